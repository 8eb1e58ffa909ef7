"""Policy-gradient objectives as losses to be minimised, and how per-token losses become one number.

Each takes log-probs [N, T] under the policy and under the one that sampled, advantages [N] or [N, T] and the
response mask [N, T], and returns per-token losses [N, T] that are 0 outside the mask. An `Objective` adds what
its paper does before and after: the advantages, and the aggregation.
"""

from deltah.objectives.advantages import group_advantages
from deltah.objectives.clipping import dr_grpo, grpo, gspo, sequence_ratio
from deltah.objectives.objective import AGGREGATIONS, OBJECTIVES, Objective, aggregate, find

__all__ = ["AGGREGATIONS", "OBJECTIVES", "Objective", "aggregate", "dr_grpo", "find", "group_advantages", "grpo",
           "gspo", "sequence_ratio"]
