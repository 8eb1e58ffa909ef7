import copy
import shutil

import pytest
import torch

import deltah as dh
from conftest import ROOT, build_model


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


def test_dropout_is_off():
    model = build_model("gpt2", 64).train()
    policy = dh.Policy(model)
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert torch.equal(policy.logits(ids, 1), policy.logits(ids, 1))


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
    with pytest.raises(ValueError, match="model: expected a causal LM with an output layer, got Qwen2Model"):
        dh.Policy(build_model("qwen2", 64).model)


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
    assert set(shifted) == set(shipped.parameters)
    assert torch.equal(shipped.parameters["model.norm.weight"], before)
    with pytest.raises(ValueError, match="expected the name of a trainable parameter, got 'x'"):
        shipped.shifted({"x": torch.ones(1)}, 1.0)
    with pytest.raises(ValueError, match=r"expected shape \[128\]"):
        shipped.shifted({"model.norm.weight": torch.ones(3)}, 1.0)


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


def test_forward_mode_is_undone_after_an_error(shipped):
    attention = shipped.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), shipped.forward_mode():
        raise RuntimeError("stop")
    assert shipped.model.config._attn_implementation == attention


def test_output_layer_makes_the_models_logits_of_the_hidden_states(random_policy):
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    before = dict(random_policy.model.get_output_embeddings().__dict__)
    hidden, layer, logits = random_policy.output(ids, keep=2)
    assert logits is None and hidden.shape[:2] == (2, 2)
    assert random_policy.model.get_output_embeddings().__dict__ == before
    torch.testing.assert_close(layer.scaling(hidden @ layer.weight.T), random_policy.logits(ids, keep=2))
