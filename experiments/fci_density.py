"""Figure 4: do problems that branching rescues have a higher FCI than those that it does not?

    python train.py --fci_filter none --output_dir runs/density
    python experiments/fci_density.py runs/density --out density.png

Densities from metrics.jsonl of one or more runs. A problem is *invalid* while all its responses are right or
all are wrong; *rescued* if that holds after initial sampling and no longer after branching. Eq. 8 presumes
the answer to be yes. Trust only runs with `--fci_filter none`, since the filter itself leaves problems with a
low FCI without branches, and so invalid.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

KINDS = ["invalid after initial sampling", "still invalid after branching", "rescued by branching"]


def collect(runs: list[Path]) -> dict[str, dict[str, np.ndarray]]:
    """Mean FCI of problems by what the initial responses were (all, "all wrong", "all right") and by kind."""
    fci, initial, valid = [], [], []
    for run in runs:
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            if record.get("problem_fci") and None not in record["problem_fci"]:
                fci += record["problem_fci"]
                initial += record["problem_initial_reward"]
                valid += record["problem_valid"]
    fci, initial, valid = np.array(fci), np.array(initial), np.array(valid, dtype=bool)
    chosen = {"all": (initial == 0) | (initial == 1), "all wrong": initial == 0, "all right": initial == 1}
    return {name: dict(zip(KINDS, (fci[c], fci[c & ~valid], fci[c & valid]))) for name, c in chosen.items()}


def density(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Silverman's bandwidth, (len(x),)."""
    width = 1.06 * values.std(ddof=1) * len(values) ** -0.2
    kernels = np.exp(-0.5 * ((x[:, None] - values) / width) ** 2) / (width * (2 * np.pi) ** 0.5)
    return kernels.mean(1)


def superiority(a: np.ndarray, b: np.ndarray) -> float:
    """Probability that a random entry of `a` exceeds one of `b`; ties count half. 0.5: no difference."""
    return float(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))


def superiority_interval(a: np.ndarray, b: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of `superiority`."""
    rng = np.random.default_rng(0)
    values = [superiority(rng.choice(a, len(a)), rng.choice(b, len(b))) for _ in range(resamples)]
    return tuple(np.quantile(values, [0.025, 0.975]))


def draw(kinds: dict[str, np.ndarray], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    everything = np.concatenate(list(kinds.values()))
    x = np.linspace(everything.min(), everything.max(), 200)
    for name, values in kinds.items():
        if len(values) > 2:
            axis.plot(x, density(values, x), label=f"{name} (n = {len(values)})")
    axis.set(xlabel="mean FCI of a problem", ylabel="density", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("density.png"))
    args = parser.parse_args()
    missing = [str(run) for run in args.runs if not (run / "metrics.jsonl").exists()]
    if missing:
        sys.exit(f"error: no metrics.jsonl in {', '.join(missing)}: give the --output_dir of a run")
    groups = collect(args.runs)
    if len(groups["all"][KINDS[0]]) < 3:
        few = "fewer than three problems with FCI and without a signal after initial sampling"
        sys.exit(f"error: {few}: run longer, with an algorithm that uses FCI")
    means = "mean FCI, rescued | mean FCI, still invalid | P(rescued > invalid), 95 %"
    print(f"| initial responses | problems | rescued | {means} |\n{'| --- ' * 6}|")
    for name, kinds in groups.items():
        before, lost, rescued = kinds.values()
        if len(lost) > 1 and len(rescued) > 1:
            low, high = superiority_interval(rescued, lost)
            probability = f"{superiority(rescued, lost):.2f} ({low:.2f}–{high:.2f})"
            means = f"{rescued.mean():.3f} | {lost.mean():.3f} | {probability}"
        else:
            means = "– | – | –"
        print(f"| {name} | {len(before)} | {len(rescued)} | {means} |")
    draw(groups["all"], args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
