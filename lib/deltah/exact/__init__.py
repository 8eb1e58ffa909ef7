"""Policies small enough to enumerate: every expectation exactly, in float64. The referee of all estimators."""

from deltah.exact.policies import exact_policy, tiny_policy
from deltah.exact.replicates import coverage, cross_fitted, replicate
from deltah.exact.responses import (
    conditional_mean,
    covariance,
    every_group,
    every_response,
    flat_gradient,
    given_prefix,
    group_moments,
    prefixes,
    probabilities,
)

__all__ = ["conditional_mean", "covariance", "coverage", "cross_fitted", "every_group", "every_response",
           "exact_policy", "flat_gradient", "given_prefix", "group_moments", "prefixes", "probabilities", "replicate",
           "tiny_policy"]
