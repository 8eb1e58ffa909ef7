"""Derivatives along one direction, faster than forward mode and its nesting: rules for what models are made of.

`derivatives_along` sends Jets through a function; where it does something that no rule covers, it takes forward mode
instead. That takes for constant what a model detaches, or turns into numbers, and for granted the derivatives that
custom functions bring; `_AllThatMoves` sees to it that nothing is lost in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

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
        Refused: something whose derivative is not known. RuntimeError: an operation that has no forward mode.

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

    def watched(theta):
        with _AllThatMoves():
            return function(theta)

    if order == 1:
        (values, firsts), rest = along(watched)(dict(parameters))
        return values, firsts, rest
    ((values, firsts), (_, seconds)), rest = along(along(watched))(dict(parameters))
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


DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}
# To what no derivative belongs.
NUMBERS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.__int__,
           Tensor.__index__, Tensor.__complex__}
STEPS = {getattr(home, name) for home in (torch, Tensor) for name in (
    "round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "floor_divide", "round_", "floor_", "ceil_",
    "trunc_", "fix_", "sign_", "sgn_", "heaviside_", "floor_divide_", "__floordiv__") if hasattr(home, name)}
CASTS = {Tensor.to, Tensor.type, Tensor.int, Tensor.long, Tensor.short, Tensor.char, Tensor.byte}
# Tensors filled with something else.
FILLED = {*(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")),
          *(getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "full", "empty"))}


class _AllThatMoves(TorchFunctionMode):
    """Inside, forward mode keeps the derivative of what is detached, and is refused where it would lose one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(map(_moves, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func in DETACHES:
            return args[0].view_as(args[0])
        name = getattr(func, "__name__", func)
        if func in NUMBERS or func == Tensor.data.__set__:
            raise Refused(f"{name} takes what moves out of PyTorch's sight")
        if name == "custom_function_call":
            raise Refused("a custom function has a derivative of its own, which need not be that of what it computes")
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if func in STEPS or kwargs.get("rounding_mode") is not None or func in CASTS and not any(
                x.is_floating_point() or x.is_complex() or x.dtype == torch.bool for x in made):
            raise Refused(f"{name} rounds what moves: no derivative tells how far its jumps are")
        floating = [x for x in made if x.is_floating_point() or x.is_complex()]
        if floating and func not in FILLED and not any(map(_moves, floating)):
            raise Refused(f"{name} of what moves gives something that does not")
        return result


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
