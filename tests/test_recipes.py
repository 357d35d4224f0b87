"""The fork recipes of README.md: each is applied to a copy of the project, trained, and compared with a naive
computation."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT

from plumbing.models import load_model, load_tokenizer, prompt_ids

pytestmark = pytest.mark.slow
LAST_THINK_END = "</think>"


def recipes() -> list[tuple[str, list[str]]]:
    """(file, lines of the diff) of every recipe in README.md."""
    blocks = re.findall(r"```diff\n--- (\S+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [(name, diff.splitlines()) for name, diff in blocks]


def apply(copy: Path, file: str, diff: list[str]) -> None:
    """The edit, which must match exactly one place."""
    path = copy / file
    old = "".join(line[1:] + "\n" for line in diff if line[:1] in ("-", " "))
    new = "".join(line[1:] + "\n" for line in diff if line[:1] in ("+", " "))
    text = path.read_text()
    expected_in = "expected in a fork that edited this place, which may delete the test; else mend README.md"
    assert text.count(old) == 1, f"the recipe does not match {file}: {expected_in}"
    path.write_text(text.replace(old, new))


def in_copy(copy: Path, *command) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def forked(tmp_path_factory, number: int) -> Path:
    copy = tmp_path_factory.mktemp(f"fork{number}")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for name in ("plumbing", "tiny"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    apply(copy, *recipes()[number])
    return copy


def trees(copy: Path, *flags) -> list[dict]:
    """rollouts.jsonl of two steps of training."""
    in_copy(copy, "train.py", *SHORT, "--steps", 2, "--threads", 1, "--output_dir", copy / "run", *flags)
    found = [json.loads(line) for line in (copy / "run/rollouts.jsonl").read_text().splitlines()]
    assert {tree["step"] for tree in found} == {1, 2}
    return found


@pytest.fixture(scope="module")
def mean_fork(tmp_path_factory):
    return forked(tmp_path_factory, 0)


def test_there_are_three_recipes():
    assert [file for file, _ in recipes()] == ["fci.py", "tree.py", "tree.py"]


# --- Mean instead of maximum


@torch.no_grad()
def naive_mean_fci(model, ids, step_ids, delta=4) -> np.ndarray:
    """Eq. 4 and 5 as written, from materialised attention, and their mean over all heads and layers: (S,)."""
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    step_ids, per_head = np.array(step_ids), []
    n_steps = step_ids.max() + 1
    for attention in attentions:
        for A in attention[0].float().numpy():  # (L, L)
            y = np.zeros(n_steps)
            for k in range(n_steps):
                for j in range(k + delta, n_steps):
                    y[k] += A[np.ix_(step_ids == j, step_ids == k)].mean()
            per_head.append(y)
    return np.mean(per_head, axis=0)


def test_mean_in_training(mean_fork):
    """The first batch is sampled and scored by the base model: FCI of its responses by the naive mean."""
    tokenizer, model = load_tokenizer(str(ROOT / "tiny")), load_model(str(ROOT / "tiny"))
    tree, compared = trees(mean_fork)[0], 0
    prompt = prompt_ids(tokenizer, tree["problem"])
    for rollout in tree["rollouts"]:
        if rollout["start"] == 0:
            steps = [tokenizer(text, add_special_tokens=False).input_ids for text in rollout["steps"]]
            ids = prompt + list(itertools.chain(*steps))
            step_ids = [0] * len(prompt) + [k for k, step in enumerate(steps, 1) for _ in step]
            expected = naive_mean_fci(model, ids, step_ids)[1:]
            answer = [k for k, text in enumerate(rollout["steps"]) if LAST_THINK_END in text]
            expected[:1] = 0
            expected[answer[-1] if answer else len(expected) :] = 0
            np.testing.assert_allclose(rollout["fci"], expected, atol=1e-6)
            compared += (expected > 0).sum()
    assert compared > 10


FCI_OF_RANDOM_MODELS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from fci import ATTENTION, StepHook
found = []
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    model.set_attn_implementation(ATTENTION)
    hook = StepHook(torch.arange(60)[None] // 2)
    with torch.no_grad():
        model(torch.arange(60)[None] % 50, step_hook=hook)
    found.append(hook.fci()[0].tolist())
print(json.dumps(found))
"""


def test_mean_with_as_many_key_heads_as_heads_with_fewer_and_with_one(mean_fork, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=3)
    models = []
    for kv_heads in (4, 2, 1):
        torch.manual_seed(kv_heads)
        config = LlamaConfig(
            **shape, num_attention_heads=4, num_key_value_heads=kv_heads, initializer_range=0.3
        )
        models.append(LlamaForCausalLM(config).eval())
        models[-1].save_pretrained(tmp_path / str(kv_heads))
    (mean_fork / "look.py").write_text(FCI_OF_RANDOM_MODELS)
    found = json.loads(in_copy(mean_fork, "look.py", *(tmp_path / str(n) for n in (4, 2, 1))))
    for model, fci in zip(models, found, strict=True):
        expected = naive_mean_fci(model, [i % 50 for i in range(60)], [i // 2 for i in range(60)])
        np.testing.assert_allclose(fci, expected, atol=1e-5)
        assert max(fci) > 0.1


# --- Another rule


def test_longest_steps_are_branched(tmp_path_factory):
    """Of every branched response the two longest steps that keep the gap, before the last </think>."""
    compared = 0
    for tree in trees(forked(tmp_path_factory, 1), "--branching", "longest"):
        for family in {family for family, _ in tree["branches"]}:
            rollout = tree["rollouts"][family]
            length = rollout["length"]
            bounds = [*rollout["step_starts"], length]
            answer = [k for k, text in enumerate(rollout["steps"]) if LAST_THINK_END in text]
            steps = range(answer[-1] if answer else len(rollout["steps"]))
            gap = max(1, 512 * length // 8192)
            expected: list[int] = []
            for k in sorted(steps, key=lambda k: (bounds[k] - bounds[k + 1], k)):
                if len(expected) < 2 and all(abs(bounds[k] - p) >= gap for p in [0, *expected]):
                    expected.append(bounds[k])
            assert sorted(expected) == [point for f, point in tree["branches"] if f == family]
            compared += 1
    assert compared > 2


# --- Another credit


def test_advantage_over_the_parent_alone(tmp_path_factory):
    """Token by token from sets of leaves: the mean outcome below its segment minus that below the parent."""
    seen = set()
    for tree in trees(forked(tmp_path_factory, 2)):
        leaves = tree["rollouts"]
        for i, leaf in enumerate(leaves):
            for start, end, advantage in leaf["advantages"]:
                for t in range(start, end):
                    own, parent = sharing(leaves, i, t)
                    value, value_of_parent = (
                        np.mean([leaves[j]["reward"] for j in x]) for x in (own, parent)
                    )
                    expected = value - value_of_parent
                    assert advantage == pytest.approx(expected, abs=1e-6)
                    seen.add(round(advantage, 3))
    assert len(seen) > 4


def test_a_test_that_a_fork_breaks_says_so(tmp_path_factory):
    """The recipe changes Eq. 3 on purpose: tests of Eq. 3 fail, and say that this is expected."""
    copy = forked(tmp_path_factory, 2)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pytest.ini", copy)
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_tree.py", "-k", "tree_by_hand"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and "holds the code to Eq. 3 of the paper" in done.stdout
    assert "A fork that changed it on purpose is expected to fail here" in done.stdout


def sharing(leaves: list[dict], i: int, t: int) -> tuple[list[int], list[int]]:
    """Leaves below the segment that holds token t of leaf i, and below that segment's parent."""
    leaf = leaves[i]
    family = [j for j, other in enumerate(leaves) if other["family"] == leaf["family"]]

    def below(position: int) -> list[int]:
        if leaf["start"] and position >= leaf["start"]:
            return [i]
        return [j for j in family if leaves[j]["start"] == 0 or leaves[j]["start"] > position]

    points = {leaves[j]["start"] for j in family if not leaf["start"] or leaves[j]["start"] <= leaf["start"]}
    first = max(point for point in points if point <= t)
    return below(t), below(first - 1) if first else list(range(len(leaves)))
