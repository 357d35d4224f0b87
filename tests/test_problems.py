"""Problems from files and hub datasets: what is read, and what is refused in one sentence."""

import json

import numpy as np
import pytest

from plumbing.problems import load_problems, stream


def test_answers_may_mix_text_numbers_and_lists(tmp_path):
    rows = [
        {"problem": "p\u2028q", "answer": "1\n"},
        {"problem": "r", "answer": 2.5},
        {"problem": "s", "answer": [3, "4"], "extra": None},
    ]
    expected = [
        {"problem": "p\u2028q", "answers": ["1"]},
        {"problem": "r", "answers": ["2.5"]},
        {"problem": "s", "answers": ["3", "4"]},
    ]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    table.write_text(json.dumps(rows), encoding="utf-8")
    assert load_problems(str(lines)) == expected
    assert load_problems(str(table)) == expected


def test_parquet_files_and_hub_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"problem": "p", "answer": ["1", "2"]}])
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert load_problems(str(tmp_path / "a.parquet")) == [{"problem": "p", "answers": ["1", "2"]}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {("org/name", "test"): table}[name, split]
    )
    assert load_problems("org/name", "test") == [{"problem": "p", "answers": ["1", "2"]}]
    with pytest.raises(ValueError, match="cannot read 'org/nome', split 'test'"):
        load_problems("org/nome", "test")


def test_rows_of_the_hub_without_a_usable_answer_are_left_out_and_counted(monkeypatch, capsys):
    """In a local file the same row is an error; so is a dataset without any usable row."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"problem": "p", "answer": "1"},
        {"problem": "q", "answer": None},
        {"problem": " ", "answer": "2"},
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    assert load_problems("org/name") == [{"problem": "p", "answers": ["1"]}]
    said = "2 of 3 rows of org/name are left out; the first: row 2 of org/name has the answer None"
    assert capsys.readouterr().out.startswith(said)
    del rows[0]
    with pytest.raises(ValueError, match="row 1 of org/name has the answer None"):
        load_problems("org/name")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.jsonl", None, "none.jsonl.*No such file"),
        ("none.parquet", None, "none.parquet"),
        ("empty.jsonl", "\n", "empty.jsonl holds no problems"),
        ("empty.json", "", "empty.json holds no problems"),
        ("cut.jsonl", '{"problem": "p", "ans', "cannot read .*cut.jsonl"),
        ("latin.json", "\udce9", "cannot read .*latin.json"),
        ("bad.parquet", "PAR", "cannot read .*bad.parquet"),
        ("table.json", '{"problem": "p", "answer": "1"}', "table.json.*needs a list of rows"),
        ("list.jsonl", "[1]", r"row 1 of .*list.jsonl has \[1\]"),
        ("columns.jsonl", '{"question": "p", "answer": "1"}', "columns question, answer; it needs `problem`"),
        ("problem.jsonl", '{"problem": " ", "answer": "1"}', "row 1 of .* has the problem ' '"),
        ("number.jsonl", '{"problem": 1, "answer": "1"}', "has the problem 1"),
        (
            "second.jsonl",
            '{"problem": "p", "answer": "1"}\n{"problem": "p", "answer": ""}',
            "row 2 of .* has the answer ''",
        ),
        ("none.jsonl", '{"problem": "p", "answer": null}', "has the answer None"),
        ("bool.jsonl", '{"problem": "p", "answer": true}', "has the answer True"),
        ("nolist.jsonl", '{"problem": "p", "answer": []}', r"has the answer \[\]"),
    ],
)
def test_bad_data_gives_one_clear_sentence(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        load_problems(str(path))
    assert "\n" not in str(error.value)


def test_the_stream_visits_every_problem_once_per_epoch_wherever_it_is_cut():
    """Epoch e is the permutation of the generator that seed and e make: runs of older commits go on alike."""
    problems = [{"problem": str(i)} for i in range(5)]
    orders = [np.random.default_rng([3, epoch]).permutation(5) for epoch in range(4)]
    expected = [problems[i] for order in orders for i in order]
    assert stream(problems, 3, 0, 20) == expected and len({tuple(order) for order in orders}) == 4
    for start in range(20):
        for stop in range(start, 21):
            assert stream(problems, 3, start, stop) == expected[start:stop]
    assert stream(problems, 4, 0, 20) != expected
