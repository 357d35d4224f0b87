"""One page that shows a run, or several side by side: curves, trees with attention and advantages, settings.

    python experiments/report.py runs/attnrl-tiny-0                           # writes report.html into it
    python experiments/report.py runs/attnrl-tiny-0 runs/grpo-tiny-0 --out both.html

The page needs nothing but a browser: no server, no network. A run writes its own at every evaluation.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is run from

from plumbing import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs")
    parser.add_argument("--out", type=Path, help="the page [report.html of the run, or runs.html of several]")
    args = parser.parse_args()
    out = args.out or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("runs.html"))
    try:
        report.write(args.runs, out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
