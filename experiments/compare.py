"""Train rows of the paper's tables over several seeds and print one table.

    python experiments/compare.py                                              # AttnRL, TreeRL, GRPO; 5 seeds
    python experiments/compare.py --rows tables                                # rows of Tables 2 and 3
    python experiments/compare.py --rows fields --seeds 2                      # single fields
    python experiments/compare.py --rows settings --first_seed 100 --seeds 3 --out runs/settings

Every run is `python train.py FLAGS --seed S`, with the same budget of generated tokens. Runs that are
complete are not repeated, so more seeds or rows can be added later. Two runs share the machine, one thread
each; times are then no benchmark.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = {  # Table 1
    "AttnRL": "--algo attnrl",
    "TreeRL": "--algo treerl",
    "GRPO": "--algo grpo",
    "GRPO with 6 responses": "--algo grpo --group_size 6 --batch_size 30",
}
TABLES = {  # Tables 2 and 3
    "TreeRL, one-step off-policy": "--algo treerl --off_policy true",
    "TreeRL + ATB": "--algo treerl --branching fci --min_branch_gap 512",
    "AttnRL without FCI filter": "--fci_filter none",
    "AttnRL, easy problems left out": "--fci_filter drop_easy",
    "AttnRL without difficulty-aware expansion": "--expansion uniform",
}
FIELDS = {  # single fields
    "AttnRL, Eq. 8 read literally": "--fci_filter all",
    "AttnRL, on-policy": "--off_policy false",
    "AttnRL, fixed batch": "--adaptive_batch false",
    "AttnRL, entropy branching": "--branching entropy --min_branch_gap 0",
    "AttnRL, random branching": "--branching random",
    "AttnRL, earliest steps": "--branching earliest",
    "AttnRL, group advantage": "--advantage group",
    "AttnRL, no KL": "--kl_coef 0",
}
# What tiny's minibatch and learning rate were chosen by, on rows that nobody argues for
SHORT = "--token_budget 200000 --eval_every 1000"
SETTINGS = {
    f"{name}, {size} sequences, lr {lr}": f"{flags} --minibatch_sequences {size} --lr {lr} {SHORT}"
    for size in (24, 48, 96)
    for lr in ("1e-4", "2e-4", "4e-4")
    for name, flags in {"GRPO": "--algo grpo", "random branching": "--branching random"}.items()
}
ROWS = {"algorithms": ALGORITHMS, "tables": TABLES, "fields": FIELDS, "settings": SETTINGS}
# Student's t, 95%, by number of seeds
T95 = dict(enumerate([12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26], start=2))


def run(name: str, flags: str, seed: int, out: Path) -> list[dict]:
    """Metrics of one run, a dict per line."""
    directory = out / f"{name.replace(' ', '_').replace(',', '').replace('.', '')}-{seed}"
    settings = ["--seed", str(seed), "--output_dir", str(directory), "--threads", "1"]
    command = [sys.executable, str(ROOT / "train.py"), *flags.split(), *settings]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {finished.stderr.strip().splitlines()[-1]}")
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    before, after = records[0]["test_accuracy"], records[-1]["test_accuracy"]
    print(f"{name}, seed {seed}: {before:.1%} -> {after:.1%}", file=sys.stderr, flush=True)
    return records


def interval(values: list[float]) -> str:
    """Mean and 95% t-interval of percentages."""
    if len(values) < 2:
        return f"{100 * values[0]:.1f}"
    half = T95.get(len(values), 2.0) * stdev(values) / len(values) ** 0.5
    return f"{100 * mean(values):.1f} ± {100 * half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", choices=ROWS, default="algorithms")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()

    rows, seeds = ROWS[args.rows], range(args.first_seed, args.first_seed + args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            name: [pool.submit(run, name, flags, seed, args.out) for seed in seeds]
            for name, flags in rows.items()
        }
        results = {name: [f.result() for f in runs] for name, runs in futures.items()}

    print(f"| row | flags | before | after | generated tokens | problems | updates |\n{'| --- ' * 7}|")
    for name, runs in results.items():
        last = [records[-1] for records in runs]
        totals = [
            f"{mean(r[f'total_{key}'] for r in last):,.0f}" for key in ("tokens", "problems", "updates")
        ]
        after = interval([records[-1]["test_accuracy"] for records in runs])
        before = interval([records[0]["test_accuracy"] for records in runs])
        print(f"| {name} | `{rows[name]}` | {before} | {after} | {' | '.join(totals)} |")


if __name__ == "__main__":
    main()
