"""Clipped surrogates: what a token, or a sequence, adds to the loss once its ratio to the old policy leaves a range."""

from __future__ import annotations

import torch
from torch import Tensor

from deltah import checks


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

    Raises:
        TypeError: something that is not a tensor of numbers, or a clip that is not a number. ValueError: shapes that
            do not fit, a negative clip, or numbers inside the mask that are NaN or infinite.

    >>> grpo(torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[-1.2000]])
    """
    ratio = log_ratio(log_probs, old_log_probs, mask).exp()
    return torch.where(mask, -_clipped(ratio, _per_token(advantages, mask), clip_low, clip_high), 0.0)


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
        TypeError, ValueError: as for `grpo`; a row without a token; or advantages that differ between tokens, which
            the sequence's ratio has no place for.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> gspo(torch.tensor([[0.5, -0.3]]), torch.zeros(1, 2), torch.ones(1), mask, clip_low=0.2, clip_high=0.2)
    tensor([[-1.1052, -1.1052]])
    """
    ratio = sequence_ratio(log_probs, old_log_probs, mask)
    checks.tensor("advantages", advantages, mask.shape[:1], kind="number", finite=True)
    loss = -_clipped(ratio, advantages, clip_low, clip_high)
    return torch.where(mask, loss[:, None], 0.0)


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """GSPO's ratio s = (π/π_old)^(1/L) = exp(mean_t log r_t) of each sequence, [N], without unit.

    Args:
        log_probs, old_log_probs: [N, T] in nats.
        mask: [N, T] bool, with a token in every row.

    Raises:
        TypeError, ValueError: as for `gspo`.

    >>> sequence_ratio(torch.tensor([[0.5, -0.3]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    tensor([1.1052])
    """
    ratio = log_ratio(log_probs, old_log_probs, mask)
    check_rows(mask)
    return (ratio.sum(1) / mask.sum(1)).exp()


def log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log r = log_probs − old_log_probs, [N, T], and 0 outside the mask, where anything may stand.

    Raises:
        TypeError, ValueError: tensors of another kind or shape, or numbers inside the mask that are NaN or infinite.
    """
    checks.tensor("mask", mask, ("N", "T"), kind="boolean")
    check_inside("log_probs", log_probs, mask)
    check_inside("old_log_probs", old_log_probs, mask)
    return torch.where(mask, log_probs - old_log_probs, 0.0)


def check_inside(name: str, value: Tensor, mask: Tensor) -> None:
    """Raise TypeError or ValueError where `value` is no floating-point tensor of the mask's shape, finite inside it."""
    checks.tensor(name, value, kind="floating")
    if value.shape != mask.shape:
        raise ValueError(f"{name}: expected the mask's shape {list(mask.shape)}, got {list(value.shape)}")
    if not (torch.isfinite(value) | ~mask).all():
        raise ValueError(f"{name}: expected finite numbers inside the mask, got NaN or infinity")


def check_rows(mask: Tensor) -> None:
    """Raise ValueError where a row has no token, whose mean would be 0 / 0."""
    if not mask.any(1).all():
        raise ValueError(f"mask: expected a token in every row; row {int((~mask.any(1)).nonzero()[0])} has none")


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    low, high = checks.number("clip_low", clip_low, minimum=0), checks.number("clip_high", clip_high, minimum=0)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    checks.tensor("advantages", advantages, kind="number")
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"advantages: expected shape {list(mask.shape[:1])} or {list(mask.shape)}, "
                         f"got {list(advantages.shape)}")
    advantages = advantages if advantages.shape == mask.shape else advantages[:, None]
    if not (torch.isfinite(advantages) | ~mask).all():
        raise ValueError("advantages: expected finite numbers inside the mask, got NaN or infinity")
    return advantages
