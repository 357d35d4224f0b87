"""The memory plan against what small models allocate on the CPU, and against the paper's model by hand; and
no tensor over all tokens and the whole vocabulary."""

import contextlib
import json
import re

import pytest
import torch
from helpers import one_sentence
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import train
from fci import ATTENTION, StepHook
from plumbing import engines, learner, memory_plan, models
from plumbing.memory_plan import LiveBytes
from plumbing.projection import token_logps
from plumbing.settings import InputError

ROWS, LENGTH = 1, 384  # their product is no width of the model
TOKENS, CHUNK = ROWS * LENGTH, 64
SHAPE = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=2000,
)
CONFIGS = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
}


def near_to(measured):
    return pytest.approx(measured, rel=0.02)


def near(planned, measured):
    return planned == near_to(measured)


@pytest.fixture(params=CONFIGS)
def model_and_shape(request, tmp_path):
    """A random model whose parts are megabytes, and the shape that the plan reads from its config.json."""
    torch.manual_seed(0)
    CONFIGS[request.param].save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation=ATTENTION)
    return model.train(), memory_plan.shape_of(str(tmp_path))


def autocast_to(bfloat16: bool):
    return torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def some_ids():
    return torch.randint(2000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def nbytes(tensors):
    tensors = list(tensors)  # all alive, or an address could come twice
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def config_of(path, flags):
    sizes = f"--preset paper --engine torch --logit_chunk {CHUNK} --microbatch_tokens {TOKENS} "
    sizes += f"--max_prompt_tokens 1 --max_response_tokens {LENGTH}"
    return train.parse_config(["--model", str(path), *sizes.split(), *flags.split()])


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_weights_gradients_and_moments(model_and_shape, tmp_path, autocast):
    model, s = model_and_shape
    optimizer = torch.optim.AdamW(model.parameters())
    model(some_ids()).logits.mean().backward()
    optimizer.step()
    passes = [1, 2, 3]
    rows = memory_plan.plan(s, passes, *config_of(tmp_path, f"--autocast {autocast}"), card=1e9)
    weights = nbytes(model.parameters())
    assert rows["weights, fp32"] == [weights] * 3 and rows["pass over the model"] == passes
    assert rows["gradients, fp32"] == [0, *[nbytes(p.grad for p in model.parameters())] * 2]
    moments = nbytes(t for state in optimizer.state.values() for t in state.values())
    assert near(rows["AdamW's moments, fp32"][0], moments)
    kept_in = torch.bfloat16 if autocast == "bfloat16" else torch.float32
    assert rows["reference"] == [nbytes(p.to(kept_in) for p in model.parameters())] * 3
    without = memory_plan.plan(s, passes, *config_of(tmp_path, "--kl_coef 0"), card=1e9)
    assert without["reference"] == [0, 0, 0]


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_without_memory_are_those_with_it(model_and_shape, tmp_path, autocast, checkpointing):
    """As `Learner` has them, gradients present before: scoring with FCI and entropies, forward, backward."""
    model, _ = model_and_shape
    run, _ = config_of(tmp_path, f"--autocast {autocast} --gradient_checkpointing {checkpointing}")
    planned = memory_plan.measure(run, TOKENS)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = [(row[:1].tolist(), row[1:].tolist()) for row in some_ids()]
    hook = StepHook(torch.arange(LENGTH).expand(ROWS, -1) // memory_plan.STEP_TOKENS)
    bf16 = autocast == "bfloat16"
    with LiveBytes() as live, torch.no_grad(), autocast_to(bf16):
        token_logps(model.eval(), batch, 1.0, CHUNK, hook, with_entropy=True)
    found = [live.peak]
    with LiveBytes() as live:
        with autocast_to(bf16):
            logps, _ = token_logps(model.train(), batch, 1.0, CHUNK)
        found.append(live.peak)
        live.peak = 0
        logps.sum().backward()
    assert planned == [near_to(x) for x in [*found, live.peak]]


@pytest.mark.parametrize("flags", ["--logit_chunk 16", "--gradient_checkpointing true"])
def test_a_knob_that_saves_memory_does_so_in_the_plan(model_and_shape, tmp_path, flags):
    base, saving = (config_of(tmp_path, f"--gradient_checkpointing false {f}")[0] for f in ("", flags))
    _, forward, backward = memory_plan.measure(base, TOKENS)
    _, less_forward, less_backward = memory_plan.measure(saving, TOKENS)
    assert less_forward < 0.95 * forward and less_backward < 0.95 * backward


def test_scoring_is_measured_with_fci(model_and_shape, tmp_path, monkeypatch):
    run, _ = config_of(tmp_path, "--logit_chunk 8 --autocast none")
    with_fci = memory_plan.measure(run, TOKENS)
    monkeypatch.setattr(StepHook, "add_layer", lambda *args: None)
    monkeypatch.setattr(StepHook, "fci", lambda *args: None)
    without = memory_plan.measure(run, TOKENS)
    assert with_fci[0] > without[0] and with_fci[1:] == without[1:]


OTHERS = {
    "a sliding window": MistralConfig(**SHAPE, sliding_window=64),
    "wide heads": Qwen3Config(**SHAPE, head_dim=64),
    "rotary embeddings that depend on the length": LlamaConfig(
        **SHAPE,
        max_position_embeddings=256,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_models(tmp_path, name):
    OTHERS[name].save_pretrained(tmp_path)
    run, _ = config_of(tmp_path, "--autocast none")
    model = AutoModelForCausalLM.from_config(OTHERS[name], attn_implementation=ATTENTION, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live:
        logps, _ = token_logps(model.train(), [([1], list(range(1, TOKENS)))], 1.0, CHUNK)
        logps.sum().backward()
    assert near(max(memory_plan.measure(run, TOKENS)[1:]), live.peak)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SHAPE, head_dim=32), "caps its attention scores"),
        (BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=500), "no attention layer was seen"),
    ],
)
def test_a_model_that_cannot_be_scored_is_one_sentence(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        train.train(*config_of(tmp_path, "--plan true"))
    one_sentence(error, str(tmp_path), reason)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tensor_over_all_tokens_and_the_vocabulary(model_and_shape, with_entropy):
    """Forward and backward, with any of the output layer's users: nothing has more elements than a chunk of
    logits or the weights."""
    model, s = model_and_shape
    batch = [([0], row.tolist()) for row in some_ids()]

    def largest(chunk):
        with LiveBytes() as live:
            logps, entropies = token_logps(model, batch, 1.0, chunk, with_entropy=with_entropy)
            (logps.sum() + (entropies.sum() if with_entropy else 0)).backward()
        return live.largest

    assert largest(TOKENS) == TOKENS * SHAPE["vocab_size"]  # so the meter sees it
    # The output layer's weights, and activations.
    others = max(SHAPE["vocab_size"] * SHAPE["hidden_size"], ROWS * (LENGTH + 1) * SHAPE["intermediate_size"])
    assert largest(CHUNK) <= max(CHUNK * SHAPE["vocab_size"], others) < TOKENS * SHAPE["vocab_size"] / 2


@pytest.mark.parametrize("masked", [False, True])
def test_generation_copies_no_keys_for_grouped_queries(masked):
    """One new token against a cache, with left-padding: as if keys and values were repeated for every head,
    without doing it."""
    torch.manual_seed(0)
    batch, heads, kv_heads, length, d = 3, 6, 2, 40, 16
    query = torch.randn(batch, 1, heads, d).transpose(1, 2)  # as models make it
    key, value = torch.randn(2, batch, kv_heads, length, d)
    mask = (torch.arange(length) >= torch.tensor([[0], [7], [20]]))[:, None, None] if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads
    attend = ALL_ATTENTION_FUNCTIONS[models.ATTENTION]
    with LiveBytes() as live:
        ours, _ = attend(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert live.largest < key.numel()


def test_cache(model_and_shape):
    model, s = model_and_shape
    cache = DynamicCache()
    with torch.no_grad():
        model(some_ids(), past_key_values=cache)
    keys_and_values = nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert keys_and_values == TOKENS * s.kv_token * 2  # fp32


def test_fci_under_autocast_casts_a_key_before_its_heads_share_it():
    """transformers' rotary embedding hands over fp32 queries and keys, copied for each head by autocast."""
    L, d, peaks = 512, 128, []
    q, k = torch.randn(1, 12, L, d), torch.randn(1, 2, L, d)
    for bfloat16 in (False, True):
        hook = StepHook(torch.arange(L)[None] * 60 // L)
        with autocast_to(bfloat16), LiveBytes() as live:
            hook.add_layer(q, k, None, None)
        peaks.append(live.peak)
    assert peaks[1] < 0.9 * peaks[0]  # 43 bytes per token and width of a head, against 53; copies: 65


def test_plan_needs_no_weights_and_reads_no_data(model_and_shape, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_data", lambda *args: pytest.fail("read data"))
    for module in (learner, engines):
        monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("loaded weights"))
    flags = ["--model", str(tmp_path), "--plan", "--gpu_gb", "80", "--output_dir", str(tmp_path / "run")]
    train.train(*train.parse_config(flags))
    printed = capsys.readouterr().out
    assert "fits: " in printed and "bytes per token" in printed and not (tmp_path / "run").exists()


PAPERS = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
PAPERS |= dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=False)


def test_plan_of_the_papers_model(tmp_path, capsys, monkeypatch):
    """By hand: 1.777 B parameters; a cache of 0.4 x 80 GB less 3.55 GB, 28,672 bytes per token."""
    monkeypatch.setattr(memory_plan, "measure", lambda run, n_tokens: [int(5e9), int(8e9), int(7e9)])
    Qwen2Config(**PAPERS, max_position_embeddings=131072).save_pretrained(tmp_path)
    s = memory_plan.shape_of(str(tmp_path))
    assert s.parameters == 1_777_088_000 and s.kv_token == 28 * 2 * 2 * 128 * 2
    train.train(*train.parse_config(["--model", str(tmp_path), "--plan", "--gpu_gb", "80"]))
    printed = capsys.readouterr().out
    assert f"so {(32_000_000_000 - 2 * s.parameters) // 28672:,} tokens" in printed
    assert "or 107 responses of 9,216 tokens; 215 are sampled at once" in printed
    train.train(*train.parse_config(["--model", str(tmp_path), "--plan", "--gpu_gb", "48"]))
    assert "does not fit" in capsys.readouterr().out
    two = ["--model", str(tmp_path), "--plan", "--gpu_gb", "80", "--tensor_parallel", "2"]
    train.train(*train.parse_config(two))
    printed = capsys.readouterr().out
    assert f"so {(64_000_000_000 - 2 * s.parameters) // 28672:,} tokens" in printed
    assert re.search(r"engine: weights, bf16 +1.8 ", printed)  # of 3.6 GB, half on each card
    train.train(*train.parse_config([*two[:-2], "--gpu_memory", "0.045"]))
    assert "does not fit: vLLM's cache holds no response" in capsys.readouterr().out


def test_passes_of_the_papers_model_by_hand(tmp_path):
    """At full length: bf16 copies of the linear layers, and of each layer its input, fp32; a chunk's
    log-probs, probabilities and their product. Scoring keeps no inputs."""
    Qwen2Config(**PAPERS).save_pretrained(tmp_path)
    run, _ = train.parse_config(["--model", str(tmp_path)])
    D, M, layers, words, n_tokens = 1536, 8960, 28, 151936, 9216
    linear = layers * (2 * D * D + 2 * D * 256 + 3 * D * M) + words * D
    copies, inputs, logits = 2 * linear, layers * D * 4 * n_tokens, 1024 * words * 4
    scoring, forward, backward = memory_plan.measure(run, n_tokens)
    assert copies + 3 * logits < scoring < 1.1 * (copies + 3 * logits)
    hidden = 3 * D * 4 * n_tokens  # the last norm's input and x / rms(x), and the response tokens'
    rotary = 2 * 128 * 4 * n_tokens  # cosines and sines
    assert forward == pytest.approx(copies + inputs + hidden + rotary + 2 * logits, rel=0.005)
    assert near(backward, inputs + hidden + rotary + 3 * logits + 2 * 2 * words * D)


def test_a_plan_without_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(InputError, match="cannot load the config.json of a causal language model"):
        train.train(*train.parse_config(["--model", str(tmp_path), "--plan"]))
