"""Statistics and tables of experiments/gradients.py, from the gradients that it wrote.

With n batches whose gradients have unit length, the consistency c of a row is the mean cosine of two of them.
If a gradient is a signal plus independent noise, c is the signal's share of its power, so c / (1 - c) is
signal to noise; over the tokens of a batch, what a token is worth. Errors are jackknives over the batches,
left out in all rows at once; two rows are compared by the logarithm of the ratio of their worths.
"""

import json
from collections import Counter
from math import sqrt
from pathlib import Path

import numpy as np

from experiments.lab_report import holm, t_quantile, t_tail, table

KINDS = ["pivotal", "local", "filler"]
BASELINES = ["GRPO 6", "GRPO 30", "random", "earliest"]  # what rows are compared with


def consistency(gram: np.ndarray) -> float:
    """Mean cosine between different batches; gram: (n, n), of unit vectors."""
    n = len(gram)
    return float((gram.sum() - np.trace(gram)) / (n * (n - 1)))


def jackknife(statistic, n: int) -> tuple[float, float]:
    """A statistic of the batches' indices, and its standard error."""
    left_out = np.array([statistic(np.delete(np.arange(n), b)) for b in range(n)])
    error = sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    return statistic(np.arange(n)), error


def analyse(out: Path, arms: list[str]) -> dict:
    """Of one policy: per metric the rows, and per row what explains it. out: *.npy, (arms + 1, weights) fp32
    per batch, the reference last; *.json, what each arm's batch was."""
    numbers = sorted(int(p.stem) for p in out.glob("*.json") if p.stem.isdigit())
    gradients = np.stack([np.load(out / f"{b}.npy") for b in numbers])  # (batches, arms + 1, weights)
    about = [json.loads((out / f"{b}.json").read_text()) for b in numbers]
    why = {arm: dict(sum((Counter(a[arm]) for a in about), Counter())) for arm in arms}
    rms = np.sqrt((gradients[:, -1] ** 2).mean(0))
    metrics = {"plain": 1.0, "Adam": rms + 1e-3 * rms.mean()}
    tokens = {arm: why[arm]["tokens"] / len(numbers) for arm in arms}
    measured = {name: in_metric(gradients / divisor, arms, tokens) for name, divisor in metrics.items()}
    return {"batches": len(numbers), "why": why, "metrics": measured}


@np.errstate(invalid="ignore")  # where batches are few, noise can make c negative: then a ratio is nan
def in_metric(gradients: np.ndarray, arms: list[str], tokens: dict[str, float]) -> dict[str, dict]:
    """consistency and direction of each arm, with standard errors, and its worth against each of BASELINES.

    direction: cosine of its mean gradient with the reference's, corrected for the noise of both. worth: ratio
    to the baseline's, 95 % interval, p by Holm's method over all arms, and `detectable`, the ratio that an
    uncorrected test at 5 % would find with a probability of 80 %."""
    n = len(gradients)
    units = gradients / np.linalg.norm(gradients, axis=-1, keepdims=True)
    gram = np.einsum("axw,byw->xyab", units, units, optimize=True)  # (arms + 1, arms + 1, batches, batches)
    place = {arm: i for i, arm in enumerate([*arms, "reference"])}
    c = lambda arm, kept: consistency(gram[place[arm], place[arm]][np.ix_(kept, kept)])
    log_worth = lambda arm, kept: np.log(c(arm, kept) / (1 - c(arm, kept)) / tokens[arm])
    two_sided, power = t_quantile(0.975, n - 1), t_quantile(0.8, n - 1)

    def direction(arm, kept):  # independent batches on both sides: what is shared is signal
        across = gram[place[arm], -1][np.ix_(kept, kept)]
        return float(across.mean() / np.sqrt(c(arm, kept) * c("reference", kept)))

    rows = {}
    for arm in arms:
        value, error = jackknife(lambda kept, a=arm: c(a, kept), n)
        angle, angle_error = jackknife(lambda kept, a=arm: direction(a, kept), n)
        rows[arm] = dict(consistency=value, consistency_error=error, tokens=tokens[arm], worth={})
        rows[arm] |= dict(direction=angle, direction_error=angle_error)
    for other in BASELINES:
        tested = [arm for arm in arms if arm != other]
        found = [jackknife(lambda k, a=a, b=other: log_worth(a, k) - log_worth(b, k), n) for a in tested]
        p = holm([2 * t_tail(abs(ratio) / error, n - 1) for ratio, error in found])
        for arm, corrected, (ratio, error) in zip(tested, p, found):
            low, high = np.exp([ratio - two_sided * error, ratio + two_sided * error]).tolist()
            detectable = float(np.exp((two_sided + power) * error))
            worth = dict(ratio=float(np.exp(ratio)), low=low, high=high, p=corrected, detectable=detectable)
            rows[arm]["worth"][other] = worth
    return rows


HEADER = ["row", "tokens", "consistency", "direction"]
HEADER += [x for other in BASELINES for x in (f"worth, {other} = 1", "p", "detectable")]
WHY = ["row", *KINDS, "place", "tokens per useful sequence", "problems per batch"]


def report(found: dict[str, dict], rows_of_why: list[str]) -> str:
    """Markdown tables of `analyse`, by policy."""
    parts = []
    for policy, measured in found.items():
        for metric, of_metric in measured["metrics"].items():
            rows = []
            for arm, row in of_metric.items():
                cells = [arm, f"{row['tokens']:,.0f}"]
                cells += [f"{row[x]:.3f} ± {2 * row[x + '_error']:.3f}" for x in ("consistency", "direction")]
                for other in BASELINES:
                    w = row["worth"].get(other)
                    shown = "" if not w else "< 0.001" if w["p"] < 0.001 else f"{w['p']:.3f}"
                    ratio = w and f"{w['ratio']:.2f} ({w['low']:.2f}–{w['high']:.2f})"
                    cells += [ratio, shown, f"{w['detectable']:.2f}"] if w else ["1", "–", "–"]
                rows.append(cells)
            parts += [f"**{policy}, {metric} metric, {measured['batches']} batches**", table(HEADER, *rows)]
        rows = []
        for row in rows_of_why:
            w = Counter(measured["why"][row])  # what a Counter dropped was 0
            share = lambda count, w=w: f"{w[count] / w['points']:.0%}" if w["points"] else "–"
            place = f"{w['place_sum'] / w['points']:.2f}" if w["points"] else "–"
            cells = [row, *(share(f"points_{kind}") for kind in KINDS), place]
            rows.append(
                [*cells, f"{w['tokens'] / w['useful']:.0f}", f"{w['problems'] / measured['batches']:.0f}"]
            )
        parts += [f"**{policy}, why**", table(WHY, *rows)]
    return "\n\n".join(parts)


def draw(found: dict[str, dict], rows: list[str], path: Path) -> None:
    """What a token is worth in both metrics, by row and policy, against GRPO 6, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = list(next(iter(found.values()))["metrics"])
    size = 4.8 * len(metrics) + 1, 0.36 * len(rows) + 1.3
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained")
    for axis, metric in zip(axes, metrics):
        for i, (policy, color) in enumerate(zip(found, ["#0072B2", "#E69F00", "#009E73"])):
            worth = [found[policy]["metrics"][metric][row]["worth"].get("GRPO 6") for row in rows]
            places = np.arange(len(rows)) + 0.22 * (i - (len(found) - 1) / 2)
            ratio = np.array([w["ratio"] for w in worth])
            bars = [[w["ratio"] - w["low"] for w in worth], [w["high"] - w["ratio"] for w in worth]]
            axis.errorbar(ratio, places, xerr=bars, fmt="o", ms=4, lw=1.2, color=color, label=policy)
        axis.axvline(1, color="grey", lw=0.8, ls=":")
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=f"{metric} metric", xlabel="a token's worth, GRPO with 6 responses = 1", xscale="log")
        axis.set_xticks([0.5, 0.7, 1, 1.4, 2], ["0.5", "0.7", "1", "1.4", "2"], minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[-1].legend(title="policy", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
