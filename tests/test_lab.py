"""experiments/lab.py: its rule, its runs and what stops them; lab_report.py: statistics against known values,
curves worked by hand, reports of incomplete results; and the further worlds of tiny/make.py."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from experiments import lab, lab_report, lora
from plumbing.logs import Log
from tiny import make
from tree import RULES, Measured, branch_points

STEPS = ["b=a+5: 1+5 so b=6", " hm ok", "c=b*6: 6*6 so c=1", " wait so c=2", "d=c*3: 2*3 so d=6", "</think>"]


# --- The rule and the summary


def test_oracle_takes_the_pivotal_steps_in_order(monkeypatch):
    response = Measured(STEPS, [0, 4, 8, 12, 15, 19], np.zeros(6), np.zeros(20), 1.0, 5)
    assert lab.oracle(response, 0.2, None) == [8, 15]
    assert "oracle" not in RULES  # only in a run of the lab
    monkeypatch.setitem(RULES, "oracle", lab.oracle)
    assert branch_points("oracle", response, 1, 0.2, 0, None) == [8]


def test_points_are_counted_by_kind_and_place():
    response = dict(family=0, start=0, steps=STEPS, step_starts=[0, 4, 8, 12, 15, 19])
    tree = {"branches": [(0, 8), (0, 9), (1, 4)], "rollouts": [response, response | {"family": 1}]}
    found = lab.points([tree])
    assert found["points"] == dict(pivotal=2, local=0, filler=1, wait=0)
    assert found["position"] == pytest.approx((2 + 2 + 1) / 6 / 3, abs=1e-4)
    assert lab.points([{"branches": [], "rollouts": []}])["position"] is None


def test_a_summary_by_hand(tmp_path):
    records = [
        dict(step=0, test_accuracy=0.4, total_tokens=0),
        dict(step=1, total_tokens=900, total_updates=1, total_problems=8, valid_sequences=10, mc_valid=0.5)
        | dict(time_step=1.0),
        dict(step=2, total_tokens=1500, total_updates=3, total_problems=9, valid_sequences=20, mc_valid=None)
        | dict(test_accuracy=0.6, time_step=2.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "rollouts.jsonl").write_text("")
    found = lab.summarised(tmp_path)
    assert (found["tokens"], found["updates"], found["accuracy"]) == ([0, 1500], [0, 3], [0.4, 0.6])
    assert found["seconds_per_step"] == 1.5
    assert (found["problems"], found["steps"], found["tokens_per_useful"], found["mixed"]) == (9, 2, 50, 0.5)


# --- Statistics


@pytest.mark.parametrize(
    "df, p, t", [(9, 0.975, 2.2622), (4, 0.975, 2.7764), (1, 0.975, 12.7062), (9, 0.8, 0.8834)]
)
def test_t_against_tables(df, p, t):
    assert lab_report.t_quantile(p, df) == pytest.approx(t, abs=1e-4)
    assert lab_report.t_tail(t, df) == pytest.approx(1 - p, abs=1e-5)
    assert lab_report.t_tail(-t, df) == pytest.approx(p, abs=1e-5)


def test_paired_statistics_by_hand():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom."""
    mean, half = lab_report.mean_and_half([1, 2, 3])
    assert (mean, half) == (2, pytest.approx(4.3027 / 3**0.5, abs=1e-4))
    assert lab_report.p_value([1, 2, 3]) == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641
    assert lab_report.detectable([1, 2, 3]) == pytest.approx((4.3027 + 1.0607) / 3**0.5, abs=1e-4)
    assert lab_report.p_value([1, 1]) == 0 and lab_report.p_value([0, 0]) == 1


def test_holm_by_hand():
    assert lab_report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert lab_report.holm([0.6, 0.7]) == [1, 1] and lab_report.holm([]) == []


def run_of(row="FCI", seed=0, world="default", accuracy=(0.4, 0.8, 0.9), **changed):
    """A summary: evaluated before training, after 100 tokens and 2 updates, after 300 and 6."""
    curve = dict(tokens=[0, 100, 300], updates=[0, 2, 6], accuracy=list(accuracy), token_budget=200)
    totals = dict(problems=9, steps=6, tokens_per_useful=50.0, mixed=0.5, position=0.25)
    points = {"points": dict(pivotal=1, local=1, filler=2, wait=0)}
    return dict(world=world, row=row, seed=seed) | curve | totals | points | {"pass@4": 0.95} | changed


def test_accuracy_and_area_by_hand():
    run = run_of()
    assert lab_report.at_end(run) == pytest.approx(0.85)  # half-way from 100 to 300 tokens
    assert lab_report.read_off(run, 1, "updates") == pytest.approx(0.6)
    assert lab_report.area(run) == pytest.approx((100 * 0.6 + 100 * 0.825) / 200)


# --- The report


def test_report_of_incomplete_results(tmp_path):
    """Rows with different numbers of seeds, one of them without branch points; pairs are of common seeds."""
    none = dict(mixed=None, position=None, points=dict.fromkeys(lab.KINDS, 0))
    summaries = [run_of("GRPO 30", 0, **none), run_of("FCI", 0), run_of("FCI", 1, accuracy=(0.4, 0.9, 1.0))]
    summaries += [run_of("random", s, accuracy=(0.4, 0.7, 0.8 - 0.1 * s)) for s in (0, 1, 2)]
    summaries += [run_of("oracle", 1, "hard")]
    text = lab_report.report(summaries, tmp_path / "lab.png")
    lines = text.splitlines()
    assert (tmp_path / "lab.png").stat().st_size > 10_000
    assert "| GRPO 30 | 1 | 85.0 | 71.2 | 95.0 | 90.0 | 6 | 9 |" in lines
    assert "| GRPO 30 | – | – | – | – | – | – | 50 |" in lines
    assert "| FCI | 25.0% | 25.0% | 50.0% | 0.0% | 0.25 | 50.0% | 50 |" in lines
    against = next(i for i, line in enumerate(lines) if "against random" in line)
    paired = [line for line in lines[against:] if line.startswith("| FCI | 2 | +17.5 ±")]
    assert len(paired) == 1  # 10 and 25 points
    assert "| GRPO 30 | 1 | +10.0 | – | – | +7.5 | – | – |" in lines[against:]
    assert "World: hard" in lines


def test_report_reads_a_file_and_writes_one(tmp_path, monkeypatch, capsys):
    """What `--report` collects from directories can be read again."""
    for seed in (1, 0):
        out = lab.directory("default", "FCI", seed, tmp_path)
        out.mkdir(parents=True)
        (out / "summary.json").write_text(json.dumps(run_of(seed=seed)))
    printed = []
    for flags in (["--report"], ["--report", str(tmp_path / "summaries.jsonl")]):
        monkeypatch.setattr(sys, "argv", ["lab.py", "--out", str(tmp_path), *flags])
        lab.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "| FCI | 2 | 85.0 ± 0.0 |" in printed[0]
    assert [s["seed"] for s in lab.lines(tmp_path / "summaries.jsonl")] == [0, 1]
    monkeypatch.setattr(sys, "argv", ["lab.py", "--out", str(tmp_path / "default"), "--report"])
    with pytest.raises(SystemExit, match="no summary"):
        lab.main()


def test_every_row_has_a_colour_of_its_own():
    assert lab_report.COLORS.keys() == lab.ROWS.keys()
    assert len(set(lab_report.COLORS.values())) == len(lab.ROWS)


# --- Runs


def arguments(out, **changed) -> argparse.Namespace:
    given = dict(out=out, worlds=["default"], rows=["GRPO 30", "oracle"], seeds=1, jobs=2)
    given |= dict(known=out / "known.jsonl", program=Path(lab.__file__))
    return argparse.Namespace(**given | dict(token_budget=6000, problems=8) | changed)


def test_runs_go_seed_by_seed_and_one_that_fails_stops_no_other(tmp_path, monkeypatch):
    done = []

    def fail_once(world, row, seed, args):
        done.append((world, row, seed))
        return "why" if (row, seed) == ("FCI", 0) else None

    monkeypatch.setattr(lab, "run_apart", fail_once)
    monkeypatch.setattr(lab, "make_world", lambda *given: None)
    args = arguments(tmp_path, worlds=["default", "few"], rows=["FCI", "late", "random"], seeds=2, jobs=1)
    assert lab.run_all(args) == ["why", "why"]
    rows = ["FCI", "late", "random"]
    assert done[:6] == [("default", row, seed) for seed in (0, 1) for row in rows]
    assert done[6:] == [("few", row, seed) for seed in (0, 1) for row in ("FCI", "random")]


def test_a_run_with_other_flags_is_a_failure(tmp_path):
    out = lab.directory("default", "FCI", 0, tmp_path)
    out.mkdir(parents=True)
    flags = " ".join(lab.flags_of("FCI", 0, arguments(tmp_path)))
    (out / "summary.json").write_text(json.dumps({"flags": flags}))
    assert lab.run_apart("default", "FCI", 0, arguments(tmp_path)) is None
    assert "choose another --out" in lab.run_apart("default", "FCI", 0, arguments(tmp_path, token_budget=7))


def test_a_run_whose_summary_is_kept_is_not_repeated(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    kept = run_of("FCI", 0) | {"flags": " ".join(lab.flags_of("FCI", 0, args))}
    args.known.write_text(json.dumps(kept) + "\n")
    assert lab.complete("default", "FCI", 0, args) and not lab.complete("default", "FCI", 1, args)
    assert lab.collect(tmp_path, args.known) == [kept]


@pytest.mark.parametrize("row", lab.ROWS)
def test_train_takes_the_flags_of_every_row(row, tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "oracle", lab.oracle)
    lab.parse_config([*lab.flags_of(row, 3, arguments(tmp_path)), "--preset", "tiny"])


@pytest.mark.slow
def test_the_lab_end_to_end(tmp_path):
    """Two rows of one seed: complete, with nothing else left, and not repeated."""
    args = arguments(tmp_path)
    assert lab.run_all(args) == []
    outs = [lab.directory("default", row, 0, tmp_path) for row in args.rows]
    assert all({path.name for path in out.iterdir()} == lab.KEPT for out in outs)
    grpo, oracle = lab.collect(tmp_path, tmp_path / "known.jsonl")
    assert oracle["points"]["pivotal"] > 0 and sum(oracle["points"].values()) == oracle["points"]["pivotal"]
    assert grpo["points"]["pivotal"] == 0 and grpo["pass@4"] >= grpo["pass@1_of_4"] > 0
    for summary in (grpo, oracle):
        assert summary["tokens"][0] == 0 and summary["tokens"][-1] > 6000 and len(json.dumps(summary)) < 2000
    written = [(out / "summary.json").stat().st_mtime_ns for out in outs]
    assert lab.run_all(args) == []
    assert written == [(out / "summary.json").stat().st_mtime_ns for out in outs]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_summary(tmp_path, monkeypatch):
    """Stopped after its first checkpoint, then before its summary."""
    monkeypatch.setitem(RULES, "oracle", lab.oracle)
    monkeypatch.setattr(lab, "SAVE_EVERY", 1)
    one = lambda name: lab.run("default", "random", 0, arguments(tmp_path / name, token_budget=15000))
    one("whole")
    append = Log.add

    def stop_at_step_2(log, name, *records):
        if any(record["step"] == 2 for record in records):
            raise KeyboardInterrupt
        append(log, name, *records)

    def stop(*given, **how):
        raise KeyboardInterrupt

    for owner, name, stopped in [(Log, "add", stop_at_step_2), (lab, "evaluate", stop)]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stopped)
            one("stopped")
        assert list(tmp_path.glob("stopped/*/*/checkpoint-1")) and not list(tmp_path.glob("stopped/*/*/su*"))
    one("stopped")
    (whole, again) = [
        lab.collect(tmp_path / name, tmp_path / "known.jsonl")[0] for name in ("whole", "stopped")
    ]
    assert whole == again and whole["steps"] > 1


# --- Worlds


FACTS = [(v, k) for v in range(1, make.MOD) for k in range(2, make.MOD)]


def made(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["make.py", *map(str, flags)])
    make.main()


def test_few_problems_are_the_first_and_the_held_out_ones_stay(tmp_path, monkeypatch):
    made(monkeypatch, "--base", TINY, "--out", tmp_path, "--n_train", 64)
    assert (tmp_path / "test.jsonl").read_bytes() == (TINY / "test.jsonl").read_bytes()
    shipped = (TINY / "train.jsonl").read_text().splitlines(keepends=True)
    assert (tmp_path / "train.jsonl").read_text() == "".join(shipped[:64])
    assert not (tmp_path / "model.safetensors").exists()


def test_without_flags_problems_are_the_shipped_ones(tmp_path, monkeypatch):
    made(monkeypatch, "--base", TINY, "--out", tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_hard_problems_are_hard(tmp_path, monkeypatch):
    """Of two samples none is right; every one has two facts that the teacher has wrong; all are different."""
    flags = "--n_train 6 --n_test 4 --hardest 0.4 --samples 2".split()
    made(monkeypatch, "--base", TINY, "--out", tmp_path, *flags)
    rows = lab.lines(tmp_path / "train.jsonl") + lab.lines(tmp_path / "test.jsonl")
    assert [len(lab.lines(tmp_path / f"{name}.jsonl")) for name in ("train", "test")] == [6, 4]
    assert len({row["problem"] for row in rows}) == 10
    monkeypatch.setattr(sys, "argv", ["make.py", "--hardest", "0.4"])
    with pytest.raises(SystemExit):
        make.main()


def test_facts_that_the_teacher_has_wrong():
    teacher = make.Teacher(0)
    wrong, known = (next(f for f in FACTS if (f in teacher.wrong) == w) for w in (True, False))
    problems = [make.Problem(value, [("*", factor), ("+", 1)]) for value, factor in (wrong, known)]
    assert [teacher.facts_wrong(problem) for problem in problems] == [[wrong], []]


# --- experiments/lora.py


def test_the_rate_is_chosen_on_its_own_seeds_and_judged_on_others():
    """Per rank the one with the largest area over seeds 0 and 1; what other seeds say has no part in it."""
    rates = {(rank, rate): i for rank in lora.RANKS for i, rate in enumerate(lora.RATES[rank])}
    best = {0: 1, 1: 2, 4: 0, 16: 1}  # of the three of each
    runs = []
    for (rank, rate), i in rates.items():
        for seed in lora.CHOOSING:
            accuracy = (0.4, 0.8 if i == best[rank] else 0.7, 0.9)
            runs.append(run_of(lora.row(rank, rate), seed, accuracy=accuracy, seconds_per_step=2.0))
        runs.append(run_of(lora.row(rank, rate), 5, accuracy=(0.4, 0.99, 0.99), seconds_per_step=2.0))
    found = lora.chosen(runs)
    assert found == {rank: lora.RATES[rank][i] for rank, i in best.items()}
    for rank in lora.RANKS:
        for seed in lora.OTHERS[1:3]:
            accuracy = (0.4, 0.6 + 0.01 * rank, 0.8)
            row = lora.row(rank, found[rank])
            runs.append(run_of(row, seed, accuracy=accuracy, seconds_per_step=2.0))
    tables = lora.report(runs)
    assert tables.count("| yes |") == 4 and "| rank 16 | 3 |" in tables and "against all weights" in tables
    for rank in lora.RANKS[1:]:  # frozen weights are all of the rest
        assert lora.state_bytes(rank) < lora.state_bytes(0) / 2


@pytest.mark.slow
def test_a_run_of_adapters_as_the_study_does_it(tmp_path, monkeypatch):
    """In a process of its own, which knows the rows of lora.py; a second call finds the summary."""
    pytest.importorskip("peft")
    monkeypatch.setattr(lab, "ROWS", lab.ROWS | lora.ROWS)
    args = arguments(tmp_path, program=Path(lora.__file__))
    job = ("default", lora.row(4, "4e-3"), 0)
    assert lab.run_apart(*job, args) is None and lab.complete(*job, args)
    (summary,) = lab.collect(tmp_path, args.known)
    assert summary["row"] == "rank 4, lr 4e-3" and summary["accuracy"][-1] > 0.1
