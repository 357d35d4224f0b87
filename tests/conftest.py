"""Shared by all tests: the embedded reasoner, loaded once."""

from pathlib import Path

import pytest
import torch

from sampler import Request, load_model, load_tokenizer

torch.set_num_threads(1)  # the models are small, and tests may share the machine

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture
def tiny_model():
    """A fresh copy: tests may train it."""
    return load_model(str(TINY))


def check_budgets(engine, prompt):
    """One call, a budget a request: a response is the full one cut there; the end-of-sequence token counts and is kept."""
    full = engine.generate([Request(prompt, 120)], temperature=0)[0].ids
    budgets = [1, 2, len(full) - 1, len(full), len(full) + 1, 120]
    responses = engine.generate([Request(prompt, b) for b in budgets], temperature=0)
    for budget, response in zip(budgets, responses, strict=True):
        assert response.ids == full[:budget] and len(response.logps) == len(response.ids)
        assert response.finish_reason == ("length" if budget < len(full) else "stop")
        assert (response.ids[-1] in engine.eos_ids) == (response.finish_reason == "stop")
    assert engine.generate([]) == []
