"""An objective: a per-token loss with what its paper does before and after, the advantages and the aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltah.objectives.advantages import group_advantages
from deltah.objectives.clipping import dr_grpo, grpo, gspo
from deltah.rollouts import Rollouts

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")


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
