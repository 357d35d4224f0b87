"""Grading on hand-picked and hostile answers, Pass@K by enumeration, data errors, evaluation with a scripted engine."""

import itertools
import json
import random
import statistics
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest

import eval as evaluation
from eval import CHECKER, boxed_answer, elements, evaluate, grade, load_problems, normalise, number, pass_at_k

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = sorted((ROOT / ".." / "shared" / "data").glob("*.jsonl"))

CORRECT = [  # gold, answer
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
]
WRONG = [
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
    "deep tuples": "\\boxed{" + "(" * 40 + "1" + ",2)" * 40 + "}",
    "deep roots": "\\boxed{" + "\\sqrt{" * 30 + "2" + "}" * 30 + "}",
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


def test_a_tower_of_powers_ends_the_worker_and_the_next_answer_gets_a_new_one():
    timeouts = CHECKER.timeouts
    assert not grade(r"\boxed{9^{9^{9^{9}}}}", ["3"])
    assert CHECKER.timeouts == timeouts + 1
    assert grade(r"\boxed{\sqrt{12}}", [r"2\sqrt{3}"])
    assert not grade(r"\boxed{\sqrt{13}}", [r"2\sqrt{3}"])
    assert CHECKER.timeouts == timeouts + 1


def test_long_answers_and_exact_numbers_never_reach_the_worker(monkeypatch):
    asked = []
    monkeypatch.setattr(CHECKER, "_start", lambda: asked.append(1))
    monkeypatch.setattr(CHECKER, "_worker", None)
    assert not CHECKER.equal("x", "y" * (evaluation.MAX_ANSWER_CHARS + 1))
    assert not grade(r"\boxed{12}", ["13"]) and grade(r"\boxed{1/2}", [r"\frac12"]) and not grade(r"\boxed{(1,2)}", ["(1,3)"])
    assert asked == []


def test_a_worker_that_does_not_start_is_an_error_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(evaluation, "WORKER_FLAG", "--help")
    with pytest.raises(RuntimeError, match="math-verify"):
        evaluation.SymbolicChecker().equal("x", "y")


def test_importing_eval_does_not_import_torch():
    code = "import sys, eval; print(sorted({'torch', 'transformers', 'datasets', 'sympy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


FRAGMENTS = (
    r"\frac \dfrac \sqrt \left( \right) \left[ \text{ \boxed{ \fbox{ </think> \pi \cup \in \pm \begin{pmatrix} \end{pmatrix} \\ \{ \} "
    "{ } ( ) [ ] , . ; = + - * / ^ _ % $ x y 0 1 12 3.5 1,000 1e5 ° \0 \ud800 \u2028 é"
).split(" ") + [" ", "\n"]


def fuzz(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 25))) for _ in range(n)]


def test_nothing_that_stands_before_the_last_box_matters():
    for text in fuzz(2000):
        assert grade(f"{text}\\boxed{{7}}", ["7"]) and not grade(f"{text}\\boxed{{7}}", ["8"]), repr(text)


def test_fuzzed_answers_raise_nothing_and_equal_themselves(monkeypatch):
    monkeypatch.setattr(CHECKER, "equal", lambda gold, answer: False)  # its own fuzz follows; 2,000 questions take too long
    for text in fuzz(2000, seed=1):
        answer = boxed_answer(f"\\boxed{{{text}}}")
        if answer and normalise(answer.replace("$", "")):
            grade(f"\\boxed{{{text}}}", ["7", "(1,2)", r"\frac{1}{2}"])
            assert grade(f"\\boxed{{{answer}}}", [f"\\boxed{{{answer}}}"]), repr(text)


def test_fuzzed_questions_leave_the_worker_in_step():
    for text in fuzz(100, seed=2):
        CHECKER.equal("7", text)
        assert CHECKER.equal(r"x+1", "1+x") and not CHECKER.equal("x+1", "x+2"), repr(text)


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c):
    for k in range(1, n + 1):
        subsets = itertools.combinations([i < c for i in range(n)], k)
        assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(map(any, subsets)))


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match=f"Pass@{k} of {n}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_gold_answers_of_the_benchmarks_are_accepted_and_others_rejected(path):
    problems = load_problems(str(path))
    for problem in problems:
        for gold in problem["answers"]:
            assert grade(f"So \\boxed{{{gold}}}.", problem["answers"]), gold

    def key(text: str) -> str:
        return normalise(text.replace("\\$", "").replace("$", ""))

    rng = random.Random(0)
    for a, b in [rng.sample(problems, 2) for _ in range(15)]:
        other = b["answers"][0]
        if key(other) not in map(key, a["answers"]):
            assert not grade(f"\\boxed{{{other}}}", a["answers"]), (a["answers"], other)


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
        reasons = ["length" if text.endswith("...") else "stop" for text in self.texts]
        return [types.SimpleNamespace(ids=[ord(c) for c in t], logps=[0.0] * len(t), finish_reason=r) for t, r in zip(self.texts, reasons)]


class CharTokenizer:
    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens  # `</think>` may be a special token
        return "".join(map(chr, ids))


@pytest.fixture
def fake_sampler(monkeypatch):
    """evaluate() needs two names of sampler.py, whose own tests cover it."""
    stub = types.ModuleType("sampler")
    stub.Request = lambda prompt_ids, max_new_tokens: types.SimpleNamespace(prompt_ids=prompt_ids, max_new_tokens=max_new_tokens)
    stub.prompt_ids = lambda tokenizer, problem: [ord(c) for c in problem]
    monkeypatch.setitem(sys.modules, "sampler", stub)


PROBLEMS = [{"problem": "abc", "answers": ["1"]}, {"problem": "defgh", "answers": ["2", "3"]}]


def test_evaluate(fake_sampler):
    engine = ScriptedEngine([r"\boxed{1}", "so...", r"\boxed{2}</think>\boxed{3}<eos>", r"\boxed{2}"])
    settings = dict(samples=2, max_new_tokens=10, temperature=0.6, top_p=0.9, context=14)
    result = evaluate(engine, CharTokenizer(), PROBLEMS, **settings)
    assert ["".join(map(chr, r.prompt_ids)) for r in engine.requests] == ["abc", "abc", "defgh", "defgh"]
    assert [r.max_new_tokens for r in engine.requests] == [10, 10, 9, 9]  # 14 - 5 < 10
    assert engine.calls == [(0.6, 0.9)]
    assert result["per_problem"] == [0.5, 1.0] and result["pass@1"] == 0.75 and result["pass@k"] == 1.0
    assert result["stderr"] == pytest.approx(0.25)  # deviation 0.3536 of (0.5, 1), over sqrt(2)
    assert result["mean_tokens"] == (9 + 5 + 31 + 9) / 4 and result["truncated"] == 0.25 and result["timeouts"] == 0
    assert [d["correct"] for d in result["samples_detail"]] == [True, False, True, True]
    assert result["samples_detail"][1] == {"problem": "abc", "answers": ["1"], "response": "so...", "correct": False, "tokens": 5}
    assert json.loads(json.dumps(result)) == result


def test_one_problem_has_no_standard_error(fake_sampler):
    result = evaluate(ScriptedEngine(["1"]), CharTokenizer(), PROBLEMS[:1], samples=1, max_new_tokens=4, temperature=1.0)
    assert result["stderr"] is None and result["pass@1"] == 0 and result["pass@k"] == 0


def test_a_prompt_that_fills_the_context_is_refused(fake_sampler):
    with pytest.raises(ValueError, match="'defgh' has 5 tokens, the model's context 5"):
        evaluate(ScriptedEngine([]), CharTokenizer(), PROBLEMS, samples=1, max_new_tokens=4, temperature=1.0, context=5)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--data", "none.jsonl"], 1, "cannot read 'none.jsonl'"),
        (["--samples", "0"], 2, "--samples is 0"),
        (["--temperature", "nan"], 2, "--temperature is nan"),
        (["--top_p", "0"], 2, "--top_p 0.0"),
        (["--json", "no/such/folder/a.json"], 2, "make it first"),
    ],
)
def test_bad_arguments_end_with_one_sentence(tmp_path, arguments, status, message):
    result = subprocess.run([sys.executable, str(ROOT / "eval.py"), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr
