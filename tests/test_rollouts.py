import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import deltah as dh
from conftest import CONFIGS, MORE, build_model
from deltah.rollouts import _draw, check_rollouts, resample

PROMPTS = ["Ava has 3 eggs.", "Ben has 12 coins. Ben sells 4. How many coins does Ben have?\n", "2"]


def make(**changes):
    """Two rollouts, P = 3 and T = 2: prompts of 2 and 3 tokens, responses of 2 and 1."""
    fields = dict(
        input_ids=torch.tensor([[0, 5, 6, 7, 1], [3, 4, 5, 1, 0]]),
        attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool(),
        response_mask=torch.tensor([[1, 1], [1, 0]]).bool(), prompt_index=torch.tensor([0, 1]))
    return dh.Rollouts(**{**fields, **changes})


def test_lengths_and_parts():
    rollouts = make()
    assert len(rollouts) == 2 and rollouts.prompt_length == 3
    assert rollouts.lengths.tolist() == [2, 1]
    assert rollouts.response_ids.tolist() == [[7, 1], [1, 0]]
    assert rollouts.select(torch.tensor([1])).input_ids.tolist() == [[3, 4, 5, 1, 0]]
    assert rollouts.replace(temperature=0.5).temperature == 0.5
    with pytest.raises(AttributeError):
        rollouts.temperature = 2.0


@pytest.mark.parametrize("changes, message", [
    ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"input_ids: expected shape \[N, P\+T\]"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids: expected shape"),
    ({"response_mask": torch.ones(2, 5).bool()}, r"response_mask: expected shape \[2, T\] with 0 < T < 5"),
    ({"response_mask": torch.ones(3, 2).bool()}, r"response_mask: expected shape \[2, T\]"),
    ({"attention_mask": torch.ones(2, 4).bool()}, r"attention_mask: expected shape \[2, 5\], got \[2, 4\]"),
    ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()}, "left-padded; row 0"),
    ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()}, "a prompt token in every row; row 1"),
    ({"attention_mask": torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()}, "wherever response_mask is; row 0"),
    ({"response_mask": torch.tensor([[0, 1], [1, 0]]).bool()}, "response_mask: .* row 0"),
    ({"response_mask": torch.tensor([[1, 1], [0, 0]]).bool()}, "every response; row 1 is empty"),
    ({"response_mask": torch.tensor([[1, 2], [1, 0]])}, "response_mask: expected booleans"),
    ({"prompt_index": torch.zeros(3, dtype=torch.long)}, r"prompt_index: expected shape \[2\]"),
    ({"rewards": torch.ones(3)}, r"rewards: expected shape \[2\], got \[3\]"),
    ({"advantages": torch.ones(2, 2)}, r"advantages: expected shape \[2\]"),
    ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    ({"temperature": math.nan}, "temperature: expected a positive number"),
])
def test_fields_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("changes, message", [
    ({"input_ids": torch.ones(2, 5)}, "input_ids: expected integers, got torch.float32"),
    ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected booleans, got torch.float32"),
    ({"rewards": torch.ones(2, dtype=torch.long)}, "rewards: expected floating-point"),
    ({"prompt_index": [0, 1]}, "prompt_index: expected a tensor, got list"),
])
def test_fields_of_the_wrong_type_are_named(changes, message):
    with pytest.raises(TypeError, match=message):
        make(**changes)


def test_saving_round_trips_and_leaves_nothing_else(tmp_path):
    rollouts = make(rewards=torch.tensor([0.0, 1.0]), temperature=0.7)
    rollouts.save(tmp_path / "a.safetensors")
    loaded = dh.Rollouts.load(tmp_path / "a.safetensors")
    for name in ("input_ids", "attention_mask", "response_mask", "prompt_index", "rewards"):
        assert torch.equal(getattr(loaded, name), getattr(rollouts, name))
    assert loaded.advantages is None and loaded.temperature == 0.7
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_save_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make(temperature=0.7).save(path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("deltah.rollouts.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make(temperature=0.9).save(path)
    assert dh.Rollouts.load(path).temperature == 0.7
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_files_are_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    make().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        dh.Rollouts.load(path)


def test_other_files_and_missing_ones_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a file written by Rollouts.save"):
        dh.Rollouts.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="path: no rollouts file at"):
        dh.Rollouts.load(tmp_path / "none.safetensors")


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch_size(random_policy):
    whole = dh.sample(random_policy, PROMPTS, responses_per_prompt=4, max_new_tokens=12, seed=3)
    for size in (1, 5):
        split = dh.sample(random_policy, PROMPTS, responses_per_prompt=4, max_new_tokens=12, seed=3, batch_size=size)
        assert torch.equal(split.input_ids, whole.input_ids)
        assert torch.equal(split.response_mask, whole.response_mask)
    other = dh.sample(random_policy, PROMPTS, responses_per_prompt=4, max_new_tokens=12, seed=4)
    assert not torch.equal(other.response_ids, whole.response_ids)


def test_more_responses_and_longer_ones_extend_those_of_a_smaller_call(shipped):
    small = dh.sample(shipped, PROMPTS, responses_per_prompt=2, max_new_tokens=6)
    large = dh.sample(shipped, PROMPTS, responses_per_prompt=5, max_new_tokens=10)
    rows = torch.tensor([0, 1, 5, 6, 10, 11])
    assert torch.equal(large.response_ids[rows, :6], small.response_ids)


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE}))
def test_a_prompt_is_read_without_logits_but_the_last_positions(shipped, name, accepts, monkeypatch):
    """Whether the model takes an argument for it or not."""
    policy = dh.Policy(build_model(name, shipped.vocabulary_size), shipped.tokenizer)
    if not accepts:
        policy._accepts = {name: p for name, p in policy._accepts.items() if name != "logits_to_keep"}
    policy.has_linear_output  # noqa: B018, which runs the model to find out
    run, made = dh.Policy.run, []

    def watched(self, arguments, parameters=None):
        output = run(self, arguments, parameters)
        made.append((tuple(arguments["input_ids"].shape), tuple(output.logits.shape)))
        return output

    monkeypatch.setattr(dh.Policy, "run", watched)
    rollouts = dh.sample(policy, PROMPTS, responses_per_prompt=2, max_new_tokens=4, seed=5)
    (ids, logits), *steps = made
    assert ids[1] > 10 and logits == (3, 1, shipped.vocabulary_size)
    assert all(ids[1] == logits[1] == 1 for ids, logits in steps)
    # The same tokens as from logits of all positions.
    monkeypatch.setattr(dh.Policy, "run_keeping", lambda self, keep, *arguments: run(self, *arguments))
    assert torch.equal(dh.sample(policy, PROMPTS, 2, max_new_tokens=4, seed=5).input_ids, rollouts.input_ids)


def test_an_output_layer_that_looks_at_all_positions_gets_them(shipped):
    """A model that neither takes the argument nor leaves its logits at a scaled linear layer."""
    class Mixed(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden):
            return self.layer(hidden + hidden.mean(1, keepdim=True))

    model = build_model("llama", shipped.vocabulary_size)
    model.lm_head = Mixed(model.lm_head)
    policy = dh.Policy(model, shipped.tokenizer)
    ids = torch.tensor(shipped.encode(PROMPTS[:1]))
    expected = model(ids).logits[:, -2:]
    policy._accepts = {name: p for name, p in policy._accepts.items() if name != "logits_to_keep"}
    torch.testing.assert_close(policy.logits(ids, keep=2), expected)


def test_rows_of_a_prompt_are_adjacent_and_padded_on_the_left(shipped):
    rollouts = dh.sample(shipped, PROMPTS, responses_per_prompt=3, max_new_tokens=4)
    assert rollouts.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row, index in enumerate(rollouts.prompt_index.tolist()):
        kept = rollouts.attention_mask[row, :rollouts.prompt_length]
        assert rollouts.input_ids[row, :rollouts.prompt_length][kept].tolist() == shipped.encode(PROMPTS)[index]
    assert rollouts.rewards is None and rollouts.temperature == 1.0


def test_responses_run_through_their_first_end_token(shipped, problems):
    rollouts = dh.sample(shipped, problems.select(range(16)), responses_per_prompt=4, max_new_tokens=24)
    end = shipped.tokenizer.eos_token_id
    ended = 0
    for ids, mask in zip(rollouts.response_ids, rollouts.response_mask, strict=True):
        kept = ids[mask].tolist()
        assert end not in kept[:-1]
        assert kept[-1] == end or len(kept) == 24
        ended += kept[-1] == end
    assert 0 < ended < len(rollouts)
    assert set(rollouts.rewards.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("limits", [
    {}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 2.0, "top_p": 0.7},
])
def test_first_tokens_have_the_distribution_that_transformers_gives(shipped, limits):
    """A χ² test of 4,000 draws against the probabilities from transformers' own logits processors."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    rollouts = dh.sample(shipped, [PROMPTS[1]], responses_per_prompt=4000, max_new_tokens=1, **limits)
    ids = torch.tensor(shipped.encode([PROMPTS[1]]))
    with torch.no_grad():
        scores = shipped.model(ids).logits[:, -1].double()
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    for name, value in limits.items():
        scores = warpers[name](value)(ids, scores)
    expected = 4000 * scores.softmax(-1)[0]
    counts = torch.bincount(rollouts.response_ids[:, 0], minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = max(int(often.sum()) - 1, 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 50) | st.just(-math.inf), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_a_drawn_token_is_the_quantile_of_its_distribution(logits, uniform):
    logits = torch.tensor([logits])
    if torch.isinf(logits).all():
        with pytest.raises(ValueError, match="policy: the model's logits are NaN or all −inf"):
            _draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, [])
        return
    token = int(_draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, []))
    p = logits[0].double().softmax(-1)
    assert p[token] > 0
    assert p[:token].sum() - 1e-12 <= uniform <= p[:token + 1].sum() + 1e-12


def test_greedy_limit_agrees_with_generate(random_policy):
    rollouts = dh.sample(random_policy, PROMPTS, responses_per_prompt=1, max_new_tokens=10, temperature=1e-6)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor(random_policy.encode([prompt]))
        expected = random_policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, pad_token_id=0,
            eos_token_id=list(random_policy.eos_token_ids))[0, ids.shape[1]:]
        kept = rollouts.response_ids[row][rollouts.response_mask[row]]
        assert torch.equal(kept, expected[:len(kept)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_samples_in_other_dtypes(shipped, dtype):
    policy = dh.Policy(build_model("qwen2", shipped.vocabulary_size, dtype), shipped.tokenizer)
    rollouts = dh.sample(policy, PROMPTS, responses_per_prompt=2, max_new_tokens=4)
    assert len(rollouts) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_gives_the_same_tokens(shipped, problems):
    from conftest import ROOT
    policy = dh.load_policy(ROOT / "data" / "policy", device="cuda")
    chosen = problems.select(range(16))
    on_gpu, on_cpu = (dh.sample(p, chosen, responses_per_prompt=4) for p in (policy, shipped))
    assert (on_gpu.response_ids.cpu() == on_cpu.response_ids).float().mean() > 0.999


@pytest.mark.parametrize("arguments, message", [
    ({"prompts": []}, "prompts: expected at least one prompt, got none"),
    ({"prompts": ["a", ""]}, r"prompts\[1\]: expected some text, got ''"),
    ({"prompts": Dataset.from_dict({"text": ["a"]})}, "prompts: expected a column 'prompt', got text"),
    ({"responses_per_prompt": 0}, "responses_per_prompt: expected an integer ≥ 1, got 0"),
    ({"responses_per_prompt": 1.5}, "responses_per_prompt: expected an integer"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer ≥ 1, got 0"),
    ({"temperature": 0}, "temperature: expected a number > 0, got 0"),
    ({"temperature": -1.0}, "temperature: expected a number > 0"),
    ({"top_k": 0}, "top_k: expected an integer ≥ 1"),
    ({"top_p": 1.5}, "top_p: expected a number > 0 and ≤ 1, got 1.5"),
    ({"seed": -1}, "seed: expected an integer ≥ 0"),
    ({"batch_size": 0}, "batch_size: expected an integer ≥ 1"),
    ({"prompts": ["7" * 3000]}, r"prompts\[0\]: has 3000 tokens; with max_new_tokens=64 .* context of 2048"),
    ({"prompts": ["7" * 2000], "max_new_tokens": 49}, r"prompts\[0\]: has 2000 tokens; with max_new_tokens=49"),
])
def test_bad_arguments_are_named(shipped, arguments, message):
    with pytest.raises(ValueError, match=message):
        dh.sample(shipped, **{"prompts": ["a"], **arguments})


def test_prompts_of_the_wrong_type_are_named(shipped):
    with pytest.raises(TypeError, match="prompts: expected a list of strings, got a single string"):
        dh.sample(shipped, "a prompt")
    with pytest.raises(TypeError, match=r"prompts\[1\]: expected a string, got int"):
        dh.sample(shipped, ["a", 3])


def test_a_policy_without_tokenizer_says_so(shipped):
    with pytest.raises(ValueError, match="policy: has no tokenizer"):
        dh.sample(dh.Policy(shipped.model), ["a"])


def test_nan_logits_are_refused(shipped):
    model = build_model("qwen2", shipped.vocabulary_size)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    policy = dh.Policy(model, shipped.tokenizer)
    with pytest.raises(ValueError, match="policy: the model's logits are NaN"):
        dh.sample(policy, ["a"])


def test_rollouts_longer_than_the_context_are_refused():
    policy = dh.Policy(build_model("llama", 37))
    ids = torch.zeros(2, 131, dtype=torch.long)
    mask = torch.ones(2, 131, dtype=torch.bool)
    mask[0, :100] = False
    long = dh.Rollouts(ids, mask, torch.ones(2, 4, dtype=torch.bool), torch.arange(2))
    rewarded = long.replace(rewards=torch.tensor([0.0, 1.0]))
    fits, v = long.select(slice(1)), {"model.norm.weight": torch.ones(32)}
    sgd = torch.optim.SGD(policy.parameters.values(), lr=0.1)
    calls = {
        "score": lambda r: dh.score(policy, r), "kernel": lambda r: dh.fisher_kernel(policy, r),
        "others": lambda r: dh.fisher_kernel(policy, fits, r), "sketch": lambda r: dh.fisher_sketch(policy, r, 8),
        "tokens": lambda r: dh.fisher_kernel(policy, r, level="token"),
        "change": lambda r: dh.entropy_change(policy, r, v, baseline="none"),
        "measured": lambda r: dh.measured_entropy_change(policy, r, v, [0.1]),
        "direction": lambda r: dh.update_direction(policy, r.replace(rewards=rewarded.rewards[:len(r)]), optimizer=sgd)}
    message = "rollouts: expected at most the 128 tokens of the model's context, .* rollout 1, has 131"
    for name, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call(long)
        if name != "measured":
            call(fits)
    # Padding is no part of a sequence, and what has no context has no limit.
    assert fits.input_ids.shape[1] == 131
    check_rollouts(dh.Policy(build_model("bloom", 37)), long)
    uniforms = torch.rand(1, 98, dtype=torch.float64)
    resample(policy, fits, torch.tensor([2]), uniforms)
    with pytest.raises(ValueError, match="rollout 0, has 129 with a response of 102"):
        resample(policy, fits, torch.tensor([2]), torch.rand(1, 102, dtype=torch.float64))
