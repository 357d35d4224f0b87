"""Which engine samples, and vLLM's calls in order. What vLLM itself does is tested in test_vllm.py."""

import importlib.machinery
import sys
import types

import pytest
import torch
from conftest import ROOT, TINY
from helpers import one_sentence
from transformers import AutoConfig, AutoModelForCausalLM

from plumbing.engines import check_engine, make_engine, resolve_engine
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from plumbing.vllm_engine import VLLM_VERSION, VLLMEngine
from train import parse_config


class FakeLLM:
    """Records what vLLM is asked for."""

    def __init__(self, *args, **settings):
        self.settings, self.calls, self.drops_prefixes = settings, [], True

    def sleep(self, **kwargs):
        self.calls.append(("sleep", kwargs))

    def wake_up(self, **kwargs):
        self.calls.append(("wake_up", kwargs))
        return kwargs["tags"] == ["kv_cache"]  # awake once both are back

    def collective_rpc(self, name, kwargs):
        self.calls.append((name, [n for n, _ in kwargs["weights_iterator"]]))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache",))
        return self.drops_prefixes


@pytest.fixture
def fake_vllm(monkeypatch):
    """A module `vllm` with the right version, and CUDA."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.__version__, module.LLM = VLLM_VERSION, FakeLLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = types.SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    return module


def test_requirements_pin_the_version_that_is_checked():
    pins = (ROOT / "requirements-gpu.txt").read_text().split()
    assert f"vllm=={VLLM_VERSION}" in pins


def test_auto_takes_vllm_where_there_is_cuda(fake_vllm, monkeypatch):
    assert resolve_engine("auto") == resolve_engine("vllm") == "vllm" and resolve_engine("torch") == "torch"
    fake_vllm.__version__ = VLLM_VERSION + "+cpu"
    assert resolve_engine("auto") == "vllm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_engine("auto") == "torch"
    assert resolve_engine("vllm") == "vllm"  # it has a CPU build: asked for by name, it is taken


@pytest.mark.parametrize("name", ["auto", "vllm"])
@pytest.mark.parametrize(
    ("breakage", "mention"),
    [("version", "0.1.0 is installed"), ("import", "does not import"), ("missing", "does not import")],
)
def test_a_gpu_without_a_working_vllm_is_an_error_with_a_remedy(
    fake_vllm, monkeypatch, name, breakage, mention
):
    """Falling back to plain PyTorch would make a run of a day one of weeks."""
    if breakage == "version":
        fake_vllm.__version__ = "0.1.0"
    elif breakage == "import":  # such as a build for another torch
        del fake_vllm.__version__
    else:
        monkeypatch.setitem(sys.modules, "vllm", None)  # what import takes for a module that is not there
    with pytest.raises(ValueError) as error:
        resolve_engine(name)
    one_sentence(error, f"engine={name}", mention, "requirements-gpu.txt", "--engine torch")
    assert resolve_engine("torch") == "torch"


def test_the_embedded_reasoner_runs_on_the_plain_engine_everywhere(monkeypatch):
    """The first run is the same on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    run, _ = parse_config([])
    check_engine(run)
    assert resolve_engine(run.engine) == "torch"
    with pytest.raises(ValueError, match="requirements-gpu.txt"):
        check_engine(parse_config(["--model", "org/some-model"])[0])


def test_a_vllm_that_does_not_start_is_one_sentence(fake_vllm, model, tokenizer):
    def no_memory(*args, **settings):
        raise ValueError("Free memory on device (1.0/80.0 GiB)\nis less than desired")

    fake_vllm.LLM = no_memory
    for name in ("vllm", "auto"):
        with pytest.raises(ValueError) as error:
            make_engine(MachineConfig(engine=name), str(TINY), tokenizer, model, max_tokens=256)
        one_sentence(error, "Free memory on device", "gpu_memory", "--engine torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="`auto` is vLLM there")
@pytest.mark.parametrize("name", ["torch", "auto"])
def test_plain_pytorch_samples_from_the_given_model(name, model, tokenizer, capsys):
    made = make_engine(MachineConfig(engine=name), str(TINY), tokenizer, model, max_tokens=256)
    assert isinstance(made, TorchEngine) and made.model is model
    assert capsys.readouterr().err == "engine: plain PyTorch\n"


def test_vllm_is_asked_for_what_the_engine_needs(fake_vllm, tokenizer):
    machine = MachineConfig(engine="vllm", gpu_memory=0.25, engine_sleep=True)
    settings = make_engine(machine, str(TINY), tokenizer, max_tokens=300, seed=3).llm.settings
    wanted = dict(
        max_model_len=300,
        seed=3,
        gpu_memory_utilization=0.25,
        enable_sleep_mode=True,
        enable_prefix_caching=True,
    )
    assert wanted.items() <= settings.items() and settings["logprobs_mode"] == "processed_logprobs"


def test_vllm_samples_no_more_at_once_than_its_cache_holds(fake_vllm, tokenizer):
    """`tiny` has 768 bytes of keys and values per token in bf16, and 0.5 MB of weights."""
    config = AutoConfig.from_pretrained(TINY)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    weights = 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    share = (weights + 10 * 300 * per_token) / 80e9  # room for 10 responses of full length
    asked = lambda share, n_gpus=1: (
        VLLMEngine(str(TINY), tokenizer, 300, 0, share, False, n_gpus).llm.settings
    )
    assert asked(share * 1.001)["max_num_seqs"] == 20  # half as long on average
    assert asked(share / 2 * 1.001, n_gpus=2)["max_num_seqs"] == 20
    assert asked(0.4)["max_num_seqs"] == 1024
    assert asked(1e-9)["max_num_seqs"] == 1  # vLLM itself says that this is too little


def test_vllm_leaves_the_trainer_its_threads(fake_vllm, tokenizer, monkeypatch):
    class SingleThreaded(FakeLLM):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            torch.set_num_threads(1)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fake_vllm.LLM = SingleThreaded
        VLLMEngine(str(TINY), tokenizer, 256)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_sleep_mode_wakes_weights_then_pushes_then_wakes_the_cache(fake_vllm, model, tokenizer):
    """vLLM's sleep mode needs a GPU: here only the order of the calls is shown, on a recorder."""
    names = list(model.state_dict())
    push = [("reload_weights", names), ("reset_prefix_cache",)]
    waking = [("wake_up", {"tags": ["weights"]}), *push, ("wake_up", {"tags": ["kv_cache"]})]
    for sleep_mode, expected in ((True, [("sleep", {"level": 2}), *waking, *push]), (False, [*push, *push])):
        engine = VLLMEngine(str(TINY), tokenizer, 256, sleep_mode=sleep_mode)
        engine.sleep()
        engine.sleep()
        engine.load(model)
        engine.load(model)
        assert engine.llm.calls == expected
    engine.llm.drops_prefixes = False
    with pytest.raises(RuntimeError, match="kept prefixes"):
        engine.load(model)
