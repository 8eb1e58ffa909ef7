"""The training loop: what a step does, by hand; two runs, stopped runs and killed runs that end with the same bits."""

import copy
import functools
import itertools
import json
import math
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoTokenizer, TrainerCallback

import deltah as dh
import killed
from conftest import ROOT, build_model
from deltah import checkpoints, objectives, training
from test_prompts import TEMPLATE

PROBLEMS = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(40)], "answer": [str(2 * i) for i in range(40)]})


def digits(texts, rows):
    """A reward that a random model can earn."""
    return [sum(c.isdigit() for c in text) / 4 for text in texts]


SETTINGS = dict(steps=5, prompts_per_step=6, responses_per_prompt=4, minibatches=3, learning_rate=3e-3,
                max_new_tokens=7, reward=digits, predict_every=2, predict_prompts=6, checkpoint_every=1)


def random_policy(dtype=torch.float32, seed=0):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    return dh.Policy(build_model("qwen2", len(tokenizer), dtype, seed), tokenizer)


def run(policy=None, problems=PROBLEMS, **settings):
    policy = random_policy() if policy is None else policy
    return policy, dh.training.train(policy, problems, **SETTINGS | settings)


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters.values(), other.parameters.values(), strict=True))


@functools.cache
def whole(**settings):
    """A run that nothing has stopped."""
    return run(**settings)


def stop_in(step, monkeypatch):
    """Have the run of a step fail when it is about to take its second minibatch."""
    calls, own = [], training._step

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 3 * step + 2:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(training, "_step", failing)


# Clip-Cov with bounds that leave much to its draw.
DRAWING = objectives.Objective(functools.partial(objectives.clip_cov, fraction=0.3, covariance_low=-99.0,
                                                 covariance_high=99.0), "token_mean")


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", DRAWING])
def test_two_steps_by_hand(objective):
    policy, by_hand = random_policy(), random_policy()
    _, table = run(policy, steps=2, seed=3, max_gradient_norm=0.01, objective=objective)
    optimizer = torch.optim.AdamW(by_hand.parameters.values(), lr=3e-3)
    for step in range(2):
        chosen, _ = training._prompts(40, 6, 3, step)
        rollouts = dh.sample(by_hand, PROBLEMS.select(chosen), 4, 7, seed=training._seed(3, step, 1), reward=digits)
        with torch.no_grad():
            old = dh.score(by_hand, rollouts)
        advantages = objectives.group_advantages(rollouts.rewards, rollouts.prompt_index,
                                                 scale=objective != "dr_grpo")
        losses = []
        for i, part in enumerate((slice(0, 8), slice(8, 16), slice(16, 24))):
            minibatch = rollouts.replace(advantages=advantages).select(part)
            # Nothing has moved before the first.
            before = old.log_probs[part] if part.start else dh.score(by_hand, minibatch).log_probs.detach()
            losses.append(dh.training.policy_gradient_step(by_hand, minibatch, before, objective, optimizer,
                                                           0.01, seed=training._seed(3, step, 4 + i)))
        row = table.iloc[step]
        assert row["loss"] == pytest.approx(sum(losses) / 3, abs=1e-9) and row["gradient_norm"] > 0.01
        assert row["reward"] == pytest.approx(rollouts.rewards.mean().item(), rel=1e-6)
        assert row["entropy"] == dh.entropy(old, rollouts, per="token").value
    assert same(policy, by_hand)


def test_what_dr_grpo_divides_by_is_no_matter_of_the_longest_response(monkeypatch):
    own, short = training.sample, []

    def shorter(policy, *arguments, **settings):
        rollouts = own(policy, *arguments, **settings)
        keep = torch.arange(rollouts.response_mask.shape[1]) < 3
        short.append(rollouts.select(slice(None)).replace(
            input_ids=rollouts.input_ids[:, :rollouts.prompt_length + 3],
            attention_mask=rollouts.attention_mask[:, :rollouts.prompt_length + 3],
            response_mask=(rollouts.response_mask & keep)[:, :3]))
        return short[-1]

    monkeypatch.setattr(training, "sample", shorter)
    losses = [run(steps=1, objective=objective, minibatches=1, predict_every=None, learning_rate=1e-3)[1]
              ["gradient_norm"][0] for objective in (
                  "dr_grpo", objectives.Objective(objectives.dr_grpo, "constant", scale=False, length=7),
                  objectives.Objective(objectives.dr_grpo, "constant", scale=False, length=14))]
    assert losses[0] == losses[1] == pytest.approx(2 * losses[2], rel=1e-5)


def test_checkpoints_that_differ_after_a_dot_have_logs_of_their_own(tmp_path):
    for seed, name in enumerate(("lr.0.1", "lr.0.2", "run.safetensors")):
        run(steps=1, predict_every=None, seed=seed, checkpoint=tmp_path / name)
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"lr.0.1.jsonl", "lr.0.2.jsonl", "run.jsonl"}


def test_functions_without_names_of_their_own_are_told_apart():
    def weighted(factor):
        return lambda *given: factor * objectives.grpo(*given)

    one, same_one, other = (checkpoints.described(weighted(factor)) for factor in (1.0, 1.0, 2.0))
    assert one == same_one != other and one == json.loads(json.dumps(one))
    first, second = lambda text: text in {"a", "b", "c"}, lambda text: text in {"a", "b", "d"}
    assert checkpoints.described(first) != checkpoints.described(second)
    assert checkpoints.described(objectives.grpo) == "deltah.objectives.clipping.grpo"
    assert checkpoints.described(object()) == "builtins.object"

    def calls_itself(n):
        return calls_itself(n - 1) if n else 0

    assert checkpoints.described(calls_itself)[-1] == ["calls_itself"]


def test_settings_of_numpy_are_stored(tmp_path):
    clipped = objectives.Objective(functools.partial(objectives.grpo, clip_high=np.float32(0.25)))
    for steps in (1, 2):
        _, table = run(steps=steps, predict_every=None, objective=clipped, checkpoint=tmp_path / "run")
    assert len(table) == 2


def test_every_problem_comes_once_before_any_comes_twice():
    seen = []
    for step in range(12):
        chosen, others = training._prompts(40, 6, 0, step)
        assert sorted([*chosen, *others]) == list(range(40)) and list(others) != sorted(others)
        seen.append(chosen.tolist())
    for epoch in (seen[:6], seen[6:]):
        assert len({i for chosen in epoch for i in chosen}) == 36
    assert seen[:6] != seen[6:]
    assert training._prompts(40, 6, 1, 0)[0].tolist() != seen[0]


def test_every_purpose_of_every_step_has_a_seed_of_its_own():
    assert len({training._seed(*key) for key in itertools.product(range(3), range(20), range(6))}) == 3 * 20 * 6


def test_predictions_stand_on_prompts_that_the_step_left_out(monkeypatch):
    calls, own = [], training.sample

    def sample(policy, prompts, responses, **settings):
        calls.append((set(prompts["prompt"]), len(prompts), responses, settings["seed"]))
        return own(policy, prompts, responses, **settings)

    monkeypatch.setattr(training, "sample", sample)
    run(steps=3)
    assert [call[1:3] for call in calls] == [(6, 4), (12, 1), (6, 4), (6, 4), (12, 1)]
    assert not calls[0][0] & calls[1][0] and not calls[3][0] & calls[4][0] and calls[1][0] != calls[4][0]
    assert len({call[3] for call in calls}) == 5


def test_it_learns():
    _, table = run(steps=25, minibatches=1, prompts_per_step=8, learning_rate=1e-2, predict_every=None)
    first, last = table["reward"].iloc[:5].mean(), table["reward"].iloc[-5:].mean()
    assert last > first + 0.5
    assert table["kl"].iloc[0] == 0 and table["kl"].iloc[-1] > 0.1
    assert list(table["step"]) == list(range(25))


def test_two_runs_of_a_seed_agree_and_leave_the_callers_generators_alone():
    (policy, table), other = whole(), random_policy()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    _, again = run(other)
    assert same(policy, other) and again.equals(table)
    assert torch.equal(torch.random.get_rng_state(), before)
    third, differs = run(seed=1)
    assert not same(policy, third) and not differs["reward"].equals(table["reward"])


def noisy(texts, rows):
    return torch.rand(len(texts))


def test_what_a_reward_draws_from_pytorchs_generator_follows_from_the_seed(tmp_path):
    policy, table = whole(reward=noisy)
    run(reward=noisy, steps=3, checkpoint=tmp_path / "run")
    other = random_policy()
    torch.manual_seed(5)
    _, again = run(other, reward=noisy, checkpoint=tmp_path / "run")
    assert same(policy, other) and again.equals(table)


def test_the_table_says_what_was_recorded():
    _, table = whole()
    predicted = ["predicted", "predicted_direct", "measured"]
    assert table[predicted].notna().all(axis=1).tolist() == [True, False, True, False, True]
    assert (table[predicted].dropna() != 0).all(axis=None)
    assert set(table["measured_by"].dropna()) <= {"importance", "coupled"}
    errors = [name for name in table if name.endswith("_error")]
    assert len(errors) == 9 and (table[errors].fillna(1) >= 0).all(axis=None)
    assert table["pass_at_1"].le(table["pass_at_4"]).all()
    # The off-policy minibatches are clipped; what PPO does not clip is not.
    assert table["clipped_positive_above"].max() > 0 and table["clipped_negative_below"].max() > 0
    assert table["clipped_positive_below"].max() == 0 and table["clipped_negative_above"].max() == 0
    _, every_third = run(log_every=3, predict_every=None)
    assert every_third["step"].tolist() == [0, 3]
    assert every_third["entropy"].tolist() == table["entropy"].iloc[[0, 3]].tolist()


@pytest.mark.parametrize("step", range(5))
def test_a_run_that_was_stopped_ends_as_one_that_was_not(step, tmp_path, monkeypatch):
    policy, table = whole()
    file = tmp_path / "run.safetensors"
    stop_in(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=file, checkpoint_every=2)
    assert file.exists() == (step >= 2)
    monkeypatch.undo()
    again, resumed = run(checkpoint=file, checkpoint_every=2)
    assert same(policy, again) and resumed.equals(table)
    lines = pd.DataFrame(map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines()))
    assert lines.equals(table)
    # Called once more, it has nothing to do.
    finished, same_table = run(checkpoint=file)
    assert same(policy, finished) and same_table.equals(table)


def test_more_steps_continue_a_run(tmp_path):
    policy, table = whole()
    run(steps=2, checkpoint=tmp_path / "run", log=tmp_path / "log")
    other, continued = run(checkpoint=tmp_path / "run", log=tmp_path / "log")
    assert same(policy, other) and continued.equals(table)
    with pytest.raises(ValueError, match="^steps: expected at least the 5 that"):
        run(steps=4, checkpoint=tmp_path / "run")


def sgd(policy):
    return torch.optim.SGD(policy.parameters.values(), lr=0.1, momentum=0.9, nesterov=True)


def amsgrad(policy):
    # Groups of their own, a learning rate in a tensor, and state from before the run.
    first, *rest = policy.parameters.values()
    optimizer = torch.optim.Adam([{"params": [first], "weight_decay": 0.1}, {"params": rest, "lr": torch.tensor(2e-3)}],
                                 lr=1e-3, amsgrad=True, betas=(0.8, 0.99))
    generator = torch.Generator().manual_seed(1)
    for p in policy.parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Averaging(torch.optim.Optimizer):
    """Not one of torch's: float32 memory of bfloat16 parameters, numbers and nothing in its state."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                mean = state.get("mean", torch.zeros(p.shape)) * 0.9 + 0.1 * p.grad.float()
                state.update(mean=mean, count=state.get("count", 0) + 1, scale=1 / 3, kind="plain", nothing=None)
                p -= (group["lr"] * state["scale"] * mean / state["count"]).to(p)


OPTIMIZERS = {"sgd": (torch.float32, sgd), "amsgrad": (torch.float64, amsgrad),
              "averaging": (torch.bfloat16, lambda policy: Averaging(policy.parameters.values()))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_callers_optimizer_goes_on_where_it_was(name, tmp_path, monkeypatch):
    dtype, make = OPTIMIZERS[name]

    def optimized(**settings):
        policy = random_policy(dtype)
        optimizer = make(policy)
        _, table = run(policy, optimizer=optimizer, predict_every=None, **settings)
        return policy, optimizer, table

    policy, optimizer, table = optimized()
    stop_in(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        optimized(checkpoint=tmp_path / "run")
    monkeypatch.undo()
    other, own, resumed = optimized(checkpoint=tmp_path / "run")
    assert same(policy, other) and resumed.equals(table) and not same(policy, random_policy(dtype))
    for p, q in zip(policy.parameters.values(), other.parameters.values(), strict=True):
        for key, x in optimizer.state[p].items():
            y = own.state[q][key]
            assert type(x) is type(y) and (torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor)
                                           else x == y)
    for group, other_group in zip(optimizer.param_groups, own.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other_group.items() if k != "params"}


def test_an_optimizer_with_more_than_a_file_can_hold_is_refused(tmp_path):
    class Listing(Averaging):
        def step(self, closure=None):
            super().step()
            for state in self.state.values():
                state["history"] = [1, 2]

    policy = random_policy()
    with pytest.raises(ValueError, match="^optimizer: a checkpoint holds tensors and numbers; Listing has list"):
        run(policy, optimizer=Listing(policy.parameters.values()), checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()


OTHERS = {
    "seed is 1, was 0": dict(seed=1),
    "objective is": dict(objective=objectives.Objective(functools.partial(objectives.grpo, clip_high=0.3))),
    "minibatches is 2, was 3": dict(minibatches=2),
    "temperature is 0.9, was 1.0": dict(temperature=0.9),
    "max_gradient_norm is 1.0, was null": dict(max_gradient_norm=1.0),
    'reward is "test_loop.noisy", was "test_loop.digits"': dict(reward=noisy),
    "optimizer is": dict(learning_rate=1e-4),
    "problems is": dict(problems=PROBLEMS.select(range(39))),
    "predict_every is null, was 2": dict(predict_every=None),
    "model is": dict(policy=lambda: random_policy(seed=1)),
    "trainable parameters is": dict(policy=lambda: frozen()),
}


def frozen():
    policy = random_policy()
    policy.model.model.embed_tokens.requires_grad_(False)
    return policy


@pytest.mark.parametrize("difference", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(difference, tmp_path):
    file = tmp_path / "run.safetensors"
    run(steps=1, checkpoint=file)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changed = dict(OTHERS[difference])
    policy = changed.pop("policy", random_policy)()
    start = copy.deepcopy(policy)
    with pytest.raises(ValueError) as caught:
        run(policy, checkpoint=file, **changed)
    assert str(caught.value).startswith(f"checkpoint: '{file}' is of another run: ")
    assert difference in str(caught.value) and len(str(caught.value)) < 700
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and same(policy, start)


def test_of_long_settings_the_refusal_shows_what_differs(tmp_path):
    for rate, eps in ((3e-3, 1e-8), (3e-3, 2e-8)):
        policy = random_policy()
        optimizer = torch.optim.AdamW(policy.parameters.values(), lr=rate, eps=eps)
        if eps == 1e-8:
            run(policy, steps=1, predict_every=None, optimizer=optimizer, checkpoint=tmp_path / "run")
            continue
        with pytest.raises(ValueError, match='optimizer is .*"eps": 2e-08.*, was .*"eps": 1e-08'):
            run(policy, steps=1, predict_every=None, optimizer=optimizer, checkpoint=tmp_path / "run")


def test_a_policy_that_has_moved_on_is_no_start(tmp_path):
    policy, _ = run(steps=1, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="model is .*a run is taken up with the policy that it began with"):
        run(policy, steps=2, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("what", ["cut", "nothing", "rollouts", "folder"])
def test_a_file_that_is_no_checkpoint_is_refused_and_stays(what, tmp_path, shipped):
    file = tmp_path / "run"
    run(steps=1, checkpoint=file)
    content = file.read_bytes()
    if what == "cut":
        file.write_bytes(content[:len(content) // 2])
    elif what == "nothing":
        file.write_bytes(b"")
    elif what == "rollouts":
        dh.sample(shipped, ["1+1="], 2, 3).save(file)
    else:
        file.unlink()
        file.mkdir()
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises((ValueError, IsADirectoryError), match="^checkpoint: "):
        run(steps=1, checkpoint=file)
    assert before == (file.read_bytes() if file.is_file() else None)


@pytest.mark.parametrize("moment", ["save_file", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_checkpoint_before(moment, tmp_path, monkeypatch):
    policy, table = whole()
    file = tmp_path / "run"
    run(steps=2, checkpoint=file)
    before = file.read_bytes()

    def failing(*arguments, **more):
        if moment == "save_file":
            Path(arguments[1]).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints if moment == "save_file" else checkpoints.os, moment, failing)
    with pytest.raises(OSError, match="no space"):
        # The records' file is written anew first.
        run(checkpoint=file, log=None if moment != "replace" else file.with_name("log"))
    assert file.read_bytes() == before
    monkeypatch.undo()
    other, resumed = run(checkpoint=file)
    assert same(policy, other) and resumed.equals(table)


def after(calls, value):
    """digits, until it has been called so often."""
    count = []

    def reward(texts, rows):
        count.append(None)
        return digits(texts, rows) if len(count) <= calls else [value] * len(texts)

    return reward


def broken_loss(log_probs, old_log_probs, advantages, mask):
    """NaN, or a finite loss with a gradient that is not, once the policy has moved."""
    moved = (log_probs - old_log_probs).detach().abs().amax() > 1e-3
    losses = objectives.grpo(log_probs, old_log_probs, advantages, mask)
    return losses + math.nan if moved else losses


def broken_slope(log_probs, old_log_probs, advantages, mask):
    moved = (log_probs - old_log_probs).detach().abs().amax() > 1e-3
    losses = objectives.grpo(log_probs, old_log_probs, advantages, mask)
    return losses + (torch.where(mask, log_probs - log_probs.detach(), 0.0)).abs().sqrt() if moved else losses


class Overflowing(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        if self.param_groups[0]["params"][0].grad is not None and len(self.count) == 4:
            self.param_groups[0]["params"][0].data[0] = math.inf
        self.count.append(None)


@pytest.mark.parametrize("what, message, notes", [
    ("reward", "reward: value 0: expected a number, got nan", ["in step 2"]),
    ("loss", "losses: expected finite numbers", ["in minibatch 1", "in step 0"]),
    ("gradient", "policy, rollouts: the gradient of .* is NaN or infinite", ["in minibatch 1", "in step 0"]),
    ("parameters", "policy: the optimizer has made .* NaN or infinite", ["in minibatch 1", "in step 1"]),
])
def test_nan_stops_the_run_with_what_and_where(what, message, notes, tmp_path):
    policy, file = random_policy(), tmp_path / "run"
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.3)
    settings = {"reward": after(2, math.nan)} if what == "reward" else {}
    if what in ("loss", "gradient"):
        settings["objective"] = objectives.Objective(broken_loss if what == "loss" else broken_slope)
    if what == "parameters":
        optimizer = Overflowing(policy.parameters.values(), lr=0.3)
        optimizer.count = []
    kept = {n: torch.full_like(p, 7.0) for n, p in policy.parameters.items()}
    for n, p in policy.parameters.items():
        p.grad = kept[n]
    policy.model.train()
    rng = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=message) as caught:
        run(policy, optimizer=optimizer, checkpoint=file, predict_every=None, **settings)
    assert caught.value.__notes__ == [f"deltah.training.train: {note}" for note in notes]
    step = int(notes[-1].split()[-1])
    assert file.exists() == (step > 0)
    if step:
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["deltah"])["steps"] == step
            assert all(torch.isfinite(opened.get_tensor(name)).all() for name in opened.keys())
    # As it was, but for the steps that were taken.
    assert all(p.grad is kept[n] and bool((p.grad == 7).all()) for n, p in policy.parameters.items())
    assert all(module.training for module in policy.model.modules())
    assert torch.equal(torch.random.get_rng_state(), rng) and not same(policy, random_policy())


def test_gradients_and_mode_are_left_as_they_were():
    policy = random_policy()
    policy.model.train()
    kept = next(iter(policy.parameters.values())).grad = torch.ones_like(next(iter(policy.parameters.values())))
    run(policy, steps=1)
    first, *rest = policy.parameters.values()
    assert first.grad is kept and bool((kept == 1).all()) and all(p.grad is None for p in rest)
    assert all(module.training for module in policy.model.modules())


def test_adapters_alone_train_and_are_stored(tmp_path, monkeypatch):
    def adapted(**settings):
        policy = random_policy()
        policy = dh.Policy(get_peft_model(policy.model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2)),
                           policy.tokenizer)
        frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
        _, table = run(policy, learning_rate=0.05, **settings)
        assert all(torch.equal(p, frozen[n]) for n, p in policy.model.named_parameters() if n in frozen)
        return policy, table

    policy, table = adapted()
    stop_in(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        adapted(checkpoint=tmp_path / "run")
    monkeypatch.undo()
    other, resumed = adapted(checkpoint=tmp_path / "run")
    assert same(policy, other) and resumed.equals(table) and table["kl"].iloc[-1] > 0
    with safe_open(tmp_path / "run", "pt") as file:
        stored = {name.removeprefix("parameter/") for name in file.keys() if name.startswith("parameter/")}
    assert stored == set(policy.parameters) and all("lora" in name for name in stored)


def test_a_bfloat16_policy_trains_and_resumes(tmp_path):
    policy, table = run(random_policy(torch.bfloat16))
    run(random_policy(torch.bfloat16), steps=3, checkpoint=tmp_path / "run")
    other, resumed = run(random_policy(torch.bfloat16), checkpoint=tmp_path / "run")
    assert same(policy, other) and resumed.equals(table) and table["measured"].iloc[0] != 0


def test_chat_problems_train_too():
    policy = random_policy()
    policy.tokenizer.chat_template = TEMPLATE
    talks = Dataset.from_dict({"prompt": [[{"role": "user", "content": row["prompt"]}] for row in PROBLEMS],
                               "level": list(range(40))})
    seen = []

    def reward(texts, rows):
        seen.extend(rows)
        return digits(texts, rows)

    _, table = run(policy, talks, steps=1, reward=reward)
    assert table["reward"].notna().all() and len(seen) == 24 and set(seen[0]) == {"prompt", "level"}
    # Texts of a Dataset are a user's messages there, so that the same responses come.
    other = random_policy()
    other.tokenizer.chat_template = TEMPLATE
    _, texts = run(other, PROBLEMS, steps=1)
    assert texts.equals(table) and same(policy, other)
    _, plain = run(steps=1, chat=False)
    assert not plain.equals(table)


@pytest.mark.parametrize("objective", sorted(objectives.OBJECTIVES))
def test_every_objective_trains(objective):
    policy, table = run(objective=objective, steps=2, predict_every=None)
    assert not same(policy, random_policy()) and table["loss"].notna().all()


def test_kl_cov_is_the_plain_policy_gradient_as_long_as_nothing_has_moved():
    def penalised(coefficient, minibatches):
        losses = functools.partial(objectives.kl_cov, kl_coefficient=coefficient, fraction=0.2)
        return run(objective=objectives.Objective(losses, "token_mean"), steps=2, predict_every=None,
                   minibatches=minibatches)[0]

    assert same(penalised(0.0, 1), penalised(5.0, 1))
    assert not same(penalised(0.0, 2), penalised(5.0, 2))


def test_batches_of_a_run_change_nothing_but_rounding():
    policy, table = whole()
    other, again = run(batch_size=3)
    numbers = [name for name in table if name != "measured_by"]
    pd.testing.assert_frame_equal(table[numbers], again[numbers], rtol=1e-2, atol=1e-4)
    assert not same(policy, other)


class Listening(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, args, state, control, model=None, **more):
        self.events.append(("begin", state.global_step, type(model).__name__))

    def on_log(self, args, state, control, logs=None, **more):
        self.events.append((state.global_step, logs))

    def on_train_end(self, args, state, control, **more):
        self.events.append("end")


def test_reporters_get_the_numbers_of_each_record(tmp_path):
    listening = Listening()
    _, table = run(steps=3, report_to=[listening])
    assert listening.events[0] == ("begin", 0, "Qwen2ForCausalLM") and listening.events[-1] == "end"
    for (step, logs), (_, row) in zip(listening.events[1:-1], table.iterrows(), strict=True):
        numbers = row.drop(["step", "measured_by"]).dropna()
        assert step == row["step"] and logs == numbers.to_dict()
    failing = Listening()
    with pytest.raises(ValueError):
        run(reward=after(1, math.nan), report_to=failing)
    assert [event if event == "end" else event[0] for event in failing.events] == ["begin", 0, "end"]


def test_reporters_by_name_are_transformers_own(tmp_path, monkeypatch):
    import sys
    import types

    from transformers.integrations import integration_utils

    written = []

    class SummaryWriter:
        def __init__(self, log_dir):
            written.append(log_dir)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def __getattr__(self, name):
            return lambda *arguments, **more: None

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    _, table = run(steps=2, report_to="tensorboard", log=tmp_path / "log.jsonl")
    assert str(written[0]).startswith(str(tmp_path))
    assert ("train/reward", table["reward"].iloc[1], 1) in written
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match="^report_to: TensorBoardCallback requires"):
        run(report_to="tensorboard")
    with pytest.raises(ValueError, match="^report_to: .*abc"):
        run(report_to=["abc"])


WRONG = {
    "problems: expected a Dataset": dict(problems=["1+1="]),
    "problems: expected a column 'prompt'": dict(problems=Dataset.from_dict({"question": ["a"] * 40})),
    "prompts_per_step: expected an integer ≥ 1 and ≤ 40": dict(prompts_per_step=41),
    "minibatches: expected a divisor of the 6 prompts": dict(minibatches=4),
    "predict_prompts: expected at most half of the 34": dict(predict_prompts=18),
    "predict_prompts: expected an integer ≥ 5": dict(predict_prompts=4),
    "reward: expected a function or a name": dict(problems=PROBLEMS.remove_columns("answer"), reward=None),
    "rows.*: expected an answer": dict(problems=Dataset.from_dict({"prompt": ["a"] * 40, "answer": ["1"] * 39 + [""]}),
                                       reward=None),
    "optimizer: expected it to hold": dict(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])),
    "log: expected another file": dict(checkpoint="log.jsonl"),
    "checkpoint: no folder": dict(checkpoint="nowhere/run"),
    "log: no folder": dict(log="nowhere/run"),
    "policy: has no tokenizer": dict(policy=lambda: dh.Policy(random_policy().model)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"log": "log.jsonl"} | WRONG[message]
    policy = given.pop("policy", random_policy)()
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=f"^{message}"):
        run(policy, **given)
    assert list(tmp_path.iterdir()) == [] and same(policy, random_policy())


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path):
    # A server that has the library loaded forks a process for each start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deltah"])

    def launched(folder):
        process = context.Process(target=killed.run, args=(str(tmp_path / folder),))
        process.start()
        return process

    for folder in ("first", "whole", "killed"):
        (tmp_path / folder).mkdir()
    launched("first").join()
    begin = time.monotonic()
    process = launched("whole")
    process.join()
    assert process.exitcode == 0
    duration, draw, kills = time.monotonic() - begin, random.Random(), 0
    for _ in range(100):
        process = launched("killed")
        process.join(draw.uniform(0, duration / 2))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills > 0
    expected, found = ({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()
                        if not path.name.startswith(".")} for folder in ("whole", "killed"))
    assert set(found) == {"run.safetensors", "run.jsonl"} and found == expected
    print(f"killed {kills} times; {duration:.1f} s of work")
