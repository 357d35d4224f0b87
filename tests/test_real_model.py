"""experiments/real_model/ and real_fci.py: problems that are right and kept apart, a warm start, and FCI of a
model whose tokens are bytes, all small. The pretrained model itself is fetched in no test."""

import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from attnrl import MethodConfig, Problem
from eval import grade
from experiments import real_fci
from experiments.gradients import Bench
from experiments.real_model import answers, gradient_signal, make_problems, warm_start
from fci import StepHook, split_steps, step_ids_of
from plumbing.checkpoints import closing_directories
from plumbing.learner import Learner
from plumbing.models import load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Sequence
from plumbing.settings import MachineConfig

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A directory with a random Llama of two layers whose tokens are bytes."""
    out = tmp_path_factory.mktemp("models") / "bytes"
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)
    fast.save_pretrained(out)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        **sizes, vocab_size=len(fast), tie_word_embeddings=True, eos_token_id=fast.eos_token_id
    )
    random_model(config, attention="sdpa").save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """The directory that the command writes, of few problems."""
    out = tmp_path_factory.mktemp("problems")
    sizes = ["--n_warm", "8", "--n_train", "200", "--n_test", "60"]
    run(make_problems, [str(out), *sizes])
    return out


def run(program, argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, closing_directories():
        patch.setattr(sys, "argv", [program.__file__, *argv])
        program.main()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def skeletons(found: list[dict]) -> set[str]:
    sentences = [s for row in found for s in re.split(r"(?<=[.?]) ", row["problem"])]
    return {re.sub(r"\d+", "#", s) for s in sentences}


def test_no_sentence_of_the_test_set_is_trained_on(problems):
    warm, train, test = (rows(problems / f"{name}.jsonl") for name in ("warm", "train", "test"))
    assert [len(x) for x in (warm, train, test)] == [8, 200, 60]
    assert skeletons(test) and not skeletons(test) & (skeletons(train) | skeletons(warm))
    texts = [row["problem"] for row in warm + train + test]
    assert len(set(texts)) == len(texts)


def test_solutions_are_right(problems):
    """Every step that computes is true and starts from what is known, and the grader accepts the answer."""
    for row in rows(problems / "train.jsonl"):
        computed = re.findall(r"^(\d+) ([-+*/]) (\d+) = (\d+)$", row["solution"], re.M)
        known = set(re.findall(r"\d+", row["problem"]))
        for a, sign, b, result in computed:
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}
            assert exact[sign] == int(result) and {a, b} <= known
            known.add(result)
        assert 1 <= len(computed) <= 4 and computed[-1][-1] == row["answer"]
        assert grade(row["solution"], [row["answer"]])


def test_half_of_the_solutions_taught_leave_the_operations_out(problems):
    """For each number of operations; the answer stays right."""
    found = rows(problems / "warm.jsonl")
    assert [row["solution"].count(" = ") for row in found] == [1, 2, 3, 4, 0, 0, 0, 0]
    for row in found:
        sentences = row["problem"].split(". ")
        assert all(f"{sentence}.\n\n" in row["solution"] for sentence in sentences[:-1])
        assert grade(row["solution"], [row["answer"]])


def test_every_number_of_operations_and_every_event_occurs(problems):
    found = rows(problems / "train.jsonl")
    lengths = {len(re.findall(r" = ", row["solution"])) for row in found}
    assert lengths == {1, 2, 3, 4}
    for ways in make_problems.EVENTS.values():
        patterns = [re.escape(way).replace(r"\{", "{").replace(r"\}", "}") for way in ways]
        patterns = [re.sub(r"{(a|b)}", r"\\d+", p) for p in patterns]
        patterns = [re.sub(r"{\w+}", r"[\\w ]+", p) for p in patterns]
        assert any(re.search(p, row["problem"]) for p in patterns for row in found), ways


def test_same_seed_same_problems():
    make = lambda seed: make_problems.make_problems(seed, 12, test=False)
    assert make(1) == make(1) != make(2)


def test_a_story_whose_sentences_are_all_of_the_other_set_is_told_anew(monkeypatch):
    """`{name} has` is for the test set alone here, so no training problem starts with it."""
    rule = make_problems.for_test
    monkeypatch.setattr(make_problems, "for_test", lambda s: " has " in s or rule(s))
    found = [make_problems.make_problem(random.Random(i), 2, test=False)["problem"] for i in range(20)]
    assert not any(" has " in problem for problem in found)


def test_steps_of_a_solution_are_its_paragraphs(problems):
    solution = rows(problems / "warm.jsonl")[3]["solution"]
    texts = list(solution)
    steps = ["".join(texts[start:end]).strip() for start, end in split_steps(texts)]
    assert steps == solution.split("\n\n")


def test_warm_start_learns_and_writes_a_model(byte_model, problems, tmp_path, capsys):
    """The same command on a model of bytes: its surprisal falls, and train.py's loader reads the result."""
    flags = ["--epochs", "6", "--batch_size", "2", "--lr", "1e-2", "--n_test", "2", "--threads", "1"]
    run(warm_start, [str(byte_model), str(problems), str(tmp_path / "out"), *flags])
    assert "of 2 held-out problems" in capsys.readouterr().out
    surprisal = lambda path: mean_surprisal(path, problems)
    assert surprisal(tmp_path / "out") < surprisal(byte_model) - 0.5


@torch.no_grad()
def mean_surprisal(path: Path, problems: Path) -> float:
    tokenizer, model = load_tokenizer(str(path)), load_model(str(path))
    row = rows(problems / "warm.jsonl")[0]
    prompt, ids = prompt_ids(tokenizer, row["problem"]), tokenizer.encode(row["solution"])
    logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(-logps.gather(1, torch.tensor(ids)[:, None]).mean())


def test_gradient_signal(monkeypatch, capsys):
    """Of batches of different problems: 1 if all gradients point one way, -1 / 2 of three that cancel."""
    seen, angles = [], []
    sample = Bench.sample
    monkeypatch.setattr(Bench, "sample", lambda bench, rows, n: seen.append(rows) or sample(bench, rows, n))
    monkeypatch.setattr(Problem, "mixed", lambda problem: mixed)
    mixed = True
    unit = lambda angle: np.array([np.cos(angle), np.sin(angle)])
    monkeypatch.setattr(Bench, "gradient", lambda *_: 3 * unit(angles.pop(0)))
    flags = [str(TINY), str(TINY / "train.jsonl"), *"--batches 3 --batch_size 2 --group_size 2".split()]
    for step, expected in ((0.0, "1.0000"), (2 * np.pi / 3, "-0.5000")):
        angles += [0, step, 2 * step]
        run(gradient_signal, flags)
        assert f"two batches: {expected} ± 0.0000" in capsys.readouterr().out
    assert [len(batch) for batch in seen] == [2] * 6
    assert len({row["problem"] for batch in seen[:3] for row in batch}) == 6
    with pytest.raises(SystemExit):
        run(gradient_signal, [*flags, "--batches", "2"])
    mixed = False
    with pytest.raises(SystemExit, match="batch 0 has no gradient"):
        run(gradient_signal, flags)


def test_answers_with_and_without_operations(problems, tmp_path, capsys):
    """Problems 0 and 1 need one and two operations."""
    responses = [(0, "2 + 3 = 5", "correct"), (0, "I say 5", "wrong"), (1, "2 * 2 = 4", "wrong")]
    found = [dict(problem=p, response=text, verdict=verdict) for p, text, verdict in responses]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    run(answers, [str(problems / "test.jsonl"), str(tmp_path / "test.jsonl")])
    lines = [line.split(" | ", 1)[1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[0] == "1 to 4 | 3 | 67 % | 50 % (1 of 2) | 0 % (0 of 1) |"
    assert lines[1] == "1 | 2 | 50 % | 100 % (1 of 1) | 0 % (0 of 1) |"
    assert lines[3] == "3 | 0 | – | – (0 of 0) | – (0 of 0) |"
    with pytest.raises(SystemExit):
        run(answers, [str(problems / "test.jsonl"), str(tmp_path / "other.jsonl")])
    assert "no such file: " + str(tmp_path / "other.jsonl") in capsys.readouterr().err


# --- real_fci.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("falls", [True, False])
def test_correlation_and_overlap_of_known_fci(tiny_model, tiny_tokenizer, monkeypatch, falls):
    """FCI that falls along the response is its position, and branches at the earliest steps; FCI that rises
    branches at others."""
    step = "b=a+5: 1+5 so b=6\n\n"
    ids = tiny_tokenizer.encode(step * 30)
    known = lambda scores, n_scored, n_steps: np.linspace(1, 2, n_steps)[:: -1 if falls else 1].tolist()
    monkeypatch.setattr(real_fci, "fci_of_response", known)
    learner = Learner(tiny_model, None, None, MachineConfig(autocast="none"))
    row = {"prompt": prompt_ids(tiny_tokenizer, "a=1, b=a+5, find b."), "ids": ids}
    found = real_fci.measure(row, tiny_tokenizer, learner, MethodConfig())
    assert list(found) == [*real_fci.VARIANTS, real_fci.CONTROL]
    assert found[real_fci.CONTROL]["overlap"] < 1 and 0 < found[real_fci.CONTROL]["place"] < 1
    for measured in (found[name] for name in real_fci.VARIANTS):
        assert measured["correlation"] == pytest.approx(-1 if falls else 1)
        assert measured["overlap"] == (1 if falls else 0) and measured["steps"] == 30
        assert measured["place"] < 0.2 if falls else measured["place"] > 0.7


def test_all_variants_in_one_pass(tiny_model, tiny_tokenizer):
    """Are those of a pass each."""
    learner = Learner(tiny_model, None, None, MachineConfig(autocast="none"))
    prompt, ids = (
        prompt_ids(tiny_tokenizer, "a=1, b=a+5, find b."),
        tiny_tokenizer.encode("b=a+5: 1+5 so b=6\n\n" * 12),
    )
    steps = split_steps([tiny_tokenizer.decode([i]) for i in ids])
    sequence = Sequence(prompt, ids, step_ids_of(len(prompt), steps))
    together = learner.score([sequence], hook=partial(real_fci.AllVariants, delta=4))[0].fci
    for i, later in enumerate(real_fci.VARIANTS):
        alone = learner.score([sequence], hook=partial(StepHook, delta=4, later=later))[0].fci
        assert alone.any() and np.array_equal(together[:, i], alone)


def test_real_fci_goes_on_where_it_was(tmp_path, capsys):
    """As a user runs it, twice: the second time the responses of the first are read and more are sampled."""
    flags = ["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--out", str(tmp_path)]
    flags += "--batch 8 --min_tokens 40 --max_tokens 128".split()
    run(real_fci, [*flags, "--responses", "3"])
    first = rows(tmp_path / "samples.jsonl")
    run(real_fci, [*flags, "--responses", "12"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in table] == ["FCI", "---", "sum", "mean", "window", "(at"] * 2
    again = rows(tmp_path / "samples.jsonl")
    assert len(again) > len(first) and again[: len(first)] == first
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"prompt": [1], "id')  # killed while it wrote
    run(real_fci, [*flags, "--responses", "12"])
    assert rows(tmp_path / "samples.jsonl") == again
    with pytest.raises(SystemExit, match="max_tokens"):
        run(real_fci, [*flags, "--max_tokens", "99"])
