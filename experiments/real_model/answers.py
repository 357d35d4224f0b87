"""How many answers write operations down, and how many of those are right?

    python experiments/real_model/answers.py models/problems/test.jsonl runs/eval-before/test.jsonl

A Markdown table of samples that eval.py wrote, by the number of operations that the problem needs. An answer
writes operations down if it contains " = ".
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from experiments.lab_report import table

HEADER = ["samples", "operations", "answers", "with operations", "right of those", "right of the others"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count(problems: list[dict], samples: list[dict], needed: list[int]) -> list[str]:
    """Cells of a row: over the problems that need one of these numbers of operations."""
    chosen = [s for s in samples if problems[s["problem"]]["solution"].count(" = ") in needed]
    groups = [[s for s in chosen if (" = " in s["response"]) == written] for written in (True, False)]
    right = [sum(s["verdict"] == "correct" for s in group) for group in groups]
    share = lambda part, whole: f"{100 * part / whole:.0f} %" if whole else "–"
    shares = [f"{share(n, len(group))} ({n} of {len(group)})" for n, group in zip(right, groups)]
    return [f"{len(chosen)}", share(len(groups[0]), len(chosen)), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("problems", type=Path, help="test.jsonl of make_problems.py")
    parser.add_argument("samples", type=Path, nargs="+", help="samples of these problems, of eval.py")
    args = parser.parse_args()
    if missing := [str(path) for path in [args.problems, *args.samples] if not path.exists()]:
        parser.error(f"no such file: {', '.join(missing)}")
    problems, rows = read(args.problems), []
    for path in args.samples:
        name, samples = path.parent.name, read(path)
        rows.append([name, "1 to 4", *count(problems, samples, [1, 2, 3, 4])])
        rows += [[name, f"{n}", *count(problems, samples, [n])] for n in (1, 2, 3, 4)]
    print(table(HEADER, *rows))


if __name__ == "__main__":
    main()
