"""Log-probabilities and entropies of response tokens: the vocabulary projection in chunks.

Logits of all tokens would be the largest tensor of training by far (8,192 tokens x 151,936 words x 4 bytes
= 5 GB, several times over in backward), so they exist for `chunk` tokens at a time, and again in backward."""

import functools

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


def collate(rows: list[list[int]], padding: int, device) -> torch.Tensor:
    """Right-padded (B, L) long tensor. Causal attention needs no mask for padding on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=padding).to(device)


def token_logps(model, batch, temperature: float, chunk: int, step_hook=None, with_entropy: bool = False):
    """Log-probs of the response tokens of a batch of (prompt ids, response ids) pairs, in order.

    step_hook: a StepHook of fci.py that sees the same pass. Returns (logps (N,), entropies (N,) or None),
    fp32, entropies in nats; N = response tokens of the batch."""
    ids = collate([prompt + response for prompt, response in batch], 0, model.device)
    is_response = collate([[0] * len(p) + [1] * len(r) for p, r in batch], 0, model.device)
    places = is_response.flatten().nonzero()[:, 0]
    unsharded = functools.partial(response_logps, model)
    forward = getattr(model, "response_logps", unsharded)  # a method where weights are sharded
    return forward(ids, places, temperature, chunk, step_hook, with_entropy)


def response_logps(model, ids, places, temperature: float, chunk: int, step_hook=None, with_entropy=False):
    """`token_logps` of tensors: ids (B, L), places (N,) of response tokens in the flattened ids."""
    extra = {"step_hook": step_hook} if step_hook else {}
    hidden = model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state  # (B, L, D)
    hidden, targets = hidden.flatten(0, 1)[places - 1], ids.flatten()[places]  # (N, D), (N,)

    def project(h, t):
        logps = (model.get_output_embeddings()(h).float() / temperature).log_softmax(-1)  # (chunk, V)
        entropy = torch.special.entr(logps.exp()).sum(-1) if with_entropy else None
        return logps.gather(-1, t[:, None])[:, 0], entropy

    chunks = zip(hidden.split(chunk), targets.split(chunk))
    logps, entropies = zip(*(checkpoint(project, h, t, use_reentrant=False) for h, t in chunks))
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None
