"""A push that leaves out any tensor is found, a sound engine passes and nothing changes, and gaps are
compared with their bound."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CopyEngine, make_learner, make_problems
from transformers import AutoModelForCausalLM, Qwen2Config

from plumbing.agreement import EngineMismatch, check_gap, verify_sync
from plumbing.models import load_model
from plumbing.torch_engine import TorchEngine


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
        with pytest.raises(EngineMismatch, match="a tenth of the gap to the weights before"):
            verify_sync(CopyEngine(tiny_tokenizer, withheld), learner, prompts, bound=0.2)
        assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters()), withheld
    assert len(before) == 30


def test_verify_sync_passes_a_deep_network_whose_engine_rounds(tmp_path):
    """28 layers of Qwen2 with large key biases, the engine in bf16: rounding alone puts it more than
    0.1 nats from the trainer. That is far less than a push that did not arrive."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, num_hidden_layers=28, vocab_size=1000))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False).mul_(200 if "lm_head" in name else 1)
        if "k_proj.bias" in name:
            parameter.normal_(std=50)
    model.save_pretrained(tmp_path)
    learner = make_learner(load_model(str(tmp_path)), machine=dict(autocast="bfloat16"))
    engine = TorchEngine(load_model(str(tmp_path), torch.bfloat16), SimpleNamespace(eos_token_id=None))
    prompts = torch.randint(1000, (8, 12)).tolist()
    sample = engine.generate

    def generate(*args):  # vLLM has a precision of its own
        assert not torch.is_autocast_enabled("cpu")
        return sample(*args)

    engine.generate = generate
    assert verify_sync(engine, learner, prompts, bound=0.2) > 0.1
    engine.load = lambda model: None
    with pytest.raises(EngineMismatch, match="a tenth of the gap to the weights before the push"):
        verify_sync(engine, learner, prompts, bound=0.2)


def test_the_mean_gap_per_token_is_compared_with_its_bound():
    """Of all tokens together: |-1|, |1| and four times |0.1| are 0.4 per token."""
    gaps = [np.array([-1.0, 1.0]), np.full(4, 0.1)]
    check_gap(gaps, 0.41, "here")
    with pytest.raises(EngineMismatch, match="^here the engine's .* by 0.4 nats per token, .* allows 0.39:"):
        check_gap(gaps, 0.39, "here")
    check_gap([], 0.0, "nothing was sampled, so")
    with pytest.raises(EngineMismatch):
        check_gap([np.array([0.0, np.nan])], 100.0, "where nothing can be compared,")
