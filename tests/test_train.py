"""Whole runs: configuration, bad input, logs, and resuming to the same bits."""

import ast
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY

import eval as evaluation
import train as train_module
from attnrl import AttnRL, Group, Rollout
from sampler import TorchEngine
from train import ALGORITHMS, PRESETS, InputError, checkpoints, digest, parse_config, read_state

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


def words_of_main(monkeypatch, *flags):
    """What train.py says to the shell as it ends early, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *map(str, flags)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            train_module.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: a write fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_a_place_that_cannot_be_written_to_is_refused_before_the_model_loads(tmp_path, uninterrupted, monkeypatch):
    """A new directory and one with a run in it, whose config.json is there already."""
    monkeypatch.setattr(train_module, "load_model", refuse_to_load)
    monkeypatch.setattr(train_module, "prepare_output", largest_file(0)(train_module.prepare_output))
    shutil.copytree(uninterrupted, tmp_path / "old")
    for out in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(InputError, match="cannot use .* another --output_dir"):
            run("--output_dir", out, "--steps", 5)
    for path in uninterrupted.rglob("*"):
        assert path.is_dir() or (tmp_path / "old" / path.relative_to(uninterrupted)).read_bytes() == path.read_bytes(), path
    assert not (tmp_path / "new/config.json").exists()  # nothing half written that would stand in the way later


def test_a_disk_too_small_for_the_checkpoints_is_named_before_the_first_step(tmp_path, monkeypatch):
    free = 2 * 12 * 259_264  # two checkpoints of tiny; three exist while the oldest of two is not yet deleted
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    monkeypatch.setattr(AttnRL, "step", refuse_to_load)
    with pytest.raises(InputError, match="needs 0.00933 GB .* has 0.00622 GB: make room, lower --keep_checkpoints"):
        run("--output_dir", tmp_path / "run", "--steps", 9, "--keep_checkpoints", 2)
    with pytest.raises(AssertionError):  # what fits goes on to the first step
        run("--output_dir", tmp_path / "run", "--steps", 2, "--keep_checkpoints", 2)


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
    assert json.loads((out / "config.json").read_text())["algo"] == algo and records[-1]["grader_timeouts"] == 0
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
    """experiments/kill_resume.py does so at random moments."""
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
    assert_ended_alike(out, uninterrupted)


def assert_ended_alike(out, uninterrupted):
    assert everything(out / "checkpoint-4") == everything(uninterrupted / "checkpoint-4")
    assert metrics(out) == metrics(uninterrupted)
    assert (out / "rollouts.jsonl").read_text() == (uninterrupted / "rollouts.jsonl").read_text()


def test_sigterm_saves_at_the_end_of_the_step_and_a_second_one_would_kill(tmp_path, uninterrupted, monkeypatch):
    """No checkpoint is due before the end: the one that the resumed run starts from is the signal's."""
    out, step, calls = tmp_path / "run", AttnRL.step, []
    flags = ("--output_dir", out, "--steps", 4, "--save_every", 9)

    def step_with_signal(self, groups):
        calls.append(groups)
        if len(calls) == 3:  # the first call only samples
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return step(self, groups)

    monkeypatch.setattr(AttnRL, "step", step_with_signal)
    said = words_of_main(monkeypatch, *flags)
    assert said == f"stopped: SIGTERM ended the run after step 2; the same command resumes from {out}/checkpoint-2"
    assert [p.name for p in checkpoints(out)] == ["checkpoint-2"] and not (out / "traceback.txt").exists()
    run(*flags)
    assert_ended_alike(out, uninterrupted)


def test_told_to_stop_before_the_first_step_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(AttnRL, "step", refuse_to_load)
    with pytest.raises(train_module.RunStopped, match="after step 0"):
        train_module.train(*parse_config([*SHORT, "--output_dir", str(tmp_path / "run")]), stop=lambda: True)
    assert not checkpoints(tmp_path / "run")


def rewound(out, uninterrupted):
    """The uninterrupted run as it was after checkpoint-2; later lines of its logs are still there, one of them torn."""
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "checkpoint-3")
    shutil.rmtree(out / "checkpoint-4")
    os.truncate(out / "metrics.jsonl", (out / "metrics.jsonl").stat().st_size - 10)
    with (out / "rollouts.jsonl").open("ab") as file:
        file.write(b"\xff\x00 not a line that json or utf-8 knows")
    return out


def test_what_breaks_on_the_way_is_one_sentence_and_the_same_command_ends_with_the_same_bits(tmp_path, uninterrupted, monkeypatch):
    """A full disk while the log or either large file of a checkpoint is written, a dead engine, gradients that are not finite."""
    out = rewound(tmp_path / "run", uninterrupted)
    intact = {p.name: digest(p) for p in (out / "checkpoint-2").iterdir()}
    flags = ("--output_dir", out, "--steps", 4)
    kept_lines = b"".join((out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:4])

    def stopped(*reasons):
        said = words_of_main(monkeypatch, *flags)
        assert said.startswith("stopped: ") and said.endswith(f"; the same command resumes from {out}/checkpoint-2"), said
        assert all(reason in said for reason in reasons), said
        assert {p.name: digest(p) for p in (out / "checkpoint-2").iterdir()} == intact
        assert [p.name for p in checkpoints(out)][-1] == "checkpoint-2" and not (out / "checkpoint.partial").exists()

    for name, size, *reasons in (
        ("append", len(kept_lines) + 10, "OSError: [Errno 27]", "traceback.txt"),
        ("save_checkpoint", 500_000, "cannot write checkpoint-3", f"make room in {out}"),  # bytes: within the weights
        ("save_checkpoint", 1_500_000, "cannot write checkpoint-3", f"make room in {out}"),  # within the optimiser
    ):
        with monkeypatch.context() as patch:
            patch.setattr(train_module, name, largest_file(size)(getattr(train_module, name)))
            stopped(*reasons)
    assert (out / "traceback.txt").read_text().count("Errno 27") and (out / "metrics.jsonl").read_bytes().startswith(kept_lines)

    def dead(self, requests, *args, **kwargs):
        if len(requests) > 8:  # not those of verify_sync
            raise RuntimeError("the core\nis dead")
        return generate(self, requests, *args, **kwargs)

    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", dead)
    stopped("RuntimeError: the core is dead", f"{out}/traceback.txt")
    assert ", in dead" in (out / "traceback.txt").read_text()
    monkeypatch.setattr(TorchEngine, "generate", generate)

    monkeypatch.setattr(AttnRL, "accumulate", not_finite)
    flags = (*flags, "--max_skipped_updates", 1)
    stopped("1 updates in a row had a loss or gradient that is not finite", f"see {out}/nonfinite-3.json")
    groups = [Group(**g | {"rollouts": [Rollout(**r) for r in g["rollouts"]]}) for g in json.loads((out / "nonfinite-3.json").read_text())]
    assert 0 < len(groups) <= 2 and all(g.mixed() and all(len(r.advantages) == len(r.ids) for r in g.rollouts) for g in groups)
    monkeypatch.undo()

    run(*flags)
    assert_ended_alike(out, uninterrupted)


def not_finite(self, rollouts, n_tokens):
    """AttnRL.accumulate where every gradient is NaN."""
    for parameter in self.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    return {"loss": 0.0, "clipped": 0.0, "kl": 0.0}


def test_updates_skipped_in_a_row_are_counted_across_checkpoints(tmp_path, uninterrupted, monkeypatch):
    out = rewound(tmp_path / "run", uninterrupted)
    monkeypatch.setattr(AttnRL, "accumulate", not_finite)
    run("--output_dir", out, "--steps", 3, "--max_skipped_updates", 99)
    last, weights = metrics(out)[-1], [(out / f"checkpoint-{n}/model.safetensors").read_bytes() for n in (2, 3)]
    assert last["skipped_updates"] >= 1 and last["total_updates"] == metrics(out)[-2]["total_updates"] and "loss" not in last
    assert weights[0] == weights[1]
    count = json.loads((out / "checkpoint-3/state.json").read_text())["skipped_in_a_row"]
    assert count == last["skipped_updates"]
    calls = []
    monkeypatch.setattr(AttnRL, "accumulate", lambda *args: (calls.append(args), not_finite(*args))[1])
    said = words_of_main(monkeypatch, "--output_dir", out, "--steps", 4, "--max_skipped_updates", count + 1)
    assert len(calls) == 1 and f"{count + 1} updates in a row" in said and said.endswith("resumes from " + str(out / "checkpoint-3"))


@pytest.mark.parametrize(("off_policy", "right"), [(True, False), (False, True)])
def test_batches_without_a_usable_sequence_change_nothing_and_the_run_goes_on(tmp_path, monkeypatch, off_policy, right):
    """Every answer right, or every one wrong, in all steps but the one after a resume."""
    out, pushes = tmp_path / "run", []
    flags = ("--output_dir", out, "--off_policy", off_policy, "--fci_filter", "none")
    monkeypatch.setattr(train_module, "grade", lambda response, answers: right)
    monkeypatch.setattr(TorchEngine, "load", lambda self, model: pushes.append(1))
    run(*flags, "--steps", 2)
    assert len(pushes) == 2  # of verify_sync
    records = metrics(out)
    assert len(records) == 4 if off_policy else 3
    for record in records[1:]:
        assert record["total_updates"] == 0 and "loss" not in record and "skipped_updates" not in record
        assert record.get("reward", float(right)) == right
        assert all(x == x and abs(x) < 1e9 for x in record.values() if isinstance(x, float))
    for record in records[-2:]:
        assert record["valid_sequences"] == record["valid_problems"] == record["valid_tokens"] == 0 and record["sequences"] > 0
        assert (record["mc_valid"], record["rescued"]) == (0, 0) and record["next_batch_size"] > 4
    before, after = (torch.load(out / f"checkpoint-{n}/optimizer.pt", weights_only=True)["optimizer"]["state"] for n in (1, 2))
    assert before == after == {}
    weights = [(path / "model.safetensors").read_bytes() for path in checkpoints(out)]
    assert weights[0] == weights[1] and (out / "curves.png").exists()
    monkeypatch.undo()
    run(*flags, "--steps", 3)
    assert metrics(out)[-1]["total_updates"] > 0 and metrics(out)[: len(records)][1:-1] == records[1:-1]


def test_a_storm_of_grader_timeouts_is_survived(tmp_path, monkeypatch):
    """Every answer makes the symbolic worker give up: all count as wrong, the run goes on."""

    def give_up(gold, answer):
        evaluation.CHECKER.timeouts += 1
        return False

    monkeypatch.setattr(evaluation.CHECKER, "equal", give_up)
    monkeypatch.setattr(train_module, "grade", lambda response, answers: evaluation.CHECKER.equal(answers[0], response))
    before, out = evaluation.CHECKER.timeouts, tmp_path / "run"
    run("--output_dir", out, "--steps", 2, "--algo", "grpo")
    assert evaluation.CHECKER.timeouts - before == sum(r["sequences"] for r in metrics(out)[1:]) > 0
    assert [r["reward"] for r in metrics(out)[1:]] == [0, 0] and metrics(out)[-1]["total_updates"] == 0


def test_weights_are_safetensors_and_nothing_is_unpickled(tmp_path, uninterrupted, tiny_model, tiny_tokenizer):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("tiny/*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        modules |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not modules & {"pickle", "shelve", "joblib", "dill", "cloudpickle"}, path
        for call in (n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"):
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), ast.unparse(call)
        assert not any(k.arg in ("allow_pickle", "trust_remote_code") for n in nodes if isinstance(n, ast.Call) for k in n.keywords), path
    suffixes = {p.suffix for p in (uninterrupted / "checkpoint-4").iterdir()}
    assert suffixes == {".safetensors", ".pt", ".json", ".jinja"}  # .pt is what torch.load reads with weights_only

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"optimizer": Malice()}, tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match="weights_only"):
        train_module.restore(None, tmp_path, {})
    assert not (tmp_path / "hacked").exists()


def test_everything_is_on_the_disk_before_an_older_checkpoint_goes(tmp_path, monkeypatch):
    out, sync, synced, fsync, lines = tmp_path / "run", train_module.sync, [], os.fsync, []
    monkeypatch.setattr(train_module, "sync", lambda path: (synced.append((path, [p.name for p in checkpoints(out)])), sync(path)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (lines.append(len(synced)), fsync(descriptor)))
    run("--algo", "grpo", "--output_dir", out, "--steps", 2, "--keep_checkpoints", 1)
    second = synced[len(synced) // 2 :]
    names = {p.name for p in (out / "checkpoint-2").iterdir()}
    assert {path.name for path, _ in second[:-1]} == names | {"checkpoint.partial"}
    assert all(found == ["checkpoint-1"] for _, found in second[:-1]) and second[-1] == (out, ["checkpoint-1", "checkpoint-2"])
    assert [p.name for p in checkpoints(out)] == ["checkpoint-2"]
    assert lines.count(len(synced) // 2) == 2 + 1  # two log lines of the second step before its checkpoint, and the rename of the first


def test_half_written_checkpoints_are_not_taken_for_one(tmp_path):
    for name in ("checkpoint.partial", "checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_damaged_checkpoint_is_named_before_the_model_loads(tmp_path, uninterrupted, monkeypatch):
    out = rewound(tmp_path / "run", uninterrupted)
    weights, logged = out / "checkpoint-2/model.safetensors", (out / "metrics.jsonl").read_bytes()
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(train_module, "load_model", refuse_to_load)
    with pytest.raises(InputError, match="checkpoint-2 is damaged .model.safetensors: .*delete it to resume from the one before"):
        run("--output_dir", out, "--steps", 4)
    assert (out / "metrics.jsonl").read_bytes() == logged


def test_every_file_of_a_checkpoint_is_checked(tmp_path, uninterrupted):
    """Each truncated, emptied, deleted, and with a bit flipped at its start, in its middle and at its end."""
    checkpoint = shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    expected = read_state(checkpoint)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert {"model.safetensors", "optimizer.pt", "state.json", "digests.json", "config.json", "tokenizer.json"} <= set(names)
    for path in [checkpoint / name for name in names]:
        data = path.read_bytes()
        flips = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in (0, len(data) // 2, len(data) - 1)]
        for damaged in (data[: len(data) // 2], data[:-1], b"", None, *flips):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InputError, match="checkpoint-4 is damaged") as caught:
                read_state(checkpoint)
            assert "\n" not in str(caught.value) and "delete it to resume from the one before" in str(caught.value)
            if path.name != "digests.json" or damaged != flips[1]:  # in its middle stands another file's name or digest
                assert path.name in str(caught.value)
            path.write_bytes(data)
    assert read_state(checkpoint) == expected


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
