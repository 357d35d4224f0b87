"""Shared by several test files: random models of several families, and what an error message must be."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fci import ATTENTION

VOCABULARY = 50
WINDOW = 11  # shorter than the sequences
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.3,  # attention far from uniform
)
CONFIGS = {
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "llama, grouped queries": LlamaConfig(**SHAPE, num_key_value_heads=1),
    "qwen3, wide heads": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "mistral, sliding": MistralConfig(**SHAPE, num_key_value_heads=4, head_dim=8, sliding_window=WINDOW),
    "gemma3, sliding and full": Gemma3TextConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=256,
        query_pre_attn_scalar=64,  # a scale that is not 1 / sqrt(head_dim)
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
HEAD_DIM = {name: getattr(config, "head_dim", None) or 8 for name, config in CONFIGS.items()}


def random_model(config, seed=0, attention=ATTENTION):
    """config: a name of CONFIGS, or a configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[config] if isinstance(config, str) else config).eval()
    model.set_attn_implementation(attention)
    return model


def random_ids(length, generator):
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def random_steps(n_steps, generator, longest=3):
    """Spans of `n_steps` steps of 1 to `longest` tokens."""
    ends = torch.randint(1, longest + 1, (n_steps,), generator=generator).cumsum(0).tolist()
    return list(zip([0, *ends], ends))


def one_sentence(error, *mentions):
    """The message is one sentence and names what it should."""
    message = str(error.value)
    assert "\n" not in message and ". " not in message, message
    assert all(mention in message for mention in mentions), message
