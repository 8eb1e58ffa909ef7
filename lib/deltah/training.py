"""The small reinforcement-learning loop that the chapters use."""

from __future__ import annotations

import torch
from torch import Tensor

from deltah.objectives import Objective, find
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import score


def policy_gradient_step(policy: Policy, rollouts: Rollouts, old_log_probs: Tensor, objective: str | Objective,
                         optimizer: torch.optim.Optimizer, max_gradient_norm: float | None = None) -> float:
    """One optimizer step on the objective's loss over `rollouts`; changes the policy in place.

    Args:
        policy: the policy whose parameters `optimizer` holds.
        rollouts: N rollouts with advantages, or with rewards that the objective makes advantages of.
        old_log_probs: [N, T] in nats, under the policy that sampled them.
        objective: a name of `objectives.OBJECTIVES`, such as "gspo", or an `objectives.Objective`.
        optimizer: any torch optimizer.
        max_gradient_norm: clip the gradient to this norm; None: leave it.

    Returns:
        The loss before the step.

    Raises:
        ValueError: an unknown objective, or rollouts without advantages and rewards.

    >>> optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-5)             # doctest: +SKIP
    >>> policy_gradient_step(policy, rollouts, old_log_probs, "gspo", optimizer)       # doctest: +SKIP
    0.0
    """
    loss = find(objective).loss(score(policy, rollouts).log_probs, old_log_probs, rollouts)
    # Of parameters that the optimizer does not hold too: their gradients count towards the norm.
    policy.model.zero_grad()
    loss.backward()
    if max_gradient_norm is not None:
        torch.nn.utils.clip_grad_norm_(policy.parameters.values(), max_gradient_norm)
    optimizer.step()
    return loss.item()
