"""Many processes (torchrun): who works on what, and how results meet again.

Every process runs the same program on the same data and makes the same random choices. Only the heavy calls
are shared out: sampling, grading, scoring, the update. So all statistics are over all processes, and a
checkpoint is that of a run of one process. With a single process everything here does nothing."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)  # of processes that wait for one that samples or writes a checkpoint


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def join_processes() -> None:
    """Meet the other processes of torchrun, each on a GPU of its own if there are any; only rank 0 prints."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    print(f"{world_size()} processes")


def shares(costs: list[int], n: int) -> list[list[int]]:
    """Indices of `costs` in n shares of about equal cost: costliest first, each to the smallest share so far.

    >>> shares([5, 1, 4, 3, 3], 2)
    [[0, 4], [1, 2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(n), key=lambda share: loads[share])
        found[least].append(i)
        loads[least] += costs[i]
    return [sorted(share) for share in found]


def union(own: dict) -> dict:
    """The dictionaries of all processes in one, the same everywhere."""
    if world_size() == 1:
        return own
    parts: list = [None] * world_size()
    torch.distributed.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def total(own: dict[str, float]) -> dict[str, float]:
    """Sums, name by name, over the dictionaries of all processes; one without a name counts as 0."""
    sums: dict[str, float] = defaultdict(float)
    for part in union({rank(): own}).values():
        for name, value in part.items():
            sums[name] += value
    return dict(sums)


def once(work: Callable):
    """What `work()` returns on rank 0, on all processes."""
    return union({0: work()} if rank() == 0 else {})[0]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process."""
    return any(union({rank(): flag}).values())


def shared_out(items: list, costs: list[int], work: Callable[[list], list], replicas: int = 1) -> list:
    """work(items), a result per item, by processes that share it out; `replicas` neighbours get the same."""
    own = shares(costs, world_size() // replicas)[rank() // replicas]
    results = union(dict(zip(own, work([items[i] for i in own]))))
    return [results[i] for i in range(len(items))]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a sharded one, for which all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(model) -> None:
    """Give all processes the mean of their gradients; those of sharded weights, FSDP has averaged already."""
    for gradient in (p.grad for p in model.parameters() if world_size() > 1):
        if gradient is not None and not isinstance(gradient, DTensor):
            torch.distributed.all_reduce(gradient)
            gradient /= world_size()


def on_rank_0(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors, in CPU memory; {} on other ranks, which have to ask for them, too."""
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if rank() == 0}


def fork_rng():
    """Keeps torch's random state as it is, that of this process' GPU included and of no other."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])
