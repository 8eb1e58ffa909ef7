"""Second-order products: v^T (second derivative of the mean log-prob) v, and v^T (empirical Fisher matrix) v."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from cases import AXES, HALF_BILLION, SMALL, Case, forward_and_backward, random_direction, response_log_probs
from side_by_side import Section, Sides, Target, peer, relative_differences
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import SiLUActivation

import deltah as dh
from deltah.derivatives.taylor import derivatives_along

BATCHED, CURVLINOPS, TWICE = "forward and backward", "curvlinops", "torch.autograd, twice"


class SiluWrittenOut(nn.Module):
    """x σ(x) of elementary operations: without grad mode, as curvlinops runs, PyTorch's own cannot be differentiated
    twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class ResponseLogits(nn.Module):
    """Logits [N, V, T] of the responses, as cross-entropy takes them."""

    def __init__(self, policy: dh.Policy, prompt_length: int):
        super().__init__()
        self.model, self.start = copy.deepcopy(policy.model), prompt_length - 1
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, (nn.SiLU, SiLUActivation)):
                    setattr(module, name, SiluWrittenOut())

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits[:, self.start:-1].transpose(1, 2)


class Problem:
    """A policy, rollouts and the direction v, and the ways of multiplying with it."""

    def __init__(self, case: Case):
        self.policy = case.policy()
        self.rollouts = case.random_rollouts(self.policy)
        self.v = random_direction(self.policy)
        self.theta = {name: p.detach() for name, p in self.policy.parameters.items()}
        self.functional = ResponseLogits(self.policy, self.rollouts.prompt_length)

    def log_probs(self, theta: Mapping[str, Tensor]) -> Tensor:
        return dh.score(self.policy, self.rollouts, theta).log_probs

    def along(self, function: Callable) -> Callable:
        return lambda theta: torch.func.jvp(function, (theta,), (self.v,))[1]

    def in_forward_mode(self, function: Callable) -> tuple[Tensor]:
        with torch.enable_grad(), self.policy.forward_mode():
            return (function(self.theta),)

    def along_gradient(self, value: Tensor) -> Tensor:
        """v^T (the gradient of `value`), to be differentiated again."""
        gradients = torch.autograd.grad(value, list(self.policy.parameters.values()), create_graph=True)
        return sum((a * b).sum() for a, b in zip(gradients, self.v.values(), strict=True))

    def curvlinops(self, operator: str) -> Tensor:
        matrix = getattr(peer("curvlinops"), operator)(
            self.functional, nn.CrossEntropyLoss(), list(self.functional.parameters()),
            [(self.rollouts.input_ids, self.rollouts.response_ids)], check_deterministic=False,
            num_data=len(self.rollouts))
        vectors = list(self.v.values())
        # Fused attention has no forward mode.
        with sdpa_kernel(SDPBackend.MATH):
            products = matrix @ vectors
        return sum((a * b).sum() for a, b in zip(products, vectors, strict=True))


def curvature(case: Case) -> Sides:
    problem = Problem(case)
    policy, rollouts = problem.policy, problem.rollouts

    def twice() -> tuple[Tensor]:
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            first = problem.along_gradient(response_log_probs(policy, rollouts).mean())
            gradients = torch.autograd.grad(first, list(policy.parameters.values()))
        return (sum((a * b).sum() for a, b in zip(gradients, problem.v.values(), strict=True)),)

    def entropy_change() -> None:
        dh.entropy_change(policy, rollouts, problem.v, order=2)

    def taylor() -> tuple[Tensor]:
        with policy.forward_mode():
            _, _, (second,), _ = derivatives_along(
                lambda theta: ((problem.log_probs(theta).mean(),), None), problem.theta, problem.v, order=2)
        return (second,)

    first = problem.along(lambda theta: problem.log_probs(theta).mean())
    return {"deltah": taylor, "deltah, all of entropy_change": entropy_change,
            "nested forward mode": lambda: problem.in_forward_mode(problem.along(first)),
            CURVLINOPS: lambda: (-problem.curvlinops("HessianLinearOperator"),),
            TWICE: twice, BATCHED: lambda: forward_and_backward(policy, rollouts)}


def fisher(case: Case) -> Sides:
    problem = Problem(case)
    policy, rollouts = problem.policy, problem.rollouts

    def twice() -> tuple[Tensor]:
        # The gradient of Σ u_k ∇S_k by u is ∇S_k.
        with sdpa_kernel(SDPBackend.MATH):
            log_probs = response_log_probs(policy, rollouts)
            u = torch.ones_like(log_probs, requires_grad=True)
            (slopes,) = torch.autograd.grad(problem.along_gradient((u * log_probs).sum()), u)
        return (slopes.square().mean(),)

    def taylor() -> tuple[Tensor]:
        with policy.forward_mode():
            _, (slopes,), _ = derivatives_along(
                lambda theta: ((problem.log_probs(theta),), None), problem.theta, problem.v, order=1)
        return (slopes.square().mean(),)

    slopes = problem.along(problem.log_probs)
    return {"deltah": taylor,
            "forward mode": lambda: problem.in_forward_mode(lambda theta: slopes(theta).square().mean()),
            CURVLINOPS: lambda: (problem.curvlinops("EFLinearOperator"),),
            TWICE: twice, BATCHED: lambda: forward_and_backward(policy, rollouts)}


def differences(case: Case, results: Mapping[str, Any]) -> dict[str, float]:
    return relative_differences(results, results.get(TWICE, results["deltah"]))


def section(title: str, about: str, sides: Callable[[Case], Sides], **growth: Any) -> Section:
    return Section(
        title=title, about=about, sides=sides, base=CURVLINOPS, case=Case(rollouts=16),
        cuda=replace(HALF_BILLION, rollouts=16),
        tiny=Case(rollouts=5, prompt=4, response=6, width=32, layers=2), targets=(Target("deltah", CURVLINOPS, 1.0),),
        differences=differences, tolerance=1e-3, **growth)


SECTIONS = {
    "curvature": section(
        "Second derivative of the mean log-prob",
        "v^T (second derivative of the mean log-prob of the responses' tokens) v: Taylor series, nested forward mode, "
        "curvlinops' `HessianLinearOperator`, and reverse mode twice. `entropy_change` of order 2 makes second "
        "derivatives of the entropies as well, and the estimate with its standard error.",
        curvature, growth=SMALL, axes=AXES),
    "fisher": section(
        "Empirical Fisher matrix of the tokens",
        "v^T (mean over the responses' tokens of ∇S_k ∇S_k^T) v: Taylor series, forward mode, curvlinops' "
        "`EFLinearOperator`, and reverse mode twice.", fisher)}
