"""experiments/gradients.py: the gradient of a batch, the controls, and the statistics, by hand."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY
from test_experiments import printed_by

from experiments.gradient_report import consistency, jackknife
from experiments.gradients import ARMS, Bench, by_place, centred, credit, once, profile_of
from plumbing.problems import stream
from tree import RULES, Leaf, group_advantages, tree_advantages


@pytest.fixture(scope="module", autouse=True)
def rules():
    """The oracle is a rule in here only."""
    yield
    RULES.pop("oracle", None)


@pytest.fixture(scope="module")
def grown():
    """(bench, two problems branched by FCI)."""
    torch.manual_seed(0)
    bench = Bench(str(TINY))
    pool = bench.sample(stream(bench.rows, 0, 0, 4), 6, ["sum"])
    problems = [p for p in bench.grow(pool, "fci", 0) if p.mixed()][:2]
    assert len(problems) == 2 and all(p.branches for p in problems)
    return bench, problems


def test_the_gradient_is_that_of_the_sum_of_advantage_times_log_prob(grown):
    """Of Eq. 1 at ratio 1, over the number of response tokens of sequences that have an advantage."""
    bench, problems = grown
    advantages = credit(problems, tree_advantages)
    ours = bench.gradient(problems, advantages)
    model = bench.model.eval()
    total, n = 0.0, 0
    for problem, of_problem in zip(problems, advantages):
        for rollout, a in zip(problem.rollouts, of_problem):
            if a.any():
                ids, prompt = problem.prompt_ids + rollout.ids, len(problem.prompt_ids)
                logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                own = logps.gather(1, torch.tensor(ids[1:])[:, None])[prompt - 1 :, 0]
                total, n = total - (torch.tensor(a) * own).sum(), n + len(rollout.ids)
    expected = torch.autograd.grad(total / n, list(model.parameters()))
    expected = torch.cat([g.flatten() for g in expected]).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max() * 10)
    assert np.linalg.norm(ours) > 0


def test_all_rules_start_from_the_same_responses(grown):
    bench, _ = grown
    pool = bench.sample(stream(bench.rows, 0, 0, 2), 6, ["sum", "mean", "window"])
    for rule in ("fci_mean", "late", "oracle", "entropy"):
        for before, after in zip(pool, bench.grow(pool, rule, 0)):
            assert after.rollouts[:6] == before.rollouts and len(before.rollouts) == 6
            assert len(after.rollouts) == 6 + 2 * len(after.branches)


LEAVES = [Leaf(0, 0, 20, 1.0), Leaf(0, 10, 20, 0.0), Leaf(0, 10, 30, 0.0), Leaf(1, 0, 10, 0.0)]


def test_a_shared_prefix_counts_once():
    """Three leaves share the first ten tokens: a third of Eq. 3 each; their own tokens as they are."""
    plain, shared = tree_advantages(LEAVES), once(LEAVES)
    for i in range(3):
        np.testing.assert_allclose(shared[i][:10], plain[i][:10] / 3)
        np.testing.assert_allclose(shared[i][10:], plain[i][10:])
    np.testing.assert_allclose(shared[3], plain[3])


def test_plain_and_weighted_group_advantages():
    assert [a[0] for a in centred(LEAVES)] == [0.75, -0.25, -0.25, -0.25]
    weighted = by_place(LEAVES, [0.5] * 5 + [2.0] * 5)
    for ours, plain in zip(weighted, group_advantages(LEAVES)):
        half = len(plain) // 2
        np.testing.assert_allclose(ours[:half], plain[:half] / 2)
        np.testing.assert_allclose(ours[half:], plain[half:] * 2)


def test_profile_has_mean_one_per_token(grown):
    profile = np.array(profile_of(grown[1]))
    assert len(profile) == 10 and (profile > 0).all() and 0.9 < profile.mean() < 1.1


def test_consistency_and_its_jackknife():
    """Vectors s + noise in many dimensions: c is |s|^2 / (|s|^2 + |noise|^2); without a signal it is 0 within
    its error; a jackknife of a mean is the usual standard error."""
    rng = np.random.default_rng(0)
    noise, signal = rng.normal(size=(60, 4000)), np.zeros(4000)
    signal[0] = 4000**0.5 / 2  # a quarter of the noise's power
    for s, expected in ((signal, 0.2), (0 * signal, 0.0)):
        u = noise + s
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        gram = u @ u.T
        value, error = jackknife(lambda kept, g=gram: consistency(g[np.ix_(kept, kept)]), 60)
        assert abs(value - expected) < 4 * error and 0 < error < 0.02
    x = rng.normal(size=50)
    value, error = jackknife(lambda kept: float(x[kept].mean()), 50)
    assert value == pytest.approx(x.mean()) and error == pytest.approx(x.std(ddof=1) / 50**0.5)


@pytest.mark.slow
def test_a_small_run_goes_on_and_reports_every_row(monkeypatch, capsys, tmp_path):
    flags = f"--policies {TINY} --names base --batches 3 --tokens 3000 --jobs 1 --out {tmp_path}".split()
    text = printed_by(monkeypatch, capsys, "gradients", *flags)
    rows = re.findall(r"^\| (.+?) \| [0-9]+,[0-9]{3} \| ", text, re.MULTILINE)
    assert rows == ARMS * 2  # two metrics
    first = (tmp_path / "base/0.npy").stat().st_mtime_ns
    (tmp_path / "base/2.json").unlink()  # as if it had been killed there
    again = printed_by(monkeypatch, capsys, "gradients", *flags)
    assert again == text and (tmp_path / "base/0.npy").stat().st_mtime_ns == first
    found = json.loads((tmp_path / "results.json").read_text())["base"]
    assert (
        found["batches"] == 3 and found["why"]["oracle"]["points_pivotal"] == found["why"]["oracle"]["points"]
    )
