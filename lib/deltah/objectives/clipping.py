"""Clipped surrogates: what a token, or a sequence, adds to the loss once its ratio to the old policy leaves a range.

Throughout r = π/π_old = exp(log_probs − old_log_probs) for a token and s for a sequence, A is the advantage, and
gradients are those of the sum of all losses with respect to the token's log-prob. At the very edge of a range they are
those inside it. Whatever a ratio or an advantage is, a token that is clipped has no gradient, not NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltah import checks


def grpo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
         clip_high: float = 0.2, dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate of PPO, −min(r A, clip(r, 1−ε_low, 1+ε_high) A) for each token, as GRPO uses it.

    Its gradient is −r A, and 0 where r > 1+ε_high with A > 0, or r < 1−ε_low with A < 0.

    Args:
        log_probs, old_log_probs: [N, T] in nats; r = exp(log_probs − old_log_probs).
        advantages: [N] or [N, T].
        mask: [N, T] bool.
        clip_low, clip_high: ε_low and ε_high, without unit.
        dual_clip: c > 1: where A < 0 the loss is at most −c A, without gradient where r > c. None: no such bound, as
            in the paper. verl has it with c = 3 in everything that it calls PPO, TRL where its `delta` is set.

    Returns:
        [N, T] losses. GRPO takes their "sequence_mean" (arXiv 2402.03300); verl and TRL may take another by default.

    Raises:
        TypeError: something that is not a tensor of numbers, or a clip that is not a number. ValueError: shapes that
            do not fit, a negative clip, a dual clip of 1 or less, or numbers inside the mask that are NaN or infinite.

    >>> grpo(torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[-1.2000]])
    """
    ratio = log_ratio(log_probs, old_log_probs, mask)
    return torch.where(mask, clipped(ratio, per_token(advantages, mask), clip_low, clip_high, dual_clip), 0.0)


def dr_grpo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
            clip_high: float = 0.2) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): for each token what `grpo` gives; what differs comes before and after.

    The advantages are R − mean, `group_advantages(..., scale=False)`, and the losses are summed and divided by a
    length that no response has a say in, `aggregate(..., "constant", length)`.

    >>> dr_grpo(torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[-1.2000]])
    """
    return grpo(log_probs, old_log_probs, advantages, mask, clip_low, clip_high)


def dapo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
         clip_high: float = 0.28, dual_clip: float | None = None) -> Tensor:
    """DAPO (arXiv 2503.14476): `grpo` with a range that is wider above, 0.8 to 1.28, and "token_mean".

    Unlikely tokens have further to rise before they are clipped. DAPO also samples until a prompt's rewards differ and
    shapes the rewards of long responses, which is not the loss's business. Its published runs have `dual_clip` 10.

    >>> dapo(torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[-1.2800]])
    """
    return grpo(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, dual_clip)


def cispo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float | None = None,
          clip_high: float = 4.0) -> Tensor:
    """CISPO (arXiv 2506.13585): −sg[min(r, 1+ε_high)] A log π; no token loses its gradient, its weight is bounded.

    Its gradient is −min(r, 1+ε_high) A. Where r is within bounds that is GRPO's, and the loss itself is another.

    Args:
        log_probs, old_log_probs, advantages, mask: as for `grpo`.
        clip_low: ε_low: the weight is also at least 1−ε_low, as in verl, whose default is 0.2. None: no lower bound,
            as the paper has it in effect.
        clip_high: ε_high. The paper prints no number; 4 makes the largest weight 5, which ScaleRL (arXiv 2510.13786)
            found good. TRL's `epsilon_high` is that largest weight, 1+ε_high; verl's default is ε_high = 0.2.

    Returns:
        [N, T] losses, of which the paper takes the "token_mean".

    Raises:
        TypeError, ValueError: as for `grpo`.

    >>> cispo(torch.tensor([[-0.5]]), torch.tensor([[-3.0]]), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    tensor([[2.5000]])
    """
    low = None if clip_low is None else 1 - checks.number("clip_low", clip_low, minimum=0)
    high = 1 + checks.number("clip_high", clip_high, minimum=0)
    weight = log_ratio(log_probs, old_log_probs, mask).detach().exp().clamp(low, high)
    return torch.where(mask, -weight * per_token(advantages, mask) * torch.where(mask, log_probs, 0.0), 0.0)


def gspo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 3e-4,
         clip_high: float = 4e-4) -> Tensor:
    """GSPO: the clipped surrogate of the sequence's ratio s = exp(mean_t log r_t) (arXiv 2507.18071).

    Its gradient is −s A at every token of the sequence, and 0 where s > 1+ε_high with A > 0, or s < 1−ε_low with A < 0.

    Args:
        log_probs, old_log_probs: [N, T] in nats.
        advantages: [N], one for each sequence.
        mask: [N, T] bool.
        clip_low, clip_high: ε_low and ε_high on s; the defaults are the paper's. Unless told otherwise, TRL's
            `importance_sampling_level="sequence"` and verl's "gspo" keep 0.2 and a mean over tokens.

    Returns:
        [N, T] losses, the same −min(s A, clip(s) A) at every token of a sequence, so that "sequence_mean"
        gives the paper's objective.

    Raises:
        TypeError, ValueError: as for `grpo`; a row without a token; or advantages that differ between tokens, which
            the sequence's ratio has no place for (`gspo_token` has).

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> gspo(torch.tensor([[0.5, -0.3]]), torch.zeros(1, 2), torch.ones(1), mask, clip_low=0.2, clip_high=0.2)
    tensor([[-1.1052, -1.1052]])
    """
    ratio = _sequence_log_ratio(log_probs, old_log_probs, mask)
    checks.tensor("advantages", advantages, mask.shape[:1], kind="number", finite=True)
    return torch.where(mask, clipped(ratio, advantages, clip_low, clip_high)[:, None], 0.0)


def gspo_token(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 3e-4,
               clip_high: float = 4e-4) -> Tensor:
    """GSPO-token: the clipped surrogate of s_t = sg[s] π_t / sg[π_t], whose value is s (arXiv 2507.18071).

    Its gradient is −s A_t, and 0 where s > 1+ε_high with A_t > 0, or s < 1−ε_low with A_t < 0. With one advantage for
    each sequence that is `gspo`'s, token by token; here advantages may differ between tokens. It is what verl calls
    "gspo".

    Args:
        log_probs, old_log_probs, mask, clip_low, clip_high: as for `gspo`.
        advantages: [N] or [N, T].

    Returns:
        [N, T] losses, of which the paper takes the "sequence_mean".

    Raises:
        TypeError, ValueError: as for `grpo`, or a row without a token.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> gspo_token(torch.tensor([[0.5, -0.3]]), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask, 0.2, 0.2)
    tensor([[-1.1052,  1.1052]])
    """
    ratio = _sequence_log_ratio(log_probs, old_log_probs, mask).detach()[:, None]
    own = torch.where(mask, log_probs, 0.0)
    ratio = ratio + (own - own.detach())
    return torch.where(mask, clipped(ratio, per_token(advantages, mask), clip_low, clip_high), 0.0)


def ce_gppo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
            clip_high: float = 0.28, beta_low: float = 0.75, beta_high: float = 1.0,
            dual_clip: float | None = 3.0) -> Tensor:
    """CE-GPPO (arXiv 2509.20712): the tokens that PPO clips keep a bounded gradient, β₁ or β₂ times that at the edge.

    The loss is −w A, and so is its gradient, with w = β₁ (1−ε_low) where r < 1−ε_low and A < 0, w = β₂ (1+ε_high)
    where r > 1+ε_high and A > 0, and w = r elsewhere. Where A < 0 and w > c the loss is −c A, without gradient. With
    β₁ = β₂ = 0 the gradient is that of `grpo` with this dual clip.

    Args:
        log_probs, old_log_probs, advantages, mask, clip_low, clip_high: as for `grpo`. The authors' runs have
            ε_high = 0.2.
        beta_low: β₁ ≥ 0, for tokens that have become less likely; 0.5 in the authors' runs of a 1.5B model.
        beta_high: β₂ ≥ 0, for tokens that have become more likely.
        dual_clip: c > 1; None: no such bound. The authors' runs have c = 10.

    Returns:
        [N, T] losses, of which the paper takes the "token_mean". The authors' runs add a tenth of the negative
        log-likelihood of correct responses, which is not in the paper's equations and not here.

    Raises:
        TypeError, ValueError: as for `grpo`, or a β that is negative.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> ce_gppo(torch.tensor([[-0.5, 0.5]]), torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), mask)
    tensor([[ 0.6000, -1.2800]])
    """
    ratio, advantages = log_ratio(log_probs, old_log_probs, mask), per_token(advantages, mask)
    below, above = checks.number("beta_low", beta_low, minimum=0), checks.number("beta_high", beta_high, minimum=0)
    outside, bound = clipped_by_ratio(ratio, advantages, clip_low, clip_high)
    kept = torch.where(advantages > 0, above * bound, below * bound)
    weight = torch.where(outside, kept, ratio.detach().exp())
    loss = surrogate(ratio, weight, torch.zeros_like(mask), advantages, dual_clip)
    return torch.where(mask, loss, 0.0)


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
    return _sequence_log_ratio(log_probs, old_log_probs, mask).exp()


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


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages [N] or [N, T] as [N, T], and 0 outside the mask, where anything may stand.

    Raises:
        TypeError, ValueError: no numbers, another shape, or numbers inside the mask that are NaN or infinite.
    """
    checks.tensor("advantages", advantages, kind="number")
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"advantages: expected shape {list(mask.shape[:1])} or {list(mask.shape)}, "
                         f"got {list(advantages.shape)}")
    advantages = advantages if advantages.shape == mask.shape else advantages[:, None]
    if not (torch.isfinite(advantages) | ~mask).all():
        raise ValueError("advantages: expected finite numbers inside the mask, got NaN or infinity")
    return torch.where(mask, advantages, 0)


def clipped_by_ratio(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where PPO's clip removes the gradient, of log-ratios in nats, and the ratio put in place of theirs.

    Raises:
        TypeError, ValueError: clips that are no numbers ≥ 0.
    """
    low, high = checks.number("clip_low", clip_low, minimum=0), checks.number("clip_high", clip_high, minimum=0)
    ratio = ratio.detach().exp()
    outside = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return outside, ratio.clamp(1 - low, 1 + high)


def clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
            dual_clip: float | None = None) -> Tensor:
    """The clipped surrogate as a loss, of log-ratios in nats."""
    outside, bound = clipped_by_ratio(ratio, advantages, clip_low, clip_high)
    weight = torch.where(outside, bound, ratio.detach().exp())
    return surrogate(ratio, weight, outside, advantages, dual_clip)


def surrogate(ratio: Tensor, weight: Tensor, stopped: Tensor, advantages: Tensor,
              dual_clip: float | None = None) -> Tensor:
    """−w A, whose derivative by the log-ratio is the same −w A, but 0 where it is stopped or the dual clip binds."""
    if dual_clip is not None:
        limit = checks.number("dual_clip", dual_clip, above=1)
        beyond = (advantages < 0) & (weight > limit)
        weight, stopped = torch.where(beyond, limit, weight), stopped | beyond
    # The exponential is 1, and never that of a large log-ratio: 0 · ∞ would be NaN.
    moving = torch.where(stopped, 0.0, ratio - ratio.detach()).exp()
    return -torch.where(advantages == 0, 0.0, weight) * moving * advantages


def _sequence_log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    ratio = log_ratio(log_probs, old_log_probs, mask)
    check_rows(mask)
    return ratio.sum(1) / mask.sum(1)
