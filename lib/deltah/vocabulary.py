"""From hidden states and the output layer straight to log-probs and entropies; the logits [R, V] never exist.

The vocabulary is gone through in tiles of rows and columns that stay in the processor's cache. Forward keeps a running
maximum, normaliser and Σ e^z z of each row; backward computes a tile's logits again. With logits z and p = softmax(z)

    log p_t = z_t − log Σ e^z,    ∂ log p_t = ∂z_t − Σ p ∂z,    H = log Σ e^z − Σ p z,    ∂H = −Σ p (log p + H) ∂z,

and, on request, two moments of p². They need Σ e^{2z} and Σ e^{2z} z in the same tiles: with Z = Σ e^z

    C = Σ p² = Σ e^{2z} / Z²,    ∂C = Σ 2 p (p − C) ∂z,
    L = Σ p² log p = Σ e^{2z} z / Z² − C log Z,    ∂L = Σ p (p + 2 p log p − C − 2 L) ∂z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from deltah import checks

# Entries of a tile: a processor's cache; on a GPU a 32nd of the logits, within bounds that keep it busy.
TILE_ON_CPU, TILE_ON_GPU = 2**20, (2**22, 2**26)
# Rows of a tile: past this, matrix products gain nothing.
ROWS_ON_CPU, ROWS_ON_GPU = 512, 4096


class Scaling(NamedTuple):
    """What becomes of x = h W^T + b: z = c tanh(scale · x / c) / temperature; without a soft cap c, scale · x / …"""

    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.soft_cap is not None:
            return (x * (self.scale / self.soft_cap)).tanh() * (self.soft_cap / self.temperature)
        factor = self.scale / self.temperature
        return x if factor == 1 else x * factor

    def slope(self, z: Tensor) -> Tensor | float:
        """∂z/∂x, given z."""
        factor = self.scale / self.temperature
        return factor if self.soft_cap is None else factor * (1 - (z * (self.temperature / self.soft_cap)).square())


def linear_log_probs_and_entropies(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                                   bias: Tensor | None = None, scale: float = 1.0, soft_cap: float | None = None,
                                   moments: bool = False) -> tuple[Tensor, ...]:
    """Log-prob of `targets` and entropy of the whole distribution with logits (h W^T + b) / temperature, in nats.

    Differentiable in reverse and in forward mode, and nested. Besides the inputs, their gradients and the results it
    takes the memory of two tiles of about a million logits, whatever the vocabulary.

    Args:
        hidden: [..., d] hidden states h.
        weight: [V, d], W of the output layer.
        targets: [...] integers in [0, V).
        temperature: divides the logits.
        bias: [V], b of the output layer, if it has one.
        scale: multiplies h W^T + b, as some models do.
        soft_cap: c; logits are then c tanh(scale · (h W^T + b) / c), as of Gemma 2.
        moments: also return the collisions Σ p² (the probability that two draws agree, without unit) and the collision
            log-probs Σ p² log p (nats) of the same distribution, whose derivatives are right, too.

    Returns:
        (log_probs, entropies), or (log_probs, entropies, collisions, collision_log_probs), each [...], in float64 for
        float64 and float32 otherwise.

    Raises:
        TypeError: no tensors, numbers or boolean, or tensors of different dtypes.
        ValueError: shapes that do not fit each other, targets out of range, a temperature or cap that is not
            positive, or a scale that is not finite.

    >>> linear_log_probs_and_entropies(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([3]))
    (tensor([-1.3863]), tensor([1.3863]))
    >>> linear_log_probs_and_entropies(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([3]), moments=True)[2:]
    (tensor([0.2500]), tensor([-0.3466]))
    """
    checks.tensor("hidden", hidden, ("...", "d"), "floating")
    checks.tensor("weight", weight, ("V", hidden.shape[-1]), "floating")
    checks.tensor("targets", targets, hidden.shape[:-1], "integer")
    if len(weight) == 0:
        raise ValueError("weight: expected a row for each token of the vocabulary, got none")
    if bias is not None:
        checks.tensor("bias", bias, (len(weight),), "floating")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected the dtype of hidden, {hidden.dtype}, got {x.dtype}")
    temperature, scale = checks.number("temperature", temperature, above=0), checks.number("scale", scale)
    soft_cap = None if soft_cap is None else checks.number("soft_cap", soft_cap, above=0)
    moments = checks.boolean("moments", moments)
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(f"targets: expected integers from 0 to {len(weight) - 1}, got {int(targets.min())} to "
                         f"{int(targets.max())}")
    tensors = hidden, weight, bias
    if has_torch_function(tensors):
        # For `taylor`, which has a form of its own for it.
        return handle_torch_function(linear_log_probs_and_entropies, tensors, hidden, weight, targets, temperature,
                                     bias, scale, soft_cap, moments)
    # A custom function has no forward mode that can be nested.
    function = _in_forward_mode if forward_ad._current_level >= 0 else LogProbsAndEntropies.apply
    log_probs, entropies, _, *more = function(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1),
                                              Scaling(scale, soft_cap, temperature), moments)
    return tuple(x.view(targets.shape) for x in (log_probs, entropies, *more))


class _Tile(NamedTuple):
    """Some rows of the hidden states and some columns of the vocabulary."""

    rows: slice
    columns: slice
    inside: Tensor   # [rows, 1]: whether the target is among the columns
    places: Tensor   # [rows, 1]: where it is, 0 if it is not

    def at_target(self, x: Tensor, otherwise: Tensor) -> Tensor:
        """x [rows, columns] at each row's target, [rows]; `otherwise` where the target is elsewhere."""
        return torch.where(self.inside[:, 0], x.gather(1, self.places)[:, 0], otherwise)


def _tiles(targets: Tensor, size: int) -> Iterator[_Tile]:
    budget, most = TILE_ON_CPU, ROWS_ON_CPU
    if targets.device.type != "cpu":
        budget, most = min(max(TILE_ON_GPU[0], len(targets) * size // 32), TILE_ON_GPU[1]), ROWS_ON_GPU
    rows = max(1, min(len(targets), max(most, budget // size)))
    columns = max(1, min(size, budget // rows))
    # A block of columns stays in the cache while the rows pass.
    for start in range(0, size, columns):
        stop = min(start + columns, size)
        for first in range(0, len(targets), rows):
            here = targets[first:first + rows, None]
            inside = (here >= start) & (here < stop)
            yield _Tile(slice(first, first + len(here)), slice(start, stop), inside,
                        torch.where(inside, here - start, 0))


def tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling,
                out: Tensor | None = None) -> Tensor:
    """Logits of rows `hidden` [R, d] for the columns `weight` [C, d] of the vocabulary, in float32 at least."""
    x = torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)
    return scaling(x.to(torch.promote_types(x.dtype, torch.float32)))


class LogProbsAndEntropies(torch.autograd.Function):
    """(hidden [R, d], weight [V, d], bias [V] or None, targets [R], scaling, moments) -> of each row, [R] each:

    log-prob, entropy and log Σ e^z, and with moments C and L.
    """

    @staticmethod
    def forward(hidden, weight, bias, targets, scaling, moments):
        kind = torch.promote_types(hidden.dtype, torch.float32)
        lowest = torch.finfo(kind).min
        maximum = torch.full(targets.shape, lowest, dtype=torch.float64, device=hidden.device)
        # Of each row z_t, then Σ e^z and Σ e^z z, then Σ e^{2z} and Σ e^{2z} z, with z counted from its maximum.
        chosen, *sums = torch.zeros(5 if moments else 3, *targets.shape, dtype=torch.float64, device=hidden.device)
        buffers = None
        for tile in _tiles(targets, len(weight)):
            r, c = tile.rows, tile.columns
            shape = (r.stop - r.start, c.stop - c.start)
            if buffers is None:
                buffers = hidden.new_empty(shape[0] * shape[1]), hidden.new_empty(shape[0] * shape[1], dtype=kind)
            product, powers = (x[:shape[0] * shape[1]].view(shape) for x in buffers)
            z = tile_logits(hidden[r], weight[c], None if bias is None else bias[c], scaling, out=product)
            chosen[r] = tile.at_target(z, chosen[r].to(kind)).double()
            if bias is not None:
                # A bias of −inf is a probability of zero, and 0 · −inf is NaN.
                z = z.clamp(min=lowest / 4)
            highest = torch.maximum(maximum[r], z.amax(1).double())
            shift = maximum[r] - highest
            z -= highest[:, None].to(kind)
            torch.exp(z, out=powers)
            for k, (total, weighted) in enumerate(zip(sums[::2], sums[1::2], strict=True), start=1):
                if k == 2:
                    powers.square_()
                growth = (k * shift).exp()
                weighted[r] = growth * (weighted[r] + shift * total[r]) + torch.linalg.vecdot(powers, z)
                total[r] = growth * total[r] + powers.sum(1)
            maximum[r] = highest
        return tuple(x.to(kind) for x in _from_sums(chosen, maximum, *sums))

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, bias, targets, ctx.scaling, _ = inputs
        _, *kept = output
        ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        # Moments that nothing is differentiated through cost backward nothing.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *above):
        hidden, weight, bias, targets, entropies, normaliser, *moments = ctx.saved_tensors
        through_moments = any(x is not None for x in above[3:])
        above = [torch.zeros_like(normaliser) if x is None else x for x in above]
        of_log_probs, of_entropies, of_normaliser, *of_moments = above
        need = ctx.needs_input_grad
        kind = normaliser.dtype
        of_hidden = torch.zeros_like(hidden, dtype=kind) if need[0] else None
        of_weight = torch.zeros_like(weight, dtype=kind) if need[1] else None
        of_bias = torch.zeros_like(bias, dtype=kind) if need[2] else None
        for tile in _tiles(targets, len(weight)):
            r, c = tile.rows, tile.columns
            z = tile_logits(hidden[r], weight[c], None if bias is None else bias[c], ctx.scaling)
            log_p = z - normaliser[r, None]
            p = log_p.exp()
            if bias is not None:
                log_p = log_p.masked_fill(p == 0, 0.0)
            # ∂ log p_t = [i = t] − p_i, ∂H = −p_i (log p_i + H) and ∂ log Σ e^z = p_i, times what comes from above.
            constant = of_normaliser[r] - of_log_probs[r] - of_entropies[r] * entropies[r]
            slope = torch.addcmul(constant[:, None], log_p, of_entropies[r, None], value=-1)
            if through_moments:
                of_c, of_l, mean, log_mean = (x[r, None] for x in (*of_moments, *moments))
                slope = slope + of_c * 2 * (p - mean) + of_l * (p + 2 * p * log_p - mean - 2 * log_mean)
            slope = p * slope
            slope = slope.scatter_add(1, tile.places, torch.where(tile.inside, of_log_probs[r, None], 0.0))
            factor = ctx.scaling.slope(z)
            if not isinstance(factor, float) or factor != 1:
                slope = slope * factor
            slope = slope.to(hidden.dtype)
            if need[0]:
                add_product(of_hidden[r], slope, weight[c])
            if need[1]:
                add_product(of_weight[c], slope.T, hidden[r])
            if need[2]:
                of_bias[c] += slope.sum(0)
        grads = [None if g is None else g.to(hidden.dtype) for g in (of_hidden, of_weight, of_bias)]
        return *grads, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in one operation where dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _in_forward_mode(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling,
                     moments: bool) -> tuple[Tensor, ...]:
    """The same in operations that have derivatives of every order; tangents are freed with their tile."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    maximum: dict[int, Tensor] = {}
    sums: dict[int, list[Tensor]] = {}
    for tile in _tiles(targets, len(weight)):
        r, c = tile.rows, tile.columns
        z = tile_logits(hidden[r], weight[c], None if bias is None else bias[c], scaling)
        nothing = torch.zeros(len(tile.places), dtype=kind, device=z.device)
        chosen = tile.at_target(z, nothing)
        if bias is not None:
            z = z.clamp(min=torch.finfo(kind).min / 4)
        # What is taken off cancels, so it needs no tangent.
        highest = z.detach().amax(1)
        z = z - highest[:, None]
        powers = z.exp()
        here = [chosen, powers.sum(1), (powers * z).sum(1)]
        if moments:
            here += [powers.square().sum(1), (powers.square() * z).sum(1)]
        if r.start in sums:
            most = torch.maximum(maximum[r.start], highest)
            before, here = _raised(sums[r.start], maximum[r.start] - most), _raised(here, highest - most)
            here, highest = [x + y for x, y in zip(before, here, strict=True)], most
        sums[r.start], maximum[r.start] = here, highest
    chosen, *totals = (torch.cat(parts) for parts in zip(*sums.values(), strict=True))
    return tuple(_from_sums(chosen, torch.cat(list(maximum.values())), *totals))


def _from_sums(chosen: Tensor, maximum: Tensor, total: Tensor, weighted: Tensor, *squares: Tensor) -> Iterator[Tensor]:
    """Log-prob, entropy, log Σ e^z and, given the sums of e^{2z}, C and L; the sums count z from its maximum."""
    normaliser = maximum + total.log()
    yield from (chosen - normaliser, total.log() - weighted / total, normaliser)
    if squares:
        squared, squared_weighted = squares
        yield from (squared / total.square(), (squared_weighted - squared * total.log()) / total.square())


def _raised(sums: Sequence[Tensor], shift: Tensor) -> list[Tensor]:
    """A tile's z_t and Σ e^{kz}, Σ e^{kz} z for k = 1, 2, once z is counted from a maximum that is −shift higher."""
    chosen, *pairs = sums
    raised = [chosen]
    for k, (total, weighted) in enumerate(zip(pairs[::2], pairs[1::2], strict=True), start=1):
        growth = (k * shift).exp()
        raised += [growth * total, growth * (weighted + shift * total)]
    return raised
