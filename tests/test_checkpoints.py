"""Checkpoints: complete or not there, checked byte by byte, and resumed from to the same bits."""

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from whole_runs import FLAGS, command, everything, forbid_loading, largest_file, metrics, run, words_of_main

from attnrl import AttnRL
from plumbing import checkpoints as checkpoints_module
from plumbing import logs
from plumbing.checkpoints import (
    checkpoints,
    closing_directories,
    digest,
    open_directory,
    read_state,
    restore,
)
from plumbing.learner import Learner
from plumbing.settings import InputError
from plumbing.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory of a run of four steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command("--output_dir", out, "--steps", 4), check=True, capture_output=True, cwd=ROOT)
    return out


def rewound(out, uninterrupted):
    """The uninterrupted run as it was after checkpoint-2; later lines of its logs are still there, one of
    them torn."""
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "checkpoint-3")
    shutil.rmtree(out / "checkpoint-4")
    os.truncate(out / "metrics.jsonl", (out / "metrics.jsonl").stat().st_size - 10)
    with (out / "rollouts.jsonl").open("ab") as file:
        file.write(b"\xff\x00 not a line that json or utf-8 knows")
    return out


def assert_ended_alike(out, uninterrupted):
    assert everything(out / "checkpoint-4") == everything(uninterrupted / "checkpoint-4")
    assert metrics(out) == metrics(uninterrupted)
    assert (out / "rollouts.jsonl").read_text() == (uninterrupted / "rollouts.jsonl").read_text()


# --- resuming

KILLED = """
import os, signal, sys
import train
from attnrl import AttnRL
from plumbing import checkpoints

moment, out = sys.argv.pop(1), sys.argv[-1]
step, digest = AttnRL.step, checkpoints.digest

def step_until_killed(self, *args):
    result = step(self, *args)
    if moment == "between checkpoints" and os.path.exists(f"{out}/checkpoint-2"):
        os.kill(os.getpid(), signal.SIGKILL)  # sampled, trained, and lost
    return result

def digest_until_killed(path):
    if moment == "during a checkpoint" and os.path.exists(f"{out}/checkpoint-1"):
        os.kill(os.getpid(), signal.SIGKILL)  # no digests.json yet
    return digest(path)

AttnRL.step, checkpoints.digest = step_until_killed, digest_until_killed
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between checkpoints", "during a checkpoint"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, moment):
    """experiments/kill_resume.py does so at random moments."""
    out = tmp_path / "run"
    flags = ("--steps", 4, "--output_dir", out)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", KILLED, moment, *FLAGS, *map(str, flags)]
    killed = subprocess.run(program, capture_output=True, cwd=ROOT, env=environment)
    assert killed.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    reached = {p.name for p in out.glob("checkpoint*")}
    if moment == "between checkpoints":
        assert reached == {"checkpoint-1", "checkpoint-2"}
    else:
        assert reached == {"checkpoint-1", "checkpoint.partial"}
    subprocess.run(command(*flags), check=True, capture_output=True, cwd=ROOT)
    assert_ended_alike(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3])  # the first call only samples
def test_sigterm_saves_at_the_end_of_the_step_and_a_second_one_would_kill(
    tmp_path, uninterrupted, monkeypatch, call
):
    """No checkpoint is due before the end: the one that the resumed run starts from is the signal's."""
    out, step, calls = tmp_path / "run", AttnRL.step, []
    flags = ("--output_dir", out, "--steps", 4, "--save_every", 9)

    def step_with_signal(self, new, clock):
        calls.append(new)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return step(self, new, clock)

    monkeypatch.setattr(AttnRL, "step", step_with_signal)
    said = words_of_main(monkeypatch, *flags)
    resumes = f"the same command resumes from {out}/checkpoint-{call - 1}"
    assert said == f"stopped: SIGTERM ended the run after step {call - 1}; {resumes}"
    assert [p.name for p in checkpoints(out)] == [f"checkpoint-{call - 1}"] and not (
        out / "traceback.txt"
    ).exists()
    run(*flags)
    assert_ended_alike(out, uninterrupted)


def not_finite(self, sequences, loss, divisors):
    """Learner.accumulate where every gradient is NaN."""
    for parameter in self.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    return {"loss": 0.0, "clipped": 0.0, "kl": 0.0, "read": 1.0, "slots": 1.0}


@pytest.mark.slow
def test_what_breaks_on_the_way_is_one_sentence_and_the_same_command_ends_with_the_same_bits(
    tmp_path, uninterrupted, monkeypatch
):
    """A full disk while the log or either large file of a checkpoint is written, a dead engine, gradients
    that are not finite."""
    out = rewound(tmp_path / "run", uninterrupted)
    intact = {p.name: digest(p) for p in (out / "checkpoint-2").iterdir()}
    flags = ("--output_dir", out, "--steps", 4)
    kept_lines = b"".join((out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:4])

    def stopped(*reasons):
        said = words_of_main(monkeypatch, *flags)
        resumes = f"; the same command resumes from {out}/checkpoint-2"
        assert said.startswith("stopped: ") and said.endswith(resumes), said
        assert all(reason in said for reason in reasons), said
        assert {p.name: digest(p) for p in (out / "checkpoint-2").iterdir()} == intact
        assert [p.name for p in checkpoints(out)][-1] == "checkpoint-2"
        assert not (out / "checkpoint.partial").exists()

    no_room = ("cannot write checkpoint-3", f"make room in {out}")
    for module, name, size, *reasons in (
        (logs, "append", len(kept_lines) + 10, "OSError: [Errno 27]", "traceback.txt"),
        (checkpoints_module, "save_checkpoint", 500_000, *no_room),  # bytes: within the weights
        (checkpoints_module, "save_checkpoint", 1_500_000, *no_room),  # within the optimiser
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, largest_file(size)(getattr(module, name)))
            stopped(*reasons)
    assert (out / "traceback.txt").read_text().count("Errno 27")
    assert (out / "metrics.jsonl").read_bytes().startswith(kept_lines)

    def dead(self, requests, *args, **kwargs):
        if len(requests) > 8:  # not those of verify_sync
            raise RuntimeError("the core\nis dead")
        return generate(self, requests, *args, **kwargs)

    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", dead)
    stopped("RuntimeError: the core is dead", f"{out}/traceback.txt")
    assert ", in dead" in (out / "traceback.txt").read_text()
    monkeypatch.setattr(TorchEngine, "generate", generate)

    monkeypatch.setattr(Learner, "accumulate", not_finite)
    flags = (*flags, "--max_skipped_updates", 1)
    stopped("1 updates in a row had a loss or gradient that is not finite", f"see {out}/nonfinite-3.json")
    assert_is_a_minibatch(json.loads((out / "nonfinite-3.json").read_text()))
    monkeypatch.undo()

    run(*flags)
    assert_ended_alike(out, uninterrupted)


def assert_is_a_minibatch(sequences):
    """At most two problems, all of their rollouts, outcomes mixed, and what the loss needs of each token."""
    problems = {}
    for s in sequences:
        problems.setdefault(tuple(s["prompt_ids"]), []).append(s)
        assert s["per_token"].keys() == {"old_logps", "engine_logps", "advantages"}
        assert all(len(values) == len(s["response_ids"]) > 0 for values in s["per_token"].values())
    assert 0 < len(problems) <= 2
    for rollouts in problems.values():
        advantages = [a for s in rollouts for a in s["per_token"]["advantages"]]
        assert len(rollouts) >= 3 and min(advantages) < 0 < max(advantages)  # group_size 3


@pytest.mark.slow
def test_updates_skipped_in_a_row_are_counted_across_checkpoints(tmp_path, uninterrupted, monkeypatch):
    out = rewound(tmp_path / "run", uninterrupted)
    monkeypatch.setattr(Learner, "accumulate", not_finite)
    run("--output_dir", out, "--steps", 3, "--max_skipped_updates", 99)
    before, last = metrics(out)[-2:]
    assert last["skipped_updates"] >= 1 and last["total_updates"] == before["total_updates"]
    assert "loss" not in last
    weights = [(out / f"checkpoint-{n}/model.safetensors").read_bytes() for n in (2, 3)]
    assert weights[0] == weights[1]
    count = json.loads((out / "checkpoint-3/state.json").read_text())["skipped_in_a_row"]
    assert count == last["skipped_updates"]
    calls = []
    monkeypatch.setattr(Learner, "accumulate", lambda *args: (calls.append(args), not_finite(*args))[1])
    flags = ("--output_dir", out, "--steps", 4, "--max_skipped_updates", count + 1)
    said = words_of_main(monkeypatch, *flags)
    assert len(calls) == 1 and f"{count + 1} updates in a row" in said
    assert said.endswith(f"resumes from {out}/checkpoint-3")


@pytest.mark.slow
def test_a_finished_run_can_be_extended_and_memory_knobs_may_change(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    others = ("--microbatch_tokens", 999, "--engine", "torch", "--max_engine_gap", 0.3)
    run("--output_dir", out, "--steps", 5, *others)
    assert metrics(out)[: len(metrics(uninterrupted))] == metrics(uninterrupted)
    assert metrics(out)[-1]["step"] == 5 and (out / "checkpoint-5").exists()


@pytest.mark.slow
def test_other_settings_are_refused_and_change_nothing(uninterrupted):
    before = (uninterrupted / "config.json").read_text()
    with pytest.raises(InputError, match=r"clip_high \(0.28 -> 0.5\)"):
        run("--output_dir", uninterrupted, "--steps", 4, "--clip_high", 0.5)
    assert (uninterrupted / "config.json").read_text() == before


@pytest.mark.slow
def test_a_place_that_cannot_be_written_to_is_refused_before_the_model_loads(
    tmp_path, uninterrupted, monkeypatch
):
    """A new directory and one with a run in it, whose config.json is there already."""
    forbid_loading(monkeypatch)
    monkeypatch.setattr(checkpoints_module, "prepare", largest_file(0)(checkpoints_module.prepare))
    old = shutil.copytree(uninterrupted, tmp_path / "old")
    for out in (tmp_path / "new", old):
        with pytest.raises(InputError, match="cannot use .* another --output_dir"):
            run("--output_dir", out, "--steps", 5)
    for path in uninterrupted.rglob("*"):
        same = old / path.relative_to(uninterrupted)
        assert path.is_dir() or same.read_bytes() == path.read_bytes(), path
    # Nothing half written that would stand in the way later.
    assert not (tmp_path / "new/config.json").exists()


# --- files


def test_half_written_checkpoints_are_not_taken_for_one(tmp_path):
    for name in ("checkpoint.partial", "checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_before_the_model_loads(tmp_path, uninterrupted, monkeypatch):
    out = rewound(tmp_path / "run", uninterrupted)
    weights, logged = out / "checkpoint-2/model.safetensors", (out / "metrics.jsonl").read_bytes()
    weights.write_bytes(weights.read_bytes()[:1000])
    forbid_loading(monkeypatch)
    sentence = "checkpoint-2 is damaged .model.safetensors: .*delete it to resume from the one before"
    with pytest.raises(InputError, match=sentence):
        run("--output_dir", out, "--steps", 4)
    assert (out / "metrics.jsonl").read_bytes() == logged


@pytest.mark.slow
def test_every_file_of_a_checkpoint_is_checked(tmp_path, uninterrupted):
    """Each truncated, emptied, deleted, and with a bit flipped at its start, in its middle and at its end."""
    checkpoint = shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    expected = read_state(checkpoint)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert {"model.safetensors", "optimizer.pt", "state.json", "digests.json"} <= set(names)
    assert {"config.json", "tokenizer.json"} <= set(names)
    for path in [checkpoint / name for name in names]:
        data = path.read_bytes()
        flips = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in (0, len(data) // 2, len(data) - 1)]
        for damaged in (data[: len(data) // 2], data[:-1], b"", None, *flips):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InputError, match="checkpoint-4 is damaged") as caught:
                read_state(checkpoint)
            said = str(caught.value)
            assert "\n" not in said and "delete it to resume from the one before" in said
            # In the middle of digests.json stands another file's name or digest.
            if path.name != "digests.json" or damaged != flips[1]:
                assert path.name in said
            path.write_bytes(data)
    assert read_state(checkpoint) == expected


@pytest.mark.slow
def test_everything_is_on_the_disk_before_an_older_checkpoint_goes(tmp_path, monkeypatch):
    out, sync, synced, fsync, lines = tmp_path / "run", checkpoints_module.sync, [], os.fsync, []

    def record_sync(path):
        synced.append((path, [p.name for p in checkpoints(out)]))
        sync(path)

    def record_fsync(descriptor):
        lines.append(len(synced))
        fsync(descriptor)

    monkeypatch.setattr(checkpoints_module, "sync", record_sync)
    monkeypatch.setattr(os, "fsync", record_fsync)
    run("--algo", "grpo", "--output_dir", out, "--steps", 2, "--keep_checkpoints", 1)
    second = synced[len(synced) // 2 :]
    names = {p.name for p in (out / "checkpoint-2").iterdir()}
    assert {path.name for path, _ in second[:-1]} == names | {"checkpoint.partial"}
    assert all(found == ["checkpoint-1"] for _, found in second[:-1])
    assert second[-1] == (out, ["checkpoint-1", "checkpoint-2"])
    assert [p.name for p in checkpoints(out)] == ["checkpoint-2"]
    # Two log lines of the second step before its checkpoint, and the rename of the first.
    assert lines.count(len(synced) // 2) == 2 + 1


# --- nothing is unpickled

SOURCES = [
    path for folder in ("", "plumbing/", "experiments/", "tiny/") for path in ROOT.glob(f"{folder}*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    modules |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not modules & {"pickle", "shelve", "joblib", "dill", "cloudpickle"}
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    for call in (n for n in calls if ast.unparse(n.func) == "torch.load"):
        safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
        assert safe, ast.unparse(call)
    assert not any(k.arg in ("allow_pickle", "trust_remote_code") for n in calls for k in n.keywords)


def test_the_sources_that_are_scanned_are_all():
    """Among them is the one that loads checkpoints, and it does so by the name that the scan looks for."""
    found = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"train.py", "plumbing/checkpoints.py", "experiments/kill_resume.py", "tiny/make.py"} <= found
    assert "torch.load(" in (ROOT / "plumbing/checkpoints.py").read_text()


@pytest.mark.slow
def test_weights_are_safetensors(uninterrupted):
    suffixes = {p.suffix for p in (uninterrupted / "checkpoint-4").iterdir()}
    # .pt is what torch.load reads with weights_only
    assert suffixes == {".safetensors", ".pt", ".json", ".jinja"}


def test_a_malicious_optimizer_is_not_executed(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"optimizer": Malice()}, tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match="weights_only"):
        restore(None, tmp_path, {})
    assert not (tmp_path / "hacked").exists()


def test_ctrl_c_is_one_sentence(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(AttnRL, "step", interrupted)
    said = words_of_main(monkeypatch, "--output_dir", tmp_path / "run", "--steps", 4)
    assert said == "stopped: Ctrl-C; the same command starts the run again"
    assert not (tmp_path / "run/traceback.txt").exists()


# --- One run, one directory; edited code is another run


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    """Two identical commands at once: one runs, the other says so in one sentence and touches nothing."""
    out = tmp_path / "run"
    flags = ("--output_dir", out, "--steps", 30)
    first = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        while not (out / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        second = subprocess.run(command(*flags), capture_output=True, text=True, cwd=ROOT)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1 and second.stdout == ""
    *before, last = second.stderr.splitlines()
    assert last == f"error: {out} is in use by another run: wait for it, or choose another --output_dir"
    assert all("train_data" in line for line in before)  # on a slow machine, its progress bar
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["total_tokens"] for line in lines if line.endswith("}")]
    assert len(steps) == len(set(steps))  # no line twice
    with FileLock(out / "lock", blocking=False):  # no Timeout: the killed run holds it no longer
        pass


@pytest.mark.slow
def test_a_second_torchrun_in_the_same_directory_is_refused(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / "lock"):
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*ranks, *command("--output_dir", out)[1:]], capture_output=True, text=True, cwd=ROOT
        )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(said) == 1 and "in use by another run" in said[0]


@pytest.mark.slow
def test_edited_code_is_not_taken_for_the_old_run(tmp_path, uninterrupted, monkeypatch):
    """Complete or not: the same command names the file, and goes on only if told that it is the same run."""
    forbid_loading(monkeypatch)
    monkeypatch.setattr(checkpoints_module, "ROOT", tmp_path / "project")
    for name in ("fci.py", "tree.py", "plumbing/logs.py"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "source.json").unlink()  # that of the real sources
    flags = ("--output_dir", out, "--steps", 4)
    run(*flags)  # complete; records the digests
    before = (out / "metrics.jsonl").read_bytes()
    (tmp_path / "project/fci.py").write_text("# edited")
    (tmp_path / "project/plumbing/new.py").write_text("# new")
    for steps in (4, 5):
        with pytest.raises(
            InputError, match=r"^fci.py, plumbing/new.py changed since .*another --output_dir"
        ) as caught:
            run("--output_dir", out, "--steps", steps)
        assert "--same_run true" in str(caught.value) and "\n" not in str(caught.value)
    assert (out / "metrics.jsonl").read_bytes() == before
    run(*flags, "--same_run", "true")
    run(*flags)  # the new digests are on record, beside the old ones and the step from which on they hold
    history = json.loads((out / "source.json").read_text())
    assert [entry["from_step"] for entry in history] == [0, 4]
    assert history[0]["files"]["fci.py"] != history[1]["files"]["fci.py"]


@pytest.mark.slow
def test_a_run_records_a_digest_of_every_source_file(uninterrupted):
    (entry,) = json.loads((uninterrupted / "source.json").read_text())
    recorded = entry["files"]
    assert {"fci.py", "train.py", "plumbing/learner.py"} <= recorded.keys() and len(recorded) == 6 + len(
        list(ROOT.glob("plumbing/*.py"))
    )
    assert recorded["fci.py"] == hashlib.sha256((ROOT / "fci.py").read_bytes()).hexdigest()


def test_the_settings_kept_are_those_of_the_last_start(tmp_path):
    """A longer run, say: the page and a reader see what is so now; what may not change stays."""
    for settings in ({"lr": 1, "steps": 5}, {"lr": 1, "steps": 8}):
        with closing_directories():
            open_directory(tmp_path, "config.json", settings, "run", {"steps"})
        assert json.loads((tmp_path / "config.json").read_text()) == settings
    with pytest.raises(InputError, match="lr"), closing_directories():
        open_directory(tmp_path, "config.json", {"lr": 2, "steps": 9}, "run", {"steps"})
    assert json.loads((tmp_path / "config.json").read_text()) == settings
