"""What a run writes about itself: times, metrics of a step, one tree per step, and the curves.
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
    """Files of JSON lines, which rank 0 writes. lines: how many each has; a checkpoint keeps that."""

    def __init__(self, out: Path, lines: dict[str, int]):
        self.out, self.lines = out, lines

    def add(self, name: str, record: dict) -> None:
        """Append a line to file `name`."""
        if rank() == 0:
            append(self.out / name, record)
        self.lines[name] = self.lines.get(name, 0) + 1


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


# --- Trees and curves -------------------------------------------------------------------------------------


def describe_tree(due: list, step: int) -> dict:
    """One tree as text and numbers, for rollouts.jsonl: of mixed outcomes the largest, else the first."""
    problem = max(due, key=lambda p: p.mixed() * len(p.rollouts))
    rollouts = []
    for r in problem.rollouts:
        row = {"family": r.family, "start": r.start, "reward": r.reward, "finished": r.finished}
        row |= {"steps": r.step_texts, "step_starts": [start for start, _ in r.steps]}
        rollouts.append(row | {"fci": r.fci, "advantages": spans(r.advantages)})
    about = {"step": step, "problem": problem.text, "answers": problem.answers, "branches": problem.branches}
    return about | {"rollouts": rollouts}


def spans(values: list[float]) -> list[list]:
    """[start, end, value] of each run of equal values.

    >>> spans([0.5, 0.5, -1.0])
    [[0, 2, 0.5], [2, 3, -1.0]]
    """
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return [[a, b, values[a]] for a, b in zip(starts, [*starts[1:], len(values)])]


def plot_curves(out: Path) -> None:
    """curves.png from metrics.jsonl: accuracy, entropy, batch composition; rank 0 draws it."""
    if rank() > 0:
        return
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    panels = {
        "accuracy": ["test_accuracy", "reward"],
        "shares": ["valid_tokens", "mc_valid", "filtered"],
        "entropy (nats per token)": ["entropy"],
        "problems per batch": ["batch_size", "valid_problems"],
    }
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(r["total_tokens"] / 1000, r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if name == "test_accuracy" else None)
        axis.set(title=title, xlabel="thousand generated tokens", ylim=(0, None))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)
