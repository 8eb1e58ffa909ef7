"""Update directions against what torch's own optimizers do."""

import copy
import dataclasses
import functools
import types

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

import deltah as dh
from conftest import build_model
from deltah import fingerprints, objectives, optimizers

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
        grads = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in policy.parameters.items()}
        direction = dh.update_direction(policy, rollouts, "grpo", optimizer=optimizer, max_gradient_norm=0.7)
        # Neither the policy nor the optimizer has moved, nor what the last step has left in the gradients.
        assert all(torch.equal(before[n], p) for n, p in policy.parameters.items())
        for n, p in policy.parameters.items():
            assert p.grad is grads[n][0] and (p.grad is None) == (step == 0)
            assert p.grad is None or torch.equal(p.grad, grads[n][1])
        for old, new in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
            assert old.keys() == new.keys()
            assert all(new[k] is x is None or torch.equal(torch.as_tensor(x), torch.as_tensor(new[k]))
                       for k, x in old.items())
        change = real_change(policy, rollouts, optimizer, "grpo", 0.7)
        assert relative_error(direction.vector, change) < tolerance


def test_a_momentum_that_was_switched_off_takes_its_dampening_along():
    policy = dh.Policy(build_model("qwen2", 11, torch.float64))
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=1e-2, momentum=0.9, dampening=0.3)
    real_change(policy, rollouts_for(11), optimizer, "grpo")
    optimizer.param_groups[0]["momentum"] = 0.0
    direction = dh.update_direction(policy, rollouts_for(11), "grpo", optimizer=optimizer)
    assert relative_error(direction.vector, real_change(policy, rollouts_for(11), optimizer, "grpo")) < 1e-12


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
    still = {n for n, v in direction.vector.items() if not v.any()}
    assert still == {n for n in policy.parameters if "ln" in n or n == "idle"}


def test_an_optimizer_may_hold_frozen_parameters():
    policy = dh.Policy(build_model("llama", 11, torch.float64))
    optimizer = AdamW(policy.model.parameters(), lr=0.02)
    policy.model.model.norm.weight.requires_grad_(False)
    direction = dh.update_direction(policy, rollouts_for(11), optimizer=optimizer)
    assert relative_error(direction.vector, real_change(policy, rollouts_for(11), optimizer, "grpo")) < 1e-12


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


def peft_policy(kind="llama", vocabulary_size=11, dora=False):
    """In float64 throughout, with PEFT's adapters away from their start."""
    base, targets = build_model(kind, vocabulary_size), {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets[kind], use_dora=dora,
                                                        fan_in_fan_out=kind == "gpt2", init_lora_weights=False))
    return dh.exact.exact_policy(adapted.base_model.model)


@pytest.mark.parametrize("make, count", [(low_rank_policy, 8), (peft_policy, 8),
                                         (functools.partial(peft_policy, dora=True), 12)])
def test_adapters(make, count):
    """As a trainer moves them, also where the backward pass holds DoRA's norm still."""
    policy = make()
    assert len(policy.parameters) == count
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


def test_state_in_bfloat16_is_computed_with_in_float32():
    policy = dh.Policy(build_model("llama", 11, torch.bfloat16))
    optimizer = SGD(policy.parameters.values(), lr=0.1, momentum=0.9)
    real_change(policy, rollouts_for(11), optimizer, "grpo")
    direction = dh.update_direction(policy, rollouts_for(11, seed=1), optimizer=optimizer)
    for name, p in policy.parameters.items():
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16 and torch.equal(direction.momentum[name], -(0.9 * buffer.float()))


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
    with pytest.raises(ValueError, match="objective: expected one of grpo, dr_grpo, .*, got 'ppo'"):
        dh.update_direction(policy, rollouts, "ppo", optimizer=SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match="rollouts: expected advantages, got None"):
        dh.update_direction(policy, rollouts.replace(rewards=None), optimizer=SGD(parameters, lr=0.1))
    optimizer = SGD(parameters, lr=0.1)
    direction = dh.update_direction(policy, rollouts, optimizer=optimizer)
    with pytest.raises(ValueError, match="index: expected one of 0 to 11, got 12"):
        direction.per_rollout(12)
    for wrong in (-1, np.int64(12)):
        with pytest.raises(ValueError, match=f"index: expected one of 0 to 11, got {wrong}"):
            direction.per_rollout(wrong)
    for wrong in (None, "0", [0], True):
        with pytest.raises(TypeError, match="index: expected an integer, got"):
            direction.per_rollout(wrong)
    assert relative_error(direction.per_rollout(np.int64(3)), direction.per_rollout(3)) == 0


def bump(policy):
    """The smallest change of a single number."""
    p = policy.model.model.layers[1].mlp.up_proj.weight
    p.data[0, 0] = torch.nextafter(p.data[0, 0], torch.tensor(9.0))


def train(policy, **settings):
    optimizer = AdamW(policy.parameters.values(), lr=1e-6, **settings)
    for p in policy.parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def write(policy, how):
    p = next(iter(policy.parameters.values()))
    with torch.no_grad():
        how(p)


WRITERS = {
    "fused": lambda policy: train(policy, fused=True),
    "foreach": lambda policy: train(policy, foreach=True),
    "one by one": lambda policy: train(policy, foreach=False),
    "data": bump,
    "data replaced": lambda policy: write(policy, lambda p: setattr(p, "data", p.data * 2)),
    "sign": lambda policy: write(policy, lambda p: setattr(p, "data", -p.data)),
    "exchanged": lambda policy: write(policy, lambda p: setattr(p, "data", p.data.flip(0))),
    "copy_": lambda policy: write(policy, lambda p: p.copy_(p + 1e-3)),
    "in numpy": lambda policy: write(policy, lambda p: p.numpy().__setitem__(0, 0.5)),
    "a parameter replaced": lambda policy: setattr(policy.model.model.norm, "weight", torch.nn.Parameter(
        1.01 * policy.model.model.norm.weight.detach())),
    "load_state_dict": lambda policy: policy.model.load_state_dict(build_model("llama", 11, seed=1).state_dict()),
    "frozen": lambda policy: write(policy, lambda p: p.requires_grad_(False).mul_(1.01).requires_grad_()),
}


@pytest.mark.parametrize("how", WRITERS)
def test_a_direction_made_at_other_parameters_is_refused_whoever_moved_them(how):
    policy, rollouts, evaluation = dh.Policy(build_model("llama", 11)), rollouts_for(11), rollouts_for(11, 6, 1, 3)
    direction = dh.update_direction(policy, rollouts, optimizer=SGD(policy.parameters.values(), lr=0.1))
    change = dh.entropy_change(policy, evaluation, direction)
    calls = (lambda: direction.per_rollout(0), lambda: dh.entropy_change(policy, evaluation, direction),
             lambda: dh.measured_entropy_change(policy, evaluation, direction, [1e-3]),
             lambda: dh.attribution(policy, evaluation, direction, change))
    for call in calls:
        call()
    before = copy.deepcopy(policy.model.state_dict())
    WRITERS[how](policy)
    for call in calls:
        with pytest.raises(ValueError, match="policy: its parameters have changed since this direction was made"):
            call()
    # Who passes the vector means it.
    dh.measured_entropy_change(policy, evaluation, direction.vector, [1e-3])
    assert dh.entropy_change(policy, evaluation, direction.vector).value != change.value
    policy.model.load_state_dict(before)
    assert [call() for call in calls][1].value == change.value


def test_another_policy_at_the_same_parameters_will_do():
    """Also one in float64, which holds the same numbers."""
    policy, rollouts, evaluation = dh.Policy(build_model("llama", 11)), rollouts_for(11), rollouts_for(11, 6, 1, 3)
    direction = dh.update_direction(policy, rollouts, optimizer=SGD(policy.parameters.values(), lr=0.1))
    change = dh.entropy_change(policy, evaluation, direction)
    other = dh.Policy(copy.deepcopy(policy.model))
    assert dh.entropy_change(other, evaluation, direction).value == change.value
    causes = dh.attribution(other, evaluation, direction, change)
    assert torch.equal(causes.tokens, dh.attribution(policy, evaluation, direction, change).tokens)
    exact = dh.exact.exact_policy(copy.deepcopy(policy.model))
    assert dh.entropy_change(exact, evaluation, direction).value == pytest.approx(change.value, rel=1e-3)
    bump(other)
    with pytest.raises(ValueError, match="policy: its parameters have changed since this direction was made"):
        dh.entropy_change(other, evaluation, direction)


def test_a_loaded_adapter_makes_a_direction_stale(tmp_path):
    def adapted(seed):
        base = build_model("llama", 11)
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    adapted(1).save_pretrained(tmp_path)
    model = adapted(0)
    policy, rollouts = dh.Policy(model.base_model.model), rollouts_for(11)
    direction = dh.update_direction(policy, rollouts, optimizer=SGD(policy.parameters.values(), lr=0.1))
    direction.per_rollout(0)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    with pytest.raises(ValueError, match="policy: its parameters have changed since this direction was made, .*lora_A"):
        direction.per_rollout(0)


def test_fingerprints_tell_values_apart_and_nothing_else():
    """Across chunks, in every dtype and layout."""
    x = torch.randn(3, fingerprints.CHUNK // 2, generator=torch.Generator().manual_seed(0))
    word = fingerprints.fingerprint({"x": x})["x"]
    same = (x.clone(), x.double(), x.T.contiguous().T, torch.stack([x, x], -1)[..., 0])
    assert {fingerprints.fingerprint({"x": y})["x"] for y in same} == {word}
    last, exchanged = x.clone(), x.clone()
    last[-1, -1] = torch.nextafter(last[-1, -1], torch.tensor(9.0))
    exchanged[0, 0], exchanged[2, 5] = x[2, 5], x[0, 0]
    others = (last, exchanged, -x, 2 * x, x.flip(1), x.flip(0), x.T, x[:2], x.double() * (1 + 1e-15), x.bfloat16(),
              x.roll(fingerprints.CHUNK), torch.zeros_like(x), torch.zeros_like(x[0]), x.long(), torch.complex(x, x))
    words = [fingerprints.fingerprint({"x": y})["x"] for y in others]
    assert len({word, *words}) == 1 + len(others)
    for a, b in ((torch.complex(x, x), torch.complex(x, x + 0.5)), (torch.tensor([1]), torch.tensor([1 + 2**40])),
                 (torch.tensor([True]), torch.tensor([False]))):
        assert fingerprints.fingerprint({"x": a}) != fingerprints.fingerprint({"x": b})


class Renamed(AdamW):
    """Nothing of its own that a step uses."""

    def __init__(self, parameters, lr=0.02):
        super().__init__(parameters, lr=lr, weight_decay=0.1)
        self.calls = 0

    def zero_grad(self, set_to_none=True):
        self.calls += 1
        super().zero_grad(set_to_none)

    def note(self):
        return self.calls


class Doubled(SGD):
    def step(self, closure=None):
        super().step(closure)
        return super().step(closure)


class Disguised(SGD):
    @functools.wraps(SGD.step)
    def step(self, closure=None):
        return None


class Mixed:
    def _init_group(self, group, *rest):
        return False


class WithMixin(Mixed, SGD):
    pass


class OwnGroups(AdamW):
    @property
    def param_groups(self):
        return [group | {"lr": 1.0} for group in self.__dict__["groups"]]

    @param_groups.setter
    def param_groups(self, groups):
        self.__dict__["groups"] = groups


def replaced(optimizer, step):
    optimizer.step = step(optimizer)
    return optimizer


def with_scheduler(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    return optimizer


@pytest.mark.parametrize("make", [
    Renamed, lambda p: with_scheduler(Renamed(p)), lambda p: with_scheduler(SGD(p, lr=0.1, momentum=0.9)),
    lambda p: Accelerator(cpu=True).prepare(AdamW(p, lr=0.02)),
    lambda p: AcceleratedOptimizer(Accelerator(cpu=True).prepare(AdamW(p, lr=0.02))),
    lambda p: with_scheduler(Accelerator(cpu=True).prepare(AdamW(p, lr=0.02)).optimizer)])
def test_the_same_step_under_another_name(make):
    """Subclasses that change nothing, schedulers, and what Accelerate makes of an optimizer."""
    policy = dh.Policy(build_model("llama", 11, torch.float64))
    optimizer = make(list(policy.parameters.values()))
    for seed in range(3):
        rollouts = rollouts_for(11, seed=seed)
        direction = dh.update_direction(policy, rollouts, optimizer=optimizer)
        assert relative_error(direction.vector, real_change(policy, rollouts, optimizer, "grpo")) < 1e-11


@pytest.mark.parametrize("make, reason", [
    (lambda p: Doubled(p, lr=0.1), "has a `step` of its own"),
    (lambda p: with_scheduler(Doubled(p, lr=0.1)), "has a `step` of its own"),
    (lambda p: Disguised(p, lr=0.1), "has a `step` of its own"),
    (lambda p: WithMixin(p, lr=0.1), "has a `_init_group` of its own"),
    (lambda p: OwnGroups(p, lr=0.1), "has a `param_groups` of its own"),
    (lambda p: replaced(SGD(p, lr=0.1), lambda o: lambda: None), "has a `step` of its own"),
    (lambda p: replaced(SGD(p, lr=0.1), lambda o: functools.wraps(o.step)(lambda: None)), "has a `step` of its own"),
    (lambda p: replaced(with_scheduler(SGD(p, lr=0.1)), lambda o: functools.wraps(o.step)(lambda: None)),
     "has a `step` of its own"),
    (lambda p: with_scheduler(replaced(SGD(p, lr=0.1), lambda o: types.MethodType(Doubled.step, o))),
     "has a `step` of its own"),
    (lambda p: Accelerator(cpu=True).prepare(Doubled(p, lr=0.1)), "has a `step` of its own"),
    (torch.optim.NAdam, "got NAdam"), (torch.optim.RAdam, "got RAdam"), (torch.optim.Adamax, "got Adamax"),
    (lambda p: None, "got None"), (lambda p: "adam", "got 'adam'"), (lambda p: p, "got list")])
def test_another_step_is_refused(make, reason):
    policy = dh.Policy(build_model("llama", 11))
    with pytest.raises(TypeError, match=f"^optimizer: expected a torch.optim SGD, RMSprop, Adam or AdamW.*{reason}"):
        dh.update_direction(policy, rollouts_for(11), optimizer=make(list(policy.parameters.values())))


def test_hooks_before_the_step_are_refused():
    policy, rollouts = dh.Policy(build_model("llama", 11)), rollouts_for(11)
    optimizer = SGD(policy.parameters.values(), lr=0.1)
    for hook in (optimizer.register_step_pre_hook, register_optimizer_step_pre_hook):
        handle = hook(lambda *_: None)
        try:
            with pytest.raises(TypeError, match="this SGD has hooks that run before its step and may change it"):
                dh.update_direction(policy, rollouts, optimizer=optimizer)
        finally:
            handle.remove()
    optimizer.register_step_post_hook(lambda *_: None)
    dh.update_direction(policy, rollouts, optimizer=optimizer)


def test_torch_s_own_step_replaced_for_all_is_refused(monkeypatch):
    policy = dh.Policy(build_model("llama", 11))
    optimizer = SGD(policy.parameters.values(), lr=0.1)
    monkeypatch.setattr(SGD, "step", lambda self, closure=None: None)
    with pytest.raises(TypeError, match="this SGD has a `step` of its own"):
        optimizers.rule_of(optimizer)


@pytest.mark.parametrize("wrong, error", [(-1.0, ValueError), (0, ValueError), (float("nan"), ValueError),
                                          (float("inf"), ValueError), ("1", TypeError), ([1.0], TypeError)])
def test_gradient_norms_are_positive_numbers(wrong, error):
    policy, rollouts = dh.Policy(build_model("qwen2", 11)), rollouts_for(11)
    with pytest.raises(error, match="^max_gradient_norm: expected a number > 0, got"):
        dh.update_direction(policy, rollouts, optimizer=SGD(policy.parameters.values(), lr=0.1),
                            max_gradient_norm=wrong)


def test_old_log_probs_and_rewards_that_are_no_numbers_are_refused():
    policy, rollouts = dh.Policy(build_model("qwen2", 11)), rollouts_for(11)
    direct = functools.partial(dh.update_direction, policy, rollouts, optimizer=SGD(policy.parameters.values(), lr=0.1))
    with torch.no_grad():
        old = dh.score(policy, rollouts).log_probs
    mask = rollouts.response_mask
    assert not mask.all()
    direct(old_log_probs=torch.where(mask, old, torch.nan))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="^old_log_probs: expected finite numbers inside the mask"):
            direct(old_log_probs=old.index_put((torch.tensor(2), torch.tensor(0)), torch.tensor(bad)))
        rewards = rollouts.rewards.index_fill(0, torch.tensor(3), bad)
        with pytest.raises(ValueError, match="^(rewards|advantages): expected finite numbers"):
            dh.update_direction(policy, rollouts.replace(rewards=rewards),
                                optimizer=SGD(policy.parameters.values(), lr=0.1))
    with pytest.raises(ValueError, match=r"^old_log_probs: expected the mask's shape \[12, 6\], got \[12, 5\]"):
        direct(old_log_probs=old[:, 1:])
    for wrong in (old.long(), old.tolist(), "old", 3):
        with pytest.raises(TypeError, match="^old_log_probs: expected (a tensor|floating-point numbers), got"):
            direct(old_log_probs=wrong)


WRONG = (None, 3, "policy", [1.0], {"a": 1}, np.ones(3))


def test_wrong_types_are_named():
    policy, rollouts = dh.Policy(build_model("qwen2", 11)), rollouts_for(11)
    optimizer = SGD(policy.parameters.values(), lr=0.1)
    right = {"policy": policy, "rollouts": rollouts, "optimizer": optimizer}
    for wrong in WRONG:
        for name, expected in (("policy", "a Policy"), ("rollouts", "a Rollouts"), ("optimizer", "a torch.optim SGD")):
            with pytest.raises(TypeError, match=f"^{name}: expected {expected}"):
                dh.update_direction(**right | {name: wrong})
    for wrong in ("4", [4], 2.5, True):
        with pytest.raises((TypeError, ValueError), match="^batch_size: expected an integer ≥ 1, got"):
            dh.update_direction(**right, batch_size=wrong)
    direction = dh.update_direction(**right, batch_size=np.int64(5))
    for name in ("vector", "momentum", "weight_decay", "preconditioner", "state"):
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            dataclasses.replace(direction, **{name: None})
    with pytest.raises(ValueError, match="^momentum: expected the parameters of the vector"):
        dataclasses.replace(direction, momentum={})
    first = next(iter(direction.vector))
    with pytest.raises(TypeError, match=r"^vector\['.*'\]: expected a tensor, got 3"):
        dataclasses.replace(direction, vector=direction.vector | {first: 3})
    for name in ("token_weights", "entropy_weights"):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \[12, 6\], got \[12\]"):
            dataclasses.replace(direction, **{name: torch.zeros(12)})


def test_what_is_not_finite_does_not_become_a_direction():
    policy, rollouts = dh.Policy(build_model("qwen2", 11)), rollouts_for(11)
    optimizer = SGD(policy.parameters.values(), lr=torch.tensor(float("nan")))
    with pytest.raises(ValueError, match=r"optimizer.param_groups\[0\]\['lr'\]: expected a number ≥ 0, got nan"):
        dh.update_direction(policy, rollouts, optimizer=optimizer)
    policy.model.model.norm.weight.register_hook(lambda g: g * torch.nan)
    with pytest.raises(ValueError, match="policy, rollouts: the gradient of model.norm.weight is NaN or infinite"):
        dh.update_direction(policy, rollouts, optimizer=SGD(policy.parameters.values(), lr=0.1))
