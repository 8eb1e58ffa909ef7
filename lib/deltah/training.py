"""The reinforcement-learning loop that the chapters use: small, and it goes on where it was stopped."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from deltah import checkpoints, checks, metrics
from deltah.logs import Log, find_reporters
from deltah.objectives import Objective, find, group_advantages
from deltah.policies import Policy
from deltah.rewards import Reward, find_reward
from deltah.rollouts import Rollouts, checked_temperature
from deltah.sampling import sample
from deltah.scoring import batches, score, weighted_gradient
from deltah.updates import check_old, groups_of, loss_and_weights


@torch.inference_mode(False)
def train(policy: Policy, problems: Dataset, objective: str | Objective = "grpo", steps: int = 100,
          prompts_per_step: int = 16, responses_per_prompt: int = 8, minibatches: int = 1,
          optimizer: Optimizer | None = None, learning_rate: float = 1e-4, max_new_tokens: int = 64,
          temperature: float = 1.0, max_gradient_norm: float | None = None, reward: str | Reward | None = None,
          chat: bool | None = None, checkpoint: str | Path | None = None, checkpoint_every: int = 10,
          log: str | Path | None = None, log_every: int = 1, predict_every: int | None = None,
          predict_prompts: int = 64, report_to: str | TrainerCallback | list[str | TrainerCallback] | None = None,
          seed: int = 0, batch_size: int | None = None) -> pd.DataFrame:
    """Train a policy in place: sample, reward, advantages, and optimizer steps on an objective's loss.

    A step draws prompts that it has not drawn since the last time through the data, samples responses, makes advantages
    over each prompt's whole group, and then takes one optimizer step on each minibatch in turn. Log-probs of the policy
    that sampled are computed once, for the whole batch. Minibatches hold whole prompts, in the order in which they were
    drawn: advantages sum to zero in each, which keeps noise out of its gradient, and no minibatch is made of prompts
    that an earlier one has moved the policy on. TRL shuffles the rollouts instead, and verl cuts them in the order in
    which balancing their lengths over devices has left them.

    What a step draws follows from `seed` and its number alone. A run that was stopped, by whatever means, and is called
    again with the same arguments and the policy that it began with, takes up its checkpoint and ends with the same
    parameters and records, bit for bit where processor, threads and batch sizes are the same (`batch_size=None` may
    choose others where memory is short). Another number of `steps` continues it, or ends it earlier.

    After an error, or an interrupt, the policy keeps the optimizer steps that were taken; its mode, gradients and
    PyTorch's generators are as they were, as they are at the end.

    Args:
        policy: any policy with a tokenizer; its trainable parameters change, those of adapters alone where only they
            train.
        problems: a Dataset with a column `prompt`, and what the reward reads.
        objective: a name of `objectives.OBJECTIVES`, or an `objectives.Objective`. The constant that Dr. GRPO divides
            by is `max_new_tokens`, unless the objective has another `length`.
        steps: in all, those of a checkpoint included.
        prompts_per_step, responses_per_prompt: of a batch; `minibatches` has to divide the prompts.
        minibatches: optimizer steps that a batch is cut for.
        optimizer: any torch optimizer that holds the policy's parameters, with its state; None: torch's AdamW.
        learning_rate: > 0, of that AdamW.
        max_new_tokens, temperature, reward, chat: as for `sample`.
        max_gradient_norm: > 0, the norm to clip gradients to; None: they are left.
        checkpoint: a file to write, and to take up where it is there; None: nothing is kept.
        checkpoint_every: steps between writing it; it is written at the end too.
        log: a file of JSON lines, one for each record, written anew; None: beside the checkpoint, run.jsonl beside
            run.safetensors and run.a.jsonl beside run.a.
        log_every: steps between records, each of which takes two forward passes over the batch, for `kl`.
        predict_every: steps between predictions and measurements of what a step does to the entropy, which cost about
            half as much as a step; None: there are none.
        predict_prompts: prompts, of those that the step leaves out, with one response each, that predict; as many
            others measure. At least 5.
        report_to: names of transformers' reporters, such as "tensorboard" or "wandb", or callbacks of its Trainer, that
            get the records; needs the package accelerate.
        seed: of the prompts' order, of the responses, and of what objectives draw.
        batch_size: rollouts at a time, wherever the model runs; None: as many as suit the device.

    Returns:
        A row for each record. `step` counts the steps taken before, and what follows is of the policy as it was then,
        with a standard error in a column named *_error: `reward`; `pass_at_1` and `pass_at_k` with k the responses to a
        prompt, one passing where its reward is above 0.5; `length` in tokens; `entropy` in nats per token; `kl`, to the
        policy at the start, in nats per token. Then of the step: `loss` and `gradient_norm` (before it is clipped),
        means over minibatches; `clipped_*`, shares of all tokens that get no gradient, by the sign of their advantage
        and whether π/π_old is below or above 1; and where predicted, in nats per token, `predicted`, first order in
        full, `predicted_direct`, its part at fixed prefixes, `measured`, and `measured_by` (`metrics`).

    Raises:
        TypeError: an argument of the wrong kind. ValueError: one out of range; a checkpoint that is damaged or of
            another run; anything that is NaN or infinite on the way, parameters included, with a note of the step and
            minibatch. A checkpoint holds none of it. FileNotFoundError: no folder to write to. RewardError: the reward
            function failed.

    >>> train(policy, problems, "gspo", steps=2, minibatches=4)[["reward", "entropy"]]         # doctest: +SKIP
         reward   entropy
    0  0.523438  0.166207
    1  0.484375  0.171394
    """
    checks.instance("policy", policy, Policy)
    checks.instance("problems", problems, Dataset, "a Dataset with a column 'prompt'")
    if "prompt" not in problems.column_names:
        raise ValueError(f"problems: expected a column 'prompt', got {', '.join(problems.column_names)}")
    policy.encode(problems["prompt"][:1])
    objective = find(objective)
    steps = checks.integer("steps", steps, minimum=1)
    prompts = checks.integer("prompts_per_step", prompts_per_step, minimum=1, maximum=len(problems))
    responses_per_prompt = checks.integer("responses_per_prompt", responses_per_prompt, minimum=1)
    minibatches = checks.integer("minibatches", minibatches, minimum=1)
    if prompts % minibatches:
        raise ValueError(f"minibatches: expected a divisor of the {prompts} prompts of a step, got {minibatches}")
    if predict_every is not None:
        predict_every = checks.integer("predict_every", predict_every, minimum=1)
    predict_prompts = checks.integer("predict_prompts", predict_prompts, minimum=5)
    if predict_every and 2 * predict_prompts > len(problems) - prompts:
        raise ValueError(f"predict_prompts: expected at most half of the {len(problems) - prompts} problems that a "
                         f"step leaves out, got {predict_prompts}")
    limit = None if max_gradient_norm is None else checks.number("max_gradient_norm", max_gradient_norm, above=0)
    learning_rate = checks.number("learning_rate", learning_rate, above=0)
    sampling = {"max_new_tokens": checks.integer("max_new_tokens", max_new_tokens, minimum=1),
                "temperature": checked_temperature(temperature),
                "chat": None if chat is None else checks.boolean("chat", chat)}
    if objective.aggregation == "constant" and objective.length is None:
        # The width of a batch is that of its longest response, and no constant.
        objective = replace(objective, length=sampling["max_new_tokens"])
    batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    checkpoint_every = checks.integer("checkpoint_every", checkpoint_every, minimum=1)
    log_every, seed = checks.integer("log_every", log_every, minimum=1), checks.integer("seed", seed, minimum=0)
    if find_reward(reward, list(problems)) is None:
        raise ValueError("reward: expected a function or a name, as the problems have no column 'answer'; got None")
    path, log = _file("checkpoint", checkpoint), _file("log", log)
    if log is None and path is not None:
        # Only a suffix that says nothing is left out: runs in lr.0.1 and lr.0.2 have two logs.
        log = path.with_name(f"{path.name.removesuffix('.safetensors')}.jsonl")
    if path is not None and log.resolve() == path.resolve():
        raise ValueError(f"log: expected another file than the checkpoint's, got {str(log)!r}")
    reporters = find_reporters(report_to)
    if optimizer is None:
        optimizer = torch.optim.AdamW(policy.parameters.values(), lr=learning_rate)
    groups_of(policy, checks.instance("optimizer", optimizer, Optimizer, "a torch optimizer"))

    done, records, run = 0, [], {}
    if path is not None:
        run = checkpoints.configuration(policy, problems, optimizer, {
            "objective": objective, "seed": seed, "prompts_per_step": prompts, "minibatches": minibatches,
            "responses_per_prompt": responses_per_prompt, "max_gradient_norm": limit, "reward": reward,
            "log_every": log_every, "predict_every": predict_every, "predict_prompts": predict_prompts, **sampling})
    sampling["batch_size"] = batch_size
    start, gradients = _copies(policy), {name: p.grad for name, p in policy.parameters.items()}
    if path is not None and path.exists():
        done, records = checkpoints.load(path, policy, optimizer, run, steps)
    try:
        with (torch.random.fork_rng(devices=range(torch.cuda.device_count())),
              Log(log, records, reporters, policy, steps, done) as shown):
            for step in range(done, steps):
                predicted = predict_every is not None and step % predict_every == 0
                recorded = predicted or step % log_every == 0
                with _noted(f"in step {step}"):
                    # What a reward or an objective may draw from.
                    torch.manual_seed(_seed(seed, step, 0))
                    rows, others = _prompts(len(problems), prompts, seed, step)
                    batch = sample(policy, problems.select(rows), responses_per_prompt, reward=reward,
                                   seed=_seed(seed, step, 1), **sampling)
                    batch = batch.replace(
                        advantages=group_advantages(batch.rewards, batch.prompt_index, objective.scale))
                    with torch.no_grad():
                        scores = score(policy, batch, batch_size=batch_size)
                    record = {"step": step} | metrics.of_rollouts(batch, scores)
                    if recorded:
                        kl = metrics.kl_per_token(policy, start, batch, batch_size)
                        record |= metrics.with_error("kl", kl)
                    if predicted:
                        before = _copies(policy)
                        unseen = problems.select(others[:2 * predict_prompts]).select_columns("prompt")
                        elsewhere = sample(policy, unseen, 1, seed=_seed(seed, step, 2), **sampling)
                    record |= _minibatch_steps(policy, batch, scores.log_probs, objective, optimizer, minibatches,
                                               limit, seed, step, batch_size)
                    if predicted:
                        record |= metrics.of_step(policy, before, elsewhere, max_new_tokens, _seed(seed, step, 3),
                                                  batch_size)
                shown.add(record, recorded)
                if path is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                    checkpoints.save(path, policy, optimizer, run, step + 1, records)
    finally:
        for name, p in policy.parameters.items():
            p.grad = gradients[name]
    return pd.DataFrame(records)


def _minibatch_steps(policy: Policy, batch: Rollouts, old_log_probs: Tensor, objective: Objective,
                     optimizer: Optimizer, minibatches: int, limit: float | None, seed: int, step: int,
                     batch_size: int | None) -> dict[str, float]:
    """An optimizer step on each minibatch; their mean loss and gradient norm, and what was clipped."""
    objective, seen = metrics.watched(objective)
    # Rollouts of a prompt are adjacent, and prompts have equally many.
    rows = torch.arange(len(batch)).chunk(minibatches)
    parts, found = [batch.select(chosen) for chosen in rows], []
    for i, part in enumerate(parts):
        # The first is still the sampling policy's own: r is 1, where rounding would leave the sign of log r to chance.
        old = old_log_probs[rows[i].to(old_log_probs.device)] if i else None
        with _noted(f"in minibatch {i}"):
            found.append(_step(policy, part, old, objective, optimizer, limit, _seed(seed, step, 4 + i), None,
                               batch_size))
            for name, p in policy.parameters.items():
                if not torch.isfinite(p).all():
                    raise ValueError(f"policy: the optimizer has made {name} NaN or infinite")
    loss, norm = np.mean(found, 0).tolist()
    return {"loss": loss, "gradient_norm": norm, **metrics.clip_fractions(parts, seen)}


def _prompts(count: int, per_step: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `count` problems those of a step, and the others in random order; a new order each time through."""
    epoch, place = divmod(step, count // per_step)
    order = _generator(seed, 0, epoch).permutation(count)
    rows = np.arange(place * per_step, (place + 1) * per_step)
    return order[rows], _generator(seed, 1, step).permutation(np.delete(order, rows))


def _seed(seed: int, step: int, purpose: int) -> int:
    return int(_generator(seed, 2 + purpose, step).integers(2**63))


def _generator(*key: int) -> np.random.Generator:
    seed, *rest = key
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=rest))


def _copies(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.parameters.items()}


@contextlib.contextmanager
def _noted(where: str) -> Iterator[None]:
    """Errors from inside say where they were raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"deltah.training.train: {where}")
        raise


def _file(name: str, path: str | Path | None) -> Path | None:
    """A file that can be written."""
    if path is None:
        return None
    path = Path(checks.instance(name, path, (str, os.PathLike), "a path"))
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file to write, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}: no folder {str(path.parent)!r} to write to")
    return path


@torch.inference_mode(False)
def policy_gradient_step(policy: Policy, rollouts: Rollouts, old_log_probs: Tensor, objective: str | Objective,
                         optimizer: Optimizer, max_gradient_norm: float | None = None, seed: int = 0,
                         selected: Tensor | None = None, batch_size: int | None = None) -> float:
    """One optimizer step on the objective's loss over `rollouts`; changes the policy in place.

    What stands in the parameters' `.grad` before takes no part in the step. After it, the (clipped) gradient of this
    batch stands there, as in any training loop, in tensors of its own: those that a caller has kept hold what they
    held. Where anything goes wrong before the step, parameters and gradients are left as they were.

    Args:
        policy: the policy whose parameters `optimizer` holds.
        rollouts: N rollouts with advantages, or with rewards that the objective makes advantages of.
        old_log_probs: [N, T] in nats, under the policy that sampled them.
        objective: a name of `objectives.OBJECTIVES`, such as "gspo", or an `objectives.Objective`.
        optimizer: any torch optimizer that needs no closure.
        max_gradient_norm: > 0, the norm to clip the gradient to; None: leave it.
        seed, selected: of `Objective.loss`: a seed for objectives that draw, another at each step; tokens that were
            chosen over more than these rollouts.
        batch_size: rollouts at a time; None: as many as suit the device. Where that is not all of them, the loss is
            taken first, without a graph, and then the gradient of one batch after the other.

    Returns:
        The loss before the step.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: an unknown objective, rollouts without advantages and
            rewards, an optimizer that holds none of the policy's parameters, or others too, a number that is NaN or out
            of range, or a gradient that is not finite.

    >>> optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-5)             # doctest: +SKIP
    >>> policy_gradient_step(policy, rollouts, old_log_probs, "gspo", optimizer)       # doctest: +SKIP
    0.0
    """
    checks.instance("policy", policy, Policy)
    checks.instance("rollouts", rollouts, Rollouts)
    checks.instance("optimizer", optimizer, Optimizer, "a torch optimizer")
    limit = None if max_gradient_norm is None else checks.number("max_gradient_norm", max_gradient_norm, above=0)
    objective = find(objective)
    check_old(old_log_probs, rollouts)
    groups_of(policy, optimizer)
    batch_size = None if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    return _step(policy, rollouts, old_log_probs, objective, optimizer, limit, seed, selected, batch_size)[0]


def _step(policy: Policy, rollouts: Rollouts, old_log_probs: Tensor | None, objective: Objective,
          optimizer: Optimizer, limit: float | None, seed: int, selected: Tensor | None, batch_size: int | None
          ) -> tuple[float, float]:
    """The loss before the step, and the gradient's norm before it is clipped; old log-probs None: the policy's own."""
    parameters, rollouts = policy.parameters, rollouts.to(policy.device)
    before = {name: p.grad for name, p in parameters.items()}
    rows = batches(policy, rollouts, batch_size)
    try:
        # Of parameters that the optimizer does not hold too: their gradients count towards the norm.
        for p in parameters.values():
            p.grad = None
        if len(rows) > 1:
            # The parameters have a say in the loss by way of log-probs and entropies alone: one graph at a time.
            loss, *weights = loss_and_weights(policy, rollouts, objective, old_log_probs, batch_size, seed, selected)
            for name, g in weighted_gradient(policy, rollouts, rows, list(parameters), *weights).items():
                parameters[name].grad = None if g is None else g.neg_().to(parameters[name].dtype)
        else:
            with torch.enable_grad():
                scores = score(policy, rollouts, batch_size=len(rollouts), moments=objective.moments)
                old = scores.log_probs.detach() if old_log_probs is None else old_log_probs
                loss = objective.loss(scores.log_probs, old, rollouts, scores.entropies, scores.collisions,
                                      scores.collision_log_probs, seed, selected)
                loss.backward()
        for name, p in parameters.items():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                raise ValueError(f"policy, rollouts: the gradient of {name} is NaN or infinite")
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if limit is None else limit)
        optimizer.step()
    except BaseException:
        for name, p in parameters.items():
            p.grad = before[name]
        raise
    return loss.item(), norm.item()
