"""The examples in docstrings are true."""

import doctest
import importlib

import pytest
from conftest import ROOT

METHOD = ("fci", "tree", "sampler", "attnrl", "train", "eval")
PLUMBING = [f"plumbing.{path.stem}" for path in sorted((ROOT / "plumbing").glob("*.py"))]
WITH_EXAMPLES = {"fci", "tree", "sampler", "eval"} | {
    f"plumbing.{name}" for name in ("agreement", "answers", "learner", "processes", "report")
}


def test_the_modules_are_found():
    assert WITH_EXAMPLES <= {*METHOD, *PLUMBING}


@pytest.mark.parametrize("name", [*METHOD, *PLUMBING])
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0 and result.attempted > 0 or name not in WITH_EXAMPLES
