"""The lines of metrics.jsonl for a tracker that somebody has installed; no other module knows of any."""

import atexit
import importlib
import json
from collections.abc import Callable
from pathlib import Path

from plumbing.processes import rank


class Tracker:
    """Hands numbers to "trackio", "wandb" or "tensorboard" on rank 0, or to "none". One that fails is given up
    with a sentence, and never stops a run."""

    def __init__(self, name: str, out: Path):
        self.name, self.sink = name, None
        if name != "none" and rank() == 0:
            self.attempt(self.start, out)

    def start(self, out: Path) -> None:
        if self.name == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(out / self.name))
            self.sink = lambda line: [writer.add_scalar(key, x, line["step"]) for key, x in line.items()]
            atexit.register(writer.close)
        else:
            module = importlib.import_module(self.name)
            config = json.loads((out / "config.json").read_text())
            module.init(project="attnrl", name=out.name, config=config)
            self.sink = module.log
            atexit.register(module.finish)

    def add(self, record: dict) -> None:
        """A line of metrics.jsonl; lists are left out."""
        if self.sink:
            self.attempt(self.sink, {key: x for key, x in record.items() if isinstance(x, int | float)})

    def attempt(self, action: Callable, *args) -> None:
        try:
            action(*args)
        except Exception as error:  # the network, a login, a version: each tracker has its own kinds
            print(f"track={self.name} gets no more lines: {type(error).__name__}: {error}")
            self.sink = None
