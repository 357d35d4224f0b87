"""Draw one problem's tree from rollouts.jsonl: segments coloured by advantage, steps by FCI.

    python experiments/plot_tree.py runs/attnrl-tiny-0 --step 1 --out tree.png

A row is a leaf. Thick bars are segments (blue: positive advantage, red: negative); the strip above an initial
response shows the FCI of its steps (darker: higher), with the two branch points marked.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import Normalize, TwoSlopeNorm


def draw(tree: dict, out: Path) -> None:
    rollouts = sorted(tree["rollouts"], key=lambda r: (r["family"], r["start"] > 0, r["start"]))
    bound = max(abs(a) for r in rollouts for _, _, a in r["advantages"])
    advantage_norm = TwoSlopeNorm(0, -bound, bound)
    fci_norm = Normalize(0, max(y for r in rollouts for y in r["fci"] or [0]))
    figure, axis = plt.subplots(figsize=(11, 0.32 * len(rollouts) + 1.6), layout="constrained")
    for row, r in enumerate(rollouts):
        length = r["advantages"][-1][1]
        for start, end, advantage in r["advantages"]:
            own = max(start, r["start"])  # the prefix is drawn once, in the initial response
            if end > own:
                color = plt.cm.RdBu(advantage_norm(advantage))
                axis.barh(row, end - own, left=own, height=0.5, color=color, edgecolor="0.6", linewidth=0.4)
        for start, end, y in zip(r["step_starts"], [*r["step_starts"][1:], length], r["fci"]):
            grey = plt.cm.Greys(fci_norm(y))
            strip = dict(height=0.16, color=grey, edgecolor="white", linewidth=0.6)
            axis.barh(row - 0.37, end - start, left=start, **strip)
        for family, point in {tuple(b) for b in tree["branches"]}:
            if r["start"] == 0 and family == r["family"]:
                axis.plot(point, row - 0.52, marker="v", color="black", markersize=5, clip_on=False)
        if r["start"]:
            axis.plot([r["start"]] * 2, [row, row - 0.75], color="0.6", linewidth=0.8)
        sign, colour = ("✓", "tab:green") if r["reward"] else ("✗", "tab:red")
        axis.text(length + 0.8, row, sign, va="center", color=colour)
    axis.set(xlabel="response token", title=tree["problem"])
    axis.set(yticks=range(len(rollouts)), ylim=(len(rollouts) - 0.4, -0.9))
    axis.set_yticklabels([f"response {r['family'] + 1}" if not r["start"] else "" for r in rollouts])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    scales = plt.cm.ScalarMappable(advantage_norm, "RdBu"), plt.cm.ScalarMappable(fci_norm, "Greys")
    figure.colorbar(scales[0], ax=axis, label="advantage (Eq. 3)", shrink=0.6, pad=0.01)
    figure.colorbar(scales[1], ax=axis, label="FCI (Eq. 6)", shrink=0.6, pad=0.02)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("tree.png"))
    args = parser.parse_args()
    if not (args.run / "rollouts.jsonl").exists():
        sys.exit(f"{args.run} has no rollouts.jsonl: give the directory of a run")
    trees = [json.loads(line) for line in (args.run / "rollouts.jsonl").read_text().splitlines()]
    trees.reverse()  # so that of several of a step the first, which is the largest, is kept
    by_step = {t["step"]: t for t in trees if t["rollouts"][0]["advantages"]}
    if args.step not in by_step:
        sys.exit(f"step {args.step} of {args.run} has no tree with advantages; try one of {sorted(by_step)}")
    draw(by_step[args.step], args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
