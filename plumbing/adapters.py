"""Low-rank adapters (LoRA), by PEFT: two small trained factors beside each linear layer of a frozen model.

    W' = W + (ALPHA / rank) B A        A (rank, in) random, B (out, rank) 0 at first; not the output layer

Switched off they leave the model that they were added to, which is why a run with adapters needs no second
model as its reference. An engine is handed W'. Most functions take models without adapters, too."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from plumbing.processes import fork_rng, whole
from plumbing.settings import refuse_if

ALPHA = 32  # divided by the rank, so that the best learning rate hardly depends on it
NAME = "default"  # PEFT's, of the adapters of a layer


def need_peft() -> None:
    """Raises ValueError where PEFT is not installed."""
    refuse_if(find_spec("peft") is None, "adapters need PEFT, which is not installed: pip install peft")


def base_of(model: str) -> str | None:
    """What the adapters in a directory were added to; None for a whole model. ValueError without PEFT."""
    path = Path(model, "adapter_config.json")
    if not path.exists():
        return None
    need_peft()
    return json.loads(path.read_text())["base_model_name_or_path"]


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
    for layer in adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast casts, and fp32 copies of inputs would be kept
    torch.cuda.empty_cache()  # for an engine that is about to start


def adapted_layers(model) -> list:
    """The linear layers that have adapters."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole weights, adapters merged in fp32, as of a model that never had any. One at a time: all
    processes must go through them together."""
    layer_of = {id(layer.base_layer.weight): layer for layer in adapted_layers(model)}
    for name, parameter in model.state_dict(keep_vars=True).items():
        weight = whole(parameter.detach())
        if layer := layer_of.get(id(parameter)):
            weight = weight.float() + layer.get_delta_weight(NAME).detach()
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), weight


@contextmanager
def adapters_off(model):
    """Within it, the model is the one that adapters were added to."""
    layers, was_training = adapted_layers(model), model.training
    try:
        for layer in layers:
            layer.enable_adapters(False)
        model.eval()
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(was_training)


@contextmanager
@torch.no_grad()
def negated(model):
    """Within it, all weights have the other sign, which is exact, and exactly undone at the end. A keeps its
    sign, or B A would. Random numbers in B make B A as large as W, so that a push without it shows."""
    flipped = [weight for name, weight in model.named_parameters() if ".lora_" not in name]
    factors = {layer: layer.lora_B[NAME].weight for layer in adapted_layers(model)}
    kept = [factor.clone() for factor in factors.values()]
    try:
        for weight in flipped:
            weight.neg_()
        with fork_rng():
            for layer, factor in factors.items():
                factor.normal_()
                factor.mul_(layer.base_layer.weight.float().norm() / layer.get_delta_weight(NAME).norm())
        yield
    finally:
        for weight in flipped:
            weight.neg_()
        for factor, values in zip(factors.values(), kept):
            factor.copy_(values)
