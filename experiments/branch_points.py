"""Where do branch points fall? The share on pivotal, local and filler steps, by rule.

    python experiments/branch_points.py                                      # the embedded reasoner
    python experiments/branch_points.py --model runs/attnrl-tiny-0/checkpoint-42   # after training

Samples one response per problem at temperature 1, scores it once, and picks two branch points by each rule of
tree.py. The kinds of step are known because the problems are synthetic (tiny/make.py). `earliest` is the
control that any rule which likes early steps has to beat.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import AttnRL, MethodConfig, Problem
from eval import grade
from plumbing.grader import Grader
from plumbing.learner import Learner
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.problems import load_problems
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from tiny.make import step_kind
from train import ALGORITHMS
from tree import RULES, branch_points

KINDS = ["pivotal", "local", "filler", "wait", "answer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--data", default=str(ROOT / "tiny/test.jsonl"))
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    cfg = MethodConfig(group_size=2, max_response_tokens=128, kl_coef=0.0)
    learner = Learner(model, None, None, MachineConfig(autocast="none"))
    engine = TorchEngine(model, tokenizer)
    method = AttnRL(cfg, engine, learner, Grader(grade), tokenizer.decode, args.seed)
    problems = [
        Problem(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"]))
        for p in load_problems(args.data)[: args.problems]
    ]
    fresh = method.generate(problems, [])[:: cfg.group_size]  # one response per problem
    method.record(fresh, method.grade(fresh), method.score(fresh))

    shares = {rule: Counter() for rule in ["all steps", *RULES]}
    correlations = []
    for _, rollout in fresh:
        response = rollout.measured()
        kinds = [step_kind(text) for text in response.step_texts]
        shares["all steps"].update(kinds)
        for rule in RULES:
            # TreeRL's rule as TreeRL uses it: without a gap
            gap = ALGORITHMS["treerl"]["min_branch_gap"] if rule == "entropy" else cfg.min_branch_gap
            points = branch_points(rule, response, 2, cfg.branch_quantile, gap, method.rng)
            steps = [np.searchsorted(response.starts, p, side="right") - 1 for p in points]
            shares[rule].update(kinds[k] for k in steps)
        scored = response.fci[response.fci > 0]
        if len(scored) > 2:
            correlations.append(np.corrcoef(scored, np.arange(len(scored)))[0, 1])

    n_steps = sum(shares["all steps"].values())
    print(f"{args.model}: {len(fresh)} responses, {n_steps / len(fresh):.1f} steps each")
    print(f"{'':16s}" + "".join(f"{kind:>10s}" for kind in KINDS))
    for rule, counts in shares.items():
        print(f"{rule:16s}" + "".join(f"{counts[kind] / sum(counts.values()):10.1%}" for kind in KINDS))
    print(f"correlation of FCI with the step's position, mean over responses: {np.mean(correlations):+.2f}")


if __name__ == "__main__":
    main()
