"""A bonus for entropy: what is added to a loss so that the policy stays open."""

from __future__ import annotations

import torch
from torch import Tensor

from deltah import checks
from deltah.objectives.clipping import check_inside, grpo


def entropy_bonus(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor,
                  beta: float = 5e-3, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """`grpo` with a bonus for the entropy of each token's distribution, −min(r A, clip(r) A) − β H.

    Its gradient with respect to the log-prob is `grpo`'s, and with respect to H it is −β: the entropies have to come
    with their graph, as `score` returns them. It raises H at the prefixes that were sampled; how a step changes which
    prefixes are met, the other part of the entropy's derivative, has no say in it.

    Args:
        log_probs, old_log_probs, advantages, mask, clip_low, clip_high: as for `grpo`.
        entropies: [N, T], H in nats, differentiable.
        beta: β, per nat; negative takes entropy away. arXiv 2505.22617 reports that 1e-4 and 1e-3 did nothing, 5e-3
            held the entropy and 1e-2 let it explode.

    Returns:
        [N, T] losses; with the "token_mean", β times the mean entropy of a token is taken off. verl averages the bonus
        as it does the losses, TRL over tokens whatever it does with the losses.

    Raises:
        TypeError, ValueError: as for `grpo`; entropies of another kind or shape, or a β that is not finite.

    >>> one, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    >>> entropy_bonus(-one, -one, torch.ones(1), mask, 2 * one, beta=0.1)
    tensor([[-1.2000]])
    """
    beta = checks.number("beta", beta)
    losses = grpo(log_probs, old_log_probs, advantages, mask, clip_low, clip_high)
    check_inside("entropies", entropies, mask)
    return losses - beta * torch.where(mask, entropies, 0.0)
