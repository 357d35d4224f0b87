"""Adapters: their gradients are those of W + B A written out, off they are not there, merged they are what is
trained, and a push without them is found; checkpoints, errors, and whole runs."""

import importlib.util
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, CopyEngine, handed_over, make_learner, make_problems, make_trainer
from helpers import CONFIGS, one_sentence, random_ids, random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config
from whole_runs import metrics, run, words_of_main

import train
from experiments.bench_logits import LiveBytes
from experiments.merge_adapters import merge
from plumbing import adapters
from plumbing import learner as learner_module
from plumbing.adapters import ALPHA, adapted_layers, adapters_off, add_adapters, base_of, full_weights
from plumbing.agreement import EngineMismatch, verify_sync
from plumbing.engines import check_engine
from plumbing.models import context_length, load_model
from plumbing.nouns import Request
from plumbing.projection import token_logps
from plumbing.settings import InputError, MachineConfig
from plumbing.torch_engine import TorchEngine

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="pip install peft")
pytestmark = needs_peft
RANK = 3


def adapted(model, rank=RANK, zero=False, seed=0, dtype=torch.float32, base=str(TINY)):
    """The model with adapters, whose B, unless it stays zero, is of the size of A."""
    add_adapters(model, SimpleNamespace(lora_rank=rank, seed=seed, model=base), dtype, base)
    generator = torch.Generator().manual_seed(1)
    for layer in [] if zero else adapted_layers(model):
        factor = layer.lora_B["default"].weight
        factor.data.copy_(0.05 * torch.randn(factor.shape, generator=generator))
    return model


def batch_of(model):
    generator = torch.Generator().manual_seed(2)
    return [(random_ids(4, generator), random_ids(n, generator)) for n in (9, 5)]


def logps_of(model, batch=None):
    with torch.no_grad():
        return token_logps(model, batch or batch_of(model), 1.0, chunk=5)[0]


class Written(torch.nn.Module):
    """x (W + s B A)^T + b, written out."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.base_layer.weight, layer.base_layer.bias
        self.A, self.B = (x["default"].weight.detach().clone() for x in (layer.lora_A, layer.lora_B))
        self.A.requires_grad_(), self.B.requires_grad_()

    def forward(self, x):
        return F.linear(x, self.weight + ALPHA / RANK * self.B @ self.A, self.bias)


# --- The model with adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "scale", "atol"), [(torch.float32, 0.1, 1e-5), (torch.float64, 0.3, 1e-12)]
)
def test_gradients_are_those_of_w_plus_ba_written_out(name, dtype, scale, atol):
    """In fp32, for weights that do not blow rounding up, and in fp64."""
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | {"initializer_range": scale})
    ours, naive = (adapted(random_model(config)).to(dtype) for _ in range(2))
    names = [n for n, module in naive.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 7 * 2 and not any("lm_head" in n for n in names)  # all linear layers but the output
    for n in names:
        naive.set_submodule(n, Written(naive.get_submodule(n)))
    for model in (ours, naive):
        logps, _ = token_logps(model, batch_of(model), 0.8, chunk=5)
        logps.mean().backward()
    for n in names:
        layer, written = ours.get_submodule(n), naive.get_submodule(n)
        pairs = [(layer.lora_A, written.A), (layer.lora_B, written.B)]
        for factor, expected in ((f["default"].weight.grad, w.grad) for f, w in pairs):
            assert expected.abs().max() > 1e-3, n
            torch.testing.assert_close(factor, expected, atol=atol, rtol=0)
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("name", CONFIGS)
def test_new_adapters_change_no_log_prob_and_off_they_are_not_there(name):
    """Bit for bit. They come back as they were, and so does training."""
    expected = logps_of(random_model(name))
    assert torch.equal(logps_of(adapted(random_model(name), zero=True)), expected)
    model = adapted(random_model(name)).train()
    with_adapters = logps_of(model)
    assert (with_adapters - expected).abs().max() > 0.1
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with adapters_off(model):
        assert torch.equal(logps_of(model), expected)
    assert model.training and torch.equal(logps_of(model), with_adapters)
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in n for n in trained)


def test_a_model_without_adapters_is_left_alone(model):
    """Off, negated, pushed: its own weights, and the same tensors."""
    expected, state = logps_of(model), model.state_dict()
    with adapters_off(model):
        assert torch.equal(logps_of(model), expected)
    assert all(weight.data_ptr() == state[name].data_ptr() for name, weight in full_weights(model))
    assert [name for name, _ in full_weights(model)] == list(state)


def test_the_same_seed_makes_the_same_adapters_and_draws_nothing():
    made = []
    for seed, before in ((7, 1), (7, 2), (8, 1)):
        model = random_model("qwen2", seed=0)
        torch.manual_seed(before)  # as of the engine, which differs by process
        state = torch.get_rng_state()
        adapted(model, zero=True, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(torch.cat([layer.lora_A["default"].weight.flatten() for layer in adapted_layers(model)]))
        assert not any(layer.lora_B["default"].weight.any() for layer in adapted_layers(model))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and made[0].std() > 0.05


def test_adapters_are_fp32_on_frozen_weights_of_the_dtype_of_forward_passes():
    model = adapted(random_model("qwen2"), dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert (p.dtype, p.requires_grad) == (
            (torch.float32, True) if "lora_" in name else (torch.bfloat16, False)
        )
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = token_logps(model, batch_of(model), 1.0, chunk=5)
        logps.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)


# --- The learner ------------------------------------------------------------------------------------------


def lora_learner(*flags):
    """As train.py makes it for the embedded reasoner."""
    settings = train.parse_config(["--lora_rank", str(RANK), "--lr", "4e-3", *flags])
    return learner_module.make_learner(*settings, str(TINY))


def test_updates_move_the_adapters_alone_and_the_reference_is_the_model_without(tiny_tokenizer):
    learner, plain = lora_learner(), load_model(str(TINY))
    trainer = make_trainer(learner.model, tiny_tokenizer)
    trainer.learner = learner
    assert learner.reference is learner.model
    ((sequences, loss, divisors), *_) = handed_over(trainer)
    references = []

    def watched(logps, ref_logps, **per_token):
        references.append(ref_logps)
        return loss(logps, ref_logps, **per_token)

    kept = {n: p.clone() for n, p in learner.model.named_parameters()}
    for _ in range(2):  # A moves once B is not zero
        assert learner.update(sequences, watched, divisors)["skipped"] == 0
    for n, p in learner.model.named_parameters():
        assert torch.equal(p, kept[n]) == ("lora_" not in n), n
    n_state = sum(t.numel() for state in learner.optimizer.state.values() for t in state.values())
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    assert n_state == 2 * sum(p.numel() for p in trained) + len(trained)
    first, second = (
        torch.cat(references[: len(references) // 2]),
        torch.cat(references[len(references) // 2 :]),
    )
    assert torch.equal(first, second)
    theirs, two_models = [], make_learner(load_model(str(TINY)), plain, machine=machine_of(learner))
    two_models.accumulate(sequences, lambda a, b, **c: (theirs.append(b), loss(a, b, **c))[1], divisors)
    assert torch.equal(torch.cat(theirs), first)


def machine_of(learner):
    """Fields of MachineConfig of a learner."""
    return {name: getattr(learner.machine, name) for name in vars(MachineConfig())}


def test_gradients_of_adapters_do_not_depend_on_memory_knobs(tiny_tokenizer):
    learner = lora_learner()
    for layer in adapted_layers(learner.model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    trainer = make_trainer(learner.model, tiny_tokenizer, minibatch_sequences=1000)
    trainer.learner = learner
    (minibatch,) = handed_over(trainer)

    def gradients(microbatch_tokens, logit_chunk, checkpointing=False):
        learner.machine.microbatch_tokens, learner.machine.logit_chunk = microbatch_tokens, logit_chunk
        learner.model.gradient_checkpointing_disable()
        if checkpointing:
            learner.model.gradient_checkpointing_enable({"use_reentrant": False})
        learner.model.zero_grad()
        learner.accumulate(*minibatch)
        return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.requires_grad])

    expected = gradients(10**9, 10**9)
    assert expected.abs().max() > 1e-3
    for knobs in [(1, 512, True), (700, 64), (4000, 7, True)]:
        torch.testing.assert_close(gradients(*knobs), expected, atol=1e-6, rtol=1e-3)


# --- Merged weights ---------------------------------------------------------------------------------------

TIED = Qwen2Config(**CONFIGS["qwen2"].to_dict() | {"tie_word_embeddings": True})


@pytest.mark.parametrize("config", [*CONFIGS, TIED], ids=[*CONFIGS, "qwen2, tied"])
def test_merged_weights_give_the_engine_the_trainers_log_probs(config):
    tokenizer = SimpleNamespace(eos_token_id=None)
    model, engine = adapted(random_model(config)), TorchEngine(random_model(config, seed=5), tokenizer)
    engine.load(model)
    requests = [Request(prompt, 12) for prompt, _ in batch_of(model)]
    sampled = engine.generate(requests)
    expected = logps_of(model, [(r.prompt_ids, s.ids) for r, s in zip(requests, sampled)])
    found = torch.tensor([x for s in sampled for x in s.logps])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with adapters_off(model):
        off = logps_of(model, [(r.prompt_ids, s.ids) for r, s in zip(requests, sampled)])
    assert (off - expected).abs().max() > 0.1


def test_merging_needs_room_for_one_tensor_and_leaves_none(model):
    own = adapted(load_model(str(TINY)))
    largest = max(4 * weight.numel() for _, weight in full_weights(own))
    with LiveBytes() as live:
        for _ in full_weights(own):
            pass
        del _
        torch.zeros(1)  # the meter looks at every call
    assert 0 < live.peak <= 3 * largest and sum(size for _, size in live.alive.values()) <= 4


# --- The proof of a push ----------------------------------------------------------------------------------


class Pushed(CopyEngine):
    """An engine that gets merged weights but for the tensors in `withheld`, or those without adapters."""

    merged = True

    def load(self, model):
        own, names = self.model.state_dict(), self.withheld
        with torch.no_grad():
            if self.merged:
                pairs = full_weights(model)
            else:
                state = model.state_dict().items()
                pairs = [(n.replace(".base_layer", ""), w) for n, w in state if ".lora_" not in n]
            for name, weight in pairs:
                if name not in names:
                    own[name].copy_(weight)


def prompts_of(tokenizer):
    return [p.prompt_ids for p in make_problems(tokenizer)]


@pytest.mark.parametrize("zero", [True, False], ids=["B is zero", "B is trained"])
def test_verify_sync_passes_a_sound_engine_and_changes_nothing(tiny_model, tiny_tokenizer, zero):
    learner, state = make_learner(adapted(tiny_model, zero=zero)), torch.get_rng_state()
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    assert verify_sync(Pushed(tiny_tokenizer), learner, prompts_of(tiny_tokenizer), bound=0.2) < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_verify_sync_finds_every_merged_tensor_that_does_not_arrive(tiny_model, tiny_tokenizer):
    learner, prompts = make_learner(adapted(tiny_model, zero=True)), prompts_of(tiny_tokenizer)
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    names = [name for name, _ in full_weights(tiny_model)]
    assert names == list(load_model(str(TINY)).state_dict()) and len(names) == 30
    for withheld in [*([name] for name in names), names]:
        with pytest.raises(EngineMismatch, match="a tenth of the gap to the weights before"):
            verify_sync(Pushed(tiny_tokenizer, withheld), learner, prompts, bound=0.2)
        assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters()), withheld


def test_verify_sync_finds_a_push_without_the_adapters(tiny_model, tiny_tokenizer):
    """Though they change nothing yet: B is zero but during the proof."""
    engine, learner = Pushed(tiny_tokenizer), make_learner(adapted(tiny_model, zero=True))
    engine.merged = False
    with pytest.raises(EngineMismatch, match="a tenth of the gap to the weights before"):
        verify_sync(engine, learner, prompts_of(tiny_tokenizer), bound=0.2)


@pytest.mark.parametrize("rank", [1, 16])
def test_verify_sync_passes_a_deep_network_whose_engine_rounds(tmp_path, rank):
    """28 layers, the base in bf16 under the trainer's autocast, merged weights in the engine's bf16."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, num_hidden_layers=28, vocab_size=1000))
    model.lm_head.weight.data.mul_(200)
    model.save_pretrained(tmp_path)
    own = adapted(load_model(str(tmp_path)), rank, zero=True, dtype=torch.bfloat16, base=str(tmp_path))
    learner = make_learner(own, machine=dict(autocast="bfloat16"))
    engine = TorchEngine(load_model(str(tmp_path), torch.bfloat16), SimpleNamespace(eos_token_id=None))
    prompts = torch.randint(1000, (8, 12)).tolist()
    assert verify_sync(engine, learner, prompts, bound=0.2) > 0.01
    engine.load = lambda model: None
    with pytest.raises(EngineMismatch, match="a tenth of the gap to the weights before the push"):
        verify_sync(engine, learner, prompts, bound=0.2)


# --- Whole runs and their checkpoints ---------------------------------------------------------------------

LORA = ["--lora_rank", RANK, "--lr", 4e-3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of three steps with adapters."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run("--output_dir", out, "--steps", 3, *LORA)
    return out


def saved(checkpoint):
    """All that a checkpoint keeps, comparable with ==."""
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = [t.tolist() for s in optimizer["optimizer"]["state"].values() for t in s.values()]
    weights = {name: w.tolist() for name, w in load_file(checkpoint / "adapter_model.safetensors").items()}
    return (
        weights,
        moments,
        optimizer["rng"][0]["cpu"].tolist(),
        json.loads((checkpoint / "state.json").read_text()),
    )


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, finished, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "run")
    for n in (2, 3):
        shutil.rmtree(out / f"checkpoint-{n}")
    run("--output_dir", out, "--steps", 3, *LORA)
    assert saved(out / "checkpoint-3") == saved(finished / "checkpoint-3")
    assert saved(out / "checkpoint-3")[0] != saved(out / "checkpoint-1")[0]
    assert metrics(out) == metrics(finished)
    said = words_of_main(monkeypatch, "--output_dir", out, "--steps", 4, "--lora_rank", 5, "--lr", 4e-3)
    assert f"lora_rank ({RANK} -> 5)" in said and "another --output_dir" in said


@pytest.mark.slow
def test_a_checkpoint_is_small_and_pefts(finished):
    """PEFT reads it; merged on loading, it scores as adapters beside the base do."""
    from peft import PeftModel

    checkpoint = finished / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names and sum(p.stat().st_size for p in checkpoint.iterdir()) < 4e5
    assert base_of(str(checkpoint)) == str(TINY) and base_of(str(TINY)) is None
    assert context_length(str(checkpoint)) == context_length(str(TINY))
    beside = PeftModel.from_pretrained(load_model(str(TINY)), str(checkpoint))
    expected, merged = logps_of(beside.base_model.model), load_model(str(checkpoint))
    torch.testing.assert_close(logps_of(merged), expected, atol=1e-5, rtol=0)
    assert (logps_of(load_model(str(TINY))) - expected).abs().max() > 1e-3
    assert list(merged.state_dict()) == list(load_model(str(TINY)).state_dict())


@pytest.mark.slow
def test_eval_and_the_merged_directory(tmp_path, finished):
    """The same samples from the checkpoint and from what merge_adapters.py writes, and better than before."""
    merged, found = tmp_path / "merged", []
    merge(str(finished / "checkpoint-3"), str(merged), "float32")
    assert base_of(str(merged)) is None and (merged / "model.safetensors").exists()
    for i, model in enumerate((finished / "checkpoint-3", merged)):
        command = [
            sys.executable,
            str(ROOT / "eval.py"),
            "--model",
            str(model),
            "--engine",
            "torch",
            "--limit",
            "20",
        ]
        command += [
            "--data",
            str(TINY / "test.jsonl"),
            "--max_new_tokens",
            "100",
            "--output_dir",
            str(tmp_path / str(i)),
        ]
        subprocess.run(command, check=True, capture_output=True)
        found.append(json.loads((tmp_path / str(i) / "results.json").read_text())["results"]["test"])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="has no adapters"):
        merge(str(TINY), str(tmp_path / "other"), "float32")
    with pytest.raises(ValueError, match="exists already"):
        merge(str(finished / "checkpoint-3"), str(merged), "float32")


@pytest.mark.slow
def test_adapters_on_a_checkpoint_with_adapters(tmp_path, finished):
    """Both are in the weights."""
    first = finished / "checkpoint-3"
    run("--output_dir", tmp_path / "run", "--steps", 1, *LORA, "--model", first, "--preset", "tiny")
    second = tmp_path / "run/checkpoint-1"
    assert base_of(str(second)) == str(first)
    a, b, c = (logps_of(load_model(str(path))) for path in (TINY, first, second))
    assert min((a - b).abs().max(), (b - c).abs().max(), (a - c).abs().max()) > 1e-4
    model = load_model(str(first))
    add_adapters(model, SimpleNamespace(lora_rank=RANK, seed=0, model=str(first)), torch.float32, str(second))
    torch.testing.assert_close(logps_of(model), c, atol=1e-5, rtol=1e-5)


# --- Errors -----------------------------------------------------------------------------------------------


def test_a_missing_peft_is_one_sentence_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        check_engine(MachineConfig(lora_rank=1))
    one_sentence(error, "pip install peft")
    check_engine(MachineConfig())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    with pytest.raises(ValueError) as error:
        load_model(str(tmp_path))
    one_sentence(error, "pip install peft")
    with pytest.raises(InputError, match="pip install peft"):
        run("--output_dir", tmp_path / "run", *LORA)


def test_a_checkpoint_whose_base_is_gone_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gone = tmp_path / "gone"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(gone)}))
    with pytest.raises(ValueError) as error:
        load_model(str(tmp_path))
    one_sentence(error, str(tmp_path), str(gone), "no such directory")


def test_the_default_run_imports_no_peft():
    program = "import sys, train, eval; train.parse_config([]); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_negative_rank_is_refused():
    with pytest.raises(InputError, match="lora_rank must be at least 0, got -1"):
        train.parse_config(["--lora_rank", "-1"])
