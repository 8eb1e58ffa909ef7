"""What an optimizer's step does to one parameter, and whether an optimizer is one that does it.

For a learning rate η and the (clipped) gradient g of the loss, the optimizers here move a parameter by δθ = η v, with

    v = −(P ∘ g + momentum + weight decay)

where P, the preconditioner, already holds the new second moments:

    SGD       P = 1 − dampening (1 at the first step; with Nesterov 1 + μ(1 − dampening))
    RMSprop   P = 1 / (√s + ε)
    Adam(W)   P = (1 − β₁) / (1 − β₁ᵗ) / (√v̂ + ε)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler
from torch.optim import optimizer as torch_optimizer

from deltah import checks

EXPECTED = "a torch.optim SGD, RMSprop, Adam or AdamW"
# What a subclass may have of its own without its step being another.
HARMLESS = {"__init__", "__repr__", "__doc__", "__module__", "__qualname__", "__annotations__", "__firstlineno__",
            "__static_attributes__", "__getstate__", "__setstate__", "add_param_group", "state_dict",
            "load_state_dict", "zero_grad"}
STATE = {"state", "param_groups", "defaults"}
# The files of what torch wraps a step in: profiling and hooks, grad mode, and counting by a scheduler.
WRAPPERS = {torch_optimizer.__file__, lr_scheduler.__file__}


class Terms(NamedTuple):
    """Of v = −(preconditioner ∘ g + momentum + weight_decay) for one parameter; a number where all are equal."""

    preconditioner: Tensor | float
    momentum: Tensor | float
    weight_decay: Tensor | float


def _sgd(group: dict[str, Any], state: dict[str, Any], p: Tensor, g: Tensor) -> Terms:
    momentum = group["momentum"]
    # Without momentum, what an earlier step has left in the buffer is not looked at.
    memory = state.get("momentum_buffer") if momentum else None
    # The first gradient enters the buffer undampened.
    fresh, kept = (1.0, 0.0) if memory is None else (1 - group["dampening"], momentum * memory)
    if group["nesterov"]:
        fresh, kept = 1 + momentum * fresh, momentum * kept
    return Terms(fresh, kept, fresh * _decay(group, p))


def _rmsprop(group: dict[str, Any], state: dict[str, Any], p: Tensor, g: Tensor) -> Terms:
    alpha, decay = group["alpha"], _decay(group, p)
    squares = alpha * state.get("square_avg", 0.0) + (1 - alpha) * (g + decay).square()
    if group["centered"]:
        squares = squares - (alpha * state.get("grad_avg", 0.0) + (1 - alpha) * (g + decay)).square()
    scale = 1 / (squares.sqrt() + group["eps"])
    kept = group["momentum"] * state["momentum_buffer"] if "momentum_buffer" in state else 0.0
    return Terms(scale, kept, scale * decay if group["weight_decay"] else 0.0)


def _adam(group: dict[str, Any], state: dict[str, Any], p: Tensor, g: Tensor) -> Terms:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state.get("step", 0)) + 1
    decay = _decay(group, p)
    coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
    squares = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * (g + decay if coupled else g).square()
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        squares = torch.maximum(squares, state["max_exp_avg_sq"])
    root = (squares / (1 - beta2**step)).sqrt() + group["eps"]
    scale = (1 - beta1) / (1 - beta1**step) / root
    kept = beta1 / (1 - beta1**step) / root * state["exp_avg"] if "exp_avg" in state else 0.0
    return Terms(scale, kept, scale * decay if coupled else decay)


def _decay(group: dict[str, Any], p: Tensor) -> Tensor | float:
    return group["weight_decay"] * p if group["weight_decay"] else 0.0


RULES: dict[type, Callable[..., Terms]] = {SGD: _sgd, RMSprop: _rmsprop, Adam: _adam, AdamW: _adam}


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer itself, where Accelerate has wrapped it."""
    while type(optimizer).__module__.partition(".")[0] == "accelerate" and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return checks.instance("optimizer", optimizer, Optimizer, EXPECTED)


def rule_of(optimizer: Optimizer) -> Callable[..., Terms]:
    """The rule (group, state, p, g) -> Terms that the optimizer's step follows.

    Raises:
        TypeError: another optimizer, or one whose `step` is not that of its class: overridden in a subclass, replaced
            in the object, or preceded by hooks.
    """
    kind = type(optimizer)
    base = next((found for found in kind.__mro__ if found in RULES), None)
    if base is None:
        raise TypeError(f"optimizer: expected {EXPECTED}, got {kind.__name__}")
    expected = f"optimizer: expected {EXPECTED} that steps as torch's own does; this {kind.__name__}"
    # By the object itself, then by its class and those between that and torch's.
    for own in map(vars, (optimizer, *kind.__mro__[:kind.__mro__.index(base)])):
        for name, value in own.items():
            replaced = callable(getattr(base, name, None)) and _written(value) is not _written(getattr(base, name))
            if name not in HARMLESS and (replaced or name in STATE and isinstance(value, property)):
                raise TypeError(f"{expected} has a `{name}` of its own")
    if not _written(base.step).__code__.co_filename.startswith(os.path.dirname(torch_optimizer.__file__)):
        raise TypeError(f"{expected} has a `step` of its own")
    if optimizer._optimizer_step_pre_hooks or torch_optimizer._global_optimizer_pre_hooks:
        raise TypeError(f"{expected} has hooks that run before its step and may change it; remove them first")
    return RULES[base]


def _written(method: Any) -> Any:
    """The function that was written as a method, without what torch's optimizers and schedulers wrap it in."""
    method = getattr(method, "__func__", method)
    while hasattr(method, "__wrapped__") and method.__code__.co_filename in WRAPPERS:
        method = method.__wrapped__
    return method
