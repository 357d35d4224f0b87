"""Teach a pretrained model the form of an answer, so that it answers some problems and fails at others.

    python experiments/real_model/warm_start.py models/SmolLM2-135M-Instruct models/problems models/smollm2

trains on the worked solutions of warm.jsonl (maximum likelihood of their tokens, AdamW, a learning rate that
falls linearly to 0), writes the model, and prints what share of the held-out problems it solves. The form is:
steps separated by blank lines, the answer in \\boxed{}, then the end; a distilled reasoning model has learned
that before reinforcement learning starts. The directory's name chooses train.py's preset `smollm2`:

    python train.py --model models/smollm2 --train_data models/problems/train.jsonl \\
        --test_data models/problems/test.jsonl
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from eval import evaluate
from plumbing.evaluations import percent
from plumbing.learner import Learner
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Sequence
from plumbing.problems import load_problems
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine


def surprisal(logps: torch.Tensor, ref_logps: None) -> tuple[torch.Tensor, dict]:
    """The loss of supervised training: −log p of each token (n,)."""
    return -logps, {}


def fit(learner: Learner, sequences: list[Sequence], epochs: int, batch_size: int, lr: float) -> None:
    """Train in place, on every sequence once per epoch, in random order."""
    batches = [order for _ in range(epochs) for order in torch.randperm(len(sequences)).split(batch_size)]
    bar = tqdm(batches, unit="update")
    for i, rows in enumerate(bar):
        learner.optimizer.param_groups[0]["lr"] = lr * (1 - i / len(batches))
        batch = [sequences[row] for row in rows]
        n_tokens = sum(len(s.response_ids) for s in batch)
        done = learner.update(batch, surprisal, [n_tokens] * len(batch))
        bar.set_postfix(nats_per_token=f"{done['loss'] / n_tokens:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="directory or hub name of a chat model")
    parser.add_argument("problems", type=Path, help="what make_problems.py wrote")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--n_test", type=int, default=200, help="held-out problems to solve afterwards")
    parser.add_argument("--autocast", default="auto", help="as in train.py")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    rows = [json.loads(line) for line in (args.problems / "warm.jsonl").read_text().splitlines()]
    solutions = [tokenizer.encode(row["solution"], add_special_tokens=False) for row in rows]
    prompts = [prompt_ids(tokenizer, row["problem"]) for row in rows]
    sequences = [Sequence(p, ids + [tokenizer.eos_token_id]) for p, ids in zip(prompts, solutions)]
    machine = MachineConfig(autocast=args.autocast, microbatch_tokens=2048, logit_chunk=512)
    learner = Learner(model, None, torch.optim.AdamW(model.parameters()), machine)
    fit(learner, sequences, args.epochs, args.batch_size, args.lr)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    longest = 2 * max(map(len, solutions))
    problems = load_problems(str(args.problems / "test.jsonl"))[: args.n_test]
    engine = TorchEngine(model, tokenizer, autocast=learner.autocast)
    how = dict(samples=1, temperature=0.6, budget=lambda n_prompt: longest)
    found = evaluate(engine, tokenizer, problems, **how)
    solved = f"{percent(found['pass@1'], found['stderr'])}% of {len(problems)} held-out problems"
    minutes = (time.perf_counter() - started) / 60
    print(f"wrote {args.out} after {minutes:.0f} min; it solves {solved}, {found['truncated']:.0%} cut off")


if __name__ == "__main__":
    main()
