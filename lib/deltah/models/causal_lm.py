"""Which transformers models are policies: what a model must be, what wraps it, what it accepts and what ends it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltah import checks
from deltah.models.modes import evaluation
from deltah.models.output_layers import watched_output

# Sequences, and tokens of each, that a model is tried with.
ROWS, LENGTH = 4, 4


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model, which PEFT's wrapper has put its adapters into, so that it runs without the wrapper.

    Raises:
        TypeError: no transformers model.
        ValueError: a wrapper that does more than run the model, such as to put a learned prompt before the tokens.
    """
    # A wrapped model has brought its library along.
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return checks.instance("model", model, PreTrainedModel, "a transformers causal LM")
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model.base_model.model
    checks.instance("model", inner, PreTrainedModel, "a transformers causal LM in PEFT's wrapper")
    ids = torch.arange(min(LENGTH, inner.config.get_text_config().vocab_size), device=inner.device)[None]
    kinds = ", ".join(sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}))
    with _tried(inner):
        wanted = _attempt(lambda: inner(input_ids=ids, use_cache=False).logits)
        found = _attempt(lambda: model(input_ids=ids, use_cache=False).logits)
    prompts = any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values())
    if prompts or isinstance(wanted, Tensor) and not (isinstance(found, Tensor) and found.shape == wanted.shape
                                           and torch.allclose(found, wanted, equal_nan=True)):
        raise ValueError(f"model: expected adapters that are part of the model's layers, such as LoRA; PEFT's wrapper "
                         f"around {type(inner).__name__} does more than run it ({kinds})")
    return inner


def check_causal_lm(model: PreTrainedModel) -> None:
    """Raise ValueError where a model makes no next-token logits of token ids alone, or lets positions see later ones.

    It is run once, on sequences that share their first token: there, their logits must be equal.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"model: expected a causal LM with an output layer, got {name}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: expected a causal LM, got {name}, whose encoder sees all tokens")
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    # Each goes on with one token, from anywhere in the vocabulary.
    ids = torch.linspace(0, config.vocab_size - 1, ROWS, device=model.device).long()[:, None].repeat(1, length)
    ids[:, 0] = 0
    with _tried(model), watched_output(model) as seen:
        z = _attempt(lambda: model(input_ids=ids, use_cache=False).logits)
    if isinstance(z, Exception):
        raise ValueError(f"model: expected a causal LM that runs on token ids alone; {name} raised "
                         f"{type(z).__name__}: {str(z).strip().splitlines()[0] if str(z).strip() else ''}") from z
    if not seen or z.shape[:2] != ids.shape:
        raise ValueError(f"model: expected logits of each position from the output layer, got {list(z.shape)} from "
                         f"{name} for token ids of shape {list(ids.shape)}")
    first = z[:, 0].to(torch.promote_types(z.dtype, torch.float32))
    first = first[:, torch.isfinite(first).all(0)]
    if first.numel() == 0:
        return
    spread = float((first - first.mean(1, keepdim=True)).abs().max())
    seen_later = float((first - first[:1]).abs().max())
    tolerance = math.sqrt(max(torch.finfo(z.dtype).eps, torch.finfo(torch.float32).eps))
    if seen_later > tolerance * spread:
        raise ValueError(f"model: expected a causal LM, got {name}, whose logits at one position depend on the tokens "
                         "after it")


@functools.cache
def with_cache(model: PreTrainedModel, attention_mask: Tensor, **arguments: Any) -> dict[str, Any]:
    """Keyword arguments for the model with a cache: positions count tokens, so that left padding shifts nothing."""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if accepts(type(model), "position_ids"):
        arguments["position_ids"] = positions[:, -arguments["input_ids"].shape[1]:]
    return {"attention_mask": attention_mask.long(), "use_cache": True, **arguments}


def accepts(kind: type[PreTrainedModel], argument: str) -> bool:
    """Whether models of this class take a keyword argument; an instance's own `forward` may hide what it passes on."""
    return argument in inspect.signature(kind.forward).parameters


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The tokens that end a response, in rising order: the tokenizer's, and those of the model's configs.

    Raises:
        ValueError: a tokenizer without one, or one outside the vocabulary, which could never be drawn.
    """
    config = model.config.get_text_config()
    size = config.vocab_size
    named = {"model.config": _listed(config), "model.generation_config": _listed(
        getattr(model, "generation_config", None))}
    found = {i for ids in named.values() for i in ids if 0 <= i < size}
    if tokenizer is not None:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError("tokenizer: has no end-of-sequence token, so no response would ever end; "
                             "set tokenizer.eos_token to one of its tokens")
        if not 0 <= eos < size:
            raise ValueError(f"tokenizer: its end-of-sequence token {tokenizer.eos_token!r} has the id {eos}, outside "
                             f"the model's vocabulary of {size}, so no response would ever end")
        return tuple(sorted(found | {eos}))
    for source, ids in named.items():
        for i in ids:
            # A default of the config's class may lie outside a small vocabulary, and was nobody's choice.
            if i not in found and i not in _listed(type(config)()):
                raise ValueError(f"{source}.eos_token_id: expected ids from 0 to {size - 1}, got {i}")
    return tuple(sorted(found))


def _listed(source: Any) -> tuple[int, ...]:
    ids = getattr(source, "eos_token_id", None)
    return tuple(i for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None)


@contextlib.contextmanager
def _tried(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a run of the model leaves no traces: neither in its mode, nor in gradients or generators."""
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluation(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


def _attempt(function: Callable[[], Tensor]) -> Tensor | Exception:
    """What a function returns or raises."""
    try:
        return function()
    except Exception as error:
        return error
