"""Word problems of one to four operations in plain English, with worked solutions.

    python experiments/real_model/make_problems.py models/problems

writes warm.jsonl for warm_start.py, train.jsonl and test.jsonl, all with solutions. A problem is a story: a
first sentence, a sentence per event, and a question.

    Nora has 13 stickers. She buys 4 packs with 6 stickers in each. How many stickers does Nora have now?

A worked solution repeats each sentence but the question, and computes, a step each, separated by blank lines.
Half of the solutions of warm.jsonl are terse: they leave the operations out, so that a model taught with them
answers in both ways, and reinforcement learning can find out which of them is right more often. No sentence
of the test set, its numbers apart, occurs in the other sets: a digest of the sentence decides where it may be
used. The same seed writes the same files.
"""

import argparse
import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

SHE = "Nora Mia Grace Sofia Hannah Lily Ruth Clara Elena Priya Amara Yuki".split()
HE = "Tom Omar Felix Daniel Ivan Peter Samuel Jonas Rahul Kofi Diego Hiro".split()
ITEMS = "stickers marbles apples books shells coins cards pencils stamps beads buttons cookies pears pebbles"
ITEMS = (ITEMS + " flowers photos candles ribbons magnets postcards").split()
SLOTS = {
    "boxes": "packs boxes bags baskets jars trays".split(),
    "place": "at the market;in the garden;at school;in the attic;on the beach;at the fair".split(";"),
    "other": "a friend;a neighbour;a cousin;a teacher;a sister;a brother;an uncle;an aunt".split(";"),
}
FIRST = [
    "{name} has {a} {items}.",
    "{name} owns {a} {items}.",
    "{name} starts the week with {a} {items}.",
    "There are {a} {items} on the desk of {name}.",
    "{name} has collected {a} {items} so far.",
]
QUESTION = [
    "How many {items} does {name} have now?",
    "How many {items} are left for {name} in the end?",
    "What is the number of {items} that {name} has at the end?",
    "When {other} asks at the end, how many {items} does {name} have?",
]
EVENTS = {  # ways to tell each; a and b are numbers
    "more": [  # v + a
        "{who} finds {a} more {items} {place}.",
        "{who} gets {a} {items} from {other}.",
        "{who} makes {a} more {items} {place}.",
        "Then {other} brings {a} {items} along.",
    ],
    "fewer": [  # v - a
        "{who} gives {a} {items} to {other}.",
        "{who} loses {a} of the {items} {place}.",
        "{who} sells {a} {items} {place}.",
        "Then {other} takes {a} of the {items} away.",
    ],
    "times": [  # v * a
        "Then {other} makes the number of {items} {a} times as large.",
        "After some trading {place}, {who} has {a} times as many {items} as before.",
    ],
    "shares": [  # v / a
        "{who} splits all the {items} into {a} equal parts and keeps one part.",
        "The {items} are divided equally among {a} people {place}, and {who} is one of them.",
    ],
    "packs": [  # v + a * b
        "{who} buys {a} {boxes} with {b} {items} in each.",
        "{who} wins {a} {boxes} of {b} {items} {place}.",
        "Then {other} hands over {a} {boxes}, each with {b} {items}.",
    ],
    "each": [  # v - a * b
        "{who} gives {b} {items} to each of {a} people {place}.",
        "{who} fills {a} {boxes} with {b} {items} each and gives them to {other}.",
    ],
}
SIGNS = {"more": "+", "fewer": "-", "times": "*", "shares": "/", "packs": "+", "each": "-"}
PRODUCTS = {"packs", "each"}  # events of two operations
LARGEST = 40  # of the numbers computed


class CannotTell(Exception):
    """None of the sentences tried belongs to the data set: another story will do."""


def for_test(sentence: str) -> bool:
    """Whether a sentence, its numbers apart, belongs to the test set; one in four does."""
    return hashlib.sha256(re.sub(r"\d+", "#", sentence).encode()).digest()[0] < 64


@dataclass
class Story:
    """What a problem tells, and its solution so far."""

    rng: random.Random
    test: bool
    name: str
    pronoun: str
    items: str
    value: int  # how many there are now
    n_operations: int = 0
    sentences: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)  # of the solution

    def tell(self, ways: list[str], **numbers: int) -> None:
        """Add a sentence that the data set may use, told in one of the ways; CannotTell if none is found."""
        for _ in range(100):
            words = {slot: self.rng.choice(choices) for slot, choices in SLOTS.items()}
            words |= dict(name=self.name, items=self.items, who=self.rng.choice([self.name, self.pronoun]))
            sentence = self.rng.choice(ways).format(**words, **numbers)
            sentence = sentence[0].upper() + sentence[1:]
            if for_test(sentence) == self.test:
                self.sentences.append(sentence)
                return
        raise CannotTell

    def compute(self, a: int, sign: str, b: int) -> int:
        """The result of one operation, which becomes a step of the solution."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        self.steps.append(f"{a} {sign} {b} = {result}")
        self.n_operations += 1
        return result

    def happen(self, event: str) -> None:
        """Tell an event and compute what it makes of `value`; nothing where its numbers do not fit."""
        sign, v = SIGNS[event], self.value
        a = self.rng.randint(2, 12) if event in ("more", "fewer") else self.rng.randint(2, 4)
        b = self.rng.randint(2, 6)
        change = a * b if event in PRODUCTS else a
        after = {"+": v + change, "-": v - change, "*": v * change, "/": v / change}[sign]
        if not 2 <= after <= LARGEST or after != int(after):
            return
        self.tell(EVENTS[event], a=a, b=b)
        self.steps.append(self.sentences[-1])
        if event in PRODUCTS:
            self.compute(a, "*", b)
        self.value = self.compute(v, sign, change)


def make_problem(rng: random.Random, n_operations: int, test: bool) -> dict[str, str]:
    """{"problem", "answer", "solution"} of a story with so many operations."""
    while True:
        names, pronoun = rng.choice([(SHE, "she"), (HE, "he")])
        story = Story(rng, test, rng.choice(names), pronoun, rng.choice(ITEMS), rng.randint(2, 20))
        try:
            story.tell(FIRST, a=story.value)
            story.steps.append(story.sentences[-1])
            while left := n_operations - story.n_operations:
                story.happen(rng.choice([event for event in EVENTS if left > 1 or event not in PRODUCTS]))
            story.tell(QUESTION)
        except CannotTell:
            continue
        story.steps.append(f"The final answer is \\boxed{{{story.value}}}.")
        problem, solution = " ".join(story.sentences), "\n\n".join(story.steps)
        return {"problem": problem, "answer": str(story.value), "solution": solution}


def make_problems(seed: int, count: int, test: bool) -> list[dict[str, str]]:
    """Different problems, of one, two, three and four operations in turn."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        row = make_problem(rng, len(found) % 4 + 1, test)
        found.setdefault(row["problem"], row)
    return list(found.values())


def terse(solution: str) -> str:
    """The solution without its operations."""
    return "\n\n".join(step for step in solution.split("\n\n") if " = " not in step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--n_warm", type=int, default=400)
    parser.add_argument("--n_train", type=int, default=2000)
    parser.add_argument("--n_test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seen = make_problems(args.seed, args.n_warm + args.n_train, test=False)
    for i, row in enumerate(seen[: args.n_warm]):
        if i // 4 % 2:  # four in a row are of one, two, three and four operations
            row["solution"] = terse(row["solution"])
    files = {"warm": seen[: args.n_warm], "train": seen[args.n_warm :]}
    files["test"] = make_problems(args.seed, args.n_test, test=True)
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} problems, such as\n    {rows[-1]['problem']}")


if __name__ == "__main__":
    main()
