"""`python experiments/gpu_check.py --small` on a CPU: all checks run and can fail; a failure stops no other.

What only CUDA does (peaks of its allocator, sleep) runs on functions that stand in for it.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments import gpu_check
from plumbing.torch_engine import TorchEngine

if torch.cuda.is_available():
    pytest.skip("these tests say what a CPU answers", allow_module_level=True)

QUICK = [name for name in gpu_check.CHECKS if name not in ("train", "vllm")]


@pytest.fixture
def s(tmp_path):
    return gpu_check.Setting(tmp_path, small=True)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The program: (exit status, lines that it prints, its JSON file)."""

    def run(*flags):
        out = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--small", "--output", str(out), *flags])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        return ended.value.code, capsys.readouterr().out.splitlines(), json.loads(out.read_text())

    return run


def test_a_cpu_answers_all_but_whole_runs(run):
    code, lines, report = run("--skip", "train", "vllm")
    found = report["checks"]
    assert code == 0 and list(found) == QUICK and len(lines) == len(QUICK) + 2
    statuses = {name: check["status"] for name, check in found.items()}
    assert statuses == {name: "measured" if name in ("speed", "shapes") else "ok" for name in QUICK}
    assert lines[-1] == "5 checks passed, 2 only measured, 0 failed, 0 skipped"
    assert all(check["numbers"] for check in found.values())
    assert report["versions"]["torch"] == torch.__version__
    assert found["kernel"]["numbers"]["FCI"] == ["flash_attention_for_cpu"]
    assert found["bf16"]["numbers"]["gap_nats"] > 1e-4 > found["decode"]["numbers"]["gap_nats"]
    assert all(0 < found["speed"]["numbers"][k]["share_of_peak"] for k in ("score", "reference", "update"))


@pytest.mark.slow
def test_as_an_owner_runs_it(tmp_path):
    """A process of its own, train.py included."""
    command = [sys.executable, str(ROOT / "experiments/gpu_check.py"), "--small", "--skip", "vllm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(json.loads((tmp_path / "gpu_check.json").read_text())["checks"]) == [*QUICK, "train"]
    assert "held-out problems" in done.stdout and "0 failed" in done.stdout


def test_a_check_that_fails_or_raises_stops_no_other(run, monkeypatch):
    def out_of_memory(s):
        raise torch.OutOfMemoryError("tried\nto allocate")

    def not_here(s):
        raise gpu_check.Skipped("no such device")

    checks = dict(a=out_of_memory, b=lambda s: (False, "too far", {"x": 1}), c=not_here)
    checks |= dict(d=lambda s: (True, "near", {}))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    code, lines, report = run()
    assert code == 1 and lines[-1] == "1 checks passed, 0 only measured, 2 failed, 1 skipped"
    assert lines[1].startswith("FAILED   a: OutOfMemoryError: tried to allocate (")
    assert lines[2].startswith("FAILED   b: too far (") and report["checks"]["b"]["numbers"] == {"x": 1}
    assert lines[3].startswith("skipped  c: no such device (") and lines[4].startswith("ok       d: near (")
    assert run("--only", "c", "d")[0] == 0


def test_without_a_gpu_the_large_model_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check, "ON_GPU", False)
    with pytest.raises(SystemExit, match="error: PyTorch finds no CUDA device: pass --small"):
        gpu_check.main()


def test_the_large_model_is_the_papers(tmp_path):
    large = gpu_check.Setting(tmp_path, small=False)
    assert large.shape.parameters == 1_777_088_000 and large.longest == large.lengths[-1] == 9216


# --- Each check can fail


def test_the_kernel_that_writes_the_matrix_down_is_a_failure(s):
    with sdpa_kernel(SDPBackend.MATH):
        passed, line, names = gpu_check.check_kernel(s)
    assert passed is False and set(names) == {"FCI", "scoring", "training"}
    assert all(kernels == ["attention_math"] for kernels in names.values())


def test_the_kernel_of_fci_alone_is_seen(s, monkeypatch):
    """The model's own attention is flash; only the hook's calls are not."""
    add_layer = gpu_check.StepHook.add_layer

    def with_math(self, *args):
        with sdpa_kernel(SDPBackend.MATH):
            add_layer(self, *args)

    monkeypatch.setattr(gpu_check.StepHook, "add_layer", with_math)
    passed, _, names = gpu_check.check_kernel(s)
    assert passed is False and names["FCI"] == ["attention_math"] != names["scoring"] == names["training"]


def test_memory_away_from_the_plan_is_a_failure(s, monkeypatch):
    measure = gpu_check.memory_plan.measure
    more_in_updates = lambda *args: [size * factor for size, factor in zip(measure(*args), (1, 2, 2))]
    monkeypatch.setattr(gpu_check.memory_plan, "measure", more_in_updates)
    assert gpu_check.check_memory(s)[0] is False
    monkeypatch.setattr(gpu_check, "planned_fci", lambda *args: 0)
    assert gpu_check.check_fci(s)[0] is False


@pytest.mark.parametrize("name", ["bf16", "decode"])
def test_a_gap_above_the_bound_is_a_failure(s, name):
    s.method.max_engine_gap = 1e-9
    assert gpu_check.CHECKS[name](s)[0] is False


def test_a_run_that_fails_or_learns_nothing_is_a_failure(s, monkeypatch):
    accuracies = [0.4, 0.3, 0.49]

    def trained(command, **settings):
        out = s.folder / "run"
        out.mkdir(exist_ok=True)
        assert command[-1] == str(out)
        lines = [json.dumps({"step": i, "test_accuracy": a}) for i, a in enumerate(accuracies)]
        (out / "metrics.jsonl").write_text("\n".join(lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", trained)
    s.small = False
    assert gpu_check.check_train(s)[:2] == (False, "40.0% -> 49.0% of the held-out problems in 2 steps")
    accuracies[-1] = 0.51
    assert gpu_check.check_train(s)[0] is True
    failed = subprocess.CompletedProcess([], 1, stderr="bar\nerror: why")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: failed)
    assert gpu_check.check_train(s)[:2] == (False, "exit status 1: bar error: why")


# --- vLLM and CUDA, by what stands in for them


class FakeVLLM(TorchEngine):
    """A copy of the model. holds: bytes that it hands back while it sleeps."""

    def __init__(self, s, holds=0):
        super().__init__(gpu_check.make_model(s), s.tokenizer)
        self.holds, self.asleep, self.calls = holds, False, []

    def sleep(self):
        self.asleep = True
        self.calls.append("sleep")

    def load(self, model):
        self.asleep = False
        self.calls.append("load")
        super().load(model)

    def generate(self, *args):
        assert not self.asleep
        return super().generate(*args)


@pytest.fixture
def fake_vllm(s, monkeypatch):
    engine = FakeVLLM(s)
    monkeypatch.setattr(gpu_check, "VLLMEngine", lambda *args, **knobs: engine)
    monkeypatch.setattr(gpu_check, "resolve_engine", lambda name: name)
    return engine


def test_without_vllm_its_check_is_skipped(s, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    found = gpu_check.outcome(gpu_check.check_vllm, s)
    assert found["status"] == "skipped" and found["line"].startswith("engine=vllm needs vLLM")


def test_an_engine_with_stale_weights_is_a_failure(s, fake_vllm, monkeypatch):
    passed, line, numbers = gpu_check.check_vllm(s)
    assert passed and line.startswith("push proved; ") and numbers["gap_nats"] < 1e-4
    monkeypatch.setattr(TorchEngine, "load", lambda self, model: None)
    found = gpu_check.outcome(gpu_check.check_vllm, s)
    assert found["status"] == "FAILED" and found["line"].startswith("EngineMismatch: ")


@pytest.mark.parametrize("holds, passes", [(12e9, True), (1e9, False)])
def test_sleep_must_free_memory(s, fake_vllm, monkeypatch, holds, passes):
    """Half of the engine's share, 0.4 of a card of 40 GB, is 8 GB."""
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    free = lambda: int(20e9 + (holds if fake_vllm.asleep else 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free(), int(40e9)))
    passed, line, numbers = gpu_check.check_vllm(s)
    assert passed is passes and numbers["freed_bytes"] == holds
    assert fake_vllm.calls == ["sleep", "load"] * 3  # two of the proof
    assert f"sleep frees {holds / 1e9:.1f} GB; after it" in line


def test_a_peak_on_cuda_is_that_of_the_allocator_since_the_reset(monkeypatch):
    log, allocated = [], {"now": 100, "peak": 900}
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"])
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"])
    assert gpu_check.peak_of(lambda size: allocated.update(peak=100 + size), 30) == 30
    assert log == ["synchronize"] * 2


def test_a_card_that_is_too_small_is_skipped(tmp_path, monkeypatch):
    s = gpu_check.Setting(tmp_path, small=False)
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(gpu_check, "make_model", lambda s: pytest.fail("made a model"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(24e9), int(24e9)))
    for name in ("memory", "speed"):
        found = gpu_check.outcome(gpu_check.CHECKS[name], s)
        assert found["status"] == "skipped" and found["line"].endswith(" GB, and 24 are free")
