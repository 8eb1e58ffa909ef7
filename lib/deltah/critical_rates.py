"""The critical learning rate: how far the first order of an entropy change reaches, with an interval for a ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t

from deltah import checks
from deltah.dynamics import EntropyChange
from deltah.estimates import Estimate


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class CriticalLearningRate(Estimate):
    """η* = 2 |dH/dη| / |d²H/dη²|, an `Estimate` whose interval is Fieller's: it may have no upper end.

    Attributes:
        first, second: the two derivatives.
        covariance: of their estimates.
    """

    first: Estimate
    second: Estimate
    covariance: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """All η* that the derivatives allow; up to infinity where the second may be zero.

        Raises:
            TypeError: a level that is no number. ValueError: one outside (0, 1).
        """
        level = checks.number("level", level, above=0, below=1)
        if self.count < 2:
            return 0.0, math.inf
        # Fieller: ratios r for which 2 d₁ − r d₂ is no further from 0 than its error allows, a r² − 2 b r + c ≤ 0.
        t = float(student_t.ppf(0.5 + level / 2, self.count - 1))
        n, d = 2 * self.first.value, self.second.value
        a = d**2 - (t * self.second.standard_error) ** 2
        b = n * d - t**2 * 2 * self.covariance
        c = n**2 - (2 * t * self.first.standard_error) ** 2
        discriminant = b**2 - a * c
        if discriminant < 0 or a == 0:
            return 0.0, math.inf
        ends = sorted(abs((b + sign * math.sqrt(discriminant)) / a) for sign in (-1, 1))
        return 0.0 if c <= 0 else ends[0], ends[1] if a > 0 else math.inf


def critical_learning_rate(first: Estimate, second: Estimate) -> CriticalLearningRate:
    """The learning rate at which the second-order change is as large as the first: η* = 2 |dH/dη| / |d²H/dη²|.

    Args:
        first, second: `entropy_change` of order 1 and 2, along one direction at one place and per the same unit. From
            the same rollouts, their errors' covariance is accounted for; otherwise they are taken as independent. Of
            plain Estimates, all that is the caller's word.

    Returns:
        A CriticalLearningRate, in the unit of η.

    Raises:
        TypeError: something that is no Estimate. ValueError: entropy changes of other orders, or that do not belong
            together; a derivative that is NaN or infinite; or a second one of exactly zero.

    Source: the notes, section 2.5.

    >>> critical_learning_rate(Estimate(-2.0, 0.1, 100), Estimate(400.0, 20.0, 100))
    0.0100 ± 0.0007
    """
    for name, change, order in (("first", first, 1), ("second", second, 2)):
        checks.instance(name, change, Estimate, "an entropy change or another Estimate")
        if isinstance(change, EntropyChange) and change.order != order:
            raise ValueError(f"{name}: expected an entropy change of order {order}, got one of order {change.order}")
        # The error of a single prompt is not known.
        if not math.isfinite(change.value) or change.count > 1 and not math.isfinite(change.standard_error):
            raise ValueError(f"{name}: expected a finite derivative and error, got {change}")
    if second.value == 0:
        raise ValueError("second: expected a second derivative other than 0, got 0: the first order never fails")
    covariance = 0.0
    if isinstance(first, EntropyChange) and isinstance(second, EntropyChange):
        for what in ("per", "of_direction", "of_policy"):
            if getattr(first, what) != getattr(second, what):
                raise ValueError(f"second: expected an entropy change with the first's `{what}`, "
                                 f"{getattr(first, what)}, got {getattr(second, what)}")
        if first.of_rollouts == second.of_rollouts and torch.equal(first.prompt_index, second.prompt_index):
            both, one, other = (Estimate.mean(x, first.prompt_index).standard_error ** 2 for x in (
                first.contributions + second.contributions, first.contributions, second.contributions))
            covariance = (both - one - other) / 2
    ratio = 2 * first.value / second.value
    variance = (2 * first.standard_error) ** 2 - 4 * ratio * covariance + (ratio * second.standard_error) ** 2
    return CriticalLearningRate(abs(ratio), math.sqrt(max(variance, 0.0)) / abs(second.value),
                                min(first.count, second.count), first=first, second=second, covariance=covariance)
