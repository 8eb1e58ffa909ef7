import copy
import math

import numpy as np
import pytest
import torch

import deltah as dh
from conftest import build_model
from deltah import objectives
from test_updates import rollouts_for


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


def set_up(**settings):
    policy, rollouts = dh.Policy(build_model("llama", 11)), rollouts_for(11)
    with torch.no_grad():
        old = dh.score(policy, rollouts).log_probs
    return {"policy": policy, "rollouts": rollouts, "old_log_probs": old, "objective": "grpo",
            "optimizer": torch.optim.AdamW(policy.parameters.values(), lr=0.01)} | settings


def test_an_optimizer_of_other_parameters_too_is_refused_and_moves_none_of_them():
    arguments, other = set_up(), torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    arguments["optimizer"].add_param_group({"params": [other]})
    own = len(arguments["policy"].parameters)
    with pytest.raises(ValueError, match=f"of {own + 1} trainable ones that it holds, {own} are the policy's"):
        dh.training.policy_gradient_step(**arguments)
    assert torch.equal(other, torch.ones(2))


def test_gradients_that_stand_there_take_no_part_and_are_not_written_to():
    clean, dirty = (set_up(max_gradient_norm=0.3) for _ in range(2))
    for each in (clean, dirty):
        # No loss reaches it, and the optimizer does not hold it.
        each["policy"].model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    start = {n: p.detach().clone() for n, p in clean["policy"].parameters.items()}
    for _ in range(2):
        kept = {n: torch.full_like(p, 7.0) for n, p in dirty["policy"].parameters.items()}
        for n, p in dirty["policy"].parameters.items():
            p.grad = kept[n]
        for each in (clean, dirty):
            dh.training.policy_gradient_step(**each)
        assert all(bool((x == 7.0).all()) for x in kept.values())
    for (n, p), q in zip(clean["policy"].parameters.items(), dirty["policy"].parameters.values(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, start[n]) == (n == "idle")
        assert (p.grad is None and q.grad is None) if n == "idle" else torch.equal(p.grad, q.grad)
    norm = sum(float(p.grad.square().sum()) for n, p in clean["policy"].parameters.items() if n != "idle") ** 0.5
    assert norm == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_old_log_probs_with_a_graph_are_constants(batch_size):
    """Their gradient would take that of the new ones off, down to nothing at r = 1."""
    gradients = []
    for with_graph in (False, True):
        step = set_up(batch_size=batch_size)
        old = dh.score(step["policy"], step["rollouts"]).log_probs
        dh.training.policy_gradient_step(**step | {"old_log_probs": old if with_graph else old.detach()})
        gradients.append(step["policy"].parameters.values())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*gradients, strict=True))
    assert any(p.grad.any() for p in gradients[1])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_gradient_by_way_of_collisions_is_refused(batch_size):
    """In one batch it would be taken, in several lost."""
    def tsallis(log_probs, old_log_probs, advantages, mask, collisions):
        return objectives.grpo(log_probs, old_log_probs, advantages, mask) + torch.where(mask, collisions, 0.0)

    step = set_up(objective=objectives.Objective(tsallis), batch_size=batch_size)
    with pytest.raises(ValueError, match="losses: expected collisions to be constants"):
        dh.training.policy_gradient_step(**step)
    with pytest.raises(ValueError, match="losses: expected collisions to be constants"):
        dh.update_direction(step["policy"], step["rollouts"], step["objective"], step["optimizer"])


@pytest.mark.parametrize("objective", sorted(objectives.OBJECTIVES))
def test_batches_of_a_step_change_nothing(objective):
    steps = []
    for batch_size in (None, 3, 1):
        policy, rollouts = dh.exact.exact_policy(build_model("llama", 11)), rollouts_for(11)
        with torch.no_grad():
            scores = dh.score(policy, rollouts)
        old = scores.log_probs + 0.3 * torch.sin(torch.arange(scores.log_probs.numel())).view_as(scores.log_probs)
        loss = dh.training.policy_gradient_step(policy, rollouts, old, objective, torch.optim.SGD(
            policy.parameters.values(), lr=0.1), max_gradient_norm=0.5, seed=3, batch_size=batch_size)
        steps.append((loss, policy.parameters))
    (loss, one), *others = steps
    start = dh.exact.exact_policy(build_model("llama", 11)).parameters
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, abs=1e-12)
        for n, p in one.items():
            torch.testing.assert_close(other[n], p, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(other[n].grad, p.grad, rtol=1e-9, atol=1e-11)
    assert max((one[n] - start[n]).abs().max() for n in one) > 1e-4


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no step today")


def nowhere(log_probs, old, advantages, mask):
    """A loss that is finite, with a gradient that is not."""
    return torch.where(mask, (log_probs - log_probs.detach()).abs().sqrt(), 0.0)


WRONG_STEPS = {
    "NaN old log-probs": lambda a: {"old_log_probs": a["old_log_probs"] * math.nan},
    "old log-probs of another shape": lambda a: {"old_log_probs": a["old_log_probs"][:, 1:]},
    "old log-probs that are integers": lambda a: {"old_log_probs": a["old_log_probs"].long()},
    "no old log-probs": lambda a: {"old_log_probs": None},
    "no policy": lambda a: {"policy": a["policy"].model},
    "no rollouts": lambda a: {"rollouts": [a["rollouts"]]},
    "no optimizer": lambda a: {"optimizer": None},
    "an optimizer of something else": lambda a: {"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])},
    "an unknown objective": lambda a: {"objective": "ppo"},
    "no objective": lambda a: {"objective": None},
    "a negative norm": lambda a: {"max_gradient_norm": -1.0},
    "a NaN norm": lambda a: {"max_gradient_norm": math.nan},
    "an infinite norm": lambda a: {"max_gradient_norm": math.inf},
    "a norm of zero": lambda a: {"max_gradient_norm": 0},
    "a norm in words": lambda a: {"max_gradient_norm": "1"},
    "an infinite gradient": lambda a: {"objective": objectives.Objective(nowhere)},
    "a failing step": lambda a: {"optimizer": Failing(a["policy"].parameters.values(), lr=0.1)},
    "a step that needs a closure": lambda a: {"optimizer": torch.optim.LBFGS(a["policy"].parameters.values())},
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_what_goes_wrong_leaves_nothing_half_done(name):
    arguments = set_up()
    policy, optimizer = arguments["policy"], arguments["optimizer"]
    dh.training.policy_gradient_step(**arguments)
    before = {n: (p.detach().clone(), p.grad, p.grad.clone()) for n, p in policy.parameters.items()}
    state = copy.deepcopy(optimizer.state_dict())
    wrong = WRONG_STEPS[name](arguments)
    argument = {"optimizer": "optimizer|no step|closure|LBFGS|.*step\\(\\)", "objective": "objective|policy",
                "rollouts": "rollouts|rewards|advantages"}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^({argument.get(*wrong, *wrong)})"):
        dh.training.policy_gradient_step(**arguments | wrong)
    for n, p in policy.parameters.items():
        value, grad, content = before[n]
        assert torch.equal(p, value) and p.grad is grad and torch.equal(p.grad, content)
    after = optimizer.state_dict()
    assert all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k]))
               for x, y in zip(state["state"].values(), after["state"].values(), strict=True) for k in x)


def test_padding_of_old_log_probs_may_hold_anything_and_grad_mode_does_not_matter():
    one, other = set_up(), set_up(max_gradient_norm=np.float32(1e9))
    mask = other["rollouts"].response_mask
    other["old_log_probs"] = torch.where(mask, other["old_log_probs"], math.nan).double()
    step = dh.training.policy_gradient_step
    with torch.no_grad():
        loss = step(**other)
    assert loss == pytest.approx(step(**one), abs=1e-6)
    for p, q in zip(one["policy"].parameters.values(), other["policy"].parameters.values(), strict=True):
        torch.testing.assert_close(p, q)
