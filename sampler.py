"""Adaptive sampling: which problems are worth the next tokens (Eq. 8 to 10).

Three decisions say where the next tokens go:
- which problems are branched: one that all its initial responses solve only if its FCI is high (Eq. 8);
- how many of a problem's initial responses are branched: more where it fails more (Eq. 9);
- how many problems the next batch holds: its sequences with non-zero advantage are to meet a target (Eq. 10).

Eq. 8 in the paper filters every problem (`fci_filter="all"`). The released code, and our default, filter only
problems that all initial responses solve; the released running mean includes the batch that is compared. The
released code rounds Eq. 9 up, the paper and we to nearest.
"""

import math
from dataclasses import dataclass

import numpy as np


def expansion(rewards: list[float]) -> int:
    """How many of a problem's initial responses to branch (Eq. 9), at most all of them.

    rewards: correctness of the initial responses, 0 or 1.

    >>> [expansion(r) for r in ([0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1])]
    [6, 4, 2]
    """
    z = sum(rewards) / len(rewards)
    return round(math.exp(-z) * len(rewards))  # Eq. 9


def choose_responses(rewards: list[float], count: int, rng: np.random.Generator) -> list[int]:
    """Indices of the `count` responses to branch: the rarer outcome first, at random within an outcome.

    On a tie the wrong ones come first. Both as in the released code.
    """
    correct = [r > 0.5 for r in rewards]
    correct_are_rarer = 2 * sum(correct) < len(correct)
    order = sorted(rng.permutation(len(rewards)).tolist(), key=lambda i: correct[i] != correct_are_rarer)
    return sorted(order[:count])


@dataclass
class AdaptiveSampler:
    """The running state of Eq. 8 and Eq. 10; `vars()` of it is what a checkpoint stores."""

    batch_size: int  # B_m, problems
    fci_total: float = 0.0  # over the problems whose FCI was compared so far
    fci_count: int = 0

    def keep(self, problem_fci: float, rewards: list[float], fci_filter: str) -> bool:
        """Whether this problem is branched (Eq. 8); counts its FCI in the running mean if it was compared.

        problem_fci: mean over the initial responses of the mean FCI of their steps. fci_filter: which
        problems have to pass, "easy" (those that all initial responses solve), "all" or "none". A problem
        passes when its FCI is above the mean of those compared before it; the first one passes. With
        "drop_easy" no problem that all initial responses solve is branched.
        """
        if fci_filter == "none" or (fci_filter != "all" and min(rewards) < 1):
            return True
        if fci_filter == "drop_easy":
            return False
        passes = self.fci_count == 0 or problem_fci > self.fci_total / self.fci_count  # Eq. 8
        self.fci_total += problem_fci
        self.fci_count += 1
        return passes

    def resize(self, target: int, valid: int, decay: float, smallest: int, largest: int) -> None:
        """Set the next batch size (Eq. 10) from the target B' and the number B'' of sequences with non-zero
        advantage.

        No valid sequence at all counts as one: the batch grows to its bound.
        """
        ratio = target / max(valid, 1)  # B' / B''
        size = round(decay * self.batch_size + (1 - decay) * ratio * self.batch_size)  # Eq. 10
        self.batch_size = min(max(size, smallest), largest)
