"""What FCI costs: time and peak memory of a log-probability pass without FCI, with it, and with the naive `output_attentions=True`.

    python experiments/bench_fci.py                              # 1k to 8k tokens; about a quarter of an hour
    python experiments/bench_fci.py --lengths 1024 --repeats 3

The model has the shape of DeepSeek-R1-Distill-Qwen-1.5B but only `--layers` layers of random weights. A repeat runs all variants one after
the other and yields ratios; the table shows their medians, with the range. "layers" compares the layers alone; "with projection" adds the
projection to 151,936 log-probabilities, measured on 1,024 tokens; "28 layers" takes 28 times a layer and one projection, as the whole model does. On a CPU, time is the
CPU time of one thread, so that a busy machine hardly counts. "+MB" is the memory that a variant adds to the peak of a forward pass, in a process
of its own; "FCI alone" is the peak of its computation on one layer, with nothing else alive. The naive route runs where its matrices fit.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen2Config, Qwen2Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.bench_logits import resident  # noqa: E402
from fci import FCI, step_ids_of  # noqa: E402

SHAPE = dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2)
HEAD_DIM, VOCABULARY, LAYERS = 128, 151936, 28  # of the real model
PROMPT = 128  # tokens
NAIVE_STEPS = 60
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def make_model(layers: int):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = Qwen2Config(**SHAPE, num_hidden_layers=layers, max_position_embeddings=65536, vocab_size=1000)
        return Qwen2Model(config).to(DTYPE).eval()


def even_steps(length: int, n_steps: int) -> torch.Tensor:
    """Step ids (1, L) of a prompt and `n_steps` steps of like length."""
    cuts = [i * (length - PROMPT) // n_steps for i in range(n_steps + 1)]
    return torch.tensor([step_ids_of(PROMPT, list(zip(cuts, cuts[1:])))], device=DEVICE)


@torch.no_grad()
def run(model, variant: str, length: int) -> torch.Tensor | None:
    """One forward pass of the layers. variant: "none", "naive" or a number of steps; returns FCI (S,) if it is computed."""
    ids = torch.arange(length, device=DEVICE)[None] % 1000
    model.set_attn_implementation("eager" if variant == "naive" else "fci")
    if variant == "none":
        model(input_ids=ids, use_cache=False)
        return None
    if variant == "naive":
        attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        member = (even_steps(length, NAIVE_STEPS)[0][:, None] == torch.arange(NAIVE_STEPS + 1, device=DEVICE)).to(DTYPE)  # (L, S)
        mean = member / member.sum(0)
        alpha = torch.stack([mean.T @ A[0] @ mean for A in attentions])  # (layers, H, S, S), Eq. 4
        return alpha.tril(-4).sum(dim=2).amax(dim=(0, 1))  # Eq. 5, 6
    scores = FCI(even_steps(length, int(variant)))
    model(input_ids=ids, use_cache=False, fci=scores)
    return scores.values[0]


@torch.no_grad()
def fci_alone(variant: str, length: int) -> None:
    """FCI of one layer of random queries and keys."""
    q, k = (torch.randn(1, SHAPE[f"num_{n}_heads"], length, HEAD_DIM, device=DEVICE, dtype=DTYPE) for n in ("attention", "key_value"))
    scores = FCI(even_steps(length, int(variant)))
    reset_peak()
    scores.add_layer(q, k, None, None)


def seconds(function, *args) -> float:
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    started = clock()
    function(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def memory(name: str) -> float:
    """MB of this process: VmRSS, now, or VmHWM, at most since `reset_peak`."""
    if DEVICE == "cuda":
        return (torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()) / 1e6
    return resident(name) / 1e6


def reset_peak() -> None:
    global baseline
    torch.cuda.reset_peak_memory_stats() if DEVICE == "cuda" else Path("/proc/self/clear_refs").write_text("5")
    baseline = memory("VmRSS")


def peak_mb(what: str, variant: str, length: int, layers: int) -> float:
    """MB above what was there before, at the peak, in a process that does one thing once."""
    command = [sys.executable, __file__, "--lengths", str(length), "--layers", str(layers), "--peak_of", what, variant]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process at once
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", nargs="+", default=["60", "250"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--naive_gb", type=float, default=4.0, help="attention matrices that may exist at once")
    parser.add_argument("--peak_of", nargs=2, help=argparse.SUPPRESS)  # the program of the processes of `peak_mb`
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.peak_of:
        what, variant = args.peak_of
        if what == "alone":
            fci_alone(variant, args.lengths[0])
        else:
            model = make_model(args.layers)
            run(model, "none", PROMPT + 8)
            reset_peak()
            run(model, variant, args.lengths[0])
        print(memory("VmHWM") - baseline)
        return

    model, head = make_model(args.layers), torch.randn(VOCABULARY, SHAPE["hidden_size"], device=DEVICE, dtype=DTYPE)
    project = lambda: (torch.ones(1024, SHAPE["hidden_size"], device=DEVICE, dtype=DTYPE) @ head.T).float().log_softmax(-1)  # noqa: E731
    print(
        f"{args.layers} layers, {DTYPE} on {DEVICE}, {args.threads} threads, {args.repeats} repeats; naive: output_attentions=True, 60 steps"
    )
    print(f"| tokens | | layers | with projection | 28 layers | peak MB | +MB | FCI alone, MB |\n{'| --- ' * 8}|")
    for length in args.lengths:
        fits = args.layers * SHAPE["num_attention_heads"] * length**2 * DTYPE.itemsize < args.naive_gb * 1e9
        variants = ["none", *args.steps, *(["naive"] if fits else [])]
        for v in variants:
            run(model, v, length)  # warm up
        times = [
            {v: seconds(run, model, v, length) for v in variants} | {"head": seconds(project) * length / 1024} for _ in range(args.repeats)
        ]
        peaks = {v: peak_mb("pass", v, length, args.layers) for v in variants}
        for v in variants:
            name = {"none": "without FCI", "naive": "naive"}.get(v, f"FCI, {v} steps")
            layers = [t[v] / t["none"] for t in times]
            few, whole = ([(n * t[v] + t["head"]) / (n * t["none"] + t["head"]) for t in times] for n in (1, LAYERS / args.layers))
            memory_of = f"{peaks[v]:,.0f} | {peaks[v] - peaks['none']:+,.0f}"
            alone = f"{peak_mb('alone', v, length, args.layers):,.0f}" if v.isdigit() else ""
            print(f"| {length} | {name} | {spread(layers)} | {spread(few)} | {spread(whole)} | {memory_of} | {alone} |", flush=True)
    shortest = min(args.lengths)
    error = (run(model, str(NAIVE_STEPS), shortest) - run(model, "naive", shortest)).abs()
    print(f"largest difference of FCI from the naive route at {shortest} tokens: {error.max():.1e}")


if __name__ == "__main__":
    main()
