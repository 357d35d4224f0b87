"""Kill a run at random moments, resume it, and compare with a run that was never stopped.

    python experiments/kill_resume.py

Twenty runs of five steps on tiny/ with the plain engine, each stopped once: SIGKILL and SIGTERM in turn, at
moments drawn evenly from the time between a run's config.json and its end. The same command then finishes it.
Everything that a run leaves behind must be the same bit for bit: weights, optimiser, random states and
pending batch of its last checkpoint, metrics (times apart) and rollouts. Exits with 1 if anything differs.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5
FLAGS = (
    f"--steps {STEPS} --token_budget 0 --batch_size 4 --min_batch_size 2 --max_batch_size 6 --group_size 3 "
    "--target_sequences 30 --minibatch_sequences 16 --eval_problems 8 --eval_every 3 --save_every 1 "
    "--keep_checkpoints 2 --threads 1 --engine torch"
).split()


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, "--output_dir", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """Wait for a run that nobody stops; what it printed."""
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"a run that nobody stopped failed: {output.strip().splitlines()[-1]}")
    return output


def wait_for_config(out: Path, process: subprocess.Popen) -> float:
    """The moment at which a run's directory is there, on the clock of time.monotonic."""
    while not (out / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists of tensors and plain values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def leavings(out: Path) -> dict:
    """All that a finished run leaves behind, by the name under which a difference is reported."""
    last = out / f"checkpoint-{STEPS}"
    saved = torch.load(last / "optimizer.pt", weights_only=True)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": (last / "model.safetensors").read_bytes(),
        "optimiser": saved["optimizer"],
        "random state": saved["rng"],
        "state": json.loads((last / "state.json").read_text()),
        "metrics": [{k: v for k, v in r.items() if not k.startswith("time_")} for r in records],
        "rollouts": (out / "rollouts.jsonl").read_text(),
    }


def kill_and_resume(i: int, number: signal.Signals, moment: float, out: Path, whole: dict) -> str:
    """Run, stop with a signal so many seconds after config.json, resume; a row of the table."""
    while True:
        shutil.rmtree(out, ignore_errors=True)
        process = start(out)
        time.sleep(max(0.0, wait_for_config(out, process) + moment - time.monotonic()))
        if process.poll() is None:
            break
        moment *= 0.8  # the machine was quicker than for the run that nobody stopped: too late
    process.send_signal(number)
    log = out / "metrics.jsonl"
    logged = len(log.read_bytes().splitlines()) if log.exists() else 0
    left = process.communicate()[0].strip().splitlines()
    by_itself = process.returncode == 1 and left[-1].startswith("stopped: SIGTERM")
    ended = "by itself" if by_itself else f"code {process.returncode}"
    writing = "yes" if (out / "checkpoint.partial").exists() else "no"
    said = finish(start(out))
    resumed = [line.rpartition("/")[2] for line in said.splitlines() if line.startswith("resuming from")]
    resumed = resumed or ["nothing, it was complete" if "is complete" in said else "the start"]
    differ = [name for name, value in leavings(out).items() if not equal(value, whole[name])]
    row = f"{i} | {number.name} | {moment:.1f} | {logged} | {writing} | {ended} | {resumed[0]}"
    return f"| {row} | {'DIFFERENT: ' + ', '.join(differ) if differ else 'same bits'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/kill_resume"))
    args = parser.parse_args()

    shutil.rmtree(args.out, ignore_errors=True)
    controls = [args.out / f"whole-{i}" for i in range(args.jobs)]  # at once, to be as slow as the runs below
    processes = [start(out) for out in controls]
    began = [wait_for_config(out, process) for out, process in zip(controls, processes)][-1]
    for process in processes:
        finish(process)
    duration = time.monotonic() - began
    whole, *others = map(leavings, controls)
    alike = "ended with the same bits" if all(equal(whole, other) for other in others) else "DIFFER"
    print(f"a run takes {duration:.1f} s from config.json to its end; ", end="")
    print(f"{args.jobs} that nobody stopped {alike}\n", flush=True)
    print("| | signal | after (s) | lines logged | writing a checkpoint | ended | resumed from | result |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    moments = np.random.default_rng(args.seed).uniform(0, duration, args.moments)
    jobs = [
        (i, (signal.SIGKILL, signal.SIGTERM)[i % 2], float(m), args.out / str(i), whole)
        for i, m in enumerate(moments, 1)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = []
        for row in pool.map(lambda job: kill_and_resume(*job), jobs):
            rows.append(row)
            print(row, flush=True)
    same = sum("same bits" in row for row in rows)
    print(f"\n{same} of {args.moments} resumed runs ended with the same bits")
    sys.exit(same < args.moments)


if __name__ == "__main__":
    main()
