"""Grades many responses at once: in threads, so that one that hangs holds up no other, by all processes."""

from concurrent.futures import ThreadPoolExecutor

from plumbing.processes import shared_out, total
from plumbing.symbolic import CHECKER, WORKERS


class Grader:
    """rule(response text, answers) -> bool grades one response, as `eval.grade` does, in any thread.

    timeouts: symbolic comparisons that all processes have given up so far."""

    def __init__(self, rule):
        self.rule, self.timeouts = rule, 0

    def grade(self, texts: list[str], answers: list[list[str]]) -> list[bool]:
        """Whether each response text is right; `answers` holds the accepted answers of each."""

        def grade(own: list[tuple[str, list[str]]]) -> list[bool]:
            with ThreadPoolExecutor(WORKERS) as pool:
                return [bool(right) for right in pool.map(self.rule, *zip(*own))] if own else []

        before = CHECKER.timeouts
        verdicts = shared_out(list(zip(texts, answers)), [1] * len(texts), grade)
        self.timeouts += total({"timeouts": CHECKER.timeouts - before})["timeouts"]
        return verdicts
