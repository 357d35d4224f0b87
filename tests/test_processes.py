"""Who works on what: shares of equal cost, results in order, sums over processes. Two real processes are in
test_distributed.py."""

import pytest
from conftest import as_rank

from plumbing import processes
from plumbing.processes import any_process, once, shared_out, shares, total


def test_shares_are_balanced():
    costs = [1 + (37 * i) % 101 for i in range(200)]
    for n in (1, 2, 3, 8, 24):
        found = shares(costs, n)
        assert sorted(sum(found, [])) == list(range(200)) and all(share == sorted(share) for share in found)
        sums = [sum(costs[i] for i in share) for share in found]
        assert max(sums) - min(sums) <= max(costs)
    assert shares([3, 3], 4) == [[0], [1], [], []] and shares([], 2) == [[], []]


@pytest.mark.parametrize("replicas", [1, 2])
def test_shared_out_keeps_the_order_and_does_everything_once(monkeypatch, replicas):
    items, costs, parts, worked = list("abcdefg"), [5, 1, 9, 2, 2, 7, 1], [], []
    upper = lambda own: worked.append(own) or [x.upper() for x in own]
    for rank in range(4):  # first what every rank contributes, then what one makes of all contributions
        as_rank(monkeypatch, processes, rank, 4)
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(processes, "union", lambda own: parts.append(own) or {})
            shared_out(items, costs, upper, replicas)
    monkeypatch.setattr(processes, "union", lambda own: {k: v for part in parts for k, v in part.items()})
    assert shared_out(items, costs, upper, replicas) == list("ABCDEFG")
    assert sorted(sum(worked[:4:replicas], [])) == items
    assert worked[0:4:replicas] == worked[replicas - 1 : 4 : replicas]


def test_sums_and_flags_over_processes(monkeypatch):
    """A name that one process lacks counts as 0 there; one process is enough to raise a flag."""
    others = {0: {"loss": 1.0, "kl": 0.5}, 1: {}}
    monkeypatch.setattr(processes, "rank", lambda: 2)
    monkeypatch.setattr(processes, "union", lambda own: others | own)
    assert total({"loss": 2.0, "clipped": 3.0}) == {"loss": 3.0, "kl": 0.5, "clipped": 3.0}
    for flags in ([False, False, True], [True, False, False], [False, False, False]):
        others = dict(enumerate(flags[:2]))
        assert any_process(flags[2]) is any(flags)


def test_a_single_process_does_everything_itself():
    assert total({"loss": 2.0}) == {"loss": 2.0} and once(lambda: "done") == "done"
    assert any_process(True) is True and any_process(False) is False
