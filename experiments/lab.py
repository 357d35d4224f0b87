"""The branching lab: learning curves of many rows and seeds, how sure their differences are, and why.

    python experiments/lab.py                                             # everything: hours
    python experiments/lab.py --worlds default --rows FCI random --seeds 3
    python experiments/lab.py --report --figure lab.png                   # of what is complete in --out
    python experiments/lab.py --report summaries.jsonl --figure lab.png   # of a file that was kept

A row is a line of ROWS, flags of train.py; all rows have the same seeds, budget of generated tokens and 400
held-out problems. A run is a process of its own on one thread; `--jobs` of them go on at a time, seed by
seed over all rows. It ends with Pass@4 of its last checkpoint and summary.json in its directory. A run with
a summary is not repeated, and one that was stopped goes on from its last checkpoint. Summaries that are kept
with the project (`--known`) count as well.

The worlds: `default` is tiny/; `few` has 64 of its training problems and the same held-out ones; `hard` has
problems that the base model solves in under 15 % of 32 samples. tiny/make.py writes the last two.

`oracle` is a rule that only this file has: it branches at the pivotal steps of tiny's world, known from
their text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import evaluate
from experiments.lab_report import KINDS, report
from plumbing.checkpoints import checkpoints, provenance, write_whole
from plumbing.models import load_model, load_tokenizer
from plumbing.problems import load_problems
from plumbing.torch_engine import TorchEngine
from tiny.make import step_kind
from train import parse_config, train
from tree import RULES, Measured

ROWS = {  # all but the first three are AttnRL, by default with a branching rule
    "GRPO 6": "--algo grpo --group_size 6 --batch_size 30",
    "GRPO 30": "--algo grpo",  # as many responses as a tree has leaves
    "TreeRL": "--algo treerl",
    "FCI": "--branching fci",
    "FCI mean": "--branching fci --fci_later mean",
    "FCI window": "--branching fci --fci_later window",
    "entropy": "--branching entropy --min_branch_gap 0",  # as TreeRL has it
    "sentence entropy": "--branching sentence_entropy",
    "random": "--branching random",
    "earliest": "--branching earliest",
    "late": "--branching late",
    "oracle": "--branching oracle",
    "group advantage": "--advantage group",
    "no adaptive sampling": "--expansion uniform --fci_filter none --adaptive_batch false",
}
FOUR = ["GRPO 30", "random", "FCI", "oracle"]
MAKE = {  # flags of tiny/make.py
    "few": "--n_train 64",
    "hard": "--n_train 1000 --n_test 400 --hardest 0.15 --samples 32",
}
WORLDS = {"default": list(ROWS), "few": FOUR, "hard": FOUR}  # and the rows of each
KEPT = {"summary.json", "metrics.jsonl", "rollouts.jsonl", "config.json"}
SAVE_EVERY = 5  # steps


def oracle(response: Measured, quantile: float, rng) -> list[int]:
    """Starts of the pivotal steps, the earliest first."""
    kinds = [step_kind(text) for text in response.step_texts]
    return [start for start, kind in zip(response.starts, kinds) if kind == "pivotal"]


# --- One run ----------------------------------------------------------------------------------------------


def flags_of(row: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Flags of train.py, apart from those that name directories."""
    every = ["--eval_every", "1" if row == "no adaptive sampling" else "2", "--save_every", str(SAVE_EVERY)]
    budget = ["--token_budget", str(args.token_budget), "--eval_problems", str(args.problems)]
    return [*ROWS[row].split(), "--seed", str(seed), *every, *budget]


def directory(world: str, row: str, seed: int, out: Path) -> Path:
    return out / world / f"{row.replace(' ', '_')}-{seed}"


def run(world: str, row: str, seed: int, args: argparse.Namespace) -> None:
    """Train, evaluate and write summary.json, in this process. What is there already is not done again."""
    RULES["oracle"] = oracle
    out, flags = directory(world, row, seed, args.out), flags_of(row, seed, args)
    places = ["--output_dir", str(out), "--threads", "1", "--preset", "tiny"]
    if world in MAKE:
        data = args.out / "worlds" / world
        places += ["--train_data", str(data / "train.jsonl"), "--test_data", str(data / "test.jsonl")]
    config, method = parse_config([*flags, *places])
    train(config, method)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checkpoint = str(checkpoints(out)[-1])
    tokenizer = load_tokenizer(checkpoint)
    problems = load_problems(config.test_data[0])[: config.eval_problems]
    how = dict(samples=4, temperature=1.0, budget=lambda n_prompt: method.max_response_tokens)
    found = evaluate(TorchEngine(load_model(checkpoint), tokenizer), tokenizer, problems, **how)
    summary = dict(world=world, row=row, seed=seed, token_budget=args.token_budget, flags=" ".join(flags))
    summary |= {"commit": provenance()["commit"]}
    summary |= {"pass@4": found["pass@k"], "pass@1_of_4": found["pass@1"]} | summarised(out)
    write_whole(out / "summary.json", json.dumps(summary))
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarised(out: Path) -> dict:
    """The learning curve, and what may explain it, of a run's metrics.jsonl and rollouts.jsonl."""
    records, trees = lines(out / "metrics.jsonl"), lines(out / "rollouts.jsonl")
    tested = [r for r in records if "test_accuracy" in r]
    curve = {name: [r.get(f"total_{name}", 0) for r in tested] for name in ("tokens", "updates")}
    last, useful = records[-1], sum(r.get("valid_sequences", 0) for r in records)
    mixed = [r["mc_valid"] for r in records if r.get("mc_valid") is not None]
    totals = dict(problems=last["total_problems"], steps=last["step"])
    totals["seconds_per_step"] = round(float(np.median([r["time_step"] for r in records[1:]])), 2)
    totals["tokens_per_useful"] = round(last["total_tokens"] / max(useful, 1), 1)
    totals["mixed"] = round(float(np.mean(mixed)), 4) if mixed else None
    return curve | {"accuracy": [round(r["test_accuracy"], 4) for r in tested]} | totals | points(trees)


def points(trees: list[dict]) -> dict:
    """Of the branch points of the trees logged: how many on each kind of step, and their mean position, the
    share of the response's steps that come before it."""
    counts, positions = dict.fromkeys(KINDS, 0), []
    for tree in trees:
        for family, token in tree["branches"]:
            response = next(r for r in tree["rollouts"] if r["family"] == family and r["start"] == 0)
            k = int(np.searchsorted(response["step_starts"], token, side="right")) - 1
            counts[step_kind(response["steps"][k])] += 1
            positions.append(k / len(response["steps"]))
    return {"points": counts, "position": round(float(np.mean(positions)), 4) if positions else None}


# --- All runs ---------------------------------------------------------------------------------------------


def python(*command: object) -> None:
    """A process of its own on one thread; RuntimeError with its last words if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    full = [sys.executable, *map(str, command)]
    finished = subprocess.run(full, capture_output=True, text=True, env=environment)
    if finished.returncode:
        words = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        raise RuntimeError(words[-1])


def known(path: Path) -> list[dict]:
    """Summaries kept of earlier runs."""
    return lines(path) if path.exists() else []


def complete(world: str, row: str, seed: int, args: argparse.Namespace) -> bool:
    """Whether the run has a summary. RuntimeError if that is one of other flags."""
    path, flags = directory(world, row, seed, args.out) / "summary.json", " ".join(flags_of(row, seed, args))
    if any((s["world"], s["row"], s["flags"]) == (world, row, flags) for s in known(args.known)):
        return True
    if not path.exists():
        return False
    found = json.loads(path.read_text())["flags"]
    if found != flags:
        raise RuntimeError(f"{path} is of a run with {found}, not {flags}: choose another --out")
    return True


def run_apart(world: str, row: str, seed: int, args: argparse.Namespace) -> str | None:
    """`run` in a process of its own, unless it is complete; what went wrong, if anything."""
    same = ["--out", args.out, "--token_budget", args.token_budget, "--problems", args.problems]
    try:
        if not complete(world, row, seed, args):
            python(args.program.resolve(), "--one", world, row, seed, *same)
            summary = json.loads((directory(world, row, seed, args.out) / "summary.json").read_text())
            before, *_, after = summary["accuracy"]
            print(f"{world}, {row}, seed {seed}: {before:.1%} -> {after:.1%}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        print(f"{world}, {row}, seed {seed} failed: {error}", file=sys.stderr, flush=True)
        return f"{world}, {row}, seed {seed}: {error}"
    return None


def make_world(world: str, out: Path) -> None:
    """tiny/make.py, unless the world is there."""
    folder = out / "worlds" / world
    if world in MAKE and not (folder / "test.jsonl").exists():
        print(f"making the world {world!r}", file=sys.stderr, flush=True)
        python(ROOT / "tiny/make.py", "--out", folder, "--base", ROOT / "tiny", *MAKE[world].split())


def run_all(args: argparse.Namespace) -> list[str]:
    """All runs, world by world and in each seed by seed; what went wrong."""
    failed = []
    for world in args.worlds:
        make_world(world, args.out)
        rows = [row for row in args.rows if row in WORLDS[world]]
        jobs = [(world, row, seed, args) for seed in range(args.seeds) for row in rows]
        with ThreadPoolExecutor(args.jobs) as pool:
            failed += filter(None, pool.map(lambda job: run_apart(*job), jobs))
    return failed


def collect(out: Path, kept: Path) -> list[dict]:
    """All summaries there are, those kept of earlier runs included; also written to summaries.jsonl, one per
    line."""
    order = {row: i for i, row in enumerate(ROWS)}
    new = [json.loads(path.read_text()) for path in out.glob("*/*/summary.json")]
    found = list({(s["world"], s["row"], s["seed"]): s for s in [*known(kept), *new]}.values())
    budgets = {s["token_budget"] for s in found}
    if len(budgets) > 1:
        raise SystemExit(
            f"error: summaries of runs of {sorted(budgets)} tokens: choose another --out or --known"
        )
    found.sort(key=lambda s: (list(WORLDS).index(s["world"]), order[s["row"]], s["seed"]))
    (out / "summaries.jsonl").write_text("".join(json.dumps(s) + "\n" for s in found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/lab"))
    add("--known", type=Path, default=ROOT / "docs/lab/summaries.jsonl", help="summaries of earlier runs")
    add("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--seeds", type=int, default=10, help="seeds 0 to this, the same in every row")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--token_budget", type=int, default=200_000, help="generated tokens per run")
    add("--problems", type=int, default=400, help="held-out problems")
    add("--report", nargs="?", const="", help="train nothing; of this file of summaries, or of --out")
    add("--figure", type=Path, help="draw the learning curves there")
    add("--one", nargs=3, metavar=("WORLD", "ROW", "SEED"), help="do one run in this process")
    args = parser.parse_args()
    args.program = Path(__file__)  # of a single run
    if args.one:
        return run(args.one[0], args.one[1], int(args.one[2]), args)
    failed = run_all(args) if args.report is None else []
    summaries = lines(Path(args.report)) if args.report else collect(args.out, args.known)
    if not summaries:
        sys.exit(f"error: no summary in {args.report or args.out}: run without --report first")
    print(report(summaries, args.figure))
    if failed:
        sys.exit(
            f"error: {len(failed)} runs failed; the same command tries them again:\n" + "\n".join(failed)
        )


if __name__ == "__main__":
    main()
