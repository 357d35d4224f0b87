"""Which models can be scored: what `check_model` accepts, and what it refuses."""

import pytest
from helpers import CONFIGS, SHAPE, VOCABULARY, random_model
from transformers import BloomConfig, Gemma2Config, LlamaConfig, StableLmConfig

import fci
from fci import ATTENTION
from plumbing import models
from plumbing.agreement import check_model

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4)
GEMMA2 = dict(**SHAPE, num_key_value_heads=2, head_dim=16)


@pytest.mark.parametrize("attention", [ATTENTION, models.ATTENTION])
@pytest.mark.parametrize("name", CONFIGS)
def test_check_model_accepts_what_is_scored_right(name, attention):
    model = random_model(name, attention=attention)
    check_model(model)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "config, message",
    [
        (
            BloomConfig(**SMALL, n_layer=2, n_head=4),
            "BloomForCausalLM .* attention implementation is 'eager'",
        ),
        (
            StableLmConfig(**SMALL, intermediate_size=40, num_hidden_layers=2, num_key_value_heads=2),
            "StableLmForCausalLM .* is 'sdpa_with_step_hook'",
        ),
        (Gemma2Config(**GEMMA2), "attention sinks"),
        (LlamaConfig(**SHAPE, attention_dropout=0.5), "LlamaForCausalLM uses dropout"),
        (Gemma2Config(**GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=0.1), "its logits"),
    ],
)
def test_check_model_refuses_what_would_silently_be_wrong(config, message):
    """No attention layer seen, attention that the fused kernels lack, logits changed after the output
    layer."""
    with pytest.raises(ValueError, match=message):
        check_model(random_model(config))


def test_check_model_compares_step_attention_with_the_eager_model(monkeypatch):
    """A hook that sees other queries than the model uses is caught; another reduction of the same attention
    is not its business."""
    monkeypatch.setattr(fci.StepHook, "add_layer", None)  # Eq. 5 and 6 may be changed at will
    check_model(random_model("qwen2"))
    own = fci.step_attention
    monkeypatch.setattr(fci, "step_attention", lambda query, *rest: own(query.flip(2), *rest))
    with pytest.raises(ValueError, match="does not see"):
        check_model(random_model("qwen2"))
