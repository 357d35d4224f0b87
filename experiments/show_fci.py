"""Look at the FCI of one response: its steps with bars, the top 20 % and the branch points, in the terminal or as Figure 2.

    python fci.py --problem "a=3, b=a+2, …, find k."                     # the model answers, then its answer is scored
    python fci.py --model DIR --text response.txt --out page.html        # a response you have; .html or .png draws Figure 2

`--problem` with `--text` says what the text answers; `--text` alone is read under the chat template with an empty problem. Constants
are those of `MethodConfig`. `python fci.py` and `python experiments/show_fci.py` are the same program.
"""

import argparse
import html
import io
import os
import sys
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import MethodConfig  # noqa: E402
from fci import FCI, check_model, count_scored_steps, fci_scores, split_steps, step_ids_of, token_logps  # noqa: E402
from sampler import Request, TorchEngine, context_length, load_model, load_tokenizer, prompt_ids  # noqa: E402
from tree import branch_points, candidates  # noqa: E402

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


@torch.no_grad()
def score(model, tokenizer, prompt: list[int], response: list[int], cfg: MethodConfig) -> Scored:
    """FCI and branch points of one response, as in training."""
    tokens = [tokenizer.decode([i]) for i in response]
    steps = split_steps(tokens)
    scores = FCI(torch.tensor([step_ids_of(len(prompt), steps)], device=model.device), cfg.fci_delta)
    _, entropies = token_logps(model, [(prompt, response)], cfg.temperature, cfg.logit_chunk, scores, with_entropy=True)
    fci = fci_scores(scores.values[0], count_scored_steps(tokens, steps), len(steps)).cpu().numpy()
    starts = [start for start, _ in steps]
    points = branch_points(
        "fci", starts, fci, entropies.cpu().numpy(), cfg.n_branch_points, cfg.branch_quantile, cfg.min_branch_gap, np.random.default_rng(0)
    )
    top = candidates(fci, cfg.branch_quantile).tolist()
    return Scored([tokenizer.decode(response[a:b]) for a, b in steps], starts, fci, top, [starts.index(p) for p in points])


def one_line(text: str, columns: int) -> str:
    """Text without line breaks or control characters, cut to `columns` of a terminal (wide characters take two).

    >>> one_line("so x = 3.\\n\\n", 80), one_line("你好吗", 5)
    ('so x = 3.', '你好…')
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    width = lambda c: 0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")  # noqa: E731
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
    """A line a step, at most 80 columns; `*` marks the top 20 %, `>` the branch points."""
    highest = max(s.fci.max(), 1e-9)
    print(f"{'step':>4} {'token':>5} {'FCI':>6}")
    for k, (text, start, y) in enumerate(zip(s.texts, s.starts, s.fci)):
        mark = ("*" if k in s.top else " ") + (">" if k in s.branches else " ")
        bar = "█" * round(BAR * y / highest)
        line = f"{k + 1:4d} {start:5d} {y:6.3f} {bar:{BAR}s} {mark} "
        print(line + (one_line(text, COLUMNS - len(line)) or "⏎"))


def draw(s: Scored, out: Path, title: str) -> None:
    """Figure 2: FCI against step index, with the text of the peaks; an .html page also holds the whole response, shaded by FCI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    index = np.arange(1, len(s.fci) + 1)
    axis.plot(index, s.fci, color="0.4", linewidth=1, marker=".", markersize=4)
    axis.plot(index[s.top], s.fci[s.top], "o", color="tab:blue", label="top 20 %")
    axis.plot(index[s.branches], s.fci[s.branches], "v", color="tab:red", markersize=10, label="branch points")
    before, after = np.r_[0, s.fci[:-1]], np.r_[s.fci[1:], 0]
    peaks = [k for k in np.argsort(-s.fci, kind="stable") if s.fci[k] > 0 and before[k] <= s.fci[k] >= after[k]][:6]
    for rank, k in enumerate(sorted(peaks)):  # labels in a row above the curve, in the order of the steps
        label = "\n".join(textwrap.wrap(one_line(s.texts[k], 54), 18)).replace("$", r"\$")
        place = ((rank + 0.5) / len(peaks), 1.04)
        arrow = dict(arrowstyle="-", color="0.7", linewidth=0.7)
        axis.annotate(label, (k + 1, s.fci[k]), place, textcoords="axes fraction", fontsize=8, ha="center", va="bottom", arrowprops=arrow)
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
        rows.append(f'<p style="{shade}"><small>{k + 1} · {y:.2f}{mark}</small> {html.escape(text.strip())}</p>')
    style = (
        "body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto } p { margin: 0; padding: .2em .5em; white-space: pre-wrap }"
    )
    head = f'<!doctype html>\n<meta charset="utf-8"><title>FCI</title><style>{style} svg {{ max-width: 100%; height: auto }}</style>'
    return "\n".join([head, f"<h1>Forward Context Influence</h1><p>{html.escape(title)}</p>", picture, *rows, ""])


def read_response(args, tokenizer, model, prompt: list[int], context: float) -> list[int]:
    """Token ids of the response: those of --text, or those that the model samples. Raises ValueError."""
    if not args.text:
        budget = int(min(args.max_new_tokens, context - len(prompt)))
        return TorchEngine(model, tokenizer).generate([Request(prompt, budget)], temperature=args.temperature)[0].ids
    ids = tokenizer(args.text, add_special_tokens=False)["input_ids"]
    if len(prompt) + len(ids) > context:
        raise ValueError(f"prompt and text have {len(prompt) + len(ids)} tokens, the model's context {context}: cut the text")
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown:
        print(f"note: {unknown} of {len(ids)} tokens of the text are unknown to this tokenizer", file=sys.stderr)
    return ids


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fci.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny"), help="directory or hub name; the default is the embedded reasoner")
    parser.add_argument("--text", type=Path, help="file with a response; `-` reads standard input")
    parser.add_argument("--problem", default="", help="the problem; without --text the model answers it first")
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
        parser.error(f"--max_new_tokens is {args.max_new_tokens} and --temperature {args.temperature}: they must be >= 1 and >= 0")
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
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's context {context}: shorten the problem")
    model = load_model(args.model)
    check_model(model)
    torch.manual_seed(args.seed)
    cfg = MethodConfig()
    response = read_response(args, tokenizer, model, prompt, context)
    s = score(model, tokenizer, prompt, response, cfg)
    heads = f"{model.config.num_hidden_layers} layers x {model.config.num_attention_heads} heads"
    title = f"{Path(args.model).name}: {len(s.texts)} steps, {len(response)} tokens, {heads}"
    print(f"{title}\nFCI: attention from steps at least {cfg.fci_delta} later; * top {cfg.branch_quantile:.0%}, > branch point\n")
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
