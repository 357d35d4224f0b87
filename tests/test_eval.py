"""Pass@K by enumeration, evaluation with a scripted engine, and the command line."""

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from scripted import PROBLEMS, SETTINGS, TEXTS, CharTokenizer, ScriptedEngine

import eval as evaluation
from eval import evaluate, grade, load_benchmarks, parse_args, pass_at_k
from experiments.compare_evaluations import compare
from plumbing.evaluations import SampleFile
from plumbing.problems import BENCHMARKS
from plumbing.symbolic import CHECKER
from plumbing.torch_engine import TorchEngine

DATA = ROOT / ".." / "shared" / "data"

# --- Pass@K


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c):
    for k in range(1, n + 1):
        subsets = itertools.combinations([i < c for i in range(n)], k)
        assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(map(any, subsets)))


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match=f"Pass@{k} of {n}"):
        pass_at_k(n, c, k)


# --- evaluate


def test_evaluate(tmp_path):
    engine, path = ScriptedEngine(TEXTS), tmp_path / "a.jsonl"
    settings = SETTINGS | {"budget": lambda n_prompt: min(10, 14 - n_prompt)}
    result = evaluate(engine, CharTokenizer(), PROBLEMS, **settings, file=SampleFile(path, chunk=512))
    assert ["".join(map(chr, r.prompt_ids)) for r in engine.requests] == ["abc", "abc", "defgh", "defgh"]
    assert [r.max_new_tokens for r in engine.requests] == [10, 10, 9, 9]  # 14 - 5 < 10
    assert engine.calls == [(0.6, 0.9)]
    assert result["per_problem"] == [0.5, 1.0] and result["pass@1"] == 0.75 and result["pass@k"] == 1.0
    assert result["stderr"] == pytest.approx(0.25)  # deviation 0.3536 of (0.5, 1), over sqrt(2)
    assert result["mean_tokens"] == (9 + 5 + 31 + 9) / 4 and result["truncated"] == 0.25
    assert result["timeouts"] == result["long_prompts"] == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["verdict"] for r in rows] == ["correct", "wrong", "correct", "correct"]
    second = {"problem": 0, "sample": 1, "verdict": "wrong", "tokens": 5}
    assert rows[1] == second | {"finish_reason": "length", "response": "so..."}
    assert json.loads(json.dumps(result)) == result
    # In one call, without a file.
    assert evaluate(ScriptedEngine(TEXTS), CharTokenizer(), PROBLEMS, **SETTINGS) == result


def test_one_problem_has_no_standard_error():
    settings = SETTINGS | {"samples": 1}
    result = evaluate(ScriptedEngine(["1"]), CharTokenizer(), PROBLEMS[:1], **settings)
    assert result["stderr"] is None and result["pass@1"] == 0 and result["pass@k"] == 0


def test_prompts_that_fill_the_context_are_reported_and_count_as_wrong():
    engine = ScriptedEngine([r"\boxed{1}"] * 2)
    within = lambda context: SETTINGS | {"budget": lambda n_prompt: context - n_prompt}
    result = evaluate(engine, CharTokenizer(), PROBLEMS, **within(5))
    assert len(engine.requests) == 2 and result["long_prompts"] == 1
    assert result["per_problem"] == [1.0, 0.0] and result["mean_tokens"] == 9
    nothing = evaluate(ScriptedEngine([]), CharTokenizer(), PROBLEMS, **within(3))
    assert nothing["long_prompts"] == 2 and nothing["pass@1"] == 0 and nothing["mean_tokens"] == 0


def test_gradings_given_up_are_reported(monkeypatch):
    def give_up(gold, answer):
        raise TimeoutError

    monkeypatch.setattr(CHECKER, "equal", give_up)
    engine = ScriptedEngine([r"\boxed{x}", r"\boxed{1}", *TEXTS[2:]])
    result = evaluate(engine, CharTokenizer(), PROBLEMS, **SETTINGS)
    assert result["timeouts"] == 1 and result["per_problem"] == [0.5, 1.0]


# --- the command line


def run(out: Path, *flags):
    """eval.py on tiny/ in this process; its results.json."""
    files = ["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--output-dir", str(out)]
    short = "--limit 4 --samples 3 --max-new-tokens 128 --chunk 5".split()
    evaluation.run(parse_args([*files, *short, *map(str, flags)]))
    return json.loads((out / "results.json").read_text())


def test_an_interrupted_evaluation_ends_with_the_same_samples(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "a")
    real, calls = TorchEngine.generate, []

    def interrupted(self, requests, **kwargs):
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, requests, **kwargs)

    monkeypatch.setattr(TorchEngine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    assert not (tmp_path / "b/results.json").exists()
    assert len((tmp_path / "b/test.jsonl").read_text().splitlines()) == 5
    torch.manual_seed(99)
    capsys.readouterr()
    assert run(tmp_path / "b") == whole and calls == [5, 5, 5, 2]
    assert (tmp_path / "b/test.jsonl").read_bytes() == (tmp_path / "a/test.jsonl").read_bytes()
    assert run(tmp_path / "b") == whole and calls == [5, 5, 5, 2]
    other = run(tmp_path / "c", "--seed", 1)
    assert other["results"] != whole["results"]
    lines = compare(str(tmp_path / "a/results.json"), str(tmp_path / "c/results.json"))
    assert lines[1].startswith("test ") and lines[2].startswith("average ")

    output = capsys.readouterr()
    assert "average" in output.out and "12/12" in output.err
    settings = whole["settings"]
    assert settings["benchmarks"]["test"]["samples"] == 3 and settings["seed"] == 0 and settings["weights"]


def test_a_folder_with_other_settings_is_refused(tmp_path):
    run(tmp_path)
    refusal = "holds an evaluation with other settings.* another --output_dir"
    for flags in (["--seed", 1], ["--limit", 3], ["--samples", 2], ["--temperature", 1], ["--chunk", 6]):
        with pytest.raises(ValueError, match=refusal) as error:
            run(tmp_path, *flags)
        assert "\n" not in str(error.value)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="cannot use"):
        run(tmp_path)


def test_benchmarks_come_from_the_hub_or_a_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {name: (question, answer) for name, question, answer in BENCHMARKS.values()}

    def load_dataset(name, split):
        question, answer = columns[name]
        assert split == "test"
        return datasets.Dataset.from_list([{question: f"of {name}", answer: r"$\boxed{7}$", "id": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_benchmarks(parse_args(["--model", "m"]))
    papers = dict(aime24=32, aime25=32, amc23=32, math500=4, minerva=4, olympiad=4)
    assert {name: samples for name, (_, samples) in found.items()} == papers
    assert found["olympiad"][0] == [{"problem": "of math-ai/olympiadbench", "answers": [r"$\boxed{7}$"]}]
    assert grade(r"\boxed{7}", found["aime24"][0][0]["answers"])

    (tmp_path / "amc23.jsonl").write_text('{"problem": "p", "answer": "1"}\n' * 3)
    args = ["--model", "m", "--data", "amc23", str(tmp_path / "amc23.jsonl")]
    two = {"amc23": ([{"problem": "p", "answers": ["1"]}] * 2, 32)}
    assert load_benchmarks(parse_args([*args[:-1], "--data-dir", str(tmp_path), "--limit", "2"])) == two
    assert load_benchmarks(parse_args([*args[:3], args[4]]))["amc23"][1] == 4  # a file is not the benchmark
    with pytest.raises(ValueError, match="two data sets called 'amc23'"):
        load_benchmarks(parse_args(args))
    with pytest.raises(ValueError, match="math500.jsonl"):
        load_benchmarks(parse_args(["--model", "m", "--data", "math500", "--data_dir", str(tmp_path)]))


@pytest.mark.skipif(not DATA.exists(), reason="needs the benchmark files")
def test_the_six_files():
    found = load_benchmarks(parse_args(["--model", "m", "--data_dir", str(DATA)]))
    assert [len(problems) for problems, _ in found.values()] == [30, 30, 40, 500, 272, 674]


BAD_ARGUMENTS = [  # arguments, exit status, message
    (["--model", "m", "--data", "none.jsonl"], 1, "cannot read 'none.jsonl'"),
    (["--model", "nowhere", "--data", str(TINY / "test.jsonl")], 1, "nowhere"),
    ([], 2, "--model is missing"),
    (["--model", "m", "--samples", "0"], 2, "--samples is 0"),
    (["--model", "m", "--temperature", "nan"], 2, "--temperature nan"),
    (["--model", "m", "--top_p", "0"], 2, "--top_p 0.0"),
    (
        f"--model {TINY} --data {TINY}/test.jsonl --output_dir {TINY}/test.jsonl".split(),
        1,
        "another --output_dir",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments, status, message", BAD_ARGUMENTS[:3])
def test_bad_arguments_end_with_one_sentence(tmp_path, arguments, status, message):
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # or looking for a model on the hub takes minutes
    command = [sys.executable, str(ROOT / "eval.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, status, message", [bad for bad in BAD_ARGUMENTS if "nowhere" not in bad[0]]
)
def test_bad_arguments_are_found_by_main(tmp_path, monkeypatch, capsys, arguments, status, message):
    """As above, in this process, where nothing has to be loaded first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        evaluation.main()
    if status == 1:
        assert message in caught.value.code and "\n" not in caught.value.code
    else:
        assert caught.value.code == status and message in capsys.readouterr().err


# --- vLLM


@pytest.mark.slow
def test_a_benchmark_file_through_vllm(tmp_path):
    pytest.importorskip("vllm")
    problems = (TINY / "test.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "amc23.jsonl").write_text("".join(problems))
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(TINY), "--data", "amc23"]
    command += ["--data_dir", str(tmp_path), "--samples", "2", "--max_new_tokens", "128", "--chunk", "50"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    found = {}
    for engine in ("vllm", "torch"):
        flags = ["--output_dir", str(tmp_path / engine), "--engine", engine]
        done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found[engine] = json.loads((tmp_path / engine / "results.json").read_text())["results"]["amc23"]
    a, b = found["vllm"], found["torch"]
    assert a["n_problems"] == 40 and a["samples"] == 2 and a["timeouts"] == 0 and 20 < a["mean_tokens"] < 100
    spread = (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5
    assert abs(a["pass@1"] - b["pass@1"]) < 4 * spread and a["pass@1"] > 0.1
