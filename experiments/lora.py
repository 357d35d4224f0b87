"""Do low-rank adapters learn as well as all weights? On the embedded reasoner, at equal generated tokens.

    python experiments/lora.py                                            # an hour and a half on two cores
    python experiments/lora.py --report docs/lab/lora.jsonl               # of summaries that were kept

For all weights and each rank, one of three learning rates is chosen on two seeds, by the mean accuracy over
the run. Five other seeds are then trained with it. Runs are those of experiments/lab.py (AttnRL, default
world): resumable, two at a time, a summary per run in `--out`, which summaries.jsonl collects.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import lab
from experiments.lab_report import area, at_end, differences, percent, table
from plumbing.memory_plan import plan, shape_of
from train import parse_config

RANKS = [0, 1, 4, 16]  # 0: all weights are trained
RATES = {0: ["2e-4", "4e-4", "8e-4"]}  # the preset's in the middle
RATES |= {rank: ["1e-3", "4e-3", "16e-3"] for rank in RANKS[1:]}  # ten times that in the middle
CHOOSING, OTHERS = [0, 1], [2, 3, 4, 5, 6]  # seeds


def row(rank: int, rate: str) -> str:
    return f"rank {rank}, lr {rate}" if rank else f"all weights, lr {rate}"


def name(rank: int) -> str:
    return f"rank {rank}" if rank else "all weights"


ROWS = {row(r, lr): f"--lora_rank {r} --lr {lr}" for r in RANKS for lr in RATES[r]}


def chosen(summaries: list[dict]) -> dict[int, str]:
    """Of each rank the learning rate whose runs on the seeds CHOOSING have the largest mean accuracy."""
    of = lambda rank, rate: [s for s in summaries if s["row"] == row(rank, rate) and s["seed"] in CHOOSING]
    mean = lambda rank, rate: float(np.mean([area(s) for s in of(rank, rate)]))
    return {rank: max(RATES[rank], key=lambda rate: mean(rank, rate)) for rank in RANKS}


def run_all(jobs: list[tuple[str, int]], args: argparse.Namespace) -> list[dict]:
    """Train what is not there yet; the summaries of `jobs`, each (row, seed). Exits where runs failed."""
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = list(filter(None, pool.map(lambda job: lab.run_apart("default", *job, args), jobs)))
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the same command tries again:\n" + "\n".join(failed))
    found = lab.collect(args.out, args.known)
    return [s for s in found if (s["row"], s["seed"]) in jobs]


def state_bytes(rank: int) -> int:
    """Of weights, reference, gradients and AdamW's moments on the embedded reasoner, by the plan, in fp32."""
    run, method = parse_config(["--lora_rank", str(rank)])
    run.autocast = "none"
    rows = plan(shape_of(run.model), run, method, 0)
    return sum(max(rows[part]) for part in ("weights", "reference", "gradients", "AdamW's moments"))


def report(summaries: list[dict]) -> str:
    """Tables in Markdown: the rates tried, and the ranks compared on the other seeds."""
    best = chosen(summaries)
    rows = [["", "learning rate", "chosen", "Pass@1 at the end", "mean over the run"]]
    for rank in RANKS:
        for rate in RATES[rank]:
            own = [s for s in summaries if s["row"] == row(rank, rate) and s["seed"] in CHOOSING]
            mark = "yes" if rate == best[rank] else ""
            cells = [f"{100 * np.mean([f(s) for s in own]):.1f}" for f in (at_end, area)]
            rows.append([name(rank), rate, mark, *cells])
    of_rank = {
        name(rank): [s for s in summaries if s["row"] == row(rank, best[rank]) and s["seed"] in OTHERS]
        for rank in RANKS
    }
    titles = ["seeds", "Pass@1 at the end", "mean over the run", "Pass@4", "seconds per step", "MB of state"]
    compared = [["", *titles]]
    for rank, own in zip(RANKS, of_rank.values()):
        measured = [[at_end(s) for s in own], [area(s) for s in own], [s["pass@4"] for s in own]]
        seconds = f"{np.mean([s['seconds_per_step'] for s in own]):.1f}"
        cells = [*map(percent, measured), seconds, f"{state_bytes(rank) / 1e6:.1f}"]
        compared.append([name(rank), str(len(own)), *cells])
    against = differences(of_rank, "all weights")
    return "\n\n".join([table(*rows), table(*compared), against])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/lora"))
    add("--known", type=Path, default=ROOT / "docs/lab/lora.jsonl", help="summaries of earlier runs")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--token_budget", type=int, default=200_000, help="generated tokens per run")
    add("--problems", type=int, default=400, help="held-out problems")
    add("--report", type=Path, help="train nothing; of this file of summaries")
    add("--one", nargs=3, help=argparse.SUPPRESS)  # the program of a run
    args = parser.parse_args()
    args.program = Path(__file__)
    lab.ROWS |= ROWS
    if args.one:
        return lab.run(args.one[0], args.one[1], int(args.one[2]), args)
    if args.report:
        summaries = lab.lines(args.report)
    else:
        trials = [(row(rank, rate), seed) for seed in CHOOSING for rank in RANKS for rate in RATES[rank]]
        summaries = run_all(trials, args)
        best = chosen(summaries)
        summaries += run_all([(row(r, best[r]), seed) for seed in OTHERS for r in RANKS], args)
    print(report(summaries))


if __name__ == "__main__":
    main()
