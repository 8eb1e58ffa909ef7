"""Ways in which a model runs for a while, and is left as it was: with derivatives of every order, expert by expert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


@contextlib.contextmanager
def forward_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `torch.func.jvp` of the logits is right to any order.

    PyTorch's fused attention has no forward mode: its mathematical form is taken instead, or the model's eager
    attention where it uses another library's. Its fused layer norm is wrong to second order.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    try:
        if attention not in ("eager", "sdpa", None):
            model.set_attn_implementation("eager")
        with eager_experts(model), sdpa_kernel(SDPBackend.MATH), LayerNormWrittenOut():
            yield
    finally:
        if attention not in ("eager", "sdpa", None):
            model.set_attn_implementation(attention)


@contextlib.contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a mixture of experts calls one expert after the other, each with the rows that it was sent."""
    experts = getattr(model.config, "_experts_implementation", None)
    try:
        if experts not in ("eager", None):
            model.set_experts_implementation("eager")
        yield
    finally:
        if experts not in ("eager", None):
            model.set_experts_implementation(experts)


class LayerNormWrittenOut(TorchFunctionMode):
    """Inside, layer norm is made of elementary operations.

    PyTorch's own is wrong to second order in nested forward mode: its tangent takes the saved mean and deviation
    for constants.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_layer_norm if func is layer_norm else func)(*args, **(kwargs or {}))


def _layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normed = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias
