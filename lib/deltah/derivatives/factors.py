"""The gradients of n rollouts with respect to one parameter, as sums of outer products that need not be formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltah.models.output_layers import OutputLayer
from deltah.rollouts import Rollouts
from deltah.vocabulary import LogProbsAndEntropies, add_product, tile_logits

# Slopes of the output layer that are computed at a time where they are not kept.
BLOCK = 2**22


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """In which a parameter's gradient is written; a vector is one column."""
    return (p.numel(), 1) if p.ndim < 2 else (p.shape[:-1].numel(), p.shape[-1])


def kind_of(x: Tensor) -> torch.dtype:
    """In which gradients are computed: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


class SampleGradient:
    """The gradients of n rollouts' log-probs with respect to a parameter, as a matrix [o, i] each.

    Attributes:
        name: of the parameter.
        index: which slice of it this is, as of one expert; None: all of it.
        shape: (o, i); a vector has i = 1.
        factors: what they are the sum of.
    """

    def __init__(self, name: str, index: int | None, shape: tuple[int, int], factors: Sequence[Factors]):
        self.name, self.index, self.shape, self.factors = name, index, shape, factors

    def formed(self, rows: slice) -> Tensor:
        """[n, rows, i]."""
        total = self.factors[0].formed(rows)
        for factors in self.factors[1:]:
            total = total + factors.formed(rows)
        return total

    def part_of(self, whole: Tensor) -> Tensor:
        """Of a tensor of the parameter's shape, what belongs to this matrix: [o, i]."""
        return (whole if self.index is None else whole[self.index]).reshape(-1, self.shape[1])

    @property
    def is_lookup(self) -> bool:
        """Whether only an embedding's rows of the rollouts' tokens have a gradient."""
        return all(isinstance(factors, Lookup) for factors in self.factors)

    def looked_up(self) -> Tensor:
        """These rows."""
        return torch.cat([factors.ids.flatten() for factors in self.factors]).unique()

    def restricted(self, rows: Tensor) -> SampleGradient:
        """Of a lookup, only `rows`, in rising order."""
        left = []
        for factors in self.factors:
            places = torch.searchsorted(rows, factors.ids.contiguous()).clamp(max=len(rows) - 1)
            left.append(Lookup(places, factors.right * (rows[places] == factors.ids)[..., None]))
        return SampleGradient(self.name, self.index, (len(rows), self.shape[1]), left)

    @property
    def positions(self) -> int | None:
        """Over how many positions k the outer products g_k ⊗ x_k run; None where they are formed already."""
        counts = [factors.positions for factors in self.factors]
        return None if None in counts else sum(counts)

    def lefts(self, rows: slice) -> Tensor:
        """The first factors [n, positions, rows] of the outer products."""
        return torch.cat([factors.left(rows) for factors in self.factors], 1)

    def rights(self) -> Tensor:
        """The second factors [n, positions, i]."""
        return torch.cat([factors.right for factors in self.factors], 1)


class Factors:
    """Σ_k left_k ⊗ right_k for each rollout, with left [n, K, o] and right [n, K, i]."""

    def __init__(self, left: Tensor, right: Tensor):
        self._left, self.right, self.positions = left, right, right.shape[1]

    def left(self, rows: slice) -> Tensor:
        return self._left[..., rows]

    def formed(self, rows: slice) -> Tensor:
        return self.left(rows).transpose(1, 2) @ self.right


class Formed(Factors):
    """Gradients that are there already, [n, o, i]."""

    def __init__(self, gradient: Tensor):
        self._gradient, self.positions = gradient, None

    def formed(self, rows: slice) -> Tensor:
        return self._gradient[:, rows]


class Lookup(Factors):
    """Of an embedding: left_k is 1 at the token's id, and 0 elsewhere."""

    def __init__(self, ids: Tensor, right: Tensor):
        self.ids, self.right, self.positions = ids, right, right.shape[1]

    def left(self, rows: slice) -> Tensor:
        return (self.ids[..., None] == torch.arange(rows.start, rows.stop, device=self.ids.device)).to(self.right)

    def formed(self, rows: slice) -> Tensor:
        n, size = len(self.ids), rows.stop - rows.start
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        places = (torch.arange(n, device=inside.device)[:, None] * size + self.ids - rows.start)[inside]
        total = self.right.new_zeros(n * size, self.right.shape[-1])
        return total.index_add_(0, places, self.right[inside]).view(n, size, -1)


class OutputSlopes:
    """∂ log π(t_k) / ∂(h_k W^T + b), [n, T, V], a block of the vocabulary at a time.

    Args:
        hidden: h, [n, T, d].
        layer: W, b, and what becomes of h W^T + b.
        rollouts: n rollouts with T response tokens.
        keep: numbers that may be held; where there are more, each block is computed again when it is asked for.
    """

    def __init__(self, hidden: Tensor, layer: OutputLayer, rollouts: Rollouts, keep: int):
        self.hidden, self.layer, self.rollouts = hidden.flatten(0, 1), layer, rollouts
        everything = slice(0, len(layer.weight))
        self.kept = None
        if len(self.hidden) * everything.stop <= keep:
            z = self._logits(everything)
            self.normaliser = z.logsumexp(1)
            self.kept = self._of_logits(z, everything)
        else:
            *_, self.normaliser = LogProbsAndEntropies.apply(self.hidden, layer.weight, layer.bias,
                                                             rollouts.response_ids.flatten(), layer.scaling, False)

    def __call__(self, rows: slice) -> Tensor:
        """[n, T, rows], of these rows of W."""
        return self._of_logits(self._logits(rows), rows) if self.kept is None else self.kept[..., rows]

    def of_hidden(self) -> Tensor:
        """∂ Σ_k log π(t_k) / ∂h, [n, T, d]."""
        total = torch.zeros_like(self.hidden, dtype=torch.promote_types(self.hidden.dtype, torch.float32))
        step = max(1, BLOCK // len(self.hidden)) if self.kept is None else len(self.layer.weight)
        for start in range(0, len(self.layer.weight), step):
            rows = slice(start, min(start + step, len(self.layer.weight)))
            add_product(total, self(rows).flatten(0, 1).to(self.hidden), self.layer.weight[rows])
        return total.to(self.hidden).view(*self.rollouts.response_mask.shape, -1)

    def _logits(self, rows: slice) -> Tensor:
        bias = None if self.layer.bias is None else self.layer.bias[rows]
        return tile_logits(self.hidden, self.layer.weight[rows], bias, self.layer.scaling)

    def _of_logits(self, z: Tensor, rows: slice) -> Tensor:
        mask, targets = self.rollouts.response_mask, self.rollouts.response_ids.flatten() - rows.start
        factor = self.layer.scaling.slope(z)
        slope = z.sub_(self.normaliser[:, None]).exp_().neg_()
        inside = ((targets >= 0) & (targets < slope.shape[1])).nonzero()[:, 0]
        slope[inside, targets[inside]] += 1
        return slope.mul_(factor).masked_fill_(~mask.flatten()[:, None], 0.0).view(*mask.shape, -1)


class Output(Factors):
    """Of the output layer: left_k is ∂ log π(t_k) / ∂(h_k W^T + b)."""

    def __init__(self, slopes: OutputSlopes, right: Tensor):
        self.left, self.right, self.positions = slopes, right, right.shape[1]
