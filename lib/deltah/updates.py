"""Update directions: where an optimizer would move the parameters, and what each part of the move comes from.

For every optimizer here one step moves a parameter, for a learning rate η and the (clipped) gradient g of the loss, by

    δθ = η v,    v = −(P ∘ g + momentum + weight decay)

where P, the preconditioner, already holds the new second moments (`optimizers` has them). So v splits exactly: P ∘ g is
a sum over the rollouts of the batch, `momentum` is what the optimizer remembers of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltah import checks
from deltah.fingerprints import fingerprint
from deltah.models.modes import held
from deltah.objectives import Objective, find
from deltah.objectives.clipping import check_inside
from deltah.optimizers import rule_of, unwrapped
from deltah.policies import Policy, check_tensors
from deltah.rollouts import Rollouts
from deltah.scoring import batches, score, weighted_gradient


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """v = δθ/η, where an optimizer would move the parameters, and its parts.

    Attributes:
        vector: v, by parameter name; zero where the optimizer does not reach.
        momentum, weight_decay: the parts of v that come from earlier batches and from weight decay, by name.
        preconditioner: P, by parameter name: the part of the rollouts is P ∘ Σ (token_weights ∇ log π +
            entropy_weights ∇H).
        token_weights: [N, T], how much v follows the score ∇ log π of each token: −∂loss/∂log π, clipping of the
            gradient included. What a loss chooses by a batch's statistics is constant: no token has a weight by way
            of another's.
        entropy_weights: [N, T], how much v follows ∇H of each token's distribution: −∂loss/∂H; 0 but for losses with
            a bonus for entropy.
        learning_rate: the optimizer's η, of its first parameter group; others count relative to it.
        policy, rollouts: what it was made from.
        state: the fingerprint of all that the model holds, by which a direction knows whether that has changed since.

    Raises:
        TypeError, ValueError: a field of another kind, or parts that are not those of the vector.
    """

    vector: dict[str, Tensor]
    momentum: dict[str, Tensor]
    weight_decay: dict[str, Tensor]
    preconditioner: dict[str, Tensor]
    token_weights: Tensor
    entropy_weights: Tensor
    learning_rate: float
    policy: Policy
    rollouts: Rollouts
    state: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("vector", "momentum", "weight_decay", "preconditioner"):
            part = checks.instance(name, getattr(self, name), Mapping, "a dict of tensors by parameter name")
            if part.keys() - self.vector.keys() or name != "preconditioner" and self.vector.keys() - part.keys():
                raise ValueError(f"{name}: expected the parameters of the vector, got other names")
            for key, x in part.items():
                shape = None if name == "vector" else self.vector[key].shape
                checks.tensor(f"{name}[{key!r}]", x, shape, kind="floating")
        checks.instance("policy", self.policy, Policy)
        checks.instance("rollouts", self.rollouts, Rollouts)
        for name in ("token_weights", "entropy_weights"):
            checks.tensor(name, getattr(self, name), self.rollouts.response_mask.shape, kind="floating")
        checks.number("learning_rate", self.learning_rate, minimum=0)
        checks.instance("state", self.state, Mapping, "the fingerprint of a model")

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """v split in three, "rollouts", "momentum" and "weight_decay", each by parameter name; they sum to v."""
        rollouts = {name: v - self.momentum[name] - self.weight_decay[name] for name, v in self.vector.items()}
        return {"rollouts": rollouts, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @torch.inference_mode(False)
    def per_rollout(self, index: int) -> dict[str, Tensor]:
        """Rollout `index`'s part of v, by parameter name; over all rollouts they sum to parts["rollouts"].

        Raises:
            TypeError: an index that is no integer. ValueError: the policy has changed since, or there is no such
                rollout.
        """
        index = checks.integer("index", index)
        if not 0 <= index < len(self.rollouts):
            raise ValueError(f"index: expected one of 0 to {len(self.rollouts) - 1}, got {index}")
        self.check_made_at(state_of(self.policy))
        check_tensors(self.policy, self.vector, "direction.vector")
        names, rows = list(self.preconditioner), torch.tensor([index])
        gradient = weighted_gradient(self.policy, self.rollouts, [rows], names, self.token_weights,
                                     self.entropy_weights)
        return {name: torch.zeros_like(self.vector[name]) if g is None else self.preconditioner[name] * g
                for name, g in gradient.items()}

    def check_made_at(self, state: Mapping[str, str], otherwise: str = "") -> None:
        """Raise ValueError unless a policy in this `state_of` it is as it was then, whoever wrote to it and however.

        Parameters that do not train count as well, and so do buffers that are saved with them: the gradient depends on
        all of them.
        """
        changed = [name for name in self.state | state if self.state.get(name) != state.get(name)]
        if changed:
            raise ValueError(f"policy: its parameters have changed since this direction was made, {changed[0]} among "
                             f"{len(changed)}; make a new one{otherwise}")

    def __repr__(self) -> str:
        norms = {name: sum(float(x.double().square().sum()) for x in part.values()) ** 0.5
                 for name, part in (("v", self.vector), *self.parts.items())}
        return "Direction(" + ", ".join(f"|{name}| = {norm:.3g}" for name, norm in norms.items()) + ")"


@torch.inference_mode(False)
def update_direction(policy: Policy, rollouts: Rollouts, objective: str | Objective = "grpo",
                     optimizer: Optimizer | None = None, old_log_probs: Tensor | None = None,
                     max_gradient_norm: float | None = None, batch_size: int | None = None, seed: int = 0,
                     selected: Tensor | None = None) -> Direction:
    """v = δθ/η as `optimizer.step()` would move after this batch; changes neither the policy nor the optimizer.

    It starts from the optimizer's real state, takes in parameter groups, gradient clipping, frozen parameters and
    parameters that the loss does not reach, and equals the real change up to the rounding of θ + δθ. The gradient is
    that of the model's backward pass, as for a trainer, also where that is not the derivative of its function.

    Args:
        policy: the policy whose parameters `optimizer` holds.
        rollouts: N rollouts with advantages, or with rewards that the objective makes advantages of.
        objective: a name of `objectives.OBJECTIVES`, such as "grpo", or an `objectives.Objective`.
        optimizer: a torch.optim SGD, RMSprop, Adam or AdamW, or a subclass with the same step; one that Accelerate has
            wrapped counts as what it wraps. A scheduler may be attached: η is as it stands. Hooks before its step are
            refused, as they may change what it does; those after it are not foreseen: v is the step without them.
        old_log_probs: [N, T] in nats, under the policy that sampled; None: this policy did.
        max_gradient_norm: > 0, what the trainer passes to `torch.nn.utils.clip_grad_norm_`; None: nothing is clipped.
        batch_size: rollouts at a time; None: as many as suit the device. Does not change the result: statistics of a
            batch, which some objectives take, are those of all rollouts.
        seed, selected: of `Objective.loss`.

    Returns:
        A Direction; float32 for bfloat16 parameters, else in their own dtype.

    Raises:
        TypeError: another optimizer, or one with a step of its own, or an argument of the wrong kind. ValueError: an
            optimizer that holds parameters of something else, a learning rate of zero beside others, rollouts without
            advantages and rewards, an unknown objective, a number that is NaN, infinite or out of range, or a gradient
            that is not finite.

    Source: the notes, sections 2.4, 2.5 and 2.7; the update rules are those of torch.optim.

    >>> optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-5)             # doctest: +SKIP
    >>> update_direction(policy, rollouts, "dr_grpo", optimizer=optimizer)             # doctest: +SKIP
    Direction(|v| = 919, |rollouts| = 919, |momentum| = 0, |weight_decay| = 0.62)
    """
    checks.instance("policy", policy, Policy)
    checks.instance("rollouts", rollouts, Rollouts)
    objective, optimizer = find(objective), unwrapped(optimizer)
    rule, groups = rule_of(optimizer), groups_of(policy, optimizer)
    limit = None if max_gradient_norm is None else checks.number("max_gradient_norm", max_gradient_norm, above=0)
    batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    made_at, rollouts = state_of(policy), rollouts.to(policy.device)
    _, weights, entropy_weights = loss_and_weights(policy, rollouts, objective, old_log_probs, batch_size, seed,
                                                   selected)
    # The norm that clips is that of all trainable parameters, whether the optimizer holds them or not.
    names = list(groups if limit is None else policy.parameters)
    gradient = weighted_gradient(policy, rollouts, batches(policy, rollouts, batch_size), names, weights,
                                 entropy_weights)
    for name, g in gradient.items():
        if g is not None and not torch.isfinite(g).all():
            raise ValueError(f"policy, rollouts: the gradient of {name} is NaN or infinite")
    if limit is not None:
        norm = sum(g.double().square().sum() for g in gradient.values() if g is not None) ** 0.5
        clip = min(1.0, float(limit / (norm + 1e-6)))
        weights, entropy_weights = clip * weights, clip * entropy_weights
        gradient = {n: g if g is None else clip * g for n, g in gradient.items()}

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
    return Direction(vector, momentum, weight_decay, preconditioner, weights, entropy_weights, base, policy,
                     rollouts, made_at)


def state_of(policy: Policy) -> dict[str, str]:
    """The fingerprint of what the policy's model computes with: parameters, and buffers that are saved with them."""
    found: dict[int, tuple[str, Tensor]] = {}
    # Not what another thread has put in for a while.
    with held(policy.model):
        for name, x in policy.model.state_dict(keep_vars=True).items():
            if isinstance(x, Tensor):
                # Tied ones stand there twice.
                found.setdefault(id(x), (name, x))
        return fingerprint(dict(found.values()))


def vector_of(policy: Policy, direction: Direction | Mapping[str, Tensor],
              state: Mapping[str, str] | None = None) -> Mapping[str, Tensor]:
    """v by parameter name: a mapping as it is, and that of a Direction if the policy is still what it was made at.

    Args:
        policy, direction: as for `entropy_change`.
        state: `state_of` the policy, where that is known.

    Raises:
        TypeError: neither of them. ValueError: a Direction made at other parameters, or parts that no trainable
            parameter of the policy has.
    """
    if isinstance(direction, Direction):
        state = state_of(policy) if state is None else state
        direction.check_made_at(state, ", or pass its .vector where you mean it all the same")
        vector = direction.vector
    else:
        vector = checks.instance("direction", direction, Mapping, "a Direction or a dict of tensors by parameter name")
        for name, x in vector.items():
            checks.tensor(f"direction[{name!r}]", x, kind="floating")
    check_tensors(policy, vector)
    return vector


def groups_of(policy: Policy, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's parameter group of each of the policy's parameters that it holds.

    Raises:
        ValueError: it holds none of them, or others that train: a step would move those by what their `.grad` holds.
    """
    of = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    groups = {name: of[id(p)] for name, p in policy.parameters.items() if id(p) in of}
    if len(groups) < len(of) or not groups:
        raise ValueError(f"optimizer: expected it to hold parameters of the policy; of {len(of)} trainable ones that "
                         f"it holds, {len(groups)} are the policy's")
    for i, group in enumerate(optimizer.param_groups):
        checks.number(f"optimizer.param_groups[{i}]['lr']", float(group["lr"]), minimum=0)
    return groups


def _filled(value: Tensor | float, p: Tensor) -> Tensor:
    """A tensor of the shape of `p`; a number becomes one that takes no memory."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device).expand(p.shape)


def _relative(rate: float, base: float) -> float:
    if rate == base:
        return 1.0
    if base == 0:
        raise ValueError(f"optimizer: the first group's learning rate is 0 and another's {rate:g}; "
                         "δθ/η needs a first group that moves")
    return rate / base


def loss_and_weights(policy: Policy, rollouts: Rollouts, objective: Objective, old_log_probs: Tensor | None,
                     batch_size: int | None, seed: int, selected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and −∂loss/∂log π and −∂loss/∂H of every token, [N, T]."""
    if old_log_probs is not None:
        check_old(old_log_probs, rollouts)
    with torch.no_grad():
        scores = score(policy, rollouts, batch_size=batch_size, moments=objective.moments)
    old = scores.log_probs if old_log_probs is None else old_log_probs.to(scores.log_probs)
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in (scores.log_probs, scores.entropies)]
        loss = objective.loss(leaves[0], old, rollouts, leaves[1], scores.collisions, scores.collision_log_probs, seed,
                              selected)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *(torch.where(rollouts.response_mask, -slope, 0.0) for slope in slopes)


def check_old(old_log_probs: Tensor, rollouts: Rollouts) -> None:
    """Raise TypeError or ValueError where these are not log-probs of the rollouts' tokens."""
    checks.tensor("old_log_probs", old_log_probs)
    check_inside("old_log_probs", old_log_probs, rollouts.response_mask.to(old_log_probs.device))
