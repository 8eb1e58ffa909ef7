"""Derivatives along one direction, by Taylor series cut off after the first or the second order.

Forward mode nested in itself carries (x, x', x', x'') through a model and computes x' twice: a product costs eight. A
`Jet` carries (x, x') or (x, x', x''), and a product y = a b costs three or six, or five where b'' = 0, as of parameters
θ + ηv:

    y = a b,    y' = a' b + a b',    y'' = a'' b + 2 a' b' + a b'',
    y = f(x),   y' = f' x',          y'' = f' x'' + f'' x'².

A Jet is a tensor without memory of its own. PyTorch hands each of its elementary operations that meets one to a rule
here, whoever called it; what has no rule, and what reads memory past PyTorch, raises. Here are the rules of operations
that are linear, and the general one; `operations` has those of all others.

So the derivative is that of the function that runs. What a model hides from backward passes, by `detach`, `no_grad` or
a backward of its own, moves with the parameters all the same, as DoRA's norm of the weights does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Refused(Exception):
    """Something was done with a Jet that no rule covers."""


class Jet(Tensor):
    """A tensor x along θ + ηv: `coefficients` are x, x' and, of second order, x''; None where x' or x'' is zero.

    They have the same strides, and share memory with those of another Jet as the tensors themselves would. So
    views of a Jet are made of views, and what is written into one shows in the other.
    """

    coefficients: tuple[Tensor | None, ...]

    @staticmethod
    def __new__(cls, *coefficients: Tensor | None):
        x = coefficients[0]
        return Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)

    def __init__(self, *coefficients: Tensor | None):
        self.coefficients = coefficients

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, operation = kwargs or {}, func.overloadpacket
        if any(isinstance(x, Jet) for x in kwargs.values()) or "reduce" in kwargs:
            raise Refused(f"{func} with arguments that no rule knows")
        if func._schema.is_mutable:
            return _in_place(func, args, kwargs)
        if operation is aten.detach:
            # What is detached moves all the same. It shares the memory of all coefficients, as a view does.
            return Jet(*args[0].coefficients)
        if operation in STEPS or kwargs.get("rounding_mode") is not None:
            raise Refused(f"{func} rounds what moves: no derivative tells how far its jumps are")
        if operation in RULES:
            return RULES[operation](func, *args, **kwargs)
        if operation in LINEAR or func.is_view and func not in NOT_LINEAR:
            return _linear(func, args, kwargs)
        if operation in CONSTANT:
            return _plain(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags and (
                torch.Tag.pointwise in func.tags or operation in GENERIC):
            return generic(func, args, kwargs)
        raise Refused(f"{func} has no rule")


def new_jet(value: Tensor, *derivatives: Tensor | None) -> Tensor:
    """A Jet, or a plain tensor where nothing moves; derivatives may be of fewer dimensions, or laid out otherwise."""
    if all(c is None for c in derivatives) or not _is_differentiable(value):
        return value
    rest = [c if c is None or c.stride() == value.stride() and c.shape == value.shape and c.dtype == value.dtype
            else torch.empty_like(value).copy_(c) for c in derivatives]
    if any(c is not None and c.stride() != value.stride() for c in rest):
        value, *rest = (None if c is None else c.contiguous() for c in (value, *rest))
    return Jet(value, *rest)


def _is_differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def order_of(*xs: Any) -> int:
    """Of the Jets among values and lists of them, which all have the same; 0 without any."""
    return max((order_of(*x) if isinstance(x, (list, tuple)) else len(parts(x)) - 1 for x in xs), default=0)


def parts(x: Any, order: int = 0) -> tuple:
    """The coefficients of x, a value; a plain tensor or a number has that of order 0, and None up to `order`."""
    return x.coefficients if isinstance(x, Jet) else (x, *(None,) * order)


def coefficient(x: Any, order: int) -> Any:
    """One coefficient of x, a value or a list of them, 0 where there is none."""
    if isinstance(x, (list, tuple)):
        return [coefficient(y, order) for y in x]
    if not isinstance(x, Tensor):
        return x if order == 0 else 0
    found = parts(x, order)[order]
    return torch.zeros_like(parts(x)[0]) if found is None else found


def _has(x: Any, order: int) -> bool:
    if isinstance(x, (list, tuple)):
        return any(_has(y, order) for y in x)
    return isinstance(x, Jet) and x.coefficients[order] is not None


def _plain(func, args: Sequence, kwargs: Mapping) -> Any:
    return func(*tree_map(lambda x: parts(x)[0], tuple(args), is_leaf=lambda x: isinstance(x, Tensor)), **kwargs)


def _at(func, args: Sequence, order: int) -> list:
    """The arguments of a function linear in some of them, with those replaced by their coefficients."""
    positions = LINEAR.get(func.overloadpacket, (0,))
    if any(_has(x, 0) for i, x in enumerate(args) if i not in positions):
        raise Refused(f"{func} of indices or conditions that move")
    return [coefficient(x, order) if i in positions else x for i, x in enumerate(args)]


def _linear(func, args: Sequence, kwargs: Mapping) -> Any:
    found = [func(*_at(func, args, k), **kwargs) if k == 0 or any(_has(x, k) for x in args) else None
             for k in range(order_of(*args) + 1)]
    if isinstance(found[0], Tensor):
        if not _is_differentiable(found[0]) and found[0].dtype != torch.bool:
            raise Refused(f"{func} rounds what moves: no derivative tells how far its jumps are")
        return _like_its_source(func, *found)
    rows = zip(*(f if f is not None else [None] * len(found[0]) for f in found), strict=True)
    return type(found[0])(_like_its_source(func, *row) for row in rows)


def _like_its_source(func, value: Tensor, *derivatives: Tensor | None) -> Tensor:
    """A view stays a Jet even of what is detached, and never gets memory of its own."""
    if not func.is_view:
        return new_jet(value, *derivatives)
    if any(c is not None and c.stride() != value.stride() for c in derivatives):
        raise Refused(f"{func} of coefficients laid out differently")
    return Jet(value, *derivatives)


def _in_place(func, args: Sequence, kwargs: Mapping) -> Any:
    """Write each coefficient into its own memory, where there is some."""
    name, x = func.overloadpacket.__name__, args[0]
    written = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if (written != [0] or not isinstance(x, Jet) or x.coefficients[1] is None or not hasattr(aten, name[:-1])
            or torch.Tag.inplace_view in func.tags):
        raise Refused(f"{func} writes where no coefficients are")
    operation = getattr(aten, name[:-1])
    if operation in LINEAR:
        if any(_has(y, 0) for i, y in enumerate(args) if i not in LINEAR[operation]):
            raise Refused(f"{func} of indices or conditions that move")
        new = None
    else:
        new = parts(Jet.__torch_dispatch__(_out_of_place(func, operation), (), args, kwargs), order_of(x))
    if x.coefficients[-1] is None and (any(_has(y, order_of(x)) for y in args) if new is None else new[-1] is not None):
        raise Refused(f"{func} writes where no second derivative is")
    for k, c in enumerate(x.coefficients):
        if c is not None and new is None:
            func(c, *(coefficient(y, k) if i in LINEAR[operation] else y
                      for i, y in enumerate(args) if i), **kwargs)
        elif c is not None:
            c.zero_() if new[k] is None else c.copy_(new[k])
    return x


def _out_of_place(func, operation):
    """The overload of the same arguments; its name may differ."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in operation.overloads():
        found = getattr(operation, name)
        if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    raise Refused(f"{func} is known in place only")


def generic(func, args: Sequence, kwargs: Mapping) -> Any:
    """Forward mode of one function, and nested: (x, x') moves along (x', x'')."""
    value = _plain(func, args, kwargs)
    if not isinstance(value, Tensor):
        raise Refused(f"{func} has no rule")
    order = order_of(*args)
    places = [i for i, x in enumerate(args) if any(_has(x, k) for k in range(1, order + 1))]
    if not places or not _is_differentiable(value):
        return value
    x, x_1, *x_2 = (tuple(coefficient(args[i], k) for i in places) for k in range(order + 1))

    def of(*moving):
        given = list(parts(a)[0] for a in args)
        for i, m in zip(places, moving, strict=True):
            given[i] = m
        return func(*given, **kwargs)

    def once(x, x_1):
        return torch.func.jvp(of, x, x_1)

    # Here, below automatic differentiation, its part of PyTorch is switched off; a model may have left grad mode.
    off = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off - off), torch.enable_grad():
        if order == 1:
            return new_jet(*once(x, x_1))
        (value, first), (_, second) = torch.func.jvp(once, (x, x_1), (x_1, *x_2))
    return new_jet(value, first, second)


# Rules of single operations, by `operations`.
RULES: dict[Any, Callable] = {}
# Linear operations other than views, and in which of their arguments.
LINEAR: dict[Any, tuple[int, ...]] = {
    **{operation: (0,) for operation in (
        aten._unsafe_view, aten.clone, aten._to_copy, aten.neg, aten.sum, aten.mean, aten.cumsum, aten.cat, aten.stack,
        aten.repeat, aten.flip, aten.roll, aten.tril, aten.triu, aten.gather, aten.index_select, aten.index,
        aten.embedding, aten.zero)},
    **{operation: (0, 1) for operation in (aten.add, aten.sub, aten.copy, aten.fill)},
    **{operation: (0, 2) for operation in (aten.masked_fill, aten.index_put, aten.constant_pad_nd)},
    **{operation: (0, 3) for operation in (aten.index_add, aten.index_copy, aten.scatter, aten.scatter_add)},
    aten.where: (1, 2)}
# Views that read the same memory as something else, or other memory.
NOT_LINEAR = {aten.view.dtype, aten.as_strided.default}
# Piecewise constant: zero where they have a derivative.
STEPS = {aten.round, aten.floor, aten.ceil, aten.trunc, aten.sign, aten.sgn, aten.heaviside, aten.floor_divide}
CONSTANT = {aten.argmax, aten.argmin, aten.argsort, aten.nonzero, aten.any, aten.all, aten.equal}
GENERIC = {aten.linalg_vector_norm, aten.amax, aten.amin, aten.var, aten.prod}
