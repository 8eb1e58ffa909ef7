"""The gradient of each rollout's log-prob, one parameter at a time, from one backward pass over all of them.

The gradient of Σ_i S_i with respect to what a layer returns holds, in its rows, those of every S_i. With the layer's
inputs x and these rows g, a weight's gradient for rollout i is Σ_k g_k ⊗ x_k over its positions k. So no pass is needed
that forms them: `sample_gradients` watches the functions that a model calls with a parameter, and hands over both
factors as soon as the backward pass has met the parameter's last use. Factors are formed in blocks, or only contracted.

A parameter that is used in a way not known here is found out, and gets one backward pass for each rollout instead.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from deltah.derivatives.factors import Factors, Formed, Lookup, Output, OutputSlopes, SampleGradient
from deltah.policies import OutputLayer, Policy
from deltah.rollouts import Rollouts
from deltah.scoring import log_probs_and_entropies, response_output, score

# Parameters that take part elementwise get a copy for each rollout up to this size.
SMALL = 2**16
# Numbers that gradients made by one backward pass for each rollout may hold, beyond a single parameter's.
TOGETHER = 2**26


def sample_gradients(policy: Policy, rollouts: Rollouts, receive: Callable[[SampleGradient], None],
                     keep: int) -> None:
    """Hand `receive` the gradients of each rollout's log-prob, every trainable parameter (or expert of it) once.

    Args:
        policy: the policy.
        rollouts: n rollouts, run as one batch; S_i is the log-prob of response i at their temperature.
        receive: called during the backward pass, in its order.
        keep: numbers that may be held on to, besides factors, to form the output layer's gradients faster.
    """
    watch = _Watch(policy, rollouts)
    with torch.enable_grad(), policy.eager_experts():
        with watch:
            hidden, layer, logits = response_output(policy, rollouts, None)
        if layer is None:
            log_probs = log_probs_and_entropies(logits, rollouts.response_ids)[0]
            total = torch.where(rollouts.response_mask, log_probs, 0.0).sum()
        else:
            total = watch.output(hidden, layer, keep)
        watch.backward(total, receive)
    groups, unknown = [[]], sorted(watch.unknown)
    # Hooks of what it holds refer to it, and all factors would stay until the next garbage collection.
    vars(watch).clear()
    for name in unknown:
        groups[-1].append(name)
        if len(rollouts) * sum(policy.parameters[name].numel() for name in groups[-1]) > TOGETHER:
            groups.append([])
    for names in filter(None, groups):
        for gradient in _one_by_one(policy, rollouts, names):
            receive(gradient)


def _one_by_one(policy: Policy, rollouts: Rollouts, names: Sequence[str]) -> Iterator[SampleGradient]:
    """By one backward pass for each rollout."""
    parameters, rows = [policy.parameters[name] for name in names], []
    with torch.enable_grad():
        for i in range(len(rollouts)):
            total = score(policy, rollouts.select(slice(i, i + 1))).log_probs.sum()
            rows.append(torch.autograd.grad(total, parameters, materialize_grads=True))
    for name, p, gradients in zip(names, parameters, zip(*rows, strict=True), strict=True):
        shape = _matrix_shape(p)
        yield SampleGradient(name, None, shape, [Formed(torch.stack(gradients).view(-1, *shape).to(_kind(p)))])


def _matrix_shape(p: Tensor) -> tuple[int, int]:
    """In which a parameter's gradient is written; a vector is one column."""
    return (p.numel(), 1) if p.ndim < 2 else (p.shape[:-1].numel(), p.shape[-1])


def _kind(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Watched(NamedTuple):
    """A trainable parameter, or what a model has made of such alone.

    `key` is the parameter's name and the slice, where it is all of a parameter, a slice of it, or a cast of either;
    `transposed` if it is turned over as well. `copies` makes the same of copies of the parameters, one for each
    rollout: [n, ...].
    """

    key: tuple[str, int | None] | None
    copies: Callable[[], Tensor] | None
    transposed: bool = False


class _Watch(TorchFunctionMode):
    """Sees every function that a model calls with a trainable parameter, and calls it so that hooks get the factors.

    Attributes:
        unknown: names of the parameters that something was done with that no rule here covers; set by `backward`.
    """

    def __init__(self, policy: Policy, rollouts: Rollouts):
        super().__init__()
        self.parameters, self.rollouts, self.n = policy.parameters, rollouts, len(rollouts)
        self.width = int(rollouts.attention_mask.sum(1).max())
        self.watched = WeakIdKeyDictionary()
        for name, p in self.parameters.items():
            copies = functools.partial(self._copies, name) if p.numel() <= SMALL else None
            self.watched[p] = _Watched((name, None), copies)
        self.samples = WeakIdKeyDictionary()             # rows that a router has picked -> the rollout of each
        self.leaves: dict[str, Tensor] = {}              # the copies, by name
        self.roots: list[Tensor] = []                    # what else the backward pass is to reach
        self.pending: dict[tuple[str, int | None], int] = defaultdict(int)
        self.arrived: dict[tuple[str, int | None], list[Factors]] = defaultdict(list)
        self.unknown: set[str] = set()

    def _copies(self, name: str) -> Tensor:
        if name not in self.leaves:
            p = self.parameters[name].detach()
            self.leaves[name] = p.expand(self.n, *p.shape).clone().requires_grad_()
        return self.leaves[name]

    def _is_watched(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x in self.watched

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        watched = [self.watched[x] for x in tensors if self._is_watched(x)] if torch.is_grad_enabled() else []
        result = NotImplemented
        if watched and len(watched) == sum(not _is_index(x) for x in tensors):
            result = self._made(func, args, kwargs, watched)
        elif watched and func in RULES:
            result = RULES[func](self, func, *args, **kwargs)
        if result is NotImplemented:
            # A parameter's gradient then goes past us, and `backward` sees it in the graph.
            result = func(*args, **kwargs)
        self._follow(func, args, tensors, result)
        return result

    def _made(self, func, args, kwargs, watched: list[_Watched]) -> Any:
        """What a function makes of parameters alone."""
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        first, key, transposed = watched[0], None, watched[0].transposed
        if func in CASTS:
            key = first.key
        elif func in TRANSPOSES and result.ndim == 2:
            key, transposed = first.key, not transposed
        elif func is Tensor.__getitem__ and first.key and first.key[1] is None and _is_index(args[1]):
            key = first.key[0], int(args[1]) % len(args[0])

        def copies() -> Tensor:
            def again(*tensors):
                values = iter(tensors)
                args_, kwargs_ = tree_map(lambda x: next(values) if self._is_watched(x) else x, (args, kwargs))
                return func(*args_, **kwargs_)
            return torch.vmap(again)(*(w.copies() for w in watched))

        small = all(w.copies for w in watched)
        if key is not None or small:
            self.watched[result] = _Watched(key, copies if small else None, transposed)
        return result

    def _follow(self, func, args, tensors: list[Tensor], result: Any) -> None:
        """Keep track of which rollout each row is of, once a router has picked rows."""
        rollout = next((self.samples[x] for x in tensors if x in self.samples), None)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
            if args[0].ndim == 2 and args[1].ndim == 1 and len(args[0]) == self.n * self.width:
                rollout = None if self._is_watched(args[0]) else args[1] // self.width
        if rollout is not None:
            for x in tree_leaves(result):
                if isinstance(x, Tensor) and x.ndim and len(x) == len(rollout):
                    self.samples[x] = rollout

    def by_rollout(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What brings tensors with the rows of x [..., i] into the form [n, K, i]; None where they are not known."""
        if x in self.samples:
            rollout = self.samples[x]
            order = rollout.argsort(stable=True)
            counts = torch.bincount(rollout, minlength=self.n)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[rollout[order]]
            most = int(counts.max())
            return lambda t: t.new_zeros(self.n, most, t.shape[-1]).index_put((rollout, place), t)
        if x.ndim > 1 and (x.shape[0] == self.n or x.shape[:-1].numel() == self.n * self.width and x.shape[0] in (
                1, self.n * self.width)):
            return lambda t: t.reshape(self.n, -1, t.shape[-1])
        return None

    def spread(self, copies: Tensor, x: Tensor) -> Tensor | None:
        """Copies [n, ...] in a shape that broadcasts over x, each over the rows of its rollout."""
        size = copies.ndim - 1
        if size >= x.ndim:
            if size > x.ndim or copies.shape[1] != 1:
                return None
            copies, size = copies[:, 0], size - 1
        if x in self.samples:
            copies = copies[self.samples[x]]
        elif x.shape[0] == self.n * self.width and self.width > 1 and x.shape[0] != self.n:
            copies = copies.repeat_interleave(self.width, 0)
        elif x.shape[0] != self.n:
            return None
        return copies.view(len(copies), *(1,) * (x.ndim - 1 - size), *copies.shape[1:])

    def use(self, out: Tensor, *uses: tuple[Tensor, Callable[[Tensor], Factors]]) -> Tensor:
        """Have the factors of each watched parameter made of the gradient with respect to `out`, once it is there."""
        root = not out.requires_grad
        if root:
            self.roots.append(out.requires_grad_())
        for parameter, make in uses:
            key = self.watched[parameter].key
            self.pending[key] += 1
            out.register_hook(functools.partial(self._arrive, key, make))
        # A model may go on in place, which the graph does not allow where it begins.
        return out.clone() if root else out

    def _arrive(self, key: tuple[str, int | None], make: Callable[[Tensor], Factors], gradient: Tensor) -> None:
        if key[0] not in self.unknown:
            self.arrived[key].append(make(gradient))
            self.pending[key] -= 1
            if not self.pending[key] and key[0] not in self.leaves:
                self._finish(key)

    def _finish(self, key: tuple[str, int | None]) -> None:
        p = self.parameters[key[0]]
        p = p if key[1] is None else p[key[1]]
        factors = self.arrived.pop(key)
        self.receive(SampleGradient(*key, _matrix_shape(p), factors))

    def output(self, hidden: Tensor, layer: OutputLayer, keep: int) -> Tensor:
        """A number whose gradient with respect to hidden [n, T, d] is that of Σ_i S_i."""
        weight, bias = (None if x is None else x.detach() for x in layer[:2])
        h, scaling = hidden.detach(), layer.scaling._replace(temperature=self.rollouts.temperature)
        slopes = OutputSlopes(h, OutputLayer(weight, bias, scaling), self.rollouts, keep)
        for parameter, right in ((layer.weight, h), (layer.bias, torch.ones_like(h[..., :1]))):
            if parameter is not None and parameter in self.watched:
                self.arrived[self.watched[parameter].key].append(Output(slopes, right.to(_kind(right))))
        return (hidden * slopes.of_hidden()).sum()

    def backward(self, total: Tensor, receive: Callable[[SampleGradient], None]) -> None:
        """One backward pass from `total`, whose gradient is that of Σ_i S_i."""
        self.receive = receive
        own = {id(p): name for name, p in self.parameters.items()}
        self.unknown.update(own[i] for i in _leaf_ids(total) if i in own)
        sliced = {name for name, index in self.pending if index is not None}
        whole = {name for name, index in [*self.pending, *self.arrived] if index is None} | set(self.leaves)
        self.unknown |= sliced & whole
        for key in list(self.arrived):
            if key[0] in self.unknown:
                del self.arrived[key]
            elif key not in self.pending and key[0] not in self.leaves:
                self._finish(key)
        inputs = [*self.roots, *self.leaves.values()]
        if inputs and total.requires_grad:
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
            for name, gradient in zip(self.leaves, gradients[len(self.roots):], strict=True):
                if gradient is not None and name not in self.unknown:
                    shape = _matrix_shape(self.parameters[name])
                    self.arrived[name, None].append(Formed(gradient.view(self.n, *shape).to(_kind(gradient))))
        # Small parameters, and those that some part of the model used without an effect.
        for key in list(self.arrived):
            self._finish(key)


def _leaf_ids(total: Tensor) -> set[int]:
    """The leaves that a graph ends in."""
    seen, stack, found = set(), [total.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            stack.extend(before for before, _ in node.next_functions)
    return found


def _is_index(x: Any) -> bool:
    return isinstance(x, int) or isinstance(x, Tensor) and x.ndim == 0 and not x.is_floating_point()


def _linear(watch: _Watch, func, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _product(watch, input, weight, bias, transposed=True)


def _addmm(watch: _Watch, func, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return _product(watch, x, weight, bias) if beta == alpha == 1 else NotImplemented


def _matmul(watch: _Watch, func, x: Tensor, weight: Tensor) -> Any:
    return _product(watch, x, weight, None)


def _product(watch: _Watch, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Any:
    """x weight^T + bias, or x weight + bias with `transposed` False."""
    order, turned = watch.by_rollout(x), transposed
    if weight in watch.watched:
        turned = turned != watch.watched[weight].transposed
    keys = [watch.watched[p].key for p in (weight, bias) if p is not None and p in watch.watched]
    if order is None or None in keys or x in watch.watched or weight.ndim != 2 or bias is not None and bias.ndim != 1:
        return NotImplemented
    out = F.linear(x, weight.detach() if transposed else weight.detach().T, None if bias is None else bias.detach())
    x, version, kind = x.detach(), x._version, _kind(x)

    def of_weight(gradient):
        if x._version != version:
            raise RuntimeError("policy: the model has changed a layer's input in place, which its gradient needs")
        factors = order(gradient).to(kind), order(x).to(kind)
        return Factors(*factors) if turned else Factors(*reversed(factors))

    def of_bias(gradient):
        return Formed(order(gradient).to(kind).sum(1)[..., None])

    uses = (weight, of_weight), (bias, of_bias)
    return watch.use(out, *((p, make) for p, make in uses if p is not None and p in watch.watched))


def _embedding(watch: _Watch, func, ids: Tensor, weight: Tensor, padding_idx: int | None = None,
               max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
               sparse: bool = False) -> Any:
    if len(ids) == 1:
        ids = ids.expand(watch.n, *ids.shape[1:])
    order = watch.by_rollout(ids[..., None])
    key = watch.watched[weight].key if weight in watch.watched else None
    if order is None or key is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented

    def of_weight(gradient):
        rows = order(ids[..., None])[..., 0]
        right = order(gradient).to(_kind(gradient))
        return Lookup(rows, right if padding_idx is None else right * (rows != padding_idx)[..., None])

    return watch.use(F.embedding(ids, weight.detach()), (weight, of_weight))


def _elementwise(watch: _Watch, func, a: Any, b: Any, **kwargs) -> Any:
    parameter, other = (a, b) if isinstance(a, Tensor) and a in watch.watched else (b, a)
    copies = watch.watched[parameter].copies
    spread = copies and watch.spread(copies(), other)
    if spread is None:
        return NotImplemented
    return func(spread, b, **kwargs) if parameter is a else func(a, spread, **kwargs)


def _layer_norm(watch: _Watch, func, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5) -> Any:
    return _scaled(watch, F.layer_norm(x, normalized_shape, None, None, eps), x, weight, bias)


def _rms_norm(watch: _Watch, func, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
              eps: float | None = None) -> Any:
    return _scaled(watch, F.rms_norm(x, normalized_shape, None, eps), x, weight, None)


def _scaled(watch: _Watch, normed: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    if x in watch.samples:
        watch.samples[normed] = watch.samples[x]
    for func, p in ((torch.mul, weight), (torch.add, bias)):
        if p is not None:
            normed = _elementwise(watch, func, normed, p) if p in watch.watched else func(normed, p)
            if normed is NotImplemented:
                return NotImplemented
    return normed


def _conv1d(watch: _Watch, func, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
            padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    """One convolution of n times the groups."""
    copies = [None if p is None else p.expand(watch.n, *p.shape) if p not in watch.watched else
              (watch.watched[p].copies or (lambda: NotImplemented))() for p in (weight, bias)]
    if x.ndim != 3 or len(x) != watch.n or any(c is NotImplemented for c in copies):
        return NotImplemented
    weight, bias = (None if c is None else c.flatten(0, 1) for c in copies)
    out = F.conv1d(x.reshape(1, -1, x.shape[-1]), weight, bias, stride, padding, dilation, groups * watch.n)
    return out.view(watch.n, -1, out.shape[-1])


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
