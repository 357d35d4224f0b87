"""Two evaluations compared: Pass@1 of each benchmark, and the difference with a 95% interval.

    python experiments/compare_evaluations.py runs/eval-a/results.json runs/eval-b/results.json [--show 5]

The interval is a paired bootstrap over problems: how far the difference would vary with other problems of the
same kind. Both evaluations must be of the same problems under the same settings.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np


def compare(path_a: str, path_b: str) -> list[str]:
    """Lines of a table: Pass@1 of two results.json, and B - A with a 95% paired bootstrap interval.

    Raises ValueError, one sentence, where the two do not answer the same problems under the same settings.
    """
    try:
        a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (path_a, path_b))
        alike = ("benchmarks", "max_new_tokens", "temperature", "top_p")
        settings = [{name: x["settings"][name] for name in alike} for x in (a, b)]
        scores = [{name: result["per_problem"] for name, result in x["results"].items()} for x in (a, b)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        needed = "both must be a results.json of eval.py"
        raise ValueError(f"cannot compare {path_a} with {path_b} ({error!r}); {needed}") from error
    other = [f"{key} ({x} and {settings[1][key]})" for key, x in settings[0].items() if x != settings[1][key]]
    if other:
        raise ValueError(f"{path_a} and {path_b} differ in {', '.join(other)}: evaluate both alike")
    pairs = {name: np.array([scores[0][name], scores[1][name]]) for name in scores[0]}
    lines = [f"{'benchmark':<18}{'A':>7}{'B':>7}{'B - A':>8}   95% interval"]
    rows = {name: [pair] for name, pair in pairs.items()} | {"average": list(pairs.values())}
    for name, chosen in rows.items():
        mean_a, mean_b = 100 * np.mean([pair.mean(axis=1) for pair in chosen], axis=0)
        low, high = bootstrap([b - a for a, b in chosen])
        interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
        lines.append(f"{name:<18}{mean_a:>7.1f}{mean_b:>7.1f}{mean_b - mean_a:>+8.1f}   {interval}")
    return lines


def first_samples(path: Path) -> dict[int, dict]:
    """The first row of each problem of a file of samples, by the problem's number."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["problem"]: row for row in reversed(rows)}


def responses(path_a: str, path_b: str, n: int) -> list[str]:
    """The first response of both to the first n problems of each benchmark, and its verdict, as lines.

    Raises ValueError, one sentence, where a file of samples beside results.json cannot be read.
    """
    lines, read = [], cache(first_samples)
    for name, result in json.loads(Path(path_a).read_text(encoding="utf-8"))["results"].items():
        for i in range(min(n, len(result["per_problem"]))):
            for letter, path in {"A": path_a, "B": path_b}.items():
                samples = Path(path).parent / f"{name}.jsonl"
                try:
                    row = read(samples)[i]
                except (OSError, ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"cannot read problem {i} of {samples} ({error!r})") from error
                text = [f"    {line}" for line in row.get("response", "").splitlines() if line.strip()]
                lines += [f"{name}, problem {i}, {letter}: {row['verdict']}", *text]
    return lines


def bootstrap(differences: list, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean difference over benchmarks; problems are drawn anew within each."""
    rng = np.random.default_rng(seed)
    resample = lambda d: d[rng.integers(len(d), size=len(d))]
    means = [np.mean([resample(d).mean() for d in differences]) for _ in range(resamples)]
    return tuple(np.percentile(means, [2.5, 97.5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("a", help="results.json of eval.py")
    parser.add_argument("b", help="another, of the same problems and settings")
    parser.add_argument("--show", type=int, default=0, help="print responses to so many problems, too")
    args = parser.parse_args()
    try:
        print("\n".join(compare(args.a, args.b) + responses(args.a, args.b, args.show)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
