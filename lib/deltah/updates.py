"""Update directions: where an optimizer would move the parameters, and what each part of the move comes from.

For every optimizer here one step moves a parameter, for a learning rate η and the (clipped) gradient g of the loss, by

    δθ = η v,    v = −(P ∘ g + momentum + weight decay)

where P, the preconditioner, already holds the new second moments. So v splits exactly: P ∘ g is a sum over the
rollouts of the batch, `momentum` is what the optimizer remembers of earlier ones.

    SGD       P = 1 − dampening (1 at the first step; with Nesterov 1 + μ(1 − dampening))
    RMSprop   P = 1 / (√s + ε)
    Adam(W)   P = (1 − β₁) / (1 − β₁ᵗ) / (√v̂ + ε)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from deltah.objectives import Objective, find
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import batches, score, weighted_gradient


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """v = δθ/η, where an optimizer would move the parameters, and its parts.

    Attributes:
        vector: v, by parameter name; zero where the optimizer does not reach.
        momentum, weight_decay: the parts of v that come from earlier batches and from weight decay, by name.
        preconditioner: P, by parameter name: the part of the rollouts is P ∘ Σ token_weights ∇ log π.
        token_weights: [N, T], how much v follows the score ∇ log π of each token: −∂loss/∂log π, clipping of the
            gradient included.
        learning_rate: the optimizer's η, of its first parameter group; others count relative to it.
        policy, rollouts: what it was made from.
        versions: of the parameters, by which `per_rollout` knows whether they have changed since.
    """

    vector: dict[str, Tensor]
    momentum: dict[str, Tensor]
    weight_decay: dict[str, Tensor]
    preconditioner: dict[str, Tensor]
    token_weights: Tensor
    learning_rate: float
    policy: Policy
    rollouts: Rollouts
    versions: dict[str, int]

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """v split in three, "rollouts", "momentum" and "weight_decay", each by parameter name; they sum to v."""
        rollouts = {name: v - self.momentum[name] - self.weight_decay[name] for name, v in self.vector.items()}
        return {"rollouts": rollouts, "momentum": self.momentum, "weight_decay": self.weight_decay}

    def per_rollout(self, index: int) -> dict[str, Tensor]:
        """Rollout `index`'s part of v, by parameter name; over all rollouts they sum to parts["rollouts"].

        Raises:
            ValueError: the policy's parameters have changed since, or there is no such rollout.
        """
        if not 0 <= index < len(self.rollouts):
            raise ValueError(f"index: expected one of 0 to {len(self.rollouts) - 1}, got {index}")
        if self.versions != _versions(self.policy):
            raise ValueError("policy: its parameters have changed since this direction was made; make a new one")
        names, rows = list(self.preconditioner), torch.tensor([index])
        gradient = weighted_gradient(self.policy, self.rollouts, [rows], names, self.token_weights)
        return {name: torch.zeros_like(self.vector[name]) if g is None else self.preconditioner[name] * g
                for name, g in gradient.items()}

    def __repr__(self) -> str:
        norms = {name: sum(float(x.double().square().sum()) for x in part.values()) ** 0.5
                 for name, part in (("v", self.vector), *self.parts.items())}
        return "Direction(" + ", ".join(f"|{name}| = {norm:.3g}" for name, norm in norms.items()) + ")"


def update_direction(policy: Policy, rollouts: Rollouts, objective: str | Objective = "grpo",
                     optimizer: Optimizer | None = None, old_log_probs: Tensor | None = None,
                     max_gradient_norm: float | None = None, batch_size: int | None = None) -> Direction:
    """v = δθ/η as `optimizer.step()` would move after this batch; changes neither the policy nor the optimizer.

    It starts from the optimizer's real state, takes in parameter groups, gradient clipping, frozen parameters and
    parameters that the loss does not reach, and equals the real change up to the rounding of θ + δθ.

    Args:
        policy: the policy whose parameters `optimizer` holds.
        rollouts: N rollouts with advantages, or with rewards that the objective makes advantages of.
        objective: "grpo", "dr_grpo", "gspo" or an `objectives.Objective`.
        optimizer: a torch.optim SGD, RMSprop, Adam or AdamW.
        old_log_probs: [N, T] in nats, under the policy that sampled; None: this policy did.
        max_gradient_norm: what the trainer passes to `torch.nn.utils.clip_grad_norm_`; None: nothing is clipped.
        batch_size: rollouts at a time; None: as many as suit the device. Does not change the result.

    Returns:
        A Direction; float32 for bfloat16 parameters, else in their own dtype.

    Raises:
        TypeError: another optimizer. ValueError: one that holds parameters of something else, a learning rate of
            zero beside others, rollouts without advantages and rewards, or an unknown objective.

    Source: the notes, sections 2.4, 2.5 and 2.7; the update rules are those of torch.optim.

    >>> optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-5)             # doctest: +SKIP
    >>> update_direction(policy, rollouts, "dr_grpo", optimizer=optimizer)             # doctest: +SKIP
    Direction(|v| = 919, |rollouts| = 919, |momentum| = 0, |weight_decay| = 0.62)
    """
    rule = _rule(optimizer)
    groups = _groups(policy, optimizer)
    rollouts = rollouts.to(policy.device)
    weights = _token_weights(policy, rollouts, find(objective), old_log_probs, batch_size)
    # The norm that clips is that of all trainable parameters, whether the optimizer holds them or not.
    names = list(groups if max_gradient_norm is None else policy.parameters)
    gradient = weighted_gradient(policy, rollouts, batches(policy, rollouts, batch_size), names, weights)
    if max_gradient_norm is not None:
        norm = sum(g.double().square().sum() for g in gradient.values() if g is not None) ** 0.5
        clip = min(1.0, float(max_gradient_norm / (norm + 1e-6)))
        weights, gradient = clip * weights, {n: g if g is None else clip * g for n, g in gradient.items()}

    parameters, base = policy.parameters, float(optimizer.param_groups[0]["lr"])
    vector, momentum, weight_decay, preconditioner = {}, {}, {}, {}
    with torch.no_grad():
        for name, p in parameters.items():
            kind = torch.promote_types(p.dtype, torch.float32)
            # A parameter that no loss reaches has no gradient, and torch.optim then leaves it alone.
            if name not in groups or gradient[name] is None:
                vector[name] = momentum[name] = weight_decay[name] = _filled(0.0, p)
                continue
            group, g = groups[name], gradient.pop(name)
            scale, sign = _relative(float(group["lr"]), base), -1.0 if group["maximize"] else 1.0
            state = {k: x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim else x
                     for k, x in optimizer.state.get(p, {}).items()}
            # The rules are written for the gradient that the optimizer descends; `g` ascends.
            terms = rule(group, state, p.to(kind), -sign * g)
            preconditioner[name] = _filled(sign * scale * terms.preconditioner, p)
            momentum[name] = _filled(-scale * terms.momentum, p)
            weight_decay[name] = _filled(-scale * terms.weight_decay, p)
            vector[name] = preconditioner[name] * g + momentum[name] + weight_decay[name]
    return Direction(vector, momentum, weight_decay, preconditioner, weights, base, policy, rollouts, _versions(policy))


class _Terms(NamedTuple):
    """Of v = −(preconditioner ∘ g + momentum + weight_decay) for one parameter; a number where all are equal."""

    preconditioner: Tensor | float
    momentum: Tensor | float
    weight_decay: Tensor | float


def _sgd(group: dict[str, Any], state: dict[str, Any], p: Tensor, g: Tensor) -> _Terms:
    momentum, memory = group["momentum"], state.get("momentum_buffer")
    # The first gradient enters the buffer undampened.
    fresh, kept = (1.0, 0.0) if memory is None else (1 - group["dampening"], momentum * memory)
    if group["nesterov"]:
        fresh, kept = 1 + momentum * fresh, momentum * kept
    return _Terms(fresh, kept, fresh * _decay(group, p))


def _rmsprop(group: dict[str, Any], state: dict[str, Any], p: Tensor, g: Tensor) -> _Terms:
    alpha, decay = group["alpha"], _decay(group, p)
    squares = alpha * state.get("square_avg", 0.0) + (1 - alpha) * (g + decay).square()
    if group["centered"]:
        squares = squares - (alpha * state.get("grad_avg", 0.0) + (1 - alpha) * (g + decay)).square()
    scale = 1 / (squares.sqrt() + group["eps"])
    kept = group["momentum"] * state["momentum_buffer"] if "momentum_buffer" in state else 0.0
    return _Terms(scale, kept, scale * decay if group["weight_decay"] else 0.0)


def _adam(group: dict[str, Any], state: dict[str, Any], p: Tensor, g: Tensor) -> _Terms:
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
    return _Terms(scale, kept, scale * decay if coupled else decay)


def _filled(value: Tensor | float, p: Tensor) -> Tensor:
    """A tensor of the shape of `p`; a number becomes one that takes no memory."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device).expand(p.shape)


def _decay(group: dict[str, Any], p: Tensor) -> Tensor | float:
    return group["weight_decay"] * p if group["weight_decay"] else 0.0


def _rule(optimizer: Optimizer):
    for kind, rule in ((SGD, _sgd), (RMSprop, _rmsprop), (Adam, _adam)):
        if isinstance(optimizer, kind):
            return rule
    raise TypeError(f"optimizer: expected a torch.optim SGD, RMSprop, Adam or AdamW, got {type(optimizer).__name__}")


def _groups(policy: Policy, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's parameter group of each of the policy's parameters that it holds."""
    held = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    groups = {name: held[id(p)] for name, p in policy.parameters.items() if id(p) in held}
    if len(groups) < len(held) or not groups:
        raise ValueError(f"optimizer: expected it to hold parameters of the policy; of {len(held)} trainable ones that "
                         f"it holds, {len(groups)} are the policy's")
    return groups


def _relative(rate: float, base: float) -> float:
    if rate == base:
        return 1.0
    if base == 0:
        raise ValueError(f"optimizer: the first group's learning rate is 0 and another's {rate:g}; "
                         "δθ/η needs a first group that moves")
    return rate / base


def _token_weights(policy: Policy, rollouts: Rollouts, objective: Objective, old_log_probs: Tensor | None,
                   batch_size: int | None) -> Tensor:
    """−∂loss/∂log π of every token, [N, T]."""
    with torch.no_grad():
        log_probs = score(policy, rollouts, batch_size=batch_size).log_probs
    old = log_probs if old_log_probs is None else old_log_probs.to(log_probs)
    with torch.enable_grad():
        leaf = log_probs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective.loss(leaf, old, rollouts), leaf)
    return torch.where(rollouts.response_mask, -slope, 0.0)


def _versions(policy: Policy) -> dict[str, int]:
    """Counts that change with every write to a parameter."""
    return {name: p._version for name, p in policy.parameters.items()}
