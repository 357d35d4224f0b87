"""An engine with vLLM, in this process, from a copy of the weights that is pushed after every update."""

import os

import numpy as np
import torch
from transformers import GenerationConfig

from plumbing.adapters import full_weights
from plumbing.memory_plan import shape_of
from plumbing.models import stop_ids
from plumbing.nouns import Request, Response
from plumbing.processes import world_size
from plumbing.torch_engine import check_requests

VLLM_VERSION = "0.32.0"  # what requirements-gpu.txt pins and tests run: its reloading of weights may change


class VLLMEngine:
    """Samples with vLLM, in this process, from a copy of the weights that `load` keeps up to date.

    max_tokens: longest prompt plus its budget. gpu_memory: share of each of n_gpus that vLLM may use.
    sleep_mode: let `sleep` hand that share back until the next `load` (CUDA only). Raises ValueError in one
    sentence if vLLM does not start. Prefix caching serves requests of one call that share a prefix."""

    def __init__(self, model_name, tokenizer, max_tokens, seed=0, gpu_memory=0.4, sleep_mode=False, n_gpus=1):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: weights are handed over as they are
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            own_settings = GenerationConfig.from_pretrained(model_name)
        except OSError:  # a model need not have any
            own_settings = GenerationConfig()
        self.eos_ids, self.max_tokens = stop_ids(tokenizer, own_settings), max_tokens
        self.sleep_mode, self.asleep = sleep_mode, False
        try:
            from vllm import LLM

            dtype = "bfloat16" if torch.cuda.is_available() else "float32"
            launcher = "external_launcher" if world_size() > 1 else None  # the processes are torchrun's
            sizes = dict(max_model_len=max_tokens, gpu_memory_utilization=gpu_memory, seed=seed, dtype=dtype)
            sizes |= dict(tensor_parallel_size=n_gpus, distributed_executor_backend=launcher)
            ways = dict(skip_tokenizer_init=True, generation_config="vllm", enable_prefix_caching=True)
            ways |= dict(logprobs_mode="processed_logprobs", enable_sleep_mode=sleep_mode)
            if torch.cuda.is_available():
                shape, card = shape_of(model_name), torch.cuda.get_device_properties(0).total_memory
                cache = shape.vllm_cache(gpu_memory * card * n_gpus)
                sizes |= dict(max_num_seqs=shape.at_once(cache, max_tokens))
            threads = torch.get_num_threads()
            self.llm = LLM(model_name, **sizes, **ways)
            torch.set_num_threads(threads)  # vLLM may have set one, for the trainer, too
        except Exception as error:  # no memory, no device, an unknown model: each has its own kind
            reason = " ".join(str(error).split())[:300]
            what = f"vLLM does not start with {model_name!r} ({type(error).__name__}: {reason})"
            remedy = "raise gpu_memory if its cache has no room, lower it if the card is full"
            raise ValueError(f"{what}: {remedy}, or pass --engine torch") from error

    def generate(self, requests: list[Request], temperature=1.0, top_p=1.0) -> list[Response]:
        """As TorchEngine.generate."""
        from vllm import SamplingParams

        check_requests(requests, self.max_tokens)
        # vLLM draws from torch's random state or NumPy's: the former, which checkpoints keep, rules both.
        np.random.seed(torch.randint(2**31, ()).item())
        settings = dict(temperature=temperature, top_p=top_p, stop_token_ids=self.eos_ids)
        settings |= dict(logprobs=0, flat_logprobs=True, detokenize=False)  # no dict for each token
        prompts = [{"prompt_token_ids": r.prompt_ids} for r in requests]
        budgets = [SamplingParams(max_tokens=r.max_new_tokens, **settings) for r in requests]
        try:
            outputs = self.llm.generate(prompts, budgets, use_tqdm=False)
        except Exception as error:  # vLLM's own kinds are no RuntimeErrors
            raise RuntimeError(f"vLLM broke down ({type(error).__name__}: {error})") from error
        responses = []
        for sampled in (output.outputs[0] for output in outputs):
            flat = sampled.logprobs  # of each place, the sampled token comes first
            logps = [flat.logprobs[start] for start in flat.start_indices]
            responses.append(Response(list(sampled.token_ids), logps, sampled.finish_reason))
        return responses

    def load(self, model) -> None:
        """Push the weights, and drop all prefixes that the old ones cached. Wakes a sleeping engine."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])  # not yet the cache: the push needs room of its own
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(model)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes of the old weights (reset_prefix_cache returned False)")
        if self.asleep and not self.llm.wake_up(tags=["kv_cache"]):
            raise RuntimeError("vLLM did not wake up (wake_up returned False)")
        self.asleep = False

    def sleep(self) -> None:
        """With sleep mode, hand the GPU memory back; `load` must come before the next `generate`."""
        if self.sleep_mode and not self.asleep:
            self.llm.sleep(level=2)  # drops the weights: `load` brings new ones
            self.asleep = True

    def close(self) -> None:
        """Release the engine and its GPU memory."""
        del self.llm
