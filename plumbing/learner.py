"""The model that learns: scoring in one forward pass, and one optimiser step on a minibatch.

What `attnrl.py` need not know is here: packing sequences into forward passes, chunks of logits, autocast,
gradient checkpointing, sharding over processes (FSDP2), and updates that are skipped because something was
not finite. The gradient does not depend on how a minibatch is packed."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from fci import PADDING, StepHook
from plumbing.adapters import adapters_off, add_adapters
from plumbing.agreement import check_model
from plumbing.models import load_model
from plumbing.nouns import Score, Sequence
from plumbing.processes import average_gradients, rank, shares, total, union, whole, world_size
from plumbing.projection import collate, response_logps, token_logps
from plumbing.settings import MachineConfig


class NonFiniteUpdates(RuntimeError):
    """Too many updates in a row were not finite. args: a sentence, and the sequences of the last one."""


@dataclass
class Pass:
    """One forward pass of this process."""

    rows: list[int]  # indices of sequences
    counts: bool = True  # False: it only keeps other processes company, which gather sharded weights together


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length: rows x longest <= budget, one row at least.

    >>> pack([3, 9, 4, 8], budget=18)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while order:
        rows = max(1, budget // lengths[order[0]])
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def passes(lengths: list[int], budget: int) -> list[Pass]:
    """This process's forward passes over sequences of these lengths; all processes make equally many."""
    batches = []
    for own in shares(lengths, world_size()):
        batches.append([[own[i] for i in rows] for rows in pack([lengths[i] for i in own], budget)])
    missing = max(map(len, batches)) - len(batches[rank()])
    idle = Pass([lengths.index(min(lengths))], counts=False) if lengths else None
    return [*(Pass(rows) for rows in batches[rank()]), *[idle] * missing]


def shard(model) -> None:
    """Split weights, gradients and the optimiser's state over the processes (FSDP2), if there are several.

    A layer's weights are gathered, in their own dtype, when it runs: all must run the model equally often."""
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what every decoder layer of transformers is
            fully_shard(module)
    # The root is resharded, too: `parameters()` must never be the gathered ones.
    fully_shard(model, reshard_after_forward=True)
    model.response_logps = functools.partial(response_logps, model)
    register_fsdp_forward_method(model, "response_logps")


def autocast_dtype(machine: MachineConfig) -> torch.dtype | None:
    """dtype of forward passes; None for that of the weights."""
    wanted = machine.autocast == "bfloat16" or (machine.autocast == "auto" and torch.cuda.is_available())
    return torch.bfloat16 if wanted else None


class Learner:
    """Scores and trains `model`, in place.

    reference: frozen copy of the initial model; the model itself if its adapters are trained; or None for
    losses that need none. temperature: of log-probs. hook(step_ids) measures FCI. grad_clip: largest norm."""

    def __init__(self, model, reference, optimizer, machine, *, temperature=1, hook=StepHook, grad_clip=1):
        self.model, self.reference, self.optimizer, self.machine = model, reference, optimizer, machine
        self.temperature, self.hook, self.grad_clip = temperature, hook, grad_clip
        self.autocast_dtype = autocast_dtype(machine)
        self.skipped_in_a_row = 0  # updates, across steps and checkpoints

    def autocast(self):
        """The context of all forward passes."""
        wanted = self.autocast_dtype is not None
        return torch.autocast(self.model.device.type, self.autocast_dtype, enabled=wanted)

    def logps(self, model, batch: list[Sequence], step_hook=None, with_entropy: bool = False):
        """`token_logps` of a batch of sequences."""
        pairs, chunk = [(s.prompt_ids, s.response_ids) for s in batch], self.machine.logit_chunk
        return token_logps(model, pairs, self.temperature, chunk, step_hook, with_entropy)

    @torch.no_grad()
    def score(self, sequences: list[Sequence], with_entropy: bool = False, hook=None) -> list[Score]:
        """Log-probs under the current weights; entropies where asked; FCI if all (not some) have step ids, or
        what `fci()` of another hook(step_ids) returns."""
        self.model.eval()
        found: dict[int, Score] = {}
        for forward in passes([len(s) for s in sequences], self.machine.microbatch_tokens):
            batch = [sequences[row] for row in forward.rows]
            lengths, nothing, seen = [len(s.response_ids) for s in batch], [None] * len(batch), None
            if batch[0].step_ids is not None:
                step_ids = collate([s.step_ids for s in batch], PADDING, self.model.device)
                seen = (hook or self.hook)(step_ids)
            with self.autocast():
                logps, entropies = self.logps(self.model, batch, seen, with_entropy)
            of_rows = logps.cpu().split(lengths), entropies.cpu().split(lengths) if with_entropy else nothing
            for row, *measured in zip(forward.rows, *of_rows, seen.fci().cpu() if seen else nothing):
                found[row] = Score(*(None if x is None else x.numpy() for x in measured))
        found = union(found)
        return [found[row] for row in range(len(sequences))]

    def update(self, sequences: list[Sequence], loss: Callable, divisors: list[float]) -> dict[str, float]:
        """One optimiser step. divisors: what the loss of each sequence's tokens is divided by.

        loss(logps, ref_logps, **per_token) gets (N,) fp32 tensors over the response tokens of some sequences,
        ref_logps None without a reference, and returns the loss (N,) and {name: (N,)} to be logged.

        Returns sums over response tokens of the undivided loss and of what is to be logged;
        `response_tokens`; `read`, tokens in the forward passes, and `slots`, with padding; `grad_norm` before
        clipping; `skipped`, 1 if loss or gradient was not finite and weights stay. Or NonFiniteUpdates."""
        sums = total(self.accumulate(sequences, loss, divisors))
        average_gradients(self.model)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)).item()
        finite = math.isfinite(norm) and math.isfinite(sums["loss"])
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.machine.max_skipped_updates:
            reason = f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite"
            raise NonFiniteUpdates(reason, sequences)
        n_tokens = sum(len(s.response_ids) for s in sequences)
        return sums | {"response_tokens": n_tokens, "grad_norm": norm, "skipped": 0 if finite else 1}

    def accumulate(self, sequences: list[Sequence], loss: Callable, divisors: list[float]) -> dict:
        """Add the gradient of the sum of losses over divisors; return this process's sums for `update`."""
        sums: dict[str, float] = defaultdict(float)
        self.model.train()
        for forward in passes([len(s) for s in sequences], self.machine.microbatch_tokens):
            batch = [sequences[row] for row in forward.rows]
            with self.autocast():
                ref_logps = None
                if self.reference is not None:
                    with torch.no_grad(), adapters_off(self.reference):
                        ref_logps, _ = self.logps(self.reference, batch)
                logps, _ = self.logps(self.model, batch)
            losses, logged = loss(logps, ref_logps, **self._per_token(batch))
            divisor = self._flat([[divisors[row]] * len(sequences[row].response_ids) for row in forward.rows])
            weight = world_size() if forward.counts else 0  # gradients are averaged, and are to be summed
            (weight * (losses / divisor).sum()).backward()
            sums["slots"] += len(batch) * max(map(len, batch))
            if not forward.counts:
                continue
            sums["read"] += sum(map(len, batch))
            sums["loss"] += losses.sum().item()
            for name, values in logged.items():
                sums[name] += values.sum().item()
        return sums

    def _per_token(self, batch: list[Sequence]) -> dict[str, torch.Tensor]:
        return {name: self._flat([s.per_token[name] for s in batch]) for name in batch[0].per_token}

    def _flat(self, rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=torch.float32, device=self.model.device)


def make_learner(run, method, weights: str) -> Learner:
    """Model, frozen reference and AdamW, of RunConfig and MethodConfig. weights: directory or hub name. With
    adapters, the model without them is the reference. ValueError for a model that cannot be scored."""
    computes_in, reference = autocast_dtype(run) or torch.float32, None
    model = load_model(run.model if run.lora_rank else weights)
    check_model(model)
    if run.lora_rank:
        add_adapters(model, run, computes_in, weights)
    if method.kl_coef:
        reference = model if run.lora_rank else load_model(run.model, computes_in).requires_grad_(False)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not run.lora_rank:  # adapters are on every process
        for each in filter(None, (model, reference)):
            shard(each)
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = torch.cuda.is_available()  # makes no copy of the state
    optimizer = torch.optim.AdamW(trained, lr=run.lr, weight_decay=run.weight_decay, fused=fused)
    hook = functools.partial(StepHook, delta=method.fci_delta, later=method.fci_later)
    constants = dict(temperature=method.temperature, grad_clip=method.grad_clip)
    return Learner(model, reference, optimizer, run, hook=hook, **constants)
