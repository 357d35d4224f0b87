"""The trees of rollouts.jsonl: text, FCI, advantages, and at evaluations all that report.html shows beside.

docs/metrics.md explains each name. The trees of an evaluation are scored once more, after the step, so that
training pays nothing for step attention.
"""

from functools import partial

from fci import fci_of_response, step_ids_of
from plumbing.agreement import AttentionHook
from plumbing.nouns import Score, Sequence

TREES = 3  # with everything, at an evaluation
MAX_STEPS = 256  # of a response whose step attention is kept, T x T numbers: a step may be a single token


def describe_trees(due: list, step: int, trainer=None) -> list[dict]:
    """Lines of rollouts.jsonl: of problems with mixed outcomes the one with the most leaves, else the first.

    With a trainer (AttnRL) up to TREES of them, with everything. All processes must call it then. It draws
    no random number.
    """
    lines = []
    for p in sorted(due, key=lambda p: -p.mixed() * len(p.rollouts))[: TREES if trainer else 1]:
        rows = [short_form(r) for r in p.rollouts]
        if trainer:
            for row, r, score in zip(rows, p.rollouts, score_again(p, trainer)):
                row |= full_form(r, score, trainer.token_text)
        about = {"step": step, "problem": p.text, "answers": p.answers, "branches": p.branches}
        lines.append(about | {"rollouts": rows})
    return lines


def score_again(problem, trainer) -> list[Score]:
    """Entropies and what AttentionHook measures of every rollout, under the current weights."""
    hook = partial(AttentionHook, delta=trainer.cfg.fci_delta, later=trainer.cfg.fci_later)
    steps = [step_ids_of(len(problem.prompt_ids), r.steps) for r in problem.rollouts]
    bounded = [[min(k, MAX_STEPS) for k in ids] for ids in steps]
    sequences = [Sequence(problem.prompt_ids, r.ids, ids) for r, ids in zip(problem.rollouts, bounded)]
    return trainer.learner.score(sequences, with_entropy=True, hook=hook)


def short_form(r) -> dict:
    """A rollout in text and numbers."""
    row = {
        "family": r.family,
        "start": r.start,
        "length": len(r.ids),
        "reward": r.reward,
        "finished": r.finished,
    }
    row |= {"steps": r.step_texts, "step_starts": [start for start, _ in r.steps]}
    return row | {"fci": r.fci, "advantages": spans(r.advantages)}


def full_form(r, score: Score, token_text) -> dict:
    """What a tree with everything adds: numbers of the rollout's own tokens, attention between its steps."""
    digits = lambda values: [round(float(x), 4) for x in values]
    row = {"tokens": [token_text(i) for i in r.ids[r.start :]], "logps": digits(r.logps[r.start :])}
    row |= {"engine_gaps": [float(f"{gap:.2g}") for gap in r.gaps()]}
    row |= {"entropies": digits((r.entropies or score.entropies)[r.start :])}
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
