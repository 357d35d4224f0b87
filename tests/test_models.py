"""Tokenizer, model and prompt of a directory, and what is said where there is none."""

import json

import pytest
import torch
from conftest import TINY
from helpers import CONFIGS, VOCABULARY, one_sentence, random_ids, random_model
from transformers import BloomConfig

import fci
from plumbing.models import ATTENTION, load_model, load_tokenizer, prompt_ids

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


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
    """The paper's prompt under the chat template: begun once, ending where the answer starts, nothing
    unknown."""
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
    assert model.config._attn_implementation == ATTENTION and model.dtype == torch.float32


def test_model_without_the_hook_still_loads(tmp_path):
    """Evaluation needs no FCI: such a model keeps its own attention."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    random_model(config, attention="eager").save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.config._attn_implementation == "eager"
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, VOCABULARY)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_with_a_cache_is_what_the_whole_sequence_says(name):
    """Query heads that share the cache change no logits, whether one token is generated or many."""
    ids = torch.tensor([random_ids(30, torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    with torch.no_grad():
        expected = random_model(name, attention=fci.ATTENTION)(ids).logits[:, -3:]
        model = random_model(name, attention=ATTENTION)
        read = model(ids[:, :-3], use_cache=True)
        logits = [model(ids[:, [i]], past_key_values=read.past_key_values).logits for i in (-3, -2, -1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_attention_that_plans_anew_for_each_shape_is_off():
    """Rows and length of a batch differ from pass to pass, and cuDNN keeps a plan for each pair."""
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
