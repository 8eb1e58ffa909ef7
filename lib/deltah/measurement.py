"""How much the policy's entropy did change over a step, measured in two independent ways.

Importance weights reuse the rollouts of θ: what the shifted policy π' does at position k is a mean over rollouts with
weights w_k = Π_{j<k} π'(t_j) / π(t_j), normalised at each k. As η → 0 its linearisation is `entropy_change` with the
mean over rollouts at position k as baseline. It works until a few rollouts hold all the weight.

Coupled sampling keeps a token t_k of θ with probability min(1, π'(t_k) / π(t_k)), else draws from what π' has in excess
of π, and goes on from there with π'. The responses are then those of π' at any distance, and each token stays with the
highest probability that any coupling allows (Gumbel noise shared by both policies parts them up to twice as often).

`linearity` holds changes at several learning rates against each other. They share rollouts, and so their noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from deltah import checks, memory
from deltah.entropy import UNITS
from deltah.estimates import Estimate
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.sampling import resample
from deltah.scoring import TokenScores, batches, response_output, score
from deltah.updates import Direction, vector_of
from deltah.vocabulary import tile_logits

METHODS = ("importance", "coupled")
# Below this share of effective samples, intervals of importance weights cover less than they say: 81% instead of 95%
# of the exact changes of an enumerable policy at a share of 0.3, 93% to 96% above a share of 0.5.
COLLAPSED = 0.5


@torch.inference_mode(False)
def measured_entropy_change(policy: Policy, rollouts: Rollouts, direction: Direction | Mapping[str, Tensor],
                            learning_rates: Iterable[float], per: str = "token", method: str = "importance",
                            seed: int = 0, max_new_tokens: int | None = None,
                            batch_size: int | None = None) -> pd.DataFrame:
    """H(θ + ηv) − H(θ) for each learning rate η; the policy stays as it is.

    Args:
        policy: the policy at θ.
        rollouts: N rollouts sampled from it without top-k or top-p, not those that made the direction.
        direction: v = δθ/η, of `update_direction` or by parameter name; what it leaves out stays still. A Direction
            has to have been made at the policy's present parameters, a dict such as its `.vector` need not.
        learning_rates: η ≥ 0, each; a list, an array or a column of a table.
        per: "sequence": of E[Σ_k H_k]. "token": of E[Σ_k H_k] / E[L]; its bias is of order 1/N.
        method: "importance" or "coupled".
        seed: of coupled sampling.
        max_new_tokens: where the rollouts were cut, for coupled sampling; None: at the longest of them.
        batch_size: rollouts at a time; None: as many as suit the device.

    Returns:
        A row for each η with the columns learning_rate; change, standard_error, low and high (the 95% interval), in
        nats (per token); effective_sample_size (Σ w)² / Σ w² of whole responses, N when coupled; collapsed: True
        where importance weights no longer represent the shifted policy, and then change and its error are NaN.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: one out of range, or a direction that does not fit the
            policy or was made at other parameters.

    Source: the notes, section 2.4, whose weights are those of whole responses.

    >>> measured_entropy_change(policy, rollouts, direction, [1e-4, 1e-3])   # doctest: +SKIP
    """
    checks.choice("method", method, METHODS)
    steps = None if max_new_tokens is None else checks.integer("max_new_tokens", max_new_tokens)
    seed = checks.integer("seed", seed, minimum=0)
    rates, rows = _rates(learning_rates), []
    changes = _changes(policy, rollouts, direction, rates, per, method, seed, steps, batch_size)
    for rate, (change, size) in zip(rates, changes, strict=True):
        collapsed = change is None
        low, high = (float("nan"),) * 2 if collapsed else change.interval()
        rows.append({"learning_rate": rate, "change": float("nan") if collapsed else change.value,
                     "standard_error": float("nan") if collapsed else change.standard_error, "low": low,
                     "high": high, "effective_sample_size": size, "collapsed": collapsed})
    return pd.DataFrame(rows)


@torch.inference_mode(False)
def linearity(policy: Policy, rollouts: Rollouts, direction: Direction | Mapping[str, Tensor],
              learning_rates: Iterable[float], per: str = "token", batch_size: int | None = None) -> list[Estimate]:
    """What is left of a linear entropy change at each learning rate: ΔH(η) / η over the same at the smallest.

    It is 1 where the change is a line, 0.6 where two fifths of it are missing, negative where the entropy went the
    other way. Changes at two learning rates, measured with importance weights on one batch, share most of their
    noise: their ratio is known long before either of them is. It does not tell whether the line's slope is right.
    Its interval covers what it says where the change at the smallest η is known to a third or better.

    Args:
        policy, rollouts, direction, per, batch_size: as for `measured_entropy_change`.
        learning_rates: two or more η > 0.

    Returns:
        An Estimate for each η, in their order, 1 ± 0 for the smallest; NaN where the weights have collapsed.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: one out of range, a direction that does not fit the
            policy or was made at other parameters, or weights that have collapsed at the smallest η.

    >>> linearity(policy, rollouts, direction, [1e-5, 1e-3])                 # doctest: +SKIP
    [1 ± 0, 0.57 ± 0.06]
    """
    rates = _rates(learning_rates)
    if len(rates) < 2 or min(rates) == 0:
        raise ValueError(f"learning_rates: expected two or more, above 0, got {checks.shown(rates)}")
    changes = [change for change, _ in _changes(policy, rollouts, direction, rates, per, "importance", 0, None,
                                                batch_size)]
    start = changes[rates.index(min(rates))]
    if start is None:
        raise ValueError(f"learning_rates: at {min(rates):.3g}, the smallest, the weights have collapsed already")
    count = len(rollouts.prompt_index.unique())
    return [Estimate(float("nan"), float("nan"), count) if change is None else
            Estimate.ratio(change.contributions / rate, start.contributions / min(rates),
                           rollouts.prompt_index.to(start.contributions.device))
            for rate, change in zip(rates, changes, strict=True)]


def _changes(policy: Policy, rollouts: Rollouts, direction: Direction | Mapping[str, Tensor],
             rates: Sequence[float], per: str, method: str, seed: int, max_new_tokens: int | None,
             batch_size: int | None) -> list[tuple[Estimate | None, float]]:
    """At each learning rate the change, None where weights have collapsed, and the effective sample size."""
    checks.instance("policy", policy, Policy)
    checks.instance("rollouts", rollouts, Rollouts)
    checks.choice("per", per, UNITS)
    steps = rollouts.response_mask.shape[1]
    if max_new_tokens is not None and max_new_tokens < steps:
        raise ValueError(f"max_new_tokens: expected at least the rollouts' {steps}, got {max_new_tokens}")
    steps = steps if max_new_tokens is None else int(max_new_tokens)
    batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    v = vector_of(policy, direction)
    rollouts, changes = rollouts.to(policy.device), []
    with torch.no_grad():
        before = score(policy, rollouts, batch_size=batch_size)
        for rate in tqdm(rates, desc="learning rates", leave=False, delay=1):
            parameters = policy.shifted(v, rate)
            if method == "importance":
                after = score(policy, rollouts, parameters, batch_size)
                changes.append(_reweighted(rollouts, before, after, per))
            else:
                moved = _coupled(policy, rollouts, before, parameters, steps, seed, batch_size)
                after = score(policy, moved, parameters, batch_size)
                changes.append((_difference(rollouts, before, moved, after, per), float(len(rollouts))))
    return changes


def _rates(learning_rates: Iterable[float]) -> list[float]:
    expected = "learning_rates: expected one or more finite numbers ≥ 0"
    if isinstance(learning_rates, (str, bytes, Mapping)) or not isinstance(learning_rates, Iterable) or (
            getattr(learning_rates, "ndim", 1) != 1):
        raise TypeError(f"{expected} in a list, got {checks.shown(learning_rates)}")
    rates = list(learning_rates)
    if not rates:
        raise ValueError(f"{expected}, got none")
    for i, rate in enumerate(rates):
        try:
            rates[i] = checks.number(f"learning_rates[{i}]", rate, minimum=0)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{expected}, got {checks.shown(rate)} at {i}") from None
    return rates


def _reweighted(rollouts: Rollouts, before: TokenScores, after: TokenScores,
                per: str) -> tuple[Estimate | None, float]:
    """The change, None where the weights have collapsed, and the effective sample size."""
    mask = rollouts.response_mask
    log_ratios = (after.log_probs.double() - before.log_probs.double()).cumsum(1)
    # Relative to the largest at each position, as a weight itself may be too large for a number.
    size = float(_relative(log_ratios[:, -1]).sum().square() / _relative(log_ratios[:, -1]).square().sum())
    whole = log_ratios[:, -1].exp()
    if not size >= COLLAPSED * len(rollouts) or not torch.isfinite(whole.square()).all():
        return None, size
    spread = Estimate.mean(whole, rollouts.prompt_index)
    # E[w] = 1: a mean far from it has missed responses that the shifted policy gives.
    if abs(spread.value - 1) > 4 * spread.standard_error + 1e-6:
        return None, size
    weights = _relative(torch.cat([torch.zeros_like(log_ratios[:, :1]), log_ratios[:, :-1]], 1))
    weights = weights / weights.mean(0)

    def moved(x: Tensor) -> Tensor:
        """Σ_k of the weighted mean of x_k, linearised: [N] with that mean."""
        means = (weights * x).mean(0)
        return (means + weights * (x - means)).sum(1)

    old, new = before.entropies.double(), after.entropies.double()
    samples = [moved(new), old.sum(1)]
    if per == "sequence":
        return Estimate.mean(samples[0] - samples[1], rollouts.prompt_index), size
    samples += [moved(mask.double()), mask.double().sum(1)]
    return _ratios(*samples, rollouts.prompt_index), size


def _relative(logs: Tensor) -> Tensor:
    """Weights [N, ...] by their logarithms, of which the largest of the N becomes 1."""
    return (logs - logs.amax(0)).exp()


def _difference(rollouts: Rollouts, before: TokenScores, moved: Rollouts, after: TokenScores, per: str) -> Estimate:
    new, old = after.entropies.double().sum(1), before.entropies.double().sum(1)
    if per == "sequence":
        return Estimate.mean(new - old, rollouts.prompt_index)
    return _ratios(new, old, moved.lengths.double(), rollouts.lengths.double(), rollouts.prompt_index)


def _ratios(new: Tensor, old: Tensor, new_lengths: Tensor, old_lengths: Tensor, clusters: Tensor) -> Estimate:
    """mean(new) / mean(new_lengths) − mean(old) / mean(old_lengths)."""
    samples = torch.stack([new, old, new_lengths, old_lengths], 1)
    return Estimate.smooth(lambda means: means[0] / means[2] - means[1] / means[3], samples, clusters)


def _coupled(policy: Policy, rollouts: Rollouts, before: TokenScores, parameters: Mapping[str, Tensor], steps: int,
             seed: int, batch_size: int | None) -> Rollouts:
    """Responses of the policy at `parameters`, each coupled to one of `rollouts`."""
    after = score(policy, rollouts, parameters, batch_size)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(rollouts), steps + 1, dtype=torch.float64, generator=generator).to(policy.device)
    mask = rollouts.response_mask
    kept = uniforms[:, :mask.shape[1]] < (after.log_probs.double() - before.log_probs.double()).exp()
    parted = ~kept & mask
    rows = parted.any(1).nonzero()[:, 0]
    if len(rows) == 0:
        return rollouts
    first = parted[rows].int().argmax(1)
    branch = rollouts.select(rows)
    drawn = _drawn(policy, branch, first, parameters, uniforms[rows, -1:], batch_size)
    tokens = rollouts.input_ids.clone()
    tokens[rows, rollouts.prompt_length + first] = drawn
    keep = rollouts.lengths.index_put((rows,), first + 1)
    return resample(policy, rollouts.replace(input_ids=tokens), keep, uniforms[:, :-1], parameters, batch_size)


def _drawn(policy: Policy, rollouts: Rollouts, position: Tensor, parameters: Mapping[str, Tensor], uniforms: Tensor,
           batch_size: int | None) -> Tensor:
    """Response token `position` [n], drawn from what the policy at `parameters` has in excess of its own, [n].

    Where it has nothing in excess, because the two differ by rounding alone, the token stays.

    Args:
        uniforms: [n, 1], which pick the token from the cumulative excess.
    """
    # Nothing is run past the position.
    mask = torch.arange(int(position.max()) + 1, device=position.device) <= position[:, None]
    width = rollouts.prompt_length + mask.shape[1]
    known = rollouts.attention_mask[:, :rollouts.prompt_length]
    rollouts = Rollouts(rollouts.input_ids[:, :width], torch.cat([known, mask], 1), mask, rollouts.prompt_index,
                        temperature=rollouts.temperature)
    if batch_size is None:
        longest = int(rollouts.attention_mask.sum(1).max())
        positions = 1 if policy.has_linear_output else mask.shape[1]
        batch_size = memory.rows_at_once(policy, longest, "forward", logits=positions)
    drawn = torch.empty_like(position)
    for rows in batches(policy, rollouts, batch_size):
        own, other = (_next_token_probs(policy, rollouts.select(rows), position[rows], p) for p in (None, parameters))
        excess = (other - own).clamp_(min=0).cumsum(1)
        found = torch.searchsorted(excess, uniforms[rows] * excess[:, -1:], right=True)[:, 0]
        kept = rollouts.response_ids[rows, position[rows]]
        drawn[rows] = torch.where(excess[:, -1] > 0, found, kept)
    return drawn


def _next_token_probs(policy: Policy, rollouts: Rollouts, position: Tensor,
                      parameters: Mapping[str, Tensor] | None) -> Tensor:
    """The distribution that response token `position` [n] was drawn from, [n, V] in float64."""
    hidden, layer, logits = response_output(policy, rollouts, parameters)

    def there(x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), position]
    if layer is None:
        return there(logits).double().softmax(-1)
    scaling = layer.scaling._replace(temperature=rollouts.temperature)
    return tile_logits(there(hidden), layer.weight, layer.bias, scaling).double().softmax(-1)
