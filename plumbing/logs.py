"""What a run writes about itself: times, metrics of a step, and the curves.
docs/metrics.md explains each name.

Problems and rollouts are those of attnrl.py; nothing else in plumbing/ knows them.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from plumbing.agreement import mismatch
from plumbing.checkpoints import append
from plumbing.learner import NonFiniteUpdates
from plumbing.processes import rank
from plumbing.settings import RunStopped
from plumbing.track import Tracker


class Clock:
    """Seconds by part: `with clock("score"):` adds to `seconds["time_score"]`. now: what reads the time."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.seconds = now, defaultdict(float)

    @contextmanager
    def __call__(self, part: str):
        started = self.now()
        try:
            yield
        finally:
            self.seconds[f"time_{part}"] += self.now() - started


class Log:
    """Files of JSON lines, which rank 0 writes. lines: how many each has; a checkpoint keeps that. track: name
    of the tracker that metrics.jsonl is handed to, too."""

    def __init__(self, out: Path, lines: dict[str, int], track: str = "none"):
        self.out, self.lines, self.tracker = out, lines, Tracker(track, out)

    def add(self, name: str, *records: dict) -> None:
        """Append lines to file `name`."""
        if rank() == 0:
            append(self.out / name, *records)
        if name == "metrics.jsonl":
            self.tracker.add(*records)
        self.lines[name] = self.lines.get(name, 0) + len(records)


def stopped(error: NonFiniteUpdates, path: Path) -> RunStopped:
    """Writes the sequences of the last update that was not finite to `path`, and returns what to raise."""
    reason, sequences = error.args
    if rank() == 0:
        path.write_text(json.dumps([asdict(s) for s in sequences]))
    remedy = "to skip more, raise --max_skipped_updates"
    return RunStopped(f"{reason}, see {path} for the last one's rollouts; {remedy}")


# --- Metrics of a step ------------------------------------------------------------------------------------


def sampled(new: list, due: list) -> list:
    """The rollouts that a step sampled: initial responses of the new, continuations of the due problems."""
    return [r for p in new for r in p.initial()] + [r for p in due for r in p.rollouts if r.start > 0]


def n_generated(new: list, due: list) -> int:
    """Tokens sampled in a step; prefixes of continuations were sampled before."""
    return sum(len(r.ids) - r.start for r in sampled(new, due))


def n_valid_tokens(due: list) -> int:
    """Tokens of the sequences of a batch that have a non-zero advantage somewhere."""
    return sum(len(r.ids) for p in due for r in p.rollouts if any(r.advantages))


def step_metrics(new: list, due: list, updates: list[dict]) -> dict:
    """All metrics of a step: of the problems sampled, of the batch trained on, and of its updates."""
    drift = mismatch([r.gaps() for r in sampled(new, due)])
    return drift | sampling_metrics(new) | batch_metrics(due) | update_metrics(updates)


def sampling_metrics(new: list) -> dict:
    """Of the problems sampled and their initial responses."""
    if not new:
        return {}
    initial = [r for p in new for r in p.initial()]
    entropies = np.concatenate([np.array(r.entropies, dtype=np.float32) for r in initial])
    return {
        "reward": float(np.mean([r.reward for r in initial])),
        "entropy": float(entropies.mean()),
        "response_tokens": float(np.mean([len(r.ids) for r in initial])),
        "truncated": float(np.mean([not r.finished for r in initial])),
        "batch_size": len(new),
        "filtered": float(np.mean([not p.kept for p in new])),
    }


def batch_metrics(due: list) -> dict:
    """What Figures 4, 6 and 7 plot, of the batch trained on; ratios with nothing below are None."""
    if not due:
        return {}
    trained = [p for p in due if p.rollouts[0].advantages]  # dropped problems have none
    leaves = [r for p in trained for r in p.rollouts]
    n_tokens, n_distinct = sum(len(r.ids) for r in leaves), sum(len(r.ids) - r.start for r in leaves)
    prompts = sum(len(p.prompt_ids) for p in trained)
    copies = sum(len(p.prompt_ids) * len(p.rollouts) for p in trained)  # of prompts, one per leaf
    branched = [p for p in due if p.branches]
    mc = [[r.reward for r in p.rollouts if r.start > 0] for p in branched]
    solved = lambda p: float(np.mean([r.reward for r in p.initial()]))
    ratio = lambda a, b: a / b if b else None
    share = lambda flags: float(np.mean(flags)) if flags else None
    rescued = lambda z: share([p.mixed() for p in branched if solved(p) == z])
    return {
        "mc_solve_all": share([min(rewards) == 1 for rewards in mc]),
        "mc_solve_none": share([max(rewards) == 0 for rewards in mc]),
        "mc_valid": share([min(rewards) < max(rewards) for rewards in mc]),
        "rescued_all_right": rescued(1),
        "rescued_all_wrong": rescued(0),
        "valid_problems": sum(p.mixed() for p in due),
        "valid_sequences": sum(any(r.advantages) for r in leaves),
        "sequences": len(leaves),
        "valid_tokens": ratio(n_valid_tokens(due), n_tokens),
        "tree_reuse": ratio(n_tokens, n_distinct),
        "tree_reuse_with_prompts": ratio(n_tokens + copies, n_distinct + prompts),
        "problem_fci": [p.fci for p in due],
        "problem_initial_reward": [solved(p) for p in due],
        "problem_valid": [p.mixed() for p in due],
    }


def update_metrics(updates: list[dict]) -> dict:
    """Averages per token, and grad_norm per update, over the updates not skipped; from their reports."""
    if not updates:
        return {}
    totals: dict[str, float] = defaultdict(float)
    taken = [u for u in updates if not u["skipped"]]
    skipped = {"skipped_updates": len(updates) - len(taken)}
    if not taken:
        return skipped
    for report in taken:
        for name, value in report.items():
            totals[name] += value
    n_tokens, padding = totals.pop("response_tokens"), 1 - totals.pop("read") / totals.pop("slots")
    del totals["skipped"], totals["grad_norm"]
    averages = {name: value / n_tokens for name, value in totals.items()}
    grad_norm = float(np.mean([u["grad_norm"] for u in taken]))
    return averages | {"grad_norm": grad_norm, "padding": padding} | skipped
