"""How good is the gradient that a branching rule buys with its tokens?

    python train.py --algo grpo --save_every 17 --eval_every 17 --output_dir runs/policy
    python experiments/gradients.py                # base, halfway and end of that run
    python experiments/gradients.py --report       # the tables again, of what is in --out
    python experiments/gradients.py --report docs/lab/gradients.json --figure gradients.png      # or was kept

The policy is fixed. Every rule gets independent batches that cost equally many generated tokens on average,
and each batch gives one gradient of Eq. 1 at ratio 1, without the KL, scaled to unit length. Two numbers say
how good a rule's gradients are, without a learning rate or a minibatch size:

    consistency   mean cosine c between two batches; c / (1 - c) is signal to noise, and grows with the tokens
    direction     cosine of the mean gradient with that of an independent reference, plain policy gradient
                  (R - mean of 30 responses) over as many batches, corrected for the noise of both

Batch b of every rule uses the same problems and the same initial responses, so differences between rules are
paired. Intervals are jackknives over batches. The second metric divides each coordinate by the root mean
square of the reference's gradients, as Adam would.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import AttnRL, MethodConfig, Problem
from eval import grade
from experiments.gradient_report import KINDS, analyse, draw, report
from experiments.lab import oracle
from fci import StepHook, fci_of_response
from plumbing.grader import Grader
from plumbing.learner import Learner
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Sequence
from plumbing.problems import load_problems, stream
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from sampler import choose_responses, expansion
from tiny.make import step_kind
from tree import RULES, Leaf, branch_points, group_advantages, grow, tree_advantages

TINY = str(ROOT / "tiny/train.jsonl")
GROUP = 30  # responses of GRPO, as many as the leaves of a tree
POOL = 72  # problems of a batch index; a rule uses the first of them, as many as it can pay for
PILOT, REFERENCE = 10_000, 20_000  # seeds of batches that no rule is measured on
BINS = 10  # of a response, for the profile of a tree's advantages


LATER = {"fci": "sum", "fci_mean": "mean", "fci_window": "window"}  # values of --fci_later
TREES = [*LATER, "entropy", "sentence_entropy", "random", "earliest", "late", "oracle"]
GROUP_ADVANTAGE = ["fci", "random", "earliest"]  # the same trees, credited as GRPO does
# Explanations that have nothing to do with where attention points:
ONCE = "fci, each token once"  # a prefix that leaves share counts once, not for each of them
PROFILE = "GRPO 30, weighted by place"  # as early tokens of FCI's trees are
ARMS = [*TREES, *(f"{rule}, group advantage" for rule in GROUP_ADVANTAGE), "GRPO 6", "GRPO 30", ONCE, PROFILE]


class Bench:
    """A fixed policy, and what samples from it, grades, scores and differentiates. data: as in train.py."""

    def __init__(self, model: str, data: str = TINY, max_tokens: int = 128, autocast: str = "none"):
        RULES["oracle"] = oracle
        self.tokenizer, self.model = load_tokenizer(model), load_model(model)
        machine = MachineConfig(autocast=autocast, microbatch_tokens=2048, logit_chunk=512)
        self.learner = Learner(self.model, None, None, machine)
        self.engine = TorchEngine(self.model, self.tokenizer, autocast=self.learner.autocast)
        self.cfg = MethodConfig(max_response_tokens=max_tokens, max_prompt_tokens=max_tokens, kl_coef=0.0)
        self.rows = load_problems(data)

    def method(self, group_size: int) -> AttnRL:
        cfg = replace(self.cfg, group_size=group_size)
        return AttnRL(cfg, self.engine, self.learner, Grader(grade), self.tokenizer.decode)

    def sample(self, rows: list[dict], group_size: int, later: list[str] = ()) -> list[Problem]:
        """Problems with graded initial responses; FCI in each way of `later`, a dict (family, way) -> FCI."""
        method = self.method(group_size)
        new = [Problem(p["problem"], p["answers"], prompt_ids(self.tokenizer, p["problem"])) for p in rows]
        fresh = method.generate(new, [])
        rewards = method.grade(fresh)
        for (problem, rollout), reward in zip(fresh, rewards, strict=True):
            rollout.reward = float(reward)
            problem.rollouts.append(rollout)
        for way in later:
            self.learner.hook = partial(StepHook, later=way)
            for (_, rollout), score in zip(fresh, method.score(fresh), strict=True):
                rollout.entropies = score.entropies.tolist()
                fci = fci_of_response(score.fci, rollout.n_scored, len(rollout.steps))
                rollout.fci = (rollout.fci or {}) | {way: fci}
        return new

    def grow(self, pool: list[Problem], rule: str, seed: int) -> list[Problem]:
        """Copies of the problems, branched by the rule (Eq. 9 says how many responses) and continued."""
        cfg, method, rng = self.cfg, self.method(6), np.random.default_rng(seed)
        due = [replace(p, rollouts=list(p.rollouts), branches=[]) for p in pool]
        for problem in due:
            rewards = [r.reward for r in problem.rollouts]
            for family in choose_responses(rewards, expansion(rewards), np.random.default_rng(seed)):
                rollout = problem.rollouts[family]
                response = replace(rollout, fci=rollout.fci[LATER.get(rule, "sum")]).measured()
                gap = 0 if rule == "entropy" else cfg.min_branch_gap  # TreeRL knows none
                name = "fci" if rule in LATER else rule
                points = branch_points(name, response, cfg.n_branch_points, cfg.branch_quantile, gap, rng)
                problem.branches += [(family, point) for point in points]
        fresh = method.generate([], due)
        for (problem, rollout), reward in zip(fresh, method.grade(fresh) if fresh else [], strict=True):
            rollout.reward = float(reward)
            problem.rollouts.append(rollout)
        return due

    def gradient(self, problems: list[Problem], advantages: list[list[np.ndarray]]) -> np.ndarray:
        """Of Eq. 1 at ratio 1, fp32 and flat. advantages: per problem and rollout, (L,) each."""
        sequences = [
            Sequence(p.prompt_ids, r.ids, per_token={"advantages": a.tolist()})
            for p, of_problem in zip(problems, advantages)
            for r, a in zip(p.rollouts, of_problem, strict=True)
            if a.any()
        ]
        loss = lambda logps, ref_logps, advantages: (-advantages * (logps - logps.detach()).exp(), {})
        n_tokens = sum(len(s.response_ids) for s in sequences)
        self.model.zero_grad()
        self.learner.accumulate(sequences, loss, [n_tokens] * len(sequences))
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]).numpy()


def leaves_of(problem: Problem) -> list[Leaf]:
    return [Leaf(r.family, r.start, len(r.ids), r.reward) for r in problem.rollouts]


def cost(problems: list[Problem]) -> int:
    """Generated tokens."""
    return sum(len(r.ids) - r.start for p in problems for r in p.rollouts)


def credit(problems: list[Problem], of_leaves) -> list[list[np.ndarray]]:
    return [of_leaves(leaves_of(p)) for p in problems]


def once(leaves: list[Leaf]) -> list[np.ndarray]:
    """Eq. 3 over the number of leaves that share the token."""
    found = tree_advantages(leaves)
    for segment in grow(leaves).walk():
        for i in segment.leaves:
            found[i][segment.start : segment.end] /= len(segment.leaves)
    return found


def centred(leaves: list[Leaf]) -> list[np.ndarray]:
    """Plain policy gradient: R - mean."""
    mean = np.mean([leaf.reward for leaf in leaves])
    return [np.full(leaf.length, leaf.reward - mean, dtype=np.float32) for leaf in leaves]


def by_place(leaves: list[Leaf], profile: list[float]) -> list[np.ndarray]:
    """GRPO's advantages times a weight per tenth of the response."""
    bins = [np.arange(leaf.length) * BINS // leaf.length for leaf in leaves]
    return [a * np.array(profile, dtype=np.float32)[b] for a, b in zip(group_advantages(leaves), bins)]


def profile_of(problems: list[Problem]) -> list[float]:
    """Mean |A| of a tree's tokens per tenth of the response, over their mean."""
    sums, counts = np.zeros(BINS), np.zeros(BINS)
    for of_problem in credit(problems, tree_advantages):
        for a in of_problem:
            bins = np.arange(len(a)) * BINS // len(a)
            np.add.at(sums, bins, np.abs(a))
            np.add.at(counts, bins, 1)
    return (sums / counts / (sums.sum() / counts.sum())).tolist()


def about(problems: list[Problem]) -> dict:
    """Why a rule's gradients are as they are: where it branched, and what came of it."""
    kinds, places = Counter(), []
    for p in problems:
        for family, point in p.branches:
            rollout = p.rollouts[family]
            k = max(k for k, (start, _) in enumerate(rollout.steps) if start <= point)
            kinds[step_kind(rollout.step_texts[k])] += 1
            places.append(point / len(rollout.ids))
    useful = sum(a.any() for of_problem in credit(problems, tree_advantages) for a in of_problem)
    found = {f"points_{kind}": kinds[kind] for kind in KINDS} | {"points": len(places)}
    found |= {"place_sum": float(np.sum(places))}
    return found | {"tokens": cost(problems), "problems": len(problems), "useful": int(useful)}


# --- Measuring --------------------------------------------------------------------------------------------


def pilot(bench: Bench, tokens: int) -> dict:
    """How many problems cost `tokens`, by arm, and the profile of FCI's advantages."""
    rows = stream(bench.rows, PILOT, 0, 48)
    torch.manual_seed(PILOT)
    pool = bench.sample(rows, 6, list(LATER.values()))
    per_problem = {rule: bench.grow(pool, rule, PILOT) for rule in TREES}
    profile = profile_of(per_problem["fci"])
    costs = {rule: cost(problems) / len(rows) for rule, problems in per_problem.items()}
    costs |= {"GRPO 6": cost(pool) / len(rows), "GRPO 30": cost(pool) / len(rows) * GROUP / 6}
    counts = {arm: min(POOL, round(tokens / mean)) for arm, mean in costs.items()}
    return {"profile": profile, "problems": counts}


def measure(bench: Bench, setup: dict, b: int, out: Path) -> None:
    """All arms on batch b: a gradient each, and what they cost."""
    torch.manual_seed(b)
    n = setup["problems"]
    rows = stream(bench.rows, b, 0, POOL)
    pool = bench.sample(rows[: max(n.values())], 6, list(LATER.values()))
    found, gradients = {}, {}
    for rule in TREES:
        problems = bench.grow(pool[: n[rule]], rule, b)
        found[rule] = about(problems)
        gradients[rule] = bench.gradient(problems, credit(problems, tree_advantages))
        if rule in GROUP_ADVANTAGE:
            name = f"{rule}, group advantage"
            gradients[name] = bench.gradient(problems, credit(problems, group_advantages))
            found[name] = found[rule]
        if rule == "fci":
            gradients[ONCE], found[ONCE] = bench.gradient(problems, credit(problems, once)), found[rule]
    six = pool[: n["GRPO 6"]]
    more = bench.sample(rows[: n["GRPO 30"]], GROUP - 6)
    thirty = [replace(p, rollouts=p.rollouts + m.rollouts) for p, m in zip(pool, more)]
    for name, problems in (("GRPO 6", six), ("GRPO 30", thirty)):
        gradients[name] = bench.gradient(problems, credit(problems, group_advantages))
        useful = sum(len(p.rollouts) for p in problems if p.mixed())
        found[name] = {"tokens": cost(problems), "problems": len(problems), "useful": useful}
    weighted = credit(thirty, partial(by_place, profile=setup["profile"]))
    gradients[PROFILE], found[PROFILE] = bench.gradient(thirty, weighted), found["GRPO 30"]

    torch.manual_seed(REFERENCE + b)
    reference = bench.sample(stream(bench.rows, REFERENCE + b, 0, n["GRPO 30"]), GROUP)
    gradients["reference"] = bench.gradient(reference, credit(reference, centred))
    np.save(out / f"{b}.npy", np.stack([gradients[name] for name in [*ARMS, "reference"]]))
    (out / f"{b}.json").write_text(json.dumps(found))


def work(args: argparse.Namespace) -> None:
    """A share of the batches of one policy, in this process; those that are there are kept."""
    torch.set_num_threads(1)
    first, step = args.share
    out, bench = args.out / args.names[0], Bench(args.policies[0])
    setup = json.loads((out / "setup.json").read_text())
    for b in range(first, args.batches, step):
        if not (out / f"{b}.json").exists():
            measure(bench, setup, b, out)
            print(f"{args.names[0]}: batch {b}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    policies = ["tiny", "runs/policy/checkpoint-17", "runs/policy/checkpoint-34"]
    parser.add_argument("--policies", nargs="+", default=policies, help="directories of models")
    parser.add_argument("--names", nargs="+", default=["base", "halfway", "end"], help="of the policies")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=15_000, help="generated per batch, on average")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"))
    parser.add_argument(
        "--report", nargs="?", const="", help="measure nothing; of these results, or of --out"
    )
    parser.add_argument("--figure", type=Path, help="draw what a token is worth there")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # the program of the workers
    args = parser.parse_args()
    if args.share:
        return work(args)
    if args.report is None:
        for name, policy in zip(args.names, args.policies, strict=True):
            (args.out / name).mkdir(parents=True, exist_ok=True)
            if not (args.out / name / "setup.json").exists():
                torch.set_num_threads(1)
                (args.out / name / "setup.json").write_text(json.dumps(pilot(Bench(policy), args.tokens)))
            flags = f"--out {args.out} --batches {args.batches} --names {name} --share".split()
            command = [sys.executable, __file__, "--policies", policy, *flags]
            with ThreadPoolExecutor(args.jobs) as pool:
                shares = [[*command, str(i), str(args.jobs)] for i in range(args.jobs)]
                list(pool.map(partial(subprocess.run, check=True), shares))
    if args.report:
        found = json.loads(Path(args.report).read_text())
    else:
        measured = [args.out / name for name in args.names if any((args.out / name).glob("*.npy"))]
        found = {path.name: analyse(path, ARMS) for path in measured}
        (args.out / "results.json").write_text(json.dumps(found, indent=1))
    if args.figure:
        draw(found, [*TREES, "GRPO 30"], args.figure)
    print(report(found, [*TREES, "GRPO 6", "GRPO 30"]))


if __name__ == "__main__":
    main()
