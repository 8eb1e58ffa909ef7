"""Ways in which a model runs for a while, and is left as it was: for one thread, without dropout, with derivatives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class _Hold:
    """Whose turn a model is, and how many contexts of that thread are open."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0


# Beside the models, whose copies and pickles must not carry locks.
_HOLDS: WeakKeyDictionary[PreTrainedModel, _Hold] = WeakKeyDictionary()
_HOLDS_LOCK = threading.Lock()
# PyTorch counts the levels of forward mode for the whole process.
_FORWARD_MODE = threading.RLock()


@contextlib.contextmanager
def held(model: PreTrainedModel) -> Iterator[int]:
    """Inside, the model is this thread's alone; gives how many contexts of its own the thread is in already.

    Other parameters, an output layer's or another attention's stand-in are put into the model for a while: a second
    thread would compute with them.
    """
    with _HOLDS_LOCK:
        hold = _HOLDS.setdefault(model, _Hold())
    with hold.lock:
        hold.depth += 1
        try:
            yield hold.depth - 1
        finally:
            hold.depth -= 1


@contextlib.contextmanager
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is this thread's alone, in evaluation mode and able to run; on leaving, it is as it was.

    Dropout would make log-probs random. Gradient checkpointing rests in evaluation mode: numbers are the same without.
    """
    with held(model) as depth:
        # Whoever is inside another context has nothing to change, unless the model was put back into training there.
        training = [] if depth and not model.training else [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            # The grouped matrix product of mixtures of experts has no float64.
            with _experts(model, None if depth or model.dtype != torch.float64 else "eager"):
                yield
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def forward_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `torch.func.jvp` of the logits is right to any order; one thread at a time may take it.

    PyTorch's fused attention has no forward mode: its mathematical form is taken instead, or the model's eager
    attention where it uses another library's. Its fused layer norm is wrong to second order.
    """
    # In this order everywhere, so that no two threads wait for each other.
    with _FORWARD_MODE, eager_experts(model):
        attention = getattr(model.config, "_attn_implementation", None)
        try:
            if attention not in ("eager", "sdpa", None):
                model.set_attn_implementation("eager")
            with WrittenOut():
                yield
        finally:
            if attention not in ("eager", "sdpa", None):
                model.set_attn_implementation(attention)


@contextlib.contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a mixture of experts calls one expert after the other, each with the rows that it was sent."""
    with evaluation(model), _experts(model, "eager"):
        yield


@contextlib.contextmanager
def _experts(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Another implementation of the experts, where the model has any; None: its own."""
    own = getattr(model.config, "_experts_implementation", None)
    changes = None not in (own, implementation) and own != implementation
    try:
        if changes:
            model.set_experts_implementation(implementation)
        yield
    finally:
        if changes:
            model.set_experts_implementation(own)


class WrittenOut(TorchFunctionMode):
    """Inside, and in this thread alone, layer norm and attention are made of elementary operations.

    PyTorch's own layer norm is wrong to second order in nested forward mode: its tangent takes the saved mean and
    deviation for constants. Its fused attention has no forward mode.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normed = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """What `sdpa_kernel(SDPBackend.MATH)` chooses, which would choose for all threads."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]


_WRITTEN_OUT = {F.layer_norm: _layer_norm, F.scaled_dot_product_attention: _attention}
