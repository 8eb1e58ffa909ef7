"""The small reinforcement-learning loop that the chapters use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltah import checks
from deltah.objectives import Objective, find
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import score
from deltah.updates import check_old


@torch.inference_mode(False)
def policy_gradient_step(policy: Policy, rollouts: Rollouts, old_log_probs: Tensor, objective: str | Objective,
                         optimizer: Optimizer, max_gradient_norm: float | None = None, seed: int = 0,
                         selected: Tensor | None = None) -> float:
    """One optimizer step on the objective's loss over `rollouts`; changes the policy in place.

    What stands in the parameters' `.grad` before takes no part in the step. After it, the (clipped) gradient of this
    batch stands there, as in any training loop, in tensors of its own: those that a caller has kept hold what they
    held. Where anything goes wrong before the step, parameters and gradients are left as they were.

    Args:
        policy: the policy whose parameters `optimizer` holds.
        rollouts: N rollouts with advantages, or with rewards that the objective makes advantages of.
        old_log_probs: [N, T] in nats, under the policy that sampled them.
        objective: a name of `objectives.OBJECTIVES`, such as "gspo", or an `objectives.Objective`.
        optimizer: any torch optimizer that needs no closure.
        max_gradient_norm: > 0, the norm to clip the gradient to; None: leave it.
        seed, selected: of `Objective.loss`: a seed for objectives that draw, another at each step; tokens that were
            chosen over more than these rollouts.

    Returns:
        The loss before the step.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: an unknown objective, rollouts without advantages and
            rewards, an optimizer that holds none of the policy's parameters, a number that is NaN, infinite or out of
            range, or a gradient that is not finite.

    >>> optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-5)             # doctest: +SKIP
    >>> policy_gradient_step(policy, rollouts, old_log_probs, "gspo", optimizer)       # doctest: +SKIP
    0.0
    """
    checks.instance("policy", policy, Policy)
    checks.instance("rollouts", rollouts, Rollouts)
    checks.instance("optimizer", optimizer, Optimizer, "a torch optimizer")
    limit = None if max_gradient_norm is None else checks.number("max_gradient_norm", max_gradient_norm, above=0)
    objective, parameters = find(objective), policy.parameters
    check_old(old_log_probs, rollouts)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in parameters.values()):
        raise ValueError("optimizer: expected it to hold parameters of the policy, got none of them")
    before = {name: p.grad for name, p in parameters.items()}
    try:
        # Of parameters that the optimizer does not hold too: their gradients count towards the norm.
        for p in parameters.values():
            p.grad = None
        with torch.enable_grad():
            scores = score(policy, rollouts, moments=objective.moments)
            loss = objective.loss(scores.log_probs, old_log_probs, rollouts, scores.entropies, scores.collisions,
                                  scores.collision_log_probs, seed, selected)
            loss.backward()
        for name, p in parameters.items():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                raise ValueError(f"policy, rollouts: the gradient of {name} is NaN or infinite")
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
        optimizer.step()
    except BaseException:
        for name, p in parameters.items():
            p.grad = before[name]
        raise
    return loss.item()
