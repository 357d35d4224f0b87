"""Evaluations: files of samples that can be continued, tables of scores, and two evaluations compared."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.checkpoints import append, digest, whole_lines

HEADER = "benchmark          problems   K       Pass@1  Pass@K  tokens  truncated  timeouts  too long"


class SampleFile:
    """Samples of one benchmark, a line of JSON each, `chunk` at a time, with a progress bar."""

    def __init__(self, path: Path, chunk: int, seed: int = 0):
        self.path, self.chunk, self.seed = path, chunk, seed
        self.n_rows, self.bar = 0, None

    def open(self, n_samples: int) -> list[dict]:
        """What the file holds; an interrupted chunk is cut off. ValueError for more than n_samples."""
        lines = whole_lines(self.path)
        if len(lines) > n_samples:
            remedy = "mend it, or use another --output_dir"
            raise ValueError(
                f"{self.path} has {len(lines)} samples, the evaluation only {n_samples}: {remedy}"
            )
        lines = lines if len(lines) == n_samples else lines[: len(lines) // self.chunk * self.chunk]
        if self.path.exists():
            os.truncate(self.path, sum(map(len, lines)))
        self.n_rows = len(lines)
        self.bar = tqdm(total=n_samples, initial=self.n_rows, desc=self.path.stem, unit="sample")
        if self.n_rows == n_samples:
            self.bar.close()
        return [json.loads(line) for line in lines]

    def seed_next_chunk(self) -> None:
        """Random numbers that depend on nothing but the seed, the file's name and the chunk's place."""
        place = hashlib.sha256(f"{self.seed} {self.path.stem} {self.n_rows}".encode()).digest()
        torch.manual_seed(int.from_bytes(place[:8], "big"))

    def add(self, rows: list[dict]) -> None:
        """Append a chunk, and force it onto the disk."""
        append(self.path, *rows)
        self.n_rows += len(rows)
        self.bar.update(len(rows))
        if self.n_rows == self.bar.total:
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


def compare(path_a: str, path_b: str) -> list[str]:
    """Lines of a table: Pass@1 of two results.json, and B - A with a 95% paired bootstrap interval.
    ValueError, one sentence, where the two do not answer the same problems under the same settings."""
    try:
        a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (path_a, path_b))
        alike = ("benchmarks", "max_new_tokens", "temperature", "top_p")
        settings = [{name: x["settings"][name] for name in alike} for x in (a, b)]
        scores = [{name: result["per_problem"] for name, result in x["results"].items()} for x in (a, b)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        needed = "both must be a results.json of eval.py"
        raise ValueError(f"cannot compare {path_a} with {path_b} ({error!r}); {needed}") from error
    if settings[0] != settings[1]:
        found = f"{path_a} and {path_b} are of {settings[0]} and of {settings[1]}"
        raise ValueError(f"{found}; evaluate both alike to compare them")
    pairs = {name: np.array([scores[0][name], scores[1][name]]) for name in scores[0]}
    lines = [f"{'benchmark':<18}{'A':>7}{'B':>7}{'B - A':>8}   95% interval"]
    rows = {name: [pair] for name, pair in pairs.items()} | {"average": list(pairs.values())}
    for name, chosen in rows.items():
        mean_a, mean_b = 100 * np.mean([pair.mean(axis=1) for pair in chosen], axis=0)
        low, high = bootstrap([b - a for a, b in chosen])
        interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
        lines.append(f"{name:<18}{mean_a:>7.1f}{mean_b:>7.1f}{mean_b - mean_a:>+8.1f}   {interval}")
    return lines


def bootstrap(differences: list, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean difference over benchmarks; problems are drawn anew within each."""
    rng = np.random.default_rng(seed)
    resample = lambda d: d[rng.integers(len(d), size=len(d))]
    means = [np.mean([resample(d).mean() for d in differences]) for _ in range(resamples)]
    return tuple(np.percentile(means, [2.5, 97.5]))
