"""Baselines for the score-function terms of an entropy's derivative: what a token could not have changed.

A term (F_k − b_k) ∇S_k, with F_k a sum over the tokens after k, keeps its expectation for every baseline b_k that
depends on the tokens before k and on other rollouts, as E[∇S_k | t_<k] = 0. The learned baseline is made in two
steps, each fitted on other rollouts than the one it serves, so that it adds no bias, whatever the fit is worth:

1. a ridge regression of F_k on what is known before token k, which estimates E[F_k | t_<k];
2. the combination of that prediction with 1, H_k, H_k² and k for which the sum Σ_k (F_k − b_k) ∇S_k varies least. The
   terms of different k depend on each other, so that the best prediction of F_k alone need not be the best baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASELINES = ("none", "entropy", "running_mean", "regression")
FOLDS = 5
# Of a feature's variance; the best is chosen on rollouts that the baseline does not serve.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
# Step 2 starts from the prediction alone, and gives that start the weight of so many rollouts.
PRIOR_ROLLOUTS = 10


def to_go(x: Tensor) -> Tensor:
    """Σ_{k' ≥ k} x_k' along dimension 1.

    >>> to_go(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[6., 5., 3.]])
    """
    return x.flip(1).cumsum(1).flip(1)


class Remaining:
    """F_k − b_k: what quantities of the tokens sum up to after token k, less a baseline.

    Args:
        quantities: by name, [N, T] float64, 0 outside the mask: a value for each token.
        baseline: one of BASELINES. "none" counts token k in, the others do not.
        mask: [N, T] bool.
        entropies: [N, T], H_k; for "regression".
        features: [N, T, F], known before the token is drawn; for "regression".

    Raises:
        ValueError: a fitted baseline with fewer rollouts than folds.

    >>> x, mask = torch.ones(1, 3).double(), torch.ones(1, 3, dtype=torch.bool)
    >>> Remaining({"tokens": x}, "entropy", mask)("tokens", factor=torch.ones(1, 3))
    tensor([[2., 1., 0.]], dtype=torch.float64)
    """

    def __init__(self, quantities: dict[str, Tensor], baseline: str, mask: Tensor, entropies: Tensor | None = None,
                 features: Tensor | None = None):
        self.names, x = list(quantities), torch.stack(list(quantities.values()), -1)
        targets = to_go(x) if baseline == "none" else to_go(x) - x
        self.targets = torch.where(mask[..., None], targets, 0.0)
        self.mask, self.predictions = mask, None
        if baseline in ("running_mean", "regression"):
            if len(mask) < FOLDS:
                raise ValueError(f"rollouts: expected at least {FOLDS}, as the baseline of one is fitted on others; "
                                 f"got {len(mask)}")
            # Rollouts of one prompt, which are adjacent, fall into different folds.
            self.folds = torch.arange(len(mask), device=mask.device) % FOLDS
        if baseline == "running_mean":
            self.targets = self.targets - self._running_mean()
        if baseline == "regression":
            self.predictions = self._predictions(torch.cat([torch.ones_like(features[..., :1]), features], -1))
            position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
            known = (torch.ones_like(entropies), entropies, entropies.square(), position)
            self.known = torch.stack([x.double() * mask for x in known], -1)

    def __call__(self, name: str, factor: Tensor) -> Tensor:
        """[N, T], for one of the quantities and the factor [N, T] that is to multiply it."""
        quantity = self.names.index(name)
        target = self.targets[..., quantity]
        if self.predictions is None or not target.any():
            return target
        result, factor = torch.empty_like(target), factor.double()
        for fold, prediction in enumerate(self.predictions[..., quantity]):
            basis = torch.cat([prediction[..., None], self.known], -1)
            others = self.folds != fold
            sums = torch.einsum("ntk,nt->nk", basis, factor)[others]
            rest = ((target - prediction) * factor).sum(1)[others]
            sums, rest = sums - sums.mean(0), rest - rest.mean()
            gram = sums.T @ sums
            ridge = gram.diagonal() * PRIOR_ROLLOUTS / len(rest) + 1e-300
            more = torch.linalg.solve(gram + torch.diag(ridge), sums.T @ rest)
            result[~others] = (target - prediction - basis @ more)[~others]
        return torch.where(self.mask, result, 0.0)

    def _running_mean(self) -> Tensor:
        """The mean of the targets at each position over the tokens of other folds' rollouts; 0 if there are none."""
        means = torch.zeros_like(self.targets)
        for fold in range(FOLDS):
            others = self.mask & (self.folds != fold)[:, None]
            sums = torch.where(others[..., None], self.targets, 0.0).sum(0)
            means[self.folds == fold] = sums / others.sum(0).clamp(min=1)[:, None]
        return torch.where(self.mask[..., None], means, 0.0)

    def _predictions(self, features: Tensor) -> Tensor:
        """[FOLDS, N, T, K]: ridge regressions of the targets, each fitted without the rollouts of one fold."""
        fold = self.folds[:, None].expand_as(self.mask)[self.mask]
        x, y = features[self.mask].double(), self.targets[self.mask]
        rows = torch.cat([x, y], 1)
        # All that a fit, or its error, needs of a fold.
        moments = torch.stack([rows[fold == f].T @ rows[fold == f] for f in range(FOLDS)])
        pairs = [(f, g) for f in range(FOLDS) for g in range(f)]
        seen = moments.sum(0) - torch.stack([moments[f] + moments[g] for f, g in pairs])
        losses = torch.zeros(FOLDS, len(PENALTIES), len(self.names), dtype=x.dtype, device=x.device)
        for i, penalty in enumerate(PENALTIES):
            for (f, g), fit in zip(pairs, _ridge(seen, penalty, len(self.names)), strict=True):
                losses[f, i] += _losses(moments[g], fit)
                losses[g, i] += _losses(moments[f], fit)
        best, predictions = losses.argmin(1), x.new_zeros(FOLDS, *self.targets.shape)
        for i in best.unique().tolist():
            for f, fit in enumerate(_ridge(moments.sum(0) - moments, PENALTIES[i], len(self.names))):
                predictions[f][self.mask] += x @ torch.where(best[f] == i, fit, 0.0)
        return predictions


def _ridge(moments: Tensor, penalty: float, count: int) -> Tensor:
    """Coefficients [B, F, K] from moments [B, F + K, F + K] of F features, the first constant, and K targets."""
    gram, cross = moments[:, :-count, :-count], moments[:, :-count, -count:]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    variances = (diagonal - gram[:, 0].square() / diagonal[:, :1].clamp(min=1e-300)).clamp(min=0)
    # A feature that does not vary is penalised a little still, so that there is one solution.
    ridge = penalty * variances + 1e-9 * diagonal + 1e-300
    ridge[:, 0] = 1e-12 * diagonal[:, 0] + 1e-300
    # Not by `solve`: MKL's batched LU of more than 200 features never returns with two threads.
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram + torch.diag_embed(ridge)))


def _losses(moments: Tensor, coefficients: Tensor) -> Tensor:
    """Σ (y − x · coefficients)² of each target, [K]."""
    count = coefficients.shape[1]
    full = torch.cat([coefficients, -torch.eye(count, dtype=coefficients.dtype, device=coefficients.device)])
    return torch.einsum("fk,fg,gk->k", full, moments, full)
