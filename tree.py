"""Where to branch, and what a branch teaches: branch points, the tree, values and advantages.

The tree of one problem. The root's children are the initial responses. A response with branch points p1 < p2 is cut into
segments [0, p1), [p1, p2), [p2, end); a continuation sampled from p is a sibling of the segment that starts at p:

    root ─┬─ [0, p1) ─┬─ [p1, p2) ─┬─ [p2, end)        the initial response
          │           │            ├─ [p2, ...)        its continuations from p2
          │           │            └─ [p2, ...)
          │           ├─ [p1, ...)                     its continuations from p1
          │           └─ [p1, ...)
          └─ the other initial responses

    V(s) = mean correctness of the leaves below s                                                   (Eq. 2)
    A(s) = (V(s) - V(root) + V(s) - V(parent(s))) / sqrt(number of leaves below s)                  (Eq. 3)

Every token of a segment has its segment's advantage, and every leaf is one training sequence from root to leaf.

From the released code, not the paper: the distance `gap` between branch points, and the fall-back to the earliest steps.
Unlike the released code, initial responses that were not branched are kept.
"""

from dataclasses import dataclass, field

import numpy as np

REFERENCE_LENGTH = 8192  # response length at which `gap` is meant as given; shorter responses scale it down


def candidates(fci: np.ndarray, quantile: float) -> np.ndarray:
    """Steps that ATB may branch at (Eq. 7), ascending: those in the top `quantile` by FCI, none where it is 0.

    >>> candidates(np.array([0, 1, 5, 2, 9.0]), 0.4)
    array([2, 4])
    """
    return np.flatnonzero((fci >= np.quantile(fci, 1 - quantile)) & (fci > 0))  # Eq. 7


def branch_points(
    rule: str, starts: list[int], fci: np.ndarray, entropies: np.ndarray, n: int, quantile: float, gap: int, rng: np.random.Generator
) -> list[int]:
    """Up to `n` token positions of one response from which to sample again, ascending.

    rule: "fci" (ATB, Eq. 7), "entropy" (TreeRL: the n most uncertain tokens), "random" or "earliest" (controls: step starts).
    starts: (T,) first token of each step. fci: (T,). entropies: (L,) nats. quantile: rho, the share of steps that are candidates.
    gap: least distance in tokens between step starts chosen, and from the response's start, for a response of
    `REFERENCE_LENGTH` tokens; scaled down in proportion for shorter ones. Token 0 is never a branch point.

    >>> rng = np.random.default_rng(0)
    >>> branch_points("fci", [0, 9, 18, 27, 36], np.array([0, 1, 5, 2, 9.0]), np.zeros(45), 2, 0.4, 0, rng)
    [18, 36]
    """
    if rule == "entropy":
        tokens = np.argsort(-entropies[1:], kind="stable")[:n] + 1  # ties by position
        return sorted(tokens.tolist())
    steps = np.arange(1, len(starts))  # never the first step
    if rule == "fci":
        order = [*(k for k in candidates(fci, quantile) if k > 0), *steps]  # the earliest candidates, then the earliest steps
    elif rule == "random":
        order = rng.permutation(steps)
    elif rule == "earliest":
        order = steps
    else:
        raise ValueError(f"unknown branching rule {rule!r}: use fci, entropy, random or earliest")
    gap = max(1, gap * min(len(entropies), REFERENCE_LENGTH) // REFERENCE_LENGTH)
    points: list[int] = []
    for k in order:
        if len(points) < n and all(abs(starts[k] - p) >= gap for p in [0, *points]):
            points.append(starts[k])
    return sorted(points)


@dataclass
class Leaf:
    """One complete response: an initial one, or the prefix of an initial one and a continuation."""

    family: int  # which initial response it descends from
    start: int  # response position of the first token that is its own; 0 for the initial response
    length: int  # response tokens, prefix included
    reward: float  # correctness, 0 or 1


@dataclass
class Segment:
    """A node of the tree: response tokens [start, end) shared by all leaves below it."""

    parent: "Segment | None" = None
    start: int = 0
    end: int = 0
    rewards: list[float] = field(default_factory=list)  # of the leaves below

    @property
    def value(self) -> float:
        return sum(self.rewards) / len(self.rewards)  # Eq. 2

    def path(self) -> list["Segment"]:
        """Segments from the root's child down to this one."""
        return [*self.parent.path(), self] if self.parent else []


def grow(leaves: list[Leaf]) -> list[Segment]:
    """The tree's last segment for each leaf; the rest hangs on `parent`. Every family needs its initial response."""
    root = Segment()
    tips: list[Segment | None] = [None] * len(leaves)
    for family in {leaf.family: None for leaf in leaves}:
        members = [i for i, leaf in enumerate(leaves) if leaf.family == family]
        initial = next(i for i in members if leaves[i].start == 0)
        points = sorted({leaves[i].start for i in members} - {0})
        parents, segment = {}, root
        for start, end in zip([0, *points], [*points, leaves[initial].length]):
            parents[start] = segment
            segment = Segment(segment, start, end)
        for i in members:
            start = leaves[i].start
            tips[i] = segment if i == initial else Segment(parents[start], start, leaves[i].length)
    for leaf, tip in zip(leaves, tips):
        for segment in [root, *tip.path()]:
            segment.rewards.append(leaf.reward)
    return tips


def tree_advantages(leaves: list[Leaf]) -> list[np.ndarray]:
    """Advantage of every response token of every leaf (Eq. 3): one fp32 array of shape (length,) a leaf."""
    per_leaf = []
    for tip in grow(leaves):
        path = tip.path()
        v_root = path[0].parent.value
        advantages = []
        for s in path:
            a = (s.value - v_root + s.value - s.parent.value) / len(s.rewards) ** 0.5  # Eq. 3
            advantages += [a] * (s.end - s.start)
        per_leaf.append(np.array(advantages, dtype=np.float32))
    return per_leaf


def group_advantages(leaves: list[Leaf]) -> list[np.ndarray]:
    """GRPO: (R - mean) / std over the group, the same for every token. Needs rewards that differ; sample std, as in verl."""
    rewards = np.array([leaf.reward for leaf in leaves])
    normalised = (rewards - rewards.mean()) / rewards.std(ddof=1)
    return [np.full(leaf.length, a, dtype=np.float32) for leaf, a in zip(leaves, normalised)]
