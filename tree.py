"""Where to branch, and what a branch teaches: branch points, the tree, values and advantages.

The tree of one problem. The root's children are the initial responses, which branch points p1 < p2 cut into
segments; a continuation sampled from p is a sibling of the segment that starts at p:

    root ─┬─ [0, p1) ─┬─ [p1, p2) ─┬─ [p2, end)        the initial response
          │           │            ├─ [p2, ...)        its continuations from p2
          │           │            └─ [p2, ...)
          │           ├─ [p1, ...)                     its continuations from p1
          │           └─ [p1, ...)
          └─ the other initial responses

    V(s) = mean correctness of the leaves below s                                                   (Eq. 2)
    A(s) = (V(s) - V(root) + V(s) - V(parent(s))) / sqrt(number of leaves below s)                  (Eq. 3)

Every token has its segment's advantage, and every leaf is one training sequence, from root to leaf.

From the released code, not the paper: the distance `gap` between branch points, and the fall-back to the
earliest steps. Unlike the released code, initial responses that were not branched are kept.
"""

from dataclasses import dataclass, field

import numpy as np

REFERENCE_LENGTH = 8192  # response length at which `gap` is meant as given; shorter responses scale it down

# --- Branch points ----------------------------------------------------------------------------------------


@dataclass
class Measured:
    """An initial response as a branching rule sees it: T steps, L tokens."""

    step_texts: list[str]  # (T,)
    starts: list[int]  # (T,), first token of each step
    fci: np.ndarray  # (T,), of each step; empty where it was not measured
    entropies: np.ndarray  # (L,), nats, of each token's distribution
    reward: float  # correctness, 0 or 1
    n_branchable: int  # leading steps that may be branched: those before the one with the last `</think>`


def fci_candidates(fci: np.ndarray, quantile: float) -> np.ndarray:
    """Steps that ATB may branch at (Eq. 7), ascending: the share `quantile` of most FCI, never one of FCI 0.

    >>> fci_candidates(np.array([0, 1, 5, 2, 9.0]), 0.4)
    array([2, 4])
    """
    return np.flatnonzero((fci >= np.quantile(fci, 1 - quantile)) & (fci > 0))  # Eq. 7


def by_fci(response: Measured, quantile: float, rng) -> list[int]:
    """ATB: starts of the candidates of Eq. 7, the earliest first; where they run out, the earliest steps."""
    return [response.starts[k] for k in fci_candidates(response.fci, quantile)] + response.starts


def by_entropy(response: Measured, quantile: float, rng) -> list[int]:
    """TreeRL: the most uncertain tokens; ties by position."""
    return np.argsort(-response.entropies, kind="stable").tolist()


def by_sentence_entropy(response: Measured, quantile: float, rng) -> list[int]:
    """DATPO (arXiv:2609.08650): the steps whose tokens are the most uncertain on average."""
    means = [tokens.mean() for tokens in np.split(response.entropies, response.starts[1:])]
    return [response.starts[k] for k in np.argsort(np.negative(means), kind="stable")]


def at_random(response: Measured, quantile: float, rng: np.random.Generator) -> list[int]:
    """A control: step starts in any order."""
    return [response.starts[k] for k in rng.permutation(np.arange(1, len(response.starts)))]


def earliest(response: Measured, quantile: float, rng) -> list[int]:
    """A control: step starts from left to right."""
    return response.starts


def late(response: Measured, quantile: float, rng: np.random.Generator) -> list[int]:
    """DEEP-GRPO (arXiv:2602.14169): in wrong responses only, step k of T with weight (k / T)^2."""
    weights = np.arange(1, len(response.starts) + 1) ** 2
    drawn = rng.choice(response.starts, len(weights), replace=False, p=weights / weights.sum())
    return drawn.tolist() if response.reward < 0.5 else []


RULES = dict(fci=by_fci, entropy=by_entropy, sentence_entropy=by_sentence_entropy)  # for `--branching`
RULES |= dict(random=at_random, earliest=earliest, late=late)


def branch_points(rule: str, response: Measured, n: int, quantile: float, gap: int, rng) -> list[int]:
    """Up to `n` token positions of one response from which to sample again, ascending.

    Walks the rule's positions in their order, and takes those that lie before the step with the last
    `</think>`, and at least `gap` tokens from the start and from each other. quantile: rho of Eq. 7.

    >>> response = Measured(["…"] * 5, [0, 9, 18, 27, 36], np.array([0, 1, 5, 2, 9.0]), np.zeros(45), 1.0, 5)
    >>> branch_points("fci", response, n=2, quantile=0.4, gap=0, rng=np.random.default_rng(0))
    [18, 36]
    """
    length = len(response.entropies)
    end = [*response.starts, length][response.n_branchable]
    gap = max(1, gap * min(length, REFERENCE_LENGTH) // REFERENCE_LENGTH)
    points: list[int] = []
    for position in RULES[rule](response, quantile, rng):
        if len(points) < n and position < end and all(abs(position - p) >= gap for p in [0, *points]):
            points.append(position)
    return sorted(points)


# --- The tree ---------------------------------------------------------------------------------------------


@dataclass
class Leaf:
    """One complete response: an initial one, or the prefix of an initial one and a continuation."""

    family: int  # which initial response it descends from
    start: int  # response position of the first token that is its own; 0 for the initial response
    length: int  # response tokens, prefix included
    reward: float  # correctness, 0 or 1


@dataclass(eq=False)
class Segment:
    """A node of the tree: response tokens [start, end) that all leaves below share; none in the root."""

    parent: "Segment | None" = None
    start: int = 0
    end: int = 0
    children: list["Segment"] = field(default_factory=list)
    leaves: dict[int, float] = field(default_factory=dict)  # index of each leaf below, and its reward

    @property
    def value(self) -> float:
        return sum(self.leaves.values()) / len(self.leaves)  # Eq. 2

    def path(self) -> list["Segment"]:
        """From the root down to this segment."""
        return [*(self.parent.path() if self.parent else []), self]

    def add(self, start: int, end: int) -> "Segment":
        """Append a child, and return it."""
        self.children.append(Segment(self, start, end))
        return self.children[-1]

    def walk(self):
        """All segments below this one."""
        for child in self.children:
            yield child
            yield from child.walk()


def grow(leaves: list[Leaf]) -> Segment:
    """The root of the tree of one problem's leaves. Every family needs its initial response."""
    root = Segment()
    for family in {leaf.family: None for leaf in leaves}:
        members = {i: leaf for i, leaf in enumerate(leaves) if leaf.family == family}
        initial = next(leaf for leaf in members.values() if leaf.start == 0)
        points = sorted({leaf.start for leaf in members.values()} - {0})
        branched_at, segment = {}, root
        for start, end in zip([0, *points], [*points, initial.length]):
            branched_at[start] = segment
            segment = segment.add(start, end)
        for i, leaf in members.items():
            tip = segment if leaf is initial else branched_at[leaf.start].add(leaf.start, leaf.length)
            for above in tip.path():
                above.leaves[i] = leaf.reward
    return root


def advantage(segment: Segment) -> float:
    """How much better the leaves below a segment are than those of the problem, and of its parent."""
    v, v_root, v_parent = segment.value, segment.path()[0].value, segment.parent.value
    return (v - v_root + v - v_parent) / len(segment.leaves) ** 0.5  # Eq. 3


def tree_advantages(leaves: list[Leaf]) -> list[np.ndarray]:
    """Each token's advantage, that of its segment: one fp32 array (length,) per leaf."""
    per_leaf = [np.zeros(leaf.length, dtype=np.float32) for leaf in leaves]
    for segment in grow(leaves).walk():
        a = advantage(segment)
        for i in segment.leaves:
            per_leaf[i][segment.start : segment.end] = a
    return per_leaf


def group_advantages(leaves: list[Leaf]) -> list[np.ndarray]:
    """GRPO: (R - mean) / std over the group, for all tokens alike; sample std. 0 if all are equal."""
    rewards = np.array([leaf.reward for leaf in leaves])
    normalised = (rewards - rewards.mean()) / (rewards.std(ddof=1) or 1.0)
    return [np.full(leaf.length, a, dtype=np.float32) for leaf, a in zip(leaves, normalised)]
