"""Whoever runs a model has it alone and in evaluation mode, and leaves it as it was."""

import contextlib
import copy
import threading

import pytest
import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deltah as dh
from conftest import build_model, random_rollouts
from deltah.models.modes import evaluation, forward_mode, held

V = 23


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def with_dropout(dropout=0.3):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=dropout,
                                      embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None))


def results(policy, rollouts):
    """Numbers of everything that runs a model and needs no tokenizer."""
    with torch.no_grad():
        scores = dh.score(policy, rollouts)
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.1)
    direction = dh.update_direction(policy, rollouts, "grpo", optimizer=optimizer)
    changes = [dh.entropy_change(policy, rollouts, direction, order, baseline="entropy") for order in (1, 2)]
    measured = [dh.measured_entropy_change(policy, rollouts, direction, [1e-3], method=method, seed=1)
                for method in ("importance", "coupled")]
    return {"log_probs": scores.log_probs, "entropies": scores.entropies,
            **{f"direction {name}": v for name, v in direction.vector.items()},
            "changes": torch.tensor([change.value for change in changes]),
            "measured": torch.tensor([float(m["change"][0]) for m in measured]),
            "kernel": dh.fisher_kernel(policy, rollouts), "logits": policy.logits(rollouts.input_ids, 2).detach(),
            "hidden": policy.output(rollouts.input_ids, 2)[0].detach()}


def rewarded(count=12):
    rollouts = random_rollouts(V, count, 4, 6)
    return rollouts.replace(rewards=torch.arange(count) % 3.0, temperature=1.0)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=0, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_a_trainers_modes_change_no_number_and_stay(checkpointing):
    model, rollouts = with_dropout(), rewarded()
    wanted = results(dh.Policy(copy.deepcopy(model).eval()), rollouts)
    assert wanted["log_probs"].abs().max() > 1
    policy = dh.Policy(model.eval())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    model.transformer.h[1].eval()
    before, random_state = modes(model), torch.get_rng_state()
    found = results(policy, rollouts)
    assert_same(found, wanted)
    assert modes(model) == before and torch.equal(torch.get_rng_state(), random_state)


def test_sampling_is_without_dropout_too(shipped):
    model = copy.deepcopy(shipped.model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    policy = dh.Policy(model.train(), shipped.tokenizer)
    arguments = (["Ava has 3 eggs."], 2, 8)
    assert torch.equal(dh.sample(policy, *arguments).input_ids, dh.sample(shipped, *arguments).input_ids)
    assert all(modes(model).values())


def test_the_constructor_changes_nothing(shipped):
    model = build_model("qwen3_moe", shipped.vocabulary_size, torch.float64).train()
    model.model.layers[0].eval()
    before, config, state = modes(model), model.config.to_dict(), torch.get_rng_state()
    experts = model.config._experts_implementation
    assert experts != "eager"
    policy = dh.Policy(model, shipped.tokenizer)
    dh.score(policy, random_rollouts(shipped.vocabulary_size, 3, 4, 5))
    assert modes(model) == before and model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert model.config._experts_implementation == experts
    assert all(p.grad is None for p in model.parameters()) and not model.lm_head.__dict__.get("forward")


def test_modes_are_put_back_after_an_exception():
    model = with_dropout().train()
    model.transformer.ln_f.eval()
    policy, before = dh.Policy(model), modes(model)

    def fail(*_):
        raise RuntimeError("stop")

    handle = model.transformer.h[0].register_forward_hook(fail)
    for call in (lambda: dh.score(policy, rewarded()), lambda: dh.fisher_kernel(policy, rewarded()),
                 lambda: policy.logits(torch.zeros(1, 2, dtype=torch.long), 1)):
        with pytest.raises(RuntimeError, match="stop"):
            call()
        assert modes(model) == before and "forward" not in model.lm_head.__dict__
    handle.remove()
    with pytest.raises(RuntimeError, match="stop"), policy.forward_mode(), evaluation(model):
        assert not any(modes(model).values())
        fail()
    assert modes(model) == before
    # Nobody is inside any more, so that a module in training counts.
    with held(model) as depth:
        assert depth == 0


@pytest.mark.parametrize("failing", [False, True])
def test_implementations_are_put_back(failing):
    """Another library's attention, and the grouped matrix product of experts."""
    model = build_model("qwen3_moe", V)
    AttentionInterface.register("another", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("another")
    model.set_experts_implementation("grouped_mm")
    with contextlib.suppress(ArithmeticError), forward_mode(model):
        assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "eager")
        if failing:
            raise ArithmeticError
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("another", "grouped_mm")


def test_training_mode_within_a_context_does_not_bring_dropout_back():
    policy = dh.Policy(with_dropout())
    wanted = dh.score(policy, rewarded()).log_probs
    with policy.forward_mode():
        policy.model.train()
        torch.testing.assert_close(dh.score(policy, rewarded()).log_probs, wanted, atol=1e-5, rtol=1e-5)


def in_threads(*functions, times):
    """What each returns, in all calls, of as many threads."""
    found, errors, start = [[] for _ in functions], [], threading.Barrier(len(functions))

    def run(function, results):
        try:
            start.wait()
            for _ in range(times):
                results.append(function())
        except Exception as error:  # for the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(functions, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def test_two_threads_score_with_one_policy():
    policy, rollouts = dh.Policy(build_model("qwen3", V)), rewarded()
    shifted = {name: 1.1 * p.detach() for name, p in policy.parameters.items()}

    def scored(parameters):
        with torch.no_grad():
            return dh.score(policy, rollouts, parameters, batch_size=2).log_probs

    functions = [lambda: scored(None), lambda: scored(shifted), lambda: torch.tensor(len(policy.parameters))]
    wanted = [function() for function in functions]
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)
    for found, right in zip(in_threads(*functions, times=20), wanted, strict=True):
        assert len(found) == 20 and all(torch.equal(x, right) for x in found)


def test_one_thread_scores_while_others_take_derivatives():
    policies = [dh.Policy(build_model(name, V)) for name in ("gpt2", "qwen3_moe")]
    rollouts = rewarded()
    attention = [policy.model.config._attn_implementation for policy in policies]
    directions = [{name: p.detach().cos() for name, p in policy.parameters.items()} for policy in policies]

    def scored():
        with torch.no_grad():
            return dh.score(policies[0], rollouts).log_probs

    def changed(k, order):
        change = dh.entropy_change(policies[k], rollouts, directions[k], order, baseline="entropy")
        return change.token_contributions

    def by_forward_mode(k):
        own = {name: p.detach() for name, p in policies[k].parameters.items()}
        with policies[k].forward_mode():
            return torch.func.jvp(lambda p: dh.score(policies[k], rollouts, p).entropies, (own,), (directions[k],))[1]

    functions = [scored, lambda: changed(0, 1), lambda: changed(1, 2), lambda: by_forward_mode(0),
                 lambda: by_forward_mode(1)]
    wanted = [function() for function in functions]
    for found, right in zip(in_threads(*functions, times=5), wanted, strict=True):
        for x in found:
            torch.testing.assert_close(x, right, atol=1e-6, rtol=1e-5)
    assert [policy.model.config._attn_implementation for policy in policies] == attention


def test_forward_mode_switches_nothing_for_other_threads():
    """PyTorch's own switch of attention holds for the whole process."""
    enabled = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled)
    before = [f() for f in enabled]
    with forward_mode(build_model("qwen2", V)):
        assert [f() for f in enabled] == before


@pytest.mark.parametrize("mask", [None, "boolean", "floating", "causal"])
def test_attention_written_out_is_attention(mask):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator, dtype=torch.float64)
    allowed = torch.ones(5, 5).tril().bool()
    options = {None: {}, "boolean": {"attn_mask": allowed}, "causal": {"is_causal": True, "scale": 0.3},
               "floating": {"attn_mask": torch.randn(5, 5, dtype=torch.float64, generator=generator)}}[mask]
    attend = torch.nn.functional.scaled_dot_product_attention
    wanted = attend(query, key, value, enable_gqa=True, **options)
    with forward_mode(build_model("qwen2", V)):
        found = attend(query, key, value, enable_gqa=True, **options)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("affine", [(), ("weight",), ("weight", "bias")])
def test_layer_norm_written_out_is_layer_norm(affine):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, 4, 8, generator=generator, dtype=torch.float64)
                       for shape in ((2, 3), (), ()))
    options = {name: {"weight": weight, "bias": bias}[name] for name in affine} | {"eps": 0.1}
    wanted = torch.nn.functional.layer_norm(x, (4, 8), **options)
    with forward_mode(build_model("qwen2", V)):
        found = torch.nn.functional.layer_norm(x, (4, 8), **options)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
