"""What to sample, and with what: adaptive sampling (Eq. 8-10) and the engines.

Adaptive sampling decides with three numbers where the next tokens go:
- which problems are branched: those solved by every initial response only if their FCI is high (Eq. 8);
- how many of a problem's initial responses are branched: more where it fails more often (Eq. 9);
- how many problems the next batch holds, so that its sequences with non-zero advantage meet a target (Eq. 10).

Released code against the paper: it filters only problems that all initial responses solve (Eq. 8 read literally
filters every problem: `fci_filter="all"`); it rounds Eq. 9 up, the paper to nearest, as here.

Engines share `generate(requests) -> responses`, `load(model)` and `close()`. Token ids go in and token ids come out; nothing
is ever tokenised twice. Log-probabilities are of the distribution that was sampled from, temperature included.
"""

import importlib.util
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
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

import fci  # noqa: F401  registers the attention that load_model asks for

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
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except Exception as error:
        raise ValueError(_cannot_load("model", model, error)) from None
    loaded.set_attn_implementation("fci")  # a model that cannot keeps its own, and `check_model` says so before training
    loaded.generation_config.do_sample = True  # with a temperature but without this, transformers refuses to save the model
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def context_length(model: str) -> float:
    """Positions the model of a directory or hub name was made for; infinite if its configuration does not say."""
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except Exception as error:
        raise ValueError(_cannot_load("configuration", model, error)) from None
    return getattr(config, "max_position_embeddings", None) or math.inf


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
    """Samples with transformers' `generate`, from the trained model itself: weights are never stale.

    batch_tokens: rows x longest sequence of a batch, a memory knob. Requests of similar length share a batch.
    """

    def __init__(self, model, tokenizer, batch_tokens: int = 32768):
        self.model, self.batch_tokens = model, batch_tokens
        self.eos_ids = stop_ids(tokenizer, model.generation_config)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    @torch.no_grad()
    def generate(self, requests: list[Request], temperature: float = 1.0, top_p: float = 1.0) -> list[Response]:
        """Sample one response a request, in the order of the requests. temperature 0 is greedy."""
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
        """Nothing to push: the engine samples from the trained model."""

    def close(self) -> None:
        """Nothing to release."""


# --- 4. Engine: vLLM --------------------------------------------------------------------------------------------------


class VLLMEngine:
    """Samples with vLLM, in this process, from a copy of the weights that `load` keeps up to date.

    max_tokens: longest prompt plus its budget. gpu_memory: share of the GPU for vLLM's weights and cache.
    Continuations of one response share their prefix, so prefix caching saves most of their prefill.
    """

    def __init__(self, model_name: str, tokenizer, max_tokens: int, seed: int = 0, gpu_memory: float = 0.4):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: weights are handed over as they are
        from vllm import LLM

        try:
            own_settings = GenerationConfig.from_pretrained(model_name)
        except OSError:  # a model need not have any
            own_settings = GenerationConfig()
        self.eos_ids = stop_ids(tokenizer, own_settings)
        self.llm = LLM(
            model_name, skip_tokenizer_init=True, dtype="bfloat16" if torch.cuda.is_available() else "float32", seed=seed,
            max_model_len=max_tokens, gpu_memory_utilization=gpu_memory, enable_prefix_caching=True, generation_config="vllm",
            logprobs_mode="processed_logprobs",
        )  # fmt: skip

    def generate(self, requests: list[Request], temperature: float = 1.0, top_p: float = 1.0) -> list[Response]:
        """As TorchEngine.generate."""
        from vllm import SamplingParams

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
        """Push the model's weights, then drop every prefix that the old ones cached."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(model.state_dict().items())})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes cached under old weights (reset_prefix_cache returned False)")

    def close(self) -> None:
        del self.llm


def stop_ids(tokenizer, generation_config: GenerationConfig) -> list[int]:
    """Tokens that end a response: the tokenizer's and those of the model's generation settings."""
    eos = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})


def resolve_engine(name: str) -> str:
    """ "torch" or "vllm"; for "auto" vllm where it is installed and CUDA is there. ValueError if vLLM is wanted but missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ValueError("engine=vllm needs vLLM: pip install -r requirements-gpu.txt, or pass --engine torch")
    return ("vllm" if installed and torch.cuda.is_available() else "torch") if name == "auto" else name


def make_engine(name: str, model_name: str, tokenizer, model=None, *, max_tokens: int, seed: int = 0, gpu_memory: float = 0.4):
    """The engine that `resolve_engine(name)` says. model: what the torch engine samples from; None loads `model_name`."""
    if resolve_engine(name) == "vllm":
        return VLLMEngine(model_name, tokenizer, max_tokens, seed, gpu_memory)
    return TorchEngine(model if model is not None else load_model(model_name), tokenizer)
