"""An objective: a per-token loss with what its paper does before and after, the advantages and the aggregation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltah import checks
from deltah.objectives.advantages import group_advantages
from deltah.objectives.bonus import entropy_bonus
from deltah.objectives.clipping import (
    ce_gppo,
    check_inside,
    check_rows,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    gspo_token,
)
from deltah.objectives.selection import clip_b_tokens, clip_cov, clip_v_tokens, kl_cov
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
        losses: of this package, such as `grpo`, a `functools.partial` that sets its hyperparameters, or a function of
            your own of (log_probs, old_log_probs, advantages, mask). What more it asks for by an argument's name, of
            those in `EXTRAS`, it is given, unless a partial has set it.
        aggregation: how `aggregate` makes one number of the per-token losses.
        scale: whether `group_advantages` divides by the group's standard deviation.
        length: the constant of `aggregate`, ≥ 1; None: the width of the batch, which its longest response decides;
            `training.train` puts its `max_new_tokens` there.
        dropped: which tokens leave the mask, for losses and aggregation alike: `clip_b_tokens`, or another function
            of (log_probs, advantages, mask), and of extras by name, to [N, T] bool. None: none do. A mean over
            sequences asks that each keeps a token.

    Raises:
        TypeError, ValueError: a field of another kind, or out of its range.

    >>> Objective(functools.partial(grpo, clip_high=0.28), aggregation="token_mean")       # doctest: +SKIP
    >>> replace(find("clip_b"), dropped=functools.partial(clip_b_tokens, threshold=3.0))   # doctest: +SKIP
    """

    losses: Callable[..., Tensor]
    aggregation: str = "sequence_mean"
    scale: bool = True
    length: int | None = None
    dropped: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.losses):
            raise TypeError(f"losses: expected a function such as objectives.grpo, got {checks.shown(self.losses)}")
        checks.choice("aggregation", self.aggregation, AGGREGATIONS)
        checks.boolean("scale", self.scale)
        if self.length is not None:
            object.__setattr__(self, "length", checks.integer("length", self.length, minimum=1))
        if self.dropped is not None and not callable(self.dropped):
            raise TypeError("dropped: expected a function such as objectives.clip_b_tokens, got "
                            f"{checks.shown(self.dropped)}")

    @property
    def needs(self) -> tuple[str, ...]:
        """What of `EXTRAS` it asks for.

        >>> find("clip_v").needs
        ('entropies', 'collisions', 'collision_log_probs')
        """
        return tuple(name for name in EXTRAS if name in {*_asked(self.losses), *_asked(self.dropped)})

    @property
    def moments(self) -> bool:
        """Whether it needs those of `score(..., moments=True)`."""
        return "collisions" in self.needs or "collision_log_probs" in self.needs

    def loss(self, log_probs: Tensor, old_log_probs: Tensor, rollouts: Rollouts, entropies: Tensor | None = None,
             collisions: Tensor | None = None, collision_log_probs: Tensor | None = None, seed: int = 0,
             selected: Tensor | None = None) -> Tensor:
        """The scalar that a trainer minimises, from log-probs [N, T]; with A from the rewards if not given.

        Statistics of a batch, and the tokens that are chosen by them, are those of these rollouts and constants of the
        differentiation; so are the old log-probs, and the collisions and their log-probs.

        Args:
            log_probs, old_log_probs: [N, T] in nats.
            rollouts: N rollouts with advantages or rewards.
            entropies, collisions, collision_log_probs: [N, T], of `score`; only for objectives that need them.
            seed: of those that draw; give another at each step.
            selected: [N, T] bool, in place of the tokens that a method which treats some apart would choose among
                these rollouts: the rows of `clip_cov_tokens`, `clip_b_tokens` and so on over a larger batch.

        Raises:
            TypeError: something that is not a tensor, or no Rollouts. ValueError: rollouts with neither advantages nor
                rewards, shapes that do not fit, numbers that are NaN or infinite, something missing that the objective
                needs, tokens selected for one that selects none, or losses that would pass a gradient on to collisions
                or their log-probs.
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
        # The old policy is no function of the parameters, even where its log-probs come with a graph.
        advantages, old_log_probs = advantages.to(log_probs), old_log_probs.detach().to(log_probs)
        mask, needs = rollouts.response_mask.to(log_probs.device), self.needs
        if selected is not None:
            if self.dropped is None and "selected" not in needs:
                raise ValueError("selected: this objective treats no tokens apart, got some")
            selected = checks.tensor("selected", selected, mask.shape, kind="boolean").to(mask.device)
        extras = {"seed": checks.integer("seed", seed, minimum=0), "selected": selected}
        for name, value in (("entropies", entropies), ("collisions", collisions),
                            ("collision_log_probs", collision_log_probs)):
            if name in needs:
                extras[name] = checks.tensor(name, value, kind="floating").to(log_probs)
                if name != "entropies":
                    extras[name] = extras[name].detach().requires_grad_(torch.is_grad_enabled())
        if self.dropped is not None:
            if selected is None:
                own = {name: extras[name] for name in _asked(self.dropped)}
                selected = self.dropped(log_probs, advantages, mask, **own)
            mask = mask & ~checks.tensor("dropped", selected, mask.shape, kind="boolean")
        own = {name: extras[name] for name in _asked(self.losses)}
        losses = self.losses(log_probs, old_log_probs, advantages, mask, **own)
        loss = aggregate(losses, mask, self.aggregation, self.length)
        _check_constant(loss, {name: own[name] for name in EXTRAS[1:3] if name in own})
        return loss


# What a method may ask for beyond log-probs, advantages and the mask, by the names of its arguments.
EXTRAS = ("entropies", "collisions", "collision_log_probs", "seed", "selected")


def _check_constant(loss: Tensor, moments: dict[str, Tensor]) -> None:
    """Raise ValueError where the loss has a derivative by a moment, which no update would follow."""
    for name, x in moments.items():
        if loss.requires_grad and x.requires_grad:
            slope, = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
            if slope is not None and slope.any():
                raise ValueError(f"losses: expected {name} to be constants of the differentiation, as gradients go by "
                                 "way of log-probs and entropies alone, got a loss that changes with them")


def _asked(function: Callable | None) -> tuple[str, ...]:
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):  # nothing, or written in C
        return ()
    bound = function.keywords if isinstance(function, functools.partial) else ()
    return tuple(name for name in EXTRAS if name in names and name not in bound)


OBJECTIVES = {
    "grpo": Objective(grpo),
    "dr_grpo": Objective(dr_grpo, "constant", scale=False),
    "dapo": Objective(dapo, "token_mean"),
    "cispo": Objective(cispo, "token_mean"),
    "gspo": Objective(gspo),
    "gspo_token": Objective(gspo_token),
    "ce_gppo": Objective(ce_gppo, "token_mean"),
    "clip_cov": Objective(clip_cov, "token_mean"),
    "kl_cov": Objective(kl_cov, "token_mean"),
    "clip_b": Objective(grpo, "token_mean", dropped=clip_b_tokens),
    "clip_v": Objective(grpo, "token_mean", dropped=clip_v_tokens),
    "entropy_bonus": Objective(entropy_bonus, "token_mean"),
}


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
