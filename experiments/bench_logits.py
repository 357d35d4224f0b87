"""Peak memory of log-probabilities over a large vocabulary, forward and backward: in chunks, and direct.

    python experiments/bench_logits.py                             # 8,192 tokens x 151,936
    python experiments/bench_logits.py --tokens 1024 --width 1536  # with the output layer of the 1.5B model

"In chunks" is plumbing.projection.token_logps. The model is one small layer below an output layer of the real
vocabulary. "tensors" is the peak of the bytes of tensors alive at once, weights and their gradients not
counted (`LiveBytes`); "process", which also sees what kernels allocate inside, the peak of resident memory
above what the process held before. The direct route holds L x V tensors, so its peak is measured on
`--direct_tokens` and scaled to `--tokens`. With a small `--width` these are the logits alone; at the real
one, gradients in flight of the output layer's weight come on top.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fci import ATTENTION
from plumbing.memory_plan import LiveBytes
from plumbing.projection import token_logps
from plumbing.settings import MachineConfig


def make_model(vocabulary: int, width: int):
    torch.manual_seed(0)
    layer = dict(intermediate_size=width, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    size = dict(hidden_size=width, vocab_size=vocabulary, tie_word_embeddings=False)
    return Qwen2ForCausalLM(Qwen2Config(**size, **layer, attn_implementation=ATTENTION))


def forward_backward(model, ids: list[int], chunk: int) -> None:
    """Log-probabilities of all tokens but the first, and their gradient. chunk: 0 for the direct route."""
    if chunk:
        logps, _ = token_logps(model, [(ids[:1], ids[1:])], 1.0, chunk)
    else:
        hidden = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        head, targets = model.get_output_embeddings(), torch.tensor(ids)[1:, None]
        logps = head(hidden[0, :-1]).float().log_softmax(-1).gather(1, targets)[:, 0]
    logps.mean().backward()


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, now, or VmHWM, at most since /proc/self/clear_refs was written."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(name)).split()[1]
    return 1024 * int(kilobytes)


def measure(vocabulary: int, width: int, tokens: int, chunk: int, by: str) -> int:
    """Peak bytes of one forward and backward pass, by "tensors" or by "process".

    Gradients exist before, as in all forward passes of a minibatch but the first.
    """
    model = make_model(vocabulary, width)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.randint(vocabulary, (tokens + 1,)).tolist()
    if by == "tensors":
        with LiveBytes() as live:
            forward_backward(model, ids, chunk)
        return live.peak
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    forward_backward(model, ids, chunk)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument(
        "--width", type=int, default=32, help="of the hidden state; small keeps this affordable"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, MachineConfig().logit_chunk])
    parser.add_argument("--direct_tokens", type=int, default=1024)
    # the program of the measuring processes: by, tokens, chunk
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        by, tokens, chunk = args.one
        print(measure(args.vocabulary, args.width, int(tokens), int(chunk), by))
        return

    def peak(by: str, tokens: int, chunk: int) -> float:
        """GB, in a process of its own that returns freed memory at once."""
        sizes = ["--vocabulary", str(args.vocabulary), "--width", str(args.width)]
        command = [sys.executable, __file__, *sizes, "--one", by, str(tokens), str(chunk)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return int(done.stdout) / 1e9

    size = f"{args.tokens} tokens x {args.vocabulary}, hidden state of {args.width}"
    print(f"{size}, fp32: peak of forward and backward, GB")
    print("| route | tensors | process |\n| --- | --- | --- |")
    for chunk in args.chunks:
        tensors, process = (peak(by, args.tokens, chunk) for by in ("tensors", "process"))
        print(f"| chunks of {chunk} | {tensors:.2f} | {process:.2f} |", flush=True)
    scale = args.tokens / args.direct_tokens
    tensors, process = (scale * peak(by, args.direct_tokens, 0) for by in ("tensors", "process"))
    route = f"direct, {scale:.0f} times that of {args.direct_tokens} tokens"
    print(f"| {route} | {tensors:.2f} | {process:.2f} |")


if __name__ == "__main__":
    main()
