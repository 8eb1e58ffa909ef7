"""Methods that treat few tokens apart: the ones that are about to lower the entropy most, by their own reckoning.

Which tokens those are depends on a whole batch: on its means and deviations, on how many tokens it has, or on a draw.
Each method has a function for it, NAME_tokens, which returns them as [N, T] bool. By default that batch is what the
loss is called with. To choose over more, call NAME_tokens with more and hand on the rows: a loss that is summed over
micro-batches is the method's only if its tokens were chosen in all of them at once, as the fraction f of a micro-batch
is at least one token, so that f is inflated.

What is chosen is a constant of the differentiation: neither statistics nor scores pass a gradient on. Scores are
computed in float64, and of equal ones the first counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltah import checks
from deltah.objectives.clipping import check_inside, clipped_by_ratio, grpo, log_ratio, per_token, surrogate


def clip_cov(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
             clip_high: float = 0.2, fraction: float = 2e-4, covariance_low: float = 1.0, covariance_high: float = 5.0,
             seed: int = 0, selected: Tensor | None = None) -> Tensor:
    """Clip-Cov (arXiv 2505.22617): `grpo` in which a few random tokens of high covariance have no gradient.

    Its gradient is that of `grpo`, and 0 at the tokens of `clip_cov_tokens`, whose loss is 0. They stay in the mask: a
    mean over tokens divides by them too.

    Args:
        log_probs, old_log_probs, advantages, mask: as for `grpo`.
        clip_low, clip_high: as for `grpo`. The published runs have 1 for both, which clips nothing but r > 2.
        fraction, covariance_low, covariance_high, seed: of `clip_cov_tokens`.
        selected: [N, T] bool, the tokens without a gradient, where they were chosen over more than this batch. None:
            `clip_cov_tokens` of this batch. The published runs choose in every micro-batch of every device.

    Returns:
        [N, T] losses, of which the paper takes the "token_mean".

    Raises:
        TypeError, ValueError: as for `grpo` and for `clip_cov_tokens`, or `selected` of another kind or shape.

    >>> mask, log_probs = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-0.5, -3.5]])
    >>> A = torch.tensor([[3.0, 1.0]])
    >>> clip_cov(log_probs, log_probs, A, mask, fraction=1.0)                # both covariances are 1 · 1.5
    tensor([[0., 0.]])
    >>> clip_cov(log_probs, log_probs, A, mask, covariance_low=2.0)
    tensor([[-3., -1.]])
    """
    losses = grpo(log_probs, old_log_probs, advantages, mask, clip_low, clip_high)
    tokens = clip_cov_tokens(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, fraction, covariance_low,
                             covariance_high, seed)
    return torch.where(_chosen(selected, tokens), 0.0, losses)


def clip_cov_tokens(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
                    clip_high: float = 0.2, fraction: float = 2e-4, covariance_low: float = 1.0,
                    covariance_high: float = 5.0, seed: int = 0) -> Tensor:
    """The tokens that Clip-Cov clips: max(1, ⌊f · tokens⌋) at random of those with a covariance within (ω_low, ω_high).

    Those that PPO clips already are not among them: the paper's equation does not except them, its code does.

    Args:
        log_probs, old_log_probs, advantages, mask, clip_low, clip_high: as for `grpo`.
        fraction: f, in (0, 1], of the mask's tokens.
        covariance_low, covariance_high: ω_low and ω_high, of `token_covariances`, in nats.
        seed: of the draw, ≥ 0; the same tokens on every device. Give another at each step.

    Returns:
        [N, T] bool; all of them where fewer lie within the bounds, so possibly none.

    Raises:
        TypeError, ValueError: as for `grpo`; a fraction outside (0, 1], bounds that are no numbers, or a seed that is
            no integer ≥ 0.
    """
    limit = _count(fraction, mask)
    low, high = checks.number("covariance_low", covariance_low), checks.number("covariance_high", covariance_high)
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, minimum=0, maximum=2**63 - 1))
    ratio = log_ratio(log_probs, old_log_probs, mask)
    covariances = token_covariances(log_probs, advantages, mask)
    free = ~clipped_by_ratio(ratio, per_token(advantages, mask), clip_low, clip_high)[0]
    among = (mask & free & (covariances > low) & (covariances < high)).flatten().nonzero()[:, 0]
    drawn = torch.randperm(len(among), generator=generator)[:limit].to(among.device)
    return _at(among[drawn], mask)


def kl_cov(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, fraction: float = 2e-3,
           kl_coefficient: float = 1.0, selected: Tensor | None = None) -> Tensor:
    """KL-Cov (arXiv 2505.22617): −r A without any clip, and κ |log r| more at the tokens of highest covariance.

    Its gradient is −r A, and κ sign(log r) more at those tokens. At r = 1 that is nothing, by symmetry: on the first
    minibatch of a batch the method is the plain policy gradient, and so it is throughout with one minibatch a batch.
    The paper writes a Kullback–Leibler divergence for the penalty; its code has |log r|.

    Args:
        log_probs, old_log_probs, advantages, mask: as for `grpo`.
        fraction: of `kl_cov_tokens`.
        kl_coefficient: κ ≥ 0, without unit; verl's default is 0.1.
        selected: [N, T] bool, the tokens with a penalty, where they were chosen over more than this batch. None:
            `kl_cov_tokens` of this batch.

    Returns:
        [N, T] losses, of which the paper takes the "token_mean".

    Raises:
        TypeError, ValueError: as for `grpo` and `kl_cov_tokens`; a negative κ, or `selected` of another kind or shape.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> kl_cov(torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), mask)
    tensor([[-1.1487,  0.0000]])
    """
    coefficient = checks.number("kl_coefficient", kl_coefficient, minimum=0)
    ratio = log_ratio(log_probs, old_log_probs, mask)
    losses = surrogate(ratio, ratio.detach().exp(), torch.zeros_like(mask), per_token(advantages, mask))
    tokens = _chosen(selected, kl_cov_tokens(log_probs, advantages, mask, fraction))
    return torch.where(mask, losses + torch.where(tokens, coefficient * ratio.abs(), 0.0), 0.0)


def kl_cov_tokens(log_probs: Tensor, advantages: Tensor, mask: Tensor, fraction: float = 2e-3) -> Tensor:
    """The tokens that KL-Cov penalises: the max(1, ⌊f · tokens⌋) of highest covariance, [N, T] bool.

    Args:
        log_probs, advantages, mask: as for `grpo`.
        fraction: f, in (0, 1], of the mask's tokens; 2e-3 in the published runs of 7B, 2e-4 in those of 32B.

    Raises:
        TypeError, ValueError: as for `grpo`, or a fraction outside (0, 1].
    """
    limit = _count(fraction, mask)
    return _smallest(-token_covariances(log_probs, advantages, mask), mask, limit)


def clip_b(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor,
           threshold: float = 2.5, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Clip_B (arXiv 2602.03392): `grpo` without the tokens of `clip_b_tokens`.

    Its gradient is that of `grpo`, and 0 at those tokens. They leave the mask, so that a mean over tokens divides by
    fewer: take it over `mask & ~clip_b_tokens(...)`, as the objective "clip_b" does.

    Args:
        log_probs, old_log_probs, advantages, mask, clip_low, clip_high: as for `grpo`.
        entropies, threshold: of `clip_b_tokens`.

    Returns:
        [N, T] losses, of which the published runs take the "token_mean".

    Raises:
        TypeError, ValueError: as for `grpo` and `clip_b_tokens`.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> log_probs, H = torch.tensor([[-3.0, -0.1]]), torch.tensor([[0.5, 0.5]])
    >>> clip_b(log_probs, log_probs, torch.tensor([-1.0]), mask, H, threshold=0.5)
    tensor([[0., 1.]])
    """
    tokens = clip_b_tokens(log_probs, advantages, mask, entropies, threshold)
    return grpo(log_probs, old_log_probs, advantages, mask & ~tokens, clip_low, clip_high)


def clip_b_tokens(log_probs: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor,
                  threshold: float = 2.5) -> Tensor:
    """The tokens that Clip_B drops, [N, T] bool: A < 0 and S more than μ deviations below the batch's mean.

    S = p (H + log p) is the token's discriminator: a step that raises its logit by ε changes the entropy of its
    distribution by −ε S. The deviation is the population's; where it is below 1e-12 nothing is dropped. The published
    code chooses once in a batch, before its minibatches, with p from the engine that sampled and H from the trainer;
    here both are of the policy that `log_probs` and `entropies` come from.

    Args:
        log_probs, advantages, mask: as for `grpo`.
        entropies: [N, T], H of each token's distribution, in nats.
        threshold: μ ≥ 0, in standard deviations.

    Raises:
        TypeError, ValueError: as for `grpo`; entropies of another kind or shape, or a negative threshold.
    """
    limit = checks.number("threshold", threshold, minimum=0)
    score = _discriminator(log_probs, mask, entropies)
    mean, deviation = _moments(score, mask)
    return mask & (per_token(advantages, mask) < 0) & (score - mean < -limit * deviation) & (deviation >= SMALLEST)


def clip_v(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor,
           collisions: Tensor, collision_log_probs: Tensor, threshold: float = 8.5, fraction: float = 1e-4,
           clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Clip_V (arXiv 2602.03392): `grpo` without the tokens of `clip_v_tokens`.

    Its gradient is that of `grpo`, and 0 at those tokens. They leave the mask, so that a mean over tokens divides by
    fewer: take it over `mask & ~clip_v_tokens(...)`, as the objective "clip_v" does.

    Args:
        log_probs, old_log_probs, advantages, mask, clip_low, clip_high: as for `grpo`.
        entropies, collisions, collision_log_probs, threshold, fraction: of `clip_v_tokens`.

    Returns:
        [N, T] losses, of which the published runs take the "token_mean".

    Raises:
        TypeError, ValueError: as for `grpo` and `clip_v_tokens`.

    >>> p = torch.tensor([0.9, 0.1])
    >>> H, collisions, collision_log_probs = (x.sum().view(1, 1) for x in (-p * p.log(), p**2, p**2 * p.log()))
    >>> log_probs, mask = p.log()[1].view(1, 1), torch.ones(1, 1, dtype=torch.bool)
    >>> clip_v(log_probs, log_probs, torch.tensor([-1.0]), mask, H, collisions, collision_log_probs)
    tensor([[1.]])
    """
    tokens = clip_v_tokens(log_probs, advantages, mask, entropies, collisions, collision_log_probs, threshold, fraction)
    return grpo(log_probs, old_log_probs, advantages, mask & ~tokens, clip_low, clip_high)


def clip_v_tokens(log_probs: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor, collisions: Tensor,
                  collision_log_probs: Tensor, threshold: float = 8.5, fraction: float = 1e-4) -> Tensor:
    """The tokens that Clip_V drops, [N, T] bool: A < 0 and D below −μ deviations, at most max(1, ⌊f · tokens⌋).

    D = S − E_{i∼p}[S_i] with `clip_b_tokens`'s S: a policy-gradient step of size α on the token changes the entropy of
    its distribution by −α D. The threshold is centred at zero, the deviation is the population's, about the mean;
    where it is below 1e-12 nothing is dropped. If there are more, the lowest go. The published code drops tokens with
    A = 0 too, which have no gradient, but count in a mean.

    Args:
        log_probs, advantages, mask: as for `grpo`.
        entropies: [N, T], H of each token's distribution, in nats.
        collisions, collision_log_probs: [N, T], Σ p² and Σ p² log p over each token's distribution, so that
            E_{i∼p}[S_i] = H Σ p² + Σ p² log p.
        threshold: μ ≥ 0, in standard deviations.
        fraction: f, in (0, 1], of the mask's tokens.

    Raises:
        TypeError, ValueError: as for `clip_b_tokens`; collisions of another kind or shape, or a fraction outside
            (0, 1].
    """
    limit, most = checks.number("threshold", threshold, minimum=0), _count(fraction, mask)
    check_inside("collisions", collisions, mask)
    check_inside("collision_log_probs", collision_log_probs, mask)
    score = _discriminator(log_probs, mask, entropies)
    mean = entropies.detach().double() * collisions.detach().double() + collision_log_probs.detach().double()
    score = torch.where(mask, score - mean, 0.0)
    _, deviation = _moments(score, mask)
    among = mask & (per_token(advantages, mask) < 0) & (score < -limit * deviation) & (deviation >= SMALLEST)
    return _smallest(score, among, most)


# Below it a deviation is rounding.
SMALLEST = 1e-12


def token_covariances(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Each token's part of the covariance of A and log π: (A − mean A)(log π − mean log π), [N, T] in nats.

    The means are over the mask's tokens; 0 outside it. In float64, without gradient.

    Raises:
        TypeError, ValueError: as for `grpo`.

    >>> token_covariances(torch.tensor([[-1.0, -3.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    checks.tensor("mask", mask, ("N", "T"), kind="boolean")
    check_inside("log_probs", log_probs, mask)
    advantages, log_probs = per_token(advantages, mask).detach().double(), log_probs.detach().double()
    centred = [x - x[mask].mean() for x in (advantages, log_probs)]
    return torch.where(mask, centred[0] * centred[1], 0.0)


def _discriminator(log_probs: Tensor, mask: Tensor, entropies: Tensor) -> Tensor:
    """S = p (H + log p), [N, T] in nats, in float64 and without gradient; 0 outside the mask."""
    checks.tensor("mask", mask, ("N", "T"), kind="boolean")
    check_inside("log_probs", log_probs, mask)
    check_inside("entropies", entropies, mask)
    log_probs, entropies = log_probs.detach().double(), entropies.detach().double()
    return torch.where(mask, log_probs.exp() * (entropies + log_probs), 0.0)


def _moments(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the mask's tokens."""
    mean = score[mask].mean()
    return mean, (score[mask] - mean).square().mean().sqrt()


def _count(fraction: float, mask: Tensor) -> int:
    """max(1, ⌊f · tokens⌋)."""
    share = checks.number("fraction", fraction, above=0, maximum=1)
    return max(1, int(share * int(checks.tensor("mask", mask, ("N", "T"), kind="boolean").sum())))


def _smallest(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The tokens with the `count` smallest scores, or as many as there are."""
    order = score.masked_fill(~among, torch.inf).flatten().sort(stable=True).indices
    return _at(order[:min(count, int(among.sum()))], among)


def _at(places: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(mask).flatten().index_fill(0, places, True).view_as(mask)


def _chosen(selected: Tensor | None, tokens: Tensor) -> Tensor:
    """The caller's choice, or else this batch's."""
    return tokens if selected is None else checks.tensor("selected", selected, tokens.shape, kind="boolean")
