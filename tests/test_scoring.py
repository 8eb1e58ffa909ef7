import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

import deltah as dh
from conftest import CONFIGS, SMALL, build_model
from deltah.models.modes import evaluation
from deltah.scoring import log_probs_and_entropies

PROMPTS = ["Ava has 3 eggs.", "Ben has 12 coins. Ben sells 4. How many coins does Ben have?\n", "2"]


FIELDS = ("log_probs", "entropies", "collisions", "collision_log_probs")


def everything(scores):
    return [getattr(scores, name) for name in FIELDS]


def by_transformers(policy, rollouts):
    """All that scores hold, one rollout at a time, unpadded, from the model's own logits."""
    found = torch.zeros(4, *rollouts.response_mask.shape, dtype=torch.float64)
    for row in range(len(rollouts)):
        ids = rollouts.input_ids[row][rollouts.attention_mask[row]][None]
        length = int(rollouts.lengths[row])
        with evaluation(policy.model):
            logits = policy.model(input_ids=ids).logits[0, -length - 1:-1].double() / rollouts.temperature
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        found[:, row, :length] = torch.stack([log_p.gather(-1, ids[0, -length:, None])[:, 0],
                                              torch.special.entr(p).sum(-1), p.square().sum(-1),
                                              torch.xlogy(p.square(), p).sum(-1)])
    return found


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_transformers_unpadded(shipped, architecture, dtype, tolerance, temperature):
    policy = dh.Policy(build_model(architecture, shipped.vocabulary_size, dtype), shipped.tokenizer)
    rollouts = dh.sample(policy, PROMPTS, 3, max_new_tokens=12, temperature=temperature, seed=1)
    with torch.no_grad():
        scores = dh.score(policy, rollouts, moments=True)
        expected = by_transformers(policy, rollouts)
    for got, wanted in zip(everything(scores), expected, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.all(got[~rollouts.response_mask] == 0)
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


OUTPUT_LAYERS = {
    "soft cap": (lambda v: Gemma2Config(vocab_size=v, head_dim=8, final_logit_softcapping=3.0, **SMALL), (1.0, 3.0)),
    "factor": (lambda v: CohereConfig(vocab_size=v, logit_scale=0.0625, **SMALL), (0.0625, None)),
    "divisor": (lambda v: GraniteConfig(vocab_size=v, logits_scaling=8.0, **SMALL), (0.125, None)),
    "bias": (lambda v: PhiConfig(vocab_size=v, **SMALL), (1.0, None)),
}


class Sharpened(torch.nn.Module):
    """An output layer that is more than a linear one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + 0.1 * self.layer(x).square()


def made(config):
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def random_rollouts(vocabulary_size):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_size, (5, 11), generator=generator)
    prompts, responses = (torch.arange(n) for n in (5, 6))
    prompts, responses = prompts >= torch.arange(5)[:, None], responses <= torch.arange(5)[:, None]
    return dh.Rollouts(ids, torch.cat([prompts, responses], 1), responses, torch.arange(5), temperature=0.8)


@pytest.mark.parametrize("kind", [*OUTPUT_LAYERS, "not linear"])
def test_output_layers_that_do_more(kind, shipped):
    config, scaling = OUTPUT_LAYERS.get(kind, (CONFIGS["llama"], None))
    model = made(config(shipped.vocabulary_size))
    if kind == "not linear":
        model.lm_head = Sharpened(model.lm_head)
    policy, rollouts = dh.Policy(model), random_rollouts(shipped.vocabulary_size)
    with torch.no_grad():
        scores, expected = dh.score(policy, rollouts, moments=True), by_transformers(policy, rollouts)
    # The logits never exist, but for an output layer that is not known.
    layer, logits = policy.output(rollouts.input_ids, keep=3)[1:]
    assert (layer is None) == (logits is not None) == (kind == "not linear")
    assert layer is None or layer.scaling[:2] == scaling
    for got, wanted in zip(everything(scores), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6 if kind == "soft cap" else 1e-12, rtol=1e-6)


def test_the_output_layer_is_found_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        for config, scaling in OUTPUT_LAYERS.values():
            layer = dh.Policy(made(config(300)).to(dtype)).output(torch.zeros(1, 2, dtype=torch.long), keep=1)[1]
            assert layer.scaling[:2] == scaling


def test_logits_in_bfloat16_are_scored_in_float32():
    model = build_model("llama", 300, torch.bfloat16)
    model.lm_head = Sharpened(model.lm_head)
    policy, rollouts = dh.Policy(model), random_rollouts(300)
    with torch.no_grad():
        scores, expected = dh.score(policy, rollouts, moments=True), by_transformers(policy, rollouts)
    for got, wanted in zip(everything(scores), expected, strict=True):
        assert got.dtype == torch.float32
        # Logits of rows of another length are rounded differently; sums of them in bfloat16 would be further off.
        torch.testing.assert_close(got.double(), wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_does_not_depend_on_the_batch_size(random_policy, batch_size):
    rollouts = dh.sample(random_policy, PROMPTS, 3, max_new_tokens=12)
    with torch.no_grad():
        whole = dh.score(random_policy, rollouts, moments=True)
        split = dh.score(random_policy, rollouts, batch_size=batch_size, moments=True)
    torch.testing.assert_close(everything(split), everything(whole), atol=1e-5, rtol=1e-5)


def test_does_not_depend_on_padding(random_policy):
    rollouts = dh.sample(random_policy, PROMPTS, 2, max_new_tokens=6)
    more = torch.full((len(rollouts), 5), 3)
    off = torch.zeros(len(rollouts), 5, dtype=torch.bool)
    padded = dh.Rollouts(torch.cat([more, rollouts.input_ids, more], 1),
                         torch.cat([off, rollouts.attention_mask, off], 1),
                         torch.cat([rollouts.response_mask, off], 1), rollouts.prompt_index)
    with torch.no_grad():
        plain, wide = (dh.score(random_policy, x, moments=True) for x in (rollouts, padded))
    for a, b in zip(everything(plain), everything(wide), strict=True):
        torch.testing.assert_close(b[:, :a.shape[1]], a, atol=1e-5, rtol=1e-5)
        assert torch.all(b[:, a.shape[1]:] == 0)


@pytest.mark.parametrize("linear", [True, False])
def test_moments_are_asked_for_and_change_nothing_else(linear, shipped):
    model = build_model("gpt2", shipped.vocabulary_size, torch.float64)
    if not linear:
        model.lm_head = Sharpened(model.lm_head)
    policy, rollouts = dh.Policy(model), random_rollouts(shipped.vocabulary_size)
    found = []
    for moments in (False, True):
        scores = dh.score(policy, rollouts, moments=moments)
        log_probs, entropies = scores
        assert all((getattr(scores, name) is not None) == moments for name in FIELDS[2:])
        gradients = [g for x in scores for g in torch.autograd.grad(x.square().sum(), policy.parameters.values(),
                                                                    retain_graph=True)]
        found.append([log_probs, entropies, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # They can be differentiated: along the gradient g of a moment, it changes by |g|².
    for field in FIELDS[2:]:
        gradients = torch.autograd.grad(getattr(scores, field).sum(), policy.parameters.values(), retain_graph=True)
        g = dict(zip(policy.parameters, gradients, strict=True))
        up, down = (getattr(dh.score(policy, rollouts, policy.shifted(g, eta), moments=True), field).sum()
                    for eta in (1e-4, -1e-4))
        slope = float((up - down).detach()) / 2e-4
        assert slope == pytest.approx(sum(float(x.square().sum()) for x in gradients), rel=1e-5)


def test_an_exact_policys_moments():
    """Each distribution once: Σ p over its tokens of p, and of p log p."""
    policy = dh.exact.tiny_policy(vocabulary_size=5)
    every = dh.exact.every_response(policy, [[0], [1, 2]], max_new_tokens=1)
    with torch.no_grad():
        scores = dh.score(policy, every, moments=True)
    log_p = scores.log_probs.view(2, 5)
    for found, wanted in ((scores.collisions, (2 * log_p).exp()), (scores.collision_log_probs,
                                                                   (2 * log_p).exp() * log_p)):
        torch.testing.assert_close(found.view(2, 5), wanted.sum(1, keepdim=True).expand(2, 5), atol=1e-14, rtol=1e-14)


def test_scores_are_a_pair_that_may_have_moments():
    parts = torch.arange(4.0).view(4, 1, 1)
    scores = dh.TokenScores(*parts)
    assert isinstance(scores, dh.TokenScores) and len(scores) == 2 and [*scores] == [0, 1]
    for other in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert everything(other) == everything(scores)
    assert everything(dh.TokenScores(*scores))[2:] == [None, None]


def test_gradients_reach_the_models_own_parameters_and_given_ones(random_policy):
    rollouts = dh.sample(random_policy, PROMPTS, 2, max_new_tokens=4)
    own = random_policy.parameters
    given_ = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    for field in range(2):
        ours = torch.autograd.grad(dh.score(random_policy, rollouts)[field].sum(), own.values(), allow_unused=True)
        theirs = torch.autograd.grad(dh.score(random_policy, rollouts, given_)[field].sum(), given_.values(),
                                     allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


finite_or_minus_infinity = st.lists(st.floats(-100, 100) | st.just(-math.inf), min_size=2, max_size=30).filter(
    lambda row: any(math.isfinite(x) for x in row))


@settings(max_examples=200, deadline=None)
@given(finite_or_minus_infinity)
def test_entropy_of_any_logits_matches_scipy_and_its_gradient_is_finite(row):
    from scipy.special import entr, softmax
    logits = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(int(logits.argmax()))
    log_prob, entropy = log_probs_and_entropies(logits, target)
    assert float(entropy.detach()) == pytest.approx(entr(softmax(row)).sum(), abs=1e-10)
    assert 0 <= entropy + 1e-12 <= math.log(len(row)) + 1e-9
    (gradient,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    # ∂H/∂z_i = −p_i (H + log p_i), the discriminator of FORMULAS for one logit.
    p = torch.tensor(softmax(row))
    expected = torch.where(p > 0, -p * (entropy.detach() + p.clamp(min=1e-300).log()), 0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-9)
    # ∂Σp²/∂z_i = 2 p_i (p_i − Σp²); E_{j∼p} S_j = H Σp² + Σp² log p.
    *same, collisions, collision_log_probs = log_probs_and_entropies(logits, target, moments=True)
    assert same == [log_prob, entropy]
    assert float(collisions.detach()) == pytest.approx(float(p @ p), abs=1e-12)
    mean = entropy * collisions + collision_log_probs
    assert float(mean.detach()) == pytest.approx(-float(p @ expected), abs=1e-10)
    for moment, wanted in ((collisions, 2 * p * (p - p @ p)), (collision_log_probs, torch.autograd.functional.jacobian(
            lambda z: torch.xlogy(z.softmax(0).square(), z.softmax(0)).sum(), logits.detach().clamp(min=-200)))):
        (gradient,) = torch.autograd.grad(moment, logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-9)


def test_padding_may_hold_a_token_of_probability_zero():
    model = build_model("phi", 50)
    with torch.no_grad():
        model.lm_head.bias[0] = -math.inf
    rollouts = random_rollouts(50)
    ids = torch.where(rollouts.attention_mask, rollouts.input_ids.clamp(min=1), 0)
    assert not rollouts.response_mask.all()
    scores = dh.score(dh.Policy(model), rollouts.replace(input_ids=ids), moments=True)
    assert all(torch.isfinite(x).all() for x in everything(scores))


def test_nan_logits_name_the_rollout(shipped):
    rollouts = dh.sample(shipped, PROMPTS, 1, max_new_tokens=3)
    broken = {name: p.detach().clone() for name, p in shipped.parameters.items()}
    broken["model.norm.weight"].fill_(math.nan)
    with pytest.raises(ValueError, match="policy: the model's logits are NaN or all −inf, first in rollout 0"):
        dh.score(shipped, rollouts, broken)


@pytest.mark.parametrize("arguments, message", [
    ({"policy": None}, "policy: expected a Policy, got None"),
    ({"policy": torch.nn.Linear(2, 2)}, "policy: expected a Policy, got Linear"),
    ({"rollouts": None}, "rollouts: expected a Rollouts, got None"),
    ({"rollouts": ["a"]}, "rollouts: expected a Rollouts, got list"),
    ({"parameters": [1]}, "parameters: expected tensors by name, got list"),
    ({"parameters": {"model.norm.weight": 2.0}}, r"parameters\['model.norm.weight'\]: expected a tensor, got 2.0"),
    ({"batch_size": "2"}, "batch_size: expected an integer ≥ 1, got '2'"),
    ({"moments": 1}, "moments: expected True or False, got 1"),
    ({"batch_size": True}, "batch_size: expected an integer ≥ 1, got True")])
def test_wrong_types_are_named(shipped, arguments, message):
    rollouts = dh.sample(shipped, PROMPTS, 1, max_new_tokens=3)
    with pytest.raises(TypeError, match=message):
        dh.score(**{"policy": shipped, "rollouts": rollouts, **arguments})


def test_numbers_of_numpy_are_welcome(shipped):
    rollouts = dh.sample(shipped, PROMPTS, 1, max_new_tokens=3)
    assert len(dh.score(shipped, rollouts, batch_size=np.int64(2)).entropies) == 3


def test_wrong_logits_are_named():
    logits, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    for wrong, error, message in (
            (([0.0], targets), TypeError, "logits: expected a tensor, got list"),
            ((targets, targets), TypeError, "logits: expected floating-point numbers"),
            ((torch.tensor(1.0), targets), ValueError, r"logits: expected shape \[..., V\], got \[\]"),
            ((logits, logits[:, 0]), TypeError, "targets: expected integers"),
            ((logits, targets[:2]), ValueError, r"targets: expected shape \[3\], got \[2\]"),
            ((logits, targets, "yes"), TypeError, "moments: expected True or False, got 'yes'"),
            ((logits, targets + 4), ValueError, "targets: expected integers from 0 to 3, got 4 to 4")):
        with pytest.raises(error, match=message):
            log_probs_and_entropies(*wrong)


def test_bad_arguments_are_named(shipped):
    rollouts = dh.sample(shipped, PROMPTS, 1, max_new_tokens=3)
    with pytest.raises(ValueError, match="batch_size: expected an integer ≥ 1, got 0"):
        dh.score(shipped, rollouts, batch_size=0)
    with pytest.raises(ValueError, match="parameters: the model has none named 'nonsense'"):
        dh.score(shipped, rollouts, {"nonsense": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"parameters\['model.norm.weight'\]: expected shape \[128\], got \[1\]"):
        dh.score(shipped, rollouts, {"model.norm.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="rollouts: expected token ids below the policy's vocabulary size 434"):
        dh.score(shipped, rollouts.replace(input_ids=rollouts.input_ids + 600))
    with pytest.raises(ValueError, match="rollouts: expected token ids below .* 434, got -1 to"):
        dh.score(shipped, rollouts.replace(input_ids=rollouts.input_ids.clamp(max=300).index_fill(
            0, torch.tensor(0), -1)))
