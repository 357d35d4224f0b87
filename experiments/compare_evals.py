"""Two evaluations compared: Pass@1 of two results.json, and their difference with a paired bootstrap interval.

python eval.py --compare runs/eval-a/results.json runs/eval-b/results.json
"""

import json
from pathlib import Path

import numpy as np


def compare(path_a: str, path_b: str) -> list[str]:
    """Lines of a table: Pass@1 of two results.json, and B - A with a 95% paired bootstrap interval over problems.

    Raises ValueError, one sentence, where the two do not answer the same problems under the same settings.
    """
    try:
        a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (path_a, path_b))
        settings = [{name: x["settings"][name] for name in ("benchmarks", "max_new_tokens", "temperature", "top_p")} for x in (a, b)]
        pairs = {name: np.array([a["results"][name]["per_problem"], b["results"][name]["per_problem"]]) for name in a["results"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot compare {path_a} with {path_b} ({error!r}); both must be a results.json of eval.py") from error
    if settings[0] != settings[1]:
        raise ValueError(f"{path_a} and {path_b} are of {settings[0]} and of {settings[1]}; evaluate both alike to compare them")
    lines = [f"{'benchmark':<18}{'A':>7}{'B':>7}{'B - A':>8}   95% interval"]
    for name, chosen in [*((name, [pair]) for name, pair in pairs.items()), ("average", list(pairs.values()))]:
        mean_a, mean_b = 100 * np.mean([pair.mean(axis=1) for pair in chosen], axis=0)
        low, high = bootstrap([b - a for a, b in chosen])
        lines.append(f"{name:<18}{mean_a:>7.1f}{mean_b:>7.1f}{mean_b - mean_a:>+8.1f}   [{100 * low:+.1f}, {100 * high:+.1f}]")
    return lines


def bootstrap(differences: list, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean difference, averaged over benchmarks; problems are drawn anew within each."""
    rng = np.random.default_rng(seed)
    means = [np.mean([d[rng.integers(len(d), size=len(d))].mean() for d in differences]) for _ in range(resamples)]
    return tuple(np.percentile(means, [2.5, 97.5]))
