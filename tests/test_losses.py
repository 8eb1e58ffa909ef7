"""Every loss, token by token, against the closed forms of its value and gradient that its docstring states."""

import math

import pytest
import torch

from deltah import objectives

LOW, HIGH = 0.2, 0.3


def clipped(ratio, a, low=LOW, high=HIGH, dual=math.inf):
    """Value and slope of −min(r A, clip(r) A), by log r."""
    if a > 0 and ratio > 1 + high:
        return -(1 + high) * a, 0.0
    if a < 0 and ratio < 1 - low:
        return -(1 - low) * a, 0.0
    if a < 0 and ratio > dual:
        return -dual * a, 0.0
    return -ratio * a, -ratio * a


def gradient_kept(ratio, a, beta_low, beta_high, dual=math.inf):
    weight = ratio
    if a > 0 and ratio > 1 + HIGH:
        weight = beta_high * (1 + HIGH)
    if a < 0 and ratio < 1 - LOW:
        weight = beta_low * (1 - LOW)
    return (-dual * a, 0.0) if a < 0 and weight > dual else (-weight * a, -weight * a)


def weighted(ratio, a, log_prob, low, high):
    weight = max(low, min(ratio, high))
    return -weight * a * log_prob, -weight * a


CLIPS = {"clip_low": LOW, "clip_high": HIGH}
# Loss, its hyperparameters, and value and slope of a token by its ratio, its sequence's, A and log π.
CASES = {
    "grpo": (objectives.grpo, CLIPS, lambda r, s, a, lp: clipped(r, a)),
    "grpo, dual clip": (objectives.grpo, CLIPS | {"dual_clip": 1.5}, lambda r, s, a, lp: clipped(r, a, dual=1.5)),
    "dr_grpo": (objectives.dr_grpo, CLIPS, lambda r, s, a, lp: clipped(r, a)),
    "dapo": (objectives.dapo, {}, lambda r, s, a, lp: clipped(r, a, 0.2, 0.28)),
    "cispo": (objectives.cispo, {"clip_high": HIGH}, lambda r, s, a, lp: weighted(r, a, lp, 0.0, 1 + HIGH)),
    "cispo, both sides": (objectives.cispo, CLIPS, lambda r, s, a, lp: weighted(r, a, lp, 1 - LOW, 1 + HIGH)),
    "gspo": (objectives.gspo, {"clip_low": 0.05, "clip_high": 0.1}, lambda r, s, a, lp: clipped(s, a, 0.05, 0.1)),
    "gspo_token": (objectives.gspo_token, {"clip_low": 0.05, "clip_high": 0.1},
                   lambda r, s, a, lp: clipped(s, a, 0.05, 0.1)),
    "ce_gppo": (objectives.ce_gppo, CLIPS, lambda r, s, a, lp: gradient_kept(r, a, 0.75, 1.0, 3.0)),
    "ce_gppo, other β, no dual clip": (
        objectives.ce_gppo, CLIPS | {"beta_low": 0.5, "beta_high": 0.25, "dual_clip": None},
        lambda r, s, a, lp: gradient_kept(r, a, 0.5, 0.25)),
    "ce_gppo, a dual clip below β": (
        objectives.ce_gppo, CLIPS | {"beta_low": 2.0, "dual_clip": 1.2},
        lambda r, s, a, lp: gradient_kept(r, a, 2.0, 1.0, 1.2)),
    "ce_gppo, β = 0": (objectives.ce_gppo, CLIPS | {"beta_low": 0.0, "beta_high": 0.0},
                       lambda r, s, a, lp: gradient_kept(r, a, 0.0, 0.0, 3.0)),
}
PER_SEQUENCE = {"gspo"}


def batch(seed, n=8, t=6, per_token=True):
    """Log-probs, old ones and advantages, some of them 0, with r from 0.1 to 10 and rows of one to t tokens."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, t, generator=g, dtype=torch.float64) * 4
    log_probs = old + 0.8 * torch.randn(n, t, generator=g, dtype=torch.float64)
    advantages = torch.randn(n, *[t] * per_token, generator=g, dtype=torch.float64)
    advantages.view(-1)[::5] = 0.0
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)
    mask[0] = torch.arange(t) < 1
    return log_probs, old, advantages, mask


def check(name, log_probs, old, advantages, mask):
    """Value and gradient of every token; outside the mask NaN, in all that is handed over, changes neither."""
    function, settings, form = CASES[name]
    spoilt = [torch.where(mask, x, torch.nan) if x.shape == mask.shape else x for x in (log_probs, old, advantages)]
    leaf = spoilt[0].clone().requires_grad_()
    losses = function(leaf, *spoilt[1:], mask, **settings)
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.dtype == torch.float64 and not losses[~mask].any() and not slopes[~mask].any()
    counts = {"clipped": 0, "moving": 0}
    for i, t in mask.nonzero().tolist():
        log_ratios = (log_probs - old)[i][mask[i]]
        a = float(advantages[i] if advantages.ndim == 1 else advantages[i, t])
        r, s = math.exp(log_probs[i, t] - old[i, t]), math.exp(log_ratios.mean())
        value, slope = form(r, s, a, float(log_probs[i, t]))
        assert losses[i, t].item() == pytest.approx(value, rel=1e-12, abs=1e-15)
        assert slopes[i, t].item() == pytest.approx(slope, rel=1e-12, abs=1e-15)
        counts["moving" if slope else "clipped"] += a != 0
    return counts


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_docstring(name):
    counts = {"clipped": 0, "moving": 0}
    for seed in range(4):
        for per_token in (False, True)[:1 if name in PER_SEQUENCE else 2]:
            found = check(name, *batch(seed, per_token=per_token))
            counts = {key: counts[key] + found[key] for key in counts}
    assert counts["moving"] > 20
    # What keeps every gradient keeps it.
    assert (counts["clipped"] == 0) == (name.startswith("cispo") or name == "ce_gppo, other β, no dual clip")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("gspo")])
def test_on_the_old_policy_all_have_the_policy_gradient(name):
    log_probs, _, advantages, mask = batch(1)
    function, settings, _ = CASES[name]
    leaf = log_probs.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(function(leaf, log_probs, advantages, mask, **settings).sum(), leaf)
    torch.testing.assert_close(slopes, torch.where(mask, -advantages, 0.0), rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["grpo", "grpo, dual clip", "gspo", "gspo_token", "ce_gppo"])
@pytest.mark.parametrize("a", [-1.5, 1.5])
def test_the_edge_of_a_range_belongs_to_it(name, a):
    """A ratio that is exactly 1−ε, 1+ε or c moves; with a range that is the smallest number narrower, it does not."""
    function, settings, _ = CASES[name]
    one, advantages = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([a], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)

    def slope(log_ratio, **clips):
        leaf = (one + log_ratio).requires_grad_()
        (found,) = torch.autograd.grad(function(leaf, one, advantages, mask, **clips).sum(), leaf)
        return found.item()

    edge = -0.3 if a < 0 else 0.3
    ratio = torch.tensor(edge, dtype=torch.float64).exp().item()
    key, width = ("clip_low", 1 - ratio) if a < 0 else ("clip_high", ratio - 1)
    narrower = width - 2**-52
    assert 1 - width == ratio or 1 + width == ratio
    assert slope(edge, **{key: width}) == pytest.approx(-ratio * a, rel=1e-14)
    kept = -a * (0.75 * (1 - narrower) if a < 0 else 1 + narrower) if name == "ce_gppo" else 0.0
    assert slope(edge, **{key: narrower}) == pytest.approx(kept, rel=1e-14)
    if a < 0 and "dual_clip" in settings:
        limit = torch.tensor(0.5, dtype=torch.float64).exp().item()
        assert slope(0.5, dual_clip=limit) == pytest.approx(-limit * a, rel=1e-14)
        assert slope(0.5, dual_clip=math.nextafter(limit, 0)) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_no_ratio_is_too_large_for_a_token_that_is_clipped(name):
    """exp overflows at 710 nats; a token that has no gradient, or no advantage, has 0, and bounds stay bounds."""
    function, settings, form = CASES[name]
    log_probs = torch.tensor([[-1.0], [-800.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-900.0], [-1.0], [-900.0]], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64)
    losses = function(log_probs, old, advantages, torch.ones(3, 1, dtype=torch.bool), **settings)
    (slopes,) = torch.autograd.grad(losses.sum(), log_probs)
    for i, (ratio, a) in enumerate([(math.inf, 2.0), (0.0, -2.0)]):
        value, slope = form(ratio, ratio, a, log_probs[i].item())
        assert losses[i].item() == pytest.approx(value) and slopes[i].item() == pytest.approx(slope)
    assert losses[2] == 0 and slopes[2] == 0


def test_clips_of_gspo_and_gspo_token_are_the_same_for_a_sequence():
    """The first differentiates s, the second one token of it at a time; summed over a sequence that is the same."""
    log_probs, old, advantages, mask = batch(2, per_token=False)
    found = []
    for function in (objectives.gspo, objectives.gspo_token):
        leaf = log_probs.clone().requires_grad_()
        losses = function(leaf, old, advantages, mask, 0.05, 0.1)
        for how in ("sequence_mean", "token_mean"):
            loss = objectives.aggregate(losses, mask, how)
            found.append((loss, *torch.autograd.grad(loss, leaf, retain_graph=True)))
    for left, right in zip(found[:2], found[2:], strict=True):
        for x, y in zip(left, right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-16)


def test_cispo_s_gradient_within_its_bounds_is_grpo_s():
    log_probs, old, advantages, mask = batch(3)
    slopes = []
    for function in (objectives.cispo, objectives.grpo):
        leaf = log_probs.clone().requires_grad_()
        losses = function(leaf, old, advantages, mask, clip_low=1.0, clip_high=1e9)
        slopes += torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(*slopes, rtol=1e-13, atol=0)


def test_the_entropy_bonus_pulls_at_the_entropies_and_nowhere_else():
    log_probs, old, advantages, mask = batch(4)
    entropies = torch.where(mask, 2.0, torch.nan).double().requires_grad_()
    leaf = log_probs.clone().requires_grad_()
    losses = objectives.entropy_bonus(leaf, old, advantages, mask, entropies, beta=0.3)
    plain = objectives.grpo(leaf, old, advantages, mask)
    torch.testing.assert_close(losses, plain - 0.6 * mask)
    slopes = torch.autograd.grad(losses.sum(), (leaf, entropies))
    assert torch.equal(slopes[0], *torch.autograd.grad(plain.sum(), leaf))
    torch.testing.assert_close(slopes[1], -0.3 * mask.double())


@pytest.mark.parametrize("name", ["grpo", "dapo", "ce_gppo"])
@pytest.mark.parametrize("wrong, error", [(1, ValueError), (0.5, ValueError), (math.nan, ValueError), ("3", TypeError)])
def test_dual_clips_are_numbers_above_one(name, wrong, error):
    with pytest.raises(error, match="^dual_clip: expected a number > 1, got"):
        getattr(objectives, name)(*batch(0), dual_clip=wrong)
