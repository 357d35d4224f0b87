"""`python experiments/show_fci.py` as a user runs it (Figure 2), Figures 3 (disruption), 4 (fci_density) and
1b and 6 to 9 (plot_runs), and what times whole runs (bench_run) and TRL (vs_trl)."""

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure

from attnrl import Rollout
from experiments import bench_run, disruption, fci_density, plot_runs, show_fci, vs_trl
from plumbing.learner import Learner
from plumbing.models import prompt_ids
from plumbing.settings import MachineConfig
from plumbing.torch_engine import TorchEngine
from train import parse_config
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
    (["--problem", "x", "--model", "tests"], "error: cannot load the tokenizer from 'tests'"),
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
    assert disruption.ratio(rows) == "0.50 ± 0.98" and disruption.ratio(rows[:1]) == "0.00 ± nan"
    assert disruption.ratio(rows[:0]) == disruption.ratio(rows * [1, 1, 0, 1]) == "–"


def test_interval_of_the_ratio_is_that_of_a_bootstrap():
    """It knows that both accuracies go together: if one is half the other in each problem, it is 0."""
    rng = np.random.default_rng(0)
    control = rng.uniform(0.2, 1, 300)
    rows = np.stack([np.arange(300), 0 * control, control, control / 2], axis=1)
    assert disruption.ratio(rows) == "0.50 ± 0.00"
    rows[:, 3] *= rng.integers(0, 2, 300)
    means = [rows[rng.integers(300, size=300), 2:].mean(0) for _ in range(4000)]
    half = 1.96 * np.std([disrupted / control for control, disrupted in means])
    ratio, interval = map(float, disruption.ratio(rows).split(" ± "))
    assert abs(ratio - rows[:, 3].sum() / control.sum()) < 0.006 and abs(interval - half) < 0.006 < half / 4


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


def test_every_hidden_step_has_its_samples(monkeypatch, capsys, tiny_tokenizer):
    """Where one of three continuations is right without a step, and all are with it, the table says so."""
    right, wrong = (tiny_tokenizer(word)["input_ids"] for word in ("find", "b"))
    drawn = Counter()

    def continue_without(model, engine, prefixes, spans, *settings):
        sampled = []
        for prefix, span in zip(map(tuple, prefixes), spans):
            drawn[prefix, span] += 1
            sampled.append(right if span is None or drawn[prefix, span] % 3 == 1 else wrong)
        return sampled

    def verdict(text, answers, judge=disruption.grade):
        known = {tiny_tokenizer.decode(right): True, tiny_tokenizer.decode(wrong): False}
        found = [value for ending, value in known.items() if text.endswith(ending)]
        return found[0] if found else judge(text, answers)

    monkeypatch.setattr(disruption, "continue_without", continue_without)
    monkeypatch.setattr(disruption, "grade", verdict)
    text = printed_by(monkeypatch, capsys, "disruption", *"--problems 12 --draws 1 --samples 3".split())
    rows = [line.split(" | ") for line in text.splitlines()[3:]]
    assert [row[0] for row in rows] == [f"| {name}" for name in disruption.CLASSES]
    assert all(row[2:6] == ["100.0", "33.3", "0.33 ± 0.00", "66.7 ± 0.0"] for row in rows)
    n = sum(int(row[1]) for row in rows)
    assert sum(drawn.values()) == 2 * 3 * n and n == 3 * int(re.search(r"(\d+) of 12", text)[1]) > 0


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


# --- Figures 1b and 6 to 9

LOGGED = [  # one run's metrics
    {"step": 0, "test_accuracy": 0.5, "test_stderr": 0.05, "test_accuracy_x": 0.25, "test_stderr_x": 0.1},
    {"step": 0, "reward": 0.25, "total_tokens": 10, "total_updates": 0},
    {"step": 1, "reward": 0.75, "mc_valid": None, "total_tokens": 30, "total_updates": 4},
    {"step": 2, "mc_valid": 0.5, "test_accuracy": 1.0, "test_stderr": 0.0}
    | {"total_tokens": 40, "total_updates": 8},
]


@pytest.fixture
def logged(tmp_path):
    """Directories of two runs; the second never branched."""
    for name, records in {"a": LOGGED, "b": LOGGED[:2]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/metrics.jsonl").write_text('{"step": 0}\n{"st')
    return tmp_path


def test_metrics_that_are_plotted_are_explained():
    text = (ROOT / "docs/metrics.md").read_text()
    for name in [*plot_runs.PANELS, *(metric for metric, _ in plot_runs.X.values())]:
        assert f"`{name}`" in text


def test_a_curve_is_what_was_measured():
    """Of what is missing or null, no point; the evaluation before training is at 0."""
    assert plot_runs.curve(LOGGED, "total_updates", "test_accuracy") == ([0, 8], [0.5, 1.0])
    assert plot_runs.curve(LOGGED, "total_tokens", "mc_valid") == ([40], [0.5])
    records = [{"x": i, "y": y} for i, y in enumerate([8, 4, 0, 2])]
    assert plot_runs.curve(records, "x", "y", smooth=3) == ([0, 1, 2, 3], [8, 6, 4, 2])


def test_panels_are_those_of_the_figures_with_data():
    runs = [LOGGED[:2], LOGGED]
    assert [*plot_runs.panels_of(runs, ["6", "7", "8"])] == ["test_accuracy", "mc_valid", "reward"]
    assert [*plot_runs.panels_of(runs, ["1b", "9"])] == ["test_accuracy", "test_accuracy_x"]
    assert plot_runs.panels_of([LOGGED[:3]], ["6", "7"]) == {}  # null is no data


def test_runs_are_overlaid(logged, monkeypatch, capsys):
    """In each panel one line per run, in the run's colour; one legend; an axis label that says "mean"."""
    figures, directories = [], [str(logged / name) for name in "ab"]
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **settings: figures.append(figure))
    flags = [*directories, "--labels", "A", "B", "--smooth", "2", "--x", "steps", "--out", "c.png"]
    assert printed_by(monkeypatch, capsys, "plot_runs", *flags) == "wrote c.png\n"
    (figure,) = figures
    assert [text.get_text() for text in figure.legends[0].texts] == ["A", "B"]
    assert "training steps (per-step metrics: mean of the last 2)" == figure.get_supxlabel()
    assert [axis.get_title("left") for axis in figure.axes] == [
        "Fig. 1b, 8: held-out problems",
        "Fig. 6: continuations mixed",
        "Fig. 8: reward in training",
        "Fig. 9: x",
    ]
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert all([line.get_color() for line in axis.lines] == colors for axis in figure.axes)
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert drawn[0] == [[[0, 0.5], [2, 1]], [[0, 0.5]]]  # evaluations are not smoothed
    assert drawn[1] == [[[2, 0.5]], []] and drawn[2] == [[[0, 0.25], [1, 0.5]], [[0, 0.25]]]
    (bar, of_certain), _ = [bars.get_segments() for bars in figure.axes[0].collections]
    assert np.allclose(bar, [[0, 0.5 - 0.098], [0, 0.5 + 0.098]])
    assert np.allclose(of_certain, [[2, 1], [2, 1]])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere"], "cannot read nowhere/metrics.jsonl"),
        (["a", "broken"], "cannot read broken/metrics.jsonl"),
        (["a", "b", "--labels", "A"], "2 runs, 1 labels"),
        (["a", "--smooth", "0"], "--smooth 0"),
        (["a", "--figure", "6", "7"], "no run has the metrics of Figure 7"),
        (["a", "--x", "problems"], "a has no metric total_problems: choose another --x"),
        (["a", "--out", "nowhere/a.png"], "cannot write nowhere/a.png"),
        (["a", "--out", "a.xyz"], "cannot write a.xyz"),
    ],
)
def test_bad_runs_get_one_sentence(flags, message, logged, monkeypatch):
    monkeypatch.chdir(logged)
    monkeypatch.setattr(sys, "argv", ["plot_runs.py", *flags])
    with pytest.raises(SystemExit) as caught:
        plot_runs.main()
    assert caught.value.code.startswith("error: ") and message in caught.value.code  # exit status 1


# --- Times of whole runs, and TRL's


def test_a_run_is_its_parts_and_the_rest():
    records = [
        {"step": 0, "total_tokens": 0},
        {"time_generate": 2.0, "time_score": 1.0, "time_step": 3.5, "total_tokens": 300},
        {"time_generate": 1.0, "time_update": 4.0, "time_push": 0.5, "total_tokens": 500},
    ]
    run = bench_run.of_metrics(10.0, records)
    expected = dict(generate=3.0, score=1.0, update=4.0, grade=0.0, push=0.5, rest=1.5)
    assert run.parts == expected and run.per_1000() == 20
    logged = (ROOT / "docs/metrics.md").read_text()
    assert all(f"`time_{part}`" in logged for part in bench_run.PARTS)


def test_the_two_of_a_pair_begin_in_turns(capsys):
    """In the order in which they ran; the report is by pair, with the ratio per token."""
    ran, lengths = [], {"old": iter([10.0, 30.0, 20.0]), "new": iter([5.0, 6.0, 2.0])}

    def measure(name):
        ran.append(name)
        seconds = next(lengths[name])
        return bench_run.Run(seconds, {"old": 1000, "new": 500}[name], {"rest": seconds})

    bench_run.report(["old", "new"], bench_run.in_pairs(3, lambda: measure("old"), lambda: measure("new")))
    assert ran == ["old", "new", "new", "old", "old", "new"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pair 1, old: 10.0 s, 1,000 tokens (10.0000 s per 1,000, 100 per second)"
    assert lines[-3:] == [
        "new / old, median of 3: 0.400 (0.200–1.000)",
        "old: rest 20.0 s",
        "new: rest 4.3 s",
    ]


def test_a_neighbour_is_busy_during_the_run_and_gone_afterwards(monkeypatch):
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: started.append(start(*args)) or started[-1])

    def train(tree, flags):
        assert tree == ROOT and flags == ["--steps", "1"] and started[0].poll() is None
        raise RuntimeError("a run that fails")

    monkeypatch.setattr(bench_run, "train", train)
    with pytest.raises(RuntimeError):
        bench_run.train_beside_a_neighbour(["--steps", "1"])
    assert started[0].returncode == -9


def test_a_failing_process_gets_one_sentence_and_no_number_of_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert bench_run.python(ROOT, "-c", "import os; print('OMP_NUM_THREADS' in os.environ)") == "False\n"
    with pytest.raises(SystemExit) as caught:
        bench_run.python(ROOT, "-c", "raise ValueError('why')")
    assert caught.value.code == f"error: {ROOT} failed: ValueError: why"


def test_the_sampling_that_is_timed_is_what_its_program_counts(monkeypatch, capsys):
    """One of its six rounds, with fewer problems."""
    monkeypatch.chdir(ROOT)
    program = bench_run.DECODE.replace("range(-1, 5)", "range(0, 1)").replace("[:16]", "[:2]")
    names = {}
    exec(program, names)
    run = bench_run.Run(**json.loads(capsys.readouterr().out))
    assert len(names["requests"]) == 12 and 0 < run.tokens <= 12 * 128 and run.seconds > 0
    assert run.tokens == sum(len(r.ids) for r in names["responses"])


def test_without_trl_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["vs_trl.py"])
    with pytest.raises(SystemExit) as caught:
        vs_trl.main()
    assert caught.value.code == "error: this needs TRL, which is not installed: pip install trl==1.16.0"


def test_ratios_to_trl_are_per_token():
    ours = dict(tokens=1000, sequences=96, updates=2, seconds=4.0, generate=1.0, grade=0.5, train=2.5)
    trl = dict(ours, tokens=2000, seconds=12.0, generate=8.0)
    pairs = [(ours, trl), (ours, dict(trl, seconds=24.0)), (ours, dict(trl, seconds=10.0))]
    assert vs_trl.ratio(pairs, "seconds") == "seconds 1.50 (1.25–3.00)"
    assert vs_trl.ratio(pairs, "generate") == "generate 4.00 (4.00–4.00)"
    counts = "TRL: 2,000 tokens, 96 sequences, 2 updates in 12.0 s"
    times = "seconds 6.000, generate 4.000, grade 0.250, train 1.250"
    assert vs_trl.row("TRL", trl) == f"{counts}; per 1,000 tokens {times}"


def test_our_side_counts_all_batches_but_the_first(tiny_tokenizer):
    """Of two batches of two problems one counts; nothing is dropped, and the parts add up."""
    sizes = "--batch_size 2 --minibatch_sequences 6 --max_response_tokens 32 --threads 1".split()
    run, cfg = parse_config([*vs_trl.FLAGS, *sizes])
    rows = [{"problem": PROBLEM, "answers": ["1"], "prompt_ids": prompt_ids(tiny_tokenizer, PROBLEM)}] * 4
    found = vs_trl.ours(run, cfg, rows, tiny_tokenizer)
    assert (found["sequences"], found["updates"]) == (12, 2) and 12 <= found["tokens"] <= 12 * 32
    parts = [found[name] for name in ("generate", "grade", "train")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(found["seconds"])


# --- All of them


def printed_by(monkeypatch, capsys, name, *flags):
    """What `python experiments/NAME.py FLAGS` prints; it must end well."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"experiments.{name}").main()
    return capsys.readouterr().out


PROGRAMS = [p.stem for p in sorted(ROOT.glob("experiments/*.py")) if "def main(" in p.read_text()]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_experiment_says_what_it_takes(name, monkeypatch, capsys):
    assert printed_by(monkeypatch, capsys, name, "--help").startswith("usage:")


def test_branch_points_has_a_row_for_every_rule(monkeypatch, capsys):
    """Rules of tree.py, each with shares of 100 %."""
    lines = printed_by(monkeypatch, capsys, "branch_points", "--problems", "12").splitlines()
    rows = {line[:16].strip(): re.findall(r"([0-9.]+)%", line) for line in lines[2:-1]}
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
