import copy
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import deltah as dh
from conftest import CONFIGS, MORE, ROOT, build_model, random_rollouts
from deltah.models.causal_lm import check_causal_lm


def test_parameters_are_the_trainable_ones_and_tied_ones_appear_once(shipped):
    names = set(shipped.parameters)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = build_model("qwen2", 64)
    model.model.layers[0].requires_grad_(False)
    frozen = dh.Policy(model).parameters
    assert frozen and not any(name.startswith("model.layers.0.") for name in frozen)


def test_padding_on_the_right_changes_no_logits(random_policy):
    ids = torch.randint(0, 400, (1, 9), generator=torch.Generator().manual_seed(0))
    whole = random_policy.logits(ids, keep=3)
    padded = random_policy.logits(torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1), keep=7)[:, :3]
    torch.testing.assert_close(padded, whole, atol=2e-5, rtol=1e-5)


def test_given_parameters_take_the_place_of_the_models_own(random_policy):
    ids = torch.randint(0, 400, (2, 6), generator=torch.Generator().manual_seed(0))
    own = {name: p.detach() for name, p in random_policy.parameters.items()}
    before = random_policy.logits(ids, keep=2)
    torch.testing.assert_close(random_policy.logits(ids, 2, own), before)
    shifted = random_policy.logits(ids, 2, {name: 1.1 * p for name, p in own.items()})
    assert not torch.allclose(shifted, before, atol=1e-3)
    torch.testing.assert_close(random_policy.logits(ids, keep=2), before)


def test_end_tokens_come_from_tokenizer_and_generation_config(shipped):
    model = build_model("llama", shipped.vocabulary_size)
    model.generation_config.eos_token_id = [7, 9, 10**9]
    assert dh.Policy(model, shipped.tokenizer).eos_token_ids == (shipped.tokenizer.eos_token_id, 7, 9)


def test_loads_what_it_shipped_and_a_float64_copy():
    policy = dh.load_policy(ROOT / "data" / "policy", device="cpu", dtype="float64")
    assert policy.dtype == torch.float64 and policy.device.type == "cpu"
    assert policy.eos_token_ids == (policy.tokenizer.eos_token_id,)


@pytest.mark.parametrize("arguments, message", [
    ({"path": "no/such/folder"}, "path: could not load a policy from 'no/such/folder'; expected a folder"),
    ({"path": str(ROOT / "tests")}, "path: could not load a policy"),
    ({"path": str(ROOT / "data" / "policy"), "device": "cuda:99"}, "device: expected 'auto'"),
    ({"path": str(ROOT / "data" / "policy"), "device": "toaster"}, "device: expected 'auto'"),
    ({"path": str(ROOT / "data" / "policy"), "dtype": "int8"},
     "dtype: expected one of float32, float64, bfloat16, got 'int8'"),
])
def test_what_cannot_be_loaded_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dh.load_policy(**arguments)


def test_damaged_weights_are_refused(tmp_path):
    folder = shutil.copytree(ROOT / "data" / "policy", tmp_path / "policy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="path: could not load a policy"):
        dh.load_policy(folder)


def test_missing_weights_are_refused_rather_than_drawn_at_random(tmp_path, shipped):
    state = shipped.model.state_dict()
    state.pop("lm_head.weight"), state.pop("model.norm.weight")
    shipped.model.save_pretrained(tmp_path, state_dict=state)
    shipped.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lack 1 tensors of the model, such as model.norm.weight"):
        dh.load_policy(tmp_path)


def test_pickled_weights_are_refused(tmp_path, shipped):
    shutil.copytree(ROOT / "data" / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").unlink()
    torch.save(shipped.model.state_dict(), tmp_path / "policy" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="path: could not load a policy"):
        dh.load_policy(tmp_path / "policy")


def test_a_tokenizer_without_end_token_is_refused(shipped):
    tokenizer = copy.deepcopy(shipped.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: has no end-of-sequence token"):
        dh.Policy(build_model("qwen2", shipped.vocabulary_size), tokenizer)


def test_what_is_no_causal_lm_is_refused():
    with pytest.raises(TypeError, match="model: expected a transformers causal LM, got Linear"):
        dh.Policy(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer, got 'gpt2'"):
        dh.Policy(build_model("qwen2", 64), "gpt2")
    with pytest.raises(ValueError, match="model: expected a causal LM with an output layer, got Qwen2Model"):
        dh.Policy(build_model("qwen2", 64).model)


SMALL_BERT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["default BERT", "BERT for masked LM", "small BERT for masked LM"])
def test_models_that_look_ahead_are_refused(kind, dtype):
    torch.manual_seed(0)
    if kind == "default BERT":
        model = AutoModelForCausalLM.from_config(BertConfig(num_hidden_layers=2))
    else:
        model = BertForMaskedLM(BertConfig(**(SMALL_BERT if "small" in kind else {"num_hidden_layers": 2})))
        if "small" in kind:
            # As far from uniform as a trained one.
            for p in model.parameters():
                p.data.mul_(3.0)
    with pytest.raises(ValueError, match=f"model: expected a causal LM, got {type(model).__name__}, whose logits at "
                                         "one position depend on the tokens after it"):
        dh.Policy(model.to(dtype))


def test_tokens_of_probability_zero_hide_no_looking_ahead():
    model = BertForMaskedLM(BertConfig(**SMALL_BERT))
    with torch.no_grad():
        model.cls.predictions.decoder.bias[3] = -torch.inf
    with pytest.raises(ValueError, match="model: expected a causal LM, got BertForMaskedLM, whose logits at one pos"):
        dh.Policy(model)


class Leaking(LlamaForCausalLM):
    """Whose logits depend on the last token, a little."""

    leak = 0.0

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * (1 + self.leak * input_ids[:, -1:, None] / 50)
        return output


def test_rounding_is_no_looking_ahead():
    """Rows of a matrix product may be rounded differently, whatever they hold."""
    model = Leaking(build_model("llama", 50).config)
    model.leak = 1e-6
    dh.Policy(model)
    model.leak = 1e-2
    with pytest.raises(ValueError, match="model: expected a causal LM, got Leaking, whose logits at one position"):
        dh.Policy(model)


def test_encoders_with_decoders_and_models_of_more_than_token_ids_are_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="model: expected a causal LM, got T5ForConditionalGeneration, whose encoder"):
        dh.Policy(model)

    class NeedsMore(LlamaForCausalLM):
        def forward(self, input_ids, image, **kwargs):
            return super().forward(input_ids, **kwargs)

    with pytest.raises(ValueError, match="model: expected a causal LM that runs on token ids alone; NeedsMore raised "
                                         "TypeError: .*image"):
        dh.Policy(NeedsMore(build_model("llama", 50).config))


class LastLogits(LlamaForCausalLM):
    """With logits at the last position alone."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[:, -1:]
        return output


class WrittenOutput(LlamaForCausalLM):
    """That multiplies with the output layer's weight, and does not call the layer."""

    def forward(self, input_ids, **kwargs):
        return CausalLMOutputWithPast(logits=self.model(input_ids)[0] @ self.lm_head.weight.T)


@pytest.mark.parametrize("kind, shape", [(LastLogits, [4, 1, 50]), (WrittenOutput, [4, 4, 50])])
def test_logits_are_of_each_position_and_from_the_output_layer(kind, shape):
    with pytest.raises(ValueError, match=re.escape("model: expected logits of each position from the output layer, got "
                                                   f"{shape} from {kind.__name__} for token ids of shape [4, 4]")):
        dh.Policy(kind(build_model("llama", 50).config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", sorted(CONFIGS | MORE))
def test_every_architecture_is_causal_and_does_without_logits(architecture, dtype):
    model = build_model(architecture, 50, dtype)
    state = torch.get_rng_state()
    policy, ids = dh.Policy(model), torch.arange(12).view(2, 6)
    assert torch.equal(torch.get_rng_state(), state)
    hidden, layer, logits = policy.output(ids, keep=3)
    assert logits is None
    product = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.scaling(product.to(torch.promote_types(dtype, torch.float32))),
                               policy.logits(ids, 3).to(torch.promote_types(dtype, torch.float32)),
                               atol=tolerance, rtol=max(tolerance, 1e-6))


@pytest.mark.parametrize("size, context", [(1, 16), (2, 16), (5, 1)])
def test_the_smallest_vocabularies_and_contexts(size, context):
    policy = dh.exact.tiny_policy(size, context_length=context)
    assert policy.logits(torch.zeros(1, 1, dtype=torch.long), 1).shape == (1, 1, size)


def test_an_end_token_outside_the_vocabulary_is_refused(shipped):
    tokenizer = copy.deepcopy(shipped.tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|the end|>"})
    with pytest.raises(ValueError, match="tokenizer: its end-of-sequence token '<.the end.>' has the id 434, outside "
                                         "the model's vocabulary of 434,"):
        dh.Policy(build_model("qwen2", shipped.vocabulary_size), tokenizer)
    for place in ("config", "generation_config"):
        model = build_model("qwen2", 50)
        getattr(model, place).eos_token_id = [3, 77]
        with pytest.raises(ValueError, match=rf"model.{place}.eos_token_id: expected ids from 0 to 49, got 77"):
            dh.Policy(model)
    # Nobody chose the default of a config's class.
    model = build_model("gpt2", 50)
    assert model.config.eos_token_id == 50256 and dh.Policy(model).eos_token_ids == ()
    model.config.eos_token_id = 7
    assert dh.Policy(model).eos_token_ids == (7,)


class Noisy(LlamaForCausalLM):
    """Draws random numbers in evaluation mode too, and notes whether graphs are made."""

    def forward(self, *args, **kwargs):
        self.graphs = getattr(self, "graphs", set()) | {torch.is_grad_enabled()}
        torch.rand(3)
        return super().forward(*args, **kwargs)


def test_trying_a_model_draws_no_random_numbers_and_makes_no_graph():
    model = Noisy(build_model("llama", 50).config)
    with torch.random.fork_rng():
        dh.Policy(model)
    state = torch.get_rng_state()
    check_causal_lm(model)
    assert torch.equal(torch.get_rng_state(), state) and model.graphs == {False}


def test_nothing_about_the_model_is_remembered(shipped):
    model = build_model("llama", 50)
    policy = dh.Policy(model)
    model.config.eos_token_id = 4
    model.resize_token_embeddings(58)
    model.config.max_position_embeddings = 99
    assert (policy.vocabulary_size, policy.eos_token_ids, policy.context_length) == (58, (4,), 99)
    assert policy.logits(torch.full((1, 2), 57), 1).shape == (1, 1, 58)


def test_copies_and_pickles_are_policies_of_their_own(shipped):
    ids = torch.arange(6)[None]
    wanted = shipped.logits(ids, 2)
    for other in (copy.deepcopy(shipped), pickle.loads(pickle.dumps(shipped))):
        assert torch.equal(other.logits(ids, 2), wanted) and other.encode(["2"]) == shipped.encode(["2"])
        with torch.no_grad():
            other.model.lm_head.weight.mul_(2)
        assert not torch.equal(other.logits(ids, 2), wanted) and torch.equal(shipped.logits(ids, 2), wanted)


def adapted(wrap, seed=3, **options):
    """A model with adapters that are not zero, by PEFT's wrapper or transformers' own way."""
    model, config = build_model("llama", 50), LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options)
    if wrap:
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    return model


def test_pefts_wrapper_is_as_good_as_the_adapter_itself():
    rollouts = random_rollouts(50, 8, 4, 5).replace(rewards=torch.arange(8) % 3.0)
    found = []
    for wrap in (True, False):
        model = adapted(wrap, lora_dropout=0.2).train()
        policy = dh.Policy(model)
        assert sorted(policy.parameters) == sorted(n for n, _ in policy.model.named_parameters() if "lora_" in n)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        direction = dh.update_direction(policy, rollouts, "grpo", optimizer=optimizer)
        changes = [dh.entropy_change(policy, rollouts, direction, order, baseline="entropy").value for order in (1, 2)]
        found.append({"log_probs": dh.score(policy, rollouts).log_probs.detach(), "changes": torch.tensor(changes),
                      "kernel": dh.fisher_kernel(policy, rollouts), **direction.vector})
        assert model.training
    torch.testing.assert_close(*found)
    assert found[0]["changes"].abs().min() > 0


def test_pefts_wrapper_samples(shipped):
    model = get_peft_model(copy.deepcopy(shipped.model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    policy = dh.Policy(model, shipped.tokenizer)
    sampled, own = (dh.sample(p, ["2", "Ava has 3 eggs."], 4, 8).input_ids for p in (policy, shipped))
    assert sampled.shape != own.shape or not torch.equal(sampled, own)
    with model.disable_adapter():
        assert torch.equal(dh.sample(policy, ["2", "Ava has 3 eggs."], 4, 8).input_ids, own)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_learned_prompts_are_refused(config):
    model = get_peft_model(build_model("llama", 50), config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="model: expected adapters that are part of the model's layers.*_TUNING"):
        dh.Policy(model)


def test_a_hook_on_pefts_wrapper_is_not_lost():
    model = get_peft_model(build_model("llama", 50), LoraConfig(target_modules=["q_proj"]))
    dh.Policy(model)
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", 2 * output.logits))
    with pytest.raises(ValueError, match=r"PEFT's wrapper around LlamaForCausalLM does more than run it \(LORA\)"):
        dh.Policy(model)


def test_peft_is_not_needed():
    code = "import sys; sys.modules['peft'] = None; import deltah; deltah.exact.tiny_policy()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})


IDS = torch.zeros(1, 3, dtype=torch.long)


@pytest.mark.parametrize("call, error, message", [
    (lambda p: p.logits([[1]], 1), TypeError, "input_ids: expected a tensor, got list"),
    (lambda p: p.logits(torch.zeros(2, 3), 1), TypeError, "input_ids: expected integers"),
    (lambda p: p.logits(torch.zeros(3, dtype=torch.long), 1), ValueError, r"input_ids: expected shape \[N, L\]"),
    (lambda p: p.logits(IDS, 4), ValueError, "keep: expected an integer ≥ 1 and ≤ 3"),
    (lambda p: p.logits(IDS, None), TypeError, "keep: expected an integer"),
    (lambda p: p.logits(IDS, 1, [1]), TypeError, "parameters: expected tensors by name"),
    (lambda p: p.logits(IDS, 1, {"x": torch.ones(1)}), ValueError,
     "parameters: the model has none named 'x'"),
    (lambda p: p.output(None, 1), TypeError, "input_ids: expected a tensor, got None"),
    (lambda p: p.output(IDS, "1"), TypeError, "keep: expected an integer"),
    (lambda p: p.shifted(None, 1.0), TypeError, "direction: expected tensors by name, got None"),
    (lambda p: p.shifted({}, "1"), TypeError, "step: expected a number, got '1'"),
    (lambda p: p.shifted({}, float("nan")), ValueError, "step: expected a number, got nan"),
    (lambda p: p.shifted({"model.norm.weight": [1.0]}, 1), TypeError, "direction.*: expected a tensor"),
    (lambda p: dh.load_policy(None), TypeError, "path: expected a folder or a hub id, got None"),
    (lambda p: dh.load_policy("x", device=3), TypeError, "device: expected 'auto'"),
    (lambda p: dh.load_policy("x", dtype=None), TypeError, "dtype: expected one of float32.*, got None"),
])
def test_wrong_arguments_are_named(shipped, call, error, message):
    with pytest.raises(error, match=message):
        call(shipped)


def test_numbers_of_numpy_are_welcome(shipped):
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(shipped.logits(ids, np.int64(2)), shipped.logits(ids, 2))
    name = "model.norm.weight"
    assert torch.equal(shipped.shifted({name: torch.ones(128)}, np.float64(0.5))[name],
                       shipped.shifted({name: torch.ones(128)}, 0.5)[name])


def test_any_text_encodes_and_decodes(shipped):
    text = "naïve 12 — 数学 🙂\n\tx"
    (ids,) = shipped.encode([text])
    tokens = torch.tensor([ids])
    assert shipped.decode(tokens, torch.ones_like(tokens, dtype=torch.bool)) == [text]


def test_remote_code_is_never_run(tmp_path, shipped):
    shutil.copytree(ROOT / "data" / "policy", tmp_path / "policy")
    config = tmp_path / "policy" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "qwen2"', '"model_type": "qwen2_custom"').replace(
        "{", '{"auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},', 1))
    (tmp_path / "policy" / "custom.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ValueError, match="path: could not load a policy"):
        dh.load_policy(tmp_path / "policy")


def test_shifted_parameters_leave_the_model_alone(shipped):
    v = {"model.norm.weight": torch.ones(128)}
    before = shipped.parameters["model.norm.weight"].detach().clone()
    shifted = shipped.shifted(v, 0.5)
    assert torch.equal(shifted["model.norm.weight"], before + 0.5)
    assert set(shifted) == set(shipped.parameters) and not any(x.requires_grad for x in shifted.values())
    assert torch.equal(shipped.parameters["model.norm.weight"], before)
    with pytest.raises(ValueError, match="expected the name of a trainable parameter, got 'x'"):
        shipped.shifted({"x": torch.ones(1)}, 1.0)
    with pytest.raises(ValueError, match=r"expected shape \[128\]"):
        shipped.shifted({"model.norm.weight": torch.ones(3)}, 1.0)
    half = dh.Policy(build_model("llama", 50, torch.bfloat16))
    v = {name: torch.ones(p.shape, dtype=torch.float32) for name, p in half.parameters.items()}
    assert {x.dtype for x in half.shifted(v, 0.5).values()} == {torch.bfloat16}


def test_forward_mode_is_arranged_and_undone(random_policy):
    model = random_policy.model
    ids = torch.tensor([[5, 6, 7, 8]])
    parameters = {n: p.detach() for n, p in random_policy.parameters.items()}
    v = {n: torch.randn_like(p) for n, p in parameters.items()}
    before = model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)
    model.set_attn_implementation("sdpa")
    with random_policy.forward_mode():
        _, tangent = torch.func.jvp(lambda theta: random_policy.logits(ids, 1, theta), (parameters,), (v,))
    assert torch.isfinite(tangent).all() and tangent.abs().max() > 0
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(before[0])
    assert (model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)) == before


def test_output_layer_makes_the_models_logits_of_the_hidden_states(random_policy):
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    before = dict(random_policy.model.get_output_embeddings().__dict__)
    hidden, layer, logits = random_policy.output(ids, keep=2)
    assert logits is None and hidden.shape[:2] == (2, 2)
    assert random_policy.model.get_output_embeddings().__dict__ == before
    torch.testing.assert_close(layer.scaling(hidden @ layer.weight.T), random_policy.logits(ids, keep=2))
