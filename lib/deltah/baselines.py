"""Baselines for the score-function terms of an entropy's derivative: what a token could not have changed.

A term (F_k − b_k) ∇S_k, with F_k a sum over the tokens after k, keeps its expectation for every baseline b_k that
depends on the tokens before k and on other rollouts, as E[∇S_k | t_<k] = 0. The variance is least, to the extent
that terms of different k are uncorrelated, where b_k minimises E[(F_k − b_k)² (∇S_k)²]: a weighted regression of F_k
on what is known before k. Every fit here is cross-fitted: a rollout's baseline comes from other rollouts, so it adds no
bias, whatever the fit is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASELINES = ("none", "entropy", "running_mean", "regression")
FOLDS = 5
# Of a feature's variance; the best is chosen on rollouts that the baseline does not serve.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def to_go(x: Tensor) -> Tensor:
    """Σ_{k' ≥ k} x_k' along the last dimension.

    >>> to_go(torch.tensor([1.0, 2.0, 3.0]))
    tensor([6., 5., 3.])
    """
    return x.flip(-1).cumsum(-1).flip(-1)


def running_mean(targets: Tensor, mask: Tensor) -> Tensor:
    """The mean of `targets` [N, T] at each position over the tokens of other folds' rollouts, [N, T]; 0 if none."""
    fold, baseline = _folds(mask), torch.zeros_like(targets)
    for f in range(FOLDS):
        others = mask & (fold != f)[:, None]
        means = torch.where(others, targets, 0.0).sum(0) / others.sum(0).clamp(min=1)
        baseline[fold == f] = means
    return torch.where(mask, baseline, 0.0)


def regression(features: Tensor, targets: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Ridge regression of `targets` on `features` over the tokens of other folds' rollouts, predicted for each token.

    The penalty of a feature is in proportion to its variance, and chosen by cross-validation within the folds that
    the fit may see.

    Args:
        features: [N, T, F], known before the token is drawn.
        targets: [N, T].
        weights: [N, T] ≥ 0.
        mask: [N, T] bool.

    Returns:
        [N, T] in float64; 0 outside the mask.

    Raises:
        ValueError: fewer rollouts than folds.
    """
    fold = _folds(mask)[:, None].expand_as(mask)[mask]
    x, y, w = features[mask].double(), targets[mask].double(), weights[mask].double()
    x = torch.cat([torch.ones_like(x[:, :1]), x], 1)
    # All that a fit needs of a fold: moments with the target as a last column.
    moments = []
    for f in range(FOLDS):
        rows = torch.cat([x[fold == f], y[fold == f, None]], 1)
        moments.append((w[fold == f, None] * rows).T @ rows)
    total = sum(moments)
    prediction = torch.zeros_like(y)
    for f in range(FOLDS):
        seen = total - moments[f]
        losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
        for g in (g for g in range(FOLDS) if g != f):
            fits = (_ridge(seen - moments[g], penalty) for penalty in PENALTIES)
            losses += torch.stack([_loss(moments[g], fit) for fit in fits]).cpu()
        best = PENALTIES[int(losses.argmin())]
        prediction[fold == f] = x[fold == f] @ _ridge(seen, best)
    return torch.zeros_like(targets, dtype=torch.float64).masked_scatter(mask, prediction)


def _ridge(moments: Tensor, penalty: float) -> Tensor:
    """Coefficients [F] for moments [F + 1, F + 1] of features, the first constant, and the target."""
    gram, cross = moments[:-1, :-1], moments[:-1, -1]
    total = gram[0, 0].clamp(min=1e-300)
    variances = (gram.diagonal() - gram[0].square() / total).clamp(min=0)
    # A feature that does not vary gets some penalty still, so that the system has one solution.
    ridge = penalty * variances + 1e-9 * gram.diagonal() + 1e-300
    ridge[0] = 1e-12 * total
    return torch.linalg.solve(gram + torch.diag(ridge), cross)


def _loss(moments: Tensor, coefficients: Tensor) -> Tensor:
    """Σ w (y − x · coefficients)²."""
    full = torch.cat([coefficients, -coefficients.new_ones(1)])
    return full @ moments @ full


def _folds(mask: Tensor) -> Tensor:
    """A fold for each rollout; those of one prompt, which are adjacent, fall into different ones."""
    if len(mask) < FOLDS:
        raise ValueError(f"rollouts: expected at least {FOLDS}, as the baseline of one is fitted on others; "
                         f"got {len(mask)}")
    return torch.arange(len(mask), device=mask.device) % FOLDS
