"""Scoring: log-probs and entropies from hidden states and the output layer, without or with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cases import Case
from side_by_side import Absent, Section, Sides, Target, peer, relative_differences
from torch import Tensor

import deltah as dh

TRL, CHUNKED, LIGER, PRODUCT = "TRL", "TRL, chunked", "Liger", "bare product"
Scored = tuple[Tensor | None, ...]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Hidden states, output layer, targets, and what log-probs and entropies are multiplied with in the loss."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (case.rollouts, case.response)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=case.device)

    # Logits of standard deviation 3: as peaked as those of a trained model.
    hidden, weight = normal(*shape, case.width), normal(case.vocabulary, case.width).mul_(3 / case.width**0.5)
    targets = torch.randint(0, case.vocabulary, shape, generator=generator, device=case.device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, normal(*shape), normal(*shape)


def sides(case: Case, backward: str) -> Sides:
    """`backward`: "" for none; "log-probs": of Σ a log p; "both": of Σ (a log p + b H)."""
    hidden, weight, targets, a, b = inputs(case)

    def scored(function: Callable[[], tuple[Tensor, Tensor | None]]) -> Scored:
        with torch.set_grad_enabled(bool(backward)):
            log_probs, entropies = function()
        if not backward:
            return log_probs, entropies, None, None
        loss = (a * log_probs).sum()
        if backward == "both":
            loss = loss + (b * entropies).sum()
        gradients = torch.autograd.grad(loss, (hidden, weight))
        return log_probs.detach(), None if entropies is None else entropies.detach(), *gradients

    def trl() -> tuple[Tensor, Tensor]:
        utils = peer("trl.trainer.utils")
        logits = torch.nn.functional.linear(hidden, weight)
        log_probs = utils.selective_log_softmax(logits, targets)
        with torch.set_grad_enabled(backward == "both"):
            return log_probs, utils.entropy_from_logits(logits)

    def trl_chunked() -> tuple[Tensor, Tensor]:
        # What its GRPO trainer calls, with the trainer's tile.
        function = peer("trl.kernels").ChunkedLogProbFunction
        chunk = peer("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
        log_probs, entropies, *_ = function.apply(hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, chunk,
                                                  None, 1.0, ("entropy",))
        return log_probs.view_as(targets), entropies.view_as(targets)

    def liger() -> tuple[Tensor, None]:
        if case.device == "cpu":
            raise Absent("does not: its kernels are for a GPU")
        if backward == "both":
            raise Absent("does not: it has no entropies")
        loss = peer("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")
        return -loss(weight, hidden.flatten(0, 1), targets.flatten()).view_as(targets), None

    def product() -> None:
        with torch.set_grad_enabled(bool(backward)):
            logits = torch.nn.functional.linear(hidden, weight)
        if backward:
            torch.autograd.grad(logits, (hidden, weight), logits.detach())

    return {"deltah": partial(scored, lambda: dh.linear_log_probs_and_entropies(hidden, weight, targets)),
            TRL: partial(scored, trl), CHUNKED: partial(scored, trl_chunked), LIGER: partial(scored, liger),
            PRODUCT: product}


def differences(case: Case, results: Mapping[str, Any], backward: str) -> dict[str, float]:
    """From float64, of the first rollout's tokens; of the output layer's gradient, from deltah's."""
    hidden, weight, *rest = inputs(case)
    targets, a, b = (x[:1] for x in rest)
    hidden = hidden[:1].detach().double().requires_grad_()
    log_p = torch.nn.functional.linear(hidden, weight.detach().double()).log_softmax(-1)
    log_probs = log_p.gather(-1, targets[..., None])[..., 0]
    entropies = -(log_p.exp() * log_p).sum(-1)
    gradient = None
    if backward:
        loss = (a * log_probs).sum() + (b * entropies).sum() * (backward == "both")
        (gradient,) = torch.autograd.grad(loss, hidden)
    first = {name: None if parts is None else [None if x is None else x[:1] for x in parts[:3]]
             for name, parts in results.items()}
    found = relative_differences(first, (log_probs.detach(), entropies.detach(), gradient))
    if backward:
        layer = {name: None if parts is None else parts[3:] for name, parts in results.items()}
        for name, difference in relative_differences(layer, layer["deltah"]).items():
            found[name] = max(found[name], difference)
    return found


FULL = Case(rollouts=16, prompt=0, response=64, layers=0, width=896, vocabulary=151_936)
TINY = Case(rollouts=2, prompt=0, response=8, layers=0, width=32, vocabulary=434)
LABELS = {"": "Log-probs and entropies, forward",
          "log-probs": "With the gradient of log-probs",
          "both": "With the gradient of log-probs and entropies"}


def section(backward: str, targets: tuple[Target, ...], growth: Case | None) -> Section:
    return Section(
        title=LABELS[backward],
        about="Hidden states [rollouts, tokens, width] and an output layer [vocabulary, width]. TRL: the logits, then "
              "`selective_log_softmax` and `entropy_from_logits`; chunked: what its GRPO trainer calls today. The bare "
              "product makes the logits only" + (", and from a given gradient of theirs its own two." if backward else
                                                 "."),
        sides=partial(sides, backward=backward), base=TRL, case=FULL, tiny=TINY, targets=targets,
        cuda=replace(FULL, rollouts=64, response=128, device="cuda"),
        differences=partial(differences, backward=backward), tolerance=1e-4,
        growth=growth,
        axes={"rollouts": ("rollouts", (2, 4, 8)), "length, tokens": ("response", (32, 64, 128)),
              "parameters": ("width", (224, 448, 896)), "vocabulary": ("vocabulary", (9_496, 37_984, 151_936))},
        memory_unit=lambda case: 4.0 * case.rollouts * case.response * case.vocabulary,
        memory_label="of the logits'")


SMALL = replace(FULL, rollouts=4, vocabulary=37_984)
SECTIONS = {
    "forward": section("", (Target("deltah", TRL, 0.75), Target("deltah", PRODUCT, 1.2),
                            Target("deltah", None, 0.1, "extra memory")), SMALL),
    "backward": section("log-probs", (Target("deltah", TRL, 1.0),), None),
    "backward, both": section("both", (Target("deltah", TRL, 1.0),), SMALL)}
