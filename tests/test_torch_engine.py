"""The PyTorch engine on the embedded model against plain loops and fresh forward passes."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, check_budgets
from helpers import CONFIGS, one_sentence, random_model

from plumbing.models import ATTENTION, load_model, load_tokenizer, prompt_ids
from plumbing.nouns import Request
from plumbing.torch_engine import TorchEngine


@pytest.fixture
def engine(model, tokenizer):
    return TorchEngine(model, tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Six prompts, of several lengths."""
    rows = [json.loads(line) for line in (TINY / "test.jsonl").read_text().splitlines()[:6]]
    chosen = [prompt_ids(tokenizer, row["problem"]) for row in rows]
    assert len({len(ids) for ids in chosen}) > 2
    return chosen


@torch.no_grad()
def greedy_loop(model, prompt, budget, stops):
    """Argmax, one token at a time, no cache, no padding."""
    ids = []
    while len(ids) < budget and not (ids and ids[-1] in stops):
        ids.append(int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return ids


@torch.no_grad()
def fresh_logps(model, prompt, ids, temperature=1.0, top_p=1.0):
    """Log-probabilities of `ids` after `prompt` by one forward pass; top-p: the fewest tokens that reach it,
    renormalised."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logps = []
    for row, token in zip((logits / temperature).softmax(-1), ids):
        nucleus, mass = {}, 0.0
        for i in row.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            nucleus[i] = row[i]
            mass += float(row[i])
        # KeyError: sampled from outside the nucleus
        logps.append((nucleus[token] / sum(nucleus.values())).log())
    return torch.tensor(logps)


def test_greedy_equals_argmax_loop(engine, model, prompts):
    """Greedy generation, in one left-padded batch with a cache, equals a plain loop for every prompt."""
    responses = engine.generate([Request(p, 120) for p in prompts], temperature=0)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.ids == greedy_loop(model, prompt, 120, engine.eos_ids)
        assert response.finish_reason == "stop" and response.ids[-1] == engine.eos_ids[0]
        expected = fresh_logps(model, prompt, response.ids)
        torch.testing.assert_close(torch.tensor(response.logps), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_any_decoder_generates_as_transformers_does(name):
    """Greedy, for prompts of several lengths, one of them twice, budgets that end at several times, and
    responses longer than a sliding window and than the room in the cache. Log-probs by a fresh pass."""
    model = random_model(name, attention=ATTENTION)
    model.generation_config.eos_token_id = None  # so that budgets alone end the responses
    prompts = [[2, 3, 4], [5] * 9, list(range(10, 27)), [2, 3, 4], [7, 8]]
    budgets = [100, 3, 90, 41, 17]
    engine = TorchEngine(model, SimpleNamespace(eos_token_id=None))
    responses = engine.generate([*map(Request, prompts, budgets)], temperature=0)
    for prompt, budget, response in zip(prompts, budgets, responses):
        how = dict(max_new_tokens=budget, do_sample=False)
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **how)
        assert response.ids == expected[0, len(prompt) :].tolist()
        assert len(response.ids) == budget and response.finish_reason == "length"
        fresh = fresh_logps(model, prompt, response.ids)
        torch.testing.assert_close(torch.tensor(response.logps), fresh, atol=1e-4, rtol=0)
    assert len({token for response in responses for token in response.ids}) > 5


def test_a_prompt_is_read_once_and_ended_rows_leave_the_batch(engine, model, prompts):
    """Six copies of two prompts are two rows at first; rows of the forward passes then never grow."""
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    torch.manual_seed(0)
    responses = engine.generate([Request(p, 120) for p in prompts[:2] for _ in range(6)])
    hook.remove()
    assert shapes[0] == (2, max(map(len, prompts[:2]))) and shapes[1] == (12, 1)
    rows = [n for n, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 12
    assert sum(rows) < 12 * max(len(r.ids) for r in responses) * 0.95


def test_batches_change_no_greedy_output(model, tokenizer, prompts, monkeypatch):
    """One by one, in pairs, all at once, in any order: the same responses, in the order of the requests."""
    requests = [Request(p, budget) for p, budget in zip(prompts, (120, 7, 30, 1, 120, 60))]
    expected = [TorchEngine(model, tokenizer).generate([r], temperature=0)[0] for r in requests]
    assert len({tuple(r.ids) for r in expected}) == 6
    for batch_tokens in (1, 400, 65536):
        engine = TorchEngine(model, tokenizer, batch_tokens)
        for order in (range(6), [3, 0, 5, 1, 4, 2]):
            rows = []

            def generate_batch(batch, *rest, engine=engine, rows=rows):
                rows.append(len(batch))
                return TorchEngine._generate_batch(engine, batch, *rest)

            monkeypatch.setattr(engine, "_generate_batch", generate_batch)
            responses = engine.generate([requests[i] for i in order], temperature=0)
            assert [r.ids for r in responses] == [expected[i].ids for i in order]
            assert [r.finish_reason for r in responses] == [expected[i].finish_reason for i in order]
            for i, response in zip(order, responses):
                torch.testing.assert_close(response.logps, expected[i].logps, atol=1e-4, rtol=0)
            assert sum(rows) == 6
            assert len(rows) in {1: [6], 400: [2, 3, 4], 65536: [1]}[batch_tokens]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.5, 0.7)])
def test_logps_are_of_the_sampled_distribution(engine, model, prompts, temperature, top_p):
    """Temperature first, then top-p renormalised, as a fresh forward pass gives them."""
    torch.manual_seed(0)
    responses = engine.generate([Request(p, 80) for p in prompts], temperature=temperature, top_p=top_p)
    reported = torch.tensor([x for r in responses for x in r.logps])
    pairs = [(p, r.ids) for p, r in zip(prompts, responses)]
    expected = torch.cat([fresh_logps(model, *pair, temperature, top_p) for pair in pairs])
    torch.testing.assert_close(reported, expected, atol=1e-4, rtol=0)
    plain = torch.cat([fresh_logps(model, *pair) for pair in pairs])
    assert ((reported - plain).abs().max() > 0.01) == ((temperature, top_p) != (1.0, 1.0))


def test_sampling_frequencies(engine, model, prompts):
    """The first token is drawn from the model's softmax: frequencies over 600 draws, to four standard
    errors."""
    greedy = greedy_loop(model, prompts[0], 120, engine.eos_ids)
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0] + greedy])).logits[0, len(prompts[0]) - 1 : -1]
    everywhere = logits.softmax(-1)
    position = int(everywhere.amax(-1).argmin())  # where the model is least certain
    torch.manual_seed(0)
    drawn = [r.ids[0] for r in engine.generate([Request(prompts[0] + greedy[:position], 1)] * 600)]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=everywhere.shape[1]) / 600
    p = everywhere[position]
    assert p.max() < 0.95
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / 600).sqrt() + 1 / 600).all()


def test_budgets_and_finish_reasons(engine, prompts):
    check_budgets(engine, prompts[0])


def test_no_forward_pass_after_the_last_token(engine, model, prompts):
    """A row that used up its budget waits for no end of sequence: one pass for each token of the longest
    response."""
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    responses = engine.generate([Request(p, b) for p, b in zip(prompts, (300, 3, 1))], temperature=0)
    hook.remove()
    assert responses[1].finish_reason == "length" and len(passes) == len(responses[0].ids) < 300


def test_continuation_of_a_prefix(engine, prompts):
    """A request that ends inside a greedy response continues it: token ids in, token ids out."""
    full = engine.generate([Request(prompts[1], 120)], temperature=0)[0]
    rest = engine.generate([Request(prompts[1] + full.ids[:9], 120 - 9)], temperature=0)[0]
    assert full.ids[:9] + rest.ids == full.ids


def test_seeds_repeat(engine, prompts):
    """torch.manual_seed decides what is sampled."""
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append([r.ids for r in engine.generate([Request(p, 60) for p in prompts])])
    assert runs[0] == runs[1] != runs[2]


def test_generation_settings_of_the_model_are_not_applied(engine, tokenizer, prompts, tmp_path):
    """A directory whose generation_config.json penalises repetition and keeps one token samples as one
    without."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl", "*.py"))
    settings = {
        "do_sample": True,
        "repetition_penalty": 2.0,
        "top_k": 1,
        "temperature": 0.1,
        "min_new_tokens": 119,
        "eos_token_id": 3,
    }
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    other = load_model(str(tmp_path / "model"))
    assert other.generation_config.repetition_penalty == 2.0
    configured = TorchEngine(other, tokenizer)
    requests = [Request(p, 120) for p in prompts]
    for temperature in (0, 1.0):
        outputs = []
        for e in (engine, configured):
            torch.manual_seed(0)
            outputs.append([r.ids for r in e.generate(requests, temperature=temperature)])
        assert outputs[0] == outputs[1]


def test_stop_tokens_of_the_generation_config_count(tokenizer, prompts):
    """Chat models list further end tokens there: a response ends at the first of any."""
    model = load_model(str(TINY))
    full = TorchEngine(model, tokenizer).generate([Request(prompts[0], 120)], temperature=0)[0].ids
    also = full[len(full) // 2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, also]
    response = TorchEngine(model, tokenizer).generate([Request(prompts[0], 120)], temperature=0)[0]
    assert response.ids == full[: full.index(also) + 1] and response.finish_reason == "stop"


def test_padding_token_is_not_needed(engine, model, prompts):
    """Without one, rows are padded with the end of sequence: no padding is read, none is returned."""
    bare = load_tokenizer(str(TINY))
    bare.pad_token = None
    requests = [Request(p, b) for p, b in zip(prompts, (120, 5, 40, 1, 120, 9))]
    expected = engine.generate(requests, temperature=0)
    assert TorchEngine(model, bare).generate(requests, temperature=0) == expected


@pytest.mark.parametrize(
    "request_",
    [Request([], 4), Request([1] * 500, 13), Request([1, 2], 0)],
    ids=["empty", "too long", "no budget"],
)
def test_requests_that_cannot_be_served_are_one_sentence(engine, request_):
    """The reasoner has 512 positions. A request that just fits is served."""
    with pytest.raises(ValueError) as error:
        engine.generate([Request([1, 2, 3], 4), request_])
    one_sentence(error, "empty" if not request_.prompt_ids else "at most the 512")
    assert len(engine.generate([Request([1] * 508, 4)])) == 1


def test_forward_passes_run_in_the_given_context(model, tokenizer, prompts):
    """The trainer's autocast: entered once per call, open in every forward pass, left at the end."""
    inside, entered, seen = [False], [], []

    @contextlib.contextmanager
    def autocast():
        entered.append(True)
        inside[0] = True
        yield
        inside[0] = False

    engine = TorchEngine(model, tokenizer, batch_tokens=400, autocast=autocast)
    hook = model.register_forward_pre_hook(lambda *_: seen.append(inside[0]))
    engine.generate([Request(p, 5) for p in prompts], temperature=0)
    hook.remove()
    assert len(entered) == 1 and len(seen) >= 5 and all(seen) and not inside[0]
