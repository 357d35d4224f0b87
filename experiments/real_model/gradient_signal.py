"""How much of the gradient of one step is signal?

    python experiments/real_model/gradient_signal.py models/smollm2 models/problems/train.jsonl

The policy is fixed. Each batch, of other problems and as large as a step of GRPO, gives one gradient, of
Eq. 1 at ratio 1 without the KL. If a gradient is a signal plus independent noise, the mean cosine c of two of
them is the signal's share of its power: the mean of (1 - c) / c gradients has as much signal as noise. The
same for the embedded reasoner is in docs/lab.md. The error is a jackknife over the batches.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from experiments.gradient_report import consistency, jackknife
from experiments.gradients import Bench, cost, credit
from plumbing.problems import stream
from tree import group_advantages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("train_data", help="as in train.py")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=12, help="problems per batch")
    parser.add_argument("--group_size", type=int, default=6, help="responses per problem")
    parser.add_argument("--max_response_tokens", type=int, default=192)
    parser.add_argument("--autocast", default="auto", help="as in train.py")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.batches < 3:
        parser.error("a jackknife needs --batches >= 3")
    torch.set_num_threads(args.threads)
    bench = Bench(args.model, args.train_data, args.max_response_tokens, args.autocast)
    gradients, tokens, mixed, rewards = [], [], [], []
    for b in trange(args.batches, unit="batch"):
        torch.manual_seed(b)
        rows = stream(bench.rows, 0, b * args.batch_size, (b + 1) * args.batch_size)
        problems = bench.sample(rows, args.group_size)
        mixed.append(sum(problem.mixed() for problem in problems))
        if not mixed[-1]:
            sys.exit(f"batch {b} has no gradient: each problem has only right or only wrong responses")
        gradient = bench.gradient(problems, credit(problems, group_advantages))
        gradients.append(gradient / np.linalg.norm(gradient))
        tokens.append(cost(problems))
        rewards += [r.reward for problem in problems for r in problem.rollouts]
    gram = np.array([[g @ h for h in gradients] for g in gradients])
    c, error = jackknife(lambda kept: consistency(gram[np.ix_(kept, kept)]), len(gradients))
    sampled = f"{np.mean(tokens):,.0f} tokens per batch, {np.mean(rewards):.1%} of the responses right"
    print(f"{sampled}, {np.mean(mixed):.1f} of {args.batch_size} problems mixed")
    print(f"mean cosine of two batches: {c:.4f} ± {error:.4f} (standard error, {args.batches} batches)")


if __name__ == "__main__":
    main()
