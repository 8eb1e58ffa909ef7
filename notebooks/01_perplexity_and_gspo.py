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
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | $s(\theta)=\mathrm{PPL}_{\rm old}/\mathrm{PPL}_\theta=\exp(\Delta H)$ | 2510.23142, abstract |
# | 2 | the sequence objective weights each response's gradient by its perplexity ratio | 2510.23142, key findings |
# | 3 | clipping $s$ to $[1-\varepsilon,1+\varepsilon]$ is a band on the change of cross-entropy | 2507.18071; FORMULAS, laws |
# | 4 | $\mathrm{Var}(\log s)\propto 1/L$, if the token log-ratios are about independent | 2510.23142, key results and limitations |
# | 5 | geometric averaging tames the outliers of arithmetic averaging | 2510.23142, abstract |
#
# **You need** the policy gradient, and what a martingale is. **You will learn** when GSPO's clip range acts, on
# which responses, and why the rollouts that made an update must not be used to measure it.

# %%
import numpy as np
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
ledger = dh.Ledger("01", source="arXiv 2510.23142")

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
# This is algebra, and it holds to rounding. The sign needs care. In these notebooks $\Delta H$ is always *new minus
# old*; the paper's $\exp(\Delta H)$ is right only if its $\Delta H$ means *old minus new*, the information gained.

# %%
with torch.no_grad():
    new = dh.score(tiny, responses, tiny.shifted(v, 0.1))
ratio = (dh.exact.probabilities(new) / pi_old) ** (1 / length)
cross_entropy_old, cross_entropy_new = -old.log_probs.mean(1), -new.log_probs.mean(1)
perplexity_ratio = cross_entropy_old.exp() / cross_entropy_new.exp()
delta_h = cross_entropy_new - cross_entropy_old

# %%
ledger.holds("01.1", "abstract", "s = PPL_old / PPL_θ, for every response",
             measured=(ratio - perplexity_ratio).abs().max(), expected=0, tolerance=1e-12)
ledger.corrected("01.2", "abstract", "s = exp(ΔH), the cross-entropy change",
                 correction="s = exp(−ΔH) with ΔH = H_θ − H_old; the paper's ΔH is H_old − H_θ",
                 measured=(ratio / torch.exp(-delta_h)).max(), expected=1,
                 as_printed=(ratio / torch.exp(delta_h)).max(), tolerance=1e-10)

# %% [markdown]
# ### What this ΔH is not
#
# It is tempting to read $\exp(\Delta H)$ as a statement about the *policy's entropy*. It is not. Averaged over
# $\pi_{\rm old}$, the cross-entropy change is a divergence,
#
# $$ \mathbb E_{\pi_{\rm old}}[\log s]=-\tfrac1L\,\mathrm{KL}(\pi_{\rm old}\,\|\,\pi_\theta)\le 0 , $$
#
# never positive and of *second* order in $\eta$. The entropy of the policy, the subject of every later chapter, may
# move either way and does so at *first* order. For a small step the two differ by orders of magnitude.

# %%
steps = torch.logspace(-3, 0, 13, dtype=torch.float64).tolist()
with torch.no_grad():
    moved = [dh.score(tiny, responses, tiny.shifted(v, eta)) for eta in steps]
mean_log_s = torch.stack([pi_old @ (x.log_probs - old.log_probs).mean(1) for x in moved])
entropies = torch.stack([-dh.exact.probabilities(x) @ x.log_probs.mean(1) for x in moved])
entropy_change = entropies + pi_old @ old.log_probs.mean(1)

# %%
figure, axes = plt.subplots()
axes.loglog(steps, -mean_log_s, "o-", label=r"$-\mathbb{E}[\log s]$ = KL per token (slope 2)")
axes.loglog(steps, entropy_change.abs(), "s--", label=r"$|\Delta\mathcal{H}|$ of the policy per token (slope 1)")
axes.set(xlabel="step size η (length of the step)", ylabel="nats per token",
         title="The weight's exponent is a divergence, not an entropy change")
axes.legend()
dh.figures.save(figure, results, "01-divergence-not-entropy")

# %% [markdown]
# *Two quantities that share a name. The dip on the dashed line is a change of sign: this step first raises the
# policy's entropy and then lowers it, while the mean of* $\log s$ *only ever falls.*
#
# Both orders, from the two smallest steps, enter the ledger.

# %%
decades = torch.tensor(steps[1] / steps[0], dtype=torch.float64).log()
slope_kl = (mean_log_s[1] / mean_log_s[0]).log() / decades
slope_entropy = (entropy_change[1] / entropy_change[0]).log() / decades
ledger.holds("01.3", "derived here", "the mean of log s over π_old is −KL/L, of second order in η (log-log slope)",
             measured=slope_kl, expected=2, tolerance=0.05)
ledger.holds("01.4", "derived here", "the policy's own entropy changes at first order, so s is no measure of it",
             measured=slope_entropy, expected=1, tolerance=0.05)

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
# $s<1-\varepsilon_{\rm low}$. We let autograd differentiate the library's GSPO loss at a shifted $\theta$ and build
# the right-hand side by hand, response by response.

# %%
theta = {name: p.requires_grad_() for name, p in tiny.shifted(v, 0.02).items()}
here = dh.score(tiny, responses, theta)
losses = dh.objectives.gspo(here.log_probs, old.log_probs, advantages, mask, clip_low=0.005, clip_high=0.005)
by_autograd = torch.autograd.grad((pi_old * losses.mean(1)).sum(), theta.values(), retain_graph=True)

# %%
s = torch.exp(cross_entropy_old + here.log_probs.mean(1)).detach()
removed = ((advantages > 0) & (s > 1.005)) | ((advantages < 0) & (s < 0.995))
weights = -pi_old * s * advantages * ~removed
by_formula = torch.autograd.grad((weights * here.log_probs.mean(1)).sum(), theta.values())
gap = max((a - b).abs().max() for a, b in zip(by_autograd, by_formula, strict=True))
print(f"{removed.double().mean():.0%} of the responses clipped; largest gap zero to ten decimals: {gap < 1e-10}")
ledger.holds("01.5", "key findings", "∇J weights each unclipped response by s·A/L = (PPL_old/PPL_θ)·A/L",
             measured=gap, expected=0, tolerance=1e-10)

# %% [markdown]
# ## 3 · The 1/L law, without independence
#
# The paper derives $\mathrm{Var}(\log s)\propto1/L$ by taking the token log-ratios
# $x_t=\log r_t=\log\frac{\pi_\theta(y_t|y_{<t})}{\pi_{\rm old}(y_t|y_{<t})}$ to be about independent, and lists that
# as its main limitation: tokens of one sentence surely depend on each other. They do. But a *variance* only needs
# them uncorrelated, and to leading order they are, exactly, whatever the model.
#
# Expand along the step: $x_t=\eta\,a_t+\tfrac{\eta^2}{2}b_t+\dots$ with $a_t=\nabla_v\log\pi(y_t|y_{<t})$. Given the
# prefix, probabilities sum to one, so
#
# $$ \mathbb E_{\pi_{\rm old}}[a_t\,|\,y_{<t}]=\sum_{y_t}\pi\,\nabla_v\log\pi=\nabla_v\sum_{y_t}\pi=0 . $$
#
# The $a_t$ are **martingale differences**. For $i<j$ the earlier one is known once $y_{<j}$ is, hence
# $\mathbb E[a_ia_j]=\mathbb E\big[a_i\,\mathbb E[a_j|y_{<j}]\big]=0$. Forward-mode differentiation gives $a_t$ for all
# responses at once.

# %%
_, a = torch.func.jvp(lambda p: dh.score(tiny, responses, p).log_probs, (tiny.shifted(v, 0.0),), (v,))
covariance = dh.exact.covariance(a, pi_old)
off_diagonal = covariance - covariance.diag().diag()
print("E[a_t²] by position:", covariance.diag().numpy().round(2))
ledger.holds("01.6", "limitations", "to leading order, log-ratios of different tokens are uncorrelated under π_old",
             measured=off_diagonal.abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# Uncorrelated is not independent. If the $a_t$ were independent, so would be their squares; and those are correlated
# plainly, because a prefix decides how far the later distributions can move.

# %%
of_squares = dh.exact.covariance(a.square(), pi_old)
scale = of_squares.diag().sqrt()
largest = (of_squares / scale / scale[:, None]).triu(1).abs().max()
print(f"largest correlation between a_i² and a_j²: {largest:.2f}")
ledger.refuted("01.7", "limitations", "the token log-ratios are independent", measured=largest, expected=0,
               tolerance=0.05, counterexample="their squares are correlated, on a random four-token policy")

# %% [markdown]
# What is left over at finite $\eta$? Call the **off-diagonal share** the part of $\mathrm{Var}(\sum_t x_t)$ that
# comes from pairs $i\ne j$. Its first contribution is a product of orders $\eta$ and $\eta^2$, relative to a
# variance of order $\eta^2$: the share vanishes linearly. We can even say with which slope. Differentiating
# $\sum\pi=1$ twice gives $\mathbb E[b_j|y_{<j}]=-\mathbb E[a_j^2|y_{<j}]$, and so
#
# $$ \text{off-diagonal share}=-\eta\;\frac{\sum_{i<j}\mathbb E[a_i\,a_j^2]}{\sum_i\mathbb E[a_i^2]}+O(\eta^2) : $$
#
# the share is positive when moving *up* early is followed by *small* Fisher information later. The arithmetic ratios
# $r_t$ do better still: $\mathbb E[r_t\,|\,y_{<t}]=1$ holds without any expansion, so the $r_t-1$ are martingale
# differences at every step size.

# %%
etas = [0.001, 0.01, 0.1, 1.0]
predicted_slope = -torch.einsum("n,ni,nj->ij", pi_old, a, a.square()).triu(1).sum() / covariance.diag().sum()
rows = []
for eta in etas:
    with torch.no_grad():
        x = dh.score(tiny, responses, tiny.shifted(v, eta)).log_probs - old.log_probs
    covariances = [dh.exact.covariance(terms, pi_old) for terms in (x, x.exp())]
    shares = [1 - c.trace() / c.sum() for c in covariances]
    rows.append({"η": eta, "share, log r": shares[0], "share / η": shares[0] / eta, "share, r": shares[1]})
exact_shares = pd.DataFrame(rows).astype(float).set_index("η")
print(f"predicted slope {predicted_slope:.3f}")
exact_shares.round(4) + 0.0

# %%
slopes = exact_shares["share / η"]
ledger.holds("01.8", "derived here", "the off-diagonal share of Var(log s) vanishes linearly in η, with the slope above",
             measured=slopes.iloc[0], expected=predicted_slope, tolerance=0.02)
ledger.holds("01.9", "derived here", "for arithmetic ratios the off-diagonal share is 0 at every η",
             measured=exact_shares["share, r"].abs().max(), expected=0, tolerance=1e-8)

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
    for rows in torch.arange(len(own)).chunk(4):
        dh.training.policy_gradient_step(trained, own.select(rows), old_own[rows], "gspo", optimizer)
    with torch.no_grad():
        for name, rollouts, before in (("own", own, old_own), ("fresh", fresh, old_fresh)):
            log_ratios[name, learning_rate] = (dh.score(trained, rollouts).log_probs - before).double()

# %% [markdown]
# ### The clip range as a band in nats
#
# Since $\log s=-\Delta H$, clipping $s$ to $[1-\varepsilon_{\rm low},\,1+\varepsilon_{\rm high}]$ is a band on the
# change of a response's cross-entropy, in nats per token:

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
    return (x < torch.tensor(1 - low).log()) | (x > torch.tensor(1 + high).log())

rows = []
for (name, learning_rate), x in log_ratios.items():
    rollouts = {"own": own, "fresh": fresh}[name]
    log_s = x.sum(1) / rollouts.lengths
    sequences = dh.Estimate.mean(outside(log_s, 3e-4, 4e-4).double(), rollouts.prompt_index)
    tokens = dh.Estimate.ratio(outside(x, 0.2, 0.2).double().sum(1), rollouts.lengths, rollouts.prompt_index)
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
# Because the spread of $\log s$ shrinks with length while the band does not, the band should clip **short** responses
# more. We compare the shortest and the longest third of the fresh rollouts at the step size where the band is about to
# act.

# %%
x = log_ratios["fresh", learning_rates[1]]
log_s = x.sum(1) / fresh.lengths
thirds = pd.qcut(pd.Series(lengths.cpu()), 3, labels=["short", "middle", "long"])
left = outside(log_s, 3e-4, 4e-4).double().cpu()
for third in ("short", "middle", "long"):
    chosen = torch.tensor((thirds == third).to_numpy())
    print(f"{third:6} responses, {lengths.cpu()[chosen].mean():2.0f} tokens: "
          f"{dh.Estimate.mean(left[chosen]).value:.2f} outside GSPO's band")

# %% [markdown]
# ### The 1/L law, measured
#
# At this learning rate the leading order should rule. In bins of length we compare the mean of $(\log s)^2$ with what
# the martingale argument makes of it, $\frac1{L^2}\sum_tx_t^2$ with every cross term dropped, and with a pure $1/L$.

# %%
bins = pd.qcut(pd.Series(lengths.cpu()), 5, labels=False, duplicates="drop").to_numpy()
rows = []
for b in range(bins.max() + 1):
    chosen = torch.tensor(bins == b, device=x.device)
    whole, diagonal = log_s[chosen].square(), x[chosen].square().sum(1) / lengths[chosen].square()
    rows.append({"length": float(lengths[chosen].mean()), "measured": dh.Estimate.mean(whole),
                 "no cross terms": dh.Estimate.mean(diagonal)})
by_length = pd.DataFrame(rows)

# %%
points = pd.DataFrame({name: by_length["measured"].map(lambda e, name=name: getattr(e, name)) for name in
                       ("value", "standard_error")})
fit, errors = np.polyfit(np.log(by_length["length"]), np.log(points["value"]), 1, cov="unscaled",
                         w=points["value"] / points["standard_error"])
slope = dh.Estimate(fit[0], errors[0, 0] ** 0.5, len(points))
print(f"log-log slope of the spread against length: {slope}")
ledger.holds("01.10", "key results", "Var(log s) ∝ 1/L on fresh rollouts (log-log slope, 4 s.e.)",
             measured=slope.value, expected=-1, tolerance=4 * slope.standard_error)

# %% [markdown]
# A bin of length selects responses by how they end, and inside it the theorem strictly says nothing. What it does cover
# is a response *cut after $k$ tokens*, whenever it would have ended: the cut depends on the prefix only. So we also take
# the sum of the first $k$ log-ratios of all fresh rollouts and divide its mean square by the sum of squares.

# %%
cuts = [1, 2, 4, 8, 16, 32, max_new_tokens]
sums, squares = x.cumsum(1), x.square().cumsum(1)
by_cut = [dh.Estimate.ratio(sums[:, min(k, x.shape[1]) - 1].square(), squares[:, min(k, x.shape[1]) - 1]) for k in cuts]

# %%
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.2))
for i, name in enumerate(("measured", "no cross terms")):
    dh.figures.estimates(left_axes, by_length["length"] * 1.03**i, by_length[name], i, name)
constant = (by_length["no cross terms"].map(lambda e: e.value) * by_length["length"]).mean()
left_axes.plot(by_length["length"], constant / by_length["length"], ":", color="0.4", label="pure 1/L")
left_axes.set(ylim=(0, None), xlabel="response length L, tokens", ylabel=r"mean of $(\log s)^2$, nats² per token²",
              title="Longer responses spread less")
left_axes.legend()
dh.figures.estimates(right_axes, cuts, by_cut, 2, "responses cut after k tokens")
right_axes.axhline(1, color="0.3", linewidth=1)
right_axes.set(xscale="log", xlabel="cut k, tokens", ylabel="variance of the sum / sum of variances", ylim=(0.5, 1.5),
               title="Tokens add up as if they were independent")
dh.figures.save(figure, results, "01-length-law")

# %% [markdown]
# *Fresh rollouts, 95% intervals. Left: the spread falls with length, and where it departs from* $1/L$ *the squares
# without cross terms depart with it; one wide interval is one rollout with an extreme token. Right: at every cut the
# variance of the sum is the sum of the variances. What the $1/L$ law leaves out is not dependence between tokens; it is
# that tokens of short and of long answers move by different amounts.*
#
# ### The update's own rollouts are another matter
#
# The proof needs $y\sim\pi_{\rm old}$ *independently of* $\theta$. Rollouts that made the update are not: $\theta$
# has seen them, and $\mathbb E[x_t|y_{<t}]\ne0$. GSPO's clip acts on exactly these rollouts. We compare both batches
# in two respects: how far $\log s$ spreads, and the off-diagonal share, the part of $\mathbb E[(\sum_tx_t)^2]$ that
# comes from pairs of tokens.

# %%
rows = []
for (name, learning_rate), x in log_ratios.items():
    rollouts = {"own": own, "fresh": fresh}[name]
    spread = dh.Estimate.mean((x.sum(1) / rollouts.lengths).square(), rollouts.prompt_index)
    for kind, terms in (("log r", x), ("r − 1", x.expm1())):
        total = terms.sum(1).square()
        share = dh.Estimate.ratio(total - terms.square().sum(1), total, rollouts.prompt_index)
        rows.append({"rollouts": name, "learning rate": learning_rate, "terms": kind, "share": share, "spread": spread})
shares = pd.DataFrame(rows)
dh.figures.pivot(shares, "share", index="learning rate", columns=["terms", "rollouts"])

# %%
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.2))
for i, (name, curve) in enumerate(shares[shares.terms == "log r"].groupby("rollouts")):
    dh.figures.estimates(left_axes, curve["learning rate"], curve["spread"], i, f"{name} rollouts")
left_axes.set(xscale="log", yscale="log", xlabel="AdamW learning rate",
              ylabel=r"mean of $(\log s)^2$, nats² per token²", title="Own rollouts spread further")
left_axes.legend()
for i, ((kind, name), curve) in enumerate(shares.groupby(["terms", "rollouts"])):
    dh.figures.estimates(right_axes, curve["learning rate"] * 1.12 ** (i - 1.5), curve["share"], i, f"{kind}, {name}")
right_axes.axhline(0, color="0.3", linewidth=1)
right_axes.set(xscale="log", xlabel="AdamW learning rate", ylabel="off-diagonal share",
               title="and their tokens move together")
right_axes.legend()
dh.figures.save(figure, results, "01-own-and-fresh")

# %% [markdown]
# *95% intervals; on the right, points of one learning rate are set side by side. On fresh rollouts the share is
# compatible with zero for log-ratios until the largest step, and for* $r-1$ *even there, as the theory says. On the
# update's own rollouts it is positive, however small the step, and the weights spread further.*

# %%
at = shares.set_index(["rollouts", "learning rate", "terms"])
small, large = learning_rates[0], learning_rates[-1]
cross_small, cross_large = at.share["fresh", small, "log r"], at.share["fresh", large, "r − 1"]
ledger.holds("01.11", "limitations", "on fresh rollouts of the transformer the cross terms vanish at small η (4 s.e.)",
             measured=cross_small.value, expected=0, tolerance=4 * cross_small.standard_error)
ledger.holds("01.12", "derived here", "for arithmetic ratios they vanish at the largest η too (4 s.e.)",
             measured=cross_large.value, expected=0, tolerance=4 * cross_large.standard_error)
inflation = at.spread["own", small, "log r"].value / at.spread["fresh", small, "log r"].value
print(f"at learning rate {small:g} the own rollouts' mean (log s)² is {inflation:.0f} times the fresh ones'")

# %% [markdown]
# ## 5 · Arithmetic against geometric averaging
#
# GSPO's $s$ is the geometric mean of the token ratios. The alternative is their arithmetic mean
# $\bar r=\frac1L\sum_tr_t$, which is unbiased for 1. Geometric averaging is said to tame outliers. It tames those
# *above*: one token with $r=10$ adds $9/L$ to $\bar r$ and only $2.3/L$ to $\log s$. But it feels every token whose
# probability *collapses*: $r=0.01$ takes at most $1/L$ from $\bar r$, and $4.6/L$ from $\log s$.

# %%
rows = []
for learning_rate in learning_rates[1:]:
    x = log_ratios["fresh", learning_rate]
    averages = {"arithmetic": 1 + x.expm1().sum(1) / lengths, "geometric": torch.exp(x.sum(1) / lengths)}
    rows += [{"learning rate": f"{learning_rate:g}", "mean": name, "smallest": weight.min(), "largest": weight.max(),
              "standard deviation": weight.std(), "without ten extremes": weight.sort().values[5:-5].std()}
             for name, weight in averages.items()]
pd.DataFrame(rows).set_index(["learning rate", "mean"]).astype(float).round(3)

# %%
figure, axes = plt.subplots()
furthest = max((weight - 1).abs().quantile(0.995) for weight in averages.values()).item()
for i, (name, weight) in enumerate(averages.items()):
    axes.hist(weight.cpu().clamp(1 - furthest, 1 + furthest), bins=torch.linspace(1 - furthest, 1 + furthest, 52),
              histtype="step", linewidth=2, linestyle=dh.figures.DASHES[i], label=f"{name} mean")
axes.set(yscale="log", ylabel="fresh rollouts",
         xlabel=f"sequence weight at learning rate {learning_rate:g} (outermost bins hold what lies beyond)", ylim=(0.7, 2000), title="Geometric averaging trades the upper tail for a lower one")
axes.legend(loc="upper right")
dh.figures.save(figure, results, "01-averages")

# %% [markdown]
# *Weights of the fresh rollouts after the largest step. The geometric mean has no outliers above, and pays with a tail
# below: a response that holds one collapsed token counts for little.*
#
# Which of the two has the larger variance? On the tiny policy the answer is exact: it depends on the direction. Along
# the gradient the sampled tokens that matter become likelier and $\bar r$ has the longer tail; against it, the same
# tokens collapse and $s$ has. To first order in $\eta$ the ratio of variances departs from one by an odd function.

# %%
rows = []
for eta in (0.01, 0.03, 0.1, 0.3):
    for sign, name in ((1, "along the gradient"), (-1, "against it")):
        with torch.no_grad():
            x = dh.score(tiny, responses, tiny.shifted(v, sign * eta)).log_probs - old.log_probs
        both = dh.exact.covariance(torch.stack([x.exp().mean(1), x.mean(1).exp()], 1), pi_old)
        rows.append({"η": eta, "direction": name, "variance ratio": float(both[0, 0] / both[1, 1])})
by_direction = pd.DataFrame(rows).pivot(index="η", columns="direction", values="variance ratio")
by_direction.round(3)

# %%
ledger.holds("01.13", "derived here", "the geometric mean never exceeds the arithmetic one: it has no outliers above",
             measured=(averages["geometric"] - averages["arithmetic"]).max().clamp(min=0), expected=0, tolerance=1e-9)
ledger.refuted("01.14", "abstract", "geometric averaging reduces the weight's variance (ratio ≤ 1), in any direction",
               counterexample="a step of 0.1 against the gradient of the tiny policy",
               measured=1 / by_direction["against it"][0.1], expected=1, tolerance=0.05)
ledger.holds("01.15", "derived here", "to first order in η the variance ratio departs from 1 by an odd function",
             measured=by_direction["along the gradient"][0.01] + by_direction["against it"][0.01], expected=2,
             tolerance=0.01)

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
