"""Wrong things thrown at every public function: one clear error that names the argument, and nothing is changed."""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

import deltah as dh
from deltah import exact, metrics, objectives

N, T, V = 12, 3, 4
MASK = torch.ones(N, T, dtype=torch.bool)


@functools.cache
def policy():
    return exact.tiny_policy(vocabulary_size=V, context_length=8)


@functools.cache
def rollouts():
    ids = torch.randint(0, V, (N, 2 + T), generator=torch.Generator().manual_seed(0))
    return dh.Rollouts(ids, torch.ones_like(ids, dtype=torch.bool), MASK, torch.arange(N) // 2,
                       rewards=torch.arange(N).double() % 3)


@functools.cache
def scores():
    with torch.no_grad():
        return dh.score(policy(), rollouts(), moments=True)


@functools.cache
def optimizer():
    return torch.optim.AdamW(policy().parameters.values(), lr=1e-3)


@functools.cache
def direction():
    return dh.update_direction(policy(), rollouts(), "grpo", optimizer=optimizer())


@functools.cache
def change(order=1):
    return dh.entropy_change(policy(), rollouts(), direction(), order=order, baseline="entropy")


NAN = float("nan")
ESTIMATE = dh.Estimate(1.0, 0.1, 10)
# What is wrong as an argument of each kind. None is added where an argument may not be left out.
ANYTHING = ["abc", [1, "a"], {"a": 1}, 1.5, ESTIMATE, object()]
NO_NUMBER = ["abc", [1.0], {}, ESTIMATE, True, 1j, NAN, torch.ones(2), -3]
WRONG = {
    "policy": [*ANYTHING, torch.nn.Linear(2, 2)],
    "rollouts": [*ANYTHING, torch.ones(2, 3)],
    "scores": [*ANYTHING, torch.ones(2, 3)],
    "direction": ["abc", [1], 1.5, ESTIMATE, {"a": torch.ones(1)}, {1: 2}, torch.ones(2)],
    "by_name": ["abc", [1], 1.5, ESTIMATE, {"a": torch.ones(1)}, {1: 2}, torch.ones(2)],
    "optimizer": [*ANYTHING, torch.optim.Adagrad([torch.ones(1, requires_grad=True)])],
    "objective": ["abc", [1], {}, 1.5, ESTIMATE, object()],
    "integer": [*NO_NUMBER, 1.5, 0.0, "3"],
    "number": [*NO_NUMBER, "3", math.inf],
    "any_number": ["abc", [1.0], {}, ESTIMATE, True, 1j, torch.ones(2), "3"],
    "choice": ["abc", [1], {}, 1.5, 17, ESTIMATE, object(), True],
    "boolean": ["abc", [1], {}, 1.5, ESTIMATE, 2],
    "floating": ["abc", [1.0], {}, 1.5, ESTIMATE, np.ones(3), torch.ones(3, 5, 7), torch.ones(N, T) * 1j],
    "any_shape": ["abc", [1.0], {}, 1.5, ESTIMATE, np.ones(3), torch.ones(N, T) * 1j],
    "integers": ["abc", [1.0], {}, 1.5, ESTIMATE, torch.ones(3, 5, 7), torch.rand(N)],
    "mask": ["abc", [1.0], {}, 1.5, ESTIMATE, torch.ones(3, 5, 7), torch.rand(N, T)],
    "text": [[1], {}, 1.5, ESTIMATE, 3, b"x"],
    "path": [[1], {}, 1.5, ESTIMATE, 3, object()],
    "texts": ["abc", 1.5, 3, ESTIMATE, [1, 2], [None]],
    "function": ["abc", [1], {}, 1.5, ESTIMATE, 3],
    "estimate": ["abc", [1], {}, 1.5, 3, torch.ones(2), object()],
    "problems": [*ANYTHING, ["2+2="], Dataset.from_dict({"question": ["2+2="]})],
    "reporters": ["abc", 1.5, {"a": 1}, ESTIMATE, [1], [None]],
    "rates": ["abc", {}, ESTIMATE, ["a"], [], [NAN], [-1.0]],
}


class Of:
    """A right argument, made when it is wanted, what kind of thing it is, and whether None is one too."""

    def __init__(self, kind, make, optional=False):
        self.kind, self.make, self.optional = kind, make if callable(make) else lambda: make, optional

    @property
    def wrong(self):
        return [*WRONG[self.kind], *([] if self.optional else [None])]


POLICY, ROLLOUTS, SCORES = Of("policy", policy), Of("rollouts", rollouts), Of("scores", scores)
DIRECTION, ESTIMATED = Of("direction", direction), Of("estimate", change)
BATCH, MOMENTS = Of("integer", 2, optional=True), Of("boolean", True)
X, LOG_PROBS = Of("floating", lambda: torch.randn(N)), Of("floating", lambda: scores().log_probs)
CLUSTERS = Of("integers", lambda: rollouts().prompt_index, optional=True)
LOSS = dict(log_probs=LOG_PROBS, old_log_probs=LOG_PROBS, advantages=Of("floating", lambda: torch.ones(N)),
            mask=Of("mask", MASK))
CLIPS = dict(clip_low=Of("number", 0.2), clip_high=Of("number", 0.2))
DUAL, FRACTION = dict(dual_clip=Of("number", 3.0, optional=True)), dict(fraction=Of("number", 0.1))
SELECTED = Of("mask", None, optional=True)
DRAWN = FRACTION | dict(covariance_low=Of("any_number", 0.0), covariance_high=Of("any_number", 5.0),
                        seed=Of("integer", 0))
RANKED = {name: LOSS[name] for name in ("log_probs", "advantages", "mask")}
ENTROPIES, THRESHOLD = dict(entropies=LOG_PROBS), dict(threshold=Of("number", 2.5))
COLLISIONS = dict(collisions=LOG_PROBS, collision_log_probs=LOG_PROBS)

CALLS = {
    dh.score: dict(policy=POLICY, rollouts=ROLLOUTS, parameters=Of("by_name", None, optional=True), batch_size=BATCH,
                   moments=MOMENTS),
    dh.log_probs_and_entropies: dict(logits=Of("any_shape", lambda: torch.randn(N, V)),
                                     targets=Of("integers", lambda: torch.zeros(N, dtype=torch.long)),
                                     moments=MOMENTS),
    dh.linear_log_probs_and_entropies: dict(
        hidden=Of("any_shape", lambda: torch.randn(N, 2)), weight=Of("floating", lambda: torch.randn(V, 2)),
        targets=Of("integers", lambda: torch.zeros(N, dtype=torch.long)), temperature=Of("number", 1.0),
        bias=Of("floating", None, optional=True), scale=Of("any_number", 1.0),
        soft_cap=Of("number", None, optional=True), moments=MOMENTS),
    dh.entropy: dict(scores=SCORES, rollouts=ROLLOUTS, method=Of("choice", "monte_carlo"), per=Of("choice", "token")),
    dh.control_variate: dict(target=X, variates=Of("floating", lambda: torch.randn(N, 1)),
                             clusters=Of("integers", lambda: torch.arange(N)),
                             denominators=Of("floating", None, optional=True)),
    dh.truncated_entropy: dict(logits=Of("any_shape", lambda: torch.randn(N, V)), top_k=Of("integer", 2),
                               top_p=Of("number", None, optional=True), temperature=Of("number", 1.0)),
    dh.variance_decomposition: dict(scores=SCORES, rollouts=ROLLOUTS, weights=Of("floating", None, optional=True)),
    dh.u_statistic: dict(products=Of("floating", lambda: torch.randn(5, 5))),
    dh.two_sample_product: dict(products=Of("floating", lambda: torch.randn(5, 4))),
    dh.update_direction: dict(
        policy=POLICY, rollouts=ROLLOUTS, objective=Of("objective", "grpo"), optimizer=Of("optimizer", optimizer),
        old_log_probs=Of("floating", None, optional=True), max_gradient_norm=Of("number", None, optional=True),
        batch_size=BATCH, seed=Of("integer", 0), selected=SELECTED),
    dh.entropy_change: dict(policy=POLICY, rollouts=ROLLOUTS, direction=DIRECTION, order=Of("choice", 1),
                            per=Of("choice", "token"), baseline=Of("choice", "entropy"), batch_size=BATCH),
    dh.attribution: dict(policy=POLICY, rollouts=ROLLOUTS, direction=DIRECTION, change=ESTIMATED, batch_size=BATCH),
    dh.critical_learning_rate: dict(first=ESTIMATED, second=Of("estimate", lambda: change(2))),
    dh.measured_entropy_change: dict(
        policy=POLICY, rollouts=ROLLOUTS, direction=DIRECTION, learning_rates=Of("rates", [1e-3]),
        per=Of("choice", "token"), method=Of("choice", "importance"), seed=Of("integer", 0),
        max_new_tokens=Of("integer", None, optional=True), batch_size=BATCH),
    dh.linearity: dict(
        policy=POLICY, rollouts=ROLLOUTS, direction=DIRECTION, learning_rates=Of("rates", [1e-4, 1e-3]),
        per=Of("choice", "token"), batch_size=BATCH),
    dh.fisher_kernel: dict(
        policy=POLICY, rollouts=ROLLOUTS, others=Of("rollouts", None, optional=True),
        preconditioner=Of("by_name", None, optional=True), level=Of("choice", "sequence"), batch_size=BATCH),
    dh.fisher_sketch: dict(
        policy=POLICY, rollouts=ROLLOUTS, dimension=Of("integer", 16),
        preconditioner=Of("by_name", None, optional=True), level=Of("choice", "sequence"),
        seed=Of("integer", 0), batch_size=BATCH),
    dh.load_policy: dict(path=Of("path", "nowhere"), device=Of("choice", "cpu"), dtype=Of("choice", "float32")),
    dh.load_problems: dict(path_or_hub_id=Of("path", "./nowhere"), split=Of("text", "test"),
                           chat=Of("boolean", False)),
    dh.extract_answer: dict(text=Of("text", "#### 4")),
    dh.score_answers: dict(responses=Of("texts", ["#### 4"]), answers=Of("texts", ["4"])),
    dh.Estimate.mean: dict(contributions=X, clusters=CLUSTERS, population=Of("integer", None, optional=True)),
    dh.Estimate.ratio: dict(numerators=X, denominators=Of("floating", lambda: torch.ones(N)), clusters=CLUSTERS),
    dh.Estimate.smooth: dict(function=Of("function", lambda: lambda means: means[0]),
                             samples=Of("floating", lambda: torch.randn(N, 2)), clusters=CLUSTERS),
    ESTIMATE.interval: dict(level=Of("number", 0.95)),
    objectives.group_advantages: dict(rewards=X, prompt_index=Of("integers", lambda: rollouts().prompt_index),
                                      scale=Of("boolean", True)),
    objectives.grpo: LOSS | CLIPS | DUAL, objectives.dr_grpo: LOSS | CLIPS, objectives.dapo: LOSS | CLIPS | DUAL,
    objectives.cispo: LOSS | CLIPS | dict(clip_low=Of("number", None, optional=True)),
    objectives.gspo: LOSS | CLIPS, objectives.gspo_token: LOSS | CLIPS,
    objectives.ce_gppo: LOSS | CLIPS | DUAL | dict(beta_low=Of("number", 0.75), beta_high=Of("number", 1.0)),
    objectives.clip_cov: LOSS | CLIPS | DRAWN | dict(selected=SELECTED),
    objectives.clip_cov_tokens: LOSS | CLIPS | DRAWN,
    objectives.kl_cov: LOSS | FRACTION | dict(kl_coefficient=Of("number", 1.0), selected=SELECTED),
    objectives.kl_cov_tokens: RANKED | FRACTION, objectives.token_covariances: RANKED,
    objectives.clip_b: LOSS | CLIPS | ENTROPIES | THRESHOLD,
    objectives.clip_b_tokens: RANKED | ENTROPIES | THRESHOLD,
    objectives.clip_v: LOSS | CLIPS | ENTROPIES | COLLISIONS | THRESHOLD | FRACTION,
    objectives.clip_v_tokens: RANKED | ENTROPIES | COLLISIONS | THRESHOLD | FRACTION,
    objectives.entropy_bonus: LOSS | CLIPS | ENTROPIES | dict(beta=Of("any_number", 0.005)),
    objectives.sequence_ratio: {name: LOSS[name] for name in ("log_probs", "old_log_probs", "mask")},
    objectives.aggregate: dict(losses=LOG_PROBS, mask=LOSS["mask"], how=Of("choice", "constant"),
                               length=Of("integer", None, optional=True)),
    **{function: dict(scores=SCORES) | {name: LOSS[name] for name in ("old_log_probs", "advantages", "mask")}
       for function in objectives.token_scores.SCORES.values()},
    objectives.find: dict(objective=Of("objective", "grpo")),
    dh.training.policy_gradient_step: dict(
        policy=POLICY, rollouts=ROLLOUTS, old_log_probs=LOG_PROBS, objective=Of("objective", "grpo"),
        optimizer=Of("optimizer", optimizer), max_gradient_norm=Of("number", None, optional=True),
        seed=Of("integer", 0), selected=SELECTED, batch_size=BATCH),
    metrics.pass_at_k: dict(rewards=X, prompt_index=Of("integers", lambda: rollouts().prompt_index),
                            k=Of("integer", 1)),
    exact.exact_policy: dict(model=Of("policy", lambda: exact.tiny_policy().model)),
    exact.tiny_policy: dict(vocabulary_size=Of("integer", 4), eos_token_id=Of("integer", None, optional=True),
                            context_length=Of("integer", 8), seed=Of("integer", 0), eos_logit=Of("any_number", 0.0)),
    exact.every_response: dict(policy=POLICY, prompts=Of("texts", [[0], [1, 2]]), max_new_tokens=Of("integer", 2),
                               temperature=Of("number", 1.0)),
    exact.probabilities: dict(scores=SCORES),
    exact.every_group: dict(probabilities=X, size=Of("integer", 2)),
    exact.flat_gradient: dict(
        policy=POLICY, quantity=Of("floating", lambda: dh.score(policy(), rollouts()).log_probs.sum())),
    exact.prefixes: dict(rollouts=ROLLOUTS),
    exact.given_prefix: dict(x=LOG_PROBS, rollouts=ROLLOUTS, weights=X),
    exact.covariance: dict(x=Of("floating", lambda: torch.randn(N, 2)), weights=X),
    exact.group_moments: dict(probabilities=Of("floating", lambda: torch.ones(2, 3) / 3),
                              values=Of("floating", lambda: torch.ones(1, 2, 3)), size=Of("integer", 2)),
    exact.coverage: dict(
        estimate=Of("function", lambda: lambda rows: ESTIMATE), weights=Of("floating", lambda: torch.ones(N)),
        size=Of("integer", 4), truth=Of("any_number", 1.0), replicates=Of("integer", 2), level=Of("number", 0.95),
        seed=Of("integer", 0)),
    exact.replicate: dict(
        estimate=Of("function", lambda: lambda rows: ESTIMATE), weights=Of("floating", lambda: torch.ones(N)),
        size=Of("integer", 4), replicates=Of("integer", 2), seed=Of("integer", 0)),
    exact.conditional_mean: dict(values=X, rollouts=ROLLOUTS, weights=Of("floating", lambda: torch.ones(N)),
                                 tokens=Of("integer", 1)),
    exact.cross_fitted: dict(target=X, variate=X, weights=Of("floating", lambda: torch.ones(N)),
                             size=Of("integer", 6), replicates=Of("integer", 2), seed=Of("integer", 0)),
}
CASES = [(function, name) for function, arguments in CALLS.items() for name in arguments]


@pytest.mark.parametrize("function, name", CASES, ids=lambda x: getattr(x, "__qualname__", x))
def test_each_wrong_argument_is_named(function, name):
    arguments = CALLS[function]
    for wrong in arguments[name].wrong:
        given = {other: of.make() for other, of in arguments.items()} | {name: wrong}
        before = state()
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**given)
        assert type(caught.value) in (TypeError, ValueError), f"{wrong!r}: {caught.value!r}"
        assert str(caught.value).startswith(name), f"{wrong!r}: {caught.value!r}"
        assert len(str(caught.value)) < 500
        assert state() == before


def state():
    """What no call may change: parameters, gradients, mode, hooks, the optimizer's state, generators."""
    model = policy().model
    return ([p.double().sum().item() for p in model.parameters()], [p.grad is None for p in model.parameters()],
            [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()],
            len(optimizer().state), torch.random.get_rng_state().tolist(), torch.is_grad_enabled())


@pytest.mark.parametrize("name", ["prompts", "responses_per_prompt", "max_new_tokens", "temperature", "top_k", "top_p",
                                  "seed", "batch_size", "reward", "chat", "policy"])
def test_each_wrong_argument_of_sample_is_named(shipped, name):
    kinds = {"prompts": Of("texts", ["2+2="]), "temperature": Of("number", 1.0),
             "top_p": Of("number", None, optional=True), "reward": Of("objective", None, optional=True),
             "chat": Of("boolean", None, optional=True), "policy": POLICY,
             "top_k": Of("integer", None, optional=True), "batch_size": BATCH}
    for wrong in kinds.get(name, Of("integer", 1)).wrong:
        given = {"policy": shipped, "prompts": ["2+2="], "max_new_tokens": 2} | {name: wrong}
        with pytest.raises((TypeError, ValueError)) as caught:
            dh.sample(**given)
        assert str(caught.value).startswith(name), f"{wrong!r}: {caught.value!r}"


TRAINING = {
    "policy": POLICY, "problems": Of("problems", None), "objective": Of("objective", "grpo"),
    "optimizer": Of("optimizer", None, optional=True), "learning_rate": Of("number", 1e-4),
    "temperature": Of("number", 1.0), "max_gradient_norm": Of("number", None, optional=True),
    "reward": Of("objective", None, optional=True), "chat": Of("boolean", None, optional=True),
    "checkpoint": Of("path", None, optional=True), "log": Of("path", None, optional=True),
    "predict_every": Of("integer", None, optional=True), "report_to": Of("reporters", None, optional=True),
    "batch_size": BATCH}


@pytest.mark.parametrize("name", inspect.signature(dh.training.train).parameters)
def test_each_wrong_argument_of_train_is_named(shipped, problems, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in TRAINING.get(name, Of("integer", 1)).wrong:
        given = {"policy": shipped, "problems": problems.select(range(20)), "prompts_per_step": 2, "predict_prompts": 5,
                 "checkpoint": "run"} | {name: wrong}
        with pytest.raises((TypeError, ValueError)) as caught:
            dh.training.train(**given)
        assert str(caught.value).startswith(name), f"{wrong!r}: {caught.value!r}"
    assert list(tmp_path.iterdir()) == []


def public_functions():
    found = [getattr(dh, name) for name in dh.__all__]
    for room in (objectives, objectives.token_scores, exact, dh.statistics, dh.training):
        found += [f for name, f in vars(room).items() if not name.startswith("_")
                  and getattr(f, "__module__", "").startswith(room.__name__)]
    return {f for f in found if inspect.isfunction(f)}


def test_no_public_function_and_no_argument_is_left_out():
    assert public_functions() - {dh.sample, dh.training.train} <= set(CALLS)
    for function, arguments in CALLS.items():
        expected = [name for name in inspect.signature(function).parameters]
        assert set(arguments) == set(expected), function.__qualname__
        # What the table calls right is right: a wrong argument is refused for being wrong.
        if function not in (dh.load_policy, dh.load_problems):
            function(**{name: of.make() for name, of in arguments.items()})
