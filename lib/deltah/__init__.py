"""deltah: what one reinforcement-learning step does to the entropy of a language model."""

from deltah import exact, figures, ledger, objectives, training
from deltah.estimates import Estimate
from deltah.ledger import Ledger
from deltah.policies import Policy, load_policy
from deltah.problems import extract_answer, load_problems, score_answers
from deltah.rollouts import Rollouts, sample
from deltah.scoring import TokenScores, log_probs_and_entropies, score

__all__ = ["Estimate", "Ledger", "Policy", "Rollouts", "TokenScores", "exact", "extract_answer", "figures", "ledger",
           "load_policy", "load_problems", "log_probs_and_entropies", "objectives", "sample", "score",
           "score_answers", "training"]
