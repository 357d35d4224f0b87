"""The GPU memory of a run, from the model's config.json alone: what `python train.py --plan` prints.

What has a fixed size is counted: weights, moments, gradients, the engine's cache. What a pass over the model
needs beyond that is measured: it runs, at full size, on tensors that have shapes and no memory (torch's
FakeTensorMode), and the bytes of those alive at once are added up. They are on the CPU, whose kernels and
autocast make the tensors that CUDA's make where attention is fused, as it is in bf16. Not counted: what
kernels allocate inside, fragmentation, the CUDA context and NCCL, together a few GB. 1 GB = 1e9 bytes."""

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from fci import StepHook, attention
from plumbing.models import head_dim, loading
from plumbing.projection import response_logps
from plumbing.settings import InputError, one_sentence

FP32, BF16 = 4, 2  # bytes per number
TORCH_BATCH_TOKENS = 32768  # TorchEngine's batch_tokens
STEP_TOKENS = 64  # of a step, when scoring is measured
FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # such as the hook's step ids
# fci.py's attention, with a mask for a sliding window only. transformers leaves a causal one out when it has
# seen that nothing is padded; tensors without values cannot show that.
ATTENTION = "sdpa_of_fake_tensors"
AttentionInterface.register(ATTENTION, attention)
is_window = lambda how: (how.get("local_size") or math.inf) < how["kv_length"]
AttentionMaskInterface.register(ATTENTION, lambda **how: sdpa_mask(**how) if is_window(how) else None)


class LiveBytes(TorchDispatchMode):
    """While active: `peak`, the largest sum of bytes alive at once, of tensors made since it was entered.

    `largest` is the most elements of one of them. Counts storages, each once; views and in-place results make
    none. What a kernel allocates inside is not seen."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = WeakIdKeyDictionary(), 0, 0  # alive: bytes of storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage] = storage.nbytes()
                self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@dataclass
class Shape:
    """What counts of a model: its parameters, and bytes of one token's keys and values in bf16."""

    parameters: int
    kv_token: int

    def vllm_cache(self, memory: float) -> int:
        """vLLM's memory less its bf16 weights; its activations and CUDA graphs are not subtracted."""
        return max(0, int(memory) - BF16 * self.parameters)

    def at_once(self, cache: int, longest: int) -> int:
        """Responses that vLLM samples at once: twice what its cache holds at full length, since those under
        way have half of that on average, at most its default of 1,024. With more, the cache would run full,
        and vLLM would drop some and read them again."""
        return min(1024, max(1, 2 * cache // (self.kv_token * longest)))


def fake_model(name: str):
    """The model of a directory or hub name, its weights fp32 and without memory. Raises InputError."""
    with one_sentence(), loading("the config.json of a causal language model", name), FAKE:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)


def shape_of(name: str) -> Shape:
    """From a directory or hub name with a config.json. Raises InputError."""
    model = fake_model(name)
    text = model.config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(model.num_parameters(), 2 * BF16 * text.num_hidden_layers * kv_heads * head_dim(text))


def measure(run, n_tokens: int) -> list[int]:
    """Bytes at the peaks of scoring, a forward pass, and its backward pass, beyond weights and gradients.

    run: RunConfig. n_tokens: of a pass. Raises InputError for a model that needs values on the way, as some
    mixtures of experts do, or that FCI cannot look into."""
    model, hook = fake_model(run.model), StepHook(torch.arange(n_tokens)[None] // STEP_TOKENS)
    try:
        return peaks_of_passes(model, hook, run, n_tokens)
    except Exception as error:  # torch's, transformers' and fci.py's kinds
        reason = " ".join(str(error).split())[:150]
        what = f"no plan for {run.model!r}: a pass on tensors without values failed"
        raise InputError(f"{what} ({type(error).__name__}: {reason})") from error


def peaks_of_passes(model, hook: StepHook, run, n_tokens: int) -> list[int]:
    """`measure` of a fake model. The hook was made outside FAKE: it reads a value."""
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if hasattr(module, "rope_type"):
            module.rope_type = "default"  # others read positions, and make tensors of the same sizes
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FAKE:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=run.autocast != "none")
        ids, places = torch.zeros(1, n_tokens, dtype=torch.long), torch.arange(1, n_tokens)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with LiveBytes() as scoring, torch.no_grad(), autocast:
            response_logps(model.eval(), ids, places, 1.0, run.logit_chunk, hook, with_entropy=True)
            hook.fci()
        with LiveBytes() as update:
            with autocast:
                logps, _ = response_logps(model.train(), ids, places, 1.0, run.logit_chunk)
            forward, update.peak = update.peak, 0
            logps.sum().backward()
    return [scoring.peak, forward, update.peak]


PHASES = ["sample, score", "forward", "backward"]  # columns of the plan


def plan(s: Shape, passes: list[int], run, method, card: float) -> dict[str, list[int]]:
    """Bytes of every part in each of PHASES. passes: what `measure` returns. run, method: RunConfig,
    MethodConfig. card: bytes of GPU memory.

    In a column all rows count as alive at once; the plain engine's cache is gone before scoring, though."""
    longest, master = method.max_prompt_tokens + method.max_response_tokens, FP32 * s.parameters
    reference = (FP32 if run.autocast == "none" else BF16) * s.parameters if method.kl_coef else 0
    always = lambda size: [size] * 3
    rows = {
        "weights, fp32": always(master),  # at lr 1e-6 an update is below the resolution of bf16
        "AdamW's moments, fp32": always(2 * master),  # running mean and square of the gradient
        "reference": always(reference),  # frozen, so kept in the dtype it computes in
        "gradients, fp32": [0, master, master],  # dropped after each optimiser step
        "pass over the model": passes,
    }
    if run.engine == "torch":
        rows["engine: cache"] = [FP32 // BF16 * s.kv_token * max(TORCH_BATCH_TOKENS, longest), 0, 0]
    else:
        alive = (lambda size: [size, 0, 0]) if run.engine_sleep else always
        n = run.tensor_parallel
        rows["engine: weights, bf16"] = alive(BF16 * s.parameters // n)
        rows["engine: cache"] = alive(s.vllm_cache(run.gpu_memory * card * n) // n)
    return rows


def report(run, method) -> str:
    """The plan as text. Raises InputError if there is no config.json."""
    s, card = shape_of(run.model), 1e9 * (run.gpu_gb or 80)  # where no card is there to ask
    if torch.cuda.is_available() and not run.gpu_gb:
        card = torch.cuda.get_device_properties(0).total_memory
    longest = method.max_prompt_tokens + method.max_response_tokens
    n_tokens = max(run.microbatch_tokens, longest)
    rows = plan(s, measure(run, n_tokens), run, method, card)
    totals = [sum(column) for column in zip(*rows.values())]
    name = run.model.rstrip("/").split("/")[-1]
    about = f"{name}: {s.parameters / 1e9:.2f} B parameters, {n_tokens:,} tokens per pass"
    lines = [f"{about}; GB of a card of {card / 1e9:.0f}"]
    lines += [f"{'':30s}" + "".join(f"{phase:>18s}" for phase in PHASES)]
    for name, sizes in [*rows.items(), ("sum", totals)]:
        if any(sizes):
            cells = [f"{size / 1e9:.1f}" if size else "-" for size in sizes]
            lines.append(f"{name:30s}" + "".join(f"{cell:>18s}" for cell in cells))
    if run.engine != "torch":
        cache = max(rows["engine: cache"]) * run.tensor_parallel
        room, limit = cache // s.kv_token, s.at_once(cache, longest)
        held = f"{room // longest} responses of {longest:,} tokens; {limit} are sampled at once"
        lines.append(f"cache: {s.kv_token:,} bytes per token, so {room:,} tokens, or {held}")
    worst = totals.index(max(totals))
    left, peak = (card - totals[worst]) / 1e9, PHASES[worst]
    if left >= 0 and run.engine != "torch" and room < longest:
        return "\n".join([*lines, "does not fit: vLLM's cache holds no response, raise --gpu_memory"])
    if left >= 0:
        return "\n".join([*lines, f"fits: {left:.1f} GB are left at the peak ({peak})"])
    lines.append(f"does not fit: {-left:.1f} GB too much at the peak ({peak})")
    parts = ("weights, fp32", "AdamW's moments, fp32", "reference", "gradients, fp32")
    sharded = [sum(sizes) for sizes in zip(*map(rows.get, parts))]
    rest = [total - part for total, part in zip(totals, sharded)]
    if max(rest) < card:
        cards = max(-(-part // int(card - other)) for part, other in zip(sharded, rest))
        room = f"over {cards} cards (FSDP), and more for the layers that it gathers, would make room"
        lines.append(f"sharding weights, moments, reference and gradients {room}")
    return "\n".join(lines)
