import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import deltah as dh
from conftest import CONFIGS, build_model
from deltah.exact import (
    conditional_mean,
    covariance,
    coverage,
    cross_fitted,
    every_group,
    every_response,
    exact_policy,
    flat_gradient,
    given_prefix,
    group_moments,
    prefixes,
    probabilities,
    tiny_policy,
)


@pytest.mark.parametrize("eos", [None, 2])
def test_lists_every_response_once_and_probabilities_sum_to_one(eos):
    policy = tiny_policy(vocabulary_size=3, eos_token_id=eos)
    rollouts = every_response(policy, [[0], [1, 0, 1]], max_new_tokens=4)
    listed = {(int(p), tuple(ids[mask].tolist())) for p, ids, mask in
              zip(rollouts.prompt_index, rollouts.response_ids, rollouts.response_mask, strict=True)}
    expected = {(p, tuple(itertools.islice(_until(r, eos), 4))) for p in range(2)
                for r in itertools.product(range(3), repeat=4)}
    assert listed == expected and len(rollouts) == len(listed)
    with torch.no_grad():
        p = probabilities(dh.score(policy, rollouts))
    assert p.dtype == torch.float64
    sums = torch.zeros(2, dtype=torch.float64).index_add(0, rollouts.prompt_index, p)
    torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64), atol=1e-13, rtol=0)


def _until(tokens, eos):
    for token in tokens:
        yield token
        if token == eos:
            return


def mean_score_function(policy):
    """Largest entry of E[∇ log π], which is 0."""
    rollouts = every_response(policy, [[0], [1, 2]], max_new_tokens=3, temperature=0.8)
    log_pi = dh.score(policy, rollouts).log_probs.sum(1)
    gradient = torch.autograd.grad((log_pi.detach().exp() * log_pi).sum(), policy.parameters.values(),
                                   allow_unused=True)
    return max(float(g.abs().max()) for g in gradient if g is not None)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture_computes_in_float64_throughout(architecture):
    """The identity holds to float64's rounding only if no layer falls back to float32."""
    assert mean_score_function(exact_policy(build_model(architecture, 5))) < 1e-12


def test_forward_mode_passes_and_agrees_with_differences():
    policy = exact_policy(build_model("qwen3", 5))
    rollouts = every_response(policy, [[0]], max_new_tokens=2)
    v = {name: torch.randn_like(p) for name, p in policy.parameters.items()}
    value = lambda p: dh.score(policy, rollouts, p).entropies  # noqa: E731
    _, slope = torch.func.jvp(value, (policy.shifted(v, 0.0),), (v,))
    with torch.no_grad():
        difference = (value(policy.shifted(v, 1e-5)) - value(policy.shifted(v, -1e-5))) / 2e-5
    torch.testing.assert_close(slope, difference, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_second_derivatives_are_exact(architecture):
    """d²H/dη² by nested forward mode, by forward over reverse mode, and by differences."""
    policy = exact_policy(build_model(architecture, 4))
    rollouts = every_response(policy, [[0], [1, 2]], max_new_tokens=2)
    v = {name: torch.randn_like(p) for name, p in policy.parameters.items()}

    def total(parameters):
        scores = dh.score(policy, rollouts, parameters)
        return -(probabilities(scores) * scores.log_probs.sum(1)).sum()

    def along(eta):
        return total({name: p.detach() + eta * v[name] for name, p in policy.parameters.items()})

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def slope(eta):
        return torch.func.jvp(along, (eta,), (one,))[1]

    second = float(torch.func.jvp(slope, (zero,), (one,))[1])
    eta = zero.clone().requires_grad_()
    (first,) = torch.autograd.grad(along(eta), eta, create_graph=True)
    assert second == pytest.approx(float(torch.autograd.grad(first, eta)[0]), rel=1e-10)
    with torch.no_grad():
        difference = (slope(zero + 1e-5) - slope(zero - 1e-5)) / 2e-5
    assert second == pytest.approx(float(difference), rel=1e-5)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = tiny_policy(seed=1), tiny_policy(seed=1), tiny_policy(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    name = "transformer.wte.weight"
    assert torch.equal(a.parameters[name], b.parameters[name])
    assert not torch.equal(a.parameters[name], c.parameters[name])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_group_has_the_expectations_of_all_ordered_draws(size):
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(3)] * size).view(-1, size)
    ordered = torch.nn.functional.one_hot(draws, 3).sum(1).double()
    counts, share = every_group(weights, size)
    assert len(counts.unique(dim=0)) == len(counts) == math.comb(size + 2, size) and (counts.sum(1) == size).all()
    assert share.sum().item() == pytest.approx(1, abs=1e-14)
    for power in (1, 2, 3):
        expected = weights[draws].prod(1) @ ordered.pow(power)
        assert torch.allclose(share @ counts.pow(power), expected, rtol=1e-13)


@pytest.mark.parametrize("size", [2, 3])
def test_moments_of_groups_are_those_of_all_ordered_draws(size):
    generator = torch.Generator().manual_seed(size)
    chances = torch.rand(2, 3, generator=generator, dtype=torch.float64).softmax(1)
    values = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    draws = list(itertools.product(range(3), repeat=size))
    mean, second = torch.zeros(12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64)
    for prompt, draw in itertools.product(range(2), draws):
        chosen = values[:, prompt, list(draw)]
        weights = torch.zeros(2, 2, 3, dtype=torch.float64)
        for position, response in enumerate(draw):
            weights[:, prompt, response] += chosen[:, position] - chosen.mean(1)
        share = chances[prompt, list(draw)].prod() / 2
        mean += share * weights.flatten()
        second += share * torch.outer(weights.flatten(), weights.flatten())
    found = group_moments(chances, values, size)
    assert torch.allclose(found[0], mean, atol=1e-14) and torch.allclose(found[1], second, atol=1e-14)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompts: expected one or more non-empty lists"):
        every_response(tiny_policy(), [[]], 2)
    with pytest.raises(ValueError, match=r"max_new_tokens: 4\^20 responses"):
        every_response(tiny_policy(), [[0]], 20)
    with pytest.raises(ValueError, match="max_new_tokens: 3 tokens of a prompt and 2 more do not fit"):
        every_response(tiny_policy(context_length=4), [[0], [0, 1, 2]], 2)


@pytest.mark.parametrize("call, error, message", [
    (lambda p, r: exact_policy(None), TypeError, "model: expected a transformers causal LM, got None"),
    (lambda p, r: tiny_policy("4"), TypeError, "vocabulary_size: expected an integer"),
    (lambda p, r: tiny_policy(4, 4), ValueError, "eos_token_id: expected an integer ≥ 0 and ≤ 3, got 4"),
    (lambda p, r: tiny_policy(eos_logit=2.0), ValueError, "eos_logit: expected 0 without an eos_token_id, got 2.0"),
    (lambda p, r: tiny_policy(eos_logit=math.nan), ValueError, "eos_logit: expected a number, got nan"),
    (lambda p, r: tiny_policy(seed=1.5), ValueError, "seed: expected an integer"),
    (lambda p, r: every_response(p.model, [[0]], 2), TypeError, "policy: expected a Policy"),
    (lambda p, r: every_response(p, None, 2), TypeError, "prompts: expected one or more non-empty lists"),
    (lambda p, r: every_response(p, [0], 2), TypeError, "prompts: expected .* got 0 at 0"),
    (lambda p, r: every_response(p, ["ab"], 2), TypeError, "prompts: expected .* got 'ab' at 0"),
    (lambda p, r: every_response(p, [[4]], 2), ValueError, r"prompts\[0\]\[0\]: expected an integer ≥ 0"),
    (lambda p, r: every_response(p, [[0]], 0), ValueError, "max_new_tokens: expected an integer ≥ 1, got 0"),
    (lambda p, r: every_response(p, [[0]], 2, temperature=None), TypeError, "temperature: expected a number"),
    (lambda p, r: probabilities(r), TypeError, "scores: expected a TokenScores"),
    (lambda p, r: flat_gradient(p, r.response_ids.double()), ValueError, r"quantity: expected shape \[\]"),
    (lambda p, r: flat_gradient(p, torch.ones(())), ValueError, "quantity: expected a number that depends"),
    (lambda p, r: covariance(torch.ones(2, 3), torch.ones(3)), ValueError, r"weights: expected shape \[2\]"),
    (lambda p, r: covariance([[1.0]], torch.ones(1)), TypeError, "x: expected a tensor, got list"),
    (lambda p, r: every_group([0.5, 0.5], 2), TypeError, "probabilities: expected a tensor, got list"),
    (lambda p, r: every_group(torch.ones(3) / 3, 0), ValueError, "size: expected an integer ≥ 1, got 0"),
    (lambda p, r: every_group(torch.ones(9) / 9, 20), ValueError, "size: groups of 20 out of 9 responses are more"),
    (lambda p, r: group_moments(torch.ones(3) / 3, torch.ones(1, 3), 2), ValueError, r"probabilities: expected shape"),
    (lambda p, r: group_moments(torch.ones(1, 3) / 3, torch.ones(1, 3), 2), ValueError, "values: expected shape"),
    (lambda p, r: coverage(None, torch.ones(3), 2, 0.0), TypeError, "estimate: expected a function of rows, got None"),
    (lambda p, r: coverage(len, torch.ones(3), 2, 0.0, level=95), ValueError, "level: expected a number > 0 and < 1"),
    (lambda p, r: coverage(len, torch.ones(3), 0, 0.0), ValueError, "size: expected an integer ≥ 1, got 0"),
])
def test_wrong_arguments_are_named(call, error, message):
    policy = tiny_policy()
    with pytest.raises(error, match=message):
        call(policy, every_response(policy, [[0]], 1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_copy_is_exact_and_runs_itself(architecture, duplicate):
    policy = exact_policy(build_model(architecture, 5))
    rollouts = every_response(policy, [[0]], 2)
    wanted = dh.score(policy, rollouts).log_probs
    other = duplicate(policy)
    assert torch.equal(dh.score(other, rollouts).log_probs, wanted)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    assert (dh.score(other, rollouts).log_probs - wanted).abs().max() > 1e-3
    assert torch.equal(dh.score(policy, rollouts).log_probs, wanted)
    assert mean_score_function(other) < 1e-12
    # So does a copy of the model alone.
    third = dh.Policy(copy.deepcopy(other.model))
    assert torch.equal(dh.score(third, rollouts).log_probs, dh.score(other, rollouts).log_probs)
    assert mean_score_function(third) < 1e-12


def test_what_cannot_be_a_policy_stays_as_it_was():
    model = BertForMaskedLM(BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="model: expected a causal LM"):
        exact_policy(model)
    assert model.dtype == torch.float32 and "forward" not in model.__dict__


def test_the_models_own_call_keeps_its_signature():
    model = exact_policy(build_model("llama", 5)).model
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    assert "self" not in inspect.signature(model.forward).parameters


def test_a_conditional_mean_is_known_given_what_it_conditions_on():
    policy = tiny_policy(vocabulary_size=3, eos_token_id=0, seed=2)
    every = every_response(policy, [[1], [2, 1]], 3)
    with torch.no_grad():
        scores = dh.score(policy, every)
    joint = probabilities(scores) / 2
    for k in range(3):
        # Given the prefix, a surprisal's mean is the next-token entropy; given the token too, it is itself.
        surprisal = -scores.log_probs[:, k]
        assert (conditional_mean(surprisal, every, joint, k) - scores.entropies[:, k]).abs().max() < 1e-12
        assert (conditional_mean(surprisal, every, joint, k + 1) - surprisal).abs().max() < 1e-12
    by_prompt = conditional_mean(every.lengths.double(), every, joint, 0)
    for prompt in (0, 1):
        rows = every.prompt_index == prompt
        wanted = joint[rows] @ every.lengths[rows].double() / joint[rows].sum()
        assert by_prompt[rows].numpy() == pytest.approx(float(wanted), abs=1e-12)


def test_replicates_of_the_control_variate_are_the_librarys():
    target, weights = torch.tensor([0.0, 2.0, 1.0, 5.0]).double(), torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    variate = torch.tensor([-1.0, 0.0, 1.0, 3.0]).double()
    variate -= weights @ variate
    plain, fitted = cross_fitted(target, variate, weights, size=6, replicates=30, seed=3)
    rows = torch.multinomial(weights, 180, True, generator=torch.Generator().manual_seed(3)).view(30, 6)
    for row, mean, adjusted in zip(rows, plain, fitted, strict=True):
        wanted = dh.control_variate(target[row], variate[row][:, None], torch.arange(6)).mean()
        assert float(adjusted) == pytest.approx(float(wanted), abs=1e-10)
        assert float(mean) == pytest.approx(float(target[row].mean()), abs=1e-12)


def test_fewer_rows_than_folds_are_named():
    with pytest.raises(ValueError, match="size"):
        cross_fitted(torch.ones(3), torch.ones(3), torch.ones(3) / 3, size=4)


def test_conditional_means_are_those_of_the_prefix():
    policy = tiny_policy(vocabulary_size=3, eos_token_id=2, seed=3)
    rollouts = every_response(policy, [[0], [1, 0]], max_new_tokens=3)
    with torch.no_grad():
        scores = dh.score(policy, rollouts)
    q, mask = probabilities(scores) / 2, rollouts.response_mask
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, numbers = given_prefix(x, rollouts, q), prefixes(rollouts)
    keys = [[(int(p), *ids[:k].tolist()) for k in range(3)]
            for p, ids in zip(rollouts.prompt_index, rollouts.response_ids, strict=True)]
    for n, k in mask.nonzero().tolist():
        same = torch.tensor([bool(mask[m, k]) and keys[m][k] == keys[n][k] for m in range(len(q))])
        assert torch.equal(same & mask[:, k], (numbers[:, k] == numbers[n, k]) & mask[:, k])
        assert found[n, k] == pytest.approx(float((q * x[:, k])[same].sum() / q[same].sum()))
    assert not found[~mask].any()
    # What the prefix decides is its own mean, and the score has none.
    torch.testing.assert_close(given_prefix(scores.entropies, rollouts, q), scores.entropies)
