"""FCI against a double loop over `output_attentions`, causality, ranges, memory; log-probabilities against `logits`."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

import fci
from fci import FCI, PADDING, check_model, collate, count_scored_steps, fci_scores, split_steps, step_attention, step_ids_of, token_logps
from sampler import load_model
from tree import branch_points

VOCABULARY = 50
WINDOW = 11  # shorter than the sequences
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
CONFIGS = {  # initializer_range: attention far from uniform
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "llama, grouped queries": LlamaConfig(**SHAPE, num_key_value_heads=1),
    "qwen3, wide heads": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "mistral, sliding": MistralConfig(**SHAPE, num_key_value_heads=4, head_dim=8, sliding_window=WINDOW),
    # query_pre_attn_scalar: a scale that is not 1 / sqrt(head_dim)
    "gemma3, sliding and full": Gemma3TextConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=256,
        query_pre_attn_scalar=64,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
HEAD_DIM = {name: getattr(config, "head_dim", None) or 8 for name, config in CONFIGS.items()}


def random_model(config, seed=0, attention="fci"):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[config] if isinstance(config, str) else config).eval()
    model.set_attn_implementation(attention)
    return model


def random_ids(length, generator):
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


def random_steps(n_steps, generator, longest=3):
    """Spans of `n_steps` steps of 1 to `longest` tokens."""
    ends = torch.randint(1, longest + 1, (n_steps,), generator=generator).cumsum(0).tolist()
    return list(zip([0, *ends], ends))


@torch.no_grad()
def naive_fci(model, ids, step_ids, delta):
    """Eq. 4-6 as written, from materialised attention: (S,)."""
    attentions = [A[0].float().numpy() for A in model(torch.tensor([ids]), output_attentions=True).attentions]  # (H, L, L) each
    step_ids = np.array(step_ids)
    S = step_ids.max() + 1
    fci = np.zeros(S, dtype=np.float32)
    for A in attentions:
        for k in range(S):
            y = np.zeros(len(A))
            for j in range(k + delta, S):
                y += A[:, step_ids == j][:, :, step_ids == k].mean((1, 2))  # Eq. 4, 5
            fci[k] = max(fci[k], y.max())  # Eq. 6
    return torch.tensor(fci)


@torch.no_grad()
def batched_fci(model, rows, step_ids, delta=4):
    """As attnrl.score: right-padded, no padding mask."""
    scores = FCI(collate(step_ids, PADDING, "cpu"), delta)
    model.base_model(input_ids=collate(rows, 0, "cpu"), use_cache=False, fci=scores)
    return scores.values


class Rows(FCI):
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
    scores = Rows(torch.tensor([step_ids]))
    model(torch.tensor([ids]), fci=scores)
    return torch.cat(scores.alphas)


def random_qk(L, d=8, heads=4, kv_heads=2, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(1, heads, L, d, generator=generator), torch.randn(1, kv_heads, L, d, generator=generator)


# --- Against the definition


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("delta", [1, 4])
def test_batch_equals_naive_single_runs(name, delta):
    """Every row of a right-padded batch equals the un-padded double loop; more steps than a head is wide, spans of one token."""
    generator = torch.Generator().manual_seed(7 * delta)
    model = random_model(name, seed=delta)
    rows, step_ids = [], []
    for n_steps in (HEAD_DIM[name] + 4, 3, 12, 1, 140):  # the longest need not come first; 140: 18 passes of 8 steps
        prompt = 1 + int(torch.randint(5, (1,), generator=generator))
        step_ids.append(step_ids_of(prompt, random_steps(n_steps, generator)))
        rows.append(random_ids(len(step_ids[-1]), generator))
    values = batched_fci(model, rows, step_ids, delta)
    model.set_attn_implementation("eager")
    for row, ids, steps in zip(values, rows, step_ids):
        expected = naive_fci(model, ids, steps, delta)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=0)
        assert not row[len(expected) :].any()  # steps that this row does not have
    assert (values > 0.05).any()


def test_scoring_pass_equals_naive():
    """FCI collected by `token_logps`, the pass that training uses, is the naive one."""
    generator = torch.Generator().manual_seed(0)
    model = random_model("qwen2")
    batch = [(random_ids(p, generator), random_ids(r, generator)) for p, r in ((4, 30), (2, 9), (7, 17))]
    step_ids = [step_ids_of(len(p), [(i, i + 1) for i in range(len(r))]) for p, r in batch]
    scores = FCI(collate(step_ids, PADDING, "cpu"))
    with torch.no_grad():
        token_logps(model, batch, 1.0, 16, scores, with_entropy=True)
    model.set_attn_implementation("eager")
    for row, (prompt, response), steps in zip(scores.values, batch, step_ids):
        expected = naive_fci(model, prompt + response, steps, 4)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("think_end", [None, 20, 33])
def test_scores_of_a_response(think_end):
    """From token texts to (T,) scores, with and without `</think>`: the naive ones, 0 for step 1 and from `</think>` on."""
    generator = torch.Generator().manual_seed(2)
    texts = ["x", "y", ".\n\n"] * 13
    if think_end:
        texts[think_end] = "</think>"
    ids, steps, model = random_ids(5 + len(texts), generator), split_steps(texts), random_model("qwen2")
    step_ids = step_ids_of(5, steps)
    scores = fci_scores(batched_fci(model, [ids], [step_ids])[0], count_scored_steps(texts, steps), len(steps))
    model.set_attn_implementation("eager")
    expected = naive_fci(model, ids, step_ids, 4)[1:]
    thinking = next((k for k, (_, end) in enumerate(steps) if think_end and end > think_end), len(steps))
    torch.testing.assert_close(scores[1:thinking], expected[1:thinking], atol=1e-5, rtol=0)
    assert scores[0] == 0 and not scores[thinking:].any() and (expected[thinking : len(steps) - 4] > 0).all()
    assert len(scores) == len(steps) and (scores[1 : min(thinking, len(steps) - 4)] > 0).all()


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_bf16_kernel_against_fp32(sharpness):
    """The same queries and keys, bf16: FCI is within 1 % of that of an fp32 kernel, wherever it is not tiny."""
    step_ids = torch.tensor([step_ids_of(8, random_steps(300, torch.Generator().manual_seed(5)))])
    query, key = (x.bfloat16() for x in random_qk(step_ids.shape[1], d=64, sharpness=sharpness))
    half, single = FCI(step_ids), FCI(step_ids)
    half.add_layer(query, key, None, None)
    single.add_layer(query.float(), key.float(), None, None)
    assert half.values.dtype == torch.float32
    torch.testing.assert_close(half.values, single.values, atol=1e-3, rtol=1e-2)
    assert not torch.equal(half.values, single.values)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_model_branches_where_fp32_does(name):
    """A whole model in bf16 rounds its hidden states too: FCI moves by up to 15 %, the branch points stay (measured: all of them)."""
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
        points = [
            branch_points("fci", [a for a, _ in steps], fci_scores(values, 40, 40).numpy(), np.zeros(len(ids) - 5), 2, 0.2, 0, None)
            for values in (half, single, naive)
        ]
        same += points[0] == points[1] == points[2]
    assert same >= 5


def test_step_attention_by_hand():
    """Two equal keys share the attention evenly: the means over steps are literal fractions."""
    query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)  # token i attends to tokens 0..i with 1 / (i + 1)
    alpha = step_attention(query, key, torch.tensor([[0, 1, 1, 2]]), 3)
    step_1 = (1 / 2 + 1 / 3) / 2  # to the prompt's token
    inside = (1 / 2 + 0 + 1 / 3 + 1 / 3) / 4
    expected = torch.tensor([[1, 0, 0], [step_1, inside, 0], [1 / 4, 1 / 4, 1 / 4]])
    torch.testing.assert_close(alpha[0, 0], expected)


@pytest.mark.parametrize("delta", [1, 4, 6])
def test_fci_counts_the_later_steps_that_look_back(delta):
    """All attention on one single-token step k: FCI[k] is the number of steps j >= k + delta, and 0 elsewhere."""
    T, k = 12, 3
    query, key = torch.zeros(1, 1, T + 1, 4), torch.zeros(1, 1, T + 1, 4)
    query[..., 0], key[:, :, k, 0] = 100.0, 100.0
    scores = FCI(torch.arange(T + 1)[None], delta)
    scores.add_layer(query, key, None, None)
    assert scores.values[0, k] == T - (k + delta) + 1
    assert not scores.values[0, k + 1 :].any()


def test_max_over_layers_and_heads():
    """Eq. 6: adding a layer can only raise FCI, to the larger of the two; each layer's value is that of its best head."""
    step_ids = torch.arange(20)[None]
    layers = [random_qk(20, seed=seed) for seed in (1, 2)]
    single = []
    for query, key in layers:
        scores = FCI(step_ids)
        scores.add_layer(query, key, None, None)
        single.append(scores.values)
        heads = []
        for h in range(query.shape[1]):
            one = FCI(step_ids)
            one.add_layer(query[:, h : h + 1], key[:, h // 2 : h // 2 + 1], None, None)  # two queries a key
            heads.append(one.values)
        torch.testing.assert_close(torch.stack(heads).amax(0), scores.values)
    both = FCI(step_ids)
    for query, key in layers:
        both.add_layer(query, key, None, None)
    assert torch.equal(both.values, torch.maximum(*single))
    assert not torch.equal(both.values, single[0]) and not torch.equal(both.values, single[1])


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
        scores = FCI(torch.tensor([step_ids_of(4, random_steps(T, torch.Generator().manual_seed(seed)))]))
        query, key = random_qk(scores.step_ids.shape[1], seed=seed, sharpness=sharpness)
        scores.add_layer(query, key, None, None)
        assert (scores.values >= 0).all() and (scores.values <= T).all()
        assert not scores.values[0, T - 3 :].any() and (scores.values[0, : T - 3] > 0).any()


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_fewer_steps_than_delta_score_zero(n_steps):
    model = random_model("qwen2")
    steps = random_steps(n_steps, torch.Generator().manual_seed(n_steps))
    step_ids = step_ids_of(5, steps)
    values = batched_fci(model, [list(range(len(step_ids)))], [step_ids])[0]
    assert values.shape == (n_steps + 1,) and values.isfinite().all()
    assert fci_scores(values, n_steps, n_steps).tolist() == [0] * n_steps


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
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
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
        model.base_model(input_ids=torch.zeros(1, L, dtype=torch.long), use_cache=False, fci=FCI(step_ids))
    assert L * 26 <= largest.numel < L * L


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_raises(attention):
    """A model whose attention is not `fci` gives an error that names the remedy, never zeros."""
    model, scores = random_model("qwen2", attention=attention), FCI(torch.arange(20)[None])
    model(torch.arange(20)[None], fci=scores)
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        _ = scores.values


@pytest.mark.parametrize("name", CONFIGS)
def test_check_model_accepts_what_is_scored_right(name):
    model = random_model(name)
    check_model(model)
    assert model.config._attn_implementation == "fci"


SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4)


@pytest.mark.parametrize(
    "config, message",
    [
        (BloomConfig(**SMALL, n_layer=2, n_head=4), "BloomForCausalLM .* attention implementation is 'eager'"),
        (StableLmConfig(**SMALL, intermediate_size=40, num_hidden_layers=2, num_key_value_heads=2), "StableLmForCausalLM .* is 'fci'"),
        (Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=16), "attention sinks"),
        (Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=0.1), "its logits"),
    ],
)
def test_check_model_refuses_what_would_silently_be_wrong(config, message):
    """No attention layer seen, attention that the fused kernels lack, logits changed after the output layer."""
    with pytest.raises(ValueError, match=message):
        check_model(random_model(config))


def test_check_model_compares_step_attention_with_the_eager_model(monkeypatch):
    """A hook that sees other queries than the model uses is caught; another reduction of the same attention is not its business."""
    monkeypatch.setattr(FCI, "add_layer", None)  # Eq. 5 and 6 may be changed at will
    check_model(random_model("qwen2"))
    own = fci.step_attention
    monkeypatch.setattr(fci, "step_attention", lambda query, *rest: own(query.flip(2), *rest))
    with pytest.raises(ValueError, match="does not see"):
        check_model(random_model("qwen2"))


def test_model_without_the_hook_still_loads(tmp_path):
    """Evaluation needs no FCI: such a model keeps its own attention."""
    random_model(BloomConfig(**SMALL, n_layer=2, n_head=4), attention="eager").save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.config._attn_implementation == "eager"
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, VOCABULARY)


@pytest.mark.parametrize("name", CONFIGS)
def test_collecting_changes_no_logits(name):
    """Logits are the same with and without FCI, and those of eager attention."""
    model, ids = random_model(name), torch.arange(40)[None]
    with torch.no_grad():
        with_fci, without = model(ids, fci=FCI(ids)).logits, model(ids).logits
        model.set_attn_implementation("eager")
        eager = model(ids).logits
    assert torch.equal(with_fci, without)
    torch.testing.assert_close(without, eager, atol=1e-4, rtol=1e-4)


# --- Steps


def test_split_steps_fallbacks():
    """Double line breaks; else single ones; else every token."""
    assert split_steps(["a", "b\n\n", "\n", "c", "\n\n\n", "d"]) == [(0, 2), (2, 5), (5, 6)]
    assert split_steps(["a\n\nb", "c"]) == [(0, 1), (1, 2)]  # inside a token
    assert split_steps(["a\n", "\n", "b\n", "c", ".\n", "\nd", "e"]) == [(0, 2), (2, 6), (6, 7)]  # blank lines over two tokens
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
    assert count_scored_steps(["a", "\n\n", "</", "think", ">", "b"], [(0, 2), (2, 6)]) == 1  # over several tokens
    assert count_scored_steps(["a", "\n\n", "b", "\n\n"], [(0, 2), (2, 4)]) == 2


def test_scores_zero_the_first_step_and_the_answer():
    """(T,) scores: prompt dropped, step 1 and the steps from `n_scored` on are 0; the values stay as they were."""
    values = torch.tensor([9.0, 8, 7, 6, 5, 4])  # prompt, 4 steps, one step of a longer neighbour
    assert fci_scores(values, 4, 4).tolist() == [0, 7, 6, 5]
    assert fci_scores(values, 2, 4).tolist() == [0, 7, 0, 0]
    assert fci_scores(values, 0, 4).tolist() == [0, 0, 0, 0]
    assert fci_scores(values, 1, 1).tolist() == [0]
    assert values.tolist() == [9, 8, 7, 6, 5, 4]


# --- Log-probabilities of the scoring pass


@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (7, 0.7), (1000, 1.0)])
def test_token_logps_equal_log_softmax_of_logits(chunk, temperature):
    """Values, entropies and gradients equal those of whole logits of un-padded single runs, whatever the chunk."""
    generator = torch.Generator().manual_seed(1)
    batch = [(random_ids(p, generator), random_ids(r, generator)) for p, r in ((3, 1), (9, 12), (1, 20), (5, 8))]
    model = random_model("qwen2")
    weights = torch.randn(sum(len(r) for _, r in batch), generator=generator)

    expected, expected_entropies = [], []
    for prompt, response in batch:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        full = (logits / temperature).log_softmax(-1)
        expected.append(full[range(len(response)), response])
        expected_entropies.append(torch.distributions.Categorical(logits=full).entropy())
    expected = torch.cat(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))

    logps, entropies = token_logps(model, batch, temperature, chunk, with_entropy=True)
    gradients = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, torch.cat(expected_entropies), atol=1e-5, rtol=1e-5)
    assert (entropies <= math.log(VOCABULARY) + 1e-5).all() and (logps < 0).all()
    for ours, theirs in zip(gradients, expected_gradients):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert max(g.abs().max() for g in gradients) > 1e-2
