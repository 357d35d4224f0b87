"""report.html: a run, or several, on one page that needs nothing but a browser; and curves.png.

Here the page's data are collected from the files of each run; plumbing/report.html draws them.
"""

import hashlib
import json
from pathlib import Path

from plumbing.checkpoints import write_whole
from plumbing.processes import rank
from plumbing.settings import InputError

TEMPLATE = Path(__file__).with_suffix(".html")
ROOM = 4_000_000  # bytes of trees on a page, which should stay quick to open; one tree is always there


def write(runs: list[Path], path: Path) -> None:
    """Write the page of these runs' directories. Raises InputError where one lacks a file, or OSError."""
    data = json.dumps({"runs": [collect(run, ROOM // len(runs)) for run in runs]})
    # In a script, "<" could end it.
    write_whole(path, TEMPLATE.read_text("utf-8").replace("{{DATA}}", data.replace("<", "\\u003c")))


def draw(out: Path) -> None:
    """curves.png and report.html of a run, by rank 0. What goes wrong is said, and stops nothing."""
    if rank() > 0:
        return
    try:
        plot_curves(out)
        write([out], out / "report.html")
    except (OSError, ValueError) as error:
        print(f"curves.png or report.html was not written: {error}")


def collect(run: Path, room: int) -> dict:
    """What the page says of a run, as plain JSON. room: bytes of trees."""
    try:
        config = json.loads((run / "config.json").read_text())
        source = json.loads((run / "source.json").read_text())[-1]
        no_nan = lambda name: None  # which is not JSON
        metrics = [json.loads(x, parse_constant=no_nan) for x in whole_lines(run / "metrics.jsonl")]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run} ({error}): give the --output_dir of a run of train.py") from None
    lines = whole_lines(run / "rollouts.jsonl") if (run / "rollouts.jsonl").exists() else []
    chosen, size = [], 0
    evaluations_first = lambda i: (b'"tokens"' not in lines[i], -i)  # and the newest
    for i in sorted(range(len(lines)), key=evaluations_first):
        if not chosen or size + len(lines[i]) <= room:
            chosen.append(i)
            size += len(lines[i])
    digest = hashlib.sha256(json.dumps(source.pop("files")).encode()).hexdigest()[:16]
    about = {"name": run.resolve().name, "config": config, "source": source | {"digest": digest}}
    trees = [json.loads(lines[i]) for i in sorted(chosen)]
    return about | {"metrics": metrics, "trees": trees, "left_out": len(lines) - len(chosen)}


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a file that a run may be writing to."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def plot_curves(out: Path) -> None:
    """curves.png from metrics.jsonl, over generated tokens, with what was run in its title."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    config, last = json.loads((out / "config.json").read_text()), records[-1]
    for name in ("entropy", "response_tokens"):
        measured = [r for r in records if r.get(name) is not None]
        for r in measured:
            r[f"{name} / first"] = r[name] / measured[0][name] if measured[0][name] else None
    panels = {
        "accuracy": ["test_accuracy", "reward"],
        "shares": ["valid_tokens", "mc_valid", "filtered"],
        "problems per batch": ["batch_size", "valid_problems"],
        "entropy (nats per token)": ["entropy"],
        "length (tokens per response)": ["response_tokens", "test_tokens"],
        "drift since the first step": ["entropy / first", "response_tokens / first"],
    }
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, panels.items()):
        for name in names:
            points = [(r["total_tokens"] / 1000, r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if name == "test_accuracy" else None)
                axis.legend(frameon=False)
        axis.set(title=title, xlabel="thousand generated tokens", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    model, so_far = Path(config["model"]).name, f"step {last['step']}, {last['total_tokens']:,} tokens"
    figure.suptitle(f"{config['algo']} on {model}, seed {config['seed']}: {so_far}")
    figure.savefig(out / "curves.png", dpi=120)
