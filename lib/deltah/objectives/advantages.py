"""What a rollout is worth: its reward relative to those of the prompt's other rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

from deltah import checks


def group_advantages(rewards: Tensor, prompt_index: Tensor, scale: bool = True) -> Tensor:
    """Advantages relative to the prompt's other rollouts: A = (R − mean) / (std + 1e-6), or R − mean.

    Args:
        rewards: [N], finite; integers become floating-point numbers of PyTorch's default kind.
        prompt_index: [N] integers; rollouts of a prompt share one.
        scale: divide by the group's (unbiased) standard deviation, as GRPO (arXiv 2402.03300) and its public
            implementations do; Dr. GRPO (arXiv 2503.20783) does not.

    Returns:
        [N] advantages in the rewards' dtype, computed in float64; exactly 0 in a group where all rewards are equal, so
        in a group of one. verl has this denominator too, and gives a group of one its reward; TRL has std + 1e-4.

    Raises:
        TypeError: rewards or prompt_index that are not tensors of numbers, or of integers.
        ValueError: rewards and prompt_index of different shapes, or a reward that is NaN or infinite.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), scale=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    checks.tensor("prompt_index", prompt_index, ("N",), kind="integer")
    checks.tensor("rewards", rewards, prompt_index.shape, kind="number", finite=True)
    checks.boolean("scale", scale)
    kind = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    exact = rewards.double()
    _, group, sizes = prompt_index.to(rewards.device).unique(return_inverse=True, return_counts=True)

    def of_groups(x: Tensor, how: str) -> Tensor:
        return x.new_zeros(len(sizes)).scatter_reduce(0, group, x, how, include_self=False)

    advantages = exact - of_groups(exact, "mean")[group]
    if scale:
        variance = of_groups(advantages.square(), "sum") / (sizes - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt()[group] + 1e-6)
    # Their mean is rounded, and what is left of the rewards would be divided by a deviation just as tiny.
    equal = of_groups(exact, "amax") == of_groups(exact, "amin")
    return torch.where(equal[group], 0.0, advantages).to(kind)
