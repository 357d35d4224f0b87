"""Low-rank adapters: two small trained factors beside each linear layer of a frozen model, by PEFT.

    W' = W + (ALPHA / rank) B A        A (rank, in) random, B (out, rank) 0 at first; not the output layer

Without them, the model is its own reference. Most functions take models without adapters, too."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from plumbing.processes import fork_rng, whole
from plumbing.settings import refuse_if

ALPHA, NAME = 32, "default"  # divided by the rank, so that the best learning rate hardly depends on it


def need_peft() -> None:
    """Raises ValueError where PEFT is not installed."""
    refuse_if(find_spec("peft") is None, "adapters need PEFT, which is not installed: pip install peft")


def add_adapters(model, run, dtype: torch.dtype, weights: str) -> None:
    """Freeze the model, run.model, in `dtype`, and add fp32 adapters: those of the checkpoint `weights`, or
    new ones, which change nothing. Their A depends on run.seed alone, and torch's random state is kept."""
    from peft import LoraConfig

    with fork_rng():
        torch.manual_seed(run.seed)
        if weights != run.model:
            model.load_adapter(weights, NAME, is_trainable=True)
        else:
            how = dict(r=run.lora_rank, lora_alpha=ALPHA, target_modules="all-linear")
            model.add_adapter(LoraConfig(**how), NAME)
    model.peft_config[NAME].base_model_name_or_path = run.model
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for layer in layers(model):
        layer.cast_input_dtype_enabled = False  # autocast casts, and fp32 copies of inputs would be kept
    torch.cuda.empty_cache()  # for an engine that is about to start


def layers(model) -> list:
    """The linear layers that have adapters."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def base_of(model: str) -> str | None:
    """What the adapters of a checkpoint were added to; None for whole models. ValueError without PEFT."""
    if (path := Path(model, "adapter_config.json")).exists():
        need_peft()
        return json.loads(path.read_text())["base_model_name_or_path"]


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Names, as without adapters, and whole weights with them merged, in fp32. One at a time: all processes
    must go through them together."""
    adapted = {id(layer.base_layer.weight): layer for layer in layers(model)}
    for name, parameter in model.state_dict(keep_vars=True).items():
        weight = whole(parameter.detach())
        if layer := adapted.get(id(parameter)):
            weight = weight.float() + layer.get_delta_weight(NAME).detach()
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), weight


@contextmanager
def adapters_off(model):
    """Within it, the model is the one that adapters were added to."""
    was_training, adapted = model.training, layers(model.eval())
    for layer in adapted:
        layer.enable_adapters(False)
    yield
    for layer in adapted:
        layer.enable_adapters(True)
    model.train(was_training)


@contextmanager
@torch.no_grad()
def negated(model):
    """Within it, all weights have the other sign, which is exact, and exactly undone at the end. A keeps its
    sign, or B A would. Random numbers in B make B A as large as W, so that a push without it shows."""
    flipped = [weight for name, weight in model.named_parameters() if ".lora_" not in name]
    factors = {layer: layer.lora_B[NAME].weight for layer in layers(model)}
    kept = [factor.clone() for factor in factors.values()]
    for weight in flipped:
        weight.neg_()
    with fork_rng():
        for layer, factor in factors.items():
            factor.normal_()
            factor.mul_(layer.base_layer.weight.float().norm() / layer.get_delta_weight(NAME).norm())
    yield
    for weight in flipped:
        weight.neg_()
    for factor, values in zip(factors.values(), kept):
        factor.copy_(values)
