"""Forward Context Influence (FCI): how much do later steps of a response look back at each step?

    alpha[j, k]  mean attention from the tokens of step j to the tokens of step k   (Eq. 4), per layer and head
    y[k]         sum of alpha[j, k] over all steps j >= k + delta                   (Eq. 5), per layer and head
    FCI[k]       maximum of y[k] over layers and heads                              (Eq. 6), in [0, T], unitless

A step that many later steps attend to carries the reasoning, so AttnRL branches there.

**How it is computed.** Attention is linear in its values. Running fused attention once more with *step indicators* as
values (column k is 1 on the tokens of step k) returns the summed attention of every token to every step: never an L x L
matrix. Fused kernels want values as wide as keys, so d steps go at a time, d being the width of a head; memory is linear in
the number L of tokens whatever the number S of steps, and there are S / d such passes a layer. Indicators are 0 or 1, exact in bf16;
division by the step's length and all sums follow in fp32.

**How it gets in.** transformers lets anyone register an attention function. Ours is named `fci`: it is
`sdpa_attention_forward`, plus a look at the queries and keys when the caller passes `fci=FCI(...)` to the model:

    model.set_attn_implementation("fci")
    scores = FCI(step_ids)
    model(input_ids, fci=scores)       # the same pass yields logits; no second one is needed
    scores.values                      # (B, S)

It works for every decoder that uses the interface, grouped queries and sliding windows included, without a line about any of them;
soft-capped attention and attention sinks are refused, since the fused kernels have neither. Batches are right-padded and need no
padding mask: causality hides the padding. (For a sliding window transformers itself makes an L x L boolean mask.)

Differences from the paper, all from the released code: steps fall back to single line breaks, then to tokens; the prompt,
the first step, and everything from the last `</think>` on score 0. The released code copies a transformers model file
and patches its attention instead.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask

THINK_END = "</think>"
PADDING = -1  # step id of padding tokens


def split_steps(token_texts: list[str]) -> list[tuple[int, int]]:
    """Cut a response into steps: half-open token spans [start, end) that cover it.

    A step ends with a token that contains two consecutive line breaks; if there is none, with a token that
    contains one; if there is none either, every token is a step.

    >>> split_steps(["So", " x", ".\\n\\n", "Then", "\\n", "y"])
    [(0, 3), (3, 6)]
    >>> split_steps(["a", "\\n", "b"]), split_steps(["a", "b"])
    ([(0, 2), (2, 3)], [(0, 1), (1, 2)])
    """
    ends = list(range(1, len(token_texts) + 1))
    for line_breaks in ("\n", "\n\n"):
        ends = [i + 1 for i, text in enumerate(token_texts) if line_breaks in text] or ends
    if ends and ends[-1] < len(token_texts):
        ends.append(len(token_texts))
    return list(zip([0, *ends], ends))


def count_scored_steps(token_texts: list[str], steps: list[tuple[int, int]]) -> int:
    """Number of leading steps that may score: those before the step with the last `</think>`, or all of them."""
    thinks = [i for i, text in enumerate(token_texts) if THINK_END in text]
    return sum(end <= thinks[-1] for _, end in steps) if thinks else len(steps)


def step_ids_of(prompt_length: int, steps: list[tuple[int, int]]) -> list[int]:
    """Step of every token of prompt + response: 0 for the prompt, 1..T for the response."""
    return [0] * prompt_length + [k for k, (start, end) in enumerate(steps, 1) for _ in range(start, end)]


def attention_to_steps(query, key, step_ids, n_steps: int, mask=None, scale=None):
    """Mean attention from every token to the tokens of every step, of one layer: the inner mean of Eq. 4.

    query (B, H, L, d), key (B, H_kv, L, d): after rotary embedding. step_ids (B, L): long, PADDING where padded.
    mask: None (causal) or what `scaled_dot_product_attention` takes. Yields (k, attended) for groups of at most d steps:
    k (c,) their numbers, attended (B, H, L, c) fp32.
    """
    groups, d = query.shape[1] // key.shape[1], query.shape[-1]
    native_gqa = groups > 1 and use_gqa_in_sdpa(mask, key, key)
    if groups > 1 and not native_gqa:
        key = repeat_kv(key, groups)
    for k in torch.arange(n_steps, device=query.device).split(d):
        member = step_ids[..., None] == k  # (B, L, c)
        size = member.sum(dim=1).clamp(min=1)  # (B, c) tokens of each step
        values = F.pad(member, (0, d - len(k))).to(query.dtype)[:, None].expand(-1, key.shape[1], -1, -1)  # (B, H_kv, L, d)
        attended = F.scaled_dot_product_attention(
            query, key, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=native_gqa
        )  # (B, H, L, d): sum over the tokens t of step k of A[i, t]
        yield k, attended[..., : len(k)].float() / size[:, None, None, :]


def step_attention(query, key, step_ids, n_steps: int, mask=None, scale=None) -> torch.Tensor:
    """alpha (B, H, S, S) of one layer (Eq. 4), fp32, to look at; FCI below never forms it. Arguments as above.

    Row j depends on no token after step j. Weighted by the sizes of the attended steps, a row sums to 1.
    """
    member = (step_ids[..., None] == torch.arange(n_steps, device=query.device)).float()  # (B, L, S)
    rows = member / member.sum(dim=1, keepdim=True).clamp(min=1)
    groups = [attended for _, attended in attention_to_steps(query, key, step_ids, n_steps, mask, scale)]
    return torch.einsum("bij,bhik->bhjk", rows, torch.cat(groups, dim=-1))


class FCI:
    """Collects FCI while a model whose attention is `fci` runs forward once.

    step_ids: (B, L) long, 0 = prompt, 1..T = response steps, PADDING = padding.
    delta: distance from which a later step counts (paper: 4).
    values: (B, S) fp32 with S = 1 + the largest T of the batch, complete after the forward pass.
    """

    def __init__(self, step_ids: torch.Tensor, delta: int = 4):
        self.step_ids, self.delta = step_ids, delta
        self.n_steps = int(step_ids.max()) + 1
        of_token = step_ids.clamp(min=0)
        sizes = torch.zeros(len(step_ids), self.n_steps, device=step_ids.device).scatter_add_(1, of_token, (step_ids != PADDING).float())
        self.row_weight = 1 / sizes.gather(1, of_token).clamp(min=1)  # (B, L): 1 / tokens of the step that the token is in
        self.layers = 0
        self._values = torch.zeros_like(sizes)  # (B, S)

    def add_layer(self, query, key, mask, scale) -> None:
        for k, attended in attention_to_steps(query, key, self.step_ids, self.n_steps, mask, scale):
            later = self.step_ids[..., None] >= k + self.delta  # (B, L, c)
            mean_of_row = (later * self.row_weight[..., None])[:, None]  # (B, 1, L, c): averages the tokens of each later step
            y = (mean_of_row * attended).sum(dim=2)  # (B, H, c), Eq. 5
            self._values[:, k] = torch.maximum(self._values[:, k], y.amax(dim=1))  # Eq. 6: max over heads, and over layers
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
        entropy = -(logps.exp() * logps).sum(-1) if with_entropy else None
        return logps.gather(-1, t[:, None])[:, 0], entropy

    parts = [checkpoint(project, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def check_projection(model) -> None:
    """Raises ValueError if the model's logits are more than its output layer applied to its last hidden state."""
    ids = torch.arange(1, 9, device=model.device)[None]
    with torch.no_grad():
        direct = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
        ours, _ = token_logps(model, [([1], list(range(2, 9)))], temperature=1.0, chunk=1024)
    if not torch.allclose(direct, ours, atol=1e-3, rtol=1e-3):
        raise ValueError(f"{type(model).__name__} soft-caps or scales its logits after the output layer, which token_logps does not do")
