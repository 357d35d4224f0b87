"""What the machines are handed and what they hand back. Token ids in, token ids and log-probs out."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Request:
    """What an engine is to continue."""

    prompt_ids: list[int]  # everything the model reads, a prefix of a response included
    max_new_tokens: int


@dataclass
class Response:
    """What an engine sampled for one request."""

    ids: list[int]  # with the end-of-sequence token where there is one
    logps: list[float]  # of `ids`, under the distribution that they were sampled from
    finish_reason: str  # "stop" (end of sequence) | "length" (budget used up)


@dataclass
class Sequence:
    """A prompt and a response of n tokens, to be scored or trained on by a learner."""

    prompt_ids: list[int]
    response_ids: list[int]
    step_ids: list[int] | None = None  # of all tokens, 0 for the prompt: asks `score` for FCI
    per_token: dict[str, list[float]] = field(default_factory=dict)  # arguments of the loss, (n,) each

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Score:
    """What a forward pass says of one sequence; fp32 arrays."""

    logps: np.ndarray  # (n,), of the response tokens
    entropies: np.ndarray | None  # (n,), nats, where asked for
    fci: np.ndarray | None  # (1 + T,), prompt first, where it has step ids; or what another hook returns
