"""What a rollout is worth: its reward relative to those of the prompt's other rollouts."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, prompt_index: Tensor, scale: bool = True) -> Tensor:
    """Advantages relative to the prompt's other rollouts: A = (R − mean) / (std + 1e-6), or R − mean.

    Args:
        rewards: [N].
        prompt_index: [N] integers; rollouts of a prompt share one.
        scale: divide by the group's (unbiased) standard deviation, as GRPO (arXiv 2402.03300) and its public
            implementations do; Dr. GRPO (arXiv 2503.20783) does not.

    Returns:
        [N] advantages; 0 in a group where all rewards are equal.

    Raises:
        ValueError: rewards and prompt_index of different shapes.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), scale=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    if rewards is None or rewards.shape != prompt_index.shape:
        raise ValueError(f"rewards: expected shape {list(prompt_index.shape)}, "
                         f"got {None if rewards is None else list(rewards.shape)}")
    _, group, sizes = prompt_index.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros_like(sizes, dtype=rewards.dtype).index_add(0, group, rewards)
    centred = rewards - (sums / sizes)[group]
    if not scale:
        return centred
    squares = rewards.new_zeros(len(sizes)).index_add(0, group, centred.square())
    deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return centred / (deviation[group] + 1e-6)
