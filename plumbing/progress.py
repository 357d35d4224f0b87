"""How far a run is, and the bar that shows it."""

from dataclasses import dataclass

from tqdm import tqdm

from plumbing.logs import n_generated, n_valid_tokens
from plumbing.processes import rank


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
        super().__init__(total=total, initial=self._so_far(progress), **style)

    def show(self, progress: Progress, reward: float | None, sampled: int) -> None:
        """After a step: the number of problems sampled, and their mean reward, None without any."""
        if reward is not None:
            self.set_postfix(step=progress.step, reward=f"{reward:.2f}", problems=sampled, refresh=False)
        self.update(self._so_far(progress) - self.n)

    def _so_far(self, progress: Progress) -> int:
        return min(progress.tokens, self.token_budget) if self.token_budget else progress.step
