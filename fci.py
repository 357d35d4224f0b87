"""Forward Context Influence (FCI): how much do later steps of a response look back at each step?

    alpha[j, k]   mean attention from the tokens of step j to those of step k    (Eq. 4), per layer and head
    y[k]          sum of alpha[j, k] over all steps j >= k + delta               (Eq. 5), per layer and head
    FCI[k]        maximum of y[k] over all layers and heads                      (Eq. 6), in [0, T], unitless

A step that many later steps attend to carries the reasoning, so AttnRL samples again from there (tree.py).

Dimensions: B sequences, L tokens, S = 1 + T steps (step 0 is the prompt), H query heads of width d, Q of
which share a key.

**In the forward pass.** transformers lets anyone register an attention function. Ours is transformers' own
`sdpa_attention_forward`, plus a look at queries and keys when the caller passes a hook:

    model.set_attn_implementation(ATTENTION)
    hook = StepHook(step_ids)
    model(input_ids, step_hook=hook)     # the same pass yields logits; no second one is needed
    hook.fci()                           # (B, S)

Decoders that use that interface work, but for soft-caps and attention sinks, which are refused.

**Without an L x L matrix.** Attention is linear in its values. Running fused attention with *step indicators*
as values (column k is 1 on the tokens of step k) returns the summed attention of every token to every step.
Indicators are 0 or 1, exact in bf16 as 1 / tokens of a step would not be; the kernel computes in autocast's
dtype, all that follows is fp32. docs/engines.md says what it costs.

From the released code, not the paper: without a blank line, single line breaks end steps, or else every
token is one; prompt, first step, and everything from the last `</think>` on score 0. Ours: a blank line may
also be two tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_with_step_hook"  # the name under which transformers knows `attention`
THINK_END = "</think>"
PADDING = -1  # step id of padding tokens


# --- Steps ------------------------------------------------------------------------------------------------


def split_steps(token_texts: list[str]) -> list[tuple[int, int]]:
    """Cut a response into steps: half-open token spans [start, end) that cover it.

    A step ends with a token that contains two consecutive line breaks; if there is none, where one token ends
    and the next begins with a line break; if there is none, with a token that contains one; else every token
    is a step.

    >>> split_steps(["So", " x", ".\\n\\n", "Then", "\\n", "y"])
    [(0, 3), (3, 6)]
    >>> split_steps(["So", "\\n", "\\n", "y\\n", "z"])
    [(0, 3), (3, 5)]
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
    """How many leading steps may score: those before the step with the last `</think>`, or all."""
    ends = [k for k, (start, end) in enumerate(steps) if THINK_END in "".join(token_texts[start:end])]
    return ends[-1] if ends else len(steps)


def step_ids_of(prompt_length: int, steps: list[tuple[int, int]]) -> list[int]:
    """Step of every token of prompt + response: 0 for the prompt, 1..T for the response."""
    return [0] * prompt_length + [k for k, (start, end) in enumerate(steps, 1) for _ in range(start, end)]


def step_sizes(step_ids: torch.Tensor, n_steps: int) -> torch.Tensor:
    """Tokens of each step, (B, n_steps) fp32; 1 where a sequence lacks the step, so that division is safe."""
    sizes = torch.zeros(len(step_ids), n_steps, device=step_ids.device)
    return sizes.scatter_add_(1, step_ids.clamp(min=0), (step_ids != PADDING).float()).clamp(min=1)


# --- Eq. 4 to 6 -------------------------------------------------------------------------------------------


class StepHook:
    """Collects FCI while a model with our attention runs forward once.

    step_ids: (B, L) long, 0 = prompt, 1..T = response steps, PADDING on the right, which causality hides.
    delta: distance in steps from which a later step counts (paper: 4).
    later: "sum" over all that count (Eq. 5). Variants not in the paper, so that being early is no advantage:
    their "mean", or the sum over a "window", the first 1 + delta of them.
    """

    def __init__(self, step_ids: torch.Tensor, delta: int = 4, later: str = "sum"):
        self.step_ids, self.delta, self.later = step_ids, delta, later
        self.n_steps = int(step_ids.max()) + 1
        self.sizes = step_sizes(step_ids, self.n_steps)  # (B, S)
        self.own_size = self.sizes.gather(1, step_ids.clamp(min=0))  # (B, L), of the step that a token is in
        first = torch.arange(self.n_steps, device=step_ids.device) + delta  # (S,), first later step
        self.n_later = (step_ids.amax(1, keepdim=True) + 1 - first).clamp(min=1)  # (B, S)
        self.y: list[torch.Tensor] = []  # per layer, (B, H, S) fp32

    def add_layer(self, query, key, mask, scale) -> None:
        """Append this layer's y. Arguments as `attention_to_steps` takes them."""

        def sum_over_later_steps(attended, k):  # (B, Q, L, K), (K,)
            is_later = self.step_ids[..., None] >= k + self.delta  # (B, L, K): tokens of steps j >= k + delta
            if self.later == "window":
                is_later &= self.step_ids[..., None] <= k + 2 * self.delta
            weights = is_later / self.own_size[..., None]  # 1 / |j|: the mean over the tokens of step j
            return attended.mul_(weights[:, None]).sum(dim=2)  # (B, Q, K); in place, it is the largest tensor

        y = attention_to_steps(query, key, self.step_ids, self.n_steps, sum_over_later_steps, mask, scale)
        y = y / self.sizes[:, None]  # Eq. 4 and 5: 1 / |k| is the mean over the tokens of step k
        self.y.append(y / self.n_later[:, None] if self.later == "mean" else y)

    def fci(self) -> torch.Tensor:
        """FCI of every step, (B, S) fp32, after the forward pass. RuntimeError if no layer was seen."""
        if not self.y:
            remedy = f"use transformers' AttentionInterface, and set_attn_implementation({ATTENTION!r})"
            raise RuntimeError(f"no attention layer was seen: {remedy}")
        return torch.cat(self.y, dim=1).amax(dim=1)  # Eq. 6: over all heads of all layers


def fci_of_response(fci, n_scored: int, n_steps: int) -> list[float]:
    """FCI of the steps 1..T of one response, (T,); 0 for the first step and from the last `</think>` on.

    fci: (S,), a row of `StepHook.fci()`; n_scored: of `count_scored_steps`; n_steps: T.
    """
    return [float(x) if 0 < i < n_scored else 0.0 for i, x in enumerate(fci[1 : n_steps + 1])]


def step_attention(query, key, step_ids, n_steps: int, mask=None, scale=None) -> torch.Tensor:
    """alpha (B, H, S, S) of one layer (Eq. 4), fp32, to look at; FCI itself never forms it."""
    sizes = step_sizes(step_ids, n_steps)[:, None]  # (B, 1, S)
    in_step = (step_ids[..., None] == torch.arange(n_steps, device=query.device)).float()  # (B, L, S)

    def mean_over_tokens(attended, k):  # (B, Q, L, K) -> (B, Q, S, K)
        return torch.einsum("bij,bhik->bhjk", in_step / sizes, attended)

    return attention_to_steps(query, key, step_ids, n_steps, mean_over_tokens, mask, scale) / sizes[:, None]


def attention_to_steps(query, key, step_ids, n_steps: int, reduce: Callable, mask=None, scale=None):
    """What `reduce` makes of the attention from each token to each step, in one layer: (B, H, ..., n_steps).

    query (B, H, L, d), key (B, H / Q, L, d): after rotary embedding. step_ids (B, L): long, PADDING where
    padded. mask: None (causal) or what `scaled_dot_product_attention` takes. reduce(attended, k) gets
    attended (B, Q, L, K) fp32, each token's attention summed over step k's tokens, for K steps k; returns (B,
    Q, ..., K).

    Fused kernels want values as wide as keys, so K <= d steps go at a time. On a GPU that is flash attention
    in bf16, the memory-efficient kernel in fp32 or with a mask; `enable_gqa` may take one that writes L x L.
    """
    Q, d, device = query.shape[1] // key.shape[1], query.shape[-1], query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    key = key.to(dtype)  # once: autocast would cast a copy for each of its heads
    chunks, how = [], dict(attn_mask=mask, is_causal=mask is None, scale=scale)
    for k in torch.arange(n_steps, device=query.device).split(d):
        indicators = step_ids[..., None] == k  # (B, L, K)
        values = F.pad(indicators, (0, d - len(k))).to(dtype)[:, None]  # (B, 1, L, d)
        heads = []
        for q, shared_key in zip(query.split(Q, dim=1), key.split(1, dim=1)):
            inputs = q, shared_key.expand_as(q), values.expand_as(q)
            attended = F.scaled_dot_product_attention(*inputs, **how)  # (B, Q, L, d)
            heads.append(reduce(attended[..., : len(k)].float(), k))
        chunks.append(torch.cat(heads, dim=1))
    return torch.cat(chunks, dim=-1)


def attention(module, query, key, value, attention_mask, scaling=None, step_hook=None, **kwargs):
    """`sdpa_attention_forward` that shows queries, keys to `step_hook`. ValueError for soft-caps, sinks."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        what = f"{type(module).__name__} caps its attention scores or has attention sinks"
        raise ValueError(f"{what}, which fused attention would silently drop")
    if step_hook is not None:
        with torch.no_grad():
            step_hook.add_layer(query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without this the mask would silently be None
