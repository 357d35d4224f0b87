"""FCI against a double loop over `output_attentions`, causality, ranges, memory."""

import inspect
import textwrap

import numpy as np
import pytest
import torch
from helpers import CONFIGS, HEAD_DIM, SHAPE, VOCABULARY, random_ids, random_model, random_steps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fci
from fci import (
    ATTENTION,
    PADDING,
    StepHook,
    count_scored_steps,
    fci_of_response,
    split_steps,
    step_attention,
    step_ids_of,
)
from plumbing import models
from plumbing.projection import collate, token_logps
from tree import Measured, branch_points

# heads that share a key: none, two, all
KEY_HEADS = {"mistral, sliding": 4, "qwen2": 2, "llama, grouped queries": 1}


@torch.no_grad()
def naive_y(model, ids, step_ids, delta, later="sum"):
    """Eq. 4 and 5 as written, or their variants, from materialised attention: (heads of all layers, S)."""
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    A = torch.cat([layer[0] for layer in attentions]).float().numpy()  # (heads of all layers, L, L)
    step_ids = np.array(step_ids)
    S = step_ids.max() + 1
    y = np.zeros((len(A), S))
    for k in range(S):
        last = k + 2 * delta if later == "window" else S - 1
        terms = [
            A[:, step_ids == j][:, :, step_ids == k].mean((1, 2)) for j in range(k + delta, S) if j <= last
        ]
        if terms:
            y[:, k] = np.mean(terms, 0) if later == "mean" else np.sum(terms, 0)
    return torch.tensor(y, dtype=torch.float32)


def naive_fci(model, ids, step_ids, delta, later="sum"):
    """Eq. 4-6 as written: (S,)."""
    return naive_y(model, ids, step_ids, delta, later).amax(0)  # Eq. 6


@torch.no_grad()
def batched_fci(model, rows, step_ids, delta=4, later="sum"):
    """As `Learner.score`: right-padded, no padding mask."""
    hook = StepHook(collate(step_ids, PADDING, "cpu"), delta, later)
    model.base_model(input_ids=collate(rows, 0, "cpu"), use_cache=False, step_hook=hook)
    return hook.fci()


class Rows(StepHook):
    """Keeps every layer's step attention."""

    def __init__(self, *args):
        super().__init__(*args)
        self.alphas = []

    def add_layer(self, query, key, mask, scale):
        self.alphas.append(step_attention(query, key, self.step_ids, self.n_steps, mask, scale))
        super().add_layer(query, key, mask, scale)


@torch.no_grad()
def model_rows(model, ids, step_ids):
    """Step attention of all layers of one sequence: (layers, H, S, S)."""
    hook = Rows(torch.tensor([step_ids]))
    model(torch.tensor([ids]), step_hook=hook)
    return torch.cat(hook.alphas)


def random_qk(L, d=8, heads=4, kv_heads=2, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    query = sharpness * torch.randn(1, heads, L, d, generator=generator)
    return query, torch.randn(1, kv_heads, L, d, generator=generator)


# --- Against the definition


@pytest.mark.holds_the_paper("Eq. 6")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("delta", "later"), [(1, "sum"), (4, "sum"), (4, "mean"), (2, "window")])
def test_batch_equals_naive_single_runs(name, delta, later):
    """Every row of a right-padded batch equals the un-padded double loop; more steps than a head is wide,
    spans of one token."""
    generator = torch.Generator().manual_seed(7 * delta)
    model = random_model(name, seed=delta)
    rows, step_ids = [], []
    # the longest need not come first; 140: 18 passes of 8 steps
    for n_steps in (HEAD_DIM[name] + 4, 3, 12, 1, 140):
        prompt = 1 + int(torch.randint(5, (1,), generator=generator))
        step_ids.append(step_ids_of(prompt, random_steps(n_steps, generator)))
        rows.append(random_ids(len(step_ids[-1]), generator))
    values = batched_fci(model, rows, step_ids, delta, later)
    model.set_attn_implementation("eager")
    for row, ids, steps in zip(values, rows, step_ids):
        expected = naive_fci(model, ids, steps, delta, later)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=0)
        assert not row[len(expected) :].any()  # steps that this row does not have
    assert (values > 0.05).any()


@pytest.mark.holds_the_paper("Eq. 6")
def test_scoring_pass_equals_naive():
    """FCI collected by `token_logps`, the pass that training uses, is the naive one."""
    generator = torch.Generator().manual_seed(0)
    model = random_model("qwen2")
    batch = [(random_ids(p, generator), random_ids(r, generator)) for p, r in ((4, 30), (2, 9), (7, 17))]
    step_ids = [step_ids_of(len(p), [(i, i + 1) for i in range(len(r))]) for p, r in batch]
    hook = StepHook(collate(step_ids, PADDING, "cpu"))
    with torch.no_grad():
        token_logps(model, batch, 1.0, 16, hook, with_entropy=True)
    model.set_attn_implementation("eager")
    for row, (prompt, response), steps in zip(hook.fci(), batch, step_ids):
        expected = naive_fci(model, prompt + response, steps, 4)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=0)


@pytest.mark.holds_the_paper("Eq. 6")
@pytest.mark.parametrize("think_end", [None, 20, 33])
def test_scores_of_a_response(think_end):
    """From token texts to (T,) scores, with and without `</think>`: the naive ones, 0 for step 1 and from
    `</think>` on."""
    generator = torch.Generator().manual_seed(2)
    texts = ["x", "y", ".\n\n"] * 13
    if think_end:
        texts[think_end] = "</think>"
    ids, steps, model = random_ids(5 + len(texts), generator), split_steps(texts), random_model("qwen2")
    step_ids = step_ids_of(5, steps)
    n_scored = count_scored_steps(texts, steps)
    scores = fci_of_response(batched_fci(model, [ids], [step_ids])[0], n_scored, len(steps))
    assert all(type(y) is float for y in scores)
    scores = torch.tensor(scores)
    model.set_attn_implementation("eager")
    expected = naive_fci(model, ids, step_ids, 4)[1:]
    thinking = next((k for k, (_, end) in enumerate(steps) if think_end and end > think_end), len(steps))
    torch.testing.assert_close(scores[1:thinking], expected[1:thinking], atol=1e-5, rtol=0)
    assert scores[0] == 0 and not scores[thinking:].any() and (expected[thinking : len(steps) - 4] > 0).all()
    assert len(scores) == len(steps) and (scores[1 : min(thinking, len(steps) - 4)] > 0).all()


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_bf16_kernel_against_fp32(sharpness):
    """The same queries and keys, bf16: FCI is within 1 % of that of an fp32 kernel, wherever it is not
    tiny."""
    step_ids = torch.tensor([step_ids_of(8, random_steps(300, torch.Generator().manual_seed(5)))])
    query, key = (x.bfloat16() for x in random_qk(step_ids.shape[1], d=64, sharpness=sharpness))
    half, single = StepHook(step_ids), StepHook(step_ids)
    half.add_layer(query, key, None, None)
    single.add_layer(query.float(), key.float(), None, None)
    assert half.fci().dtype == torch.float32
    torch.testing.assert_close(half.fci(), single.fci(), atol=1e-3, rtol=1e-2)
    assert not torch.equal(half.fci(), single.fci())


@pytest.mark.holds_the_paper("Eq. 6")
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_model_branches_where_fp32_does(name):
    """A whole model in bf16 rounds its hidden states too: FCI moves by up to 15 %, the branch points stay
    (measured: all of them)."""
    same = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        steps, model = random_steps(40, generator, longest=6), random_model(name, seed)
        step_ids = step_ids_of(5, steps)
        ids = random_ids(len(step_ids), generator)
        single = batched_fci(model, [ids], [step_ids])[0]
        half = batched_fci(model.bfloat16(), [ids], [step_ids])[0]
        assert ((half - single).abs() <= 0.15 * single.clamp(min=0.1)).all()
        model.set_attn_implementation("eager")
        naive = naive_fci(model, ids, step_ids, 4)
        assert ((half - naive).abs() <= 0.15 * naive.clamp(min=0.1)).all()
        points = []
        for values in (half, single, naive):
            scores, starts = np.array(fci_of_response(values, 40, 40)), [a for a, _ in steps]
            response = Measured(["…"] * 40, starts, scores, np.zeros(len(ids) - 5), 1.0, 40)
            points.append(branch_points("fci", response, 2, 0.2, 0, None))
        same += points[0] == points[1] == points[2]
    assert same >= 5


def test_step_attention_by_hand():
    """Two equal keys share the attention evenly: the means over steps are literal fractions."""
    query, key = torch.zeros(2, 1, 1, 4, 2)  # token i attends to tokens 0..i with 1 / (i + 1)
    alpha = step_attention(query, key, torch.tensor([[0, 1, 1, 2]]), 3)
    step_1 = (1 / 2 + 1 / 3) / 2  # to the prompt's token
    inside = (1 / 2 + 0 + 1 / 3 + 1 / 3) / 4
    expected = torch.tensor([[1, 0, 0], [step_1, inside, 0], [1 / 4, 1 / 4, 1 / 4]])
    torch.testing.assert_close(alpha[0, 0], expected)


@pytest.mark.parametrize("delta", [1, 4, 6])
def test_fci_counts_the_later_steps_that_look_back(delta):
    """All attention on one single-token step k: FCI[k] is the number of steps j >= k + delta, and 0
    elsewhere."""
    T, k = 12, 3
    query, key = torch.zeros(1, 1, T + 1, 4), torch.zeros(1, 1, T + 1, 4)
    query[..., 0], key[:, :, k, 0] = 100.0, 100.0
    hook = StepHook(torch.arange(T + 1)[None], delta)
    hook.add_layer(query, key, None, None)
    assert hook.fci()[0, k] == T - (k + delta) + 1
    assert not hook.fci()[0, k + 1 :].any()


@pytest.mark.holds_the_paper("Eq. 6")
def test_max_over_layers_and_heads():
    """Eq. 6: adding a layer can only raise FCI, to the larger of the two; each layer's value is that of its
    best head."""
    step_ids = torch.arange(20)[None]
    layers = [random_qk(20, seed=seed) for seed in (1, 2)]
    single = []
    for query, key in layers:
        hook = StepHook(step_ids)
        hook.add_layer(query, key, None, None)
        single.append(hook.fci())
        heads = []
        for h in range(query.shape[1]):
            one = StepHook(step_ids)
            one.add_layer(query[:, h : h + 1], key[:, h // 2 : h // 2 + 1], None, None)  # two queries a key
            heads.append(one.fci())
        torch.testing.assert_close(torch.stack(heads).amax(0), hook.fci())
    both = StepHook(step_ids)
    for query, key in layers:
        both.add_layer(query, key, None, None)
    assert torch.equal(both.fci(), torch.maximum(*single))
    assert not torch.equal(both.fci(), single[0]) and not torch.equal(both.fci(), single[1])


@pytest.mark.holds_the_paper("Eq. 6")
@pytest.mark.parametrize("name, key_heads", KEY_HEADS.items())
def test_eq_6_is_one_reduction(name, key_heads, monkeypatch):
    """`amax` edited to `mean` is the mean over all heads of all layers, however many heads share a key."""
    source = textwrap.dedent(inspect.getsource(StepHook.fci))
    assert source.count("amax") == 1
    edited = {}
    exec(source.replace("amax", "mean"), vars(fci), edited)
    generator = torch.Generator().manual_seed(key_heads)
    model = random_model(name, seed=key_heads)
    assert model.config.num_key_value_heads == key_heads
    rows, step_ids = [], []
    for n_steps in (6, HEAD_DIM[name] + 9):
        step_ids.append(step_ids_of(3, random_steps(n_steps, generator)))
        rows.append(random_ids(len(step_ids[-1]), generator))
    largest = batched_fci(model, rows, step_ids)
    monkeypatch.setattr(StepHook, "fci", edited["fci"])
    mean = batched_fci(model, rows, step_ids)
    model.set_attn_implementation("eager")
    for ids, steps, ours, ours_max in zip(rows, step_ids, mean, largest):
        y = naive_y(model, ids, steps, 4)
        assert len(y) == SHAPE["num_hidden_layers"] * SHAPE["num_attention_heads"]
        torch.testing.assert_close(ours[: y.shape[1]], y.mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours_max[: y.shape[1]], y.amax(0), atol=1e-5, rtol=0)
        assert (y.amax(0) - y.mean(0)).max() > 0.05


# --- Laws


@pytest.mark.parametrize("seed", range(5))
def test_weighted_rows_sum_to_one(seed):
    """Attention is a distribution: sum over k of alpha[j, k] * tokens of k is 1, next to padding too."""
    generator = torch.Generator().manual_seed(seed)
    step_ids = torch.tensor([step_ids_of(3, random_steps(20, generator)) + [PADDING] * 5])
    query, key = random_qk(step_ids.shape[1], seed=seed)
    size = torch.bincount(step_ids[step_ids != PADDING]).float()
    sums = (step_attention(query, key, step_ids, 21) * size).sum(-1)  # (1, H, S)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sharpness", [0.0, 2.0, 50.0])
def test_range(sharpness):
    """FCI is in [0, T], and exactly 0 for the last delta steps, that nothing can count for."""
    T = 30
    for seed in range(5):
        hook = StepHook(torch.tensor([step_ids_of(4, random_steps(T, torch.Generator().manual_seed(seed)))]))
        query, key = random_qk(hook.step_ids.shape[1], seed=seed, sharpness=sharpness)
        hook.add_layer(query, key, None, None)
        assert (hook.fci() >= 0).all() and (hook.fci() <= T).all()
        assert not hook.fci()[0, T - 3 :].any() and (hook.fci()[0, : T - 3] > 0).any()


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_fewer_steps_than_delta_score_zero(n_steps):
    model = random_model("qwen2")
    steps = random_steps(n_steps, torch.Generator().manual_seed(n_steps))
    step_ids = step_ids_of(5, steps)
    values = batched_fci(model, [list(range(len(step_ids)))], [step_ids])[0]
    assert values.shape == (n_steps + 1,) and values.isfinite().all()
    assert fci_of_response(values, n_steps, n_steps) == [0] * n_steps


@pytest.mark.parametrize("name", CONFIGS)
def test_causality(name):
    """A changed token alters its step's row of some layer, and no row of an earlier step."""
    generator = torch.Generator().manual_seed(3)
    steps = random_steps(14, generator)
    step_ids, model = step_ids_of(4, steps), random_model(name)
    ids = random_ids(len(step_ids), generator)
    before = model_rows(model, ids, step_ids)
    for changed_step in (2, 9, 14):
        position = 4 + steps[changed_step - 1][0]
        changed = [*ids[:position], (ids[position] + 1) % VOCABULARY, *ids[position + 1 :]]
        after = model_rows(model, changed, step_ids)
        torch.testing.assert_close(after[:, :, :changed_step], before[:, :, :changed_step], atol=1e-6, rtol=0)
        assert (after[:, :, changed_step] - before[:, :, changed_step]).abs().max() > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_truncation_reproduces_rows(name):
    """Cut after any step: the rows that remain are those of the full sequence."""
    generator = torch.Generator().manual_seed(4)
    steps, model = random_steps(20, generator), random_model(name)
    step_ids = step_ids_of(4, steps)
    ids = random_ids(len(step_ids), generator)
    full = model_rows(model, ids, step_ids)
    for S in (2, 8, 9, 17):
        end = 4 + steps[S - 2][1]
        cut = model_rows(model, ids[:end], step_ids[:end])
        assert cut.shape[-1] == S
        torch.testing.assert_close(cut, full[:, :, :S, :S], atol=1e-6, rtol=0)


def test_steps_after_the_row_attract_nothing():
    """alpha is lower triangular."""
    alpha = model_rows(random_model("qwen2"), list(range(30)), [0] * 3 + list(range(1, 28)))
    assert not alpha.triu(1).any() and (alpha.diagonal(dim1=-2, dim2=-1) > 0).all()


# --- Cost and safety


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))]
        )
        return result


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_no_quadratic_tensor(kv_heads):
    """Neither step attention nor a model's forward pass with FCI makes a tensor of L * L elements."""
    L = 1024
    query, key = random_qk(L, d=16, heads=2, kv_heads=kv_heads)
    step_ids = torch.arange(L)[None] // 40
    with Largest() as largest:
        step_attention(query, key, step_ids, 26)
    assert L * 26 <= largest.numel < L * L

    model = random_model("qwen2")
    with Largest() as largest, torch.no_grad():
        ids = torch.zeros(1, L, dtype=torch.long)
        model.base_model(input_ids=ids, use_cache=False, step_hook=StepHook(step_ids))
    assert L * 26 <= largest.numel < L * L


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_raises(attention):
    """A model with another attention than ours gives an error that names the remedy, never zeros."""
    model, hook = random_model("qwen2", attention=attention), StepHook(torch.arange(20)[None])
    model(torch.arange(20)[None], step_hook=hook)
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        hook.fci()


@pytest.mark.parametrize("attention", [ATTENTION, models.ATTENTION])
@pytest.mark.parametrize("name", CONFIGS)
def test_collecting_changes_no_logits(name, attention):
    """Logits are the same with and without FCI, and those of eager attention."""
    model, ids = random_model(name, attention=attention), torch.arange(40)[None]
    with torch.no_grad():
        with_fci, without = model(ids, step_hook=StepHook(ids)).logits, model(ids).logits
        model.set_attn_implementation("eager")
        eager = model(ids).logits
    assert torch.equal(with_fci, without)
    torch.testing.assert_close(without, eager, atol=1e-4, rtol=1e-4)


# --- Steps


def test_split_steps_fallbacks():
    """Double line breaks; else single ones; else every token."""
    assert split_steps(["a", "b\n\n", "\n", "c", "\n\n\n", "d"]) == [(0, 2), (2, 5), (5, 6)]
    assert split_steps(["a\n\nb", "c"]) == [(0, 1), (1, 2)]  # inside a token
    blank_lines_over_two_tokens = ["a\n", "\n", "b\n", "c", ".\n", "\nd", "e"]
    assert split_steps(blank_lines_over_two_tokens) == [(0, 2), (2, 6), (6, 7)]
    assert split_steps(["a\n", "\n", "b", "\n\n", "c"]) == [(0, 4), (4, 5)]  # not where a token has two
    assert split_steps(["a", "\n", "b", "c.\n"]) == [(0, 2), (2, 4)]
    assert split_steps(["a", "b", "c"]) == [(0, 1), (1, 2), (2, 3)]
    assert split_steps(["a"]) == split_steps(["\n\n"]) == [(0, 1)]


def test_steps_cover_the_response():
    """Steps are non-empty, adjacent, and cover all tokens; step ids repeat every step by its length."""
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (["a", "\n", "\n\n"], ["a", "\n"], ["a", "b"]):
        for length in range(1, 40):
            texts = [vocabulary[i] for i in torch.randint(len(vocabulary), (length,), generator=generator)]
            steps = split_steps(texts)
            assert steps[0][0] == 0 and steps[-1][1] == length
            assert all(start < end for start, end in steps)
            assert all(end == start for (_, end), (start, _) in zip(steps, steps[1:]))
            ids = step_ids_of(3, steps)
            assert len(ids) == 3 + length and ids[:3] == [0, 0, 0]
            assert all(set(ids[3 + s : 3 + e]) == {k} for k, (s, e) in enumerate(steps, 1))


def test_steps_from_the_last_think_end_do_not_count():
    """Only steps before the one that holds the last `</think>` score."""
    texts = ["a", "\n\n", "</think>", "\n\n", "b", "\n\n", "c", "</think>\n\n", "d", "\n\n"]
    steps = split_steps(texts)
    assert steps == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert count_scored_steps(texts, steps) == 3
    assert count_scored_steps(texts[:6], steps[:3]) == 1  # the first one is the last there
    assert count_scored_steps(["</think>", *texts[1:2]], [(0, 2)]) == 0
    over_several_tokens = ["a", "\n\n", "</", "think", ">", "b"]
    assert count_scored_steps(over_several_tokens, [(0, 2), (2, 6)]) == 1
    assert count_scored_steps(["a", "\n\n", "b", "\n\n"], [(0, 2), (2, 4)]) == 2


def test_scores_zero_the_first_step_and_the_answer():
    """(T,) scores: prompt dropped, step 1 and the steps from `n_scored` on are 0; the row stays as it was."""
    values = torch.tensor([9.0, 8, 7, 6, 5, 4])  # prompt, 4 steps, one step of a longer neighbour
    assert fci_of_response(values, 4, 4) == [0, 7, 6, 5]
    assert fci_of_response(values, 2, 4) == [0, 7, 0, 0]
    assert fci_of_response(values, 0, 4) == [0, 0, 0, 0]
    assert fci_of_response(values, 1, 1) == [0]
    assert values.tolist() == [9, 8, 7, 6, 5, 4]
