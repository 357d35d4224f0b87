"""Problems with answers, from files or datasets and checked row by row; the order of training."""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.models import context_length, prompt_ids
from plumbing.processes import rank
from plumbing.settings import refuse_if

BENCHMARKS = {  # the paper's: hub dataset, its columns of problems and answers
    "aime24": ("math-ai/aime24", "problem", "solution"),
    "aime25": ("math-ai/aime25", "problem", "answer"),
    "amc23": ("math-ai/amc23", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", "problem", "answer"),
    "minerva": ("math-ai/minervamath", "question", "answer"),
    "olympiad": ("math-ai/olympiadbench", "question", "final_answer"),
}


def load_problems(source: str, split="train") -> list[dict]:
    """[{"problem": str, "answers": [str, ...]}] of a benchmark of the paper, a .jsonl, .json or .parquet file
    or a hub dataset, with columns `problem` and `answer`: text, a number, or a list of them.

    `split` is for the hub only. Raises ValueError, one sentence with the value and the remedy."""
    source, problem, answer = BENCHMARKS.get(source, (source, "problem", "answer"))
    try:
        rows = _read_rows(source, split)
    except Exception as error:  # json, unicode, pyarrow, datasets and the network each have their own
        reason = " ".join(str(error).split())
        remedy = "give an intact .jsonl, .json or .parquet file, or name and split of a hub dataset in reach"
        raise ValueError(f"cannot read {source!r}, split {split!r} ({reason}); {remedy}") from error
    needed = f"it needs a list of rows with `{problem}` and `{answer}`"
    refuse_if(not isinstance(rows, list) or not rows, f"{source} holds no problems; {needed}")
    problems, unusable = [], []
    for i, row in enumerate(rows, 1):
        try:
            problems.append(_problem(row, f"row {i} of {source}", problem, answer))
        except ValueError as error:
            unusable.append(error)
    if unusable and (Path(source).exists() or not problems):  # a file can be mended, a dataset of the hub not
        raise unusable[0]
    if unusable:
        print(f"{len(unusable)} of {len(rows)} rows of {source} are left out; the first: {unusable[0]}")
    return problems


def _read_rows(source: str, split: str) -> list:
    path = Path(source)
    if path.suffix == ".jsonl":  # `datasets` wants one type per column, and answers may mix them
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8") or "[]")
    from datasets import Dataset, disable_progress_bars, load_dataset

    disable_progress_bars()
    if path.suffix == ".parquet":
        return Dataset.from_parquet(source, keep_in_memory=True).to_list()
    return load_dataset(source, split=split).to_list()


def _problem(row: object, where: str, problem: str, answer: str) -> dict:
    """{"problem", "answers"} from one row, checked; `where` names the row in errors."""
    if not isinstance(row, dict) or not {problem, answer} <= row.keys():
        found = f"the columns {', '.join(row)}" if isinstance(row, dict) else repr(row)[:80]
        raise ValueError(f"{where} has {found}; it needs `{problem}` and `{answer}`")
    answers = row[answer] if isinstance(row[answer], list) else [row[answer]]
    if not isinstance(row[problem], str) or not row[problem].strip():
        raise ValueError(f"{where} has the problem {row[problem]!r}; it needs some text")
    usable = lambda a: isinstance(a, str | int | float) and not isinstance(a, bool) and str(a).strip()
    if not answers or not all(map(usable, answers)):
        raise ValueError(f"{where} has the answer {row[answer]!r}; it needs text, a number, or a list")
    return {"problem": row[problem], "answers": [str(a).strip() for a in answers]}


def with_prompts(problems: list[dict], name: str, tokenizer, longest: int, consequence: str) -> list[dict]:
    """Problems with their `prompt_ids`; prints how many prompts are too long. ValueError if all are."""
    bar = tqdm(problems, desc=name, delay=2, disable=rank() > 0)
    found = [p | {"prompt_ids": prompt_ids(tokenizer, p["problem"])} for p in bar]
    n_long, limit = sum(len(p["prompt_ids"]) > longest for p in found), f"max_prompt_tokens={longest}"
    refuse_if(n_long == len(found), f"no prompt of {name} fits into {limit}: raise it")
    if n_long:
        print(f"{n_long} of {len(found)} prompts of {name} are longer than {limit} and {consequence}")
    return found


def load_data(run, method, tokenizer) -> tuple[list[dict], dict[str, list[dict]]]:
    """Training problems whose prompts fit, and all held-out ones by the name of their file. ValueError."""
    longest, context = method.max_prompt_tokens, context_length(run.model)
    needed = longest + method.max_response_tokens
    both = f"max_prompt_tokens + max_response_tokens = {needed}"
    refuse_if(needed > context, f"{both} exceeds the model's context of {context} tokens: lower one of them")
    train, held_out = load_problems(run.train_data), {}
    for source in run.test_data:
        name = Path(source).stem
        refuse_if(name in held_out, f"test_data has two data sets called {name!r}: rename one")
        rows = load_problems(source, "test")[: run.eval_problems or None]
        held_out[name] = with_prompts(rows, name, tokenizer, longest, "count as wrong")
    train = with_prompts(train, "train_data", tokenizer, longest, "are left out")
    return [p for p in train if len(p["prompt_ids"]) <= longest], held_out


def stream(problems: list[dict], seed: int, start: int, stop: int) -> list[dict]:
    """Problems start to stop of an endless stream that visits all of them in a new order in each epoch."""
    n = len(problems)
    epochs = range(start // n, stop // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return [problems[i] for i in order[start % n : start % n + stop - start]]
