"""Does this tree train to the same numbers as another commit? metrics.jsonl of six runs, line by line and bit
by bit.

    python experiments/same_numbers.py --old 1eb60e7

Runs the default, `--algo treerl`, `--algo grpo`, `--old_logps engine`, `--off_policy false`, and the default
on two processes of torchrun, 40,000 generated tokens each, from a checkout of the old commit and from this
tree. Every field must be equal but times; `engine_ess` and `engine_log_ratio` may differ by a rounding,
because their order of summation may. Exits with 1 if anything else differs. Runs that are complete are not
repeated: after an edit give another --out.
"""

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "default": "",
    "treerl": "--algo treerl",
    "grpo": "--algo grpo",
    "engine": "--old_logps engine",
    "onpolicy": "--off_policy false",
    "two": "",
}
COMMON = "--token_budget 40000 --threads 1 --eval_problems 300"
ROUNDED = {"engine_ess", "engine_log_ratio"}


def run(tree: Path, mode: str, out: Path) -> list[dict]:
    """metrics.jsonl of one run, a dict per line, without times."""
    python = [sys.executable]
    if mode == "two":
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = f"{COMMON} {MODES[mode]}".split()
    done = subprocess.run(
        [*python, "train.py", *flags, "--output_dir", str(out / mode)],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{mode} of {tree} failed: {done.stderr.strip().splitlines()[-1]}")
    records = [json.loads(line) for line in (out / mode / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time_")} for r in records]


def differences(old: list[dict], new: list[dict]) -> list[str]:
    """A line for each field that differs."""
    found = [f"{len(old)} lines, and now {len(new)}"] if len(old) != len(new) else []
    for i, (a, b) in enumerate(zip(old, new)):
        for name in a.keys() | b.keys():
            x, y = a.get(name), b.get(name)
            near = name in ROUNDED and math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-12)
            if x != y and not near:
                found.append(f"line {i}: {name} was {x} and is {y}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", default="1eb60e7", help="commit to compare with")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/same_numbers"), help="where the runs are written"
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    args = parser.parse_args()

    out = args.out.resolve()
    checkout = out / args.old
    if not checkout.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        subprocess.run(["git", "checkout", "--quiet", args.old], cwd=checkout, check=True)
    failed = False
    with ThreadPoolExecutor(2) as pool:
        old = {mode: pool.submit(run, checkout, mode, out / f"runs-{args.old}") for mode in args.modes}
        new = {mode: pool.submit(run, ROOT, mode, out / "runs-new") for mode in args.modes}
        for mode in args.modes:
            before, now = old[mode].result(), new[mode].result()
            found = differences(before, now)
            steps, fields = len(now) - 1, sum(map(len, now))
            verdict = "equal" if not found else f"{len(found)} DIFFERENCES: " + "; ".join(found[:5])
            print(f"{mode}: {steps} steps, {fields} fields, {verdict}", flush=True)
            failed |= bool(found)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
