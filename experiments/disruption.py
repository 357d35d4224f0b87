"""Figure 3: hide one step from a model while it finishes its answer. Which steps does it need?

    python experiments/disruption.py                      # the embedded reasoner
    python experiments/disruption.py --distance 4         # hidden only from steps that FCI counts
    python experiments/disruption.py --model DIR --data math500.jsonl --max_new_tokens 8192 --draws 1

Takes responses that are right, cuts each where `--distance` steps from the hidden one on are complete, and
samples the rest again, 8 times (the paper's number) as it is (the control), and 8 times with the attention of
every further token to the hidden step set to zero. Tokens keep their positions. With distance 1 the very next
step must do without it, with distance 4 = Delta only the steps whose attention FCI sums.

The step is drawn at random from a class of the response's scored steps: the top 20 % by FCI, the other 80 %,
or the top 20 % by mean token entropy. "Ratio" is the accuracy of the disrupted continuations over that of the
control, "loss" the control's minus theirs, with 95 % intervals over problems. The loss is also given by the
step's place in the response (five bins): early steps have a high FCI, and much depends on them.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import MethodConfig, Rollout
from eval import grade
from fci import fci_of_response, step_ids_of
from plumbing.grader import Grader
from plumbing.learner import Learner, pack
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Request, Sequence
from plumbing.problems import load_problems
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from tree import fci_candidates

CLASSES = ["FCI top 20 %", "FCI other 80 %", "entropy top 20 %"]
BINS = 5


@dataclass
class Cut:
    """A right response, cut some steps after one that will be hidden."""

    problem: int  # index
    kind: str  # of CLASSES
    fifth: int  # place of the hidden step in the response
    prompt_ids: list[int]
    prefix: list[int]  # what is kept of the response
    span: tuple[int, int]  # of the hidden step, in prompt + prefix


@torch.no_grad()
def continue_without(model, engine, prefixes, spans, max_new_tokens, temperature) -> list[list[int]]:
    """Sample on from lists of token ids while the tokens of `spans` are hidden from all that follows.

    spans: (start, end) in each prefix, or None.
    """
    longest = max(map(len, prefixes))
    ids = torch.full((len(prefixes), longest), engine.eos_ids[0])
    real, visible = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prefix, span) in enumerate(zip(prefixes, spans)):
        padding = longest - len(prefix)  # on the left
        ids[row, padding:] = torch.tensor(prefix)
        real[row, padding:] = visible[row, padding:] = 1
        if span:
            visible[row, padding + span[0] : padding + span[1]] = 0
    special = dict(eos_token_id=engine.eos_ids, pad_token_id=engine.eos_ids[0])
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=max_new_tokens)
    ids, real, visible = (x.to(model.device) for x in (ids, real, visible))
    positions = (real.cumsum(1) - 1).clamp(min=0)
    # The prefix is read with everything in sight. Not so what is sampled, and the last token of the prefix,
    # which is read again to predict the first one.
    read = model(ids, attention_mask=real, position_ids=positions, logits_to_keep=1)
    read.past_key_values.crop(longest - 1)
    output = model.generate(
        ids,
        attention_mask=visible,
        position_ids=positions,
        past_key_values=read.past_key_values,
        generation_config=GenerationConfig(**sampling, **special),
    )
    return output[:, longest:].tolist()


def classes_of(
    fci: np.ndarray, entropies: np.ndarray, steps: list[tuple[int, int]], last: int, quantile: float
) -> dict[str, np.ndarray]:
    """Indices of the steps of each class, among those from the second one (the first has FCI 0 by rule) up to
    `last`, exclusive."""
    scored = np.arange(1, last)
    if len(scored) < 2:
        return {}
    entropy = np.array([entropies[a:b].mean() for a, b in steps])
    top = fci_candidates(fci[scored], quantile)
    uncertain = entropy[scored] >= np.quantile(entropy[scored], 1 - quantile)
    return dict(zip(CLASSES, (scored[top], np.delete(scored, top), scored[uncertain])))


def mean_with_interval(problems: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Mean over problems, whose draws are not independent, and its 95 % half-width, NaN for one problem."""
    means = np.array([values[problems == problem].mean() for problem in np.unique(problems)])
    return means.mean(), 1.96 * means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")


def loss(rows: np.ndarray) -> str:
    """rows (n, 4): problem, fifth, accuracy of control and disrupted. What hiding costs, in points."""
    if not len(rows):
        return "–"
    mean, half = mean_with_interval(rows[:, 0], rows[:, 2] - rows[:, 3])
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def ratio(rows: np.ndarray) -> str:
    """rows as in `loss`. Disrupted over control, both means over problems; interval by the delta method."""
    if not rows[:, 2].any():
        return "–"
    control, disrupted = (mean_with_interval(rows[:, 0], rows[:, column])[0] for column in (2, 3))
    quotient = disrupted / control
    _, half = mean_with_interval(rows[:, 0], (rows[:, 3] - quotient * rows[:, 2]) / control)
    return f"{quotient:.2f} ± {half:.2f}"


def draw(results: dict[str, np.ndarray], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, rows) in enumerate(results.items()):
        for fifth in np.unique(rows[:, 1]):
            inside = rows[rows[:, 1] == fifth]
            mean, half = mean_with_interval(inside[:, 0], inside[:, 3])
            label = name if fifth == rows[:, 1].min() else None  # once per class
            place = fifth + 1 + 0.27 * (i - 1)
            outline = dict(edgecolor=f"C{i}", linewidth=2)  # shows a bar of height 0
            axis.bar(place, mean, 0.22, yerr=half, color=f"C{i}", label=label, **outline)
    axis.set(xlabel="place of the hidden step in the response, fifths", xlim=(0.5, BINS + 0.5))
    axis.set(ylabel="accuracy with the step hidden", ylim=(0, 1.02))
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def right_responses(
    engine: TorchEngine, learner: Learner, tokenizer, problems: list[dict], cfg: MethodConfig
) -> list[tuple[int, Rollout]]:
    """One response per problem; those that are right, scored, each with the index of its problem."""
    requests = [Request(p["prompt_ids"], cfg.max_response_tokens) for p in problems]
    responses = engine.generate(requests, temperature=cfg.temperature, top_p=cfg.top_p)
    texts = [tokenizer.decode(response.ids) for response in responses]
    rewards = Grader(grade).grade(texts, [p["answers"] for p in problems])
    right = [(i, Rollout(family=0, ids=responses[i].ids)) for i, reward in enumerate(rewards) if reward]
    sequences = []
    for i, rollout in right:
        rollout.set_steps([tokenizer.decode([token_id]) for token_id in rollout.ids])
        prompt = problems[i]["prompt_ids"]
        sequences.append(Sequence(prompt, rollout.ids, step_ids_of(len(prompt), rollout.steps)))
    for (_, rollout), score in zip(right, learner.score(sequences, with_entropy=True)):
        rollout.entropies = score.entropies
        rollout.fci = fci_of_response(score.fci, rollout.n_scored, len(rollout.steps))
    return right


def choose_cuts(
    right: list[tuple[int, Rollout]], problems: list[dict], quantile: float, draws: int, distance: int, rng
) -> list[Cut]:
    """`draws` steps of each class of each response."""
    cuts = []
    for i, rollout in right:
        last = rollout.n_scored - distance + 1  # a step must follow
        classes = classes_of(np.array(rollout.fci), rollout.entropies, rollout.steps, last, quantile)
        for kind, members in classes.items():
            for k in rng.choice(members, draws if len(members) else 0):
                start, end = rollout.steps[k]
                prompt, kept = problems[i]["prompt_ids"], rollout.steps[k + distance - 1][1]
                span = len(prompt) + start, len(prompt) + end
                fifth = BINS * start // len(rollout.ids)
                cuts.append(Cut(i, kind, fifth, prompt, rollout.ids[:kept], span))
    return cuts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--data", default=str(ROOT / "tiny/test.jsonl"))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=2, help="steps drawn per response and class")
    parser.add_argument("--samples", type=int, default=8, help="continuations of each kind per drawn step")
    kept = "the steps from the hidden one on that are kept; the rest must do without it"
    parser.add_argument("--distance", type=int, default=1, help=kept)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6)
    knob = "rows x longest sequence of a batch; a memory knob"
    parser.add_argument("--batch_tokens", type=int, default=32768, help=knob)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also draw the figure into this .png")
    args = parser.parse_args()
    if min(args.problems, args.draws, args.samples, args.distance) < 1:
        parser.error("--problems, --draws, --samples and --distance must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    problems = load_problems(args.data, "test")[: args.problems]
    problems = [p | {"prompt_ids": prompt_ids(tokenizer, p["problem"])} for p in problems]
    engine = TorchEngine(model, tokenizer, args.batch_tokens)
    cfg = MethodConfig(max_response_tokens=args.max_new_tokens, temperature=args.temperature)
    learner = Learner(model, None, None, MachineConfig(autocast="none"), temperature=cfg.temperature)

    # ---- choose steps, then sample on from each cut, with the step and without
    right = right_responses(engine, learner, tokenizer, problems, cfg)
    cuts = choose_cuts(right, problems, cfg.branch_quantile, args.draws, args.distance, rng)
    if not cuts:
        remedy = "take more --problems, more --max_new_tokens or a smaller --distance"
        sys.exit(f"error: no right response with enough steps: {remedy}")
    jobs = [cut for cut in cuts for _ in range(args.samples)]
    rewards = np.zeros((len(jobs), 2))  # control, disrupted
    lengths = [len(cut.prompt_ids + cut.prefix) + args.max_new_tokens for cut in jobs]
    for rows in tqdm(pack(range(len(lengths)), lengths, args.batch_tokens), desc="continuations", delay=2):
        batch = [jobs[row] for row in rows]
        prefixes = [cut.prompt_ids + cut.prefix for cut in batch]
        for column, spans in enumerate(([None for _ in batch], [cut.span for cut in batch])):
            sampled = continue_without(model, engine, prefixes, spans, args.max_new_tokens, args.temperature)
            for row, cut, ids in zip(rows, batch, sampled):
                text = tokenizer.decode(cut.prefix + ids)
                rewards[row, column] = grade(text, problems[cut.problem]["answers"])
    accuracy = rewards.reshape(len(cuts), args.samples, 2).mean(1)

    # ---- table
    measured = np.array([(cut.problem, cut.fifth, *pair) for cut, pair in zip(cuts, accuracy)])
    kinds = np.array([cut.kind for cut in cuts])
    results = {name: measured[kinds == name] for name in CLASSES}
    found = f"{len(right)} of {len(problems)} responses are right"
    print(f"{args.model}: {found}; hidden from distance {args.distance} on; --samples {args.samples}")
    fifths = " | ".join(f"fifth {b + 1}" for b in range(BINS))
    print(f"| hidden step | n | control | disrupted | ratio | loss, all | {fifths} |")
    print("| --- " * (6 + BINS) + "|")
    for name, rows in results.items():
        control, disrupted = 100 * rows[:, 2:].mean(0)
        costs = [ratio(rows), loss(rows), *(loss(rows[rows[:, 1] == b]) for b in range(BINS))]
        print(f"| {name} | {len(rows)} | {control:.1f} | {disrupted:.1f} | {' | '.join(costs)} |")
    if args.out:
        draw(results, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
