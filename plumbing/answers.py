"""Answers as strings and as numbers: when are two of them the same?

A DeepScaleR-style check (the last `\\boxed{}` after the last `</think>`, normalised strings, numbers, element
by element) and, for what that does not settle, Math-Verify (symbolic.py). Other than in the released code:

- Math-Verify, also the sympy equality of the DeepScaleR-style check, sees the content of the last box, not
  the whole response, so an answer that was only mentioned on the way cannot count.
- Two plain numbers are compared as numbers, not by Math-Verify, which rounds to six decimals.
- Math-Verify takes the last letter of `6m` for a unit, R for r, and drops the base of 52_8. Here gold answers
  keep their letters (an answer may add a unit), R and r differ where both occur, and another base is wrong (a
  missing one is not).
- Model output can blow up sympy (`9^{9^{9^9}}`), so Math-Verify runs in workers with limits."""

import re
from fractions import Fraction
from itertools import accumulate, pairwise

from plumbing.symbolic import CHECKER

UNIT = r"\s*\\(?:text|mbox|mathrm)\s*\{(?!\s*[aApP]\.?[mM]\b)[^{}]*\}"  # \text{ cm}, but not \text{ AM}
UNIT += r"(?:\s*\^\s*\{?-?[0-9]\}?)?"  # ^2
TEXT_UNITS = rf"(?<=[\w}})\]])(?:{UNIT})+$"
WORDS = "degree|dollar|cent|euro|unit|second|minute|hour|day|year|foot|feet|inche?|mile"
APART = "~"  # between digits that are two numbers
REWRITES = [  # pattern, replacement; in this order
    ("[–−]", "-"),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle|quad)(?![a-zA-Z])", ""),  # not "\\ ", a matrix row's end
    (r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°)(?:\s*[CF]$)?|\\?%", ""),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (TEXT_UNITS, ""),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (rf"(?<=[0-9])\s*(?:{WORDS})s?(?:\^[0-9])?$", ""),
    (r"(?<=[0-9}])\s+(?:[cmk]?m|kg|Hz)(?:\^[0-9])?$", ""),  # needs the space: 2m may be twice a variable
    (r"(?<![\w.}])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9.])", r"\1\\frac{\2}{\3}"),  # 5 3/4 is not 53/4
    (r"(?<=[0-9])\s+(?=[0-9]{3}(?![0-9]))", ""),  # 1 000
    (r"(?<=[0-9])\s+(?=[0-9])", APART),  # but 1 2 is not twelve
    (r"\s+", ""),
    (r"^[a-zA-Z](?:\([a-zA-Z]\))?(?:=|\\in(?![a-z]))(?=[^=]+$)", ""),  # x=5, f(x)=x^2, x\in[0,1]
    (r"\\frac([0-9])", r"\\frac{\1}"),  # \frac12
    (r"(\\frac\{[^{}]*\})([0-9])", r"\1{\2}"),
    (r"([\^_])\{(\w)\}", r"\1\2"),  # x^{2}
    (r"^\(([A-Z])\)$", r"\1"),  # the choice (C)
]


def boxed_answer(response: str) -> str | None:
    r"""Content of the last `\boxed{...}` after the last `</think>` (if any); None if none is there or closes.

    >>> boxed_answer(r"<think>\boxed{1}</think> so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = response.rpartition("</think>")[2]
    starts = [box.end() for box in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    content, depth = text[starts[-1] :] if starts else "", 1
    for token in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # "\{" is a printed brace, it opens nothing
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return content[: token.start()].strip() or None
    return None


def normalise(answer: str) -> str:
    r"""One spelling for answers that differ in typesetting only: units, `x=` and spaces go.

    >>> normalise(r"x = \dfrac12\text{ cm}^2.")
    '\\frac{1}{2}'
    """
    text = answer.strip().rstrip(".").rstrip()
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text)
    return text.lower() if re.fullmatch(r"[a-zA-Z]{2,}", text) else text  # a word, not a variable


def number(text: str) -> Fraction | None:
    r"""The exact value of a normalised integer, decimal, fraction or mixed number; None for anything else.

    >>> number("-1,000.5"), number(r"1\frac{4}{5}"), number("3e-2"), number("2x")
    (Fraction(-2001, 2), Fraction(9, 5), Fraction(3, 100), None)
    """
    without_commas = lambda match: match[0].replace(",", "")
    text = re.sub(r"^[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?=\.|$)", without_commas, text)
    text = re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}$", r" \1/\2", text)
    text = re.sub(r"(?:\\times|\\cdot)10\^\{?([+-]?[0-9]+)\}?$", r"e\1", text)
    fraction = r"[0-9]* ?[0-9]+/[0-9]+"
    decimal = r"[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]{1,3})?"  # an exponent of three digits cannot explode
    if not re.fullmatch(rf"(?=.*[0-9])[+-]?(?:{fraction}|{decimal})", text):
        return None
    try:
        value = sum(Fraction(part) for part in text.lstrip("+-").split())
    except (ValueError, ZeroDivisionError):  # "e5", "1/0"
        return None
    return -value if text.startswith("-") else value


def elements(answer: str) -> tuple[str, list[str]] | None:
    """Brackets and elements of a tuple or interval: "(1, 2]" is ("(]", ["1", " 2"]); None for others."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", answer).strip()
    depth = list(accumulate((char in "([{") - (char in ")]}") for char in text))
    if not re.fullmatch(r"[(\[].+[)\]]", text, re.DOTALL) or 0 in depth[:-1]:  # 0: (0,9) \cup (9,36)
        return None
    cuts = [0, *(i for i, char in enumerate(text) if char == "," and depth[i] == 1), len(text) - 1]
    return text[0] + text[-1], [text[a + 1 : b] for a, b in pairwise(cuts)]


def equal(gold: str, answer: str, symbolic: bool = True) -> bool:
    """Whether two answers are the same: as strings, numbers, element by element, or for Math-Verify if
    `symbolic`. Raises TimeoutError if that is given up."""
    gold, answer = (re.sub(r"\\?\$", "", text).strip() for text in (gold, answer))
    a, b = normalise(gold), normalise(answer)
    if a == b:
        return a != ""
    x, y = number(a), number(b)
    if x is not None and y is not None and "%" not in gold + answer:  # Math-Verify reads 8% as 8 or as 0.08
        return abs(x - y) <= min(1, max(abs(x), abs(y))) / 10**6  # six decimals, as Math-Verify; six digits
    left, right = elements(gold), elements(answer)
    if left and right:
        same_shape = left[0] == right[0] and len(left[1]) == len(right[1])
        return same_shape and all(equal(g, r, symbolic) for g, r in zip(left[1], right[1]))
    if re.fullmatch(r"[0-9]+_[0-9]+ [0-9]+_[0-9]+", re.sub(r"[{}]", "", f"{a} {b}")):
        return False  # other digits or another base
    if APART in a + b:
        return False
    return symbolic and CHECKER.equal(*mark_capitals(re.sub(TEXT_UNITS, "", gold), answer))


def mark_capitals(gold: str, answer: str) -> tuple[str, str]:
    r"""Math-Verify ignores case. Where a letter occurs in both cases, R becomes R_{0}, to differ from r.

    >>> mark_capitals("R - r", r"r - \Delta R"), mark_capitals("3R^2", "3r^2")
    (('R_{0} - r', 'r - \\Delta R_{0}'), ('3R^2', '3r^2'))
    """
    for text in (gold, answer):
        letters = set(re.sub(r"\\[a-zA-Z]+", "", text))
        if any(letter.swapcase() in letters for letter in letters if letter.isascii() and letter.isupper()):
            mark = lambda match: match[0] + ("_{0}" if match[1] else "")
            return tuple(re.sub(r"\\[a-zA-Z]+|([A-Z])(?!\s*_)", mark, text) for text in (gold, answer))
    return gold, answer
