"""What a run says about itself: times, lines of logs, the metrics of a step, how far it is.

docs/metrics.md explains each name. Problems and rollouts are those of attnrl.py."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

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
    """Files of JSON lines, which rank 0 writes. lines: how many each has; a checkpoint keeps that.
    track: name of a tracker that gets the lines of metrics.jsonl, too, or "none"."""

    def __init__(self, out: Path, lines: dict[str, int], track: str = "none"):
        self.out, self.lines, self.track, self.send = out, lines, track, None

    def add(self, name: str, *records: dict) -> None:
        """Append lines to file `name`."""
        if rank() == 0:
            append(self.out / name, *records)
            if name == "metrics.jsonl" and self.track != "none":
                self.hand_over(*records)
        self.lines[name] = self.lines.get(name, 0) + len(records)

    def hand_over(self, record: dict) -> None:
        """Give a line's numbers to the tracker. One that fails gets no more of them, and stops nothing."""
        try:
            self.send = self.send or tracker(self.track, self.out)
            self.send({name: x for name, x in record.items() if isinstance(x, int | float)})
        except Exception as error:  # the network, a login, a version: each has its own kinds
            print(f"track={self.track} failed and is left alone ({type(error).__name__}: {error})")
            self.track = "none"


def tracker(name: str, out: Path) -> Callable[[dict], object]:
    """What takes a line: of "trackio", "wandb", or "tensorboard", which writes into the run's directory."""
    if name == "tensorboard":
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(out / name))
        return lambda line: [writer.add_scalar(key, x, line["step"]) for key, x in line.items()]
    module = import_module(name)
    module.init(project="attnrl", name=out.name, config=json.loads((out / "config.json").read_text()))
    return module.log


def stopped(error: NonFiniteUpdates, path: Path) -> RunStopped:
    """Writes the sequences of the last update that was not finite to `path`, and returns what to raise."""
    reason, sequences = error.args
    if rank() == 0:
        path.write_text(json.dumps([asdict(s) for s in sequences]))
    return RunStopped(f"{reason}, see {path} for its rollouts; to skip more, raise --max_skipped_updates")


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
    taken = [report for report in updates if not report["skipped"]]
    skipped = {"skipped_updates": len(updates) - len(taken)} if updates else {}
    if not taken:
        return skipped
    sums = {name: sum(report[name] for report in taken) for name in taken[0]}
    n_tokens, padding = sums.pop("response_tokens"), 1 - sums.pop("read") / sums.pop("slots")
    del sums["skipped"], sums["grad_norm"]
    grad_norm = float(np.mean([report["grad_norm"] for report in taken]))
    averages = {name: value / n_tokens for name, value in sums.items()}
    return averages | {"grad_norm": grad_norm, "padding": padding} | skipped


@dataclass
class Progress:
    """How far a run is; a checkpoint keeps it."""

    step: int = 0  # batches trained on
    position: int = 0  # in the stream of training problems
    tokens: int = 0  # generated for training
    valid_tokens: int = 0  # of sequences with non-zero advantage
    updates: int = 0  # optimiser steps
    first_accuracy: float = 0.0  # held out, before training
    test_accuracy: float = 0.0  # held out, at the last evaluation

    def count(self, new: list, due: list, updates: list[dict]) -> None:
        """Add what a step did: problems sampled, the batch trained on, the learner's reports."""
        self.step += bool(due)
        self.position += len(new)
        self.tokens += n_generated(new, due)
        self.valid_tokens += n_valid_tokens(due)
        self.updates += sum(not report["skipped"] for report in updates)

    def totals(self) -> dict[str, int]:
        """For metrics.jsonl."""
        totals = {"total_problems": self.position, "total_updates": self.updates}
        return totals | {"total_tokens": self.tokens, "total_valid_tokens": self.valid_tokens}

    def enough(self, run, pending: bool = False) -> bool:
        """Whether nothing new is sampled any more. A pending batch will be the step after this one."""
        return self.step + pending >= run.steps or 0 < run.token_budget <= self.tokens


class ProgressBar(tqdm):
    """In generated tokens where they are limited, else in steps; rank 0 shows it."""

    def __init__(self, run, progress: Progress):
        self.token_budget = run.token_budget
        unit, total = ("token", run.token_budget) if run.token_budget else ("step", run.steps)
        style = dict(unit=unit, unit_scale=unit == "token", dynamic_ncols=True, disable=rank() > 0)
        # smoothing=0: time left by the mean rate; an evaluation would dominate that of the latest steps.
        super().__init__(total=total, initial=self._so_far(progress), smoothing=0, **style)

    def show(self, progress: Progress, reward: float | None, sampled: int) -> None:
        """After a step: the number of problems sampled, and their mean reward, None without any."""
        if reward is not None:
            self.set_postfix(step=progress.step, reward=f"{reward:.2f}", problems=sampled, refresh=False)
        self.update(self._so_far(progress) - self.n)

    def _so_far(self, progress: Progress) -> int:
        return min(progress.tokens, self.token_budget) if self.token_budget else progress.step
