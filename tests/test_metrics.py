"""What a training run records, against enumeration, brute force over the vocabulary, and counts by hand."""

import copy
import functools
import itertools
import math

import pytest
import torch

import deltah as dh
from conftest import build_model, random_rollouts
from deltah import exact, metrics, objectives


def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k():
    rewards = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0.6, 0.5, -1])
    prompts = torch.tensor([3] * 6 + [1] * 6 + [2] * 6)
    for k in range(1, 7):
        values = []
        for prompt in (3, 1, 2):
            passed = (rewards[prompts == prompt] > 0.5).tolist()
            draws = list(itertools.combinations(passed, k))
            values.append(sum(map(any, draws)) / len(draws))
        found = metrics.pass_at_k(rewards, prompts, k)
        assert found.value == pytest.approx(sum(values) / 3, abs=1e-12)
        assert found.standard_error == pytest.approx(torch.tensor(values).std().item() / math.sqrt(3), abs=1e-6)
    with pytest.raises(ValueError, match="^k: expected at most the 6 responses"):
        metrics.pass_at_k(rewards, prompts, 7)
    with pytest.raises(ValueError, match="at most the 1 responses"):
        metrics.pass_at_k(rewards[:7], prompts[:7], 2)


@pytest.mark.parametrize("architecture", ["llama", "granite", "gemma2", "gpt2"])
def test_kl_is_the_sum_over_the_vocabulary(architecture, monkeypatch):
    policy = dh.Policy(build_model(architecture, 11, torch.float64))
    reference = {n: 1.05 * p.detach() + 0.01 for n, p in policy.parameters.items()}
    rollouts = random_rollouts(11, 6, prompt=4, response=5, temperature=0.7)
    totals = torch.zeros(6, dtype=torch.float64)
    for i in range(6):
        ids = rollouts.input_ids[i, rollouts.attention_mask[i]][None]
        length = int(rollouts.lengths[i])
        log_p, log_q = ((policy.logits(ids, length + 1, theta)[0, :-1] / 0.7).log_softmax(-1).detach()
                        for theta in (None, reference))
        totals[i] = (log_p.exp() * (log_p - log_q)).sum()
    expected = dh.Estimate.ratio(totals, rollouts.lengths.double(), rollouts.prompt_index)
    # In pieces of two places as well as at once.
    for numbers in (metrics.NUMBERS_AT_ONCE, 22):
        monkeypatch.setattr(metrics, "NUMBERS_AT_ONCE", numbers)
        found = metrics.kl_per_token(policy, reference, rollouts, batch_size=4)
        assert found.value == pytest.approx(expected.value, rel=1e-6) and found.value > 1e-3
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-5)
    own = {n: p.detach() for n, p in policy.parameters.items()}
    assert metrics.kl_per_token(policy, own, rollouts).value == 0


def test_kl_of_tokens_without_probability_is_finite():
    policy = exact.tiny_policy(4, context_length=8)
    forward = policy.model.forward

    def without_the_first(*arguments, **more):
        output = forward(*arguments, **more)
        output.logits = output.logits.clone()
        output.logits[..., 0] = -torch.inf
        return output

    policy.model.forward = without_the_first
    rollouts = random_rollouts(3, 4, prompt=2, response=3)
    rollouts = rollouts.replace(input_ids=rollouts.input_ids + 1)
    reference = {n: 1.1 * p.detach() for n, p in policy.parameters.items()}
    assert 0 < metrics.kl_per_token(policy, reference, rollouts).value < 10


def test_of_rollouts_counts_prompts_as_samples(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(4)), 3, 30)
    with torch.no_grad():
        scores = dh.score(shipped, rollouts)
    found = metrics.of_rollouts(rollouts, scores)
    rewards = rollouts.rewards.view(4, 3).double()
    assert found["reward"] == pytest.approx(rewards.mean().item())
    assert found["reward_error"] == pytest.approx(rewards.mean(1).std().item() / 2)
    assert found["pass_at_3"] == pytest.approx((rewards.max(1).values).mean().item())
    assert found["length"] == pytest.approx(rollouts.lengths.double().mean().item())
    assert found["entropy"] == pytest.approx((scores.entropies.sum() / rollouts.response_mask.sum()).item(), rel=1e-6)
    assert list(found)[:6] == ["reward", "reward_error", "pass_at_1", "pass_at_1_error", "pass_at_3", "pass_at_3_error"]


def clipping_case():
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    ratio = torch.tensor([[1.5, 0.5, 1.1, 1.3], [1.5, 0.5, 0.7, 9.0], [0.5, 2.0, 1.0, 1.0]])
    ids = torch.zeros(3, 6, dtype=torch.long)
    rollouts = dh.Rollouts(ids, torch.cat([torch.ones(3, 2, dtype=torch.bool), mask], 1), mask, torch.arange(3),
                           advantages=torch.tensor([1.0, -2.0, 0.0]))
    old = torch.full((3, 4), -1.0)
    return rollouts, (old + ratio.log()).requires_grad_(), old


def test_clip_fractions_are_ppos_by_side():
    rollouts, log_probs, old = clipping_case()
    objective = objectives.find("grpo")
    seeing, seen = metrics.watched(objective)
    loss = seeing.loss(log_probs, old, rollouts)
    assert loss == objective.loss(log_probs, old, rollouts)
    (own,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    (plain,) = torch.autograd.grad(objective.loss(log_probs, old, rollouts), log_probs)
    assert torch.equal(own, plain)
    found = metrics.clip_fractions([rollouts], seen)
    # Of eleven tokens: A > 0 with r of 1.5 and 1.3, A < 0 with r of 0.5 and 0.7; those of A = 0 do not count.
    assert found == {"clipped_positive_below": 0, "clipped_positive_above": pytest.approx(2 / 11),
                     "clipped_negative_below": pytest.approx(2 / 11), "clipped_negative_above": 0}
    twice = metrics.clip_fractions([rollouts, rollouts.select([0])], [seen[0], tuple(x[:1] for x in seen[0])])
    assert twice["clipped_positive_above"] == pytest.approx(4 / 15)


def test_a_watched_objective_keeps_what_a_partial_has_set():
    rollouts, log_probs, old = clipping_case()
    objective = objectives.Objective(functools.partial(objectives.grpo, clip_high=0.35), "token_mean", scale=False)
    seeing, seen = metrics.watched(objective)
    assert seeing.loss(log_probs, old, rollouts) == objective.loss(log_probs, old, rollouts)
    assert (seeing.aggregation, seeing.scale) == ("token_mean", False)
    assert metrics.clip_fractions([rollouts], seen)["clipped_positive_above"] == pytest.approx(1 / 11)


def test_a_watched_objective_may_have_arguments_ahead_of_the_log_probs():
    def times(factor, *given):
        return factor * objectives.grpo(*given)

    rollouts, log_probs, old = clipping_case()
    seeing, seen = metrics.watched(objectives.Objective(functools.partial(times, 2.0)))
    assert seeing.loss(log_probs, old, rollouts) == 2 * objectives.find("grpo").loss(log_probs, old, rollouts)
    assert metrics.clip_fractions([rollouts], seen)["clipped_positive_above"] == pytest.approx(2 / 11)


def test_tokens_that_a_loss_leaves_out_count_on_the_side_of_their_ratio():
    rollouts, log_probs, old = clipping_case()

    def none_of_the_first(log_probs, old_log_probs, advantages, mask):
        return torch.where(mask & (torch.arange(4) > 1), -(log_probs - old_log_probs).exp() * advantages[:, None], 0.0)

    seeing, seen = metrics.watched(objectives.Objective(none_of_the_first))
    seeing.loss(log_probs, old, rollouts)
    found = metrics.clip_fractions([rollouts], seen)
    # Of the first two tokens of each row, with A > 0 or A < 0.
    assert list(found.values()) == pytest.approx([1 / 11] * 4)


def test_tokens_that_leave_the_mask_count_too():
    rollouts, log_probs, old = clipping_case()
    left_out = torch.tensor([[False] * 4, [False, False, True, False], [True] * 4])
    objective = objectives.Objective(objectives.grpo, "token_mean",
                                     dropped=lambda log_probs, advantages, mask: left_out)
    seeing, seen = metrics.watched(objective)
    assert seeing.loss(log_probs, old, rollouts) == objective.loss(log_probs, old, rollouts)
    # Row 1's third token has r = 0.7, which PPO clips anyway; its second, r = 0.5, is clipped alone.
    assert metrics.clip_fractions([rollouts], seen)["clipped_negative_below"] == pytest.approx(2 / 11)
    inside, seen = metrics.watched(objective)
    inside.loss((old + 0.1).requires_grad_(), old, rollouts)
    assert metrics.clip_fractions([rollouts], seen)["clipped_negative_above"] == pytest.approx(1 / 11)


def test_a_watched_objective_is_given_what_it_asks_for():
    for name, objective in objectives.OBJECTIVES.items():
        seeing, _ = metrics.watched(objective)
        assert seeing.needs == objective.needs and seeing.moments == objective.moments, name
    drawn = objectives.Objective(functools.partial(objectives.clip_cov, seed=3), "token_mean")
    assert metrics.watched(drawn)[0].needs == drawn.needs == ("selected",)


@pytest.fixture(scope="module")
def moved():
    """An enumerable policy that has moved, and exactly: the change of its entropy per token, and its first order."""
    policy = exact.tiny_policy(4, eos_token_id=3, context_length=8, seed=2)
    every = exact.every_response(policy, [[0], [1, 2]], max_new_tokens=4)
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    generator = torch.Generator().manual_seed(5)

    def parts(theta, weights_of, entropies_of):
        """E[Σ H_k] / E[L], with the probabilities of one policy and the entropies of another."""
        weights = exact.probabilities(dh.score(policy, every, weights_of or theta))
        entropies = dh.score(policy, every, entropies_of or theta).entropies.sum(1)
        return (weights @ entropies) / (weights @ every.lengths.double())

    own = list(policy.parameters.values())
    in_full, direct = (torch.autograd.grad(parts(None, fixed, None), own) for fixed in (None, before))
    delta = dict(zip(before, (-0.02 * g for g in in_full), strict=True))
    slopes = [sum(float((g * d).sum()) for g, d in zip(gradient, delta.values(), strict=True))
              for gradient in (in_full, direct)]
    with torch.no_grad():
        weights = exact.probabilities(dh.score(policy, every, before))
        after = {n: before[n] + delta[n] for n in before}
        change = (parts(after, None, None) - parts(before, None, None)).item()
    rows = torch.multinomial(weights / weights.sum(), 6000, replacement=True, generator=generator)
    rollouts = every.select(rows).replace(prompt_index=torch.arange(6000))
    metrics.put(policy, after)
    return policy, before, after, rollouts, (*slopes, change)


@pytest.mark.parametrize("collapsed", [False, True])
def test_prediction_and_measurement_of_a_step_are_the_exact_ones(moved, collapsed, monkeypatch):
    policy, before, after, rollouts, exact_ones = moved
    if collapsed:
        monkeypatch.setattr("deltah.measurement.COLLAPSED", 1.1)
    found = metrics.of_step(policy, before, rollouts, 4, seed=1, batch_size=None)
    assert found["measured_by"] == ("coupled" if collapsed else "importance")
    for name, value in zip(("predicted", "predicted_direct", "measured"), exact_ones, strict=True):
        assert abs(found[name] - value) < 4 * found[f"{name}_error"]
        # No other of them, nor zero, would do.
        for rival in {0.0, *exact_ones} - {value}:
            assert abs(found[name] - rival) > 6 * found[f"{name}_error"]
    assert all(torch.equal(p, after[n]) for n, p in policy.parameters.items())


def test_prediction_and_measurement_stand_on_different_rollouts(moved):
    policy, before, _, rollouts, _ = moved
    halves = [torch.arange(50), torch.arange(50, 100)]
    one, other = (metrics.of_step(policy, before, rollouts.select(torch.cat([halves[0], second])), 4, 1, None)
                  for second in (halves[1], halves[1] + 50))
    assert one["predicted"] == other["predicted"] and one["measured"] != other["measured"]


def test_an_error_on_the_way_leaves_the_policy_after_the_step(moved, monkeypatch):
    policy, before, after, rollouts, _ = moved
    monkeypatch.setattr(metrics, "measured_entropy_change", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metrics.of_step(policy, before, rollouts.select(slice(40)), 4, 1, None)
    assert all(torch.equal(p, after[n]) for n, p in policy.parameters.items())


def test_a_step_of_a_bfloat16_policy_is_measured():
    policy = dh.Policy(build_model("llama", 11, torch.bfloat16))
    before = copy.deepcopy({n: p.detach() for n, p in policy.parameters.items()})
    metrics.put(policy, {n: 1.02 * p for n, p in before.items()})
    rollouts = random_rollouts(11, 40, prompt=3, response=4).replace(prompt_index=torch.arange(40))
    found = metrics.of_step(policy, before, rollouts, 4, 0, None)
    assert found["predicted"] * found["measured"] > 0 and math.isfinite(found["predicted_error"])
