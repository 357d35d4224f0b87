"""Two processes on a CPU do what one does: three steps to the same weights, whole runs, resuming, and a
process that dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # torchrun runs this file: see `two_processes`
    sys.path.insert(0, str(ROOT))

from conftest import SHORT, SMALL, TINY

import train
from attnrl import AttnRL, MethodConfig, Problem
from eval import grade
from plumbing import learner as learner_module
from plumbing.adapters import add_adapters, full_weights
from plumbing.engines import SharedEngine
from plumbing.grader import Grader
from plumbing.learner import Learner, passes, shard
from plumbing.logs import Clock, Progress, step_metrics
from plumbing.models import ATTENTION, load_model, load_tokenizer, prompt_ids
from plumbing.problems import load_problems
from plumbing.processes import rank, whole, world_size
from plumbing.projection import token_logps
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine


def torchrun(*command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), *map(str, command)]


def finish(command, ok=True):
    how = dict(capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, **how, timeout=600)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time_")} for line in lines]


def test_engines_draw_different_samples_unless_they_are_one(monkeypatch):
    seeds = []
    for rank_ in range(4):
        monkeypatch.setattr(train, "rank", lambda rank_=rank_: rank_)
        seeds.append([train.engine_seed(train.RunConfig(seed=7, tensor_parallel=n)) for n in (1, 2)])
    assert seeds == [[7, 7], [8, 7], [9, 8], [10, 8]]


# --- The same weights as one process ----------------------------------------------------------------------


class Prepared:
    """An engine that looks its responses up, and counts them."""

    def __init__(self):
        self.responses, self.handed_out = {}, 0
        self.load = self.sleep = self.close = lambda *args: None

    def generate(self, requests, temperature, top_p):
        self.handed_out += len(requests)
        return [self.responses[id(r)] for r in requests]


class Script(SharedEngine):
    """Fixed responses, whatever was learned: those of the base model, sampled alike on every rank, each
    handed out by one of them."""

    def __init__(self, tokenizer):
        super().__init__(Prepared())
        self.base, self.calls = TorchEngine(load_model(str(TINY)), tokenizer), 0

    def generate(self, requests, **settings):
        self.calls += 1
        torch.manual_seed(self.calls)
        responses = self.base.generate(requests, **settings)
        self.own.responses = dict(zip(map(id, requests), responses))
        return super().generate(requests, **settings)


def three_steps(lora_rank: int = 0, **machine) -> tuple[dict, list[dict], int]:
    """(weights, metrics, responses handed out by this process) of three steps of training on scripted
    rollouts; with adapters, which are not sharded, or without."""
    cfg = MethodConfig(**SMALL, max_engine_gap=100)
    tokenizer, model = load_tokenizer(str(TINY)), load_model(str(TINY))
    if lora_rank:
        torch.manual_seed(rank())  # as engines' seeds are: A must not depend on it
        run = SimpleNamespace(lora_rank=lora_rank, seed=0, model=str(TINY))
        add_adapters(model, run, torch.float32, str(TINY))
    reference = model if lora_rank else load_model(str(TINY)).requires_grad_(False)
    if world_size() > 1:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for each in () if lora_rank else (model, reference):
            shard(each)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-3 if lora_rank else 4e-4, weight_decay=0.0)
    learner, engine = Learner(model, reference, optimizer, MachineConfig(**machine)), Script(tokenizer)
    trainer = AttnRL(cfg, engine, learner, Grader(grade), tokenizer.decode)
    problems = load_problems(str(TINY / "train.jsonl"))
    progress, metrics = Progress(), []
    for step in range(4):  # one-step off-policy: the first call trains on nothing
        chosen = problems[4 * step : 4 * step + 4] if step < 3 else []
        new = [Problem(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])) for p in chosen]
        due, updates = trainer.step(new, Clock())
        progress.count(new, due, updates)
        size = {"next_batch_size": trainer.sampler.batch_size}
        metrics.append(step_metrics(new, due, updates) | progress.totals() | size)
    return {k: w.clone() for k, w in full_weights(model)}, metrics, engine.own.handed_out


def tied_gradients() -> dict:
    """Gradients of a model whose input and output embeddings are one tensor, and whose layers have two
    shapes of attention."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
        attn_implementation=ATTENTION,
    )
    model = Gemma3ForCausalLM(config)
    if world_size() > 1:
        shard(model)
    batch = [([1, 2, 3], list(range(4, 40))), ([5], [6, 7])]
    logps, _ = token_logps(model, batch, temperature=0.7, chunk=5)
    logps.square().sum().backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    finish(torchrun(__file__, out))
    return out


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(two_processes):
    """Sharded, checkpointed, in other microbatches, on other ranks: the gradient is the same."""
    expected, metrics, _ = three_steps()
    found, base = load_file(two_processes / "weights.safetensors"), load_model(str(TINY)).state_dict()
    assert max((expected[name] - base[name]).abs().max() for name in base) > 1e-3  # they learned something
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
    ours = [json.loads((two_processes / f"metrics-{r}.json").read_text()) for r in range(2)]
    assert sum(o["idle"] for o in ours) > 0  # or else passes that count for nothing were not tested
    for one, *both in zip(metrics, *(o["metrics"] for o in ours), strict=True):
        assert one.keys() == both[0].keys() == both[1].keys()
        for name, value in one.items():
            assert both[0][name] == both[1][name], name
            if name != "padding":  # shares make other batches, which are padded otherwise
                close = None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)
                assert both[0][name] == close, name
    assert abs(ours[0]["handed_out"] - ours[1]["handed_out"]) <= 2  # of more than a hundred


@pytest.mark.slow
def test_two_processes_reach_the_adapters_of_one(two_processes):
    """Data parallel: every process has all adapters, and the same at the end, bit for bit."""
    pytest.importorskip("peft")
    expected, _, _ = three_steps(lora_rank=4)
    base = load_model(str(TINY)).state_dict()
    found = [load_file(two_processes / f"adapted-{rank_}.safetensors") for rank_ in range(2)]
    assert max((expected[name] - base[name]).abs().max() for name in base) > 1e-3
    for name, weight in expected.items():
        torch.testing.assert_close(found[0][name], weight, atol=1e-5, rtol=0)
        assert torch.equal(found[0][name], found[1][name])


@pytest.mark.slow
def test_tied_embeddings_can_be_sharded(two_processes):
    found = load_file(two_processes / "tied.safetensors")
    for name, gradient in tied_gradients().items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


# --- Whole runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns(tmp_path):
    out = tmp_path / "run"
    flags = "--token_budget 60000 --eval_problems 200 --eval_every 100 --gradient_checkpointing true".split()
    done = finish(torchrun(ROOT / "train.py", "--output_dir", out, *flags))
    first, last = records(out)[0], records(out)[-1]
    # by about 0.2; the standard error of the difference is 0.05
    assert last["test_accuracy"] > first["test_accuracy"] + 0.05
    assert done.stdout.count("before training") == 1 and "2 processes" in done.stdout
    assert (out / "curves.png").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(torchrun(ROOT / "train.py", *SHORT, "--output_dir", out, "--steps", 3))
    return out


def alive(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_two_resume_it(tmp_path, uninterrupted):
    """Every rank follows the launcher down; resumed by as many processes, the run ends with the weights of
    one that never stopped."""
    out = tmp_path / "run"
    command = torchrun(ROOT / "train.py", *SHORT, "--output_dir", out, "--steps", 3)
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    launcher = subprocess.Popen(command, **pipes, text=True, cwd=ROOT)
    while not (out / "checkpoint-1").exists():
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout
    ranks = [int(pid) for pid in found.split()]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    _, stderr = launcher.communicate(
        timeout=120
    )  # torchrun asks the others to end, and kills them after 30 s
    assert launcher.returncode != 0 and "Signal 9 (SIGKILL) received" in stderr
    assert not any(alive(pid) for pid in ranks) and not (out / "checkpoint-3").exists()
    finish(command)
    assert records(out) == records(uninterrupted)
    for name, weight in weights(uninterrupted / "checkpoint-3").items():
        assert torch.equal(weights(out / "checkpoint-3")[name], weight)


@pytest.mark.slow
def test_a_run_with_adapters_is_begun_by_two_and_resumed_by_one(tmp_path):
    """Every process samples from a model of its own, with merged weights."""
    pytest.importorskip("peft")
    flags = [*SHORT, "--output_dir", tmp_path / "run", "--lora_rank", 4, "--lr", 4e-3]
    finish(torchrun(ROOT / "train.py", *flags, "--steps", 2))
    before = records(tmp_path / "run")
    assert before[-1]["total_updates"] > 1 and all(r["engine_gap_max"] < 1e-4 for r in before[1:])
    finish([sys.executable, ROOT / "train.py", *map(str, flags), "--steps", "3", "--threads", "1"])
    assert records(tmp_path / "run")[: len(before)] == before and records(tmp_path / "run")[-1]["step"] == 3


@pytest.mark.slow
def test_one_process_resumes_what_two_began(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    flags = ["--output_dir", out, "--steps", "4", "--threads", "1"]
    done = finish([sys.executable, ROOT / "train.py", *SHORT, *flags])
    assert "written by 2 processes, and there are 1" in done.stdout
    assert records(out)[: len(records(uninterrupted))] == records(uninterrupted)
    assert records(out)[-1]["step"] == 4
    saved = torch.load(out / "checkpoint-4/optimizer.pt", weights_only=True)["optimizer"]["state"]
    # the optimiser went on, too
    assert {int(s["step"]) for s in saved.values()} == {records(out)[-1]["total_updates"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--clip_high", 0.5], "other settings"), (["--max_prompt_tokens", 20], "no prompt of")],
    ids=["known to rank 0 only", "known to all"],
)
def test_an_error_is_said_once_and_ends_all(uninterrupted, flags, message):
    command = torchrun(ROOT / "train.py", *SHORT, "--output_dir", uninterrupted, "--steps", 3, *flags)
    done = finish(command, ok=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    idle = []

    def counted_passes(*args):
        found = passes(*args)
        idle.extend(not forward.counts for forward in found)
        return found

    def uneven_shares(costs, n):  # so that rank 0 has to idle
        return [list(range(len(costs) // 4)), list(range(len(costs) // 4, len(costs)))]

    learner_module.passes, learner_module.shares = counted_passes, uneven_shares
    out, trained = Path(sys.argv[1]), three_steps(microbatch_tokens=700)
    if find_spec("peft"):
        adapted, _, _ = three_steps(lora_rank=4, microbatch_tokens=700)
        save_file(adapted, out / f"adapted-{rank()}.safetensors")
    tied = tied_gradients()
    written = {"metrics": trained[1], "handed_out": trained[2], "idle": sum(idle)}
    (out / f"metrics-{rank()}.json").write_text(json.dumps(written))
    if rank() == 0:
        save_file(trained[0], out / "weights.safetensors")
        save_file(tied, out / "tied.safetensors")
    torch.distributed.barrier()  # or one process may exit while gloo's threads still hold what it gathered
    torch.distributed.destroy_process_group()
