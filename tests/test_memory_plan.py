"""The memory plan against what a small model allocates, on the CPU and to 10%; and no tensor over all tokens
and the whole vocabulary."""

import contextlib
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import train
from experiments.bench_logits import LiveBytes
from fci import ATTENTION, StepHook
from plumbing import engines, learner, memory_plan, models
from plumbing.adapters import add_adapters
from plumbing.projection import token_logps
from plumbing.settings import InputError

ROWS, LENGTH = 2, 192  # their product is no width of the model
TOKENS, CHUNK = ROWS * LENGTH, 64
RANKS = [0, 8]  # of adapters; 0: all weights are trained
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


def near(planned, measured):
    return planned == pytest.approx(measured, rel=0.1)


def plan(s, flags="", card=1e9):
    """Rows of the plan of such a model, by train.py's flags."""
    sizes = f"--preset paper --engine torch --logit_chunk {CHUNK} --microbatch_tokens {TOKENS} "
    sizes += f"--max_prompt_tokens 1 --max_response_tokens {LENGTH} {flags}"
    return memory_plan.plan(s, *train.parse_config(sizes.split()), card)


def knobs(autocast, rank, checkpointing=True):
    how = f"--autocast {'bfloat16' if autocast else 'none'} --lora_rank {rank}"
    return f"{how} --gradient_checkpointing {checkpointing}"


@pytest.fixture(params=CONFIGS)
def model_and_shape(request, tmp_path):
    """A random model whose parts are megabytes, and the shape that the plan reads from its config.json."""
    torch.manual_seed(0)
    CONFIGS[request.param].save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation=ATTENTION)
    return model.train(), memory_plan.shape_of(str(tmp_path))


def with_adapters(model, autocast, rank):
    """The same model, trained by adapters, as `make_learner` has it, if there is a rank."""
    run = SimpleNamespace(lora_rank=rank, seed=0, model="base")
    if rank:
        add_adapters(model, run, torch.bfloat16 if autocast else torch.float32, "base")
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def autocast_to(bfloat16: bool):
    return torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def some_ids():
    return torch.randint(2000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def nbytes(tensors):
    tensors = list(tensors)  # all alive, or an address could come twice
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_gradients_and_moments(model_and_shape, autocast, rank):
    model, s = model_and_shape
    rows = plan(s, knobs(autocast, rank))
    reference = nbytes(p.to(torch.bfloat16 if autocast else torch.float32) for p in model.parameters())
    assert rows["reference"] == [0 if rank else reference] * 4
    with_adapters(model, autocast, rank)
    optimizer = torch.optim.AdamW(trained(model))
    with autocast_to(autocast):
        model(some_ids()).logits.float().mean().backward()
    optimizer.step()
    assert rows["weights"] == [nbytes(model.parameters())] * 4
    assert max(rows["gradients"]) == nbytes(p.grad for p in trained(model))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    moments = nbytes(t for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert rows["AdamW's moments"] == [moments] * 4
    if rank:
        assert (
            rows["gradients"][1] < rows["weights"][0] / 5 and reference < rows["weights"][0] < 1.5 * reference
        )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_kept_for_backward(model_and_shape, autocast, checkpointing, rank):
    model, s = model_and_shape
    with_adapters(model, autocast, rank)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights, saved = {p.untyped_storage()._cdata for p in model.parameters()}, []

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast_to(autocast):
        hidden = model.base_model(input_ids=some_ids(), use_cache=False).last_hidden_state
    is_cast = lambda t: t.dtype == torch.bfloat16 and not {TOKENS, LENGTH} & set(t.shape)
    copies = [t for t in saved if is_cast(t)]
    picked = hidden.clone()  # what picking response tokens makes
    activations = [*(t for t in saved if not is_cast(t)), hidden, picked]
    rows = plan(s, knobs(autocast, rank, checkpointing))
    kept = rows[f"{'inputs' if checkpointing else 'activations'} of {s.layers} layers"]
    assert near(kept[1] + rows["last norm, hidden states"][1], nbytes(activations))
    if not checkpointing:
        head = 0 if rank else 2 * s.vocabulary * s.width * autocast
        assert near(rows["autocast's copies of weights"][1] - head, nbytes(copies))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("autocast", [False, True])
def test_peaks_of_forward_and_backward_through_the_layers(model_and_shape, autocast, rank):
    model, s = model_and_shape
    with_adapters(model, autocast, rank)
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live, torch.no_grad(), autocast_to(autocast):
        model.base_model(input_ids=some_ids(), use_cache=False)
    rows = plan(s, knobs(autocast, rank))
    copies, layer = rows["autocast's copies of weights"], rows["one layer"]
    head = 0 if rank else 2 * s.vocabulary * s.width * autocast
    assert near(layer[0] + copies[0] - head, live.peak)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    with LiveBytes() as live:
        with autocast_to(autocast):
            hidden = model.base_model(input_ids=some_ids(), use_cache=False).last_hidden_state
        loss = hidden.sum()
        del hidden
        live.peak = 0
        loss.backward()
    assert near(max(rows[f"inputs of {s.layers} layers"]) + layer[3] + copies[3], live.peak)


class Output(torch.nn.Module):
    """An output layer whose hidden states are given, so that nothing but the projection is measured."""

    device = torch.device("cpu")

    def __init__(self, head, hidden):
        super().__init__()
        self.head, self.hidden = head, hidden

    def base_model(self, input_ids, use_cache):
        return self

    @property
    def last_hidden_state(self):
        return self.hidden

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [16, 128])  # the weight's gradient and the logits are the larger part
def test_logits(model_and_shape, autocast, chunk, rank):
    model, s = model_and_shape
    head = with_adapters(model, autocast, rank).get_output_embeddings()
    if not rank:
        head.weight.grad = torch.zeros_like(head.weight)
    states = torch.randn(1, LENGTH + 1, s.width, dtype=head.weight.dtype, requires_grad=True)
    output, batch = Output(head, states), [([0], some_ids()[0].tolist())]
    hidden = 2 * states.element_size() * LENGTH * s.width  # picked, and their gradient
    forward, _, backward, _ = plan(s, f"{knobs(autocast, rank)} --logit_chunk {chunk}")["logits of a chunk"]
    with LiveBytes() as live, autocast_to(autocast):
        with torch.no_grad():
            token_logps(output, batch, 1.0, chunk, with_entropy=True)
    head_copy = 2 * head.weight.numel() if autocast and not rank else 0
    assert near(forward + head_copy + hidden // 2, live.peak)
    with LiveBytes() as live:
        with autocast_to(autocast):
            logps, _ = token_logps(output, batch, 1.0, chunk)
        live.peak = 0
        logps.sum().backward()
    assert near(backward + hidden, live.peak)


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

    assert largest(TOKENS) == TOKENS * s.vocabulary  # so the meter sees it
    # The output layer's weights, and activations.
    others = max(s.vocabulary * s.width, ROWS * (LENGTH + 1) * s.mlp)
    assert largest(CHUNK) <= max(CHUNK * s.vocabulary, others) < TOKENS * s.vocabulary / 2


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


def test_fci_and_cache(model_and_shape):
    model, s = model_and_shape
    s12 = dataclasses.replace(s, heads=12, kv_heads=2, head_dim=128)  # of the 1.5B model
    q, k = (torch.randn(1, n, TOKENS, s12.head_dim) for n in (s12.heads, s12.kv_heads))
    hook = StepHook(torch.arange(TOKENS)[None] * 60 // TOKENS)
    with LiveBytes() as live:
        hook.add_layer(q, k, None, None)
    assert near(s12.fci(TOKENS), live.peak)
    cache = DynamicCache()
    with torch.no_grad():
        model(some_ids(), past_key_values=cache)
    keys_and_values = nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert keys_and_values == TOKENS * s.kv_token(bytes_each=4)


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


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_whole_microbatch(model_and_shape, checkpointing, autocast, rank):
    """As `Learner.accumulate` has it, gradients present before: the largest column of the plan."""
    model, s = model_and_shape
    rows = plan(s, knobs(autocast, rank, checkpointing))
    for name in ("weights", "AdamW's moments", "reference", "gradients"):
        del rows[name]
    with_adapters(model, autocast, rank)
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = [(row[:1].tolist(), row[1:].tolist()) for row in some_ids()]
    with LiveBytes() as live:
        with autocast_to(autocast):
            logps, _ = token_logps(model, batch, 1.0, CHUNK)
        logps.sum().backward()
    assert near(max(sum(column) for column in list(zip(*rows.values()))[1:]), live.peak)


def test_plan_needs_no_weights_and_reads_no_data(model_and_shape, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_data", lambda *args: pytest.fail("read data"))
    for module in (learner, engines):
        monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("loaded weights"))
    flags = ["--model", str(tmp_path), "--plan", "--gpu_gb", "80", "--output_dir", str(tmp_path / "run")]
    train.train(*train.parse_config(flags))
    printed = capsys.readouterr().out
    assert "fits: " in printed and "bytes per token" in printed and not (tmp_path / "run").exists()


def test_plan_of_the_papers_model(tmp_path, capsys):
    """By hand: 1.777 B parameters; a cache of 0.4 x 80 GB less 3.55 GB, 28,672 bytes per token."""
    shape = dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    config = Qwen2Config(
        **shape, vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=131072
    )
    config.save_pretrained(tmp_path)
    s = memory_plan.shape_of(str(tmp_path))
    assert s.parameters == 1_777_088_000 and s.kv_token() == 28 * 2 * 2 * 128 * 2
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


SIZES = {  # config.json of DeepSeek-R1-Distill-Qwen: width, MLP, heads, heads of keys, words
    "1.5B": (1536, 8960, 12, 2, 151936),
    "7B": (3584, 18944, 28, 4, 152064),
}


def save_config(size, path):
    width, mlp, heads, kv_heads, words = SIZES[size]
    shape = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=28, vocab_size=words)
    shape |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False)
    Qwen2Config(**shape).save_pretrained(path)


@pytest.mark.parametrize(
    ("size", "gb", "gpu_memory"),
    [("1.5B", 24, 0.55), ("7B", 80, 0.65)],
)
def test_adapters_fit_where_all_weights_do_not(tmp_path, capsys, size, gb, gpu_memory):
    """As docs/gpu.md has it: at full length, with GBs to spare for what is not counted."""
    save_config(size, tmp_path)
    plan_of = ["--model", str(tmp_path), "--plan", "--gpu_gb", str(gb), "--engine_sleep", "true"]
    train.train(*train.parse_config(plan_of))
    assert "does not fit" in capsys.readouterr().out.split("flags to fit")[0]
    flags = ["--lora_rank", "16", "--gpu_memory", str(gpu_memory)]
    run, method = train.parse_config([*plan_of, *flags])
    assert method.max_prompt_tokens + method.max_response_tokens == 9216
    train.train(run, method)
    printed = capsys.readouterr().out
    assert float(re.search(r"fits: (\S+) GB are left", printed)[1]) > 3
    s, (width, mlp, _, kv_heads, _) = memory_plan.shape_of(str(tmp_path)), SIZES[size]
    assert s.adapters == 28 * (4 * width + 2 * (width + kv_heads * 128) + 3 * (width + mlp))  # by hand
    weights = 2 * s.parameters + 4 * 16 * s.adapters
    assert re.search(rf"weights +{weights / 1e9:.1f} ", printed) and "reference" not in printed


def test_the_table_of_cards(tmp_path, capsys):
    """A line per card; the flags that it prints fit, and those of the next larger cache do not."""
    save_config("1.5B", tmp_path)
    plan_of = ["--model", str(tmp_path), "--plan", "--gpu_gb"]
    train.train(*train.parse_config([*plan_of, "80"]))
    lines = capsys.readouterr().out.split("flags to fit other cards:\n")[1].strip().split("\n")
    assert [int(line.split()[0]) for line in lines] == [16, 24, 40, 48, 80, 141]
    for line in lines:
        gb, flags = line.split()[0], line.split("GB: ")[1].split(" (")[0].split()
        train.train(*train.parse_config([*plan_of, gb, *flags]))
        left = float(re.search(r"fits: (\S+) GB are left", capsys.readouterr().out)[1])
        assert left >= memory_plan.SPARE and f"({left:.1f} GB left" in line
        assert ("--lora_rank 16" in line) == (int(gb) <= 40) and ("--engine_sleep true" in line) == (
            int(gb) <= 48
        )
    train.train(*train.parse_config([*plan_of, "80", "--max_response_tokens", "90000"]))
    assert " 16 GB: does not fit" in capsys.readouterr().out


def test_a_plan_without_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(InputError, match="no plan without the config.json"):
        train.train(*train.parse_config(["--model", str(tmp_path), "--plan"]))
