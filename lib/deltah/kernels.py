"""The Fisher kernel K(t, t') = Σ_α P_α ∂_α S(t) ∂_α S(t') between rollouts or between tokens, with S = log π(t|p).

η/B Σ_t' K(t, t') A(t') is how much a policy-gradient step with advantages A moves log π(t); P is the optimizer's
preconditioner. Gradients are formed one parameter at a time from their factors (`sample_gradients`), so that no matrix
of rollouts by parameters is ever held. Chapter 08 shows what K looks like, and derives both routes:

    formed      G_i = Σ_k g_k ⊗ x_k in blocks,  K_ij += Σ G_i P G_j
    contracted  K_ij += Σ_kl (g_k · g_l) (x_k · x_l),  for wide layers and few positions
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from deltah import checks, memory
from deltah.derivatives.sample_gradients import SampleGradient, sample_gradients
from deltah.policies import Policy, check_tensors
from deltah.rollouts import Rollouts, check_rollouts
from deltah.scoring import batches

LEVELS = ("sequence", "token")
# Numbers that gradients formed at a time should hold, so that their memory is used again without going back to the
# system; the rows that a matrix should have nevertheless.
FORMED, THINNEST = 2**22, 16
# Numbers that may be held, if the memory is there: by gradients formed for the sake of these rows; by the matrices that
# a layer is contracted through; of a block's output layer, to be computed once.
ROOM, CONTRACTED, KEPT = 2**26, 2**24, 2**27
# Products that are summed in float32: matrix products of greater depth lose digits (4e-4 of K at 15 million).
DEPTH = 2**13
# Rows below which a matrix product gets slow.
NARROWEST = 64
# Of a call's budget: the factors of gradients, a backward pass, and each of the three above.
OF_FACTORS, OF_PASS, OF_EACH = 0.55, 0.25, 0.05
# Coordinates of a parameter that a sketch hashes together.
HASHED = 2**18


@torch.inference_mode(False)
def fisher_kernel(policy: Policy, rollouts: Rollouts, others: Rollouts | None = None,
                  preconditioner: Mapping[str, Tensor] | None = None, level: str = "sequence",
                  batch_size: int | None = None) -> Tensor:
    """The Fisher kernel between the rollouts (or tokens) of one set, or of two.

    Over the trainable parameters: tied ones once, biases, norms and adapters included. Takes about a third more than a
    forward and backward pass over all rollouts. A single batch's gradients are used up as they come; of more batches,
    each layer's inputs and output gradients are held. Where that takes too much memory, blocks of rollouts meet in
    pairs, and the cost grows with the square of their number.

    Args:
        policy: the policy.
        rollouts: N rollouts; S is at their temperature.
        others: N' rollouts of the same temperature; None: `rollouts` again.
        preconditioner: P by parameter name, of the parameters' shapes, such as `Direction.preconditioner`; parameters
            that it leaves out do not move, and add nothing. None: P = 1.
        level: "sequence": S = log π(response | prompt). "token": S = log π(token | all before it), a row for each
            response token in the order of `response_mask.nonzero()`.
        batch_size: rollouts (or tokens) in one backward pass; None: as many as suit the device.

    Returns:
        [N, N'], in float64 for a float64 policy and float32 otherwise.

    Raises:
        TypeError: an argument of the wrong type. ValueError: an unknown level, a preconditioner that does not fit the
            policy, temperatures that differ, rollouts that the policy cannot run, a policy without trainable
            parameters, a model whose backward pass is not the derivative of its function, as where it detaches
            something that moves (DoRA's norm), or a result that is not finite.

    Source: the notes, sections 2.1 and 2.7.

    >>> kernel = fisher_kernel(policy, rollouts)                             # doctest: +SKIP
    >>> eta / len(rollouts) * kernel @ rollouts.advantages     # δ log π(t) of an SGD step   # doctest: +SKIP
    """
    left = _samples(policy, rollouts, level)
    right = left if others is None else _samples(policy, checks.instance("others", others, Rollouts), level)
    if right.temperature != left.temperature:
        raise ValueError(f"others: expected the temperature {left.temperature} of rollouts, got {right.temperature}")
    scale = _checked(policy, preconditioner)
    if batch_size is not None:
        batch_size = checks.integer("batch_size", batch_size, minimum=1)
    kernel = torch.zeros(len(left), len(right), dtype=torch.float64, device=policy.device)
    size = _block_size(policy, left, right)
    rows, across = batches(policy, left, size), batches(policy, right, size)
    # A single set's blocks have met those before them.
    columns = [rows[a + 1:] if others is None else across for a in range(len(rows))]
    total = sum(len(first) + sum(map(len, row)) for first, row in zip(rows, columns, strict=True))
    with tqdm(total=total, desc="kernel", unit="rollout", leave=False, delay=1) as progress:
        passes = _Passes(policy, scale, batch_size, _limits(policy), progress)
        for first, row in zip(rows, columns, strict=True):
            chosen, here = left.select(first), first[:, None]
            if others is None and not row:
                kernel[here, first] = passes.meet(chosen)
                break
            held = passes.gradients(chosen)
            if others is None:
                kernel[here, first] = _products(held, held, scale, (len(first), len(first)), passes.limits)
            for second in row:
                kernel[here, second] = passes.meet(right.select(second), held, len(first))
                if others is None:
                    kernel[second[:, None], first] = kernel[here, second].T
            # Before the next block's come.
            del held
    wrong = ~torch.isfinite(kernel).all(1)
    if wrong.any():
        raise ValueError(f"policy: the kernel is NaN or infinite, first in row {int(wrong.nonzero()[0])}")
    return kernel.to(torch.promote_types(policy.dtype, torch.float32))


@torch.inference_mode(False)
def fisher_sketch(policy: Policy, rollouts: Rollouts, dimension: int = 4096,
                  preconditioner: Mapping[str, Tensor] | None = None, level: str = "sequence", seed: int = 0,
                  batch_size: int | None = None) -> Tensor:
    """Random projections z_i of √P ∂S_i, with E[z_i · z_j] = K(t_i, t_j), for batches whose kernel is too large.

    Every coordinate goes into one of `dimension` buckets with a random sign (a count sketch). An entry of z z^T has
    standard error √((K_ii K_jj + K_ij²) / dimension), and so has one between two sketches of the same seed, dimension
    and policy. With weights x and y, Σ_ij x_i K_ij y_j ≈ (x^T z) · (y^T z'): products of mean gradients X · Y.

    Args:
        policy: the policy.
        rollouts: N rollouts; S is at their temperature.
        dimension: m of the projections.
        preconditioner: P ≥ 0 by parameter name, as for `fisher_kernel`.
        level: "sequence" or "token", as for `fisher_kernel`.
        seed: of the projection, which is made again where it is needed and never stored.
        batch_size: rollouts (or tokens) in one backward pass; None: as many as suit the device.

    Returns:
        [N, dimension], in float64 for a float64 policy and float32 otherwise.

    Raises:
        ValueError: as `fisher_kernel`; or a negative preconditioner, or `dimension` < 1.

    Source: the notes, section 2.1.1; Charikar, Chen and Farach-Colton (2002) for the count sketch.

    >>> z = fisher_sketch(policy, rollouts, dimension=1024)                  # doctest: +SKIP
    >>> z @ z.T                            # the kernel, to about 3% of √(K_ii K_jj)   # doctest: +SKIP
    """
    dimension = checks.integer("dimension", dimension, minimum=1)
    seed = checks.integer("seed", seed, minimum=0)
    if batch_size is not None:
        batch_size = checks.integer("batch_size", batch_size, minimum=1)
    samples = _samples(policy, rollouts, level)
    scale = _checked(policy, preconditioner)
    for name, p in (scale or {}).items():
        if (p < 0).any():
            raise ValueError(f"preconditioner[{name!r}]: expected numbers ≥ 0, to take roots of, got {float(p.min())}")
    roots = None if scale is None else {name: p.sqrt() for name, p in scale.items()}
    kind = torch.promote_types(policy.dtype, torch.float32)
    sketch = torch.zeros(len(samples), dimension, dtype=kind, device=policy.device)
    limits = _limits(policy)
    with tqdm(total=len(samples), desc="sketch", unit="rollout", leave=False, delay=1) as progress:
        for rows in _batches(policy, samples, batch_size, max(1, limits.room // HASHED)):
            part = torch.zeros(len(rows), dimension, dtype=kind, device=policy.device)

            def receive(gradient: SampleGradient, part=part) -> None:
                if roots is None or gradient.name in roots:
                    part += _hashed(gradient, None if roots is None else roots[gradient.name], dimension, seed)

            sample_gradients(policy, samples.select(rows), receive, limits.kept)
            sketch[rows] = part
            progress.update(len(rows))
    return sketch


def _samples(policy: Policy, rollouts: Rollouts, level: str) -> Rollouts:
    """A rollout for each row of the kernel."""
    checks.choice("level", level, LEVELS)
    check_rollouts(policy, rollouts)
    if not policy.parameters:
        raise ValueError("policy: has no trainable parameters, so its kernel is empty; set requires_grad on some")
    rollouts = rollouts.to(policy.device)
    if level == "sequence":
        return rollouts
    # Each token becomes a response of its own, to all that stands before it.
    rows, places = rollouts.response_mask.nonzero().T
    columns = torch.arange(rollouts.input_ids.shape[1], device=policy.device)
    source = columns - (rollouts.response_mask.shape[1] - 1 - places)[:, None]
    inside = source >= 0
    rows, source = rows[:, None], source.clamp(min=0)
    return Rollouts(torch.where(inside, rollouts.input_ids[rows, source], 0),
                    rollouts.attention_mask[rows, source] & inside,
                    torch.ones_like(rows, dtype=torch.bool), rollouts.prompt_index[rows[:, 0]],
                    temperature=rollouts.temperature)


def _checked(policy: Policy, preconditioner: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if preconditioner is None:
        return None
    check_tensors(policy, preconditioner, "preconditioner")
    return {name: p.detach().to(policy.device) for name, p in preconditioner.items()}


def _batches(policy: Policy, rollouts: Rollouts, batch_size: int | None, most: int | None = None) -> list[Tensor]:
    """Row indices of the rollouts of one backward pass each."""
    if batch_size is None:
        length = int(rollouts.attention_mask.sum(1).max())
        logits = 0 if policy.has_linear_output else rollouts.response_mask.shape[1]
        batch_size = memory.rows_at_once(policy, length, "backward", logits=logits, share=OF_PASS)
    return batches(policy, rollouts, batch_size if most is None else min(batch_size, most))


def _block_size(policy: Policy, left: Rollouts, right: Rollouts) -> int:
    """Rollouts of either set whose factors are held at a time."""
    longest = max(int(x.attention_mask.sum(1).max()) for x in (left, right))
    most = memory.budget(policy.device, OF_FACTORS) // max(1, memory.position_bytes(policy) * longest)
    return max(1, most if left is right and len(left) <= most else most // 2)


class _Limits(NamedTuple):
    """Numbers that parts of a call may hold, as at ROOM, CONTRACTED and KEPT."""

    room: int
    contracted: int
    kept: int


def _limits(policy: Policy) -> _Limits:
    kind = torch.promote_types(policy.dtype, torch.float32)
    return _Limits(*(memory.numbers(policy.device, kind, most, OF_EACH) for most in (ROOM, CONTRACTED, KEPT)))


# The gradients of one parameter, in parts with the rows that each is of; and of all, by name and slice.
Parts = list[tuple[Tensor, SampleGradient]]
Gradients = dict[tuple[str, int | None], Parts]


class _Passes(NamedTuple):
    """The gradients of a call's rollouts."""

    policy: Policy
    scale: Mapping[str, Tensor] | None
    batch_size: int | None
    limits: _Limits
    progress: tqdm

    def hand_over(self, rollouts: Rollouts, batches: Sequence[Tensor],
                  receive: Callable[[Tensor, SampleGradient], None]) -> None:
        """Call `receive` with each gradient and the rows that it is of."""
        for rows in batches:
            def wanted(gradient: SampleGradient, rows=rows) -> None:
                if self.scale is None or gradient.name in self.scale:
                    receive(rows, gradient)

            kept = self.limits.kept * len(rows) // len(rollouts)
            sample_gradients(self.policy, rollouts.select(rows), wanted, kept)
            self.progress.update(len(rows))

    def gradients(self, rollouts: Rollouts, batches: Sequence[Tensor] | None = None) -> Gradients:
        found: Gradients = defaultdict(list)
        self.hand_over(rollouts, batches or _batches(self.policy, rollouts, self.batch_size),
                       lambda rows, gradient: found[gradient.name, gradient.index].append((rows, gradient)))
        return found

    def meet(self, rollouts: Rollouts, held: Gradients | None = None, count: int | None = None) -> Tensor:
        """Products of the gradients that are held, of `count` rollouts, or of the rollouts' own, with the rollouts'."""
        shape = count or len(rollouts), len(rollouts)
        batches = _batches(self.policy, rollouts, self.batch_size)
        if len(batches) > 1:
            found = self.gradients(rollouts, batches)
            return _products(found if held is None else held, found, self.scale, shape, self.limits)
        # Those of a single batch need not be held.
        total = torch.zeros(shape, dtype=torch.float64, device=self.policy.device)

        def receive(rows: Tensor, gradient: SampleGradient) -> None:
            nonlocal total
            own = {(gradient.name, gradient.index): [(rows, gradient)]}
            total += _products(own if held is None else held, own, self.scale, shape, self.limits)

        self.hand_over(rollouts, batches, receive)
        return total


def _products(left: Gradients, right: Gradients, scale: Mapping[str, Tensor] | None, shape: tuple[int, int],
              limits: _Limits) -> Tensor:
    """Σ_α P_α G_iα G_jα in float64."""
    total = 0.0
    for key in left.keys() & right.keys():
        # Of lookups, only the rows that the first have looked up.
        rows = None
        if all(gradient.is_lookup for _, gradient in left[key] + right[key]):
            rows = torch.cat([gradient.looked_up() for _, gradient in left[key]]).unique()
        first = [(i, gradient if rows is None else gradient.restricted(rows)) for i, gradient in left[key]]
        second = first if left is right else [
            (j, gradient if rows is None else gradient.restricted(rows)) for j, gradient in right[key]]
        p = None
        if scale is not None:
            p = first[0][1].part_of(scale[key[0]])
            p = p if rows is None else p[rows]
        contract = p is None and _is_cheaper_contracted(first, second, limits.contracted)
        total = total + (_contracted(first, second, shape) if contract else
                         _formed(first, second, p, shape, limits.room))
    return total


def _is_cheaper_contracted(first: Parts, second: Parts, most: int) -> bool:
    """Whether that takes fewer multiplications than to form gradients, and matrices of at most so many numbers."""
    if any(gradient.positions is None for _, gradient in first + second):
        return False
    o, i = first[0][1].shape
    (n, most_n, rows_n), (m, most_m, rows_m) = (
        (sum(len(x) for x, _ in parts), max(len(x) * g.positions for x, g in parts),
         sum(len(x) * g.positions for x, g in parts)) for parts in (first, second))
    return most_n * most_m <= most and rows_n * rows_m * (o + i) < (rows_n + n * m) * o * i


def _pairs(first: Parts, second: Parts) -> Iterator[tuple[int, int]]:
    """Which parts to multiply: of a set with itself, each pair once."""
    return ((a, b) for a in range(len(first)) for b in range(a if first is second else 0, len(second)))


def _add(total: Tensor, rows: Tensor, columns: Tensor, part: Tensor, mirrored: bool) -> None:
    total[rows[:, None], columns] += part
    if mirrored:
        total[columns[:, None], rows] += part.T


def _contracted(first: Parts, second: Parts, shape: tuple[int, int]) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float64, device=first[0][0].device)
    for a, b in _pairs(first, second):
        (i, x), (j, y), products = first[a], second[b], 0.0
        for block in _slices(x.shape[0], min(DEPTH, FORMED // max(len(i) * x.positions, len(j) * y.positions))):
            left = x.lefts(block).flatten(0, 1)
            right = left if x is y else y.lefts(block).flatten(0, 1)
            products = products + (left @ right.T).double()
        products = products * (x.rights().flatten(0, 1) @ y.rights().flatten(0, 1).T)
        _add(total, i, j, products.view(len(i), x.positions, len(j), y.positions).sum((1, 3)),
             first is second and a < b)
    return total


def _formed(first: Parts, second: Parts, p: Tensor | None, shape: tuple[int, int], room: int) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float64, device=first[0][0].device)
    o, i = first[0][1].shape
    row = sum(shape) * i
    for block in _slices(o, max(FORMED // row, min(THINNEST, room // row))):
        left = [gradient.formed(block).flatten(1) for _, gradient in first]
        right = left if first is second else [gradient.formed(block).flatten(1) for _, gradient in second]
        if p is not None:
            right = [x * p[block].flatten().to(x) for x in right]
        for a, b in _pairs(first, second):
            _add(total, first[a][0], second[b][0], _inner(left[a], right[b], first is second and a == b),
                 first is second and a < b)
    return total


def _inner(x: Tensor, y: Tensor, symmetric: bool = False) -> Tensor:
    """x y^T in float64, of x [n, C] and y [m, C]; half of it is left out where it is known to be symmetric."""
    if symmetric and len(x) > NARROWEST:
        half = len(x) // 2
        across = _inner(x[:half], y[half:])
        corners = (_inner(x[part], y[part], True) for part in (slice(half), slice(half, None)))
        return torch.cat([torch.cat([next(corners), across], 1), torch.cat([across.T, next(corners)], 1)])
    return sum((x[:, block] @ y[:, block].T).double() for block in _slices(x.shape[1], DEPTH))


def _slices(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _hashed(gradient: SampleGradient, root: Tensor | None, dimension: int, seed: int) -> Tensor:
    """The sketch's share of one parameter, [n, dimension]."""
    o, i = gradient.shape
    root = None if root is None else gradient.part_of(root)
    total = 0.0
    for block in _slices(o, HASHED // i):
        formed = gradient.formed(block)
        if root is not None:
            formed = formed * root[block].to(formed)
        formed = formed.flatten(1)
        # A generator of the processor's gives the same numbers for every device.
        label = f"{seed} {gradient.name} {gradient.index} {block.start}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label.encode()).digest()[:7]))
        size = formed.shape[1]
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        places = torch.randperm(-(-size // dimension) * dimension, generator=generator)
        formed = F.pad(formed * signs.to(formed), (0, len(places) - size))
        total = total + formed[:, places.to(formed.device)].view(len(formed), -1, dimension).sum(1)
    return total
