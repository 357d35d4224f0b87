"""The loss by hand, exact gradients, and the order of events in a step."""

import math

import pytest
import torch
from conftest import TINY

import attnrl
from attnrl import AttnRL, Group, MethodConfig, Rollout, initial_jobs, pack, policy_loss, token_logps
from eval import grade, load_problems
from sampler import EngineMismatch, TorchEngine, load_model, prompt_ids, verify_sync
from tree import tree_advantages

SMALL = dict(
    batch_size=4,
    min_batch_size=2,
    max_batch_size=8,
    target_sequences=40,
    group_size=4,
    max_prompt_tokens=128,
    max_response_tokens=128,
    minibatch_prompts=2,
)


class CountingEngine(TorchEngine):
    """Remembers the requests of every call."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def generate(self, requests, **kwargs):
        self.calls.append(requests)
        return super().generate(requests, **kwargs)


def make_trainer(model, tokenizer, reward_fn=grade, lr=1e-3, **fields):
    cfg = MethodConfig(**SMALL | fields)
    reference = load_model(str(TINY)).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    torch.manual_seed(0)
    return AttnRL(cfg, model, reference, tokenizer, CountingEngine(model, tokenizer), optimizer, reward_fn)


def make_groups(tokenizer, count=4, first=0):
    problems = load_problems(str(TINY / "train.jsonl"))[first : first + count]
    return [Group(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])) for p in problems]


# --- loss


def test_policy_loss_by_hand():
    ratio = torch.tensor([1.0, 2.0, 2.0, 0.5, 0.5])
    advantages = torch.tensor([3.0, 1.0, -1.0, 1.0, -1.0])
    logps = ratio.log().requires_grad_()
    ref_logps = torch.tensor([0.0, 0.0, math.log(2), 0.0, 0.0])
    loss, clipped, kl = policy_loss(logps, torch.zeros(5), ref_logps, advantages, clip_low=0.2, clip_high=0.28, kl_coef=0.1)
    # k3 = exp(r) - r - 1 with r = log(ref / policy): ratios 1, 1/2, 1, 2, 2
    expected_kl = torch.tensor([0.0, 0.5 + math.log(2) - 1, 0.0, 1 - math.log(2), 1 - math.log(2)])
    torch.testing.assert_close(kl, expected_kl)
    torch.testing.assert_close(loss.detach(), torch.tensor([-3.0, -1.28, 2.0, -0.5, 0.8]) + 0.1 * expected_kl)
    assert clipped.tolist() == [False, True, False, False, True]


def test_clipped_tokens_have_no_policy_gradient():
    logps = torch.tensor([math.log(2.0), math.log(0.5), 0.0], requires_grad=True)
    loss, _, _ = policy_loss(logps, torch.zeros(3), None, torch.tensor([1.0, -1.0, 2.0]), 0.2, 0.28, 0.0)
    loss.sum().backward()
    assert logps.grad.tolist() == [0.0, 0.0, -2.0]


@pytest.mark.parametrize("old_logps", ["recompute", "engine"])
def test_first_gradient_is_reinforce_on_full_logits(tiny_model, tiny_tokenizer, old_logps):
    """Where the ratio is 1 and there is no KL, the gradient is -sum(w A grad log p) / N: checked against plain logits, one row at a time.

    w is 1 for recomputed log-probs, and min(P(trainer) / P(engine), 2) of each token for the engine's.
    """
    trainer = make_trainer(tiny_model, tiny_tokenizer, kl_coef=0.0, off_policy=False, old_logps=old_logps)
    rollouts = scored_rollouts(trainer)
    n = sum(len(r.ids) for _, r in rollouts)
    ratios = torch.tensor([0.25, 1.0, 1.5, 8.0])  # of trainer to engine; the last is cut off
    expected = dict(recompute=torch.ones(4), engine=torch.tensor([0.25, 1.0, 1.5, 2.0]))[old_logps]
    for _, r in rollouts:
        r.engine_logps = [x - float(ratios[i % 4].log()) for i, x in enumerate(r.logps)]
    trainer.accumulate(rollouts, n)
    ours = [p.grad.clone() for p in tiny_model.parameters()]
    tiny_model.zero_grad()
    for group, r in rollouts:
        ids = torch.tensor([group.prompt_ids + r.ids])
        logps = tiny_model(ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        picked = logps.gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        weights = expected[torch.arange(len(r.ids)) % 4]
        (-(weights * torch.tensor(r.advantages) * picked).sum() / n).backward()
    for a, p in zip(ours, tiny_model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


def scored_rollouts(trainer):
    """One branched, graded and scored batch with advantages, as (group, rollout) pairs."""
    groups = make_groups(trainer.tokenizer)
    trainer.grade(trainer.generate(initial_jobs(groups, trainer.cfg)))
    trainer.plan(groups)
    fresh = trainer.generate(attnrl.branch_jobs(groups, trainer.cfg))
    trainer.grade(fresh)
    trainer.score(fresh)
    rollouts = [(g, r) for g in trainer.assign_advantages(groups) for r in g.rollouts]
    assert len({a for _, r in rollouts for a in r.advantages}) > 4
    return rollouts


def test_gradients_do_not_depend_on_memory_knobs(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer, kl_coef=0.1)
    rollouts = scored_rollouts(trainer)
    n = sum(len(r.ids) for _, r in rollouts)
    for _, r in rollouts:
        r.logps = [x - 0.1 for x in r.logps]  # so that ratio and clipping take part

    def gradients(microbatch_tokens, logit_chunk, checkpointing=False):
        trainer.cfg.microbatch_tokens, trainer.cfg.logit_chunk = microbatch_tokens, logit_chunk
        tiny_model.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else tiny_model.gradient_checkpointing_disable()
        tiny_model.zero_grad()
        sums = trainer.accumulate(rollouts, n)
        return torch.cat([p.grad.flatten() for p in tiny_model.parameters()]), sums["loss"]

    expected, expected_loss = gradients(10**9, 10**9)
    assert expected.abs().max() > 1e-4
    for knobs in [(1, 10**9), (1, 512, True), (700, 64), (4000, 7), (4000, 1000, True), (10**9, 64), (10**9, 10**9, True)]:
        actual, loss = gradients(*knobs)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
        assert loss == pytest.approx(expected_loss, abs=1e-3)


def test_padding_is_the_share_of_slots_without_a_token(tiny_model, tiny_tokenizer):
    """Three sequences of 6, 5 and 2 tokens: none is padded alone, 18 slots together, 12 and 2 in two passes."""
    trainer = make_trainer(tiny_model, tiny_tokenizer, kl_coef=0.0)
    rollouts = [Rollout(0, 0, [9] * n, [-1.0] * n, True, n % 2, [-1.0] * n) for n in (5, 4, 1)]
    for budget, slots in [(1, 13), (100, 18), (12, 14)]:
        trainer.cfg.microbatch_tokens = budget
        for r in rollouts:
            r.advantages = [1.0] * len(r.ids)
        assert trainer.update([Group("p", ["1"], [8], rollouts)])["padding"] == pytest.approx(1 - 13 / slots)


# --- forward passes


def test_pack_covers_everything_once_within_the_budget():
    sequences = [([0] * 3, [0] * n) for n in (5, 1, 9, 9, 2, 30, 4)]
    for budget in (1, 12, 40, 1000):
        batches = list(pack(sequences, budget))
        assert sorted(i for rows in batches for i in rows) == list(range(7))
        for rows in batches:
            assert len(rows) == 1 or len(rows) * max(3 + len(sequences[i][1]) for i in rows) <= budget


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_agree_with_the_engine(tiny_model, tiny_tokenizer, temperature):
    trainer = make_trainer(tiny_model, tiny_tokenizer, temperature=temperature)
    fresh = trainer.generate(initial_jobs(make_groups(tiny_tokenizer), trainer.cfg))
    trainer.score(fresh)
    gaps = [abs(a - b) for _, r in fresh for a, b in zip(r.logps, r.engine_logps, strict=True)]
    assert max(gaps) < 1e-4


class CopyEngine(TorchEngine):
    """Samples, like vLLM, from a copy of the model, which `load` brings up to date but for the tensors in `withheld`."""

    def __init__(self, tokenizer, withheld=()):
        super().__init__(load_model(str(TINY)), tokenizer)
        self.withheld = withheld

    def load(self, model):
        self.model.load_state_dict({k: v for k, v in model.state_dict().items() if k not in self.withheld}, strict=False)


def some_prompts(tokenizer):
    return [g.prompt_ids for g in make_groups(tokenizer)]


def test_verify_sync_passes_a_sound_engine_and_changes_nothing(tiny_model, tiny_tokenizer):
    engine = CopyEngine(tiny_tokenizer)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.01)
    before, state = [p.clone() for p in tiny_model.parameters()], torch.get_rng_state()
    assert verify_sync(engine, tiny_model, some_prompts(tiny_tokenizer), bound=0.2) < 1e-4
    assert all(map(torch.equal, before, tiny_model.parameters())) and torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, engine.model.parameters()))


def test_verify_sync_finds_every_tensor_that_does_not_arrive(tiny_model, tiny_tokenizer):
    """Each of the model's 30 tensors in turn is withheld, and all at once: embedding, output layer, norms, attention, MLP."""
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    for withheld in [*([name] for name in before), list(before)]:
        with pytest.raises(EngineMismatch, match="max_engine_gap"):
            verify_sync(CopyEngine(tiny_tokenizer, withheld), tiny_model, some_prompts(tiny_tokenizer), bound=0.2)
        assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters()), withheld
    assert len(before) == 30


@pytest.mark.parametrize("off_policy", [True, False])
def test_a_stale_engine_stops_the_step_before_it_trains(tiny_model, tiny_tokenizer, off_policy):
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=off_policy)
    trainer.engine = CopyEngine(tiny_tokenizer)
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight.neg_()  # the engine is not told
    before = [p.clone() for p in tiny_model.parameters()]
    with pytest.raises(EngineMismatch, match="tokens sampled in this step"):
        trainer.step(make_groups(tiny_tokenizer))
    assert all(map(torch.equal, before, tiny_model.parameters())) and trainer.totals["updates"] == 0


def test_top_p_reaches_the_engine_and_its_renormalisation_is_no_mismatch(tiny_model, tiny_tokenizer):
    """Sampled from the nucleus: the engine's log-probs are the larger by at most -log(top_p), so the ratio is below 1."""
    trainer = make_trainer(tiny_model, tiny_tokenizer, top_p=0.7, max_engine_gap=1e-3, lr=0.1)
    metrics, _ = trainer.step(make_groups(tiny_tokenizer))
    assert 1e-3 < metrics["engine_gap_mean"] <= metrics["engine_gap_max"] <= -math.log(0.7) + 1e-4
    assert metrics["engine_log_ratio"] < 0 and 0 < metrics["engine_ess"] < 1
    metrics, _ = trainer.step([])
    assert metrics["loss"]


def test_engine_sleeps_during_updates_only(tiny_model, tiny_tokenizer, monkeypatch):
    """What a sleeping engine relies on: nothing is generated between `sleep` and `load`, and an update that is skipped skips both."""
    for off_policy in (True, False):
        trainer, calls = make_trainer(tiny_model, tiny_tokenizer, off_policy=off_policy), []
        for owner, names in ((trainer.engine, ("generate", "sleep", "load")), (trainer, ("score", "update"))):
            for name in names:
                wrapped = getattr(owner, name)
                monkeypatch.setattr(owner, name, lambda *a, name=name, wrapped=wrapped, **k: (calls.append(name), wrapped(*a, **k))[1])
        trainer.step(make_groups(tiny_tokenizer))
        trainer.step(make_groups(tiny_tokenizer, first=4))
        first = ["generate", "score", "score"] if off_policy else ["generate", "score", "generate", "score"]
        whole = [*first, "sleep", "update", "load"]
        assert calls == (first if off_policy else whole) + whole


def test_entropy_is_of_the_full_distribution(tiny_model, tiny_tokenizer):
    prompt = prompt_ids(tiny_tokenizer, "a=3, b=a+2, find b.")
    response = tiny_tokenizer(" hm ok now\n\n").input_ids
    with torch.no_grad():
        _, entropies = token_logps(tiny_model, [(prompt, response)], 1.0, 2, with_entropy=True)
        logits = tiny_model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5)


# --- the step


def test_off_policy_makes_one_generation_call_a_step_and_trains_a_step_later(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    first, second = make_groups(tiny_tokenizer), make_groups(tiny_tokenizer, first=4)
    before = [p.clone() for p in tiny_model.parameters()]
    metrics, batch = trainer.step(first)
    assert batch == [] and all(map(torch.equal, before, tiny_model.parameters()))
    behaviour = {id(r): list(r.logps) for g in first for r in g.rollouts}
    metrics, batch = trainer.step(second)
    assert batch is first and metrics["valid_sequences"] > 0
    assert not all(map(torch.equal, before, tiny_model.parameters()))
    metrics, batch = trainer.step([])
    assert batch is second and trainer.pending == [] and "reward" not in metrics
    assert len(trainer.engine.calls) == 3
    assert len(trainer.engine.calls[1]) == 16 + sum(r.start > 0 for g in first for r in g.rollouts)
    assert all(r.logps == behaviour[id(r)] for g in first for r in g.rollouts[:4])  # still of the policy that sampled them


def test_on_policy_makes_two_calls_and_trains_at_once(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=False)
    groups = make_groups(tiny_tokenizer)
    metrics, batch = trainer.step(groups)
    assert batch is groups and len(trainer.engine.calls) == 2 and trainer.totals["updates"] > 0


def test_grpo_makes_one_call_and_never_branches(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer, branching="none", fci_filter="none", off_policy=False, advantage="group")
    _, batch = trainer.step(make_groups(tiny_tokenizer))
    assert len(trainer.engine.calls) == 1 and all(len(g.rollouts) == 4 for g in batch)


def test_continuations_keep_their_prefix_and_its_behaviour_log_probs(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    groups = make_groups(tiny_tokenizer)
    trainer.step(groups)
    with torch.no_grad():
        next(tiny_model.parameters()).add_(0.01)  # the policy moves on
    trainer.step([])
    continuations = [(g, r) for g in groups for r in g.rollouts if r.start > 0]
    assert len(continuations) > 8
    for group, r in continuations:
        parent = group.rollouts[r.family]
        assert parent.start == 0 and r.ids[: r.start] == parent.ids[: r.start]
        assert r.logps[: r.start] == parent.logps[: r.start] and len(r.logps) == len(r.ids) <= 128
    moved = [abs(a - b) for g, r in continuations for a, b in zip(r.logps, r.engine_logps, strict=True)]
    assert max(moved) < 1e-4  # prefix and continuation: each is scored under the policy that sampled it


def test_advantages_are_those_of_the_tree(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    groups = make_groups(tiny_tokenizer)
    trainer.step(groups)
    trainer.step([])
    for group in groups:
        expected = tree_advantages(group.leaves())
        for rollout, a in zip(group.rollouts, expected):
            assert rollout.advantages == (a.tolist() if group.mixed() else [])


@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_a_batch_without_signal_updates_nothing_and_grows_to_its_bound(tiny_model, tiny_tokenizer, right, off_policy, monkeypatch):
    trainer = make_trainer(tiny_model, tiny_tokenizer, reward_fn=lambda response, answers: right, off_policy=off_policy)
    monkeypatch.setattr(trainer.engine, "load", lambda model: pytest.fail("weights that did not change were pushed"))
    before = [p.clone() for p in tiny_model.parameters()]
    for _ in range(2):
        metrics, _ = trainer.step(make_groups(tiny_tokenizer))
    assert metrics["valid_sequences"] == 0 and trainer.totals["updates"] == 0 and metrics["next_batch_size"] == 8
    assert metrics["reward"] == right and "loss" not in metrics and not trainer.optimizer.state
    assert all(map(torch.equal, before, tiny_model.parameters()))


def poison(trainer, monkeypatch, minibatches, what):
    """Make the loss or a gradient of the given minibatches (numbered from 0) not finite, one element in both cases."""
    accumulate, calls = trainer.accumulate, []

    def poisoned(rollouts, n_tokens):
        sums = accumulate(rollouts, n_tokens)
        if len(calls) in minibatches and what == "loss":
            sums["loss"] += math.inf
        elif len(calls) in minibatches:
            next(trainer.model.parameters()).grad[3, 5] = math.nan if what == "NaN gradient" else -math.inf
        calls.append(rollouts)
        return sums

    monkeypatch.setattr(trainer, "accumulate", poisoned)


def two_minibatches(trainer):
    """Two problems with advantages, ready for `update`, which makes a minibatch of each."""
    trainer.cfg.minibatch_prompts = 1
    torch.manual_seed(0)  # the same two, whatever was sampled before
    return list({id(g): g for g, _ in scored_rollouts(trainer)}.values())[:2]


@pytest.mark.parametrize("what", ["loss", "NaN gradient", "infinite gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tiny_tokenizer, monkeypatch, what):
    """The first of two minibatches is skipped as if it were not there: weights, optimiser and metrics are those of the second alone."""
    trainer, expected = (make_trainer(load_model(str(TINY)), tiny_tokenizer, off_policy=False) for _ in range(2))
    groups = two_minibatches(trainer)
    poison(trainer, monkeypatch, {0}, what)
    metrics = trainer.update(groups)
    other = two_minibatches(expected)[expected.rng.permutation(2)[1]]
    expected_metrics = expected.update([other])
    assert metrics == expected_metrics | {"skipped_updates": 1} and expected_metrics["skipped_updates"] == 0
    assert trainer.totals["updates"] == 1 and trainer.skipped_in_a_row == 0 and metrics["grad_norm"] > 0
    for a, b in zip(trainer.model.parameters(), expected.model.parameters()):
        assert torch.equal(a, b) and a.grad is None
        state, expected_state = trainer.optimizer.state[a], expected.optimizer.state[b]
        assert state.keys() == expected_state.keys() and all(torch.equal(state[k], expected_state[k]) for k in state)


def test_updates_skipped_in_a_row_stop_the_run_with_their_last_batch(tiny_model, tiny_tokenizer):
    """A reference model of NaN makes every loss NaN: two updates are skipped in one step, the third in the next."""
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=False)
    groups = two_minibatches(trainer)
    with torch.no_grad():
        trainer.reference.lm_head.weight.fill_(math.nan)
    before = [p.clone() for p in tiny_model.parameters()]
    assert trainer.update(groups) == {"skipped_updates": 2} and trainer.skipped_in_a_row == 2
    with pytest.raises(attnrl.NonFiniteUpdates) as caught:
        trainer.update(groups)
    message, last = caught.value.args
    assert message.startswith("3 updates in a row") and len(last) == 1 and any(last[0] is g for g in groups)
    assert all(map(torch.equal, before, tiny_model.parameters())) and not trainer.optimizer.state and trainer.totals["updates"] == 0


def test_a_finite_update_ends_a_row_of_skipped_ones(tiny_model, tiny_tokenizer, monkeypatch):
    trainer = make_trainer(tiny_model, tiny_tokenizer, off_policy=False)
    groups = two_minibatches(trainer)
    poison(trainer, monkeypatch, {0, 1, 3, 4}, "loss")
    assert [(trainer.update(groups)["skipped_updates"], trainer.skipped_in_a_row) for _ in range(3)] == [(2, 2), (1, 1), (1, 0)]
    assert trainer.totals["updates"] == 2


@pytest.mark.parametrize(
    "fields",
    [
        dict(branching="entropy"), dict(branching="random"), dict(branching="earliest"), dict(expansion="uniform"), dict(fci_filter="all"),
        dict(fci_filter="none"), dict(adaptive_batch=False), dict(advantage="group"), dict(kl_coef=0.0), dict(n_branch_points=1, n_continuations=3),
        dict(old_logps="engine"),
    ],
    ids=str,
)  # fmt: skip
def test_every_field_trains(tiny_model, tiny_tokenizer, fields):
    trainer = make_trainer(tiny_model, tiny_tokenizer, **fields)
    trainer.step(make_groups(tiny_tokenizer))
    metrics, batch = trainer.step([])
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and trainer.totals["updates"] > 0
    if fields.get("expansion") == "uniform":
        assert all({f for f, _ in g.branches} == {0, 1, 2, 3} for g in batch if g.kept)
    if "n_continuations" in fields:
        assert all(
            sum(r.start > 0 for r in g.rollouts) == 3 * len(g.branches) and len({f for f, _ in g.branches}) == len(g.branches)
            for g in batch
        )


def test_bfloat16_autocast_trains_fp32_weights(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    trainer.autocast_dtype = torch.bfloat16
    trainer.step(make_groups(tiny_tokenizer))
    metrics, _ = trainer.step([])
    assert metrics["grad_norm"] > 0 and {p.dtype for p in tiny_model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(group_size=1), "group_size"), (dict(branching="none"), "fci_filter"), (dict(batch_size=1), "min_batch_size"),
        (dict(temperature=0.0), "temperature"), (dict(branch_quantile=0.0), "branch_quantile"), (dict(top_p=1.5), "top_p"),
        (dict(top_p=0.0), "top_p"), (dict(top_p=0.9, old_logps="engine"), "which no weight corrects"), (dict(max_importance=0.0), "max_importance"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**SMALL | fields).check()


def test_rollout_round_trips_through_plain_dicts():
    """What a checkpoint does to the pending batch."""
    from dataclasses import asdict

    rollout = Rollout(1, 1, [5, 6], [-1.0, -0.25], True, 1.0, [-1.0, -0.25], [0.0], [])
    group = Group("p", ["1"], [1, 2], [rollout], 0.5, True, [(1, 1)])
    raw = asdict(group)
    assert Group(**raw | {"rollouts": [Rollout(**r) for r in raw["rollouts"]]}) == group
