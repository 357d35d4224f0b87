"""Two processes on a CPU do what one does: the shares, three steps to the same weights, whole runs, resuming, and a process that dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # torchrun runs this file: see `three_steps`
    sys.path.insert(0, str(ROOT))

import attnrl
import sampler
import train
from attnrl import AttnRL, Group, MethodConfig, microbatches
from eval import grade, load_problems
from fci import token_logps
from sampler import SharedEngine, TorchEngine, full_weights, load_model, load_tokenizer, prompt_ids, shard, shared_out, shares, world_size

TINY = ROOT / "tiny"
SHORT = (
    "--batch_size 4 --min_batch_size 2 --max_batch_size 6 --target_sequences 30 --group_size 3 --minibatch_prompts 2 --token_budget 0 "
    "--eval_problems 8 --eval_every 2 --save_every 1 --keep_checkpoints 9"
).split()


def torchrun(*command, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, command)]


def finish(command, ok=True):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time_")} for line in lines]


# --- who does what


def test_shares_are_balanced():
    costs = [1 + (37 * i) % 101 for i in range(200)]
    for n in (1, 2, 3, 8, 24):
        found = shares(costs, n)
        assert sorted(sum(found, [])) == list(range(200)) and all(share == sorted(share) for share in found)
        sums = [sum(costs[i] for i in share) for share in found]
        assert max(sums) - min(sums) <= max(costs)
    assert shares([3, 3], 4) == [[0], [1], [], []] and shares([], 2) == [[], []]


def as_rank(monkeypatch, rank, n):
    for module in (sampler, attnrl):
        monkeypatch.setattr(module, "rank", lambda: rank)
        monkeypatch.setattr(module, "world_size", lambda: n)


@pytest.mark.parametrize("replicas", [1, 2])
def test_shared_out_keeps_the_order_and_does_everything_once(monkeypatch, replicas):
    items, costs, parts, worked = list("abcdefg"), [5, 1, 9, 2, 2, 7, 1], [], []
    upper = lambda own: worked.append(own) or [x.upper() for x in own]  # noqa: E731
    for rank in range(4):  # first what every rank contributes, then what one makes of all contributions
        as_rank(monkeypatch, rank, 4)
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(sampler, "union", lambda own: parts.append(own) or {})
            shared_out(items, costs, upper, replicas)
    monkeypatch.setattr(sampler, "union", lambda own: {k: v for part in parts for k, v in part.items()})
    assert shared_out(items, costs, upper, replicas) == list("ABCDEFG")
    assert sorted(sum(worked[:4:replicas], [])) == items and worked[0:4:replicas] == worked[replicas - 1 : 4 : replicas]


@pytest.mark.parametrize("n_sequences", [1, 2, 7, 40])
def test_all_ranks_make_equally_many_passes_and_every_sequence_counts_once(monkeypatch, n_sequences):
    sequences = [([1] * 3, [1] * (1 + (29 * i) % 50)) for i in range(n_sequences)]
    passes = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        passes.append(list(microbatches(sequences, budget=60)))
    assert len({len(p) for p in passes}) == 1
    assert sorted(i for p in passes for rows, counts in p for i in rows if counts) == list(range(n_sequences))
    as_rank(monkeypatch, 0, 1)
    assert [rows for rows, _ in microbatches(sequences, 60)] == list(attnrl.pack(sequences, 60))


def test_engines_draw_different_samples_unless_they_are_one(monkeypatch):
    seeds = []
    for rank in range(4):
        monkeypatch.setattr(train, "rank", lambda: rank)  # noqa: B023
        seeds.append([train.engine_seed(train.RunConfig(seed=7, tensor_parallel=n)) for n in (1, 2)])
    assert seeds == [[7, 7], [8, 7], [9, 8], [10, 8]]


# --- the same weights as one process


class Prepared:
    """An engine that looks its responses up, and counts them."""

    def __init__(self):
        self.responses, self.handed_out = {}, 0
        self.load = self.sleep = self.close = lambda *args: None

    def generate(self, requests, temperature, top_p):
        self.handed_out += len(requests)
        return [self.responses[id(r)] for r in requests]


class Script(SharedEngine):
    """Fixed responses, whatever was learned: those of the base model, sampled alike on every rank, each handed out by one of them."""

    def __init__(self, tokenizer):
        super().__init__(Prepared())
        self.base, self.calls = TorchEngine(load_model(str(TINY)), tokenizer), 0

    def generate(self, requests, **settings):
        self.calls += 1
        torch.manual_seed(self.calls)
        self.own.responses = dict(zip(map(id, requests), self.base.generate(requests, **settings)))
        return super().generate(requests, **settings)


def three_steps(**knobs) -> tuple[dict, list[dict], int]:
    """(weights, metrics, responses handed out by this process) of three steps of training on scripted rollouts."""
    cfg = MethodConfig(
        batch_size=4, min_batch_size=2, max_batch_size=8, target_sequences=40, group_size=4, max_prompt_tokens=128, max_response_tokens=128,
        minibatch_prompts=2, max_engine_gap=100, **knobs,
    )  # fmt: skip
    tokenizer, model, reference = load_tokenizer(str(TINY)), load_model(str(TINY)), load_model(str(TINY)).requires_grad_(False)
    if world_size() > 1:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(model)
        shard(reference)
    engine = Script(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.0)
    trainer, metrics = AttnRL(cfg, model, reference, tokenizer, engine, optimizer, grade), []
    problems = load_problems(str(TINY / "train.jsonl"))
    for step in range(4):  # one-step off-policy: the first call trains on nothing
        chosen = problems[4 * step : 4 * step + 4] if step < 3 else []
        metrics.append(trainer.step([Group(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])) for p in chosen])[0])
    return {k: w.clone() for k, w in full_weights(model)}, metrics, engine.own.handed_out


def tied_gradients() -> dict:
    """Gradients of a model whose input and output embeddings are one tensor, and whose layers have two shapes of attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True, attn_implementation="fci",
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    if world_size() > 1:
        shard(model)
    logps, _ = token_logps(model, [([1, 2, 3], list(range(4, 40))), ([5], [6, 7])], temperature=0.7, chunk=5)
    logps.square().sum().backward()
    return {name: sampler.whole(p.grad) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    finish(torchrun(__file__, out))
    return out


def test_two_processes_reach_the_weights_of_one(two_processes):
    """Sharded, checkpointed, in other microbatches, on other ranks: the gradient is the same."""
    expected, metrics, _ = three_steps()
    found, base = load_file(two_processes / "weights.safetensors"), load_model(str(TINY)).state_dict()
    assert max((expected[name] - base[name]).abs().max() for name in base) > 1e-3  # they learned something
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
    ours = [json.loads((two_processes / f"metrics-{rank}.json").read_text()) for rank in range(2)]
    assert sum(o["idle"] for o in ours) > 0  # or else passes that count for nothing were not tested
    for one, *both in zip(metrics, *(o["metrics"] for o in ours)):
        for name, value in one.items():
            if not name.startswith("time_"):
                assert both[0][name] == both[1][name], name
                if name != "padding":  # shares make other batches, which are padded otherwise
                    assert both[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert abs(ours[0]["handed_out"] - ours[1]["handed_out"]) <= 2  # of more than a hundred


def test_tied_embeddings_can_be_sharded(two_processes):
    found = load_file(two_processes / "tied.safetensors")
    for name, gradient in tied_gradients().items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


# --- whole runs


def test_a_run_learns(tmp_path):
    out = tmp_path / "run"
    done = finish(torchrun(
        ROOT / "train.py", "--output_dir", out, "--token_budget", 60_000, "--eval_problems", 200, "--eval_every", 100, "--gradient_checkpointing", "true"
    ))  # fmt: skip
    first, last = records(out)[0], records(out)[-1]
    assert last["test_accuracy"] > first["test_accuracy"] + 0.05  # by about 0.2; the standard error of the difference is 0.05
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


def test_a_rank_that_dies_ends_the_run_and_two_resume_it(tmp_path, uninterrupted):
    """Every rank follows the launcher down; resumed by as many processes, the run ends with the weights of one that never stopped."""
    out = tmp_path / "run"
    command = torchrun(ROOT / "train.py", *SHORT, "--output_dir", out, "--steps", 3)
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (out / "checkpoint-1").exists():
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.01)
    ranks = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=120)  # torchrun asks the others to end, and kills them after 30 s
    assert launcher.returncode != 0 and "Signal 9 (SIGKILL) received" in stderr
    assert not any(alive(pid) for pid in ranks) and not (out / "checkpoint-3").exists()
    finish(command)
    assert records(out) == records(uninterrupted)
    for name, weight in weights(uninterrupted / "checkpoint-3").items():
        assert torch.equal(weights(out / "checkpoint-3")[name], weight)


def test_one_process_resumes_what_two_began(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    done = finish([sys.executable, ROOT / "train.py", *SHORT, "--output_dir", out, "--steps", "4", "--threads", "1"])
    assert "written by 2 processes, and there are 1" in done.stdout
    assert records(out)[: len(records(uninterrupted))] == records(uninterrupted) and records(out)[-1]["step"] == 4
    saved = torch.load(out / "checkpoint-4/optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert {int(s["step"]) for s in saved.values()} == {records(out)[-1]["total_updates"]}  # the optimiser went on, too


@pytest.mark.parametrize(
    ("flags", "message"), [(["--clip_high", 0.5], "other settings"), (["--max_prompt_tokens", 20], "--long_prompts skip")],
    ids=["known to rank 0 only", "known to all"],
)  # fmt: skip
def test_an_error_is_said_once_and_ends_all(uninterrupted, flags, message):
    done = finish(torchrun(ROOT / "train.py", *SHORT, "--output_dir", uninterrupted, "--steps", 3, *flags), ok=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    idle = []
    attnrl.microbatches = lambda *args: (idle.append(not counts) or (rows, counts) for rows, counts in microbatches(*args))
    attnrl.shares = lambda costs, n: [list(range(len(costs) // 4)), list(range(len(costs) // 4, len(costs)))]  # so that rank 0 has to idle
    out, trained = Path(sys.argv[1]), three_steps(microbatch_tokens=700)
    tied = tied_gradients()
    (out / f"metrics-{sampler.rank()}.json").write_text(json.dumps({"metrics": trained[1], "handed_out": trained[2], "idle": sum(idle)}))
    if sampler.rank() == 0:
        save_file(trained[0], out / "weights.safetensors")
        save_file(tied, out / "tied.safetensors")
    torch.distributed.destroy_process_group()
