"""Files of samples: what they hold is not sampled again, and random numbers depend on their place alone."""

import json

import pytest
import torch
from scripted import PROBLEMS, SETTINGS, TEXTS, CharTokenizer, ScriptedEngine

from eval import evaluate
from plumbing.evaluations import SampleFile
from plumbing.nouns import Response


def run(engine, path, chunk=3, seed=0):
    return evaluate(engine, CharTokenizer(), PROBLEMS, **SETTINGS, file=SampleFile(path, chunk, seed))


def test_what_a_file_holds_is_not_sampled_again(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = run(ScriptedEngine(TEXTS), path)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    chunk = b"".join(lines[:3])
    for left in (content[:-20], chunk, content[: len(chunk) + 9]):  # torn, between chunks, torn
        path.write_bytes(left)
        engine = ScriptedEngine(TEXTS[3:])
        assert run(engine, path) == whole
        assert len(engine.requests) == 1 and path.read_bytes() == content
    for left in (content[:50], lines[0], lines[0] + lines[1] + b"{"):  # less than the first chunk
        path.write_bytes(left)
        engine = ScriptedEngine(TEXTS)
        assert run(engine, path) == whole and len(engine.requests) == 4
        assert path.read_bytes() == content
    assert run(ScriptedEngine([]), path) == whole


def test_more_samples_than_the_evaluation_has_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    run(ScriptedEngine(TEXTS), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.jsonl has 4 samples, the evaluation only 3: .*--output_dir"):
        SampleFile(path, chunk=3).open(3)
    assert path.read_bytes() == before


class RandomEngine:
    def generate(self, requests, temperature=1.0, top_p=1.0):
        texts = [str(x) for x in torch.rand(len(requests)).tolist()]
        return [Response([ord(c) for c in text], [], "stop") for text in texts]


def test_random_numbers_depend_on_seed_name_and_place_alone(tmp_path):
    drawn = []
    for name, seed in (("a.jsonl", 0), ("a.jsonl", 0), ("a.jsonl", 1), ("b.jsonl", 0)):
        path = tmp_path / str(len(drawn)) / name
        path.parent.mkdir()
        torch.manual_seed(len(drawn))
        run(RandomEngine(), path, chunk=1, seed=seed)
        drawn.append([json.loads(line)["response"] for line in path.read_text().splitlines()])
    assert drawn[0] == drawn[1] and len({text for rows in drawn[1:] for text in rows}) == 12
