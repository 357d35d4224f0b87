"""The GPU memory of a run, part by part, from the configuration alone: what `python train.py --plan` prints.

    python train.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --plan --gpu_gb 80

Nothing is loaded but config.json; parameters are counted on torch's meta device. Every function returns bytes (1 GB = 1e9) by a formula
that tests/test_memory.py holds against measured allocations. The activations are those of a decoder layer with two RMSNorms and a gated
MLP (Llama, Qwen2, Mistral, ...); in other families they are an estimate.

A part that is not there: allocator fragmentation, the CUDA context and NCCL, together a few GB, so leave a card some room.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

FP32, BF16 = 4, 2  # bytes a number
TORCH_BATCH_TOKENS = 32768  # TorchEngine's batch_tokens
DEFAULT_GB = 80  # H100 or A100, where no card is there to ask


@dataclass
class Shape:
    """Sizes of a model."""

    parameters: int
    linear: int  # of them in linear layers, which autocast copies; the output layer included
    layer: int  # of those, in one decoder layer
    layers: int
    width: int  # D
    mlp: int  # M
    heads: int  # H
    kv_heads: int
    head_dim: int
    vocabulary: int


def shape_of(model: str) -> Shape:
    """From a directory or hub name with a config.json. Raises ValueError in one sentence."""
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ValueError(f"no plan without the config.json of a causal language model in {model!r} ({type(error).__name__})") from None
    text = config.get_text_config()
    count = lambda module: sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))  # noqa: E731
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    linear, head = count(net), net.get_output_embeddings().weight.numel()
    return Shape(
        parameters=sum(p.numel() for p in net.parameters()), linear=linear, layer=(linear - head) // layers, layers=layers,
        width=text.hidden_size, mlp=text.intermediate_size, heads=heads, kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads, vocabulary=text.vocab_size,
    )  # fmt: skip


# --- Parts ------------------------------------------------------------------------------------------------------------


def weights(s: Shape) -> int:
    """fp32 master weights: at lr 1e-6 an update is below the resolution of bf16 (8 bits), which would lose it."""
    return FP32 * s.parameters


def gradients(s: Shape) -> int:
    """fp32, one a parameter; dropped after each optimiser step."""
    return FP32 * s.parameters


def moments(s: Shape) -> int:
    """AdamW's running mean and square of the gradient, fp32."""
    return 2 * FP32 * s.parameters


def reference(s: Shape, autocast: bool) -> int:
    """Frozen, so kept in the dtype it computes in."""
    return (BF16 if autocast else FP32) * s.parameters


def casts(linear: int, autocast: bool) -> int:
    """Autocast copies the weight of a linear layer to bf16 at its first use in a forward pass and keeps it until the pass is over."""
    return BF16 * linear if autocast else 0


def layer_inputs(s: Shape, tokens: int) -> int:
    """What checkpointing keeps of every layer: its input, fp32 (autocast leaves the residual stream so)."""
    return s.layers * FP32 * s.width * tokens


def last_hidden(s: Shape, tokens: int) -> int:
    """After the last layer, fp32: the last norm's input, x / rms(x) and output, and the hidden states of the response tokens picked."""
    return 4 * FP32 * s.width * tokens


def layer_activations(s: Shape, tokens: int, autocast: bool) -> int:
    """What backward needs of one layer, without checkpointing of every layer.

    fp32 whatever the autocast: the input x of each of two norms and x / rms(x), 4 D; log-sum-exp of the attention, H; 1 / rms, 2.
    In the dtype of matrix products: queries and the attention's output, 2 H d; keys and values, 2 H_kv d; the MLP's gate, its
    activation, the other branch and their product, 4 M; the weighted norms, 2 D, which autocast casts for each of its 5 users.
    """
    bytes_each, norm_outputs = (BF16, 5) if autocast else (FP32, 2)
    product = norm_outputs * s.width + 2 * (s.heads + s.kv_heads) * s.head_dim + 4 * s.mlp
    return (FP32 * (4 * s.width + s.heads + 2) + bytes_each * product) * tokens


def layer_forward(s: Shape, tokens: int, autocast: bool) -> int:
    """One layer at its widest, the MLP, with nothing kept for backward: gate, activation and the other branch; fp32 the embeddings, the
    layer's input, the MLP's residual, and its norm."""
    return (3 * (BF16 if autocast else FP32) * s.mlp + 4 * FP32 * s.width) * tokens


def layer_backward(s: Shape, tokens: int, autocast: bool) -> int:
    """Gradients in flight in one layer: of two more of the MLP's inner values than were freed; fp32, of the residual stream and the
    branch beside it."""
    return (2 * (BF16 if autocast else FP32) * s.mlp + 2 * FP32 * s.width) * tokens


def logits(s: Shape, chunk: int) -> int:
    """Forward: three fp32 tensors of chunk x V at once, for the entropy: log-probabilities, probabilities, and their product."""
    return 3 * FP32 * chunk * s.vocabulary


def logits_backward(s: Shape, chunk: int, autocast: bool) -> int:
    """Backward: log-probabilities and two gradients beside the output layer's gradient so far; then that, the chunk's and their sum.

    Under autocast these weight gradients are bf16, and a bf16 copy of the weight stands beside the logits.
    """
    c, w = FP32 * chunk * s.vocabulary, (BF16 if autocast else FP32) * s.vocabulary * s.width
    return max(3 * c + 2 * w, c // 2 + 3 * w) if autocast else max(3 * c + w, 3 * w)


def fci(s: Shape, tokens: int) -> int:
    """Of one layer: attention to up to d steps of the heads that share a key, twice (from the kernel and in fp32), and masks of later steps."""
    return FP32 * (2 * s.heads // s.kv_heads + 2) * s.head_dim * tokens


def kv_token(s: Shape, bytes_each: int = BF16) -> int:
    """Keys and values of one token in all layers."""
    return 2 * s.layers * s.kv_heads * s.head_dim * bytes_each


# --- The plan ---------------------------------------------------------------------------------------------------------

PHASES = ["sample, score", "forward", "backward: logits", "backward: layers"]  # each row says where it is alive


def plan(s: Shape, run, method, card: float) -> dict[str, list[int]]:
    """Bytes of every part in each of PHASES. run, method: RunConfig and MethodConfig; card: bytes of GPU memory.

    In a column all rows count as alive at once. Of sampling and scoring, which take turns, the one or the other is then counted too high,
    by less than a row of it.
    """
    longest = method.max_prompt_tokens + method.max_response_tokens
    tokens, autocast = max(method.microbatch_tokens, longest), run.autocast != "none"
    all_, update = [1, 1, 1, 1], [0, 1, 1, 1]
    checkpointing = run.gradient_checkpointing
    kept = layer_inputs(s, tokens) if checkpointing else s.layers * layer_activations(s, tokens, autocast)
    whole, layer = casts(s.linear, autocast), casts(s.layer, autocast)
    rows = {
        "weights": (weights(s), all_),
        "AdamW's moments": (moments(s), all_),
        "reference": (reference(s, autocast) if method.kl_coef else 0, all_),
        "gradients": (gradients(s), update),
        "autocast's copies of weights": (1, [whole, whole, layer, layer] if checkpointing else [whole] * 4),
        f"{'inputs' if checkpointing else 'activations'} of {s.layers} layers": (kept, update),
        "last norm, hidden states": (last_hidden(s, tokens), [0, 1, 1, 0]),
        "one layer": (1, [layer_forward(s, tokens, autocast), 0, 0,
                          checkpointing * layer_activations(s, tokens, autocast) + layer_backward(s, tokens, autocast)]),
        "logits of a chunk": (1, [logits(s, method.logit_chunk)] * 2 + [logits_backward(s, method.logit_chunk, autocast), 0]),
        "FCI": (fci(s, tokens), [1, 0, 0, 0]),
    }  # fmt: skip
    if run.engine == "torch":
        rows["engine: cache"] = kv_token(s, FP32) * max(TORCH_BATCH_TOKENS, longest), [1, 0, 0, 0]
    else:
        rows["engine: weights, bf16"] = BF16 * s.parameters, [1, 0, 0, 0] if run.engine_sleep else all_
        rows["engine: cache"] = max(0, int(run.gpu_memory * card) - BF16 * s.parameters), [1, 0, 0, 0] if run.engine_sleep else all_
    return {name: [size * phase for phase in phases] for name, (size, phases) in rows.items()}


def report(run, method) -> str:
    """The plan as text. Raises ValueError in one sentence if there is no config.json."""
    s = shape_of(run.model)
    there = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else DEFAULT_GB
    card = 1e9 * (run.gpu_gb or there)
    rows = plan(s, run, method, card)
    totals = [sum(column) for column in zip(*rows.values())]
    line = lambda name, values: f"{name:30s}" + "".join(f"{v / 1e9:18.1f}" if v else f"{'-':>18s}" for v in values)  # noqa: E731
    lines = [f"{run.model.rstrip('/').split('/')[-1]}: {s.parameters / 1e9:.2f} B parameters; GB of a card of {card / 1e9:.0f}"]
    lines += [f"{'':30s}" + "".join(f"{phase:>18s}" for phase in PHASES)]
    lines += [*(line(name, values) for name, values in rows.items() if any(values)), line("sum", totals)]

    longest = method.max_prompt_tokens + method.max_response_tokens
    if run.engine != "torch":
        room = max(rows["engine: cache"]) // kv_token(s)
        lines.append(
            f"cache: {kv_token(s):,} bytes a token, so {room:,} tokens, or {room // longest} responses of {longest:,} tokens, prompts "
            "included, at once; less what vLLM takes for its own activations"
        )
    worst = totals.index(max(totals))
    if totals[worst] <= card:
        return "\n".join([*lines, f"fits: {(card - totals[worst]) / 1e9:.1f} GB are left at the peak ({PHASES[worst]})"])
    lines.append(f"does not fit: {(totals[worst] - card) / 1e9:.1f} GB too much at the peak ({PHASES[worst]})")
    state = [sum(values) for values in zip(*(rows[name] for name in ("weights", "AdamW's moments", "gradients")))]
    rest = max(total - sharded for total, sharded in zip(totals, state))
    if rest < card:
        cards = max(-(-sharded // int(card - total + sharded)) for total, sharded in zip(totals, state))
        lines.append(f"sharding weights, moments and gradients over {cards} cards (FSDP) would make room, but for the layer it gathers")
    return "\n".join(lines)
