"""Benchmarks, the verdict on a response, Pass@1 and Pass@K.

    python eval.py --model runs/a/checkpoint-500                 # the paper's six benchmarks and settings
    python eval.py --model tiny --data tiny/test.jsonl --engine torch   # the embedded reasoner, anywhere
    python experiments/compare_evaluations.py runs/eval-a/results.json runs/eval-b/results.json

The paper samples 32 responses per problem of AIME24, AIME25 and AMC23, and 4 of MATH-500, Minerva and
OlympiadBench (at most 32,768 tokens, temperature 0.6), and reports Pass@1, the mean correctness of all
samples. A response is right if the content of its last `\\boxed{}` after the last `</think>` equals a gold
answer, by a DeepScaleR-style check or by Math-Verify (plumbing/answers.py). An evaluation writes
settings.json, NAME.jsonl with every sample of a benchmark, and results.json with the scores. The same command
again resumes.
"""

import argparse
import json
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from math import comb, hypot, inf
from pathlib import Path

from transformers.utils import logging

from plumbing.answers import boxed_answer, equal
from plumbing.checkpoints import closing_directories, open_directory
from plumbing.engines import make_engine, resolve_engine
from plumbing.evaluations import HEADER, SampleFile, describe, table_row
from plumbing.models import context_length, load_tokenizer, prompt_ids
from plumbing.nouns import Request
from plumbing.problems import load_problems
from plumbing.settings import MachineConfig
from plumbing.symbolic import MAX_ANSWER_CHARS, WORKERS

# The paper's samples per problem; plumbing/problems.py says where the hub has these benchmarks.
SAMPLES = {"aime24": 32, "aime25": 32, "amc23": 32, "math500": 4, "minerva": 4, "olympiad": 4}

# --- The grader -------------------------------------------------------------------------------------------


def verdict(response: str, answers: list[str]) -> str:
    r""" "correct" if the last `\boxed{}` of a response holds one of the gold answers, else "wrong", or
    "timeout" if a symbolic comparison was given up. RuntimeError if Math-Verify does not start.

    >>> verdict(r"... so $x = \boxed{\dfrac12}$.", ["0.25", r"\frac{1}{2}"]), verdict("it is 3", ["3"])
    ('correct', 'wrong')
    """
    answer = boxed_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return "wrong"
    golds = [boxed_answer(gold) or gold for gold in answers]
    try:  # cheapest first, for all gold answers
        right = any(equal(gold, answer, symbolic) for symbolic in (False, True) for gold in golds)
    except TimeoutError:  # at the first gold answer: the next one would take as long
        return "timeout"
    return "correct" if right else "wrong"


def grade(response: str, answers: list[str]) -> bool:
    """The reward: whether the verdict is "correct"."""
    return verdict(response, answers) == "correct"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k samples hold a correct one, from n with c correct (Chen et al. 2021, Eq.
    1).

    >>> pass_at_k(n=4, c=1, k=1), pass_at_k(n=4, c=1, k=2)
    (0.25, 0.5)
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"Pass@{k} of {n} samples with {c} correct: 1 <= k <= n and 0 <= c <= n must hold")
    return 1 - comb(n - c, k) / comb(n, k)


# --- Sampling and scores ----------------------------------------------------------------------------------


def evaluate(engine, tokenizer, problems, *, samples, budget, temperature, top_p=1.0, file=None) -> dict:
    """Sample every problem `samples` times, grade, and return `scores`, which can be written as JSON.

    budget(n): tokens of a response to a prompt of n tokens. Where that is not above 0, the verdict is "long
    prompt", and nothing is sampled. Without a `file` all is one generation call on torch's random state. A
    SampleFile keeps samples chunk by chunk, and what it holds is not sampled again.
    """
    prompts = [prompt_ids(tokenizer, p["problem"]) for p in problems]
    budgets = [budget(len(ids)) for ids in prompts]
    jobs = [(i, k) for i in range(len(problems)) for k in range(samples)]
    rows = file.open(len(jobs)) if file else []
    while len(rows) < len(jobs):
        chunk = jobs[len(rows) :][: file.chunk] if file else jobs
        fresh = [{"problem": i, "sample": k, "verdict": "long prompt"} for i, k in chunk]
        sampled = [row for row in fresh if budgets[row["problem"]] > 0]
        if file:
            file.seed_chunk(len(rows))
        requests = [Request(prompts[row["problem"]], budgets[row["problem"]]) for row in sampled]
        responses = engine.generate(requests, temperature=temperature, top_p=top_p) if requests else []
        texts = [tokenizer.decode(r.ids, skip_special_tokens=False) for r in responses]  # keeps `</think>`
        answers = [problems[row["problem"]]["answers"] for row in sampled]
        with ThreadPoolExecutor(WORKERS) as pool:  # one that takes long does not hold up the others
            verdicts = list(pool.map(verdict, texts, answers))
        for row, response, text, v in zip(sampled, responses, texts, verdicts):
            row |= dict(
                verdict=v, tokens=len(response.ids), finish_reason=response.finish_reason, response=text
            )
        if file:
            file.add(fresh)
        rows = rows + fresh
    return scores(rows, samples)


def scores(rows: list[dict], samples: int) -> dict:
    """Scores of the rows of `evaluate`, problem by problem. Shares are in [0, 1].

    pass@1: mean correctness; stderr: its standard error over problems, whose samples are not independent
    (None for one problem); pass@k: unbiased, k = samples; mean_tokens: response length; truncated: share that
    ran into its limit; timeouts: responses whose grading was given up; long_prompts: problems that were not
    sampled (both count as wrong); per_problem: each one's mean correctness.
    """
    of_problem = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    n_correct = [sum(r["verdict"] == "correct" for r in own) for own in of_problem]
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
    averaged = ("pass@1", "pass@k", "mean_tokens", "truncated")
    mean = {name: statistics.fmean(r[name] for r in results) for name in averaged}
    mean |= {name: sum(r[name] for r in results) for name in ("n_problems", "timeouts", "long_prompts")}
    errors = [r["stderr"] for r in results]
    stderr = None if None in errors else hypot(*errors) / len(errors)
    return mean | {"samples": "", "stderr": stderr}


# --- The command line -------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] + " The defaults are the paper's.")
    add, names = parser.add_argument, ", ".join(SAMPLES)
    add("--model", help="checkpoint folder or hub name")
    add("--data", nargs="+", default=list(SAMPLES), help=f"any of {names}, files, hub names [all six]")
    add("--data_dir", help="folder that holds NAME.jsonl of the benchmarks, instead of the hub")
    add("--split", default="test", help="split of other hub datasets")
    add("--samples", type=int, help="K, responses per problem [the paper's; 4 for other data]")
    add("--max_new_tokens", type=int, default=32768, help="limit of a response; so is the model's context")
    add("--temperature", type=float, default=0.6)
    add("--top_p", type=float, default=1.0)
    add("--limit", type=int, help="only the first problems of each benchmark")
    add("--seed", type=int, default=0)
    add("--engine", choices=["auto", "torch", "vllm"], default="auto")
    add("--chunk", type=int, default=512, help="responses per generation call: what an interruption can lose")
    add("--output_dir", help="for results.json and the samples of each benchmark [runs/eval-MODEL]")
    # --max-new-tokens is --max_new_tokens
    underscores = lambda flag: "--" + flag[0][2:].replace("-", "_")
    with_underscores = [re.sub("^--[a-z-]+", underscores, text) for text in argv]
    args = parser.parse_args(with_underscores)
    if not args.model:
        parser.error("--model is missing; give a checkpoint folder or a hub name")
    for name in ("samples", "max_new_tokens", "limit", "chunk"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.temperature < inf or not 0 < args.top_p <= 1:
        given = f"--temperature {args.temperature} and --top_p {args.top_p}"
        parser.error(f"{given}: the first must be at least 0, the second in (0, 1]")
    return args


def load_benchmarks(args: argparse.Namespace) -> dict[str, tuple[list[dict], int]]:
    """Problems and samples per problem, by the name of the benchmark or file. Raises ValueError."""
    benchmarks = {}
    for source in args.data:
        name = Path(source).stem
        if name in benchmarks:
            raise ValueError(f"--data has two data sets called {name!r}; evaluate them one by one")
        in_folder = args.data_dir and source in SAMPLES
        where = str(Path(args.data_dir, f"{source}.jsonl")) if in_folder else source
        problems = load_problems(where, args.split)[: args.limit]
        benchmarks[name] = problems, args.samples or SAMPLES.get(source, 4)
    return benchmarks


@closing_directories()
def run(args: argparse.Namespace) -> None:
    """Evaluate, print the table, write the files. Raises ValueError before anything is sampled."""
    benchmarks = load_benchmarks(args)
    logging.disable_progress_bar()  # of loading the weights
    tokenizer, context = load_tokenizer(args.model), context_length(args.model)
    out = Path(args.output_dir or f"runs/eval-{Path(args.model).name}")
    settings = describe(args, benchmarks, resolve_engine(args.engine))
    open_directory(out, "settings.json", settings, "evaluation")
    prompts = [prompt_ids(tokenizer, p["problem"]) for problems, _ in benchmarks.values() for p in problems]
    longest = min(context, max(map(len, prompts)) + args.max_new_tokens)
    machine = MachineConfig(engine=args.engine, gpu_memory=0.9)
    engine = make_engine(machine, args.model, tokenizer, max_tokens=longest, seed=args.seed)
    shown = {name: settings[name] for name in ("max_new_tokens", "temperature", "top_p", "seed", "chunk")}
    shown["engine"] = settings["engine"]
    how = dict(temperature=args.temperature, top_p=args.top_p)
    how["budget"] = lambda n_prompt: min(args.max_new_tokens, context - n_prompt)
    print(f"{args.model}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    print(HEADER, flush=True)
    results = {}
    for name, (problems, samples) in benchmarks.items():
        file = SampleFile(out / f"{name}.jsonl", args.chunk, args.seed)
        results[name] = evaluate(engine, tokenizer, problems, samples=samples, file=file, **how)
        print(table_row(name, results[name]), flush=True)
    written = {"settings": settings, "average": average(list(results.values())), "results": results}
    print(table_row("average", written["average"]))
    (out / "results.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(f"settings and scores: {out}/results.json; samples: {out}/NAME.jsonl")


def main() -> None:
    args = parse_args(sys.argv[1:])
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
