"""The gradient of each rollout's log-prob, one parameter at a time, from one backward pass over all of them.

The gradient of Σ_i S_i with respect to what a layer returns holds, in its rows, those of every S_i. With the layer's
inputs x and these rows g, a weight's gradient for rollout i is Σ_k g_k ⊗ x_k over its positions k. So no pass is needed
that forms them: `sample_gradients` watches the functions that a model calls with a parameter, and hands over both
factors as soon as the backward pass has met the parameter's last use. Factors are formed in blocks, or only contracted.

A parameter that is used in a way not known here is found out, and gets one backward pass for each rollout instead.

Where a model hides something from its backward pass (`detach`, `no_grad`, a custom function), these are derivatives
only if that cancels. One rollout's are then held against a derivative in forward mode.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from deltah import memory
from deltah.derivatives.factors import Factors, Formed, Output, OutputSlopes, SampleGradient, kind_of, matrix_shape
from deltah.derivatives.jets import Refused
from deltah.derivatives.rows import Rows
from deltah.derivatives.taylor import DETACHES, derivatives_along
from deltah.derivatives.uses import CASTS, RULES, TRANSPOSES, is_index
from deltah.models.modes import eager_experts
from deltah.models.output_layers import OutputLayer, rounding
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import log_probs_and_entropies, response_output, score, score_batch

# Parameters that take part elementwise get a copy for each rollout up to this size.
SMALL = 2**16
# Numbers that gradients made by one backward pass for each rollout may hold, beyond a single parameter's, and their
# share of a call's budget.
TOGETHER, SHARE = 2**26, 0.25


def sample_gradients(policy: Policy, rollouts: Rollouts, receive: Callable[[SampleGradient], None],
                     keep: int) -> None:
    """Hand `receive` the gradients of each rollout's log-prob, every trainable parameter (or expert of it) once.

    Args:
        policy: the policy.
        rollouts: n rollouts, run as one batch; S_i is the log-prob of response i at their temperature.
        receive: called during the backward pass, in its order.
        keep: numbers that may be held on to, besides factors, to form the output layer's gradients faster.

    Raises:
        ValueError: a model whose backward pass is not the derivative of its function.
    """
    watch = Watch(policy, rollouts)
    with torch.enable_grad():
        with eager_experts(policy.model):
            with watch:
                hidden, layer, logits = response_output(policy, rollouts, None)
            if layer is None:
                log_probs = log_probs_and_entropies(logits, rollouts.response_ids)[0]
                total = torch.where(rollouts.response_mask, log_probs, 0.0).sum()
            else:
                total = watch.output(hidden, layer, keep)
        # Without holding the model, for which another thread in forward mode may be waiting.
        if watch.hidden or _has_custom_functions(total):
            _check_backward(policy, rollouts.select(slice(0, 1)), watch.hidden or "a custom function")
        watch.backward(total, receive)
    groups, unknown = [[]], sorted(watch.unknown)
    # Hooks of what it holds refer to it, and all factors would stay until the next garbage collection.
    vars(watch).clear()
    together = memory.numbers(policy.device, kind_of(hidden), TOGETHER, SHARE)
    for name in unknown:
        groups[-1].append(name)
        if len(rollouts) * sum(policy.parameters[name].numel() for name in groups[-1]) > together:
            groups.append([])
    for names in filter(None, groups):
        for gradient in _one_by_one(policy, rollouts, names):
            receive(gradient)


def _check_backward(policy: Policy, rollout: Rollouts, hidden: str) -> None:
    """Raise ValueError where the gradient g of a rollout's log-prob does not have the derivative |g|² along itself."""
    parameters, name = policy.parameters, type(policy.model).__name__
    with torch.enable_grad():
        total = score(policy, rollout).log_probs.sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    v = dict(zip(parameters, gradients, strict=True))
    theta = {key: p.detach() for key, p in parameters.items()}

    def scored(moved):
        (log_probs, _), states = score_batch(policy, rollout, theta | moved)
        return (log_probs,), states

    try:
        with policy.forward_mode():
            (slope,) = derivatives_along(scored, theta, v, 1)[1]
    except (Refused, RuntimeError) as error:
        raise ValueError(f"policy: the backward pass of {name} hides something ({hidden}), and whether it is the "
                         f"derivative of its function cannot be told: {error}") from error
    expected, found = sum(float(g.double().square().sum()) for g in gradients), float(slope.double().sum())
    # Two thirds of the digits that the model computes with.
    if abs(found - expected) > rounding(policy.model) ** (2 / 3) * expected:
        raise ValueError(f"policy: the backward pass of {name} is not the derivative of its function, as it hides "
                         f"something ({hidden}): along a rollout's gradient the log-prob changes by {found:.4g}, not "
                         f"{expected:.4g}")


def _one_by_one(policy: Policy, rollouts: Rollouts, names: Sequence[str]) -> Iterator[SampleGradient]:
    """By one backward pass for each rollout."""
    parameters, rows = [policy.parameters[name] for name in names], []
    with torch.enable_grad():
        for i in range(len(rollouts)):
            total = score(policy, rollouts.select(slice(i, i + 1)), batch_size=1).log_probs.sum()
            rows.append(torch.autograd.grad(total, parameters, materialize_grads=True))
    for name, p, gradients in zip(names, parameters, zip(*rows, strict=True), strict=True):
        shape = matrix_shape(p)
        yield SampleGradient(name, None, shape, [Formed(torch.stack(gradients).view(-1, *shape).to(kind_of(p)))])


class _Watched(NamedTuple):
    """A trainable parameter, or what a model has made of such alone.

    `key` is the parameter's name and the slice, where it is all of a parameter, a slice of it, or a cast of either;
    `transposed` if it is turned over as well. `copies` makes the same of copies of the parameters, one for each
    rollout: [n, ...].
    """

    key: tuple[str, int | None] | None
    copies: Callable[[], Tensor] | None
    transposed: bool = False


class Watch(TorchFunctionMode):
    """Sees every function that a model calls with a trainable parameter, and calls it so that hooks get the factors.

    Attributes:
        unknown: names of the parameters that something was done with that no rule here covers; set by `backward`.
        hidden: what has hidden something from the backward pass, if anything has.
    """

    def __init__(self, policy: Policy, rollouts: Rollouts):
        super().__init__()
        self.parameters, self.rollouts, self.n = policy.parameters, rollouts, len(rollouts)
        self.rows = Rows(self.n, int(rollouts.attention_mask.sum(1).max()))
        self.watched = WeakIdKeyDictionary()
        for name, p in self.parameters.items():
            copies = functools.partial(self._copies, name) if p.numel() <= SMALL else None
            self.watched[p] = _Watched((name, None), copies)
        self.leaves: dict[str, Tensor] = {}              # the copies, by name
        self.roots: list[Tensor] = []                    # what else the backward pass is to reach
        self.pending: dict[tuple[str, int | None], int] = defaultdict(int)
        self.arrived: dict[tuple[str, int | None], list[Factors]] = defaultdict(list)
        self.unknown: set[str] = set()
        self.hidden: str | None = None

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
        if watched and len(watched) == sum(not is_index(x) for x in tensors):
            result = self._made(func, args, kwargs, watched)
        elif watched and func in RULES:
            result = RULES[func](self, func, *args, **kwargs)
        if result is NotImplemented:
            # A parameter's gradient then goes past us, and `backward` sees it in the graph.
            result = func(*args, **kwargs)
        self._follow_hidden(func, tensors, result)
        self.rows.follow(func, args, tensors, result, bool(args) and self._is_watched(args[0]))
        return result

    def _follow_hidden(self, func, tensors: list[Tensor], result: Any) -> None:
        """Note what ends the graph of something that depends on a parameter."""
        if self.hidden is not None or not any(x.requires_grad for x in tensors):
            return
        name, grad = getattr(func, "__name__", str(func)), torch.is_grad_enabled()
        for x in tree_leaves(result):
            floating = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
            if isinstance(x, (float, complex)) or floating and (func in DETACHES or not grad):
                self.hidden = name if grad else f"{name} without grad mode"

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
        elif func is Tensor.__getitem__ and first.key and first.key[1] is None and is_index(args[1]):
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
        self.receive(SampleGradient(*key, matrix_shape(p), factors))

    def output(self, hidden: Tensor, layer: OutputLayer, keep: int) -> Tensor:
        """A number whose gradient with respect to hidden [n, T, d] is that of Σ_i S_i."""
        weight, bias = (None if x is None else x.detach() for x in layer[:2])
        h, scaling = hidden.detach(), layer.scaling._replace(temperature=self.rollouts.temperature)
        slopes = OutputSlopes(h, OutputLayer(weight, bias, scaling), self.rollouts, keep)
        for parameter, right in ((layer.weight, h), (layer.bias, torch.ones_like(h[..., :1]))):
            if parameter is not None and parameter in self.watched:
                self.arrived[self.watched[parameter].key].append(Output(slopes, right.to(kind_of(right))))
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
                    shape = matrix_shape(self.parameters[name])
                    self.arrived[name, None].append(Formed(gradient.view(self.n, *shape).to(kind_of(gradient))))
        # Small parameters, and those that some part of the model used without an effect.
        for key in list(self.arrived):
            self._finish(key)


def _leaf_ids(total: Tensor) -> set[int]:
    """The leaves that a graph ends in."""
    return {id(node.variable) for node in _nodes(total) if hasattr(node, "variable")}


def _has_custom_functions(total: Tensor) -> bool:
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _nodes(total))


def _nodes(total: Tensor) -> Iterator[Any]:
    """Of a graph, each once."""
    seen, stack = set(), [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(before for before, _ in node.next_functions)
