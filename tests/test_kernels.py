import gc
import inspect
import math
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltah as dh
from conftest import CONFIGS, MORE, build_model, random_rollouts
from deltah import kernels, memory
from deltah.derivatives import factors, sample_gradients
from deltah.scoring import score
from test_updates import low_rank_policy, peft_policy

V = 37
NAMES = sorted({*CONFIGS, *MORE})


def build(name, dtype=torch.float64):
    return dh.Policy(build_model(name, V, dtype))


def exact(name):
    """In float64 throughout: a model that rounds to float32 by itself scores a rollout differently in a batch."""
    return dh.exact.exact_policy(build_model(name, V))


def rollouts_for(size=V, count=5, prompt=5, response=6, seed=0, temperature=1.3):
    return random_rollouts(size, count, prompt, response, seed, temperature)


def gradients(policy, rollouts):
    """One backward pass for each rollout."""
    rows = []
    for i in range(len(rollouts)):
        total = score(policy, rollouts.select(slice(i, i + 1))).log_probs.sum()
        found = torch.autograd.grad(total, list(policy.parameters.values()), materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def random_preconditioner(policy):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(p.shape, dtype=p.dtype, generator=generator) for name, p in policy.parameters.items()}


def flat(policy, tensors):
    return torch.cat([tensors.get(name, torch.zeros_like(p)).flatten() for name, p in policy.parameters.items()])


def assert_close(kernel, expected, tolerance=1e-10):
    scale = expected.diag().sqrt() if len(expected) == expected.shape[1] else expected.abs().max().sqrt().expand(1)
    error = (kernel - expected).abs() / (scale[:, None] * scale)
    assert error.max() < tolerance, f"relative error {float(error.max()):.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_backward_pass_for_each_rollout(name):
    policy, rollouts = exact(name), rollouts_for()
    matrix, p = gradients(policy, rollouts), random_preconditioner(policy)
    assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T, 1e-12)
    assert_close(dh.fisher_kernel(policy, rollouts, preconditioner=p), matrix * flat(policy, p) @ matrix.T, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_rounds_by_itself_agrees_to_its_rounding(name):
    """As users have it: float64 weights, and norms, rotary positions or a softmax in float32.

    Alone, a rollout is rounded differently than beside longer ones, so that its log-probs differ by some 1e-8 already.
    """
    policy, rollouts = build(name), rollouts_for()
    matrix, p = gradients(policy, rollouts), random_preconditioner(policy)
    rounding = torch.finfo(torch.float32).eps
    assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T, rounding)
    assert_close(dh.fisher_kernel(policy, rollouts, preconditioner=p), matrix * flat(policy, p) @ matrix.T, rounding)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "qwen3_moe", "lfm2", "opt"])
@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_any_number_of_rollouts(name, count):
    """Also as many as positions (11), heads, or experts."""
    policy, rollouts = exact(name), rollouts_for(count=count)
    matrix = gradients(policy, rollouts)
    assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "qwen3_moe", "phi", "gemma2"])
@pytest.mark.parametrize("limit", ["FORMED", "CONTRACTED", "KEPT"])
def test_every_way_of_computing_agrees(name, limit, monkeypatch):
    """Small blocks of what is formed; nothing contracted; nothing kept of the output layer, and small blocks of it."""
    policy, rollouts = build(name), rollouts_for()
    expected = dh.fisher_kernel(policy, rollouts)
    monkeypatch.setattr(kernels, limit, 500 if limit == "FORMED" else 0)
    monkeypatch.setattr(factors, "BLOCK", 100)
    assert_close(dh.fisher_kernel(policy, rollouts), expected)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3_moe"])
def test_what_does_not_fit_meets_in_blocks(name, batch_size, monkeypatch):
    policy, one, two = exact(name), rollouts_for(count=7), rollouts_for(count=4, response=9, seed=1)
    a, b, p = gradients(policy, one), gradients(policy, two), random_preconditioner(policy)
    # Of what is held for two blocks of two rollouts.
    needed = 5 * memory.position_bytes(policy) * int(one.attention_mask.sum(1).max())
    monkeypatch.setattr(memory, "free", lambda device: needed / memory.SHARE / kernels.OF_FACTORS + 9)
    assert kernels._block_size(policy, one, one) == 2
    assert_close(dh.fisher_kernel(policy, one, preconditioner=p, batch_size=batch_size), a * flat(policy, p) @ a.T)
    assert_close(dh.fisher_kernel(policy, one, two, batch_size=batch_size), a @ b.T)


class Kept(list):
    def __call__(self, gradient):
        self.append(gradient)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_gradients_are_gone_with_their_last_use(name):
    """Not only at the next garbage collection: those of many batches would pile up until then."""
    policy, kept = build(name), Kept()
    gc.collect()
    gc.disable()
    try:
        sample_gradients.sample_gradients(policy, rollouts_for(), kept, keep=0)
        alive = [weakref.ref(gradient) for gradient in kept]
        assert len(alive) >= len(policy.parameters)
        del kept
        assert not any(gradient() for gradient in alive)
    finally:
        gc.enable()


def test_both_routes_are_taken(monkeypatch):
    """Wide layers and few positions are contracted, narrow ones and many formed."""
    taken = set()
    for route in ("_contracted", "_formed"):
        original = getattr(kernels, route)
        monkeypatch.setattr(kernels, route, lambda *a, f=original, r=route: (taken.add(r), f(*a))[1])
    dh.fisher_kernel(build("llama"), rollouts_for(count=2, prompt=1, response=1))
    assert "_contracted" in taken
    taken.clear()
    dh.fisher_kernel(build("llama"), rollouts_for(count=5, response=60))
    assert "_formed" in taken


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 6])
def test_two_sets_and_batches(name, batch_size):
    policy, one, two = exact(name), rollouts_for(), rollouts_for(count=7, prompt=3, response=9, seed=1)
    a, b = gradients(policy, one), gradients(policy, two)
    p = random_preconditioner(policy)
    assert_close(dh.fisher_kernel(policy, one, batch_size=batch_size), a @ a.T)
    for left, right, expected in ((one, two, a @ b.T), (two, one, b @ a.T)):
        assert_close(dh.fisher_kernel(policy, left, right, batch_size=batch_size), expected)
    expected = a * flat(policy, p) @ b.T
    assert_close(dh.fisher_kernel(policy, one, two, preconditioner=p, batch_size=batch_size), expected)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "qwen3_moe"])
def test_token_kernel_sums_to_the_sequences(name):
    policy = exact(name)
    rollouts, others = rollouts_for(), rollouts_for(count=3, response=4, seed=2)
    rows, columns = (torch.nn.functional.one_hot(r.response_mask.nonzero()[:, 0]).double() for r in (rollouts, others))
    tokens = dh.fisher_kernel(policy, rollouts, others, level="token")
    assert tokens.shape == (int(rollouts.response_mask.sum()), int(others.response_mask.sum()))
    assert_close(rows.T @ tokens @ columns, dh.fisher_kernel(policy, rollouts, others))
    # One entry by hand: the last token of the first response with itself.
    last = int(rollouts.lengths[0]) - 1
    log_prob = score(policy, rollouts.select(slice(0, 1))).log_probs[0, last]
    found = torch.autograd.grad(log_prob, list(policy.parameters.values()), materialize_grads=True)
    own = dh.fisher_kernel(policy, rollouts, level="token")[last, last]
    assert float(own) == pytest.approx(float(sum(g.square().sum() for g in found)), rel=1e-10)


def test_float32_to_1e_5(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(4)), 4, seed=1)
    exact = dh.load_policy(shipped.model.config._name_or_path, device="cpu", dtype="float64")
    matrix = gradients(exact, rollouts)
    kernel = dh.fisher_kernel(shipped, rollouts)
    assert kernel.dtype == torch.float32
    assert_close(kernel.double(), matrix @ matrix.T, 1e-5)


def test_float32_sums_of_millions_of_products():
    """A matrix product of such depth in float32 would lose three digits."""
    config = CONFIGS["qwen2"](60_000)
    config.hidden_size, config.head_dim = 64, 16
    torch.manual_seed(0)
    policy = dh.Policy(AutoModelForCausalLM.from_config(config))
    rollouts = rollouts_for(size=60_000, count=3, response=40)
    kernel = dh.fisher_kernel(policy, rollouts)
    policy.model.double()
    assert_close(kernel.double(), dh.fisher_kernel(policy, rollouts), 3e-6)


def test_bfloat16():
    policy, rollouts = build("qwen2", torch.bfloat16), rollouts_for()
    matrix = gradients(policy, rollouts).double()
    kernel = dh.fisher_kernel(policy, rollouts)
    assert kernel.dtype == torch.float32
    assert_close(kernel.double(), matrix @ matrix.T, 0.05)


def test_frozen_parameters_and_adapters():
    rollouts = rollouts_for(size=11)
    adapted = low_rank_policy()
    matrix = gradients(adapted, rollouts)
    assert_close(dh.fisher_kernel(adapted, rollouts), matrix @ matrix.T)
    for kept in ("bias", "norm", "embed", "layers.1", "lm_head", "experts"):
        policy = build("qwen3_moe" if kept == "experts" else "phi" if kept == "bias" else "llama")
        for name, p in policy.model.named_parameters():
            p.requires_grad_(kept in name)
        matrix = gradients(policy, rollouts)
        assert len(policy.parameters) and matrix.any()
        assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T)


class Hidden(torch.autograd.Function):
    """A product that no function of torch shows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight.mean()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight.mean(), (gradient * x).sum().expand(weight.shape) / weight.numel()


def unusual(kind):
    """What a model may do with its parameters that none of the tested ones does."""
    policy = build("llama")
    layer = policy.model.model.layers[0].mlp.down_proj
    forward, weight = layer.forward, layer.weight
    layer.forward = {
        "hidden": lambda x: Hidden.apply(forward(x), weight),
        "hidden cast": lambda x: Hidden.apply(forward(x), weight.float()),
        "elementwise": lambda x: forward(x) + weight.sum(),
        "twice": lambda x: forward(x) + 0.5 * forward(x.flip(-1)),
        "transposed": lambda x: x @ weight.T + torch.matmul(x, weight.t()),
        "rows": lambda x: torch.nn.functional.linear(x, weight[:16]).repeat(1, 1, 2),
        "in place": lambda x: forward(x).mul_(2).add_(1),
        "without a gradient": lambda x: torch.nn.functional.linear(x, weight.detach()),
        "no grad": lambda x: forward(x) + torch.no_grad()(forward)(x),
        "stacked": lambda x: torch.einsum("nli,soi->nlo", x, torch.stack([weight, weight * 2])),
    }[kind]
    return policy


@pytest.mark.parametrize("kind", ["hidden", "hidden cast", "elementwise", "twice", "transposed", "rows", "in place",
                                  "without a gradient", "stacked"])
def test_what_no_rule_covers_is_found_out(kind):
    policy, rollouts = unusual(kind), rollouts_for()
    matrix = gradients(policy, rollouts)
    assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T)


def test_rules_cover_real_models(monkeypatch):
    """No tested model but one falls back on a backward pass for each rollout."""
    def refuse(policy, rollouts, names):
        raise AssertionError(f"{names} have no rule")

    monkeypatch.setattr(sample_gradients, "_one_by_one", refuse)
    for name in {*NAMES} - {"gpt_oss"}:
        dh.fisher_kernel(build(name), rollouts_for())
    with pytest.raises(AssertionError, match="sinks"):
        dh.fisher_kernel(build("gpt_oss"), rollouts_for())


def test_an_input_changed_in_place_is_refused():
    policy = build("llama")
    layer = policy.model.model.layers[0].mlp.down_proj
    forward = layer.forward

    def spoiled(x):
        out = forward(x)
        with torch.no_grad():
            x.mul_(2)
        return out

    layer.forward = spoiled
    with pytest.raises(RuntimeError, match="changed a layer's input in place|modified by an inplace operation"):
        dh.fisher_kernel(policy, rollouts_for())


def test_a_policy_gradient_step_moves_log_probs_as_the_kernel_says(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(4)), 4, seed=2)
    policy = dh.exact.exact_policy(dh.load_policy(shipped.model.config._name_or_path, "cpu").model)
    objective = dh.objectives.Objective(dh.objectives.grpo, aggregation="constant", length=1)
    direction = dh.update_direction(policy, rollouts, objective, torch.optim.SGD(policy.parameters.values(), lr=0.1))
    weights = direction.token_weights[:, 0].double()
    eta = 1e-9
    with torch.no_grad():
        moved = score(policy, rollouts, policy.shifted(direction.vector, eta)).log_probs.sum(1)
        moved = moved - score(policy, rollouts).log_probs.sum(1)
    predicted = eta * dh.fisher_kernel(policy, rollouts) @ weights
    torch.testing.assert_close(moved, predicted, atol=1e-4 * float(predicted.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_sketch_has_the_error_that_it_states(level):
    policy, rollouts = build("llama"), rollouts_for(count=4, response=4)
    exact = dh.fisher_kernel(policy, rollouts, level=level)
    errors = []
    for dimension in (16, 64, 256):
        stated = ((exact.diag()[:, None] * exact.diag() + exact.square()) / dimension).sqrt()
        z = [dh.fisher_sketch(policy, rollouts, dimension, level=level, seed=seed) for seed in range(60)]
        scores = torch.stack([(x @ x.T - exact) / stated for x in z])
        # 60 draws of pairs that depend on each other: four standard errors are about a third.
        assert scores.square().mean().sqrt() == pytest.approx(1, abs=0.3)
        assert scores.mean().abs() < 0.3
        errors.append(float(torch.stack([x @ x.T - exact for x in z]).norm()))
    assert math.log(errors[0] / errors[2]) / math.log(16) == pytest.approx(0.5, abs=0.1)


def test_sketches_of_batches_and_sets_belong_together():
    policy, one, two = build("qwen3_moe"), rollouts_for(), rollouts_for(count=7, seed=1)
    p = random_preconditioner(policy)
    whole = dh.fisher_sketch(policy, one, 64, p)
    torch.testing.assert_close(dh.fisher_sketch(policy, one, 64, p, batch_size=2), whole)
    torch.testing.assert_close(dh.fisher_sketch(policy, one.select(slice(1, 4)), 64, p), whole[1:4])
    assert not torch.equal(dh.fisher_sketch(policy, one, 64, p, seed=1), whole)
    exact = dh.fisher_kernel(policy, one, two, p)
    large = dh.fisher_sketch(policy, one, 2**14, p) @ dh.fisher_sketch(policy, two, 2**14, p).T
    assert (large - exact).norm() < 0.1 * dh.fisher_kernel(policy, one, preconditioner=p).norm()


@pytest.mark.parametrize("arguments, message", [
    ({"policy": None}, "policy: expected a Policy, got None"),
    ({"rollouts": [1]}, "rollouts: expected a Rollouts, got list"),
    ({"others": "rollouts"}, "others: expected a Rollouts, got 'rollouts'"),
    ({"level": None}, "level: expected one of sequence, token, got None"),
    ({"batch_size": "2"}, "batch_size: expected an integer ≥ 1, got '2'"),
    ({"preconditioner": 1.0}, "preconditioner: expected tensors by name, got 1.0"),
    ({"preconditioner": {"model.norm.weight": [1.0]}}, r"preconditioner\['model.norm.weight'\]: expected a tensor"),
    ({"dimension": None}, "dimension: expected an integer ≥ 1, got None"),
    ({"seed": "a"}, "seed: expected an integer ≥ 0, got 'a'")])
def test_wrong_types_are_named(arguments, message):
    given = {"policy": build("llama"), "rollouts": rollouts_for(), **arguments}
    for function in (dh.fisher_kernel, dh.fisher_sketch):
        if arguments.keys() <= set(inspect.signature(function).parameters):
            with pytest.raises(TypeError, match=message):
                function(**given)


def test_bad_arguments_are_named():
    policy, rollouts = build("llama"), rollouts_for()
    with pytest.raises(ValueError, match="level: expected one of sequence, token, got 'word'"):
        dh.fisher_kernel(policy, rollouts, level="word")
    with pytest.raises(ValueError, match="others: expected the temperature 1.3 of rollouts, got 1.0"):
        dh.fisher_kernel(policy, rollouts, rollouts.replace(temperature=1.0))
    with pytest.raises(ValueError, match=r"preconditioner\['nonsense'\]: expected the name of a trainable parameter"):
        dh.fisher_kernel(policy, rollouts, preconditioner={"nonsense": torch.ones(1)})
    with pytest.raises(ValueError, match="batch_size: expected an integer ≥ 1, got 0"):
        dh.fisher_kernel(policy, rollouts, batch_size=0)
    with pytest.raises(ValueError, match="dimension: expected an integer ≥ 1, got 0"):
        dh.fisher_sketch(policy, rollouts, 0)
    with pytest.raises(ValueError, match=r"preconditioner\['model.norm.weight'\]: expected numbers ≥ 0"):
        dh.fisher_sketch(policy, rollouts, 8, {"model.norm.weight": -torch.ones(32, dtype=torch.float64)})
    with pytest.raises(ValueError, match="rollouts: expected token ids below the policy's vocabulary size"):
        dh.fisher_kernel(policy, rollouts.replace(input_ids=rollouts.input_ids + V))
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="policy: the kernel is NaN or infinite, first in row 0"):
        dh.fisher_kernel(policy, rollouts)
    policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="policy: has no trainable parameters"):
        dh.fisher_kernel(policy, rollouts)


class Doubled(torch.autograd.Function):
    """With the derivative of what it computes, if `true`, or another."""

    @staticmethod
    def forward(ctx, x, true):
        ctx.true = true
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return (2.0 if ctx.true else 1.0) * gradient, None


class OutsidePyTorch(Doubled):
    @staticmethod
    def forward(ctx, x, true):
        ctx.true = true
        return torch.from_numpy(2 * x.numpy())


def without_grad(x):
    with torch.no_grad():
        return x.abs().amax(-1, keepdim=True)


HIDDEN = {
    # What a layer does with its output, and whether the backward pass is its derivative all the same.
    "detach that cancels": (lambda x: (x - x.detach().mean()) + x.detach().mean(), True),
    "softmax less its maximum": (lambda x: (x - without_grad(x)).softmax(-1) + x, True),
    "custom function": (lambda x: Doubled.apply(x, True), True),
    "detach": (lambda x: x * x.detach(), False),
    "data": (lambda x: x * x.data.mean(), False),
    "no grad": (lambda x: x * without_grad(x), False),
    "number": (lambda x: x * float(x.mean()), False),
    "custom function that nobody can see into": (lambda x: OutsidePyTorch.apply(x, True), False),
    "another backward": (lambda x: Doubled.apply(x, False), False),
    "straight through": (lambda x: x + ((4 * x).round() / 4 - x).detach(), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_backward_pass_that_is_not_the_derivative_is_refused(kind, dtype):
    function, right = HIDDEN[kind]
    policy, rollouts = dh.Policy(build_model("llama", V, dtype)), rollouts_for()
    layer = policy.model.model.layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: function(forward(x))
    if right:
        matrix = gradients(policy, rollouts)
        assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T, 1e-5 if dtype == torch.float32 else 1e-10)
        return
    for call in (dh.fisher_kernel, dh.fisher_sketch):
        with pytest.raises(ValueError, match="^policy: the backward pass of LlamaForCausalLM (is not the|hides some)"):
            call(policy, rollouts)


def test_a_backward_pass_is_told_within_the_rounding_of_autocast():
    model, rollouts = build_model("llama", V), rollouts_for()
    model.model.norm.register_forward_hook(lambda module, arguments, h: (h - h.detach().mean()) + h.detach().mean())
    exact = dh.fisher_kernel(dh.Policy(model), rollouts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = dh.fisher_kernel(dh.Policy(model), rollouts)
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 0.04


def test_a_layer_called_once_more_without_grad_is_refused():
    with pytest.raises(ValueError, match="is not the derivative of its function, as it hides .*linear without grad"):
        dh.fisher_kernel(unusual("no grad"), rollouts_for())


def test_dora_has_no_kernel_and_lora_has():
    rollouts = rollouts_for(11)
    with pytest.raises(ValueError, match="policy: the backward pass of LlamaForCausalLM is not the derivative"):
        dh.fisher_kernel(peft_policy(dora=True), rollouts)
    policy = peft_policy()
    matrix = gradients(policy, rollouts)
    assert_close(dh.fisher_kernel(policy, rollouts), matrix @ matrix.T)
