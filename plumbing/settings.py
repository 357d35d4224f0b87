"""Settings: the machine's fields, how flags become dataclasses, and what is refused in one sentence."""

import contextlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


class InputError(ValueError):
    """Something the user gave cannot work; the message says what and how to mend it."""


class RunStopped(RuntimeError):
    """A run ended early; what it had done by its last checkpoint is safe."""


@contextlib.contextmanager
def one_sentence():
    """Turns ValueErrors, which say in one sentence what is wrong with the input, into InputErrors."""
    try:
        yield
    except ValueError as error:
        raise InputError(error) from None


@dataclass
class MachineConfig:
    """What runs where, how precisely and in how much memory. Memory knobs never change a result."""

    lora_rank: int = HfArg(default=0, help="train adapters of this rank on frozen weights; 0: the weights")
    engine: Literal["auto", "torch", "vllm"] = HfArg(default="auto", help="auto: vllm where there is CUDA")
    gpu_memory: float = HfArg(default=0.4, help="share of the GPU that vllm may use")
    engine_sleep: bool = HfArg(default=False, help="vllm hands its GPU memory back during updates; CUDA only")
    tensor_parallel: int = HfArg(default=1, help="GPUs that hold one vllm engine together; needs torchrun")
    autocast: Literal["auto", "none", "bfloat16"] = HfArg(default="auto", help="auto: bfloat16 on CUDA")
    gradient_checkpointing: bool = HfArg(default=True, help="recompute activations in backward: less memory")
    microbatch_tokens: int = HfArg(default=16384, help="rows x longest sequence of one forward pass")
    logit_chunk: int = HfArg(default=1024, help="tokens whose logits exist at once")
    max_skipped_updates: int = HfArg(default=3, help="updates in a row, not finite, that stop a run")
    threads: int = HfArg(default=0, help="CPU threads; 0: torch's choice")
    track: Literal["none", "trackio", "wandb", "tensorboard"] = HfArg(default="none", help="gets metrics")
    plan: bool = HfArg(default=False, help="print the GPU memory that is needed, and stop; loads no weights")
    gpu_gb: float = HfArg(default=0, help="for --plan, the GPU's memory in GB; 0: of the one there, else 80")

    def check(self, may_be_zero: set[str]) -> None:
        """Raises ValueError for an impossible number. may_be_zero: fields of a subclass that may be 0."""
        check_signs(self, may_be_zero | {"threads", "gpu_gb", "lora_rank"})
        refuse_if(self.gpu_memory > 1, f"gpu_memory is a share of the GPU, at most 1, got {self.gpu_memory}")


# A run may be resumed under another value of these: where, how long, on which engine, and memory knobs.
MAY_CHANGE = set("output_dir same_run steps token_budget save_every keep_checkpoints max_engine_gap".split())
MAY_CHANGE |= {field.name for field in fields(MachineConfig)} - {"autocast", "lora_rank"}


class Parser(HfArgumentParser):
    """Errors are InputErrors, not the end of the process."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(configs: tuple[type, ...], argv: list[str], description: str, overrides) -> tuple:
    """The dataclasses `configs` from flags: defaults < overrides(them) < flags. Raises InputError."""
    parser = Parser(configs, description=description, allow_abbrev=False)
    *first, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    parser.set_defaults(**overrides(*first))
    return parser.parse_args_into_dataclasses(argv)


def absolute(name: str) -> str:
    """A path that exists reads the same from every folder; a hub name stays as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def refuse_if(condition: bool, why: str) -> None:
    """Raises ValueError(why) if the condition holds."""
    if condition:
        raise ValueError(why)


def check_signs(config, may_be_zero: set[str]) -> None:
    """Raises ValueError for a number that is negative, infinite, or 0 and not in `may_be_zero`."""
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in may_be_zero):
                bound = "at least" if name in may_be_zero else "above"
                raise ValueError(f"{name} must be {bound} 0, got {value}")
