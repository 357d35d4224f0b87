"""The loss by hand, exact gradients, the order of events in a step, and machines that a student can
replace."""

import inspect
import itertools
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    TINY,
    CopyEngine,
    handed_over,
    make_learner,
    make_problems,
    make_trainer,
    measured_step,
    n_updates,
)

from attnrl import AttnRL, MethodConfig, Problem, Rollout, minibatches, policy_loss
from eval import grade
from plumbing.agreement import EngineMismatch
from plumbing.grader import Grader
from plumbing.models import load_model
from plumbing.nouns import Response, Score, Sequence
from tree import Leaf, tree_advantages

# --- The loss ---------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    ratio = torch.tensor([1.0, 2.0, 2.0, 0.5, 0.5])
    advantages = torch.tensor([3.0, 1.0, -1.0, 1.0, -1.0])
    logps = ratio.log().requires_grad_()
    ref_logps = torch.tensor([0.0, 0.0, math.log(2), 0.0, 0.0])
    unused = torch.full((5,), math.nan)  # the engine's log-probs
    cfg = MethodConfig(clip_low=0.2, clip_high=0.28, kl_coef=0.1)
    loss, logged = policy_loss(logps, ref_logps, torch.zeros(5), unused, advantages, cfg)
    # k3 = exp(r) - r - 1 with r = log(ref / policy): ratios 1, 1/2, 1, 2, 2
    expected_kl = torch.tensor([0.0, 0.5 + math.log(2) - 1, 0.0, 1 - math.log(2), 1 - math.log(2)])
    torch.testing.assert_close(logged["kl"], expected_kl)
    expected = torch.tensor([-3.0, -1.28, 2.0, -0.5, 0.8]) + 0.1 * expected_kl
    torch.testing.assert_close(loss.detach(), expected)
    assert logged["clipped"].tolist() == [False, True, False, False, True]
    assert logged.keys() == {"clipped", "kl"} and not logged["kl"].requires_grad


def test_clipped_tokens_have_no_policy_gradient():
    logps = torch.tensor([math.log(2.0), math.log(0.5), 0.0], requires_grad=True)
    cfg = MethodConfig(clip_low=0.2, clip_high=0.28, kl_coef=0.0)
    advantages = torch.tensor([1.0, -1.0, 2.0])
    loss, _ = policy_loss(logps, None, torch.zeros(3), torch.zeros(3), advantages, cfg)
    loss.sum().backward()
    assert logps.grad.tolist() == [0.0, 0.0, -2.0]


@pytest.mark.parametrize("old_logps", ["recompute", "engine"])
def test_first_gradient_is_reinforce_on_full_logits(tiny_model, tiny_tokenizer, old_logps):
    """Where the ratio is 1 and there is no KL, the gradient is -sum(w A grad log p) / N: checked against
    plain logits, one row at a time.

    w is 1 for recomputed log-probs, and min(P(trainer) / P(engine), 2) of each token for the engine's.
    """
    fields = dict(kl_coef=0.0, off_policy=False, old_logps=old_logps, minibatch_sequences=1000)
    trainer = make_trainer(tiny_model, tiny_tokenizer, **fields)
    ((sequences, loss, divisors),) = handed_over(trainer)
    n = sum(len(s.response_ids) for s in sequences)
    ratios = torch.tensor([0.25, 1.0, 1.5, 8.0])  # of trainer to engine; the last is cut off
    expected = dict(recompute=torch.ones(4), engine=torch.tensor([0.25, 1.0, 1.5, 2.0]))[old_logps]
    for s in sequences:
        logps = s.per_token["old_logps"]
        s.per_token["engine_logps"] = [x - float(ratios[i % 4].log()) for i, x in enumerate(logps)]
    trainer.learner.accumulate(sequences, loss, divisors)
    ours = [p.grad.clone() for p in tiny_model.parameters()]
    tiny_model.zero_grad()
    for s in sequences:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        logps = tiny_model(ids).logits[0, len(s.prompt_ids) - 1 : -1].log_softmax(-1)
        picked = logps.gather(1, torch.tensor(s.response_ids)[:, None])[:, 0]
        weights = expected[torch.arange(len(s.response_ids)) % 4]
        (-(weights * torch.tensor(s.per_token["advantages"]) * picked).sum() / n).backward()
    for a, p in zip(ours, tiny_model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


# --- Engine and trainer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("off_policy", [True, False])
def test_a_stale_engine_stops_the_step_before_it_trains(tiny_model, tiny_tokenizer, off_policy):
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=off_policy)
    trainer.engine = CopyEngine(tiny_tokenizer)
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight.neg_()  # the engine is not told
    before = [p.clone() for p in tiny_model.parameters()]
    with pytest.raises(EngineMismatch, match="tokens sampled in this step"):
        measured_step(trainer, make_problems(tiny_tokenizer))
    assert all(map(torch.equal, before, tiny_model.parameters())) and n_updates(trainer.learner) == 0


def test_top_p_reaches_the_engine_and_its_renormalisation_is_no_mismatch(tiny_model, tiny_tokenizer):
    """Sampled from the nucleus: the engine's log-probs are the larger by at most -log(top_p), so the ratio
    is below 1."""
    trainer = make_trainer(tiny_model, tiny_tokenizer, top_p=0.7, max_engine_gap=1e-3, lr=0.1)
    metrics, _ = measured_step(trainer, make_problems(tiny_tokenizer))
    assert 1e-3 < metrics["engine_gap_mean"] <= metrics["engine_gap_max"] <= -math.log(0.7) + 1e-4
    assert metrics["engine_log_ratio"] < 0 and 0 < metrics["engine_ess"] < 1
    metrics, _ = measured_step(trainer, [])
    assert metrics["loss"]


@pytest.mark.parametrize("off_policy", [True, False])
def test_engine_sleeps_during_updates_only(tiny_model, tiny_tokenizer, monkeypatch, off_policy):
    """What a sleeping engine relies on: nothing is generated between `sleep` and `load`, and where no
    update is due neither is called."""
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=off_policy)
    calls: list[str] = []

    def note(owner, name):
        wrapped = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(name), wrapped(*a, **k))[1])

    for name in ("generate", "sleep", "load"):
        note(trainer.engine, name)
    for name in ("score", "update"):
        note(trainer.learner, name)
    expected = []
    for first in (0, 4):
        metrics, due = measured_step(trainer, make_problems(tiny_tokenizer, first=first))
        sampled = ["generate", "score", "score"]  # initial responses are scored, then continuations
        expected += sampled if off_policy else [*sampled, *sampled]
        if due:
            n_minibatches = max(1, round(metrics["sequences"] / 16))
            expected += ["sleep", *["update"] * n_minibatches, "load"]
            assert n_minibatches > 0
    assert calls == expected and calls.count("load") == (1 if off_policy else 2)


# --- The step ---------------------------------------------------------------------------------------------


def test_off_policy_makes_one_generation_call_per_step_and_trains_a_step_later(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    first, second = make_problems(tiny_tokenizer), make_problems(tiny_tokenizer, first=4)
    before = [p.clone() for p in tiny_model.parameters()]
    metrics, due = measured_step(trainer, first)
    assert due == [] and all(map(torch.equal, before, tiny_model.parameters()))
    behaviour = [list(r.logps) for p in first for r in p.rollouts]
    metrics, due = measured_step(trainer, second)
    assert due is first and metrics["valid_sequences"] > 0
    assert not all(map(torch.equal, before, tiny_model.parameters()))
    metrics, due = measured_step(trainer, [])
    assert due is second and trainer.pending == [] and "reward" not in metrics
    assert len(trainer.engine.calls) == 3
    assert len(trainer.engine.calls[1]) == 16 + sum(r.start > 0 for p in first for r in p.rollouts)
    # still of the policy that sampled them
    assert [r.logps for p in first for r in p.rollouts[:4]] == behaviour


def test_on_policy_makes_two_calls_and_trains_at_once(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=False)
    problems = make_problems(tiny_tokenizer)
    _, due = measured_step(trainer, problems)
    assert due is problems and len(trainer.engine.calls) == 2 and n_updates(trainer.learner) > 0


def test_grpo_makes_one_call_and_never_branches(tiny_model, tiny_tokenizer):
    grpo = dict(branching="none", fci_filter="none", off_policy=False, advantage="group")
    trainer = make_trainer(tiny_model, tiny_tokenizer, **grpo)
    _, due = measured_step(trainer, make_problems(tiny_tokenizer))
    assert len(trainer.engine.calls) == 1 and all(len(p.rollouts) == 4 for p in due)


def test_continuations_keep_their_prefix_and_its_behaviour_log_probs(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    problems = make_problems(tiny_tokenizer)
    measured_step(trainer, problems)
    with torch.no_grad():
        next(tiny_model.parameters()).add_(0.01)  # the policy moves on
    measured_step(trainer, [])
    continuations = [(p, r) for p in problems for r in p.rollouts if r.start > 0]
    assert len(continuations) > 8
    for problem, r in continuations:
        parent = problem.rollouts[r.family]
        assert parent.start == 0 and r.ids[: r.start] == parent.ids[: r.start]
        assert r.logps[: r.start] == parent.logps[: r.start] and len(r.logps) == len(r.ids) <= 128
    moved = [abs(a - b) for _, r in continuations for a, b in zip(r.logps, r.engine_logps, strict=True)]
    assert max(moved) < 1e-4  # prefix and continuation: each is scored under the policy that sampled it


def test_advantages_are_those_of_the_tree(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    problems = make_problems(tiny_tokenizer)
    measured_step(trainer, problems)
    measured_step(trainer, [])
    for problem in problems:
        leaves = [Leaf(r.family, r.start, len(r.ids), r.reward) for r in problem.rollouts]
        for rollout, a in zip(problem.rollouts, tree_advantages(leaves), strict=True):
            assert rollout.advantages == (a.tolist() if problem.mixed() else [])


@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_a_batch_without_signal_updates_nothing_and_grows_to_its_bound(
    tiny_model, tiny_tokenizer, right, off_policy, monkeypatch
):
    rule = lambda response, answers: right
    trainer = make_trainer(tiny_model, tiny_tokenizer, rule=rule, off_policy=off_policy)
    pushed = lambda model: pytest.fail("weights that did not change were pushed")
    monkeypatch.setattr(trainer.engine, "load", pushed)
    before = [p.clone() for p in tiny_model.parameters()]
    for _ in range(2):
        metrics, _ = measured_step(trainer, make_problems(tiny_tokenizer))
    assert (
        metrics["valid_sequences"] == 0
        and n_updates(trainer.learner) == 0
        and trainer.sampler.batch_size == 8
    )
    assert metrics["reward"] == right and "loss" not in metrics and not trainer.learner.optimizer.state
    assert all(map(torch.equal, before, tiny_model.parameters()))


@pytest.mark.parametrize("advantage", ["tree", "group"])
def test_kept_problems_without_advantage_carry_the_kl_alone(tiny_model, tiny_tokenizer, advantage):
    """GRPO and TreeRL: problems that are all wrong are trained on with advantage 0, so that only the KL moves
    the weights."""
    fields = dict(rule=lambda response, answers: False, drop_zero_advantage=False, advantage=advantage)
    trainer = make_trainer(tiny_model, tiny_tokenizer, kl_coef=1.0, **fields)
    measured_step(trainer, make_problems(tiny_tokenizer))
    with torch.no_grad():
        next(tiny_model.parameters()).mul_(1.1)  # away from the reference
    metrics, due = measured_step(trainer, [])
    assert all(not any(r.advantages) and len(r.advantages) == len(r.ids) for p in due for r in p.rollouts)
    assert metrics["valid_tokens"] == 0 and metrics["sequences"] == sum(len(p.rollouts) for p in due)
    assert metrics["loss"] == pytest.approx(metrics["kl"]) and metrics["kl"] > 1e-4
    assert n_updates(trainer.learner) > 0


@pytest.mark.parametrize(
    "fields",
    [
        dict(branching="entropy"),
        dict(branching="random"),
        dict(branching="earliest"),
        dict(expansion="uniform"),
        dict(fci_filter="all"),
        dict(fci_filter="none"),
        dict(fci_filter="drop_easy"),
        dict(drop_zero_advantage=False),
        dict(adaptive_batch=False),
        dict(advantage="group"),
        dict(kl_coef=0.0),
        dict(n_branch_points=1, n_continuations=3),
        dict(old_logps="engine"),
    ],
    ids=str,
)
def test_every_field_trains(tiny_model, tiny_tokenizer, fields):
    trainer = make_trainer(tiny_model, tiny_tokenizer, **fields)
    measured_step(trainer, make_problems(tiny_tokenizer))
    metrics, due = measured_step(trainer, [])
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and n_updates(trainer.learner) > 0
    if fields.get("expansion") == "uniform":
        assert all({f for f, _ in p.branches} == {0, 1, 2, 3} for p in due if p.kept)
    if "n_continuations" in fields:
        for problem in due:
            n_continuations = sum(r.start > 0 for r in problem.rollouts)
            assert n_continuations == 3 * len(problem.branches)
            assert len({f for f, _ in problem.branches}) == len(problem.branches)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(group_size=1), "group_size"),
        (dict(branching="none"), "fci_filter"),
        (dict(batch_size=1), "min_batch_size"),
        (dict(temperature=0.0), "temperature"),
        (dict(branch_quantile=0.0), "branch_quantile"),
        (dict(top_p=1.5), "top_p"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=0.9, old_logps="engine"), "which no weight corrects"),
        (dict(max_importance=0.0), "max_importance"),
        (dict(branching="sideways"), "branching must be one of .* got 'sideways'"),
    ],
    ids=str,
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**SMALL | fields).check()


def test_the_state_round_trips_through_plain_json():
    """What a checkpoint does to the pending batch, the sampler and the random state."""
    trainer, other, third = (AttnRL(MethodConfig(**SMALL), None, None, None, str, seed) for seed in (0, 1, 2))
    measured = dict(steps=[(0, 2)], step_texts=["ab"], n_scored=1, entropies=[0.5, 0.25], fci=[0.0])
    initial = Rollout(1, 0, [5, 6], [-1.0, -0.25], [-1.0, -0.25], True, 1.0, [], **measured)
    continuation = Rollout(1, 1, [5, 6], [-1.0, -0.25], [-1.0, -0.5], True, 1.0, [0.5, 0.125])
    trainer.pending = [Problem("p", ["1"], [1, 2], [initial, continuation], 0.5, True, [(1, 1)])]
    trainer.sampler.keep(0.5, [1.0, 1.0], "easy")
    trainer.rng.random(3)
    other.load_state(trainer.state())
    assert other.pending == trainer.pending and other.sampler == trainer.sampler
    third.load_state(json.loads(json.dumps(trainer.state())))
    assert json.dumps(third.state()) == json.dumps(trainer.state())
    assert third.rng.random() == other.rng.random() == trainer.rng.random()


# --- Minibatches ------------------------------------------------------------------------------------------


def test_minibatches_are_whole_problems_nearly_equal_and_none_is_a_leftover():
    """Every problem once and in order; round(sequences / size) of them, at least one; a boundary is off by
    half a problem at most."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(6, 31, size=rng.integers(1, 60))
        problems = [Problem(str(i), [], [], [Rollout(0)] * n) for i, n in enumerate(counts)]
        size = int(rng.integers(31, 200))
        made = minibatches(problems, size)
        assert [p for minibatch in made for p in minibatch] == problems
        assert len(made) == max(1, round(counts.sum() / size))
        equal = counts.sum() / len(made)
        assert all(abs(sum(len(p.rollouts) for p in minibatch) - equal) <= 30 for minibatch in made)
    single = [Problem("p", [], [], [Rollout(0)] * 6)]
    assert minibatches(single * 3, 1) == [single] * 3  # smaller than a problem: one problem each


def simulated_steps(n_steps, solve_rates, **fields):
    """Reports of the updates of each step, at the size of the paper: only the machines are canned."""
    rng, words = np.random.default_rng(0), ["x", ".\n\n", "right", "wrong"]

    class Engine(CannedEngine):
        def generate(self, requests, temperature, top_p):
            ids = [[0, 1] * 8 + [3 - int(rng.random() < solve_rates[r.prompt_ids[0]])] for r in requests]
            ids = [own[len(r.prompt_ids) - 1 :] for own, r in zip(ids, requests)]
            return [Response(own, [-1.0] * len(own), "stop") for own in ids]

    decode = lambda ids: "".join(words[i] for i in ids)
    cfg = MethodConfig(max_engine_gap=100, **fields)
    trainer = AttnRL(cfg, Engine(), CannedLearner(), CannedGrader(), decode)
    updates = []
    for _ in range(n_steps):
        chosen = rng.integers(len(solve_rates), size=trainer.sampler.batch_size)
        _, reports = trainer.step([Problem("p", ["1"], [int(i)]) for i in chosen], nullcontext)
        updates.append([len(report["sequences"]) for report in reports])
    return updates


def test_a_step_of_the_papers_size_makes_about_ten_updates_on_192_sequences():
    """Default fields, a policy whose success differs from problem to problem: once Eq. 10 has found the batch
    that gives 1,920 useful sequences, a step makes ten updates, each on 192 sequences give or take half a
    tree at both ends. GRPO's 64 groups of 30 make ten from the first step on."""
    solve_rates = np.random.default_rng(1).random(200)
    updates = simulated_steps(60, solve_rates)
    assert updates[0] == []  # off-policy: the first step only samples
    settled = [n for reports in updates[30:] for n in reports]
    assert np.mean([len(reports) for reports in updates[30:]]) == pytest.approx(10, abs=0.5)
    assert np.mean(settled) == pytest.approx(192, rel=0.05) and max(abs(n - 192) for n in settled) < 45

    grpo = dict(branching="none", fci_filter="none", advantage="group", group_size=30, off_policy=False)
    grpo |= dict(adaptive_batch=False, drop_zero_advantage=False)
    assert {len(reports) for reports in simulated_steps(2, solve_rates, **grpo)} == {10}


# --- A student can replace a machine by ten lines ---------------------------------------------------------


class CannedEngine:
    def __init__(self, *responses):
        self.responses = itertools.cycle(responses)  # right and wrong ones, in turn

    def generate(self, requests, temperature, top_p):
        return [Response(ids, [-1.0] * len(ids), "stop") for _, ids in zip(requests, self.responses)]

    load = lambda self, model: None
    sleep = close = lambda self: None


class CannedGrader:
    def grade(self, texts, answers):
        return [text.endswith("right") for text in texts]


class CannedLearner:
    model = None

    def score(self, sequences, with_entropy=False):  # every token is certain; later steps have more FCI
        zeros = [np.zeros(len(s.response_ids)) for s in sequences]
        fci = [np.arange(1 + max(s.step_ids)) if s.step_ids else None for s in sequences]
        return list(map(Score, zeros, zeros, fci))

    def update(self, sequences, loss, divisors):
        flat = lambda name: torch.tensor([x for s in sequences for x in s.per_token[name]])
        losses, _ = loss(flat("old_logps"), flat("old_logps"), **{n: flat(n) for n in sequences[0].per_token})
        return {"sequences": sequences, "losses": losses, "divisors": divisors}


@pytest.mark.parametrize(
    ("machine", "methods"),
    [
        (CannedEngine, {"generate", "load", "sleep", "close"}),
        (CannedGrader, {"grade"}),
        (CannedLearner, {"score", "update", "model"}),
    ],
)
def test_a_machine_has_at_most_ten_lines_and_only_what_the_method_names(machine, methods):
    lines = [line for line in inspect.getsource(machine).splitlines() if line.strip()]
    assert len(lines) <= 10 and {name for name in vars(machine) if not name.startswith("_")} == methods


@pytest.mark.parametrize("grader", [Grader(grade), CannedGrader()], ids=["real grader", "canned grader"])
def test_a_student_can_replace_the_engine_by_ten_lines(tiny_model, tiny_tokenizer, grader):
    """With the real learner: the weights change, and the right response gains on the wrong one."""
    ending = "right" if isinstance(grader, CannedGrader) else "<eos>"
    encode = lambda text: tiny_tokenizer(text, add_special_tokens=False).input_ids
    work = "b=a+2: 3+2 so b=5\n\n hm well\n\n mind so\n\n</think>\n\n"
    right, wrong = encode(work + "\\boxed{5}<eos>"), encode(work + "\\boxed{4}<eos>")
    prompt = make_problems(tiny_tokenizer, 1)[0].prompt_ids
    decode = lambda ids: tiny_tokenizer.decode(ids).replace("\\boxed{5}<eos>", "\\boxed{5}" + ending)
    learner = make_learner(tiny_model, load_model(str(TINY)))
    cfg = MethodConfig(**SMALL, max_engine_gap=100)  # the canned log-probs are no model's
    trainer = AttnRL(cfg, CannedEngine(right, wrong), learner, grader, decode)
    problems = [Problem(f"problem {i}", ["5"], prompt) for i in range(4)]

    def lead() -> float:
        """How much likelier the right response is than the wrong one, in nats."""
        scores = learner.score([Sequence(prompt, right), Sequence(prompt, wrong)])
        return float(scores[0].logps.sum() - scores[1].logps.sum())

    before, lead_before = [p.clone() for p in tiny_model.parameters()], lead()
    trainer.step(problems, clock=nullcontext)
    assert all(map(torch.equal, before, tiny_model.parameters()))
    due, updates = trainer.step([], clock=nullcontext)
    assert due is problems and len(updates) == 3 == n_updates(trainer.learner)  # 48 sequences, 16 each
    assert all([r.reward for r in p.initial()] == [1, 0, 1, 0] and len(p.rollouts) > 4 for p in due)
    assert not any(map(torch.equal, before, tiny_model.parameters())) and lead() > lead_before


@pytest.mark.holds_the_paper("Eq. 3")
def test_a_whole_step_needs_no_model():
    """Three canned machines, and all that the step does by hand: plan, tree, advantages, loss, next size.

    A response has six steps of two tokens and one of one. FCI rises from step to step, so the candidates of
    Eq. 7 are the last two of seven, at tokens 10 and 12. Two of four are right: round(4 exp(-1/2)) = 2 are
    branched, the wrong ones first.
    """
    words = ["x", ".\n\n", "right", "wrong"]
    decode = lambda ids: "".join(words[i] for i in ids)
    engine = CannedEngine([0, 1] * 6 + [2], [0, 1] * 6 + [3])
    trainer = AttnRL(
        MethodConfig(**SMALL, max_engine_gap=100), engine, CannedLearner(), CannedGrader(), decode
    )
    new = [Problem("p", ["1"], [9, 9, 9])]
    assert trainer.step(new, clock=nullcontext) == ([], [])
    (problem,) = trainer.pending
    assert problem.branches == [(1, 10), (1, 12), (3, 10), (3, 12)] and problem.kept
    assert problem.rollouts[0].fci == [0, 2, 3, 4, 5, 6, 7]

    (problem,), (update,) = trainer.step([], clock=nullcontext)
    starts = [(r.family, r.start, r.reward) for r in problem.rollouts[4:]]
    assert starts == [(f, start, right) for f in (1, 3) for start in (10, 12) for right in (1, 0)]
    # Eq. 2 and 3: V(root) = 1/2; the second response's segments have 5, 3 and 1 leaves
    first, second, third = (2 * 2 / 5 - 1) / 5**0.5, (2 * 1 / 3 - 1 / 2 - 2 / 5) / 3**0.5, -1 / 2 - 1 / 3
    expected = [first] * 10 + [second] * 2 + [third]
    assert problem.rollouts[1].advantages == pytest.approx(expected)
    assert problem.rollouts[0].advantages == pytest.approx([1] * 13)
    # a right continuation from token 12, of 13 tokens
    assert problem.rollouts[6].advantages == pytest.approx(expected[:12] + [2 - 1 / 2 - 1 / 3] * 13)
    # Eq. 1 where the policy is the one that sampled: minus the advantages, divided by all response tokens
    assert update["divisors"] == [4 * 13 + 4 * 23 + 4 * 25] * 12
    advantages = [a for r in problem.rollouts for a in r.advantages]
    assert update["losses"].tolist() == pytest.approx([-a for a in advantages])
    assert [s.response_ids for s in update["sequences"]] == [r.ids for r in problem.rollouts]
    assert trainer.sampler.batch_size == round(0.9 * 4 + 0.1 * 4 * 40 / 12) == 5  # Eq. 10
