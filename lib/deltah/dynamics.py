"""How an update direction changes the policy's entropy, predicted: dH/dη and d²H/dη² along θ + ηv.

With S_k = log π(t_k | t_<k), the next-token entropy H_k, and ∇ the derivative along v, for responses sampled at θ

    dH/dη   = E[ Σ_k  F_k ∇S_k + ∇H_k ],                                F_k = Σ_{j>k} H_j
    d²H/dη² = E[ Σ_k  F_k (∇²S_k + (∇S_k)² + 2 ∇S_k ∇S_<k) + 2 F'_k ∇S_k + ∇²H_k ],    F'_k = Σ_{j>k} ∇H_j

F_k is the entropy-to-go G_k after the baseline b_k = H_k; a baseline is taken off F_k and F'_k. The entropy per token
is h = E[Σ H_k] / E[L], so that h' = (H' − h L') / L and h'' = (H'' − 2 h' L' − h L'') / L, where L' and L'' are the
same sums with 1 in place of H_j. All derivatives come from forward-mode differentiation through the transformer, of all
tokens of a batch in one pass. They are those of the function that runs: what a model detaches, as DoRA does the norm of
its weights, moves too. Chapters 03, 06 and 07 derive and check this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from deltah import checks
from deltah.baselines import BASELINES, Remaining
from deltah.derivatives.jets import Refused
from deltah.derivatives.taylor import derivatives_along
from deltah.entropy import UNITS
from deltah.estimates import Estimate
from deltah.fingerprints import digest, fingerprint
from deltah.models.output_layers import rounding
from deltah.policies import Policy
from deltah.rollouts import Rollouts, check_rollouts
from deltah.scoring import batches, in_batches, score_batch, weighted_gradient
from deltah.updates import Direction, state_of, vector_of


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class EntropyChange(Estimate):
    """d^order H / dη^order, an `Estimate` whose `contributions` [N] are those of its linearisation.

    Attributes:
        token_contributions: [N, T], what each token adds: value = Σ token_contributions / N.
        score_term: the part of `value` that comes with ∇S, the change of which tokens are drawn. The rest comes
            with the change of H_k at given prefixes, and its variance is mostly small.
        score_weights: [N, T], of order 1: value = Σ (score_weights · ∇S_k + entropy_weight · ∇H_k).
        entropy_weight: 1 / N, or 1 / (N E[L]) per token.
        prompt_index: [N], the clusters of the standard error.
        order: 1 or 2.
        per: "sequence" or "token".
        of_policy, of_rollouts, of_direction: digests of what it is the change of; those of the same content are equal.

    Raises:
        TypeError, ValueError: a field of another kind, or out of its range.
    """

    token_contributions: Tensor
    score_term: Estimate
    score_weights: Tensor
    entropy_weight: float
    prompt_index: Tensor
    order: int
    per: str
    of_policy: str
    of_rollouts: str
    of_direction: str

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.tensor("contributions", self.contributions, ("N",), kind="floating")
        checks.tensor("prompt_index", self.prompt_index, self.contributions.shape, kind="integer")
        for name in ("token_contributions", "score_weights"):
            checks.tensor(name, getattr(self, name), ("N", "T"), kind="floating")
        checks.instance("score_term", self.score_term, Estimate, "an Estimate")
        checks.number("entropy_weight", self.entropy_weight)
        checks.choice("order", self.order, (1, 2))
        checks.choice("per", self.per, UNITS)
        for name in ("of_policy", "of_rollouts", "of_direction"):
            checks.instance(name, getattr(self, name), str, "a digest")


@torch.inference_mode(False)
def entropy_change(policy: Policy, rollouts: Rollouts, direction: Direction | Mapping[str, Tensor], order: int = 1,
                   per: str = "token", baseline: str = "regression", batch_size: int | None = None) -> EntropyChange:
    """The derivative of the policy's entropy along an update direction, from rollouts that did not make the update.

    Args:
        policy: the policy, at the parameters θ where the derivative is taken.
        rollouts: N rollouts sampled from it, at any temperature, without top-k or top-p. Those that made the
            direction would bias the estimate (chapter 05).
        direction: v = δθ/η, of `update_direction` or by parameter name; what it leaves out stays still. A Direction
            has to have been made at the policy's present parameters, a dict such as its `.vector` need not.
        order: 1 or 2.
        per: "sequence": of E[Σ_k H_k]. "token": of E[Σ_k H_k] / E[L]; its bias is of order 1/N.
        baseline: of the score-function terms. "none"; "entropy": b_k = H_k; "running_mean": b_k = H_k + the mean of
            the rest at position k; "regression": b_k = H_k + a baseline learned from the hidden state, H_k and k
            (`baselines`). The last two are fitted on other rollouts and add no bias. For order 2, where few rollouts
            decide, neither is reliably the better.
        batch_size: rollouts at a time; None: as many as suit the device.

    Returns:
        An EntropyChange, in nats (per token) per unit of η^order. Its standard error takes a prompt as the unit of
        sampling, and the direction as given.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: one out of range, a direction that does not fit the
            policy or was made at other parameters, fewer than five rollouts for a fitted baseline, a result that is
            not finite, or a model whose derivative is not to be had: one without forward mode, or that rounds what
            moves, or leaves PyTorch.

    Source: the notes, sections 2.3, 2.4 and 2.6.

    >>> change = entropy_change(policy, rollouts, direction)                 # doctest: +SKIP
    >>> change, 1e-3 * change.value        # per unit of η, and what to expect at η = 1e-3   # doctest: +SKIP
    (-0.73 ± 0.04, -0.00073)
    """
    checks.instance("policy", policy, Policy)
    checks.instance("rollouts", rollouts, Rollouts)
    for name, value, allowed in (("order", order, (1, 2)), ("per", per, UNITS), ("baseline", baseline, BASELINES)):
        checks.choice(name, value, allowed)
    batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    state, rollouts = state_of(policy), rollouts.to(policy.device)
    v = _moving(vector_of(policy, direction, state))
    d = _derivatives(policy, rollouts, v, order, baseline, batch_size)
    mask, zeros = rollouts.response_mask, torch.zeros_like(d.entropies)
    # What the entropy is divided by: tokens, whose number changes too, or responses. The entropy less a constant for
    # each token has the same derivatives per token, and with its mean for the constant the least variance.
    count, mean = rollouts.lengths.double(), d.entropies.sum() / mask.sum()
    if per == "sequence":
        count, mean = torch.ones_like(count), 0.0
    excess = d.entropies - mean * mask
    quantities = {"excess": excess}
    if per == "token":
        quantities["tokens"] = mask.double()
    if order == 2:
        quantities["slopes"] = d.entropies_1
    remaining = Remaining(quantities, baseline, mask, d.entropies, _features(rollouts, d))
    terms = _terms(remaining, "excess", d, d.entropies_1, d.entropies_2)
    units = _terms(remaining, "tokens", d, zeros, zeros) if per == "token" else _Terms(zeros, zeros, zeros)
    direct = d.entropies_1 if order == 1 else d.entropies_2

    def derivative(means: Tensor) -> Tensor:
        return _quotient(*means[:6])[order]

    sums = [x.sum(1) for x in (excess, terms.first, terms.second, units.first, units.second, direct)]
    samples = torch.stack([*sums[:3], count, *sums[3:]], 1)
    if not torch.isfinite(samples).all():
        raise ValueError("policy, direction: the derivative is NaN or infinite, first in rollout "
                         f"{int((~torch.isfinite(samples)).any(1).nonzero()[0])}")
    clusters, size = rollouts.prompt_index, float(count.mean())
    whole = Estimate.smooth(derivative, samples, clusters)
    score_term = Estimate.smooth(lambda means: derivative(means) - means[6] / means[3], samples, clusters)
    h, h_1, _ = _quotient(*samples.mean(0)[:6])
    tokens = terms.first - h * units.first
    if order == 2:
        tokens = terms.second - 2 * h_1 * units.first - h * units.second
    return EntropyChange(
        **{f.name: getattr(whole, f.name) for f in fields(Estimate)}, token_contributions=tokens / size,
        score_term=score_term, score_weights=(terms.rest - h * units.rest) / (size * len(rollouts)),
        entropy_weight=1 / (size * len(rollouts)), prompt_index=clusters, order=int(order), per=per,
        of_policy=digest(state), of_rollouts=_digest(rollouts), of_direction=digest(fingerprint(v)))


def _moving(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what stays still, which needs no tangent."""
    return {name: x for name, x in v.items() if x.any()}


def _digest(rollouts: Rollouts) -> str:
    """Of what an entropy change of the rollouts depends on; padding may hold anything."""
    tensors = {"tokens": torch.where(rollouts.attention_mask, rollouts.input_ids, 0), "tokens seen":
               rollouts.attention_mask, "response": rollouts.response_mask, "prompt_index": rollouts.prompt_index}
    return digest(fingerprint(tensors) | {"temperature": float(rollouts.temperature)})


def _quotient(x: Tensor, x_1: Tensor, x_2: Tensor, n: Tensor, n_1: Tensor, n_2: Tensor) -> tuple[Tensor, ...]:
    """x / n and its first two derivatives."""
    h = x / n
    h_1 = (x_1 - h * n_1) / n
    return h, h_1, (x_2 - 2 * h_1 * n_1 - h * n_2) / n


class _Terms(NamedTuple):
    """Each token's terms of the derivatives of E[Σ_k x_k], [N, T], and F_k − b_k of the first."""

    rest: Tensor
    first: Tensor
    second: Tensor


def _terms(remaining: Remaining, name: str, d: _Derivatives, x_1: Tensor, x_2: Tensor | None) -> _Terms:
    """Of the quantity `name` in `remaining`, with derivatives x_1 and x_2 at given prefixes."""
    rest = remaining(name, d.scores_1)
    first = rest * d.scores_1 + x_1
    if d.scores_2 is None:
        return _Terms(rest, first, torch.zeros_like(first))
    before = d.scores_1.cumsum(1) - d.scores_1
    curvature = d.scores_2 + d.scores_1.square() + 2 * d.scores_1 * before
    second = remaining(name, curvature) * curvature + x_2
    if x_1.any():
        second = second + 2 * remaining("slopes", d.scores_1) * d.scores_1
    return _Terms(rest, first, second)


def _features(rollouts: Rollouts, d: _Derivatives) -> Tensor | None:
    """What is known before each token is drawn, [N, T, F]: the hidden state, H_k, and lengths so far."""
    if d.hidden is None:
        return None
    position = torch.arange(d.entropies.shape[1], device=d.entropies.device).expand(d.entropies.shape)
    prompt = (rollouts.attention_mask.sum(1) - rollouts.lengths)[:, None].expand(d.entropies.shape)
    known = torch.stack([d.entropies, d.entropies.square(), position, 1 / (1 + position), prompt], -1)
    return torch.cat([d.hidden.double(), known], -1)


class _Derivatives(NamedTuple):
    """H_k and the derivatives along v of H_k and of S_k, [N, T] in float64, and the hidden states [N, T, d]."""

    entropies: Tensor
    scores_1: Tensor
    entropies_1: Tensor
    scores_2: Tensor | None
    entropies_2: Tensor | None
    hidden: Tensor | None


def _derivatives(policy: Policy, rollouts: Rollouts, v: Mapping[str, Tensor], order: int, baseline: str,
                 batch_size: int | None) -> _Derivatives:
    check_rollouts(policy, rollouts)
    parameters = {name: p.detach() for name, p in policy.parameters.items()}
    v = {name: x.detach().to(parameters[name]) for name, x in v.items()}
    moving = {name: parameters[name] for name in v}

    def one_batch(batch: Rollouts) -> list[Tensor]:
        def scored(theta):
            scores, hidden = score_batch(policy, batch, parameters | theta)
            return tuple(scores), hidden

        if not v:
            (_, h), hidden = scored({})
            values = [h] + [torch.zeros_like(h)] * (2 * order)
        else:
            # The hidden states ride along, undifferentiated.
            (_, h), *derivatives, hidden = derivatives_along(scored, moving, v, order)
            values = [h, *chain.from_iterable(derivatives)]
        return values + [hidden] * (baseline == "regression")

    rows = batches(policy, rollouts, batch_size, "series", order)
    try:
        with policy.forward_mode():
            results = list(in_batches(rollouts, rows, one_batch))
    except Refused as error:
        name = type(policy.model).__name__
        raise ValueError(f"policy: the derivative of {name} is not to be had: {error}") from error
    except RuntimeError as error:
        if not any(word in str(error) for word in ("forward AD", "functorch", "data pointer")):
            raise
        raise ValueError(f"policy: an operation of {type(policy.model).__name__} has no forward-mode derivative: "
                         f"{str(error).splitlines()[0]}") from error
    hidden = results.pop() if baseline == "regression" else None
    results = [x.double() for x in results] + [None, None] * (2 - order)
    return _Derivatives(*results, hidden)


class Attribution(NamedTuple):
    """The first-order entropy change per unit of η, by cause; all parts sum to the `EntropyChange` it explains.

    Attributes:
        tokens: [N, T], of the rollouts that made the update.
        momentum: of what the optimizer remembers of earlier batches.
        weight_decay: of weight decay.
    """

    tokens: Tensor
    momentum: float
    weight_decay: float


@torch.inference_mode(False)
def attribution(policy: Policy, rollouts: Rollouts, direction: Direction, change: EntropyChange,
                batch_size: int | None = None) -> Attribution:
    """Which tokens of the update, and what else in the optimizer, a first-order entropy change comes from.

    The change is linear in the direction, which is a sum over the tokens of the update batch, momentum and weight
    decay. One backward pass over `rollouts` gives the entropy's gradient u; the derivative of each token's log-prob
    along P ∘ u, times the token's weight in the loss, is its share; with a bonus for entropy, that of H likewise.

    Args:
        policy: the policy, as it was for `change`.
        rollouts: those that `change` was estimated from.
        direction: that of `change`.
        change: `entropy_change(policy, rollouts, direction)`, of order 1.
        batch_size: rollouts at a time; None: as many as suit the device.

    Returns:
        An Attribution, in nats (per token) per unit of η; `.tokens.sum(1)` is what each rollout of the update did.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a change of order 2, of other rollouts, of another
            direction or at other parameters; a policy whose parameters have changed since; or a model whose backward
            pass is not the derivative of its function, as where it detaches something that moves (DoRA's norm): the
            parts would not sum to the change.

    >>> causes = attribution(policy, rollouts, direction, change)            # doctest: +SKIP
    >>> causes.tokens.sum(1).argsort()[:8]     # the rollouts that lowered the entropy most   # doctest: +SKIP
    """
    for name, value, kind in (("policy", policy, Policy), ("rollouts", rollouts, Rollouts),
                              ("direction", direction, Direction), ("change", change, EntropyChange)):
        checks.instance(name, value, kind)
    batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    state = state_of(policy)
    vector = vector_of(policy, direction, state)
    if change.score_weights.shape != rollouts.response_mask.shape or change.order != 1:
        raise ValueError(f"change: expected one of order 1 of these rollouts, {list(rollouts.response_mask.shape)}, "
                         f"got order {change.order} of {list(change.score_weights.shape)}")
    for what, own, expected in (("of these rollouts", change.of_rollouts, _digest(rollouts)),
                                ("along this direction", change.of_direction, digest(fingerprint(_moving(vector)))),
                                ("at the policy's parameters", change.of_policy, digest(state))):
        if own != expected:
            raise ValueError(f"change: expected one {what}, got another's")
    rollouts = rollouts.to(policy.device)
    # Of the estimated entropy: `change` is its product with the direction.
    gradient = weighted_gradient(policy, rollouts, batches(policy, rollouts, batch_size), list(policy.parameters),
                                 change.score_weights, change.entropy_weight)
    gradient = {name: g for name, g in gradient.items() if g is not None}

    def along(part: Mapping[str, Tensor]) -> float:
        return float(sum((gradient[name].double() * part[name]).sum() for name in gradient))

    toward = {name: scale * gradient[name] for name, scale in direction.preconditioner.items() if name in gradient}
    update = direction.rollouts.to(policy.device)
    shares = _derivatives(policy, update, _moving(toward), 1, "none", batch_size)
    tokens = (direction.token_weights.to(policy.device).double() * shares.scores_1
              + direction.entropy_weights.to(policy.device).double() * shares.entropies_1)
    causes = Attribution(tokens, along(direction.momentum), along(direction.weight_decay))
    whole = float(tokens.sum()) + causes.momentum + causes.weight_decay
    size = float(tokens.abs().sum()) + abs(causes.momentum) + abs(causes.weight_decay)
    # Two thirds of the digits that the model computes with.
    if abs(whole - change.value) > rounding(policy.model) ** (2 / 3) * size:
        raise ValueError(f"policy: the parts sum to {whole:.4g}, and the change is {change.value:.4g}; the backward "
                         f"pass of {type(policy.model).__name__} is not the derivative of its function, as where it "
                         "detaches something that moves")
    return causes
