"""Estimates from many independent samples of what is known exactly: do they scatter as they say?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltah import checks
from deltah.entropy import FOLDS
from deltah.estimates import Estimate


def coverage(estimate: Callable[[Tensor], Estimate], weights: Tensor, size: int, truth: float, replicates: int = 2000,
             level: float = 0.95, seed: int = 0) -> float:
    """The share of independent samples whose confidence interval holds the truth: what `level` promises.

    Args:
        estimate: takes the rows [size] of a sample and returns its Estimate.
        weights: [N] probabilities to draw rows with, with replacement.
        size: rows in a sample.
        truth: the value that is estimated, known exactly.
        replicates: samples; with 2,000, a true 95% is seen within one point.
        level: of the intervals.
        seed: of the samples.

    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> coverage(lambda rows: Estimate.mean(x[rows]), torch.ones(3) / 3, size=50, truth=1.0, replicates=200) > 0.9
    True
    """
    truth, level = checks.number("truth", truth), checks.number("level", level, above=0, below=1)
    estimates = replicate(estimate, weights, size, replicates, seed)
    return sum(low <= truth <= high for low, high in (e.interval(level) for e in estimates)) / len(estimates)


def replicate(estimate: Callable[[Tensor], Estimate], weights: Tensor, size: int, replicates: int = 2000,
              seed: int = 0) -> list[Estimate]:
    """The estimates from independent samples; the arguments are those of `coverage`.

    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> len(replicate(lambda rows: Estimate.mean(x[rows]), torch.ones(3) / 3, size=50, replicates=20))
    20
    """
    checks.instance("estimate", estimate, Callable, "a function of rows")
    checks.tensor("weights", weights, ("N",), "floating", finite=True)
    size, replicates = checks.integer("size", size, minimum=1), checks.integer("replicates", replicates, minimum=1)
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, minimum=0))
    return [estimate(torch.multinomial(weights, size, replacement=True, generator=generator))
            for _ in range(replicates)]


def cross_fitted(target: Tensor, variate: Tensor, weights: Tensor, size: int, replicates: int = 2000,
                 seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means of `target` over independent samples, [replicates], and those that `entropy.control_variate` makes of them.

    Args:
        target, variate: [N]; the variate's expectation is zero.
        weights: [N] probabilities to draw rows with, with replacement; a row is a cluster of its own.
        size: rows in a sample, at least five.
        replicates: samples, all at once.
        seed: of the samples.

    >>> x = torch.tensor([-1.0, 0.0, 1.0])
    >>> plain, fitted = cross_fitted(1 + 2 * x, x, torch.ones(3) / 3, size=40, replicates=50)
    >>> bool(plain.std() > 0.1), bool(fitted.std() < 1e-6)
    (True, True)
    """
    checks.tensor("weights", weights, ("N",), "floating", finite=True)
    for name, tensor in (("target", target), ("variate", variate)):
        checks.tensor(name, tensor, weights.shape, "floating", finite=True)
    size, replicates = checks.integer("size", size, minimum=FOLDS), checks.integer("replicates", replicates, minimum=1)
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, minimum=0))
    rows = torch.multinomial(weights, replicates * size, replacement=True, generator=generator).view(replicates, size)
    y, x = target.double()[rows], variate.double()[rows]
    folds, fitted = torch.arange(size) % FOLDS, y.clone()
    for fold in range(FOLDS):
        others = folds != fold
        centred = x[:, others] - x[:, others].mean(1, keepdim=True)
        spread = centred.square().sum(1)
        # A variate that does not vary explains nothing, as in the pseudo-inverse.
        slope = torch.where(spread > 1e-20, (centred * y[:, others]).sum(1) / spread, 0.0)
        fitted[:, ~others] -= slope[:, None] * x[:, ~others]
    return y.mean(1), fitted.mean(1)
