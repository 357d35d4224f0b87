"""Packing changes no score and no gradient, scores are those of the sampled policy, and updates that are not
finite are skipped."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    as_rank,
    handed_over,
    make_learner,
    make_problems,
    make_trainer,
    measured_step,
    n_updates,
)

from fci import split_steps, step_ids_of
from plumbing import learner as learner_module
from plumbing.learner import NonFiniteUpdates, pack, passes
from plumbing.logs import update_metrics
from plumbing.models import load_model, prompt_ids
from plumbing.nouns import Sequence
from plumbing.projection import token_logps

# --- Forward passes ---------------------------------------------------------------------------------------


def test_pack_covers_everything_once_within_the_budget():
    lengths = [3 + n for n in (5, 1, 9, 9, 2, 30, 4)]
    for budget in (1, 12, 40, 1000):
        batches = pack(range(len(lengths)), lengths, budget)
        assert sorted(i for rows in batches for i in rows) == list(range(7))
        for rows in batches:
            assert len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget


@pytest.mark.parametrize("n_sequences", [1, 2, 7, 40])
def test_all_ranks_make_equally_many_passes_and_every_sequence_counts_once(monkeypatch, n_sequences):
    lengths = [3 + 1 + (29 * i) % 50 for i in range(n_sequences)]
    of_rank = []
    for rank in range(3):
        as_rank(monkeypatch, learner_module, rank, 3)
        of_rank.append(passes(lengths, budget=60))
    assert len({len(forwards) for forwards in of_rank}) == 1
    counted = [i for forwards in of_rank for forward in forwards if forward.counts for i in forward.rows]
    assert sorted(counted) == list(range(n_sequences))
    as_rank(monkeypatch, learner_module, 0, 1)
    assert [forward.rows for forward in passes(lengths, 60)] == pack(range(len(lengths)), lengths, 60)


def test_nothing_to_do_is_no_pass(monkeypatch):
    for rank in range(2):
        as_rank(monkeypatch, learner_module, rank, 2)
        assert passes([], budget=60) == []


# --- Scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_agree_with_the_engine(tiny_model, tiny_tokenizer, temperature):
    trainer = make_trainer(tiny_model, tiny_tokenizer, temperature=temperature)
    fresh = trainer.generate(make_problems(tiny_tokenizer), [])
    scores = trainer.score(fresh)
    pairs = [(score.logps, r.engine_logps) for (_, r), score in zip(fresh, scores, strict=True)]
    assert max(abs(a - b) for logps, engine in pairs for a, b in zip(logps, engine, strict=True)) < 1e-4


def test_scores_do_not_depend_on_memory_knobs(tiny_model, tiny_tokenizer):
    """Log-probs, entropies and FCI, in the order of the sequences; what was not asked for is None."""
    trainer = make_trainer(tiny_model, tiny_tokenizer)
    learner, sequences = trainer.learner, []
    for problem, r in trainer.generate(make_problems(tiny_tokenizer, 2), []):
        steps = split_steps([tiny_tokenizer.decode([i]) for i in r.ids])
        sequences.append(Sequence(problem.prompt_ids, r.ids, step_ids_of(len(problem.prompt_ids), steps)))
    expected = learner.score(sequences, with_entropy=True)
    for microbatch_tokens, logit_chunk in [(1, 512), (300, 7), (10**9, 10**9)]:
        learner.machine.microbatch_tokens, learner.machine.logit_chunk = microbatch_tokens, logit_chunk
        for sequence, ours, theirs in zip(sequences, learner.score(sequences, True), expected, strict=True):
            n, n_steps = len(sequence.response_ids), max(sequence.step_ids)
            assert ours.logps.shape == ours.entropies.shape == (n,) and len(ours.fci) >= 1 + n_steps
            np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-5)
            np.testing.assert_allclose(ours.entropies, theirs.entropies, atol=1e-5)
            np.testing.assert_allclose(ours.fci[: 1 + n_steps], theirs.fci[: 1 + n_steps], atol=1e-5)
    (bare,) = learner.score([Sequence(sequences[0].prompt_ids, sequences[0].response_ids)])
    np.testing.assert_allclose(bare.logps, expected[0].logps, atol=1e-5)
    assert bare.entropies is None and bare.fci is None and learner.score([]) == []


def test_entropy_is_of_the_full_distribution(tiny_model, tiny_tokenizer):
    prompt = prompt_ids(tiny_tokenizer, "a=3, b=a+2, find b.")
    response = tiny_tokenizer(" hm ok now\n\n").input_ids
    with torch.no_grad():
        _, entropies = token_logps(tiny_model, [(prompt, response)], 1.0, 2, with_entropy=True)
        logits = tiny_model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropies, expected, atol=1e-5, rtol=1e-5)


# --- Gradients --------------------------------------------------------------------------------------------


def test_gradients_do_not_depend_on_memory_knobs(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer, kl_coef=0.1, minibatch_sequences=1000)
    learner, (minibatch,) = trainer.learner, handed_over(trainer)
    for s in minibatch[0]:  # so that ratio and clipping take part
        s.per_token["old_logps"] = [x - 0.1 for x in s.per_token["old_logps"]]

    def gradients(microbatch_tokens, logit_chunk, checkpointing=False):
        learner.machine.microbatch_tokens, learner.machine.logit_chunk = microbatch_tokens, logit_chunk
        if checkpointing:
            tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            tiny_model.gradient_checkpointing_disable()
        tiny_model.zero_grad()
        sums = learner.accumulate(*minibatch)
        return torch.cat([p.grad.flatten() for p in tiny_model.parameters()]), sums["loss"]

    expected, expected_loss = gradients(10**9, 10**9)
    assert expected.abs().max() > 1e-4
    for knobs in [
        (1, 10**9),
        (1, 512, True),
        (700, 64),
        (4000, 7),
        (4000, 1000, True),
        (10**9, 64),
        (10**9, 10**9, True),
    ]:
        actual, loss = gradients(*knobs)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
        assert loss == pytest.approx(expected_loss, abs=1e-3)


def test_each_sequence_has_a_divisor_of_its_own(tiny_model):
    """The gradient is the sum of the sequences' own ones, each over its divisor, in one pass or many."""
    learner = make_learner(tiny_model)
    sequences = [
        Sequence([8], [9, 7, 5], per_token={"a": [1.0, 2.0, 3.0]}),
        Sequence([8, 9], [4], None, {"a": [1.0]}),
    ]
    loss = lambda logps, ref_logps, a: (-a * logps, {"twice": 2 * a})

    def gradient(chosen, divisors):
        tiny_model.zero_grad()
        sums = learner.accumulate(chosen, loss, divisors)
        assert sums["twice"] == 2 * sum(sum(s.per_token["a"]) for s in chosen)
        return torch.cat([p.grad.flatten() for p in tiny_model.parameters()])

    apart = gradient(sequences[:1], [1.0]) / 4 + gradient(sequences[1:], [1.0]) / 7
    for budget in (1, 100):
        learner.machine.microbatch_tokens = budget
        torch.testing.assert_close(gradient(sequences, [4, 7]), apart, atol=1e-5, rtol=1e-4)


def test_padding_is_the_share_of_slots_without_a_token(tiny_model):
    """Three sequences of 6, 5 and 2 tokens: none is padded alone, 18 slots together, 12 and 2 in two
    passes."""
    learner = make_learner(tiny_model)
    sequences = [Sequence([8], [9] * n, per_token={"advantages": [1.0] * n}) for n in (5, 4, 1)]
    loss = lambda logps, ref_logps, advantages: (-advantages * logps, {})
    for budget, slots in [(1, 13), (100, 18), (12, 14)]:
        learner.machine.microbatch_tokens = budget
        report = learner.update(sequences, loss, divisors=[10] * 3)
        assert (report["read"], report["slots"], report["response_tokens"]) == (13, slots, 10)
        assert update_metrics([report])["padding"] == pytest.approx(1 - 13 / slots)


def test_bfloat16_autocast_trains_fp32_weights(tiny_model, tiny_tokenizer):
    trainer = make_trainer(tiny_model, tiny_tokenizer, machine=dict(autocast="bfloat16"))
    assert trainer.learner.autocast_dtype == torch.bfloat16
    measured_step(trainer, make_problems(tiny_tokenizer))
    metrics, _ = measured_step(trainer, [])
    assert metrics["grad_norm"] > 0 and {p.dtype for p in tiny_model.parameters()} == {torch.float32}


# --- Updates that are not finite --------------------------------------------------------------------------


def poison(learner, monkeypatch, minibatches, what):
    """Make the loss or a gradient of the given minibatches (numbered from 0) not finite, one element in both
    cases."""
    accumulate, calls = learner.accumulate, []

    def poisoned(sequences, loss, divisors):
        sums = accumulate(sequences, loss, divisors)
        if len(calls) in minibatches and what == "loss":
            sums["loss"] += math.inf
        elif len(calls) in minibatches:
            next(learner.model.parameters()).grad[3, 5] = math.nan if what == "NaN gradient" else -math.inf
        calls.append(sequences)
        return sums

    monkeypatch.setattr(learner, "accumulate", poisoned)


def learner_and_minibatches(tokenizer):
    """A learner on fresh weights, and two minibatches of one problem each for `update`; always the same."""
    model = load_model(str(TINY))
    trainer = make_trainer(model, tokenizer, off_policy=False, minibatch_sequences=8)
    return trainer.learner, handed_over(trainer)[:2]


@pytest.mark.parametrize("what", ["loss", "NaN gradient", "infinite gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tiny_tokenizer, monkeypatch, what):
    """The first of two minibatches is skipped as if it were not there: weights, optimiser and metrics are
    those of the second alone."""
    learner, minibatches = learner_and_minibatches(tiny_tokenizer)
    poison(learner, monkeypatch, {0}, what)
    reports = [learner.update(*minibatch) for minibatch in minibatches]
    expected, (_, other) = learner_and_minibatches(tiny_tokenizer)
    assert other[0] == minibatches[1][0] != minibatches[0][0]
    expected_metrics = update_metrics([expected.update(*other)])
    metrics = update_metrics(reports)
    assert [report["skipped"] for report in reports] == [1, 0]
    assert metrics == expected_metrics | {"skipped_updates": 1} and expected_metrics["skipped_updates"] == 0
    assert n_updates(learner) == 1 and learner.skipped_in_a_row == 0 and metrics["grad_norm"] > 0
    for a, b in zip(learner.model.parameters(), expected.model.parameters()):
        assert torch.equal(a, b) and a.grad is None
        state, expected_state = learner.optimizer.state[a], expected.optimizer.state[b]
        assert state.keys() == expected_state.keys()
        assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_updates_skipped_in_a_row_stop_the_run_with_their_last_batch(tiny_tokenizer):
    """A reference model of NaN makes every loss NaN: two updates are skipped, the third stops the run."""
    learner, minibatches = learner_and_minibatches(tiny_tokenizer)
    with torch.no_grad():
        learner.reference.lm_head.weight.fill_(math.nan)
    before = [p.clone() for p in learner.model.parameters()]
    reports = [learner.update(*minibatch) for minibatch in minibatches]
    assert update_metrics(reports) == {"skipped_updates": 2} and learner.skipped_in_a_row == 2
    with pytest.raises(NonFiniteUpdates) as caught:
        learner.update(*minibatches[0])
    message, last = caught.value.args
    assert message.startswith("3 updates in a row") and last is minibatches[0][0]
    assert all(map(torch.equal, before, learner.model.parameters()))
    assert not learner.optimizer.state and n_updates(learner) == 0


def test_a_finite_update_ends_a_row_of_skipped_ones(tiny_tokenizer, monkeypatch):
    learner, minibatches = learner_and_minibatches(tiny_tokenizer)
    poison(learner, monkeypatch, {0, 1, 3, 4}, "loss")
    seen = []
    for _ in range(3):
        metrics = update_metrics([learner.update(*minibatch) for minibatch in minibatches])
        seen.append((metrics["skipped_updates"], learner.skipped_in_a_row))
    assert seen == [(2, 2), (1, 1), (1, 0)]
    assert n_updates(learner) == 2


def test_step_ids_of_some_sequences_are_refused(model):
    """Whether FCI came back would depend on which of them share a pass."""
    sequences = [Sequence([1], [2, 3], [0, 1, 1]), Sequence([1], [2, 3])]
    with pytest.raises(ValueError, match="1 of 2 sequences have step ids"):
        make_learner(model).score(sequences)
