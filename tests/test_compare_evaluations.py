"""Two results compared: the table, what is refused, and the width of the bootstrap interval."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.compare_evaluations import bootstrap, compare, main, responses


def results(path: Path, per_problem: dict[str, list[float]], **settings) -> str:
    sizes = {name: {"problems": len(x), "samples": 4, "sha256": "0"} for name, x in per_problem.items()}
    settings = {"max_new_tokens": 9, "temperature": 0.6, "top_p": 1.0, "benchmarks": sizes} | settings
    scores = {name: {"per_problem": x} for name, x in per_problem.items()}
    path.write_text(json.dumps({"settings": settings, "results": scores}), encoding="utf-8")
    return str(path)


def test_compare(tmp_path):
    a = results(tmp_path / "a.json", {"m": [0, 0.5, 1, 1], "n": [0.25]}, seed=0)
    b = results(tmp_path / "b.json", {"m": [0.5, 1, 1, 1], "n": [0]}, seed=1)
    table = [line.split() for line in compare(a, b)]
    assert table[1][:4] == ["m", "62.5", "87.5", "+25.0"]
    assert table[2] == ["n", "25.0", "0.0", "-25.0", "[-25.0,", "-25.0]"]
    assert table[3][:4] == ["average", "43.8", "43.8", "+0.0"]
    assert compare(a, b) == compare(a, b) and compare(a, a)[1].endswith("+0.0   [+0.0, +0.0]")
    others = {"temperature": {"temperature": 1.0}, "max_new_tokens": {"max_new_tokens": 8}}
    for name, other in (others | {"sha256": {"benchmarks": {}}}).items():
        c = results(tmp_path / "c.json", {"m": [0.5, 1, 1, 1], "n": [0]}, **other)
        with pytest.raises(ValueError, match=f"{name}.*evaluate both alike"):
            compare(a, c)
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a results.json"):
        compare(a, str(tmp_path / "d.json"))


def test_main_prints_the_table_or_one_sentence(tmp_path, monkeypatch, capsys):
    a = results(tmp_path / "a.json", {"m": [0, 1]})
    monkeypatch.setattr(sys, "argv", ["compare_evaluations.py", a, a])
    main()
    assert capsys.readouterr().out.splitlines() == compare(a, a)
    monkeypatch.setattr(sys, "argv", ["compare_evaluations.py", a, "b.json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code.startswith(f"error: cannot compare {a} with b.json (FileNotFoundError")
    assert "\n" not in caught.value.code


def test_responses_of_both_to_the_same_problems(tmp_path, monkeypatch, capsys):
    """The first sample of each problem, without blank lines; what cannot be read is one sentence."""
    sample = lambda i, k, x: {"problem": i, "sample": k, "verdict": f"{x}{i}", "response": f"{x}\n\n{i}{k}"}
    paths = []
    for x in "ab":
        (tmp_path / x).mkdir()
        paths.append(results(tmp_path / x / "results.json", {"m": [0, 1, 0]}))
        rows = [json.dumps(sample(i, k, x)) for i in range(2) for k in range(2)]
        (tmp_path / x / "m.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(sys, "argv", ["compare_evaluations.py", *paths, "--show", "2"])
    main()
    table, shown = compare(*paths), capsys.readouterr().out.splitlines()
    expected = [f"m, problem {i}, {x.upper()}: {x}{i}|    {x}|    {i}0" for i in range(2) for x in "ab"]
    assert shown == table + "|".join(expected).split("|")
    with pytest.raises(ValueError, match="cannot read problem 2 of .*a/m.jsonl"):
        responses(*paths, 3)
    assert len(responses(*paths, 1)) == 6


def test_the_bootstrap_interval_has_its_width():
    d = np.random.default_rng(1).normal(0.1, 0.3, size=400)
    low, high = bootstrap([d])
    half = 1.96 * d.std() / 20
    assert low == pytest.approx(d.mean() - half, abs=0.004)
    assert high == pytest.approx(d.mean() + half, abs=0.004)
    # The average of two benchmarks: resampled apart, so that the width shrinks by sqrt(2).
    low, high = bootstrap([d, -d])
    assert high == pytest.approx(half / 2**0.5, abs=0.004)
    assert low == pytest.approx(-half / 2**0.5, abs=0.004)
