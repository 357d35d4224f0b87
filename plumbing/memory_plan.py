"""The GPU memory of a run, from the model's config.json alone: what `python train.py --plan` prints.

What has a fixed size is counted: weights, moments, gradients, the engine's cache. What a pass over the model
needs beyond that is measured: it runs, at full size, on tensors that have shapes and no memory (torch's
FakeTensorMode), and the bytes of those alive at once are added up. So no formula has to follow a family of
models or a change of the code. Not counted: what kernels allocate inside, fragmentation, the CUDA context
and NCCL, together a few GB. 1 GB = 1e9 bytes."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from fci import StepHook, attention
from plumbing.models import loading
from plumbing.projection import response_logps
from plumbing.settings import one_sentence

FP32, BF16 = 4, 2  # bytes per number
TORCH_BATCH_TOKENS = 32768  # TorchEngine's batch_tokens
STEP_TOKENS = 64  # of a step, when scoring is measured
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
WITHOUT_MASK = "causal_without_mask"  # fci.py's attention; for tensors without values an L x L mask is made
AttentionInterface.register(WITHOUT_MASK, attention)
AttentionMaskInterface.register(WITHOUT_MASK, lambda *args, **kwargs: None)


class LiveBytes(TorchDispatchMode):
    """While active: `peak`, the largest sum of bytes alive at once of tensors made since then.

    `largest` is the most elements of one of them. Counts storages, each once; views and in-place results make
    none. What a kernel allocates inside is not seen."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, tensor.numel())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
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
        way have half of it on average. Of more it would drop some and read them again. Its default: 1,024."""
        return min(1024, max(1, 2 * cache // (self.kv_token * longest)))


def fake_model(name: str):
    """The model of a directory or hub name, its weights fp32 and without memory. Raises InputError."""
    with one_sentence(), loading("the config.json of a causal language model", name), FAKE:
        how = dict(attn_implementation=WITHOUT_MASK, dtype=torch.float32)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), **how)


def shape_of(name: str) -> Shape:
    """From a directory or hub name with a config.json. Raises InputError."""
    model = fake_model(name)
    text = model.config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(model.num_parameters(), 2 * BF16 * text.num_hidden_layers * kv_heads * head_dim)


def measure(run, n_tokens: int, with_fci: bool = True) -> list[int]:
    """Bytes at the peaks of scoring, a forward pass, and its backward pass, beyond weights and gradients.

    run: RunConfig. n_tokens: of a pass. Raises InputError."""
    model, step_ids = fake_model(run.model), torch.arange(n_tokens)[None] // STEP_TOKENS
    hook = StepHook(step_ids) if with_fci else None  # reads a number off a tensor, which a fake one has not
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FAKE:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=run.autocast != "none")
        ids, places = torch.zeros(1, n_tokens, dtype=torch.long), torch.arange(1, n_tokens)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with LiveBytes() as scoring, torch.no_grad(), autocast:
            response_logps(model.eval(), ids, places, 1.0, run.logit_chunk, hook, with_entropy=True)
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

    In a column all rows count as alive at once. Sampling and scoring take turns, so the first is too high."""
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
        if room < longest:
            return "\n".join([*lines, "does not fit: vLLM's cache holds no response, raise --gpu_memory"])
    worst = totals.index(max(totals))
    left, peak = (card - totals[worst]) / 1e9, PHASES[worst]
    if left >= 0:
        return "\n".join([*lines, f"fits: {left:.1f} GB are left at the peak ({peak})"])
    lines.append(f"does not fit: {-left:.1f} GB too much at the peak ({peak})")
    parts = ("weights, fp32", "AdamW's moments, fp32", "reference", "gradients, fp32")
    sharded = [sum(sizes) for sizes in zip(*map(rows.get, parts))]
    rest = [total - part for total, part in zip(totals, sharded)]
    if max(rest) < card:
        cards = max(-(-part // int(card - other)) for part, other in zip(sharded, rest))
        room = f"over {cards} cards (FSDP) would make room, but for the layer it gathers"
        lines.append(f"sharding weights, moments, reference and gradients {room}")
    return "\n".join(lines)
