"""Measured entropy changes against exact ones."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import deltah as dh
from conftest import build_model, random_rollouts
from deltah import measurement
from deltah.sampling import resample

PROMPTS = [[0], [1, 2, 0], [2, 2]]


@pytest.fixture(scope="module")
def enumerated():
    policy = dh.exact.tiny_policy(4, eos_token_id=3, seed=1)
    every = dh.exact.every_response(policy, PROMPTS, 4, temperature=0.7)
    generator = torch.Generator().manual_seed(3)
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()}
    with torch.no_grad():
        weights = dh.exact.probabilities(dh.score(policy, every)) / len(PROMPTS)
    return policy, every, v, weights


def exact_change(policy, every, v, rate, per):
    def entropy(step):
        log_probs, entropies = dh.score(policy, every, policy.shifted(v, step))
        p = log_probs.sum(1).exp() / len(PROMPTS)
        return float(p @ entropies.sum(1) / (p @ every.lengths.double() if per == "token" else 1.0))

    with torch.no_grad():
        return entropy(rate) - entropy(0.0)


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("method, rates", [("importance", [1e-3, 1e-2, 3e-2]), ("coupled", [1e-2, 0.1])])
def test_intervals_cover_the_exact_change(enumerated, per, method, rates):
    """Takes long: 150 measurements, each from 400 rollouts of its own; fewer could not tell 95% from 90%."""
    policy, every, v, weights = enumerated
    generator, tables = torch.Generator().manual_seed(0), []
    for replicate in range(150):
        rows = torch.multinomial(weights, 400, replacement=True, generator=generator)
        rollouts = every.select(rows).replace(prompt_index=torch.arange(len(rows)))
        tables.append(dh.measured_entropy_change(policy, rollouts, v, rates, per, method, seed=replicate))
    for i, rate in enumerate(rates):
        truth = exact_change(policy, every, v, rate, per)
        rows = [table.iloc[i] for table in tables if not table.collapsed[i]]
        assert len(rows) > 140
        covered = sum(row.low <= truth <= row.high for row in rows) / len(rows)
        # 150 replicates see a true 95% within 3.6 points, twice their standard error.
        assert 0.91 <= covered <= 0.99
        values = torch.tensor([row.change for row in rows])
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / len(rows) ** 0.5


def test_linearity_covers_the_exact_ratio(enumerated):
    policy, every, v, weights = enumerated
    rates, generator, found = [1e-2, 1e-3], torch.Generator().manual_seed(4), []
    far, near = (exact_change(policy, every, v, rate, "token") / rate for rate in rates)
    # The change itself is known to a quarter; where it is known to a half, intervals of the ratio cover 84%.
    for _ in range(40):
        rows = torch.multinomial(weights, 1200, replacement=True, generator=generator)
        rollouts = every.select(rows).replace(prompt_index=torch.arange(len(rows)))
        ratio, start = dh.linearity(policy, rollouts, v, rates)
        assert (start.value, start.standard_error) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
        low, high = ratio.interval()
        found.append(low <= far / near <= high)
    assert sum(found) >= 34
    change = dh.measured_entropy_change(policy, rollouts, v, rates)
    assert ratio.value == pytest.approx(change.change[0] / rates[0] / (change.change[1] / rates[1]))


def test_linearity_says_where_weights_collapsed(enumerated):
    policy, every, v, weights = enumerated
    rows = torch.multinomial(weights, 200, replacement=True, generator=torch.Generator().manual_seed(1))
    rollouts = every.select(rows)
    start, far = dh.linearity(policy, rollouts, v, [1e-3, 1.0])
    assert start.value == pytest.approx(1.0) and math.isnan(far.value)
    for rates, message in (([1e-3], "two or more, above 0"), ([0.0, 1e-3], "two or more, above 0"),
                           ([1.0, 2.0], "at 1, the smallest, the weights have collapsed")):
        with pytest.raises(ValueError, match=f"learning_rates: .*{message}"):
            dh.linearity(policy, rollouts, v, rates)


def test_far_away_weights_collapse_and_say_so(enumerated):
    policy, every, v, weights = enumerated
    rows = torch.multinomial(weights, 400, replacement=True, generator=torch.Generator().manual_seed(1))
    rollouts = every.select(rows).replace(prompt_index=torch.arange(len(rows)))
    table = dh.measured_entropy_change(policy, rollouts, v, [1e-3, 1.0])
    assert table.collapsed.tolist() == [False, True]
    assert table.change.isna().tolist() == [False, True] and table.standard_error.isna().tolist() == [False, True]
    assert table.effective_sample_size[0] > 399 and table.effective_sample_size[1] < 200
    # Coupled sampling goes all the way.
    coupled = dh.measured_entropy_change(policy, rollouts, v, [1.0], method="coupled")
    assert coupled.low[0] <= exact_change(policy, every, v, 1.0, "token") <= coupled.high[0]
    assert not coupled.collapsed[0]


def test_weights_too_large_for_a_number_have_collapsed(enumerated):
    policy, every, _, _ = enumerated
    zeros = torch.zeros(len(every), every.response_mask.shape[1], dtype=torch.float64)
    before = dh.TokenScores(zeros, zeros + 1)
    for log_probs in (zeros + 300, torch.linspace(0, 900, len(every), dtype=torch.float64)[:, None] + zeros):
        change, size = measurement._reweighted(every, before, dh.TokenScores(log_probs, zeros + 1), "token")
        assert change is None and 0 < size <= len(every)
    # Weights that have only been large in between have not.
    back = torch.tensor([800.0, -800.0] + [0.0] * (zeros.shape[1] - 2), dtype=torch.float64) * torch.ones_like(zeros)
    change, size = measurement._reweighted(every, before, dh.TokenScores(back, zeros + 1), "sequence")
    assert change.value == 0 and size == pytest.approx(len(every))


def test_a_token_stays_where_the_shifted_policy_has_nothing_in_excess(enumerated):
    policy, every, _, _ = enumerated
    uniforms = torch.full((len(every), 1), 0.5, dtype=torch.float64)
    drawn = measurement._drawn(policy, every, every.lengths - 1, policy.shifted({}, 1.0), uniforms, None)
    assert torch.equal(drawn, every.response_ids.gather(1, every.lengths[:, None] - 1)[:, 0])


def test_small_steps_follow_the_prediction(shipped, problems):
    policy = dh.exact.exact_policy(dh.load_policy("data/policy", device="cpu").model)
    update = dh.sample(shipped, problems.select(range(900, 904)), 8, seed=1)
    evaluation = dh.sample(shipped, problems.select(range(24)), 1, seed=2)
    direction = dh.update_direction(policy, update, optimizer=torch.optim.SGD(policy.parameters.values(), lr=0.1))
    # The weights' linearisation has the sample's own mean at each position as baseline.
    for per in ("sequence", "token"):
        first = dh.entropy_change(policy, evaluation, direction, per=per, baseline="entropy")
        table = dh.measured_entropy_change(policy, evaluation, direction, [1e-7, 1e-5], per=per)
        slopes = table.change / table.learning_rate
        assert slopes[0] == pytest.approx(slopes[1], rel=1e-2)
        assert abs(slopes[0] - first.value) < 4 * first.standard_error


def test_coupled_rollouts_are_those_of_the_shifted_policy(enumerated):
    policy, every, v, weights = enumerated
    rows = torch.multinomial(weights, 4000, replacement=True, generator=torch.Generator().manual_seed(2))
    rollouts = every.select(rows)
    with torch.no_grad():
        parameters = policy.shifted(v, 0.1)
        moved = measurement._coupled(policy, rollouts, dh.score(policy, rollouts), parameters, 4, 0, None)
        expected = dh.exact.probabilities(dh.score(policy, every, parameters)) / len(PROMPTS)

    def key(batch):
        return [(int(p), *row[m].tolist()) for p, row, m in zip(batch.prompt_index, batch.response_ids,
                                                               batch.response_mask, strict=True)]

    counts = dict.fromkeys(key(every), 0)
    for response in key(moved):
        counts[response] += 1
    shares = torch.tensor(list(counts.values())) / 4000
    # The prompts' shares are the sample's own.
    prompt_shares = torch.bincount(rollouts.prompt_index, minlength=3) / 4000
    expected = expected * 3 * prompt_shares[every.prompt_index]
    chi_squared = float(((shares - expected).square() / expected).sum()) * 4000
    freedom = len(every) - 3
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5
    same = sum(a == b for a, b in zip(key(moved), key(rollouts), strict=True)) / 4000
    assert 0.3 < same < 0.99


def test_resampling_keeps_what_it_is_told_to(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(6)), 2, max_new_tokens=32)
    keep = (rollouts.lengths // 4).clamp(min=1)
    uniforms = torch.rand(12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = resample(shipped, rollouts, keep, uniforms)
    for i in range(12):
        n = int(keep[i])
        assert torch.equal(moved.response_ids[i, :n], rollouts.response_ids[i, :n])
    assert not moved.response_ids[~moved.response_mask].any()
    assert moved.response_mask.shape[1] <= 32 and not torch.equal(moved.response_ids, rollouts.response_ids)
    one_by_one = resample(shipped, rollouts, keep, uniforms, batch_size=1)
    assert torch.equal(one_by_one.input_ids, moved.input_ids)
    whole = resample(shipped, rollouts, rollouts.lengths, uniforms)
    ended = rollouts.lengths < 32
    assert torch.equal(whole.lengths[ended], rollouts.lengths[ended])


@pytest.mark.parametrize("linear", [True, False])
def test_next_tokens_are_drawn_from_one_positions_logits(linear, monkeypatch):
    model = build_model("phi" if linear else "llama", 37, torch.float64)
    if not linear:
        model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    policy, rollouts = dh.Policy(model), random_rollouts(37, 6, 5, 6)
    position = rollouts.lengths - 1 - torch.arange(6) % 2 * (rollouts.lengths > 1)
    shifted = policy.shifted({name: 0.1 * torch.ones_like(p) for name, p in policy.parameters.items()}, 1.0)
    run, made = dh.Policy.run, []

    def watched(self, arguments, parameters=None):
        output = run(self, arguments, parameters)
        made.append(len(output.logits) == len(arguments["input_ids"]))
        return output

    assert policy.has_linear_output == linear
    monkeypatch.setattr(dh.Policy, "run", watched)
    for parameters in (None, shifted):
        made.clear()
        found = measurement._next_token_probs(policy, rollouts, position, parameters)
        # Numbers of our own stand in for the logits where the output layer is linear.
        assert any(made) != linear
        for i, k in enumerate(position.tolist()):
            ids = rollouts.input_ids[i][rollouts.attention_mask[i]]
            before = ids[:len(ids) - int(rollouts.lengths[i]) + k]
            expected = (policy.logits(before[None], 1, parameters)[0, -1] / rollouts.temperature).softmax(-1)
            torch.testing.assert_close(found[i], expected, atol=1e-6, rtol=1e-6)


def test_bad_input_is_named(enumerated):
    policy, every, v, _ = enumerated
    for arguments, message in (
            (dict(learning_rates=[]), "learning_rates: expected one or more finite numbers ≥ 0"),
            (dict(learning_rates=[-1.0]), "learning_rates: expected one or more finite numbers ≥ 0"),
            (dict(method="exact"), "method: expected one of importance, coupled, got 'exact'"),
            (dict(per="word"), "per: expected one of sequence, token, got 'word'"),
            (dict(max_new_tokens=2), "max_new_tokens: expected at least the rollouts' 4, got 2")):
        with pytest.raises(ValueError, match=message):
            dh.measured_entropy_change(policy, every, v, **{"learning_rates": [0.1], **arguments})
    with pytest.raises(ValueError, match="expected the name of a trainable parameter"):
        dh.measured_entropy_change(policy, every, {"no such": torch.ones(1)}, [0.1])
    table = dh.measured_entropy_change(policy, every, v, np.array([0.0, 1e-3]), seed=np.int64(1),
                                       max_new_tokens=np.int64(4))
    for rates in ([0.0, np.float64(1e-3)], (0, 1e-3), pd.Series([0.0, 1e-3], index=[4, 2]), iter([0.0, 1e-3]),
                  torch.tensor([0.0, 1e-3], dtype=torch.float64)):
        pd.testing.assert_frame_equal(dh.measured_entropy_change(policy, every, v, rates), table)
    for wrong, error in ((0.1, TypeError), (np.float64(0.1), TypeError), (torch.tensor(0.1), TypeError),
                         ("0.1", TypeError), (None, TypeError), ({"a": 0.1}, TypeError), (["0.1"], TypeError),
                         ([None], TypeError), ([[0.1]], TypeError), ([True], TypeError), (np.ones((1, 1)), TypeError),
                         ([0.1, float("nan")], ValueError), ([float("inf")], ValueError)):
        with pytest.raises(error, match="^learning_rates: expected one or more finite numbers ≥ 0"):
            dh.measured_entropy_change(policy, every, v, wrong)


WRONG = (None, 3, "v", [1.0], {"a": 1}, np.ones(3))


def test_wrong_types_are_named(enumerated):
    policy, every, v, _ = enumerated
    right = {"policy": policy, "rollouts": every, "direction": v, "learning_rates": [0.1]}
    for wrong in WRONG:
        for name, expected in (("policy", "a Policy"), ("rollouts", "a Rollouts"), ("direction", "a Direction")):
            if not (name == "direction" and isinstance(wrong, dict)):
                with pytest.raises(TypeError, match=f"^{name}: expected {expected}"):
                    dh.measured_entropy_change(**right | {name: wrong})
    for argument, expected in (("max_new_tokens", "an integer"), ("seed", "an integer"),
                               ("batch_size", "an integer ≥ 1"), ("per", "one of"), ("method", "one of")):
        for wrong in ([4], {"a": 4}, 4.5, True):
            with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected {expected}"):
                dh.measured_entropy_change(**right, **{argument: wrong})
    with pytest.raises(TypeError, match=r"^direction\['a'\]: expected a tensor, got 1"):
        dh.measured_entropy_change(**right | {"direction": {"a": 1}})
