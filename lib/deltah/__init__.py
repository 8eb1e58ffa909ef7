"""deltah: what one reinforcement-learning step does to the entropy of a language model."""

from deltah import exact, objectives, rewards, statistics, training
from deltah.book import figures, ledger
from deltah.book.ledger import Ledger
from deltah.critical_rates import CriticalLearningRate, critical_learning_rate
from deltah.dynamics import Attribution, EntropyChange, attribution, entropy_change
from deltah.entropy import control_variate, entropy, truncated_entropy, variance_decomposition
from deltah.estimates import Estimate
from deltah.kernels import fisher_kernel, fisher_sketch
from deltah.measurement import linearity, measured_entropy_change
from deltah.policies import Policy, load_policy
from deltah.problems import load_problems
from deltah.rewards import extract_answer, score_answers
from deltah.rollouts import Rollouts
from deltah.sampling import sample
from deltah.scoring import TokenScores, log_probs_and_entropies, score
from deltah.statistics import TwoSampleProduct, UStatistic, two_sample_product, u_statistic
from deltah.updates import Direction, update_direction
from deltah.vocabulary import linear_log_probs_and_entropies

__all__ = ["Attribution", "CriticalLearningRate", "Direction", "EntropyChange", "Estimate", "Ledger", "Policy",
           "Rollouts", "TokenScores", "TwoSampleProduct", "UStatistic", "attribution", "control_variate",
           "critical_learning_rate", "entropy", "entropy_change", "exact", "extract_answer", "figures",
           "fisher_kernel", "fisher_sketch", "ledger", "linear_log_probs_and_entropies", "linearity", "load_policy",
           "load_problems", "log_probs_and_entropies", "measured_entropy_change", "objectives", "rewards", "sample",
           "score", "score_answers", "statistics", "training", "truncated_entropy", "two_sample_product",
           "u_statistic", "update_direction", "variance_decomposition"]
