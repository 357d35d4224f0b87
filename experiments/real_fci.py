"""FCI in a real language model: is it more than position, and do its variants branch elsewhere?

    python experiments/real_fci.py --model models/SmolLM2-135M-Instruct --data train.jsonl --out runs/real_fci

Samples one response per problem at temperature 1 until enough have `--min_tokens` (a file keeps them batch by
batch, so the same command goes on), scores each with FCI as the paper defines it, as a mean over later steps,
and over a window of them (train.py's `--fci_later`), and prints per variant: the correlation of FCI with a
step's position, where branch points fall, and how many of them are those of the rule that takes the earliest
steps. The last row branches at random, to compare with.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import MethodConfig
from fci import StepHook, count_scored_steps, fci_of_response, split_steps, step_ids_of
from plumbing.checkpoints import append, cut_log, open_directory, whole_lines
from plumbing.engines import make_engine
from plumbing.learner import Learner
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Request, Sequence
from plumbing.problems import load_problems
from plumbing.settings import InputError, MachineConfig
from tree import Measured, branch_points

VARIANTS = ["sum", "mean", "window"]
CONTROL = "(at random)"
MAX_STEPS = 256  # of a response; one with more has fallen into a loop of line breaks


class AllVariants:
    """A StepHook for each of VARIANTS in one forward pass."""

    def __init__(self, step_ids: torch.Tensor, delta: int):
        self.hooks = [StepHook(step_ids, delta, later) for later in VARIANTS]

    def add_layer(self, *attention) -> None:
        for hook in self.hooks:
            hook.add_layer(*attention)

    def fci(self) -> torch.Tensor:
        """(B, S, variants)."""
        return torch.stack([hook.fci() for hook in self.hooks], dim=-1)


def sample(args, tokenizer, model) -> list[dict]:
    """Responses long enough, and the prompts they answer; those in the file first."""
    path = args.out / "samples.jsonl"
    lines = whole_lines(path)
    kept = len(lines) // args.batch * args.batch
    cut_log(path, kept)  # a batch that was interrupted goes
    done = [json.loads(line) for line in lines[:kept]]
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in load_problems(args.data)]
    ends = lambda row: len(row["ids"]) < args.max_tokens or not args.ended
    wanted = lambda row: len(row["ids"]) >= args.min_tokens and ends(row)
    long = list(filter(wanted, done))
    if len(long) < args.responses:
        longest, machine = max(map(len, prompts)) + args.max_tokens, MachineConfig(engine=args.engine)
        engine = make_engine(machine, args.model, tokenizer, model, max_tokens=longest)
    bar = tqdm(total=args.responses, initial=len(long), unit="response")
    while len(long) < args.responses and len(done) < len(prompts):
        chosen = prompts[len(done) : len(done) + args.batch]
        torch.manual_seed(args.seed + len(done))
        requests = [Request(prompt, args.max_tokens) for prompt in chosen]
        rows = [{"prompt": q.prompt_ids, "ids": r.ids} for q, r in zip(requests, engine.generate(requests))]
        append(path, *rows)
        done += rows
        found = list(filter(wanted, rows))
        bar.update(len(found))
        long += found
    bar.close()
    cut_off = sum(len(row["ids"]) == args.max_tokens for row in long[: args.responses])
    print(f"{len(done)} responses sampled, {len(long)} of {args.min_tokens} tokens or more", end="")
    print(f"; of the {min(len(long), args.responses)} used {cut_off} do not end within {args.max_tokens}")
    return long[: args.responses]


def measure(row: dict, tokenizer, learner: Learner, cfg: MethodConfig) -> dict[str, dict] | None:
    """Of one response, per variant and for the control: correlation of FCI with position, place of branch
    points, overlap with the earliest steps. None where anywhere fewer than three steps have FCI > 0, or none
    is branched, or there are more than MAX_STEPS."""
    texts = [tokenizer.decode([i]) for i in row["ids"]]
    steps = split_steps(texts)
    n_scored, starts = count_scored_steps(texts, steps), [start for start, _ in steps]
    if len(steps) - cfg.fci_delta - 1 < 3 or len(steps) > MAX_STEPS:  # the first and the last have no FCI
        return None
    sequence = Sequence(row["prompt"], row["ids"], step_ids_of(len(row["prompt"]), steps))
    how = cfg.n_branch_points, cfg.branch_quantile, cfg.min_branch_gap, np.random.default_rng(0)
    score, found = learner.score([sequence], True, partial(AllVariants, delta=cfg.fci_delta))[0], {}
    for name, of_steps in zip([*VARIANTS, CONTROL], [*score.fci.T, score.fci[:, 0]]):
        fci = np.array(fci_of_response(of_steps, n_scored, len(steps)))
        response = Measured([""] * len(steps), starts, fci, score.entropies, 0.0, n_scored)
        points = branch_points("random" if name == CONTROL else "fci", response, *how)
        earliest = branch_points("earliest", response, *how)
        positive = np.flatnonzero(fci > 0)
        if len(positive) < 3 or not points:
            return None
        correlation = np.corrcoef(fci[positive], positive)[0, 1]
        place = np.mean([p / len(row["ids"]) for p in points])
        overlap = len(set(points) & set(earliest)) / len(points)
        found[name] = dict(correlation=correlation, place=place, overlap=overlap, steps=len(steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a file or data set of problems")
    parser.add_argument("--responses", type=int, default=200)
    parser.add_argument("--min_tokens", type=int, default=1000)
    parser.add_argument("--max_tokens", type=int, default=2000)
    parser.add_argument("--ended", action="store_true", help="only responses that end within --max_tokens")
    parser.add_argument("--batch", type=int, default=64, help="responses sampled at once")
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/real_fci"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    decisive = "model", "data", "max_tokens", "batch", "engine", "seed"
    settings = {name: str(getattr(args, name)) for name in decisive}
    try:
        open_directory(args.out, "settings.json", settings, "sampling")
    except InputError as error:
        sys.exit(f"error: {error}")
    tokenizer, model, cfg = load_tokenizer(args.model), load_model(args.model), MethodConfig()
    rows = sample(args, tokenizer, model)
    learner = Learner(model, None, None, MachineConfig(autocast="none"))
    measured = [measure(row, tokenizer, learner, cfg) for row in tqdm(rows, unit="response")]
    measured = [m for m in measured if m]
    print(f"{len(measured)} of {len(rows)} have three scored steps and a branch point")
    columns = ["correlation", "place", "overlap", "steps"]
    print(f"\n| FCI of later steps | {' | '.join(columns)} |\n{'| --- ' * 5}|")
    for row in [*VARIANTS, CONTROL]:
        cells = []
        for name in columns:
            values = np.array([m[row][name] for m in measured])
            interval = f"{values.mean():.2f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.2f}"
            cells.append("–" if (row, name) == (CONTROL, "correlation") else interval)
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
