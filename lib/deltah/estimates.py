"""A number with its standard error: what every estimator of this library returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from deltah import checks


@dataclass(frozen=True)
class Estimate:
    """An estimated value, its standard error, and what each sample contributed to it.

    Attributes:
        value: the estimate.
        standard_error: of `value`; NaN where a single cluster leaves it unknown.
        count: independent samples (clusters) behind the standard error.
        contributions: [N], one term for each sample; their mean is `value`. None where there is none.
        skewness: of the clusters' contributions; intervals lean by it.

    Raises:
        TypeError, ValueError: a field that is no number (or tensor of them), a negative error, or a count < 1.

    >>> Estimate(-0.01234, 0.00041, 100)
    -0.0123 ± 0.0004
    """

    value: float
    standard_error: float
    count: int
    contributions: Tensor | None = None
    skewness: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _number("value", self.value))
        object.__setattr__(self, "standard_error", _number("standard_error", self.standard_error, minimum=0))
        object.__setattr__(self, "count", checks.integer("count", self.count, minimum=1))
        object.__setattr__(self, "skewness", _number("skewness", self.skewness))
        if self.contributions is not None:
            checks.tensor("contributions", self.contributions, ("N",), kind="number")

    @classmethod
    def mean(cls, contributions: Tensor, clusters: Tensor | None = None, population: int | None = None) -> Estimate:
        """The mean of `contributions`, with a standard error that takes a cluster as the unit of sampling.

        Clusters drawn without replacement from a finite population, as prompts from a data set, tell more about that
        population's mean: of the variance between them only the share that was not drawn counts, and the share drawn
        adds what its own samples leave open (two-stage sampling: Cochran, *Sampling Techniques*, 1977, chapter 10).

        Args:
            contributions: [N], any floating dtype; summed in float64.
            clusters: [N] integers; samples with the same one (rollouts of one prompt) may depend on each
                other. None: all are independent.
            population: how many clusters there are to draw from, where the mean over these alone is meant. None: the
                mean over all that could be.

        Raises:
            TypeError: something that is not a tensor of numbers. ValueError: empty or non-finite contributions,
                clusters of another shape, or a population without clusters of two samples or more, all drawn from it.

        >>> Estimate.mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        2.5 ± 0.6
        """
        _check(contributions, "contributions", clusters)
        contributions = contributions.detach().double()
        value = contributions.mean()
        sums = contributions - value
        if clusters is not None:
            _, index = clusters.to(sums.device).unique(return_inverse=True)
            sums = sums.new_zeros(int(index.max()) + 1).index_add(0, index, sums)
        count = len(sums)
        variance = sums.square().sum() / len(contributions) ** 2 * (count / (count - 1) if count > 1 else math.nan)
        if population is not None:
            drawn = count / checks.integer("population", population, minimum=count)
            within = _within(contributions, index if clusters is not None else None)
            variance = (1 - drawn) * variance + drawn * within / len(contributions) ** 2
        error = math.sqrt(variance)
        spread = sums.square().mean() ** 1.5
        skewness = float(sums.pow(3).mean() / spread) if spread > 0 else 0.0
        return cls(float(value), error, count, contributions, skewness)

    @classmethod
    def ratio(cls, numerators: Tensor, denominators: Tensor, clusters: Tensor | None = None) -> Estimate:
        """The ratio of two means, such as entropy per token, with the standard error of its linearisation.

        Args:
            numerators, denominators: [N]; the value is mean(numerators) / mean(denominators).
            clusters: [N] integers, as for `mean`.

        Raises:
            TypeError, ValueError: as for `mean`, or denominators whose mean is 0.

        >>> Estimate.ratio(torch.tensor([2.0, 3.0, 7.0]), torch.tensor([1.0, 2.0, 3.0]))
        2.0 ± 0.3
        """
        _check(numerators, "numerators", clusters)
        _check(denominators, "denominators", clusters)
        if denominators.shape != numerators.shape:
            raise ValueError(f"denominators: expected shape {list(numerators.shape)}, got {list(denominators.shape)}")
        if denominators.double().mean() == 0:
            raise ValueError("denominators: expected a mean other than 0")
        return cls.smooth(lambda means: means[0] / means[1], torch.stack([numerators, denominators], 1), clusters)

    @classmethod
    def smooth(cls, function: Callable[[Tensor], Tensor], samples: Tensor, clusters: Tensor | None = None) -> Estimate:
        """A smooth function of means, with the standard error of its linearisation (the delta method).

        Args:
            function: of the means [M], in float64; returns a scalar that autograd can differentiate.
            samples: [N, M]; the value is function(samples.mean(0)), and its bias is of order 1/N.
            clusters: [N] integers, as for `mean`.

        Returns:
            An Estimate whose contributions are value + ∇function · (sample − mean).

        Raises:
            TypeError: as for `mean`, or no function. ValueError: as for `mean`, or samples that are not a matrix.

        >>> Estimate.smooth(lambda means: means[0] ** 2, torch.tensor([[2.0], [3.0], [7.0]]))
        20 ± 10
        """
        if not callable(function):
            raise TypeError(f"function: expected a function of the means, got {checks.shown(function)}")
        checks.tensor("samples", samples, ("N", "M"), kind="number")
        for i, column in enumerate(samples.unbind(1)):
            _check(column, f"samples[:, {i}]", clusters)
        samples = samples.detach().double()
        with torch.inference_mode(False), torch.enable_grad():
            means = samples.mean(0).requires_grad_()
            value = function(means)
            (gradient,) = torch.autograd.grad(value, means)
        return cls.mean(value.detach() + (samples - means.detach()) @ gradient, clusters)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided confidence interval, from Student's t with `count` − 1 degrees of freedom.

        The studentised mean of skewed samples misses its truth in the long tail. Hall's transformation (Journal of
        the Royal Statistical Society B 54, 221, 1992) tells how much further the interval has to reach there. On the
        other side, where it could reach less far, it does not: a skewness that was estimated may be chance.

        Raises:
            TypeError: a level that is no number. ValueError: one outside (0, 1).
        """
        level = checks.number("level", level, above=0, below=1)
        if self.count < 2:
            return -math.inf, math.inf
        quantile = float(student_t.ppf(0.5 + level / 2, self.count - 1))
        lean = self.skewness / math.sqrt(self.count)
        below, above = max(quantile, _untransformed(quantile, lean)), max(quantile, -_untransformed(-quantile, lean))
        return self.value - below * self.standard_error, self.value + above * self.standard_error

    def __repr__(self) -> str:
        if not math.isfinite(self.standard_error) or self.standard_error == 0:
            return f"{self.value:.6g} ± {self.standard_error:.1g}"
        decimals = -math.floor(math.log10(self.standard_error))
        # An error of 0.0096 rounds up to 0.01: one decimal fewer then shows one digit.
        decimals = -math.floor(math.log10(round(self.standard_error, decimals)))
        shown = max(decimals, 0)
        # Adding 0.0 turns −0 into 0.
        return f"{round(self.value, decimals) + 0.0:.{shown}f} ± {round(self.standard_error, decimals):.{shown}f}"


def _untransformed(z: float, lean: float) -> float:
    """The T that Hall's cubic T + lean T²/3 + lean² T³/27 + lean/6 maps to `z`."""
    if abs(lean) < 1e-6:
        return z
    return 3 / lean * (math.cbrt(1 + lean * (z - lean / 6)) - 1)


def _within(contributions: Tensor, index: Tensor | None) -> Tensor:
    """The variance of the sum of `contributions` that samples within their clusters leave open."""
    sizes = torch.ones(1) if index is None else index.bincount()
    if sizes.min() < 2:
        raise ValueError("population: expected clusters of two samples or more, got one of a single sample: what it "
                         "leaves open is not known")
    means = contributions.new_zeros(len(sizes)).index_add(0, index, contributions) / sizes
    squares = (contributions - means[index]).square()
    return (squares * (sizes / (sizes - 1))[index]).sum()


def _number(name: str, value: float, minimum: float | None = None) -> float:
    """A number, or NaN or infinity where there is none."""
    number = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if isinstance(number, (float, np.floating)) and not math.isfinite(number) and (minimum is None or not number < 0):
        return float(number)
    return checks.number(name, value, minimum=minimum)


def _check(samples: Tensor, name: str, clusters: Tensor | None) -> None:
    checks.tensor(name, samples, kind="number")
    if samples.ndim != 1 or len(samples) == 0:
        raise ValueError(f"{name}: expected shape [N] with N ≥ 1, got {list(samples.shape)}")
    checks.tensor(name, samples, finite=True)
    if clusters is not None:
        checks.tensor("clusters", clusters, samples.shape)
        checks.tensor("clusters", clusters, kind="integer")
