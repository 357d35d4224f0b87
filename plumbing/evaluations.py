"""Evaluations: what decides their samples, and files of samples that can be continued."""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoints import append, cut_log, digest, whole_lines
from plumbing.settings import refuse_if


class SampleFile:
    """Samples of one benchmark, a line of JSON each, `chunk` at a time, with a progress bar."""

    def __init__(self, path: Path, chunk: int, seed: int = 0):
        self.path, self.chunk, self.seed = path, chunk, seed
        self.n_rows, self.bar = 0, None

    def open(self, n_samples: int) -> list[dict]:
        """What the file holds; an interrupted chunk is cut off. ValueError for more than n_samples."""
        n_whole = len(whole_lines(self.path))
        why = f"{self.path} has {n_whole} samples, the evaluation only {n_samples}"
        refuse_if(n_whole > n_samples, f"{why}: mend it, or use another --output_dir")
        self.n_rows = n_whole if n_whole == n_samples else n_whole // self.chunk * self.chunk
        cut_log(self.path, self.n_rows)
        style = dict(desc=self.path.stem, unit="sample", disable=self.n_rows == n_samples)
        self.bar = tqdm(total=n_samples, initial=self.n_rows, **style)
        return [json.loads(line) for line in whole_lines(self.path)]

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
