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
# # 02 · Rao–Blackwell and other entropy estimators
#
# The entropy of a policy is one number, $\mathcal H=-\mathbb E[\log\pi(t|p)]$, and there are several ways to estimate it
# from rollouts. This chapter settles which is best and why, shows that the notes' proof that Rao–Blackwellisation always
# helps is wrong, gives the estimator that never loses, and says how many prompts a heavy-tailed entropy needs.
#
# **What is checked**, all from *RL studies*, sections 2.2.2, 2.2.4 and 2.2.5:
#
# | | statement |
# |---|---|
# | 1 | $\hat H_{RB}=-\frac1G\sum_n\sum_k\sum_{t_k}\pi\log\pi$ is unbiased, through four displayed steps |
# | 2 | the proposition $\mathrm{Var}(S_{RB})\le\mathrm{Var}(S)$ for whole sequences, every line of its proof, its remark |
# | 3 | $H=Z-\sum_a p_az_a$, and the decomposition of the entropy over a subset of tokens |
# | 4 | the heavy right tail, and what control variates can do about it |
#
# **You need** conditional expectations. **You will learn** to choose an estimator, and to put an honest error on it.

# %%
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import wasserstein_distance

import deltah as dh
from deltah.entropy import METHODS, UNITS

dh.figures.use_style()

# %% tags=["parameters"]
model = "../data/policy"          # a folder or a Hugging Face hub id
problems = "../data/problems"     # a folder, a file or a hub id
gsm8k = "../../shared/data/gsm8k" # a second set of problems to compare with; left out when it is not there
device = "auto"
dtype = "float64"                 # keeps the printed digits the same everywhere; float32 for large models
results = "../results/default"
seed = 0
prompts = 384                     # each with `responses` responses
responses = 4
gsm8k_prompts = 64
max_new_tokens = 64
replicates = 2000                 # of each coverage

# %%
ledger = dh.Ledger("02", source="RL studies")

# %% [markdown]
# ## 1 · Two estimators with one mean
#
# A response $t$ of $L$ tokens has the surprisal $S=\sum_kZ_k$ with $Z_k=-\log\pi(t_k|t_{<k},p)$. Its mean is the entropy;
# averaging it is the **Monte Carlo** estimator. The next-token entropy $H_k=\mathbb E[Z_k|t_{<k},p]$ is known exactly once
# the prefix is, and a forward pass returns it. Averaging $S_{RB}=\sum_kH_k$ is the **Rao–Blackwell** estimator.
#
# We take a policy that can be enumerated: three tokens, the first of which ends a response, at most four of them, two
# prompts of different lengths. The convention of section 2.2.2 is ours too: the first EOS counts, nothing after it does.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=0, seed=4)
every = dh.exact.every_response(tiny, prompts=[[1], [2, 1]], max_new_tokens=4)
with torch.no_grad():
    scores = dh.score(tiny, every)
pi = dh.exact.probabilities(scores)          # π(t|p)
joint = pi / 2                               # π(t|p) D(p), with both prompts equally likely
Z, H = -scores.log_probs, scores.entropies
truth = -joint @ pi.log()
print(f"{len(every)} responses; entropy {truth:.4f} nats; mean length {joint @ every.lengths.double():.2f} tokens")

# %% [markdown]
# The notes show that $\hat H_{RB}$ is unbiased in four steps: the inner sum does not depend on $t_k$, so the expectation
# runs over prefixes only; renaming makes it $\sum_t\pi(t|p)\log\pi(t_k|t_{<k})$; summing over $k$ gives
# $\sum_t\pi\log\pi$; and prompts average outside. We check the middle steps position by position, and the sums.

# %%
by_prefix = joint @ H                                        # Σ over prefixes of π(t_<k) H_k, for each k
by_token = joint @ Z                                         # −Σ_t π(t|p) log π(t_k|t_<k), for each k
print("entropy by position:", by_prefix.numpy().round(4), " sum", by_prefix.sum().numpy().round(4))
ledger.holds("02.1", "2.2.4", "E over t_k and t_>k drops out of E[Σ π log π]: prefixes remain, position by position",
             measured=(by_prefix - by_token).abs().max(), expected=0, tolerance=1e-12)
ledger.holds("02.2", "2.2.4", "the sum over k is Σ_t π(t|p) log π(t|p) = −𝓗: Ĥ_RB is unbiased",
             measured=by_prefix.sum(), expected=truth, tolerance=1e-12)
ledger.holds("02.3", "2.2.2", "with the first EOS counted and nothing after it, Σ_k E[H_k] is the sequence entropy",
             measured=(joint @ H.sum(1)), expected=truth, tolerance=1e-12)

# %% [markdown]
# The last display of that argument averages over prompts, and loses a sign: an entropy is printed equal to
# $\sum\pi D\log\pi$, which is negative. Its sampled form also lacks the sum over responses. With one prompt taken at a
# time, each with probability one half:

# %%
by_prompt = torch.stack([-(pi * pi.log())[every.prompt_index == p].sum() for p in (0, 1)])
one_response = (pi * pi.log())[[int((every.prompt_index == p).nonzero()[0]) for p in (0, 1)]].mean()
ledger.corrected("02.4", "2.2.4", "E_{t,p}[H] = Σ π(t|p) D(p) log π(t|p)", correction="the right-hand side needs a minus",
                 measured=truth, expected=-(joint * pi.log()).sum(), as_printed=(joint * pi.log()).sum(),
                 tolerance=1e-12)
ledger.corrected("02.5", "2.2.4", "sampling prompts: → (1/B) Σ_n π(t|p_n) log π(t|p_n)",
                 correction="−(1/B) Σ_n Σ_t π(t|p_n) log π(t|p_n): a minus, and the sum over responses",
                 measured=by_prompt.mean(), expected=truth, as_printed=one_response, tolerance=1e-12)

# %% [markdown]
# ## 2 · The proposition, and three responses that refute it
#
# *Proposition (notes, 2.2.4): $\mathrm{Var}(S_{RB})\le\mathrm{Var}(S)$.* Conditioning lowers variance, so this sounds
# safe; but $S_{RB}$ conditions each term on a *different* prefix, and the sum is not one conditional expectation.
#
# Take two steps. The first token is $a$ with probability $2/3$ or $b$ with $1/3$. After $a$ the second token is a fair
# coin; after $b$ it is certain. So there are three responses, **each of probability 1/3**: the surprisal is $\log 3$
# whatever happens, and the Monte Carlo estimator has no variance at all. The next-token entropies are not constant: the
# second is $\log2$ after $a$ and $0$ after $b$. Hence
#
# $$ \mathrm{Var}(S)=0\;<\;\mathrm{Var}(S_{RB})=\tfrac23\cdot\tfrac13\,\log^22=\tfrac29\log^22 . $$

# %%
log_probs = torch.tensor([[2 / 3, 1 / 2], [2 / 3, 1 / 2], [1 / 3, 1]], dtype=torch.float64).log()
first = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
entropies = torch.tensor([[first, np.log(2)], [first, np.log(2)], [first, 0]], dtype=torch.float64)
three = dh.Rollouts(torch.zeros(3, 3).long(), torch.ones(3, 3).bool(), torch.ones(3, 2).bool(), torch.arange(3))
thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
counterexample = dh.variance_decomposition(dh.TokenScores(log_probs, entropies), three, thirds)
(pd.Series(counterexample._asdict()).round(4) + 0.0).to_frame("nats²").T

# %%
ledger.refuted("02.6", "2.2.4", "Var(S_RB) ≤ Var(S) for whole sequences (excess of S_RB's variance is 0 or less)",
               counterexample="two steps, three responses of probability 1/3: Var(S) = 0, Var(S_RB) = (2/9) log² 2",
               measured=counterexample.rao_blackwell - counterexample.monte_carlo, expected=0, tolerance=0.05)
ledger.holds("02.7", "2.2.4", "the counterexample's Var(S_RB) is (2/9) log² 2", tolerance=1e-12,
             measured=counterexample.rao_blackwell, expected=2 / 9 * np.log(2) ** 2)

# %% [markdown]
# ### Where the proof fails
#
# With $D_k=Z_k-H_k$ and $\mathcal F_k=\sigma(p,t_{<k})$ we go through the proof line by line on the enumerable policy.
# The $D_k$ have mean zero given the prefix and are uncorrelated. (To see that, condition on $\mathcal F_j$, not on
# $\mathcal F_{j-1}$ as printed: $D_{j-1}$ needs $t_{j-1}$, which $\mathcal F_{j-1}$ does not hold.) The variance of their
# sum is the sum of the conditional variances.

# %%
D = torch.where(every.response_mask, Z - H, 0.0)
centred = H.sum(1) - joint @ H.sum(1)
covariance_D = dh.exact.covariance(D, joint)
given_first = torch.stack([(joint * (every.response_ids[:, 0] == token)) @ D[:, 1:3] for token in range(3)])
conditional = torch.where(every.response_mask, (Z - H).square(), 0.0)
ledger.holds("02.8", "2.2.4", "E[S] = Σ E[Z_k] = Σ E[E[Z_k|F_k]] = Σ E[H_k] = E[S_RB]", tolerance=1e-12,
             measured=joint @ Z.sum(1), expected=joint @ H.sum(1))
ledger.holds("02.9", "2.2.4", "H_k = E[Z_k|F_k], or E[D_k|F_k] = 0 (given the first token, k = 2)",
             measured=given_first[:, 0].abs().max(), expected=0, tolerance=1e-12)
ledger.holds("02.10", "2.2.4", "E[D_k|F_{k−1}] = 0 (given the first token, k = 3), and E[D_k] = 0",
             measured=torch.cat([joint @ D, given_first[:, 1]]).abs().max(), expected=0, tolerance=1e-12)
ledger.holds("02.11", "2.2.4", "the D_k are pairwise uncorrelated (given F_j; the printed F_{j−1} does not hold D_{j−1})",
             measured=(covariance_D - covariance_D.diag().diag()).abs().max(), expected=0, tolerance=1e-12)

# %%
terms = dh.variance_decomposition(scores, every, joint)
ledger.holds("02.12", "2.2.4", "Var(ΣD_k) = Σ E[D_k²] = Σ E[Var(Z_k|F_k)]", tolerance=1e-12,
             measured=terms.steps, expected=(joint @ conditional).sum())
ledger.holds("02.13", "2.2.4", "Var(S) = Var(S_RB) + Var(ΣD_k) + 2 Cov(S_RB, ΣD_k)", tolerance=1e-12,
             measured=joint @ (Z.sum(1) - truth).square(), expected=terms.rao_blackwell + terms.steps + terms.cross)

# %% [markdown]
# Then comes the mistake. Splitting $S_{RB}$ at $j$, the proof says that both $\sum_{k<j}H_k$ and $\sum_{k\ge j}H_k$ are
# known before $t_j$ is drawn. The first is. The second is not: $H_{j+1}$ depends on $t_j$, and whether a surprising token
# leads to an uncertain place is a property of the policy. The second covariance does not vanish, and with it goes the
# conclusion.

# %%
past = torch.stack([joint @ (H[:, :j].sum(1) * D[:, j]) for j in range(4)])
future = torch.stack([joint @ (H[:, j:].sum(1) * D[:, j]) for j in range(4)])
# Adding zero takes the sign off a rounded −0.
print("Cov with what came before:", past.abs().numpy().round(4),
      "  with what follows:", future.numpy().round(4) + 0.0)
ledger.holds("02.14", "2.2.4", "E[(Σ_{k<j} H_k) D_j] = 0", measured=past.abs().max(), expected=0, tolerance=1e-12)
ledger.refuted("02.15", "2.2.4", "E[(Σ_{k≥j} H_k) D_j] = 0", measured=future.abs().max(), expected=0, tolerance=0.01,
               counterexample="H_{j+1} depends on t_j: Σ_{k≥j} H_k is not F_j-measurable")
ledger.corrected("02.16", "2.2.4", "Var(S) = Var(S_RB) + Σ E[Var(Z_k|F_k)]", tolerance=1e-12,
                 correction="+ 2 Cov(S_RB, Σ D_k) = 2 Σ_{j<k} Cov(H_k, D_j)", measured=terms.monte_carlo,
                 expected=terms.rao_blackwell + terms.steps + 2 * future.sum(),
                 as_printed=terms.rao_blackwell + terms.steps)

# %% [markdown]
# The equality clause fails too: *equality if and only if every $\mathrm{Var}(Z_k|\mathcal F_k)=0$*. In the two-step
# family with $P(a)=q$, the counterexample has $q=2/3$ and $S$ wins; at small $q$ $S_{RB}$ wins. In between lies a $q$ at
# which the variances are equal although the tokens are random.

# %%
q = np.linspace(0.02, 0.98, 97)
surprisal = np.array([-np.log(q / 2), -np.log(q / 2), -np.log(1 - q)])
weights = np.array([q / 2, q / 2, 1 - q])
var_s = (weights * surprisal**2).sum(0) - (weights * surprisal).sum(0) ** 2
var_rb = q * (1 - q) * np.log(2) ** 2
crossings = q[1:][np.diff(np.sign(var_s - var_rb)) != 0]
print("Var(S) − Var(S_RB) changes sign near q =", crossings.round(2))
ledger.refuted("02.17", "2.2.4", "the variances are equal only if no token is random (sign changes of their difference)",
               counterexample="P(a) = q in the two-step family: equal variances at a q strictly between 0 and 1",
               measured=len(crossings), expected=0, tolerance=0.5)

# %% [markdown]
# ### What stays true
#
# The mean, and each single step: $\mathrm{Var}(H_k)\le\mathrm{Var}(Z_k)$. The whole is reduced exactly when
# $2\,\mathrm{Cov}(S_{RB},\sum D_k)\ge-\sum_k\mathbb E[\mathrm{Var}(Z_k|\mathcal F_k)]$: when surprising tokens do not, on
# balance, lead to more certain continuations. We draw a hundred random policies of the same shape and look.

# %%
def decomposition(seed):
    policy = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=0, seed=seed)
    rollouts = dh.exact.every_response(policy, prompts=[[1]], max_new_tokens=4)
    with torch.no_grad():
        scored = dh.score(policy, rollouts)
    return dh.variance_decomposition(scored, rollouts, dh.exact.probabilities(scored))

many = pd.DataFrame([decomposition(i)._asdict() for i in range(100)])
steps_hold = ((joint @ H.square() - (joint @ H) ** 2) - (joint @ Z.square() - (joint @ Z) ** 2)).max()
print(f"S_RB has the larger variance in {(many.rao_blackwell > many.monte_carlo).mean():.0%} of 100 random policies")
ledger.holds("02.18", "2.2.4", "each step's variance is reduced: Var(H_k) ≤ Var(Z_k) (largest excess)",
             measured=steps_hold.clamp(min=0), expected=0, tolerance=1e-12)

# %%
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.2))
worse = many.rao_blackwell > many.monte_carlo
for chosen, marker, label in ((~worse, "o", "Rao–Blackwell better"), (worse, "^", "Monte Carlo better")):
    left_axes.plot(many.steps[chosen], many.cross[chosen], marker, label=label)
limit = np.array([0, many.steps.max()])
left_axes.plot(limit, -limit, "--", color="0.3", label="cross = − steps")
left_axes.set(xlabel=r"steps, $\sum_k\mathrm{E[Var}(Z_k|F_k)]$, nats²", ylabel=r"cross, $2\,\mathrm{Cov}(S_{RB},\sum D_k)$, nats²",
              title="The cross term decides")
left_axes.legend()
c = np.linspace(-1.5, 1.5, 61)
for i, (name, row) in enumerate((("three responses", counterexample), ("the tiny policy", terms))):
    right_axes.plot(c, row.rao_blackwell + c**2 * row.steps + c * row.cross, dh.figures.DASHES[i], label=name)
    right_axes.plot([row.coefficient], [row.control_variate], dh.figures.MARKERS[i], color=f"C{i}")
right_axes.axvline(0, color="0.5", linewidth=1)
right_axes.axvline(1, color="0.5", linewidth=1)
right_axes.set(xlabel=r"c   (0: $S_{RB}$, 1: $S$)", ylabel=r"Var($S_{RB}+c\,\sum D_k$), nats²", title="The best c beats both")
right_axes.legend()
dh.figures.save(figure, results, "02-variance-decomposition")

# %% [markdown]
# *Left: a hundred random policies; below the dashed line Rao–Blackwellisation raises the variance. Right: the variance
# along the line through both estimators is a parabola; its minimum (marker) is never above either end.*
#
# ### The estimator that never loses
#
# $S_{RB}+c\sum_kD_k$ has the right mean for every $c$. The best one,
#
# $$ c^*=-\frac{\mathrm{Cov}(S_{RB},\sum D_k)}{\sum_k\mathbb E[\mathrm{Var}(Z_k|\mathcal F_k)]} , $$
#
# leaves $\mathrm{Var}(S_{RB})-\mathrm{Cov}^2/\mathrm{Var}(\sum D_k)$, at most the smaller of the two variances. A $c$
# fitted on the same rollouts would bias the mean. `dh.entropy(..., method="control_variate")` fits it for each fifth of
# the prompts on the other four fifths: independent of what it multiplies, it adds no bias.

# %%
never_worse = (many.control_variate - many[["monte_carlo", "rao_blackwell"]].min(axis=1)).max()
print(f"variance left on average: Rao–Blackwell {(many.rao_blackwell / many.monte_carlo).median():.2f}, best c "
      f"{(many.control_variate / many.monte_carlo).median():.2f} of Monte Carlo's (medians over the 100 policies)")
ledger.holds("02.19", "derived here", "Var(S_RB + c* ΣD_k) is at most the smaller of both (largest excess)",
             measured=max(never_worse, 0), expected=0, tolerance=1e-12)

# %% [markdown]
# ### Per token: the remark about S/L
#
# *For per-token reporting, replace $S$ and $S_{RB}$ by $S/L$ and $S_{RB}/L$; condition on $L$ first if it is random.* It
# is random with EOS, and conditioning on it spoils everything: given that a response will be short, the next token is
# likely EOS, so $\mathbb E[D_k|\mathcal F_k,L]\ne0$. The two averages then have different means. What works is the ratio
# of means, $\mathbb E[S]/\mathbb E[L]$.

# %%
lengths = every.lengths.double()
per_response = {"S / L": joint @ (Z.sum(1) / lengths), "S_RB / L": joint @ (H.sum(1) / lengths),
                "E[S] / E[L]": (joint @ Z.sum(1)) / (joint @ lengths)}
print(", ".join(f"{name}: {float(value):.4f}" for name, value in per_response.items()), "nats per token")
ledger.refuted("02.20", "2.2.4", "E[S/L] = E[S_RB/L] when L is random (remark)", tolerance=0.01,
               counterexample="the tiny policy with EOS: given L, E[D_k|F_k] is not zero",
               measured=per_response["S / L"], expected=per_response["S_RB / L"])

# %% [markdown]
# ## 3 · Computing $H_k$, whole or truncated
#
# From logits, $H=Z-\sum_ap_az_a$ with $Z=\mathrm{logsumexp}(z)$. When only the likeliest tokens $a\in\mathcal S$ are at
# hand (top-k or top-p), with total probability $s$ and $\varepsilon=1-s$, the notes write
# $H=sH(p_{\mathcal S}/s)-s\log s-\varepsilon\log\varepsilon+$ "tail error", *some really small thing*. It has a name:
#
# $$ H=s\,H(p_{\mathcal S}/s)-s\log s-\varepsilon\log\varepsilon+\varepsilon\,H(\mathrm{tail}) , \qquad
#    \log\frac{\varepsilon}{p_{\min}}\le H(\mathrm{tail})\le\log n , $$
#
# where $n$ tokens are in the tail and none is likelier than $p_{\min}$, the least likely token kept. Small it is only if
# $\varepsilon$ is. These bounds are what `dh.truncated_entropy` returns.

# %%
z = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
p = z.softmax(-1).sort(descending=True).values
exact = -(p * p.log()).sum()
s, epsilon = p[:50].sum(), p[50:].sum()
kept = -(p[:50] * p[:50].log()).sum() - epsilon * epsilon.log()      # s H(p_S/s) − s log s − ε log ε
tail = -(p[50:] / epsilon * (p[50:] / epsilon).log()).sum()
value, lower, upper = dh.truncated_entropy(z, top_k=50)
print(f"H = {exact:.3f}; without the tail {kept:.3f}; bounds {lower:.3f} to {upper:.3f}")

# %%
renormalised = s * -(p[:50] / s * (p[:50] / s).log()).sum() - s * s.log() - epsilon * epsilon.log()
ledger.holds("02.21", "2.2.5", "H = logsumexp(z) − Σ p z", measured=z.logsumexp(-1) - z.softmax(-1) @ z, expected=exact,
             tolerance=1e-12)
ledger.holds("02.22", "2.2.5", "s = exp(Z_S − Z) is the probability of the tokens kept", tolerance=1e-12,
             measured=(z.topk(50).values.logsumexp(-1) - z.logsumexp(-1)).exp(), expected=s)
ledger.corrected("02.23", "2.2.5", "H = s H(p_S/s) − s log s − ε log ε + a really small tail error", tolerance=1e-10,
                 correction="the tail error is ε H(tail), here most of the entropy", measured=exact,
                 expected=renormalised + epsilon * tail, as_printed=renormalised)

# %% [markdown]
# ## 4 · On the shipped policy
#
# Now rollouts of a real transformer. The population is the test split; a random half of its prompts is sampled.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "test").shuffle(seed=seed)
chosen = table.select(range(min(prompts, len(table))))
rollouts = dh.sample(policy, chosen, responses, max_new_tokens, seed=seed)
with torch.no_grad():
    scores = dh.score(policy, rollouts)
clusters = rollouts.prompt_index

# %%
rows = {method: {f"per {per}": dh.entropy(scores, rollouts, method, per) for per in UNITS} for method in METHODS}
estimates = pd.DataFrame(rows).T
error = estimates.map(lambda e: e.standard_error)
gain = (error.loc["monte_carlo"] / error) ** 2
shown = estimates.map(repr)
shown.assign(**{f"samples saved, {unit}": gain[unit].map("{:.1f}-fold".format) for unit in gain})

# %% [markdown]
# The last two columns say by what factor fewer prompts give the Monte Carlo estimator's error. Most of the gain comes
# from Rao–Blackwell here, where the cross term is positive; the control variate adds a little, and would protect us where
# it is negative. What the variance of one response is made of:

# %%
decomposed = dh.variance_decomposition(scores, rollouts)
pd.Series(decomposed._asdict()).round(1).to_frame("shipped policy").T

# %% [markdown]
# ### How much of a token's distribution is needed
#
# The bounds on the next-token entropy, for growing $k$, averaged over the tokens of a few responses. A handful of tokens
# out of the vocabulary holds nearly all of the entropy of this policy, and the bounds say so without knowing the rest.

# %%
one = rollouts.select(slice(0, 1))
with torch.no_grad():
    logits = policy.logits(one.input_ids[one.attention_mask][None], keep=int(one.lengths) + 1)[0, :-1]
ks = [1, 2, 4, 8, 16, 32, 64, 128]
bounds = [[float(x.mean()) for x in dh.truncated_entropy(logits, top_k=k)] for k in ks]
whole = float(dh.truncated_entropy(logits, top_p=1.0).value.mean())

# %%
figure, axes = plt.subplots()
value, lower, upper = np.array(bounds).T
axes.fill_between(ks, lower, upper, alpha=0.25, label="rigorous bounds")
axes.plot(ks, value, "o-", label="value, in their middle")
axes.axhline(whole, color="0.3", linestyle="--", label="whole vocabulary")
axes.set(xscale="log", xlabel="tokens kept, k", ylabel="mean next-token entropy, nats",
         title="A few tokens hold the entropy, and the bounds prove it")
axes.legend()
dh.figures.save(figure, results, "02-truncated")

# %% [markdown]
# *Bounds on the entropy from the k likeliest tokens, along one response of the shipped policy.*
#
# ## 5 · The heavy right tail
#
# The author of the notes needs *well over a thousand prompts*: the 50th, 80th and 95th percentiles of the entropy per
# prompt still move by some ten percent between 1,024 and 4,096. Is that a property of the entropy, or of percentiles?
# We take the mean $S_{RB}$ of each prompt's responses, look at the first $B$ prompts, and bootstrap.

# %%
def per_prompt(rollouts, scores):
    sums = torch.zeros(int(rollouts.prompt_index.max()) + 1, dtype=torch.float64)
    return (sums.index_add(0, rollouts.prompt_index.cpu(), scores.entropies.sum(1).double().cpu()) /
            rollouts.prompt_index.cpu().bincount()).numpy()

populations = {"these problems": per_prompt(rollouts, scores)}
if (Path(gsm8k) / "test.jsonl").is_file():
    others = dh.load_problems(gsm8k, "test").shuffle(seed=seed).select(range(gsm8k_prompts))
    other_rollouts = dh.sample(policy, others, responses, max_new_tokens, seed=seed)
    with torch.no_grad():
        populations["GSM8K text"] = per_prompt(other_rollouts, dh.score(policy, other_rollouts))

# %%
generator = np.random.default_rng(seed)
values = populations["these problems"]
sizes = [32, 64, 128, len(values)]
percentiles = {}
for size in sizes:
    draws = generator.choice(values[:size], (2000, size))
    percentiles[size] = {level: np.percentile(np.percentile(draws, level, axis=1), [2.5, 50, 97.5])
                         for level in (50, 80, 95)}
widths = {level: np.diff(percentiles[sizes[-1]][level][[0, 2]])[0] / 2 / percentiles[sizes[-1]][level][1]
          for level in (50, 80, 95)}
print(f"half-width of the 95% interval at {sizes[-1]} prompts:",
      ", ".join(f"{level}th percentile {width:.0%}" for level, width in widths.items()))

# %% [markdown]
# A percentile is a noisy statistic: its error is $\sqrt{q(1-q)/B}$ over the density there, and the density in a tail is
# small. Movements of several percent between samples are what chance alone makes. A distance between whole distributions
# says more than three percentiles. We use Wasserstein's, the mean gap between the sorted values of a sample of $B$ prompts
# and those of all others, in units of the standard deviation. The mean, all that we need for the entropy, has an error of
# $1/\sqrt B$ in these units, however heavy the tail; what a heavy tail changes is the unit.

# %%
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.2))
for i, level in enumerate((50, 80, 95)):
    low, middle, high = np.array([percentiles[size][level] for size in sizes]).T
    left_axes.errorbar(sizes, middle, yerr=[middle - low, high - middle], capsize=3, marker=dh.figures.MARKERS[i],
                       linestyle=dh.figures.DASHES[i], label=f"{level}th percentile")
left_axes.set(xscale="log", xlabel="prompts B", ylabel="a prompt's mean entropy, nats", ylim=(None, 11.5),
              title="Percentiles move within their error")
left_axes.set_xticks(sizes, sizes, minor=False)
left_axes.minorticks_off()
left_axes.legend(loc="upper right")
for i, (name, values) in enumerate(populations.items()):
    some = [size for size in (8, 16, 32, 64, 128) if size <= len(values) // 2]
    mixed = [[generator.permutation(values / values.std()) for _ in range(100)] for _ in some]
    distance = [np.mean([wasserstein_distance(v[:size], v[size:]) for v in each])
                for size, each in zip(some, mixed, strict=True)]
    right_axes.plot(some, distance, marker=dh.figures.MARKERS[i], linestyle=dh.figures.DASHES[i], label=name)
right_axes.plot([8, 128], [8**-0.5, 128**-0.5], ":", color="0.4", label="error of the mean, 1/√B")
right_axes.set(xscale="log", yscale="log", xlabel="prompts B", ylabel="distance, standard deviations",
               title="Distributions converge about as the mean does")
right_axes.set_xticks([8, 16, 32, 64, 128], [8, 16, 32, 64, 128], minor=False)
right_axes.minorticks_off()
right_axes.set_yticks([0.1, 0.2, 0.5], [0.1, 0.2, 0.5])
right_axes.legend()
dh.figures.save(figure, results, "02-heavy-tail")

# %% [markdown]
# *Left: percentiles of the mean entropy per prompt over the first B prompts, 95% bootstrap intervals. Right: Wasserstein
# distance between a sample and the rest, averaged over random splits, beside the error of the mean.*
#
# ### Which control variates help
#
# The notes ask for a systematic way to find control variates. Here is one: write down quantities *whose mean is known*,
# and let cross-fitted regression decide. Two kinds are free. **Martingale sums** $\sum_kw_kD_k$ have mean zero for any
# weight $w_k$ that the prefix decides: $1$, $H_k$, or the first token only. **Prompt features** have a known mean over the
# data set, as they cost no sampling: the length of the prompt, and the entropy of the first token.

# %%
one_token = dh.sample(policy, table, 1, 1, seed=seed)
with torch.no_grad():
    first_entropy = dh.score(policy, one_token).entropies[:, 0].double()
prompt_length = one_token.attention_mask.sum(1).double() - 1
D = torch.where(rollouts.response_mask, -scores.log_probs - scores.entropies, 0.0).double()
variates = {"Σ D": D.sum(1), "Σ H D": (scores.entropies * D).sum(1), "D of the first token": D[:, 0],
            "prompt length": (prompt_length - prompt_length.mean())[clusters],
            "first token's entropy": (first_entropy - first_entropy.mean())[clusters]}
target = scores.entropies.sum(1)

# %%
def variance_left(names):
    adjusted = dh.control_variate(target, torch.stack([variates[name] for name in names], 1), clusters)
    return (dh.Estimate.mean(adjusted, clusters).standard_error / dh.Estimate.mean(target, clusters).standard_error) ** 2

left = {name: variance_left([name]) for name in variates}
left["all of them"] = variance_left(list(variates))
pd.Series(left).map("{:.2f}".format).to_frame("variance left, of Rao–Blackwell's")

# %% [markdown]
# The lesson is in the last rows. Martingale sums act *within* a prompt, and the error of an entropy over prompts is mostly
# *between* prompts: some need long answers, some short. A feature of the prompt explains that, and its mean over the
# data set costs one forward pass, or none.
#
# ## 6 · Are the errors honest?
#
# For each estimator, 95% intervals on 2,000 independent samples from policies whose entropy is known exactly: one without
# a heavy tail at 100 responses, and one that almost always stops at once, so that rare responses hold the entropy, at 800.

# %%
def estimate(rows, method, per):
    sampled = every.select(rows).replace(prompt_index=torch.arange(len(rows)))
    return dh.entropy(dh.TokenScores(known.log_probs[rows], known.entropies[rows]), sampled, method, per)

covered = {}
for case, eos_logit, chosen_seed, size in (("plain", 0.0, 1, 100), ("heavy tail", 3.0, 2, 800)):
    tiny = dh.exact.tiny_policy(4, eos_token_id=0, seed=chosen_seed, eos_logit=eos_logit)
    every = dh.exact.every_response(tiny, prompts=[[1]], max_new_tokens=4)
    with torch.no_grad():
        known = dh.score(tiny, every)
    pi = dh.exact.probabilities(known)
    for method in METHODS:
        for per in UNITS:
            exact = float(-(pi @ pi.log()) / (pi @ every.lengths.double() if per == "token" else 1))
            covered[f"{case}, {size} responses", f"{method}, per {per}"] = dh.exact.coverage(
                partial(estimate, method=method, per=per), pi, size, exact, replicates)
coverages = pd.Series(covered).unstack(0)
coverages.map("{:.1%}".format)

# %%
for i, (label, share) in enumerate(coverages.min(axis=1).items()):
    ledger.holds(f"02.{24 + i}", "derived here", f"95% intervals cover: {label}, the worse of both policies",
                 measured=share, expected=0.95, tolerance=0.02)

# %% [markdown]
# ## What stands
#
# Use the next-token entropies, not the surprisals; add $c\sum_kD_k$ with a cross-fitted $c$, which never loses; report per
# token as a ratio of means; and put prompt features with known means into the regression before sampling more prompts.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Find a two-step policy whose $\mathrm{Var}(S_{RB})$ exceeds $\mathrm{Var}(S)$ by more than $(2/9)\log^22$.
# 2. For which policies is $c^*=1$, so that Monte Carlo is already best? What is special about them?
# 3. Add a variate: the indicator that the response's first token is the likeliest one, less its probability.
# 4. Set `max_new_tokens = 16`. Which row of the decomposition changes most, and why?
#
# ## Further reading
#
# - Casella, G. and Robert, C. *Rao–Blackwellisation of sampling schemes*, Biometrika 83, 1996.
# - Owen, A. *Monte Carlo theory, methods and examples*, chapter 8: control variates and regression.
# - Hall, P. *On the removal of skewness by transformation*, Journal of the Royal Statistical Society B 54, 1992.
