"""Shared by all tests: the embedded reasoner, and what makes a small trainer of it."""

from functools import partial
from pathlib import Path

import pytest
import torch

from attnrl import AttnRL, MethodConfig, Problem
from eval import grade
from fci import StepHook
from plumbing.grader import Grader
from plumbing.learner import Learner
from plumbing.logs import Clock, step_metrics
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Request
from plumbing.problems import load_problems
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine

torch.set_num_threads(1)  # the models are small, and tests may share the machine

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
SMALL = dict(  # of MethodConfig: steps that take a second
    batch_size=4,
    min_batch_size=2,
    max_batch_size=8,
    target_sequences=40,
    group_size=4,
    max_prompt_tokens=128,
    max_response_tokens=128,
    minibatch_sequences=16,
)
SHORT = (  # flags of train.py: runs that take seconds
    "--batch_size 4 --min_batch_size 2 --max_batch_size 6 --target_sequences 30 --group_size 3 "
    "--minibatch_sequences 16 --token_budget 0 --eval_problems 8 --eval_every 2 --save_every 1 "
    "--keep_checkpoints 9"
).split()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture
def tiny_model():
    """A fresh copy: tests may train it."""
    return load_model(str(TINY))


@pytest.fixture(scope="module")
def tokenizer():
    """One per test file, which may change it."""
    return load_tokenizer(str(TINY))


@pytest.fixture(scope="module")
def model():
    """One per test file; its tests must not train it."""
    return load_model(str(TINY))


class CountingEngine(TorchEngine):
    """Remembers the requests of every call."""

    def __init__(self, model, tokenizer, **settings):
        super().__init__(model, tokenizer, **settings)
        self.tokenizer = tokenizer
        self.calls: list[list[Request]] = []

    def generate(self, requests, *args, **settings):
        self.calls.append(requests)
        return super().generate(requests, *args, **settings)


class CopyEngine(TorchEngine):
    """Samples, like vLLM, from a copy of the model, which `load` brings up to date but for the tensors in
    `withheld`."""

    def __init__(self, tokenizer, withheld=()):
        super().__init__(load_model(str(TINY)), tokenizer)
        self.withheld = withheld

    def load(self, model):
        weights = {name: w for name, w in model.state_dict().items() if name not in self.withheld}
        self.model.load_state_dict(weights, strict=False)


def make_learner(model, reference=None, *, lr=1e-3, machine=None, **constants) -> Learner:
    """machine: fields of MachineConfig that are not the default. constants: of Learner."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return Learner(model, reference, optimizer, MachineConfig(**machine or {}), **constants)


def make_trainer(model, tokenizer, *, rule=grade, lr=1e-3, machine=None, **fields) -> AttnRL:
    """AttnRL on one process with a CountingEngine; torch's seed is set. fields: of MethodConfig."""
    cfg = MethodConfig(**SMALL | fields)
    reference = load_model(str(TINY)).requires_grad_(False) if cfg.kl_coef else None
    hook = partial(StepHook, delta=cfg.fci_delta, later=cfg.fci_later)
    constants = dict(temperature=cfg.temperature, make_hook=hook, grad_clip=cfg.grad_clip)
    learner = make_learner(model, reference, lr=lr, machine=machine, **constants)
    engine = CountingEngine(model, tokenizer, autocast=learner.autocast)
    torch.manual_seed(0)
    return AttnRL(cfg, engine, learner, Grader(rule), tokenizer.decode)


def make_problems(tokenizer, count=4, first=0) -> list[Problem]:
    """Training problems of the embedded reasoner, not yet sampled."""
    rows = load_problems(str(TINY / "train.jsonl"))[first : first + count]
    return [Problem(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])) for p in rows]


def measured_step(trainer, new) -> tuple[dict, list[Problem]]:
    """One step: (its metrics, the batch that it trained on)."""
    due, updates = trainer.step(new, Clock())
    return step_metrics(new, due, updates), due


def handed_over(trainer) -> list[tuple]:
    """What a whole step with eight problems hands to `Learner.update`: (sequences, loss, divisors) of each
    minibatch. The weights stay as they are."""
    calls: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.learner, "update", lambda *given: calls.append(given))
        trainer.step(make_problems(trainer.engine.tokenizer, 8), Clock())
        if trainer.cfg.off_policy:
            trainer.step([], Clock())
    assert len({a for sequences, *_ in calls for s in sequences for a in s.per_token["advantages"]}) > 4
    return calls


def n_updates(learner) -> int:
    """Optimiser steps that were taken so far, by the optimiser's own count."""
    return max((int(state["step"]) for state in learner.optimizer.state.values()), default=0)


def check_budgets(engine, prompt):
    """One call, a budget per request: a response is the full one cut there; the end-of-sequence token
    counts and is kept."""
    full = engine.generate([Request(prompt, 120)], temperature=0)[0].ids
    budgets = [1, 2, len(full) - 1, len(full), len(full) + 1, 120]
    responses = engine.generate([Request(prompt, b) for b in budgets], temperature=0)
    for budget, response in zip(budgets, responses, strict=True):
        assert response.ids == full[:budget] and len(response.logps) == len(response.ids)
        assert response.finish_reason == ("length" if budget < len(full) else "stop")
        assert (response.ids[-1] in engine.eos_ids) == (response.finish_reason == "stop")
    assert engine.generate([]) == []


def as_rank(monkeypatch, module, rank: int, n: int) -> None:
    """Let a module believe that it runs in process `rank` of n."""
    monkeypatch.setattr(module, "rank", lambda: rank)
    monkeypatch.setattr(module, "world_size", lambda: n)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that holds the code to an equation of the paper says so when it fails: forks change equations on
    purpose."""
    report = yield
    mark = item.get_closest_marker("holds_the_paper")
    if report.failed and mark and hasattr(report.longrepr, "addsection"):
        report.longrepr.addsection(
            f"this test holds the code to {mark.args[0]} of the paper",
            "A fork that changed it on purpose is expected to fail here: adapt the test, or delete it.",
        )
    return report
