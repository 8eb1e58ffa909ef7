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
# # 01 · Perplexity and GSPO
#
# GSPO weights a whole response by $s=(\pi_\theta/\pi_{\rm old})^{1/L}$, and *Rethinking GSPO* (arXiv 2510.23142)
# reads that weight as a ratio of perplexities and as the exponential of an entropy change. This chapter settles
# which of its statements are identities, which are approximations and of what order, and shows that the one
# assumption the paper apologises for, independent token log-ratios, is neither true nor needed.
#
# ## In short
#
# - **The weight is a perplexity ratio, exactly**, and its logarithm the *fall* of a response's cross-entropy,
#   $s=e^{-\Delta H}$. It says nothing about the policy's entropy: averaged over responses $\log s$ is of second order
#   in the step, the entropy changes at first.
# - **$\mathrm{Var}(\log s)\propto1/L$ needs no independence.** Token log-ratios are martingale differences: their
#   squares correlate (up to 0.21 on a tiny policy), they do not. On fresh rollouts of the shipped policy the variance
#   of their sum is 0.98 ± 0.03 of the sum of their variances; its log-log slope against $L$ is −1.2 ± 0.2, and
#   not the same for every update (−2.0 to −0.6 with ten other seeds), as tokens of short responses move further
#   (1.7 ± 0.1 times).
# - **GSPO's range clips responses long before PPO's clips tokens**: at learning rate $10^{-5}$, 55% of fresh responses
#   are outside the one and fewer than one in a thousand tokens outside the other. It clips short responses more.
# - **The rollouts that made an update are not fresh**: their mean $|\log s|$ is 1.5 ± 0.2 times as large, after the
#   smallest step.
# - **What to do.** Measure an update's effect on rollouts that it has not seen. Read GSPO's $\varepsilon$ in nats per
#   token, and expect it to act on short responses first. Do not take the mean of $\log s$ for the entropy.
#
# **What is checked**
#
# | statement | source | verdict |
# |---|---|---|
# | $s(\theta)=\mathrm{PPL}_{\rm old}/\mathrm{PPL}_\theta$ | 2510.23142 | holds [01.1](#ledger-01.1) |
# | $s=\exp(\Delta H)$ | 2510.23142 | holds with a correction [01.2](#ledger-01.2) |
# | the sequence objective weights gradients by perplexity ratios | 2510.23142 | holds [01.5](#ledger-01.5) |
# | clipping $s$ is a band on the change of cross-entropy | 2507.18071 | holds [01.16](#ledger-01.16) |
# | token log-ratios are about independent | 2510.23142 | refuted [01.7](#ledger-01.7) |
# | they are uncorrelated | 2510.23142 | holds [01.6](#ledger-01.6) |
# | the same, seen on fresh rollouts | 2510.23142 | not decided by these data [01.11](#ledger-01.11) |
# | $1/L$ variance reduction: $\mathrm{Var}(\log s)$ falls with $L$, faster than $L^{-1/2}$ | 2510.23142 | not decided by these data [01.10](#ledger-01.10) |
# | $\log s$ averages to a divergence, no entropy change | our own | holds [01.3](#ledger-01.3), [01.4](#ledger-01.4) |
# | geometric means may be further from 1 | our own | holds [01.14](#ledger-01.14), [01.15](#ledger-01.15) |
# | the update's own rollouts move further than fresh ones | our own | holds [01.21](#ledger-01.21) |
#
# **You need** the policy gradient, and what a martingale is. **You will learn** when GSPO's clip range acts, on
# which responses, and why the rollouts that made an update must not be used to measure it.

# %%
import math

import pandas as pd
import torch
from matplotlib import pyplot as plt

import deltah as dh

dh.figures.use_style()

# %% tags=["parameters"]
model = "../data/policy"          # a folder or a Hugging Face hub id
problems = "../data/problems"     # a folder, a file or a hub id
device = "auto"
dtype = "float64"                 # keeps tiny log-ratios exact; float32 for large models
results = "../results/default"
seed = 0
update_prompts = 64               # the update: this many prompts, 8 responses each
fresh_prompts = 1024              # the test: other prompts, 1 response each
max_new_tokens = 64
learning_rates = [1e-6, 1e-5, 1e-4, 1e-3]

# %%
ledger = dh.Ledger("01", source="arXiv 2510.23142", seeds="../data/seeds",
                   stated=(model, problems, seed) == ("../data/policy", "../data/problems", 0))
gspo_paper = "arXiv 2507.18071"

# %% [markdown]
# ## 1 · Three names of one number
#
# We begin with a policy whose every response can be written down: a random transformer over four tokens, asked for
# exactly six of them. There are $4^6=4096$ responses, so an expectation is a sum, and float64 leaves nothing to
# sampling noise.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=4, context_length=8, seed=1)
responses = dh.exact.every_response(tiny, prompts=[[0]], max_new_tokens=6)
with torch.no_grad():
    old = dh.score(tiny, responses)
pi_old = dh.exact.probabilities(old)
mask, length = responses.response_mask, 6
print(f"{len(responses)} responses, probabilities sum to {pi_old.sum():.12f}")

# %% [markdown]
# To have a $\theta$ to compare with $\theta_{\rm old}$ we take a policy-gradient step. The reward is the share of
# token 2 in the response; the advantage $A$ is the reward less its mean; $v$ is the exact gradient of
# $J=\mathbb E_{\pi_{\rm old}}[s A]$ at $\theta_{\rm old}$, scaled to unit length, and $\theta=\theta_{\rm old}+\eta v$.

# %%
reward = (responses.response_ids == 2).double().mean(1)
advantages = reward - (pi_old * reward).sum()
log_probs = dh.score(tiny, responses).log_probs
objective = (pi_old * advantages * dh.objectives.sequence_ratio(log_probs, old.log_probs, mask)).sum()
gradient = torch.autograd.grad(objective, list(tiny.parameters.values()))
norm = torch.sqrt(sum(g.square().sum() for g in gradient))
v = {name: g / norm for name, g in zip(tiny.parameters, gradient, strict=True)}

# %% [markdown]
# Write $H_\theta(y)=-\frac1L\log\pi_\theta(y)$ for the cross-entropy of one response in nats per token. Its
# exponential is the perplexity. Then
#
# $$ s(\theta)=\Big(\frac{\pi_\theta(y)}{\pi_{\rm old}(y)}\Big)^{1/L}
#    =\frac{\mathrm{PPL}_{\rm old}(y)}{\mathrm{PPL}_\theta(y)}
#    =e^{\,H_{\rm old}(y)-H_\theta(y)} . $$
#
# This is algebra, and the weight that the library's GSPO uses obeys it <a id="01.1" href="#ledger-01.1">[01.1]</a>. The
# sign needs care. In these notebooks $\Delta H$ is always *new minus old*; the paper's $\exp(\Delta H)$ is right only
# if its $\Delta H$ means *old minus new*, the information gained <a id="01.2" href="#ledger-01.2">[01.2]</a>.

# %%
with torch.no_grad():
    new = dh.score(tiny, responses, tiny.shifted(v, 0.1))
weight = dh.objectives.sequence_ratio(new.log_probs, old.log_probs, mask)
cross_entropy_old, cross_entropy_new = -old.log_probs.mean(1), -new.log_probs.mean(1)
perplexity_ratio = cross_entropy_old.exp() / cross_entropy_new.exp()
delta_h = cross_entropy_new - cross_entropy_old
unrooted = dh.exact.probabilities(new) / pi_old

# %%
ledger.holds("01.1", "abstract", "s = PPL_old / PPL_θ, for every response (largest gap)",
             measured=(weight - perplexity_ratio).abs().max(), expected=0, tolerance=1e-12,
             rules_out={"without the root": float((unrooted - perplexity_ratio).abs().max())})
ledger.corrected("01.2", "abstract", "s = exp(ΔH), the cross-entropy change (slope of log s in ΔH)",
                 correction="s = exp(−ΔH) with ΔH = H_θ − H_old; the paper's ΔH is H_old − H_θ",
                 measured=weight.log() @ delta_h / delta_h.square().sum(), expected=-1, as_printed=1, tolerance=1e-10)

# %% [markdown]
# ### What this ΔH is not
#
# It is tempting to read $\exp(\Delta H)$ as a statement about the *policy's entropy*. It is not. Averaged over
# $\pi_{\rm old}$, the cross-entropy change is a divergence,
#
# $$ \mathbb E_{\pi_{\rm old}}[\log s]=-\tfrac1L\,\mathrm{KL}(\pi_{\rm old}\,\|\,\pi_\theta)
#    =-\frac{\eta^2}{2L}\,\mathbb E[(\nabla_v\log\pi)^2]+\mathcal O(\eta^3)\le 0 , $$
#
# never positive and of *second* order in $\eta$ <a id="01.3" href="#ledger-01.3">[01.3]</a>. The entropy of the policy,
# the subject of every later chapter, may move either way and does so at *first* order,
# $-\frac\eta L\,\mathbb E[\log\pi\,\nabla_v\log\pi]$ <a id="01.4" href="#ledger-01.4">[01.4]</a>. For a small step the
# two differ by orders of magnitude. We take steps of several sizes, forwards and backwards, and for the formulas the
# slopes $a_t=\nabla_v\log\pi(y_t|y_{<t})$ of all tokens at once, from forward-mode differentiation.

# %%
steps = torch.logspace(-3, 0, 13, dtype=torch.float64).tolist()
with torch.no_grad():
    moved = {eta: dh.score(tiny, responses, tiny.shifted(v, eta)) for eta in [-steps[0], *steps]}
mean_log_s = {eta: float(pi_old @ (scores.log_probs - old.log_probs).mean(1)) for eta, scores in moved.items()}
entropy_old = -pi_old @ old.log_probs.mean(1)
entropy_change = {eta: float(-dh.exact.probabilities(scores) @ scores.log_probs.mean(1) - entropy_old)
                  for eta, scores in moved.items()}
_, slopes = torch.func.jvp(lambda p: dh.score(tiny, responses, p).log_probs, (tiny.shifted(v, 0.0),), (v,))

# %%
figure, axes = plt.subplots()
axes.loglog(steps, [-mean_log_s[eta] for eta in steps], "o-", label=r"$-\mathbb{E}[\log s]$ = KL per token")
axes.loglog(steps, [abs(entropy_change[eta]) for eta in steps], "s--",
            label=r"$|\Delta\mathcal{H}|$ of the policy per token")
axes.set(xlabel="step size η (length of the step)", ylabel="nats per token",
         title="The weight's exponent is a divergence, not an entropy change")
axes.legend()
dh.figures.save(figure, results, "01-divergence-not-entropy")

# %% [markdown]
# *Two quantities that share a name. The dip on the dashed line is a change of sign: this step first raises the
# policy's entropy and then lowers it, while the mean of* $\log s$ *only ever falls.*
#
# The ledger compares both with their formulas: the mean over the smallest step and its opposite for the second order,
# half the difference for the first.

# %%
eta = steps[0]
second_order = (mean_log_s[eta] + mean_log_s[-eta]) / 2 / (-(eta**2) / 2 * pi_old @ slopes.sum(1).square() / length)
first_order = -(pi_old * old.log_probs.sum(1)) @ slopes.sum(1) / length
change = (entropy_change[eta] - entropy_change[-eta]) / 2 / eta / first_order
ledger.holds("01.3", "derived here", "the mean of log s over π_old is −½η² E[(∇_v log π)²]/L (relative)",
             source="deltah", measured=second_order, expected=1, tolerance=1e-3,
             rules_out={"zero": 0, "half": 0.5, "the other sign": -1})
ledger.holds("01.4", "derived here", "the policy's entropy changes by −η E[log π ∇_v log π]/L: s is no measure of it",
             source="deltah", measured=change, expected=1, tolerance=1e-3,
             rules_out={"zero, as for log s": 0, "half": 0.5, "the other sign": -1})

# %% [markdown]
# ## 2 · The gradient weights each response by its perplexity ratio
#
# Differentiating $s=\exp(\frac1L\log\pi_\theta-\frac1L\log\pi_{\rm old})$ brings down $s$ itself:
#
# $$ \nabla_\theta\,\mathbb E_{\pi_{\rm old}}[s A]
#    =\mathbb E_{\pi_{\rm old}}\Big[\underbrace{\tfrac{\mathrm{PPL}_{\rm old}}{\mathrm{PPL}_\theta}}_{s}\,A\,
#     \tfrac1L\nabla_\theta\log\pi_\theta(y)\Big] . $$
#
# With the clip, a response loses its gradient when $A>0$ and $s>1+\varepsilon_{\rm high}$, or $A<0$ and
# $s<1-\varepsilon_{\rm low}$. Since $\log s=-\Delta H$, that is a band on the change of a response's cross-entropy
# <a id="01.16" href="#ledger-01.16">[01.16]</a>: with $A>0$ it may fall by $\log(1+\varepsilon_{\rm high})$, with $A<0$
# rise by $-\log(1-\varepsilon_{\rm low})$ nats per token, and what goes further counts no more. We let autograd
# differentiate the library's GSPO loss at a shifted $\theta$ and build the right-hand side by hand, response by
# response <a id="01.5" href="#ledger-01.5">[01.5]</a>.

# %%
theta = {name: p.requires_grad_() for name, p in tiny.shifted(v, 0.02).items()}
here = dh.score(tiny, responses, theta)
losses = dh.objectives.gspo(here.log_probs, old.log_probs, advantages, mask, clip_low=0.005, clip_high=0.005)
by_autograd = torch.autograd.grad((pi_old * losses.mean(1)).sum(), theta.values(), retain_graph=True)
by_response, = torch.autograd.grad(losses.sum(), here.log_probs, retain_graph=True)

# %%
delta_h = (cross_entropy_old.neg() - here.log_probs.mean(1)).detach()
low, high = torch.tensor([0.995, 1.005], dtype=torch.float64).log()
beyond = {"either side": (-delta_h > high) | (-delta_h < low),
          "A's side": ((advantages > 0) & (-delta_h > high)) | ((advantages < 0) & (-delta_h < low))}
no_gradient = (by_response == 0).all(1)
wrong = {name: int((outside != no_gradient).sum()) for name, outside in beyond.items()}
print(f"{no_gradient.double().mean():.0%} of the responses have lost their gradient")
ledger.holds("01.16", "clip", "clipping s to [1−ε, 1+ε] is a band on ΔH, on the side of A (responses that differ)",
             source=gspo_paper, measured=wrong["A's side"], expected=0, tolerance=0.5,
             rules_out={"on either side": wrong["either side"]})

# %%
gaps = {}
for name, exponent in (("weight s", 1.0), ("no weight", 0.0), ("weight 1/s", -1.0)):
    weights = -pi_old * torch.exp(-exponent * delta_h) * advantages * ~no_gradient
    by_formula = torch.autograd.grad((weights * here.log_probs.mean(1)).sum(), theta.values(), retain_graph=True)
    gaps[name] = max(float((p - q).abs().max()) for p, q in zip(by_autograd, by_formula, strict=True))
ledger.holds("01.5", "key findings", "∇J weights each unclipped response by s·A/L = (PPL_old/PPL_θ)·A/L (largest gap)",
             measured=gaps.pop("weight s"), expected=0, tolerance=1e-10, rules_out=gaps)

# %% [markdown]
# ## 3 · The 1/L law, without independence
#
# The paper derives $\mathrm{Var}(\log s)\propto1/L$ by taking the token log-ratios
# $x_t=\log r_t=\log\frac{\pi_\theta(y_t|y_{<t})}{\pi_{\rm old}(y_t|y_{<t})}$ to be about independent, and lists that
# as its main limitation: tokens of one sentence surely depend on each other. They do. But a *variance* only needs
# them uncorrelated, and to leading order they are, exactly, whatever the model
# <a id="01.6" href="#ledger-01.6">[01.6]</a>.
#
# Expand along the step: $x_t=\eta\,a_t+\tfrac{\eta^2}{2}b_t+\dots$ with the slopes $a_t$ from above. Given the prefix,
# probabilities sum to one, so
#
# $$ \mathbb E_{\pi_{\rm old}}[a_t\,|\,y_{<t}]=\sum_{y_t}\pi\,\nabla_v\log\pi=\nabla_v\sum_{y_t}\pi=0 . $$
#
# The $a_t$ are **martingale differences**. For $i<j$ the earlier one is known once $y_{<j}$ is, hence
# $\mathbb E[a_ia_j]=\mathbb E\big[a_i\,\mathbb E[a_j|y_{<j}]\big]=0$.

# %%
covariance = dh.exact.covariance(slopes, pi_old)
off_diagonal = covariance - covariance.diag().diag()
print("E[a_t²] by position:", covariance.diag().numpy().round(2))
ledger.holds("01.6", "limitations", "to leading order, log-ratios of different tokens are uncorrelated under π_old "
             "(largest covariance, relative)", measured=off_diagonal.abs().max() / covariance.diag().max(), expected=0,
             tolerance=1e-10, rules_out={"a correlation of 0.01": 0.01})

# %% [markdown]
# Uncorrelated is not independent. If the $a_t$ were independent, so would be their squares; and those are correlated
# plainly <a id="01.7" href="#ledger-01.7">[01.7]</a>, because a prefix decides how far the later distributions can
# move.

# %%
of_squares = dh.exact.covariance(slopes.square(), pi_old)
scale = of_squares.diag().sqrt()
largest = (of_squares / scale / scale[:, None]).triu(1).abs().max()
print(f"largest correlation between a_i² and a_j²: {largest:.2f}")
ledger.refuted("01.7", "limitations", "the token log-ratios are about independent (largest correlation of squares)",
               measured=largest, expected=0, tolerance=0.1,
               counterexample="their squares are correlated, on a random four-token policy")

# %% [markdown]
# What is left over at finite $\eta$? Call the **off-diagonal share** the part of $\mathrm{Var}(\sum_t x_t)$ that
# comes from pairs $i\ne j$. Its first contribution is a product of orders $\eta$ and $\eta^2$, relative to a
# variance of order $\eta^2$: the share vanishes linearly. We can even say with which slope. Differentiating
# $\sum\pi=1$ twice gives $\mathbb E[b_j|y_{<j}]=-\mathbb E[a_j^2|y_{<j}]$, and so
#
# $$ \text{off-diagonal share}=-\eta\;\frac{\sum_{i<j}\mathbb E[a_i\,a_j^2]}{\sum_i\mathbb E[a_i^2]}+O(\eta^2) $$
#
# <a id="01.8" href="#ledger-01.8">[01.8]</a>: the share is positive when moving *up* early is followed by *small*
# Fisher information later. The arithmetic ratios $r_t$ do better still: $\mathbb E[r_t\,|\,y_{<t}]=1$ holds without any
# expansion, so the $r_t-1$ are martingale differences at every step size <a id="01.9" href="#ledger-01.9">[01.9]</a>.

# %%
of_pairs = torch.einsum("n,ni,nj->ij", pi_old, slopes, slopes.square()).triu(1).sum()
predicted_slope = float(-of_pairs / covariance.diag().sum())
rows = []
for eta in (-0.001, 0.001, 0.01, 0.1, 1.0):
    with torch.no_grad():
        log_ratio = dh.score(tiny, responses, tiny.shifted(v, eta)).log_probs - old.log_probs
    covariances = [dh.exact.covariance(terms, pi_old) for terms in (log_ratio, log_ratio.exp())]
    shares = [1 - c.trace() / c.sum() for c in covariances]
    rows.append({"η": eta, "share, log r": shares[0], "share / η": shares[0] / eta, "share, r": shares[1]})
exact_shares = pd.DataFrame(rows).astype(float).set_index("η")
print(f"predicted slope {predicted_slope:.3f}")
exact_shares.round(4) + 0.0

# %%
ledger.holds("01.8", "derived here", "the off-diagonal share of Var(log s) vanishes linearly in η, with that slope",
             source="deltah", measured=exact_shares["share / η"].iloc[:2].mean(), expected=predicted_slope,
             tolerance=1e-2, rules_out={"zero": 0, "half": predicted_slope / 2, "the other sign": -predicted_slope})
ledger.holds("01.9", "derived here", "for arithmetic ratios the off-diagonal share is 0 at every η", source="deltah",
             measured=exact_shares["share, r"].abs().max(), expected=0, tolerance=1e-8,
             rules_out={"as for log r": exact_shares["share, log r"].abs().max()})

# %% [markdown]
# So the law reads $\mathrm{Var}(\log s)=\frac1L\cdot\frac1L\sum_t\mathbb E[x_t^2]$ to leading order: $1/L$ times the
# mean squared log-ratio of a token. It is a pure $1/L$ only if that mean does not itself depend on $L$, which is a
# fact about the model to be measured, and the assumption that one should worry about instead.
#
# ## 4 · Real rollouts, real steps
#
# Now the shipped policy, a transformer that solves half of its word problems, or whatever `model` names. One batch is
# for the update. A second batch, of other prompts, is *fresh*: the updates will know nothing of it.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
last = min(update_prompts + fresh_prompts, len(table))
own = dh.sample(policy, table.select(range(update_prompts)), 8, max_new_tokens, seed=seed)
fresh = dh.sample(policy, table.select(range(update_prompts, last)), 1, max_new_tokens, seed=seed + 1)
own = own.replace(advantages=dh.objectives.group_advantages(own.rewards, own.prompt_index))
with torch.no_grad():
    old_own, old_fresh = (dh.score(policy, rollouts).log_probs for rollouts in (own, fresh))

# %%
lengths = fresh.lengths.double()
print(f"update: {len(own)} rollouts, mean reward {own.rewards.mean():.2f}")
print(f"fresh:  {len(fresh)} rollouts, length {lengths.mean():.0f} ± {lengths.std():.0f} tokens")

# %% [markdown]
# At each learning rate we start again from the shipped policy and train as GSPO does: the batch in four minibatches,
# one AdamW step for each, clipping at the paper's $3\cdot10^{-4}$ and $4\cdot10^{-4}$. Then we keep the token
# log-ratios $x_t$ on both batches.

# %%
log_ratios = {}
for learning_rate in learning_rates:
    trained = dh.load_policy(model, device, dtype)
    optimizer = torch.optim.AdamW(trained.parameters.values(), lr=learning_rate)
    for minibatch in torch.arange(len(own)).chunk(4):
        dh.training.policy_gradient_step(trained, own.select(minibatch), old_own[minibatch], "gspo", optimizer)
    with torch.no_grad():
        for name, rollouts, before in (("own", own, old_own), ("fresh", fresh, old_fresh)):
            log_ratios[name, learning_rate] = (dh.score(trained, rollouts).log_probs - before).double()
batches = {"own": own, "fresh": fresh}
small, acting, large = learning_rates[0], learning_rates[1], learning_rates[-1]

# %% [markdown]
# ### The clip range as a band in nats
#
# In nats per token, clipping $s$ to $[1-\varepsilon_{\rm low},\,1+\varepsilon_{\rm high}]$ is this band:

# %%
ranges = pd.DataFrame({"GSPO, mean of a sequence": [1 - 3e-4, 1 + 4e-4], "PPO, one token": [1 - 0.2, 1 + 0.2]},
                      index=["lower edge, nats", "upper edge, nats"])
ranges.map(lambda edge: f"{torch.tensor(edge, dtype=torch.float64).log():+.5f}")

# %% [markdown]
# GSPO's band is some five hundred times narrower, but it is laid on a mean over $L$ tokens, whose spread is smaller by
# $\sqrt L$. How many real rollouts leave it, and how many tokens leave PPO's? A GSPO rollout outside the band and
# moving the way its advantage asks loses its gradient altogether.

# %%
def outside(x, low, high):
    return ((x < torch.tensor(1 - low).log()) | (x > torch.tensor(1 + high).log())).double()

rows = []
for (name, learning_rate), log_ratio in log_ratios.items():
    rollouts = batches[name]
    sequences = dh.Estimate.mean(outside(log_ratio.sum(1) / rollouts.lengths, 3e-4, 4e-4), rollouts.prompt_index)
    tokens = dh.Estimate.ratio(outside(log_ratio, 0.2, 0.2).sum(1), rollouts.lengths, rollouts.prompt_index)
    rows += [{"rollouts": name, "learning rate": learning_rate, "range": range_, "share": estimate}
             for range_, estimate in (("GSPO's, sequences", sequences), ("PPO's, tokens", tokens))]
clipped = pd.DataFrame(rows)
dh.figures.pivot(clipped, "share", index="learning rate", columns=["range", "rollouts"])

# %%
figure, axes = plt.subplots()
for i, ((range_, name), curve) in enumerate(clipped.groupby(["range", "rollouts"])):
    dh.figures.estimates(axes, curve["learning rate"] * 1.1 ** (i - 1.5), curve["share"], i,
                         f"{range_}, {name} rollouts")
axes.set(xscale="log", xlabel="AdamW learning rate", ylabel="share outside the range", ylim=(-0.03, 1.03),
         title="GSPO's range clips whole responses long before PPO's clips a token")
axes.legend()
dh.figures.save(figure, results, "01-clipped-share")

# %% [markdown]
# *Share of sequences outside GSPO's range and of tokens outside PPO's after four minibatch steps, with 95% intervals;
# points of one learning rate are set side by side.*
#
# At the second rate, where GSPO's band acts on about half of the responses, PPO's has hardly met a token
# <a id="01.17" href="#ledger-01.17">[01.17]</a>. Because the spread of $\log s$ shrinks with length while the band does
# not, the band should clip **short** responses more. We compare the shortest and the longest third of the fresh
# rollouts at that rate <a id="01.18" href="#ledger-01.18">[01.18]</a>.

# %%
log_ratio = log_ratios["fresh", acting]
log_s = log_ratio.sum(1) / lengths
left = outside(log_s, 3e-4, 4e-4)
too_far = left - outside(log_ratio, 0.2, 0.2).sum(1) / lengths
thirds = torch.tensor(pd.qcut(pd.Series(lengths.cpu()), 3, labels=False).to_numpy(), device=left.device)
is_third = torch.nn.functional.one_hot(thirds).double()
members = torch.cat([left[:, None] * is_third, is_third], 1)
for name, third in (("short", 0), ("middle", 1), ("long", 2)):
    print(f"{name:6} responses, {lengths[thirds == third].mean():2.0f} tokens: "
          f"{dh.Estimate.mean(left[thirds == third])} outside GSPO's band")

# %%
more_short = dh.Estimate.smooth(lambda means: means[0] / means[3] - means[2] / means[5], members)
ledger.holds("01.17", "derived here", "at the second learning rate, responses outside GSPO's range less tokens outside "
             "PPO's", source="deltah", measured=dh.Estimate.mean(too_far), expected=(0.0, math.inf), rules_out=0.0)
ledger.holds("01.18", "derived here", "the band clips short responses more (share, shortest third less longest)",
             source="deltah", measured=more_short, expected=(0.0, math.inf), rules_out=0.0)

# %% [markdown]
# ### The 1/L law, measured
#
# At the smallest learning rate the leading order should rule. In five bins of length we compare the mean of
# $(\log s)^2$ with what the martingale argument makes of it, $\frac1{L^2}\sum_tx_t^2$ with every cross term dropped,
# and with a pure $1/L$. The slope of its logarithm against that of the length would be 0 without
# any averaging, and $-1$ where tokens of long and short responses move alike; we ask whether it is below
# $-\frac12$ <a id="01.10" href="#ledger-01.10">[01.10]</a>. It need not be $-1$: ten other seeds have slopes from −2.0
# to −0.6, with errors near 0.2. All are negative, but three of them leave it open whether as fast as that.

# %%
log_ratio = log_ratios["fresh", small]
log_s, squares = log_ratio.sum(1) / lengths, log_ratio.square()
bins = pd.qcut(pd.Series(lengths.cpu()), 5, labels=False, duplicates="drop").to_numpy()
bins = torch.tensor(bins, device=log_s.device)
in_bin = torch.nn.functional.one_hot(bins).double()
bin_lengths = in_bin.T @ lengths / in_bin.sum(0)
centred = bin_lengths.log() - bin_lengths.log().mean()

def log_slope(means):
    totals, shares = means.view(2, -1)
    return (totals / shares).log() @ centred / centred.square().sum()

slope = dh.Estimate.smooth(log_slope, torch.cat([log_s.square()[:, None] * in_bin, in_bin], 1))
ledger.holds("01.10", "key results", "1/L variance reduction: Var(log s) falls with L, on fresh rollouts (log-log)",
             measured=slope, expected=(-math.inf, -0.5), rules_out={"no dependence on L": 0.0})
print(f"log-log slope of the mean of (log s)² against length: {slope}")

# %% [markdown]
# A bin of length selects responses by how they end, and inside it the theorem strictly says nothing. What it does cover
# is a response *cut after $k$ tokens*, whenever it would have ended: the cut depends on the prefix only. So we also
# take the sum of the first $k$ log-ratios of all fresh rollouts and divide its mean square by the mean sum of squares.
# For whole responses that ratio enters the ledger <a id="01.11" href="#ledger-01.11">[01.11]</a>, against what it
# would be if every two tokens of a response had a correlation of one hundredth. The theorem says 1. Of ten other seeds
# eight agree and rule that correlation out; one leaves it open, and on one the ratio is 0.90 ± 0.03, for such means of
# squares have tails that their intervals underrate.

# %%
cuts = [k for k in (1, 2, 4, 8, 16, 32) if k < log_ratio.shape[1]] + [log_ratio.shape[1]]
by_cut = [dh.Estimate.ratio(log_ratio[:, :k].sum(1).square(), squares[:, :k].sum(1)) for k in cuts]
little = 1 + 0.01 * float((lengths * (lengths - 1)).mean() / lengths.mean())
ledger.holds("01.11", "limitations", "on fresh rollouts Var(Σ x) = Σ Var(x), as if tokens were independent (ratio)",
             measured=by_cut[-1], expected=1.0, rules_out={"correlations of 0.01": little})
print(f"variance of the sum over sum of variances: {by_cut[-1]}; with correlations of 0.01 it would be {little:.2f}")

# %% [markdown]
# Does a token's own spread depend on the length of its response? Squares have tails too heavy to tell. Absolute values
# tell: tokens of the shortest third move further than those of the longest
# <a id="01.19" href="#ledger-01.19">[01.19]</a>. That is a departure from a pure $1/L$ which has nothing to do with
# dependence.

# %%
sizes = torch.stack([log_ratio.abs().sum(1) * (thirds == 0), lengths * (thirds == 0),
                     log_ratio.abs().sum(1) * (thirds == 2), lengths * (thirds == 2)], 1)
relative_size = dh.Estimate.smooth(lambda means: (means[0] / means[1]) / (means[2] / means[3]), sizes)
ledger.holds("01.19", "derived here", "tokens of short responses move further (mean |log r|, short third to long)",
             source="deltah", measured=relative_size, expected=(1.0, math.inf), rules_out={"the same": 1.0})
print(f"mean |log r| of a token, shortest to longest third: {relative_size}")

# %%
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.2))
for i, (name, terms) in enumerate({"measured": log_s.square(), "no cross terms": squares.sum(1) / lengths**2}.items()):
    dh.figures.estimates(left_axes, (bin_lengths + 0.7 * i).cpu(), [dh.Estimate.mean(terms[bins == b]) for b in
                                                                     range(len(bin_lengths))], i, name)
constant = squares.sum() / lengths.sum()
left_axes.plot(bin_lengths.cpu(), (constant / bin_lengths).cpu(), ":", color="0.4", label="pure 1/L")
left_axes.set(yscale="log", xlabel="response length L, tokens",
              ylabel=r"mean of $(\log s)^2$, nats² per token²", title="Longer responses spread less")
left_axes.legend()
dh.figures.estimates(right_axes, cuts, by_cut, 2, "responses cut after k tokens")
right_axes.axhline(1, color="0.3", linewidth=1)
right_axes.set(xscale="log", xlabel="cut k, tokens", ylabel="variance of the sum / sum of variances", ylim=(0.5, 1.5),
               title="Tokens add up as if they were independent")
dh.figures.save(figure, results, "01-length-law")

# %% [markdown]
# *Fresh rollouts, 95% intervals. Left: the spread falls with length; a wide interval is one rollout
# with an extreme token, and the squares without cross terms share it. Right: at every cut the variance of the sum is
# about the sum of the variances.*
#
# ### The update's own rollouts are another matter
#
# The proof needs $y\sim\pi_{\rm old}$ *independently of* $\theta$. Rollouts that made the update are not: $\theta$
# has seen them, and $\mathbb E[x_t|y_{<t}]\ne0$. GSPO's clip acts on exactly these rollouts. We compare both batches
# in two respects: how large $|\log s|$ is, and the off-diagonal share, the part of $\mathbb E[(\sum_tx_t)^2]$ that
# comes from pairs of tokens.

# %%
rows = []
for (name, learning_rate), log_ratio in log_ratios.items():
    rollouts = batches[name]
    size = dh.Estimate.mean((log_ratio.sum(1) / rollouts.lengths).abs(), rollouts.prompt_index)
    for kind, terms in (("log r", log_ratio), ("r − 1", log_ratio.expm1())):
        total = terms.sum(1).square()
        share = dh.Estimate.ratio(total - terms.square().sum(1), total, rollouts.prompt_index)
        rows.append({"rollouts": name, "learning rate": learning_rate, "terms": kind, "share": share, "size": size})
shares = pd.DataFrame(rows)
dh.figures.pivot(shares, "share", index="learning rate", columns=["terms", "rollouts"])

# %%
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.2))
for i, (name, curve) in enumerate(shares[shares.terms == "log r"].groupby("rollouts")):
    dh.figures.estimates(left_axes, curve["learning rate"] * 1.12 ** (i - 0.5), curve["size"], i, f"{name} rollouts")
left_axes.set(xscale="log", yscale="log", xlabel="AdamW learning rate", ylabel=r"mean of $|\log s|$, nats per token",
              title="At small rates own rollouts move further")
left_axes.legend()
for i, ((kind, name), curve) in enumerate(shares.groupby(["terms", "rollouts"])):
    dh.figures.estimates(right_axes, curve["learning rate"] * 1.12 ** (i - 1.5), curve["share"], i, f"{kind}, {name}")
right_axes.axhline(0, color="0.3", linewidth=1)
right_axes.set(xscale="log", xlabel="AdamW learning rate", ylabel="off-diagonal share",
               title="Fresh tokens add up singly until the step is large")
right_axes.legend(fontsize="small")
dh.figures.save(figure, results, "01-own-and-fresh")

# %% [markdown]
# *95% intervals; points of one learning rate are set side by side. On fresh rollouts the share of
# log-ratios is compatible with zero until the largest step. On the update's own rollouts it lies above zero where the
# rate is not small.*
#
# Three numbers of this figure enter the ledger. At the largest rate the cross terms of $\log r$ on fresh rollouts no
# longer vanish: their share is above that of $r-1$ on the same rollouts, which theory has at zero
# <a id="01.20" href="#ledger-01.20">[01.20]</a>. (The share of $r-1$ itself hangs on single tokens with a huge ratio;
# its interval is not to be trusted.) At the smallest rate the own rollouts' $|\log s|$ is larger than the fresh ones'
# <a id="01.21" href="#ledger-01.21">[01.21]</a>, and at the third their tokens move together
# <a id="01.22" href="#ledger-01.22">[01.22]</a>, which is clear on seven of ten other seeds.

# %%
at = shares.set_index(["rollouts", "learning rate", "terms"])
log_r, r_less_1 = log_ratios["fresh", large], log_ratios["fresh", large].expm1()
sums = torch.stack([term for x in (log_r, r_less_1) for term in (x.square().sum(1), x.sum(1).square())], 1)
more_log_r = dh.Estimate.smooth(lambda means: means[2] / means[3] - means[0] / means[1], sums)
both = torch.cat([log_ratios[name, small].sum(1) / batches[name].lengths for name in ("own", "fresh")]).abs()
is_own = torch.arange(len(both), device=both.device) < len(own)
clusters = torch.cat([own.prompt_index, own.prompt_index.max() + 1 + fresh.prompt_index])
samples = torch.stack([both * is_own, is_own.double(), both * ~is_own, (~is_own).double()], 1)
further = dh.Estimate.smooth(lambda means: means[0] / means[1] / (means[2] / means[3]), samples, clusters)

# %%
ledger.holds("01.20", "derived here", "at the largest η the cross terms of log r do not vanish (share, less r − 1's)",
             source="deltah", measured=more_log_r, expected=(0.0, math.inf), rules_out=0.0)
ledger.holds("01.21", "derived here", "at the smallest η the update's own rollouts move further (|log s|, to fresh)",
             source="deltah", measured=further, expected=(1.0, math.inf), rules_out={"the same": 1.0})
ledger.holds("01.22", "derived here", "at the third η the own rollouts' tokens move together (share)", source="deltah",
             measured=at.share["own", learning_rates[2], "log r"], expected=(0.0, math.inf), rules_out=0.0)
print(f"own to fresh rollouts, mean |log s| at learning rate {small:g}: {further}")

# %% [markdown]
# ## 5 · Arithmetic against geometric averaging
#
# GSPO's $s$ is the geometric mean of the token ratios. The alternative is their arithmetic mean
# $\bar r=\frac1L\sum_tr_t$, which is unbiased for 1. Geometric averaging is said to tame outliers. It tames those
# *above*, as it never exceeds the arithmetic mean: one token with $r=10$ adds $9/L$ to $\bar r$ and only $2.3/L$ to
# $\log s$. But it feels every token whose probability *collapses*: $r=0.01$ takes at most $1/L$ from $\bar r$, and
# $4.6/L$ from $\log s$. After the largest step the geometric mean of most fresh rollouts is further from one than
# their arithmetic mean <a id="01.14" href="#ledger-01.14">[01.14]</a>.

# %%
rows = []
for learning_rate in learning_rates[1:]:
    log_ratio = log_ratios["fresh", learning_rate]
    averages = {"arithmetic": 1 + log_ratio.expm1().sum(1) / lengths,
                "geometric": torch.exp(log_ratio.sum(1) / lengths)}
    rows += [{"learning rate": f"{learning_rate:g}", "mean": name, "smallest": weight.min(), "largest": weight.max(),
              "mean distance from 1": (weight - 1).abs().mean()} for name, weight in averages.items()]
distance = {name: (weight - 1).abs() for name, weight in averages.items()}
ledger.holds("01.14", "derived here", "after the largest step |s − 1| > |r̄ − 1| for most fresh responses (share)",
             source="deltah", measured=dh.Estimate.mean((distance["geometric"] > distance["arithmetic"]).double()),
             expected=(0.5, math.inf), rules_out={"half": 0.5})
pd.DataFrame(rows).set_index(["learning rate", "mean"]).astype(float).round(3)

# %%
figure, axes = plt.subplots()
furthest = max(d.quantile(0.995) for d in distance.values()).item()
edges = torch.linspace(1 - furthest, 1 + furthest, 52, dtype=torch.float64)
for i, (name, weight) in enumerate(averages.items()):
    axes.hist(weight.cpu().clamp(1 - furthest, 1 + furthest), bins=edges, histtype="step", linewidth=2,
              linestyle=dh.figures.DASHES[i], label=f"{name} mean")
axes.set(yscale="log", ylabel="fresh rollouts", ylim=(0.7, 2 * len(fresh)),
         xlabel=f"sequence weight at learning rate {large:g} (outermost bins hold what lies beyond)",
         title="Geometric averaging trades the upper tail for a lower one")
axes.legend(loc="upper right")
dh.figures.save(figure, results, "01-averages")

# %% [markdown]
# *Weights of the fresh rollouts after the largest step. The geometric mean has fewer outliers above, and pays with a
# tail below: a response that holds one collapsed token counts for little.*
#
# Which of the two has the larger variance? On the tiny policy the answer is exact: it depends on the direction. With
# $\bar a=\frac1L\sum_ta_t$, the two weights agree to first order in $\eta$ and differ by
# $\frac{\eta^2}2(\overline{a^2}-\bar a^2)$ at second, so that
#
# $$ \frac{\mathrm{Var}(\bar r)}{\mathrm{Var}(s)}
#    =1+\eta\,\frac{\mathrm{Cov}(\bar a,\;\overline{a^2}-\bar a^2)}{\mathrm{Var}(\bar a)}+\mathcal O(\eta^2) $$
#
# <a id="01.15" href="#ledger-01.15">[01.15]</a>. Whatever the sign of the slope is, the opposite step has the other.
# Along this gradient the sampled tokens that matter become likelier and $\bar r$ has the longer tail; against it, the
# same tokens collapse and $s$ has.

# %%
rows = []
for eta in (0.001, 0.01, 0.03, 0.1, 0.3):
    for sign, name in ((1, "along the gradient"), (-1, "against it")):
        with torch.no_grad():
            log_ratio = dh.score(tiny, responses, tiny.shifted(v, sign * eta)).log_probs - old.log_probs
        of_both = dh.exact.covariance(torch.stack([log_ratio.exp().mean(1), log_ratio.mean(1).exp()], 1), pi_old)
        rows.append({"η": eta, "direction": name, "Var r̄ / Var s": float(of_both[0, 0] / of_both[1, 1])})
by_direction = pd.DataFrame(rows).pivot(index="η", columns="direction", values="Var r̄ / Var s")
by_direction.round(3)

# %%
mean_slope = slopes.mean(1)
of_slopes = dh.exact.covariance(torch.stack([mean_slope, slopes.square().mean(1) - mean_slope.square()], 1), pi_old)
expected_slope = float(of_slopes[0, 1] / of_slopes[0, 0])
measured_slope = (by_direction["along the gradient"] - by_direction["against it"]).iloc[0] / 0.002
ledger.holds("01.15", "derived here", "Var(r̄)/Var(s) departs from 1 with a slope in η: either mean may vary more",
             source="deltah", measured=measured_slope, expected=expected_slope, tolerance=1e-2,
             rules_out={"zero": 0.0, "half": expected_slope / 2, "the other sign": -expected_slope})

# %% [markdown]
# ## What stands
#
# GSPO's weight *is* a perplexity ratio, and its clip *is* a band in nats per token. Its exponent is a divergence and
# says nothing of first order about the policy's entropy. The $1/L$ law needs no independence, only fresh rollouts and
# a small step; the rollouts one trains on are not fresh.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Make `learning_rates` finer around the step where the fresh log-ratio share leaves zero. Does the share grow
#    linearly there, and with which sign? Compare with the slope formula of section 3.
# 2. Set `update_prompts = 256`. By what factor does the own rollouts' off-diagonal share shrink, and why?
# 3. Choose $\varepsilon$ in proportion to $1/\sqrt L$ and plot the clipped share against length again.
# 4. Point `model` and `problems` at a model of your own, with `dtype = "float32"`.
#
# ## Further reading
#
# - *Group Sequence Policy Optimization*, arXiv 2507.18071: the objective and its clip range.
# - *Rethinking GSPO: the perplexity–entropy equivalence*, arXiv 2510.23142: the reading examined here.
# - Williams, D. *Probability with Martingales*, Cambridge 1991, chapter 12: why orthogonal increments are enough.
