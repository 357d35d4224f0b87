"""Configuration, bad input, and whole runs: what they write, and what they survive."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from whole_runs import FLAGS, command, forbid_loading, metrics, refuse_to_load, run

import train as train_module
from attnrl import AttnRL
from plumbing import symbolic
from plumbing.checkpoints import checkpoints
from plumbing.models import load_model
from plumbing.settings import InputError, RunStopped
from plumbing.torch_engine import TorchEngine
from train import ALGORITHMS, PRESETS, parse_config

# --- configuration


def test_defaults_are_the_papers():
    run, method = parse_config(["--model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"])
    assert (run.lr, run.steps, method.batch_size, method.group_size) == (1e-6, 500, 64, 6)
    assert (method.minibatch_sequences, run.weight_decay) == (192, 0.01)
    assert (method.max_prompt_tokens, method.max_response_tokens) == (1024, 8192)
    assert (method.clip_low, method.clip_high, method.kl_coef) == (0.2, 0.28, 0.001)
    assert (method.n_branch_points, method.n_continuations, method.branch_quantile) == (2, 2, 0.2)
    assert (method.fci_delta, method.batch_decay, method.target_sequences) == (4, 0.9, 64 * 6 * 5)
    assert run.train_data == "agentica-org/DeepScaleR-Preview-Dataset"


def test_flags_override_algorithms_override_presets():
    run, method = parse_config(["--algo", "treerl", "--off_policy", "true", "--lr", "0.5"])
    assert run.lr == 0.5 and method.off_policy and method.branching == "entropy"
    assert method.batch_size == PRESETS["tiny"]["batch_size"] and not method.adaptive_batch
    paper, _ = parse_config(["--preset", "paper"])
    assert paper.lr == 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_fields_and_are_found_by_the_models_directory(name):
    preset, _, algo = name.partition(" ")
    run, method = parse_config(["--model", f"models/{preset}", "--algo", algo or "attnrl"])
    fields = vars(run) | vars(method)
    assert all(fields[key] == value for key, value in PRESETS[name].items())


def test_baselines_are_the_papers():
    """800 steps and problems without advantage kept; GRPO has as many responses as a tree has leaves."""
    _, attnrl = parse_config([])
    leaves = attnrl.group_size * (1 + attnrl.n_branch_points * attnrl.n_continuations)
    assert attnrl.drop_zero_advantage
    for algo, group_size in {"grpo": leaves, "treerl": 6}.items():
        run, method = parse_config(["--algo", algo])
        assert (run.steps, method.group_size, method.drop_zero_advantage) == (800, group_size, False)
    assert parse_config(["--algo", "grpo", "--group_size", "6"])[1].group_size == 6


# --- bad input: one sentence, before the model is loaded


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--train_data", "{tmp}/empty.jsonl"], "no problems"),
        (["--train_data", "{tmp}/column.jsonl"], "needs `problem` and `answer`"),
        (["--model", "{tmp}/nothing"], "no such directory"),
        (["--model", "{tmp}"], "tokenizer"),
        (["--max_prompt_tokens", "20"], "no prompt of test fits into max_prompt_tokens=20"),
        (["--test_data", "{tiny}/test.jsonl", "{tmp}/test.jsonl"], "two data sets called 'test'"),
        (["--test_data", "{tiny}/test.jsonl", "{tmp}/empty.jsonl"], "no problems"),
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
        (["--output_dir", "{tmp}/column.jsonl/run"], "another --output_dir"),
        (["--max_skipped_updates", "0"], "max_skipped_updates"),
        (["--engine", "vllm"], "vllm"),
        (["--engine_sleep", "true"], "no vLLM on a CUDA device"),
        (["--top_p", "0.9", "--old_logps", "engine"], "top_p=1"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input(tmp_path, monkeypatch, flags, message):
    if "vllm" in flags:
        monkeypatch.setitem(sys.modules, "vllm", None)  # what import takes for a module that is not there
    forbid_loading(monkeypatch)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "column.jsonl").write_text('{"question": "a=1, find a.", "answer": "1"}\n')
    flags = [f.format(tmp=tmp_path, tiny=TINY) for f in flags]
    if "--output_dir" not in flags:
        flags += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match=message) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)


def test_a_disk_too_small_for_the_checkpoints_is_named_before_the_first_step(tmp_path, monkeypatch):
    free = 2 * 12 * 259_264  # two checkpoints of tiny; three exist while the oldest of two is not yet deleted
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    )
    monkeypatch.setattr(AttnRL, "step", refuse_to_load)
    sentence = "needs 0.00933 GB .* has 0.00622 GB: make room, lower --keep_checkpoints"
    with pytest.raises(InputError, match=sentence):
        run("--output_dir", tmp_path / "run", "--steps", 9, "--keep_checkpoints", 2)
    with pytest.raises(AssertionError):  # what fits goes on to the first step
        run("--output_dir", tmp_path / "run", "--steps", 2, "--keep_checkpoints", 2)


@pytest.mark.slow
def test_errors_reach_the_shell_as_one_line():
    flags = ("--train_data", "nowhere.jsonl")
    done = subprocess.run(command(*flags), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_an_engine_that_is_not_the_trainer_stops_the_run_before_it_starts(tmp_path):
    """A bound below rounding makes a sound engine fail; the same command with a higher one goes on."""
    out = tmp_path / "run"
    flags = ("--output_dir", out, "--steps", 1, "--max_engine_gap", 1e-12)
    done = subprocess.run(command(*flags), capture_output=True, text=True, cwd=ROOT)
    words = "error: after a push of the weights, the engine's"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(words)
    assert "Traceback" not in done.stderr and not (out / "metrics.jsonl").exists()
    run(*flags[:-1], 1e-3)
    assert metrics(out)[-1]["step"] == 1 and metrics(out)[-1]["engine_gap_mean"] < 1e-4


# --- runs


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_writes_what_it_says(tmp_path, algo, capsys):
    out = tmp_path / "run"
    run("--algo", algo, "--output_dir", out, "--steps", 2)
    records = metrics(out)
    assert records[0]["test_accuracy"] > 0 and records[-1]["step"] == 2 and "test_accuracy" in records[-1]
    tokens = [r["total_tokens"] for r in records]
    assert tokens == sorted(tokens) and tokens[-1] > 0 and records[-1]["total_problems"] >= 8
    assert json.loads((out / "config.json").read_text())["algo"] == algo
    assert records[-1]["grader_timeouts"] == 0 and (out / "curves.png").stat().st_size > 1000
    trees = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert [t["step"] for t in trees] == sorted(t["step"] for t in trees) and trees[0]["step"] == 1
    assert (out / "report.html").stat().st_size > 50_000
    for rollout in trees[0]["rollouts"]:
        assert len(rollout["fci"]) in (0, len(rollout["steps"]))
        assert "".join(rollout["steps"]).count("boxed") <= 1
    assert load_model(str(out / "checkpoint-2")).num_parameters() > 0
    run("--algo", algo, "--output_dir", out, "--steps", 2)
    assert "is complete" in capsys.readouterr().out and metrics(out) == records


def test_several_held_out_files_and_prompts_that_are_too_long(tmp_path, capsys):
    """Each file has its own metrics, and test_accuracy is their mean. Training prompts over the limit are
    left out, held-out ones count as wrong; both are counted in one line."""
    rows = [json.loads(line) for line in (TINY / "test.jsonl").read_text().splitlines()[:8]]
    long = {"problem": " ".join(["a=1,"] * 90) + " find a.", "answer": "1"}
    for name, chosen in {"train": [*rows, long], "mixed": [*rows, long, long], "short": rows}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    files = [tmp_path / "mixed.jsonl", tmp_path / "short.jsonl"]
    flags = ["--train_data", tmp_path / "train.jsonl", "--max_prompt_tokens", 120, "--eval_problems", 0]
    run(*flags, "--test_data", *files, "--output_dir", tmp_path / "run", "--steps", 1)
    said = capsys.readouterr().out
    for line in (
        "1 of 9 prompts of train_data are longer than max_prompt_tokens=120 and are left out",
        "2 of 10 prompts of mixed are longer than max_prompt_tokens=120 and count as wrong",
        "8 problems",
        "of 18 held-out problems solved",
    ):
        assert line in said
    first = metrics(tmp_path / "run")[0]
    assert first["test_accuracy"] == (first["test_accuracy_mixed"] + first["test_accuracy_short"]) / 2
    assert first["test_accuracy_mixed"] <= 0.8 and first["test_tokens_short"] > 0
    for name in ("test_accuracy", "test_tokens", "test_truncated"):
        assert {name, f"{name}_mixed", f"{name}_short"} <= first.keys()


def save_gemma(directory):
    """A random Gemma-3 with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["one plus one\n\nis two"], trainer)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    how = dict(bos_token="<s>", eos_token="</s>", chat_template=template)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **how).save_pretrained(directory)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    Gemma3ForCausalLM(config).save_pretrained(directory)


@pytest.mark.slow
def test_another_architecture_and_tokenizer(tmp_path):
    """Nothing is known of the model but its directory."""
    save_gemma(tmp_path / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    rows = [{"problem": f"{i} plus {i}", "answer": [str(2 * i)]} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", tmp_path / "model", "--train_data", data, "--test_data", data, "--output_dir", out]
    run(*flags, "--max_prompt_tokens", 128, "--max_response_tokens", 32, "--steps", 2)
    records = metrics(out)
    assert records[1]["truncated"] > 0 and records[-1]["valid_sequences"] == 0
    assert records[-1]["total_updates"] == 0 and records[-1]["problem_fci"][0] > 0


def test_told_to_stop_before_the_first_step_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(AttnRL, "step", refuse_to_load)
    with pytest.raises(RunStopped, match="after step 0"):
        config = parse_config([*FLAGS, "--output_dir", str(tmp_path / "run")])
        train_module.train(*config, stop=lambda: True)
    assert not checkpoints(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("off_policy", "right"), [(True, False), (False, True)])
def test_batches_without_a_usable_sequence_change_nothing_and_the_run_goes_on(
    tmp_path, monkeypatch, off_policy, right
):
    """Every answer right, or every one wrong, in all steps but the one after a resume."""
    out, pushes = tmp_path / "run", []
    flags = ("--output_dir", out, "--off_policy", off_policy, "--fci_filter", "none")
    monkeypatch.setattr(train_module, "grade", lambda response, answers: right)
    monkeypatch.setattr(TorchEngine, "load", lambda self, model: pushes.append(1))
    run(*flags, "--steps", 2)
    assert len(pushes) == 2  # of verify_sync
    records = metrics(out)
    assert len(records) == (4 if off_policy else 3)
    for record in records[1:]:
        assert record["total_updates"] == 0 and "loss" not in record and "skipped_updates" not in record
        assert record.get("reward", float(right)) == right
        assert all(x == x and abs(x) < 1e9 for x in record.values() if isinstance(x, float))
    for record in records[-2:]:
        assert record["valid_sequences"] == record["valid_problems"] == record["sequences"] == 0
        assert record["mc_valid"] == 0 and record["valid_tokens"] is None
        assert record["next_batch_size"] > 4
    for n in (1, 2):
        saved = torch.load(out / f"checkpoint-{n}/optimizer.pt", weights_only=True)
        assert saved["optimizer"]["state"] == {}
    weights = [(path / "model.safetensors").read_bytes() for path in checkpoints(out)]
    assert weights[0] == weights[1] and (out / "curves.png").exists()
    monkeypatch.undo()
    run(*flags, "--steps", 3)
    assert metrics(out)[-1]["total_updates"] > 0 and metrics(out)[: len(records)][1:-1] == records[1:-1]


@pytest.mark.slow
def test_a_storm_of_grader_timeouts_is_survived(tmp_path, monkeypatch):
    """Every answer makes the symbolic worker give up: all count as wrong, the run goes on."""
    checker = symbolic.CHECKER

    def give_up(gold, answer):
        checker.timeouts += 1
        return False

    monkeypatch.setattr(checker, "equal", give_up)
    monkeypatch.setattr(train_module, "grade", lambda response, answers: checker.equal(answers[0], response))
    before, out = checker.timeouts, tmp_path / "run"
    run("--output_dir", out, "--steps", 2, "--algo", "grpo")
    records = metrics(out)[1:]
    assert checker.timeouts - before == sum(r["sequences"] for r in records) > 0
    assert sum(r["grader_timeouts"] for r in records) == checker.timeouts - before
    assert all(r["reward"] == r["valid_sequences"] == 0 for r in records)
