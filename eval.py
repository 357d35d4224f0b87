"""Grading, benchmarks, Pass@1 and Pass@K.

    python eval.py --model runs/a/checkpoint-500                             # the paper's six benchmarks and settings
    python eval.py --model tiny --data tiny/test.jsonl                       # the embedded reasoner on its own test problems
    python eval.py --compare runs/eval-a/results.json runs/eval-b/results.json

The paper samples 32 responses to a problem of AIME24, AIME25 and AMC23, and 4 to one of MATH-500, Minerva and OlympiadBench (at most
32,768 tokens, temperature 0.6), and reports Pass@1, the mean correctness of all samples. An evaluation writes settings.json, NAME.jsonl
with every sample of a benchmark, and results.json with the scores. The same command again resumes.

The grader is a hybrid: an answer is right if a DeepScaleR-style check (last `\\boxed{}` after the last `</think>`, normalised strings,
numbers, element by element) or Math-Verify says so. Ours differs from the released code in four points:

- Math-Verify, also the sympy equality of the DeepScaleR-style check, sees the content of the last box, not the whole response, so an
  answer that was only mentioned on the way cannot count.
- Two plain numbers are compared as numbers, never by Math-Verify: it rounds to six decimals, so that 8.2e-19 is 8.3e-19.
- Math-Verify takes the last letter of `6m` for a unit, R for r, and drops the base of 52_8. Here a gold answer keeps its letters (an
  answer may add a unit), R and r differ where both occur, and another base is wrong (a missing one is not).
- Model output can blow up sympy (`9^{9^{9^9}}`), so Math-Verify runs in worker processes with limits on time and memory (Linux; macOS
  has the time limit alone), not in the trainer, where only an alarm signal in the main thread could stop it.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

# numpy, torch, transformers, datasets and sampler are imported inside the functions that need them: this file is also
# the program of the grading workers, which have to start fast and to fit into their memory limit.

TIME_LIMIT = 5  # seconds of wall-clock time for one symbolic comparison
GRACE = 1  # seconds after which we end a worker whose own alarm clock did not: one that is stopped, say
START_LIMIT = 120  # seconds for a worker to import Math-Verify (a cold network disk is slow)
MEMORY_LIMIT = 2 << 30  # bytes of address space of a worker
WORKERS = 4  # at most: 16 hanging answers among 64 took 106 s with one, 34 s with four; a second one starts only when two threads ask
MAX_ANSWER_CHARS = 2000  # a longer boxed answer is wrong; gold answers of the six benchmarks stay far below
WORKER_FLAG = "--symbolic-worker"  # `python eval.py --symbolic-worker` is the worker's command

BENCHMARKS = {  # the paper's: hub dataset, its columns of problems and answers, samples a problem
    "aime24": ("math-ai/aime24", "problem", "solution", 32),
    "aime25": ("math-ai/aime25", "problem", "answer", 32),
    "amc23": ("math-ai/amc23", "question", "answer", 32),
    "math500": ("HuggingFaceH4/MATH-500", "problem", "answer", 4),
    "minerva": ("math-ai/minervamath", "question", "answer", 4),
    "olympiad": ("math-ai/olympiadbench", "question", "final_answer", 4),
}

# --- 1. Answers as strings and as numbers ----------------------------------------------------------------------------

UNIT = r"\s*\\(?:text|mbox|mathrm)\s*\{(?!\s*[aApP]\.?[mM]\b)[^{}]*\}(?:\s*\^\s*\{?-?[0-9]\}?)?"  # \text{ cm}^2
TEXT_UNITS = rf"(?<=[\w}})\]])(?:{UNIT})+$"
APART = "~"  # between digits that are two numbers
REWRITES = [  # pattern, replacement; in this order
    ("[–−]", "-"),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle|quad)(?![a-zA-Z])", ""),  # spacing; not "\\ ", the end of a matrix row
    (r"(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°)(?:\s*[CF]$)?|\\?%", ""),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (TEXT_UNITS, ""),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<=[0-9])\s*(?:degree|dollar|cent|euro|unit|second|minute|hour|day|year|foot|feet|inche?|mile)s?(?:\^[0-9])?$", ""),
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
    r"""Content of the last `\boxed{...}` after the last `</think>` (if any); None without one, or if it never closes.

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
    text = re.sub(r"^[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?=\.|$)", lambda thousands: thousands[0].replace(",", ""), text)
    text = re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}$", r" \1/\2", text)
    text = re.sub(r"(?:\\times|\\cdot)10\^\{?([+-]?[0-9]+)\}?$", r"e\1", text)
    plain = r"(?=.*[0-9])[+-]?(?:[0-9]* ?[0-9]+/[0-9]+|[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]{1,3})?)"  # three digits cannot explode
    if not re.fullmatch(plain, text):
        return None
    try:
        value = sum(Fraction(part) for part in text.lstrip("+-").split())
    except (ValueError, ZeroDivisionError):  # "e5", "1/0"
        return None
    return -value if text.startswith("-") else value


def elements(answer: str) -> tuple[str, list[str]] | None:
    """Brackets and elements of a tuple or interval, "(1, 2]" -> ("(]", ["1", " 2"]); None for anything else."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", answer).strip()
    depth = list(accumulate((char in "([{") - (char in ")]}") for char in text))
    if not re.fullmatch(r"[(\[].+[)\]]", text, re.DOTALL) or 0 in depth[:-1]:  # depth 0 inside: (0,9) \cup (9,36)
        return None
    cuts = [0, *(i for i, char in enumerate(text) if char == "," and depth[i] == 1), len(text) - 1]
    return text[0] + text[-1], [text[a + 1 : b] for a, b in pairwise(cuts)]


# --- 2. Symbolic equality, in processes of their own -----------------------------------------------------------------


class SymbolicChecker:
    """Math-Verify in worker processes, which start when they are needed and live until this process ends. Any thread may ask.

    Subprocesses and not `multiprocessing`: its spawn runs the main module again in the child, and train.py imports torch. A worker
    ends by itself when its input closes, and its own alarm clock ends it when a question takes too long, so neither a hung
    comparison nor a killed trainer leaves a process behind.
    """

    def __init__(self) -> None:
        self.timeouts = 0  # questions given up because their worker ran into a limit or died
        self._idle: list[subprocess.Popen] = []
        self._free = threading.Semaphore(WORKERS)
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two LaTeX answers are equal. Raises TimeoutError if the worker does not survive the question.

        Raises RuntimeError if a worker does not start, as without Math-Verify: grading everything wrong would be worse.
        """
        if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
            return False
        with self._free:
            worker, reply = self._take(), ""
            try:
                reply = self._ask(worker, json.dumps([gold, answer]), TIME_LIMIT)  # ASCII: escapes lone surrogates and NUL too
            finally:
                with self._lock:
                    self.timeouts += not reply
                    if reply:
                        self._idle.append(worker)
                if not reply:  # or Ctrl-C: a late reply must not answer the next question
                    worker.kill()
                    worker.communicate()  # closes the pipes, waits for the end
        if not reply:
            raise TimeoutError(f"no verdict on {answer[:60]!r} within {TIME_LIMIT} s and {MEMORY_LIMIT >> 30} GiB")
        return reply == "1\n"

    def _take(self) -> subprocess.Popen:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.poll() is None:
                    return worker
        command = [sys.executable, __file__, WORKER_FLAG]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii")
        worker = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C in the terminal is not for it
        if self._ask(worker, "", START_LIMIT) != "ready\n":
            raise RuntimeError("the grading worker did not start (its error is above); try `pip install math-verify`")
        return worker

    @staticmethod
    def _ask(worker: subprocess.Popen, question: str, limit: float) -> str:
        """The worker's next line; "" if it dies or if `limit` and some grace pass, even if its own clock does not run."""
        clock = threading.Timer(limit + GRACE, worker.kill)
        clock.start()
        try:
            with contextlib.suppress(OSError):  # the worker has died
                worker.stdin.write(question + "\n")
                worker.stdin.flush()
                return worker.stdout.readline()
            return ""
        finally:
            clock.cancel()


def serve_symbolic() -> None:
    """A worker: reads a JSON line [gold, answer], writes "1" (equal) or "0", until its input closes."""
    import logging
    import resource
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole job: the trainer may save first, and then closes the pipes
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process, even inside C code
    with contextlib.suppress(ValueError, OSError):  # macOS refuses; the time limit still holds
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # Math-Verify warns about every answer it cannot parse
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not write into the replies
    keep_units = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False)
    literal = [LatexExtractionConfig(normalization_config=keep_units), ExprExtractionConfig()]
    sys.stdin.readline()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT)
        try:  # this alarm replaces Math-Verify's own timeouts
            gold, answer = (f"\\boxed{{{text}}}" for text in json.loads(line))
            golds, answers = (parse(text, literal, parsing_timeout=None) for text in (gold, answer))
            if re.search(r"[a-zA-Z]\W*$|\\(text|mbox|mathrm)", answer):  # its end may be a unit
                answers += parse(answer, parsing_timeout=None)
            equal = verify(golds, answers, timeout_seconds=None)  # not symmetric: the gold answer comes first
        except Exception:  # what sympy cannot read is not an answer
            equal = False
        signal.alarm(0)
        print(int(equal), file=replies, flush=True)


CHECKER = SymbolicChecker()
os.register_at_fork(after_in_child=CHECKER.__init__)  # a child shares no worker with its parent

# --- 3. The grader and Pass@K ----------------------------------------------------------------------------------------


def equal(gold: str, answer: str, symbolic: bool = True) -> bool:
    """Whether two answers are the same: as strings, as numbers, element by element, then symbolically unless told not to.

    Raises TimeoutError if the symbolic comparison is given up.
    """
    gold, answer = (re.sub(r"\\?\$", "", text).strip() for text in (gold, answer))
    a, b = normalise(gold), normalise(answer)
    if a == b:
        return a != ""
    x, y = number(a), number(b)
    if x is not None and y is not None and "%" not in gold + answer:  # Math-Verify reads 8% as 8 or as 0.08
        return abs(x - y) <= min(1, max(abs(x), abs(y))) / 10**6  # six decimals, as in Math-Verify, and six digits
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
    r"""Math-Verify ignores case. Where a letter occurs in both cases, R becomes R_{0}, so that it differs from r.

    >>> mark_capitals("R - r", r"r - \Delta R"), mark_capitals("3R^2", "3r^2")
    (('R_{0} - r', 'r - \\Delta R_{0}'), ('3R^2', '3r^2'))
    """
    for text in (gold, answer):
        letters = set(re.sub(r"\\[a-zA-Z]+", "", text))
        if any(letter.swapcase() in letters for letter in letters if letter.isascii() and letter.isupper()):
            mark = lambda match: match[0] + ("_{0}" if match[1] else "")  # noqa: E731
            return tuple(re.sub(r"\\[a-zA-Z]+|([A-Z])(?!\s*_)", mark, text) for text in (gold, answer))
    return gold, answer


def verdict(response: str, answers: list[str]) -> str:
    r""" "correct" if the last `\boxed{}` of a response holds one of the gold answers, else "wrong", or "timeout" if
    a symbolic comparison was given up. Raises nothing, whatever the response says.

    >>> verdict(r"... so $x = \boxed{\dfrac12}$.", ["0.25", r"\frac{1}{2}"]), verdict("it is 3", ["3"])
    ('correct', 'wrong')
    """
    answer = boxed_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return "wrong"
    golds = [boxed_answer(gold) or gold for gold in answers]
    try:  # cheapest first, for all gold answers
        return "correct" if any(equal(gold, answer, symbolic) for symbolic in (False, True) for gold in golds) else "wrong"
    except TimeoutError:  # at the first gold answer: the next one would take as long
        return "timeout"


def grade(response: str, answers: list[str]) -> bool:
    """The reward: whether the verdict is "correct"."""
    return verdict(response, answers) == "correct"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k samples hold a correct one, from n samples with c correct (Chen et al. 2021, Eq. 1).

    >>> pass_at_k(n=4, c=1, k=1), pass_at_k(n=4, c=1, k=2)
    (0.25, 0.5)
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"Pass@{k} of {n} samples with {c} correct is undefined: 1 <= k <= n and 0 <= c <= n must hold")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# --- 4. Problems -----------------------------------------------------------------------------------------------------


def load_problems(source: str, split: str = "train", problem: str = "problem", answer: str = "answer") -> list[dict]:
    """Problems of a .jsonl, .json or .parquet file or a Hugging Face dataset: [{"problem": str, "answers": [str, ...]}].

    `problem` and `answer` name the columns; an answer is text, a number, or a list of them. `split` is for hub datasets only.
    Raises ValueError, one sentence with the value and the remedy, for everything that can be wrong with them.
    """
    path = Path(source)
    try:
        if path.suffix in (".jsonl", ".json"):  # not through `datasets`: it wants one type for a column, answers may mix them
            text = path.read_text(encoding="utf-8")
            rows = [json.loads(x) for x in text.split("\n") if x.strip()] if path.suffix == ".jsonl" else json.loads(text or "[]")
        else:
            from datasets import Dataset, disable_progress_bars, load_dataset

            disable_progress_bars()
            is_parquet = path.suffix == ".parquet"
            rows = (Dataset.from_parquet(source, keep_in_memory=True) if is_parquet else load_dataset(source, split=split)).to_list()
    except Exception as error:  # json, unicode, pyarrow, datasets and the network each have their own
        remedy = "give an intact .jsonl, .json or .parquet file, or name and split of a hub dataset within reach"
        raise ValueError(f"cannot read {source!r}, split {split!r} ({' '.join(str(error).split())}); {remedy}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{source} holds no problems; it needs a list of rows with `{problem}` and `{answer}`")
    return [_problem(row, f"row {i} of {source}", problem, answer) for i, row in enumerate(rows, 1)]


def _problem(row: object, where: str, problem: str, answer: str) -> dict:
    """{"problem", "answers"} from one row, checked; `where` names the row in errors."""
    if not isinstance(row, dict) or not {problem, answer} <= row.keys():
        found = f"the columns {', '.join(row)}" if isinstance(row, dict) else repr(row)[:80]
        raise ValueError(f"{where} has {found}; it needs `{problem}` and `{answer}`")
    answers = row[answer] if isinstance(row[answer], list) else [row[answer]]
    if not isinstance(row[problem], str) or not row[problem].strip():
        raise ValueError(f"{where} has the problem {row[problem]!r}; it needs some text")
    if not answers or any(isinstance(a, bool) or not isinstance(a, str | int | float) or not str(a).strip() for a in answers):
        raise ValueError(f"{where} has the answer {row[answer]!r}; it needs text, a number, or a list of them")
    return {"problem": row[problem], "answers": [str(a).strip() for a in answers]}


# --- 5. Sampling and scores ------------------------------------------------------------------------------------------


def evaluate(
    engine, tokenizer, problems, *, samples, max_new_tokens, temperature, top_p=1.0, context=math.inf, path=None, seed=0, chunk=None
) -> dict:
    """Sample every problem `samples` times, grade, and return the scores of `scores`, which can be written as JSON.

    context: the model's context length in tokens. A response gets what its prompt leaves of it; where that is nothing, the
    verdict is "long prompt", and nothing is sampled. Without a `path` all is one generation call on torch's random state.
    With one, `chunk` responses at a time are sampled and appended to that file, from random numbers that depend on nothing
    but `seed`, the file's name and the chunk's place; what the file already holds is not sampled again.
    """
    import torch
    from tqdm import tqdm

    from sampler import Request, prompt_ids

    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    budgets = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    jobs = [{"problem": i, "sample": k, "verdict": "long prompt"} for i in range(len(problems)) for k in range(samples)]
    chunk = chunk or len(jobs)
    rows = finished_rows(path, len(jobs), chunk) if path else []
    progress = tqdm(total=len(jobs), initial=len(rows), desc=path and path.stem, unit="sample", disable=not path)
    while len(rows) < len(jobs):
        fresh = [dict(job) for job in jobs[len(rows) : len(rows) + chunk]]
        fitting = [row for row in fresh if budgets[row["problem"]] > 0]
        if path:
            place = hashlib.sha256(f"{seed} {path.stem} {len(rows)}".encode()).digest()
            torch.manual_seed(int.from_bytes(place[:8], "big"))
        requests = [Request(prompts[row["problem"]], budgets[row["problem"]]) for row in fitting]
        responses = engine.generate(requests, temperature=temperature, top_p=top_p) if requests else []
        texts = [tokenizer.decode(r.ids, skip_special_tokens=False) for r in responses]  # `</think>` may be a special token
        with ThreadPoolExecutor(WORKERS) as pool:  # an answer on which sympy hangs does not hold up the others
            verdicts = pool.map(verdict, texts, [problems[row["problem"]]["answers"] for row in fitting])
        for row, response, text, v in zip(fitting, responses, texts, verdicts):
            row |= {"verdict": v, "tokens": len(response.ids), "finish_reason": response.finish_reason, "response": text}
        if path:
            with path.open("a", encoding="ascii") as file:
                file.writelines(json.dumps(row) + "\n" for row in fresh)
                file.flush()
                os.fsync(file.fileno())
        rows += fresh
        progress.update(len(fresh))
    progress.close()
    return scores(rows, samples)


def finished_rows(path: Path, n_jobs: int, chunk: int) -> list[dict]:
    """Rows of the complete chunks of a file; what an interruption left of another chunk is cut off. ValueError for too many."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    n_whole = sum(line.endswith(b"\n") for line in lines)  # the last one may be torn
    if n_whole > n_jobs:
        raise ValueError(f"{path} has {n_whole} samples, the evaluation only {n_jobs}: mend it, or use another --output_dir")
    lines = lines[: n_whole if n_whole == n_jobs else n_whole // chunk * chunk]
    if path.exists():
        os.truncate(path, sum(map(len, lines)))
    return [json.loads(line) for line in lines]


def scores(rows: list[dict], samples: int) -> dict:
    """Scores of the rows of `evaluate`, problem by problem. Shares are in [0, 1].

    "pass@1" is the mean correctness, "stderr" its standard error over problems (None for one problem: samples of a problem are not
    independent), "pass@k" is unbiased with k = samples, "mean_tokens" the response length, "truncated" the share that ran into its
    limit, "timeouts" the responses whose grading was given up, "long_prompts" the problems that were not sampled (both count as
    wrong), "per_problem" each problem's mean correctness.
    """
    n_correct = [sum(r["verdict"] == "correct" for r in rows[i : i + samples]) for i in range(0, len(rows), samples)]
    per_problem = [c / samples for c in n_correct]
    sampled = [r for r in rows if r["verdict"] != "long prompt"]
    return {
        "pass@1": statistics.fmean(per_problem),
        "stderr": statistics.stdev(per_problem) / len(per_problem) ** 0.5 if len(per_problem) > 1 else None,
        "pass@k": statistics.fmean(pass_at_k(samples, c, samples) for c in n_correct),
        "mean_tokens": statistics.fmean(r["tokens"] for r in sampled) if sampled else 0.0,
        "truncated": statistics.fmean(r["finish_reason"] == "length" for r in sampled) if sampled else 0.0,
        "timeouts": sum(r["verdict"] == "timeout" for r in rows),
        "long_prompts": (len(rows) - len(sampled)) // samples,
        **{"n_problems": len(per_problem), "samples": samples, "per_problem": per_problem},
    }


def average(results: list[dict]) -> dict:
    """The paper's last column: every benchmark has the same weight. Counts are summed."""
    means = {name: statistics.fmean(r[name] for r in results) for name in ("pass@1", "pass@k", "mean_tokens", "truncated")}
    counts = {name: sum(r[name] for r in results) for name in ("n_problems", "timeouts", "long_prompts")}
    errors = [r["stderr"] for r in results]
    return means | counts | {"samples": "", "stderr": None if None in errors else math.hypot(*errors) / len(errors)}


HEADER = (
    f"{'benchmark':<18}{'problems':>9}{'K':>4}{'Pass@1':>13}{'Pass@K':>8}{'tokens':>8}{'truncated':>11}{'timeouts':>10}{'too long':>10}"
)


def table_row(name: str, r: dict) -> str:
    pass_1 = f"{100 * r['pass@1']:.1f}" + (f" ± {100 * r['stderr']:.1f}" if r["stderr"] is not None else "")
    quality = f"{name:<18}{r['n_problems']:>9}{r['samples']:>4}{pass_1:>13}{100 * r['pass@k']:>8.1f}"
    return f"{quality}{r['mean_tokens']:>8.0f}{r['truncated']:>11.1%}{r['timeouts']:>10}{r['long_prompts']:>10}"


# --- 6. The command line ---------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pass@1 and Pass@K of a model; the defaults are the paper's benchmarks and settings.")
    parser.add_argument("--model", help="checkpoint folder or hub name")
    parser.add_argument("--data", nargs="+", default=list(BENCHMARKS), help=f"any of {', '.join(BENCHMARKS)}, files, hub names [all six]")
    parser.add_argument("--data_dir", help="folder that holds NAME.jsonl of the benchmarks, instead of the hub")
    parser.add_argument("--split", default="test", help="split of other hub datasets")
    parser.add_argument("--samples", type=int, help="responses a problem, the K of Pass@K [the paper's; 4 for other data]")
    parser.add_argument("--max_new_tokens", type=int, default=32768, help="limit of a response; the model's context limits it too")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="only the first problems of each benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["auto", "torch", "vllm"], default="auto")
    parser.add_argument("--chunk", type=int, default=512, help="responses a generation call: what an interruption can lose")
    parser.add_argument("--output_dir", help="for results.json and a .jsonl of the samples of each benchmark [runs/eval-MODEL]")
    parser.add_argument("--compare", nargs=2, metavar="RESULTS", help="print the difference of two results.json, and nothing else")
    args = parser.parse_args([re.sub(r"^--[a-z-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in argv])
    if not args.model and not args.compare:
        parser.error("--model is missing; give a checkpoint folder or a hub name")
    for name in ("samples", "max_new_tokens", "limit", "chunk"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error(f"--temperature is {args.temperature} and --top_p {args.top_p}; they must be >= 0 and in (0, 1]")
    return args


def load_benchmarks(args: argparse.Namespace) -> dict[str, tuple[list[dict], int]]:
    """Problems and samples a problem, by the name of the benchmark or file. Raises ValueError."""
    benchmarks = {}
    for source in args.data:
        name = Path(source).stem
        if name in benchmarks:
            raise ValueError(f"--data has two data sets called {name!r}; evaluate them one by one")
        where, problem, answer, samples = BENCHMARKS.get(source, (source, "problem", "answer", 4))
        if source in BENCHMARKS and args.data_dir:
            where, problem, answer = str(Path(args.data_dir, f"{source}.jsonl")), "problem", "answer"
        benchmarks[name] = load_problems(where, args.split, problem, answer)[: args.limit], args.samples or samples
    return benchmarks


def describe(args: argparse.Namespace, benchmarks: dict[str, tuple[list[dict], int]], engine: str) -> dict:
    """All that decides the samples and scores."""
    settings = {name: getattr(args, name) for name in ("model", "max_new_tokens", "temperature", "top_p", "seed", "chunk")}
    if Path(args.model).is_dir():
        settings["model"] = str(Path(args.model).resolve())
        files = sorted(Path(args.model).glob("*.safetensors"))
        settings["weights"] = [hashlib.file_digest(path.open("rb"), "sha256").hexdigest()[:16] for path in files]
    settings |= {"engine": engine, "benchmarks": {}}
    for name, (problems, samples) in benchmarks.items():
        digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]
        settings["benchmarks"][name] = {"problems": len(problems), "samples": samples, "sha256": digest}
    return settings


def prepare_output(out: Path, settings: dict) -> None:
    """Make the folder, or know that it holds this very evaluation. Raises ValueError."""
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot use {out} for the evaluation ({error}); choose another --output_dir") from error
    changed = [f"{name} ({before.get(name)} -> {value})" for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"{out} holds an evaluation with other settings, {', '.join(changed)}; use them, or another --output_dir")


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the table, write the files. Raises ValueError, one sentence, before anything is sampled."""
    benchmarks = load_benchmarks(args)
    from transformers.utils import logging

    from sampler import context_length, load_tokenizer, make_engine, prompt_ids, resolve_engine

    logging.disable_progress_bar()  # of loading the weights
    tokenizer, context = load_tokenizer(args.model), context_length(args.model)
    out = Path(args.output_dir or f"runs/eval-{Path(args.model).name}")
    settings = describe(args, benchmarks, resolve_engine(args.engine)[0])
    prepare_output(out, settings)
    longest_prompt = max(len(prompt_ids(tokenizer, p["problem"])) for problems, _ in benchmarks.values() for p in problems)
    longest = min(context, longest_prompt + args.max_new_tokens)
    engine = make_engine(args.engine, args.model, tokenizer, max_tokens=longest, seed=args.seed, gpu_memory=0.9)
    sampling = {name: settings[name] for name in ("max_new_tokens", "temperature", "top_p", "seed", "chunk")}
    results = {}
    print(f"{args.model}: " + ", ".join(f"{name} {value}" for name, value in {**sampling, "engine": settings["engine"]}.items()))
    print(HEADER, flush=True)
    for name, (problems, samples) in benchmarks.items():
        results[name] = evaluate(engine, tokenizer, problems, samples=samples, context=context, path=out / f"{name}.jsonl", **sampling)
        print(table_row(name, results[name]), flush=True)
    mean = average(list(results.values()))
    print(table_row("average", mean))
    (out / "results.json").write_text(json.dumps({"settings": settings, "average": mean, "results": results}, indent=1), encoding="utf-8")
    print(f"settings and scores: {out}/results.json; samples: {out}/NAME.jsonl")


def main() -> None:
    args = parse_args(sys.argv[1:])
    try:
        if args.compare:
            from experiments.compare_evals import compare

            print("\n".join(compare(*args.compare)))
        else:
            run(args)
    except ValueError as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    serve_symbolic() if sys.argv[1:] == [WORKER_FLAG] else main()
