"""The trees of rollouts.jsonl: text, FCI and advantages, and at evaluations what report.html shows beside them.

docs/metrics.md explains each name. What an evaluation logs is scored once more, after the step, so that training
pays nothing for step attention, which FCI itself never forms.
"""

from functools import partial
from itertools import repeat

import torch

from fci import StepHook, fci_of_response, step_attention, step_ids_of
from plumbing.nouns import Score, Sequence

TREES = 3  # with everything, at an evaluation
MAX_STEPS = 256  # of a response whose step attention is kept, T x T numbers: a step may be a single token


class AttentionHook(StepHook):
    """FCI and the attention that it is made of, while a model runs forward once."""

    def __init__(self, step_ids: torch.Tensor, **constants):
        super().__init__(step_ids, **constants)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # (B, S, S) each, alpha[j, k] at [k, j]

    def add_layer(self, query, key, mask, scale) -> None:
        """Append this layer's y, and its alpha (Eq. 4): maximum over heads, and of the head with the largest y."""
        super().add_layer(query, key, mask, scale)
        alpha = step_attention(query, key, self.step_ids, self.n_steps, mask, scale)  # (B, H, S, S)
        alpha, head = alpha.transpose(2, 3), self.y[-1].argmax(dim=1)  # [k, j]; (B, S)
        self.layers.append((alpha.amax(dim=1), pick(alpha, head)))

    def fci(self) -> torch.Tensor:
        """(B, S, 3 + 2 S) fp32. Of each step k: its FCI; layer and head of the largest y[k], from 0; alpha[j, k]
        of all steps j, as the maximum over heads and layers; and the same of that one head."""
        best, H = torch.cat(self.y, dim=1).argmax(dim=1), self.y[0].shape[1]  # (B, S)
        largest, own = (torch.stack(parts, dim=1) for parts in zip(*self.layers))  # (B, layers, S, S)
        about = torch.stack([super().fci(), best // H, best % H], dim=-1)
        return torch.cat([about, largest.amax(dim=1), pick(own, best // H)], dim=-1)


def pick(alpha: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, S): for each step k, alpha (B, n, S, S) at [b, index[b, k], k]."""
    return alpha.gather(1, index[:, None, :, None].expand_as(alpha[:, :1]))[:, 0]


def score_again(pairs: list, trainer) -> list[Score]:
    """Everything about (problem, rollout) pairs under the current weights; all processes must call it.

    `Score.fci` is a row of `AttentionHook.fci`, None for responses of more than MAX_STEPS steps. trainer: AttnRL.
    Draws no random number.
    """
    hook = partial(AttentionHook, delta=trainer.cfg.fci_delta, later=trainer.cfg.fci_later)
    few = [len(r.steps) <= MAX_STEPS for _, r in pairs]

    def score(wanted: bool):
        chosen = [(p, r) for (p, r), is_few in zip(pairs, few) if is_few == wanted]
        step_ids = lambda p, r: step_ids_of(len(p.prompt_ids), r.steps) if wanted else None
        sequences = [Sequence(p.prompt_ids, r.ids, step_ids(p, r)) for p, r in chosen]
        return iter(trainer.learner.score(sequences, with_entropy=True, hook=hook))

    scores = {wanted: score(wanted) for wanted in (True, False)}
    return [next(scores[is_few]) for is_few in few]


def describe_trees(due: list, step: int, trainer=None) -> list[dict]:
    """Lines of rollouts.jsonl: of the problems with mixed outcomes the one with the most leaves, else the first.

    With a trainer (AttnRL; all processes must call it) up to TREES of them, with everything.
    """
    largest_first = sorted(due, key=lambda p: -p.mixed() * len(p.rollouts))
    chosen = largest_first[: TREES if trainer else 1]
    pairs = [(p, r) for p in chosen for r in p.rollouts]
    scores = iter(score_again(pairs, trainer)) if trainer else repeat(None)
    lines = []
    for p in chosen:
        rows = [describe(r) | (everything(r, next(scores), trainer.token_text) if trainer else {}) for r in p.rollouts]
        about = {"step": step, "problem": p.text, "answers": p.answers, "branches": p.branches}
        lines.append(about | {"rollouts": rows})
    return lines


def describe(r) -> dict:
    """The short form of a rollout."""
    row = {"family": r.family, "start": r.start, "length": len(r.ids), "reward": r.reward, "finished": r.finished}
    row |= {"steps": r.step_texts, "step_starts": [start for start, _ in r.steps]}
    return row | {"fci": r.fci, "advantages": spans(r.advantages)}


def everything(r, score: Score, token_text) -> dict:
    """What the full form adds: of its own tokens, and of the attention between its steps."""
    start, few_digits = r.start, lambda values: [round(float(x), 4) for x in values]
    row = {"tokens": [token_text(i) for i in r.ids[start:]], "logps": few_digits(r.logps[start:])}
    row |= {"engine_gaps": [float(f"{gap:.2g}") for gap in r.gaps()]}
    row |= {"entropies": few_digits(r.entropies or score.entropies[start:])}
    if score.fci is None:
        return row
    T = len(r.steps)
    fci, layers, heads = score.fci[:, :3].T
    attention = score.fci[1 : T + 1, 3:].reshape(T, 2, -1)[:, :, 1 : T + 1]  # (k, maximum or head, j)
    row |= {"fci_again": few_digits(fci_of_response(fci, r.n_scored, T))}
    row |= {"heads": [[int(layer), int(head)] for layer, head in zip(layers[1 : T + 1], heads[1 : T + 1])]}
    for i, name in enumerate(("attention", "head_attention")):
        row[name] = [few_digits(attention[k, i, k + 1 :]) for k in range(T)]
    return row


def spans(values: list[float]) -> list[list]:
    """[start, end, value] of each run of equal values.

    >>> spans([0.5, 0.5, -1.0])
    [[0, 2, 0.5], [2, 3, -1.0]]
    """
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return [[a, b, values[a]] for a, b in zip(starts, [*starts[1:], len(values)])]
