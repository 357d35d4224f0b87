"""Where the time of a training step goes.

    python experiments/bench_step.py                                   # the embedded reasoner, its preset
    python experiments/bench_step.py --model DIR --engine vllm --max_response_tokens 2048 --batch_size 8

Takes train.py's flags and `--bench_steps`. Off-policy steps are run with the clock that train.py hands to
them, with the reference model's part of the update apart; the first step, which has nothing to train on, is
not counted. The optimiser really steps. Then the last step's generation requests are served again, in turns:
all in one call, and in two, initial responses and continuations apart.

FLOPs are those of matrix products: 2 per weight of a linear layer and token forward, 4 backward, 2 more where
activations are recomputed, and 2 L D per token and layer for causal attention forward; of real tokens only,
so that padding and the second run over the logits count as waste. The peak to compare with is a square
product in the dtype of training, here and now. On a CPU all times are the CPU time of one thread, so that
other jobs hardly count; on a GPU, seconds.
"""

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import AttnRL, Problem
from plumbing import logs
from plumbing.models import head_dim, load_tokenizer
from plumbing.problems import load_data, stream
from train import build, parse_config

PAIRS = 3  # one call against two, in turns
MATMUL = 2048  # rows and columns of the product that measures the peak
PARTS = ["generate", "grade", "score", "reference", "update", "push"]
now = time.perf_counter if torch.cuda.is_available() else time.process_time


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, *args) -> float:
    synchronise()
    started = now()
    function(*args)
    synchronise()
    return now() - started


def matmul_peak(device, dtype, size: int = MATMUL) -> float:
    """FLOP/s of a square product, the best of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(torch.mm, a, a) for _ in range(5))


def forward_flops(model, lengths: list[int]) -> float:
    """Matrix products of one forward pass over sequences of these lengths."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    config = model.config.get_text_config()
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim(config)
    return sum(2 * linear * n + attention * n * n for n in lengths)


def time_reference(learner, clock: logs.Clock) -> None:
    """From now on the clock also adds up the forward passes of the reference model, a part of updates."""
    logps = learner.logps

    def timed_logps(model, *args):
        if model is not learner.reference:
            return logps(model, *args)
        with clock("reference"):
            result = logps(model, *args)
            synchronise()
        return result

    learner.logps = timed_logps


def one_call_saving(trainer: AttnRL, new: list[Problem], due: list[Problem]) -> list[float]:
    """Time of two calls over that of one, same requests and weights, once for each of PAIRS."""

    def two_calls():
        trainer.generate(new, [])
        trainer.generate([], due)

    ratios = []
    for _ in range(PAIRS):
        state = torch.get_rng_state()
        one = seconds(trainer.generate, new, due)
        torch.set_rng_state(state)
        ratios.append(seconds(two_calls) / one)
    return ratios


def main() -> None:
    argv = sys.argv[1:]
    steps = 3
    if "--bench_steps" in argv:  # not a field of train.py
        at = argv.index("--bench_steps")
        steps, argv = int(argv[at + 1]), argv[:at] + argv[at + 2 :]
    run, cfg = parse_config(["--threads", "1", *argv])
    if not cfg.off_policy:
        remedy = "whose one generation call it compares with two: leave out --off_policy false"
        sys.exit(f"error: bench_step times off-policy steps, {remedy}")
    tokenizer = load_tokenizer(run.model)
    problems, _ = load_data(run, cfg, tokenizer)
    trainer = build(run, cfg, tokenizer, None)
    clock = logs.Clock(now)
    time_reference(trainer.learner, clock)

    length = lambda problem, rollout: len(problem.prompt_ids) + len(rollout.ids)
    scored, trained, padding, position, tokens = [], [], [], 0, 0
    for step in range(steps + 1):
        rows = stream(problems, run.seed, position, position + trainer.sampler.batch_size)
        position += len(rows)
        new = [Problem(p["problem"], p["answers"], p["prompt_ids"]) for p in rows]
        before = clock.seconds["time_step"]
        with clock("step"):
            due, updates = trainer.step(new, clock)
        if step == 0:
            clock.seconds.clear()
            continue
        tokens += logs.n_generated(new, due)
        scored += [length(p, r) for p in new for r in p.rollouts]
        scored += [length(p, r) for p in due for r in p.rollouts if r.start > 0]
        trained += [length(p, r) for p in due if p.mixed() for r in p.rollouts]
        metrics = logs.update_metrics(updates)
        padding += [metrics["padding"]] if "padding" in metrics else []
        took = f"{clock.seconds['time_step'] - before:.1f} s"
        print(f"step {step}: {took}, {len(new)} problems sampled", file=sys.stderr, flush=True)

    times = {name: clock.seconds[f"time_{name}"] for name in ["step", *PARTS]}
    training = times["update"]
    times["update"] -= times["reference"]
    learner, per_step = trainer.learner, times["step"] / steps
    where = f"{learner.model.device}, {torch.get_num_threads()} threads"
    print(f"{Path(run.model).name}: {steps} steps of {per_step:.1f} s; {where}")
    print(f"sampled: {tokens / times['generate']:,.0f} tokens/s")
    wasted = f"{np.mean(padding):.1%} of the slots are padding"
    print(f"trained: {len(trained) / training:,.1f} sequences/s, {wasted}")
    print("share of the step: " + ", ".join(f"{name} {times[name] / times['step']:.1%}" for name in PARTS))

    peak = matmul_peak(learner.model.device, learner.autocast_dtype)
    passes = 4 if run.gradient_checkpointing else 3  # of the cost of a forward pass each
    of = lambda lengths: forward_flops(learner.model, lengths)
    flops = {"update": passes * of(trained), "score": of(scored)}
    for name in flops:
        rate = flops[name] / times[name]
        share = f"{rate / peak:.1%} of the {peak / 1e9:,.0f} of a matrix product"
        print(f"{name}: {rate / 1e9:,.1f} GFLOP/s, {share}")

    n_initial, n_continuations = len(trainer.generate(new, [])), len(trainer.generate([], due))
    ratios = one_call_saving(trainer, new, due)
    print(
        f"generating {n_initial} responses and {n_continuations} continuations in two calls takes "
        f"{median(ratios):.2f} times as long as in one ({min(ratios):.2f}–{max(ratios):.2f})"
    )
    trainer.engine.close()


if __name__ == "__main__":
    main()
