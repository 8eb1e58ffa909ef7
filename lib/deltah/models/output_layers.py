"""A model's output layer, from hidden states to logits: what it is given, and what the model does with the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from deltah.models.modes import evaluation
from deltah.vocabulary import Scaling


class OutputLayer(NamedTuple):
    """Turns hidden states h [..., d] into logits `scaling`(h weight^T + bias) [..., V]."""

    weight: Tensor
    bias: Tensor | None
    scaling: Scaling


@contextlib.contextmanager
def watched_output(model: PreTrainedModel, instead: Callable[[Tensor], Tensor] | None = None) -> Iterator[list]:
    """Inside, the list gets (input, weight, bias) of every call of the output layer, which `instead` answers."""
    layer, seen = model.get_output_embeddings(), []
    forward = layer.forward

    def watched(hidden):
        # Read at the call: `Policy.run` may have put other parameters in.
        seen.append((hidden, getattr(layer, "weight", None), getattr(layer, "bias", None)))
        return (instead or forward)(hidden)

    replaced = layer.__dict__.get("forward")
    layer.forward = watched
    try:
        yield seen
    finally:
        del layer.forward
        if replaced is not None:
            layer.forward = replaced


def rounding(model: PreTrainedModel) -> float:
    """How far the numbers that the model computes with are apart, relatively.

    Those of its own dtype, or of float32, which most fall back to in places, or of autocast around it or in it.
    """
    kinds = [model.dtype, torch.float32]
    with evaluation(model), torch.no_grad():
        forward = model.get_output_embeddings().forward

        def asked(hidden):
            device = hidden.device.type
            kinds.extend([torch.get_autocast_dtype(device)] * torch.is_autocast_enabled(device))
            return forward(hidden)

        with watched_output(model, asked):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return max(torch.finfo(kind).eps for kind in kinds)


def linear_output(model: PreTrainedModel, logits: Callable[[], Tensor]) -> tuple[Tensor, OutputLayer] | None:
    """Hidden states and output layer of one forward pass, without its logits; None where these are needed.

    The model is handed numbers of our own in the output layer's place, and what comes out tells what it does with
    them, whatever its config calls it. Logits are needed where that is more than a factor or a soft cap, where it
    depends on anything but these numbers, such as a trainable factor, and where the layer is not a plain linear one
    that nobody else listens to.

    Args:
        model: the model.
        logits: runs it, and returns all its logits.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or _is_listened_to(layer):
        return None
    x = _numbers(layer.weight)
    # Two rows and two positions, to see whether they are all treated alike.
    with watched_output(model, lambda _: Probe(x.repeat(2, 2, 1))) as seen:
        try:
            z = logits()
        except Exception:  # of whatever kind: the model may not cope with numbers of such a shape
            if not seen:
                raise
            return None
    scaling = _find_scaling(x, z) if len(seen) == 1 else None
    if scaling is None:
        return None
    hidden, weight, bias = seen[0]
    return hidden, OutputLayer(weight, bias, scaling)


def _is_listened_to(layer: torch.nn.Module) -> bool:
    """Whether something besides the model sees what the layer is given or returns, or takes its place."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(hooks) or _has_any_global_hook() or "forward" in layer.__dict__


def _numbers(weight: Tensor) -> Tensor:
    """[V], large and small: powers of two, which a factor turns into multiples of itself without rounding."""
    exponents = (torch.arange(len(weight), device=weight.device) - 1) % 24 - 10
    x = torch.pow(2.0, exponents).to(torch.promote_types(weight.dtype, torch.float32))
    x[1::2] *= -1
    return x


def _find_scaling(x: Tensor, z: Tensor) -> Scaling | None:
    """What has made z [..., V] of x [V]."""
    z = z.values if isinstance(z, Probe) else None
    if z is None or not z.is_floating_point() or z.numel() == 0 or z.shape[-1] != len(x):
        return None
    tolerance = 8 * torch.finfo(z.dtype).eps
    for scaling in (Scaling(float(z.flatten()[0] / x[0])), Scaling(1.0, float(z.abs().max()))):
        if torch.allclose(scaling(x).expand(z.shape), z.to(x.dtype), rtol=tolerance, atol=0):
            return scaling
    return None


class Probe(Tensor):
    """Numbers for a model to do with as it does with its logits: what is made of them alone is a Probe again.

    What is made of them and any other tensor is a plain tensor. So a result that is a Probe depends on no parameter,
    hidden state or token, however derivatives are being taken at the time.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values: Tensor):
        self.values = values

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        arguments = args, kwargs or {}
        alone = all(isinstance(x, Probe) for x in tree_leaves(arguments) if isinstance(x, Tensor))
        args, kwargs = tree_map(lambda x: x.values if isinstance(x, Probe) else x, arguments)
        result = func(*args, **kwargs)
        if not alone or isinstance(result, torch.Size):
            return result
        return tree_map(lambda x: Probe(x) if isinstance(x, Tensor) else x, result)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"{func} on numbers that only PyTorch's functions may see")
