"""Which engine samples, and the engines of all processes as one.

An engine is anything with `generate(requests, temperature, top_p) -> responses`, `load(model)`, `sleep()`
and `close()`.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from plumbing.models import load_model
from plumbing.nouns import Request, Response
from plumbing.processes import rank, shared_out, world_size
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from plumbing.vllm_engine import VLLM_VERSION, VLLMEngine


def resolve_engine(name: str) -> tuple[str, str]:
    """("vllm" or "torch", why not vLLM). "auto" is vLLM where its tested version and CUDA are there.

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
        try:
            from vllm import __version__
        except Exception as error:  # built for another torch, or without its libraries
            why_not = f"vLLM does not import ({' '.join(str(error).split())[:200]})"
        else:
            if __version__.partition("+")[0] != VLLM_VERSION:  # "+cpu" is a build of the same
                why_not = f"vLLM {__version__} is installed, and {VLLM_VERSION} is the one that works here"
    if name == "vllm" and why_not:
        remedy = "pip install -r requirements-gpu.txt, or pass --engine torch"
        raise ValueError(f"engine=vllm is out of reach, {why_not}: {remedy}")
    return ("torch" if why_not else "vllm"), why_not


def check_engine(machine: MachineConfig) -> None:
    """Raises ValueError where the settings ask for what this machine does not have."""
    chosen, _ = resolve_engine(machine.engine)
    if machine.engine_sleep and not (chosen == "vllm" and torch.cuda.is_available()):
        reason = "this run has no vLLM on a CUDA device: leave it out"
        raise ValueError(f"engine_sleep hands vLLM's GPU memory back, and {reason}")
    if world_size() % machine.tensor_parallel:
        needed = f"must divide the number of torchrun's processes, here {world_size()}"
        raise ValueError(f"tensor_parallel={machine.tensor_parallel} {needed}")


def make_engine(
    machine: MachineConfig,
    model_name: str,
    tokenizer,
    model=None,
    *,
    max_tokens: int,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
):
    """The engine that `resolve_engine(machine.engine)` says, which is printed to stderr.

    model, autocast: what the torch engine samples from, and in which context; without a model it loads
    `model_name`. With "auto", a vLLM that does not start is replaced by the torch engine. max_tokens:
    longest prompt plus its budget.
    """
    chosen, why_not = resolve_engine(machine.engine)
    if chosen == "vllm":
        knobs = machine.gpu_memory, machine.engine_sleep, machine.tensor_parallel
        try:
            engine = VLLMEngine(model_name, tokenizer, max_tokens, seed, *knobs)
            if rank() == 0:
                print(f"engine: vLLM {VLLM_VERSION}", file=sys.stderr)
            return engine
        except ValueError as error:
            if machine.engine == "vllm":
                raise
            why_not = str(error)
    if rank() == 0:
        print(f"engine: plain PyTorch ({why_not})", file=sys.stderr)
    return TorchEngine(model if model is not None else load_model(model_name), tokenizer, autocast=autocast)


class SharedEngine:
    """The engines of all processes as one. tensor_parallel: how many neighbours hold one engine together."""

    def __init__(self, own, tensor_parallel: int = 1):
        self.own, self.tensor_parallel = own, tensor_parallel
        self.load, self.sleep, self.close = own.load, own.sleep, own.close

    def generate(self, requests: list[Request], temperature=1.0, top_p=1.0) -> list[Response]:
        budgets = [r.max_new_tokens for r in requests]

        def generate(own: list[Request]) -> list[Response]:
            return self.own.generate(own, temperature, top_p)

        return shared_out(requests, budgets, generate, self.tensor_parallel)
