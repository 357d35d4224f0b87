"""Which engine samples, and the engines of all processes as one.

An engine has `generate(requests, temperature, top_p) -> responses`, `load(model)`, `sleep()`, `close()`."""

import sys
from contextlib import nullcontext
from functools import partial

import torch

from plumbing.adapters import base_of, need_peft
from plumbing.models import load_model
from plumbing.nouns import Request, Response
from plumbing.processes import rank, shared_out, world_size
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from plumbing.vllm_engine import VLLM_VERSION, VLLMEngine


def resolve_engine(name: str) -> str:
    """ "vllm" or "torch"; "auto" is vLLM where there is CUDA. ValueError where it cannot be used."""
    if name == "torch" or (name == "auto" and not torch.cuda.is_available()):
        return "torch"
    try:
        from vllm import __version__
    except Exception as error:  # not installed, built for another torch, or without its libraries
        why_not = f"it does not import ({' '.join(str(error).split())[:200]})"
    else:
        if __version__.partition("+")[0] == VLLM_VERSION:  # "+cpu" is a build of the same
            return "vllm"
        why_not = f"{__version__} is installed, and {VLLM_VERSION} is the one that works here"
    remedy = "pip install -r requirements-gpu.txt, or pass --engine torch, which is slow on large models"
    raise ValueError(f"engine={name} needs vLLM, and {why_not}: {remedy}")


def check_engine(machine: MachineConfig) -> None:
    """Raises ValueError where the settings ask for what this machine does not have."""
    if machine.lora_rank:
        need_peft()
    chosen = resolve_engine(machine.engine)
    if machine.engine_sleep and not (chosen == "vllm" and torch.cuda.is_available()):
        reason = "this run has no vLLM on a CUDA device: leave it out"
        raise ValueError(f"engine_sleep hands vLLM's GPU memory back, and {reason}")
    if world_size() % machine.tensor_parallel:
        needed = f"must divide the number of torchrun's processes, here {world_size()}"
        raise ValueError(f"tensor_parallel={machine.tensor_parallel} {needed}")


def make_engine(machine, model_name, tokenizer, model=None, *, max_tokens, seed=0, autocast=nullcontext):
    """The engine that `resolve_engine(machine.engine)` says, which is printed to stderr.

    model, autocast: what the torch engine samples from, and in which context; without a model it loads
    `model_name`. max_tokens: longest prompt plus its budget. Raises ValueError if vLLM does not start."""
    if resolve_engine(machine.engine) == "vllm":
        knobs = machine.gpu_memory, machine.engine_sleep, machine.tensor_parallel
        name, whole_model = f"vLLM {VLLM_VERSION}", model_name
        while base := base_of(whole_model):  # vLLM does not start from adapters
            whole_model = base
        engine = VLLMEngine(whole_model, tokenizer, max_tokens, seed, *knobs)
        if whole_model != model_name:
            engine.load(load_model(model_name, device="cpu"))  # the GPU's memory may be vLLM's
    else:
        model, name = (load_model(model_name) if model is None else model), "plain PyTorch"
        engine = TorchEngine(model, tokenizer, autocast=autocast)
    if rank() == 0:
        print(f"engine: {name}", file=sys.stderr)
    return engine


class SharedEngine:
    """The engines of all processes as one. tensor_parallel: how many neighbours hold one engine together."""

    def __init__(self, own, tensor_parallel: int = 1):
        self.own, self.tensor_parallel = own, tensor_parallel
        self.load, self.sleep, self.close = own.load, own.sleep, own.close

    def generate(self, requests: list[Request], temperature=1.0, top_p=1.0) -> list[Response]:
        generate = partial(self.own.generate, temperature=temperature, top_p=top_p)
        return shared_out(requests, [r.max_new_tokens for r in requests], generate, self.tensor_parallel)
