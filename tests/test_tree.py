"""A tree worked by hand, values and advantages against brute force on random trees, branch points by every
rule."""

from fractions import Fraction
from math import sqrt

import numpy as np
import pytest

import tree
from attnrl import MethodConfig
from tree import (
    RULES,
    Leaf,
    Measured,
    Segment,
    advantage,
    branch_points,
    fci_candidates,
    group_advantages,
    grow,
    tree_advantages,
)


def random_tree(rng, n_families=4):
    """Leaves in the order of training: initial responses first, continuations after, some responses not
    branched."""
    leaves = [Leaf(i, 0, int(rng.integers(4, 20)), float(rng.integers(2))) for i in range(n_families)]
    for initial in leaves[:n_families]:
        points = rng.choice(np.arange(1, initial.length), size=rng.integers(0, 4), replace=False)
        for point in points.tolist():
            for _ in range(rng.integers(1, 4)):
                length, reward = point + int(rng.integers(1, 12)), float(rng.integers(2))
                leaves.append(Leaf(initial.family, point, length, reward))
    return leaves


def shared_by(leaves, i, t):
    """Indices of the leaves whose segment holds token t of leaf i, straight from the definition."""
    leaf = leaves[i]
    if leaf.start > 0 and t >= leaf.start:
        return [i]  # a continuation's own tokens
    family = [j for j, other in enumerate(leaves) if other.family == leaf.family]
    return [j for j in family if leaves[j].start == 0 or leaves[j].start > t]


def brute_force_advantages(leaves, i):
    """Eq. 2 and 3, token by token, without a tree."""
    value = lambda group: sum(leaves[j].reward for j in group) / len(group)
    everyone = range(len(leaves))
    own = leaves[i]
    starts = {leaf.start for leaf in leaves if leaf.family == own.family}
    points = {start for start in starts if own.start == 0 or start <= own.start}
    advantages = []
    for t in range(leaves[i].length):
        segment_start = max(p for p in points if p <= t)
        below = shared_by(leaves, i, t)
        parent = shared_by(leaves, i, segment_start - 1) if segment_start else everyone
        advantages.append((value(below) - value(everyone) + value(below) - value(parent)) / sqrt(len(below)))
    return advantages


# --- Values and advantages


def tip_of(root, i):
    """The last segment of leaf i."""
    return next(s for s in root.walk() if i in s.leaves and not s.children)


@pytest.mark.holds_the_paper("Eq. 3")
def test_tree_by_hand():
    """Two initial responses, one branched at 3 and 6 with two continuations each: six leaves, three right."""
    leaves = [
        Leaf(0, 0, 10, 1.0),
        Leaf(1, 0, 4, 1.0),
        Leaf(0, 3, 5, 1.0),
        Leaf(0, 3, 7, 0.0),
        Leaf(0, 6, 8, 0.0),
        Leaf(0, 6, 9, 0.0),
    ]
    root = grow(leaves)
    tips = [tip_of(root, i) for i in range(6)]
    above, first, second, third = tips[0].path()
    assert above is root and root.path() == [root] and (root.start, root.end) == (0, 0)
    assert [(s.start, s.end) for s in (first, second, third)] == [(0, 3), (3, 6), (6, 10)]
    assert tips[2].parent is tips[3].parent is first and tips[4].parent is tips[5].parent is second
    assert first.parent is tips[1].parent is root and root.parent is None
    assert root.children == [first, tips[1]]
    assert first.children == [second, tips[2], tips[3]] and second.children == [third, tips[4], tips[5]]
    assert list(root.walk()) == [first, second, third, tips[4], tips[5], tips[2], tips[3], tips[1]]
    assert root.leaves == {0: 1, 1: 1, 2: 1, 3: 0, 4: 0, 5: 0}
    assert first.leaves == {0: 1, 2: 1, 3: 0, 4: 0, 5: 0} and second.leaves == {0: 1, 4: 0, 5: 0}
    assert root.value == pytest.approx(1 / 2)  # 3 of 6
    assert first.value == pytest.approx(2 / 5)
    assert second.value == pytest.approx(1 / 3)
    assert [tip.value for tip in tips] == [1, 1, 1, 0, 0, 0]

    a_first = (-1 / 10 - 1 / 10) / sqrt(5)  # 2/5 - 1/2, twice: its parent is the root
    a_second = (-1 / 6 - 1 / 15) / sqrt(3)  # 1/3 - 1/2, 1/3 - 2/5
    assert advantage(first) == pytest.approx(a_first) and advantage(second) == pytest.approx(a_second)
    assert advantage(third) == pytest.approx(1 / 2 + 2 / 3)  # 1 - 1/2, 1 - 1/3
    of_tips = [1 / 2 + 2 / 3, 1 / 2 + 1 / 2, 1 / 2 + 3 / 5, -1 / 2 - 2 / 5, -1 / 2 - 1 / 3, -1 / 2 - 1 / 3]
    assert [advantage(tip) for tip in tips] == pytest.approx(of_tips)
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


@pytest.mark.holds_the_paper("Eq. 3")
def test_advantage_is_eq_3_of_one_segment():
    """By hand, without `grow`: 3 of 4 right below a child whose parent has 3 of 6, under a root with 4 of
    9."""
    root = Segment(leaves=dict(enumerate([1, 1, 1, 1, 0, 0, 0, 0, 0])))
    middle = root.add(0, 5)
    middle.leaves = dict(enumerate([1, 1, 1, 0, 0, 0]))
    child = middle.add(5, 8)
    child.leaves = dict(enumerate([1, 1, 1, 0]))
    assert child.path() == [root, middle, child] and root.children == [middle]
    assert advantage(child) == pytest.approx((3 / 4 - 4 / 9 + 3 / 4 - 3 / 6) / 2)  # sqrt(4)
    assert advantage(middle) == pytest.approx(2 * (1 / 2 - 4 / 9) / sqrt(6))


def test_tokens_carry_what_advantage_says_of_their_segment(monkeypatch):
    """Eq. 3 is in `advantage` and nowhere else: another rule there is another advantage of every token."""
    leaves = random_tree(np.random.default_rng(3))
    root, number = grow(leaves), {}
    for i, segment in enumerate(root.walk()):
        number[min(segment.leaves), segment.start] = float(i)
    monkeypatch.setattr(tree, "advantage", lambda s: number[min(s.leaves), s.start])
    for i, advantages in enumerate(tree_advantages(leaves)):
        on_path = [s for s in root.walk() if i in s.leaves]
        lengths = [s.end - s.start for s in on_path]
        expected = np.repeat([number[min(s.leaves), s.start] for s in on_path], lengths)
        assert advantages.tolist() == expected.tolist()


@pytest.mark.holds_the_paper("Eq. 3")
def test_no_branches_is_the_group_mean():
    """A root with leaves only: A = 2 (R - mean)."""
    leaves = [Leaf(i, 0, i + 1, r) for i, r in enumerate([1.0, 0.0, 0.0, 1.0, 0.0])]
    for leaf, advantages in zip(leaves, tree_advantages(leaves)):
        np.testing.assert_allclose(advantages, [2 * (leaf.reward - 2 / 5)] * leaf.length, rtol=1e-6)


@pytest.mark.holds_the_paper("Eq. 3")
@pytest.mark.parametrize("seed", range(20))
def test_advantages_equal_brute_force(seed):
    """Eq. 3 token by token from sets of leaves; every leaf has one advantage per token."""
    leaves = random_tree(np.random.default_rng(seed))
    for i, advantages in enumerate(tree_advantages(leaves)):
        assert len(advantages) == leaves[i].length
        np.testing.assert_allclose(advantages, brute_force_advantages(leaves, i), atol=1e-6)


@pytest.mark.holds_the_paper("Eq. 3")
@pytest.mark.parametrize("seed", range(20))
def test_laws_of_values(seed):
    """V is the mean of the leaves below; children's deviations from their parent cancel against leaf counts;
    and the root's children satisfy sum of n^1.5 A = 0."""
    leaves = random_tree(np.random.default_rng(100 + seed))
    root, advantages = grow(leaves), tree_advantages(leaves)
    tips = [tip_of(root, i) for i in range(len(leaves))]
    assert isinstance(root, Segment) and root.parent is None and not root.path()[:-1]
    segments = [root, *root.walk()]
    assert all(tip in segments for tip in tips) and len(set(tips)) == len(leaves)
    for segment in segments:
        below = [i for i, tip in enumerate(tips) if segment in tip.path()]
        assert segment.leaves == {i: leaves[i].reward for i in below}
        assert segment.value == pytest.approx(np.mean([leaves[i].reward for i in below]))
        children = segment.children
        assert all(child.parent is segment for child in children) and (children or segment in tips)
        if children:
            deviations = [len(child.leaves) * (child.value - segment.value) for child in children]
            assert sum(deviations) == pytest.approx(0, abs=1e-9)
            assert sum(len(child.leaves) for child in children) == len(below)  # every leaf is under one child
    assert len(root.children) == 4
    first_advantages = [advantages[min(child.leaves)][0] for child in root.children]
    weighted = [len(child.leaves) ** 1.5 * a for child, a in zip(root.children, first_advantages)]
    assert sum(weighted) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_shared_prefix_has_equal_advantages(seed):
    """Tokens that a continuation inherits carry what they carry in the initial response."""
    leaves = random_tree(np.random.default_rng(200 + seed))
    advantages = tree_advantages(leaves)
    continuations = [(leaf, a) for leaf, a in zip(leaves, advantages) if leaf.start]
    assert continuations
    for leaf, own in continuations:
        assert np.array_equal(own[: leaf.start], advantages[leaf.family][: leaf.start])


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
    """GRPO: by hand for one right in four, and mean 0, standard deviation 1 in general; constant within a
    response."""
    leaves = [Leaf(i, 0, 2 + i, r) for i, r in enumerate([1.0, 0.0, 0.0, 0.0])]
    by_hand = [3 / 2, -1 / 2, -1 / 2, -1 / 2]  # (R - 1/4) / (1/2)
    for advantages, expected, leaf in zip(group_advantages(leaves), by_hand, leaves):
        np.testing.assert_allclose(advantages, [expected] * leaf.length, rtol=1e-6)
    rng = np.random.default_rng(0)
    for n in range(2, 30):
        rewards = [1.0, 0.0, *rng.integers(2, size=n - 2).astype(float)]
        advantages = group_advantages([Leaf(i, 0, 3, r) for i, r in enumerate(rewards)])
        assert all(len(set(a.tolist())) == 1 and a.dtype == np.float32 for a in advantages)
        firsts = [a[0] for a in advantages]
        assert np.mean(firsts) == pytest.approx(0, abs=1e-6)
        assert np.std(firsts, ddof=1) == pytest.approx(1, abs=1e-6)


# --- Branch points


def points(
    rule,
    starts,
    fci=None,
    entropies=None,
    length=100,
    n=2,
    quantile=0.2,
    gap=0,
    seed=0,
    n_branchable=None,
    reward=0.0,
):
    """n_branchable: all steps, if it is not given."""
    fci = np.zeros(len(starts)) if fci is None else np.array(fci, dtype=float)
    entropies = np.zeros(length) if entropies is None else np.array(entropies, dtype=float)
    n_branchable = len(starts) if n_branchable is None else n_branchable
    response = Measured(["…"] * len(starts), starts, fci, entropies, reward, n_branchable)
    return branch_points(rule, response, n, quantile, gap, np.random.default_rng(seed))


TENS = list(range(0, 110, 10))  # T = 11 steps


def test_fci_rule_by_hand():
    """Eq. 7: of 11 steps the 0.8 quantile is the third largest value; the two earliest of those three are
    taken."""
    fci = [0, 3, 9, 1, 2, 7, 1, 8, 1, 2, 1]  # largest: 9, 8, 7
    assert points("fci", TENS, fci, length=110) == [20, 50]
    assert points("fci", TENS, fci, length=110, n=1) == [20]
    assert points("fci", TENS, fci, length=110, n=3) == [20, 50, 70]
    # the 0.9 quantile: the second largest
    assert points("fci", TENS, fci, length=110, quantile=0.1) == [20, 70]


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
        assert fci_candidates(fci, float(quantile)).tolist() == candidates
        how = dict(length=T, n=len(candidates), quantile=float(quantile))
        assert points("fci", list(range(T)), fci, **how) == candidates


def random_response(rng):
    """(starts, fci, entropies) of one response of up to 300 tokens."""
    length = int(rng.integers(1, 300))
    n_cuts = rng.integers(0, min(length, 40)) if length > 1 else 0
    cuts = rng.choice(np.arange(1, length), size=n_cuts, replace=False) if n_cuts else np.array([], dtype=int)
    starts = [0, *sorted(cuts.tolist())]
    fci = np.where(rng.random(len(starts)) < 0.5, 0, rng.random(len(starts)))
    return starts, fci, rng.random(length)


@pytest.mark.parametrize("rule", RULES)
def test_branch_point_laws(rule):
    """At most n, ascending, plain ints, never token 0, nothing from the step with the last `</think>` on, at
    least `gap` tokens apart and from the response's start. Every rule but entropy takes starts of steps."""
    rng = np.random.default_rng(0)
    for trial in range(400):
        starts, fci, entropies = random_response(rng)
        length, n, gap = len(entropies), int(rng.integers(1, 5)), int(rng.integers(0, 1024))
        n_branchable = len(starts) if trial % 2 else int(rng.integers(0, len(starts) + 1))
        how = dict(n=n, gap=gap, seed=trial, n_branchable=n_branchable)
        chosen = points(rule, starts, fci, entropies, **how)
        end = [*starts, length][n_branchable]
        assert len(chosen) <= n and chosen == sorted(set(chosen))
        assert all(type(p) is int and 0 < p < end for p in chosen)
        scaled = gap * length / 8192
        assert all(b - a > scaled - 1 for a, b in zip([0, *chosen], chosen))
        allowed = range(1, end) if rule == "entropy" else starts[1:n_branchable]
        assert set(chosen) <= set(allowed)
        if scaled < 1:
            assert len(chosen) == min(n, len(allowed))
        elif len(chosen) < n:  # no step that may be branched is left
            near = [any(abs(p - other) <= scaled for other in [0, *chosen]) for p in starts[1:n_branchable]]
            assert all(near)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_from_the_last_think_end_on(rule):
    """The cut holds for every rule, the fall-back of FCI included: steps 0-2 may be branched, the later
    ones have all the FCI and all the entropy, and are many."""
    starts, fci = TENS, [0, 0, 0, 5, 6, 7, 8, 9, 9, 9, 9]
    entropies = [0.0] * 30 + [9.0] * 80
    for seed in range(20):
        how = dict(n=4, quantile=1.0, seed=seed)
        chosen = points(rule, starts, fci, entropies, n_branchable=3, **how)
        assert chosen and max(chosen) < 30
        assert set(chosen) <= {10, 20} if rule != "entropy" else chosen == [1, 2, 3, 4]
        inside_step_1 = [1, 2, 3, 4] if rule == "entropy" else []
        assert points(rule, starts, fci, entropies, n_branchable=1, **how) == inside_step_1
        assert points(rule, starts, fci, entropies, n_branchable=0, **how) == []
        assert max(points(rule, starts, fci, entropies, **how)) >= (30 if rule != "earliest" else 40)
    assert points("fci", starts, fci, entropies, n_branchable=3, n=4) == [10, 20]  # all of it fall-back


@pytest.mark.parametrize("rule", RULES)
def test_gap_holds_for_every_rule(rule):
    """Of 8,192 tokens with a step every 64: points at least 512 apart, and as many as asked for."""
    starts = list(range(0, 8192, 64))
    fci, entropies = np.ones(len(starts)), np.ones(8192)
    fci[0] = 0
    for seed in range(20):
        chosen = points(rule, starts, fci, entropies, n=5, gap=512, quantile=1.0, seed=seed)
        assert len(chosen) == 5 and all(b - a >= 512 for a, b in zip([0, *chosen], chosen))
    close = points(rule, starts, fci, entropies, n=5, gap=0, quantile=1.0)
    assert rule in ("random", "late") or min(np.diff([0, *close])) < 512


def test_a_new_rule_is_a_function_and_its_name(monkeypatch):
    """A rule in RULES is served by `branch_points` with N, gap and cut, and accepted by the settings."""
    seen = []

    def longest_steps(response, quantile, rng):
        seen.append((response, quantile, rng))
        ends = [*response.starts[1:], len(response.entropies)]
        lengths = [end - start for start, end in zip(response.starts, ends)]
        return [response.starts[k] for k in sorted(range(len(lengths)), key=lambda k: -lengths[k])]

    monkeypatch.setitem(RULES, "longest", longest_steps)
    starts = [0, 10, 15, 40, 45, 90]  # lengths 10, 5, 25, 5, 45, 10
    assert points("longest", starts, n=2) == [15, 45]
    assert points("longest", starts, n=2, quantile=0.7, n_branchable=4) == [10, 15]  # 0 never; 10 before 40
    assert points("longest", starts, n=2, n_branchable=4, gap=8192 * 20 // 100) == [40]
    monkeypatch.setitem(RULES, "none_of_them", lambda response, quantile, rng: [])
    assert points("none_of_them", starts, n=3) == []
    response, quantile, rng = seen[1]
    assert response.starts == starts and response.n_branchable == 4 and quantile == 0.7
    assert isinstance(rng, np.random.Generator)
    MethodConfig(branching="longest").check()
    with pytest.raises(ValueError, match="longest"):  # a typo gets the names that there are
        MethodConfig(branching="lngest").check()


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
        # 100 is near the start, 700 near 600
        assert points("fci", starts, fci, length=length, quantile=1.0, gap=512) == [600, 1300]
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
    assert points("entropy", [0, 3], entropies=[9, 1, 5, 2, 5, 8], n=2) == [2, 5]
    assert points("entropy", [0, 3], entropies=[9, 1, 5, 2, 7, 8], n=2) == [4, 5]
    assert points("entropy", [0, 3], entropies=[9, 1, 5, 2, 7, 8], n=2, gap=3000) == [2, 5]  # 2 of 6 tokens
    assert points("entropy", [0], entropies=[9], n=2) == []
    # too long for an insertion sort
    assert points("entropy", [0], entropies=[2, *[1] * 500, 2, *[1] * 500], n=4) == [1, 2, 3, 501]


def test_random_depends_on_the_generator_alone():
    """Same seed, same points; all pairs come up; FCI and entropies do not matter."""
    starts = [0, 10, 20, 30]
    drawn = [points("random", starts, seed=s) for s in range(60)]
    assert drawn == [points("random", starts, [0, 9, 0, 0], np.arange(100), seed=s) for s in range(60)]
    assert {tuple(d) for d in drawn} == {(10, 20), (10, 30), (20, 30)}


def test_earliest():
    assert points("earliest", [0, 10, 20, 30], [0, 0, 0, 9], n=2) == [10, 20]


def test_sentence_entropy_by_hand():
    """Steps of 2, 1, 3 and 2 tokens with means 4, 1, 2 and 2: never the first; ties by position."""
    entropies = [8, 0, 1, 6, 0, 0, 2, 2]
    assert points("sentence_entropy", [0, 2, 3, 6], entropies=entropies, n=1) == [3]
    assert points("sentence_entropy", [0, 2, 3, 6], entropies=entropies, n=2) == [3, 6]
    assert points("sentence_entropy", [0, 2, 3, 6], entropies=entropies, n=3) == [2, 3, 6]


def test_late_draws_steps_of_wrong_responses_by_the_square_of_their_place():
    """One point among the steps 2, 3 and 4 of 4: chances of 4, 9 and 16 in 29 (step 1 is passed over, and
    passing it over leaves the others' odds)."""
    starts, n = [0, 10, 20, 30], 3000
    drawn = [points("late", starts, n=1, seed=seed) for seed in range(n)]
    for start, weight in zip(starts[1:], (4, 9, 16)):
        p = weight / 29
        assert drawn.count([start]) / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert points("late", starts, n=3) == [10, 20, 30]
    assert points("late", starts, n=3, reward=1.0) == []


def test_unknown_rule_raises():
    with pytest.raises(KeyError, match="fcl"):
        points("fcl", [0, 10])
    with pytest.raises(ValueError, match="fcl"):  # before a run starts, in one sentence
        MethodConfig(branching="fcl").check()
