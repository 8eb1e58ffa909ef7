"""The Fisher kernel: inner products of the gradients of the rollouts' log-probs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from cases import AXES, HALF_BILLION, SMALL, Case, forward_and_backward, response_log_probs
from side_by_side import Absent, Section, Sides, Target, peer, relative_differences
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import deltah as dh

BATCHED, EACH = "one batched forward and backward", "one backward per rollout"
# Rollouts at a time: past this, memory grows and speed does not.
CHUNK = 16
# Parameters whose products are summed in float32.
DEPTH = 2**16


def gram(gradients: Mapping[str, Tensor]) -> tuple[Tensor]:
    """G G^T of gradients [N, ...] by parameter, without a copy of all of them."""
    # Float32 products lose digits with their depth.
    blocks = (block for g in gradients.values() for block in g.flatten(1).split(DEPTH, 1))
    return (sum((block @ block.T).double() for block in blocks),)


def sides(case: Case) -> Sides:
    policy = case.policy()
    rollouts = case.random_rollouts(policy)
    model, names, start = policy.model, list(policy.parameters), rollouts.prompt_length - 1

    def one_at_a_time() -> tuple[Tensor]:
        rows = []
        for i in range(len(rollouts)):
            value = response_log_probs(policy, rollouts.select(slice(i, i + 1))).sum()
            rows.append(torch.autograd.grad(value, list(policy.parameters.values())))
        return gram(dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True)))

    def log_prob(parameters: dict[str, Tensor], input_ids: Tensor) -> Tensor:
        arguments = {"input_ids": input_ids[None], "use_cache": False}
        logits = torch.func.functional_call(model, parameters, (), arguments).logits[0, start:-1]
        return logits.log_softmax(-1).gather(-1, input_ids[start + 1:, None]).sum()

    def vmapped() -> tuple[Tensor]:
        parameters = {name: p.detach() for name, p in policy.parameters.items()}
        # Fused attention has no batching rule for its gradient.
        with sdpa_kernel(SDPBackend.MATH):
            function = torch.func.vmap(torch.func.grad(log_prob), (None, 0), chunk_size=CHUNK)
            return gram(function(parameters, rollouts.input_ids))

    samplers = []

    def opacus() -> tuple[Tensor]:
        if not samplers:
            # Its hooks stay silent in evaluation mode; the model has no dropout.
            samplers.append(peer("opacus.grad_sample").GradSampleModule(
                copy.deepcopy(model).train(), strict=False, loss_reduction="sum"))
        (sampler,) = samplers
        parts = []
        for rows in torch.arange(len(rollouts), device=policy.device).split(CHUNK):
            batch = rollouts.select(rows)
            logits = sampler(input_ids=batch.input_ids, use_cache=False).logits[:, start:-1]
            with warnings.catch_warnings():
                # Its hook on the embedding, whose inputs are integers.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                logits.log_softmax(-1).gather(-1, batch.response_ids[..., None]).sum().backward()
            parts.append({name: p.grad_sample for name, p in sampler.named_parameters()})
            sampler.zero_grad(set_to_none=True)
        return gram({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def nngeometry() -> tuple[Tensor]:
        collection = peer("nngeometry.layercollection").LayerCollection
        try:
            layers = collection.from_model(model)
        except Exception as error:  # it raises no narrower type
            # Left to the layers it knows, it takes the derivative by the inputs, which token ids do not have.
            raise Absent(f"does not: {error}") from error
        matrix = peer("nngeometry.gram").GramMatrix(
            model, torch.utils.data.DataLoader(range(len(rollouts)), batch_size=CHUNK),
            lambda rows: response_log_probs(policy, rollouts.select(rows)).sum(1, keepdim=True),
            layer_collection=layers)
        return (matrix.to_torch()[0, :, 0],)

    return {"deltah": lambda: (dh.fisher_kernel(policy, rollouts),),
            BATCHED: lambda: forward_and_backward(policy, rollouts), EACH: one_at_a_time,
            "torch.func vmap(grad)": vmapped, "Opacus": opacus, "NNGeometry": nngeometry}


def differences(case: Case, results: Mapping[str, Any]) -> dict[str, float]:
    return relative_differences(results, results.get(EACH, results["deltah"]))


SECTIONS = {"kernel": Section(
    title="The Fisher kernel of rollouts",
    about="K = G G^T, with the gradient of each rollout's log-prob, by all parameters, for a row of G. Opacus: its "
          "gradients per sample, then their products. The batched pass makes the gradient of the sum only.",
    sides=sides, base=BATCHED, case=Case(), cuda=replace(HALF_BILLION, rollouts=16),
    tiny=Case(rollouts=3, prompt=4, response=6, width=32, layers=2),
    targets=(Target("deltah", BATCHED, 1.35),), differences=differences, tolerance=1e-5,
    growth=SMALL, axes=AXES)}
