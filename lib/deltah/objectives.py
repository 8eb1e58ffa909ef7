"""Policy-gradient objectives as losses to be minimised, and how per-token losses become one number.

Each takes log-probs [N, T] under the policy and under the one that sampled, advantages [N] or [N, T] and the
response mask [N, T], and returns per-token losses [N, T] that are 0 outside the mask. An `Objective` adds what
its paper does before and after: the advantages, and the aggregation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltah.rollouts import Rollouts

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")


def group_advantages(rewards: Tensor, prompt_index: Tensor, scale: bool = True) -> Tensor:
    """Advantages relative to the prompt's other rollouts: A = (R − mean) / (std + 1e-6), or R − mean.

    Args:
        rewards: [N].
        prompt_index: [N] integers; rollouts of a prompt share one.
        scale: divide by the group's (unbiased) standard deviation, as GRPO (arXiv 2402.03300) and its public
            implementations do; Dr. GRPO (arXiv 2503.20783) does not.

    Returns:
        [N] advantages; 0 in a group where all rewards are equal.

    Raises:
        ValueError: rewards and prompt_index of different shapes.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), scale=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    if rewards is None or rewards.shape != prompt_index.shape:
        raise ValueError(f"rewards: expected shape {list(prompt_index.shape)}, "
                         f"got {None if rewards is None else list(rewards.shape)}")
    _, group, sizes = prompt_index.unique(return_inverse=True, return_counts=True)
    sums = rewards.new_zeros(len(sizes)).index_add(0, group, rewards)
    centred = rewards - (sums / sizes)[group]
    if not scale:
        return centred
    squares = rewards.new_zeros(len(sizes)).index_add(0, group, centred.square())
    deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (deviation[group] + 1e-6)


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


def aggregate(losses: Tensor, mask: Tensor, how: str = "sequence_mean", length: int | None = None) -> Tensor:
    """One loss from per-token losses [N, T].

    Args:
        losses: [N, T].
        mask: [N, T] bool.
        how: "sequence_mean": mean over a sequence's tokens, then over sequences (GRPO, GSPO). "token_mean":
            mean over the batch's tokens (DAPO). "constant": sum over tokens divided by `length`, then mean
            over sequences (Dr. GRPO).
        length: the constant; None: the batch's width T.

    Raises:
        ValueError: another `how`, or shapes that differ.

    >>> aggregate(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.7500)
    """
    if losses.shape != mask.shape:
        raise ValueError(f"losses: expected the mask's shape {list(mask.shape)}, got {list(losses.shape)}")
    losses = torch.where(mask, losses, 0.0)
    if how == "sequence_mean":
        return (losses.sum(1) / mask.sum(1)).mean()
    if how == "token_mean":
        return losses.sum() / mask.sum()
    if how == "constant":
        return losses.sum(1).mean() / (length or mask.shape[1])
    raise ValueError(f"how: expected one of {', '.join(AGGREGATIONS)}, got {how!r}")


@dataclass(frozen=True)
class Objective:
    """A per-token loss with the advantages and the aggregation that it is used with.

    Attributes:
        losses: of this module, such as `grpo`, or a `functools.partial` that sets its hyperparameters.
        aggregation: how `aggregate` makes one number of the per-token losses.
        scale: whether `group_advantages` divides by the group's standard deviation.
        length: the constant of `aggregate`; None: the width of the batch.

    >>> Objective(functools.partial(grpo, clip_high=0.28), aggregation="token_mean")       # doctest: +SKIP
    """

    losses: Callable[..., Tensor]
    aggregation: str = "sequence_mean"
    scale: bool = True
    length: int | None = None

    def loss(self, log_probs: Tensor, old_log_probs: Tensor, rollouts: Rollouts) -> Tensor:
        """The scalar that a trainer minimises, from log-probs [N, T]; with A from the rewards if not given.

        Raises:
            ValueError: rollouts with neither advantages nor rewards, or shapes that do not fit.
        """
        advantages = rollouts.advantages
        if advantages is None:
            if rollouts.rewards is None:
                raise ValueError("rollouts: expected advantages, got None, and no rewards to make them from; fill "
                                 "either in with rollouts.replace(advantages=...)")
            advantages = group_advantages(rollouts.rewards, rollouts.prompt_index, self.scale)
        mask = rollouts.response_mask.to(log_probs.device)
        losses = self.losses(log_probs, old_log_probs, advantages.to(log_probs), mask)
        return aggregate(losses, mask, self.aggregation, self.length)


OBJECTIVES = {"grpo": Objective(grpo), "dr_grpo": Objective(dr_grpo, "constant", scale=False), "gspo": Objective(gspo)}


def find(objective: str | Objective) -> Objective:
    """The objective of that name, with its paper's settings; an `Objective` is returned as it is.

    >>> find("dr_grpo").aggregation
    'constant'
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)} or an objectives.Objective, "
                         f"got {objective!r}")
    return OBJECTIVES[objective]


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
