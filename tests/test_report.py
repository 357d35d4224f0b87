"""What a run shows: trees with all numbers, the page's data, curves.png, and lines handed to a tracker."""

import json
import math
import re
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, make_problems, make_trainer
from whole_runs import metrics, run

from fci import StepHook, step_attention, step_ids_of
from plumbing import report
from plumbing.logs import Clock, Log
from plumbing.models import load_model
from plumbing.report import AttentionHook, describe_trees
from plumbing.settings import InputError


class SeenAttention(StepHook):
    """Every layer's alpha by `fci.step_attention`, for one sequence: an independent look."""

    def __init__(self, step_ids):
        super().__init__(step_ids)
        self.seen = []

    def add_layer(self, query, key, mask, scale):
        super().add_layer(query, key, mask, scale)
        self.seen.append(step_attention(query, key, self.step_ids, self.n_steps, mask, scale)[0])


@pytest.fixture(scope="module")
def measured(tokenizer):
    """A trainer whose weights never change, and the batch of a whole step."""
    trainer = make_trainer(load_model(str(ROOT / "tiny")), tokenizer, off_policy=False, lr=0.0, kl_coef=0.0)
    due, _ = trainer.step(make_problems(tokenizer, 6), Clock())
    return trainer, due


@pytest.fixture(scope="module")
def trees(measured):
    trainer, due = measured
    return describe_trees(due, 3, trainer)


def problem_of(tree, due):
    return next(p for p in due if p.text == tree["problem"])


def test_trees_of_an_evaluation_are_several_and_the_largest_mixed_one_is_first(measured, trees):
    _, due = measured
    (short,) = describe_trees(due, 3)
    assert [t["step"] for t in trees] == [3] * report.TREES and trees[0]["problem"] == short["problem"]
    sizes = [len(t["rollouts"]) * (len({r["reward"] for r in t["rollouts"]}) > 1) for t in trees]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4
    assert describe_trees([], 3) == []


def test_other_trees_have_the_short_form(measured, trees):
    (short,) = describe_trees(measured[1], 3)
    for row, full in zip(short["rollouts"], trees[0]["rollouts"]):
        assert row == {name: full[name] for name in row}
        assert set(full) - set(row) == set(
            "tokens logps engine_gaps entropies fci_again heads attention head_attention".split()
        )


def test_numbers_of_tokens_are_those_that_were_trained_on(measured, trees):
    trainer, due = measured
    for r, row in zip(problem_of(trees[0], due).rollouts, trees[0]["rollouts"]):
        n_own = len(r.ids) - r.start
        assert "".join(row["tokens"]) == trainer.decode(r.ids[r.start :])
        assert row["logps"] == pytest.approx(r.logps[r.start :], abs=1e-4)
        assert row["engine_gaps"] == pytest.approx(r.gaps(), rel=0.1)
        assert len(row["entropies"]) == n_own and row["length"] == len(r.ids)
        if r.start == 0:
            assert row["entropies"] == pytest.approx(r.entropies, abs=1e-4)


@torch.no_grad()
def test_step_attention_is_the_maximum_over_all_heads(measured, trees):
    """Each later step's attention to step k, by fci.step_attention of the response alone."""
    trainer, due = measured
    p = problem_of(trees[0], due)
    for r, row in list(zip(p.rollouts, trees[0]["rollouts"]))[:8]:
        hook = SeenAttention(torch.tensor([step_ids_of(len(p.prompt_ids), r.steps)]))
        trainer.learner.model(torch.tensor([p.prompt_ids + r.ids]), use_cache=False, step_hook=hook)
        alpha = torch.stack(hook.seen)[..., 1:, 1:]  # (layers, H, T, T)
        largest = alpha.amax(dim=(0, 1)).numpy()
        T = len(r.steps)
        assert [len(column) for column in row["attention"]] == list(range(T - 1, -1, -1))
        for k in range(T):
            layer, head = row["heads"][k]
            assert row["attention"][k] == pytest.approx(largest[k + 1 :, k], abs=1e-4)
            assert row["head_attention"][k] == pytest.approx(alpha[layer, head, k + 1 :, k].numpy(), abs=1e-4)


def test_the_numbers_that_eq_5_sums_add_up_to_the_logged_fci(measured, trees):
    """In the head that Eq. 6 picks, from Delta = 4 steps on: what the page writes out."""
    compared = 0
    for tree in trees:
        for row in tree["rollouts"]:
            sums = np.array([sum(column[3:]) for column in row["head_attention"]])
            again = np.array(row["fci_again"])
            assert sums[again > 0] == pytest.approx(again[again > 0], abs=2e-3)
            if row["start"] == 0:  # the weights have not changed since
                assert again == pytest.approx(row["fci"], abs=1e-4)
                compared += (again > 0).sum()
    assert compared > 50


def test_a_fork_of_eq_6_keeps_its_own_fci(measured, monkeypatch):
    trainer, due = measured
    monkeypatch.setattr(StepHook, "fci", lambda self: torch.cat(self.y, dim=1).mean(dim=1))
    rows = describe_trees(due, 3, trainer)[0]["rollouts"]
    assert all(sum(row["fci_again"]) < 0.9 * sum(row["fci"]) for row in rows if row["start"] == 0)


def test_step_attention_is_bounded_in_size(measured, monkeypatch):
    """Responses of more than MAX_STEPS steps keep the numbers of their tokens only."""
    trainer, due = measured
    counts = sorted(len(r.steps) for r in due[0].rollouts)
    monkeypatch.setattr(report, "MAX_STEPS", counts[len(counts) // 2])
    seen = []

    class Watched(AttentionHook):
        def __init__(self, step_ids, **constants):
            super().__init__(step_ids, **constants)
            seen.append(self.n_steps)

    monkeypatch.setattr(report, "AttentionHook", Watched)
    rows = [row for tree in describe_trees(due[:1], 3, trainer) for row in tree["rollouts"]]
    assert {"attention" in row for row in rows} == {True, False}
    assert all(("attention" in row) == (len(row["steps"]) <= report.MAX_STEPS) for row in rows)
    assert all("logps" in row for row in rows) and max(seen) == report.MAX_STEPS + 1  # and the prompt


def test_scoring_again_draws_no_random_number(measured):
    trainer, due = measured
    before = torch.get_rng_state(), trainer.rng.bit_generator.state
    describe_trees(due, 3, trainer)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == trainer.rng.bit_generator.state


# --- The page's data


def fake_run(out, trees=(), lines=({"step": 0, "total_tokens": 0},)):
    out.mkdir(exist_ok=True)
    config = {"model": "/a/tiny", "algo": "attnrl", "seed": 0, "output_dir": str(out)}
    (out / "config.json").write_text(json.dumps(config))
    source = {"from_step": 0, "files": {"fci.py": "0"}, "commit": "abc", "machine": "one"}
    (out / "source.json").write_text(json.dumps([source]))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "rollouts.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return out


def data_of(page):
    """What the page's script reads."""
    text = page.read_text()
    data = text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_page_holds_the_runs_and_nothing_is_loaded(tmp_path):
    nasty = {"step": 1, "problem": "</script><b>&", "rollouts": []}
    lines = [{"step": 1, "total_tokens": 3, "loss": math.nan}]
    runs = [fake_run(tmp_path / "a", [nasty], lines), fake_run(tmp_path / "b")]
    report.write(runs, tmp_path / "page.html")
    first, second = data_of(tmp_path / "page.html")["runs"]
    assert (first["name"], second["name"]) == ("a", "b") and first["trees"] == [nasty]
    assert first["metrics"] == [{"step": 1, "total_tokens": 3, "loss": None}]
    assert first["source"]["commit"] == "abc" and len(first["source"]["digest"]) == 16
    text = (ROOT / "plumbing/report.html").read_text()
    for word in ("src=", "@import", "url(", "fetch(", "XMLHttpRequest", "import("):
        assert word not in text
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, no address


def test_trees_of_evaluations_come_first_where_not_all_fit(tmp_path):
    short = [{"step": step, "text": "x" * 50, "rollouts": []} for step in (1, 2, 3, 4)]
    full = [{"step": 2, "rollouts": [{"tokens": [name * 90]}]} for name in "xy"]
    out = fake_run(tmp_path / "run", [*short[:2], *full, *short[2:]])
    assert [t["step"] for t in report.collect(out, room=10**6)["trees"]] == [1, 2, 2, 2, 3, 4]
    few = report.collect(out, room=460)
    assert few["trees"] == [*full, *short[2:]] and few["left_out"] == 2
    assert report.collect(out, room=0)["trees"] == full[:1]  # the largest one is always there


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    out = fake_run(tmp_path / "run")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "total')
    assert len(report.collect(out, 10**6)["metrics"]) == 1


@pytest.mark.parametrize("missing", ["config.json", "source.json", "metrics.jsonl"])
def test_a_missing_file_is_one_clear_sentence(tmp_path, missing):
    out = fake_run(tmp_path / "run")
    (out / missing).unlink()
    with pytest.raises(InputError, match=f"cannot read {out} .*give the --output_dir of a run") as caught:
        report.collect(out, 10**6)
    assert missing in str(caught.value) and "\n" not in str(caught.value)
    said = subprocess.run(
        [sys.executable, str(ROOT / "experiments/report.py"), str(out)], capture_output=True, text=True
    )
    assert said.returncode == 1 and said.stderr.startswith("error: cannot read")
    assert len(said.stderr.splitlines()) == 1


def test_no_tree_yet_is_no_error(tmp_path):
    out = fake_run(tmp_path / "run")
    (out / "rollouts.jsonl").unlink()
    assert report.collect(out, 10**6)["trees"] == []


def test_a_page_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    out = fake_run(tmp_path / "run")
    (out / "source.json").unlink()
    report.draw(out)
    assert "was not written: cannot read" in capsys.readouterr().out
    monkeypatch.setattr(report, "rank", lambda: 1)
    report.draw(out)  # of other processes
    assert capsys.readouterr().out == ""


def test_curves_say_what_was_run(tmp_path, monkeypatch):
    lines = [
        {"step": i, "total_tokens": 10 * i, "entropy": 2 - i / 9, "response_tokens": 9} for i in (0, 1, 2)
    ]
    out = fake_run(tmp_path / "run", lines=lines)
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: drawn.append((self, path)))
    report.plot_curves(out)
    ((figure, path),) = drawn
    assert path == out / "curves.png" and figure.get_suptitle() == "attnrl on tiny, seed 0: step 2, 20 tokens"
    titles = {axis.get_title(): axis for axis in figure.axes}
    drift = titles["drift: ratio to the first step"].lines
    assert [line.get_ydata()[0] for line in drift] == [1, 1] and drift[0].get_ydata()[-1] == pytest.approx(
        8 / 9
    )
    assert titles["length (tokens per response)"].lines[0].get_ydata()[0] == 9


# --- Trackers


def fake_tracker(monkeypatch, name, log):
    """A module that is imported under the name of a tracker, and the calls that it got."""
    calls, module = [], ModuleType(name)
    module.init = lambda **how: calls.append(how)
    module.log = lambda line: (calls.append(line), log(line))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_lines_go_to_a_tracker(tmp_path, monkeypatch, name):
    out = fake_run(tmp_path / "run")
    calls = fake_tracker(monkeypatch, name, lambda line: None)
    log = Log(out, {}, name)
    log.add("metrics.jsonl", {"step": 1, "loss": 0.5, "problem_fci": [1.0], "mc_valid": None})
    log.add("rollouts.jsonl", {"step": 1})
    log.add("metrics.jsonl", {"step": 2, "loss": 0.25})
    about, *lines = calls
    assert about["project"] == "attnrl" and about["name"] == "run" and about["config"]["algo"] == "attnrl"
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_tensorboard_gets_scalars(tmp_path, monkeypatch):
    written, module = [], ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *what):
            written.append((self.folder, *what))

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    out = fake_run(tmp_path / "run")
    Log(out, {}, "tensorboard").add("metrics.jsonl", {"step": 3, "loss": 0.5})
    folder = str(out / "tensorboard")
    assert written == [(folder, "step", 3, 3), (folder, "loss", 0.5, 3)]


def test_a_tracker_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    out = fake_run(tmp_path / "run", lines=[])
    calls = fake_tracker(monkeypatch, "wandb", lambda line: 1 / 0)
    log = Log(out, {}, "wandb")
    for step in (1, 2):
        log.add("metrics.jsonl", {"step": step})
    assert len(calls) == 2  # init, and the line that failed
    assert capsys.readouterr().out.count("track=wandb failed and is left alone (ZeroDivisionError") == 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == log.lines["metrics.jsonl"] == 2


def test_a_tracker_that_is_not_installed_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)  # importing it fails
    Log(fake_run(tmp_path / "run"), {}, "trackio").add("metrics.jsonl", {"step": 1})
    assert "track=trackio failed" in capsys.readouterr().out


def test_no_tracker_is_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.logs.import_module", lambda name: pytest.fail(f"imported {name}"))
    Log(fake_run(tmp_path / "run"), {}).add("metrics.jsonl", {"step": 1})


# --- Whole runs


@pytest.mark.slow
def test_a_run_writes_its_page_and_hands_its_metrics_over(tmp_path, monkeypatch):
    calls = fake_tracker(monkeypatch, "trackio", lambda line: None)
    out = tmp_path / "run"
    run("--output_dir", out, "--steps", 3, "--track", "trackio")
    (page,) = data_of(out / "report.html")["runs"]
    assert [m["step"] for m in page["metrics"]] == [0, 0, 1, 2, 3] and len(calls) == 6
    assert page["metrics"] == [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [t["step"] for t in page["trees"]]
    full = {t["step"] for t in page["trees"] if "tokens" in t["rollouts"][0]}
    assert set(steps) == {1, 2, 3} and full == {2, 3} and steps.count(1) == 1 < steps.count(2)
    assert page["source"]["machine"] and (out / "report.html").stat().st_size < 2e6
    plain = tmp_path / "plain"
    run("--output_dir", plain, "--steps", 3)
    assert metrics(plain) == metrics(out)
