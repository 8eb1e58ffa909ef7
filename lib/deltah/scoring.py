"""Scoring: log-probs of the tokens of rollouts, and the exact entropy of every next-token distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltah import checks, memory
from deltah.models.modes import evaluation
from deltah.models.output_layers import OutputLayer
from deltah.policies import Policy
from deltah.rollouts import Rollouts, check_rollouts
from deltah.vocabulary import linear_log_probs_and_entropies


class _LogProbsAndEntropies(NamedTuple):
    log_probs: Tensor
    entropies: Tensor


class TokenScores(_LogProbsAndEntropies):
    """Log-probs of the sampled tokens and entropies of their distributions, [N, T] in nats; 0 outside the mask.

    As a tuple it is these two, with moments or without.

    Attributes:
        collisions: Σ p² over the vocabulary, the probability that two draws agree, [N, T] without unit; None where not
            asked for.
        collision_log_probs: Σ p² log p over the vocabulary, [N, T] in nats; None where not asked for.

    >>> log_probs, entropies = TokenScores(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), torch.tensor([[0.2]]))
    >>> entropies
    tensor([[2.]])
    """

    collisions: Tensor | None = None
    collision_log_probs: Tensor | None = None

    def __new__(cls, log_probs: Tensor, entropies: Tensor, collisions: Tensor | None = None,
                collision_log_probs: Tensor | None = None) -> TokenScores:
        scores = super().__new__(cls, log_probs, entropies)
        scores.collisions, scores.collision_log_probs = collisions, collision_log_probs
        return scores


def score(policy: Policy, rollouts: Rollouts, parameters: Mapping[str, Tensor] | None = None,
          batch_size: int | None = None, moments: bool = False) -> TokenScores:
    """Log-prob of every response token under the policy, and the entropy over the whole vocabulary there.

    Both are of the distribution at `rollouts.temperature`. Differentiable, with respect to the model's own
    parameters or to `parameters`; wrap in `torch.no_grad()` where no gradient is wanted.

    Args:
        policy: the policy.
        rollouts: N rollouts of at most T response tokens.
        parameters: values in place of the model's own, by name. None: the model's own.
        batch_size: rollouts at a time; None: as many as suit the device.
        moments: fill in `collisions` and `collision_log_probs`, which token scores and some objectives need; they are
            differentiable, too.

    Returns:
        TokenScores(log_probs, entropies), each [N, T], in nats; float64 for a float64 policy, else float32.

    Raises:
        TypeError: an argument of the wrong type. ValueError: parameters that the model does not have, or of another
            shape, token ids outside the vocabulary, sequences longer than the model's context, logits that are NaN,
            or `batch_size` < 1.

    >>> log_probs, entropies = score(policy, rollouts)                       # doctest: +SKIP
    >>> -log_probs.sum(1).mean()           # the Monte Carlo entropy of a response   # doctest: +SKIP
    """
    check_rollouts(policy, rollouts)
    checks.boolean("moments", moments)
    rollouts = rollouts.to(policy.device)
    with evaluation(policy.model):
        # With gradients the graphs of all batches stay, and only a caller who scores batch by batch has one at a time.
        rows = batches(policy, rollouts, batch_size, "backward" if torch.is_grad_enabled() else "forward")
        scores = in_batches(rollouts, rows, lambda batch: score_batch(policy, batch, parameters, moments)[0])
    scores = TokenScores(*scores)
    wrong = torch.isnan(scores.log_probs + scores.entropies).any(1)
    if wrong.any():
        raise ValueError(f"policy: the model's logits are NaN or all −inf, first in rollout {int(wrong.nonzero()[0])}")
    return scores


def batches(policy: Policy, rollouts: Rollouts, batch_size: int | None = None, kind: str = "backward",
            order: int = 0) -> list[Tensor]:
    """Row indices of batches of rollouts of similar length, so that little is computed for padding.

    Args:
        policy: the policy.
        rollouts: N rollouts.
        batch_size: rollouts in a batch; None: as many as `memory.rows_at_once` allows for a run of this kind and order.
    """
    if batch_size is None:
        logits = 0 if policy.has_linear_output else rollouts.response_mask.shape[1]
        batch_size = memory.rows_at_once(policy, int(rollouts.attention_mask.sum(1).max()), kind, order, logits,
                                         held=memory.gradient_bytes(policy) if kind == "backward" else 0)
    rows = checks.integer("batch_size", batch_size, minimum=1)
    return list(rollouts.attention_mask.sum(1).argsort(stable=True).split(rows))


def in_batches(rollouts: Rollouts, rows: Sequence[Tensor],
               function: Callable[[Rollouts], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """`function` of each batch, its results [n, t, ...] padded with 0 to [N, T, ...] and in the rollouts' order."""
    steps, results = rollouts.response_mask.shape[1], []
    for index in rows:
        batch = rollouts.select(index)
        width = batch.prompt_length + int(batch.lengths.max())
        batch = batch.replace(input_ids=batch.input_ids[:, :width], attention_mask=batch.attention_mask[:, :width],
                              response_mask=batch.response_mask[:, :width - batch.prompt_length])
        padding = steps - batch.response_mask.shape[1]
        results.append([torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)) for x in function(batch)])
    order = torch.cat(list(rows)).argsort()
    return tuple(torch.cat(parts)[order] for parts in zip(*results, strict=True))


def weighted_gradient(policy: Policy, rollouts: Rollouts, rows: Sequence[Tensor], names: Sequence[str],
                      weights: Tensor, entropy_weights: Tensor | float = 0.0) -> dict[str, Tensor | None]:
    """The gradient of Σ (weights · log π + entropy_weights · H_k) over the rollouts at `rows`, by parameter name.

    Args:
        rows: row indices of each batch.
        names: of the parameters.
        weights: [N, T].
        entropy_weights: [N, T], or one for all tokens.

    Returns:
        Tensors in float32 at least; None where no token depends on the parameter.
    """
    parameters, total = policy.parameters, dict.fromkeys(names)
    entropy_weights = torch.as_tensor(entropy_weights, dtype=weights.dtype, device=weights.device).expand_as(weights)
    for index in rows:
        index = index.to(weights.device)
        with torch.enable_grad():
            log_probs, entropies = score(policy, rollouts.select(index), batch_size=len(index))
            value = (weights[index].to(log_probs) * log_probs).sum()
            if entropy_weights[index].any():
                value = value + (entropy_weights[index].to(entropies) * entropies).sum()
            gradients = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                # Into memory of its own: autograd may return one tensor for two parameters, or one expanded.
                total[name] = gradient.clone() if total[name] is None else total[name].add_(gradient)
    return total


def left_aligned(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Token ids [n, P+T] with each prompt moved to the left edge, and the prompts' lengths [n, 1].

    Causal attention alone then keeps the padding out, at every position, whatever the model's own treatment of masks.
    """
    prompt_lengths = rollouts.attention_mask[:, :rollouts.prompt_length].sum(1, keepdim=True)
    columns = torch.arange(rollouts.input_ids.shape[1], device=prompt_lengths.device)
    aligned = (columns + rollouts.prompt_length - prompt_lengths).clamp(max=len(columns) - 1)
    return rollouts.input_ids.gather(1, aligned), prompt_lengths


def response_output(policy: Policy, rollouts: Rollouts, parameters: Mapping[str, Tensor] | None
                    ) -> tuple[Tensor, OutputLayer | None, Tensor | None]:
    """`policy.output` at the position before each response token: hidden states [n, T, d], and logits [n, T, V]."""
    steps = rollouts.response_mask.shape[1]
    input_ids, prompt_lengths = left_aligned(rollouts)
    columns = torch.arange(steps, device=prompt_lengths.device)
    width = int((prompt_lengths[:, 0] + rollouts.lengths).max())

    first = int(prompt_lengths.min()) - 1
    hidden, layer, logits = policy.output(input_ids[:, :width], width - first, parameters)
    positions = (prompt_lengths - 1 - first + columns).clamp(max=width - first - 1)[..., None]
    hidden, logits = (None if x is None else x.gather(1, positions.expand(-1, -1, x.shape[-1]))
                      for x in (hidden, logits))
    if logits is not None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / rollouts.temperature
    return hidden, layer, logits


def score_batch(policy: Policy, rollouts: Rollouts, parameters: Mapping[str, Tensor] | None,
                moments: bool = False) -> tuple[tuple[Tensor, ...], Tensor]:
    """What `TokenScores` are made of, [n, t] each, and the hidden states [n, t, d] that the output layer is given."""
    hidden, layer, logits = response_output(policy, rollouts, parameters)
    if layer is None:
        found = log_probs_and_entropies(logits, rollouts.response_ids, moments)
    else:
        found = linear_log_probs_and_entropies(
            hidden, layer.weight, rollouts.response_ids, rollouts.temperature, layer.bias, layer.scaling.scale,
            layer.scaling.soft_cap, moments)
    # torch.where, not a product: padding may hold NaN, and NaN · 0 is NaN.
    return tuple(torch.where(rollouts.response_mask, x, 0.0) for x in found), hidden


def log_probs_and_entropies(logits: Tensor, targets: Tensor, moments: bool = False) -> tuple[Tensor, ...]:
    """Log-prob of `targets` [...] and entropy H = −Σ p log p of the distribution with `logits` [..., V], in nats.

    Logits of −inf are tokens of probability zero. With `moments`, also the collisions Σ p² and the collision log-probs
    Σ p² log p, as `linear_log_probs_and_entropies` gives them.

    Raises:
        TypeError, ValueError: no tensors of these shapes, or targets outside the vocabulary.

    >>> log_probs_and_entropies(torch.zeros(4), torch.tensor(0))
    (tensor(-1.3863), tensor(1.3863))
    >>> log_probs_and_entropies(torch.zeros(4), torch.tensor(0), moments=True)[2:]
    (tensor(0.2500), tensor(-0.3466))
    """
    checks.tensor("logits", logits, ("...", "V"), "floating")
    checks.tensor("targets", targets, logits.shape[:-1], "integer")
    checks.boolean("moments", moments)
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(f"targets: expected integers from 0 to {logits.shape[-1] - 1}, got {int(targets.min())} to "
                         f"{int(targets.max())}")
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(-1, targets[..., None])[..., 0]
    # 0 · log 0 = 0, in value and in gradient.
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)
    terms = p * log_p
    found = log_probs, -terms.sum(-1)
    return (*found, torch.linalg.vecdot(p, p), torch.linalg.vecdot(p, terms)) if moments else found
