"""Rules of elementary operations: what becomes of a Jet's derivatives in a product, an activation, a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltah.derivatives.jets import RULES, Jet, Refused, aten, generic, new_jet, order_of, parts


def _new(func, x: Any, *args, **kwargs) -> Tensor:
    """A tensor to be filled, maybe with what moves: it gets room for coefficients."""
    value = func(parts(x)[0], *args, **kwargs)
    return new_jet(value, *(torch.zeros_like(value) for _ in range(order_of(x))))


def _sum(func, a: Any, b: Any, **kwargs) -> Tensor:
    """Of what is broadcast; a number added moves nothing."""
    order = order_of(a, b)
    a, b = parts(a, order), parts(b, order)
    value = func(a[0], b[0], **kwargs)
    rest = []
    for x, y in zip(a[1:], b[1:], strict=True):
        if y is None:
            # A copy, as the sum shares no memory with its terms.
            rest.append(None if x is None else torch.empty_like(value).copy_(x))
        else:
            rest.append(func(torch.zeros_like(value) if x is None else x, y, **kwargs))
    return new_jet(value, *rest)


def of_product(times: Callable[[Any, Any], Tensor], add: Callable[[Tensor, Any, Any, int], Tensor],
                a: tuple, b: tuple) -> list[Tensor | None]:
    """Derivatives of any bilinear function `times`; `add` adds so many times the product to what it is given."""

    def total(*terms: tuple[int, Any, Any]) -> Tensor | None:
        terms = [t for t in terms if t[1] is not None and t[2] is not None]
        if not terms:
            return None
        (factor, x, y), *others = terms
        found = times(x, y)
        if factor != 1:
            found *= factor
        for factor, x, y in others:
            found = add(found, x, y, factor)
        return found

    found = [total((1, a[1], b[0]), (1, a[0], b[1]))]
    if len(a) > 2:
        found.append(total((1, a[2], b[0]), (1, a[0], b[2]), (2, a[1], b[1])))
    return found


def _mul(func, a: Any, b: Any) -> Tensor:
    if a is b:
        return _square(func, a)
    kinds = {x.dtype for x in (a, b) if isinstance(x, Tensor)}

    def add(total, x, y, factor):
        return total.addcmul_(x, y, value=factor) if len(kinds) == 1 else total.add_(x * y, alpha=factor)
    return _product(func, add, a, b)


def _product(func, add: Callable[[Tensor, Any, Any, int], Tensor], a: Any, b: Any) -> Tensor:
    order = order_of(a, b)
    a, b = parts(a, order), parts(b, order)
    return new_jet(func(a[0], b[0]), *of_product(func, add, a, b))


def _square(func, x: Jet) -> Tensor:
    value = x.coefficients[0]
    return _chain(x, value * value, 2 * value, lambda: torch.full_like(value, 2))


def _pow(func, x: Any, exponent: Any) -> Tensor:
    if isinstance(x, Jet) and isinstance(exponent, (int, float)) and exponent == 2:
        return _square(func, x)
    return generic(func, (x, exponent), {})


def _div(func, a: Any, b: Any, **kwargs) -> Tensor:
    if kwargs:
        return generic(func, (a, b), kwargs)
    (y, *moves), order = parts(b), order_of(a, b)
    if all(c is None for c in moves):
        return new_jet(*(None if c is None else c / y for c in parts(a, order)))
    return generic(func, (a, b), kwargs)


def _mm(func, a: Any, b: Any) -> Tensor:
    return _product(func, lambda total, x, y, factor: total.addmm_(x, y, alpha=factor), a, b)


def _bmm(func, a: Any, b: Any) -> Tensor:
    return _product(func, lambda total, x, y, factor: total.baddbmm_(x, y, alpha=factor), a, b)


def _bilinear(func, a: Any, b: Any) -> Tensor:
    return _product(func, lambda total, x, y, factor: total.add_(func(x, y), alpha=factor), a, b)


def _addmm(func, bias: Any, a: Any, b: Any, **kwargs) -> Tensor:
    if kwargs:
        raise Refused(f"{func} with factors")
    order = order_of(bias, a, b)
    bias, a, b = (parts(x, order) for x in (bias, a, b))
    rest = of_product(torch.mm, lambda total, x, y, factor: total.addmm_(x, y, alpha=factor), a, b)
    return _plus(bias, func(bias[0], a[0], b[0]), rest, lambda c: c)


def _baddbmm(func, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    order = order_of(bias, a, b)
    bias, a, b = (parts(x, order) for x in (bias, a, b))
    value = func(bias[0], a[0], b[0], beta=beta, alpha=alpha)
    rest = of_product(torch.bmm, lambda total, x, y, factor: total.baddbmm_(x, y, alpha=factor), a, b)
    rest = [c if c is None or alpha == 1 else c.mul_(alpha) for c in rest]
    return _plus(tuple(c if c is None or beta == 1 else beta * c for c in bias), value, rest, lambda c: c)


def _convolution(func, x: Any, weight: Any, bias: Any, *args) -> Tensor:
    def times(a, b):
        return func(a, b, None, *args)
    order = order_of(x, weight, bias)
    x, weight, bias = (parts(y, order) for y in (x, weight, bias))
    rest = of_product(times, lambda total, a, b, factor: total.add_(times(a, b), alpha=factor), x, weight)
    return _plus(bias, func(x[0], weight[0], bias[0], *args), rest, lambda c: c.view(-1, *(1,) * (x[0].ndim - 2)))


def _plus(bias: tuple, value: Tensor, rest: list[Tensor | None], shape: Callable[[Tensor], Tensor]) -> Tensor:
    """`value` has the bias already."""
    for k, c in enumerate(bias[1:]):
        if c is not None:
            rest[k] = torch.empty_like(value).copy_(shape(c)) if rest[k] is None else rest[k].add_(shape(c))
    return new_jet(value, *rest)


def _chain(x: Jet, value: Tensor, slope: Tensor, bend: Callable[[], Tensor] | None) -> Tensor:
    """f(x), given f, f' and how to compute f'' there; f' and f'' are overwritten."""
    _, first, *seconds = x.coefficients
    if first is None:
        return new_jet(value, None, *(None if c is None else slope.mul_(c) for c in seconds))
    curves = [None if c is None else slope * c for c in seconds]
    if curves and bend is not None:
        curve = bend().mul_(first).mul_(first)
        curves = [curve if c is None else c.add_(curve) for c in curves]
    return new_jet(value, slope.mul_(first), *curves)


def _silu(func, x: Jet) -> Tensor:
    z = x.coefficients[0]
    s = z.sigmoid()
    value, t = z * s, 1 - s
    w = value * t
    slope = s + w
    # f'' = (1 − s)(2 s + f (1 − 2 s))
    return _chain(x, value, slope, lambda: t.sub(s).mul_(w).addcmul_(s, t, value=2))


def _gelu(func, x: Jet, approximate: str = "none") -> Tensor:
    z = x.coefficients[0]
    value = func(z, approximate=approximate)
    if approximate == "tanh":
        k, a = math.sqrt(2 / math.pi), 0.044715
        square = z * z
        u_1 = (square * (3 * a)).add_(1).mul_(k)
        t = square.mul(a).add_(1).mul_(z).mul_(k).tanh_()
        s = 1 - t * t
        half = z / 2
        slope = (t / 2).add_(0.5).addcmul_(half, s * u_1)
        return _chain(x, value, slope,
                      lambda: (z * (6 * k * a)).sub_(2 * t * u_1 * u_1).mul_(half).add_(u_1).mul_(s))
    density = (z * z).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    slope = (z * math.sqrt(0.5)).erf_().add_(1).mul_(0.5).addcmul_(z, density)
    return _chain(x, value, slope, lambda: (2 - z * z).mul_(density))


def _exp(func, x: Jet) -> Tensor:
    value = x.coefficients[0].exp()
    return _chain(x, value, value.clone(), value.clone)


def _tanh(func, x: Jet) -> Tensor:
    value = x.coefficients[0].tanh()
    slope = 1 - value * value
    return _chain(x, value, slope, lambda: value * slope * -2)


def _sigmoid(func, x: Jet) -> Tensor:
    value = x.coefficients[0].sigmoid()
    slope = value * (1 - value)
    return _chain(x, value, slope, lambda: (1 - 2 * value).mul_(slope))


def _relu(func, x: Jet) -> Tensor:
    value = x.coefficients[0]
    return _chain(x, value.relu(), (value > 0).to(value.dtype), None)


def _rsqrt(func, x: Jet) -> Tensor:
    z = x.coefficients[0]
    value = z.rsqrt()
    slope = value / z * -0.5
    return _chain(x, value, slope, lambda: slope / z * -1.5)


def _softmax(func, x: Jet, dim: int, *args) -> Tensor:
    """p' = p d with d = z' − Σ p z', and p'' = p (q − Σ p q) with q = z'' + d²."""
    z, z_1, *seconds = x.coefficients
    p = func(z, dim, *args)
    z_1 = torch.zeros_like(p) if z_1 is None else z_1.to(p.dtype)
    first = p * z_1
    d = z_1 - first.sum(dim, keepdim=True)
    first = torch.mul(p, d, out=first)
    curves = []
    for z_2 in seconds:
        second = first * d
        if z_2 is not None:
            second.addcmul_(p, z_2.to(p.dtype))
        curves.append(second.addcmul_(p, second.sum(dim, keepdim=True), value=-1))
    return new_jet(p, first, *curves)


def _log_softmax(func, x: Jet, dim: int, *args) -> Tensor:
    """Of its exponentials p: z' − Σ p z' = d, and z'' − Σ p (z'' + d²)."""
    value = func(x.coefficients[0], dim, *args)
    p = value.exp()
    z_1, *seconds = (torch.zeros_like(p) if c is None else c.to(p.dtype) for c in x.coefficients[1:])
    d = z_1 - (p * z_1).sum(dim, keepdim=True)
    return new_jet(value, d, *(z_2 - (z_2 + d * d).mul_(p).sum(dim, keepdim=True) for z_2 in seconds))


def _logsumexp(func, x: Jet, dim: Any, keepdim: bool = False) -> Tensor:
    z = x.coefficients[0]
    value = func(z, dim, True)
    p = (z - value).exp()
    z_1, *seconds = (torch.zeros_like(p) if c is None else c for c in x.coefficients[1:])
    first = (p * z_1).sum(dim, keepdim=True)
    curves = [((z_1 - first).square() + z_2).mul_(p).sum(dim, keepdim=True) for z_2 in seconds]
    return new_jet(*(c if keepdim else c.squeeze(dim) for c in (value, first, *curves)))


def _picked(func, x: Jet, *args, **kwargs) -> Any:
    """Values and indices of the largest, or sorted: the derivatives are those at the indices."""
    found = func(x.coefficients[0], *args, **kwargs)
    if isinstance(found, Tensor):
        return generic(func, (x, *args), kwargs)
    values, indices = found
    schema = [a.name for a in func._schema.arguments][1:]
    given = dict(zip(schema, args, strict=False)) | kwargs
    dim, gone = given.get("dim", -1), values.ndim < x.ndim
    at = indices.unsqueeze(dim) if gone else indices
    rest = [None if c is None else c.gather(dim, at) for c in x.coefficients[1:]]
    return type(found)((new_jet(values, *(c.squeeze(dim) if gone and c is not None else c for c in rest)), indices))


RULES.update({
    aten.add: _sum, aten.sub: _sum, aten.mul: _mul, aten.div: _div, aten.square: _square, aten.pow: _pow,
    aten.mm: _mm, aten.bmm: _bmm, aten.mv: _bilinear, aten.dot: _bilinear, aten.addmm: _addmm, aten.baddbmm: _baddbmm,
    aten.convolution: _convolution, aten.silu: _silu, aten.gelu: _gelu, aten.exp: _exp, aten.tanh: _tanh,
    aten.sigmoid: _sigmoid, aten.relu: _relu, aten.rsqrt: _rsqrt, aten._softmax: _softmax,
    aten._safe_softmax: _softmax, aten._log_softmax: _log_softmax, aten.logsumexp: _logsumexp, aten.topk: _picked,
    aten.sort: _picked, aten.max: _picked, aten.min: _picked,
    **{operation: _new for operation in (aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like,
                                         aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full)}})
