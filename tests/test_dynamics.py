"""Predicted entropy changes against exact derivatives, found another way: enumeration and reverse mode."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import deltah as dh
from conftest import CONFIGS, StraightThrough, build_model
from deltah import dynamics
from deltah.baselines import _ridge
from test_updates import low_rank_policy, peft_policy, rollouts_for

PROMPTS = [[0], [1, 2, 0], [2, 2]]


def random_direction(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for n, p in
            policy.parameters.items()}


def along(policy, v, function, order):
    """Derivatives of function(θ + ηv) at η = 0, by reverse mode."""
    own, step = policy.shifted(v, 0.0), torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = function({n: own[n] + step * v[n] for n in own})
    for _ in range(order):
        (value,) = torch.autograd.grad(value, step, create_graph=True)
    return value.item()


@pytest.fixture(scope="module", params=[*sorted(CONFIGS), "low rank"])
def enumerated(request):
    """An exact policy with EOS, all its responses at a temperature, and a direction small enough for its routers."""
    if request.param == "low rank":
        policy = dh.exact.exact_policy(low_rank_policy(4).model)
    else:
        policy = dh.exact.exact_policy(build_model(request.param, 4))
    policy.model.config.eos_token_id = 3
    return policy, dh.exact.every_response(policy, PROMPTS, 4, temperature=0.7), random_direction(policy)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("baseline", ["none", "entropy"])
def test_expectation_is_the_exact_derivative(enumerated, order, baseline):
    policy, every, v = enumerated

    def entropy(parameters):
        log_probs = dh.score(policy, every, parameters).log_probs.sum(1)
        return -(log_probs.exp() * log_probs).sum() / len(PROMPTS)

    with torch.no_grad():
        weights = dh.exact.probabilities(dh.score(policy, every)) / len(PROMPTS)
    change = dh.entropy_change(policy, every, v, order, "sequence", baseline)
    assert float(weights @ change.contributions) == pytest.approx(along(policy, v, entropy, order), rel=1e-9)
    assert float(weights @ change.token_contributions.sum(1)) == pytest.approx(float(weights @ change.contributions))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_value_is_the_derivative_of_the_reweighted_entropy_of_the_same_rollouts(enumerated, order, per):
    policy, every, v = enumerated
    rollouts = every.select(torch.randint(0, len(every), (40,), generator=torch.Generator().manual_seed(1)))
    mask = rollouts.response_mask.double()
    with torch.no_grad():
        before = dh.score(policy, rollouts).log_probs

    def entropy(parameters):
        log_probs, entropies = dh.score(policy, rollouts, parameters)
        ratios = log_probs - before
        weights = (ratios.cumsum(1) - ratios).exp()      # of the tokens before k
        return (weights * entropies).sum() / ((weights * mask).sum() if per == "token" else len(rollouts))

    change = dh.entropy_change(policy, rollouts, v, order, per, baseline="entropy")
    assert change.value == pytest.approx(along(policy, v, entropy, order), rel=1e-9)
    assert float(change.token_contributions.sum() / len(rollouts)) == pytest.approx(change.value, rel=1e-9)
    assert float(change.contributions.mean()) == pytest.approx(change.value, rel=1e-9)


def test_order_two_is_right_through_a_fused_layer_norm():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=16, n_layer=2, n_head=2, n_positions=16,
                                       initializer_range=0.4, bos_token_id=None, eos_token_id=None)).double()
    policy, rollouts = dh.Policy(model), rollouts_for(5)
    v = random_direction(policy)
    ours = dh.entropy_change(policy, rollouts, v, 2, "sequence", "entropy").value
    written_out = dh.exact.exact_policy(copy.deepcopy(model))
    assert ours == pytest.approx(dh.entropy_change(written_out, rollouts, v, 2, "sequence", "entropy").value, rel=1e-4)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_fitted_baselines_agree_with_the_others_and_lower_the_variance(shipped, problems, per):
    """Takes long: three derivatives of the real policy, over as many prompts as the ratio of two variances needs."""
    update = dh.sample(shipped, problems.select(range(1000, 1024)), 8, seed=1)
    evaluation = dh.sample(shipped, problems.select(range(640)), 1, seed=2)
    optimizer = torch.optim.SGD(shipped.parameters.values(), lr=0.1)
    direction = dh.update_direction(shipped, update, optimizer=optimizer)
    changes = {b: dh.entropy_change(shipped, evaluation, direction, per=per, baseline=b)
               for b in ("entropy", "running_mean", "regression")}
    for name in ("running_mean", "regression"):
        difference = dh.Estimate.mean(changes[name].contributions - changes["entropy"].contributions)
        assert abs(difference.value) < 4 * difference.standard_error
    ratio = (changes["entropy"].score_term.standard_error / changes["regression"].score_term.standard_error) ** 2
    # Per token there is little for a baseline to take (chapter 06); it must not do harm.
    assert ratio > (3 if per == "sequence" else 0.9)


@pytest.mark.parametrize("order, baseline", [(1, "regression"), (1, "running_mean"), (2, "entropy"), (2, "regression")])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_intervals_cover_the_exact_derivative(order, baseline, per, monkeypatch):
    """Takes long where a baseline is fitted, once for each of 400 replicates: what sees 95% to within two points."""
    policy = dh.exact.tiny_policy(4, eos_token_id=3, seed=1)
    every, v = dh.exact.every_response(policy, PROMPTS, 4, temperature=0.7), random_direction(policy, 3)
    with torch.no_grad():
        weights = dh.exact.probabilities(dh.score(policy, every)) / len(PROMPTS)

    def entropy(parameters):
        log_probs, entropies = dh.score(policy, every, parameters)
        p = log_probs.sum(1).exp() / len(PROMPTS)
        return (p * entropies.sum(1)).sum() / ((p * every.lengths).sum() if per == "token" else 1.0)

    truth = along(policy, v, entropy, order)
    # Derivatives of all responses once; a replicate is a draw of rows.
    whole = dynamics._derivatives(policy, every, v, order, "regression", None)
    generator, covered, values, replicates = torch.Generator().manual_seed(0), 0, [], 400
    for _ in range(replicates):
        rows = torch.multinomial(weights, 800, replacement=True, generator=generator)
        drawn = dynamics._Derivatives(*(None if x is None else x[rows] for x in whole))
        monkeypatch.setattr(dynamics, "_derivatives", lambda *_, drawn=drawn: drawn)
        rollouts = every.select(rows).replace(prompt_index=torch.arange(len(rows)))
        change = dh.entropy_change(policy, rollouts, v, order, per, baseline)
        low, high = change.interval()
        covered += low <= truth <= high
        values.append(change.value)
    # 400 replicates see a true 95% within 2.2 points, twice their standard error.
    assert 0.925 <= covered / replicates <= 0.975
    spread = torch.tensor(values).std() / math.sqrt(replicates)
    assert abs(sum(values) / replicates - truth) < 4 * spread


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_causes_sum_to_the_whole(per):
    policy = dh.exact.exact_policy(build_model("qwen2", 11))
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=0.01, weight_decay=0.1)
    with torch.no_grad():
        old = dh.score(policy, rollouts_for(11, seed=7)).log_probs
    dh.training.policy_gradient_step(policy, rollouts_for(11, seed=7), old, "grpo", optimizer)
    update, evaluation = rollouts_for(11, seed=1), rollouts_for(11, prompts=6, seed=2)
    direction = dh.update_direction(policy, update, optimizer=optimizer, max_gradient_norm=0.3)
    change = dh.entropy_change(policy, evaluation, direction, per=per)
    causes = dh.attribution(policy, evaluation, direction, change)
    assert float(causes.tokens.sum()) + causes.momentum + causes.weight_decay == pytest.approx(change.value, rel=1e-9)
    # A rollout's share is the change along its own part of the direction, at the same score weights.
    own = dynamics._derivatives(policy, evaluation, direction.per_rollout(3), 1, "none", None)
    share = (change.score_weights * own.scores_1 + change.entropy_weight * own.entropies_1).sum()
    assert float(causes.tokens[3].sum()) == pytest.approx(float(share), rel=1e-9)
    decay = dynamics._derivatives(policy, evaluation, direction.parts["weight_decay"], 1, "none", None)
    share = (change.score_weights * decay.scores_1 + change.entropy_weight * decay.entropies_1).sum()
    assert causes.weight_decay == pytest.approx(float(share), rel=1e-9)


@pytest.mark.parametrize("inside", [False, True])
def test_causes_sum_to_the_whole_within_the_rounding_of_autocast(inside):
    """Around the call, or around the model's forward, where Accelerate puts it."""
    model, evaluation = build_model("qwen2", 50), rollouts_for(50, prompts=6, seed=2)
    if inside:
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    policy = dh.Policy(model)
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        direction = dh.update_direction(policy, rollouts_for(50), optimizer=optimizer)
        change = dh.entropy_change(policy, evaluation, direction)
        causes = dh.attribution(policy, evaluation, direction, change)
    size = float(causes.tokens.abs().sum())
    assert 1e-4 * size < abs(float(causes.tokens.sum()) - change.value) < 0.04 * size


@pytest.mark.parametrize("order", [1, 2])
def test_batches_do_not_change_the_result(shipped, problems, order):
    rollouts = dh.sample(shipped, problems.select(range(12)), 2)
    v = {n: 1e-3 * x for n, x in random_direction(shipped).items()}
    whole, split = (dh.entropy_change(shipped, rollouts, v, order, baseline="entropy", batch_size=size)
                    for size in (None, 5))
    assert split.value == pytest.approx(whole.value, rel=1e-3)
    assert torch.allclose(split.contributions, whole.contributions, rtol=1e-2, atol=1e-2 * whole.standard_error)


def test_the_model_is_left_as_it_was(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(6)), 1)
    before = {n: p.detach().clone() for n, p in shipped.parameters.items()}
    attention = shipped.model.config._attn_implementation
    dh.entropy_change(shipped, rollouts, random_direction(shipped))
    assert shipped.model.config._attn_implementation == attention
    assert all(torch.equal(before[n], p) and p.grad is None and p.requires_grad for n, p in shipped.parameters.items())


def test_bfloat16_parameters_give_about_the_same(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(32)), 1)
    half = dh.Policy(copy.deepcopy(shipped.model).bfloat16(), shipped.tokenizer)
    update = dh.sample(shipped, problems.select(range(100, 108)), 8)
    direction = dh.update_direction(shipped, update, optimizer=torch.optim.SGD(shipped.parameters.values(), lr=0.1))
    exact, rough = (dh.entropy_change(p, rollouts, direction.vector, baseline="entropy") for p in (shipped, half))
    with pytest.raises(ValueError, match="policy: its parameters have changed since this direction was made"):
        # Rounded, they are others.
        dh.entropy_change(half, rollouts, direction)
    assert rough.contributions.dtype == torch.float64
    assert rough.value == pytest.approx(exact.value, rel=0.1, abs=exact.standard_error / 2)


def test_a_direction_of_zero_changes_nothing(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(6)), 1)
    still = {n: torch.zeros_like(p) for n, p in shipped.parameters.items()}
    for order in (1, 2):
        change = dh.entropy_change(shipped, rollouts, still, order)
        assert change.value == 0 and change.standard_error == 0


def test_bad_input_is_named(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(6)), 1)
    v = random_direction(shipped)
    name = next(iter(v))
    for wrong in (v[name].to_sparse(), v[name].to("meta")):
        with pytest.raises(TypeError, match=rf"direction\['{name}'\]: expected a dense tensor with values, got torch"):
            dh.entropy_change(shipped, rollouts, {name: wrong})
    for arguments, message in (
            (dict(order=3), "order: expected one of 1, 2, got 3"),
            (dict(per="word"), "per: expected one of sequence, token, got 'word'"),
            (dict(baseline="mean"), "baseline: expected one of none, entropy, running_mean, regression, got 'mean'"),
            (dict(batch_size=0), "batch_size: expected an integer ≥ 1, got 0")):
        with pytest.raises(ValueError, match=message):
            dh.entropy_change(shipped, rollouts, v, **arguments)
    with pytest.raises(ValueError, match="rollouts: expected at least 5, as the baseline of one is fitted on others"):
        dh.entropy_change(shipped, rollouts.select(slice(0, 4)), v)
    with pytest.raises(ValueError, match=r"direction\['no such'\]: expected the name of a trainable parameter"):
        dh.entropy_change(shipped, rollouts, v | {"no such": torch.ones(2)})
    with pytest.raises(ValueError, match=r"direction\[.*\]: expected finite numbers"):
        dh.entropy_change(shipped, rollouts, v | {name: torch.full_like(v[name], torch.nan)})
    optimizer = torch.optim.SGD(shipped.parameters.values(), lr=0.1)
    direction = dh.update_direction(shipped, rollouts_for(shipped.vocabulary_size), optimizer=optimizer)
    with pytest.raises(ValueError, match="change: expected one of order 1 of these rollouts"):
        dh.attribution(shipped, rollouts, direction, dh.entropy_change(shipped, rollouts, direction, 2))


def test_changes_know_what_they_are_of():
    policy = dh.exact.exact_policy(build_model("llama", 11))
    update, evaluation = rollouts_for(11, seed=1), rollouts_for(11, prompts=6, seed=2)
    direction, plain = (dh.update_direction(policy, update, optimizer=o) for o in (
        torch.optim.AdamW(policy.parameters.values(), lr=0.01), torch.optim.SGD(policy.parameters.values(), lr=0.01)))
    change = functools.partial(dh.entropy_change, policy, baseline="entropy")
    first, second = (change(evaluation, direction, order) for order in (1, 2))
    # Padding, rewards, explicit zeros and another dtype change nothing.
    ids = torch.where(evaluation.attention_mask, evaluation.input_ids, 3)
    frozen = {n: v if "norm" in n else torch.zeros_like(v) for n, v in direction.vector.items()}
    same = change(evaluation.replace(input_ids=ids, rewards=None), direction.vector, 2)
    assert (same.of_policy, same.of_rollouts, same.of_direction) == (
        first.of_policy, first.of_rollouts, first.of_direction)
    alone = {n: v.double() for n, v in frozen.items() if v.any()}
    assert change(evaluation, frozen).of_direction == change(evaluation, alone).of_direction
    eta = dh.critical_learning_rate(first, second)
    assert eta.covariance != 0

    others = {
        "temperature": evaluation.replace(temperature=1.1),
        "tokens": evaluation.replace(input_ids=(evaluation.input_ids + 1) % 11),
        "prompts": evaluation.replace(prompt_index=torch.arange(len(evaluation))),
        "order": evaluation.select(torch.arange(len(evaluation)).flip(0)).replace(prompt_index=evaluation.prompt_index),
    }
    for other in others.values():
        # "Same prompts" is not "same rollouts": their errors are independent.
        assert dh.critical_learning_rate(first, change(other, direction, 2)).covariance == 0
        with pytest.raises(ValueError, match="change: expected one of these rollouts, got another's"):
            dh.attribution(policy, other, direction, first)
    with pytest.raises(ValueError, match="change: expected one along this direction, got another's"):
        dh.attribution(policy, evaluation, plain, first)
    with pytest.raises(ValueError, match="first: expected an entropy change of order 1, got one of order 2"):
        dh.critical_learning_rate(second, first)
    with pytest.raises(ValueError, match="second: expected an entropy change of order 2, got one of order 1"):
        dh.critical_learning_rate(first, first)
    with pytest.raises(ValueError, match="second: expected an entropy change of order 2, got one of order 1"):
        dh.critical_learning_rate(dh.Estimate(1.0, 0.1, 9), first)
    with pytest.raises(ValueError, match="second: expected an entropy change with the first's `per`, token, got seq"):
        dh.critical_learning_rate(first, change(evaluation, direction, 2, per="sequence"))
    with pytest.raises(ValueError, match="second: expected an entropy change with the first's `of_direction`"):
        dh.critical_learning_rate(first, change(evaluation, plain, 2))
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(1.1)
    elsewhere = change(evaluation, direction.vector, 2)
    with pytest.raises(ValueError, match="second: expected an entropy change with the first's `of_policy`"):
        dh.critical_learning_rate(first, elsewhere)
    here = dh.update_direction(policy, update, optimizer=torch.optim.SGD(policy.parameters.values(), lr=0.01))
    again = dataclasses.replace(first, of_direction=change(evaluation, here).of_direction)
    with pytest.raises(ValueError, match="change: expected one at the policy's parameters, got another's"):
        dh.attribution(policy, evaluation, here, again)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_derivatives_that_are_no_numbers_have_no_critical_learning_rate(bad):
    good = dh.Estimate(1.0, 0.1, 9)
    for name, pair in (("first", (dh.Estimate(bad, 0.1, 9), good)), ("second", (good, dh.Estimate(bad, 0.1, 9))),
                       ("second", (good, dh.Estimate(1.0, abs(bad), 9)))):
        with pytest.raises(ValueError, match=f"^{name}: expected a finite derivative and error, got"):
            dh.critical_learning_rate(*pair)
    unknown = dh.critical_learning_rate(dh.Estimate(1.0, math.nan, 1), good)
    assert math.isnan(unknown.standard_error) and unknown.interval() == (0, math.inf)


WRONG = (None, 3, "v", [1.0], {"a": 1}, np.ones(3))


def test_wrong_types_are_named(shipped, problems):
    rollouts, v = dh.sample(shipped, problems.select(range(6)), 1, 4), random_direction(shipped)
    optimizer = torch.optim.SGD(shipped.parameters.values(), lr=0.1)
    direction = dh.update_direction(shipped, rollouts, optimizer=optimizer)
    change = dh.entropy_change(shipped, rollouts, direction)
    right = {"policy": shipped, "rollouts": rollouts, "direction": direction, "change": change}
    for wrong in WRONG:
        for name, expected in (("policy", "a Policy"), ("rollouts", "a Rollouts"), ("direction", "a Direction")):
            if not (name == "direction" and isinstance(wrong, dict)):
                with pytest.raises(TypeError, match=f"^{name}: expected {expected}"):
                    dh.entropy_change(**{k: right[k] for k in right if k != "change"} | {name: wrong})
            with pytest.raises(TypeError, match=f"^{name}: expected {expected}"):
                dh.attribution(**right | {name: wrong})
        with pytest.raises(TypeError, match="^change: expected a EntropyChange, got"):
            dh.attribution(**right | {"change": wrong})
        with pytest.raises(TypeError, match="^first: expected an entropy change or another Estimate, got"):
            dh.critical_learning_rate(wrong, change)
        with pytest.raises(TypeError, match="^second: expected an entropy change or another Estimate, got"):
            dh.critical_learning_rate(change, wrong)
    name = next(iter(v))
    for wrong in (None, 3, [1.0], np.ones(3)):
        with pytest.raises(TypeError, match=rf"^direction\['{name}'\]: expected a tensor, got"):
            dh.entropy_change(shipped, rollouts, v | {name: wrong})
    with pytest.raises(TypeError, match=r"^direction\[.*\]: expected floating-point numbers, got a int64 tensor"):
        dh.entropy_change(shipped, rollouts, v | {name: torch.ones_like(v[name], dtype=torch.long)})
    for argument in ("order", "per", "baseline"):
        for wrong in (None, [1], {"a": 1}, 1.0, True):
            with pytest.raises(TypeError, match=f"^{argument}: expected one of"):
                dh.entropy_change(shipped, rollouts, v, **{argument: wrong})
    for wrong in ("4", [4], 2.5, True):
        with pytest.raises((TypeError, ValueError), match="^batch_size: expected an integer ≥ 1, got"):
            dh.entropy_change(shipped, rollouts, v, batch_size=wrong)
        with pytest.raises((TypeError, ValueError), match="^batch_size: expected an integer ≥ 1, got"):
            dh.attribution(**right, batch_size=wrong)
    assert dh.entropy_change(shipped, rollouts, v, np.int64(2), batch_size=np.int64(3)).order == 2
    for field, wrong in (("order", 3), ("per", "word"), ("of_policy", None), ("prompt_index", torch.zeros(2).long()),
                         ("score_weights", None), ("score_term", 0.5), ("entropy_weight", "1"), ("value", "1")):
        with pytest.raises((TypeError, ValueError), match=f"^{field}: expected"):
            dataclasses.replace(change, **{field: wrong})
    eta = dh.critical_learning_rate(dh.Estimate(1.0, 0.1, 9), dh.Estimate(1.0, 0.1, 9))
    for wrong in (0, 1, 95, math.nan, "0.95", None):
        with pytest.raises((TypeError, ValueError), match="^level: expected a number > 0 and < 1, got"):
            eta.interval(wrong)


def straight_through(x):
    return x + ((4 * x).round() / 4 - x).detach()


@pytest.mark.parametrize("function, message", [
    (straight_through, "the derivative of LlamaForCausalLM is not to be had: round rounds what moves"),
    (StraightThrough.apply, "the derivative of LlamaForCausalLM is not to be had: a custom function has a derivative"),
    (lambda x: x * float(x.mean()), "the derivative of LlamaForCausalLM is not to be had: __float__ takes what moves"),
    (lambda x: x * torch.from_numpy(x.detach().numpy()), "the derivative of LlamaForCausalLM is not to be had: numpy"),
    (lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).double(),
     "an operation of LlamaForCausalLM has no forward-mode derivative: Trying to use forward AD with fake_quant")])
def test_derivatives_that_are_not_to_be_had_are_refused(function, message):
    policy = dh.exact.exact_policy(build_model("llama", 11))
    layer, rollouts = policy.model.model.layers[0].mlp.down_proj, rollouts_for(11)
    forward = layer.forward
    layer.forward = lambda x: function(forward(x))
    for order in (1, 2):
        with pytest.raises(ValueError, match=f"^policy: {message}"):
            dh.entropy_change(policy, rollouts, random_direction(policy), order)


@pytest.mark.parametrize("order, tolerance", [(1, 1e-7), (2, 1e-5)])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_entropy_changes_of_dora_are_those_of_the_function_that_runs(order, tolerance, per):
    """Against finite differences of the reweighted entropy; a backward pass holds the norm still."""
    policy, rollouts = peft_policy(dora=True), rollouts_for(11)
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=0.01)
    direction = dh.update_direction(policy, rollouts_for(11, seed=3), optimizer=optimizer)
    mask = rollouts.response_mask.double()
    with torch.no_grad():
        before = dh.score(policy, rollouts).log_probs

    def entropy(step):
        with torch.no_grad():
            log_probs, entropies = dh.score(policy, rollouts, policy.shifted(direction.vector, step))
        ratios = log_probs - before
        weights = (ratios.cumsum(1) - ratios).exp()
        return float((weights * entropies).sum() / ((weights * mask).sum() if per == "token" else len(rollouts)))

    h, weights = 2e-4, {1: (1, -8, 0, 8, -1), 2: (-1, 16, -30, 16, -1)}[order]
    truth = sum(w * entropy(k * h) for k, w in zip(range(-2, 3), weights, strict=True)) / (12 * h**order)
    change = dh.entropy_change(policy, rollouts, direction, order, per, baseline="entropy")
    assert change.value == pytest.approx(truth, rel=tolerance)


def test_attributions_that_would_not_sum_to_the_change_are_refused():
    for dora in (False, True):
        policy, evaluation = peft_policy(dora=dora), rollouts_for(11, prompts=6, seed=2)
        optimizer = torch.optim.AdamW(policy.parameters.values(), lr=0.01)
        direction = dh.update_direction(policy, rollouts_for(11), optimizer=optimizer)
        change = dh.entropy_change(policy, evaluation, direction)
        if not dora:
            causes = dh.attribution(policy, evaluation, direction, change)
            whole = float(causes.tokens.sum()) + causes.momentum + causes.weight_decay
            assert whole == pytest.approx(change.value, rel=1e-9)
            continue
        with pytest.raises(ValueError, match="^policy: the parts sum to .*LlamaForCausalLM is not the derivative of"):
            dh.attribution(policy, evaluation, direction, change)


def test_critical_learning_rate_is_where_both_orders_are_equal():
    first, second = dh.Estimate(-2.0, 0.1, 100), dh.Estimate(400.0, 20.0, 100)
    eta = dh.critical_learning_rate(first, second)
    assert eta.value == pytest.approx(0.01)
    assert eta.value * 2 == pytest.approx(eta.value**2 / 2 * 400)
    assert eta.standard_error == pytest.approx(0.01 * math.hypot(0.05, 0.05))
    low, high = eta.interval()
    assert low < 0.01 < high and high - 0.01 > 0.01 - low
    # A second derivative that may be zero leaves η* without an upper end, but not without a lower one.
    low, high = dh.critical_learning_rate(first, dh.Estimate(40.0, 30.0, 100)).interval()
    assert 0 < low < 0.1 and high == math.inf
    assert dh.critical_learning_rate(dh.Estimate(0.1, 1.0, 9), dh.Estimate(0.1, 1.0, 9)).interval() == (0.0, math.inf)
    with pytest.raises(ValueError, match="second: expected a second derivative other than 0"):
        dh.critical_learning_rate(first, dh.Estimate(0.0, 1.0, 9))


def made_up(contributions, order=1, per="token", **others):
    """An entropy change with these contributions, of one policy, rollouts and direction unless others are given."""
    e, tokens = dh.Estimate.mean(contributions), torch.zeros(len(contributions), 2)
    fields = dict(token_contributions=tokens, score_term=e, score_weights=tokens, entropy_weight=0.0,
                  prompt_index=torch.arange(len(contributions)), of_policy="a", of_rollouts="b", of_direction="c")
    return dynamics.EntropyChange(e.value, e.standard_error, e.count, e.contributions, order=order, per=per,
                                  **fields | others)


def test_critical_learning_rate_covers_with_correlated_derivatives():
    generator, covered, truth = torch.Generator().manual_seed(0), 0, 2 * 1.0 / 3.0

    for _ in range(1000):
        noise = torch.randn(2, 60, generator=generator, dtype=torch.float64)
        first, second = 1.0 + 2 * noise[0], -3.0 + 4 * noise[0] + 2 * noise[1]
        low, high = dh.critical_learning_rate(made_up(first, 1), made_up(second, 2)).interval()
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_ridge_regressions_of_many_features_end():
    """A batch of LU decompositions of this size does not, with MKL and two threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 400, 300, dtype=torch.float64, generator=generator)
    x[..., 0] = 1.0
    y = torch.randn(10, 400, 2, dtype=torch.float64, generator=generator)
    rows = torch.cat([x, y], 2)
    fits = _ridge(rows.transpose(1, 2) @ rows, 0.0, count=2)
    torch.testing.assert_close(fits, torch.linalg.lstsq(x, y).solution, atol=1e-6, rtol=1e-6)
