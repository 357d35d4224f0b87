"""A scripted engine and a tokenizer of one character per token: what `evaluate` needs, without a model."""

from plumbing.models import PROMPT
from plumbing.nouns import Response

PROBLEMS = [{"problem": "abc", "answers": ["1"]}, {"problem": "defgh", "answers": ["2", "3"]}]
TEXTS = [r"\boxed{1}", "so...", r"\boxed{2}</think>\boxed{3}<eos>", r"\boxed{2}"]
SETTINGS = dict(samples=2, budget=lambda n_prompt: 10, temperature=0.6, top_p=0.9)


class ScriptedEngine:
    """Returns the given texts in order, one character per token, and keeps what it was asked."""

    def __init__(self, texts: list[str]):
        self.texts, self.requests, self.calls = texts, [], []

    def generate(self, requests, temperature=1.0, top_p=1.0):
        self.requests += requests
        self.calls.append((temperature, top_p))
        texts, self.texts = self.texts[: len(requests)], self.texts[len(requests) :]
        reasons = ["length" if text.endswith("...") else "stop" for text in texts]
        return [Response([ord(c) for c in t], [0.0] * len(t), r) for t, r in zip(texts, reasons)]


class CharTokenizer:
    def apply_chat_template(self, messages, **how):
        """The problem alone, without the words around it."""
        problem = messages[0]["content"].removesuffix(PROMPT.format(problem=""))
        return {"input_ids": [ord(c) for c in problem]}

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens  # `</think>` may be a special token
        return "".join(map(chr, ids))
