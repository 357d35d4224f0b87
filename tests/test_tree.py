"""A tree worked by hand, values and advantages against brute force on random trees, branch points by every rule."""

from fractions import Fraction
from math import sqrt

import numpy as np
import pytest

from tree import Leaf, branch_points, group_advantages, grow, tree_advantages

RULES = ["fci", "entropy", "random", "earliest"]


def random_tree(rng, n_families=4):
    """Leaves in the order of training: initial responses first, continuations after, some responses not branched."""
    leaves = [Leaf(family, 0, int(rng.integers(4, 20)), float(rng.integers(2))) for family in range(n_families)]
    for initial in leaves[:n_families]:
        points = rng.choice(np.arange(1, initial.length), size=rng.integers(0, 4), replace=False)
        for point in points.tolist():
            for _ in range(rng.integers(1, 4)):
                leaves.append(Leaf(initial.family, point, point + int(rng.integers(1, 12)), float(rng.integers(2))))
    return leaves


def shared_by(leaves, i, t):
    """Indices of the leaves whose segment holds token t of leaf i, straight from the definition."""
    leaf = leaves[i]
    if leaf.start > 0 and t >= leaf.start:
        return [i]  # a continuation's own tokens
    return [j for j, other in enumerate(leaves) if other.family == leaf.family and (other.start == 0 or other.start > t)]


def brute_force_advantages(leaves, i):
    """Eq. 2 and 3, token by token, without a tree."""
    value = lambda group: sum(leaves[j].reward for j in group) / len(group)  # noqa: E731
    everyone = range(len(leaves))
    own = leaves[i]
    points = {leaf.start for leaf in leaves if leaf.family == own.family and (own.start == 0 or leaf.start <= own.start)}
    advantages = []
    for t in range(leaves[i].length):
        segment_start = max(p for p in points if p <= t)
        below = shared_by(leaves, i, t)
        parent = shared_by(leaves, i, segment_start - 1) if segment_start else everyone
        advantages.append((value(below) - value(everyone) + value(below) - value(parent)) / sqrt(len(below)))
    return advantages


# --- Values and advantages


def test_tree_by_hand():
    """Two initial responses, one branched at 3 and 6 with two continuations each: six leaves, three of them right."""
    leaves = [Leaf(0, 0, 10, 1.0), Leaf(1, 0, 4, 1.0), Leaf(0, 3, 5, 1.0), Leaf(0, 3, 7, 0.0), Leaf(0, 6, 8, 0.0), Leaf(0, 6, 9, 0.0)]
    tips = grow(leaves)
    first, second, third = tips[0].path()
    assert [(s.start, s.end) for s in (first, second, third)] == [(0, 3), (3, 6), (6, 10)]
    assert tips[2].parent is tips[3].parent is first and tips[4].parent is tips[5].parent is second
    assert first.parent is tips[1].parent and first.parent.parent is None
    assert first.parent.value == pytest.approx(1 / 2)  # root: 3 of 6
    assert first.value == pytest.approx(2 / 5)
    assert second.value == pytest.approx(1 / 3)
    assert [tip.value for tip in tips] == [1, 1, 1, 0, 0, 0]

    a_first = (-1 / 10 - 1 / 10) / sqrt(5)  # 2/5 - 1/2, twice: its parent is the root
    a_second = (-1 / 6 - 1 / 15) / sqrt(3)  # 1/3 - 1/2, 1/3 - 2/5
    expected = [
        [a_first] * 3 + [a_second] * 3 + [1 / 2 + 2 / 3] * 4,
        [1 / 2 + 1 / 2] * 4,
        [a_first] * 3 + [1 / 2 + 3 / 5] * 2,
        [a_first] * 3 + [-1 / 2 - 2 / 5] * 4,
        [a_first] * 3 + [a_second] * 3 + [-1 / 2 - 1 / 3] * 2,
        [a_first] * 3 + [a_second] * 3 + [-1 / 2 - 1 / 3] * 3,
    ]
    for ours, theirs in zip(tree_advantages(leaves), expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_no_branches_is_the_group_mean():
    """A root with leaves only: A = 2 (R - mean)."""
    leaves = [Leaf(i, 0, i + 1, r) for i, r in enumerate([1.0, 0.0, 0.0, 1.0, 0.0])]
    for leaf, advantages in zip(leaves, tree_advantages(leaves)):
        np.testing.assert_allclose(advantages, [2 * (leaf.reward - 2 / 5)] * leaf.length, rtol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_advantages_equal_brute_force(seed):
    """Eq. 3 token by token from sets of leaves; every leaf has one advantage a token."""
    leaves = random_tree(np.random.default_rng(seed))
    for i, advantages in enumerate(tree_advantages(leaves)):
        assert len(advantages) == leaves[i].length
        np.testing.assert_allclose(advantages, brute_force_advantages(leaves, i), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_laws_of_values(seed):
    """V is the mean of the leaves below; children's deviations from their parent cancel against leaf counts; and
    the root's children satisfy sum of n^1.5 A = 0."""
    leaves = random_tree(np.random.default_rng(100 + seed))
    tips, advantages = grow(leaves), tree_advantages(leaves)
    below, first_advantage = {}, {}
    for leaf, tip, a in zip(leaves, tips, advantages):
        for segment in [tip.path()[0].parent, *tip.path()]:
            below.setdefault(id(segment), (segment, []))[1].append(leaf.reward)
        first_advantage[id(tip.path()[0])] = a[0]
    children = {}
    for segment, rewards in below.values():
        assert segment.value == pytest.approx(np.mean(rewards))
        if segment.parent:
            children.setdefault(id(segment.parent), []).append((segment, len(rewards)))
    for siblings in children.values():
        assert sum(n * (s.value - s.parent.value) for s, n in siblings) == pytest.approx(0, abs=1e-9)
        assert sum(n for _, n in siblings) == len(below[id(siblings[0][0].parent)][1])  # every leaf is under one child
    top = children[id(tips[0].path()[0].parent)]
    assert len(top) == 4
    assert sum(n**1.5 * first_advantage[id(s)] for s, n in top) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_shared_prefix_has_equal_advantages(seed):
    """Tokens that a continuation inherits carry what they carry in the initial response."""
    leaves = random_tree(np.random.default_rng(200 + seed))
    advantages = tree_advantages(leaves)
    inherited = [(a[: leaf.start], advantages[leaf.family][: leaf.start]) for leaf, a in zip(leaves, advantages) if leaf.start]
    assert inherited
    for ours, initial in inherited:
        assert np.array_equal(ours, initial)


def test_order_of_leaves_is_free():
    """Shuffled leaves get the same advantages."""
    rng = np.random.default_rng(0)
    leaves = random_tree(rng)
    order = rng.permutation(len(leaves))
    shuffled = tree_advantages([leaves[i] for i in order])
    for i, advantages in zip(order, shuffled):
        np.testing.assert_allclose(advantages, tree_advantages(leaves)[i], atol=1e-6)


def test_equal_rewards_teach_nothing():
    """All right or all wrong: every advantage is exactly zero."""
    for reward in (0.0, 1.0):
        leaves = random_tree(np.random.default_rng(1))
        for leaf in leaves:
            leaf.reward = reward
        assert not any(a.any() for a in tree_advantages(leaves))


def test_group_advantages():
    """GRPO: by hand for one right in four, and mean 0, standard deviation 1 in general; constant within a response."""
    leaves = [Leaf(i, 0, 2 + i, r) for i, r in enumerate([1.0, 0.0, 0.0, 0.0])]
    for advantages, expected, leaf in zip(group_advantages(leaves), [3 / 2, -1 / 2, -1 / 2, -1 / 2], leaves):  # (R - 1/4) / (1/2)
        np.testing.assert_allclose(advantages, [expected] * leaf.length, rtol=1e-6)
    rng = np.random.default_rng(0)
    for n in range(2, 30):
        rewards = [1.0, 0.0, *rng.integers(2, size=n - 2).astype(float)]
        advantages = group_advantages([Leaf(i, 0, 3, r) for i, r in enumerate(rewards)])
        assert all(len(set(a.tolist())) == 1 and a.dtype == np.float32 for a in advantages)
        firsts = [a[0] for a in advantages]
        assert np.mean(firsts) == pytest.approx(0, abs=1e-6) and np.std(firsts, ddof=1) == pytest.approx(1, abs=1e-6)


# --- Branch points


def points(rule, starts, fci=None, entropies=None, length=100, n=2, quantile=0.2, gap=0, seed=0):
    fci = np.zeros(len(starts)) if fci is None else np.array(fci, dtype=float)
    entropies = np.zeros(length) if entropies is None else np.array(entropies, dtype=float)
    return branch_points(rule, starts, fci, entropies, n, quantile, gap, np.random.default_rng(seed))


TENS = list(range(0, 110, 10))  # T = 11 steps


def test_fci_rule_by_hand():
    """Eq. 7: of 11 steps the 0.8 quantile is the third largest value; the two earliest of those three are taken."""
    fci = [0, 3, 9, 1, 2, 7, 1, 8, 1, 2, 1]  # largest: 9, 8, 7
    assert points("fci", TENS, fci, length=110) == [20, 50]
    assert points("fci", TENS, fci, length=110, n=1) == [20]
    assert points("fci", TENS, fci, length=110, n=3) == [20, 50, 70]
    assert points("fci", TENS, fci, length=110, quantile=0.1) == [20, 70]  # the 0.9 quantile: the second largest


def test_fci_rule_where_the_quantile_is_zero():
    """Then candidates are the steps above zero, not all of them."""
    fci = [0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]
    assert points("fci", TENS, fci, length=110, n=1) == [70]
    assert points("fci", TENS, fci, length=110, n=2) == [10, 70]  # one candidate, then the earliest step
    assert points("fci", TENS, [0] * 11, length=110, n=2) == [10, 20]


@pytest.mark.parametrize("quantile", ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
def test_fci_candidates_equal_exact_quantile(quantile):
    """Candidates are y >= the (1 - rho) quantile in exact arithmetic: no step is lost to rounding."""
    rng = np.random.default_rng(0)
    for T in [2, 3, 4, 5, *range(6, 302, 5)]:
        fci = np.concatenate([[0], rng.random(T - 1)])
        ordered = sorted(Fraction(y) for y in fci.tolist())
        place = (1 - Fraction(quantile)) * (T - 1)
        low = int(place)
        threshold = ordered[low] + (place - low) * (ordered[min(low + 1, T - 1)] - ordered[low])
        candidates = [k for k in range(1, T) if Fraction(float(fci[k])) >= threshold]
        assert points("fci", list(range(T)), fci, length=T, n=len(candidates), quantile=float(quantile)) == candidates


@pytest.mark.parametrize("rule", RULES)
def test_branch_point_laws(rule):
    """At most n, ascending, plain ints, never token 0; step starts at least `gap` apart and from the response's start."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        length = int(rng.integers(1, 300))
        starts = (
            [0, *sorted(rng.choice(np.arange(1, length), size=rng.integers(0, min(length, 40)), replace=False).tolist())]
            if length > 1
            else [0]
        )
        fci = np.where(rng.random(len(starts)) < 0.5, 0, rng.random(len(starts)))
        n, gap = int(rng.integers(1, 5)), int(rng.integers(0, 1024))
        chosen = points(rule, starts, fci, rng.random(length), n=n, gap=gap, seed=trial)
        assert len(chosen) <= n and chosen == sorted(set(chosen)) and all(type(p) is int and 0 < p < length for p in chosen)
        if rule == "entropy":
            assert len(chosen) == min(n, length - 1)
        else:
            assert set(chosen) <= set(starts[1:])
            scaled = gap * length / 8192
            assert all(b - a > scaled - 1 for a, b in zip([0, *chosen], chosen))
            if gap == 0 or scaled < 1:
                assert len(chosen) == min(n, len(starts) - 1)


@pytest.mark.parametrize("rule", ["fci", "random", "earliest"])
def test_fewer_steps_than_asked(rule):
    """One step: nothing to branch. Three steps: the two that are not the first."""
    assert points(rule, [0], [5], n=2) == []
    assert points(rule, [0, 4, 9], [9, 1, 2], n=5) == [4, 9]


def test_first_step_is_never_chosen():
    assert points("fci", [0, 30, 60], [9, 0, 1], n=1, quantile=0.5) == [60]
    assert points("earliest", [0, 30, 60], n=1) == [30]
    assert points("entropy", [0], entropies=[9, 1, 2], n=1) == [2]
    assert {points("random", [0, 30, 60], n=1, seed=s)[0] for s in range(30)} == {30, 60}


def test_gap_by_hand():
    """Given for 8192 tokens, in proportion below, not above."""
    starts, fci = [0, 100, 600, 700, 1300], [0, 5, 5, 5, 5]
    for length in (8192, 20000):
        assert points("fci", starts, fci, length=length, quantile=1.0, gap=512) == [600, 1300]  # 100 is near the start, 700 near 600
    assert points("fci", starts, fci, length=1600, quantile=1.0, gap=512) == [100, 600]  # gap 100
    assert points("fci", starts, fci, length=1700, quantile=1.0, gap=512) == [600, 1300]  # gap 106
    assert points("earliest", starts, length=8192, gap=512) == [600, 1300]
    assert points("fci", starts, fci, length=8192, quantile=1.0, gap=2000) == []


def test_gap_holds_in_the_fall_back():
    """One candidate remains: the earliest step that keeps the distance to it joins."""
    assert points("fci", [0, 600, 1200, 1600, 2200], [0, 0, 0, 7, 0], length=8192, gap=512) == [600, 1600]
    assert points("fci", [0, 600, 800, 1200, 1400], [0, 0, 7, 0, 0], length=8192, gap=512) == [800, 1400]


def test_entropy_ties_by_position_without_token_zero():
    assert points("entropy", [0, 3], entropies=[9, 1, 5, 5, 5, 2], n=2) == [2, 3]
    assert points("entropy", [0, 3], entropies=[9, 1, 5, 2, 5, 8], n=2, gap=8192) == [2, 5]  # tokens: no gap
    assert points("entropy", [0], entropies=[9], n=2) == []
    assert points("entropy", [0], entropies=[2, *[1] * 500, 2, *[1] * 500], n=4) == [1, 2, 3, 501]  # too long for an insertion sort


def test_random_depends_on_the_generator_alone():
    """Same seed, same points; all pairs come up; FCI and entropies do not matter."""
    starts = [0, 10, 20, 30]
    drawn = [points("random", starts, seed=s) for s in range(60)]
    assert drawn == [points("random", starts, [0, 9, 0, 0], np.arange(100), seed=s) for s in range(60)]
    assert {tuple(d) for d in drawn} == {(10, 20), (10, 30), (20, 30)}


def test_earliest():
    assert points("earliest", [0, 10, 20, 30], [0, 0, 0, 9], n=2) == [10, 20]


def test_unknown_rule_raises():
    with pytest.raises(ValueError, match="fcl"):
        points("fcl", [0, 10])
