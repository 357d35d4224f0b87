"""What to sample, and with what: adaptive sampling (Eq. 8-10) and the engines.

Adaptive sampling decides with three numbers where the next tokens go:
- which problems are branched: those solved by every initial response only if their FCI is high (Eq. 8);
- how many of a problem's initial responses are branched: more where it fails more often (Eq. 9);
- how many problems the next batch holds, so that its sequences with non-zero advantage meet a target (Eq. 10).

Released code against the paper: it filters only problems that all initial responses solve (Eq. 8 read literally
filters every problem: `fci_filter="all"`); it rounds Eq. 9 up, the paper to nearest, as here.

Engines share `generate(requests) -> responses`, `load(model)`, `sleep()` and `close()`. Token ids go in and token ids come out;
nothing is ever tokenised twice. Log-probabilities are of the distribution that was sampled from, temperature included.

vLLM holds a copy of the weights and has kernels of its own, so sampler and trainer are never quite the same policy. How far apart they
are is measured on every sampled token (`mismatch`), a run stops when they are further apart than rounding explains (`check_gap`), and
before anything is trained it is shown that a push reaches every weight (`verify_sync`).
"""

import contextlib
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from fci import response_logps, token_logps  # importing fci registers the attention that load_model asks for

VLLM_VERSION = "0.32.0"  # the one that requirements-gpu.txt pins and the tests run; its weight reload is not a stable interface
PROMPT = "{problem} Let's think step by step and output the final answer within \\boxed{{}}."  # the paper's


# --- 1. Adaptive sampling -------------------------------------------------------------------------------------------


def expansion(rewards: list[float]) -> int:
    """How many of a problem's initial responses to branch (Eq. 9), between 0 and len(rewards).

    >>> [expansion(r) for r in ([0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1])]
    [6, 4, 2]
    """
    z = sum(rewards) / len(rewards)
    return round(math.exp(-z) * len(rewards))  # Eq. 9


def choose_responses(rewards: list[float], count: int, rng: np.random.Generator) -> list[int]:
    """Indices of the `count` initial responses to branch: the rarer outcome first, at random within an outcome."""
    correct = [r > 0.5 for r in rewards]
    rarer = 2 * sum(correct) <= len(correct)  # True: correct ones are the rarer
    order = sorted(rng.permutation(len(rewards)).tolist(), key=lambda i: correct[i] != rarer)
    return sorted(order[:count])


@dataclass
class AdaptiveSampler:
    """The running state of Eq. 8 and Eq. 10; `vars()` of it is what a checkpoint stores."""

    batch_size: int  # B_m, prompts
    fci_total: float = 0.0  # over the problems whose FCI was compared so far
    fci_count: int = 0

    def keep(self, problem_fci: float, rewards: list[float], fci_filter: str) -> bool:
        """Is this problem branched? (Eq. 8) `fci_filter`: "easy" | "all" | "none", which problems have to pass.

        A problem passes when its FCI is above the mean of those compared before it; the first one passes.
        """
        if fci_filter == "none" or (fci_filter == "easy" and min(rewards) < 1):
            return True
        passes = self.fci_count == 0 or problem_fci > self.fci_total / self.fci_count  # Eq. 8
        self.fci_total += problem_fci
        self.fci_count += 1
        return passes

    def resize(self, target: int, useful: int, decay: float, smallest: int, largest: int) -> None:
        """Set the next batch size (Eq. 10) from the target B' and the number B'' of training sequences with non-zero advantage.

        No useful sequence at all counts as one: the batch grows to its bound.
        """
        ratio = target / max(useful, 1)  # B' / B''
        size = round(decay * self.batch_size + (1 - decay) * ratio * self.batch_size)  # Eq. 10
        self.batch_size = min(max(size, smallest), largest)


# --- 2. Requests, prompts and models --------------------------------------------------------------------------------


@dataclass
class Request:
    prompt_ids: list[int]  # everything the model reads, a prefix of a response included
    max_new_tokens: int


def check_requests(requests: list[Request], context: float) -> None:
    """Raises ValueError in one sentence for a request that no model with so many positions can serve."""
    for r in requests:
        if not r.prompt_ids:
            raise ValueError("a request has an empty prompt: give it at least one token to start from")
        if r.max_new_tokens < 1 or len(r.prompt_ids) + r.max_new_tokens > context:
            sizes = f"a prompt of {len(r.prompt_ids)} tokens with a budget of {r.max_new_tokens}"
            raise ValueError(
                f"{sizes} cannot be served: the budget must be at least 1, and both together at most the {context} the engine holds"
            )


@dataclass
class Response:
    ids: list[int]  # sampled tokens, with the end-of-sequence token where there is one
    logps: list[float]  # of `ids`, under the distribution they were sampled from
    finish_reason: str  # "stop" (end of sequence) | "length" (budget used up)


def load_tokenizer(model: str):
    """Fast tokenizer of a local directory or hub name, with a chat template. Raises ValueError in one sentence."""
    try:
        # Not AutoTokenizer: for some model types it replaces what tokenizer.json says by what the type usually has.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    except Exception as error:  # transformers raises many kinds, some pages long
        raise ValueError(_cannot_load("tokenizer", model, error)) from None
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {model!r} has no chat template: the prompt needs one, as instruction-tuned models have")
    return tokenizer


def load_model(model: str, dtype: torch.dtype = torch.float32):
    """Causal language model with the `fci` attention of fci.py, on the GPU if there is one. Raises ValueError in one sentence."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="fci")
    except Exception as error:
        raise ValueError(_cannot_load("model", model, error)) from None
    loaded.generation_config.do_sample = True  # with a temperature but without this, transformers refuses to save the model
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def context_length(model: str) -> float:
    """Positions the model of a directory or hub name was made for; infinite if its configuration does not say."""
    try:
        return _positions(AutoConfig.from_pretrained(model))
    except Exception as error:
        raise ValueError(_cannot_load("configuration", model, error)) from None


def _positions(config) -> float:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def _cannot_load(what: str, model: str, error: Exception) -> str:
    if os.path.isdir(model):
        return (
            f"the directory {model!r} holds no {what} that loads ({type(error).__name__}): it needs the files that save_pretrained writes"
        )
    return f"cannot load the {what} of {model!r} ({type(error).__name__}): no such directory, and no such model on the hub within reach"


def prompt_ids(tokenizer, problem: str) -> list[int]:
    """Token ids of the paper's prompt under the model's chat template, up to where the answer starts."""
    messages = [{"role": "user", "content": PROMPT.format(problem=problem)}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


# --- 3. Engine: plain PyTorch ---------------------------------------------------------------------------------------


class _Recorder(LogitsProcessor):
    """Log-probabilities of sampled tokens: keeps the last distribution until the token drawn from it is known."""

    def __init__(self):
        self.distribution, self.logps = None, []

    def __call__(self, input_ids, scores):
        if self.distribution is not None:
            self.logps.append(self.distribution.gather(1, input_ids[:, -1:]))
        self.distribution = scores.log_softmax(-1)
        return scores


class _Budgets(StoppingCriteria):
    """Stops each row at its own number of new tokens."""

    def __init__(self, prompt_length: int, budgets: torch.Tensor):
        self.prompt_length, self.budgets = prompt_length, budgets

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_length >= self.budgets


class TorchEngine:
    """Samples with transformers' `generate`, from the trained model itself (weights are never stale) or from a copy of it.

    batch_tokens: rows x longest sequence of a batch, a memory knob. Requests of similar length share a batch.
    """

    def __init__(self, model, tokenizer, batch_tokens: int = 32768):
        self.model, self.batch_tokens = model, batch_tokens
        self.eos_ids = stop_ids(tokenizer, model.generation_config)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    @torch.no_grad()
    def generate(self, requests: list[Request], temperature: float = 1.0, top_p: float = 1.0) -> list[Response]:
        """Sample one response a request, in the order of the requests. temperature 0 is greedy.

        Raises ValueError in one sentence for a request that cannot be served.
        """
        check_requests(requests, _positions(self.model.config))
        self.model.eval()
        responses: dict[int, Response] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        while order:
            width = len(requests[order[-1]].prompt_ids) + max(requests[i].max_new_tokens for i in order)
            rows = max(1, self.batch_tokens // width)
            batch, order = order[-rows:], order[:-rows]  # the longest prompts left
            responses |= zip(batch, self._generate_batch([requests[i] for i in batch], temperature, top_p))
        return [responses[i] for i in range(len(requests))]

    def _generate_batch(self, requests, temperature, top_p) -> list[Response]:
        device = self.model.device
        longest = max(len(r.prompt_ids) for r in requests)
        ids = torch.full((len(requests), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, r in enumerate(requests):  # left-padded, so that every row ends where generation starts
            ids[row, longest - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
            mask[row, longest - len(r.prompt_ids) :] = 1
        budgets = torch.tensor([r.max_new_tokens for r in requests], device=device)
        recorder, processors = _Recorder(), []
        if temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        # The model's own settings (repetition penalty, top-k, ...) would silently change what is sampled.
        settings = GenerationConfig(
            eos_token_id=self.eos_ids, pad_token_id=self.pad_id, do_sample=temperature > 0, max_new_tokens=int(budgets.max())
        )
        if temperature > 0:
            settings.update(temperature=1.0, top_p=1.0, top_k=0)
        own, self.model.generation_config = self.model.generation_config, settings
        output = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            stopping_criteria=[_Budgets(longest, budgets)],
            logits_processor=[*processors, recorder],
        )
        self.model.generation_config = own
        recorder(output, recorder.distribution)  # the last token drawn
        sampled, logps = output[:, longest:].tolist(), torch.cat(recorder.logps, dim=1).tolist()
        return [self._trim(row, row_logps, r.max_new_tokens) for row, row_logps, r in zip(sampled, logps, requests)]

    def _trim(self, ids: list[int], logps: list[float], budget: int) -> Response:
        stop = next((i + 1 for i, token in enumerate(ids[:budget]) if token in self.eos_ids), None)
        end = stop or budget
        return Response(ids[:end], logps[:end], "stop" if stop else "length")

    def load(self, model) -> None:
        """Copy the model's weights, unless the engine samples from that very model."""
        if model is not self.model:
            own = self.model.state_dict()
            for name, weight in full_weights(model):
                own[name].copy_(weight)

    def sleep(self) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to release."""


# --- 4. Engine: vLLM --------------------------------------------------------------------------------------------------


class VLLMEngine:
    """Samples with vLLM, in this process, from a copy of the weights that `load` keeps up to date.

    max_tokens: longest prompt plus its budget. gpu_memory: share of the GPU for vLLM's weights and cache. sleep_mode: let
    `sleep` hand that share back until the next `load` (CUDA only). Raises ValueError in one sentence if vLLM does not start.
    Continuations of one response share their prefix, so prefix caching saves most of their prefill.
    """

    def __init__(
        self, model_name: str, tokenizer, max_tokens: int, seed: int = 0, gpu_memory: float = 0.4, sleep_mode: bool = False,
        tensor_parallel: int = 1,
    ):  # fmt: skip
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: weights are handed over as they are
        from vllm import LLM

        try:
            own_settings = GenerationConfig.from_pretrained(model_name)
        except OSError:  # a model need not have any
            own_settings = GenerationConfig()
        self.eos_ids, self.max_tokens = stop_ids(tokenizer, own_settings), max_tokens
        self.sleep_mode, self.asleep = sleep_mode, False
        try:
            self.llm = LLM(
                model_name, skip_tokenizer_init=True, dtype="bfloat16" if torch.cuda.is_available() else "float32", seed=seed,
                max_model_len=max_tokens, gpu_memory_utilization=gpu_memory, enable_prefix_caching=True, generation_config="vllm",
                logprobs_mode="processed_logprobs", enable_sleep_mode=sleep_mode, tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if world_size() > 1 else None,  # the processes are torchrun's
            )  # fmt: skip
        except Exception as error:  # no memory, no device, a model that vLLM does not know: each has its own kind
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"vLLM does not start with {model_name!r} ({type(error).__name__}: {reason}): if memory is short, lower gpu_memory "
                "or the number of response tokens, or else pass --engine torch"
            ) from error

    def generate(self, requests: list[Request], temperature: float = 1.0, top_p: float = 1.0) -> list[Response]:
        """As TorchEngine.generate."""
        from vllm import SamplingParams

        check_requests(requests, self.max_tokens)
        # vLLM draws from torch's random state or NumPy's, by backend: the former, which checkpoints keep, rules both.
        np.random.seed(torch.randint(2**31, ()).item())
        settings = dict(temperature=temperature, top_p=top_p, logprobs=0, stop_token_ids=self.eos_ids, detokenize=False)
        outputs = self.llm.generate(
            [{"prompt_token_ids": r.prompt_ids} for r in requests],
            [SamplingParams(max_tokens=r.max_new_tokens, **settings) for r in requests],
            use_tqdm=False,
        )  # fmt: skip
        responses = []
        for sampled in (output.outputs[0] for output in outputs):
            logps = [choices[token].logprob for token, choices in zip(sampled.token_ids, sampled.logprobs)]
            responses.append(Response(list(sampled.token_ids), logps, sampled.finish_reason))
        return responses

    def load(self, model) -> None:
        """Push the model's weights, then drop every prefix that the old ones cached. Wakes a sleeping engine."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])  # the cache stays away until the push, which needs room of its own, is over
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(model)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes cached under old weights (reset_prefix_cache returned False)")
        if self.asleep and not self.llm.wake_up(tags=["kv_cache"]):
            raise RuntimeError("vLLM did not wake up (wake_up returned False)")
        self.asleep = False

    def sleep(self) -> None:
        """With sleep mode, hand the GPU memory of weights and cache back; `load` must come before the next `generate`."""
        if self.sleep_mode and not self.asleep:
            self.llm.sleep(level=2)  # drops the weights: `load` brings new ones
            self.asleep = True

    def close(self) -> None:
        del self.llm


def stop_ids(tokenizer, generation_config: GenerationConfig) -> list[int]:
    """Tokens that end a response: the tokenizer's and those of the model's generation settings."""
    eos = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})


def resolve_engine(name: str) -> tuple[str, str]:
    """("vllm" or "torch", why it is not vLLM). For "auto" vLLM where it is installed, in its tested version, and CUDA is there.

    Raises ValueError if vLLM is asked for and cannot be had.
    """
    why_not = ""
    if name == "torch":
        why_not = "as asked"
    elif importlib.util.find_spec("vllm") is None:
        why_not = "vLLM is not installed"
    elif name == "auto" and not torch.cuda.is_available():
        why_not = "there is no CUDA device"
    else:
        from vllm import __version__

        if __version__.partition("+")[0] != VLLM_VERSION:  # "+cpu" is a build of the same
            why_not = f"vLLM {__version__} is installed, and {VLLM_VERSION} is the one that works with this code"
    if name == "vllm" and why_not:
        raise ValueError(f"engine=vllm is out of reach, {why_not}: pip install -r requirements-gpu.txt, or pass --engine torch")
    return ("torch" if why_not else "vllm"), why_not


def make_engine(
    name: str, model_name: str, tokenizer, model=None, *, max_tokens: int, seed: int = 0, gpu_memory: float = 0.4,
    sleep_mode: bool = False, tensor_parallel: int = 1,
):  # fmt: skip
    """The engine that `resolve_engine(name)` says, which is printed to stderr. model: what the torch engine samples from; None loads
    `model_name`. With "auto", a vLLM that does not start is replaced by the torch engine."""
    chosen, why_not = resolve_engine(name)
    if chosen == "vllm":
        try:
            engine = VLLMEngine(model_name, tokenizer, max_tokens, seed, gpu_memory, sleep_mode, tensor_parallel)
            if rank() == 0:
                print(f"engine: vLLM {VLLM_VERSION}", file=sys.stderr)
            return engine
        except ValueError as error:
            if name == "vllm":
                raise
            why_not = str(error)
    if rank() == 0:
        print(f"engine: plain PyTorch ({why_not})", file=sys.stderr)
    return TorchEngine(model if model is not None else load_model(model_name), tokenizer)


# --- 5. Is the engine the policy that is trained? ---------------------------------------------------------------------


class EngineMismatch(RuntimeError):
    """Sampler and trainer are further apart than rounding explains."""


def check_gap(gap: float, bound: float, when: str) -> None:
    """Raises EngineMismatch if the mean |log-prob of the trainer - log-prob of the engine| of some tokens exceeds `bound` (nats)."""
    if not gap <= bound:  # NaN is no agreement either
        raise EngineMismatch(
            f"{when} the engine's log-probs differ from the trainer's by {gap:.3g} nats a token, max_engine_gap allows {bound:.3g}: "
            "most likely weights that were pushed did not all arrive; pass --engine torch, or raise the bound if the kernels are that coarse"
        )


def verify_sync(engine, model, prompts, bound: float, n_tokens: int = 16, temperature=1.0, autocast=contextlib.nullcontext) -> float:
    """Prove that a push reaches every weight of the engine: the mean gap on n_tokens a prompt (nats). Raises EngineMismatch.

    Negates every parameter, pushes, compares the log-probs of sampled tokens with the model's, and does so again with the weights as
    they were. Negating twice is exact, and a tensor that does not arrive has the wrong sign for the network around it. Comparing after
    a real update would prove nothing: at lr 1e-6 it moves log-probs less than bf16 does. A tensor of zeros stays unproven. torch's
    random state is kept (and NumPy's global one follows from it in every call of vLLM). autocast: makes the context of forward passes.
    """
    gaps, requests = {}, [Request(ids, n_tokens) for ids in prompts]
    for weights in ("the weights, negated", "the weights"):
        with torch.no_grad(), fork_rng():
            for parameter in model.parameters():
                parameter.neg_()
            engine.sleep()
            engine.load(model)
            with autocast():  # anew: it keeps its casts of the weights until it is left
                responses = engine.generate(requests, temperature)
                logps, _ = token_logps(model.eval(), [(ids, r.ids) for ids, r in zip(prompts, responses)], temperature, chunk=1024)
        gaps[weights] = (logps.cpu() - torch.tensor([x for r in responses for x in r.logps])).abs().mean().item()
    for weights, gap in gaps.items():  # only now, with the weights as they were
        check_gap(gap, bound, f"after a push of {weights},")
    return max(gaps.values())


def mismatch(gaps: list[np.ndarray]) -> dict[str, float]:
    """How far apart trainer and engine are, from log-prob of the trainer - log-prob of the engine of each token, an array a sequence.

    engine_gap_mean, engine_gap_max: of |difference| over all tokens, nats. engine_ratio: mean over sequences of the ratio
    w = P(trainer) / P(engine) of a whole sequence; 1 if they agree. engine_ess: effective sample size (sum w)^2 / (n sum w^2) of
    those ratios, the share of the n sequences that importance weighting would leave, in (0, 1]. Empty without tokens.

    >>> {name: round(value, 2) for name, value in mismatch([np.log([2.0, 0.5]), np.log([3.0])]).items()}
    {'engine_gap_mean': 0.83, 'engine_gap_max': 1.1, 'engine_ratio': 2.0, 'engine_ess': 0.8}
    """
    if not gaps:
        return {}
    tokens, sums = np.abs(np.concatenate(gaps)), np.array([g.sum() for g in gaps])
    w = np.exp(sums - sums.max())  # in (0, 1]: the effective sample size does not depend on the scale
    return {
        "engine_gap_mean": float(tokens.mean()), "engine_gap_max": float(tokens.max()),
        "engine_ratio": float(np.exp(sums).mean()), "engine_ess": float(w.sum() ** 2 / (len(w) * (w**2).sum())),
    }  # fmt: skip


# --- 6. Many processes (torchrun) -------------------------------------------------------------------------------------
#
# Every process runs the same program on the same data and makes the same random choices. Only the heavy calls are shared out: sampling,
# grading, scoring, the update. So all statistics are over all processes, and a checkpoint is that of a run of one process.


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def shares(costs: list[int], n: int) -> list[list[int]]:
    """Indices of `costs` in n shares of about equal cost: the dearest first, each to the share with the least so far.

    >>> shares([5, 1, 4, 3, 3], 2)
    [[0, 4], [1, 2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(n), key=lambda share: loads[share])
        found[least].append(i)
        loads[least] += costs[i]
    return [sorted(share) for share in found]


def union(own: dict) -> dict:
    """The dictionaries of all processes in one, the same everywhere."""
    if world_size() == 1:
        return own
    parts: list = [None] * world_size()
    torch.distributed.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def once(work: Callable):
    """What `work()` returns on rank 0, on all processes."""
    return union({0: work()} if rank() == 0 else {})[0]


def shared_out(items: list, costs: list[int], work: Callable[[list], list], replicas: int = 1) -> list:
    """work(items), which returns a result an item, by processes that each work on a share. `replicas` neighbours work on the same one."""
    own = shares(costs, world_size() // replicas)[rank() // replicas]
    results = union(dict(zip(own, work([items[i] for i in own]))))
    return [results[i] for i in range(len(items))]


class SharedEngine:
    """The engines of all processes as one. tensor_parallel: how many neighbouring processes hold one engine together."""

    def __init__(self, own, tensor_parallel: int = 1):
        self.own, self.tensor_parallel = own, tensor_parallel
        self.load, self.sleep, self.close = own.load, own.sleep, own.close

    def generate(self, requests: list[Request], temperature: float = 1.0, top_p: float = 1.0) -> list[Response]:
        budgets = [r.max_new_tokens for r in requests]
        return shared_out(requests, budgets, lambda own: self.own.generate(own, temperature, top_p), self.tensor_parallel)


def shard(model) -> None:
    """Split weights, gradients and so the optimiser's state over the processes (FSDP2); a single one keeps the model as it is.

    A layer's weights are gathered, in their own dtype, when it runs: all processes must run the model equally often.
    """
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what every decoder layer of transformers is
            fully_shard(module)
    fully_shard(model, reshard_after_forward=True)  # the root too: `parameters()` must never be the gathered ones
    model.response_logps = functools.partial(response_logps, model)
    register_fsdp_forward_method(model, "response_logps")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a sharded one, for which all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole weights, one at a time: all processes must go through them together."""
    return ((name, whole(weight)) for name, weight in model.state_dict().items())


def on_rank_0(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors, in CPU memory; {} on other ranks, which have to ask for them, too."""
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if rank() == 0}


def fork_rng():
    """Keeps torch's random state as it is, that of this process' GPU included and of no other."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])
