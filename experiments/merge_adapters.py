"""Adapters merged into their model: a checkpoint of `train.py --lora_rank N` as a whole Hugging Face model.

    python experiments/merge_adapters.py runs/attnrl-DeepSeek-R1-Distill-Qwen-1.5B-0/checkpoint-500 merged

The directory needs neither PEFT nor the model that the adapters were trained on. The sum is computed in fp32
on the CPU, and written in --dtype: bfloat16 rounds it as vLLM does with the weights of a step.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is run from

from plumbing.adapters import base_of
from plumbing.models import load_model, load_tokenizer


def merge(checkpoint: str, out: str, dtype: str) -> None:
    """Write the merged model and its tokenizer. Raises ValueError, one sentence."""
    if base_of(checkpoint) is None:
        raise ValueError(f"{checkpoint} has no adapters: give a checkpoint of a run with --lora_rank")
    if Path(out).exists():
        raise ValueError(f"{out} exists already: give another directory")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, device="cpu")
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="directory with adapters")
    parser.add_argument("out", help="directory to be written")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    try:
        merge(args.checkpoint, args.out, args.dtype)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
