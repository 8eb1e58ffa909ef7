"""Clipped surrogates: what a token, or a sequence, adds to the loss once its ratio to the old policy leaves a range."""

from __future__ import annotations

import torch
from torch import Tensor


def grpo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
         clip_high: float = 0.2) -> Tensor:
    """The clipped surrogate of PPO, −min(r A, clip(r, 1−ε_low, 1+ε_high) A) for each token, as GRPO uses it.

    Args:
        log_probs, old_log_probs: [N, T] in nats; r = exp(log_probs − old_log_probs).
        advantages: [N] or [N, T].
        mask: [N, T] bool.
        clip_low, clip_high: ε_low and ε_high, without unit.

    Returns:
        [N, T] losses. GRPO takes their "sequence_mean" (arXiv 2402.03300).

    >>> grpo(torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[-1.2000]])
    """
    ratio, advantages = _ratio(log_probs, old_log_probs, mask), _per_token(advantages, mask)
    return torch.where(mask, -_clipped(ratio, advantages, clip_low, clip_high), 0.0)


def dr_grpo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
            clip_high: float = 0.2) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): for each token what `grpo` gives; what differs comes before and after.

    The advantages are R − mean, `group_advantages(..., scale=False)`, and the losses are summed and divided by a
    length that no response has a say in, `aggregate(..., "constant", length)`.

    >>> dr_grpo(torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[-1.2000]])
    """
    return grpo(log_probs, old_log_probs, advantages, mask, clip_low, clip_high)


def gspo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 3e-4,
         clip_high: float = 4e-4) -> Tensor:
    """GSPO: the clipped surrogate of the sequence's ratio s = exp(mean_t log r_t) (arXiv 2507.18071).

    Args:
        log_probs, old_log_probs: [N, T] in nats.
        advantages: [N], one for each sequence.
        mask: [N, T] bool.
        clip_low, clip_high: ε_low and ε_high on s; the defaults are the paper's.

    Returns:
        [N, T] losses, the same −min(s A, clip(s) A) at every token of a sequence, so that "sequence_mean"
        gives the paper's objective.

    Raises:
        ValueError: advantages that differ between tokens, which the sequence's ratio has no place for.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> gspo(torch.tensor([[0.5, -0.3]]), torch.zeros(1, 2), torch.ones(1), mask, clip_low=0.2, clip_high=0.2)
    tensor([[-1.1052, -1.1052]])
    """
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages: expected shape {list(mask.shape[:1])}, got {list(advantages.shape)}")
    loss = -_clipped(sequence_ratio(log_probs, old_log_probs, mask), advantages, clip_low, clip_high)
    return torch.where(mask, loss[:, None], 0.0)


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """GSPO's ratio s = (π/π_old)^(1/L) = exp(mean_t log r_t) of each sequence, [N], without unit.

    >>> sequence_ratio(torch.tensor([[0.5, -0.3]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    tensor([1.1052])
    """
    _check_shapes(log_probs, old_log_probs, mask)
    return (torch.where(mask, log_probs - old_log_probs, 0.0).sum(1) / mask.sum(1)).exp()


def _ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    _check_shapes(log_probs, old_log_probs, mask)
    return torch.where(mask, log_probs - old_log_probs, 0.0).exp()


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"advantages: expected shape {list(mask.shape[:1])} or {list(mask.shape)}, "
                         f"got {list(advantages.shape)}")
    return advantages if advantages.shape == mask.shape else advantages[:, None]


def _check_shapes(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> None:
    for name, value in (("log_probs", log_probs), ("old_log_probs", old_log_probs)):
        if value.shape != mask.shape:
            raise ValueError(f"{name}: expected the mask's shape {list(mask.shape)}, got {list(value.shape)}")
