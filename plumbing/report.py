"""What a run shows: trees in rollouts.jsonl, curves.png, and report.html, a page that needs only a browser.

docs/metrics.md explains each name. The trees of an evaluation are scored once more, after the step, so that
training pays nothing for step attention. plumbing/report.html draws what is collected here."""

import hashlib
import json
from functools import partial
from pathlib import Path

import torch

from fci import StepHook, fci_of_response, step_attention, step_ids_of
from plumbing.checkpoints import whole_lines, write_whole
from plumbing.nouns import Score, Sequence
from plumbing.processes import rank
from plumbing.settings import InputError, refuse_if

ROOM = 4_000_000  # bytes of trees on a page, which should stay quick to open; one tree is always there
TREES = 3  # with everything, at an evaluation
MAX_STEPS = 256  # of a response whose step attention is kept, T x T numbers: a step may be a single token


class AttentionHook(StepHook):
    """FCI, and the step attention that it is made of, to look at."""

    def __init__(self, step_ids, **constants):
        super().__init__(step_ids, **constants)
        self.alphas: list[torch.Tensor] = []  # per layer, alpha (B, H, S, S) of Eq. 4

    def add_layer(self, query, key, mask, scale) -> None:
        super().add_layer(query, key, mask, scale)
        self.alphas.append(step_attention(query, key, self.step_ids, self.n_steps, mask, scale))

    def fci(self) -> torch.Tensor:
        """(B, S, 3 + 2 S) fp32. Of each step k: its FCI; layer and head of the largest y[k] (Eq. 5), from 0;
        alpha[j, k] of all S steps j, as the maximum over layers and heads; and the same in that one head."""
        alpha, H = torch.cat(self.alphas, dim=1), self.y[0].shape[1]  # (B, layers x H, S, S)
        best = torch.cat(self.y, dim=1).argmax(dim=1)  # (B, S)
        own = alpha.gather(1, best[:, None, None].expand_as(alpha[:, :1]))[:, 0]  # (B, S, S)
        about = torch.stack([super().fci(), best // H, best % H], dim=-1)
        return torch.cat([about, alpha.amax(dim=1).mT, own.mT], dim=-1)


def describe_trees(due: list, step: int, trainer=None) -> list[dict]:
    """Lines of rollouts.jsonl: of problems with mixed outcomes the one with the most leaves, else the first;
    with a trainer (AttnRL) TREES of them, with everything, for which all processes must call it."""
    lines = []
    for p in sorted(due, key=lambda p: -p.mixed() * len(p.rollouts))[: TREES if trainer else 1]:
        rows = [short_form(r) for r in p.rollouts]
        for row, r, score in zip(rows, p.rollouts, score_again(p, trainer) if trainer else []):
            row |= full_form(r, score, trainer.token_text)
        about = {"step": step, "problem": p.text, "answers": p.answers, "branches": p.branches}
        lines.append(about | {"rollouts": rows})
    return lines


def score_again(problem, trainer) -> list[Score]:
    """Entropies and what AttentionHook measures of every rollout, under the current weights."""
    hook = partial(AttentionHook, delta=trainer.cfg.fci_delta, later=trainer.cfg.fci_later)
    step_ids = lambda r: [min(k, MAX_STEPS) for k in step_ids_of(len(problem.prompt_ids), r.steps)]
    sequences = [Sequence(problem.prompt_ids, r.ids, step_ids(r)) for r in problem.rollouts]
    return trainer.learner.score(sequences, with_entropy=True, hook=hook)


def short_form(r) -> dict:
    """A rollout in text and numbers."""
    row = {"family": r.family, "start": r.start, "length": len(r.ids), "reward": r.reward}
    row |= {"finished": r.finished, "steps": r.step_texts, "step_starts": [start for start, _ in r.steps]}
    return row | {"fci": r.fci, "advantages": spans(r.advantages)}


def full_form(r, score: Score, token_text) -> dict:
    """What a tree with everything adds: numbers of the rollout's own tokens, attention between its steps."""
    digits = lambda values: [round(float(x), 4) for x in values]
    row = {"tokens": [token_text(i) for i in r.ids[r.start :]], "logps": digits(r.logps[r.start :])}
    row["engine_gaps"] = [float(f"{gap:.2g}") for gap in r.gaps()]  # around 1e-7 where the two agree
    row["entropies"] = digits((r.entropies or score.entropies)[r.start :])
    T, S = len(r.steps), len(score.fci)
    if T > MAX_STEPS:
        return row
    row |= {"fci_again": digits(fci_of_response(score.fci[:, 0], r.n_scored, T))}
    row |= {"heads": [[int(layer), int(head)] for layer, head in score.fci[1 : T + 1, 1:3]]}
    largest, own = score.fci[:, 3 : 3 + S], score.fci[:, 3 + S :]  # (S, S) each, alpha[j, k] at [k, j]
    later = lambda alpha: [digits(alpha[k, k + 1 : T + 1]) for k in range(1, T + 1)]  # steps j > k
    return row | {"attention": later(largest), "head_attention": later(own)}


def spans(values: list[float]) -> list[list]:
    """[start, end, value] of each run of equal values.

    >>> spans([0.5, 0.5, -1.0])
    [[0, 2, 0.5], [2, 3, -1.0]]
    """
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return [[a, b, values[a]] for a, b in zip(starts, [*starts[1:], len(values)])]


def write(runs: list[Path], path: Path) -> None:
    """Write the page of these runs' directories. Raises InputError where one lacks a file, or OSError."""
    data = json.dumps({"runs": [collect(run, ROOM // len(runs)) for run in runs]}).replace("<", "\\u003c")
    write_whole(path, Path(__file__).with_suffix(".html").read_text("utf-8").replace("{{DATA}}", data))


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
        config, sources = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "source"))
        no_nan = dict(parse_constant=lambda name: None)  # nor infinity: browsers want JSON
        metrics = [json.loads(line, **no_nan) for line in whole_lines(run / "metrics.jsonl")]
        refuse_if(not metrics, "metrics.jsonl has no line")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run} ({error}): give the --output_dir of a run of train.py") from None
    lines, chosen, size = whole_lines(run / "rollouts.jsonl"), [], 0
    evaluations_first = lambda i: (b'"tokens"' not in lines[i], -int(lines[i][9 : lines[i].index(b",")]), i)
    for i in sorted(range(len(lines)), key=evaluations_first):  # and the newest; a line is {"step": N, ...
        if not chosen or size + len(lines[i]) <= room:
            chosen.append(i)
            size += len(lines[i])
    digest = hashlib.sha256(json.dumps(sources[-1].pop("files")).encode()).hexdigest()[:16]
    about = {"name": run.resolve().name, "config": config, "source": sources[-1] | {"digest": digest}}
    trees = [json.loads(lines[i]) for i in sorted(chosen)]
    return about | {"metrics": metrics, "trees": trees, "left_out": len(lines) - len(chosen)}


def plot_curves(out: Path) -> None:
    """curves.png from metrics.jsonl, over generated tokens, with what was run in its title."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    config, last = json.loads((out / "config.json").read_text()), records[-1]
    panels = {
        "accuracy": ["test_accuracy", "reward"],
        "shares": ["valid_tokens", "mc_valid", "filtered"],
        "problems per batch": ["batch_size", "valid_problems"],
        "entropy (nats per token)": ["entropy"],
        "length (tokens per response)": ["response_tokens", "test_tokens"],
        "drift: ratio to the first step": ["entropy", "response_tokens"],
    }
    figure = Figure(figsize=(13, 6.8), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, panels.items()):
        for name in names:
            points = [(r["total_tokens"] / 1000, r[name]) for r in records if r.get(name) is not None]
            if points:
                unit = points[0][1] if title.startswith("drift") else 1
                dots = {"marker": "o"} if name == "test_accuracy" else {}
                axis.plot(*zip(*((x, y / unit) for x, y in points)), label=name, **dots)
                axis.legend(frameon=False)
        axis.set(title=title, xlabel="thousand generated tokens", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    model, so_far = Path(config["model"]).name, f"step {last['step']}, {last['total_tokens']:,} tokens"
    figure.suptitle(f"{config['algo']} on {model}, seed {config['seed']}: {so_far}")
    figure.savefig(out / "curves.png", dpi=120)
