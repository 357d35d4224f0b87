"""Forward Context Influence (FCI): how much do later steps of a response look back at each step?

    alpha[j, k]  mean attention from the tokens of step j to the tokens of step k   (Eq. 4), per layer and head
    y[k]         sum of alpha[j, k] over all steps j >= k + delta                   (Eq. 5), per layer and head
    FCI[k]       maximum of y[k] over layers and heads                              (Eq. 6), in [0, T], unitless

A step that many later steps attend to carries the reasoning, so AttnRL branches there.

**How it is computed.** Attention is linear in its values. Running fused attention once more with *step indicators* as
values (column k is 1 on the tokens of step k) returns the summed attention of every token to every step: never an L x L
matrix. Indicators are 0 or 1, exact in bf16; division by the sizes of steps and all sums follow in fp32.

**What it costs.** Fused kernels want values as wide as keys, so d steps go at a time, d being the width of a head: S / d passes a
layer, each as dear as the layer's own attention, in memory linear in the number L of tokens whatever the number of steps. On a
GPU in bf16, which autocast makes of queries and keys, all passes go to flash attention (d <= 256); with a mask, as sliding windows
bring, or in fp32, to the memory-efficient kernel; values of another width than d can end in the kernel that writes L x L down. On
paper, for the 1.5B model (28 layers, 12 heads, d = 128) and L = 9,216: a pass takes 28 * 12 * 4 d * L^2 / 2 = 7.3 TFLOP, a forward
pass without FCI 2 * 1.54e9 * L + 7.3 = 36 TFLOP, so 128 steps add a fifth to one forward pass. experiments/bench_fci.py measures it.

**How it gets in.** transformers lets anyone register an attention function. Ours is named `fci`: it is
`sdpa_attention_forward`, plus a look at the queries and keys when the caller passes `fci=FCI(...)` to the model:

    model.set_attn_implementation("fci")
    scores = FCI(step_ids)
    model(input_ids, fci=scores)       # the same pass yields logits; no second one is needed
    scores.values                      # (B, S)

It works for every decoder that uses the interface, grouped queries and sliding windows included, without a line about any of them;
`check_model` refuses the others. Soft-capped attention and attention sinks are refused, since the fused kernels have neither.
Batches are right-padded and need no padding mask: causality hides the padding. (For a sliding window transformers itself makes an
L x L boolean mask.)

Differences from the paper, from the released code: steps fall back to single line breaks, then to tokens; the prompt, the first
step, and everything from the last `</think>` on score 0. Our own: before falling back we look for a blank line made of two tokens, as
some tokenizers write it; otherwise the lone second line break would be a step, and one that attracts much attention. The released
code copies a transformers model file and patches its attention instead.

    python fci.py --problem "a=3, b=a+2, c=b*4, d=c+1, e=d+c, f=e+2, find f."      # look at it, see experiments/show_fci.py
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

THINK_END = "</think>"
PADDING = -1  # step id of padding tokens


def split_steps(token_texts: list[str]) -> list[tuple[int, int]]:
    """Cut a response into steps: half-open token spans [start, end) that cover it.

    A step ends with a token that contains two consecutive line breaks; if there is none, where two such tokens make up
    a blank line together; if there is none either, with a token that contains one line break; else every token is a step.

    >>> split_steps(["So", " x", ".\\n\\n", "Then", "\\n", "y"]), split_steps(["So", "\\n", "\\n", "y\\n", "z"])
    ([(0, 3), (3, 6)], [(0, 3), (3, 5)])
    >>> split_steps(["a", "\\n", "b"]), split_steps(["a", "b"])
    ([(0, 2), (2, 3)], [(0, 1), (1, 2)])
    """
    joined = [before[-1:] + text for before, text in zip(["", *token_texts], token_texts)]
    rules = ((token_texts, "\n\n"), (joined, "\n\n"), (token_texts, "\n"), (token_texts, ""))
    ends: list[int] = []
    for texts, mark in rules:
        ends = ends or [i + 1 for i, text in enumerate(texts) if mark in text]
    if ends and ends[-1] < len(token_texts):
        ends.append(len(token_texts))
    return list(zip([0, *ends], ends))


def count_scored_steps(token_texts: list[str], steps: list[tuple[int, int]]) -> int:
    """Number of leading steps that may score: those before the step with the last `</think>`, or all of them."""
    answers = [k for k, (start, end) in enumerate(steps) if THINK_END in "".join(token_texts[start:end])]
    return answers[-1] if answers else len(steps)


def step_ids_of(prompt_length: int, steps: list[tuple[int, int]]) -> list[int]:
    """Step of every token of prompt + response: 0 for the prompt, 1..T for the response."""
    return [0] * prompt_length + [k for k, (start, end) in enumerate(steps, 1) for _ in range(start, end)]


def attention_to_steps(query, key, step_ids, n_steps: int, mask=None, scale=None):
    """Attention that every token pays to the tokens of every step together, of one layer: the inner sum of Eq. 4.

    query (B, H, L, d), key (B, H_kv, L, d): after rotary embedding. step_ids (B, L): long, PADDING where padded.
    mask: None (causal) or what `scaled_dot_product_attention` takes. Yields (heads, steps, attended), at most d steps of the G heads
    that share a key at a time: two slices, and attended (B, G, L, steps) fp32, in [0, 1].
    """
    G, d = query.shape[1] // key.shape[1], query.shape[-1]
    for first in range(0, n_steps, d):
        steps = slice(first, min(first + d, n_steps))
        indicators = step_ids[..., None] == torch.arange(n_steps, device=query.device)[steps]  # (B, L, steps)
        values = F.pad(indicators, (0, d - indicators.shape[-1])).to(query.dtype)[:, None]  # (B, 1, L, d)
        for i, q in enumerate(query.split(G, dim=1)):
            # Expanded, not copied; and not enable_gqa, which without flash ends in the kernel that writes L x L down.
            k, v = key[:, i : i + 1].expand_as(q), values.expand_as(q)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)  # (B, G, L, d)
            yield slice(i * G, (i + 1) * G), steps, attended[..., : indicators.shape[-1]].float()  # sum of A[., t] over t in a step


def step_sizes(step_ids, n_steps: int) -> torch.Tensor:
    """Tokens of every step, (B, n_steps) fp32; 1 for steps that a sequence does not have, as it divides."""
    sizes = torch.zeros(len(step_ids), n_steps, device=step_ids.device)
    return sizes.scatter_add_(1, step_ids.clamp(min=0), (step_ids != PADDING).float()).clamp(min=1)


def step_attention(query, key, step_ids, n_steps: int, mask=None, scale=None) -> torch.Tensor:
    """alpha (B, H, S, S) of one layer (Eq. 4), fp32, to look at; FCI below never forms it. Arguments as above.

    Row j depends on no token after step j. Weighted by the sizes of the attended steps, a row sums to 1.
    """
    sizes = step_sizes(step_ids, n_steps)[:, None]  # (B, 1, S)
    rows = (step_ids[..., None] == torch.arange(n_steps, device=query.device)).float() / sizes  # (B, L, S)
    alpha = torch.empty(*query.shape[:2], n_steps, n_steps, device=query.device)
    for heads, steps, attended in attention_to_steps(query, key, step_ids, n_steps, mask, scale):
        alpha[:, heads, :, steps] = torch.einsum("bij,bhik->bhjk", rows, attended)
    return alpha / sizes[:, None]


class FCI:
    """Collects FCI while a model whose attention is `fci` runs forward once.

    step_ids: (B, L) long, 0 = prompt, 1..T = response steps, PADDING = padding.
    delta: distance from which a later step counts (paper: 4).
    values: (B, S) fp32 with S = 1 + the largest T of the batch, complete after the forward pass.
    """

    def __init__(self, step_ids: torch.Tensor, delta: int = 4):
        self.step_ids, self.delta = step_ids, delta
        self.n_steps = int(step_ids.max()) + 1
        self.sizes = step_sizes(step_ids, self.n_steps)
        self.row_weight = 1 / self.sizes.gather(1, step_ids.clamp(min=0))  # (B, L): 1 / tokens of the step that the token is in
        self.layers = 0
        self._values = torch.zeros_like(self.sizes)  # (B, S)

    def add_layer(self, query, key, mask, scale) -> None:
        for _, steps, attended in attention_to_steps(query, key, self.step_ids, self.n_steps, mask, scale):
            k = torch.arange(self.n_steps, device=query.device)[steps]
            later = self.step_ids[..., None] >= k + self.delta  # (B, L, steps)
            rows = (later * self.row_weight[..., None])[:, None]  # (B, 1, L, steps): averages the tokens of each later step
            y = attended.mul_(rows).sum(dim=2) / self.sizes[:, None, steps]  # (B, G, steps), Eq. 5; in place: the largest tensor here
            self._values[:, steps] = torch.maximum(self._values[:, steps], y.amax(dim=1))  # Eq. 6: max over heads, and over layers
        self.layers += 1

    @property
    def values(self) -> torch.Tensor:
        if not self.layers:
            raise RuntimeError(
                "FCI saw no attention layer: call model.set_attn_implementation('fci') first, and use a model whose "
                "attention goes through transformers' AttentionInterface"
            )
        return self._values


def fci_scores(values: torch.Tensor, n_scored: int, n_steps: int) -> torch.Tensor:
    """FCI of the response steps 1..T of one sequence, (T,); 0 for the first step and from the last `</think>` on.

    values: (S,), a row of `FCI.values`; n_scored: of `count_scored_steps`; n_steps: T.
    """
    scores = values[1 : n_steps + 1].clone()
    scores[:1] = 0
    scores[n_scored:] = 0
    return scores


def _attention(module, query, key, value, attention_mask, scaling=None, fci: FCI | None = None, **kwargs):
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} caps its attention scores or has attention sinks, which fused attention would silently drop"
        )
    if fci is not None:
        with torch.no_grad():
            fci.add_layer(query, key, attention_mask, scaling)
    batch, heads, n_queries, _ = query.shape
    if n_queries == 1 and key.shape[1] < heads:  # a token is generated: as its group's rows, queries share keys and values without copies
        grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)  # transformers would copy the cache for every head
        dropout = kwargs.get("dropout", 0.0)
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
        return output.reshape(batch, 1, heads, -1), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("fci", _attention)
AttentionMaskInterface.register("fci", sdpa_mask)  # without this the mask would silently be None


# --- The forward pass that FCI rides on: log-probabilities and entropies of a batch -----------------------------------


def collate(rows: list[list[int]], padding: int, device) -> torch.Tensor:
    """Right-padded (B, L) long tensor. Causal attention needs no mask for padding on the right."""
    ids = torch.full((len(rows), max(map(len, rows))), padding)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device)


def token_logps(model, batch, temperature: float, chunk: int, fci: FCI | None = None, with_entropy: bool = False):
    """Log-probabilities of the response tokens of a batch of (prompt, response) pairs, in order, as one flat tensor.

    Logits are computed for `chunk` tokens at a time and once more in backward, so L x V never exists. Returns (logps (N,),
    entropies (N,) or None), fp32, entropies in nats; N = response tokens of the batch.
    """
    ids = collate([prompt + response for prompt, response in batch], 0, model.device)
    is_response = collate([[0] * len(p) + [1] * len(r) for p, r in batch], 0, model.device).bool()
    forward = getattr(model, "response_logps", functools.partial(response_logps, model))  # a method where weights are sharded
    return forward(ids, is_response, temperature, chunk, fci, with_entropy)


def response_logps(model, ids, is_response, temperature: float, chunk: int, fci: FCI | None, with_entropy: bool):
    """`token_logps` of tensors: ids (B, L), is_response (B, L) bool."""
    extra = {"fci": fci} if fci else {}
    hidden = model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state  # (B, L, D)
    hidden, targets = hidden[:, :-1][is_response[:, 1:]], ids[is_response]  # (N, D), (N,)

    def project(h, t):
        logps = (model.get_output_embeddings()(h).float() / temperature).log_softmax(-1)  # (chunk, V)
        entropy = torch.special.entr(logps.exp()).sum(-1) if with_entropy else None
        return logps.gather(-1, t[:, None])[:, 0], entropy

    parts = [checkpoint(project, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


class _StepAttention(FCI):
    """Keeps every layer's alpha."""

    def __init__(self, step_ids):
        super().__init__(step_ids)
        self.alphas = []

    def add_layer(self, query, key, mask, scale) -> None:
        self.alphas.append(step_attention(query, key, self.step_ids, self.n_steps, mask, scale))


def check_model(model) -> None:
    """Raises ValueError if step attention, or the log-probabilities of `token_logps`, would silently be wrong for this kind of model.

    Compares both with the model's own eager attention and logits on a few tokens, each a step of its own, for which alpha is attention.
    """
    name, attention = type(model).__name__, model.config._attn_implementation
    ids = torch.arange(1, 9, device=model.device)[None]
    seen = _StepAttention(ids - 1)
    with torch.no_grad():
        if attention == "fci":
            model(input_ids=ids, use_cache=False, fci=seen)
        if not seen.alphas:
            raise ValueError(f"{name} cannot be scored by FCI: its attention implementation is {attention!r}, which takes no hook")
        ours, _ = token_logps(model, [([1], list(range(2, 9)))], temperature=1.0, chunk=1024)
        model.set_attn_implementation("eager")
        eager = model(input_ids=ids, use_cache=False, output_attentions=True)
        model.set_attn_implementation(attention)
    attentions = torch.cat([a for a in eager.attentions if a is not None]).float()  # (layers, H, L, L)
    if not torch.allclose(torch.cat(seen.alphas), attentions, atol=1e-2):
        raise ValueError(f"{name} attends in ways that FCI does not see: step attention differs from what output_attentions says")
    expected = eager.logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    if not torch.allclose(ours, expected, atol=1e-2):
        raise ValueError(f"{name} soft-caps or scales its logits after the output layer, which token_logps does not do")


if __name__ == "__main__":
    from experiments.show_fci import main

    main()
