"""Where do branch points fall? The share on pivotal, local and filler steps, by rule.

    python experiments/branch_points.py                                      # the embedded reasoner
    python experiments/branch_points.py --model runs/attnrl-tiny-0/checkpoint-42   # after training

Samples one response a problem at temperature 1, scores it once, and picks two branch points by each rule. The kinds of step
are known because the problems are synthetic (tiny/make.py). `earliest` is the control that any rule which likes early steps has to beat.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import AttnRL, Group, MethodConfig, initial_jobs  # noqa: E402
from eval import grade, load_problems  # noqa: E402
from sampler import TorchEngine, load_model, load_tokenizer, prompt_ids  # noqa: E402
from tiny.make import step_kind  # noqa: E402
from tree import branch_points  # noqa: E402

KINDS = ["pivotal", "local", "filler", "wait", "answer"]
RULES = ["fci", "entropy", "random", "earliest"]


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
    method = AttnRL(cfg, model, None, tokenizer, TorchEngine(model, tokenizer), None, grade, args.seed)
    groups = [Group(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])) for p in load_problems(args.data)[: args.problems]]
    fresh = method.generate(initial_jobs(groups, cfg))[:: cfg.group_size]
    scored = method.score(fresh, with_fci=True)

    shares = {rule: Counter() for rule in ["all steps", *RULES]}
    correlations = []
    for (group, rollout), (entropies, steps) in zip(fresh, scored):
        starts = [start for start, _ in steps]
        kinds = [step_kind("".join(map(method.text_of, rollout.ids[a:b]))) for a, b in steps]
        shares["all steps"].update(kinds)
        for rule in RULES:
            points = branch_points(rule, starts, np.array(rollout.fci), entropies, 2, cfg.branch_quantile, cfg.min_branch_gap, method.rng)
            shares[rule].update(kinds[np.searchsorted(starts, p, side="right") - 1] for p in points)
        scores = np.array([y for y in rollout.fci if y > 0])
        if len(scores) > 2:
            correlations.append(np.corrcoef(scores, np.arange(len(scores)))[0, 1])

    print(f"{args.model}: {len(fresh)} responses, {sum(shares['all steps'].values()) / len(fresh):.1f} steps each")
    print(f"{'':10s}" + "".join(f"{kind:>10s}" for kind in KINDS))
    for rule, counts in shares.items():
        print(f"{rule:10s}" + "".join(f"{counts[kind] / sum(counts.values()):10.1%}" for kind in KINDS))
    print(f"correlation of FCI with the step's position, mean over responses: {np.mean(correlations):+.2f}")


if __name__ == "__main__":
    main()
