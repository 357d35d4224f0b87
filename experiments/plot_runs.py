"""Figures 1b and 6 to 9: the curves of several runs, one panel per metric.

    python experiments/plot_runs.py runs/attnrl-tiny-0 runs/grpo-tiny-0 --labels AttnRL GRPO
    python experiments/plot_runs.py runs/attnrl-tiny-0 runs/grpo-tiny-0 --figure 1b --x valid_tokens

Reads metrics.jsonl of each run (docs/metrics.md). Figure 9 needs runs with several held-out files. Bars at
accuracies are 95% intervals over problems; runs evaluated on the same problems differ by less than these say.
"""

import argparse
import json
import sys
from math import ceil
from pathlib import Path

import numpy as np

PANELS = {  # metric: (figures of the paper, title, unit)
    "test_accuracy": (["1b", "8"], "held-out problems", "accuracy"),
    "mc_solve_all": (["6"], "continuations all right", "share of branched problems"),
    "mc_solve_none": (["6"], "continuations all wrong", "share of branched problems"),
    "mc_valid": (["6"], "continuations mixed", "share of branched problems"),
    "rescued_all_right": (["7"], "first all right, then mixed", "share of problems"),
    "rescued_all_wrong": (["7"], "first all wrong, then mixed", "share of problems"),
    "valid_tokens": (["7"], "sequences with advantage", "share of tokens"),
    "filtered": (["7"], "filtered by Eq. 8", "share of problems"),
    "batch_size": (["7"], "prompt batch", "problems"),
    "entropy": (["8"], "entropy", "nats per token"),
    "reward": (["8"], "reward in training", "mean correctness"),
    "test_tokens": (["8"], "held-out responses", "mean length in tokens"),
}
X = {  # of --x: (metric, label)
    "tokens": ("total_tokens", "generated tokens"),
    "steps": ("step", "training steps"),
    "updates": ("total_updates", "optimiser updates"),
    "valid_tokens": ("total_valid_tokens", "trained tokens of sequences with non-zero advantage"),
    "problems": ("total_problems", "problems sampled"),
}
FIGURES = ["1b", "6", "7", "8", "9"]


def read(run: Path) -> list[dict]:
    """Lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read {path} ({error}): give the --output_dir of a run")


def curve(records: list[dict], x: str, y: str, smooth: int = 1) -> tuple[list, list]:
    """Metric x and the mean of the last `smooth` values of metric y, wherever y was measured."""
    # The evaluation before training is at 0 on every axis, and does not say so.
    found = [(r.get(x, 0), r[y]) for r in records if r.get(y) is not None]
    values = [value for _, value in found]
    means = [np.mean(values[max(0, end - smooth) : end]) for end in range(1, len(values) + 1)]
    return [place for place, _ in found], means


def panels_of(runs: list[list[dict]], figures: list[str]) -> dict[str, tuple]:
    """Of PANELS and one per held-out file (Figure 9), those of `figures` that a run has data for."""
    logged = dict.fromkeys(name for records in runs for r in records for name in r if r[name] is not None)
    files = [name for name in logged if name.startswith("test_accuracy_")]
    panels = PANELS | {name: (["9"], name.removeprefix("test_accuracy_"), "accuracy") for name in files}
    return {name: p for name, p in panels.items() if name in logged and not set(p[0]).isdisjoint(figures)}


def draw(runs: list[list[dict]], labels: list[str], panels: dict[str, tuple], args) -> None:
    """args: x, smooth and out of the command line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    rows = ceil(len(panels) / 4)
    columns = ceil(len(panels) / rows)
    size = 3.1 * max(columns, 2), 2.5 * rows + 0.7
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    colors = plt.cm.tab10.colors if len(runs) <= 10 else plt.cm.turbo(np.linspace(0.05, 0.95, len(runs)))
    # Unclipped, so that a line at 0 is not half hidden; with `in_layout` that would upset the layout.
    style = dict(markersize=2, linewidth=1, clip_on=False, in_layout=False)
    for axis, (name, (numbers, title, unit)) in zip(axes.flat, panels.items()):
        window = 1 if name.startswith("test_") else args.smooth  # evaluations are few
        for records, color in zip(runs, colors):
            points = curve(records, X[args.x][0], name, window)
            axis.plot(*points, "o-" if len(points[0]) <= 50 else "-", color=color, **style)
            if name.startswith("test_accuracy"):
                half = 1.96 * np.array(curve(records, X[args.x][0], name.replace("accuracy", "stderr"))[1])
                axis.errorbar(*points, half, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.5)
        axis.set_title(f"Fig. {', '.join(numbers)}: {title}", fontsize=10, loc="left")
        axis.set(ylabel=unit, ylim=(0, None))
        axis.locator_params(nbins=5)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.tick_params(labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_xlim(0, None)  # of all panels
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    smoothed = f" (per-step metrics: mean of the last {args.smooth})" if args.smooth > 1 else ""
    figure.supxlabel(X[args.x][1] + smoothed, fontsize=10)
    lines = [plt.Line2D([], [], color=color) for color, _ in zip(colors, runs)]
    figure.legend(lines, labels, frameon=False, loc="outside upper center", ncols=min(len(runs), 4))
    figure.savefig(args.out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs")
    parser.add_argument("--labels", nargs="+", help="one per run, for the legend [the directories]")
    which = "of the paper [all that a run has data for]"
    parser.add_argument("--figure", nargs="+", choices=FIGURES, help=which)
    parser.add_argument("--x", choices=X, default="tokens")
    parser.add_argument("--smooth", type=int, default=1, help="show the mean of the last so many steps")
    parser.add_argument("--out", type=Path, default=Path("runs.png"))
    args = parser.parse_args()
    labels = args.labels or [str(run) for run in args.runs]
    if len(labels) != len(args.runs) or args.smooth < 1:
        given = f"{len(args.runs)} runs, {len(labels)} labels and --smooth {args.smooth}"
        sys.exit(f"error: got {given}: give one label per run, and at least 1 to --smooth")
    runs, x = [read(run) for run in args.runs], X[args.x][0]
    for run, records in zip(args.runs, runs):
        if not any(x in record for record in records):
            sys.exit(f"error: {run} has no metric {x}: choose another --x")
    for number in args.figure or []:
        if not panels_of(runs, [number]):
            sys.exit(f"error: no run has the metrics of Figure {number}: leave it out of --figure")
    try:
        draw(runs, labels, panels_of(runs, args.figure or FIGURES), args)
    except (OSError, ValueError) as error:  # what --out names cannot be written
        sys.exit(f"error: cannot write {args.out} ({error}): give a .png in a folder that exists")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
