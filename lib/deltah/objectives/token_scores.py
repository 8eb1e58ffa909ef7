"""What published methods rank or weigh a sampled token by, to control the entropy: functions of the same four things.

Each takes `TokenScores`, old log-probs, advantages and the mask, and returns [N, T]: 0 outside the mask, computed in
float64, without gradient, as methods select and weigh by it. Where a score has a sign, larger means that the step
lowers the entropy more.

They are about the distribution p that token k was drawn from, with entropy H, and about a step on its logits alone. As
∂H/∂z_i = −S_i with S_i = p_i (H + log p_i), three steps change H to first order by

    one logit            δz = α e_k            δH = −α S_k
    policy gradient      δz = α (e_k − p)      δH = −α D_k,    D_k = S_k − E_{i∼p} S_i
    natural gradient     δz = α e_k / p_k      δH = −α (H + log p_k)

where α = η r A for a loss −r A that is not clipped. S and H + log p change their sign at p = e^{−H}. D does so at a
higher probability p*: E_{i∼p} S_i = Cov_p(p, log p) ≥ 0, S is negative below e^{−H} and grows with p from there, so

    D > 0  ⇔  p > p*,    log p* = −H + W(e^H E_{i∼p} S_i),    W: Lambert's function.

A sign taken from H + log p is thus wrong about a policy-gradient step for e^{−H} < p < p*, where abs(D) < E_{i∼p} S_i,
and right for every other token; of a vocabulary of two, no token lies there. What the step does through shared
parameters, to other distributions and to which prefixes are met, none of them sees: that is the influence, which
`deltah.attribution` gives. The entropy ratio H_new / H_old, outside (0.95, 1.05) in arXiv 2512.05591, takes the step
first: divide the entropies of two calls of `score`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deltah import checks
from deltah.objectives.clipping import check_inside, per_token
from deltah.objectives.selection import token_covariances
from deltah.scoring import TokenScores


def entropy(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """H of the token's distribution, in nats (arXiv 2506.01939, which gives gradients to the top fifth alone). No sign.

    Args:
        scores: of the policy that is about to be changed, [N, T]; `d` and `first_order` need its moments.
        old_log_probs: [N, T], in nats, under the policy that sampled.
        advantages: A, [N] or [N, T].
        mask: [N, T] bool; outside it anything may stand.

    Returns:
        [N, T], in the log-probs' dtype.

    Raises:
        TypeError: no TokenScores, or something in them, or beside them, that is not a tensor of numbers. ValueError:
            shapes that do not fit, moments that are needed and not there, or numbers inside the mask that are NaN or
            infinite.

    >>> scores = TokenScores(torch.tensor([[-0.6931]]), torch.tensor([[1.0397]]))                    # p = 1/2, 1/4, 1/4
    >>> entropy(scores, scores.log_probs, torch.tensor([1.0]), torch.tensor([[True]]))
    tensor([[1.0397]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask)
    return tokens.entropies.to(scores.log_probs)


def surprisal(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """−log p of the token, in nats (arXiv 2606.19236, which looks at the top tenth of those with A > 0). No sign.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(torch.tensor([[-0.6931]]), torch.tensor([[1.0397]]))                    # p = 1/2, 1/4, 1/4
    >>> surprisal(scores, scores.log_probs, torch.tensor([1.0]), torch.tensor([[True]]))
    tensor([[0.6931]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask)
    return (-tokens.log_probs).to(scores.log_probs)


def quadrant(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The sign of A times that of H + log p: 1, −1 or 0, without unit (the table of CE-GPPO, arXiv 2509.20712).

    Claimed: A > 0 on a likely token and A < 0 on an unlikely one lower the entropy, the other two raise it. Likely is
    here p > e^{−H}, where S changes its sign. So the claim is true of a step on the token's logit alone, and of a
    natural-gradient step. Of a policy-gradient step it is true but for e^{−H} < p < p*: always of unlikely tokens, not
    always of likely ones.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(torch.tensor([[-0.6931]]), torch.tensor([[1.0397]]))                    # p = 1/2, 1/4, 1/4
    >>> quadrant(scores, scores.log_probs, torch.tensor([-2.0]), torch.tensor([[True]]))
    tensor([[-1.]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask)
    return (tokens.advantages.sign() * tokens.above_mean.sign()).to(scores.log_probs)


def covariance(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(A − mean A)(log p − mean log p), in nats times the unit of A (arXiv 2505.22617); means over the mask's tokens.

    Claimed: large ones lower the entropy. That is true on average over the actions of one state, where a
    natural-gradient step changes H by −η Cov_p(A, log p). Of a single token's policy-gradient step the sign is right
    if A has the sign of A − mean A and log p is on the same side of mean log p as of its own log p*, or if neither is
    so. The means are those of what this is called with: of a micro-batch, they make another score.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(torch.tensor([[-0.5, -3.5]]), torch.tensor([[1.0, 1.0]]))
    >>> covariance(scores, scores.log_probs, torch.tensor([[1.0, 0.0]]), torch.tensor([[True, True]]))
    tensor([[0.7500, 0.7500]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask)
    return token_covariances(tokens.log_probs, tokens.advantages, mask).to(scores.log_probs)


def s(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """S = p (H + log p), in nats: Clip_B's discriminator (arXiv 2602.03392).

    Claimed, and exact to first order: raising the token's logit alone by α changes H by −α S. The advantage is not in
    it, and A < 0 turns the sign round. Under a policy-gradient step the sign is right but for e^{−H} < p < p*.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(torch.tensor([[-0.6931]]), torch.tensor([[1.0397]]))                    # p = 1/2, 1/4, 1/4
    >>> s(scores, scores.log_probs, torch.tensor([1.0]), torch.tensor([[True]]))
    tensor([[0.1733]])
    """
    return _Tokens.read(scores, old_log_probs, advantages, mask).s.to(scores.log_probs)


def d(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """D = S − E_{i∼p} S_i, in nats: Clip_V's discriminator (arXiv 2602.03392), with E S = H Σ p² + Σ p² log p.

    Claimed, and exact to first order: a policy-gradient step of size α on the token changes H by −α D. The advantage is
    not in it, and A < 0 turns the sign round. The mean of D over k ∼ p is 0. From scores in float32 it is exact to
    about 1e-7, and where H is smaller than that it is rounding.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(*torch.tensor([-0.6931, 1.0397, 0.3750, -0.3466]).view(4, 1, 1))        # p = 1/2, 1/4, 1/4
    >>> d(scores, scores.log_probs, torch.tensor([1.0]), torch.tensor([[True]]))
    tensor([[0.1300]])
    """
    return _Tokens.read(scores, old_log_probs, advantages, mask, moments=True).d.to(scores.log_probs)


def first_order(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A D, in nats times the unit of A: what a policy-gradient step takes off H (arXiv 2602.03392, 2602.09782).

    Papers write the change, −A D. Exact to first order, in sign and in size, at r = 1: δH = −η A D. Off the old policy
    the loss −r A makes it r times as large, and 0 where it is clipped. The mean over k ∼ p is Cov_p(log p, p A), the
    change under the tabular policy gradient, if A has mean 0 under p.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(*torch.tensor([-0.6931, 1.0397, 0.3750, -0.3466]).view(4, 1, 1))        # p = 1/2, 1/4, 1/4
    >>> first_order(scores, scores.log_probs, torch.tensor([-2.0]), torch.tensor([[True]]))
    tensor([[-0.2600]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask, moments=True)
    return (tokens.advantages * tokens.d).to(scores.log_probs)


def steer(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """STEER's Ω = (A/π_old) p (1 − p)(log p + H), in nats times the unit of A (arXiv 2510.10150).

    Claimed: the larger it is, the more the entropy falls. As p/π_old = r, it is r A (1 − p)(log p + H). A
    policy-gradient step moves the token's own logit by η r A (1 − p), and through that logit alone H by
    −η r A p (1 − p)(log p + H) = −η p Ω. This is the paper's theorem, and Ω lacks a factor p; the other logits, which
    move by −η r A p_i, are left out of both. With them it is −η r A D, so that the sign is wrong for e^{−H} < p < p*.
    The published code weighs tokens by abs(Ω), with p and π_old bounded below by 1e-8.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(torch.tensor([[-0.6931]]), torch.tensor([[1.0397]]))                    # p = 1/2, 1/4, 1/4
    >>> steer(scores, scores.log_probs, torch.tensor([1.0]), torch.tensor([[True]]))
    tensor([[0.1733]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask)
    others = -torch.expm1(tokens.log_probs)
    ratio = (tokens.log_probs - tokens.old_log_probs).exp()
    return (tokens.advantages * ratio * others * tokens.above_mean).to(scores.log_probs)


def repo(scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """REPO's A (log p − E_{i∼p} log p_i) = A (log p + H), in nats times the unit of A (arXiv 2603.11682).

    Claimed: positive ones lower the entropy. Exact to first order for a natural-gradient step, δH = −η A (log p + H) at
    r = 1; its mean over k ∼ p is Cov_p(A, log p). Under a policy-gradient step the sign is right but for
    e^{−H} < p < p*, and the size lacks a factor p even where the other logits hardly count.

    Arguments and errors as for `entropy`.

    >>> scores = TokenScores(torch.tensor([[-0.6931]]), torch.tensor([[1.0397]]))                    # p = 1/2, 1/4, 1/4
    >>> repo(scores, scores.log_probs, torch.tensor([2.0]), torch.tensor([[True]]))
    tensor([[0.6932]])
    """
    tokens = _Tokens.read(scores, old_log_probs, advantages, mask)
    return (tokens.advantages * tokens.above_mean).to(scores.log_probs)


SCORES: dict[str, Callable[[TokenScores, Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": entropy, "surprisal": surprisal, "quadrant": quadrant, "covariance": covariance, "s": s, "d": d,
    "first_order": first_order, "steer": steer, "repo": repo}


class _Tokens(NamedTuple):
    """What the scores are made of, [N, T] in float64 and without gradient; all 0 outside the mask, and so are they."""

    log_probs: Tensor
    entropies: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    collisions: Tensor | None
    collision_log_probs: Tensor | None

    @classmethod
    def read(cls, scores: TokenScores, old_log_probs: Tensor, advantages: Tensor, mask: Tensor,
             moments: bool = False) -> _Tokens:
        """Checks all of them; `moments`: those of the scores are needed."""
        checks.instance("scores", scores, TokenScores)
        checks.tensor("mask", mask, ("N", "T"), kind="boolean")
        if moments and (scores.collisions is None or scores.collision_log_probs is None):
            raise ValueError("scores: expected moments, which score(..., moments=True) gives, got none")

        def inside(name: str, x: Tensor) -> Tensor:
            check_inside(name, x, mask)
            return torch.where(mask, x.detach(), 0.0).double()

        names = ("collisions", "collision_log_probs")
        return cls(inside("scores.log_probs", scores.log_probs), inside("scores.entropies", scores.entropies),
                   inside("old_log_probs", old_log_probs), per_token(advantages, mask).detach().double(),
                   *(inside(f"scores.{name}", getattr(scores, name)) if moments else None for name in names))

    @property
    def above_mean(self) -> Tensor:
        """log p − E_{i∼p} log p_i = log p + H."""
        return self.log_probs + self.entropies

    @property
    def s(self) -> Tensor:
        return self.log_probs.exp() * self.above_mean

    @property
    def d(self) -> Tensor:
        return self.s - (self.entropies * self.collisions + self.collision_log_probs)
