"""The GPU memory of a run, part by part, from the configuration alone: what `python train.py --plan` prints.

Sizes are bytes (1 GB = 1e9), by formulas that tests/test_memory_plan.py holds against measured allocations.
They are those of a decoder layer with two RMSNorms and a gated MLP (Llama, Qwen2, Mistral, ...), elsewhere an
estimate. Not counted: allocator fragmentation, the CUDA context and NCCL, together a few GB."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plumbing.settings import InputError

FP32, BF16 = 4, 2  # bytes per number
TORCH_BATCH_TOKENS = 32768  # TorchEngine's batch_tokens
CARDS, SPARE = (16, 24, 40, 48, 80, 141), 2  # GB: common ones; what is left on them for the uncounted
WAYS = [{}, dict(engine_sleep=True), dict(engine_sleep=True, lora_rank=16, lr=1e-5)]  # to fit, in this order


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
    adapters: int  # parameters of adapters of rank 1

    def fci(self, tokens: int) -> int:
        """One layer: attention of heads that share a key to d steps, twice (kernel's, fp32), and masks."""
        return FP32 * (2 * self.heads // self.kv_heads + 2) * self.head_dim * tokens

    def kv_token(self, bytes_each: int = BF16) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_each

    def vllm_cache(self, memory: float) -> int:
        """What its weights leave for its cache of the memory that vLLM may use."""
        return max(0, int(memory) - BF16 * self.parameters)

    def at_once(self, cache: int, longest: int) -> int:
        """Responses that vLLM samples at once: twice what its cache holds at full length, since one under way
        has half of that on average. It would drop some of more, and read them again. Its limit is 1,024."""
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
    linear = [m for m in net.modules() if isinstance(m, nn.Linear) and m is not head]
    in_layers = sum(m.weight.numel() for m in linear)
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    counts = dict(parameters=net.num_parameters(), linear=in_layers + head.weight.numel(), layers=layers)
    counts |= dict(adapters=sum(m.in_features + m.out_features for m in linear), layer=in_layers // layers)
    sizes = dict(width=text.hidden_size, mlp=text.intermediate_size, vocabulary=text.vocab_size)
    return Shape(**counts, **sizes, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


PHASES = ["sample, score", "forward", "backward: logits", "backward: layers"]  # columns of the plan


def plan(s: Shape, run, method, card: float) -> dict[str, list[int]]:
    """Bytes of every part in each of PHASES. run, method: RunConfig and MethodConfig; card: its bytes.

    In a column all rows count as alive at once. Sampling and scoring take turns, so the first column is too
    high, by at most one row. The residual stream is of the embeddings' dtype: fp32 where they are trained."""
    longest, adapters = method.max_prompt_tokens + method.max_response_tokens, run.lora_rank > 0
    tokens, autocast = max(run.microbatch_tokens, longest), run.autocast != "none"
    each = BF16 if autocast else FP32  # bytes of a number in matrix products
    D, M, stream = s.width, s.mlp, each if adapters else FP32
    trained = s.adapters * run.lora_rank or s.parameters
    copied = (trained, trained // s.layers) if adapters else (s.linear, s.layer)
    whole, layer = (BF16 * n if autocast else 0 for n in copied)
    # For backward of a layer. Queries, the attention's output, 2 H d; keys, values, 2 H_kv d; the MLP's gate,
    # activation, other branch and their product, 4 M; weighted norms, 2 D, cast from fp32 for each of 5 users
    # where they are trained; what A makes of 7 inputs. In fp32: what two norms keep, 1 / rms, log-sum-exp, H.
    products = 2 * (s.heads + s.kv_heads) * s.head_dim + 4 * M + 7 * run.lora_rank
    products += (5 if autocast and not adapters else 2) * D
    norm = FP32 if adapters else 2 * FP32  # its input x and, where it is trained, x / rms(x)
    activations = (2 * norm * D + FP32 * (s.heads + 2) + each * products) * tokens
    # The MLP's gate, activation and branch, and one more beside adapters; four times the stream.
    forward = ((4 if adapters else 3) * each * M + 4 * stream * D) * tokens
    # Gradients of two inner values of the MLP; of the stream and, where it is fp32, of the branch.
    backward = (2 * each * M + (1 if adapters else 2) * stream * D) * tokens
    if run.gradient_checkpointing:
        kept, kept_name, backward = s.layers * stream * D * tokens, "inputs", backward + activations
    else:
        kept, kept_name, layer = s.layers * activations, "activations", whole
    last = (norm + 2 * stream) * D * tokens  # the norm's, its output, and that of response tokens
    logits, head = FP32 * run.logit_chunk * s.vocabulary, each * s.vocabulary * D
    # Log-probs, probabilities, their product; in backward log-probs and two gradients, beside the output
    # layer's gradient and, under autocast, copy; then that gradient, the chunk's and their sum.
    logits_backward = max(3 * logits + head * (2 if autocast else 1), 3 * head + logits // 2 * autocast)
    always = lambda size: [size] * 4
    in_update = lambda size: [0, size, size, size]
    rows = {
        # Trained ones are fp32: at lr 1e-6 an update is below the resolution of bf16, which would lose it.
        "weights": always(FP32 * trained + (each * s.parameters if adapters else 0)),
        "AdamW's moments": always(2 * FP32 * trained),  # running mean and square of the gradient
        "reference": always(each * s.parameters if method.kl_coef and not adapters else 0),
        "gradients": in_update(FP32 * trained),  # dropped after each optimiser step
        "autocast's copies of weights": [whole, whole, layer, layer],  # made at first use, kept for the pass
        f"{kept_name} of {s.layers} layers": in_update(kept),
        "last norm, hidden states": [0, last, last, 0],
        "one layer": [forward, 0, 0, backward],
        "logits of a chunk": [3 * logits, 3 * logits, 3 * logits if adapters else logits_backward, 0],
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


def card_line(s: Shape, run, method, gb: int) -> str:
    """Which flags make a run fit a card: the first of WAYS that does, with the largest cache."""
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
    s, card = shape_of(run.model), 1e9 * (run.gpu_gb or 80)  # H100 or A100, where no card is there to ask
    if torch.cuda.is_available() and not run.gpu_gb:
        card = torch.cuda.get_device_properties(0).total_memory
    rows = plan(s, run, method, card)
    totals = [sum(column) for column in zip(*rows.values())]
    lines = [
        f"{Path(run.model).name}: {s.parameters / 1e9:.2f} B parameters; GB of a card of {card / 1e9:.0f}"
    ]
    lines += [f"{'':30s}" + "".join(f"{phase:>18s}" for phase in PHASES)]
    for name, sizes in [*rows.items(), ("sum", totals)]:
        if any(sizes):
            cells = [f"{size / 1e9:.1f}" if size else "-" for size in sizes]
            lines.append(f"{name:30s}" + "".join(f"{cell:>18s}" for cell in cells))
    left, peak = (card - max(totals)) / 1e9, PHASES[totals.index(max(totals))]
    verdict = f"fits: {left:.1f} GB are left" if left >= 0 else f"does not fit: {-left:.1f} GB too much"
    verdict, table = f"{verdict} at the peak ({peak})", []
    if run.engine != "torch":
        longest = method.max_prompt_tokens + method.max_response_tokens
        cache = max(rows["engine: cache"]) * run.tensor_parallel
        room, limit = cache // s.kv_token(), s.at_once(cache, longest)
        held = f"{room // longest} responses of {longest:,} tokens; {limit} are sampled at once"
        lines.append(f"cache: {s.kv_token():,} bytes per token, so {room:,} tokens, or {held}")
        if room < longest:
            verdict = "does not fit: vLLM's cache holds no response, raise --gpu_memory"
        table = ["flags to fit other cards:", *(card_line(s, run, method, gb) for gb in CARDS)]
    return "\n".join([*lines, verdict, *table])
