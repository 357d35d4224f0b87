"""Eq. 8 to 10 by hand, and the PyTorch engine on the embedded model against plain loops and fresh forward passes."""

import importlib.machinery
import json
import shutil
import sys
import types
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_budgets

from sampler import (
    VLLM_VERSION,
    AdaptiveSampler,
    Request,
    TorchEngine,
    VLLMEngine,
    choose_responses,
    expansion,
    load_model,
    load_tokenizer,
    make_engine,
    prompt_ids,
    resolve_engine,
)

TINY = Path(__file__).resolve().parent.parent / "tiny"
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."

EASY, MIXED, HARD = [1.0] * 6, [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0] * 6


# --- Adaptive sampling


@pytest.mark.parametrize(
    "fci_filter, kept, n_compared",
    [
        ("easy", [True, True, False, True, True, True, False], 4),  # means before the easy ones: none, 0.50, 0.45, 0.48
        ("all", [True, False, True, True, True, False, False], 7),  # means: none, 0.50, 0.30, 0.33.., 0.385, 0.488.., 0.4066..
        ("none", [True] * 7, 0),
    ],
)
def test_filter_by_hand(fci_filter, kept, n_compared):
    """Eq. 8: a compared problem passes when its FCI is above the mean of those compared before it, itself excluded."""
    sampler = AdaptiveSampler(batch_size=8)
    problems = [(0.5, EASY), (0.1, MIXED), (0.4, EASY), (0.54, EASY), (0.9, HARD), (0.0, MIXED), (0.4, EASY)]
    assert [sampler.keep(fci, rewards, fci_filter) for fci, rewards in problems] == kept
    assert sampler.fci_count == n_compared
    assert sampler.fci_total == pytest.approx({"easy": 1.84, "all": 2.84, "none": 0}[fci_filter])


def test_filter_needs_more_than_the_mean():
    sampler = AdaptiveSampler(batch_size=8)
    assert [sampler.keep(0.5, EASY, "easy") for _ in range(3)] == [True, False, False]


def test_expansion_table():
    """Eq. 9 for six responses: 6 exp(-z) = 6, 5.08, 4.30, 3.64, 3.08, 2.61, 2.21, to the nearest."""
    assert [expansion([1.0] * n + [0.0] * (6 - n)) for n in range(7)] == [6, 5, 4, 4, 3, 3, 2]


def test_expansion_laws():
    """In any group: all responses where none is right, never more, at least one in three, fewer as more are right."""
    for size in range(1, 40):
        counts = [expansion([1.0] * n + [0.0] * (size - n)) for n in range(size + 1)]
        assert counts[0] == size and counts == sorted(counts, reverse=True) and counts[-1] >= size // 3
        assert size < 3 or counts[-1] < size


def test_choose_responses_rarer_outcome_first():
    """Every outcome of six, every count: distinct, ascending, and of the rarer outcome as many as there are."""
    rng = np.random.default_rng(0)
    for rewards in product([0.0, 1.0], repeat=6):
        for count in range(7):
            chosen = choose_responses(list(rewards), count, rng)
            assert len(chosen) == count and chosen == sorted(set(chosen)) and set(chosen) <= set(range(6))
            n_correct = sum(rewards)
            if n_correct != 3:
                rarer = float(n_correct < 3)
                assert sum(rewards[i] == rarer for i in chosen) == min(count, min(n_correct, 6 - n_correct))


def test_choose_responses_is_random_within_an_outcome():
    """All choices within an outcome come up, and the generator's seed repeats them."""
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    drawn = [tuple(choose_responses(rewards, 3, np.random.default_rng(s))) for s in range(60)]
    assert set(drawn) == {(0, 1, 3), (1, 2, 3), (1, 3, 4), (1, 3, 5)}  # both wrong ones and any right one
    assert drawn == [tuple(choose_responses(rewards, 3, np.random.default_rng(s))) for s in range(60)]


@pytest.mark.parametrize(
    "useful, expected",
    [
        (1920, 64),  # the target
        (960, 70),  # 57.6 + 0.1 * 2 * 64 = 70.4
        (480, 83),  # 57.6 + 25.6 = 83.2
        (3840, 61),  # 57.6 + 3.2 = 60.8
        (0, 256),  # no division by zero: the upper bound
        (1, 256),
        (10**9, 58),  # 57.6 + 0: at most a tenth a step
    ],
)
def test_resize_by_hand(useful, expected):
    """Eq. 10 from 64 prompts with a target of 1,920 sequences and lambda 0.9."""
    sampler = AdaptiveSampler(batch_size=64)
    sampler.resize(1920, useful, decay=0.9, smallest=16, largest=256)
    assert sampler.batch_size == expected and type(sampler.batch_size) is int


def test_resize_laws():
    """On target nothing changes; the bounds hold; a shortage never shrinks the batch and a surplus never grows it."""
    rng = np.random.default_rng(0)
    for size in range(16, 257):
        for decay in (0.0, 0.3, 0.9, 1.0):
            sampler = AdaptiveSampler(size)
            sampler.resize(77, 77, decay, 16, 256)
            assert sampler.batch_size == size
            target, useful = (int(x) for x in rng.integers(1, 2000, size=2))
            sampler.resize(target, useful, decay, 16, 256)
            assert 16 <= sampler.batch_size <= 256
            assert sampler.batch_size >= size if useful < target else sampler.batch_size <= size
    shrinking = AdaptiveSampler(64)
    for _ in range(100):
        shrinking.resize(1, 10**6, 0.9, 20, 256)
    assert shrinking.batch_size == 20


# --- The PyTorch engine


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture(scope="module")
def model():
    return load_model(str(TINY))


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
    """Log-probabilities of `ids` after `prompt` by one forward pass; top-p: the fewest tokens that reach it, renormalised."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logps = []
    for row, token in zip((logits / temperature).softmax(-1), ids):
        nucleus, mass = {}, 0.0
        for i in row.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            nucleus[i] = row[i]
            mass += float(row[i])
        logps.append((nucleus[token] / sum(nucleus.values())).log())  # KeyError: sampled from outside the nucleus
    return torch.tensor(logps)


def test_greedy_equals_argmax_loop(engine, model, prompts):
    """Greedy generation, in one left-padded batch with a cache, equals a plain loop for every prompt."""
    responses = engine.generate([Request(p, 120) for p in prompts], temperature=0)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.ids == greedy_loop(model, prompt, 120, engine.eos_ids)
        assert response.finish_reason == "stop" and response.ids[-1] == engine.eos_ids[0]
        torch.testing.assert_close(torch.tensor(response.logps), fresh_logps(model, prompt, response.ids), atol=1e-4, rtol=0)


def test_batches_change_no_greedy_output(model, tokenizer, prompts, monkeypatch):
    """One by one, in pairs, all at once, in any order: the same responses, in the order of the requests."""
    requests = [Request(p, budget) for p, budget in zip(prompts, (120, 7, 30, 1, 120, 60))]
    expected = [TorchEngine(model, tokenizer).generate([r], temperature=0)[0] for r in requests]
    assert len({tuple(r.ids) for r in expected}) == 6
    for batch_tokens in (1, 400, 65536):
        engine = TorchEngine(model, tokenizer, batch_tokens)
        for order in (range(6), [3, 0, 5, 1, 4, 2]):
            rows = []
            monkeypatch.setattr(
                engine, "_generate_batch", lambda batch, *rest: rows.append(len(batch)) or TorchEngine._generate_batch(engine, batch, *rest)
            )
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
    expected = torch.cat([fresh_logps(model, p, r.ids, temperature, top_p) for p, r in zip(prompts, responses)])
    torch.testing.assert_close(reported, expected, atol=1e-4, rtol=0)
    plain = torch.cat([fresh_logps(model, p, r.ids) for p, r in zip(prompts, responses)])
    assert ((reported - plain).abs().max() > 0.01) == ((temperature, top_p) != (1.0, 1.0))


def test_sampling_frequencies(engine, model, prompts):
    """The first token is drawn from the model's softmax: frequencies over 600 draws, to four standard errors."""
    greedy = greedy_loop(model, prompts[0], 120, engine.eos_ids)
    with torch.no_grad():
        everywhere = model(torch.tensor([prompts[0] + greedy])).logits[0, len(prompts[0]) - 1 : -1].softmax(-1)
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
    """A row that used up its budget waits for no end of sequence: one pass for each token of the longest response."""
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
    """A directory whose generation_config.json penalises repetition and keeps one token samples as one without."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl", "*.py"))
    settings = {"do_sample": True, "repetition_penalty": 2.0, "top_k": 1, "temperature": 0.1, "min_new_tokens": 119, "eos_token_id": 3}
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


@pytest.mark.parametrize("request_", [Request([], 4), Request([1] * 500, 13), Request([1, 2], 0)], ids=["empty", "too long", "no budget"])
def test_requests_that_cannot_be_served_are_one_sentence(engine, request_):
    """The reasoner has 512 positions. A request that just fits is served."""
    with pytest.raises(ValueError) as error:
        engine.generate([Request([1, 2, 3], 4), request_])
    one_sentence(error, "empty" if not request_.prompt_ids else "at most the 512")
    assert len(engine.generate([Request([1] * 508, 4)])) == 1


# --- Which engine, and vLLM's calls in order (what vLLM itself does: test_vllm.py)


class FakeLLM:
    """Records what vLLM is asked for."""

    def __init__(self, *args, **settings):
        self.settings, self.calls, self.drops_prefixes = settings, [], True

    def sleep(self, **kwargs):
        self.calls.append(("sleep", kwargs))

    def wake_up(self, **kwargs):
        self.calls.append(("wake_up", kwargs))
        return kwargs["tags"] == ["kv_cache"]  # awake once both are back

    def collective_rpc(self, name, kwargs):
        self.calls.append((name, [n for n, _ in kwargs["weights_iterator"]]))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache",))
        return self.drops_prefixes


@pytest.fixture
def fake_vllm(monkeypatch):
    """A module `vllm` with the right version, and CUDA."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.__version__, module.LLM = VLLM_VERSION, FakeLLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


def test_requirements_pin_the_version_that_is_checked():
    pins = (TINY.parent / "requirements-gpu.txt").read_text().split()
    assert f"vllm=={VLLM_VERSION}" in pins


def test_auto_takes_vllm_only_where_it_can_run(fake_vllm, monkeypatch):
    assert resolve_engine("auto")[0] == resolve_engine("vllm")[0] == "vllm" and resolve_engine("torch")[0] == "torch"
    fake_vllm.__version__ = VLLM_VERSION + "+cpu"
    assert resolve_engine("auto")[0] == "vllm"
    reasons = {"version": "0.1.0 is installed", "cuda": "no CUDA device", "missing": "not installed", "import": "does not import"}
    for breakage, mention in reasons.items():
        with monkeypatch.context() as patch:
            if breakage == "version":
                patch.setattr(fake_vllm, "__version__", "0.1.0")
            elif breakage == "import":  # such as a build for another torch
                patch.delattr(fake_vllm, "__version__")
            elif breakage == "cuda":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            else:
                patch.setattr("importlib.util.find_spec", lambda name: None)
            chosen, why_not = resolve_engine("auto")
            assert chosen == "torch" and mention in why_not
            if breakage == "cuda":  # vLLM has a CPU build: asked for by name, it is taken
                assert resolve_engine("vllm")[0] == "vllm"
            else:
                with pytest.raises(ValueError) as error:
                    resolve_engine("vllm")
                one_sentence(error, mention.split()[-1], "requirements-gpu.txt", "--engine torch")


def test_a_vllm_that_does_not_start_is_one_sentence_or_replaced(fake_vllm, model, tokenizer, capsys):
    def no_memory(*args, **settings):
        raise ValueError("Free memory on device (1.0/80.0 GiB)\nis less than desired")

    fake_vllm.LLM = no_memory
    with pytest.raises(ValueError) as error:
        make_engine("vllm", str(TINY), tokenizer, model, max_tokens=256)
    one_sentence(error, "Free memory on device", "gpu_memory", "--engine torch")
    made = make_engine("auto", str(TINY), tokenizer, model, max_tokens=256)
    assert isinstance(made, TorchEngine) and made.model is model and "Free memory on device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_plain_pytorch_samples_from_the_given_model_and_says_why(name, model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = make_engine(name, str(TINY), tokenizer, model, max_tokens=256)
    assert isinstance(made, TorchEngine) and made.model is model
    assert capsys.readouterr().err == f"engine: plain PyTorch ({dict(torch='as asked', auto='vLLM is not installed')[name]})\n"


def test_vllm_is_asked_for_what_the_engine_needs(fake_vllm, tokenizer):
    settings = make_engine("vllm", str(TINY), tokenizer, max_tokens=300, seed=3, gpu_memory=0.25, sleep_mode=True).llm.settings
    wanted = dict(max_model_len=300, seed=3, gpu_memory_utilization=0.25, enable_sleep_mode=True, enable_prefix_caching=True)
    assert wanted.items() <= settings.items() and settings["logprobs_mode"] == "processed_logprobs"


def test_sleep_mode_wakes_weights_then_pushes_then_wakes_the_cache(fake_vllm, model, tokenizer):
    """vLLM's sleep mode needs a GPU: here only the order of the calls is shown, on a recorder."""
    names = list(model.state_dict())
    push = [("reload_weights", names), ("reset_prefix_cache",)]
    waking = [("wake_up", {"tags": ["weights"]}), *push, ("wake_up", {"tags": ["kv_cache"]})]
    for sleep_mode, expected in ((True, [("sleep", {"level": 2}), *waking, *push]), (False, [*push, *push])):
        engine = VLLMEngine(str(TINY), tokenizer, 256, sleep_mode=sleep_mode)
        engine.sleep()
        engine.sleep()
        engine.load(model)
        engine.load(model)
        assert engine.llm.calls == expected
    engine.llm.drops_prefixes = False
    with pytest.raises(RuntimeError, match="kept prefixes"):
        engine.load(model)


# --- Tokenizer, model, prompt


def one_sentence(error, *mentions):
    message = str(error.value)
    assert "\n" not in message and ". " not in message, message
    assert all(mention in message for mention in mentions), message


@pytest.mark.parametrize("load", [load_tokenizer, load_model])
@pytest.mark.parametrize("exists", [False, True])
def test_missing_directory_is_one_sentence(load, exists, tmp_path):
    """No such directory, or one that holds nothing: ValueError that names it."""
    path = tmp_path / "model"
    if exists:
        path.mkdir()
    with pytest.raises(ValueError) as error:
        load(str(path))
    one_sentence(error, str(path), "load")


def test_missing_chat_template_is_one_sentence(tmp_path):
    bare = load_tokenizer(str(TINY))
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(tmp_path))
    one_sentence(error, str(tmp_path), "chat template")


def test_prompt_holds_problem_and_instruction(tokenizer):
    """The paper's prompt under the chat template: begun once, ending where the answer starts, nothing unknown."""
    problem = json.loads((TINY / "train.jsonl").read_text().splitlines()[0])["problem"]
    ids = prompt_ids(tokenizer, problem)
    assert tokenizer.decode(ids) == f"<bos><user>{problem} {INSTRUCTION}<assistant><think>"
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.unk_token_id not in ids
    assert all(type(i) is int for i in ids)


def test_prompt_takes_braces_in_a_problem(tokenizer):
    """LaTeX in a problem is no format field: the instruction survives."""
    assert INSTRUCTION in tokenizer.decode(prompt_ids(tokenizer, r"Find \frac{1}{2} {x} {} {{."))


def test_model_loads_for_evaluation_with_fci_attention(model):
    assert not load_model(str(TINY)).training
    assert model.config._attn_implementation == "fci" and model.dtype == torch.float32
