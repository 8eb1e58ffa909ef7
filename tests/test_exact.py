import itertools

import pytest
import torch

import deltah as dh
from deltah.exact import every_response, probabilities, tiny_policy


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


def test_the_policy_is_float64_throughout():
    """E[∇ log π] = 0 holds to float64's rounding only if no layer falls back to float32."""
    policy = tiny_policy()
    rollouts = every_response(policy, [[0]], max_new_tokens=3)
    log_pi = dh.score(policy, rollouts).log_probs.sum(1)
    gradient = torch.autograd.grad((log_pi.detach().exp() * log_pi).sum(), policy.parameters.values())
    assert max(float(g.abs().max()) for g in gradient) < 1e-13


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = tiny_policy(seed=1), tiny_policy(seed=1), tiny_policy(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    name = "transformer.wte.weight"
    assert torch.equal(a.parameters[name], b.parameters[name])
    assert not torch.equal(a.parameters[name], c.parameters[name])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="prompts: expected one or more non-empty lists"):
        every_response(tiny_policy(), [[]], 2)
    with pytest.raises(ValueError, match=r"max_new_tokens: 4\^20 responses"):
        every_response(tiny_policy(), [[0]], 20)
