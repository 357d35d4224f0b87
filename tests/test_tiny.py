"""The embedded world is what tiny/make.py says, and its shipped problems are right."""

import json
import random
import re

from conftest import TINY

from fci import split_steps
from plumbing.models import prompt_ids
from tiny.make import MIN_DISTANCE, Problem, Teacher, make_problem, step_kind


def read(name):
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()]


def solve(text):
    """Answer of a problem by a reading of its text that shares no code with make.py."""
    definitions, target = re.fullmatch(r"(.*), find (\w)\.", text).groups()
    values = {}
    for definition in definitions.split(", "):
        name, expression = definition.split("=")
        values[name] = eval(expression, {}, values) % 7
    return str(values[target])


def test_shipped_answers_are_right_and_splits_disjoint():
    train, test = read("train.jsonl"), read("test.jsonl")
    assert all(solve(row["problem"]) == row["answer"] for row in train + test)
    assert len(test) >= 1000 and not {r["problem"] for r in train} & {r["problem"] for r in test}


def test_pivotal_steps_are_copied_from_afar_and_never_come_first():
    rng = random.Random(1)
    for _ in range(200):
        ops = make_problem(rng).ops
        pivots = [i for i, (op, _) in enumerate(ops) if op == "*"]
        copies = {x: i for i, (_, x) in enumerate(ops) if isinstance(x, str)}
        assert pivots[0] >= 1 and len(pivots) == 3
        assert {"abcdefghijklm"[p + 1] for p in pivots} == set(copies)
        assert all(copies["abcdefghijklm"[p + 1]] - p >= MIN_DISTANCE for p in pivots)


def test_teacher_errs_on_pivotal_steps_only():
    rng, teacher = random.Random(2), Teacher(0)
    wrong = {"pivotal": 0, "local": 0}
    for _ in range(200):
        for step in teacher.solve(make_problem(rng), rng).split("\n\n"):
            fact = re.search(r": (\d)([+*])(\d) so \w=(\d)", step)
            if fact:
                a, op, b, result = fact.groups()
                wrong[step_kind(step)] += eval(f"{a}{op}{b}") % 7 != int(result)
    assert wrong["pivotal"] > 50 and wrong["local"] == 0


def test_tokenizer_reads_and_writes_solutions_exactly(tiny_tokenizer):
    rng, teacher = random.Random(3), Teacher(0)
    for _ in range(50):
        problem = make_problem(rng)
        solution = teacher.solve(problem, rng)
        ids = tiny_tokenizer(solution).input_ids
        assert tiny_tokenizer.decode(ids) == solution and tiny_tokenizer.unk_token_id not in ids
        assert tiny_tokenizer.unk_token_id not in prompt_ids(tiny_tokenizer, problem.text)
        steps = split_steps([tiny_tokenizer.decode([i]) for i in ids])
        assert 9 <= len(steps) <= 30


def test_step_kinds():
    kinds = {
        "c=b*4: 5*4 so c=6": "pivotal",
        "d=c+2: 6+2 so d=1": "local",
        " hm ok now": "filler",
        " wait so c=6": "wait",
        "</think>": "answer",
        "\\boxed{3}": "answer",
    }
    assert {step: step_kind(step) for step in kinds} == kinds


def test_problem_by_hand():
    problem = Problem(3, [("+", 2), ("*", 4), ("+", 6), ("+", "c")])
    assert problem.text == "a=3, b=a+2, c=b*4, d=c+6, e=d+c, find e."
    assert problem.values() == {"a": 3, "b": 5, "c": 6, "d": 5, "e": 4}
