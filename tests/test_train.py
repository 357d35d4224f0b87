"""Whole runs: configuration, bad input, logs, and resuming to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY

import train as train_module
from train import ALGORITHMS, PRESETS, InputError, checkpoints, parse_config

ROOT = TINY.parent
SHORT = (
    "--batch_size 4 --min_batch_size 2 --max_batch_size 6 --target_sequences 30 --group_size 3 --minibatch_prompts 2 --token_budget 0 "
    "--eval_problems 8 --eval_every 2 --save_every 1 --keep_checkpoints 9 --threads 1"
).split()


def run(*flags):
    """train.py in this process."""
    train_module.train(*parse_config([*SHORT, *map(str, flags)]))


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *SHORT, *map(str, flags)]


def metrics(out):
    """What was logged, without the times."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time_")} for r in records]


def everything(checkpoint):
    """Weights, optimiser, random state and pending batch of a checkpoint, comparable with ==."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = [t.tolist() for state in saved["optimizer"]["state"].values() for t in state.values()]
    return (
        (checkpoint / "model.safetensors").read_bytes(),
        moments,
        saved["rng"][0]["cpu"].tolist(),
        json.loads((checkpoint / "state.json").read_text()),
    )


# --- configuration


def test_defaults_are_the_papers():
    run, method = parse_config(["--model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"])
    assert (run.lr, run.steps, method.batch_size, method.group_size, method.minibatch_prompts) == (1e-6, 500, 64, 6, 32)
    assert (method.max_prompt_tokens, method.max_response_tokens, method.clip_low, method.clip_high, method.kl_coef) == (
        1024,
        8192,
        0.2,
        0.28,
        0.001,
    )
    assert (method.n_branch_points, method.n_continuations, method.branch_quantile, method.fci_delta, method.batch_decay) == (
        2,
        2,
        0.2,
        4,
        0.9,
    )
    assert run.train_data == "agentica-org/DeepScaleR-Preview-Dataset" and method.target_sequences == 64 * 6 * 5


def test_flags_override_algorithms_override_presets():
    run, method = parse_config(["--algo", "treerl", "--off_policy", "true", "--lr", "0.5"])
    assert run.lr == 0.5 and method.off_policy and method.branching == "entropy"
    assert method.batch_size == PRESETS["tiny"]["batch_size"] and not method.adaptive_batch
    paper, _ = parse_config(["--preset", "paper"])
    assert paper.lr == 1e-6


# --- bad input: one sentence, before the model is loaded


def refuse_to_load(*args):
    raise AssertionError("the model was loaded before the input was checked")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--train_data", "{tmp}/empty.jsonl"], "no problems"),
        (["--train_data", "{tmp}/column.jsonl"], "needs `problem` and `answer`"),
        (["--model", "{tmp}/nothing"], "no such directory"),
        (["--model", "{tmp}"], "tokenizer"),
        (["--max_prompt_tokens", "20"], "--long_prompts skip"),
        (["--max_prompt_tokens", "20", "--long_prompts", "skip"], "no prompt"),
        (["--max_response_tokens", "600"], "context of 512"),
        (["--branching", "none"], "fci_filter=none"),
        (["--branching", "sideways"], "sideways"),
        (["--batch_size", "many"], "many"),
        (["--learning_rate", "1"], "learning_rate"),
        (["--steps", "0"], "steps"),
        (["--token_budget", "-1"], "token_budget"),
        (["--seed", "-1"], "seed"),
        (["--lr", "nan"], "lr"),
        (["--gpu_memory", "7"], "gpu_memory"),
        (["--output_dir", "{tmp}/column.jsonl"], "column.jsonl"),
        (["--engine", "vllm"], "vllm"),
        (["--engine_sleep", "true"], "no CUDA device"),
        (["--top_p", "0.9", "--old_logps", "engine"], "top_p=1"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input(tmp_path, monkeypatch, flags, message):
    if "vllm" in flags:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(train_module, "load_model", refuse_to_load)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "column.jsonl").write_text('{"question": "a=1, find a.", "answer": "1"}\n')
    flags = [f.format(tmp=tmp_path) for f in flags]
    if "--output_dir" not in flags:
        flags += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match=message) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)


def test_errors_reach_the_shell_as_one_line():
    done = subprocess.run(command("--train_data", "nowhere.jsonl"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_an_engine_that_is_not_the_trainer_stops_the_run_before_it_starts(tmp_path):
    """A bound below rounding makes a sound engine fail; the same command with the bound that the message proposes goes on."""
    flags = ("--output_dir", tmp_path / "run", "--steps", 1, "--max_engine_gap", 1e-12)
    done = subprocess.run(command(*flags), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: after a push of the weights, negated, the engine's")
    assert "Traceback" not in done.stderr and not (tmp_path / "run/metrics.jsonl").exists()
    run(*flags[:-1], 1e-3)
    assert metrics(tmp_path / "run")[-1]["step"] == 1 and metrics(tmp_path / "run")[-1]["engine_gap_mean"] < 1e-4


# --- runs


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_writes_what_it_says(tmp_path, algo, capsys):
    out = tmp_path / "run"
    run("--algo", algo, "--output_dir", out, "--steps", 2)
    records = metrics(out)
    assert records[0]["test_accuracy"] > 0 and records[-1]["step"] == 2 and "test_accuracy" in records[-1]
    tokens = [r["total_tokens"] for r in records]
    assert tokens == sorted(tokens) and tokens[-1] > 0 and records[-1]["total_problems"] >= 8
    assert json.loads((out / "config.json").read_text())["algo"] == algo
    assert (out / "curves.png").stat().st_size > 1000
    trees = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert [t["step"] for t in trees] == [1, 2]
    for rollout in trees[0]["rollouts"]:
        assert len(rollout["fci"]) in (0, len(rollout["steps"])) and "".join(rollout["steps"]).count("boxed") <= 1
    from sampler import load_model

    assert load_model(str(out / "checkpoint-2")).num_parameters() > 0
    run("--algo", algo, "--output_dir", out, "--steps", 2)
    assert "is complete" in capsys.readouterr().out and metrics(out) == records


def test_another_architecture_and_tokenizer(tmp_path):
    """A random Gemma-3 with a byte-level tokenizer: nothing is known of it but its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["one plus one\n\nis two"], trainer)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template).save_pretrained(
        tmp_path / "model"
    )
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i} plus {i}", "answer": [str(2 * i)]}) + "\n" for i in range(9)))
    out = tmp_path / "run"
    run(
        "--model",
        tmp_path / "model",
        "--train_data",
        data,
        "--test_data",
        data,
        "--max_prompt_tokens",
        128,
        "--max_response_tokens",
        32,
        "--output_dir",
        out,
        "--steps",
        2,
    )
    records = metrics(out)
    assert records[1]["truncated"] > 0 and records[-1]["valid_sequences"] == 0 and records[-1]["total_updates"] == 0
    assert records[-1]["problem_fci"][0] > 0


# --- resuming


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command("--output_dir", out, "--steps", 4), check=True, capture_output=True, cwd=ROOT)
    return out


@pytest.mark.parametrize("moment", ["between checkpoints", "during a checkpoint"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, moment):
    out = tmp_path / "run"
    flags = ("--output_dir", out, "--steps", 4)
    process = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None:
        reached = [p.name for p in out.glob("checkpoint*")]
        if "checkpoint-2" in reached or (moment == "during a checkpoint" and {"checkpoint-1", "checkpoint.partial"} <= set(reached)):
            break
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (out / "checkpoint-4").exists()
    subprocess.run(command(*flags), check=True, capture_output=True, cwd=ROOT)
    assert everything(out / "checkpoint-4") == everything(uninterrupted / "checkpoint-4")
    assert metrics(out) == metrics(uninterrupted)
    assert (out / "rollouts.jsonl").read_text() == (uninterrupted / "rollouts.jsonl").read_text()


def test_half_written_checkpoints_are_not_taken_for_one(tmp_path):
    for name in ("checkpoint.partial", "checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no digests"])
def test_a_damaged_checkpoint_is_named_before_the_model_loads(tmp_path, uninterrupted, monkeypatch, damage):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    weights = out / "checkpoint-4/model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        (weights if damage == "remove" else out / "checkpoint-4/digests.json").unlink()
    monkeypatch.setattr(train_module, "load_model", refuse_to_load)
    logged = (out / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="checkpoint-4 is damaged"):
        run("--output_dir", out, "--steps", 4)
    assert (out / "metrics.jsonl").read_text() == logged


def test_other_settings_are_refused_and_change_nothing(tmp_path, uninterrupted):
    before = (uninterrupted / "config.json").read_text()
    with pytest.raises(InputError, match=r"clip_high \(0.28 -> 0.5\)"):
        run("--output_dir", uninterrupted, "--steps", 4, "--clip_high", 0.5)
    assert (uninterrupted / "config.json").read_text() == before


def test_a_finished_run_can_be_extended_and_memory_knobs_may_change(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    run("--output_dir", out, "--steps", 5, "--microbatch_tokens", 999, "--engine", "torch", "--max_engine_gap", 0.3)
    assert metrics(out)[: len(metrics(uninterrupted))] == metrics(uninterrupted)
    assert metrics(out)[-1]["step"] == 5 and (out / "checkpoint-5").exists()
