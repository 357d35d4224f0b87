"""Tokenizer, model, context length and prompt of a local directory or a hub name."""

import contextlib
import math
import os

import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.masking_utils import sdpa_mask

import fci

PROMPT = "{problem} Let's think step by step and output the final answer within \\boxed{{}}."  # the paper's
ATTENTION = "sdpa_with_step_hook_and_shared_cache"  # the name under which transformers knows `attention`


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """fci.py's attention; where one token is generated, heads that share a key are rows of one attention.
    transformers would copy the cache for each of them: on a CPU, generation took 1.8 times as long."""
    batch, heads, n_queries, _ = query.shape
    if n_queries > 1 or key.shape[1] == heads:
        return fci.attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


torch.backends.cuda.enable_cudnn_sdp(False)  # it would build a plan for each new shape: minutes per step
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def loading(what: str, model: str):
    """Turns what transformers raises, of many kinds and some pages long, into ValueError in one sentence."""
    try:
        yield
    except Exception as error:
        kind, reason = type(error).__name__, "no such directory, and no such model on the hub within reach"
        if os.path.isdir(model):
            reason = "the directory needs the files that save_pretrained writes"
        raise ValueError(f"cannot load {what} from {model!r} ({kind}): {reason}") from None


def load_tokenizer(model: str):
    """Fast tokenizer with a chat template, of a directory or hub name. ValueError in one sentence."""
    with loading("the tokenizer", model):
        # Not AutoTokenizer: for some types of models it does not do what tokenizer.json says.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    if not tokenizer.chat_template:
        needed = "the prompt needs one, as instruction-tuned models have"
        raise ValueError(f"the tokenizer of {model!r} has no chat template: {needed}")
    return tokenizer


def load_model(model: str, dtype: torch.dtype = torch.float32):
    """Causal language model that FCI can look into, on the GPU if there is one. ValueError if it cannot."""
    with loading("the model", model):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    loaded.set_attn_implementation(ATTENTION)  # or it keeps its own, and `check_model` refuses to train it
    loaded.generation_config.do_sample = True  # or transformers would not save a model with a temperature
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def context_length(model: str) -> float:
    """Positions that a model was made for; infinite if its configuration does not say."""
    with loading("the configuration", model):
        return positions(AutoConfig.from_pretrained(model))


def positions(config) -> float:
    """The same of a model's configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def head_dim(config) -> int:
    """Width of an attention head, of the configuration of a text model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def prompt_ids(tokenizer, problem: str) -> list[int]:
    """Token ids of the paper's prompt under the model's chat template, up to where the answer starts."""
    messages = [{"role": "user", "content": PROMPT.format(problem=problem)}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def stop_ids(tokenizer, generation_config: transformers.GenerationConfig) -> list[int]:
    """Tokens that end a response: the tokenizer's and those of the model's generation settings."""
    eos = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
