"""A model's output layer, from hidden states to logits: what it is given, and what the model does with the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

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


def find_scaling(model: PreTrainedModel, size: int, logits: Callable[[Tensor], Tensor]) -> Scaling | None:
    """What the model does to x = h W^T + b of its output layer; None where it is no linear layer, or more is done.

    Found by handing the model numbers of our own in the output layer's place, whatever its config calls them.

    Args:
        model: the model.
        size: of its vocabulary.
        logits: runs the model on token ids [1, 1].
    """
    layer = model.get_output_embeddings()
    hooks = layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__
    if type(layer) is not torch.nn.Linear or hooks or layer.weight.shape[0] != size:
        return None
    # Powers of two, which a factor turns into multiples of itself without rounding.
    device, dtype = layer.weight.device, layer.weight.dtype
    x = torch.pow(2.0, torch.arange(size, device=device) % 24 - 10.0).to(dtype)
    x[1::2] *= -1
    try:
        with torch.no_grad(), watched_output(model, lambda h: x.expand(*h.shape[:-1], size)):
            z = logits(torch.zeros(1, 1, dtype=torch.long, device=device))[0, -1]
    except RuntimeError:
        return None
    tolerance = 8 * torch.finfo(z.dtype).eps
    for scaling in (Scaling(float(z[0] / x[0])), Scaling(1.0, float(z.abs().max()))):
        wanted = scaling(x.to(torch.promote_types(x.dtype, torch.float32)))
        if torch.allclose(wanted, z.to(wanted.dtype), rtol=tolerance, atol=0):
            return scaling
    return None
