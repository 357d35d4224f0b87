"""Figure 3: hide one step from a model while it finishes its answer. Which steps does it need?

    python experiments/disruption.py                                         # the embedded reasoner
    python experiments/disruption.py --distance 4                            # hidden only from steps that FCI counts
    python experiments/disruption.py --model DIR --data math500.jsonl --max_new_tokens 8192 --problems 200

Takes responses that are right, cuts each where `--distance` steps from the hidden one on are complete, and samples the rest again, twice: as it is
(the control), and with the attention of every further token to the hidden step set to zero. Tokens keep their positions. With distance 1 the
very next step must do without it, with distance 4 = Delta only the steps whose attention FCI sums. The step is drawn at random from a class of
the response's scored steps: the top 20 % by FCI, the other 80 %, or the top 20 % by mean token entropy. "Loss" is the accuracy of the control minus
that of the disrupted continuation, with a 95 % interval over problems, in all and by the step's place in the response (five bins), since
early steps have both a high FCI and much that depends on them.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnrl import AttnRL, Group, MethodConfig, pack  # noqa: E402
from eval import grade, load_problems  # noqa: E402
from fci import count_scored_steps  # noqa: E402
from sampler import TorchEngine, load_model, load_tokenizer, prompt_ids  # noqa: E402
from tree import candidates  # noqa: E402

CLASSES = ["FCI top 20 %", "FCI other 80 %", "entropy top 20 %"]
BINS = 5


@torch.no_grad()
def continue_without(model, engine: TorchEngine, prefixes, spans, max_new_tokens: int, temperature: float) -> list[list[int]]:
    """Sample on from token ids while the tokens of `spans`, (start, end) of each prefix or None, are hidden from all that follows."""
    longest = max(map(len, prefixes))
    ids, real = torch.full((len(prefixes), longest), engine.pad_id), torch.zeros(len(prefixes), longest, dtype=torch.long)
    for row, prefix in enumerate(prefixes):  # left-padded
        ids[row, longest - len(prefix) :] = torch.tensor(prefix)
        real[row, longest - len(prefix) :] = 1
    visible = real.clone()
    for row, (prefix, span) in enumerate(zip(prefixes, spans)):
        if span:
            visible[row, longest - len(prefix) + span[0] : longest - len(prefix) + span[1]] = 0
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=engine.eos_ids,
        pad_token_id=engine.pad_id,
    )
    position_ids = (real.cumsum(1) - 1).clamp(min=0).to(model.device)
    # The prefix is read with everything in sight; what is sampled, and the last token again as it predicts the first, is not.
    cache = model(ids.to(model.device), attention_mask=real.to(model.device), position_ids=position_ids, logits_to_keep=1).past_key_values
    cache.crop(longest - 1)
    output = model.generate(
        ids.to(model.device),
        attention_mask=visible.to(model.device),
        position_ids=position_ids,
        past_key_values=cache,
        generation_config=settings,
    )
    return output[:, longest:].tolist()


def classes_of(fci: np.ndarray, entropies: np.ndarray, steps: list[tuple[int, int]], last: int, quantile: float) -> dict[str, np.ndarray]:
    """Indices of the steps of each class, from the second one (the first has FCI 0 by rule) up to `last`, exclusive."""
    scored = np.arange(1, last)
    if len(scored) < 2:
        return {}
    entropy = np.array([entropies[a:b].mean() for a, b in steps])
    top = candidates(fci[scored], quantile)
    uncertain = entropy[scored] >= np.quantile(entropy[scored], 1 - quantile)
    return dict(zip(CLASSES, (scored[top], np.delete(scored, top), scored[uncertain])))


def mean_with_interval(problems: list[int], values: list[float]) -> tuple[float, float]:
    """Mean over problems of their draws' means, and its 95 % half-width (NaN for one problem): draws of a problem are not independent."""
    per_problem = defaultdict(list)
    for problem, value in zip(problems, values):
        per_problem[problem].append(value)
    means = np.array([np.mean(x) for x in per_problem.values()])
    return means.mean(), 1.96 * means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")


def loss(rows: np.ndarray) -> str:
    """rows (n, 4): problem, fifth, control, disrupted. What hiding costs, in points."""
    if not len(rows):
        return "–"
    mean, half = mean_with_interval(rows[:, 0], rows[:, 2] - rows[:, 3])
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def draw(results: dict[str, np.ndarray], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, rows) in enumerate(results.items()):
        fifths = [b for b in range(BINS) if (rows[:, 1] == b).any()]
        means, halves = zip(*(mean_with_interval(rows[rows[:, 1] == b, 0], rows[rows[:, 1] == b, 3]) for b in fifths))
        axis.bar([b + 1 + 0.27 * (i - 1) for b in fifths], means, 0.25, yerr=halves, color=f"C{i}", label=name)
    axis.set(
        xlabel="place of the hidden step in the response, fifths",
        ylabel="accuracy with the step hidden",
        ylim=(0, 1.02),
        xlim=(0.5, BINS + 0.5),
    )
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--data", default=str(ROOT / "tiny/test.jsonl"))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=2, help="steps drawn a response and class")
    parser.add_argument(
        "--distance", type=int, default=1, help="the steps from the hidden one on that are kept; the rest must do without it"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--batch_tokens", type=int, default=32768, help="rows x longest sequence of a batch; a memory knob")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also draw the figure into this .png")
    args = parser.parse_args()

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer, model, problems = load_tokenizer(args.model), load_model(args.model), load_problems(args.data, "test")[: args.problems]
    engine = TorchEngine(model, tokenizer, args.batch_tokens)
    cfg = MethodConfig(max_response_tokens=args.max_new_tokens, temperature=args.temperature, kl_coef=0.0)
    method = AttnRL(cfg, model, None, tokenizer, engine, None, grade, args.seed)
    groups = [Group(p["problem"], p["answers"], prompt_ids(tokenizer, p["problem"])) for p in problems]
    fresh = method.generate([(group, 0, 0) for group in groups])  # one response a problem
    method.grade(fresh)
    right = [(i, g, r) for i, (g, r) in enumerate(fresh) if r.reward]
    scored = method.score([(g, r) for _, g, r in right], with_fci=True)

    # ---- choose steps, then sample every continuation twice
    jobs = []  # class, bin, problem, prefix, span of the hidden step in the prefix
    for (i, group, rollout), (entropies, steps) in zip(right, scored):
        last = count_scored_steps([method.text_of(token) for token in rollout.ids], steps) - args.distance + 1  # a step must follow
        for name, members in classes_of(np.array(rollout.fci), entropies, steps, last, cfg.branch_quantile).items():
            for k in rng.choice(members, args.draws if len(members) else 0):
                start, end = steps[k]
                n, cut = len(group.prompt_ids), steps[k + args.distance - 1][1]
                jobs.append((name, BINS * start // len(rollout.ids), i, group.prompt_ids + rollout.ids[:cut], (n + start, n + end)))
    if not jobs:
        sys.exit("error: no right response with enough steps: take more --problems, more --max_new_tokens or a smaller --distance")
    accuracy = np.zeros((len(jobs), 2))  # control, disrupted
    lengths = [(prefix, [0] * args.max_new_tokens) for _, _, _, prefix, _ in jobs]
    for rows in tqdm(list(pack(lengths, args.batch_tokens)), desc="continuations", delay=2):
        for hide in (0, 1):
            spans = [jobs[row][4] if hide else None for row in rows]
            prefixes = [jobs[row][3] for row in rows]
            sampled = continue_without(model, engine, prefixes, spans, args.max_new_tokens, args.temperature)
            for row, ids in zip(rows, sampled):
                group = groups[jobs[row][2]]
                text = tokenizer.decode(jobs[row][3][len(group.prompt_ids) :] + ids)
                accuracy[row, hide] = grade(text, group.answers)

    # ---- table
    results = {}
    for name in CLASSES:
        results[name] = np.array([(job[2], job[1], *accuracy[row]) for row, job in enumerate(jobs) if job[0] == name]).reshape(-1, 4)
    print(f"{args.model}: {len(right)} of {len(problems)} responses are right; hidden from distance {args.distance} on")
    print("| hidden step | n | control | disrupted | loss, all | " + " | ".join(f"fifth {b + 1}" for b in range(BINS)) + " |")
    print("| --- " * (5 + BINS) + "|")
    for name, rows in results.items():
        control, disrupted = 100 * rows[:, 2:].mean(0)
        losses = [loss(rows), *(loss(rows[rows[:, 1] == b]) for b in range(BINS))]
        print(f"| {name} | {len(rows)} | {control:.1f} | {disrupted:.1f} | {' | '.join(losses)} |")
    if args.out:
        draw(results, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
