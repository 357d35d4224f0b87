"""The first thing to run on a GPU: does what was tested on CPUs hold there, and what does it cost?

    python experiments/gpu_check.py                         # at most 10 minutes; no hub, vLLM if it is there
    python experiments/gpu_check.py --only kernel memory
    python experiments/gpu_check.py --small --skip vllm     # a small model: what a CPU can answer

The model is random, of the 1.5B shape. Prints a line per check, writes all numbers to a JSON file, and exits
with 1 if a check fails. A check that raises has failed; the others still run. "measured": there is no bound.

    kernel   attention kernels of passes that score and train; fails if one writes L x L matrices
    fci      time of scoring with FCI over that without; the memory that FCI adds, at most its tensors'
    memory   peaks of an update and of scoring at the longest length, beyond weights, within 10 % of `--plan`
    bf16     log-probs, gap to fp32 at most max_engine_gap; branch points that are the same
    speed    tokens/s of score, reference and update, and their share of a matrix product's peak (measured)
    shapes   shapes of the passes over 384 responses, and what the first call of one costs (measured)
    decode   the plain engine: tokens/s; gap to scoring at most max_engine_gap
    train    train.py on the embedded reasoner: exit status 0 and, without --small, 10 points gained
    vllm     proof of a push; tokens/s; gap at most max_engine_gap, again after sleep, which frees memory

Gaps are the mean |difference| of log-probs per token. On a CPU, passes are in fp32, times are the CPU time of
one thread, and memory is that of tensors (`LiveBytes`).
"""

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import policy_loss
from experiments.bench_fci import DEVICE, LAYERS, ON_GPU, SHAPE, VOCABULARY
from experiments.bench_step import forward_flops, matmul_peak, now, seconds, time_reference
from fci import PADDING, StepHook, fci_of_response, step_ids_of
from plumbing import logs, memory_plan
from plumbing.agreement import mismatch, verify_sync
from plumbing.engines import resolve_engine
from plumbing.learner import Learner, autocast_dtype, passes
from plumbing.memory_plan import LiveBytes
from plumbing.models import ATTENTION, head_dim, load_tokenizer
from plumbing.nouns import Request, Sequence
from plumbing.projection import collate
from plumbing.torch_engine import TorchEngine
from plumbing.vllm_engine import VLLMEngine
from train import parse_config
from tree import Measured, branch_points

N_STEPS = 60  # of a response
SMALL = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(num_hidden_layers=3, vocab_size=512)
SMALL_FLAGS = "--max_prompt_tokens 64 --max_response_tokens 320 --microbatch_tokens 768 --logit_chunk 64"
SDPA = "aten::_scaled_dot_product_"  # what the names of all kernels begin with


class Skipped(Exception):
    """This machine cannot answer; the message says why."""


class Setting:
    """The model's configuration, the paper's settings or small ones, and lengths in tokens."""

    def __init__(self, folder: Path, small: bool):
        sizes = SMALL if small else SHAPE | dict(num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
        self.config = Qwen2Config(**sizes, max_position_embeddings=131072, tie_word_embeddings=False)
        self.config.save_pretrained(folder)
        flags = ["--model", str(folder), "--preset", "paper", "--autocast", "bfloat16" if ON_GPU else "none"]
        self.run, self.method = parse_config([*flags, *(SMALL_FLAGS.split() if small else [])])
        self.folder, self.small, self.shape = folder, small, memory_plan.shape_of(str(folder))
        self.tokenizer = load_tokenizer(str(ROOT / "tiny"))  # only for its end of sequence
        self.prompt = self.method.max_prompt_tokens // 8
        self.longest = self.method.max_prompt_tokens + self.method.max_response_tokens
        self.lengths = [96, 192, 384] if small else [2048, 4096, 9216]


def make_model(s: Setting):
    """Random weights, fp32, the same each time, with biases that keep attention from being uniform."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(s.config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.data.normal_(std=2.0)
    model.set_attn_implementation(ATTENTION)
    return model.eval()


def planned_peaks(s: Setting, run) -> dict[str, int]:
    """Bytes of an update and of scoring, by the plan: beyond what lasts, and what lasts."""
    scoring, *update = memory_plan.measure(run, max(run.microbatch_tokens, s.longest))
    rows = memory_plan.plan(s.shape, [0, 0, 0], run, s.method, card=0)
    lasting = [sum(sizes) for sizes in zip(*(x for name, x in rows.items() if not name.startswith("engine")))]
    return {"update": lasting[1] - lasting[0] + max(update), "score": scoring, "state": lasting[0]}


def make_learner(s: Setting, trains: bool = False, **knobs) -> Learner:
    """As that of plumbing/learner.py. trains: with reference and optimiser. knobs: fields of s.run."""
    run, reference, optimizer = replace(s.run, **knobs), None, None
    if trains and ON_GPU:
        free, planned = torch.cuda.mem_get_info()[0], planned_peaks(s, run)
        needed = 1.1 * (planned["update"] + planned["state"])
        if free < needed:
            raise Skipped(f"needs {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free")
    model = make_model(s)
    if trains:
        reference = make_model(s).to(autocast_dtype(run)).requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), run.lr, weight_decay=run.weight_decay, fused=ON_GPU)
    return Learner(model, reference, optimizer, run)


def make_sequence(s: Setting, length: int) -> Sequence:
    """Random tokens in N_STEPS steps of random lengths."""
    ids, n = torch.randint(s.config.vocab_size, (length,)).tolist(), length - s.prompt
    ends = [*sorted((torch.randperm(n - 1)[: N_STEPS - 1] + 1).tolist()), n]
    return Sequence(ids[: s.prompt], ids[s.prompt :], step_ids_of(s.prompt, list(zip([0, *ends], ends))))


def make_update(s: Setting, learner: Learner, batch: list[Sequence]) -> Callable[[], dict]:
    """A function that takes one optimiser step on the batch, with random advantages."""
    trained = []
    for sequence, score in zip(batch, learner.score(batch)):
        logps, advantages = score.logps.tolist(), torch.randn(len(score.logps)).tolist()
        given = dict(old_logps=logps, engine_logps=logps, advantages=advantages)
        trained.append(replace(sequence, per_token=given))
    divisors = [sum(len(q.response_ids) for q in trained)] * len(trained)
    return partial(learner.update, trained, partial(policy_loss, cfg=s.method), divisors)


def peak_of(function: Callable, *args) -> int:
    """Bytes at the peak of function(*args), above what was allocated before."""
    if not ON_GPU:
        with LiveBytes() as live:
            function(*args)
        return live.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def sampled_from(s: Setting, engine, learner: Learner) -> tuple[float, float]:
    """Tokens per second on 64 random prompts, after a first call, and mean |gap| to scoring, nats."""
    prompts, responses = torch.randint(s.config.vocab_size, (64, s.prompt)).tolist(), []
    engine.generate([Request(prompt, 4) for prompt in prompts])
    requests = [Request(prompt, s.method.max_response_tokens // 64) for prompt in prompts]
    took = seconds(lambda: responses.extend(engine.generate(requests)))
    scores = learner.score([Sequence(prompt, r.ids) for prompt, r in zip(prompts, responses)])
    gaps = [score.logps - np.array(r.logps) for score, r in zip(scores, responses)]
    return sum(len(r.ids) for r in responses) / took, mismatch(gaps)["engine_gap_mean"]


# --- The checks, each: (passed, or None where there is no bound; a line; numbers) -------------------------


def kernels_of(function: Callable, *args) -> set[str]:
    """Attention kernels that function(*args) takes, by the names of PyTorch's operations."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:  # names are enough: no trace of the device
        function(*args)
    return {e.name.removeprefix(SDPA) for e in profiled.events() if e.name.startswith(SDPA)}


def check_kernel(s: Setting):
    class Watched(StepHook):
        kernels = set()

        def add_layer(self, *args):
            self.kernels = self.kernels | kernels_of(super().add_layer, *args)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to stderr
    learner, sequence = make_learner(s), make_sequence(s, s.lengths[0])
    hook = Watched(collate([sequence.step_ids], PADDING, DEVICE))
    with torch.no_grad(), learner.autocast():
        learner.logps(learner.model, [sequence], hook)
        names = {"FCI": hook.kernels, "scoring": kernels_of(learner.logps, learner.model, [sequence])}
    with learner.autocast():
        names["training"] = kernels_of(learner.logps, learner.model, [sequence])
    passed = all(names.values()) and not any("math" in kernel for each in names.values() for kernel in each)
    names = {whose: sorted(kernels) for whose, kernels in names.items()}
    return passed, "; ".join(f"{k}: {', '.join(each) or 'none seen'}" for k, each in names.items()), names


def planned_fci(s: Setting, length: int) -> int:
    """Bytes that the hook needs for one layer, on tensors without memory."""
    hook, c = StepHook(torch.arange(length)[None] * N_STEPS // length), s.config
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=s.run.autocast != "none")
    heads = c.num_attention_heads, c.num_key_value_heads
    with memory_plan.FAKE, torch.no_grad(), bf16:
        query, key = (torch.empty(1, n, length, head_dim(c)) for n in heads)
        with LiveBytes() as live:
            hook.add_layer(query, key, None, None)
    return live.peak


def check_fci(s: Setting):
    learner, cells, numbers, passed = make_learner(s), [], {}, True
    for length in s.lengths:
        batches = [[make_sequence(s, length)]]
        batches.append([replace(batches[0][0], step_ids=None)])  # without FCI
        for batch in batches:
            learner.score(batch)  # the first call allocates work spaces
        added = int(np.subtract(*[peak_of(learner.score, batch) for batch in batches]))
        pairs = [[seconds(learner.score, batch) for batch in batches] for _ in range(5)]
        ratio, took = median(a / b for a, b in pairs), median(a for a, _ in pairs)
        planned = planned_fci(s, length)
        passed = passed and added <= 1.1 * planned
        numbers[length] = dict(ratio=ratio, seconds=took, added_bytes=added, planned_bytes=planned)
        memory = f"{added / 1e6:+,.1f} MB (plan {planned / 1e6:,.1f})"
        cells.append(f"{length:,} tokens {ratio:.2f}, {memory}")
    return passed, f"times a pass without, and memory added: {'; '.join(cells)}", numbers


def check_memory(s: Setting):
    if s.small and ON_GPU:
        raise Skipped("CUDA's work spaces are larger than a small model")
    learner = make_learner(s, trains=True, microbatch_tokens=s.longest)
    planned = planned_peaks(s, learner.machine)
    batch = [make_sequence(s, s.longest) for _ in range(2)]  # the second pass adds to gradients
    update = make_update(s, learner, batch)
    update()  # makes the optimiser's state
    tensors = [*learner.model.parameters(), *learner.reference.parameters()]
    tensors += [t for moments in learner.optimizer.state.values() for t in moments.values()]
    state = sum(t.nbytes for t in tensors)
    found = {"update": peak_of(update), "score": peak_of(learner.score, batch, True), "state": state}
    of_plan = {name: found[name] / planned[name] for name in found}
    cells = [f"{k} {found[k] / 1e9:.3g} GB, {of_plan[k]:.1%} of the plan" for k in found]
    numbers = dict(measured_bytes=found, planned_bytes=planned, tokens=s.longest)
    line = f"{'; '.join(cells)} (weights, moments, reference)"
    return all(0.9 <= share <= 1.1 for share in of_plan.values()), line, numbers


def check_bf16(s: Setting):
    def points_of(sequence: Sequence, score) -> set[int]:
        starts = np.searchsorted(sequence.step_ids[s.prompt :], range(1, N_STEPS + 1)).tolist()
        fci = np.array(fci_of_response(score.fci, N_STEPS, N_STEPS))
        response = Measured(["…"] * N_STEPS, starts, fci, score.entropies, 1.0, N_STEPS)
        how = s.method.n_branch_points, s.method.branch_quantile, s.method.min_branch_gap
        return set(branch_points("fci", response, *how, rng=None))

    learner = make_learner(s, microbatch_tokens=s.lengths[1])  # fp32 may take kernels that need more memory
    batch, scores = [make_sequence(s, s.lengths[1]) for _ in range(8)], []
    for dtype in (torch.float32, torch.bfloat16):
        learner.autocast_dtype = dtype
        scores.append(learner.score(batch, with_entropy=True))
    pairs = list(zip(*scores))  # of each sequence, (in fp32, in bf16)
    nats = mismatch([a.logps - b.logps for a, b in pairs])["engine_gap_mean"]
    moved = max(float((np.abs(b.fci - a.fci) / a.fci.clip(0.1)).max()) for a, b in pairs)
    points = [(points_of(q, a), points_of(q, b)) for q, (a, b) in zip(batch, pairs)]
    same, n = sum(len(a & b) for a, b in points), sum(len(a) for a, _ in points)
    line = f"mean |gap| to fp32 {nats:.2g} nats; FCI moves by at most {moved:.1%}"
    numbers = dict(gap_nats=nats, fci_moved=moved, branch_points=n, same_branch_points=same)
    return nats <= s.method.max_engine_gap, f"{line}; {same} of {n} branch points are the same", numbers


def check_speed(s: Setting):
    learner, clock = make_learner(s, trains=True), logs.Clock(now)
    time_reference(learner, clock)
    peak = matmul_peak(DEVICE, learner.autocast_dtype, 512 if s.small else 8192)
    lengths = torch.randint(s.longest // 4, s.longest * 8 // 9, (12,)).tolist()
    batch = [make_sequence(s, length) for length in lengths]
    update = make_update(s, learner, batch)
    update()  # first calls, of scoring, too
    clock.seconds.clear()
    score, whole_update = seconds(learner.score, batch, True), seconds(update)
    reference = clock.seconds["time_reference"]
    flops, cells, numbers = forward_flops(learner.model, lengths), [], dict(peak_flops=peak, lengths=lengths)
    # What each costs in forward passes: the update's are forward, again for checkpointing, backward twice.
    for name, took, cost in [("score", score, 1), ("reference", reference, 1), ("update", whole_update, 4)]:
        took -= reference if name == "update" else 0
        rate, share = sum(lengths) / took, cost * flops / took / peak
        numbers[name] = dict(tokens_per_second=rate, share_of_peak=share)
        cells.append(f"{name} {rate:,.0f} tokens/s, {share:.0%}")
    return None, f"{'; '.join(cells)}; of {peak / 1e12:,.3g} TFLOP/s of a matrix product", numbers


def check_shapes(s: Setting):
    learner, responses = make_learner(s), torch.randint(s.longest // 16, s.longest * 8 // 9, (384,))
    lengths, shapes = (responses + s.prompt).tolist(), []
    for forward in passes(lengths, s.run.microbatch_tokens):
        shapes.append((len(forward.rows), max(lengths[row] for row in forward.rows)))
    distinct, times = sorted(set(shapes)), []
    for n_rows, length in distinct[:: max(1, len(distinct) // 6)]:
        batch = [make_sequence(s, length) for _ in range(n_rows)]
        times.append([seconds(learner.score, batch) for _ in range(3)])
    more = median(first - min(later) for first, *later in times[1:])  # the very first call of all is left out
    numbers = dict(passes=len(shapes), shapes=len(distinct), seconds_of_calls=times)
    line = f"{len(distinct)} in {len(shapes)} passes over 384 responses; the first call of one takes "
    line += f"{more * 1e3:.0f} ms more, so {more * len(distinct):.1f} s if all are new"
    return None, line, numbers


def check_decode(s: Setting):
    learner = make_learner(s)
    engine = TorchEngine(learner.model, s.tokenizer, autocast=learner.autocast)
    rate, nats = sampled_from(s, engine, learner)
    line = f"{rate:,.0f} tokens/s with 64 prompts; mean |gap| to scoring {nats:.2g} nats"
    return nats <= s.method.max_engine_gap, line, dict(tokens_per_second=rate, gap_nats=nats)


def check_train(s: Setting):
    flags = "--token_budget 15000 --eval_problems 20" if s.small else "--token_budget 150000"
    command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--output_dir", str(s.folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return False, f"exit status {done.returncode}: {' '.join(done.stderr.split())[-200:]}", {}
    records = [json.loads(line) for line in (s.folder / "run/metrics.jsonl").read_text().splitlines()]
    before, *_, after = [r["test_accuracy"] for r in records if "test_accuracy" in r]
    line = f"{before:.1%} -> {after:.1%} of the held-out problems in {records[-1]['step']} steps"
    return s.small or after > before + 0.1, line, dict(before=before, after=after)


def check_vllm(s: Setting):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, of its CPU build
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        resolve_engine("vllm")
    except ValueError as error:
        raise Skipped(error) from None
    make_model(s).bfloat16().save_pretrained(s.folder)
    learner, share, bound = make_learner(s), s.run.gpu_memory, s.method.max_engine_gap
    free_memory()
    engine = VLLMEngine(str(s.folder), s.tokenizer, s.longest, 0, share, sleep_mode=ON_GPU, n_gpus=1)
    prompts = torch.randint(s.config.vocab_size, (8, s.prompt)).tolist()
    proof = verify_sync(engine, learner, prompts, bound)
    rate, nats = sampled_from(s, engine, learner)
    passed, numbers = nats <= bound, dict(push_gap_nats=proof, tokens_per_second=rate, gap_nats=nats)
    line = f"push proved; {rate:,.0f} tokens/s with 64 prompts; mean |gap| to scoring {nats:.2g} nats"
    if ON_GPU:
        free_memory()
        before, card = torch.cuda.mem_get_info()
        engine.sleep()
        freed = torch.cuda.mem_get_info()[0] - before
        engine.load(learner.model)
        _, again = sampled_from(s, engine, learner)
        passed = passed and again <= bound and freed >= share * card / 2
        numbers |= dict(freed_bytes=freed, gap_after_sleep_nats=again)
        line += f"; sleep frees {freed / 1e9:.1f} GB; after it {again:.2g} nats"
    engine.close()
    return passed, line, numbers


CHECKS = dict(kernel=check_kernel, fci=check_fci, memory=check_memory, bf16=check_bf16, speed=check_speed)
CHECKS |= dict(shapes=check_shapes, decode=check_decode, train=check_train)
CHECKS |= dict(vllm=check_vllm)  # last: it changes its process


# --- All of them ------------------------------------------------------------------------------------------


def outcome(check: Callable, s: Setting) -> dict:
    """status ("ok", "measured", "FAILED" or "skipped"), line, numbers and seconds of one check."""
    started, numbers = time.perf_counter(), {}
    try:
        free_memory()  # of the check before
        passed, line, numbers = check(s)
        status = "measured" if passed is None else "ok" if passed else "FAILED"
    except Skipped as reason:
        status, line = "skipped", str(reason)
    except Exception as error:  # out of memory, no kernel, ...: the next check may still answer
        status, line = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return dict(status=status, line=line, numbers=numbers, seconds=time.perf_counter() - started)


def machine() -> dict:
    """What the numbers are measured on, and with what."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {k: installed[k] for k in ("torch", "transformers", "vllm", "vllm-cpu") if k in installed}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        commit = None
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    return dict(device=device, cuda=torch.version.cuda, commit=commit, versions=versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = dict(nargs="+", choices=list(CHECKS), metavar="CHECK")
    parser.add_argument("--only", **names, default=list(CHECKS), help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--skip", **names, default=[], help="of the same")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU or a GPU")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    args = parser.parse_args()
    if not (ON_GPU or args.small):
        sys.exit("error: PyTorch finds no CUDA device: pass --small for what a CPU can answer")
    if not ON_GPU:
        torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    report = machine() | dict(small=args.small, checks={})
    print(report["device"], *(f"{name} {version}" for name, version in report["versions"].items()), sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        s = Setting(Path(folder), args.small)
        for name in (name for name in CHECKS if name in args.only and name not in args.skip):
            found = report["checks"][name] = outcome(CHECKS[name], s)
            args.output.write_text(json.dumps(report, indent=1) + "\n")  # each time: a check may end it all
            print(f"{found['status']:8s} {name}: {found['line']} ({found['seconds']:.0f} s)", flush=True)
    statuses = [found["status"] for found in report["checks"].values()]
    passed, measured, failed, skipped = map(statuses.count, ["ok", "measured", "FAILED", "skipped"])
    print(f"{passed} checks passed, {measured} only measured, {failed} failed, {skipped} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
