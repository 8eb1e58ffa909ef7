"""Every objective in an update: the direction that it gives, the parts of that, and the step that is really taken."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch.optim import SGD, AdamW

import deltah as dh
from conftest import build_model
from deltah import objectives
from test_updates import relative_error, rollouts_for

# Bounds that choose some of a small batch's tokens.
SETTINGS = {
    "clip_cov": dict(losses=functools.partial(objectives.clip_cov, fraction=0.1, covariance_low=0.0)),
    "kl_cov": dict(losses=functools.partial(objectives.kl_cov, fraction=0.1)),
    "clip_b": dict(dropped=functools.partial(objectives.clip_b_tokens, threshold=0.5)),
    "clip_v": dict(dropped=functools.partial(objectives.clip_v_tokens, threshold=0.3, fraction=0.1)),
    "entropy_bonus": dict(losses=functools.partial(objectives.entropy_bonus, beta=0.3)),
}


@functools.cache
def policy():
    return dh.exact.exact_policy(build_model("qwen2", 11))


def case(name):
    """An objective, rollouts, and log-probs of an older policy, so that some tokens are clipped."""
    objective, rollouts = replace(objectives.find(name), **SETTINGS.get(name, {})), rollouts_for(11)
    with torch.no_grad():
        old = dh.score(policy(), rollouts).log_probs
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return objective, rollouts, (old + 0.3 * noise) * rollouts.response_mask


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_direction_is_the_real_step_and_the_sum_of_its_rollouts(name):
    objective, rollouts, old = case(name)
    direct = functools.partial(dh.update_direction, policy(), rollouts, objective, old_log_probs=old, seed=3,
                               max_gradient_norm=0.1)
    optimizer = AdamW(policy().parameters.values(), lr=0.01, weight_decay=0.1)
    direction = direct(optimizer=optimizer)
    assert relative_error(direct(optimizer=optimizer, batch_size=5).vector, direction.vector) < 1e-12
    summed = {n: torch.zeros_like(v) for n, v in direction.vector.items()}
    for i in range(len(rollouts)):
        summed = {n: summed[n] + part for n, part in direction.per_rollout(i).items()}
    assert relative_error(summed, direction.parts["rollouts"]) < 1e-11
    assert bool(direction.entropy_weights.any()) == (name == "entropy_bonus")
    trained = dh.Policy(copy.deepcopy(policy().model))
    optimizer = AdamW(trained.parameters.values(), lr=0.01, weight_decay=0.1)
    dh.training.policy_gradient_step(trained, rollouts, old, objective, optimizer, 0.1, seed=3)
    real = {n: (p.detach() - policy().parameters[n].detach()) / 0.01 for n, p in trained.parameters.items()}
    assert relative_error(direction.vector, real) < 1e-12


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_causes_sum_to_the_entropy_change(name):
    objective, rollouts, old = case(name)
    optimizer = AdamW(policy().parameters.values(), lr=0.01, weight_decay=0.1)
    direction = dh.update_direction(policy(), rollouts, objective, optimizer, old_log_probs=old)
    others = rollouts_for(11, seed=1)
    change = dh.entropy_change(policy(), others, direction, baseline="entropy")
    causes = dh.attribution(policy(), others, direction, change)
    assert float(causes.tokens.sum()) + causes.momentum + causes.weight_decay == pytest.approx(change.value, rel=1e-9)
    # A rollout's share is that of its own part of the direction.
    own = dh.entropy_change(policy(), others, direction.per_rollout(4), baseline="entropy")
    assert float(causes.tokens[4].sum()) == pytest.approx(own.value, rel=1e-9)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "clip_b", "clip_v"])
def test_tokens_chosen_by_the_caller_are_those_treated_apart(name):
    objective, rollouts, old = case(name)
    optimizer = SGD(policy().parameters.values(), lr=0.1)
    tokens = rollouts.response_mask & (torch.arange(6) == 1)
    direct = functools.partial(dh.update_direction, policy(), rollouts, optimizer=optimizer, old_log_probs=old)
    weights = direct(objective=objective, selected=tokens).token_weights
    plain = direct(objective=replace(objective, losses=objectives.grpo, dropped=None)).token_weights
    count = rollouts.response_mask.sum()
    if name == "kl_cov":
        with torch.no_grad():
            ratio = dh.score(policy(), rollouts).log_probs - old
        plain = direct(objective=objectives.Objective(functools.partial(objectives.grpo, clip_low=1.0, clip_high=9.0),
                                                      "token_mean")).token_weights
        expected = plain - tokens * ratio.sign() / count
    else:
        expected = torch.where(tokens, 0.0, plain)
    if name in ("clip_b", "clip_v"):
        expected = expected * count / (count - tokens.sum())
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-15)
    trained = dh.Policy(copy.deepcopy(policy().model))
    loss = functools.partial(dh.training.policy_gradient_step, trained, rollouts, old, objective,
                             SGD(trained.parameters.values(), lr=1e-9))
    assert loss(selected=tokens) != loss()


def test_an_entropy_bonus_raises_the_entropy_and_its_part_is_found():
    """With A = 0 nothing else moves: the step climbs the entropy at the sampled prefixes."""
    _, rollouts, _ = case("entropy_bonus")
    objective = objectives.find("entropy_bonus")
    direction = dh.update_direction(policy(), rollouts.replace(advantages=torch.zeros(12)), objective,
                                    SGD(policy().parameters.values(), lr=0.1))
    assert not direction.token_weights.any()
    expected = 0.005 * rollouts.response_mask.double() / rollouts.response_mask.sum()
    torch.testing.assert_close(direction.entropy_weights, expected)
    entropies = dh.score(policy(), rollouts).entropies
    slopes = torch.autograd.grad((expected * entropies).sum(), list(policy().parameters.values()))
    assert relative_error(direction.vector, dict(zip(policy().parameters, slopes, strict=True))) < 1e-12
