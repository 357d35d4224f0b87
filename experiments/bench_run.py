"""Time of the default run, as whole processes, against that of another commit.

    python experiments/bench_run.py --old 1eb60e7    # `python train.py` of both, three times each
    python experiments/bench_run.py --neighbour      # of this tree alone, and beside a busy process
    python experiments/bench_run.py --decode         # only the plain engine of both: sampling, on one thread
    python experiments/bench_run.py --continuous     # this one, and transformers' continuous batching

The two of a pair run one after the other, the second first in every other pair, so that a machine that slows
down slows both. Runs need not generate equally many tokens, so the ratio is of seconds per 1,000 of them.
Parts are sums over metrics.jsonl; `rest` is start, evaluations, checkpoints and what a step does besides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["generate", "score", "update", "grade", "push"]
PROMPTS = """
torch.set_num_threads(1)
tokenizer = load_tokenizer("tiny")
problems = [json.loads(line)["problem"] for line in open("tiny/train.jsonl")][:16]
prompts = [prompt_ids(tokenizer, problem) for problem in problems for _ in range(6)]
"""
DECODE = f"""
import json, time
import torch
try:
    from plumbing.models import load_model, load_tokenizer, prompt_ids
    from plumbing.nouns import Request
    from plumbing.torch_engine import TorchEngine
except ImportError:  # a commit from before plumbing/
    from sampler import Request, TorchEngine, load_model, load_tokenizer, prompt_ids
{PROMPTS}
engine = TorchEngine(load_model("tiny"), tokenizer)
requests = [Request(prompt, 128) for prompt in prompts]
seconds = tokens = 0
for seed in range(-1, 5):  # -1: to warm up
    torch.manual_seed(max(seed, 0))
    started = time.perf_counter()
    responses = engine.generate(requests, temperature=1.0)
    if seed >= 0:
        seconds += time.perf_counter() - started
        tokens += sum(len(r.ids) for r in responses)
print(json.dumps(dict(seconds=seconds, tokens=tokens)))
"""
CONTINUOUS = f"""
import json, time
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from plumbing.models import load_tokenizer, prompt_ids
{PROMPTS}
model = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
settings = GenerationConfig(do_sample=True, max_new_tokens=128, **special)
for warming_up in (True, False):
    started = time.perf_counter()
    outputs = model.eval().generate_batch(prompts, generation_config=settings)
    seconds = time.perf_counter() - started
tokens = sum(len(output.generated_tokens) for output in outputs.values())
print(json.dumps(dict(seconds=seconds, tokens=tokens)))
"""

# Burns a core, and ends with the process that started it, however that ends.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@dataclass
class Run:
    seconds: float  # of the whole process, or of sampling
    tokens: int  # generated
    parts: dict[str, float] = field(default_factory=dict)  # seconds

    def per_1000(self) -> float:
        return 1000 * self.seconds / self.tokens

    def __str__(self) -> str:
        rates = f"{self.per_1000():.4f} s per 1,000, {self.tokens / self.seconds:,.0f} per second"
        return f"{self.seconds:.1f} s, {self.tokens:,} tokens ({rates})"


def of_metrics(seconds: float, records: list[dict]) -> Run:
    """A whole run that took so long, from the lines of its metrics.jsonl."""
    parts = {name: sum(record.get(f"time_{name}", 0.0) for record in records) for name in PARTS}
    return Run(seconds, records[-1]["total_tokens"], parts | {"rest": seconds - sum(parts.values())})


def python(tree: Path, *arguments: str) -> str:
    """What Python prints in that tree. It chooses its own number of threads, as for a user who sets none."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {tree} failed: {(done.stderr.strip() or 'it says nothing').splitlines()[-1]}")
    return done.stdout


def train(tree: Path, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        python(tree, "train.py", *flags, "--output_dir", out)
        seconds = time.perf_counter() - started
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return of_metrics(seconds, [json.loads(line) for line in lines])


def train_beside_a_neighbour(flags: list[str]) -> Run:
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        return train(ROOT, flags)
    finally:
        neighbour.kill()
        neighbour.wait()


def in_pairs(n: int, first: Callable[[], Run], second: Callable[[], Run]) -> Iterator[tuple[Run, Run]]:
    """n pairs of (first, second), of which the second runs before the first in every other pair."""
    for i in range(n):
        if i % 2:
            after = second()
            yield first(), after
        else:
            yield first(), second()


def report(names: list[str], pairs: Iterator[tuple[Run, Run]]) -> None:
    """Print each pair when it is there, then the ratios, then where the time goes (means over the pairs)."""
    runs, ratios, ratio_of = [], [], f"{names[1]} / {names[0]}"
    for i, pair in enumerate(pairs, 1):
        runs.append(pair)
        ratios.append(pair[1].per_1000() / pair[0].per_1000())
        for name, run in zip(names, pair):
            print(f"pair {i}, {name}: {run}")
        print(f"pair {i}, {ratio_of}: {ratios[-1]:.3f}", flush=True)
    print(f"{ratio_of}, median of {len(ratios)}: {median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})")
    for name, own in zip(names, zip(*runs)):
        means = {part: fmean(run.parts[part] for run in own) for part in own[0].parts}
        if means:
            print(f"{name}: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in means.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", default="1eb60e7", help="commit to compare with")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--flags", default="", help='more flags of train.py, for both: "--threads 1"')
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--neighbour", action="store_true", help="this tree alone, and beside a busy process")
    what.add_argument("--decode", action="store_true", help="only sampling with the plain engine")
    what.add_argument("--continuous", action="store_true", help="the same, and continuous batching")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; it must be at least 1")

    flags = args.flags.split()
    if args.neighbour:
        kinds = lambda: train(ROOT, flags), lambda: train_beside_a_neighbour(flags)
        return report(["alone", "neighbour"], in_pairs(args.pairs, *kinds))
    sample = lambda tree, code: Run(**json.loads(python(tree, "-c", code).splitlines()[-1]))
    if args.continuous:
        kinds = lambda: sample(ROOT, DECODE), lambda: sample(ROOT, CONTINUOUS)
        return report(["plain engine", "continuous batching"], in_pairs(args.pairs, *kinds))
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(old)], check=True)
        if subprocess.run(["git", "checkout", args.old], cwd=old, capture_output=True).returncode:
            sys.exit(f"error: there is no commit {args.old} in {ROOT}: give another --old")
        measure = lambda tree: sample(tree, DECODE) if args.decode else train(tree, flags)
        report(["old", "new"], in_pairs(args.pairs, lambda: measure(old), lambda: measure(ROOT)))


if __name__ == "__main__":
    main()
