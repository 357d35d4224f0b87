"""Evaluations: files of samples that can be continued, and tables of scores."""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoints import append, cut_log, digest, whole_lines
from plumbing.settings import refuse_if

HEADER = "benchmark          problems   K       Pass@1  Pass@K  tokens  truncated  timeouts  too long"


class SampleFile:
    """Samples of one benchmark, a line of JSON each, `chunk` at a time, with a progress bar."""

    def __init__(self, path: Path, chunk: int, seed: int = 0):
        self.path, self.chunk, self.seed = path, chunk, seed

    def open(self, n_samples: int) -> list[dict]:
        """What the file holds; an interrupted chunk is cut off. ValueError for more than n_samples."""
        lines = whole_lines(self.path)
        found = f"{self.path} has {len(lines)} samples, the evaluation only {n_samples}"
        refuse_if(len(lines) > n_samples, f"{found}: mend it, or use another --output_dir")
        lines = lines if len(lines) == n_samples else lines[: len(lines) // self.chunk * self.chunk]
        cut_log(self.path, len(lines))
        self.bar = tqdm(total=n_samples, initial=len(lines), desc=self.path.stem, unit="sample")
        if len(lines) == n_samples:
            self.bar.close()
        return [json.loads(line) for line in lines]

    def seed_chunk(self, n_before: int) -> None:
        """Random numbers that depend on nothing but the seed, the file's name and the samples before."""
        place = hashlib.sha256(f"{self.seed} {self.path.stem} {n_before}".encode()).digest()
        torch.manual_seed(int.from_bytes(place[:8], "big"))

    def add(self, rows: list[dict]) -> None:
        """Append a chunk, and force it onto the disk."""
        append(self.path, *rows)
        self.bar.update(len(rows))
        if self.bar.n == self.bar.total:
            self.bar.close()  # before the table's next row is printed


def describe(args, benchmarks: dict[str, tuple[list[dict], int]], engine: str) -> dict:
    """All that decides samples and scores: flags, weights, problems, samples per problem."""
    names = ("model", "max_new_tokens", "temperature", "top_p", "seed", "chunk")
    settings = {name: getattr(args, name) for name in names}
    if Path(args.model).is_dir():
        settings["model"] = str(Path(args.model).resolve())
        settings["weights"] = [digest(path)[:16] for path in sorted(Path(args.model).glob("*.safetensors"))]
    settings |= {"engine": engine, "benchmarks": {}}
    for name, (problems, samples) in benchmarks.items():
        content = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]
        settings["benchmarks"][name] = {"problems": len(problems), "samples": samples, "sha256": content}
    return settings


def percent(value: float, stderr: float | None) -> str:
    """Share and standard error in %, without the error where there is none."""
    return f"{100 * value:.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def table_row(name: str, r: dict) -> str:
    """A line under HEADER of what `eval.scores` returns."""
    pass_1 = percent(r["pass@1"], r["stderr"])
    quality = f"{name:<18}{r['n_problems']:>9}{r['samples']:>4}{pass_1:>13}{100 * r['pass@k']:>8.1f}"
    failures = f"{r['truncated']:>11.1%}{r['timeouts']:>10}{r['long_prompts']:>10}"
    return f"{quality}{r['mean_tokens']:>8.0f}{failures}"
