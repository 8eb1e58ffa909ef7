"""Derivatives along one direction, faster than forward mode and its nesting: rules for what models are made of.

`derivatives_along` sends Jets through a function; where it does something that no rule covers, it takes forward mode
instead, so that nothing is lost in silence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from deltah import vocabulary
from deltah.derivatives.jets import RULES, Jet, Refused, aten, coefficient, generic, new_jet, order_of, parts
from deltah.vocabulary import Scaling

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


def _of_product(times: Callable[[Any, Any], Tensor], add: Callable[[Tensor, Any, Any, int], Tensor],
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
    return new_jet(func(a[0], b[0]), *_of_product(func, add, a, b))


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
    rest = _of_product(torch.mm, lambda total, x, y, factor: total.addmm_(x, y, alpha=factor), a, b)
    return _plus(bias, func(bias[0], a[0], b[0]), rest, lambda c: c)


def _convolution(func, x: Any, weight: Any, bias: Any, *args) -> Tensor:
    def times(a, b):
        return func(a, b, None, *args)
    order = order_of(x, weight, bias)
    x, weight, bias = (parts(y, order) for y in (x, weight, bias))
    rest = _of_product(times, lambda total, a, b, factor: total.add_(times(a, b), alpha=factor), x, weight)
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


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """Scaled dot-product attention in its mathematical form; the heads that share keys are taken together."""
    shape, length = query.shape, key.shape[-2]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    unusual = dropout_p or len(shape) != 4 or attn_mask is not None and (
        is_causal or isinstance(attn_mask, Jet) or bool((attn_mask == -torch.inf).all(-1).any()))
    if unusual:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                              enable_gqa=enable_gqa)
    groups = shape[1] // key.shape[1] if enable_gqa else 1
    query = (query * (shape[-1]**-0.5 if scale is None else scale)).reshape(shape[0], shape[1] // groups, -1, shape[3])
    scores = (query @ key.transpose(-1, -2)).view(*shape[:3], length)
    if is_causal:
        attn_mask = torch.full((shape[2], length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    if attn_mask is not None:
        # Where the mask is −∞ the softmax is 0, whatever the derivatives.
        parts(scores)[0].add_(attn_mask)
    weights = scores.softmax(-1).view(*query.shape[:3], length)
    return (weights @ value).view(*shape[:3], value.shape[-1])


def _log_probs_and_entropies(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                             bias: Tensor | None = None, scale: float = 1.0,
                             soft_cap: float | None = None) -> tuple[Tensor, Tensor]:
    """`vocabulary.linear_log_probs_and_entropies`; a tile's logits z, z' and z'' exist at a time.

    With means E and covariances over the vocabulary, and d = z' − E z', q = z'' + d²

        S' = z'_t − E z',    S'' = z''_t − E q,    H' = −Cov(z, d),    H'' = −E d² − Cov(z, q),

    as ∂ Cov(z, z') = Cov(z', z') + Cov(z, z'') + E (z − E z) d².
    """
    scaling, order = Scaling(scale, soft_cap, temperature), order_of(hidden, weight, bias)
    h, w, b = (parts(x, order) for x in (hidden.reshape(-1, hidden.shape[-1]), weight, bias))
    target = targets.reshape(-1)
    kind = torch.promote_types(hidden.dtype, torch.float32)
    rows: dict[int, _Sums] = {}
    with torch.no_grad():
        for tile in vocabulary._tiles(target, len(weight)):
            z = _tile_logits(*(tuple(None if c is None else c[s] for c in x)
                               for x, s in ((h, tile.rows), (w, tile.columns), (b, tile.columns))), scaling)
            rows[tile.rows.start] = _sums(tile, z, rows.get(tile.rows.start), bias is not None)
        chosen, origin, (n, *sums) = ([torch.cat(x) for x in zip(*field, strict=True)]
                                      for field in zip(*rows.values(), strict=True))
        u, d, ud, *curves = (x / n for x in sums)
        means, entropies = [n.log(), d], [n.log() - u, u * d - ud]
        if curves:
            dd, q, uq = curves
            means.append(q - d * d)
            entropies.append(u * q - uq + d * (2 * ud - 2 * u * d) - dd + d * d)
        log_probs = [x - y - z for x, y, z in zip(chosen, origin, means, strict=True)]
    return tuple(new_jet(*(x.to(kind).view(targets.shape) for x in jet)) for jet in (log_probs, entropies))


def _tile_logits(h: tuple, w: tuple, b: tuple, scaling: Scaling) -> list[Tensor]:
    """z, z' and, of second order, z''."""
    def times(x, y):
        return x @ y.T
    value = times(h[0], w[0])
    x = [value, *_of_product(times, lambda total, x, y, factor: total.addmm_(x, y.T, alpha=factor), h, w)]
    x = [torch.zeros_like(value) if c is None else c for c in x]
    x = [c.to(torch.promote_types(c.dtype, torch.float32)) for c in (c if y is None else c.add_(y)
                                                                     for c, y in zip(x, b, strict=True))]
    factor = scaling.scale / scaling.temperature
    if scaling.soft_cap is None:
        return [c if factor == 1 else c.mul_(factor) for c in x]
    # z = c tanh(y) / temperature with y = scale · x / c
    value, first, *seconds = (c.mul_(scaling.scale / scaling.soft_cap) for c in x)
    value.tanh_()
    slope = 1 - value * value
    for second in seconds:
        second.addcmul_(first * first, value, value=-2).mul_(slope)
    return [c.mul_(scaling.soft_cap / scaling.temperature) for c in (value, first.mul_(slope), *seconds)]


class _Sums(NamedTuple):
    """Of some rows, over the vocabulary so far, [rows] each in float64, with u = z − max z, and d and q from `origin`.

    Attributes:
        chosen: z, z' and z'' of the target.
        origin: what z, z' and z'' are counted from: max z, and the means over the first tile.
        sums: of e^u times 1, u, d, u d and, of second order, d², q, u q.
    """

    chosen: list[Tensor]
    origin: list[Tensor]
    sums: list[Tensor]


def _sums(tile: vocabulary._Tile, z: list[Tensor], before: _Sums | None, has_bias: bool) -> _Sums:
    """With what a tile adds; z is overwritten."""
    u, d, *seconds = z
    nothing = u.new_zeros(len(u))
    chosen = [tile.at_target(x, nothing).double() for x in z]
    if has_bias:
        # A bias of −inf is a probability of zero, and 0 · −inf is NaN.
        u = u.clamp_(min=torch.finfo(u.dtype).min / 4)
    top = u.amax(1)
    if before is not None:
        top = torch.maximum(top, before.origin[0].to(top.dtype))
    u -= top[:, None]
    e = u.exp()
    total = e.sum(1)
    # Counted from the first tile's mean, the sums of squares do not cancel.
    means = [torch.linalg.vecdot(e, x) / total for x in z[1:]] if before is None else [
        x.to(u.dtype) for x in before.origin[1:]]
    for x, mean in zip(z[1:], means, strict=True):
        x -= mean[:, None]
    eu = e * u
    products = [(e, u), (e, d), (eu, d)]
    for q in seconds:
        products += [(e * d, d), (e, q.addcmul_(d, d)), (eu, q)]
    sums = [x.double() for x in (total, *(torch.linalg.vecdot(x, y) for x, y in products))]
    if before is not None:
        shift = before.origin[0] - top.double()
        n, of_u, of_d, of_ud, *curves = before.sums
        earlier = [n, of_u + shift * n, of_d, of_ud + shift * of_d, *curves]
        if curves:
            earlier[-1] = curves[2] + shift * curves[1]
        sums = [x + shift.exp() * y for x, y in zip(sums, earlier, strict=True)]
        chosen = [torch.where(tile.inside[:, 0], x, y) for x, y in zip(chosen, before.chosen, strict=True)]
    return _Sums(chosen, [top.double(), *(x.double() for x in means)], sums)


RULES.update({
    aten.add: _sum, aten.sub: _sum, aten.mul: _mul, aten.div: _div, aten.square: _square, aten.pow: _pow,
    aten.mm: _mm, aten.bmm: _bmm, aten.mv: _bilinear, aten.dot: _bilinear, aten.addmm: _addmm,
    aten.convolution: _convolution, aten.silu: _silu, aten.gelu: _gelu, aten.exp: _exp, aten.tanh: _tanh,
    aten.sigmoid: _sigmoid, aten.relu: _relu, aten.rsqrt: _rsqrt, aten._softmax: _softmax,
    aten._safe_softmax: _softmax, aten._log_softmax: _log_softmax, aten.logsumexp: _logsumexp, aten.topk: _picked,
    aten.sort: _picked, aten.max: _picked, aten.min: _picked,
    **{operation: _new for operation in (aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like,
                                         aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full)}})
# Functions that PyTorch would take apart in a way that costs more, or cannot.
FUNCTIONS: dict[Any, Callable] = {
    F.scaled_dot_product_attention: _attention,
    vocabulary.linear_log_probs_and_entropies: _log_probs_and_entropies}

