"""Update directions against what torch's own optimizers do."""

import copy
import functools

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

import deltah as dh
from conftest import build_model
from deltah import objectives

OPTIMIZERS = {
    "sgd": (SGD, dict(lr=0.5)),
    "sgd, momentum": (SGD, dict(lr=0.5, momentum=0.9, dampening=0.3, weight_decay=0.02)),
    "sgd, nesterov": (SGD, dict(lr=0.5, momentum=0.8, nesterov=True, weight_decay=0.02)),
    "sgd, ascending": (SGD, dict(lr=0.5, momentum=0.8, maximize=True)),
    "rmsprop": (RMSprop, dict(lr=0.02, alpha=0.95)),
    "rmsprop, all": (RMSprop, dict(lr=0.02, alpha=0.95, centered=True, momentum=0.7, weight_decay=0.02, eps=1e-4)),
    "adam": (Adam, dict(lr=0.02)),
    "adam, coupled": (Adam, dict(lr=0.02, betas=(0.8, 0.95), weight_decay=0.05, eps=1e-6)),
    "adam, amsgrad": (Adam, dict(lr=0.02, amsgrad=True, maximize=True)),
    "adamw": (AdamW, dict(lr=0.02, weight_decay=0.1)),
    "adamw, one by one": (AdamW, dict(lr=0.02, weight_decay=0.1, amsgrad=True, foreach=False)),
    "adamw, tensors": (AdamW, dict(lr=torch.tensor(0.02, dtype=torch.float64), weight_decay=0.1)),
}


def rollouts_for(vocabulary_size, prompts=4, responses=3, seed=0):
    """Random tokens and rewards, prompts and responses of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    n, width, steps = prompts * responses, 4, 6
    starts = torch.randint(0, width, (prompts,), generator=generator).repeat_interleave(responses)
    lengths = torch.randint(1, steps + 1, (n,), generator=generator)
    attention = torch.cat([torch.arange(width) >= starts[:, None], torch.arange(steps) < lengths[:, None]], 1)
    return dh.Rollouts(torch.randint(0, vocabulary_size, (n, width + steps), generator=generator), attention,
                       attention[:, width:], torch.arange(prompts).repeat_interleave(responses),
                       rewards=torch.randn(n, generator=generator), temperature=0.8)


def real_change(policy, rollouts, optimizer, objective, norm=None):
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    rate = float(optimizer.param_groups[0]["lr"])
    with torch.no_grad():
        old = dh.score(policy, rollouts).log_probs
    dh.training.policy_gradient_step(policy, rollouts, old, objective, optimizer, norm)
    return {name: (p.detach() - before[name]) / rate for name, p in policy.parameters.items()}


def relative_error(left, right):
    difference = sum(float((left[n].double() - right[n].double()).square().sum()) for n in right)
    return (difference / sum(float(x.double().square().sum()) for x in right.values())) ** 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_direction_is_what_the_optimizer_does_after_several_steps(name, dtype, tolerance):
    policy = dh.Policy(build_model("qwen2", 11, dtype))
    kind, settings = OPTIMIZERS[name]
    optimizer = kind(policy.parameters.values(), **settings)
    for step in range(4):
        rollouts = rollouts_for(11, seed=step)
        state = copy.deepcopy(optimizer.state_dict())
        before = {n: p.detach().clone() for n, p in policy.parameters.items()}
        direction = dh.update_direction(policy, rollouts, "grpo", optimizer=optimizer, max_gradient_norm=0.7)
        # Neither the policy nor the optimizer has moved.
        assert all(torch.equal(before[n], p) and p.grad is None or step for n, p in policy.parameters.items())
        for old, new in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old if old[k] is not None)
        change = real_change(policy, rollouts, optimizer, "grpo", 0.7)
        assert relative_error(direction.vector, change) < tolerance


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "gspo"])
def test_the_parts_of_a_direction_sum_to_it(objective, random_policy):
    policy = dh.exact.exact_policy(random_policy.model)
    optimizer = AdamW(policy.parameters.values(), lr=0.01, weight_decay=0.1)
    for seed in range(2):
        real_change(policy, rollouts_for(policy.vocabulary_size, seed=seed), optimizer, objective)
    rollouts = rollouts_for(policy.vocabulary_size, seed=5)
    direction = dh.update_direction(policy, rollouts, objective, optimizer=optimizer, max_gradient_norm=0.1)
    whole = {n: sum(part[n] for part in direction.parts.values()) for n in direction.vector}
    assert relative_error(whole, direction.vector) < 1e-14
    each = [direction.per_rollout(i) for i in range(len(rollouts))]
    summed = {n: sum(part[n] for part in each) for n in direction.vector}
    assert relative_error(summed, direction.parts["rollouts"]) < 1e-10
    assert all(float(x.abs().max()) > 0 for x in direction.parts["momentum"].values())
    assert relative_error(direction.parts["weight_decay"],
                          {n: -0.1 * p.detach() for n, p in policy.parameters.items()}) < 1e-14


def test_batches_do_not_change_the_direction(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(4)), 4)
    optimizer = SGD(shipped.parameters.values(), lr=0.1)
    whole, split = (dh.update_direction(shipped, rollouts, "dr_grpo", optimizer=optimizer, batch_size=size).vector
                    for size in (None, 3))
    assert relative_error(split, whole) < 1e-5


def test_groups_frozen_parameters_and_unreached_ones():
    policy = dh.Policy(build_model("gpt2", 11, torch.float64))
    names = list(policy.parameters)
    policy.model.transformer.wpe.weight.requires_grad_(False)
    policy.model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    kept = [p for n, p in policy.parameters.items() if "ln" not in n]
    optimizer = AdamW([{"params": kept[:5], "lr": 0.02}, {"params": kept[5:], "lr": 0.005, "weight_decay": 0.3}])
    for seed in range(3):
        rollouts = rollouts_for(11, seed=seed)
        direction = dh.update_direction(policy, rollouts, optimizer=optimizer, max_gradient_norm=0.5)
        change = real_change(policy, rollouts, optimizer, "grpo", 0.5)
        assert relative_error(direction.vector, change) < 1e-12
    assert "transformer.wpe.weight" in names and "transformer.wpe.weight" not in direction.vector
    still = [n for n, v in direction.vector.items() if not v.any()]
    assert "idle" in still and all("ln" in n or n == "idle" for n in still)


class LowRank(torch.nn.Module):
    """A frozen linear layer beside a trainable product of two thin ones, as LoRA has it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = torch.nn.Linear(layer.in_features, rank, bias=False, dtype=layer.weight.dtype)
        self.up = torch.nn.Linear(rank, layer.out_features, bias=False, dtype=layer.weight.dtype)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def low_rank_policy(vocabulary_size=11):
    model = build_model("llama", vocabulary_size, torch.float64).requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.q_proj, block.mlp.up_proj = LowRank(block.self_attn.q_proj), LowRank(block.mlp.up_proj)
    return dh.Policy(model)


def test_adapters():
    policy = low_rank_policy()
    assert len(policy.parameters) == 8
    optimizer = AdamW(policy.parameters.values(), lr=0.02)
    for seed in range(3):
        rollouts = rollouts_for(11, seed=seed)
        direction = dh.update_direction(policy, rollouts, "grpo", optimizer=optimizer)
        assert relative_error(direction.vector, real_change(policy, rollouts, optimizer, "grpo")) < 1e-12


def test_off_policy_rollouts_use_the_log_probs_that_they_are_given():
    policy = dh.Policy(build_model("qwen3", 11, torch.float64))
    rollouts = rollouts_for(11)
    optimizer = SGD(policy.parameters.values(), lr=0.1)
    with torch.no_grad():
        old = dh.score(policy, rollouts).log_probs - 0.4 * rollouts.response_mask
    clipped = dh.update_direction(policy, rollouts, optimizer=optimizer, old_log_probs=old)
    # r = e^0.4 is past the clip: tokens of positive advantage have no say.
    advantages = objectives.group_advantages(rollouts.rewards, rollouts.prompt_index)
    assert not clipped.token_weights[advantages > 0].any() and clipped.token_weights[advantages < 0].any()
    loose = objectives.Objective(functools.partial(objectives.grpo, clip_high=1.0))
    assert dh.update_direction(policy, rollouts, loose, optimizer=optimizer,
                               old_log_probs=old).token_weights[advantages > 0].any()


def test_bfloat16_parameters_give_a_float32_direction(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(4)), 4)
    half = dh.Policy(copy.deepcopy(shipped.model).bfloat16(), shipped.tokenizer)
    make = functools.partial(SGD, lr=0.1)
    exact = dh.update_direction(shipped, rollouts, optimizer=make(shipped.parameters.values())).vector
    rough = dh.update_direction(half, rollouts, optimizer=make(half.parameters.values())).vector
    assert all(v.dtype == torch.float32 for v in rough.values())
    assert relative_error(rough, exact) < 0.1


def test_bad_input_is_named():
    policy = dh.Policy(build_model("qwen2", 11))
    rollouts = rollouts_for(11)
    parameters = list(policy.parameters.values())
    with pytest.raises(TypeError, match="optimizer: expected a torch.optim SGD, RMSprop, Adam or AdamW, got Adagrad"):
        dh.update_direction(policy, rollouts, optimizer=torch.optim.Adagrad(parameters))
    with pytest.raises(ValueError, match="of 1 trainable ones that it holds, 0 are the policy's"):
        dh.update_direction(policy, rollouts, optimizer=SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    sgd = SGD([{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:], "lr": 0.1}])
    with pytest.raises(ValueError, match="the first group's learning rate is 0 and another's 0.1"):
        dh.update_direction(policy, rollouts, optimizer=sgd)
    with pytest.raises(ValueError, match="objective: expected one of grpo, dr_grpo, gspo .*, got 'ppo'"):
        dh.update_direction(policy, rollouts, "ppo", optimizer=SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match="rollouts: expected advantages, got None"):
        dh.update_direction(policy, rollouts.replace(rewards=None), optimizer=SGD(parameters, lr=0.1))
    optimizer = SGD(parameters, lr=0.1)
    direction = dh.update_direction(policy, rollouts, optimizer=optimizer)
    with pytest.raises(ValueError, match="index: expected one of 0 to 11, got 12"):
        direction.per_rollout(12)
    real_change(policy, rollouts, optimizer, "grpo")
    with pytest.raises(ValueError, match="policy: its parameters have changed since"):
        direction.per_rollout(0)
