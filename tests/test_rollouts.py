import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import deltah as dh
from conftest import CONFIGS, MORE, build_model
from deltah.models.causal_lm import accepts
from deltah.rollouts import check_rollouts
from deltah.sampling import _draw, resample

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
    ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
    ({"temperature": math.nan}, "temperature: expected a number > 0, got nan"),
    ({"temperature": math.inf}, "temperature: expected a number > 0, got inf"),
    ({"temperature": torch.tensor(-1.0)}, "temperature: expected a number > 0, got -1.0"),
    ({"rewards": torch.tensor([1.0, math.nan])}, "rewards: expected finite numbers, got NaN or infinity"),
    ({"advantages": torch.tensor([1.0, math.nan])}, "advantages: expected finite numbers"),
    ({"rewards": torch.tensor([1.0, math.inf])}, "rewards: expected finite numbers"),
])
def test_fields_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("changes, message", [
    ({"input_ids": torch.ones(2, 5)}, "input_ids: expected integers, got a float32 tensor"),
    ({"input_ids": torch.ones(2, 5).bool()}, "input_ids: expected integers, got a bool tensor"),
    ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected booleans, got a float32 tensor"),
    ({"prompt_index": [0, 1]}, "prompt_index: expected a tensor, got list"),
    ({"prompt_index": None}, "prompt_index: expected a tensor, got None"),
    ({"advantages": torch.ones(2).bool()}, "advantages: expected numbers, got a bool tensor"),
    ({"rewards": torch.ones(2, dtype=torch.complex64)}, "rewards: expected numbers, got a complex64 tensor"),
    ({"rewards": [0.0, 1.0]}, "rewards: expected a tensor, got list"),
    ({"rewards": torch.ones(2, device="meta")}, "rewards: expected a dense tensor with values"),
    ({"rewards": torch.ones(2).to_sparse()}, "rewards: expected a dense tensor with values"),
    ({"temperature": None}, "temperature: expected a number > 0, got None"),
    ({"temperature": "1"}, "temperature: expected a number > 0, got '1'"),
    ({"temperature": torch.ones(2)}, "temperature: expected a number > 0, got a float32 tensor"),
    ({"temperature": torch.tensor(True)}, "temperature: expected a number > 0, got True"),
])
def test_fields_of_the_wrong_type_are_named(changes, message):
    with pytest.raises(TypeError, match=message):
        make(**changes)


@pytest.mark.parametrize("temperature", [0.5, torch.tensor(0.5), torch.tensor([[0.5]], requires_grad=True),
                                         np.float32(0.5), np.array(0.5), np.array([0.5])])
def test_one_number_of_any_library_is_a_temperature(tmp_path, temperature):
    rollouts = make(temperature=temperature)
    assert rollouts.temperature == 0.5 and type(rollouts.temperature) is float
    rollouts.save(tmp_path / "a.safetensors")
    assert dh.Rollouts.load(tmp_path / "a.safetensors").temperature == 0.5
    assert make(temperature=np.int64(2)).temperature == 2.0


def test_integers_and_booleans_become_rewards():
    for rewards in (torch.tensor([0, 1]), torch.tensor([False, True]), torch.tensor([0, 1], dtype=torch.uint8),
                    torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn), torch.tensor([0.0, 1.0]).to(torch.float8_e5m2)):
        found = make(rewards=rewards).rewards
        assert found.dtype == torch.float32 and found.tolist() == [0, 1]
    found = make(advantages=torch.tensor([-1, 1])).advantages
    assert found.dtype == torch.float32 and found.tolist() == [-1, 1]
    assert make(rewards=torch.ones(2).bfloat16()).rewards.dtype == torch.bfloat16


def test_tensors_on_several_devices_are_refused():
    """There is one device here: a tensor that says it is elsewhere stands for another."""
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:1")

    with pytest.raises(ValueError, match="prompt_index: expected it on cpu, where input_ids are, got cuda:1"):
        make(prompt_index=torch.tensor([0, 1]).as_subclass(Elsewhere))


@pytest.mark.parametrize("inside", [True, False])
def test_what_inference_mode_made_can_take_part_in_a_backward_pass(shipped, inside):
    with torch.inference_mode():
        parts = dict(rewards=torch.tensor([0, 1]), advantages=torch.ones(2), input_ids=torch.ones(2, 5).int(),
                     attention_mask=torch.ones(2, 5).bool(), response_mask=torch.ones(2, 2).bool(),
                     prompt_index=torch.arange(2))
        made = [make(**parts), make(**parts).select([1, 0]), dh.sample(shipped, ["a", "b"], 1, 4)] if inside else []
    for rollouts in made or [make(**parts)]:
        for tensor in rollouts._tensors().values():
            assert not tensor.is_inference()
        log_probs = dh.score(shipped, rollouts).log_probs
        weights = log_probs * rollouts.response_mask * (rollouts.lengths.float() + rollouts.prompt_index)[:, None]
        if rollouts.advantages is not None:
            weights = weights * rollouts.advantages[:, None] * rollouts.rewards[:, None]
        gradient, = torch.autograd.grad(weights.sum(), [next(iter(shipped.parameters.values()))])
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("rows, kept", [
    (slice(1, None), [1, 2]), (slice(None, None, 2), [0, 2]), (slice(None, None, -1), [2, 1, 0]),
    ([2, 0, 0], [2, 0, 0]), ((1,), [1]), (range(2), [0, 1]), (np.array([2, -3]), [2, 0]),
    (np.arange(3)[::-1], [2, 1, 0]), (torch.tensor([-1, 1], dtype=torch.int32), [2, 1]), ([True, False, True], [0, 2]),
    (torch.tensor([False, True, True]), [1, 2]), (np.array([True, False, False]), [0]),
])
def test_select_keeps_the_rows_as_asked(rows, kept):
    three = make().select([0, 1, 1]).replace(prompt_index=torch.arange(3), rewards=torch.tensor([0.1, 0.2, 0.3]))
    found = three.select(rows)
    assert found.prompt_index.tolist() == kept
    for name, tensor in found._tensors().items():
        assert torch.equal(tensor, getattr(three, name)[torch.tensor(kept)])


@pytest.mark.parametrize("rows, error, message", [
    ([], ValueError, "rows: expected at least one rollout, got none"),
    (slice(2, None), ValueError, "rows: expected at least one rollout, got none"),
    (slice("a"), TypeError, "rows: expected a slice of integers, got slice"),
    (slice(None, None, 0), ValueError, "rows: expected a slice of integers, got slice"),
    ([False, False], ValueError, "rows: expected at least one rollout, got none"),
    ([True], ValueError, r"rows: expected shape \[2\], got \[1\]"),
    (torch.ones(3).bool(), ValueError, r"rows: expected shape \[2\], got \[3\]"),
    (torch.ones(2, 5).bool(), ValueError, r"rows: expected shape \[2\], got \[2, 5\]"),
    ([0, 2], ValueError, "rows: expected indices of 2 rollouts, got 0 to 2"),
    ([-3], ValueError, "rows: expected indices of 2 rollouts, got -3 to -3"),
    (torch.zeros(1, 1).long(), ValueError, r"rows: expected shape \[n\], got \[1, 1\]"),
    (torch.tensor(1), ValueError, r"rows: expected shape \[n\], got \[\]"),
    ([0.0], TypeError, "rows: expected integers, got a float32 tensor"),
    (1, TypeError, "rows: expected a slice, indices or a mask, got 1"),
    (None, TypeError, "rows: expected a slice, indices or a mask, got None"),
    ("01", TypeError, "rows: expected a slice, indices or a mask, got '01'"),
    ({0: 1}, TypeError, "rows: expected a slice, indices or a mask, got dict"),
    ([None], TypeError, "rows: expected a slice, indices or a mask, got list"),
    ([[0], [1, 0]], TypeError, "rows: expected a slice, indices or a mask, got list"),
])
def test_rows_that_cannot_be_selected_are_named(rows, error, message):
    with pytest.raises(error, match=message):
        make().select(rows)


@pytest.mark.parametrize("call, error, message", [
    (lambda r, p: r.to(None), TypeError, "device: expected .* got None"),
    (lambda r, p: r.to("moon"), ValueError, "device: expected .* got 'moon'"),
    (lambda r, p: r.replace(reward=1), TypeError, "reward: expected one of the fields input_ids, .*, temperature"),
    (lambda r, p: r.replace(rewards=1.0), TypeError, "rewards: expected a tensor, got 1.0"),
    (lambda r, p: r.save(None), TypeError, "path: expected .* got None"),
    (lambda r, p: r.save(p), IsADirectoryError, "path: expected a file to write, got the folder"),
    (lambda r, p: r.save(p / "no" / "a"), FileNotFoundError, "path: no folder .*no' to write to"),
    (lambda r, p: r.load(None), TypeError, "path: expected .* got None"),
    (lambda r, p: r.load(p), FileNotFoundError, "path: no rollouts file at"),
])
def test_wrong_calls_of_rollouts_are_named(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(make(), tmp_path)
    assert not list(tmp_path.iterdir())


@st.composite
def any_rollouts(draw):
    n, p, t = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    prompts = torch.tensor(draw(st.lists(st.integers(1, p), min_size=n, max_size=n)))[:, None] > torch.arange(p).flip(0)
    responses = torch.tensor(draw(st.lists(st.integers(1, t), min_size=n, max_size=n)))[:, None] > torch.arange(t)
    attention = torch.cat([prompts, responses], 1)
    shared = draw(st.booleans())
    numbers = st.none() | st.lists(st.floats(-2.0**99, 2.0**99, width=32), min_size=n, max_size=n).map(torch.tensor)
    rewards = draw(numbers)
    return dh.Rollouts(
        torch.randint(0, 99, (p + t, n), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).T,
        attention, attention[:, p:] if shared else responses, torch.tensor(draw(st.lists(st.integers(0, 9), min_size=n,
                                                                                       max_size=n))),
        rewards, rewards if shared else draw(numbers), draw(st.floats(0, 1e300, exclude_min=True)))


@settings(max_examples=100, deadline=None)
@given(any_rollouts())
def test_what_is_saved_is_loaded(tmp_path_factory, rollouts):
    """Tensors that share memory, views and transposed ones included."""
    folder = tmp_path_factory.mktemp("saved")
    rollouts.save(folder / "a.safetensors")
    loaded = dh.Rollouts.load(folder / "a.safetensors")
    assert loaded._tensors().keys() == rollouts._tensors().keys()
    for name, tensor in rollouts._tensors().items():
        assert torch.equal(getattr(loaded, name), tensor) and getattr(loaded, name).dtype == tensor.dtype
    assert loaded.temperature == rollouts.temperature
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]


def test_a_save_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make(temperature=0.7).save(path)

    def fail(tensors, partial, **_):
        partial.write_bytes(b"half of it")
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
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a file written by Rollouts.save"):
        dh.Rollouts.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="path: no rollouts file at"):
        dh.Rollouts.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("tensors, metadata, message", [
    ({}, {"temperature": None}, "temperature"), ({}, {"temperature": "warm"}, "warm"),
    ({}, {"temperature": "nan"}, "temperature: expected"), ({}, {"temperature": "-1.0"}, "temperature: expected"),
    ({}, {"temperature": "tensor(0.5)"}, "tensor"), ({"input_ids": None}, {}, "input_ids"),
    ({"extra": torch.ones(1)}, {}, "extra"), ({"temperature": torch.ones(1)}, {}, "temperature"),
    ({"input_ids": torch.ones(2, 5)}, {}, "input_ids: expected integers"),
    ({"rewards": torch.ones(3)}, {}, "rewards: expected shape"), ({"prompt_index": torch.ones(())}, {}, "prompt_index"),
    ({"rewards": torch.tensor([1.0, math.nan])}, {}, "rewards: expected finite"),
])
def test_a_file_that_does_not_hold_what_save_writes_is_refused(tmp_path, tensors, metadata, message):
    path = tmp_path / "a.safetensors"
    whole = {**make()._tensors(), **tensors}
    described = {"format": "deltah.rollouts/1", "temperature": "1.0", **metadata}
    save_file({k: v for k, v in whole.items() if v is not None}, path,
              metadata={k: v for k, v in described.items() if v is not None})
    with pytest.raises(ValueError, match=f"path: .*a.safetensors' does not hold what Rollouts.save writes .*{message}"):
        dh.Rollouts.load(path)


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


def all_positions(monkeypatch):
    """From here on, models take no argument for which positions they should make logits of."""
    monkeypatch.setattr("deltah.policies.accepts", lambda kind, name: name != "logits_to_keep" and accepts(kind, name))


@pytest.mark.parametrize("takes_it", [True, False])
@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE}))
def test_a_prompt_is_read_without_logits_but_the_last_positions(shipped, name, takes_it, monkeypatch):
    """Whether the model takes an argument for it or not."""
    policy = dh.Policy(build_model(name, shipped.vocabulary_size), shipped.tokenizer)
    if not takes_it:
        all_positions(monkeypatch)
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


def test_an_output_layer_that_looks_at_all_positions_gets_them(shipped, monkeypatch):
    """A model that neither takes the argument nor leaves its logits at a scaled linear layer."""
    class Mixed(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden):
            return self.layer(hidden + hidden.cumsum(1))

    model = build_model("llama", shipped.vocabulary_size)
    model.lm_head = Mixed(model.lm_head)
    policy = dh.Policy(model, shipped.tokenizer)
    ids = torch.tensor(shipped.encode(PROMPTS[:1]))
    expected = model(ids).logits[:, -2:]
    all_positions(monkeypatch)
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
    # No wider than the longest.
    rollouts = dh.sample(shipped, problems.select(range(2)), 2, max_new_tokens=200)
    assert rollouts.response_mask.shape[1] == rollouts.lengths.max() < 200
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


def test_a_large_vocabulary_is_drawn_from_in_float64():
    size = 200_003
    logits, wanted = torch.linspace(-1, 1, size), torch.arange(1, size, 4097)
    p = logits.double().softmax(0)
    drawn = _draw(logits.expand(len(wanted), size), (p.cumsum(0) - p / 2)[wanted], 1.0, [])
    assert torch.equal(drawn, wanted)


def test_sampling_makes_no_graph(shipped):
    graphs = set()
    handle = shipped.model.register_forward_pre_hook(lambda *_: graphs.add(torch.is_grad_enabled()))
    try:
        dh.sample(shipped, ["a"], 1, 4)
    finally:
        handle.remove()
    assert graphs == {False}


def test_a_model_without_a_cache_is_refused(shipped):
    class NoCache(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.past_key_values = None
            return output

    policy = dh.Policy(NoCache(build_model("llama", shipped.vocabulary_size).config), shipped.tokenizer)
    with pytest.raises(ValueError, match="policy: NoCache returns no past_key_values; sampling needs a cache"):
        dh.sample(policy, ["a"], 1, 2)


def test_greedy_limit_agrees_with_generate(random_policy):
    rollouts = dh.sample(random_policy, PROMPTS, responses_per_prompt=1, max_new_tokens=10, temperature=1e-6)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor(random_policy.encode([prompt]))
        expected = random_policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, pad_token_id=0,
            eos_token_id=list(random_policy.eos_token_ids))[0, ids.shape[1]:]
        kept = rollouts.response_ids[row][rollouts.response_mask[row]]
        assert torch.equal(kept, expected[:len(kept)])
        assert len(kept) == 10 or kept[-1] in random_policy.eos_token_ids


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
    ({"prompts": ["a", "b\ud83d"]}, r"prompts\[1\]: expected text, got half of a character"),
    ({"prompts": ["7" * 3000]}, r"prompts\[0\]: has 3000 tokens; with max_new_tokens=64 .* context of 2048"),
    ({"prompts": ["7" * 2000], "max_new_tokens": 49}, r"prompts\[0\]: has 2000 tokens; with max_new_tokens=49"),
])
def test_bad_arguments_are_named(shipped, arguments, message):
    with pytest.raises(ValueError, match=message):
        dh.sample(shipped, **{"prompts": ["a"], **arguments})


@pytest.mark.parametrize("arguments, message", [
    ({"policy": None}, "policy: expected a Policy, got None"), ({"policy": "data/policy"}, "policy: expected a Policy"),
    ({"prompts": "a prompt"}, "prompts: expected a list of strings, got a single string"),
    ({"prompts": ["a", 3]}, r"prompts\[1\]: expected a string or a list of messages, got 3"),
    ({"prompts": {"prompt": ["a"]}}, "prompts: expected a Dataset, or .* got dict"),
    ({"prompts": {"a", "b"}}, "prompts: expected a Dataset, or .* got set"),
    ({"prompts": None}, "prompts: expected a Dataset, or .* got None"),
    ({"prompts": 3}, "prompts: expected a Dataset, or .* got 3"),
    ({"prompts": torch.ones(2)}, r"prompts\[0\]: expected a string or a list of messages, got a float32 tensor"),
    ({"prompts": Dataset.from_dict({"prompt": [1]})}, r"prompts\[0\]: expected a string or .* got 1"),
    ({"responses_per_prompt": None}, "responses_per_prompt: expected an integer ≥ 1, got None"),
    ({"responses_per_prompt": "2"}, "responses_per_prompt: expected an integer ≥ 1, got '2'"),
    ({"max_new_tokens": [4]}, "max_new_tokens: expected an integer ≥ 1, got list"),
    ({"max_new_tokens": True}, "max_new_tokens: expected an integer ≥ 1, got True"),
    ({"temperature": "1"}, "temperature: expected a number > 0, got '1'"),
    ({"temperature": torch.ones(2)}, "temperature: expected a number > 0, got a float32 tensor"),
    ({"top_k": [3]}, "top_k: expected an integer ≥ 1, got list"), ({"top_p": "0.5"}, "top_p: expected a number"),
    ({"seed": None}, "seed: expected an integer ≥ 0, got None"),
    ({"batch_size": {}}, "batch_size: expected an integer ≥ 1, got dict"),
    ({"chat": "yes"}, "chat: expected True or False, got 'yes'"),
])
def test_arguments_of_the_wrong_type_are_named(shipped, arguments, message):
    with pytest.raises(TypeError, match=message):
        dh.sample(**{"policy": shipped, "prompts": ["a"], **arguments})


def test_a_response_may_fill_the_context(shipped):
    policy = dh.Policy(build_model("llama", shipped.vocabulary_size), shipped.tokenizer)
    (ids,) = policy.encode(PROMPTS[:1])
    room = policy.context_length - len(ids)
    assert len(dh.sample(policy, PROMPTS[:1], 1, max_new_tokens=room)) == 1
    with pytest.raises(ValueError, match=rf"prompts\[0\]: has {len(ids)} tokens; with max_new_tokens={room + 1} that"):
        dh.sample(policy, PROMPTS[:1], 1, max_new_tokens=room + 1)


def test_prompts_may_come_from_anywhere(shipped, problems):
    expected = dh.sample(shipped, PROMPTS, 2, 4)
    for prompts in (tuple(PROMPTS), iter(PROMPTS), (prompt for prompt in PROMPTS), np.array(PROMPTS),
                    Dataset.from_dict({"prompt": PROMPTS}), Dataset.from_dict({"prompt": PROMPTS})["prompt"]):
        assert torch.equal(dh.sample(shipped, prompts, 2, 4).input_ids, expected.input_ids)


def test_numbers_may_be_numpys(shipped):
    expected = dh.sample(shipped, PROMPTS, 2, 4, temperature=0.5, top_k=3, top_p=0.5, seed=1, batch_size=2)
    found = dh.sample(shipped, PROMPTS, np.int64(2), np.int32(4), np.float32(0.5), torch.tensor(3), np.float64(0.5),
                      np.uint8(1), np.int64(2))
    assert torch.equal(found.input_ids, expected.input_ids) and type(found.temperature) is float


@pytest.mark.parametrize("arguments, error, message", [
    ({"policy": None}, TypeError, "policy: expected a Policy"),
    ({"rollouts": None}, TypeError, "rollouts: expected a Rollouts, got None"),
    ({"keep": [1, 1]}, TypeError, "keep: expected a tensor, got list"),
    ({"keep": torch.ones(3).long()}, ValueError, r"keep: expected shape \[2\], got \[3\]"),
    ({"keep": torch.tensor([0, 1])}, ValueError, "keep: expected numbers between 1 and .* got 0 to 1"),
    ({"keep": torch.tensor([2, 2])}, ValueError, "keep: expected numbers between 1 and .* got 2 to 2"),
    ({"keep": torch.tensor([2, 1]), "uniforms": torch.zeros(2, 1)}, ValueError, "keep: .* up to 1, got 1 to 2"),
    ({"uniforms": torch.ones(2, 3).long()}, TypeError, "uniforms: expected floating-point numbers"),
    ({"uniforms": torch.zeros(1, 3)}, ValueError, r"uniforms: expected shape \[2, T'\], got \[1, 3\]"),
    ({"uniforms": torch.ones(2, 3)}, ValueError, "uniforms: expected numbers ≥ 0 and < 1"),
    ({"uniforms": torch.full((2, 3), math.nan)}, ValueError, "uniforms: expected numbers ≥ 0 and < 1"),
    ({"batch_size": 0}, ValueError, "batch_size: expected an integer ≥ 1, got 0"),
])
def test_wrong_calls_of_resample_are_named(shipped, arguments, error, message):
    usual = {"policy": shipped, "rollouts": make(), "keep": torch.ones(2).long(), "uniforms": torch.zeros(2, 3)}
    with pytest.raises(error, match=message):
        resample(**{**usual, **arguments})


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
    # What fills the context fits it. Padding is no part of a sequence, and what has no context has no limit.
    check_rollouts(policy, dh.Rollouts(ids[:, 3:], torch.ones(2, 128, dtype=torch.bool), long.response_mask,
                                       torch.arange(2)))
    assert fits.input_ids.shape[1] == 131
    check_rollouts(dh.Policy(build_model("bloom", 37)), long)
    uniforms = torch.rand(1, 98, dtype=torch.float64)
    resample(policy, fits, torch.tensor([2]), uniforms)
    with pytest.raises(ValueError, match="rollout 0, has 129 with a response of 102"):
        resample(policy, fits, torch.tensor([2]), torch.rand(1, 102, dtype=torch.float64))
