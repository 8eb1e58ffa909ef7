"""Which rollout each row of a tensor belongs to, while a model reshapes, picks and sends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Rows:
    """Of tensors that a model makes of n rollouts of `width` tokens: [n, width, ...], [n · width, ...], or picked rows.

    Attributes:
        picked: rows that a router has picked -> the rollout of each.
    """

    def __init__(self, n: int, width: int):
        self.n, self.width = n, width
        self.picked = WeakIdKeyDictionary()

    def follow(self, func, args: Sequence, tensors: list[Tensor], result: Any, is_parameter: bool) -> None:
        """Keep track of what a function makes of `tensors`; rows of a parameter are no rollout's."""
        rollout = next((self.picked[x] for x in tensors if x in self.picked), None)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
            if args[0].ndim == 2 and args[1].ndim == 1 and len(args[0]) == self.n * self.width:
                rollout = None if is_parameter else args[1] // self.width
        if rollout is not None:
            for x in tree_leaves(result):
                if isinstance(x, Tensor) and x.ndim and len(x) == len(rollout):
                    self.picked[x] = rollout

    def by_rollout(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What brings tensors with the rows of x [..., i] into the form [n, K, i]; None where they are not known."""
        if x in self.picked:
            rollout = self.picked[x]
            order = rollout.argsort(stable=True)
            counts = torch.bincount(rollout, minlength=self.n)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[rollout[order]]
            most = int(counts.max())
            return lambda t: t.new_zeros(self.n, most, t.shape[-1]).index_put((rollout, place), t)
        if x.ndim > 1 and (x.shape[0] == self.n or x.shape[:-1].numel() == self.n * self.width and x.shape[0] in (
                1, self.n * self.width)):
            return lambda t: t.reshape(self.n, -1, t.shape[-1])
        return None

    def spread(self, copies: Tensor, x: Tensor) -> Tensor | None:
        """Copies [n, ...] in a shape that broadcasts over x, each over the rows of its rollout."""
        size = copies.ndim - 1
        if size >= x.ndim:
            if size > x.ndim or copies.shape[1] != 1:
                return None
            copies, size = copies[:, 0], size - 1
        if x in self.picked:
            copies = copies[self.picked[x]]
        elif x.shape[0] == self.n * self.width and self.width > 1 and x.shape[0] != self.n:
            copies = copies.repeat_interleave(self.width, 0)
        elif x.shape[0] != self.n:
            return None
        return copies.view(len(copies), *(1,) * (x.ndim - 1 - size), *copies.shape[1:])
