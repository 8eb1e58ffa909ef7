import copy

import pytest
import torch

import deltah as dh
from deltah import objectives


def test_a_step_raises_the_reward_on_the_rollouts_it_was_made_from(shipped, problems):
    policy = dh.Policy(copy.deepcopy(shipped.model), shipped.tokenizer)
    rollouts = dh.sample(policy, problems.select(range(8)), responses_per_prompt=8, max_new_tokens=64)
    advantages = objectives.group_advantages(rollouts.rewards, rollouts.prompt_index)
    rollouts = rollouts.replace(advantages=advantages)
    with torch.no_grad():
        before = dh.score(policy, rollouts).log_probs
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-4)
    loss = dh.training.policy_gradient_step(policy, rollouts, before, "gspo", optimizer)
    # On-policy s = 1, so the loss is −mean A = 0.
    assert loss == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        after = dh.score(policy, rollouts).log_probs
    gain = (advantages * (after - before).sum(1)).mean()
    assert gain > 0


def test_rollouts_without_advantages_are_refused(shipped):
    rollouts = dh.sample(shipped, ["a"], 2, 2)
    optimizer = torch.optim.SGD(shipped.parameters.values(), lr=0.1)
    with pytest.raises(ValueError, match="rollouts: expected advantages, got None, and no rewards"):
        dh.training.policy_gradient_step(shipped, rollouts, torch.zeros(2, 2), "gspo", optimizer)
