"""Policy-gradient objectives as losses to be minimised, and how per-token losses become one number.

Each takes log-probs [N, T] under the policy and under the one that sampled, advantages [N] or [N, T] and the
response mask [N, T], what more it needs by name, and returns per-token losses [N, T] that are 0 outside the mask. An
`Objective` adds what its paper does before and after: the advantages, the tokens that it drops, and the aggregation.
A new one is a function and a line in `OBJECTIVES`. `token_scores` has what methods select and weigh tokens by.
"""

from deltah.objectives import token_scores
from deltah.objectives.advantages import group_advantages
from deltah.objectives.bonus import entropy_bonus
from deltah.objectives.clipping import ce_gppo, cispo, dapo, dr_grpo, grpo, gspo, gspo_token, sequence_ratio
from deltah.objectives.objective import AGGREGATIONS, EXTRAS, OBJECTIVES, Objective, aggregate, find
from deltah.objectives.selection import (
    clip_b,
    clip_b_tokens,
    clip_cov,
    clip_cov_tokens,
    clip_v,
    clip_v_tokens,
    kl_cov,
    kl_cov_tokens,
    token_covariances,
)

__all__ = ["AGGREGATIONS", "EXTRAS", "OBJECTIVES", "Objective", "aggregate", "ce_gppo", "cispo", "clip_b",
           "clip_b_tokens", "clip_cov", "clip_cov_tokens", "clip_v", "clip_v_tokens", "dapo", "dr_grpo",
           "entropy_bonus", "find", "group_advantages", "grpo", "gspo", "gspo_token", "kl_cov", "kl_cov_tokens",
           "sequence_ratio", "token_covariances", "token_scores"]
