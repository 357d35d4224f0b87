"""A training command from the shell: torchrun's processes, SIGTERM, and errors in one sentence."""

import contextlib
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from plumbing.agreement import EngineMismatch
from plumbing.checkpoints import checkpoints
from plumbing.processes import join_processes, rank, world_size
from plumbing.settings import InputError, RunStopped


def run_command(parse_config, train) -> None:
    """Run train(*parse_config(flags), stop); stop() tells of SIGTERM, a second one kills the process."""
    if torch.distributed.is_torchelastic_launched():
        join_processes()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: (told.set(), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    try:
        run, method = parse_config(sys.argv[1:])
        train(run, method, told.is_set)
    except (InputError, EngineMismatch) as error:
        last_words(f"error: {error}")
    except (RuntimeError, OSError, KeyboardInterrupt) as error:  # at work; anything else is a bug
        out = Path(run.output_dir)
        reason = " ".join(str(error).split()) or "Ctrl-C"
        if not isinstance(error, RunStopped | KeyboardInterrupt):
            reason = f"{type(error).__name__}: {reason}, see {out}/traceback.txt"
            with contextlib.suppress(OSError):
                (out / "traceback.txt").write_text(traceback.format_exc())
        going_on = f"resumes from {found[-1]}" if (found := checkpoints(out)) else "starts the run again"
        print(file=sys.stderr)  # below the progress bar
        last_words(f"stopped: {reason}; the same command {going_on}")
    if world_size() > 1:
        torch.distributed.barrier()  # a process that ends early may make another abort at its exit
        torch.distributed.destroy_process_group()


def last_words(message: str) -> None:
    """Exit with a sentence. If all processes fail alike, rank 0 says it, and its end ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank() > 0:
        time.sleep(5)
    sys.exit(message)
