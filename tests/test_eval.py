"""Grading on hand-picked and hostile answers, Pass@K by enumeration, data errors, evaluation with a scripted engine."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import eval as evaluation
import sampler
from eval import (
    BENCHMARKS,
    CHECKER,
    SymbolicChecker,
    boxed_answer,
    elements,
    evaluate,
    grade,
    load_benchmarks,
    load_problems,
    normalise,
    number,
    parse_args,
    pass_at_k,
    verdict,
)
from experiments.compare_evals import bootstrap, compare
from experiments.grader_parity import check, hostile

ROOT = TINY.parent
DATA = ROOT / ".." / "shared" / "data"

CORRECT = [  # gold, answer
    ("23/4", "5 3/4"),
    ("1000", "1 000"),
    ("\\frac{3}{2}", "1 1/2"),
    ("-5", "–5"),
    ("\\emptyset", "\\varnothing"),
    ("204", "204"),
    ("204", "204."),
    ("5", "5.0"),
    ("033", "33"),
    ("10,\\!080", "10080"),
    ("1{,}008", "1,008"),
    (r"\$32,\!348", "32348"),
    (r"\frac{14}{3}", r"\dfrac{14}3"),
    (r"\frac43", "4/3"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"-\frac{35}{9}", "-35/9"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"137 \frac{1}{2}", "137.5"),
    ("x=5", "5"),
    ("2x+3", "y = 2x + 3"),
    (r"x \in [-2,7]", "[-2, 7]"),
    (r"90^\circ", "90"),
    ("145", r"145^{\circ}"),
    (r"84\%", "84"),
    (r"15\mbox{ cm}^2", "15"),
    (r"5.4 \text{ cents}", "5.4"),
    ("147", "147 cm"),
    (r"\text{Evelyn}", "Evelyn"),
    ("even", r"\text{Even}"),
    (r"\text{(C)}", "C"),
    ("4210_{5}", "4210_5"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(0.6, 8/3]"),
    ("(3, 4)", r"\left(\sqrt{9}, 2^2\right)"),
    ("1,3,5", "5, 1, 3"),
    ("$69$,$84$", "84, 69"),
    (r"\boxed{7}", "7"),
    ("p - q", "-q+p"),
    (r"2\sqrt{113}", r"\sqrt{452}"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} \frac15 \\ -\frac{18}{5} \end{pmatrix}"),
    (r"x^5 - x + 1", r"1-x+x^{5}"),
    ("2", "2m"),  # an answer may add a unit
    ("52_8", "52"),  # and leave out the base
    ("3R^2", "3r^2"),  # case matters only where a letter has both
    ("R - r", "-r + R"),
    ("m v^2 + M V", "VM + mv^2"),
    (r"\frac{1}{\sqrt{2}}c", r"\frac{c}{\sqrt{2}}"),  # c is no unit
    (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "15000"),
    (r"1950^\circ C", "1950"),
    (r"4.4677 \times 10^{14} Hz", "4.4677e14"),
    (r"\frac13", "0.333333"),
    ("0.333333", "1/3"),
    (r"50\%", "0.5"),
]
WRONG = [
    ("53/4", "5 3/4"),
    ("12", "1 2"),
    ("11/2", "1 1/2"),
    ("10:00\\text{ AM}", "10:00\\text{ PM}"),
    ("204", "205"),
    ("204", "-204"),
    ("5", "5.1"),
    ("1", "1,2"),
    ("1,2", "1"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{2}", r"\frac{1}{0}"),
    ("(3,4)", "(4,3)"),
    ("(3,4]", "(3,4)"),
    ("(3,4)", "[3,4]"),
    ("(1,2,3)", "(1,2)"),
    ("40_9", "41_9"),
    ("52_8", "528"),
    (r"\text{even}", "odd"),
    (r"\text{(C)}", "D"),
    (r"2\sqrt{3}", r"2\sqrt{5}"),
    ("2x+3", "2x-3"),
    ("7 \\times 10^{37}", "7 \\times 10^{36}"),
    ("8.2 \\times 10^{-19}", "0"),
    ("5", "5 - x"),
    (r"(0,9) \cup (9,36)", "(0,36)"),
    ("2m", "2"),
    ("$6m$", "6"),
    (r"\frac{1}{\sqrt{2}}c", r"\frac{1}{\sqrt{2}}"),
    ("52_8", "52_9"),
    ("52_8", "52_{10}"),
    ("R - r", "r - R"),
    ("R - r", "0"),
    ("3R^2", "3Rr"),
    ("8.2 \\times 10^{-19}", "8.3 \\times 10^{-19}"),
    ("0.0000001", "0.0000002"),
    (r"6.43 \times 10^{16}", "64300000000000001"),
    ("12345678.5", "12345679.5"),
    (r"\frac13", "0.33"),
    (r"50\%", "0.05"),
]
HOSTILE = {
    "NUL": "\\boxed{\0}",
    "lone surrogate": "\\boxed{\ud800}",
    "line separators": "\\boxed{3\u20283\n3}",
    "foreign digit": "\\boxed{\u0663x}",
    "open braces": "\\boxed{" + "{" * 100_000,
    "closed braces": "\\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
    "many boxes": "\\boxed{" * 15_000,
    "many spaces": "\\boxed" + " " * 100_000,
    "deep tuples": "\\boxed{" + "(" * 20 + "1" + ",2)" * 20 + "}",
    "deep roots": "\\boxed{" + "\\sqrt{" * 15 + "2" + "}" * 15 + "}",
    "huge number": "\\boxed{" + "9" * 1_999 + "}",
    "huge exponent": "\\boxed{1e999999999}",
    "only a backslash": "\\boxed{\\}",
    "no denominator": "\\boxed{1/0}",
    "empty elements": "\\boxed{(,)}",
    "code": "\\boxed{__import__('os').getcwd()}",
}


def test_a_unit_needs_its_space():
    assert evaluation.normalise("2 m") == "2" and evaluation.normalise("2m") == "2m"


@pytest.mark.parametrize("gold, answer", CORRECT)
def test_correct_answers(gold, answer):
    assert grade(f"<think>\\boxed{{0}}</think> So it is $\\boxed{{{answer}}}$.", [gold])


@pytest.mark.parametrize("gold, answer", WRONG)
def test_wrong_answers(gold, answer):
    assert not grade(f"So it is $\\boxed{{{answer}}}$.", [gold])


def test_only_the_last_box_after_the_last_think_counts():
    assert boxed_answer(r"\boxed{1} and \boxed{2}") == "2"
    assert boxed_answer(r"\boxed{1}</think> \boxed{2} </think> \boxed{\left\{3\right.}!") == r"\left\{3\right."
    assert boxed_answer(r"\fbox{4}") == "4" and boxed_answer(r"\boxed{\boxed{5}}") == "5"
    for response in ("5", "", r"\boxed{}", r"\boxed{ }", r"\boxed{5</think>", r"\boxed{5}</think> done", r"\boxed{4} \boxed{5"):
        assert boxed_answer(response) is None and not grade(response, ["5", "", "4"])


def test_any_gold_answer_suffices():
    assert grade(r"\boxed{m}", ["1", "m\n"])
    assert not grade(r"\boxed{2}", ["1", "3"])
    assert not grade(r"\boxed{2}", [])


def test_numbers_and_elements():
    assert number("-.5") == Fraction(-1, 2) and number("1,234,567") == 1234567 and number("-1\\frac{1}{2}") == Fraction(-3, 2)
    assert number("2e-3") == Fraction(1, 500) and number("3\\times10^{4}") == 30000
    assert [number(text) for text in ("", "-", ".", "e5", "1/0", "52_8", "1,23", "1e9999", "x", "\u0663")] == [None] * 10
    assert elements("(1, (2,3)]") == ("(]", ["1", " (2,3)"])
    assert elements("(0,9) \\cup (9,36)") is None and elements("1,2") is None and elements("(1") is None


@pytest.mark.parametrize("gold, answer", CORRECT + WRONG)
def test_normalising_twice_changes_nothing(gold, answer):
    for text in (gold, answer):
        assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_are_wrong_without_a_timeout(response):
    timeouts = CHECKER.timeouts
    assert not grade(response, ["3", "(1,2)"])
    assert CHECKER.timeouts == timeouts


TOWER = "9^{9^{9^{9}}}"


@pytest.mark.parametrize("answer, gold", [(TOWER, "3"), (f"(1, {TOWER})", "(1,2)")])
def test_a_tower_of_powers_costs_one_worker_and_is_counted(answer, gold):
    timeouts = CHECKER.timeouts
    assert verdict(f"\\boxed{{{answer}}}", [gold, gold, gold]) == "timeout" and not grade("\\boxed{x}", ["3"])
    assert CHECKER.timeouts == timeouts + 1  # not one for each gold answer
    assert grade(r"\boxed{\sqrt{12}}", [r"2\sqrt{3}"]) and not grade(r"\boxed{\sqrt{13}}", [r"2\sqrt{3}"])
    assert CHECKER.timeouts == timeouts + 1


@pytest.fixture
def stopped():
    """A checker and its only worker, which is stopped: its own alarm clock stands still."""
    checker = SymbolicChecker()
    assert checker.equal("x+1", "1+x")
    os.kill(checker._idle[0].pid, signal.SIGSTOP)
    return checker, checker._idle[0]


def test_a_stopped_worker_is_given_up(stopped, monkeypatch):
    checker, worker = stopped
    monkeypatch.setattr(evaluation, "TIME_LIMIT", 1)
    with pytest.raises(TimeoutError, match="no verdict on '1\\+x' within 1 s"):
        checker.equal("x+1", "1+x")
    assert checker.timeouts == 1 and worker.poll() is not None and checker.equal("x+1", "1+x")


def test_an_answer_that_hangs_blocks_no_other(stopped, monkeypatch):
    checker, worker = stopped
    monkeypatch.setattr(evaluation, "TIME_LIMIT", 600)
    with ThreadPoolExecutor(8) as pool:
        hung = pool.submit(checker.equal, "x+1", "1+x")
        while checker._idle:
            pass  # until the stopped worker is taken
        answers = list(pool.map(checker.equal, ["x+1", "x+2"] * 20, ["1+x", "1+x"] * 20))
        assert answers == [True, False] * 20 and not hung.done()
        worker.kill()
        assert isinstance(hung.exception(), TimeoutError)
    assert len(checker._idle) <= evaluation.WORKERS and checker.timeouts == 1


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit on address space")
def test_workers_have_a_memory_limit():
    import resource

    checker = SymbolicChecker()
    assert not checker.equal("3", "x")
    assert resource.prlimit(checker._idle[0].pid, resource.RLIMIT_AS)[0] == evaluation.MEMORY_LIMIT


SCRIPT = r"""
import multiprocessing, os, threading
from eval import CHECKER, grade

def right():
    return grade(r"\boxed{\sqrt{12}}", [r"2\sqrt{3}"]) and not grade(r"\boxed{\sqrt{13}}", [r"2\sqrt{3}"])

if __name__ == "__main__":
    assert right()
    child = os.fork()
    if child == 0:
        os._exit(0 if CHECKER._idle == [] and right() else 1)  # a worker that both asked would mix up their answers
    assert right() and os.waitpid(child, 0)[1] == 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(right)
    found = []
    thread = threading.Thread(target=lambda: found.append(right()))
    thread.start(); thread.join()
    assert found == [True]
    print("all right")
"""


def test_grading_in_threads_forked_and_spawned_processes_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("all right") == 2, result.stderr


def test_long_answers_and_plain_numbers_never_reach_a_worker(monkeypatch):
    monkeypatch.setattr(CHECKER, "_take", lambda: pytest.fail("a worker was asked"))
    assert not CHECKER.equal("x", "y" * (evaluation.MAX_ANSWER_CHARS + 1))
    assert not grade(r"\boxed{12}", ["13"]) and grade(r"\boxed{1/2}", [r"\frac12"]) and not grade(r"\boxed{(1,2)}", ["(1,3)"])
    assert grade(r"\boxed{y + 2}", ["x+1", "y+2"])  # the second gold answer matches before the first is asked about
    assert grade(r"\boxed{0.50}", ["1/2"]) and not grade(r"\boxed{0.51}", ["1/2"]) and grade(r"\boxed{x + 1}", ["x+1"])


def test_a_worker_that_does_not_start_is_an_error_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(evaluation, "WORKER_FLAG", "--help")
    with pytest.raises(RuntimeError, match="math-verify"):
        SymbolicChecker().equal("x", "y")


def test_importing_eval_does_not_import_torch():
    code = "import sys, eval; print(sorted({'torch', 'transformers', 'datasets', 'sympy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def fuzz(n: int, seed: int = 0) -> list[str]:
    """Contents of hostile boxes, some of which do not close."""
    return [text.partition("\\boxed{1} </think>")[2] or text for text in hostile(n, seed)]


def test_nothing_that_stands_before_the_last_box_matters():
    for text in fuzz(1000):
        assert grade(f"{text}\\boxed{{7}}", ["7"]) and not grade(f"{text}\\boxed{{7}}", ["8"]), repr(text)


def test_ten_thousand_hostile_answers_raise_nothing_and_equal_themselves(monkeypatch):
    monkeypatch.setattr(CHECKER, "equal", lambda gold, answer: False)  # its own fuzz follows
    for response in hostile(10_000, seed=1):
        assert verdict(response, ["7", "(1,2)", r"\frac{1}{2}", "2x+1"]) in ("correct", "wrong")
        answer = boxed_answer(response)
        if answer and len(answer) <= evaluation.MAX_ANSWER_CHARS and normalise(answer.replace("\\$", "").replace("$", "")):
            assert grade(response, [f"\\boxed{{{answer}}}"]), repr(response)


def test_hostile_questions_leave_the_workers_in_step():
    for response in hostile(60, seed=2):
        verdict(response, ["2x+1"])
        assert CHECKER.equal(r"x+1", "1+x") and not CHECKER.equal("x+1", "x+2"), repr(response)


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c):
    for k in range(1, n + 1):
        subsets = itertools.combinations([i < c for i in range(n)], k)
        assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(map(any, subsets)))


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match=f"Pass@{k} of {n}"):
        pass_at_k(n, c, k)


@pytest.mark.skipif(not DATA.exists(), reason="needs the benchmark files")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_parity_on_the_benchmarks(name):
    problems = load_problems(str(DATA / f"{name}.jsonl"))
    assert all(grade(f"So \\boxed{{{gold}}}.", p["answers"]) for p in problems for gold in p["answers"])
    asked, _, errors, _ = check(problems[::5])  # experiments/grader_parity.py checks them all
    assert not errors and asked["off by one"] > 0 and asked["other answer"] > 0 and asked["units"] > 0


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_answers_may_mix_text_numbers_and_lists(tmp_path):
    rows = [{"problem": "p\u2028q", "answer": "1\n"}, {"problem": "r", "answer": 2.5}, {"problem": "s", "answer": [3, "4"], "extra": None}]
    expected = [{"problem": "p\u2028q", "answers": ["1"]}, {"problem": "r", "answers": ["2.5"]}, {"problem": "s", "answers": ["3", "4"]}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert load_problems(write(tmp_path / "a.jsonl", lines)) == expected
    assert load_problems(write(tmp_path / "a.json", json.dumps(rows))) == expected


def test_parquet_files_and_hub_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"problem": "p", "answer": ["1", "2"]}])
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert load_problems(str(tmp_path / "a.parquet")) == [{"problem": "p", "answers": ["1", "2"]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("org/name", "test"): table}[name, split])
    assert load_problems("org/name", "test") == [{"problem": "p", "answers": ["1", "2"]}]
    with pytest.raises(ValueError, match="cannot read 'org/nome', split 'test'"):
        load_problems("org/nome", "test")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.jsonl", None, "none.jsonl.*No such file"),
        ("none.parquet", None, "none.parquet"),
        ("empty.jsonl", "\n", "empty.jsonl holds no problems"),
        ("empty.json", "", "empty.json holds no problems"),
        ("cut.jsonl", '{"problem": "p", "ans', "cannot read .*cut.jsonl"),
        ("latin.json", "\udce9", "cannot read .*latin.json"),
        ("bad.parquet", "PAR", "cannot read .*bad.parquet"),
        ("table.json", '{"problem": "p", "answer": "1"}', "table.json.*needs a list of rows"),
        ("list.jsonl", "[1]", r"row 1 of .*list.jsonl has \[1\]"),
        ("columns.jsonl", '{"question": "p", "answer": "1"}', "columns question, answer; it needs `problem`"),
        ("problem.jsonl", '{"problem": " ", "answer": "1"}', "row 1 of .* has the problem ' '"),
        ("number.jsonl", '{"problem": 1, "answer": "1"}', "has the problem 1"),
        ("second.jsonl", '{"problem": "p", "answer": "1"}\n{"problem": "p", "answer": ""}', "row 2 of .* has the answer ''"),
        ("none.jsonl", '{"problem": "p", "answer": null}', "has the answer None"),
        ("bool.jsonl", '{"problem": "p", "answer": true}', "has the answer True"),
        ("nolist.jsonl", '{"problem": "p", "answer": []}', r"has the answer \[\]"),
    ],
)
def test_bad_data_gives_one_clear_sentence(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        load_problems(str(path))
    assert "\n" not in str(error.value)


class ScriptedEngine:
    """Returns the given texts in order, one character a token, and keeps what it was asked."""

    def __init__(self, texts: list[str]):
        self.texts, self.requests, self.calls = texts, [], []

    def generate(self, requests, temperature=1.0, top_p=1.0):
        self.requests += requests
        self.calls.append((temperature, top_p))
        texts, self.texts = self.texts[: len(requests)], self.texts[len(requests) :]
        reasons = ["length" if text.endswith("...") else "stop" for text in texts]
        return [types.SimpleNamespace(ids=[ord(c) for c in t], logps=[0.0] * len(t), finish_reason=r) for t, r in zip(texts, reasons)]


class CharTokenizer:
    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens  # `</think>` may be a special token
        return "".join(map(chr, ids))


@pytest.fixture
def char_prompts(monkeypatch):
    monkeypatch.setattr(sampler, "prompt_ids", lambda tokenizer, problem: [ord(c) for c in problem])


PROBLEMS = [{"problem": "abc", "answers": ["1"]}, {"problem": "defgh", "answers": ["2", "3"]}]
TEXTS = [r"\boxed{1}", "so...", r"\boxed{2}</think>\boxed{3}<eos>", r"\boxed{2}"]
SETTINGS = dict(samples=2, max_new_tokens=10, temperature=0.6, top_p=0.9)


def test_evaluate(char_prompts, tmp_path):
    engine, path = ScriptedEngine(TEXTS), tmp_path / "a.jsonl"
    result = evaluate(engine, CharTokenizer(), PROBLEMS, **SETTINGS, context=14, path=path)
    assert ["".join(map(chr, r.prompt_ids)) for r in engine.requests] == ["abc", "abc", "defgh", "defgh"]
    assert [r.max_new_tokens for r in engine.requests] == [10, 10, 9, 9]  # 14 - 5 < 10
    assert engine.calls == [(0.6, 0.9)]
    assert result["per_problem"] == [0.5, 1.0] and result["pass@1"] == 0.75 and result["pass@k"] == 1.0
    assert result["stderr"] == pytest.approx(0.25)  # deviation 0.3536 of (0.5, 1), over sqrt(2)
    assert result["mean_tokens"] == (9 + 5 + 31 + 9) / 4 and result["truncated"] == 0.25
    assert result["timeouts"] == result["long_prompts"] == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["verdict"] for r in rows] == ["correct", "wrong", "correct", "correct"]
    assert rows[1] == {"problem": 0, "sample": 1, "verdict": "wrong", "tokens": 5, "finish_reason": "length", "response": "so..."}
    assert json.loads(json.dumps(result)) == result
    assert evaluate(ScriptedEngine(TEXTS), CharTokenizer(), PROBLEMS, **SETTINGS) == result  # in one call, without a file


def test_what_a_file_holds_is_not_sampled_again(char_prompts, tmp_path):
    path = tmp_path / "a.jsonl"
    whole = evaluate(ScriptedEngine(TEXTS), CharTokenizer(), PROBLEMS, **SETTINGS, path=path, chunk=3)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for left in (content[:-20], b"".join(lines[:3]), content[: len(b"".join(lines[:3])) + 9]):  # torn, between chunks, torn
        path.write_bytes(left)
        engine = ScriptedEngine(TEXTS[3:])
        assert evaluate(engine, CharTokenizer(), PROBLEMS, **SETTINGS, path=path, chunk=3) == whole
        assert len(engine.requests) == 1 and path.read_bytes() == content
    for left in (content[:50], lines[0], lines[0] + lines[1] + b"{"):  # less than the first chunk
        path.write_bytes(left)
        engine = ScriptedEngine(TEXTS)
        assert evaluate(engine, CharTokenizer(), PROBLEMS, **SETTINGS, path=path, chunk=3) == whole and len(engine.requests) == 4
        assert path.read_bytes() == content
    assert evaluate(ScriptedEngine([]), CharTokenizer(), PROBLEMS, **SETTINGS, path=path, chunk=3) == whole


class RandomEngine:
    def generate(self, requests, temperature=1.0, top_p=1.0):
        texts = [str(x) for x in torch.rand(len(requests)).tolist()]
        return [types.SimpleNamespace(ids=[ord(c) for c in t], logps=[], finish_reason="stop") for t in texts]


def test_random_numbers_depend_on_seed_name_and_place_alone(char_prompts, tmp_path):
    def texts(name, seed):
        torch.manual_seed(len(drawn))
        evaluate(RandomEngine(), CharTokenizer(), PROBLEMS, **SETTINGS, path=tmp_path / str(len(drawn)) / name, seed=seed, chunk=1)
        return [json.loads(line)["response"] for line in (tmp_path / str(len(drawn)) / name).read_text().splitlines()]

    drawn = []
    for name, seed in (("a.jsonl", 0), ("a.jsonl", 0), ("a.jsonl", 1), ("b.jsonl", 0)):
        (tmp_path / str(len(drawn))).mkdir()
        drawn.append(texts(name, seed))
    assert drawn[0] == drawn[1] and len({text for rows in drawn[1:] for text in rows}) == 12


def test_one_problem_has_no_standard_error(char_prompts):
    result = evaluate(ScriptedEngine(["1"]), CharTokenizer(), PROBLEMS[:1], samples=1, max_new_tokens=4, temperature=1.0)
    assert result["stderr"] is None and result["pass@1"] == 0 and result["pass@k"] == 0


def test_prompts_that_fill_the_context_are_reported_and_count_as_wrong(char_prompts):
    engine = ScriptedEngine([r"\boxed{1}"] * 2)
    result = evaluate(engine, CharTokenizer(), PROBLEMS, **SETTINGS, context=5)
    assert len(engine.requests) == 2 and result["long_prompts"] == 1 and result["per_problem"] == [1.0, 0.0] and result["mean_tokens"] == 9
    nothing = evaluate(ScriptedEngine([]), CharTokenizer(), PROBLEMS, **SETTINGS, context=3)
    assert nothing["long_prompts"] == 2 and nothing["pass@1"] == 0 and nothing["mean_tokens"] == 0


def test_gradings_given_up_are_reported(char_prompts, monkeypatch):
    def give_up(gold, answer):
        raise TimeoutError

    monkeypatch.setattr(CHECKER, "equal", give_up)
    result = evaluate(ScriptedEngine([r"\boxed{x}", r"\boxed{1}", *TEXTS[2:]]), CharTokenizer(), PROBLEMS, **SETTINGS)
    assert result["timeouts"] == 1 and result["per_problem"] == [0.5, 1.0]


# --- the command line


def run(out: Path, *flags):
    """eval.py on tiny/ in this process; its results.json."""
    files = ["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--output-dir", str(out)]
    evaluation.run(parse_args([*files, "--limit", "4", "--samples", "3", "--max-new-tokens", "128", "--chunk", "5", *map(str, flags)]))
    return json.loads((out / "results.json").read_text())


def test_an_interrupted_evaluation_ends_with_the_same_samples(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "a")
    real, calls = sampler.TorchEngine.generate, []

    def interrupted(self, requests, **kwargs):
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, requests, **kwargs)

    monkeypatch.setattr(sampler.TorchEngine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    assert not (tmp_path / "b/results.json").exists() and len((tmp_path / "b/test.jsonl").read_text().splitlines()) == 5
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
    assert whole["settings"]["benchmarks"]["test"]["samples"] == 3 and whole["settings"]["seed"] == 0 and "weights" in whole["settings"]


def test_a_folder_with_other_settings_is_refused(tmp_path):
    run(tmp_path)
    for flags in (["--seed", 1], ["--limit", 3], ["--samples", 2], ["--temperature", 1], ["--chunk", 6]):
        with pytest.raises(ValueError, match="holds an evaluation with other settings.* another --output_dir") as error:
            run(tmp_path, *flags)
        assert "\n" not in str(error.value)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="cannot use"):
        run(tmp_path)


def test_benchmarks_come_from_the_hub_or_a_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {name: (question, answer) for name, question, answer, _ in BENCHMARKS.values()}

    def load_dataset(name, split):
        question, answer = columns[name]
        assert split == "test"
        return datasets.Dataset.from_list([{question: f"of {name}", answer: r"$\boxed{7}$", "id": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_benchmarks(parse_args(["--model", "m"]))
    assert {name: samples for name, (_, samples) in found.items()} == dict(aime24=32, aime25=32, amc23=32, math500=4, minerva=4, olympiad=4)
    assert found["olympiad"][0] == [{"problem": "of math-ai/olympiadbench", "answers": [r"$\boxed{7}$"]}]
    assert grade(r"\boxed{7}", found["aime24"][0][0]["answers"])

    write(tmp_path / "amc23.jsonl", '{"problem": "p", "answer": "1"}\n' * 3)
    args = ["--model", "m", "--data", "amc23", str(tmp_path / "amc23.jsonl")]
    assert load_benchmarks(parse_args([*args[:-1], "--data-dir", str(tmp_path), "--limit", "2"])) == {
        "amc23": ([{"problem": "p", "answers": ["1"]}] * 2, 32)
    }
    assert load_benchmarks(parse_args([*args[:3], args[4]]))["amc23"][1] == 4  # a file is not the benchmark
    with pytest.raises(ValueError, match="two data sets called 'amc23'"):
        load_benchmarks(parse_args(args))
    with pytest.raises(ValueError, match="math500.jsonl"):
        load_benchmarks(parse_args(["--model", "m", "--data", "math500", "--data_dir", str(tmp_path)]))


@pytest.mark.skipif(not DATA.exists(), reason="needs the benchmark files")
def test_the_six_files():
    found = load_benchmarks(parse_args(["--model", "m", "--data_dir", str(DATA)]))
    assert [len(problems) for problems, _ in found.values()] == [30, 30, 40, 500, 272, 674]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--model", "m", "--data", "none.jsonl"], 1, "cannot read 'none.jsonl'"),
        (["--model", "nowhere", "--data", str(TINY / "test.jsonl")], 1, "nowhere"),
        (["--compare", "a.json", "b.json"], 1, "cannot compare a.json with b.json"),
        ([], 2, "--model is missing"),
        (["--model", "m", "--samples", "0"], 2, "--samples is 0"),
        (["--model", "m", "--temperature", "nan"], 2, "--temperature is nan"),
        (["--model", "m", "--top_p", "0"], 2, "--top_p 0.0"),
        (["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--output_dir", str(TINY / "test.jsonl")], 1, "another --output_dir"),
    ],
)
def test_bad_arguments_end_with_one_sentence(tmp_path, arguments, status, message):
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # or looking for a model on the hub takes minutes
    result = subprocess.run([sys.executable, str(ROOT / "eval.py"), *arguments], cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr


# --- comparison


def results(path: Path, per_problem: dict[str, list[float]], **settings) -> str:
    sizes = {name: {"problems": len(x), "samples": 4, "sha256": "0"} for name, x in per_problem.items()}
    settings = {"max_new_tokens": 9, "temperature": 0.6, "top_p": 1.0, "benchmarks": sizes} | settings
    return write(path, json.dumps({"settings": settings, "results": {name: {"per_problem": x} for name, x in per_problem.items()}}))


def test_compare(tmp_path):
    a = results(tmp_path / "a.json", {"m": [0, 0.5, 1, 1], "n": [0.25]}, seed=0)
    b = results(tmp_path / "b.json", {"m": [0.5, 1, 1, 1], "n": [0]}, seed=1)
    table = [line.split() for line in compare(a, b)]
    assert table[1][:4] == ["m", "62.5", "87.5", "+25.0"] and table[2] == ["n", "25.0", "0.0", "-25.0", "[-25.0,", "-25.0]"]
    assert table[3][:4] == ["average", "43.8", "43.8", "+0.0"]
    assert compare(a, b) == compare(a, b) and compare(a, a)[1].endswith("+0.0   [+0.0, +0.0]")
    for name, other in (("temperature", {"temperature": 1.0}), ("max_new_tokens", {"max_new_tokens": 8}), ("sha256", {"benchmarks": {}})):
        c = results(tmp_path / "c.json", {"m": [0.5, 1, 1, 1], "n": [0]}, **other)
        with pytest.raises(ValueError, match=f"{name}.*evaluate both alike"):
            compare(a, c)
    with pytest.raises(ValueError, match="must be a results.json"):
        compare(a, write(tmp_path / "d.json", "[]"))


def test_the_bootstrap_interval_has_its_width():
    d = np.random.default_rng(1).normal(0.1, 0.3, size=400)
    low, high = bootstrap([d])
    half = 1.96 * d.std() / 20
    assert low == pytest.approx(d.mean() - half, abs=0.004) and high == pytest.approx(d.mean() + half, abs=0.004)
    low, high = bootstrap([d, -d])  # the average of two benchmarks: resampled apart, so that the width shrinks by sqrt(2)
    assert high == pytest.approx(half / 2**0.5, abs=0.004) and low == pytest.approx(-half / 2**0.5, abs=0.004)


# --- vLLM


def test_a_benchmark_file_through_vllm(tmp_path):
    pytest.importorskip("vllm")
    write(tmp_path / "amc23.jsonl", "".join((TINY / "test.jsonl").read_text().splitlines(keepends=True)[:40]))
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(TINY), "--data", "amc23", "--data_dir", str(tmp_path)]
    command += ["--samples", "2", "--max_new_tokens", "128", "--chunk", "50", "--output_dir"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for engine in ("vllm", "torch"):
        done = subprocess.run([*command, str(tmp_path / engine), "--engine", engine], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (json.loads((tmp_path / engine / "results.json").read_text())["results"]["amc23"] for engine in ("vllm", "torch"))
    assert a["n_problems"] == 40 and a["samples"] == 2 and a["timeouts"] == 0 and 20 < a["mean_tokens"] < 100
    assert abs(a["pass@1"] - b["pass@1"]) < 4 * (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5 and a["pass@1"] > 0.1
