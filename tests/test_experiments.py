"""`python experiments/show_fci.py` as a user runs it (Figure 2), and Figures 3 (disruption) and 4
(fci_density)."""

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from attnrl import Rollout
from experiments import disruption, fci_density, show_fci
from plumbing.learner import Learner
from plumbing.models import prompt_ids
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from tree import RULES

PROBLEM = "a=1, b=a+5, c=b*6, d=c+1, e=d*5, f=e*4, g=f+c, h=g+c, i=h+2, j=i+e, k=j+f, l=k+c, find l."
STEPS = [
    "b=a+5: 1+5 so b=6",
    "c=b*6: 6*6 so c=1",
    "d=c+1: 1+1 so d=2",
    "e=d*5: 2*5 so e=3",
    "f=e*4: 3*4 so f=5",
    "g=f+c: 5+1 so g=6",
    "h=g+c: 6+1 so h=0",
]
RESPONSE = "".join(step + "\n\n" for step in STEPS)


def show(*flags, stdin=""):
    command = [sys.executable, "experiments/show_fci.py", *flags]
    settings = dict(capture_output=True, text=True, input=stdin, cwd=ROOT, encoding="utf-8")
    return subprocess.run(command, **settings)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One run of the program on a text: (standard output, page)."""
    out = tmp_path_factory.mktemp("fci")
    (out / "response.txt").write_text(RESPONSE)
    run = show("--problem", PROBLEM, "--text", str(out / "response.txt"), "--out", str(out / "page.html"))
    assert run.returncode == 0 and run.stderr == ""
    return run.stdout, (out / "page.html").read_text()


@pytest.mark.slow
def test_bars_fit_the_terminal(shown):
    """A line per step with its text, at most 80 columns, no escape codes; two branch points among the marked
    steps; the longest bar is the highest FCI."""
    lines = shown[0].splitlines()
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in shown[0]
    steps = [re.fullmatch(r" +(\d+) +(\d+) +(\d\.\d{3}) (█*) *(\*?)(>?) +(\S.*)", line) for line in lines]
    steps = [m.groups() for m in steps if m]
    assert [text for *_, text in steps] == STEPS
    assert [int(start) for _, start, *_ in steps] == [0, 4, 8, 12, 16, 20, 24]
    assert steps[0][2] == "0.000" and sum(mark == ">" for *_, mark, _ in steps) == 2
    bars = [len(bar) for _, _, _, bar, *_ in steps]
    assert max(bars) == show_fci.BAR and np.argmax(bars) == np.argmax([float(y) for _, _, y, *_ in steps])


@pytest.mark.slow
def test_page_is_self_contained(shown):
    page = shown[1]
    assert page.count("<svg") == 1 and "http://www.w3.org" in page
    assert "<script" not in page and "src=" not in page
    assert all(step in page for step in STEPS)


@pytest.mark.holds_the_paper("Eq. 6")
def test_scores_equal_the_naive_definition(tiny_model, tiny_tokenizer):
    """What is shown is FCI: eager attention, one block of tokens per step, Eq. 4-6."""
    prompt, response = prompt_ids(tiny_tokenizer, PROBLEM), tiny_tokenizer(RESPONSE)["input_ids"]
    learner = Learner(tiny_model, None, None, MachineConfig())
    s = show_fci.score(learner, tiny_tokenizer, prompt, response, show_fci.MethodConfig())
    tiny_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = tiny_model(torch.tensor([prompt + response]), output_attentions=True)
    attention = torch.cat(output.attentions)
    member = torch.zeros(len(prompt + response), 8)
    member[: len(prompt), 0] = 1
    for k in range(7):
        member[len(prompt) + 4 * k : len(prompt) + 4 * k + 4, k + 1] = 1
    mean = member / member.sum(0)
    expected = (mean.T @ attention @ mean).tril(-4).sum(2).amax((0, 1))[1:].numpy()
    np.testing.assert_allclose(s.fci[1:], expected[1:], atol=1e-6)
    assert s.fci[0] == 0 and s.fci[1] > 0
    assert s.top == np.flatnonzero((s.fci >= np.quantile(s.fci, 0.8)) & (s.fci > 0)).tolist()
    assert set(s.branches) <= set(range(1, 7))


def test_hostile_text_is_escaped(tmp_path, tiny_tokenizer):
    """Markup and TeX in a response neither break the page nor the picture, nor does a wide script overflow a
    line."""
    texts = ["<b>&\n\n", "$x_1", "很长" * 40, "\x1b[31m\x00 x", ""]
    s = show_fci.Scored(texts, [0, 1, 2, 3, 4], np.array([0.0, 2, 1, 3, 0]), [1, 3], [1, 3])
    show_fci.draw(s, tmp_path / "a.html", "<i>")
    show_fci.draw(s, tmp_path / "a.png", "<i>")
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "&lt;i&gt;" in page
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert show_fci.one_line(s.texts[2], 21) == "很长" * 5 + "…"
    assert show_fci.one_line(s.texts[3], 40) == "[31m x"


@pytest.mark.slow
def test_answers_first_and_survives_a_closed_pipe():
    program = f"{sys.executable} experiments/show_fci.py"
    command = f"{program} --problem '{PROBLEM}' --temperature 0 | head -2"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.count("\n") == 2 and run.stderr == ""


BAD_INPUT = [  # flags, message
    ([], "python experiments/show_fci.py: error: give --text FILE"),
    (["--text", "nowhere.txt"], "cannot read --text"),
    (["--text", "-"], "empty"),
    (["--problem", "x", "--out", "a.pdf"], "in .png or .html"),
    (["--problem", "x", "--out", "nowhere/a.png"], "in a folder that exists"),
    (["--problem", "x", "--model", "tests"], "error: the directory 'tests' holds no tokenizer that loads"),
    (["--problem", "a=1 " * 600], "shorten the problem"),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [BAD_INPUT[0], BAD_INPUT[-1]])
def test_bad_input_gets_one_sentence(flags, message):
    run = show(*flags)
    assert run.returncode and message in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("flags, message", BAD_INPUT)
def test_bad_input_is_found_by_main(flags, message, monkeypatch, capsys):
    """Each without a process of its own: the program ends with that sentence and a status that is not 0."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["experiments/show_fci.py", *flags])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as caught:
        show_fci.main()
    said = capsys.readouterr().err if caught.value.code == 2 else caught.value.code
    assert caught.value.code and message in said


# --- Figure 3


def test_hiding_nothing_changes_nothing_and_hiding_a_step_hides_it(tiny_model, tiny_tokenizer):
    """With no span, the first logits are those of the model; with one, those of a model that cannot look
    there."""
    engine = TorchEngine(tiny_model, tiny_tokenizer)
    prompts = [prompt_ids(tiny_tokenizer, PROBLEM), prompt_ids(tiny_tokenizer, PROBLEM[:20])]
    prefixes = [prompt + tiny_tokenizer(RESPONSE)["input_ids"] for prompt in prompts]
    spans = [(len(p) + 4, len(p) + 8) for p in prompts]
    seen = []
    keep = lambda module, args, output: seen.append(output[:, -1].clone())
    hook = tiny_model.get_output_embeddings().register_forward_hook(keep)
    disruption.continue_without(tiny_model, engine, prefixes, [None, spans[1]], 3, 1.0)
    hook.remove()
    for row, (prefix, hidden) in enumerate(zip(prefixes, [None, spans[1]])):
        cache = tiny_model(torch.tensor([prefix[:-1]])).past_key_values  # read with everything in sight
        mask = torch.ones(1, len(prefix), dtype=torch.long)
        if hidden:
            mask[0, slice(*hidden)] = 0
        position = torch.tensor([[len(prefix) - 1]])
        settings = dict(attention_mask=mask, position_ids=position, past_key_values=cache)
        expected = tiny_model(torch.tensor([prefix[-1:]]), **settings).logits[0, -1]
        torch.testing.assert_close(seen[-3][row], expected, atol=1e-4, rtol=1e-4)
        plain = tiny_model(torch.tensor([prefix])).logits[0, -1]
        assert torch.allclose(expected, plain, atol=1e-4) == (hidden is None)


def test_classes_are_disjoint_shares():
    fci, entropies = np.arange(12)[::-1] / 4, np.r_[np.zeros(33), np.ones(3)]
    steps = [(3 * k, 3 * k + 3) for k in range(12)]
    classes = disruption.classes_of(fci, entropies, steps, 11, 0.2)
    assert classes["FCI top 20 %"].tolist() == [1, 2]
    assert classes["FCI other 80 %"].tolist() == list(range(3, 11))
    assert disruption.classes_of(fci, entropies, steps, 12, 0.2)["entropy top 20 %"].tolist()[-1] == 11
    assert disruption.classes_of(fci, entropies, steps, 2, 0.2) == {}
    nobody = disruption.classes_of(np.zeros(12), entropies, steps, 11, 0.2)
    assert nobody["FCI top 20 %"].tolist() == [] and nobody["FCI other 80 %"].tolist() == list(range(1, 11))


def test_interval_counts_problems_not_draws():
    rows = np.array([(0, 0, 1, 0), (1, 0, 1, 1)] * 50)
    assert disruption.loss(rows) == "50.0 ± 98.0"
    assert disruption.loss(rows[:1]) == "100.0 ± nan" and disruption.loss(rows[:0]) == "–"


def test_a_response_is_cut_some_steps_after_the_hidden_one():
    """Prefix and span of each cut, by hand: 12 steps of 3 tokens, the answer from step 11 on."""
    ids, prompt = list(range(100, 136)), [7] * 5
    rollout = Rollout(family=0, ids=ids, steps=[(3 * k, 3 * k + 3) for k in range(12)], n_scored=11)
    rollout.fci, rollout.entropies = (np.arange(12)[::-1] / 4).tolist(), np.linspace(1, 0, 36)
    problems = [{"prompt_ids": prompt}]
    for distance in (1, 4):
        rng = np.random.default_rng(0)
        cuts = disruption.choose_cuts([(0, rollout)], problems, 0.2, 30, distance, rng)
        assert {cut.kind for cut in cuts} == set(disruption.CLASSES) and len(cuts) == 90
        hidden = set()
        for cut in cuts:
            k = (cut.span[0] - 5) // 3
            hidden.add(k)
            assert cut.span == (5 + 3 * k, 8 + 3 * k) and cut.fifth == 5 * 3 * k // 36
            assert (cut.prompt_ids, cut.prefix) == (prompt, ids[: 3 * (k + distance)])
        assert hidden == set(range(1, 11 - distance + 1))  # a scored step must follow


# --- Figure 4


def test_density_sorts_problems_by_kind(tmp_path):
    sampled = {
        "problem_fci": [1.0, 2.0, 3.0, 4.0],
        "problem_initial_reward": [0.0, 1.0, 0.0, 0.5],
        "problem_valid": [False, True, True, True],
    }
    records = [{"step": 0, "test_accuracy": 0.5}, sampled]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    groups = fci_density.collect([tmp_path])
    assert [x.tolist() for x in groups["all"].values()] == [[1, 2, 3], [1], [2, 3]]
    assert [x.tolist() for x in groups["all wrong"].values()] == [[1, 3], [1], [3]]


def test_density_integrates_to_one_and_superiority_is_a_probability():
    values, x = np.random.default_rng(0).normal(3, 2, 200), np.linspace(-15, 20, 4000)
    y = fci_density.density(values, x)
    assert abs(np.sum(y) * (x[1] - x[0]) - 1) < 1e-3 and abs(x[y.argmax()] - 3) < 1
    assert fci_density.superiority(np.array([2, 3]), np.array([0, 1])) == 1
    assert fci_density.superiority(np.array([1.0]), np.array([1.0, 2.0])) == 0.25


# --- All of them


def printed_by(monkeypatch, capsys, name, *flags):
    """What `python experiments/NAME.py FLAGS` prints; it must end well."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"experiments.{name}").main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("*.py")))
def test_each_experiment_says_what_it_takes(name, monkeypatch, capsys):
    assert printed_by(monkeypatch, capsys, name, "--help").startswith("usage:")


def test_branch_points_has_a_row_for_every_rule(monkeypatch, capsys):
    """Rules of tree.py, each with shares of 100 %."""
    lines = printed_by(monkeypatch, capsys, "branch_points", "--problems", "12").splitlines()
    rows = {line[:10].strip(): re.findall(r"([0-9.]+)%", line) for line in lines[2:-1]}
    assert list(rows) == ["all steps", *RULES]
    assert all(abs(sum(map(float, shares)) - 100) < 0.3 for shares in rows.values())


@pytest.mark.slow
def test_bench_step_accounts_for_the_parts_of_a_step(monkeypatch, capsys):
    flags = "--bench_steps 1 --batch_size 4 --min_batch_size 2 --max_batch_size 6 --group_size 3".split()
    text = printed_by(monkeypatch, capsys, "bench_step", *flags)
    shares = next(line for line in text.splitlines() if line.startswith("share of the step"))
    parts = {name: float(share) for name, share in re.findall(r"(\w+) ([0-9.]+)%", shares)}
    assert list(parts) == ["generate", "grade", "score", "reference", "update", "push"]
    assert min(parts.values()) >= 0 and 0 < sum(parts.values()) < 101
    assert re.search(r"generating 12 responses and [1-9]\d* continuations in two calls takes", text)
