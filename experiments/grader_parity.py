"""Does the grader accept every gold answer in every spelling, and nothing else? Does it survive anything?

    python experiments/grader_parity.py DATA_DIR            # a folder with aime24.jsonl, ..., olympiad.jsonl
    python experiments/grader_parity.py DATA_DIR --fuzz 0   # without the hostile strings

A table: for each benchmark and each form, how many gradings gave the right verdict, of how many, and the
seconds per 1,000 gradings. Then what went wrong, one by one.
"""

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import SAMPLES, verdict
from plumbing.answers import normalise, number
from plumbing.problems import load_problems
from plumbing.symbolic import CHECKER, WORKERS

FORMS = ["gold itself", "frac/dfrac", "spaces", "units", "decimal", "thousands"]  # to be accepted
FORMS += ["other answer", "inverted", "off by one"]  # to be rejected

# --- Forms of a gold answer -------------------------------------------------------------------------------


def plain(answer: str) -> str:
    return re.sub(r"\\?\$", "", answer).strip()


def value_of(answer: str) -> Fraction | None:
    return number(normalise(plain(answer)))


def as_text(value: Fraction) -> str:
    r"""An integer, a decimal if that is exact, else \frac{a}{b}."""
    if value.denominator == 1:
        return str(value.numerator)
    digits = next((d for d in range(1, 40) if (value * 10**d).denominator == 1), None)
    if digits is None:
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    whole, rest = divmod(abs(value.numerator) * 10**digits // value.denominator, 10**digits)
    return f"{'-' if value < 0 else ''}{whole}.{rest:0{digits}d}"


def spellings(gold: str) -> Iterator[tuple[str, str]]:
    """(form, answer) pairs that must be accepted."""
    text, value = plain(gold), value_of(gold)
    yield "gold itself", gold
    if re.search(r"\\d?frac(?![a-zA-Z])", text):
        yield "frac/dfrac", re.sub(r"\\(d?)frac(?![a-zA-Z])", lambda m: r"\frac" if m[1] else r"\dfrac", text)
        yield "frac/dfrac", text.replace(r"\frac", r"\tfrac")
    yield "spaces", re.sub(r"([+=,()])", r" \1 ", f" {text} ")
    yield "spaces", re.sub(r"(?<=[)}]),", r",\\ ", text)
    if value is not None:
        yield "units", rf"{text} \text{{ units}}"
        yield "units", rf"{text}\text{{ cm}}^2"
    if value is not None and value.denominator == 1 and re.fullmatch(r"-?[0-9]+", text):
        yield "decimal", f"{text}.0"
        yield "decimal", f"{text}.00"
    if value is not None and value.denominator == 1 and 1000 <= abs(value) < 10**15:
        for separator in (",", "{,}", r",\!", r"{,}\!"):
            yield "thousands", f"{int(value):,}".replace(",", separator)


def inverted(answer: str) -> str | None:
    r"""b/a for an answer that is a fraction a/b of integers and no more: \frac{}{}, \dfrac{}{} or a/b."""
    fraction = r"(-?)(?:\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+))"
    match = re.fullmatch(fraction, plain(answer).replace(" ", ""))
    if not match:
        return None
    above, below = (match[2], match[3]) if match[2] else (match[4], match[5])
    return rf"{match[1]}\frac{{{below}}}{{{above}}}" if int(above) != int(below) and int(above) else None


def wrong_answers(problem: dict, others: list[dict], rng: random.Random) -> Iterator[tuple[str, str]]:
    """(form, answer) pairs that must be rejected."""
    values = [value_of(gold) for gold in problem["answers"]]
    texts = {normalise(plain(gold)) for gold in problem["answers"]}
    for gold, value in zip(problem["answers"], values):
        other = rng.choice(rng.choice(others)["answers"])
        equal_value = value_of(other) is not None and value_of(other) in values
        if normalise(plain(other)) not in texts and not equal_value:
            yield "other answer", other
        if inverted(gold) and value_of(inverted(gold)) not in values:
            yield "inverted", inverted(gold)
        for change in (1, -1):
            if value is not None and value + change not in values:
                yield "off by one", as_text(value + change)


# --- Hostile strings --------------------------------------------------------------------------------------

FRAGMENTS = (
    r"\frac \dfrac \sqrt \left( \right) \left[ \text{ \boxed{ \fbox{ </think> \pi \cup \in \pm "
    r"\begin{pmatrix} \end{pmatrix} \\ \{ \} \int_0^ \sum_{n=1}^{\infty} \prod \lim_{x\to0} \log \sin "
    r"\binom{ ! \infty \le \cdot \times \overline{ \mathbb{R} \%"
    "{ } ( ) [ ] , . ; = + - * / ^ _ % $ x y R r 0 1 12 3.5 1,000 1e5 ° \0 \ud800 \u2028 \u202e \u0663 é 1/0 "
    "(1,2) \\frac12 \\sqrt{2} x^{2} 2x+1"
).split(" ") + [" ", "\n"]


def hostile(n: int, seed: int = 0) -> Iterator[str]:
    """Responses that a policy may come up with: soups of LaTeX and worse, in a box that may not close."""
    rng = random.Random(seed)
    for _ in range(n):
        soup = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 25)))
        kind = rng.random()
        if kind < 0.02:  # long
            soup = rng.choice("{}([\\$ 9^") * rng.randint(100, 100_000)
        elif kind < 0.03:  # deep
            brackets = [("{", "}"), ("(", ")"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), ("2^{", "}")]
            opening, closing = rng.choice(brackets)
            depth = rng.randint(2, 100)
            soup = opening * depth + "1" + closing * depth
        elif kind < 0.04:  # any character at all
            soup = "".join(map(chr, rng.choices(range(0x3000), k=30)))
        yield rng.choice(["", "\\boxed{1} </think>"]) + "\\boxed{" + soup + rng.choice(["}", "}", "}", ""])


# --- The report -------------------------------------------------------------------------------------------


def check(problems: list[dict], seed: int = 0) -> tuple[Counter, Counter, list[str], float]:
    """(gradings by form, right verdicts by form, a line for each wrong one, seconds)."""
    rng, asked, right, errors = random.Random(seed), Counter(), Counter(), []
    started = time.perf_counter()
    for i, problem in enumerate(problems):
        others = problems[:i] + problems[i + 1 :]
        cases = [(form, answer, "correct") for gold in problem["answers"] for form, answer in spellings(gold)]
        cases += [(form, answer, "wrong") for form, answer in wrong_answers(problem, others, rng)]
        for form, answer, expected in cases:
            got = verdict(f"So it is $\\boxed{{{answer}}}$.", problem["answers"])
            asked[form] += 1
            right[form] += got == expected
            if got != expected:
                errors.append(f"{form}: {answer!r} is {got} for {problem['answers']}")
    return asked, right, errors, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", help="folder with NAME.jsonl of the six benchmarks")
    parser.add_argument("--fuzz", type=int, default=10_000, help="hostile strings")
    args = parser.parse_args()
    CHECKER.equal("x", "y")  # its start is no part of the times
    print(f"| right verdicts of | golds | {' | '.join(FORMS)} | s per 1,000 |")
    print("| --- " * (len(FORMS) + 3) + "|")
    all_asked, all_right, all_errors, all_golds, all_seconds = Counter(), Counter(), [], 0, 0.0
    for name in SAMPLES:
        problems = load_problems(str(Path(args.data_dir, f"{name}.jsonl")))
        asked, right, errors, seconds = check(problems)
        golds = sum(len(p["answers"]) for p in problems)
        print(row(name, golds, asked, right, seconds), flush=True)
        all_asked += asked
        all_right += right
        all_errors += [f"{name}, {error}" for error in errors]
        all_golds += golds
        all_seconds += seconds
    print(row("all", all_golds, all_asked, all_right, all_seconds))
    print("\n".join(["", *all_errors]))

    started = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:  # an exception would end up here
        outcomes = list(pool.map(timed_verdict, hostile(args.fuzz)))
    counts, took = Counter(got for got, _ in outcomes), time.perf_counter() - started
    slowest = max((seconds for _, seconds in outcomes), default=0)
    times = f"{took:.0f} s, slowest {slowest:.1f} s"
    print(f"{args.fuzz:,} hostile strings: {dict(counts)}, no exception, {times}")


def timed_verdict(response: str) -> tuple[str, float]:
    started = time.perf_counter()
    return verdict(response, ["7", r"\frac{1}{2}", "(1,2)", "2x+1"]), time.perf_counter() - started


def row(name: str, golds: int, asked: Counter, right: Counter, seconds: float) -> str:
    cells = [f"{right[form]}/{asked[form]}" if asked[form] else "" for form in FORMS]
    return f"| {name} | {golds} | {' | '.join(cells)} | {1000 * seconds / asked.total():.2f} |"


if __name__ == "__main__":
    main()
