"""The GPU memory of a run, part by part, from the configuration alone: what `python train.py --plan` prints.

Nothing is loaded but config.json; parameters are counted on torch's meta device. Every function returns bytes
(1 GB = 1e9) by a formula that tests/test_memory_plan.py holds against measured allocations. The activations
are those of a decoder layer with two RMSNorms and a gated MLP (Llama, Qwen2, Mistral, ...); in other families
they are an estimate. Not counted: allocator fragmentation, the CUDA context and NCCL, together a few GB."""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plumbing.settings import InputError

FP32, BF16 = 4, 2  # bytes per number
TORCH_BATCH_TOKENS = 32768  # TorchEngine's batch_tokens
CARDS, SPARE = (16, 24, 40, 48, 80, 141), 2  # GB: common cards; what is left of them for the uncounted
# Ways to fit a card, in this order; "LoRA Without Regret" has ten times the learning rate for adapters.
WAYS = [{}, dict(engine_sleep=True), dict(engine_sleep=True, lora_rank=16, lr=1e-5)]


@dataclass
class Shape:
    """Sizes of a model, and how it is trained."""

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
    adapters: int  # parameters of adapters of rank 1, in all layers
    rank: int = 0  # of adapters; 0: all weights are trained
    autocast: bool = False

    def __post_init__(self):
        self.each = BF16 if self.autocast else FP32  # bytes per number in matrix products
        self.stream = self.each if self.rank else FP32  # in the residual stream: as the embeddings' dtype

    def trained(self) -> int:
        """What is trained, fp32: at lr 1e-6 an update is below bf16's resolution, which would lose it."""
        return FP32 * (self.rank * self.adapters or self.parameters)

    def frozen(self) -> int:
        """A model that only computes, in that dtype: the reference, or what adapters are added to."""
        return self.each * self.parameters

    def casts(self, one_layer: bool) -> int:
        """Autocast's bf16 copies of what is fp32, made at first use in a forward pass and kept for it."""
        of_adapters = self.rank * self.adapters // (self.layers if one_layer else 1)
        of_weights = self.layer if one_layer else self.linear
        return self.autocast * BF16 * (of_adapters if self.rank else of_weights)

    def norm(self) -> int:
        """What a norm keeps per token, fp32: its input x, and x / rms(x) if its weight is trained."""
        return (1 if self.rank else 2) * FP32 * self.width

    def layer_inputs(self, tokens: int) -> int:
        """What checkpointing keeps of every layer: its input, the residual stream."""
        return self.layers * self.stream * self.width * tokens

    def last_hidden(self, tokens: int) -> int:
        """After the last layer: what its norm keeps, its output, and response tokens' states."""
        return (self.norm() + 2 * self.stream * self.width) * tokens

    def layer_activations(self, tokens: int) -> int:
        """What backward needs of one layer, without checkpointing of every layer.

        fp32 whatever the autocast: what two norms keep; log-sum-exp of the attention, H; 1 / rms, 2. In the
        dtype of matrix products: queries and the attention's output, 2 H d; keys and values, 2 H_kv d; the
        MLP's gate, activation, other branch and their product, 4 M; weighted norms, 2 D, which autocast casts
        for each of their 5 users if their weights are fp32; what the factors A make of 7 inputs."""
        norm_outputs = 5 if self.autocast and not self.rank else 2
        product = norm_outputs * self.width + 2 * (self.heads + self.kv_heads) * self.head_dim + 4 * self.mlp
        return (2 * self.norm() + FP32 * (self.heads + 2) + self.each * (product + 7 * self.rank)) * tokens

    def layer_forward(self, tokens: int) -> int:
        """One layer without backward: the MLP's gate, activation and branch, one more beside adapters; four
        times the stream."""
        return ((4 if self.rank else 3) * self.each * self.mlp + 4 * self.stream * self.width) * tokens

    def layer_backward(self, tokens: int) -> int:
        """Gradients in flight in a layer: of two inner values of the MLP; of the stream and, where they are
        fp32, the branch."""
        return (2 * self.each * self.mlp + (1 if self.rank else 2) * self.stream * self.width) * tokens

    def logits(self, chunk: int) -> int:
        """Forward: log-probs, probabilities and their product, fp32, chunk x V each, for the entropy."""
        return 3 * FP32 * chunk * self.vocabulary

    def logits_backward(self, chunk: int) -> int:
        """Backward: log-probs and two gradients beside the output layer's; then it, the chunk's and the sum.

        Under autocast these weight gradients are bf16, and a bf16 copy of the weight is beside the logits. A
        frozen output layer has neither."""
        c, w = FP32 * chunk * self.vocabulary, self.each * self.vocabulary * self.width
        if self.rank:
            return 3 * c
        return max(3 * c + 2 * w, c // 2 + 3 * w) if self.autocast else max(3 * c + w, 3 * w)

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


def shape_of(model: str) -> Shape:
    """From a directory or hub name with a config.json. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        needed = f"the config.json of a causal language model in {model!r}"
        raise InputError(f"no plan without {needed} ({type(error).__name__})") from None
    text, head = config.get_text_config(), net.get_output_embeddings()
    inner = [m.weight for m in net.modules() if isinstance(m, nn.Linear) and m is not head]
    in_layers, adapters = sum(w.numel() for w in inner), sum(sum(w.shape) for w in inner)
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    counts = dict(parameters=net.num_parameters(), linear=in_layers + head.weight.numel(), adapters=adapters)
    sizes = dict(layer=in_layers // layers, layers=layers, width=text.hidden_size, vocabulary=text.vocab_size)
    sizes |= dict(mlp=text.intermediate_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return Shape(**counts, **sizes)


PHASES = ["sample, score", "forward", "backward: logits", "backward: layers"]  # columns of the plan


def plan(s: Shape, run, method, card: float) -> dict[str, list[int]]:
    """Bytes of every part in each of PHASES. run, method: RunConfig, MethodConfig; card: bytes of GPU memory.

    In a column all rows count as alive at once. Sampling and scoring take turns, so the first column is too
    high, by at most one row."""
    s = replace(s, rank=run.lora_rank, autocast=run.autocast != "none")
    longest, chunk = method.max_prompt_tokens + method.max_response_tokens, run.logit_chunk
    tokens = max(run.microbatch_tokens, longest)
    activations = s.layer_activations(tokens)
    whole, layer = s.casts(one_layer=False), s.casts(one_layer=True)
    if run.gradient_checkpointing:
        kept, kept_name = s.layer_inputs(tokens), f"inputs of {s.layers} layers"
        copies, recomputed = [whole, whole, layer, layer], activations
    else:
        kept, kept_name = s.layers * activations, f"activations of {s.layers} layers"
        copies, recomputed = [whole] * 4, 0
    hidden, logits_forward = s.last_hidden(tokens), s.logits(chunk)
    backward = recomputed + s.layer_backward(tokens)
    always = lambda size: [size] * 4
    in_update = lambda size: [0, size, size, size]
    rows = {
        "weights": always(s.trained() + (s.frozen() if s.rank else 0)),
        "AdamW's moments": always(2 * s.trained()),  # running mean and square of the gradient
        "reference": always(s.frozen() if method.kl_coef and not s.rank else 0),
        "gradients": in_update(s.trained()),  # dropped after each optimiser step
        "autocast's copies of weights": copies,
        kept_name: in_update(kept),
        "last norm, hidden states": [0, hidden, hidden, 0],
        "one layer": [s.layer_forward(tokens), 0, 0, backward],
        "logits of a chunk": [logits_forward, logits_forward, s.logits_backward(chunk), 0],
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


def flags_to_fit(s: Shape, run, method, gb: int) -> str:
    """A line of text: the first of WAYS that fits a card, with the largest cache that leaves SPARE."""
    longest = method.max_prompt_tokens + method.max_response_tokens
    for way, share in product(WAYS, range(90, 0, -5)):
        tried = replace(run, **way, gpu_memory=share / 100)
        rows = plan(s, tried, method, 1e9 * gb)
        left = gb - max(map(sum, zip(*rows.values()))) / 1e9
        held = max(rows["engine: cache"]) * run.tensor_parallel // (s.kv_token() * longest)
        if left >= SPARE and held >= 8:
            changed = {name: value for name, value in vars(tried).items() if value != getattr(run, name)}
            flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changed.items())
            return f"{gb:4d} GB: {flags or 'as it is'} ({left:.1f} GB left, cache for {held} responses)"
    return f"{gb:4d} GB: does not fit"


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
    lines += verdict(s, run, method, rows, card)
    if run.engine != "torch":
        lines += ["flags to fit other cards:", *(flags_to_fit(s, run, method, gb) for gb in CARDS)]
    return "\n".join(lines)


def verdict(s: Shape, run, method, rows: dict[str, list[int]], card: float) -> list[str]:
    """Lines of text: how many responses vLLM's cache holds, whether the plan fits, or what would make it."""
    lines, totals = [], [sum(column) for column in zip(*rows.values())]
    if run.engine != "torch":
        longest = method.max_prompt_tokens + method.max_response_tokens
        cache = max(rows["engine: cache"]) * run.tensor_parallel
        room, limit = cache // s.kv_token(), s.at_once(cache, longest)
        held = f"{room // longest} responses of {longest:,} tokens; {limit} are sampled at once"
        lines.append(f"cache: {s.kv_token():,} bytes per token, so {room:,} tokens, or {held}")
        if room < longest:
            return [*lines, "does not fit: vLLM's cache holds no response, raise --gpu_memory"]
    worst = totals.index(max(totals))
    left, peak = (card - totals[worst]) / 1e9, PHASES[worst]
    if left >= 0:
        return [*lines, f"fits: {left:.1f} GB are left at the peak ({peak})"]
    lines.append(f"does not fit: {-left:.1f} GB too much at the peak ({peak})")
    parts = ("weights", "AdamW's moments", "reference", "gradients")
    sharded = [sum(sizes) for sizes in zip(*map(rows.get, parts))]
    rest = [total - part for total, part in zip(totals, sharded)]
    if max(rest) < card and not run.lora_rank:  # adapters are on every card, and so is what they are added to
        cards = max(-(-part // int(card - other)) for part, other in zip(sharded, rest))
        room = f"over {cards} cards (FSDP) would make room, but for the layer it gathers"
        lines.append(f"sharding weights, moments, reference and gradients {room}")
    return lines
