"""The GPU memory of a run, part by part, from the configuration alone: what `python train.py --plan` prints.

Nothing is loaded but config.json; parameters are counted on torch's meta device. Every function returns bytes
(1 GB = 1e9) by a formula that tests/test_memory_plan.py holds against measured allocations. The activations
are those of a decoder layer with two RMSNorms and a gated MLP (Llama, Qwen2, Mistral, ...); in other families
they are an estimate. Not counted: allocator fragmentation, the CUDA context and NCCL, together a few GB."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plumbing.models import loading
from plumbing.settings import one_sentence

FP32, BF16 = 4, 2  # bytes per number
TORCH_BATCH_TOKENS = 32768  # TorchEngine's batch_tokens


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

    def weights(self) -> int:
        """fp32 master weights: at lr 1e-6 an update is below the resolution of bf16, which would lose it."""
        return FP32 * self.parameters

    def moments(self) -> int:
        """AdamW's running mean and square of the gradient, fp32."""
        return 2 * FP32 * self.parameters

    def reference(self, autocast: bool) -> int:
        """Frozen, so kept in the dtype it computes in."""
        return (BF16 if autocast else FP32) * self.parameters

    def layer_inputs(self, tokens: int) -> int:
        """What checkpointing keeps of every layer: its input, fp32 as autocast leaves the residual stream."""
        return self.layers * FP32 * self.width * tokens

    def last_hidden(self, tokens: int) -> int:
        """After the last layer, fp32: its norm's input, x / rms(x), output, and response tokens' states."""
        return 4 * FP32 * self.width * tokens

    def layer_activations(self, tokens: int, autocast: bool) -> int:
        """What backward needs of one layer, without checkpointing of every layer.

        fp32 whatever the autocast: the input x of each of two norms and x / rms(x), 4 D; log-sum-exp of the
        attention, H; 1 / rms, 2. In the dtype of matrix products: queries and the attention's output, 2 H d;
        keys and values, 2 H_kv d; the MLP's gate, activation, other branch and their product, 4 M; weighted
        norms, 2 D, which autocast casts for each of its 5 users."""
        bytes_each, norm_outputs = (BF16, 5) if autocast else (FP32, 2)
        product = norm_outputs * self.width + 2 * (self.heads + self.kv_heads) * self.head_dim + 4 * self.mlp
        return (FP32 * (4 * self.width + self.heads + 2) + bytes_each * product) * tokens

    def layer_forward(self, tokens: int, autocast: bool) -> int:
        """One layer without backward: the MLP's gate, activation and branch; fp32, four times the stream."""
        return (3 * (BF16 if autocast else FP32) * self.mlp + 4 * FP32 * self.width) * tokens

    def layer_backward(self, tokens: int, autocast: bool) -> int:
        """Gradients in flight in a layer: of two inner values of the MLP; fp32, of the stream and branch."""
        return (2 * (BF16 if autocast else FP32) * self.mlp + 2 * FP32 * self.width) * tokens

    def logits(self, chunk: int) -> int:
        """Forward: log-probs, probabilities and their product, fp32, chunk x V each, for the entropy."""
        return 3 * FP32 * chunk * self.vocabulary

    def logits_backward(self, chunk: int, autocast: bool) -> int:
        """Backward: log-probs and two gradients beside the output layer's; then it, the chunk's and the sum.

        Under autocast these weight gradients are bf16, and a bf16 copy of the weight is beside the logits."""
        c, w = FP32 * chunk * self.vocabulary, (BF16 if autocast else FP32) * self.vocabulary * self.width
        return max(3 * c + 2 * w, c // 2 + 3 * w) if autocast else max(3 * c + w, 3 * w)

    def fci(self, tokens: int) -> int:
        """One layer: attention of heads that share a key to d steps, twice (kernel's, fp32), and masks."""
        return FP32 * (2 * self.heads // self.kv_heads + 2) * self.head_dim * tokens

    def kv_token(self, bytes_each: int = BF16) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_each

    def vllm_cache(self, memory: float) -> int:
        """vLLM's memory less its bf16 weights; its activations and CUDA graphs are not subtracted."""
        return max(0, int(memory) - BF16 * self.parameters)

    def at_once(self, cache: int, longest: int) -> int:
        """Responses that vLLM samples at once: twice what its cache holds at full length, since those under
        way have half of it on average. Of more it would drop some and read them again. Its default: 1,024."""
        return min(1024, max(1, 2 * cache // (self.kv_token() * longest)))


def casts(linear: int, autocast: bool) -> int:
    """Autocast's bf16 copies of linear layers, made at their first use in a forward pass and kept for it."""
    return BF16 * linear if autocast else 0


def shape_of(model: str) -> Shape:
    """From a directory or hub name with a config.json. Raises InputError."""
    with one_sentence(), loading("the config.json of a causal language model", model):
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    linear = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear))
    heads, layers, head = text.num_attention_heads, text.num_hidden_layers, net.get_output_embeddings()
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    counts = dict(parameters=net.num_parameters(), linear=linear, vocabulary=text.vocab_size)
    counts |= dict(layer=(linear - head.weight.numel()) // layers, layers=layers, width=text.hidden_size)
    return Shape(**counts, mlp=text.intermediate_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


PHASES = ["sample, score", "forward", "backward: logits", "backward: layers"]  # columns of the plan


def plan(s: Shape, run, method, card: float) -> dict[str, list[int]]:
    """Bytes of every part in each of PHASES. run, method: RunConfig, MethodConfig; card: bytes of GPU memory.

    In a column all rows count as alive at once. Sampling and scoring take turns, so the first column is too
    high, by at most one row."""
    longest = method.max_prompt_tokens + method.max_response_tokens
    tokens, autocast, chunk = max(run.microbatch_tokens, longest), run.autocast != "none", run.logit_chunk
    whole, layer = casts(s.linear, autocast), casts(s.layer, autocast)
    activations = s.layer_activations(tokens, autocast)
    if run.gradient_checkpointing:
        kept, kept_name = s.layer_inputs(tokens), f"inputs of {s.layers} layers"
        copies, recomputed = [whole, whole, layer, layer], activations
    else:
        kept, kept_name = s.layers * activations, f"activations of {s.layers} layers"
        copies, recomputed = [whole] * 4, 0
    hidden, logits_forward = s.last_hidden(tokens), s.logits(chunk)
    backward = recomputed + s.layer_backward(tokens, autocast)
    always = lambda size: [size] * 4
    in_update = lambda size: [0, size, size, size]
    rows = {
        "weights": always(s.weights()),
        "AdamW's moments": always(s.moments()),
        "reference": always(s.reference(autocast) if method.kl_coef else 0),
        "gradients": in_update(s.weights()),  # fp32, too; dropped after each optimiser step
        "autocast's copies of weights": copies,
        kept_name: in_update(kept),
        "last norm, hidden states": [0, hidden, hidden, 0],
        "one layer": [s.layer_forward(tokens, autocast), 0, 0, backward],
        "logits of a chunk": [logits_forward, logits_forward, s.logits_backward(chunk, autocast), 0],
        "FCI": [s.fci(tokens), 0, 0, 0],
    }
    if run.engine == "torch":
        rows["engine: cache"] = [s.kv_token(FP32) * max(TORCH_BATCH_TOKENS, longest), 0, 0, 0]
    else:
        alive = (lambda size: [size, 0, 0, 0]) if run.engine_sleep else always
        n = run.tensor_parallel
        rows["engine: weights, bf16"] = alive(BF16 * s.parameters // n)
        rows["engine: cache"] = alive(s.vllm_cache(run.gpu_memory * card * n) // n)
    return rows


def report(run, method) -> str:
    """The plan as text. Raises InputError if there is no config.json."""
    s, card = shape_of(run.model), 1e9 * (run.gpu_gb or 80)  # where no card is there to ask
    if torch.cuda.is_available() and not run.gpu_gb:
        card = torch.cuda.get_device_properties(0).total_memory
    rows = plan(s, run, method, card)
    totals = [sum(column) for column in zip(*rows.values())]
    name = run.model.rstrip("/").split("/")[-1]
    lines = [f"{name}: {s.parameters / 1e9:.2f} B parameters; GB of a card of {card / 1e9:.0f}"]
    lines += [f"{'':30s}" + "".join(f"{phase:>18s}" for phase in PHASES)]
    for name, sizes in [*rows.items(), ("sum", totals)]:
        if any(sizes):
            cells = [f"{size / 1e9:.1f}" if size else "-" for size in sizes]
            lines.append(f"{name:30s}" + "".join(f"{cell:>18s}" for cell in cells))
    if run.engine != "torch":
        longest = method.max_prompt_tokens + method.max_response_tokens
        cache = max(rows["engine: cache"]) * run.tensor_parallel
        room, limit = cache // s.kv_token(), s.at_once(cache, longest)
        held = f"{room // longest} responses of {longest:,} tokens; {limit} are sampled at once"
        lines.append(f"cache: {s.kv_token():,} bytes per token, so {room:,} tokens, or {held}")
        if room < longest:
            return "\n".join([*lines, "does not fit: vLLM's cache holds no response, raise --gpu_memory"])
    worst = totals.index(max(totals))
    left, peak = (card - totals[worst]) / 1e9, PHASES[worst]
    if left >= 0:
        return "\n".join([*lines, f"fits: {left:.1f} GB are left at the peak ({peak})"])
    lines.append(f"does not fit: {-left:.1f} GB too much at the peak ({peak})")
    parts = ("weights", "AdamW's moments", "reference", "gradients")
    sharded = [sum(sizes) for sizes in zip(*map(rows.get, parts))]
    rest = [total - part for total, part in zip(totals, sharded)]
    if max(rest) < card:
        cards = max(-(-part // int(card - other)) for part, other in zip(sharded, rest))
        room = f"over {cards} cards (FSDP) would make room, but for the layer it gathers"
        lines.append(f"sharding weights, moments, reference and gradients {room}")
    return "\n".join(lines)
