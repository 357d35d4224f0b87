"""One training step of AttnRL, and its loss: the method composed from fci.py, tree.py and sampler.py.

    new problems ──────┐
                       ├─ 1 generate ─ 2 grade ─ 3 score ─┬─ new: 4 plan ──────────────────▶ the next step
    batch that is due ─┘  (one call)                      └─ due: 5 advantages ─ 6 update ─ 7 resize

One-step off-policy (Fig. 5): a step trains on the batch that is due and, in the same generation call,
samples the initial responses of the next one. With `off_policy=False` the seven are run twice per step:
with the new problems and nothing due, then with nothing new and the same problems due.

    J = 1/N sum over tokens of min(r A, clip(r, 1 - low, 1 + high) A) - kl_coef KL(policy || ref)      (Eq. 1)

N counts the response tokens of a minibatch, r is the ratio to the policy that sampled the token (by the
log-probs of scoring, not the engine's), A the advantage of tree.py.

Three machines do the heavy work. A step needs no more of them than this, so a few lines can replace each
(train.py's checkpoints, checks and page ask for more). They get and return lists of plumbing/nouns.py:

    engine    generate(requests, temperature, top_p) -> responses; load(model), sleep(), close()
    learner   score(sequences, with_entropy) -> scores; update(sequences, loss, divisors) -> report; .model
    grader    grade(texts, answers) -> list of bool

What is not here: critic, reward model, entropy bonus, length penalty, learning-rate schedule.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from fci import count_scored_steps, fci_of_response, split_steps, step_ids_of
from plumbing.agreement import check_gap
from plumbing.nouns import Request, Score, Sequence
from plumbing.settings import check_signs, refuse_if
from sampler import AdaptiveSampler, choose_responses, expansion
from tree import RULES, Leaf, Measured, branch_points, group_advantages, tree_advantages


@dataclass
class MethodConfig:
    """The method's constants. Defaults are the paper's for the 1.5B model and responses of 8k tokens."""

    # sampling
    batch_size: int = HfArg(default=64, help="problems per step; where adaptive_batch starts")
    group_size: int = HfArg(default=6, help="G, initial responses per problem")
    max_prompt_tokens: int = HfArg(default=1024, help="longest prompt")
    max_response_tokens: int = HfArg(default=8192, help="budget of a response, its prefix included")
    temperature: float = HfArg(default=1.0, help="of sampling, and of the log-probs trained on")
    top_p: float = HfArg(default=1.0, help="nucleus of sampling; 1: the whole distribution; no top-k")
    off_policy: bool = HfArg(default=True, help="one-step off-policy: one generation call per step, not two")
    # branching
    branching: str = HfArg(default="fci", help=f"where to branch (Eq. 7): {', '.join(RULES)} or none")
    n_branch_points: int = HfArg(default=2, help="branch points per response (N of Eq. 7)")
    n_continuations: int = HfArg(default=2, help="continuations per branch point (the paper's T)")
    branch_quantile: float = HfArg(default=0.2, help="rho, share of steps that are candidates")
    min_branch_gap: int = HfArg(default=512, help="tokens between branch points, per 8192 tokens of response")
    fci_delta: int = HfArg(default=4, help="Delta of Eq. 5, steps")
    fci_later: Literal["sum", "mean", "window"] = HfArg(default="sum", help="what FCI takes of later steps")
    # adaptive sampling
    expansion: Literal["adaptive", "uniform"] = HfArg(default="adaptive", help="Eq. 9, or branch all")
    fci_filter: Literal["easy", "all", "drop_easy", "none"] = HfArg(default="easy", help="of Eq. 8")
    drop_zero_advantage: bool = HfArg(default=True, help="leave out problems that are all right or all wrong")
    adaptive_batch: bool = HfArg(default=True, help="resize the batch to the target (Eq. 10)")
    target_sequences: int = HfArg(default=1920, help="B', sequences with non-zero advantage wanted per step")
    batch_decay: float = HfArg(default=0.9, help="lambda of Eq. 10")
    min_batch_size: int = HfArg(default=16, help="smallest batch of Eq. 10, problems")
    max_batch_size: int = HfArg(default=256, help="largest batch of Eq. 10, problems")
    # loss
    advantage: Literal["tree", "group"] = HfArg(default="tree", help="Eq. 3, or GRPO's (R - mean) / std")
    minibatch_sequences: int = HfArg(default=192, help="sequences per optimiser step, in whole problems")
    clip_low: float = HfArg(default=0.2, help="the ratio is clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.28, help="the ratio is clipped above 1 + clip_high")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the initial model; 0: no reference model")
    grad_clip: float = HfArg(default=1.0, help="largest gradient norm")
    # an engine may have a copy of the weights, and kernels of its own
    old_logps: Literal["recompute", "engine"] = HfArg(
        default="recompute", help="engine: A is also weighted by P(trainer) / P(engine) of the sampled token"
    )
    max_importance: float = HfArg(default=2.0, help="largest weight of old_logps=engine")
    max_engine_gap: float = HfArg(
        default=0.2, help="mean |log-prob of trainer - engine| per token, nats, above which a run stops"
    )

    def check(self) -> None:
        """Raises ValueError in one sentence where fields contradict each other."""
        check_signs(self, set("min_branch_gap fci_delta batch_decay clip_low clip_high kl_coef".split()))
        rules, sizes = [*RULES, "none"], (self.min_batch_size, self.batch_size, self.max_batch_size)
        shares = self.branch_quantile, self.batch_decay, self.top_p
        refuse_if(self.branching not in rules, f"branching must be one of {rules}, got {self.branching!r}")
        alone = "one response has nothing to be compared with"
        refuse_if(self.group_size < 2, f"group_size must be at least 2, got {self.group_size}: {alone}")
        refuse_if(max(shares) > 1, f"branch_quantile, batch_decay and top_p must not exceed 1, got {shares}")
        cannot = f"top_p={self.top_p} makes P(engine) zero on some tokens, which no weight corrects"
        remedy = "use top_p=1, or old_logps=recompute"
        refuse_if(self.old_logps == "engine" and self.top_p < 1, f"old_logps=engine: {cannot}; {remedy}")
        needed = "fci_filter chooses which problems to branch, so branching=none needs fci_filter=none"
        refuse_if(self.branching == "none" and self.fci_filter != "none", needed)
        order = f"min_batch_size <= batch_size <= max_batch_size must hold, got {sizes}"
        refuse_if(self.adaptive_batch and list(sizes) != sorted(sizes), order)


# --- What is trained on -----------------------------------------------------------------------------------


@dataclass
class Rollout:
    """A response of L tokens and T steps: an initial one, or the prefix of one and a continuation."""

    family: int  # the initial response it descends from
    start: int = 0  # first token of its own; 0 for an initial response
    ids: list[int] = field(default_factory=list)  # (L,), prefix included
    engine_logps: list[float] = field(default_factory=list)  # (L,), as the engine reported them
    logps: list[float] = field(default_factory=list)  # (L,), under the policies that sampled the tokens
    finished: bool = False  # ended by itself, within its budget
    reward: float = 0.0  # correctness, 0 or 1
    advantages: list[float] = field(default_factory=list)  # (L,)
    steps: list[tuple[int, int]] = field(default_factory=list)  # (T,) token spans
    step_texts: list[str] = field(default_factory=list)  # (T,)
    n_scored: int = 0  # leading steps before the one with the last `</think>`
    entropies: list[float] = field(default_factory=list)  # (L,), nats; of initial responses only
    fci: list[float] = field(default_factory=list)  # (T,); of initial responses, in runs that branch

    def prefix(self, end: int) -> "Rollout":
        """A continuation before it is sampled: the first `end` tokens, with their log-probs."""
        return Rollout(self.family, end, self.ids[:end], self.engine_logps[:end], self.logps[:end])

    def set_steps(self, token_texts: list[str]) -> None:
        self.steps = split_steps(token_texts)
        self.step_texts = ["".join(token_texts[start:end]) for start, end in self.steps]
        self.n_scored = count_scored_steps(token_texts, self.steps)

    def gaps(self) -> np.ndarray:
        """Log-prob of the trainer - log-prob of the engine, of the tokens of its own."""
        return np.array(self.logps[self.start :]) - np.array(self.engine_logps[self.start :])

    def measured(self) -> Measured:
        """What branching rules see of an initial response."""
        starts = [start for start, _ in self.steps]
        fci, entropies = np.array(self.fci), np.array(self.entropies)
        return Measured(self.step_texts, starts, fci, entropies, self.reward, self.n_scored)

    def for_loss(self) -> dict[str, list[float]]:
        """Arguments of `policy_loss` by name, (L,) each."""
        return {"old_logps": self.logps, "engine_logps": self.engine_logps, "advantages": self.advantages}


@dataclass
class Problem:
    """A problem on its way through a step."""

    text: str
    answers: list[str]
    prompt_ids: list[int]
    rollouts: list[Rollout] = field(default_factory=list)  # the initial ones first
    fci: float | None = None  # mean over the initial responses of the mean FCI of their steps, zeros too
    kept: bool = True  # passed the filter of Eq. 8; others stay, unbranched
    branches: list[tuple[int, int]] = field(default_factory=list)  # where to sample again: (family, token)

    def initial(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.start == 0]

    def mixed(self) -> bool:
        """Neither all right nor all wrong: only such problems have non-zero advantages."""
        return len({r.reward for r in self.rollouts}) > 1


# --- Loss (Eq. 1) -----------------------------------------------------------------------------------------


def policy_loss(logps, ref_logps, old_logps, engine_logps, advantages, cfg: MethodConfig):
    """Loss of each token (Eq. 1, negated); the learner sums it over the minibatch and divides by N.

    All tensors (n,), fp32, of the response tokens of one forward pass: logps, ref_logps (None if kl_coef is
    0) and what `Rollout.for_loss` names. Also returns "clipped" and "kl", to be logged.
    """
    if cfg.old_logps == "engine":  # truncated importance weights; as they are > 0, weighting A is enough
        advantages = advantages * (old_logps - engine_logps).exp().clamp(max=cfg.max_importance)
    ratio = (logps - old_logps).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantages
    loss = -torch.minimum(gain, clipped_gain)  # Eq. 1, first term
    kl = torch.zeros_like(loss)
    if cfg.kl_coef:
        log_ratio = ref_logps - logps
        kl = log_ratio.exp() - log_ratio - 1  # k3 estimator of KL(policy || reference)
        loss = loss + cfg.kl_coef * kl
    return loss, {"clipped": clipped_gain < gain, "kl": kl.detach()}


def minibatches(problems: list[Problem], size: int) -> list[list[Problem]]:
    """Whole problems in round(sequences / size) parts, at least one, of nearly equally many sequences."""
    n_sequences = np.array([len(problem.rollouts) for problem in problems])
    count = max(1, round(n_sequences.sum() / size))
    middles = n_sequences.cumsum() - n_sequences / 2  # a problem belongs to the part that its middle is in
    parts = (middles * count / n_sequences.sum()).astype(int)
    return [[p for p, part in zip(problems, parts) if part == i] for i in np.unique(parts)]


# --- The step ---------------------------------------------------------------------------------------------


class AttnRL:
    """Trains `learner.model`, one step per call. decode(token ids) -> text."""

    def __init__(self, cfg: MethodConfig, engine, learner, grader, decode, seed: int = 0):
        cfg.check()
        self.cfg, self.engine, self.learner, self.grader, self.decode = cfg, engine, learner, grader, decode
        self.token_text = cache(lambda token_id: decode([token_id]))
        self.sampler = AdaptiveSampler(cfg.batch_size)
        self.rng = np.random.default_rng(seed)
        self.pending: list[Problem] = []  # sampled and planned, not yet branched

    def step(self, problems: list[Problem], clock) -> tuple[list[Problem], list[dict[str, float]]]:
        """Sample `problems`; train on the batch due, and return it with the learner's report of each update.

        Off-policy, due is what the last call sampled: at first nothing. `with clock(name)` times a part.
        """
        cfg, updates = self.cfg, []
        batch, self.pending = (self.pending, problems) if cfg.off_policy else (problems, [])
        passes = [(problems, batch)] if cfg.off_policy else [(problems, []), ([], batch)]
        for new, due in passes:
            with clock("generate"):  # 1. initial responses of the new problems, continuations of those due
                fresh = self.generate(new, due)
            with clock("grade"):  # 2. right or wrong
                rewards = self.grade(fresh)
            with clock("score"):  # 3. log-probs; of initial responses entropies and FCI (Eq. 4-6)
                scores = self.score(fresh)
            self.record(fresh, rewards, scores)
            for problem in new:  # 4. where the next step will branch (Eq. 7-9)
                self.plan(problem)
            trained = [problem for problem in due if problem.mixed() or not cfg.drop_zero_advantage]
            for problem in trained:  # 5. the tree (Eq. 2, 3)
                self.set_advantages(problem)
            if trained:  # 6. the loss (Eq. 1)
                self.engine.sleep()
                with clock("update"):
                    updates += self.update(trained)
                with clock("push"):
                    self.engine.load(self.learner.model)
            if due and cfg.adaptive_batch:  # 7. the size of the next batch (Eq. 10)
                n_valid = sum(any(r.advantages) for problem in due for r in problem.rollouts)
                bounds = cfg.min_batch_size, cfg.max_batch_size
                self.sampler.resize(cfg.target_sequences, n_valid, cfg.batch_decay, *bounds)
        return batch, updates

    def generate(self, new: list[Problem], due: list[Problem]) -> list[tuple[Problem, Rollout]]:
        """One call: initial responses of the new problems, continuations from branch points of those due."""
        cfg = self.cfg
        fresh = [(problem, Rollout(family)) for problem in new for family in range(cfg.group_size)]
        for problem in due:
            for family, point in problem.branches:
                prefix = problem.rollouts[family].prefix
                fresh += [(problem, prefix(point)) for _ in range(cfg.n_continuations)]
        requests = [Request(p.prompt_ids + r.ids, cfg.max_response_tokens - len(r.ids)) for p, r in fresh]
        if not requests:
            return []
        responses = self.engine.generate(requests, temperature=cfg.temperature, top_p=cfg.top_p)
        for (_, rollout), response in zip(fresh, responses, strict=True):
            rollout.ids += response.ids
            rollout.engine_logps += response.logps
            rollout.finished = response.finish_reason == "stop"
            rollout.set_steps([self.token_text(token_id) for token_id in rollout.ids])
        return fresh

    def grade(self, fresh: list[tuple[Problem, Rollout]]) -> list[bool]:
        """Whether each response is right."""
        texts = [self.decode(rollout.ids) for _, rollout in fresh]
        return self.grader.grade(texts, [problem.answers for problem, _ in fresh])

    def score(self, fresh: list[tuple[Problem, Rollout]]) -> list[Score]:
        """Log-probs of new tokens; of initial responses, which come first, also entropies and FCI."""
        branches = self.cfg.branching != "none"
        step_ids = lambda p, r: step_ids_of(len(p.prompt_ids), r.steps) if branches else None
        initial = [Sequence(p.prompt_ids, r.ids, step_ids(p, r)) for p, r in fresh if r.start == 0]
        own = lambda p, r: Sequence(p.prompt_ids + r.ids[: r.start], r.ids[r.start :])
        continuations = [own(p, r) for p, r in fresh if r.start > 0]
        return self.learner.score(initial, with_entropy=True) + self.learner.score(continuations)

    def record(self, fresh: list[tuple[Problem, Rollout]], rewards: list[bool], scores: list[Score]) -> None:
        """Write results into the rollouts, and add those to their problems. Raises EngineMismatch."""
        for (problem, rollout), reward, score in zip(fresh, rewards, scores, strict=True):
            rollout.reward = float(reward)
            rollout.logps += score.logps.tolist()  # those of a prefix stay: of the policy that sampled it
            if score.entropies is not None:
                rollout.entropies = score.entropies.tolist()
            if score.fci is not None:
                rollout.fci = fci_of_response(score.fci, rollout.n_scored, len(rollout.steps))
            problem.rollouts.append(rollout)
        # Under top-p the engine's log-probs are those of the nucleus: larger, by at most -log(top_p).
        bound = self.cfg.max_engine_gap - math.log(self.cfg.top_p)
        check_gap([rollout.gaps() for _, rollout in fresh], bound, "on the tokens sampled in this step")

    def plan(self, problem: Problem) -> None:
        """Set where the problem will be branched: whether at all, in which responses, at which tokens."""
        cfg, rewards = self.cfg, [r.reward for r in problem.rollouts]
        if cfg.branching == "none":
            return
        problem.fci = float(np.mean([np.mean(r.fci) for r in problem.rollouts]))
        problem.kept = self.sampler.keep(problem.fci, rewards, cfg.fci_filter)  # Eq. 8
        count = expansion(rewards) if cfg.expansion == "adaptive" else len(rewards)  # Eq. 9
        for family in choose_responses(rewards, count if problem.kept else 0, self.rng):
            response = problem.rollouts[family].measured()
            n, quantile, gap = cfg.n_branch_points, cfg.branch_quantile, cfg.min_branch_gap
            points = branch_points(cfg.branching, response, n, quantile, gap, self.rng)  # Eq. 7
            problem.branches += [(family, point) for point in points]

    def set_advantages(self, problem: Problem) -> None:
        """Set the advantage of each token of the problem's rollouts."""
        leaves = [Leaf(r.family, r.start, len(r.ids), r.reward) for r in problem.rollouts]
        advantages_of = tree_advantages if self.cfg.advantage == "tree" else group_advantages
        for rollout, advantages in zip(problem.rollouts, advantages_of(leaves)):
            rollout.advantages = advantages.tolist()

    def update(self, trained: list[Problem]) -> list[dict[str, float]]:
        """One optimiser step per minibatch of problems, in random order; the learner's report of each."""
        reports, shuffled = [], [trained[i] for i in self.rng.permutation(len(trained))]
        for minibatch in minibatches(shuffled, self.cfg.minibatch_sequences):
            pairs = [(problem, rollout) for problem in minibatch for rollout in problem.rollouts]
            sequences = [Sequence(p.prompt_ids, r.ids, per_token=r.for_loss()) for p, r in pairs]
            N = sum(len(r.ids) for _, r in pairs)
            divisors = [N for _ in sequences]  # Eq. 1: the loss of each sequence's tokens is divided by N
            reports.append(self.learner.update(sequences, partial(policy_loss, cfg=self.cfg), divisors))
        return reports

    def state(self) -> dict:
        """All of the method that a checkpoint has to keep, as plain JSON."""
        state = {"sampler": vars(self.sampler), "planner_rng": self.rng.bit_generator.state}
        return state | {"pending": [asdict(problem) for problem in self.pending]}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` returned."""
        vars(self.sampler).update(state["sampler"])
        self.rng.bit_generator.state = state["planner_rng"]
        rollouts = lambda p: [Rollout(**r) for r in p["rollouts"]]
        self.pending = [Problem(**p | {"rollouts": rollouts(p)}) for p in state["pending"]]
