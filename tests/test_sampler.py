"""Adaptive sampling: Eq. 8 to 10 by hand, and the laws that they obey."""

from itertools import product

import numpy as np
import pytest

from sampler import AdaptiveSampler, choose_responses, expansion

EASY, MIXED, HARD = [1.0] * 6, [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0] * 6


@pytest.mark.parametrize(
    "fci_filter, kept, n_compared",
    [
        # means before the easy ones: none, 0.50, 0.45, 0.48
        ("easy", [True, True, False, True, True, True, False], 4),
        # means: none, 0.50, 0.30, 0.33.., 0.385, 0.488.., 0.4066..
        ("all", [True, False, True, True, True, False, False], 7),
        ("none", [True] * 7, 0),
        ("drop_easy", [False, True, False, False, True, True, False], 0),
    ],
)
def test_filter_by_hand(fci_filter, kept, n_compared):
    """Eq. 8: a compared problem passes when its FCI is above the mean of those compared before it, itself
    excluded."""
    sampler = AdaptiveSampler(batch_size=8)
    problems = [(0.5, EASY), (0.1, MIXED), (0.4, EASY), (0.54, EASY), (0.9, HARD), (0.0, MIXED), (0.4, EASY)]
    assert [sampler.keep(fci, rewards, fci_filter) for fci, rewards in problems] == kept
    assert sampler.fci_count == n_compared
    assert sampler.fci_total == pytest.approx({"easy": 1.84, "all": 2.84}.get(fci_filter, 0))


def test_filter_needs_more_than_the_mean():
    sampler = AdaptiveSampler(batch_size=8)
    assert [sampler.keep(0.5, EASY, "easy") for _ in range(3)] == [True, False, False]


def test_expansion_table():
    """Eq. 9 for six responses: 6 exp(-z) = 6, 5.08, 4.30, 3.64, 3.08, 2.61, 2.21, to the nearest."""
    assert [expansion([1.0] * n + [0.0] * (6 - n)) for n in range(7)] == [6, 5, 4, 4, 3, 3, 2]


def test_expansion_laws():
    """In any group: all responses where none is right, never more, at least one in three, fewer as more are
    right."""
    for size in range(1, 40):
        counts = [expansion([1.0] * n + [0.0] * (size - n)) for n in range(size + 1)]
        assert counts[0] == size and counts == sorted(counts, reverse=True) and counts[-1] >= size // 3
        assert size < 3 or counts[-1] < size


def test_choose_responses_rarer_outcome_first():
    """Every outcome of six, every count: distinct, ascending, and of the rarer outcome as many as there
    are."""
    rng = np.random.default_rng(0)
    for rewards in product([0.0, 1.0], repeat=6):
        for count in range(7):
            chosen = choose_responses(list(rewards), count, rng)
            assert len(chosen) == count and chosen == sorted(set(chosen)) and set(chosen) <= set(range(6))
            n_correct = sum(rewards)
            rarer = float(n_correct < 3)  # of three and three, the wrong ones
            assert sum(rewards[i] == rarer for i in chosen) == min(count, min(n_correct, 6 - n_correct))


def test_choose_responses_is_random_within_an_outcome():
    """All choices within an outcome come up, and the generator's seed repeats them."""
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    drawn = [tuple(choose_responses(rewards, 3, np.random.default_rng(s))) for s in range(60)]
    assert set(drawn) == {(0, 1, 3), (1, 2, 3), (1, 3, 4), (1, 3, 5)}  # both wrong ones and any right one
    assert drawn == [tuple(choose_responses(rewards, 3, np.random.default_rng(s))) for s in range(60)]


@pytest.mark.parametrize(
    "useful, expected",
    [
        (1920, 64),  # the target
        (960, 70),  # 57.6 + 0.1 * 2 * 64 = 70.4
        (480, 83),  # 57.6 + 25.6 = 83.2
        (3840, 61),  # 57.6 + 3.2 = 60.8
        (0, 256),  # no division by zero: the upper bound
        (1, 256),
        (10**9, 58),  # 57.6 + 0: at most a tenth per step
    ],
)
def test_resize_by_hand(useful, expected):
    """Eq. 10 from 64 problems with a target of 1,920 sequences and lambda 0.9."""
    sampler = AdaptiveSampler(batch_size=64)
    sampler.resize(1920, useful, decay=0.9, smallest=16, largest=256)
    assert sampler.batch_size == expected and type(sampler.batch_size) is int


def test_resize_laws():
    """On target nothing changes; the bounds hold; a shortage never shrinks the batch and a surplus never
    grows it."""
    rng = np.random.default_rng(0)
    for size in range(16, 257):
        for decay in (0.0, 0.3, 0.9, 1.0):
            sampler = AdaptiveSampler(size)
            sampler.resize(77, 77, decay, 16, 256)
            assert sampler.batch_size == size
            target, useful = (int(x) for x in rng.integers(1, 2000, size=2))
            sampler.resize(target, useful, decay, 16, 256)
            assert 16 <= sampler.batch_size <= 256
            assert sampler.batch_size >= size if useful < target else sampler.batch_size <= size
    shrinking = AdaptiveSampler(64)
    for _ in range(100):
        shrinking.resize(1, 10**6, 0.9, 20, 256)
    assert shrinking.batch_size == 20
