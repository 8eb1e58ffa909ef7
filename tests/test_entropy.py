import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

import deltah as dh
from conftest import build_model
from deltah.entropy import FOLDS, METHODS, UNITS, control_variate, variance_decomposition
from deltah.exact import coverage, every_response, exact_policy, probabilities, tiny_policy


@pytest.fixture(scope="module")
def enumerated():
    """All responses to three prompts of different lengths, with EOS, at a temperature other than 1."""
    model = build_model("qwen3", 5, seed=3)
    model.config.eos_token_id = 0
    policy = exact_policy(model)
    rollouts = every_response(policy, [[1], [2, 3], [4, 4, 1]], max_new_tokens=4, temperature=0.7)
    with torch.no_grad():
        scores = dh.score(policy, rollouts)
    return scores, rollouts, probabilities(scores) / 3


def exact_entropy(p, rollouts, per):
    nats = -(p * (3 * p).log()).sum()
    return float(nats / (p @ rollouts.lengths.double()) if per == "token" else nats)


def test_monte_carlo_and_rao_blackwell_have_the_entropy_as_expectation(enumerated):
    scores, rollouts, p = enumerated
    for values in (-scores.log_probs, scores.entropies):
        assert float(p @ values.sum(1)) == pytest.approx(exact_entropy(p, rollouts, "sequence"), abs=1e-12)


def test_the_decomposition_is_exact_and_its_steps_are_the_conditional_variances(enumerated):
    scores, rollouts, p = enumerated
    terms = variance_decomposition(scores, rollouts, p)
    surprisal, entropies = -scores.log_probs.sum(1), scores.entropies.sum(1)
    for total, value in ((surprisal, terms.monte_carlo), (entropies, terms.rao_blackwell)):
        assert value == pytest.approx(float(p @ total.square() - (p @ total) ** 2), abs=1e-12)
    assert terms.monte_carlo == pytest.approx(terms.rao_blackwell + terms.steps + terms.cross, abs=1e-12)
    squares = (scores.log_probs + scores.entropies).square().sum(1)
    assert terms.steps == pytest.approx(float(p @ squares), abs=1e-12)
    assert terms.control_variate <= min(terms.monte_carlo, terms.rao_blackwell) + 1e-12
    difference = -(scores.log_probs + scores.entropies).sum(1)
    best = entropies + terms.coefficient * difference
    assert terms.control_variate == pytest.approx(float(p @ best.square() - (p @ best) ** 2), abs=1e-12)


def test_scores_with_gradients_are_numbers_here(enumerated):
    scores, rollouts, p = enumerated
    graphs = dh.TokenScores(*(x.clone().requires_grad_() for x in scores))
    with warnings.catch_warnings(action="error"):
        assert variance_decomposition(graphs, rollouts, p) == variance_decomposition(scores, rollouts, p)
        found = dh.entropy(graphs, rollouts)
    assert not found.contributions.requires_grad and found.value == dh.entropy(scores, rollouts).value


def test_a_policy_that_leaves_nothing_to_chance_has_no_variance():
    nothing = torch.zeros(3, 2)
    rollouts = dh.Rollouts(torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3).bool(), torch.ones(3, 2).bool(),
                           torch.arange(3))
    assert variance_decomposition(dh.TokenScores(nothing, nothing), rollouts) == (0,) * 6


def test_rao_blackwellising_a_whole_sequence_can_raise_the_variance():
    """Three equally likely responses: Var(S) = 0, and Var(S_RB) = (2/9) log² 2."""
    log_probs = tensor([[2 / 3, 1 / 2], [2 / 3, 1 / 2], [1 / 3, 1]], dtype=torch.float64).log()
    first = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    entropies = tensor([[first, math.log(2)], [first, math.log(2)], [first, 0]], dtype=torch.float64)
    rollouts = dh.Rollouts(torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3).bool(), torch.ones(3, 2).bool(),
                           torch.arange(3))
    terms = variance_decomposition(dh.TokenScores(log_probs, entropies), rollouts, torch.full((3,), 1 / 3))
    assert terms.monte_carlo == pytest.approx(0, abs=1e-12)
    assert terms.rao_blackwell == pytest.approx(2 / 9 * math.log(2) ** 2, rel=1e-6)


def test_cross_fitting_adds_no_bias():
    """Over every sample of six responses from four, the control variate's mean is exact: 4,096 fits, some seconds."""
    value, variate = tensor([0.0, 1.0, 5.0, 2.0]), tensor([1.0, -1.0, 2.0, -2.0])
    p = tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    assert float(p @ variate.double()) == pytest.approx(0, abs=1e-7)
    mean = 0.0
    for draw in itertools.product(range(4), repeat=FOLDS + 1):
        index = tensor(draw)
        adjusted = control_variate(value[index], variate[index, None], torch.arange(FOLDS + 1))
        mean += float(p[index].prod() * adjusted.mean())
    assert mean == pytest.approx(float(p @ value.double()), abs=1e-7)


def test_a_variate_that_explains_everything_leaves_no_variance():
    generator = torch.Generator().manual_seed(0)
    variates = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    target = 2.0 + variates @ tensor([1.5, -0.5], dtype=torch.float64)
    clusters = torch.arange(20).repeat_interleave(3)
    assert control_variate(target, variates, clusters).std() < 1e-12
    lengths = torch.rand(60, generator=generator, dtype=torch.float64) + 1
    rate = control_variate(3 * lengths + variates[:, 0], variates[:, :1], clusters, lengths)
    ratio = dh.Estimate.ratio(rate, lengths, clusters)
    assert ratio.value == pytest.approx(3, abs=1e-12) and ratio.standard_error < 1e-12


@pytest.mark.parametrize("per", UNITS)
def test_the_variate_is_fitted_to_what_is_estimated(enumerated, per):
    """Per token, to a ratio of means."""
    scores, rollouts, p = enumerated
    rows = torch.multinomial(p, 60, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled, drawn = rollouts.select(rows), dh.TokenScores(*(x[rows] for x in scores))
    sampled = sampled.replace(prompt_index=torch.arange(60) // 2)
    variate = -(drawn.log_probs + drawn.entropies).sum(1, keepdim=True)
    lengths = sampled.lengths.double() if per == "token" else torch.ones(60, dtype=torch.float64)
    totals = control_variate(drawn.entropies.sum(1), variate, sampled.prompt_index, lengths)
    wanted = dh.Estimate.ratio(totals, lengths, sampled.prompt_index)
    found = dh.entropy(drawn, sampled, "control_variate", per)
    assert (found.value, found.standard_error) == pytest.approx((wanted.value, wanted.standard_error), rel=1e-12)


CASES = {"plain": (dict(seed=1, eos_token_id=0), 100), "heavy tail": (dict(seed=2, eos_token_id=0, eos_logit=3.0), 800)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per", UNITS)
@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_exact_entropy(case, per, method):
    """Takes long where a coefficient is fitted, once for each of thousands of replicates."""
    arguments, size = CASES[case]
    policy = tiny_policy(**arguments)
    every = every_response(policy, [[1]], max_new_tokens=4)
    with torch.no_grad():
        scores = dh.score(policy, every)
    p = probabilities(scores)
    if case == "heavy tail":
        total = scores.entropies.sum(1)
        centred = total - p @ total
        assert (p @ centred**4) / (p @ centred**2) ** 2 > 40
    truth = float(-p @ p.log() / ((p @ every.lengths.double()) if per == "token" else 1))

    def estimate(rows):
        sampled = every.select(rows).replace(prompt_index=torch.arange(size))
        return dh.entropy(dh.TokenScores(*(x[rows] for x in scores)), sampled, method, per)

    assert 0.93 <= coverage(estimate, p, size, truth) <= 0.97


logit_rows = st.lists(st.floats(-80, 80) | st.just(-math.inf) | st.integers(-3, 3).map(float), min_size=1,
                      max_size=40).filter(lambda row: any(math.isfinite(x) for x in row))
LIMITS = st.fixed_dictionaries({}, optional={"top_k": st.integers(1, 45), "top_p": st.floats(1e-6, 1.0)}).filter(bool)


@settings(max_examples=500, deadline=None)
@given(logit_rows, LIMITS, st.floats(0.05, 20))
def test_truncated_entropy_brackets_the_entropy(row, limits, temperature):
    logits = tensor(row, dtype=torch.float64)
    exact = float(torch.special.entr((logits / temperature).softmax(-1)).sum())
    value, lower, upper = dh.truncated_entropy(logits, **limits, temperature=temperature)
    assert lower - 1e-10 <= exact <= upper + 1e-10
    assert lower - 1e-12 <= value <= upper + 1e-12
    if limits.get("top_k", 0) >= len(row) and "top_p" not in limits:
        assert float(upper - lower) == pytest.approx(0, abs=1e-12)


def test_truncated_entropy_of_a_batch_and_of_a_uniform_tail():
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    value, lower, upper = dh.truncated_entropy(logits, top_p=0.9)
    assert value.shape == lower.shape == upper.shape == (3, 4) and value.dtype == torch.float64
    # The tail of a uniform distribution is known exactly: both bounds meet.
    _, lower, upper = dh.truncated_entropy(torch.zeros(1000), top_k=10)
    assert float(lower) == pytest.approx(math.log(1000)) == pytest.approx(float(upper))
    # And so is a tail of one token; rounding never turns the bounds around.
    two = tensor([2.0, 0.0])
    value, lower, upper = dh.truncated_entropy(two, top_k=1)
    assert float(lower) == float(upper) == pytest.approx(float(torch.special.entr(two.softmax(-1)).sum()))
    for size in range(2, 200):
        _, lower, upper = dh.truncated_entropy(torch.full((size,), 0.1), top_k=1 + size // 3)
        assert lower <= upper


@pytest.mark.parametrize("arguments, message", [
    ({}, "top_k, top_p: expected at least one"),
    ({"top_k": 0}, "top_k: expected an integer ≥ 1, got 0"),
    ({"top_k": 2.0}, "top_k: expected an integer"),
    ({"top_p": 0.0}, "top_p: expected a number > 0 and ≤ 1, got 0.0"),
    ({"top_p": 1.1}, "top_p: expected a number"),
    ({"top_k": 1, "temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
    ({"top_k": 1, "logits": tensor([math.nan, 0.0])}, "logits: expected finite numbers or −inf"),
    ({"top_k": 1, "logits": tensor([-math.inf, -math.inf])}, "logits: expected finite numbers or −inf"),
])
def test_bad_arguments_of_truncated_entropy_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dh.truncated_entropy(**{"logits": torch.zeros(4), **arguments})


def test_bad_arguments_are_named(enumerated):
    scores, rollouts, p = enumerated
    with pytest.raises(ValueError, match="method: expected one of rao_blackwell, monte_carlo, control_variate"):
        dh.entropy(scores, rollouts, method="magic")
    with pytest.raises(ValueError, match="per: expected one of sequence, token, got 'word'"):
        dh.entropy(scores, rollouts, per="word")
    with pytest.raises(ValueError, match="scores.log_probs: expected the rollouts' shape"):
        dh.entropy(dh.TokenScores(*(x[:, 1:] for x in scores)), rollouts)
    with pytest.raises(ValueError, match="clusters: expected at least 5 prompts to fit a control variate on, got 3"):
        dh.entropy(scores, rollouts, method="control_variate")
    with pytest.raises(ValueError, match="weights: expected shape"):
        variance_decomposition(scores, rollouts, p[1:])
    with pytest.raises(ValueError, match=r"variates: expected shape \[4, C\], got \[4\]"):
        control_variate(torch.zeros(4), torch.zeros(4), torch.arange(4))


WRONG = (None, 3, "scores", [1.0], {"a": 1}, np.ones(3))


def test_wrong_types_are_named(enumerated):
    scores, rollouts, p = enumerated
    for wrong in WRONG:
        for function in (dh.entropy, variance_decomposition):
            with pytest.raises(TypeError, match="^scores: expected a TokenScores, got"):
                function(wrong, rollouts)
            with pytest.raises(TypeError, match="^rollouts: expected a Rollouts, got"):
                function(scores, wrong)
            with pytest.raises(TypeError, match="^scores.entropies: expected a tensor, got"):
                function(dh.TokenScores(scores.log_probs, wrong), rollouts)
        with pytest.raises(TypeError, match="^logits: expected a tensor, got"):
            dh.truncated_entropy(wrong, top_k=1)
        with pytest.raises(TypeError, match="^target: expected a tensor, got"):
            control_variate(wrong, torch.zeros(9, 1), torch.arange(9))
        with pytest.raises(TypeError, match="^variates: expected a tensor, got"):
            control_variate(torch.zeros(9), wrong, torch.arange(9))
        with pytest.raises(TypeError, match="^clusters: expected a tensor, got"):
            control_variate(torch.zeros(9), torch.zeros(9, 1), wrong)
        if wrong is not None:
            with pytest.raises(TypeError, match="^weights: expected a tensor, got"):
                variance_decomposition(scores, rollouts, wrong)
            with pytest.raises(TypeError, match="^denominators: expected a tensor, got"):
                control_variate(torch.zeros(9), torch.zeros(9, 1), torch.arange(9), wrong)
    for wrong in (None, [1], 1.5, True):
        with pytest.raises(TypeError, match="^method: expected one of"):
            dh.entropy(scores, rollouts, method=wrong)
        with pytest.raises(TypeError, match="^per: expected one of"):
            dh.entropy(scores, rollouts, per=wrong)
    for name in ("top_k", "top_p", "temperature"):
        for wrong in ("1", [1], True, math.nan):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected (a number|an integer)"):
                dh.truncated_entropy(torch.zeros(4), **{"top_k": 2, name: wrong})
    assert dh.truncated_entropy(torch.zeros(4), np.int64(2), np.float32(0.5), np.float64(1)).value == pytest.approx(
        math.log(4))


def test_what_is_not_finite_is_refused_inside_the_mask_and_only_there(enumerated):
    scores, rollouts, p = enumerated
    mask = rollouts.response_mask
    padded = dh.TokenScores(*(torch.where(mask, x, math.nan) for x in scores))
    assert dh.entropy(padded, rollouts).value == dh.entropy(scores, rollouts).value
    for bad in (math.nan, math.inf):
        for name in scores._fields:
            value = getattr(scores, name).clone()
            value[3, 0] = bad
            with pytest.raises(ValueError, match=f"^scores.{name}: expected finite numbers inside the mask"):
                dh.entropy(scores._replace(**{name: value}), rollouts)
        with pytest.raises(ValueError, match="^weights: expected finite numbers"):
            variance_decomposition(scores, rollouts, p * bad)
        with pytest.raises(ValueError, match="^target: expected finite numbers"):
            control_variate(torch.full((9,), bad), torch.zeros(9, 1), torch.arange(9))
    with pytest.raises(ValueError, match="^weights: expected probabilities that sum to 1, got a sum of 3"):
        variance_decomposition(scores, rollouts, 3 * p)
    with pytest.raises(ValueError, match="^weights: expected probabilities that sum to 1, got a sum of 1"):
        variance_decomposition(scores, rollouts, p.index_fill(0, tensor(0), -0.1) + (0.1 + p[0]) / (len(p) - 1) * (
            torch.arange(len(p)) > 0))
