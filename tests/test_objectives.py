import math

import pytest
import torch

import deltah as dh
from deltah import objectives


def batch(seed=0, n=6, t=5):
    generator = torch.Generator().manual_seed(seed)
    old, change = (torch.randn(n, t, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(t) < torch.tensor([5, 3, 1, 4, 2, 5])[:n, None]
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    return (old + 0.5 * change).requires_grad_(), old, advantages, mask


def test_grpo_token_by_token():
    log_probs, old, advantages, mask = batch()
    losses = objectives.grpo(log_probs, old, advantages, mask, clip_low=0.2, clip_high=0.3)
    for i in range(len(mask)):
        for t in range(mask.shape[1]):
            r, a = math.exp(log_probs[i, t].item() - old[i, t].item()), float(advantages[i])
            expected = -min(r * a, min(max(r, 0.8), 1.3) * a) if mask[i, t] else 0.0
            assert losses[i, t].item() == pytest.approx(expected, abs=1e-12)


def test_gspo_sequence_by_sequence_and_its_gradient():
    log_probs, old, advantages, mask = batch()
    losses = objectives.gspo(log_probs, old, advantages, mask, clip_low=0.1, clip_high=0.2)
    total = objectives.aggregate(losses, mask)
    (gradient,) = torch.autograd.grad(total, log_probs)
    for i in range(len(mask)):
        length = int(mask[i].sum())
        s, a = math.exp((log_probs - old)[i, :length].mean().item()), float(advantages[i])
        surrogate = min(s * a, min(max(s, 0.9), 1.2) * a)
        assert losses[i, :length].tolist() == pytest.approx([-surrogate] * length, abs=1e-12)
        clipped = (a > 0 and s > 1.2) or (a < 0 and s < 0.9)
        weight = 0.0 if clipped else -s * a / length / len(mask)
        assert gradient[i].tolist() == pytest.approx([weight] * length + [0.0] * (5 - length), abs=1e-12)


def test_padding_may_hold_anything():
    log_probs, old, advantages, mask = batch()
    for objective in (objectives.grpo, objectives.gspo):
        clean = objective(log_probs, old, advantages, mask)
        dirty = torch.where(mask, log_probs, math.nan).detach().requires_grad_()
        losses = objective(dirty, old, advantages, mask)
        torch.testing.assert_close(losses, clean)
        (gradient,) = torch.autograd.grad(losses.sum(), dirty)
        assert torch.isfinite(gradient).all()


def test_on_policy_both_give_the_policy_gradient():
    _, old, advantages, mask = batch()
    for objective in (objectives.grpo, objectives.gspo):
        log_probs = old.clone().requires_grad_()
        objectives.aggregate(objective(log_probs, old, advantages, mask), mask).backward()
        expected = -(advantages / mask.sum(1) / len(mask))[:, None] * mask
        torch.testing.assert_close(log_probs.grad, expected)


def test_group_advantages():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([4, 4, 4, 9, 9])
    assert objectives.group_advantages(rewards, groups, scale=False).tolist() == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3, 0, 0])
    scaled = objectives.group_advantages(rewards, groups)
    assert scaled[:3].std() == pytest.approx(1.0, abs=1e-5)
    assert scaled[3:].tolist() == [0, 0]
    assert objectives.group_advantages(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0]


def test_aggregations():
    losses, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    assert float(objectives.aggregate(losses, mask)) == pytest.approx((1.5 + 6) / 2)
    assert float(objectives.aggregate(losses, mask, "token_mean")) == pytest.approx(3.0)
    assert float(objectives.aggregate(losses, mask, "constant")) == pytest.approx(9 / 4)
    assert float(objectives.aggregate(losses, mask, "constant", length=10)) == pytest.approx(9 / 20)


def test_bad_arguments_are_named():
    log_probs, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="log_probs: expected the mask's shape"):
        objectives.grpo(log_probs[:, 1:], old, advantages, mask)
    with pytest.raises(ValueError, match="old_log_probs: expected the mask's shape"):
        objectives.gspo(log_probs, old[1:], advantages, mask)
    with pytest.raises(ValueError, match=r"advantages: expected shape \[6\] or \[6, 5\], got \[3\]"):
        objectives.grpo(log_probs, old, advantages[:3], mask)
    with pytest.raises(ValueError, match=r"advantages: expected shape \[6\], got \[6, 5\]"):
        objectives.gspo(log_probs, old, torch.zeros(6, 5), mask)
    with pytest.raises(ValueError, match="how: expected one of sequence_mean"):
        objectives.aggregate(log_probs, mask, "median")
    with pytest.raises(ValueError, match="losses: expected the mask's shape"):
        objectives.aggregate(log_probs[1:], mask)
    with pytest.raises(ValueError, match="rewards: expected shape"):
        objectives.group_advantages(torch.ones(3), torch.zeros(2, dtype=torch.long))


def test_dr_grpo_sums_over_tokens_and_leaves_the_advantages_unscaled():
    log_probs = torch.tensor([[0.1, -0.2, 0.3], [0.2, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rollouts = dh.Rollouts(torch.zeros(2, 4).long(), torch.cat([torch.ones(2, 1).bool(), mask], 1), mask,
                           torch.zeros(2).long(), rewards=torch.tensor([3.0, 0.0]))
    loss = objectives.Objective(objectives.dr_grpo, "constant", scale=False, length=10)
    (slope,) = torch.autograd.grad(loss.loss(log_probs, log_probs.detach(), rollouts), log_probs)
    # −A / (N · length) for each token, A = ±1.5.
    assert torch.allclose(slope, torch.tensor([[-0.075, -0.075, -0.075], [0.075, 0.0, 0.0]]))
    named = objectives.find("dr_grpo")
    assert (named.losses, named.aggregation, named.scale) == (objectives.dr_grpo, "constant", False)
    given = rollouts.replace(advantages=torch.tensor([0.0, 0.0]))
    assert loss.loss(log_probs, log_probs.detach(), given) == 0


def test_unknown_objectives_are_named():
    with pytest.raises(ValueError, match="objective: expected one of grpo, dr_grpo, gspo or an objectives.Objective"):
        objectives.find("ppo")
