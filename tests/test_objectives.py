import functools
import inspect
import math

import numpy as np
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


MOMENTS = {name: torch.ones(6, 5, dtype=torch.float64) for name in ("entropies", "collisions", "collision_log_probs")}
# Every loss, with what it needs beyond the four common arguments.
LOSSES = {
    name: functools.partial(function, **{k: MOMENTS[k] for k in inspect.signature(function).parameters if k in MOMENTS})
    for name, function in vars(objectives).items()
    if inspect.isfunction(function) and not name.endswith("_tokens")
    and list(inspect.signature(function).parameters)[:4] == ["log_probs", "old_log_probs", "advantages", "mask"]}


def test_every_loss_of_the_interface_is_there():
    names = {"grpo", "dr_grpo", "dapo", "cispo", "gspo", "gspo_token", "ce_gppo", "clip_cov", "kl_cov", "clip_b",
             "clip_v", "entropy_bonus"}
    assert set(LOSSES) == names == set(objectives.OBJECTIVES)


# Published defaults, as FORMULAS lists them.
DEFAULTS = {
    "grpo": dict(clip_low=0.2, clip_high=0.2), "dr_grpo": dict(clip_low=0.2, clip_high=0.2),
    "dapo": dict(clip_low=0.2, clip_high=0.28), "gspo": dict(clip_low=3e-4, clip_high=4e-4),
    "gspo_token": dict(clip_low=3e-4, clip_high=4e-4),
    "ce_gppo": dict(clip_low=0.2, clip_high=0.28, beta_low=0.75, beta_high=1.0, dual_clip=3.0),
    "clip_cov": dict(fraction=2e-4, covariance_low=1.0, covariance_high=5.0),
    "kl_cov": dict(fraction=2e-3, kl_coefficient=1.0), "clip_b": dict(threshold=2.5),
    "clip_v": dict(threshold=8.5, fraction=1e-4),
}
AGGREGATED = {"grpo": "sequence_mean", "gspo": "sequence_mean", "gspo_token": "sequence_mean", "dr_grpo": "constant"}


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_and_aggregation_are_the_published_ones(name):
    parameters = inspect.signature(getattr(objectives, name)).parameters
    assert all(parameters[k].default == x for k, x in DEFAULTS.get(name, {}).items())
    objective = objectives.find(name)
    assert objective.aggregation == AGGREGATED.get(name, "token_mean")
    assert objective.scale == (name != "dr_grpo") and objective.length is None
    if objective.dropped is not None:
        # The selection's own defaults are those of the loss.
        own = inspect.signature(objective.dropped).parameters
        assert all(own[k].default == x for k, x in DEFAULTS[name].items())


@pytest.mark.parametrize("name", LOSSES)
def test_the_objective_of_a_name_is_the_function_of_that_name(name):
    log_probs, old, advantages, mask = batch()
    rollouts = dh.Rollouts(torch.zeros(6, 6).long(), torch.cat([torch.ones(6, 1).bool(), mask], 1), mask,
                           torch.arange(6), advantages=advantages)
    found = objectives.find(name).loss(log_probs, old, rollouts, **MOMENTS)
    losses = LOSSES[name](log_probs, old, advantages, mask)
    torch.testing.assert_close(found, objectives.aggregate(losses, mask, AGGREGATED.get(name, "token_mean")))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_keep_the_precision_they_are_given(name):
    log_probs, old, advantages, mask = batch()
    function, log_probs = getattr(objectives, name), log_probs.detach()
    exact = function(log_probs, old, advantages, mask, **extras(name, torch.float64))
    for dtype in (torch.float32, torch.bfloat16):
        found = function(log_probs.to(dtype), old.to(dtype), advantages.to(dtype), mask, **extras(name, dtype))
        assert found.dtype == dtype
        # A token at a clip's edge is on one side or the other in bfloat16.
        if dtype == torch.float32:
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    whole = function(log_probs, old, (5 * advantages).long(), mask, **extras(name, torch.float64))
    torch.testing.assert_close(whole, function(log_probs, old, (5 * advantages).trunc(), mask,
                                               **extras(name, torch.float64)))


def extras(name, dtype):
    asked = inspect.signature(getattr(objectives, name)).parameters
    return {key: x.to(dtype) for key, x in MOMENTS.items() if key in asked}


def test_padding_may_hold_anything():
    log_probs, old, advantages, mask = batch()
    for objective in LOSSES.values():
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_are_worth_exactly_nothing(dtype, scale):
    for reward in (100.1, 1.0, 1 / 3, 0.1, 2.3, -7e-5, 0.0):
        for count in (1, 3, 12, 13, 300):
            rewards = torch.tensor([reward] * count + [0.25, 0.75], dtype=torch.float64).to(dtype)
            groups = torch.cat([torch.full((count,), 7), torch.tensor([2, 2])])
            found = objectives.group_advantages(rewards, groups, scale)
            assert found.dtype == dtype and found[:count].tolist() == [0.0] * count
            worth = 0.5**0.5 if scale else 0.25
            assert found[count:].tolist() == pytest.approx([-worth, worth], rel=1e-2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_group_advantages_are_computed_in_float64(dtype, tolerance):
    """Rewards of about 100 with a deviation of 1: float32's own mean would cost four digits, bfloat16's all."""
    rewards = (100 + torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    groups = torch.arange(40) % 5
    found = objectives.group_advantages(rewards, groups)
    for group in range(5):
        own = rewards[groups == group].double()
        expected = (own - own.mean()) / (own.std() + 1e-6)
        torch.testing.assert_close(found[groups == group].double(), expected, rtol=tolerance, atol=tolerance)


def test_integer_rewards_are_converted():
    found = objectives.group_advantages(torch.tensor([1, 0, 0, 1]), torch.tensor([3, 3, 3, 3]), scale=False)
    assert found.dtype == torch.float32 and found.tolist() == [0.5, -0.5, -0.5, 0.5]


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
    with pytest.raises(ValueError, match="objective: expected one of grpo, .*bonus or an objectives.Objective"):
        objectives.find("ppo")


def test_what_is_not_finite_is_refused_inside_the_mask_and_only_there():
    log_probs, old, advantages, mask = batch()
    for objective in LOSSES.values():
        clean = objective(log_probs, old, advantages, mask)
        for bad in (math.nan, math.inf, -math.inf):
            torch.testing.assert_close(objective(log_probs, torch.where(mask, old, bad), advantages, mask), clean)
            for name, place in (("log_probs", 0), ("old_log_probs", 1), ("advantages", 2)):
                arguments = [log_probs.detach().clone(), old.clone(), advantages.clone()]
                arguments[place][2 if place == 2 else (2, 0)] = bad
                with pytest.raises(ValueError, match=f"^{name}: expected finite numbers"):
                    objective(*arguments, mask)
    losses = torch.where(mask, log_probs.detach(), math.nan)
    for how in objectives.AGGREGATIONS:
        assert torch.isfinite(objectives.aggregate(losses, mask, how))
        with pytest.raises(ValueError, match="losses: expected finite numbers inside the mask"):
            objectives.aggregate(torch.full_like(losses, math.nan), mask, how)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rewards: expected finite numbers"):
            objectives.group_advantages(torch.tensor([1.0, bad]), torch.zeros(2).long())


def test_rows_without_a_token_have_no_mean():
    log_probs, old, advantages, mask = batch()
    mask[3] = False
    with pytest.raises(ValueError, match="mask: expected a token in every row; row 3 has none"):
        objectives.gspo(log_probs, old, advantages, mask)
    losses = objectives.grpo(log_probs, old, advantages, mask)
    with pytest.raises(ValueError, match="mask: expected a token in every row; row 3 has none"):
        objectives.aggregate(losses, mask)
    assert torch.isfinite(objectives.aggregate(losses, mask, "token_mean"))
    assert torch.isfinite(objectives.aggregate(losses, mask, "constant"))
    with pytest.raises(ValueError, match="mask: expected a token to take the mean of, got none"):
        objectives.aggregate(losses, torch.zeros_like(mask), "token_mean")


@pytest.mark.parametrize("wrong, error", [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError),
                                          ("0.2", TypeError), (None, TypeError), ([0.2], TypeError)])
@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
def test_clips_are_numbers_from_zero_on(name, wrong, error):
    for objective in (objectives.grpo, objectives.dr_grpo, objectives.gspo):
        with pytest.raises(error, match=f"^{name}: expected a number ≥ 0, got"):
            objective(*batch(), **{name: wrong})


@pytest.mark.parametrize("wrong, error", [(0, ValueError), (-3, ValueError), (2.5, ValueError), (math.nan, ValueError),
                                          ("10", TypeError), (True, TypeError)])
def test_lengths_are_positive_integers(wrong, error):
    log_probs, _, _, mask = batch()
    with pytest.raises(error, match="^length: expected an integer ≥ 1, got"):
        objectives.aggregate(log_probs, mask, "constant", length=wrong)
    with pytest.raises(error, match="^length: expected an integer ≥ 1, got"):
        objectives.Objective(objectives.dr_grpo, "constant", length=wrong)


def test_numbers_of_numpy_are_welcome():
    log_probs, old, advantages, mask = batch()
    loose = objectives.grpo(log_probs, old, advantages, mask, np.float32(0.25), np.int64(1))
    torch.testing.assert_close(loose, objectives.grpo(log_probs, old, advantages, mask, 0.25, 1.0))
    assert objectives.Objective(objectives.grpo, "constant", length=np.int64(7)).length == 7


WRONG = (None, 3, "grpo", [1.0], {"a": 1}, np.ones(3))


def test_wrong_types_are_named():
    log_probs, old, advantages, mask = batch()
    right = {"log_probs": log_probs, "old_log_probs": old, "advantages": advantages, "mask": mask}
    for function in LOSSES.values():
        for name in right:
            for wrong in WRONG:
                with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got"):
                    function(**right | {name: wrong})
    for name in ("log_probs", "old_log_probs", "mask"):
        for wrong in WRONG:
            with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got"):
                objectives.sequence_ratio(**{k: right[k] for k in right if k != "advantages"} | {name: wrong})
    with pytest.raises(TypeError, match="^mask: expected booleans, got a float64 tensor"):
        objectives.grpo(log_probs, old, advantages, mask.double())
    with pytest.raises(TypeError, match="^old_log_probs: expected floating-point numbers, got a int64 tensor"):
        objectives.grpo(log_probs, old.long(), advantages, mask)
    for wrong in WRONG:
        with pytest.raises(TypeError, match="^losses: expected a tensor, got"):
            objectives.aggregate(wrong, mask)
        with pytest.raises(TypeError, match="^mask: expected a tensor, got"):
            objectives.aggregate(log_probs, wrong)
        with pytest.raises(TypeError, match="^rewards: expected a tensor, got"):
            objectives.group_advantages(wrong, torch.zeros(3).long())
        with pytest.raises(TypeError, match="^prompt_index: expected a tensor, got"):
            objectives.group_advantages(torch.ones(3), wrong)
        with pytest.raises(TypeError, match="^losses: expected a function such as objectives.grpo, got"):
            objectives.Objective(wrong)
        with pytest.raises(TypeError, match="^rollouts: expected a Rollouts, got"):
            objectives.find("grpo").loss(log_probs, old, wrong)
        error = ValueError if isinstance(wrong, (int, str)) else TypeError
        with pytest.raises(error, match="^how: expected one of sequence_mean"):
            objectives.aggregate(log_probs, mask, wrong)
        with pytest.raises(error, match="^aggregation: expected one of seq"):
            objectives.Objective(objectives.grpo, wrong)
    for wrong in (None, 3, [1.0], {"a": 1}):
        with pytest.raises(TypeError, match="^objective: expected one of grpo, .*bonus or an objectives.Obj"):
            objectives.find(wrong)
        with pytest.raises(TypeError, match="^scale: expected True or False, got"):
            objectives.Objective(objectives.grpo, scale=wrong)
        with pytest.raises(TypeError, match="^scale: expected True or False, got"):
            objectives.group_advantages(torch.ones(3), torch.zeros(3).long(), scale=wrong)
