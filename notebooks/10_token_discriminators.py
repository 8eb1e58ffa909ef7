# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Token discriminators
#
# Reinforcing one token changes the entropy of the distribution that it was drawn from, and to first order that
# distribution alone tells whether up or down, and how far. This chapter settles which discriminator is exact for which
# step, which of the published scores are the same thing in other words, and what dropping the tokens that it points at
# does to the entropy of a transformer.
#
# ## In short
#
# - **One formula, several names.** A step $\alpha$ of the policy gradient on token $k$ changes the entropy of its
#   distribution by $-\alpha D_k$, with $D=S-\mathbb E_p[S]$ and $S=p\,(H+\log p)$ [10.3](#ledger-10.3); for GRPO
#   $\alpha=\eta\,rA$ [10.4](#ledger-10.4). Its expectation is the covariance law of "The entropy mechanism"
#   [10.6](#ledger-10.6); REPO's score is $AS/p$ [10.10](#ledger-10.10), STEER's $(A/\pi_{\rm old})(1-p)S$
#   [10.11](#ledger-10.11).
# - **The boundary is not $e^{-H}$.** As $\mathbb E[S]=\mathrm{Cov}(p,\log p)\ge0$ [10.7](#ledger-10.7), a reinforced
#   token must be likelier than $p^*=e^{-H+W}\ge e^{-H}$ to lower the entropy [10.8](#ledger-10.8). On the shipped policy
#   that matters little: $e^{-H}$ gets the sign wrong for 0.7 ± 0.2% of $\sum|A\,D|$ [10.13](#ledger-10.13).
# - **A covariance over the batch is no discriminator of sign.** Centred by the batch's mean of $\log p$, as Clip-Cov and
#   KL-Cov have it, the sign is wrong for 48.2 ± 2.5% of $\sum|A\,D|$ [10.14](#ledger-10.14). That is of all tokens; of
#   the few with the largest covariance, which the methods act on, most do lower the entropy [10.26](#ledger-10.26).
# - **$D$ sees parts, not the sum.** Split by the signs of $A$ and $D$, each part of a step moves the entropy of other
#   prompts' tokens as $D$ says, at given prefixes [10.16](#ledger-10.16). There the parts cancel; the step's fall of
#   0.017 ± 0.002 nats a token per unit of $\eta$ comes by other prefixes [10.18](#ledger-10.18).
# - **One percent of the tokens**, punished ones with $D<-2\sigma$, has 0.27 ± 0.04 of that fall
#   [10.23](#ledger-10.23). The published thresholds of Clip_B and Clip_V drop two tokens of 14,169 and none.
# - **What to do.** Take a token's sign from $A\,D$ or from REPO's score, not from a covariance centred on the batch; set
#   thresholds by the share of tokens that they drop on *your* policy; and before training with such a rule, predict
#   what it leaves of the fall, as section 6 does.
#
# ## What is checked
#
# | statement | source | verdict |
# |---|---|---|
# | one logit: $\delta H=-\varepsilon S_k$, and its boundary $e^{-H}$ | 2602.03392 | holds [10.1](#ledger-10.1) [10.2](#ledger-10.2) |
# | a policy-gradient step: $-\alpha(S_k-\mathbb E[S])$; GRPO: $\alpha=\eta rA$ | 2602.03392 | holds [10.3](#ledger-10.3) [10.4](#ledger-10.4) |
# | the policy's and the batch's average vanish | 2602.03392 | holds [10.5](#ledger-10.5) [10.12](#ledger-10.12) |
# | the same as the covariance law; $\mathbb E[S]$; the moved boundary | own | holds [10.6](#ledger-10.6) [10.7](#ledger-10.7) [10.8](#ledger-10.8) |
# | entropy bonus, REPO and STEER in terms of $S$ | own | holds [10.9](#ledger-10.9) [10.10](#ledger-10.10) [10.11](#ledger-10.11) |
# | $e^{-H}$ is good enough; the batch's covariance is not | own | holds [10.13](#ledger-10.13) [10.14](#ledger-10.14) |
# | tokens of the highest covariance lower the entropy | 2505.22617 | holds [10.26](#ledger-10.26) |
# | the 80/20 rule gives nothing up | own | holds [10.15](#ledger-10.15) |
# | what is clipped with $A>0$ raises the entropy | 2509.20712 | not decided by these data [10.24](#ledger-10.24) |
# | what is clipped with $A<0$ lowers it | 2509.20712 | holds [10.25](#ledger-10.25) |
# | signs of the four parts, at given prefixes and summed in full | own | holds [10.16](#ledger-10.16) [10.17](#ledger-10.17) |
# | the step's net change is the prefixes' | own | holds [10.18](#ledger-10.18) |
# | outliers lower the entropy | 2602.03392 | holds [10.19](#ledger-10.19) [10.20](#ledger-10.20) |
# | more than others, as predicted, a tenth of the fall or more | own | holds [10.21](#ledger-10.21) [10.22](#ledger-10.22) [10.23](#ledger-10.23) |
#
# **You need** chapters 03 and 06. **You will learn** to read any rule that clips, masks or weighs tokens as a statement
# about one number, and to measure what such a rule would do to your policy before you train with it.

# %%
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.special import lambertw

import deltah as dh
from deltah.objectives import clip_b_tokens, clip_v_tokens
from deltah.objectives.token_scores import SCORES
from deltah.scoring import batches, weighted_gradient

dh.figures.use_style()

# %% tags=["parameters"]
model = "../data/policy"          # a folder or a Hugging Face hub id
problems = "../data/problems"     # a folder, a file or a hub id
device = "auto"
dtype = "float64"                 # float32 for large models
results = "../results/default"
seed = 0
update_prompts = 64               # with 8 responses each
evaluation_prompts = 320          # twice, with one response each
max_new_tokens = 64

# %%
stated = (model, problems, seed) == ("../data/policy", "../data/problems", 0)
ledger = dh.Ledger("10", source="arXiv 2602.03392", stated=stated, seeds="../data/seeds")
above_zero, below_zero = (0.0, np.inf), (-np.inf, 0.0)

# %% [markdown]
# ## 1 · One logit
#
# Let $p$ be a next-token distribution with logits $z$ and entropy $H$. Raising the logit of token $k$ by $\varepsilon$
# changes the entropy by <a id="10.1" href="#ledger-10.1">[10.1]</a>
#
# $$ \delta H=-\varepsilon\,S_k+\mathcal O(\varepsilon^2),\qquad S_k=p_k\,(H+\log p_k). $$
#
# The paper calls $S$ the discriminator. As its sign is that of $H+\log p_k$, raising a logit lowers the entropy where
# $p_k>e^{-H}$ and raises it where $p_k<e^{-H}$ <a id="10.2" href="#ledger-10.2">[10.2]</a>. We try it on random
# distributions of 2 to 1,000 tokens, from nearly uniform to nearly certain, and move every logit of each up and down.

# %%
generator = torch.Generator().manual_seed(seed)
tables = []
for size in (2, 3, 5, 20, 100, 1000):
    for sharpness in (0.1, 0.5, 1.0, 2.0, 4.0):
        z = sharpness * torch.randn(size, generator=generator, dtype=torch.float64)
        tables.append((z, int(torch.randint(size, (), generator=generator))))


def entropy(z):
    return torch.distributions.Categorical(logits=z).entropy()


def discriminators(z):
    """S and its mean E[S] under p, from logits [V]."""
    log_p = z.log_softmax(-1)
    S = log_p.exp() * (entropy(z) + log_p)
    return S, log_p.exp() @ S


# %%
slopes = [torch.func.grad(entropy)(z) for z, _ in tables]
S_of = [discriminators(z)[0] for z, _ in tables]
ledger.holds("10.1", "abstract", "one logit raised by ε: δH = −ε S_k (largest gap of ∂H/∂z from −S)", expected=0,
             measured=max((g + S).abs().max() for g, S in zip(slopes, S_of, strict=True)), tolerance=1e-10,
             rules_out={"half": max(S.abs().max() / 2 for S in S_of), "p log p": max(
                 (g - z.softmax(0) * z.log_softmax(0)).abs().max() for g, (z, _) in zip(slopes, tables, strict=True))})
right = {"e^−H": [], "boundary 1/V": []}
for z, _ in tables:
    nudge = 1e-3 * torch.eye(len(z), dtype=z.dtype)
    lowered = entropy(z + nudge) < entropy(z - nudge)
    right["e^−H"].append(lowered == (z.log_softmax(0) > -entropy(z)))
    right["boundary 1/V"].append(lowered == (z.softmax(0) > 1 / len(z)))
share = {name: float(torch.cat(found).double().mean()) for name, found in right.items()}
ledger.holds("10.2", "abstract", "a raised logit lowers H where p > e^−H, and raises it elsewhere (share of tokens)",
             measured=share.pop("e^−H"), expected=1, tolerance=0, rules_out=share)
low, high = (f(float(entropy(z)) for z, _ in tables) for f in (min, max))
print(f"{len(tables)} distributions, entropies from {low:.2g} to {high:.2g} nats")

# %% [markdown]
# ## 2 · One token of a policy gradient
#
# No trainer moves one logit. The score of a softmax is $\partial\log p_k/\partial z=e_k-p$, so a policy-gradient step on
# token $k$ lifts one logit and pushes all down, $\delta z=\alpha\,(e_k-p)$, and
# <a id="10.3" href="#ledger-10.3">[10.3]</a>
#
# $$ \delta H=-\alpha\,D_k+\mathcal O(\alpha^2),\qquad D_k=S_k-\mathbb E_{i\sim p}[S_i]. $$
#
# For GRPO $\alpha=\eta\,r_kA$, with $r_k$ the ratio to the policy that sampled, and $\alpha=0$ where the ratio is
# clipped <a id="10.4" href="#ledger-10.4">[10.4]</a>. We let the library's loss say what $\delta z$ is.

# %%
# A, log r and whether GRPO's clip leaves the token its gradient
cases = [(-1.3, 0.15, True), (0.7, -0.4, True), (0.7, 0.3, False), (-1.3, -0.4, False)]
gaps, grpo_gaps, without_ratio, without_clip = [], [], [], []
for (z, k), S, slope in zip(tables, S_of, slopes, strict=True):
    D_k = S[k] - z.softmax(0) @ S
    gaps.append(slope @ (torch.eye(len(z), dtype=z.dtype)[k] - z.softmax(0)) + D_k)
    for A, log_r, kept in cases:
        leaf = z.clone().requires_grad_()
        log_p = leaf.log_softmax(0)[k].view(1, 1)
        A_k, mask = torch.tensor([A], dtype=z.dtype), torch.ones(1, 1, dtype=torch.bool)
        loss = dh.objectives.grpo(log_p, log_p.detach() - log_r, A_k, mask)
        change = slope @ torch.autograd.grad(-loss.sum(), leaf)[0]
        for found, alpha in ((grpo_gaps, kept * np.exp(log_r) * A), (without_ratio, kept * A),
                             (without_clip, np.exp(log_r) * A)):
            found.append(change + alpha * D_k)

# %%
largest = [max(abs(float(x)) for x in values) for values in (gaps, grpo_gaps, without_ratio, without_clip)]
uncentred = max(abs(float(z.softmax(0) @ S)) for (z, _), S in zip(tables, S_of, strict=True))
ledger.holds("10.3", "abstract", "a policy-gradient step α on token k: δH = −α (S_k − E[S]) (largest gap)",
             measured=largest[0], expected=0, tolerance=1e-10, rules_out={"−α S_k": uncentred})
ledger.holds("10.4", "abstract", "the same for GRPO, with α = η r A, and 0 where it clips (largest gap)", expected=0,
             measured=largest[1], tolerance=1e-10, rules_out={"α = η A": largest[2], "no clip": largest[3]})

# %% [markdown]
# Three things follow at once.
#
# **The policy's average vanishes.** $\mathbb E_{k\sim p}[D_k]=0$: reinforcing whatever the policy draws, with one
# advantage for all, leaves the entropy where it is, to first order <a id="10.5" href="#ledger-10.5">[10.5]</a>. What
# changes it is the covariance of advantage and discriminator (for $D$ we take the library's, made of moments),
#
# $$ \frac{\delta H}{\eta}=-\mathbb E_{k\sim p}[A_kD_k]=-\mathrm{Cov}_p(A,S)=-\mathrm{Cov}_p\big(\log p,\,p\,(A-\mathbb
#    E[A])\big), $$
#
# and the last form is the covariance law of "The entropy mechanism" (chapter 03). The two papers' first orders are one
# formula <a id="10.6" href="#ledger-10.6">[10.6]</a>.
#
# **The boundary moves.** The mean is itself a covariance, $\mathbb E_{i\sim p}[S_i]=\mathrm{Cov}_p(p,\log p)$, and as
# $\log$ rises it is never negative; it is zero for uniform distributions only <a id="10.7" href="#ledger-10.7">[10.7]</a>.
# So a reinforced token needs more than $p>e^{-H}$ to lower the entropy. Solving $p^*(H+\log p^*)=\mathbb E[S]$ gives
# <a id="10.8" href="#ledger-10.8">[10.8]</a>
#
# $$ p^*=e^{-H+W},\qquad W=W_0\big(\mathbb E[S]\,e^{H}\big)\ge0, $$
#
# with Lambert's function $W_0$. With two tokens nothing lies between the two boundaries; with three, something may. The
# likeliest token never does: $S$ is largest there, and so no less than its mean.

# %%
def scores_of_all(z):
    """The library's scores of every token of a distribution, as [1, V]."""
    log_p = z.log_softmax(0)
    moments = (entropy(z), log_p.exp().square().sum(), log_p.exp().square() @ log_p)
    return dh.TokenScores(log_p[None], *(x.expand(1, len(z)) for x in moments))


averages, one_formula, uncentred_law, covariances, roots = [], [], [], [], []
for (z, _), S in zip(tables, S_of, strict=True):
    p, log_p, H = z.softmax(0), z.log_softmax(0), entropy(z)
    mean_S, A = p @ S, 0.5 + torch.randn(len(z), generator=generator, dtype=torch.float64)
    D = SCORES["d"](scores_of_all(z), log_p[None], A[None], torch.ones(1, len(z), dtype=torch.bool))[0]
    averages.append(p @ D)
    for found, x in ((one_formula, A - p @ A), (uncentred_law, A)):
        found.append(p @ (A * D) - (p @ (log_p * p * x) - (p @ log_p) * (p @ (p * x))))
    covariances.append(mean_S - (p @ (p * log_p) - (p @ p) * (p @ log_p)))
    boundary = torch.exp(-H + float(lambertw(float(mean_S * H.exp())).real))
    roots.append(boundary * (H + boundary.log()) - mean_S)
lists = {"average": averages, "law": one_formula, "uncentred": uncentred_law, "mean": covariances, "root": roots}
worst = {name: max(abs(float(x)) for x in values) for name, values in lists.items()}

# %%
ledger.holds("10.5", "abstract", "the policy's average of D vanishes (largest)", measured=worst["average"], expected=0,
             tolerance=1e-12, rules_out={"of S": uncentred})
ledger.holds("10.6", "derived here", "−E[A D] is the covariance law −Cov(log p, p (A − E[A])) (largest gap)",
             source="deltah", measured=worst["law"], expected=0, tolerance=1e-10,
             rules_out={"−Cov(log p, p A)": worst["uncentred"]})
ledger.holds("10.7", "derived here", "E[S] = Cov(p, log p) (largest gap)", source="deltah", measured=worst["mean"],
             expected=0, tolerance=1e-12, rules_out={"E[S] = 0": uncentred})
ledger.holds("10.8", "derived here", "D = 0 at p* = exp(−H + W₀(E[S] e^H)) (largest D there)", source="deltah",
             measured=worst["root"], expected=0, tolerance=1e-12, rules_out={"at e^−H": uncentred})

# %% [markdown]
# Where do the two boundaries part? Take distributions in which each token has a fixed fraction $q$ of the probability of
# the one before it, from certain ($q\to0$) to uniform ($q\to1$).

# %%
figure, axes = plt.subplots(figsize=(7.5, 4.4))
ratios, count = np.linspace(0.02, 0.98, 200), 12
geometric = torch.tensor(ratios)[:, None] ** torch.arange(count)
geometric = geometric / geometric.sum(1, keepdim=True)
H = torch.distributions.Categorical(geometric).entropy()
mean_S = (geometric**2 * (H[:, None] + geometric.log())).sum(1)
plain, moved_up = (-H).exp().numpy(), np.exp(-H.numpy() + lambertw((mean_S * H.exp()).numpy()).real)
for i in range(3):
    axes.plot(ratios, geometric[:, i], color="0.35", linewidth=1.2, linestyle=dh.figures.DASHES[i],
              label=("likeliest", "second", "third")[i] + " token")
axes.plot(ratios, plain, color="C0", marker="o", markevery=20, label=r"$e^{-H}$, where $S=0$")
axes.plot(ratios, moved_up, color="C1", marker="s", markevery=20, label=r"$p^*$, where $D=0$")
axes.fill_between(ratios, plain, moved_up, color="C1", alpha=0.2)
axes.set(xlabel="q, probability of a token over that of the next likelier one", ylabel="probability", yscale="log",
         ylim=(0.02, 1.1), title="Second and third pass between the boundaries, the likeliest never")
axes.legend(fontsize="small")
dh.figures.save(figure, results, "10-boundaries")

# %% [markdown]
# *Where a token's line runs in the shaded band, raising its logit lowers the entropy and reinforcing it raises it.*

# %% [markdown]
# ## 3 · One lens for many methods
#
# Papers rank or weigh tokens by different things. In terms of $S$ they are:
#
# | method | what it looks at | the same in terms of $S$ |
# |---|---|---|
# | entropy bonus | $\delta z=\beta\,\partial H/\partial z$ | $-\beta S$, so that $\delta H=\beta\sum_iS_i^2$ <a id="10.9" href="#ledger-10.9">[10.9]</a> |
# | REPO | $A\,(\log p-\mathbb E_p[\log p])$ | $A\,S/p$ <a id="10.10" href="#ledger-10.10">[10.10]</a> |
# | STEER | $(A/\pi_{\rm old})\,p\,(1-p)(\log p+H)$ | $(A/\pi_{\rm old})(1-p)\,S$ <a id="10.11" href="#ledger-10.11">[10.11]</a> |
# | CE-GPPO's quadrants | signs of $A$ and of $p$ against a boundary | sign of $A\,S$, with the boundary $e^{-H}$ |
# | Clip-Cov, KL-Cov | $(A-\bar A)(\log p-\overline{\log p})$, means over a batch | REPO, if each state's own mean stood there |
# | 80/20 rule | $H$ | a bound: $\lvert D\rvert\to0$ as $H\to0$ |
#
# So REPO, STEER and the quadrants have the sign of $A\,S$, which differs from that of the truth $A\,D$ between
# $e^{-H}$ and $p^*$. STEER has what of $D$ comes by the token's own logit, $D_k=(1-p_k)S_k-\sum_{i\ne k}p_iS_i$, but
# over $\pi_{\rm old}$: as $\alpha=\eta\,rA$, its score times $\pi$ is that part of the change.

# %%
gaps = {"10.9": [], "10.10": [], "10.11": []}
rivals = {"10.9": [], "10.10": [], "10.11": []}
for (z, k), S, slope in zip(tables, S_of, slopes, strict=True):
    A, one, mask = torch.tensor([-1.3], dtype=z.dtype), (1, 1), torch.ones(1, 1, dtype=torch.bool)
    leaf = z.clone().requires_grad_()
    log_p, beta = leaf.log_softmax(0)[k].view(one), 0.2
    loss = dh.objectives.entropy_bonus(log_p, log_p.detach(), 0 * A, mask, entropy(leaf).view(one), beta=beta)
    change = slope @ torch.autograd.grad(-loss.sum(), leaf)[0]
    scored, old = dh.TokenScores(*(x[:, k:k + 1] for x in scores_of_all(z))), log_p.detach() - 0.15
    p_k, p_old = log_p.detach().exp(), old.exp()
    repo, steer = (float(SCORES[name](scored, old, A, mask)) for name in ("repo", "steer"))
    for id, found, right, rival in (("10.9", change, beta * S.square().sum(), 0.0),
                                    ("10.10", repo, A * S[k] / p_k, A * S[k]),
                                    ("10.11", steer, A / p_old * (1 - p_k) * S[k], A / p_k * (1 - p_k) * S[k])):
        gaps[id].append(abs(float(found - right)))
        rivals[id].append(abs(float(found - rival)))

# %%
statements = {"10.9": ("the library's entropy bonus changes H by β Σ S²", "nothing"),
              "10.10": ("REPO's score is A S / p", "A S"),
              "10.11": ("STEER's score is (A/π_old) (1 − p) S", "with π for π_old")}
for id, (statement, rival) in statements.items():
    ledger.holds(id, "derived here", f"{statement} (largest gap)", source="deltah", expected=0, tolerance=1e-9,
                 measured=max(gaps[id]), rules_out={rival: max(rivals[id])})

# %% [markdown]
# ## 4 · The shipped policy's tokens
#
# A batch U of rollouts, with GRPO's advantages. All scores come from the library in one pass, without logits: beside the
# entropy, `score` hands out $\sum_ip_i^2$ and $\sum_ip_i^2\log p_i$, of which $\mathbb E[S]=H\sum p^2+\sum p^2\log p$.

# %%
policy = dh.load_policy(model, device, dtype)
data = dh.load_problems(problems, "train").shuffle(seed=seed)
ends = np.cumsum([0, update_prompts, evaluation_prompts, evaluation_prompts])
chosen, one_half, other_half = (data.select(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True))
U = dh.sample(policy, chosen, 8, max_new_tokens, seed=seed)
E, elsewhere = (dh.sample(policy, part, 1, max_new_tokens, seed=seed + 1 + i)
                for i, part in enumerate((one_half, other_half)))
policy.model.float()
A = dh.objectives.group_advantages(U.rewards, U.prompt_index)
with torch.no_grad():
    scores = dh.score(policy, U, moments=True)
mask, prompt, log_probs = U.response_mask, U.prompt_index, scores.log_probs
score_of = {name: function(scores, log_probs, A, mask) for name, function in SCORES.items()}
D, truth = score_of["d"], score_of["first_order"]
print(f"{len(U)} rollouts, {int(mask.sum()):,} tokens, entropy {scores.entropies[mask].mean():.3f} nats a token")

# %% [markdown]
# **The batch's average of $D$ vanishes**, as the corollary says, up to sampling
# <a id="10.12" href="#ledger-10.12">[10.12]</a>; the average of $S$, whose mean is $\mathbb E[S]$, does not. So a batch
# has no entropy change of its own: all of it comes from how advantages sort the tokens.
#
# **The two boundaries hardly differ here.** Few tokens lie between $e^{-H}$ and $p^*$, and little of
# $\sum\lvert A\,D\rvert$ is theirs <a id="10.13" href="#ledger-10.13">[10.13]</a>. So the simpler sign of REPO, STEER
# and the quadrants, whose boundary is $e^{-H}$ too, is right for nearly all that matters.
#
# **A batch's mean is no boundary.** Clip-Cov and KL-Cov take off the batch's mean of $\log p$. Where most tokens are
# nearly certain, that mean is nearly zero, and a token that is likely among its alternatives still counts as unlikely.
# We add up $\lvert A\,D\rvert$ over the tokens whose sign a score gets wrong
# <a id="10.14" href="#ledger-10.14">[10.14]</a>.

# %%
weight = truth.abs()
wrong = {name: dh.Estimate.ratio((weight * (score_of[name].sign() != truth.sign())).sum(1), weight.sum(1), prompt)
         for name in ("repo", "steer", "quadrant", "covariance")}
per_token = dh.Estimate.ratio(D.sum(1), mask.double().sum(1), prompt)
expected_S = float((score_of["s"] - D)[mask].mean())
ledger.holds("10.12", "abstract", "the batch's average of D vanishes (nats a token)", measured=per_token, expected=0.0,
             rules_out={"the average of S": expected_S})
ledger.holds("10.13", "derived here", "REPO's sign is wrong for little of Σ|A D| (share)", source="deltah",
             measured=wrong["repo"], expected=(0.0, 0.05), rules_out={"a tenth": 0.1})
ledger.holds("10.14", "derived here", "the batch's covariance has the wrong sign for more of Σ|A D| (share)",
             source="deltah", measured=wrong["covariance"], expected=(0.25, 1.0), rules_out={
                 "REPO's": wrong["repo"].value})
pd.Series(wrong).map(lambda e: f"{e.value:.1%} ± {e.standard_error:.1%}").to_frame("Σ|A D| with the wrong sign")

# %% [markdown]
# Over all tokens the sign of a batch's covariance is about as good as a coin's. Clip-Cov and KL-Cov use its largest
# values alone. There it does point at tokens that lower the entropy of their distribution
# <a id="10.26" href="#ledger-10.26">[10.26]</a>, if at fewer of them than the same number by REPO's score.

# %%
def lowering(name, share):
    """Of the tokens with the largest scores, the share that lowers the entropy of its distribution, A D > 0."""
    scored = score_of[name].masked_fill(~mask, -torch.inf).flatten()
    top = torch.zeros_like(mask).flatten().index_fill(0, scored.topk(int(share * mask.sum())).indices, True).view_as(mask)
    return dh.Estimate.ratio((top & (truth > 0)).double().sum(1), top.double().sum(1), prompt)


top = {name: [lowering(name, share) for share in (0.002, 0.02)] for name in ("covariance", "repo")}
ledger.holds("10.26", "method", "tokens of the highest covariance lower the entropy (share of the top 2% with A D > 0)",
             source="arXiv 2505.22617", measured=top["covariance"][1], expected=(0.5, 1.0), rules_out={"a coin": 0.5})
pd.DataFrame.from_dict({name: [f"{e.value:.0%} ± {e.standard_error:.0%}" if e.standard_error > 0.005 else f"{e.value:.0%}"
                               for e in found] for name, found in top.items()}, "index",
                       columns=["top 0.2%", "top 2%"]).rename_axis("share that lowers H")

# %% [markdown]
# What makes the covariance a discriminator everywhere is the state's own mean, $\mathbb E_p[\log p]=-H$, which costs
# nothing once the entropy is there.
#
# **The 80/20 rule** gives gradients only to the fifth of the tokens with the highest entropy. In terms of $D$ it gives
# up nothing: the other four fifths hold next to none of $\sum\lvert A\,D\rvert$ <a id="10.15" href="#ledger-10.15">[10.15]</a>.

# %%
fifth = mask & (scores.entropies >= scores.entropies[mask].quantile(0.8))
left = dh.Estimate.ratio((weight * ~fifth).sum(1), weight.sum(1), prompt)
ledger.holds("10.15", "derived here", "the lower four fifths of tokens by entropy hold little of Σ|A D| (share)",
             source="deltah", measured=left, expected=(0.0, 0.1), rules_out={"four fifths": 0.8})
order = weight[mask].sort(descending=True).values
print(f"the top fifth begins at {scores.entropies[fifth].min():.3f} nats; "
      f"half of Σ|A D| is in {int((order.cumsum(0) < order.sum() / 2).sum()) / len(order):.1%} of the tokens")

# %% [markdown]
# **Clip-higher and CE-GPPO** are about tokens whose ratio has left the clip range: DAPO lets through more of those with
# $A>0$ and $r>1+\varepsilon$, CE-GPPO both sides, with factors $\beta$. Both papers call them unlikely tokens, which
# would make $D<0$: the first kind should raise the entropy of its own distribution, the second lower it. We train a copy
# of the policy on three quarters of U, a minibatch at a time, and look at the ratios in the last quarter, as a trainer
# would find them.

# %%
trained = dh.load_policy(model, device, dtype)
trained.model.float()
adamw = torch.optim.AdamW(trained.parameters.values(), lr=2e-4)
*before, last = torch.arange(len(U)).chunk(4)
for minibatch in before:
    dh.training.policy_gradient_step(trained, U.select(minibatch).replace(advantages=A[minibatch]),
                                     log_probs[minibatch], "dapo", adamw)
with torch.no_grad():
    now = dh.score(trained, U.select(last), moments=True)
A_last, mask_last, old = A[last, None], mask[last], log_probs[last]
ratio = (now.log_probs - old).exp()
D_now = SCORES["d"](now, old, A[last], mask_last)
outside = {"A > 0, r > 1.2": mask_last & (A_last > 0) & (ratio > 1.2),
           "A < 0, r < 0.8": mask_last & (A_last < 0) & (ratio < 0.8)}

# %%
rows = {}
for id, (name, tokens), sign in zip(("10.24", "10.25"), outside.items(), (above_zero, below_zero), strict=True):
    change = (-ratio * A_last * D_now * tokens).sum(1)
    rows[name] = [int(tokens.sum()), float((D_now < 0)[tokens].double().mean()), float(now.log_probs[tokens].exp().median()),
                  dh.Estimate.mean(change, prompt[last])]
    ledger.holds(id, "abstract", f"{name}: their gradient {'raises' if id == '10.24' else 'lowers'} the entropy of their "
                 "own distributions (Σ −r A D a response)", source="arXiv 2509.20712", measured=rows[name][-1],
                 expected=sign, rules_out=0.0)
pd.DataFrame.from_dict(rows, "index", columns=["tokens", "share with D < 0", "median p", "Σ −r A D a response"]).round(2)

# %% [markdown]
# What CE-GPPO's $\beta_1$ brings back is what the paper says: nearly all of these tokens have $D<0$, and punishing them
# lowers the entropy of their distributions <a id="10.25" href="#ledger-10.25">[10.25]</a>. Of those above the range,
# which clip-higher lets through as far as 1.28, about as many have either sign
# <a id="10.24" href="#ledger-10.24">[10.24]</a>: half of them have a probability of more than a half, and can hardly have
# been unlikely before they rose. Chapter 12 goes on from here.
#
# ## 5 · What a token does to the whole policy
#
# $D$ knows one distribution. A step moves shared parameters, and with them every other distribution and the prefixes
# that occur (chapter 03). So we ask the policy. We split the update's gradient by the signs of $A$ and $D$, and predict
# the effect of each part on fresh rollouts E: at given prefixes, which is all that a theory of tokens can mean, and in
# full. All parts are of one SGD step with DAPO's token mean, per unit of $\eta$.

# %%
sgd = torch.optim.SGD(policy.parameters.values(), lr=1.0)
direction = dh.update_direction(policy, U, "dapo", optimizer=sgd)
in_batches = batches(policy, U)


def along(tokens):
    """The part of the update that comes from some of its tokens [N, T]."""
    parts = weighted_gradient(policy, U, in_batches, list(direction.preconditioner), direction.token_weights * tokens)
    return {name: x.to(policy.dtype) for name, x in parts.items() if x is not None}


def effects(tokens):
    """dH/dη per token along that part: what D says of the batch, at given prefixes on E, and in full on E."""
    full = dh.entropy_change(policy, E, along(tokens))
    fixed = dh.Estimate.mean(full.contributions - full.score_term.contributions)
    return -float((direction.token_weights * D * tokens).sum()), fixed, full


# %%
raised = (A > 0)[:, None] & mask
lowered = (A < 0)[:, None] & mask
quadrants = {"A > 0, D > 0": raised & (D > 0), "A > 0, D < 0": raised & (D < 0),
             "A < 0, D > 0": lowered & (D > 0), "A < 0, D < 0": lowered & (D < 0)}
found = {name: effects(tokens) for name, tokens in quadrants.items()}
table = pd.DataFrame({name: [int(tokens.sum()), found[name][0], *map(str, found[name][1:])]
                      for name, tokens in quadrants.items()}).T
table.columns = ["tokens", "Σ −w D", "at given prefixes", "in full"]
table.round(5)

# %% [markdown]
# At given prefixes every part has the sign that $D$ gives it <a id="10.16" href="#ledger-10.16">[10.16]</a>, and sizes
# follow too: the four ratios of effect to $\sum-wD$ lie close together, though $D$ has never heard of other tokens. In
# full the four still follow the rule when summed with its signs <a id="10.17" href="#ledger-10.17">[10.17]</a>, but
# sizes do not, and reinforced unlikely tokens have an effect that other seeds cannot tell from zero. At given prefixes
# the parts nearly cancel. What is left in full, the step's net change, is mostly the other prefixes'
# <a id="10.18" href="#ledger-10.18">[10.18]</a>.

# %%
signs = {"A > 0, D > 0": -1, "A > 0, D < 0": 1, "A < 0, D > 0": 1, "A < 0, D < 0": -1}
parts = {place: sum(found[name][place].contributions for name in quadrants) for place in (1, 2)}
net, net_fixed = (dh.Estimate.mean(parts[place]) for place in (2, 1))
by_rule = {place: {name: sign * found[name][place].contributions for name, sign in signs.items()} for place in (1, 2)}
weakest = min(map(dh.Estimate.mean, by_rule[1].values()), key=lambda e: e.value / e.standard_error)
ledger.holds("10.16", "derived here", "effects at given prefixes have the sign of −A D (the least certain of the four "
             "parts, times that sign)", source="deltah", measured=weakest, expected=above_zero, rules_out=0.0)
ledger.holds("10.17", "derived here", "effects in full, each times the sign of −A D, summed", source="deltah",
             measured=dh.Estimate.mean(sum(by_rule[2].values())), expected=above_zero, rules_out=0.0)
ledger.holds("10.18", "derived here", "of the step's dH/dη, the part at given prefixes is the smaller (share)",
             source="deltah", measured=dh.Estimate.ratio(parts[1], parts[2]), expected=(-0.5, 0.5),
             rules_out={"all": 1.0})
print(f"net: at given prefixes {net_fixed}, in full {net} nats a token per unit of η")

# %%
figure, axes = plt.subplots(figsize=(8, 4.4))
places = np.arange(5)
totals = [*found.values(), (-float((direction.token_weights * D).sum()), net_fixed, net)]
for i, (name, shift) in enumerate({"at given prefixes": -0.12, "in full": 0.12}.items()):
    values = [row[i + 1] for row in totals]
    axes.errorbar(places + shift, [e.value for e in values], yerr=[1.96 * e.standard_error for e in values], capsize=3,
                  linestyle="none", color=f"C{i}", marker=dh.figures.MARKERS[i], label=name)
axes.axhline(0, color="0.3", linewidth=1)
axes.axvline(3.5, color="0.6", linewidth=1, linestyle=":")
axes.set_xticks(places, [*quadrants, "the whole step"])
axes.set(ylabel="dH/dη, nats a token", title="At given prefixes D tells the sign of each part; they cancel")
axes.legend()
dh.figures.save(figure, results, "10-quadrants")

# %% [markdown]
# *Predicted effect of the four parts of one step on fresh rollouts, with 95% intervals, and of the whole step.*

# %% [markdown]
# ## 6 · Clip_B and Clip_V
#
# Both drop punished tokens, $A<0$, that lower the entropy most: Clip_B those with $S$ more than $\mu$ standard
# deviations below the batch's mean, Clip_V those with $D<-\mu\,\sigma_D$, at most a fraction $f$. With the published
# $\mu=2.5$, and $\mu=8.5$ with $f=10^{-4}$, they hardly act here: $S$ and $D$ are bounded, $S\ge-1/e$, and where
# many tokens are undecided their deviations are too large for such thresholds. Lower thresholds show what the rules do.

# %%
H, collisions = scores.entropies, scores.collisions
moments = (H, collisions, scores.collision_log_probs)
chosen_by = {"Clip_B, μ = 2.5": clip_b_tokens(log_probs, A, mask, H),
             "Clip_V, μ = 8.5, f = 1e-4": clip_v_tokens(log_probs, A, mask, *moments),
             "Clip_B, μ = 1": clip_b_tokens(log_probs, A, mask, H, threshold=1.0),
             "Clip_V, μ = 2, f = 1": clip_v_tokens(log_probs, A, mask, *moments, threshold=2.0, fraction=1.0)}
size = (A[:, None] ** 2 * (1 - 2 * log_probs.exp() + collisions) * mask).double()
pd.DataFrame({name: [int(tokens.sum()), f"{float((tokens & mask).sum() / mask.sum()):.2%}",
                     f"{float((size * tokens).sum() / size.sum()):.0%}",
                     f"{float((weight * tokens).sum() / weight.sum()):.0%}"] for name, tokens in chosen_by.items()},
             index=["tokens", "of all tokens", "of Σ A² |e − p|²", "of Σ|A D|"]).T

# %% [markdown]
# One percent of the tokens has a fifth of the squared length of all gradients on logits, $\sum A^2\lvert e_k-p\rvert^2$:
# the outliers are outliers of the gradient as well. Here are some of them, in their places.

# %%
outliers = chosen_by["Clip_V, μ = 2, f = 1"]
lowest = D.masked_fill(~outliers, torch.inf).flatten().argsort()[:5].tolist()
for place in lowest:
    n, k = divmod(place, mask.shape[1])
    before, token = (policy.tokenizer.decode(U.response_ids[n, a:b]) for a, b in ((max(0, k - 8), k), (k, k + 1)))
    print(f"A {A[n]:+.1f}  D {D[n, k]:+.2f}  p {log_probs[n, k].exp():.2f}  H {H[n, k]:.2f}  …{before!r} → {token!r}")

# %% [markdown]
# What does dropping them do? The step without them is the step less their part, so the part's effect says it: they lower
# the entropy, at given prefixes <a id="10.19" href="#ledger-10.19">[10.19]</a> and in full
# <a id="10.20" href="#ledger-10.20">[10.20]</a>. As a control we take random punished tokens, twenty times as many, in
# units of one set of outliers: at given prefixes as many of them do little, and the other way, as most have $D>0$
# <a id="10.21" href="#ledger-10.21">[10.21]</a>.
# And the prediction is held against a measurement: the policy is moved along their part, and the change is measured on
# other prompts <a id="10.22" href="#ledger-10.22">[10.22]</a>.

# %%
_, fixed, full = effects(outliers)
draw = torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(mask.device)
random_tokens = lowered & ~outliers & (draw < 20 * float(outliers.sum() / lowered.sum()))
_, control, _ = effects(random_tokens)
in_units = control.contributions * float(outliers.sum() / random_tokens.sum())
part = along(outliers)
rate = 1e-3 / abs(full.value)
measured = dh.measured_entropy_change(policy, elsewhere, part, [rate]).iloc[0] / rate
hit = measured.change / full.value
hit = dh.Estimate(hit, abs(hit) * np.hypot(measured.standard_error / measured.change,
                                             full.standard_error / full.value), len(E))
share = dh.Estimate.ratio(full.contributions, parts[2])

# %%
ledger.holds("10.19", "abstract", "punished tokens with D < −2σ lower the entropy at given prefixes (dH/dη)",
             measured=fixed, expected=below_zero, rules_out=0.0)
ledger.holds("10.20", "abstract", "and in full: without them the entropy falls less (dH/dη)", measured=full,
             expected=below_zero, rules_out=0.0)
ledger.holds("10.21", "derived here", "as many random punished tokens do less (dH/dη, outliers' less theirs)",
             source="deltah", measured=dh.Estimate.mean(fixed.contributions - in_units), expected=below_zero,
             rules_out=0.0)
ledger.holds("10.22", "derived here", "the outliers' effect, measured over predicted, on disjoint prompts",
             source="deltah", measured=hit, expected=1.0, rules_out={"nothing": 0.0, "half": 0.5, "other sign": -1.0})
ledger.holds("10.23", "derived here", "dropped, these tokens take a tenth or more of the step's fall with them (share)",
             source="deltah", measured=share, expected=(0.1, 1.0), rules_out={"their share of the tokens": float(
                 outliers.sum() / mask.sum())})
print(f"outliers: at given prefixes {fixed}, in full {full}; as many random ones {dh.Estimate.mean(in_units)}\n"
      f"share of the step's change {share}; measured / predicted {hit}")

# %% [markdown]
# So a percent of the tokens carries a quarter of the fall <a id="10.23" href="#ledger-10.23">[10.23]</a>. That is the
# rule at its best, and its limit. Of the three quarters that remain, given prefixes see nothing: there, the rest of the
# step *raises* the entropy. All of its fall comes by way of other prefixes, where no discriminator looks.
#
# **Gradient normalisation** is named beside the rules as a stabiliser. It multiplies a step of SGD by one number, so
# that it cannot change which way the entropy goes to first order, only how far. But outliers have a say in that number:
# where a trainer clips the gradient's norm, dropping them makes room for the rest.

# %%
def length(v):
    return float(sum(x.double().square().sum() for x in v.values())) ** 0.5


whole = along(mask)
rest = {name: x - part[name] for name, x in whole.items()}
rescaled = dh.Estimate.mean(length(whole) / length(rest) * (parts[2] - full.contributions))
print(f"without the outliers the gradient has {length(rest) / length(whole):.2f} of its length\n"
      f"dH/dη of the step {net}, without them {dh.Estimate.mean(parts[2] - full.contributions)}, "
      f"scaled back to the same length {rescaled}")

# %% [markdown]
# ## What stands
#
# $S$ and $D$ are exact for the steps that they are made for, and most scores of the literature are $S$ or $D$ in other
# words. One is not: centred by the batch rather than by the state, the covariance loses the sign. On a transformer
# $D$ tells the sign of what a group of tokens does to the entropy at given prefixes. It does not tell the change that a
# step makes, in which parts of either sign nearly cancel and other prefixes decide.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Show that with two tokens $D$ and $S$ have one sign. *Hint:* $S_2=-S_1$, as $\sum_iS_i=0$.
# 2. Find a distribution of three tokens in which reinforcing a token with $p>e^{-H}$ raises the entropy.
# 3. Which threshold of Clip_B drops as many tokens as Clip_V with $\mu=2$, and how many have both?
# 4. Replace the SGD step of section 5 by AdamW's. Do the four ratios still lie close together? *Hint:* `along` has to
#    multiply each gradient by `direction.preconditioner`, which is 1 for SGD; without that nothing changes.
# 5. Bound $\lvert D\rvert$ by a function of $H$ that vanishes with $H$. How good is the 80/20 rule's choice by it?
#
# ## Further reading
#
# - *On the entropy dynamics in reinforcement fine-tuning of large language models*, arXiv 2602.03392.
# - Cui, G. et al. *The entropy mechanism of reinforcement learning for reasoning language models*, arXiv 2505.22617.
# - Su, Z. et al. *CE-GPPO*, arXiv 2509.20712; STEER, arXiv 2510.10150; REPO, arXiv 2603.11682.
# - Wang, S. et al. *Beyond the 80/20 rule*, arXiv 2506.01939.
