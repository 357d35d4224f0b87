"""An engine in plain PyTorch: a decoding loop over the model and its cache, on any device.

Each distinct prompt of a batch is read once, and rows that have ended leave the batch."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from plumbing.models import positions, stop_ids
from plumbing.nouns import Request, Response
from plumbing.processes import full_weights

ROOM = 64
KEEP = 3 / 4  # rows that have ended leave a batch when less than this share of it goes on


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, in buffers with room for ROOM more tokens: transformers' own layer
    copies all that it holds for each token that it takes in."""

    buffers = None  # of keys and of values, (B, heads, capacity, head dim)

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            super().update(key_states, value_states)
            self.buffers = [F.pad(x, (0, 0, 0, ROOM)) for x in (self.keys, self.values)]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None


def check_requests(requests: list[Request], context: float) -> None:
    """Raises ValueError in one sentence for a request that no model with so many positions can serve."""
    for r in requests:
        if not r.prompt_ids or r.max_new_tokens < 1 or len(r.prompt_ids) + r.max_new_tokens > context:
            sizes = f"a prompt of {len(r.prompt_ids)} tokens with a budget of {r.max_new_tokens}"
            limits = f"neither may be empty, and both together at most the {context} the engine holds"
            raise ValueError(f"{sizes} cannot be served: {limits}")


def draw(logits: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row of logits (B, V), and its log-prob under what it was drawn from: (B,) each, by
    temperature, then top-p. temperature 0: the likeliest token, its log-prob at temperature 1."""
    logits = logits.float() / (temperature or 1)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    logps = logits.log_softmax(-1)
    tokens = torch.multinomial(logps.exp(), 1) if temperature else logps.argmax(-1, keepdim=True)
    return tokens[:, 0], logps.gather(1, tokens)[:, 0]


class TorchEngine:
    """Samples from the trained model itself (weights are never stale) or from a copy of it.

    batch_tokens: rows x longest sequence of a batch, a memory knob. Requests of similar length share a batch.
    autocast: makes the context manager of forward passes, the trainer's."""

    def __init__(self, model, tokenizer, batch_tokens: int = 32768, autocast: Callable = nullcontext):
        self.model, self.batch_tokens, self.autocast = model, batch_tokens, autocast
        self.eos_ids = stop_ids(tokenizer, model.generation_config)

    @torch.no_grad()
    def generate(self, requests: list[Request], temperature=1.0, top_p=1.0) -> list[Response]:
        """Sample one response per request, in the order of the requests. temperature 0 is greedy. Log-probs
        are those of `draw`. Raises ValueError as `check_requests` does."""
        check_requests(requests, positions(self.model.config))
        self.model.eval()
        responses: dict[int, Response] = {}
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        with self.autocast():
            while order:
                width = len(requests[order[-1]].prompt_ids) + max(requests[i].max_new_tokens for i in order)
                rows = max(1, self.batch_tokens // width)
                batch, order = order[-rows:], order[:-rows]  # the longest prompts left
                sampled = self._generate_batch([requests[i] for i in batch], temperature, top_p)
                responses |= zip(batch, sampled)
        return [responses[i] for i in range(len(requests))]

    def _generate_batch(self, requests, temperature, top_p) -> list[Response]:
        device = self.model.device
        stops = torch.tensor(self.eos_ids, dtype=torch.long, device=device)
        budgets = torch.tensor([r.max_new_tokens for r in requests], device=device)
        prompts = list(dict.fromkeys(tuple(r.prompt_ids) for r in requests))  # each one once
        left = dict(batch_first=True, padding_side="left")  # so that every row ends where generation starts
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], **left).to(device)
        mask = pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts], **left).to(device)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        logits = self._read(ids, mask, cache)  # (prompts, V)

        row_of_prompt = {prompt: i for i, prompt in enumerate(prompts)}
        kept = torch.tensor([row_of_prompt[tuple(r.prompt_ids)] for r in requests], device=device)
        row_of = torch.arange(len(requests), device=device)  # whose response each row of the batch is
        going = torch.ones_like(row_of, dtype=torch.bool)
        drawn = torch.zeros(len(requests), int(budgets.max()), dtype=torch.long, device=device)
        logps = torch.zeros_like(drawn, dtype=torch.float)
        cache.batch_select_indices(kept)
        logits, mask = logits[kept], mask[kept]
        for t in range(drawn.shape[1]):
            tokens, logps_of_tokens = draw(logits, temperature, top_p)
            drawn[row_of, t], logps[row_of, t] = tokens, logps_of_tokens
            going &= ~torch.isin(tokens, stops) & (t + 1 < budgets[row_of])
            n_going = int(going.sum())
            if n_going == 0:
                break
            if n_going < KEEP * len(going):  # rows that have ended leave the batch
                kept = going.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                tokens, mask, row_of, going = tokens[kept], mask[kept], row_of[kept], going[kept]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = self._read(tokens[:, None], mask, cache)
        responses = []
        for ids, own_logps, r in zip(drawn.tolist(), logps.tolist(), requests):
            stop = next((i for i, x in enumerate(ids[: r.max_new_tokens], 1) if x in self.eos_ids), None)
            end = stop or r.max_new_tokens
            responses.append(Response(ids[:end], own_logps[:end], "stop" if stop else "length"))
        return responses

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Read ids (B, n), the last n columns of the mask; logits (B, V) of the token after them."""
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        how = dict(attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
        return self.model(ids, past_key_values=cache, **how).logits[:, -1]

    def load(self, model) -> None:
        """Copy the model's weights, unless the engine samples from that very model."""
        if model is not self.model:
            own = self.model.state_dict()
            for name, weight in full_weights(model):
                own[name].copy_(weight)

    def sleep(self) -> None:
        """Nothing to free, here or when it is closed."""

    close = sleep
