"""Policies that compute in float64 throughout, and a tiny random one whose responses can be enumerated."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from deltah import checks
from deltah.models.modes import WrittenOut
from deltah.policies import Policy


class _InFloat64(WrittenOut):
    """Turns every request for float32 into one for float64, too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return super().__torch_function__(func, types, args, kwargs)


def exact_policy(model: PreTrainedModel) -> Policy:
    """A policy whose every layer computes in float64, without a tokenizer.

    Most transformers models fall back to float32 in places (RMS norms, rotary positions, the softmax of eager
    attention), whatever the dtype of their weights: identities then hold to 1e-7 only. Here they hold to float64's
    rounding, and derivatives of any order and mode are right. Attention is the eager kind, as the fused ones have no
    forward mode.

    Args:
        model: any transformers causal LM; it is converted in place. Its `config.eos_token_id` ends a response.

    Raises:
        TypeError, ValueError: a model that cannot be a policy, which then stays as it was.

    >>> exact_policy(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=5))).dtype
    torch.float64
    """
    policy = Policy(model)
    policy.model.set_attn_implementation("eager")
    if getattr(policy.model.config, "_experts_implementation", None):
        policy.model.set_experts_implementation("eager")
    policy.model.double().forward = _ForwardInFloat64(policy.model)
    return policy


class _ForwardInFloat64:
    """What takes the place of a model's `forward`; a copy or a pickle of the model has one of its own."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.model).forward, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _InFloat64():
            return type(self.model).forward(self.model, *args, **kwargs)


def tiny_policy(vocabulary_size: int = 4, eos_token_id: int | None = None, context_length: int = 16,
                seed: int = 0, eos_logit: float = 0.0) -> Policy:
    """An `exact_policy` to begin with: a random GPT-2 of a few thousand parameters.

    Args:
        vocabulary_size: V.
        eos_token_id: the token that ends a response; None: responses end at the length asked for.
        context_length: tokens of prompt and response together.
        seed: of the weights.
        eos_logit: roughly added to the EOS token's logit: a large one makes long responses rare, and the
            entropy heavy-tailed.

    >>> tiny_policy().vocabulary_size
    4
    """
    vocabulary_size = checks.integer("vocabulary_size", vocabulary_size, minimum=1)
    context_length = checks.integer("context_length", context_length, minimum=1)
    if eos_token_id is not None:
        eos_token_id = checks.integer("eos_token_id", eos_token_id, minimum=0, maximum=vocabulary_size - 1)
    if checks.number("eos_logit", eos_logit) and eos_token_id is None:
        raise ValueError(f"eos_logit: expected 0 without an eos_token_id, got {eos_logit}")
    seed = checks.integer("seed", seed, minimum=0)
    config = GPT2Config(vocab_size=vocabulary_size, n_positions=context_length, n_embd=16, n_layer=2, n_head=2,
                        initializer_range=0.4, bos_token_id=None, eos_token_id=eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    if eos_logit:
        with torch.no_grad():
            direction = model.lm_head.weight[eos_token_id]
            model.transformer.ln_f.bias += eos_logit * direction / direction.square().sum()
    return exact_policy(model)
