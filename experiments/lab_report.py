"""Tables and figure of experiments/lab.py, from summaries of runs, and the statistics that they use.

Student's t distribution with df degrees of freedom is that of sqrt(df) tan(angle), where the density of the
angle is proportional to cos(angle)^(df - 1) on (-pi/2, pi/2).

All intervals are of 95 % and not corrected; p is, by Holm's method, over all comparisons of its table.
`detectable` is the true difference that one uncorrected test at 5 % would find with a probability of 80 %.
"""

from math import atan, exp, lgamma, pi, sqrt
from pathlib import Path

import numpy as np

# --- Statistics -------------------------------------------------------------------------------------------


def t_tail(t: float, df: int) -> float:
    """P(T > t)."""
    angles = np.linspace(atan(t / sqrt(df)), pi / 2, 4001)
    constant = exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(pi)
    return float(constant * np.trapezoid(np.cos(angles) ** (df - 1), angles))


def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, by bisection."""
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - p else (low, middle)
    return low


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its t-interval; infinite for one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("inf")
    return float(np.mean(values)), t_quantile(0.975, n - 1) * float(np.std(values, ddof=1)) / sqrt(n)


def p_value(differences: list[float]) -> float:
    """Two-sided, of the paired t-test."""
    standard_error = np.std(differences, ddof=1) / sqrt(len(differences))
    if standard_error == 0:
        return float(np.mean(differences) == 0)
    return 2 * t_tail(abs(float(np.mean(differences) / standard_error)), len(differences) - 1)


def detectable(differences: list[float]) -> float:
    """The true mean difference that an uncorrected test at 5 % finds with a probability of 80 %, if the
    differences scatter as these do."""
    df = len(differences) - 1
    standard_error = float(np.std(differences, ddof=1)) / sqrt(len(differences))
    return (t_quantile(0.975, df) + t_quantile(0.8, df)) * standard_error


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for the family: the k-th smallest of m p-values, multiplied by m - k + 1, at most 1, and never
    below the one before."""
    adjusted, largest, m = [0.0] * len(p_values), 0.0, len(p_values)
    for k, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (m - k) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# --- Learning curves --------------------------------------------------------------------------------------


def read_off(run: dict, at, axis: str = "tokens"):
    """Accuracy at so many tokens or updates, linear between evaluations."""
    return np.interp(at, run[axis], run["accuracy"])


def at_end(run: dict) -> float:
    """Accuracy when the budget of generated tokens is spent."""
    return float(read_off(run, run["token_budget"]))


def area(run: dict) -> float:
    """Mean accuracy over the budget of generated tokens, by trapezoids between evaluations."""
    places = [t for t in run["tokens"] if t < run["token_budget"]] + [run["token_budget"]]
    return float(np.trapezoid(read_off(run, places), places)) / run["token_budget"]


# --- Tables -----------------------------------------------------------------------------------------------

REFERENCES = ["random", "GRPO 30", "FCI"]
KINDS = ["pivotal", "local", "filler", "wait", "answer"]


def table(*rows: list[str]) -> str:
    """Markdown; the first row is the header."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "| --- " * len(rows[0]) + "|", *body])


def percent(values: list[float], sign: str = "") -> str:
    """Mean and t-interval, in %."""
    mean, half = mean_and_half(values)
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * half:.1f}" if len(values) > 1 else "")


def fewest_updates(runs: dict[str, list[dict]]) -> int:
    """Updates that every run has made."""
    return min(run["updates"][-1] for own in runs.values() for run in own)


def outcomes(runs: dict[str, list[dict]]) -> str:
    """What each row reached. runs: of one world, by row."""
    n_updates, budget = fewest_updates(runs), next(iter(runs.values()))[0]["token_budget"]
    title = ["row", "seeds", f"Pass@1 after {budget:,} tokens", "mean over the run", "Pass@4"]
    rows = [[*title, f"Pass@1 after {n_updates} updates", "updates", "problems"]]
    for name, own in runs.items():
        measured = [[at_end(r) for r in own], [area(r) for r in own], [r["pass@4"] for r in own]]
        measured += [[float(read_off(r, n_updates, "updates")) for r in own]]
        counts = [
            f"{np.mean(values):.0f}" for values in zip(*[(r["updates"][-1], r["problems"]) for r in own])
        ]
        rows.append([name, str(len(own)), *map(percent, measured), *counts])
    return table(*rows)


def why(runs: dict[str, list[dict]]) -> str:
    """Where each row branched and what came of it; of rows that do not branch, the last columns only."""
    title = ["row", *KINDS, "position", "mixed continuations", "tokens per useful sequence"]
    rows = [title]
    for name, own in runs.items():
        points = np.sum([[r["points"].get(kind, 0) for kind in KINDS] for r in own], axis=0)
        branched = [r for r in own if r["position"] is not None]
        cells = ["–"] * (len(KINDS) + 2)
        if branched:
            mixed = np.mean([r["mixed"] for r in branched])
            position = np.mean([r["position"] for r in branched])
            cells = [f"{x:.1%}" for x in points / points.sum()] + [f"{position:.2f}", f"{mixed:.1%}"]
        rows.append([name, *cells, f"{np.mean([r['tokens_per_useful'] for r in own]):.0f}"])
    return table(*rows)


def differences(runs: dict[str, list[dict]], reference: str) -> str:
    """Each row against another, paired by seed, in points: difference ± half of its interval (p; detectable
    difference). Holm's correction is over the whole table."""
    n_updates = fewest_updates(runs)
    measures = {
        "at the end": at_end,
        "mean over the run": area,
        f"after {n_updates} updates": lambda run: float(read_off(run, n_updates, "updates")),
    }
    of_seed = {name: {r["seed"]: r for r in own} for name, own in runs.items()}
    found, base = {}, of_seed[reference]
    for name in runs.keys() - {reference}:
        seeds = sorted(of_seed[name].keys() & base.keys())
        for title, measure in measures.items():
            found[name, title] = [measure(of_seed[name][s]) - measure(base[s]) for s in seeds]
    tested = [key for key, values in found.items() if len(values) > 1]
    p = dict(zip(tested, holm([p_value(found[key]) for key in tested])))

    def cell(key: tuple[str, str]) -> str:
        text = percent(found[key], "+")
        if key not in p:
            return text
        shown = "p < 0.001" if p[key] < 0.001 else f"p = {p[key]:.3f}"
        return f"{text} ({shown}; {100 * detectable(found[key]):.1f})"

    rows = [[f"row, against {reference}", "seeds", *measures]]
    for name in runs:
        if found.get((name, "at the end")):
            cells = [cell((name, title)) for title in measures]
            rows.append([name, str(len(found[name, "at the end"])), *cells])
    return table(*rows)


def report(summaries: list[dict], figure: Path | None = None) -> str:
    """All tables in Markdown, of complete and incomplete results alike; draws the figure if it has a path."""
    parts, worlds = [], {}
    for run in summaries:
        worlds.setdefault(run["world"], {}).setdefault(run["row"], []).append(run)
    for world, runs in worlds.items():
        parts += [f"World: {world}", outcomes(runs), why(runs)]
        parts += [differences(runs, r) for r in REFERENCES if r in runs and len(runs) > 1]
    if figure:
        draw(worlds, figure)
    return "\n\n".join(parts)


# --- Figure -----------------------------------------------------------------------------------------------

RULE_COLORS = {"FCI": "#d62728", "FCI mean": "#ff9896", "FCI window": "#e377c2", "entropy": "#17becf"}
RULE_COLORS |= {"sentence entropy": "#1f77b4", "random": "#7f7f7f", "earliest": "#bcbd22", "late": "#8c564b"}
RULE_COLORS |= {"oracle": "black"}
COLORS = RULE_COLORS | {"GRPO 6": "#98df8a", "GRPO 30": "#2ca02c", "TreeRL": "#ff7f0e"}
COLORS |= {"group advantage": "#9467bd", "no adaptive sampling": "#393b79"}


def draw(worlds: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Accuracy against tokens (above) and updates (below): mean over seeds, with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, PercentFormatter

    panels = []
    for world, runs in worlds.items():
        rules = {name: own for name, own in runs.items() if name in RULE_COLORS}
        others = {name: own for name, own in runs.items() if name not in RULE_COLORS or name == "FCI"}
        split = {f"{world}: rules": rules, f"{world}: algorithms": others}
        panels += (split if len(runs) > 7 else {world: runs}).items()
    size = 4.2 * len(panels) + 0.6, 7.4
    figure, axes = plt.subplots(2, len(panels), figsize=size, squeeze=False, layout="constrained")
    for column, (title, runs) in enumerate(panels):
        for axis, x in zip(axes[:, column], ["tokens", "updates"]):
            for name, own in runs.items():
                ends = [r["token_budget"] if x == "tokens" else r["updates"][-1] for r in own]
                grid = np.linspace(0, min(ends), 101)
                curves = np.array([read_off(r, grid, x) for r in own])  # (runs, 101)
                mean = curves.mean(0)
                axis.plot(grid, mean, color=COLORS[name], linewidth=1.5, label=name)
                if len(own) > 1:
                    error = curves.std(0, ddof=1) / sqrt(len(own))
                    band = dict(color=COLORS[name], alpha=0.12, linewidth=0)
                    axis.fill_between(grid, mean - error, mean + error, **band)
            axis.set(xlabel={"tokens": "generated tokens", "updates": "optimiser updates"}[x], xlim=(0, None))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(title, loc="left", fontsize=11)
        axes[0, column].legend(frameon=False, fontsize=8, loc="lower right")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out problems solved")
    figure.savefig(path, dpi=130)
    plt.close(figure)
