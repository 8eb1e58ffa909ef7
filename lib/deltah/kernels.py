"""The Fisher kernel K(t, t') = Σ_α P_α ∂_α S(t) ∂_α S(t') between rollouts or between tokens, with S = log π(t|p).

η/B Σ_t' K(t, t') A(t') is how much a policy-gradient step with advantages A moves log π(t); P is the optimizer's
preconditioner. Gradients come one parameter at a time (`sample_gradients`), so that no matrix of rollouts by parameters
is ever held. Chapter 08 shows what K looks like, and derives both routes:

    formed      G_i = Σ_k g_k ⊗ x_k in blocks,  K_ij += Σ G_i P G_j
    contracted  K_ij += Σ_kl (g_k · g_l) (x_k · x_l),  for wide layers and few positions
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.sample_gradients import SampleGradient, sample_gradients
from deltah.scoring import check_tokens

LEVELS = ("sequence", "token")
# Numbers that gradients formed at a time may hold, and the matrices that a layer is contracted through.
FORMED, CONTRACTED = 2**26, 2**24
# Products that are summed in float32: matrix products of greater depth lose digits (4e-4 of K at 15 million).
DEPTH = 2**13
# Bytes that the activations of one backward pass may take on a CPU.
ACTIVATIONS = 2**33
# Coordinates of a parameter that a sketch hashes together.
HASHED = 2**18


def fisher_kernel(policy: Policy, rollouts: Rollouts, others: Rollouts | None = None,
                  preconditioner: Mapping[str, Tensor] | None = None, level: str = "sequence",
                  batch_size: int | None = None) -> Tensor:
    """The Fisher kernel between the rollouts (or tokens) of one set, or of two.

    Over the trainable parameters: tied ones once, biases, norms and adapters included. Takes about a third more than a
    forward and backward pass over all rollouts; where they do not fit into one batch, one pass for each pair of
    batches.

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
        ValueError: an unknown level, a preconditioner that does not fit the policy, temperatures that differ, a policy
            without trainable parameters, or a result that is not finite.

    Source: the notes, sections 2.1 and 2.7.

    >>> kernel = fisher_kernel(policy, rollouts)                             # doctest: +SKIP
    >>> eta / len(rollouts) * kernel @ rollouts.advantages     # δ log π(t) of an SGD step   # doctest: +SKIP
    """
    left = _samples(policy, rollouts, level)
    right = left if others is None else _samples(policy, others, level)
    if right.temperature != left.temperature:
        raise ValueError(f"others: expected the temperature {left.temperature} of rollouts, got {right.temperature}")
    scale = _checked(policy, preconditioner)
    kernel = torch.zeros(len(left), len(right), dtype=torch.float64, device=policy.device)
    passes = list(_passes(policy, left, None if others is None else right, batch_size))
    for a, b in tqdm(passes, desc="kernel", unit="pass", leave=False, delay=1):
        if others is None:
            batch, first, second = left.select(a), slice(0, len(a)), slice(0, len(a))
        else:
            batch = _joined(left.select(a), right.select(b))
            first, second = slice(0, len(a)), slice(len(a), len(batch))
        part = torch.zeros(len(a), len(b), dtype=torch.float64, device=policy.device)

        def receive(gradient: SampleGradient, part=part, first=first, second=second) -> None:
            if scale is None or gradient.name in scale:
                part += _products(gradient, first, second, None if scale is None else scale[gradient.name])

        sample_gradients(policy, batch, receive)
        kernel[a[:, None], b] = part
    wrong = ~torch.isfinite(kernel).all(1)
    if wrong.any():
        raise ValueError(f"policy: the kernel is NaN or infinite, first in row {int(wrong.nonzero()[0])}")
    return kernel.to(torch.promote_types(policy.dtype, torch.float32))


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
    if dimension < 1:
        raise ValueError(f"dimension: expected an integer ≥ 1, got {dimension}")
    samples = _samples(policy, rollouts, level)
    scale = _checked(policy, preconditioner)
    for name, p in (scale or {}).items():
        if (p < 0).any():
            raise ValueError(f"preconditioner[{name!r}]: expected numbers ≥ 0, to take roots of, got {float(p.min())}")
    kind = torch.promote_types(policy.dtype, torch.float32)
    sketch = torch.zeros(len(samples), dimension, dtype=kind, device=policy.device)
    batches = _blocks(samples, min(_batch_size(policy, samples, batch_size), FORMED // HASHED))
    for rows in tqdm(batches, desc="sketch", unit="pass", leave=False, delay=1):
        part = torch.zeros(len(rows), dimension, dtype=kind, device=policy.device)

        def receive(gradient: SampleGradient, part=part) -> None:
            if scale is None or gradient.name in scale:
                root = None if scale is None else scale[gradient.name].sqrt()
                part += _hashed(gradient, root, dimension, seed)

        sample_gradients(policy, samples.select(rows), receive)
        sketch[rows] = part
    return sketch


def _samples(policy: Policy, rollouts: Rollouts, level: str) -> Rollouts:
    """A rollout for each row of the kernel."""
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    if not policy.parameters:
        raise ValueError("policy: has no trainable parameters, so its kernel is empty; set requires_grad on some")
    check_tokens(policy, rollouts)
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
    policy.check(preconditioner, "preconditioner")
    return {name: p.detach().to(policy.device) for name, p in preconditioner.items()}


def _joined(a: Rollouts, b: Rollouts) -> Rollouts:
    """Both, padded alike."""
    prompt = max(a.prompt_length, b.prompt_length)
    steps = max(a.response_mask.shape[1], b.response_mask.shape[1])

    def both(name: str, before: bool) -> Tensor:
        return torch.cat([F.pad(getattr(x, name), ((prompt - x.prompt_length) * before,
                                                   steps - x.response_mask.shape[1])) for x in (a, b)])

    return Rollouts(both("input_ids", True), both("attention_mask", True), both("response_mask", False),
                    torch.cat([a.prompt_index, b.prompt_index]), temperature=a.temperature)


def _batch_size(policy: Policy, rollouts: Rollouts, batch_size: int | None) -> int:
    """Rollouts whose activations and gradients fit into one backward pass."""
    if batch_size is not None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected an integer ≥ 1, got {batch_size}")
        return batch_size
    budget = ACTIVATIONS
    if policy.device.type == "cuda":
        budget = torch.cuda.mem_get_info(policy.device)[0] // 2
    # What goes into each layer and comes out of it, and as much again between layers.
    position = 2 * sum(p.element_size() * sum(p.shape[-2:]) for p in policy.model.parameters()
                       if p.ndim > 1 and policy.vocabulary_size not in p.shape)
    return max(1, budget // max(1, position * int(rollouts.attention_mask.sum(1).max())))


def _blocks(rollouts: Rollouts, size: int) -> list[Tensor]:
    """Row indices of batches of similar length."""
    return list(rollouts.attention_mask.sum(1).argsort(stable=True).split(size))


def _passes(policy: Policy, left: Rollouts, right: Rollouts | None,
            batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `left` and of `right` between which one pass gives the kernel; twice the same rows of a single set."""
    if right is None:
        most = _batch_size(policy, left, batch_size)
        blocks = _blocks(left, len(left) if len(left) <= most else max(1, most // 2))
        unions = (torch.cat(pair) for pair in itertools.combinations(blocks, 2)) if len(blocks) > 1 else blocks
        yield from ((rows, rows) for rows in unions)
        return
    most = min(_batch_size(policy, x, batch_size) for x in (left, right))
    sizes = (len(left), len(right)) if len(left) + len(right) <= most else (max(1, most // 2),) * 2
    yield from itertools.product(_blocks(left, sizes[0]), _blocks(right, sizes[1]))


def _products(gradient: SampleGradient, a: slice, b: slice, scale: Tensor | None) -> Tensor:
    """Σ_α P_α G_iα G_jα for rollouts i in `a` and j in `b`, [n_a, n_b] in float64."""
    gradient, rows = gradient.compressed()
    (o, i), k, n = gradient.shape, gradient.positions, max(a.stop, b.stop)
    n_a, n_b = a.stop - a.start, b.stop - b.start
    if scale is not None:
        scale = gradient.part_of(scale) if rows is None else gradient.part_of(scale)[rows]
    elif k is not None and n_a * n_b * k**2 <= CONTRACTED and n_a * n_b * k**2 * (o + i) < (n * k + n_a * n_b) * o * i:
        return _contracted(gradient, a, b)
    total = 0.0
    for block in _slices(o, FORMED // (n * i)):
        formed = gradient.formed(block).flatten(1)
        other = formed[b] if scale is None else formed[b] * scale[block].flatten().to(formed)
        total = total + _inner(formed[a], other)
    return total


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """x y^T in float64, of x [n, C] and y [m, C]."""
    whole = x.shape[1] // DEPTH * DEPTH
    parts = (z[:, :whole].view(len(z), -1, DEPTH).transpose(0, 1) for z in (x, y))
    total = torch.bmm(next(parts), next(parts).transpose(1, 2)).sum(0, dtype=torch.float64)
    return total + (x[:, whole:] @ y[:, whole:].T).double()


def _contracted(gradient: SampleGradient, a: slice, b: slice) -> Tensor:
    rights, k = gradient.rights(), gradient.positions
    products = 0.0
    for block in _slices(gradient.shape[0], min(DEPTH, FORMED // (len(rights) * k))):
        lefts = gradient.lefts(block)
        products = products + (lefts[a].flatten(0, 1) @ lefts[b].flatten(0, 1).T).double()
    products = products * (rights[a].flatten(0, 1) @ rights[b].flatten(0, 1).T)
    return products.view(len(rights[a]), k, -1, k).sum((1, 3))


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
