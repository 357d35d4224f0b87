"""Whole runs of train.py, in this process or in one of their own, and what they leave behind."""

import contextlib
import json
import resource
import signal
import sys

import pytest
import torch
from conftest import ROOT, SHORT

import train as train_module
from plumbing import engines, learner

FLAGS = [*SHORT, "--threads", "1"]


def run(*flags):
    """train.py in this process."""
    train_module.train(*train_module.parse_config([*FLAGS, *map(str, flags)]))


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *FLAGS, *map(str, flags)]


def words_of_main(monkeypatch, *flags):
    """What train.py says to the shell as it ends early, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *map(str, flags)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            train_module.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def refuse_to_load(*args):
    raise AssertionError("the model was loaded before the input was checked")


def forbid_loading(monkeypatch):
    """Neither the learner nor an engine may load a model."""
    for module in (learner, engines):
        monkeypatch.setattr(module, "load_model", refuse_to_load)


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: a write fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def metrics(out):
    """What was logged, without the times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time_")} for r in records]


def everything(checkpoint):
    """Weights, optimiser, random state and pending batch of a checkpoint, comparable with ==."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = [t.tolist() for state in saved["optimizer"]["state"].values() for t in state.values()]
    random_state = saved["rng"][0]["cpu"].tolist()
    state = json.loads((checkpoint / "state.json").read_text())
    return (checkpoint / "model.safetensors").read_bytes(), moments, random_state, state
