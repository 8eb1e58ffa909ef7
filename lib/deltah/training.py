"""The small reinforcement-learning loop that the chapters use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltah.objectives import aggregate
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import score


def policy_gradient_step(policy: Policy, rollouts: Rollouts, old_log_probs: Tensor, objective: Callable[..., Tensor],
                         optimizer: torch.optim.Optimizer, aggregation: str = "sequence_mean") -> float:
    """One optimizer step on the objective's loss over `rollouts`; changes the policy in place.

    Args:
        policy: the policy whose parameters `optimizer` holds.
        rollouts: N rollouts with advantages.
        old_log_probs: [N, T] in nats, under the policy that sampled them.
        objective: of `deltah.objectives`, such as `objectives.gspo`.
        optimizer: any torch optimizer.
        aggregation: how `objectives.aggregate` makes one number of the per-token losses.

    Returns:
        The loss before the step.

    Raises:
        ValueError: rollouts without advantages.

    >>> optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-5)             # doctest: +SKIP
    >>> policy_gradient_step(policy, rollouts, old_log_probs, objectives.gspo, optimizer)  # doctest: +SKIP
    0.0
    """
    if rollouts.advantages is None:
        raise ValueError("rollouts: expected advantages, got None; fill them in with "
                         "rollouts.replace(advantages=objectives.group_advantages(rewards, prompt_index))")
    log_probs = score(policy, rollouts).log_probs
    losses = objective(log_probs, old_log_probs, rollouts.advantages.to(log_probs), rollouts.response_mask)
    loss = aggregate(losses, rollouts.response_mask, aggregation)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
