"""What a model does with a trainable parameter, function by function, so that hooks get the gradient's factors.

A rule calls the function with the parameter detached, and has `watch` make each rollout's gradient of what the
backward pass brings; or with a copy of the parameter for each rollout, where it takes part elementwise. It returns
NotImplemented for a call that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltah.derivatives.factors import Factors, Formed, Lookup, kind_of

if TYPE_CHECKING:
    from deltah.derivatives.sample_gradients import Watch


def _linear(watch: Watch, func, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _product(watch, input, weight, bias, transposed=True)


def _addmm(watch: Watch, func, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return _product(watch, x, weight, bias) if beta == alpha == 1 else NotImplemented


def _matmul(watch: Watch, func, x: Tensor, weight: Tensor) -> Any:
    return _product(watch, x, weight, None)


def _product(watch: Watch, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Any:
    """x weight^T + bias, or x weight + bias with `transposed` False."""
    order, turned = watch.rows.by_rollout(x), transposed
    if weight in watch.watched:
        turned = turned != watch.watched[weight].transposed
    keys = [watch.watched[p].key for p in (weight, bias) if p is not None and p in watch.watched]
    if order is None or None in keys or x in watch.watched or weight.ndim != 2 or bias is not None and bias.ndim != 1:
        return NotImplemented
    out = F.linear(x, weight.detach() if transposed else weight.detach().T, None if bias is None else bias.detach())
    x, version, kind = x.detach(), x._version, kind_of(x)

    def of_weight(gradient):
        if x._version != version:
            raise RuntimeError("policy: the model has changed a layer's input in place, which its gradient needs")
        factors = order(gradient).to(kind), order(x).to(kind)
        return Factors(*factors) if turned else Factors(*reversed(factors))

    def of_bias(gradient):
        return Formed(order(gradient).to(kind).sum(1)[..., None])

    uses = (weight, of_weight), (bias, of_bias)
    return watch.use(out, *((p, make) for p, make in uses if p is not None and p in watch.watched))


def _embedding(watch: Watch, func, ids: Tensor, weight: Tensor, padding_idx: int | None = None,
               max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
               sparse: bool = False) -> Any:
    if len(ids) == 1:
        ids = ids.expand(watch.n, *ids.shape[1:])
    order = watch.rows.by_rollout(ids[..., None])
    key = watch.watched[weight].key if weight in watch.watched else None
    if order is None or key is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented

    def of_weight(gradient):
        rows = order(ids[..., None])[..., 0]
        right = order(gradient).to(kind_of(gradient))
        return Lookup(rows, right if padding_idx is None else right * (rows != padding_idx)[..., None])

    return watch.use(F.embedding(ids, weight.detach()), (weight, of_weight))


def _elementwise(watch: Watch, func, a: Any, b: Any, **kwargs) -> Any:
    parameter, other = (a, b) if isinstance(a, Tensor) and a in watch.watched else (b, a)
    copies = watch.watched[parameter].copies
    spread = copies and watch.rows.spread(copies(), other)
    if spread is None:
        return NotImplemented
    return func(spread, b, **kwargs) if parameter is a else func(a, spread, **kwargs)


def _layer_norm(watch: Watch, func, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5) -> Any:
    return _scaled(watch, F.layer_norm(x, normalized_shape, None, None, eps), x, weight, bias)


def _rms_norm(watch: Watch, func, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
              eps: float | None = None) -> Any:
    return _scaled(watch, F.rms_norm(x, normalized_shape, None, eps), x, weight, None)


def _scaled(watch: Watch, normed: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    if x in watch.rows.picked:
        watch.rows.picked[normed] = watch.rows.picked[x]
    for func, p in ((torch.mul, weight), (torch.add, bias)):
        if p is not None:
            normed = _elementwise(watch, func, normed, p) if p in watch.watched else func(normed, p)
            if normed is NotImplemented:
                return NotImplemented
    return normed


def _conv1d(watch: Watch, func, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
            padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    """One convolution of n times the groups."""
    copies = [None if p is None else p.expand(watch.n, *p.shape) if p not in watch.watched else
              (watch.watched[p].copies or (lambda: NotImplemented))() for p in (weight, bias)]
    if x.ndim != 3 or len(x) != watch.n or any(c is NotImplemented for c in copies):
        return NotImplemented
    weight, bias = (None if c is None else c.flatten(0, 1) for c in copies)
    out = F.conv1d(x.reshape(1, -1, x.shape[-1]), weight, bias, stride, padding, dilation, groups * watch.n)
    return out.view(watch.n, -1, out.shape[-1])


def is_index(x: Any) -> bool:
    return isinstance(x, int) or isinstance(x, Tensor) and x.ndim == 0 and not x.is_floating_point()


ELEMENTWISE = ("add", "sub", "mul", "div", "true_divide")
RULES: dict[Any, Callable] = {
    F.linear: _linear, torch.addmm: _addmm, torch.matmul: _matmul, torch.mm: _matmul, Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul, F.embedding: _embedding, F.layer_norm: _layer_norm, F.rms_norm: _rms_norm,
    F.conv1d: _conv1d,
    **{getattr(home, name): _elementwise for home in (torch, Tensor) for name in ELEMENTWISE},
    **{getattr(Tensor, f"__{prefix}{name}__"): _elementwise
       for name in ("add", "sub", "mul", "truediv") for prefix in ("", "r", "i")},
    **{getattr(Tensor, f"{name}_"): _elementwise for name in ELEMENTWISE}}
CASTS = {Tensor.to, Tensor.float, Tensor.double, Tensor.type, Tensor.contiguous}
TRANSPOSES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t}
