"""Grading, benchmarks, Pass@1 and Pass@K.

    python eval.py                                     # the embedded reasoner on its own test problems
    python eval.py --model runs/a/checkpoint-500 --data math500.jsonl HuggingFaceH4/MATH-500 --samples 4 --json a.json

The paper samples 32 responses to a problem of AIME24, AIME25 and AMC23, and 4 to one of MATH-500, Minerva and
OlympiadBench (at most 32,768 tokens, temperature 0.6), and reports Pass@1, the mean correctness of all samples.
Its grader is a hybrid: an answer is right if a DeepScaleR-style check (last `\\boxed{}` after `</think>`,
normalised strings) or Math-Verify says so. Ours differs from the released code in three points:

- Math-Verify, also the sympy equality of the DeepScaleR-style check, sees the content of the last box, not the
  whole response, so an answer that was only mentioned on the way cannot count.
- Two integers or fractions that differ are wrong without asking Math-Verify: most wrong answers end there.
- Model output can blow up sympy (`9^{9^{9^9}}`), so Math-Verify runs in a worker process with limits on time and
  memory (Linux, macOS), not in the trainer, where only an alarm signal in the main thread could stop it.
"""

import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import threading
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

# torch, transformers, datasets and sampler are imported inside the functions that need them: this file is also the
# program of the grading worker, which has to start fast and to fit into its memory limit.

TIME_LIMIT = 5  # seconds of wall-clock time for one symbolic comparison
START_LIMIT = 120  # seconds for the worker to import Math-Verify (a cold network disk is slow)
MEMORY_LIMIT = 2 << 30  # bytes of address space of the worker
MAX_ANSWER_CHARS = 2000  # a longer boxed answer is wrong; gold answers of the six benchmarks stay far below
WORKER_FLAG = "--symbolic-worker"  # `python eval.py --symbolic-worker` is the worker's command

# --- 1. Answers as strings and as numbers ----------------------------------------------------------------------------

REWRITES = [  # pattern, replacement; in this order
    (r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle|quad)(?![a-zA-Z])", ""),  # spacing; not "\\ ", the end of a matrix row
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?%", ""),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"(?<=[\w})\]])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?[0-9]\}?)?$", ""),  # the unit in 15\text{ cm}^2
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<=[0-9])\s*(?:degree|dollar|cent|euro|unit|second|minute|hour|day|year|foot|feet|inche?|mile)s?(?:\^[0-9])?$", ""),
    (r"(?<=[0-9])\s+(?:[cmk]?m|kg)(?:\^[0-9])?$", ""),  # needs the space: 2m may be twice a variable
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


# --- 2. Symbolic equality, in a process of its own -------------------------------------------------------------------


class SymbolicChecker:
    """Math-Verify in a worker process that starts at the first question and lives until this process ends.

    A subprocess and not `multiprocessing`: its spawn runs the main module again in the child, and train.py imports
    torch. The worker ends by itself when its input closes, and its own alarm clock ends it when a question
    takes too long, so neither a hung comparison nor a killed trainer leaves a process behind.
    """

    def __init__(self) -> None:
        self.timeouts = 0  # questions given up because the worker ran into its time limit or died
        self._worker: subprocess.Popen | None = None
        self._lock = threading.Lock()  # one question at a time

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two LaTeX answers are equal; False, and one more `timeouts`, if the worker does not survive the question.

        Raises RuntimeError if the worker does not start, as without Math-Verify: grading everything wrong would be worse.
        """
        if max(len(gold), len(answer)) > MAX_ANSWER_CHARS:
            return False
        with self._lock:
            if self._worker is None or self._worker.poll() is not None:
                self._start()
            reply = ""
            try:
                with contextlib.suppress(OSError):  # the worker has died
                    self._worker.stdin.write(json.dumps([gold, answer]) + "\n")  # ASCII: escapes lone surrogates and NUL too
                    self._worker.stdin.flush()
                    reply = self._worker.stdout.readline()
            finally:
                if not reply:  # or Ctrl-C: a late reply must not answer the next question
                    self.timeouts += 1
                    self._worker.kill()
                    self._worker.communicate()  # closes the pipes, waits for the end
        return reply == "1\n"

    def _start(self) -> None:
        command = [sys.executable, __file__, WORKER_FLAG]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii")
        self._worker = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C in the terminal is not for it
        if self._worker.stdout.readline() != "ready\n":
            raise RuntimeError("the grading worker did not start (its error is above); try `pip install math-verify`")


def serve_symbolic() -> None:
    """The worker: reads a JSON line [gold, answer], writes "1" (equal) or "0", until its input closes."""
    import logging
    import resource
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process, even inside C code
    signal.alarm(START_LIMIT)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses; the time limit still holds
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # Math-Verify warns about every answer it cannot parse
    replies, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not write into the replies
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT)
        try:  # this alarm replaces Math-Verify's own timeouts
            gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
            equal = verify(gold, answer, timeout_seconds=None)  # not symmetric: the gold answer comes first
        except Exception:  # what sympy cannot read is not an answer
            equal = False
        signal.alarm(0)
        print(int(equal), file=replies, flush=True)


CHECKER = SymbolicChecker()

# --- 3. The grader and Pass@K ----------------------------------------------------------------------------------------


def equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same: as strings, as numbers, element by element, then symbolically (cheapest first)."""
    gold, answer = (re.sub(r"\\?\$", "", text).strip() for text in (gold, answer))
    a, b = normalise(gold), normalise(answer)
    if a == b:
        return a != ""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        if x == y:
            return True
        if not re.search(r"[.,eE%]|times|cdot", a + b) and "%" not in gold + answer:
            return False  # both exact; Math-Verify rounds decimals, and reads 8% as 8 or as 0.08
    left, right = elements(gold), elements(answer)
    if left and right:
        same_shape = left[0] == right[0] and len(left[1]) == len(right[1])
        return same_shape and all(equal(g, r) for g, r in zip(left[1], right[1]))
    return CHECKER.equal(gold, answer)


def grade(response: str, answers: list[str]) -> bool:
    r"""Whether the last `\boxed{}` of a response holds one of the gold answers. Raises nothing, whatever the response says.

    >>> grade(r"... so $x = \boxed{\dfrac12}$.", [r"\frac{1}{2}"]), grade("it is 3", ["3"])
    (True, False)
    """
    answer = boxed_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    return any(equal(boxed_answer(gold) or gold, answer) for gold in answers)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k samples hold a correct one, from n samples with c correct (Chen et al. 2021, Eq. 1).

    >>> pass_at_k(n=4, c=1, k=1), pass_at_k(n=4, c=1, k=2)
    (0.25, 0.5)
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"Pass@{k} of {n} samples with {c} correct is undefined: 1 <= k <= n and 0 <= c <= n must hold")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# --- 4. Problems -----------------------------------------------------------------------------------------------------


def load_problems(source: str, split: str = "train") -> list[dict]:
    """Problems of a .jsonl, .json or .parquet file or a Hugging Face dataset: [{"problem": str, "answers": [str, ...]}].

    Its columns are `problem` and `answer` (text, a number, or a list of them). `split` is for hub datasets only.
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
        raise ValueError(f"{source} holds no problems; it needs a list of rows with `problem` and `answer`")
    return [_problem(row, f"row {i} of {source}") for i, row in enumerate(rows, 1)]


def _problem(row: object, where: str) -> dict:
    """{"problem", "answers"} from one row, checked; `where` names the row in errors."""
    if not isinstance(row, dict) or not {"problem", "answer"} <= row.keys():
        found = f"the columns {', '.join(row)}" if isinstance(row, dict) else repr(row)[:80]
        raise ValueError(f"{where} has {found}; it needs `problem` and `answer`")
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not isinstance(row["problem"], str) or not row["problem"].strip():
        raise ValueError(f"{where} has the problem {row['problem']!r}; it needs some text")
    if not answers or any(isinstance(a, bool) or not isinstance(a, str | int | float) or not str(a).strip() for a in answers):
        raise ValueError(f"{where} has the answer {row['answer']!r}; it needs text, a number, or a list of them")
    return {"problem": row["problem"], "answers": [str(a).strip() for a in answers]}


# --- 5. Sampling, scores and the command line ------------------------------------------------------------------------


def evaluate(engine, tokenizer, problems, *, samples, max_new_tokens, temperature, top_p=1.0, context=math.inf) -> dict:
    """Sample every problem `samples` times in one generate call and grade; the result can be written as JSON.

    `context` is the model's context length in tokens: a response gets at most what its prompt leaves of it.
    Raises ValueError for a prompt longer than `context`.

    "pass@1" is the mean correctness, "stderr" its standard error over problems (None for one problem: samples of a
    problem are not independent), "pass@k" is unbiased with k = samples, "mean_tokens" the response length, "truncated"
    the share that ran into its limit, "timeouts" the gradings given up, "per_problem" each problem's mean correctness.
    """
    from sampler import Request, prompt_ids

    requests = []
    for problem in problems:
        ids = prompt_ids(tokenizer, problem["problem"])
        limit = min(max_new_tokens, context - len(ids))
        if limit < 1:
            raise ValueError(f"{problem['problem'][:60]!r} has {len(ids)} tokens, the model's context {context}; leave it out")
        requests += [Request(ids, limit)] * samples
    responses = engine.generate(requests, temperature=temperature, top_p=top_p)

    timeouts_before, details = CHECKER.timeouts, []
    for i, response in enumerate(responses):
        problem = problems[i // samples]
        text = tokenizer.decode(response.ids, skip_special_tokens=False)  # some tokenizers hold `</think>` as a special token
        details.append({**problem, "response": text, "correct": grade(text, problem["answers"]), "tokens": len(response.ids)})
    n_correct = [sum(d["correct"] for d in details[i : i + samples]) for i in range(0, len(details), samples)]
    per_problem = [c / samples for c in n_correct]
    return {
        "pass@1": statistics.fmean(per_problem),
        "stderr": statistics.stdev(per_problem) / len(problems) ** 0.5 if len(problems) > 1 else None,
        "pass@k": statistics.fmean(pass_at_k(samples, c, samples) for c in n_correct),
        "mean_tokens": statistics.fmean(d["tokens"] for d in details),
        "truncated": statistics.fmean(r.finish_reason == "length" for r in responses),
        "timeouts": CHECKER.timeouts - timeouts_before,
        **{"n_problems": len(problems), "samples": samples, "per_problem": per_problem, "samples_detail": details},
    }


def parse_args() -> argparse.Namespace:
    tiny = Path(__file__).resolve().parent / "tiny"
    parser = argparse.ArgumentParser(description="Pass@1 and Pass@K of a model; the defaults evaluate the embedded reasoner.")
    parser.add_argument("--model", default=str(tiny), help="checkpoint folder or hub name")
    parser.add_argument("--data", nargs="+", default=[str(tiny / "test.jsonl")], help=".jsonl, .json, .parquet files or hub names")
    parser.add_argument("--split", default="test", help="split of hub datasets")
    parser.add_argument("--samples", type=int, default=4, help="responses a problem, the K of Pass@K")
    parser.add_argument("--max_new_tokens", type=int, default=32768, help="limit of a response; the model's context limits it too")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="only the first problems of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["auto", "torch", "vllm"], default="auto")
    parser.add_argument("--json", help="write settings, scores and every sample here")
    args = parser.parse_args()
    for name in ("samples", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error(f"--temperature is {args.temperature} and --top_p {args.top_p}; they must be >= 0 and in (0, 1]")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json is {args.json}; its folder does not exist, make it first")
    return args


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Evaluate each benchmark of `args.data`, print the table; {source: result of `evaluate`}. ValueError for bad input."""
    benchmarks = {source: load_problems(source, args.split)[: args.limit] for source in args.data}  # before the weights are read
    import torch
    from transformers.utils import logging

    from sampler import context_length, load_tokenizer, make_engine, prompt_ids

    logging.disable_progress_bar()  # of loading the weights
    tokenizer, context = load_tokenizer(args.model), context_length(args.model)
    longest_prompt = max(len(prompt_ids(tokenizer, p["problem"])) for problems in benchmarks.values() for p in problems)
    longest = min(context, longest_prompt + args.max_new_tokens)
    engine = make_engine(args.engine, args.model, tokenizer, max_tokens=longest, seed=args.seed, gpu_memory=0.9)
    torch.manual_seed(args.seed)
    settings = {name: getattr(args, name) for name in ("samples", "max_new_tokens", "temperature", "top_p")}
    print(f"{'benchmark':<24}{'Pass@1':>14}{f'Pass@{args.samples}':>9}{'tokens':>9}{'truncated':>11}")
    results = {}
    for source, problems in benchmarks.items():
        results[source] = r = evaluate(engine, tokenizer, problems, context=context, **settings)
        pass_1 = f"{100 * r['pass@1']:.1f}" + (f" ± {100 * r['stderr']:.1f}" if r["stderr"] is not None else "")
        row = f"{Path(source).stem:<24}{pass_1:>14}{100 * r['pass@k']:>9.1f}{r['mean_tokens']:>9.0f}{r['truncated']:>11.1%}"
        print(row, flush=True)
    return results


def main() -> None:
    args = parse_args()
    try:
        results = run(args)
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    serve_symbolic() if sys.argv[1:] == [WORKER_FLAG] else main()
