"""Is the engine the policy that is trained, and can this model be scored at all?

An engine with a copy of the weights and kernels of its own is never quite the policy that is trained. How
far apart the two are is measured on every sampled token (`mismatch`), a run stops when they are further
apart than rounding explains (`check_gap`), and before anything is trained it is shown that a push reaches
every weight (`verify_sync`). `check_model` compares what scoring computes with the model's own eager pass."""

from types import SimpleNamespace

import numpy as np
import torch

import fci
from plumbing import models
from plumbing.nouns import Request
from plumbing.processes import fork_rng
from plumbing.projection import token_logps
from plumbing.settings import refuse_if


class EngineMismatch(RuntimeError):
    """Sampler and trainer are further apart than rounding explains."""


def check_gap(gaps: list[np.ndarray], bound: float, when: str, source: str = "max_engine_gap") -> None:
    """Raises EngineMismatch if the mean |gap| per token exceeds `bound`, nats. gaps: log-prob of trainer -
    engine per token, an array per sequence. when, source: for the message."""
    if not gaps:
        return
    gap = np.abs(np.concatenate(gaps)).mean()
    if not gap <= bound:  # a gap of NaN, too, is a mismatch
        found = f"{when} the engine's log-probs differ from the trainer's by {gap:.3g} nats per token"
        cause = f"{source} allows {bound:.3g}: most likely weights that were pushed did not all arrive"
        remedy = "pass --engine torch, or raise the bound if the kernels are that coarse"
        raise EngineMismatch(f"{found}, {cause}; {remedy}")


def verify_sync(engine, learner, prompts, bound: float, n_tokens: int = 16) -> float:
    """Prove that a push reaches every weight of the engine: the mean gap on n_tokens per prompt, nats.

    Negates every parameter, pushes, compares the log-probs of sampled tokens with the model's, and does so
    again with the weights as they were. Negating twice is exact, and a tensor that does not arrive has the
    wrong sign for the network around it. Comparing after a real update would prove nothing: at lr 1e-6 it
    moves log-probs less than bf16 does. Rounding moves a negated network further than a trained one, so its
    gap is held against that to the weights from before the push, on the same tokens. A tensor of zeros stays
    unproven. torch's random state is kept, which also rules vLLM's. Raises EngineMismatch."""
    model, requests = learner.model, [Request(ids, n_tokens) for ids in prompts]

    def gap_of(responses) -> np.ndarray:
        pairs = [(ids, r.ids) for ids, r in zip(prompts, responses)]
        with torch.no_grad(), learner.autocast():  # anew: it keeps its casts of the weights until it is left
            logps, _ = token_logps(model.eval(), pairs, learner.temperature, chunk=1024)
        return (logps.cpu() - torch.tensor([x for r in responses for x in r.logps])).numpy()

    sampled, gaps = [], []
    for _ in ("the weights, negated", "the weights"):
        with torch.no_grad(), fork_rng():
            for parameter in model.parameters():
                parameter.neg_()
            engine.sleep()
            engine.load(model)
            sampled.append(engine.generate(requests, learner.temperature))
        gaps.append(gap_of(sampled[-1]))
    before_push = float(np.abs(gap_of(sampled[0])).mean())  # the model has those weights again
    source = "max_engine_gap, or a tenth of the gap to the weights before the push,"
    check_gap([gaps[0]], max(bound, before_push / 10), "after a push of the weights, negated,", source)
    check_gap([gaps[1]], bound, "after a push of the weights,")
    return max(float(np.abs(gap).mean()) for gap in gaps)


def mismatch(gaps: list[np.ndarray]) -> dict[str, float]:
    """How far apart trainer and engine are. gaps: log-prob of trainer - engine per token, by sequence.

    engine_gap_mean, engine_gap_max: of |gap| over all tokens, nats. engine_log_ratio: logarithm of the mean
    over sequences of the ratio w = P(trainer) / P(engine) of a whole sequence; 0 if they agree. engine_ess:
    effective sample size (sum w)^2 / (n sum w^2) of those ratios, the share of the n sequences that
    importance weighting would leave, in (0, 1]. Empty without tokens.

    >>> {name: round(value, 2) for name, value in mismatch([np.log([2.0, 0.5]), np.log([3.0])]).items()}
    {'engine_gap_mean': 0.83, 'engine_gap_max': 1.1, 'engine_log_ratio': 0.69, 'engine_ess': 0.8}
    """
    if not gaps:
        return {}
    tokens, sums = np.abs(np.concatenate(gaps)), np.array([g.sum() for g in gaps])
    w = np.exp(sums - sums.max())  # in (0, 1]: the effective sample size does not depend on the scale
    return {
        "engine_gap_mean": float(tokens.mean()),
        "engine_gap_max": float(tokens.max()),
        "engine_log_ratio": float(sums.max() + np.log(w.mean())),
        "engine_ess": float(w.sum() ** 2 / (len(w) * (w**2).sum())),
    }


def check_model(model) -> None:
    """Raises ValueError if step attention or `token_logps` would silently be wrong for this kind of model.

    Compares both with the model's own eager attention and logits on a few tokens, each a step of its own,
    for which alpha is attention. Eq. 5 and 6, which forks may change, are not compared."""
    name, attention = type(model).__name__, model.config._attn_implementation
    ids, alphas = torch.arange(1, 9, device=model.device)[None], []
    see = lambda query, key, *how: alphas.append(fci.step_attention(query, key, ids - 1, 8, *how))
    with torch.no_grad():
        if attention in (fci.ATTENTION, models.ATTENTION):
            model(input_ids=ids, use_cache=False, step_hook=SimpleNamespace(add_layer=see))
        reason = f"its attention implementation is {attention!r}, which takes no hook"
        refuse_if(not alphas, f"{name} cannot be scored by FCI: {reason}")
        batch = [([1], list(range(2, 9)))]
        trained, ours = (token_logps(model.train(mode), batch, 1.0, chunk=1024)[0] for mode in (True, False))
        does = "uses dropout: what is trained would not be what sampled. Set it to 0 in its config.json"
        refuse_if(not torch.allclose(ours, trained, atol=1e-2), f"{name} {does}")
        model.set_attn_implementation("eager")
        eager = model(input_ids=ids, use_cache=False, output_attentions=True)
        model.set_attn_implementation(attention)
    attentions = torch.cat([a for a in eager.attentions if a is not None]).float()  # (layers, H, L, L)
    does = "attends in ways that FCI does not see: step attention differs from what output_attentions says"
    refuse_if(not torch.allclose(torch.cat(alphas), attentions, atol=1e-2), f"{name} {does}")
    expected = eager.logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    does = "soft-caps or scales its logits after the output layer, which token_logps does not do"
    refuse_if(not torch.allclose(ours, expected, atol=1e-2), f"{name} {does}")
