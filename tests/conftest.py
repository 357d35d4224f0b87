"""Shared by all tests: the embedded reasoner, loaded once."""

from pathlib import Path

import pytest
import torch

from sampler import load_model, load_tokenizer

torch.set_num_threads(1)  # the models are small, and tests may share the machine

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture
def tiny_model():
    """A fresh copy: tests may train it."""
    return load_model(str(TINY))
