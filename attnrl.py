"""One training step of AttnRL, and its loss: the method composed from fci.py, tree.py and sampler.py.

    prompts of batch m+1 ─┐
                          ├─ generate (one call) ─ grade ─┬─ initial responses m+1 ─ score (logps, entropies, FCI) ─ plan m+1
    plan of batch m ──────┘                               └─ continuations m ─ tree ─ advantages ─ drop zeros ─ update ─ push

One-step off-policy (Fig. 5): a step trains on batch m and, in the same generation call, samples the initial responses of batch
m+1. With `off_policy=False` batch m is sampled, planned and branched inside its own step, which takes two calls.

    J = 1/N sum over tokens of min(r A, clip(r, 1 - low, 1 + high) A) - kl_coef * KL(policy || reference)              (Eq. 1)

N counts the response tokens of a minibatch, r is the ratio to the policy that sampled the token, A the advantage of tree.py.
That policy is the trainer's, by log-probabilities recomputed in scoring; what the engine's own ones are for: `old_logps`, `mismatch`.

What is not here: critic, reward model, entropy bonus, length penalty, learning-rate schedule. The authors train several minibatches per
step on data laid out by verl; here a minibatch is a list of problems and its gradient does not depend on how it is packed.
"""

import contextlib
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from fci import FCI, PADDING, check_projection, collate, count_scored_steps, fci_scores, split_steps, step_ids_of, token_logps
from sampler import (
    AdaptiveSampler,
    Request,
    check_gap,
    choose_responses,
    expansion,
    mismatch,
    rank,
    shared_out,
    shares,
    union,
    whole,
    world_size,
)
from tree import Leaf, branch_points, group_advantages, tree_advantages


@dataclass
class MethodConfig:
    """The method's constants; defaults are the paper's (SPEC: 1.5B, 8k responses)."""

    # sampling
    batch_size: int = HfArg(default=64, help="prompts a step; where adaptive_batch starts")
    group_size: int = HfArg(default=6, help="G, initial responses a prompt")
    max_prompt_tokens: int = HfArg(default=1024, help="longest prompt; longer ones are refused before training")
    max_response_tokens: int = HfArg(default=8192, help="budget of a response, its prefix included")
    temperature: float = HfArg(default=1.0, help="of sampling, and of the log-probabilities trained on")
    top_p: float = HfArg(default=1.0, help="nucleus of sampling; 1 is the whole distribution, as in the paper; there is no top-k")
    off_policy: bool = HfArg(default=True, help="one-step off-policy: one generation call a step instead of two")
    # branching
    branching: Literal["fci", "entropy", "random", "earliest", "none"] = HfArg(default="fci", help="where to branch (Eq. 7)")
    n_branch_points: int = HfArg(default=2, help="N, branch points a response")
    n_continuations: int = HfArg(default=2, help="T, continuations a branch point")
    branch_quantile: float = HfArg(default=0.2, help="rho, share of steps that are candidates")
    min_branch_gap: int = HfArg(default=512, help="tokens between branch points in a response of 8192 tokens; in proportion in others")
    fci_delta: int = HfArg(default=4, help="Delta of Eq. 5, steps")
    # adaptive sampling
    expansion: Literal["adaptive", "uniform"] = HfArg(default="adaptive", help="branch more responses of harder problems (Eq. 9), or all")
    fci_filter: Literal["easy", "all", "none"] = HfArg(
        default="easy", help="which problems must exceed the mean FCI to be branched (Eq. 8)"
    )
    adaptive_batch: bool = HfArg(default=True, help="resize the batch to the target (Eq. 10)")
    target_sequences: int = HfArg(default=1920, help="B', training sequences with non-zero advantage wanted a step")
    batch_decay: float = HfArg(default=0.9, help="lambda of Eq. 10")
    min_batch_size: int = HfArg(default=16, help="bounds of Eq. 10, prompts")
    max_batch_size: int = HfArg(default=256, help="bounds of Eq. 10, prompts")
    # loss
    advantage: Literal["tree", "group"] = HfArg(default="tree", help="Eq. 3, or GRPO's (R - mean) / std")
    minibatch_prompts: int = HfArg(default=32, help="problems with non-zero advantage an optimiser step")
    clip_low: float = HfArg(default=0.2, help="the ratio is clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.28, help="and above 1 + clip_high")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the frozen initial model; 0 drops the reference model")
    grad_clip: float = HfArg(default=1.0, help="largest gradient norm")
    # the engine: it has a copy of the weights and kernels of its own
    old_logps: Literal["recompute", "engine"] = HfArg(
        default="recompute", help="the sampling policy: the trainer's log-probs, or the engine's by truncated importance weights"
    )
    max_importance: float = HfArg(default=2.0, help="where the weights of old_logps=engine are cut off")
    # in bf16 rounding alone makes 0.01 to 0.05 nats; a tensor of tiny/ that did not arrive makes 0.9 and more (verify_sync)
    max_engine_gap: float = HfArg(default=0.2, help="mean |log-prob of trainer - engine| a token, nats, above which the run stops")
    # memory knobs: they never change a result
    microbatch_tokens: int = HfArg(default=16384, help="rows x longest sequence of one forward pass")
    logit_chunk: int = HfArg(default=1024, help="tokens whose logits exist at once")

    def check(self) -> None:
        """Raises ValueError in one sentence where fields contradict each other."""
        check_signs(self, may_be_zero={"min_branch_gap", "fci_delta", "batch_decay", "clip_low", "clip_high", "kl_coef"})
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}: one response has nothing to be compared with")
        if max(self.branch_quantile, self.batch_decay, self.top_p) > 1:
            raise ValueError("branch_quantile, batch_decay and top_p must not exceed 1")
        if self.old_logps == "engine" and self.top_p < 1:
            raise ValueError(
                f"old_logps=engine weights tokens by P(trainer) / P(engine), but top_p={self.top_p} makes P(engine) zero on tokens that "
                "the trainer allows, which no weight corrects: use top_p=1, or old_logps=recompute"
            )
        if self.branching == "none" and self.fci_filter != "none":
            raise ValueError("fci_filter chooses which problems to branch, so branching=none needs fci_filter=none")
        if self.adaptive_batch and not self.min_batch_size <= self.batch_size <= self.max_batch_size:
            bounds = f"[{self.min_batch_size}, {self.max_batch_size}]"
            raise ValueError(f"batch_size {self.batch_size} must lie in [min_batch_size, max_batch_size] = {bounds}")


def check_signs(config, may_be_zero: set[str]) -> None:
    """Raises ValueError if a number of a config is negative, infinite, or zero without being in `may_be_zero`."""
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in may_be_zero):
                raise ValueError(f"{name} must be {'at least' if name in may_be_zero else 'above'} 0, got {value}")


# --- What is trained on -----------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """A response of one problem: an initial one, or the prefix of one and a continuation."""

    family: int  # the initial response it descends from
    start: int  # first token of its own; 0 for an initial response
    ids: list[int]  # response tokens, prefix included
    engine_logps: list[float]  # of all tokens, as the engine reported them
    finished: bool  # ended by itself, within its budget
    reward: float = 0.0
    logps: list[float] = field(default_factory=list)  # of all tokens, under the policies that sampled them
    fci: list[float] = field(default_factory=list)  # of its steps; initial responses only
    advantages: list[float] = field(default_factory=list)  # of all tokens


@dataclass
class Group:
    """A problem on its way through a step: its rollouts (the initial ones first) and where it will be branched."""

    problem: str
    answers: list[str]
    prompt_ids: list[int]
    rollouts: list[Rollout] = field(default_factory=list)
    fci: float | None = None  # mean over responses of the mean over their steps
    kept: bool = True  # passed the filter of Eq. 8
    branches: list[tuple[int, int]] = field(default_factory=list)  # (family, branch point)

    def initial_rewards(self) -> list[float]:
        return [r.reward for r in self.rollouts if r.start == 0]

    def leaves(self) -> list[Leaf]:
        return [Leaf(r.family, r.start, len(r.ids), r.reward) for r in self.rollouts]

    def mixed(self) -> bool:
        """Neither all right nor all wrong: only such problems have non-zero advantages."""
        return len({r.reward for r in self.rollouts}) > 1


# --- Loss (Eq. 1) -----------------------------------------------------------------------------------------------------


def policy_loss(logps, old_logps, ref_logps, advantages, clip_low: float, clip_high: float, kl_coef: float):
    """Loss of every token (Eq. 1, negated): sum it over a minibatch and divide by the minibatch's number of tokens.

    All arguments (N,), fp32. ref_logps may be None when kl_coef is 0. Returns (loss (N,), clipped (N,) bool, kl (N,)).
    """
    ratio = (logps - old_logps).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(gain, clipped_gain)  # Eq. 1, first term
    kl = torch.zeros_like(loss)
    if kl_coef:
        r = ref_logps - logps
        kl = r.exp() - r - 1  # k3 estimator of KL(policy || reference)
        loss = loss + kl_coef * kl
    return loss, clipped_gain < gain, kl.detach()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def pack(sequences: list[tuple[list[int], list[int]]], budget: int) -> Iterator[list[int]]:
    """Indices of (prompt, response) pairs in batches of similar length: rows x longest <= budget, one row at least."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]) - len(sequences[i][1]))
    while order:
        rows = max(1, budget // (len(sequences[order[0]][0]) + len(sequences[order[0]][1])))
        yield order[:rows]
        order = order[rows:]


def microbatches(sequences: list[tuple[list[int], list[int]]], budget: int) -> Iterator[tuple[list[int], bool]]:
    """(indices of a batch, True) for what this process runs of (prompt, response) pairs, all of them if it is the only one.

    Processes gather sharded weights together, so all make equally many passes: (indices, False) is one that counts for nothing.
    """
    costs = [len(prompt) + len(response) for prompt, response in sequences]
    batches = [[[own[i] for i in rows] for rows in pack([sequences[i] for i in own], budget)] for own in shares(costs, world_size())]
    missing = max(map(len, batches)) - len(batches[rank()])
    yield from ((rows, True) for rows in batches[rank()])
    yield from (([costs.index(min(costs))], False) for _ in range(missing))


def timed(method):
    """Adds the wall-clock seconds of a method to `self.seconds`, under time_NAME."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.seconds[f"time_{method.__name__}"] += time.perf_counter() - started

    return wrapper


# --- The step ---------------------------------------------------------------------------------------------------------


class AttnRL:
    """Trains `model` in place, a step a call.

    reward_fn(response text, answers) -> bool. reference: frozen copy of the initial model, or None when kl_coef is 0.
    autocast: dtype of forward passes, or None for that of the weights.
    """

    def __init__(
        self, cfg: MethodConfig, model, reference, tokenizer, engine, optimizer,
        reward_fn: Callable[[str, list[str]], bool], seed: int = 0, autocast: torch.dtype | None = None,
    ):  # fmt: skip
        cfg.check()
        check_projection(model)
        self.cfg, self.model, self.reference, self.tokenizer = cfg, model, reference, tokenizer
        self.engine, self.optimizer, self.reward_fn = engine, optimizer, reward_fn
        self.sampler = AdaptiveSampler(cfg.batch_size)
        self.rng = np.random.default_rng(seed)
        self.pending: list[Group] = []  # sampled and planned, not yet branched
        self.autocast_dtype = autocast
        self.text_of = functools.cache(lambda token_id: tokenizer.decode([token_id]))
        self.seconds: dict[str, float] = defaultdict(float)  # of the current step
        self.gaps: list[np.ndarray] = []  # of the current step, a response each: log-prob here - log-prob of the engine
        self.totals = {"problems": 0, "updates": 0, "tokens": 0}

    def step(self, groups: list[Group]) -> tuple[dict, list[Group]]:
        """Sample `groups`, train on the batch that is due, return (metrics, that batch).

        Off-policy the batch due is that of the last call: empty in the first one, and the last call gets no groups.
        """
        cfg, started = self.cfg, time.perf_counter()
        self.seconds.clear()
        self.gaps.clear()
        if cfg.off_policy:
            batch, self.pending = self.pending, groups
            self.grade(self.generate([*initial_jobs(groups, cfg), *branch_jobs(batch, cfg)]))
            sampling = self.plan(groups)
        else:
            batch = groups
            self.grade(self.generate(initial_jobs(groups, cfg)))
            sampling = self.plan(groups)
            self.grade(self.generate(branch_jobs(groups, cfg)))
        self.score([(g, r) for g in batch for r in g.rollouts if r.start > 0])
        drift = mismatch(self.gaps)
        if drift:  # under top-p the engine's log-probs are renormalised: larger by up to -log(top_p)
            check_gap(drift["engine_gap_mean"], cfg.max_engine_gap - math.log(cfg.top_p), "on the tokens sampled in this step")

        useful, training = self.assign_advantages(batch), {}
        if useful:
            self.engine.sleep()  # with engine_sleep its GPU memory is the update's; `push` wakes it
            training = self.update(useful)
            self.push()
        trained = batch_metrics(batch, useful)
        if cfg.adaptive_batch and batch:
            n_useful = trained["valid_sequences"]
            self.sampler.resize(cfg.target_sequences, n_useful, cfg.batch_decay, cfg.min_batch_size, cfg.max_batch_size)

        self.totals["problems"] += len(groups)
        metrics = {"next_batch_size": self.sampler.batch_size} | drift | sampling | trained | training
        metrics |= {**self.seconds, "time_step": time.perf_counter() - started}
        return metrics | {f"total_{name}": count for name, count in self.totals.items()}, batch

    # -- 1. generate and grade

    @timed
    def generate(self, jobs: list[tuple[Group, int, int]]) -> list[tuple[Group, Rollout]]:
        """One generation call. A job is (group, family, start): sample on from token `start` of that initial response."""
        if not jobs:
            return []
        prefixes = [group.rollouts[family].ids[:start] if start else [] for group, family, start in jobs]
        requests = [Request(g.prompt_ids + prefix, self.cfg.max_response_tokens - len(prefix)) for (g, _, _), prefix in zip(jobs, prefixes)]
        with self.autocast():
            responses = self.engine.generate(requests, temperature=self.cfg.temperature, top_p=self.cfg.top_p)
        fresh = []
        for (group, family, start), prefix, response in zip(jobs, prefixes, responses):
            logps = (group.rollouts[family].engine_logps[:start] if start else []) + response.logps
            rollout = Rollout(family, start, prefix + response.ids, logps, response.finish_reason == "stop")
            group.rollouts.append(rollout)
            fresh.append((group, rollout))
            self.totals["tokens"] += len(response.ids)
        return fresh

    @timed
    def grade(self, fresh: list[tuple[Group, Rollout]]) -> None:
        def rewards(own: list[tuple[Group, Rollout]]) -> list[float]:
            return [float(self.reward_fn(self.tokenizer.decode(rollout.ids), group.answers)) for group, rollout in own]

        for (_, rollout), reward in zip(fresh, shared_out(fresh, [1] * len(fresh), rewards)):
            rollout.reward = reward

    # -- 2. score and plan

    @timed
    @torch.no_grad()
    def score(self, fresh: list[tuple[Group, Rollout]], with_fci: bool = False) -> list[tuple[np.ndarray, list]]:
        """Set `logps` (and `fci`) of rollouts under the current policy; return their (entropies, steps). One forward pass."""
        self.model.eval()
        sequences = [(g.prompt_ids, r.ids) for g, r in fresh]
        measured, results = {}, [None] * len(fresh)
        for rows, _ in microbatches(sequences, self.cfg.microbatch_tokens):
            texts = [[self.text_of(i) for i in fresh[row][1].ids] for row in rows]
            steps = [split_steps(t) for t in texts]
            step_ids = [step_ids_of(len(sequences[row][0]), s) for row, s in zip(rows, steps)]
            fci = FCI(collate(step_ids, PADDING, self.model.device), self.cfg.fci_delta) if with_fci else None
            with self.autocast():
                logps, entropies = token_logps(
                    self.model, [sequences[row] for row in rows], self.cfg.temperature, self.cfg.logit_chunk, fci, with_entropy=True
                )
            lengths = [len(sequences[row][1]) for row in rows]
            for i, (row, lp, h) in enumerate(zip(rows, logps.cpu().split(lengths), entropies.cpu().split(lengths))):
                scores = fci_scores(fci.values[i], count_scored_steps(texts[i], steps[i]), len(steps[i])).tolist() if fci else []
                measured[row] = lp.numpy(), h.numpy(), scores, steps[i]
        for row, (logps, entropies, scores, steps) in union(measured).items():
            group, rollout = fresh[row]
            prefix = group.rollouts[rollout.family].logps[: rollout.start]  # of the policy that sampled it
            rollout.logps, rollout.fci = prefix + logps[rollout.start :].tolist(), scores
            self.gaps.append(logps[rollout.start :] - np.array(rollout.engine_logps[rollout.start :]))
            results[row] = entropies, steps
        return results

    def plan(self, groups: list[Group]) -> dict:
        """Score the initial responses and decide where to branch; returns metrics of the sampling."""
        if not groups:
            return {}
        cfg = self.cfg
        fresh = [(g, r) for g in groups for r in g.rollouts]
        scored = self.score(fresh, with_fci=cfg.branching == "fci" or cfg.fci_filter != "none")
        of_rollout = {id(r): s for (_, r), s in zip(fresh, scored)}
        for group in groups:
            rewards = group.initial_rewards()
            if group.rollouts[0].fci:
                group.fci = float(np.mean([np.mean(r.fci) for r in group.rollouts]))
                group.kept = self.sampler.keep(group.fci, rewards, cfg.fci_filter)
            if not group.kept or cfg.branching == "none":
                continue
            count = expansion(rewards) if cfg.expansion == "adaptive" else len(rewards)
            for family in choose_responses(rewards, count, self.rng):
                entropies, steps = of_rollout[id(group.rollouts[family])]
                fci = np.array(group.rollouts[family].fci)
                starts, n, gap = [start for start, _ in steps], cfg.n_branch_points, cfg.min_branch_gap
                points = branch_points(cfg.branching, starts, fci, entropies, n, cfg.branch_quantile, gap, self.rng)
                group.branches += [(family, p) for p in points]
        entropies = np.concatenate([h for h, _ in scored])
        return {
            "reward": float(np.mean([r.reward for _, r in fresh])),
            "entropy": float(entropies.mean()),
            "response_tokens": float(np.mean([len(r.ids) for _, r in fresh])),
            "truncated": float(np.mean([not r.finished for _, r in fresh])),
            "batch_size": len(groups),
            "filtered": float(np.mean([not g.kept for g in groups])),
        }

    # -- 3. advantages

    def assign_advantages(self, batch: list[Group]) -> list[Group]:
        """Set every token's advantage (Eq. 3); return the problems that have any."""
        useful = [g for g in batch if g.mixed()]
        for group in useful:
            advantages = (tree_advantages if self.cfg.advantage == "tree" else group_advantages)(group.leaves())
            for rollout, a in zip(group.rollouts, advantages):
                rollout.advantages = a.tolist()
        return useful

    # -- 4. update

    @timed
    def update(self, groups: list[Group]) -> dict:
        """One pass over the problems in minibatches; returns metrics averaged over tokens."""
        totals: dict[str, float] = defaultdict(float)
        norms, n_total = [], 0
        order = self.rng.permutation(len(groups))
        for first in range(0, len(order), self.cfg.minibatch_prompts):
            rollouts = [(groups[i], r) for i in order[first : first + self.cfg.minibatch_prompts] for r in groups[i].rollouts]
            n_tokens = sum(len(r.ids) for _, r in rollouts)
            for sums in union({rank(): self.accumulate(rollouts, n_tokens)}).values():
                for name, value in sums.items():
                    totals[name] += value
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip, error_if_nonfinite=True)
            norms.append(whole(norm).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.totals["updates"] += 1
            n_total += n_tokens
        return {name: value / n_total for name, value in totals.items()} | ({"grad_norm": float(np.mean(norms))} if norms else {})

    def accumulate(self, rollouts: list[tuple[Group, Rollout]], n_tokens: int) -> dict[str, float]:
        """Add the minibatch's gradient, microbatch by microbatch: the sum over tokens divided by `n_tokens` once, so packing
        changes nothing. Returns sums over tokens."""
        cfg, sums = self.cfg, defaultdict(float)
        self.model.train()
        sequences = [(g.prompt_ids, r.ids) for g, r in rollouts]
        for rows, counts in microbatches(sequences, cfg.microbatch_tokens):
            batch = [sequences[i] for i in rows]
            old_logps, engine_logps, advantages = (
                torch.tensor([x for i in rows for x in getattr(rollouts[i][1], name)], device=self.model.device)
                for name in ("logps", "engine_logps", "advantages")
            )
            if cfg.old_logps == "engine":  # truncated importance weight w; as w > 0, w * min(rA, clip(r)A) = min(r wA, clip(r) wA)
                advantages = advantages * (old_logps - engine_logps).exp().clamp(max=cfg.max_importance)
            with self.autocast():
                ref_logps = None
                if cfg.kl_coef:
                    with torch.no_grad():
                        ref_logps, _ = token_logps(self.reference, batch, cfg.temperature, cfg.logit_chunk)
                logps, _ = token_logps(self.model, batch, cfg.temperature, cfg.logit_chunk)
            losses = policy_loss(logps, old_logps, ref_logps, advantages, cfg.clip_low, cfg.clip_high, cfg.kl_coef)
            loss, clipped, kl = (counts * x for x in losses)
            (loss.sum() * world_size() / n_tokens).backward()  # FSDP averages gradients over processes
            sums["loss"] += loss.sum().item()
            sums["clipped"] += clipped.sum().item()
            sums["kl"] += kl.sum().item()
        return sums

    @timed
    def push(self) -> None:
        """Give the engine the new weights."""
        self.engine.load(self.model)

    def autocast(self):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.autocast_dtype)


def initial_jobs(groups: list[Group], cfg: MethodConfig) -> list[tuple[Group, int, int]]:
    return [(g, family, 0) for g in groups for family in range(cfg.group_size)]


def branch_jobs(groups: list[Group], cfg: MethodConfig) -> list[tuple[Group, int, int]]:
    return [(g, family, point) for g in groups for family, point in g.branches for _ in range(cfg.n_continuations)]


def batch_metrics(batch: list[Group], useful: list[Group]) -> dict:
    """What the paper's Figures 4, 6 and 7 plot, of the batch trained on; shares in [0, 1]."""
    if not batch:
        return {}
    rollouts = [r for g in batch for r in g.rollouts]
    valid = [r for r in rollouts if any(r.advantages)]
    mc = [[r.reward for r in g.rollouts if r.start > 0] for g in batch if g.branches]
    uniform = [g for g in batch if len(set(g.initial_rewards())) == 1]
    share = lambda flags: float(np.mean(flags)) if flags else None  # noqa: E731
    return {
        "mc_solve_all": share([min(rewards) == 1 for rewards in mc]),
        "mc_solve_none": share([max(rewards) == 0 for rewards in mc]),
        "mc_valid": share([min(rewards) < max(rewards) for rewards in mc]),
        "rescued": share([g.mixed() for g in uniform]),  # invalid after initial sampling, valid after MC
        "valid_problems": len(useful),
        "valid_sequences": len(valid),
        "sequences": len(rollouts),
        "valid_tokens": sum(len(r.ids) for r in valid) / sum(len(r.ids) for r in rollouts),
        "problem_fci": [g.fci for g in batch],
        "problem_initial_reward": [float(np.mean(g.initial_rewards())) for g in batch],
        "problem_valid": [g.mixed() for g in batch],
    }
