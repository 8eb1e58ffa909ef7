"""Derivatives along one direction, faster than forward mode and its nesting: rules for what models are made of.

`derivatives_along` sends Jets through a function; where it does something that no rule covers, it takes forward mode
instead, so that nothing is lost in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from deltah.derivatives.functions import FUNCTIONS
from deltah.derivatives.jets import Jet, Refused, coefficient, new_jet

logger = logging.getLogger(__name__)
Function = Callable[[dict[str, Tensor]], tuple[Sequence[Tensor], Any]]


def derivatives_along(function: Function, parameters: Mapping[str, Tensor], v: Mapping[str, Tensor], order: int
                      ) -> tuple:
    """Values of a function along θ + ηv, and their derivatives in η, at η = 0.

    Args:
        function: takes tensors by name, returns (a tuple of floating-point tensors, another tensor).
        parameters: θ.
        v: the direction, of the same names and shapes.
        order: 1 or 2.

    Returns:
        (values, first derivatives, the other tensor, undifferentiated), with second derivatives before the last for
        order 2.

    Raises:
        RuntimeError: an operation that has no forward mode.

    >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    >>> derivatives_along(lambda p: ((p["x"].exp().sum(),), p["x"]), {"x": x}, {"x": v}, order=2)[:3]
    ((tensor(10.1073),), (tensor(24.8854),), (tensor(69.2198),))
    """
    # Without grad mode some backward formulas, of which tangents are made, cannot be differentiated once more.
    with torch.enable_grad():
        try:
            return _by_jets(function, parameters, v, order)
        except Exception as error:  # whatever stopped them: forward mode does without, or says what is wrong
            logger.info("forward mode, as Jets were stopped by %s: %s", type(error).__name__, error)
        # Past the handler, which keeps alive what has been computed.
        return _by_forward_mode(function, parameters, v, order)


def _by_jets(function: Function, parameters: Mapping[str, Tensor], v: Mapping[str, Tensor], order: int) -> tuple:
    with _Functions():
        values, rest = function({name: new_jet(p, v[name], *(None,) * (order - 1)) for name, p in parameters.items()})
    orders = [tuple(coefficient(x, k) for x in values) for k in range(order + 1)]
    return *orders, tree_map(lambda x: x.coefficients[0] if isinstance(x, Jet) else x, rest)


def _by_forward_mode(function: Function, parameters: Mapping[str, Tensor], v: Mapping[str, Tensor],
                     order: int) -> tuple:
    def along(function):
        def differentiated(theta):
            values, tangents, rest = torch.func.jvp(function, (theta,), (dict(v),), has_aux=True)
            return (values, tangents), rest
        return differentiated

    if order == 1:
        (values, firsts), rest = along(function)(dict(parameters))
        return values, firsts, rest
    ((values, firsts), (_, seconds)), rest = along(along(function))(dict(parameters))
    return values, firsts, seconds, rest


class _Functions(TorchFunctionMode):
    """What is to be caught before PyTorch takes it apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.data.__set__:
            # It swaps a tensor's memory, of which a Jet has none.
            raise Refused("a tensor's data replaced")
        if func in FUNCTIONS and any(isinstance(x, Jet) for x in args):
            func = FUNCTIONS[func]
        return func(*args, **(kwargs or {}))
