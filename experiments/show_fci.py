"""Look at the FCI of one response, step by step, with its branch points: in the terminal, or as Figure 2.

    # the model answers, then its answer is scored
    python experiments/show_fci.py --problem "a=3, b=a+2, …, find k."
    # a response you have; .html or .png draws Figure 2
    python experiments/show_fci.py --model DIR --text response.txt --out page.html

`--problem` with `--text` says what the text answers; `--text` alone is read under the chat template with an
empty problem. Constants are those of `MethodConfig`.
"""

import argparse
import html
import io
import os
import sys
import textwrap
import unicodedata
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import MethodConfig, Rollout
from fci import StepHook, fci_of_response, step_ids_of
from plumbing.learner import Learner
from plumbing.models import context_length, load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Request, Sequence
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from tree import branch_points, fci_candidates

COLUMNS = 80
BAR = 16  # columns of the longest bar


@dataclass
class Scored:
    """One response with its FCI."""

    texts: list[str]  # of the T steps
    starts: list[int]  # first token of each step
    fci: np.ndarray  # (T,)
    top: list[int]  # candidates of Eq. 7, as indices into the steps
    branches: list[int]  # steps at which ATB would branch


def score(learner: Learner, tokenizer, prompt: list[int], response: list[int], cfg: MethodConfig) -> Scored:
    """FCI and branch points of one response, as in training."""
    rollout = Rollout(family=0, ids=response)
    rollout.set_steps([tokenizer.decode([i]) for i in response])
    sequence = Sequence(prompt, response, step_ids_of(len(prompt), rollout.steps))
    measured = learner.score([sequence], with_entropy=True)[0]
    rollout.entropies = measured.entropies
    rollout.fci = fci_of_response(measured.fci, rollout.n_scored, len(rollout.steps))
    seen, quantile = rollout.measured(), cfg.branch_quantile
    rng = np.random.default_rng(0)
    points = branch_points("fci", seen, cfg.n_branch_points, quantile, cfg.min_branch_gap, rng)
    return Scored(
        texts=[tokenizer.decode(response[a:b]) for a, b in rollout.steps],
        starts=seen.starts,
        fci=seen.fci,
        top=fci_candidates(seen.fci, quantile).tolist(),
        branches=[seen.starts.index(point) for point in points],
    )


def one_line(text: str, columns: int) -> str:
    """Text without line breaks or control characters, cut to `columns` of a terminal; wide characters take
    two.

    >>> one_line("so x = 3.\\n\\n", 80), one_line("你好吗", 5)
    ('so x = 3.', '你好…')
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())

    def width(c: str) -> int:
        if unicodedata.combining(c):
            return 0
        return 2 if unicodedata.east_asian_width(c) in "WF" else 1

    if sum(map(width, text)) <= columns:
        return text
    cut, used = "", 1  # the ellipsis
    for c in text:
        used += width(c)
        if used > columns:
            break
        cut += c
    return cut + "…"


def print_bars(s: Scored) -> None:
    """A line per step, at most 80 columns; `*` marks the top 20 %, `>` the branch points."""
    highest = max(s.fci.max(), 1e-9)
    print(f"{'step':>4} {'token':>5} {'FCI':>6}")
    for k, (text, start, y) in enumerate(zip(s.texts, s.starts, s.fci)):
        mark = ("*" if k in s.top else " ") + (">" if k in s.branches else " ")
        bar = "█" * round(BAR * y / highest)
        line = f"{k + 1:4d} {start:5d} {y:6.3f} {bar:{BAR}s} {mark} "
        print(line + (one_line(text, COLUMNS - len(line)) or "⏎"))


def draw(s: Scored, out: Path, title: str) -> None:
    """Figure 2: FCI against step index, with the text of the peaks.

    An .html page also holds the whole response, shaded by FCI.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    index = np.arange(1, len(s.fci) + 1)
    axis.plot(index, s.fci, color="0.4", linewidth=1, marker=".", markersize=4)
    axis.plot(index[s.top], s.fci[s.top], "o", color="tab:blue", label="top 20 %")
    markers = dict(color="tab:red", markersize=10, label="branch points")
    axis.plot(index[s.branches], s.fci[s.branches], "v", **markers)
    before, after = np.r_[0, s.fci[:-1]], np.r_[s.fci[1:], 0]
    is_peak = (s.fci > 0) & (before <= s.fci) & (s.fci >= after)
    peaks = [k for k in np.argsort(-s.fci, kind="stable") if is_peak[k]][:6]
    arrow = dict(arrowstyle="-", color="0.7", linewidth=0.7)
    style = dict(textcoords="axes fraction", fontsize=8, ha="center", va="bottom", arrowprops=arrow)
    for rank, k in enumerate(sorted(peaks)):  # labels in a row above the curve, in the order of the steps
        label = "\n".join(textwrap.wrap(one_line(s.texts[k], 54), 18)).replace("$", r"\$")
        axis.annotate(label, (k + 1, s.fci[k]), ((rank + 0.5) / len(peaks), 1.04), **style)
    axis.set(xlabel="step", ylabel="FCI (Eq. 6)", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    if out.suffix == ".png":
        figure.savefig(out, dpi=130)
    else:
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        picture = svg.getvalue()
        out.write_text(page(s, title, picture[picture.index("<svg") :]), encoding="utf-8")
    plt.close(figure)


def page(s: Scored, title: str, picture: str) -> str:
    """A self-contained HTML page: the picture, then every step on a background that darkens with its FCI."""
    highest = max(s.fci.max(), 1e-9)
    rows = []
    for k, (text, y) in enumerate(zip(s.texts, s.fci)):
        mark = " ▼" if k in s.branches else ""
        shade = f"background: rgba(70, 130, 200, {0.6 * y / highest:.2f})"
        about = f"<small>{k + 1} · {y:.2f}{mark}</small>"
        rows.append(f'<p style="{shade}">{about} {html.escape(text.strip())}</p>')
    style = (
        "body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto } "
        "p { margin: 0; padding: .2em .5em; white-space: pre-wrap } svg { max-width: 100%; height: auto }"
    )
    head = f'<!doctype html>\n<meta charset="utf-8"><title>FCI</title><style>{style}</style>'
    heading = f"<h1>Forward Context Influence</h1><p>{html.escape(title)}</p>"
    return "\n".join([head, heading, picture, *rows, ""])


def read_response(args, tokenizer, model, prompt: list[int], context: float) -> list[int]:
    """Token ids of the response: those of --text, or those that the model samples. Raises ValueError."""
    if not args.text:
        request = Request(prompt, int(min(args.max_new_tokens, context - len(prompt))))
        return TorchEngine(model, tokenizer).generate([request], temperature=args.temperature)[0].ids
    ids = tokenizer(args.text, add_special_tokens=False)["input_ids"]
    if len(prompt) + len(ids) > context:
        have = f"prompt and text have {len(prompt) + len(ids)} tokens"
        raise ValueError(f"{have}, the model's context {context}: cut the text")
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown:
        note = f"note: {unknown} of {len(ids)} tokens of the text are unknown to this tokenizer"
        print(note, file=sys.stderr)
    return ids


def parse_args() -> argparse.Namespace:
    prog, raw = "python experiments/show_fci.py", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=raw)
    default = "directory or hub name; the default is the embedded reasoner"
    parser.add_argument("--model", default=str(ROOT / "tiny"), help=default)
    parser.add_argument("--text", type=Path, help="file with a response; `-` reads standard input")
    parser.add_argument(
        "--problem", default="", help="the problem; without --text the model answers it first"
    )
    parser.add_argument("--out", type=Path, help="also draw Figure 2 into this .png or .html")
    parser.add_argument("--max_new_tokens", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=0.6, help="of the answer; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.text and not args.problem.strip():
        parser.error("give --text FILE, or --problem for the model to answer")
    if args.out and (args.out.suffix not in (".png", ".html") or not args.out.resolve().parent.is_dir()):
        parser.error(f"--out is {args.out}: it needs to end in .png or .html, in a folder that exists")
    if args.max_new_tokens < 1 or args.temperature < 0:
        given = f"--max_new_tokens is {args.max_new_tokens} and --temperature {args.temperature}"
        parser.error(f"{given}: they must be >= 1 and >= 0")
    if args.text:
        try:
            args.text = sys.stdin.read() if str(args.text) == "-" else args.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"cannot read --text: {error}")
        if not args.text.strip():
            parser.error("--text is empty: it needs a response")
    return args


def run(args: argparse.Namespace) -> None:
    tokenizer, context = load_tokenizer(args.model), context_length(args.model)
    prompt = prompt_ids(tokenizer, args.problem)
    if len(prompt) >= context:
        has = f"the prompt has {len(prompt)} tokens, the model's context {context}"
        raise ValueError(f"{has}: shorten the problem")
    model, cfg = load_model(args.model), MethodConfig()
    hook = partial(StepHook, delta=cfg.fci_delta, later=cfg.fci_later)
    machine = MachineConfig(autocast="none")
    learner = Learner(model, None, None, machine, temperature=cfg.temperature, make_hook=hook)
    torch.manual_seed(args.seed)
    response = read_response(args, tokenizer, model, prompt, context)
    s = score(learner, tokenizer, prompt, response, cfg)
    heads = f"{model.config.num_hidden_layers} layers x {model.config.num_attention_heads} heads"
    title = f"{Path(args.model).name}: {len(s.texts)} steps, {len(response)} tokens, {heads}"
    marks = f"* top {cfg.branch_quantile:.0%}, > branch point"
    print(f"{title}\nFCI: attention from steps at least {cfg.fci_delta} later; {marks}\n")
    print_bars(s)
    if args.out:
        draw(s, args.out, title)
        print(f"\nwrote {args.out}")


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        run(parse_args())
        sys.stdout.flush()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
