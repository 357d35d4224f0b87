"""What a run writes about itself: times by part, lines of logs, the tree of a step, and shares of a batch."""

import json

import pytest

from attnrl import Problem, Rollout
from plumbing.learner import NonFiniteUpdates
from plumbing.logs import Clock, Log, batch_metrics, n_generated, stopped, update_metrics
from plumbing.nouns import Sequence
from plumbing.report import describe_trees


def test_the_clock_adds_up_parts_and_stops_at_an_error():
    times = iter([0.0, 2.0, 5.0, 6.0, 10.0, 10.5])
    clock = Clock(now=lambda: next(times))
    for _ in range(2):
        with clock("score"):
            pass
    with pytest.raises(KeyError), clock("update"):
        raise KeyError
    assert clock.seconds == {"time_score": 3.0, "time_update": 0.5}


def test_lines_are_written_at_once_and_counted(tmp_path):
    log = Log(tmp_path, {"a.jsonl": 4})
    log.add("a.jsonl", {"x": 1})
    log.add("b.jsonl", {"x": 2})
    log.add("b.jsonl", {"x": 3})
    assert log.lines == {"a.jsonl": 5, "b.jsonl": 2}
    assert (tmp_path / "a.jsonl").read_text() == '{"x": 1}\n'
    assert (tmp_path / "b.jsonl").read_text() == '{"x": 2}\n{"x": 3}\n'


def test_updates_that_were_not_finite_leave_their_sequences(tmp_path):
    sequence = Sequence([1, 2], [3], per_token={"advantages": [0.5]})
    error = stopped(NonFiniteUpdates("3 updates in a row", [sequence]), tmp_path / "bad.json")
    assert str(error).startswith(f"3 updates in a row, see {tmp_path}/bad.json")
    assert "--max_skipped_updates" in str(error)
    assert [Sequence(**row) for row in json.loads((tmp_path / "bad.json").read_text())] == [sequence]


def rollout(family, start, reward, advantages, texts=("a", "\n\n", "b")) -> Rollout:
    """Three tokens in two steps."""
    made = Rollout(family, start, ids=[0, 1, 2], reward=reward, advantages=advantages)
    made.set_steps(list(texts))
    return made


def batch() -> list[Problem]:
    """One problem that its continuation rescued, one that all rollouts solve, one of mixed initial ones."""
    rescued = [rollout(0, 0, 0.0, [0.0, -0.5, -0.5]), rollout(1, 0, 0.0, [-1.0] * 3)]
    rescued += [rollout(0, 1, 1.0, [0.0, 0.5, 0.5])]
    solved = [rollout(0, 0, 1.0, []), rollout(1, 0, 1.0, []), *(rollout(1, 2, 1.0, []) for _ in range(2))]
    mixed = [rollout(0, 0, 1.0, [1.0] * 3), rollout(1, 0, 0.0, [-1.0] * 3)]
    return [
        Problem("p", ["1"], [9], rescued, fci=0.5, branches=[(0, 1)]),
        Problem("q", ["2"], [9], solved, fci=0.25, branches=[(1, 2)]),
        Problem("r", ["3"], [9], mixed),
    ]


def test_shares_of_a_batch_by_hand():
    assert batch_metrics(batch()) == {
        "mc_solve_all": 1.0,
        "mc_solve_none": 0.0,
        "mc_valid": 0.0,
        "rescued_all_right": 0.0,  # the second
        "rescued_all_wrong": 1.0,  # the first
        "valid_problems": 2,
        "valid_sequences": 5,
        "sequences": 5,  # the second problem was dropped
        "valid_tokens": 1.0,
        "tree_reuse": 15 / (8 + 6),  # the continuation shares its first token
        "tree_reuse_with_prompts": (15 + 5) / (8 + 6 + 2),
        "problem_fci": [0.5, 0.25, None],
        "problem_initial_reward": [0.0, 1.0, 0.5],
        "problem_valid": [True, False, True],
    }
    assert batch_metrics([]) == {}
    assert batch_metrics(batch()[2:])["mc_valid"] is None  # nothing was branched
    assert batch_metrics(batch()[1:2])["valid_tokens"] is None  # nothing was trained on


def test_problems_kept_without_advantage_count_as_tokens():
    """GRPO and TreeRL: Fig. 7b's share is below 1. A problem that was filtered was not branched, so it does
    not count as one that branching failed to rescue."""
    due = batch()
    for r in due[1].rollouts:
        r.advantages = [0.0] * 3
    metrics = batch_metrics(due)
    assert (metrics["sequences"], metrics["valid_sequences"]) == (9, 5) and metrics["valid_tokens"] == 15 / 27
    due[1].branches = []
    assert batch_metrics(due)["rescued_all_right"] is None


def test_tokens_of_a_prefix_were_generated_before():
    assert n_generated(batch()[2:], []) == 6  # two initial responses
    assert n_generated([], batch()) == 2 + 1 + 1  # own tokens of three continuations


def test_the_tree_that_is_logged_has_mixed_outcomes_and_the_most_leaves():
    (tree,) = describe_trees(batch(), step=7)
    assert (tree["step"], tree["problem"], tree["answers"], tree["branches"]) == (7, "p", ["1"], [(0, 1)])
    assert json.loads(json.dumps(tree))["branches"] == [[0, 1]]  # a line of JSON can hold it
    assert [(r["family"], r["start"], r["reward"]) for r in tree["rollouts"]] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 1),
    ]
    for row in tree["rollouts"]:  # continuations, too, have their text
        assert row["steps"] == ["a\n\n", "b"] and row["step_starts"] == [0, 2]
    assert tree["rollouts"][0]["advantages"] == [[0, 1, 0.0], [1, 3, -0.5]]


def test_skipped_updates_are_counted_and_averaged_over_no_token():
    taken = {"loss": 6.0, "clipped": 3.0, "kl": 0.0, "response_tokens": 12, "read": 20, "slots": 25}
    taken |= {"grad_norm": 2.0, "skipped": 0}
    skipped = taken | {"loss": float("nan"), "grad_norm": float("nan"), "skipped": 1}
    averages = {"loss": 0.5, "clipped": 0.25, "kl": 0.0, "grad_norm": 2.0, "padding": pytest.approx(0.2)}
    assert update_metrics([taken, skipped, taken]) == averages | {"skipped_updates": 1}
    assert update_metrics([skipped]) == {"skipped_updates": 1} and update_metrics([]) == {}
