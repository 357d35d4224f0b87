"""`python fci.py` as a user runs it, and the figures of the paper: Figure 2 (show_fci), 3 (disruption), 4 (fci_density)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import disruption, fci_density, show_fci
from sampler import TorchEngine, prompt_ids

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = "a=1, b=a+5, c=b*6, d=c+1, e=d*5, f=e*4, g=f+c, h=g+c, i=h+2, j=i+e, k=j+f, l=k+c, find l."
RESPONSE = "b=a+5: 1+5 so b=6\n\nc=b*6: 6*6 so c=1\n\nd=c+1: 1+1 so d=2\n\ne=d*5: 2*5 so e=3\n\nf=e*4: 3*4 so f=5\n\ng=f+c: 5+1 so g=6\n\nh=g+c: 6+1 so h=0\n\n"


def show(*flags, stdin=""):
    return subprocess.run(
        [sys.executable, ROOT / "fci.py", *flags], capture_output=True, text=True, input=stdin, cwd=ROOT, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One run of the program on a text: (standard output, page)."""
    out = tmp_path_factory.mktemp("fci")
    (out / "response.txt").write_text(RESPONSE)
    run = show("--problem", PROBLEM, "--text", str(out / "response.txt"), "--out", str(out / "page.html"))
    assert run.returncode == 0 and run.stderr == ""
    return run.stdout, (out / "page.html").read_text()


def test_bars_fit_the_terminal(shown):
    """A line a step with its text, at most 80 columns, no escape codes; two branch points among the marked steps; the longest bar is the highest FCI."""
    lines = shown[0].splitlines()
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in shown[0]
    steps = [re.fullmatch(r" +(\d+) +(\d+) +(\d\.\d{3}) (█*) *(\*?)(>?) +(\S.*)", line) for line in lines]
    steps = [m.groups() for m in steps if m]
    assert [text for *_, text in steps] == RESPONSE.strip().split("\n\n")
    assert [int(start) for _, start, *_ in steps] == [0, 4, 8, 12, 16, 20, 24]
    assert steps[0][2] == "0.000" and sum(mark == ">" for *_, mark, _ in steps) == 2
    bars = [len(bar) for _, _, _, bar, *_ in steps]
    assert max(bars) == show_fci.BAR and np.argmax(bars) == np.argmax([float(y) for _, _, y, *_ in steps])


def test_page_is_self_contained(shown):
    page = shown[1]
    assert page.count("<svg") == 1 and "http://www.w3.org" in page and "<script" not in page and "src=" not in page
    assert all(step in page for step in RESPONSE.strip().split("\n\n"))


def test_scores_equal_the_naive_definition(tiny_model, tiny_tokenizer):
    """What is shown is FCI: eager attention, a step a block, Eq. 4-6."""
    prompt, response = prompt_ids(tiny_tokenizer, PROBLEM), tiny_tokenizer(RESPONSE)["input_ids"]
    s = show_fci.score(tiny_model, tiny_tokenizer, prompt, response, show_fci.MethodConfig())
    tiny_model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.cat(tiny_model(torch.tensor([prompt + response]), output_attentions=True).attentions)
    member = torch.zeros(len(prompt + response), 8)
    member[: len(prompt), 0] = 1
    for k in range(7):
        member[len(prompt) + 4 * k : len(prompt) + 4 * k + 4, k + 1] = 1
    mean = member / member.sum(0)
    expected = (mean.T @ attention @ mean).tril(-4).sum(2).amax((0, 1))[1:].numpy()
    np.testing.assert_allclose(s.fci[1:], expected[1:], atol=1e-6)
    assert s.fci[0] == 0 and s.fci[1] > 0
    assert s.top == np.flatnonzero((s.fci >= np.quantile(s.fci, 0.8)) & (s.fci > 0)).tolist() and set(s.branches) <= set(range(1, 7))


def test_hostile_text_is_escaped(tmp_path, tiny_tokenizer):
    """Markup and TeX in a response neither break the page nor the picture, nor does a wide script overflow a line."""
    s = show_fci.Scored(
        ["<b>&\n\n", "$x_1", "很长" * 40, "\x1b[31m\x00 x", ""], [0, 1, 2, 3, 4], np.array([0.0, 2, 1, 3, 0]), [1, 3], [1, 3]
    )
    show_fci.draw(s, tmp_path / "a.html", "<i>")
    show_fci.draw(s, tmp_path / "a.png", "<i>")
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "&lt;i&gt;" in page
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert show_fci.one_line(s.texts[2], 21) == "很长" * 5 + "…" and show_fci.one_line(s.texts[3], 40) == "[31m x"


def test_answers_first_and_survives_a_closed_pipe():
    command = f"{sys.executable} {ROOT / 'fci.py'} --problem '{PROBLEM}' --temperature 0 | head -2"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.count("\n") == 2 and run.stderr == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --text FILE"),
        (["--text", "nowhere.txt"], "cannot read --text"),
        (["--text", "-"], "empty"),
        (["--problem", "x", "--out", "a.pdf"], "in .png or .html"),
        (["--problem", "x", "--out", "nowhere/a.png"], "in a folder that exists"),
        (["--problem", "x", "--model", "tests"], "error: the directory 'tests' holds no tokenizer that loads"),
        (["--problem", "a=1 " * 600], "shorten the problem"),
    ],
)
def test_bad_input_gets_one_sentence(flags, message):
    run = show(*flags)
    assert run.returncode and message in run.stderr and "Traceback" not in run.stderr


# --- Figure 3


def test_hiding_nothing_changes_nothing_and_hiding_a_step_hides_it(tiny_model, tiny_tokenizer):
    """Greedy continuations: with no span those of the engine; with one, the first log-probs are those of a model that cannot look there."""
    engine = TorchEngine(tiny_model, tiny_tokenizer)
    prompts = [prompt_ids(tiny_tokenizer, PROBLEM), prompt_ids(tiny_tokenizer, PROBLEM[:20])]
    prefixes = [prompt + tiny_tokenizer(RESPONSE)["input_ids"] for prompt in prompts]
    spans = [(len(p) + 4, len(p) + 8) for p in prompts]
    seen = []
    hook = tiny_model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output[:, -1].clone()))
    disruption.continue_without(tiny_model, engine, prefixes, [None, spans[1]], 3, 1.0)
    hook.remove()
    for row, (prefix, hidden) in enumerate(zip(prefixes, [None, spans[1]])):
        cache = tiny_model(torch.tensor([prefix[:-1]])).past_key_values  # read with everything in sight
        mask = torch.ones(1, len(prefix), dtype=torch.long)
        if hidden:
            mask[0, slice(*hidden)] = 0
        settings = dict(attention_mask=mask, position_ids=torch.tensor([[len(prefix) - 1]]), past_key_values=cache)
        expected = tiny_model(torch.tensor([prefix[-1:]]), **settings).logits[0, -1]
        torch.testing.assert_close(seen[-3][row], expected, atol=1e-4, rtol=1e-4)
        plain = tiny_model(torch.tensor([prefix])).logits[0, -1]
        assert torch.allclose(expected, plain, atol=1e-4) == (hidden is None)


def test_classes_are_disjoint_shares():
    fci, entropies = np.arange(12)[::-1] / 4, np.r_[np.zeros(33), np.ones(3)]
    steps = [(3 * k, 3 * k + 3) for k in range(12)]
    classes = disruption.classes_of(fci, entropies, steps, 11, 0.2)
    assert classes["FCI top 20 %"].tolist() == [1, 2] and classes["FCI other 80 %"].tolist() == list(range(3, 11))
    assert disruption.classes_of(fci, entropies, steps, 12, 0.2)["entropy top 20 %"].tolist()[-1] == 11
    assert disruption.classes_of(fci, entropies, steps, 2, 0.2) == {}
    nobody = disruption.classes_of(np.zeros(12), entropies, steps, 11, 0.2)
    assert nobody["FCI top 20 %"].tolist() == [] and nobody["FCI other 80 %"].tolist() == list(range(1, 11))


def test_interval_counts_problems_not_draws():
    rows = np.array([(0, 0, 1, 0), (1, 0, 1, 1)] * 50)
    assert disruption.loss(rows) == "50.0 ± 98.0" and disruption.loss(rows[:1]) == "100.0 ± nan" and disruption.loss(rows[:0]) == "–"


# --- Figure 4


def test_density_sorts_problems_by_kind(tmp_path):
    records = [
        {"step": 0, "test_accuracy": 0.5},
        {"problem_fci": [1.0, 2.0, 3.0, 4.0], "problem_initial_reward": [0.0, 1.0, 0.0, 0.5], "problem_valid": [False, True, True, True]},
    ]
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
