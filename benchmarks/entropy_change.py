"""What predicting the entropy change costs, against one forward and backward pass over the same batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cases import AXES, HALF_BILLION, SMALL, Case, forward_and_backward, random_direction
from side_by_side import Section, Sides, Target

import deltah as dh

BATCHED = "forward and backward"


def sides(case: Case) -> Sides:
    policy = case.policy()
    rollouts, v = case.random_rollouts(policy), random_direction(policy)

    def predicted(order: int) -> None:
        dh.entropy_change(policy, rollouts, v, order)

    return {"deltah, first order": lambda: predicted(1), "deltah, second order": lambda: predicted(2),
            BATCHED: lambda: forward_and_backward(policy, rollouts)}


def differences(case: Case, results: Mapping[str, Any]) -> dict[str, float]:
    """No side computes what another does; the library's tests hold the predictions to exact derivatives."""
    return {}


# Few tokens: vectors of the parameters' size are most of the memory.
HEAVY = Case(rollouts=5, prompt=4, response=4, width=768, intermediate=2048, layers=5, vocabulary=4096)


def parameter_bytes(case: Case) -> float:
    return sum(float(p.numel() * p.element_size()) for p in case.policy().parameters.values())


SECTIONS = {"entropy change": Section(
    title="Predicting the entropy change",
    about="`entropy_change` along a given direction, of both orders.",
    sides=sides, base=BATCHED, case=Case(rollouts=32), cuda=HALF_BILLION,
    tiny=Case(rollouts=5, prompt=4, response=6, width=32, layers=2),
    targets=(Target("deltah, first order", BATCHED, 1.5), Target("deltah, second order", BATCHED, 5.0),
             Target("deltah, first order", None, 4.0, "memory with θ and v"),
             Target("deltah, second order", None, 4.0, "memory with θ and v")),
    differences=differences, tolerance=0.0, growth=SMALL, axes=AXES,
    memory_case=HEAVY, memory_unit=parameter_bytes, memory_label="vectors of the parameters' size", memory_inputs=2)}
