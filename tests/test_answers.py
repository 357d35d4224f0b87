"""The verdict on hand-picked and hostile answers, and on every gold answer of the benchmarks."""

from fractions import Fraction

import pytest
from conftest import ROOT

from eval import SAMPLES, grade, verdict
from experiments.grader_parity import check, hostile
from plumbing.answers import boxed_answer, elements, normalise, number
from plumbing.problems import load_problems
from plumbing.symbolic import CHECKER, MAX_ANSWER_CHARS

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
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\begin{pmatrix} \frac15 \\ -\frac{18}{5} \end{pmatrix}",
    ),
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
    assert normalise("2 m") == "2" and normalise("2m") == "2m"


@pytest.mark.parametrize("gold, answer", CORRECT)
def test_correct_answers(gold, answer):
    assert grade(f"<think>\\boxed{{0}}</think> So it is $\\boxed{{{answer}}}$.", [gold])


@pytest.mark.parametrize("gold, answer", WRONG)
def test_wrong_answers(gold, answer):
    assert not grade(f"So it is $\\boxed{{{answer}}}$.", [gold])


def test_only_the_last_box_after_the_last_think_counts():
    assert boxed_answer(r"\boxed{1} and \boxed{2}") == "2"
    third = r"\boxed{1}</think> \boxed{2} </think> \boxed{\left\{3\right.}!"
    assert boxed_answer(third) == r"\left\{3\right."
    assert boxed_answer(r"\fbox{4}") == "4" and boxed_answer(r"\boxed{\boxed{5}}") == "5"
    for response in (
        "5",
        "",
        r"\boxed{}",
        r"\boxed{ }",
        r"\boxed{5</think>",
        r"\boxed{5}</think> done",
        r"\boxed{4} \boxed{5",
    ):
        assert boxed_answer(response) is None and not grade(response, ["5", "", "4"])


def test_any_gold_answer_suffices():
    assert grade(r"\boxed{m}", ["1", "m\n"])
    assert not grade(r"\boxed{2}", ["1", "3"])
    assert not grade(r"\boxed{2}", [])


def test_numbers_and_elements():
    assert number("-.5") == Fraction(-1, 2) and number("1,234,567") == 1234567
    assert number("-1\\frac{1}{2}") == Fraction(-3, 2)
    assert number("2e-3") == Fraction(1, 500) and number("3\\times10^{4}") == 30000
    for text in ("", "-", ".", "e5", "1/0", "52_8", "1,23", "1e9999", "x", "\u0663"):
        assert number(text) is None
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
        without_dollars = (answer or "").replace("\\$", "").replace("$", "")
        if answer and len(answer) <= MAX_ANSWER_CHARS and normalise(without_dollars):
            assert grade(response, [f"\\boxed{{{answer}}}"]), repr(response)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs the benchmark files")
@pytest.mark.parametrize("name", SAMPLES)
def test_parity_on_the_benchmarks(name):
    problems = load_problems(str(DATA / f"{name}.jsonl"))
    assert all(grade(f"So \\boxed{{{gold}}}.", p["answers"]) for p in problems for gold in p["answers"])
    asked, _, errors, _ = check(problems[::5])  # experiments/grader_parity.py checks them all
    assert not errors and asked["off by one"] > 0 and asked["other answer"] > 0 and asked["units"] > 0
