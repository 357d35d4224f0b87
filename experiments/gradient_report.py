"""Statistics and tables of experiments/gradients.py, from the gradients that it wrote.

With n batches whose gradients have unit length, the consistency c of a row is the mean cosine of two of them.
If a gradient is a signal plus independent noise, c is the signal's share of its power, so c / (1 - c) is
signal to noise; divided by the tokens of a batch, what a token is worth. All errors are jackknives over the
batches, left out in all rows at once where two rows are compared.
"""

import json
from collections import Counter
from math import sqrt
from pathlib import Path

import numpy as np

from experiments.lab_report import holm, t_quantile, t_tail, table

KINDS = ["pivotal", "local", "filler"]
BASELINES = ["GRPO 30", "random", "earliest"]  # what rows are compared with


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


def in_metric(gradients: np.ndarray, arms: list[str], tokens: dict[str, float]) -> dict[str, dict]:
    """consistency, agreement and worth (signal to noise per token, that of GRPO 30 = 1) of each arm, with
    standard errors; direction, the cosine of its mean gradient with the reference's, corrected for the noise
    of both; p and detectable against each of BASELINES."""
    n = len(gradients)
    units = gradients / np.linalg.norm(gradients, axis=-1, keepdims=True)
    grams = {arm: units[:, i] @ units[:, i].T for i, arm in enumerate([*arms, "reference"])}
    c = lambda arm, kept: consistency(grams[arm][np.ix_(kept, kept)])
    snr = lambda arm, kept: c(arm, kept) / (1 - c(arm, kept)) / tokens[arm]
    target = gradients[:, -1].mean(0)
    target /= np.linalg.norm(target)
    reliability = lambda value: max(n * value / (1 + (n - 1) * value), 1e-9)  # of a mean of n batches
    rows = {}
    for i, arm in enumerate(arms):
        value, error = jackknife(lambda kept, a=arm: c(a, kept), n)
        worth, worth_error = jackknife(lambda kept, a=arm: snr(a, kept) / snr("GRPO 30", kept), n)
        cosines, mean = units[:, i] @ target, units[:, i].mean(0)
        noise = sqrt(reliability(value) * reliability(c("reference", np.arange(n))))
        rows[arm] = dict(consistency=value, consistency_error=error, worth=worth, worth_error=worth_error)
        rows[arm] |= dict(
            agreement=float(cosines.mean()), agreement_error=float(cosines.std(ddof=1)) / sqrt(n)
        )
        rows[arm] |= dict(direction=float(mean @ target / np.linalg.norm(mean)) / noise, tokens=tokens[arm])
    for other in BASELINES:
        tested = [arm for arm in arms if arm != other]
        found = [jackknife(lambda kept, a=arm, b=other: c(a, kept) - c(b, kept), n) for arm in tested]
        p = holm([2 * t_tail(abs(difference) / error, n - 1) for difference, error in found])
        for arm, corrected, (_, error) in zip(tested, p, found):
            detectable = (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * error
            rows[arm][f"against {other}"] = dict(p=corrected, detectable=detectable)
    return rows


HEADER = ["row", "tokens", "consistency", "agreement", "a token is worth", "direction"]
HEADER += [f"p, against {other}" for other in BASELINES] + ["detectable"]
WHY = ["rule", *KINDS, "place", "mixed continuations", "tokens per useful sequence", "problems"]


def report(found: dict[str, dict], rules: list[str]) -> str:
    """Markdown tables of `analyse`, by policy. p: Holm's, over a column. detectable: the difference of
    consistency to `random` that an uncorrected test at 5 % would find with a probability of 80 %."""
    parts = []
    interval = lambda row, name: f"{row[name]:.3f} ± {1.96 * row[name + '_error']:.3f}"
    for policy, measured in found.items():
        for metric, of_metric in measured["metrics"].items():
            rows = []
            for arm, row in of_metric.items():
                cells = [
                    arm,
                    f"{row['tokens']:,.0f}",
                    interval(row, "consistency"),
                    interval(row, "agreement"),
                ]
                cells += [f"{row['worth']:.2f} ± {1.96 * row['worth_error']:.2f}", f"{row['direction']:.2f}"]
                tests = [row.get(f"against {other}") for other in BASELINES]
                shown = lambda test: (
                    "–" if not test else "< 0.001" if test["p"] < 0.001 else f"{test['p']:.3f}"
                )
                cells += [shown(test) for test in tests]
                rows.append([*cells, f"{tests[1]['detectable']:.3f}" if tests[1] else "–"])
            parts += [f"**{policy}, {metric} metric, {measured['batches']} batches**", table(HEADER, *rows)]
        rows = []
        for rule in rules:
            w = Counter(measured["why"][rule])  # what a Counter dropped was 0
            cells = [rule, *(f"{w['points_' + kind] / w['points']:.0%}" for kind in KINDS)]
            cells += [f"{w['place_sum'] / w['points']:.2f}", f"{w['mixed'] / w['branched']:.0%}"]
            cells += [f"{w['tokens'] / w['useful']:.0f}", f"{w['problems'] / measured['batches']:.1f}"]
            rows.append(cells)
        parts += [f"**{policy}, why**", table(WHY, *rows)]
    return "\n\n".join(parts)


def draw(found: dict[str, dict], rows: list[str], path: Path) -> None:
    """What a token is worth in the plain metric, by row and policy, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 0.36 * len(rows) + 1.2), layout="constrained")
    for i, (policy, color) in enumerate(zip(found, ["#0072B2", "#E69F00", "#009E73"])):
        measured = found[policy]["metrics"]["plain"]
        worth, error = ([measured[row][name] for row in rows] for name in ("worth", "worth_error"))
        places = np.arange(len(rows)) + 0.22 * (i - (len(found) - 1) / 2)
        axis.errorbar(
            worth, places, xerr=1.96 * np.array(error), fmt="o", ms=4, lw=1.2, color=color, label=policy
        )
    axis.axvline(1, color="grey", lw=0.8, ls=":")
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set(
        xlabel="signal to noise of the gradient per generated token, GRPO with 30 responses = 1",
        xlim=(0, None),
    )
    axis.set_title("What a token is worth", loc="left")
    axis.legend(title="policy", frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
