"""Whole functions that meet Jets in a form of their own: attention, and the vocabulary's log-probs and entropies.

PyTorch would take them apart in a way that costs more, or cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltah import vocabulary
from deltah.derivatives.jets import Jet, Refused, new_jet, order_of, parts
from deltah.derivatives.operations import of_product
from deltah.vocabulary import Scaling


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
                             bias: Tensor | None = None, scale: float = 1.0, soft_cap: float | None = None,
                             moments: bool = False) -> tuple[Tensor, Tensor]:
    """`vocabulary.linear_log_probs_and_entropies`; a tile's logits z, z' and z'' exist at a time.

    With means E and covariances over the vocabulary, and d = z' − E z', q = z'' + d²

        S' = z'_t − E z',    S'' = z''_t − E q,    H' = −Cov(z, d),    H'' = −E d² − Cov(z, q),

    as ∂ Cov(z, z') = Cov(z', z') + Cov(z, z'') + E (z − E z) d².
    """
    if moments:
        raise Refused("the moments of p²")
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
    x = [value, *of_product(times, lambda total, x, y, factor: total.addmm_(x, y.T, alpha=factor), h, w)]
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


FUNCTIONS: dict[Any, Callable] = {
    F.scaled_dot_product_attention: _attention,
    vocabulary.linear_log_probs_and_entropies: _log_probs_and_entropies}
