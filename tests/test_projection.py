"""Log-probabilities of the scoring pass, in chunks, against whole `logits`."""

import math

import pytest
import torch
from helpers import VOCABULARY, random_ids, random_model

from plumbing.projection import token_logps


@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (7, 0.7), (1000, 1.0)])
def test_token_logps_equal_log_softmax_of_logits(chunk, temperature):
    """Values, entropies and gradients equal those of whole logits of un-padded single runs, whatever the
    chunk."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 1), (9, 12), (1, 20), (5, 8)
    batch = [(random_ids(p, generator), random_ids(r, generator)) for p, r in lengths]
    model = random_model("qwen2")
    weights = torch.randn(sum(len(r) for _, r in batch), generator=generator)

    expected, expected_entropies = [], []
    for prompt, response in batch:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        full = (logits / temperature).log_softmax(-1)
        expected.append(full[range(len(response)), response])
        expected_entropies.append(torch.distributions.Categorical(logits=full).entropy())
    expected = torch.cat(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))

    logps, entropies = token_logps(model, batch, temperature, chunk, with_entropy=True)
    gradients = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, torch.cat(expected_entropies), atol=1e-5, rtol=1e-5)
    assert (entropies <= math.log(VOCABULARY) + 1e-5).all() and (logps < 0).all()
    for ours, theirs in zip(gradients, expected_gradients):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert max(g.abs().max() for g in gradients) > 1e-2
