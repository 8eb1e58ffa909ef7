"""What a model does with its output layer's result is found anew in each run: scores are of what is sampled."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM

import deltah as dh
from conftest import SMALL, build_model, random_rollouts
from deltah.models.causal_lm import with_cache
from deltah.models.output_layers import Probe

V = 50
ROLLOUTS = random_rollouts(V, 6, 4, 5)


def by_logits(policy, rollouts=ROLLOUTS):
    """Log-probs [N, T] from the logits that sampling would draw from: the model's own with a cache."""
    found = torch.zeros(rollouts.response_mask.shape, dtype=torch.float64)
    for row in range(len(rollouts)):
        ids = rollouts.input_ids[row][rollouts.attention_mask[row]][None]
        length = int(rollouts.lengths[row])
        output = policy.run(with_cache(policy.model, torch.ones_like(ids), input_ids=ids))
        log_p = (output.logits[0, -length - 1:-1].double() / rollouts.temperature).log_softmax(-1)
        found[row, :length] = log_p.gather(-1, ids[0, -length:, None])[:, 0]
    return found


def assert_scores_are_of_what_is_sampled(policy):
    with torch.no_grad():
        scores, wanted = dh.score(policy, ROLLOUTS).log_probs, by_logits(policy)
    torch.testing.assert_close(scores.double(), wanted, atol=2e-5, rtol=1e-5)
    return scores


def made(config):
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def add_to_logits(module, args, output):
    logits = output if isinstance(output, torch.Tensor) else output.logits
    logits = logits + torch.linspace(0, 3, logits.shape[-1])
    if isinstance(output, torch.Tensor):
        return logits
    output.logits = logits
    return output


def double(module, args, output):
    output.logits.mul_(2)


def set_output_layer(model):
    torch.manual_seed(1)
    model.set_output_embeddings(torch.nn.Linear(32, V, bias=True))


def sharpen_last(module, args, output):
    output.logits[:, -1] *= 3
    return output


# What somebody does to a model that has been scored already.
CHANGES = {
    "hook on the output layer": lambda m: m.lm_head.register_forward_hook(add_to_logits),
    "hook before the output layer": lambda m: m.lm_head.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "hook on the model": lambda m: m.register_forward_hook(add_to_logits),
    "hook that multiplies in place": lambda m: m.register_forward_hook(double),
    "replaced output layer": set_output_layer,
    "forward of its own": lambda m: setattr(m.lm_head, "forward", lambda x: x @ m.lm_head.weight.T * 2),
    "new output layer's size": lambda m: m.resize_token_embeddings(V + 8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_to_the_model_after_the_first_score_counts(change):
    model = build_model("llama", V)
    policy = dh.Policy(model)
    before = assert_scores_are_of_what_is_sampled(policy)
    handle = CHANGES[change](model)
    after = assert_scores_are_of_what_is_sampled(policy)
    assert (after - before).abs().max() > 1e-3
    if hasattr(handle, "remove"):
        handle.remove()
        assert torch.equal(assert_scores_are_of_what_is_sampled(policy), before)
        # Logits are done without again.
        assert policy.output(ROLLOUTS.input_ids, 2)[2] is None


def test_a_hook_for_every_module_counts():
    policy = dh.Policy(build_model("llama", V))
    before = assert_scores_are_of_what_is_sampled(policy)

    def doubled(module, args, output):
        return 2 * output if module is policy.model.lm_head else output

    handle = torch.nn.modules.module.register_module_forward_hook(doubled)
    try:
        assert (assert_scores_are_of_what_is_sampled(policy) - before).abs().max() > 1e-3
    finally:
        handle.remove()


def test_a_hook_for_some_positions_alone_is_no_scaling():
    policy = dh.Policy(build_model("llama", V))
    policy.model.register_forward_hook(sharpen_last)
    assert policy.output(ROLLOUTS.input_ids, 3)[1] is None


@pytest.mark.parametrize("change", [lambda z: z + 1e-3 * z.tanh(), lambda z: torch.nn.functional.leaky_relu(z, 0.5)])
def test_what_is_almost_a_scaling_is_none(change):
    """By a thousandth, and of negative numbers alone."""
    policy = dh.Policy(build_model("llama", V))
    policy.model.register_forward_hook(lambda module, args, output: setattr(output, "logits", change(output.logits)))
    assert policy.output(ROLLOUTS.input_ids, 3)[1] is None
    assert_scores_are_of_what_is_sampled(policy)


class Twice(LlamaForCausalLM):
    """Whose output layer is called for the tokens backwards first."""

    def forward(self, input_ids, **kwargs):
        super().forward(input_ids.flip(1))
        return super().forward(input_ids, **kwargs)


def test_an_output_layer_that_is_called_twice_makes_logits():
    model = Twice(build_model("llama", V).config)
    model.load_state_dict(build_model("llama", V).state_dict())
    policy = dh.Policy(model)
    assert policy.output(ROLLOUTS.input_ids, 3)[1] is None
    assert_scores_are_of_what_is_sampled(policy)


LISTEN = {
    "before": lambda layer, hear: layer.register_forward_pre_hook(lambda module, args: hear(*args)),
    "after": lambda layer, hear: layer.register_forward_hook(lambda module, args, output: hear(output)),
    "before the backward pass": lambda layer, hear: layer.register_full_backward_pre_hook(lambda m, g: hear(*g)),
    "after the backward pass": lambda layer, hear: layer.register_full_backward_hook(lambda m, g, h: hear(*h)),
    "after any module": lambda layer, hear: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: hear(output) if module is layer else None),
}


@pytest.mark.parametrize("when", LISTEN)
def test_who_listens_to_the_output_layer_hears_of_the_real_logits(when):
    policy, heard = dh.Policy(build_model("llama", V)), []

    def hear(x):
        heard.append((type(x), x.shape[1:]))

    handle = LISTEN[when](policy.model.lm_head, hear)
    try:
        assert policy.output(ROLLOUTS.input_ids, 3)[1] is None
        del heard[:]
        dh.score(policy, ROLLOUTS, batch_size=len(ROLLOUTS)).log_probs.sum().backward()
    finally:
        handle.remove()
    assert heard and all(kind is torch.Tensor and shape[-1] in (V, 32) for kind, shape in heard)


CONFIGS = {
    "granite": (lambda: GraniteConfig(vocab_size=V, logits_scaling=3.0, **SMALL), "logits_scaling"),
    "cohere": (lambda: CohereConfig(vocab_size=V, logit_scale=0.3, **SMALL), "logit_scale"),
    "gemma2": (lambda: Gemma2Config(vocab_size=V, head_dim=8, final_logit_softcapping=3.0, **SMALL),
               "final_logit_softcapping"),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_scaling_changed_after_the_first_score_counts(architecture):
    config, name = CONFIGS[architecture]
    model = made(config())
    policy = dh.Policy(model)
    before = assert_scores_are_of_what_is_sampled(policy)
    for holder in (model, model.config):
        if hasattr(holder, name):
            setattr(holder, name, 1.7)
    after = assert_scores_are_of_what_is_sampled(policy)
    assert (after - before).abs().max() > 1e-3 and policy.output(ROLLOUTS.input_ids, 2)[2] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_is_found_to_the_last_digit_in_every_dtype(dtype):
    policy = dh.Policy(made(CONFIGS["granite"][0]()).to(dtype))
    assert policy.output(ROLLOUTS.input_ids, 1)[1].scaling.scale == pytest.approx(1 / 3, rel=1e-7)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_soft_cap_shows_in_the_smallest_vocabulary(size):
    config = CONFIGS["gemma2"][0]()
    config.vocab_size = size
    scaling = dh.Policy(made(config)).output(torch.zeros(1, 2, dtype=torch.long), 1)[1].scaling
    assert scaling.soft_cap == pytest.approx(3.0) and scaling.scale == 1


class WithScale(LlamaForCausalLM):
    """Whose logits are multiplied by a trainable number."""

    def __init__(self, config):
        super().__init__(config)
        self.log_scale = torch.nn.Parameter(torch.tensor(0.4))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.log_scale.exp()
        return output


def with_scale():
    model = WithScale(build_model("llama", V).config)
    model.load_state_dict(build_model("llama", V).state_dict(), strict=False)
    return dh.exact.exact_policy(model)


def test_the_gradient_of_a_trainable_scale_is_not_lost():
    policy = with_scale()
    assert policy.output(ROLLOUTS.input_ids, 2)[1] is None
    own = {name: p.detach() for name, p in policy.parameters.items()}
    step = 1e-5

    def total(parameters):
        scores = dh.score(policy, ROLLOUTS, parameters)
        return scores.log_probs.sum() + scores.entropies.sum()

    with torch.no_grad():
        difference = (total(own | {"log_scale": own["log_scale"] + step})
                      - total(own | {"log_scale": own["log_scale"] - step})) / (2 * step)
    (reverse,) = torch.autograd.grad(total(None), policy.parameters["log_scale"])
    v = {"log_scale": torch.ones((), dtype=torch.float64)}
    moving = {"log_scale": own["log_scale"]}
    forward = torch.func.jvp(lambda p: total(own | p), (moving,), (v,))[1]
    assert difference.abs() > 1e-2
    for found in (reverse, forward):
        torch.testing.assert_close(found, difference, atol=1e-6, rtol=1e-6)
    # The outer of two nested derivatives moves the scale, the inner one the rest.
    rest = {name: p for name, p in own.items() if name != "log_scale"}
    w = {name: p.cos() for name, p in rest.items()}

    def inner(p):
        return torch.func.jvp(lambda q: total(q | p), (rest,), (w,))[1]

    mixed = torch.func.jvp(inner, (moving,), (v,))[1]
    with torch.no_grad():
        up, down = (inner({"log_scale": own["log_scale"] + sign * step}) for sign in (1, -1))
    torch.testing.assert_close(mixed, (up - down) / (2 * step), atol=1e-6, rtol=1e-6)
    # And so do Taylor series, and the gradients of each rollout.
    change = dh.entropy_change(policy, ROLLOUTS, v, baseline="none", per="sequence")
    assert abs(change.value) > 1e-3
    kernel = dh.fisher_kernel(policy, ROLLOUTS, preconditioner=v)
    gradients = torch.stack([torch.autograd.grad(x, policy.parameters["log_scale"], retain_graph=True)[0]
                             for x in dh.score(policy, ROLLOUTS).log_probs.sum(1)])
    torch.testing.assert_close(kernel, torch.outer(gradients, gradients), atol=1e-10, rtol=1e-10)


def test_a_model_that_needs_its_logits_runs_once_for_each_batch():
    """Twice the first time; then one token tells."""
    policy, widths = dh.Policy(build_model("llama", V)), []
    policy.model.register_forward_hook(add_to_logits)
    policy.model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for _ in range(3):
        policy.output(ROLLOUTS.input_ids, 2)
    assert widths == [9, 9, 1, 9, 1, 9]


def test_an_error_of_the_models_own_is_the_one_that_is_raised():
    policy = dh.Policy(build_model("llama", V))

    def fail(*_):
        raise ArithmeticError("the model's own")

    for module in (policy.model.model.norm, policy.model):
        handle = module.register_forward_hook(fail)
        with pytest.raises(ArithmeticError, match="the model's own"):
            policy.output(ROLLOUTS.input_ids, 2)
        handle.remove()
    assert "forward" not in policy.model.lm_head.__dict__


def test_a_layers_own_forward_is_put_back():
    model = build_model("llama", V)
    own = model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight)
    policy = dh.Policy(model)
    policy.output(ROLLOUTS.input_ids, 2)
    assert model.lm_head.__dict__["forward"] is own


def test_probes_stay_probes_among_themselves_alone():
    x = Probe(torch.tensor([[1.0, -2.0]]))
    assert isinstance((x / 3)[:, -1:].float().tanh() * 2, Probe) and isinstance(torch.cat([x, x]), Probe)
    for met in (x * torch.ones(2), torch.ones(2) - x, torch.cat([x, torch.ones(1, 2)])):
        assert type(met) is torch.Tensor
    assert isinstance(x.shape, torch.Size) and x.shape == (1, 2)
    x *= 2
    x[..., 0] = 7
    assert x.values.tolist() == [[7.0, -4.0]]
