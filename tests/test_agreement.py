"""A push that leaves out any tensor is found, a sound engine passes and nothing changes, and gaps are
compared with their bound."""

import numpy as np
import pytest
import torch
from conftest import CopyEngine, make_learner, make_problems

from plumbing.agreement import EngineMismatch, check_gap, verify_sync


def some_prompts(tokenizer):
    return [p.prompt_ids for p in make_problems(tokenizer)]


def test_verify_sync_passes_a_sound_engine_and_changes_nothing(tiny_model, tiny_tokenizer):
    engine, learner = CopyEngine(tiny_tokenizer), make_learner(tiny_model)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.01)
    before, state = [p.clone() for p in tiny_model.parameters()], torch.get_rng_state()
    assert verify_sync(engine, learner, some_prompts(tiny_tokenizer), bound=0.2) < 1e-4
    assert all(map(torch.equal, before, tiny_model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, engine.model.parameters()))


def test_verify_sync_finds_every_tensor_that_does_not_arrive(tiny_model, tiny_tokenizer):
    """Each of the model's 30 tensors in turn is withheld, and all at once: embedding, output layer, norms,
    attention, MLP."""
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    learner, prompts = make_learner(tiny_model), some_prompts(tiny_tokenizer)
    for withheld in [*([name] for name in before), list(before)]:
        with pytest.raises(EngineMismatch, match="max_engine_gap"):
            verify_sync(CopyEngine(tiny_tokenizer, withheld), learner, prompts, bound=0.2)
        assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters()), withheld
    assert len(before) == 30


def test_the_mean_gap_per_token_is_compared_with_its_bound():
    """Of all tokens together: |-1|, |1| and four times |0.1| are 0.4 per token."""
    gaps = [np.array([-1.0, 1.0]), np.full(4, 0.1)]
    check_gap(gaps, 0.41, "here")
    with pytest.raises(EngineMismatch, match="^here the engine's .* by 0.4 nats per token, .* allows 0.39:"):
        check_gap(gaps, 0.39, "here")
    check_gap([], 0.0, "nothing was sampled, so")
    with pytest.raises(EngineMismatch):
        check_gap([np.array([0.0, np.nan])], 100.0, "where nothing can be compared,")
