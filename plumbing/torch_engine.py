"""An engine in plain PyTorch: transformers' `generate`, with log-probs and a budget for each request."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from plumbing.models import positions, stop_ids
from plumbing.nouns import Request, Response
from plumbing.processes import full_weights


def check_requests(requests: list[Request], context: float) -> None:
    """Raises ValueError in one sentence for a request that no model with so many positions can serve."""
    for r in requests:
        if not r.prompt_ids:
            raise ValueError("a request has an empty prompt: give it at least one token to start from")
        if r.max_new_tokens < 1 or len(r.prompt_ids) + r.max_new_tokens > context:
            sizes = f"a prompt of {len(r.prompt_ids)} tokens with a budget of {r.max_new_tokens}"
            limits = f"the budget must be at least 1, and both at most the {context} the engine holds"
            raise ValueError(f"{sizes} cannot be served: {limits}")


class _Recorder(LogitsProcessor):
    """Log-probs of sampled tokens: keeps the last distribution until the token drawn from it is known."""

    def __init__(self):
        self.distribution, self.logps = None, []

    def __call__(self, input_ids, scores):
        if self.distribution is not None:
            self.logps.append(self.distribution.gather(1, input_ids[:, -1:]))
        self.distribution = scores.log_softmax(-1)
        return scores


class _Budgets(StoppingCriteria):
    """Stops each row at its own number of new tokens."""

    def __init__(self, prompt_length: int, budgets: torch.Tensor):
        self.prompt_length, self.budgets = prompt_length, budgets

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_length >= self.budgets


class TorchEngine:
    """Samples from the trained model itself (weights are never stale) or from a copy of it.

    batch_tokens: rows x longest sequence of a batch, a memory knob. Requests of similar length share a batch.
    autocast: makes the context of forward passes, that of the trainer.
    """

    def __init__(self, model, tokenizer, batch_tokens: int = 32768, autocast: Callable = nullcontext):
        self.model, self.batch_tokens, self.autocast = model, batch_tokens, autocast
        self.eos_ids = stop_ids(tokenizer, model.generation_config)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    @torch.no_grad()
    def generate(self, requests: list[Request], temperature=1.0, top_p=1.0) -> list[Response]:
        """Sample one response per request, in the order of the requests. temperature 0 is greedy.

        Log-probabilities are of the distribution that was sampled from, temperature and top-p included.
        Raises ValueError in one sentence for a request that cannot be served.
        """
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
        longest = max(len(r.prompt_ids) for r in requests)
        ids = torch.full((len(requests), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, r in enumerate(requests):  # left-padded, so that every row ends where generation starts
            ids[row, longest - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
            mask[row, longest - len(r.prompt_ids) :] = 1
        budgets = torch.tensor([r.max_new_tokens for r in requests], device=device)
        recorder, processors = _Recorder(), []
        if temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        # The model's own settings (repetition penalty, top-k, ...) would silently change what is sampled.
        special = dict(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)
        settings = GenerationConfig(do_sample=temperature > 0, max_new_tokens=int(budgets.max()), **special)
        if temperature > 0:
            settings.update(temperature=1.0, top_p=1.0, top_k=0)
        own, self.model.generation_config = self.model.generation_config, settings
        output = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            stopping_criteria=[_Budgets(longest, budgets)],
            logits_processor=[*processors, recorder],
        )
        self.model.generation_config = own
        recorder(output, recorder.distribution)  # the last token drawn
        sampled, logps = output[:, longest:].tolist(), torch.cat(recorder.logps, dim=1).tolist()
        return [self._trim(i, x, r.max_new_tokens) for i, x, r in zip(sampled, logps, requests)]

    def _trim(self, ids: list[int], logps: list[float], budget: int) -> Response:
        stop = next((i + 1 for i, token in enumerate(ids[:budget]) if token in self.eos_ids), None)
        end = stop or budget
        return Response(ids[:end], logps[:end], "stop" if stop else "length")

    def load(self, model) -> None:
        """Copy the model's weights, unless the engine samples from that very model."""
        if model is not self.model:
            own = self.model.state_dict()
            for name, weight in full_weights(model):
                own[name].copy_(weight)

    def sleep(self) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to release."""
