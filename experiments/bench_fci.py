"""What FCI costs: time and peak memory of a forward pass without FCI, with it, and with `output_attentions`.

    python experiments/bench_fci.py                              # 1k to 8k tokens; about a quarter of an hour
    python experiments/bench_fci.py --lengths 1024 --repeats 3

The model has the shape of DeepSeek-R1-Distill-Qwen-1.5B but only `--layers` layers of random weights. A
repeat runs all variants one after the other and yields ratios; the table shows their medians, with the range.
"layers" compares the layers alone; "with projection" adds the projection to 151,936 log-probabilities,
measured on 1,024 tokens; "28 layers" takes 28 times a layer and one projection, as the whole model does. On a
CPU, time is the CPU time of one thread, so that a busy machine hardly counts. "+MB" is the memory that a
variant adds to the peak of a forward pass, in a process of its own; "FCI alone" is the peak of its
computation on one layer, with nothing else alive. The naive route, `output_attentions=True`, runs where its
matrices fit.
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

from experiments.bench_logits import resident
from fci import ATTENTION, StepHook, step_ids_of

SHAPE = dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2)
HEAD_DIM, VOCABULARY, LAYERS = 128, 151936, 28  # of the real model
PROMPT = 128  # tokens
NAIVE_STEPS = 60
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HEADER = "| tokens | | layers | with projection | 28 layers | peak MB | +MB | FCI alone, MB |"


def make_model(layers: int):
    torch.manual_seed(0)
    size = dict(num_hidden_layers=layers, max_position_embeddings=65536, vocab_size=1000)
    with torch.device(DEVICE):
        return Qwen2Model(Qwen2Config(**SHAPE, **size)).to(DTYPE).eval()


def even_steps(length: int, n_steps: int) -> torch.Tensor:
    """Step ids (1, L) of a prompt and `n_steps` steps of about equal length."""
    cuts = [i * (length - PROMPT) // n_steps for i in range(n_steps + 1)]
    return torch.tensor([step_ids_of(PROMPT, list(zip(cuts, cuts[1:])))], device=DEVICE)


@torch.no_grad()
def run(model, variant: str, length: int) -> torch.Tensor | None:
    """FCI (S,) by one forward pass. variant: a number of steps, "naive", or "none": only the pass."""
    ids = torch.arange(length, device=DEVICE)[None] % 1000
    model.set_attn_implementation("eager" if variant == "naive" else ATTENTION)
    if variant == "none":
        model(input_ids=ids, use_cache=False)
        return None
    if variant == "naive":
        attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        steps = torch.arange(NAIVE_STEPS + 1, device=DEVICE)
        in_step = (even_steps(length, NAIVE_STEPS)[0][:, None] == steps).to(DTYPE)  # (L, S)
        mean = in_step / in_step.sum(0)
        alpha = torch.stack([mean.T @ A[0] @ mean for A in attentions])  # (layers, H, S, S), Eq. 4
        return alpha.tril(-4).sum(dim=2).amax(dim=(0, 1))  # Eq. 5, 6
    hook = StepHook(even_steps(length, int(variant)))
    model(input_ids=ids, use_cache=False, step_hook=hook)
    return hook.fci()[0]


@torch.no_grad()
def fci_alone(variant: str, length: int) -> None:
    """FCI of one layer of random queries and keys."""
    heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    query, key = (torch.randn(1, n, length, HEAD_DIM, device=DEVICE, dtype=DTYPE) for n in heads)
    hook = StepHook(even_steps(length, int(variant)))
    reset_peak()
    hook.add_layer(query, key, None, None)
    hook.fci()


def seconds(function, *args) -> float:
    clock = time.perf_counter if ON_GPU else time.process_time
    started = clock()
    function(*args)
    if ON_GPU:
        torch.cuda.synchronize()
    return clock() - started


def memory(name: str) -> float:
    """MB of this process: VmRSS, now, or VmHWM, at most since `reset_peak`."""
    if ON_GPU:
        return (torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()) / 1e6
    return resident(name) / 1e6


def reset_peak() -> None:
    """Start to measure: VmHWM and `baseline` are what is there now."""
    global baseline
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    baseline = memory("VmRSS")


def peak_mb(what: str, variant: str, length: int, layers: int) -> float:
    """MB above what was there before, at the peak, in a process that does one thing once."""
    flags = ["--lengths", str(length), "--layers", str(layers), "--peak_of", what, variant]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process at once
    settings = dict(stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(subprocess.run([sys.executable, __file__, *flags], **settings).stdout)


def print_peak_of(what: str, variant: str, length: int, layers: int) -> None:
    """The program of the processes of `peak_mb`."""
    if what == "alone":
        fci_alone(variant, length)
    else:
        model = make_model(layers)
        run(model, "none", PROMPT + 8)
        reset_peak()
        run(model, variant, length)
    print(memory("VmHWM") - baseline)


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", nargs="+", default=["60", "250"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--naive_gb", type=float, default=4.0, help="attention matrices that may exist at once"
    )
    parser.add_argument("--peak_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak_of(*args.peak_of, args.lengths[0], args.layers)
        return

    model = make_model(args.layers)
    head = torch.randn(VOCABULARY, SHAPE["hidden_size"], device=DEVICE, dtype=DTYPE)
    hidden = torch.ones(1024, SHAPE["hidden_size"], device=DEVICE, dtype=DTYPE)
    project = lambda: (hidden @ head.T).float().log_softmax(-1)
    how = f"{args.threads} threads, {args.repeats} repeats"
    with_projection = lambda t, v: t[v] + t["head"]
    whole_model = lambda t, v: LAYERS / args.layers * t[v] + t["head"]
    print(f"{args.layers} layers, {DTYPE} on {DEVICE}, {how}; naive: output_attentions=True, 60 steps")
    print(f"{HEADER}\n{'| --- ' * 8}|")
    for length in args.lengths:
        fits = args.layers * SHAPE["num_attention_heads"] * length**2 * DTYPE.itemsize < args.naive_gb * 1e9
        variants = ["none", *args.steps, *(["naive"] if fits else [])]
        for v in variants:
            run(model, v, length)  # warm up
        times = []
        for _ in range(args.repeats):
            of_variants = {v: seconds(run, model, v, length) for v in variants}
            times.append(of_variants | {"head": seconds(project) * length / 1024})
        peaks = {v: peak_mb("pass", v, length, args.layers) for v in variants}
        for v in variants:
            name = {"none": "without FCI", "naive": "naive"}.get(v, f"FCI, {v} steps")
            cells = [
                spread([t[v] / t["none"] for t in times]),
                spread([with_projection(t, v) / with_projection(t, "none") for t in times]),
                spread([whole_model(t, v) / whole_model(t, "none") for t in times]),
                f"{peaks[v]:,.0f}",
                f"{peaks[v] - peaks['none']:+,.0f}",
                f"{peak_mb('alone', v, length, args.layers):,.0f}" if v.isdigit() else "",
            ]
            print(f"| {length} | {name} | {' | '.join(cells)} |", flush=True)
    shortest = min(args.lengths)
    error = (run(model, str(NAIVE_STEPS), shortest) - run(model, "naive", shortest)).abs()
    print(f"largest difference of FCI from the naive route at {shortest} tokens: {error.max():.1e}")


if __name__ == "__main__":
    main()
