"""Where the time of a training step goes.

    python experiments/bench_step.py                                   # the embedded reasoner, its preset
    python experiments/bench_step.py --model DIR --engine vllm --max_response_tokens 2048 --batch_size 8

Takes train.py's flags and `--bench_steps`. Off-policy steps are run and timed by AttnRL's own clocks (`trainer.seconds`), with the reference
model's part of the update apart; the first step, which has nothing to train on, is not counted. The optimiser really steps.
Then the last step's generation requests are served again, in turns: all in one call, and in two, initial responses and continuations apart.

FLOPs are those of matrix products: 2 a weight of a linear layer and token forward, 4 backward, 2 more where activations are recomputed, and
2 L D a token and layer for causal attention forward; of real tokens only, so that padding and the second run over the logits count as
waste. The peak to compare with is a square product in the dtype of training, here and now. On a CPU all clocks, AttnRL's too, count
the CPU time of one thread, so that other jobs hardly count; on a GPU, seconds.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attnrl  # noqa: E402
from attnrl import branch_jobs, initial_jobs  # noqa: E402
from experiments.memory_plan import shape_of  # noqa: E402
from sampler import Request, load_tokenizer  # noqa: E402
from train import build, load_data, next_groups, parse_config  # noqa: E402

PAIRS = 3  # one call against two, in turns
MATMUL = 2048  # rows and columns of the product that measures the peak
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, *args) -> float:
    synchronise()
    started = clock()
    function(*args)
    synchronise()
    return clock() - started


def matmul_peak(device, dtype) -> float:
    """FLOP/s of a square product, the best of five."""
    a = torch.randn(MATMUL, MATMUL, device=device, dtype=dtype)
    return 2 * MATMUL**3 / min(seconds(torch.mm, a, a) for _ in range(5))


def forward_flops(shape, lengths: list[int]) -> float:
    """Matrix products of one forward pass over sequences of these lengths."""
    attention = 2 * shape.layers * shape.heads * shape.head_dim
    return sum(2 * shape.linear * n + attention * n * n for n in lengths)


def requests_of(jobs, cfg) -> list[Request]:
    starts = [(g.prompt_ids, g.rollouts[family].ids[:start] if start else []) for g, family, start in jobs]
    return [Request(prompt + prefix, cfg.max_response_tokens - len(prefix)) for prompt, prefix in starts]


def one_call_saving(trainer, initial: list[Request], continuations: list[Request]) -> list[float]:
    """Time of two calls over that of one, same requests and weights, once for each of PAIRS."""
    serve = lambda *calls: [trainer.engine.generate(c, temperature=trainer.cfg.temperature) for c in calls]  # noqa: E731
    ratios = []
    with trainer.autocast():
        for _ in range(PAIRS):
            state = torch.get_rng_state()
            once = seconds(serve, initial + continuations)
            torch.set_rng_state(state)
            ratios.append(seconds(serve, initial, continuations) / once)
    return ratios


def main() -> None:
    argv = sys.argv[1:]
    steps = 3
    if "--bench_steps" in argv:  # not a field of train.py
        at = argv.index("--bench_steps")
        steps, argv = int(argv[at + 1]), argv[:at] + argv[at + 2 :]
    run, cfg = parse_config(["--threads", "1", *argv])
    if not cfg.off_policy:
        sys.exit("error: bench_step times off-policy steps, whose one generation call it compares with two: leave out --off_policy false")
    tokenizer = load_tokenizer(run.model)
    problems, _ = load_data(run, cfg, tokenizer)
    trainer, shape = build(run, cfg, tokenizer, None), shape_of(run.model)

    attnrl.time = SimpleNamespace(perf_counter=clock)
    original = attnrl.token_logps

    def timed_logps(model, *args, **kwargs):  # the reference model is called inside the update
        started, result = clock(), original(model, *args, **kwargs)
        if model is trainer.reference:
            synchronise()
            trainer.seconds["time_reference"] += clock() - started
        return result

    attnrl.token_logps = timed_logps
    totals: dict[str, float] = defaultdict(float)
    scored, trained, padding, position = [], [], [], 0
    for step in range(steps + 1):
        groups = next_groups(problems, tokenizer, position, trainer.sampler.batch_size, run.seed)
        position += len(groups)
        tokens = trainer.totals["tokens"]
        metrics, batch = trainer.step(groups)
        last = groups, batch
        if step == 0:
            continue
        totals["tokens"] += trainer.totals["tokens"] - tokens
        for name, value in metrics.items():
            if name.startswith("time_"):
                totals[name.removeprefix("time_")] += value
        length = lambda g, r: len(g.prompt_ids) + len(r.ids)  # noqa: E731
        scored += [length(g, r) for g in groups for r in g.rollouts] + [length(g, r) for g in batch for r in g.rollouts if r.start > 0]
        trained += [length(g, r) for g in batch if g.mixed() for r in g.rollouts]
        padding += [metrics["padding"]] if "padding" in metrics else []
        print(f"step {step}: {metrics['time_step']:.1f} s, {len(groups)} problems sampled", file=sys.stderr, flush=True)
    attnrl.token_logps = original

    totals["update"] -= totals["reference"]
    training, threads = totals["update"] + totals["reference"], torch.get_num_threads()
    print(f"{Path(run.model).name}: {steps} steps of {totals['step'] / steps:.1f} s; {trainer.model.device}, {threads} threads")
    print(f"sampled: {totals['tokens'] / totals['generate']:,.0f} tokens/s")
    print(f"trained: {len(trained) / training:,.1f} sequences/s, {np.mean(padding):.1%} of the slots are padding")
    parts = ["generate", "grade", "score", "reference", "update", "push"]
    print("share of the step: " + ", ".join(f"{name} {totals[name] / totals['step']:.1%}" for name in parts))

    peak = matmul_peak(trainer.model.device, trainer.autocast_dtype or torch.float32)
    passes = 4 if run.gradient_checkpointing else 3
    for name, flops in (("update", passes * forward_flops(shape, trained)), ("score", forward_flops(shape, scored))):
        rate = flops / totals[name]
        print(f"{name}: {rate / 1e9:,.1f} GFLOP/s, {rate / peak:.1%} of the {peak / 1e9:,.0f} of a matrix product")

    groups, batch = last
    initial, continuations = requests_of(initial_jobs(groups, cfg), cfg), requests_of(branch_jobs(batch, cfg), cfg)
    ratios = one_call_saving(trainer, initial, continuations)
    print(
        f"generating {len(initial)} responses and {len(continuations)} continuations in two calls takes "
        f"{median(ratios):.2f} times as long as in one ({min(ratios):.2f}–{max(ratios):.2f})"
    )
    trainer.engine.close()


if __name__ == "__main__":
    main()
