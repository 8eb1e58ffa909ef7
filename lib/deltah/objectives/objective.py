"""An objective: a per-token loss with what its paper does before and after, the advantages and the aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltah import checks
from deltah.objectives.advantages import group_advantages
from deltah.objectives.clipping import check_inside, check_rows, dr_grpo, grpo, gspo
from deltah.rollouts import Rollouts

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")


def aggregate(losses: Tensor, mask: Tensor, how: str = "sequence_mean", length: int | None = None) -> Tensor:
    """One loss from per-token losses [N, T].

    Args:
        losses: [N, T]; outside the mask anything may stand.
        mask: [N, T] bool.
        how: "sequence_mean": mean over a sequence's tokens, then over sequences (GRPO, GSPO). "token_mean":
            mean over the batch's tokens (DAPO). "constant": sum over tokens divided by `length`, then mean
            over sequences (Dr. GRPO).
        length: the constant; None: the batch's width T.

    Raises:
        TypeError: something that is not a tensor, or not of the kind above. ValueError: another `how`, shapes that
            differ, losses inside the mask that are NaN or infinite, a length < 1, or no token where the mean of some
            is asked for.

    >>> aggregate(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.7500)
    """
    checks.choice("how", how, AGGREGATIONS)
    length = None if length is None else checks.integer("length", length, minimum=1)
    checks.tensor("mask", mask, ("N", "T"), kind="boolean")
    check_inside("losses", losses, mask)
    losses = torch.where(mask, losses, 0.0)
    if how == "constant":
        return losses.sum(1).mean() / (length or mask.shape[1])
    if how == "sequence_mean":
        check_rows(mask)
        return (losses.sum(1) / mask.sum(1)).mean()
    if not mask.any():
        raise ValueError("mask: expected a token to take the mean of, got none")
    return losses.sum() / mask.sum()


@dataclass(frozen=True)
class Objective:
    """A per-token loss with the advantages and the aggregation that it is used with.

    Attributes:
        losses: of this module, such as `grpo`, or a `functools.partial` that sets its hyperparameters.
        aggregation: how `aggregate` makes one number of the per-token losses.
        scale: whether `group_advantages` divides by the group's standard deviation.
        length: the constant of `aggregate`, ≥ 1; None: the width of the batch.

    Raises:
        TypeError, ValueError: a field of another kind, or out of its range.

    >>> Objective(functools.partial(grpo, clip_high=0.28), aggregation="token_mean")       # doctest: +SKIP
    """

    losses: Callable[..., Tensor]
    aggregation: str = "sequence_mean"
    scale: bool = True
    length: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.losses):
            raise TypeError(f"losses: expected a function such as objectives.grpo, got {checks.shown(self.losses)}")
        checks.choice("aggregation", self.aggregation, AGGREGATIONS)
        checks.boolean("scale", self.scale)
        if self.length is not None:
            object.__setattr__(self, "length", checks.integer("length", self.length, minimum=1))

    def loss(self, log_probs: Tensor, old_log_probs: Tensor, rollouts: Rollouts) -> Tensor:
        """The scalar that a trainer minimises, from log-probs [N, T]; with A from the rewards if not given.

        Raises:
            TypeError: something that is not a tensor, or no Rollouts. ValueError: rollouts with neither advantages nor
                rewards, shapes that do not fit, or numbers that are NaN or infinite.
        """
        checks.instance("rollouts", rollouts, Rollouts)
        checks.tensor("log_probs", log_probs, kind="floating")
        checks.tensor("old_log_probs", old_log_probs, kind="floating")
        advantages = rollouts.advantages
        if advantages is None:
            if rollouts.rewards is None:
                raise ValueError("rollouts: expected advantages, got None, and no rewards to make them from; fill "
                                 "either in with rollouts.replace(advantages=...)")
            advantages = group_advantages(rollouts.rewards, rollouts.prompt_index, self.scale)
        mask = rollouts.response_mask.to(log_probs.device)
        losses = self.losses(log_probs, old_log_probs.to(log_probs), advantages.to(log_probs), mask)
        return aggregate(losses, mask, self.aggregation, self.length)


OBJECTIVES = {"grpo": Objective(grpo), "dr_grpo": Objective(dr_grpo, "constant", scale=False), "gspo": Objective(gspo)}


def find(objective: str | Objective) -> Objective:
    """The objective of that name, with its paper's settings; an `Objective` is returned as it is.

    Raises:
        TypeError: neither a name nor an `Objective`. ValueError: an unknown name.

    >>> find("dr_grpo").aggregation
    'constant'
    """
    if isinstance(objective, Objective):
        return objective
    expected = f"objective: expected one of {', '.join(OBJECTIVES)} or an objectives.Objective"
    if not isinstance(objective, str):
        raise TypeError(f"{expected}, got {checks.shown(objective)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"{expected}, got {objective!r}")
    return OBJECTIVES[objective]
