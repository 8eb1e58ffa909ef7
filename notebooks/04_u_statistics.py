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
# # 04 · U-statistics
#
# The first-order entropy change is a product of two expectations, and one batch of rollouts has to estimate both
# without counting its own noise as signal. This chapter settles which pairs of rollouts may be multiplied, what the
# variance of the result is, exactly, and which of the notes' estimates of that variance are unbiased.
#
# ## In short
#
# - **Multiply across prompts only.** The U-statistic over prompt groups is unbiased
#   <a href="#ledger-04.6">[04.6]</a>; over all pairs of responses it is off by a share of what happens inside prompts,
#   on the enumerated policy −2.27 in place of −1.79 <a href="#ledger-04.7">[04.7]</a>.
# - **$\mathrm{Var}(U)=\frac4B\zeta_1+\frac2{B(B-1)}\zeta_2$ is exact** <a href="#ledger-04.21">[04.21]</a>, but both
#   $\zeta$ belong to *groups*, not to prompts <a href="#ledger-04.22">[04.22]</a>. The number $G$ of responses is no
#   subleading matter: with $G=2$ the leading $\zeta_1$ is 20 times that of exactly known prompts, with $G=8$ still 4
#   times, relative to $T^2$ <a href="#ledger-04.41">[04.41]</a>.
# - **The two estimators of $\zeta_1$ are one**, biased twice. Rows and residuals together give an unbiased variance at
#   no cost <a href="#ledger-04.35">[04.35]</a>.
# - **What to do**: call `dh.u_statistic` on the products of groups; at a fixed number of responses take four to six for
#   each prompt (the enumerated policy's best, and flat); trust its interval from some dozens of prompts on, within
#   three points of its 95%, and from some hundreds where rare responses decide <a href="#ledger-04.40">[04.40]</a>.
# - **What not to expect**: 48 prompts do not show the sign of $U$ on the shipped policy, nor how far off the naive
#   statistic is there <a href="#ledger-04.43">[04.43]</a>. How many would, has from such a batch a lower bound only.
#
# **What is checked**
#
# | statement | source | verdict |
# |---|---|---|
# | a U-statistic over the responses of one prompt | notes 2.2 | holds with a correction [04.5](#ledger-04.5) |
# | equations (6), (7) over prompt groups | notes 2.2 | holds [04.3](#ledger-04.3), [04.6](#ledger-04.6); its sign: holds with a correction [04.4](#ledger-04.4) |
# | the kernel $h_0$ and the target $T$ | notes 2.2 | holds [04.8](#ledger-04.8); holds with a correction [04.9](#ledger-04.9) |
# | $U$, $\phi_1$, $\phi_2$, $\zeta_1$ and $\mathrm{Var}(U)$ | notes 2.2 | holds [04.13](#ledger-04.13), [04.16](#ledger-04.16), [04.17](#ledger-04.17), [04.21](#ledger-04.21) |
# | $\mathrm{Var}(\sum\phi_2)=B(B-1)\zeta_2$ | notes 2.2 | holds with a correction [04.19](#ledger-04.19) |
# | for large $B$ the variance goes as $1/B$ | notes 2.2 | holds with a correction [04.42](#ledger-04.42) |
# | effects of $G$ on the variance are subleading | notes 2.2.3 | refuted [04.41](#ledger-04.41) |
# | $X_n$, $Y_n$, the cheap $U$, rows $r_n$, $\phi_n$, $U_{(-n)}$ | notes 2.2.1 | holds [04.1](#ledger-04.1), [04.23](#ledger-04.23) to [04.26](#ledger-04.26) |
# | $\phi_n$, $\hat\zeta_1$ and the jackknife as estimates | notes 2.2.1 | holds with a correction [04.27](#ledger-04.27), [04.29](#ledger-04.29), [04.30](#ledger-04.30), [04.32](#ledger-04.32) |
# | the entropy per token has to account for lengths | notes 2.2.2 | holds [04.44](#ledger-04.44) |
# | where rare responses decide, the interval covers too little at 32 prompts | our own | holds [04.39](#ledger-04.39) |
#
# **You need** variances of sums, and chapter 03's first-order change. **You will learn** how many prompts an estimate
# of $\delta\mathcal H_1$ needs, and how to tell from the batch itself.

# %%
import math

import pandas as pd
import torch
from matplotlib import pyplot as plt

import deltah as dh
from deltah.exact import flat_gradient

dh.figures.use_style()

# %% tags=["parameters"]
model = "../data/policy"          # a folder or a Hugging Face hub id
problems = "../data/problems"     # a folder, a file or a hub id
device = "auto"
dtype = "float64"                 # float32 for large models
results = "../results/default"
seed = 0
prompts_in_batch = 48             # B
responses_per_prompt = 8          # G
max_new_tokens = 64
replicates = 2000                 # batches behind each number of the coverage table

# %%
stated = (model, problems, seed) == ("../data/policy", "../data/problems", 0)
ledger = dh.Ledger("04", source="notes", stated=stated, seeds="../data/seeds")

# %% [markdown]
# ## 1 · A population small enough to write down
#
# As before we start where every expectation is a sum: a random transformer over three tokens, of which token 2 ends a
# response, four prompts of different lengths, and every response of at most two tokens. The reward is the number of
# ones in a response. $L_{\max}(p)$ is what a prompt leaves of the context, so that it differs between prompts.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=5)
prompts = [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]]
responses = dh.exact.every_response(tiny, prompts, max_new_tokens=2)
scores = dh.score(tiny, responses)
log_probs, pi = scores.log_probs.sum(1), dh.exact.probabilities(scores).detach()
D, N = len(prompts), len(responses) // len(prompts)
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
longest = torch.tensor([8.0 - len(prompt) for prompt in prompts], dtype=torch.float64)
print(f"{D} prompts with {N} responses each; probabilities sum to {pi.view(D, N).sum(1).numpy().round(10)}")

# %% [markdown]
# The gradient of every response's log-prob $S(t|p)$ makes a matrix with one row for each response. Its Gram matrix is
# the Fisher kernel $K$ of chapter 08. Every inner product of this chapter is a weighted sum of entries of $K$.

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in log_probs])
K_tiny, S_tiny = gradients @ gradients.T, log_probs.detach()
print(f"gradients: {list(gradients.shape)}, kernel: {list(K_tiny.shape)}")

# %% [markdown]
# What we want is known from two more gradients: that of the entropy $\mathcal H$, averaged over prompts, and that of
# the objective $J$ with its normalisation by $L_{\max}(p)$. The step is $\delta\theta=\eta\,\nabla J$.

# %%
response_share = log_probs.exp() / D
grad_H = flat_gradient(tiny, -(response_share * log_probs).sum())
grad_J = flat_gradient(tiny, (response_share * rewards / longest.repeat_interleave(N)).sum())
print(f"dH/dη of one exact step: {grad_H @ grad_J:+.4f} nats per unit of learning rate")

# %% [markdown]
# ## 2 · Groups, and the vectors they contribute
#
# A batch does not hold responses; it holds *groups*, $G$ responses to one prompt. From each group the notes build
#
# $$ X_n=\frac1G\sum_{g\in G_n}(S_{n,g}-\bar S_{n,-g})\,g_{n,g},\qquad
#    Y_n=\frac1{L_{\max}(p_n)\,G}\sum_{g\in G_n}A_{n,g}\,g_{n,g}, $$
#
# with $\bar S_{n,-g}$ the mean over the *other* responses of the group, $g_{n,g}$ the gradient of $S_{n,g}$, and
# $A=R-\bar R$ the advantage as it enters the update. With $G=2$ there are 49 ordered groups for each prompt, 196 in
# all, and the probability of each is a product. We hold $X$ and $Y$ as weights over the 28 responses, so that
# $X_n\cdot Y_m$ is `x_two[n] @ K_tiny @ y_two[m]`.

# %%
G_two = 2
pairs_drawn = torch.cartesian_prod(*[torch.arange(N)] * G_two)
members = (N * torch.arange(D)[:, None, None] + pairs_drawn).flatten(0, 1)
group_share = pi[members].prod(1) / D
S_group, R_group = S_tiny[members], rewards[members]
minus_others = S_group - (S_group.sum(1, keepdim=True) - S_group) / (G_two - 1)
minus_mean, advantages = (q - q.mean(1, keepdim=True) for q in (S_group, R_group))
L_group = longest.repeat_interleave(len(pairs_drawn))[:, None]
empty = torch.zeros(len(members), N * D, dtype=torch.float64)
x_two = empty.scatter_add(1, members, minus_others / G_two)
y_two = empty.scatter_add(1, members, advantages / (G_two * L_group))
products = x_two @ K_tiny @ y_two.T

# %% [markdown]
# The two expectations. $\mathbb E[X]$ is $-\nabla\mathcal H$: the leave-one-out baseline is independent of the
# response it is subtracted for, so it biases nothing <a id="04.1" href="#ledger-04.1">[04.1]</a>. $\mathbb E[Y]$ is
# *not* $\nabla J$. The advantage subtracts a mean that holds the response's own reward, which shortens the expected
# update by $(G-1)/G$ <a id="04.2" href="#ledger-04.2">[04.2]</a>. As $Y$ is what training does, that is what a
# prediction should use; to read $\nabla J$ from it, one has to undo the factor.

# %%
mean_X, mean_Y = (group_share @ weights @ gradients for weights in (x_two, y_two))
ledger.holds("04.1", "2.2.1", "X_n with the leave-one-out baseline is an unbiased estimate of −∇H (largest gap)",
             measured=(mean_X + grad_H).abs().max(), expected=0, tolerance=1e-10, formulas=(36,),
             rules_out={"the mean of the whole group": grad_H.abs().max() / G_two})
ledger.holds("04.2", "2", "E[Y_n] = (G−1)/G ∇J, as R̄ includes the response's own reward (length ratio, G = 2)",
             source="deltah", measured=mean_Y.norm() / grad_J.norm(), expected=(G_two - 1) / G_two, tolerance=1e-10,
             rules_out={"∇J itself": 1})

# %% [markdown]
# Equations (6) and (7) write the statistic with the *full* group mean $\bar S_n$ and the prefactor $1/(G(G-1))$:
#
# $$ \delta\hat{\mathcal H}_1=\frac{\eta}{B(B-1)}\sum_{p_n\ne p_m}\frac1{L_{\max}(p_m)}\frac1{G(G-1)}
#    \sum_{t_h\in G_n,\,t_g\in G_m}(S(t_h|p_n)-\bar S_n)\,K\big((t_h|p_n),(t_g|p_m)\big)\,A(t_g|p_m) . $$
#
# Since $S_g-\bar S_{-g}=\frac{G}{G-1}(S_g-\bar S)$, the summand is $X_n\cdot Y_m$
# <a id="04.3" href="#ledger-04.3">[04.3]</a>. The sign in front is another matter
# <a id="04.4" href="#ledger-04.4">[04.4]</a>: $X$ estimates *minus* the entropy gradient, so the entropy change is
# $-\eta\,X\cdot Y$, and the printed $+\eta$ predicts collapse where there is growth. The target that the notes call
# $T=\mathbb E[\delta\mathcal H_1]=\mathbb E[h(p,p')]$ inherits both, the sign and the $\eta$
# <a id="04.9" href="#ledger-04.9">[04.9]</a>.

# %%
left, right = (empty.scatter_add(1, members, side) for side in (minus_mean, advantages / L_group))
of_whole_mean = left @ K_tiny @ right.T
printed = of_whole_mean / (G_two * (G_two - 1))
expected_printed = group_share @ ((printed + printed.T) / 2) @ group_share
ledger.holds("04.3", "2.2 (7)", "the summands of (7), with S̄_n and 1/(G(G−1)), are X_n·Y_m (largest gap)",
             measured=(printed - products).abs().max(), expected=0, tolerance=1e-10, formulas=(21, 37),
             rules_out={"with 1/G²": (of_whole_mean / G_two**2 - products).abs().max()})
ledger.corrected("04.4", "2.2 (6)", "E[δĤ₁]/η is the first-order entropy change along the expected update (B = 2)",
                 correction="the sign: −η in place of +η, as X estimates −∇H", measured=grad_H @ mean_Y,
                 expected=-expected_printed, as_printed=expected_printed, tolerance=1e-10, formulas=(20,))

# %% [markdown]
# ## 3 · Which pairs may be multiplied
#
# ### One prompt
#
# For a single prompt the notes start with all pairs $i\ne j$ of its responses,
#
# $$ \delta\hat{\mathcal H}_1=\frac1{G(G-1)}\frac1{L_{\max}}\sum_{i\ne j}(S_i-\bar S_{loo})\,K_{ij}\,A_j . $$
#
# Leaving out $i=j$ is not quite enough, because the *baselines* still join the two: $\bar S_{loo}$ of response $i$
# contains $S_j$, and the mean reward in $A_j$ contains $R_i$. Multiplying out, one term survives, and the expectation
# is $1+\frac1{(G-1)^2}$ times what it should be <a id="04.5" href="#ledger-04.5">[04.5]</a>. We enumerate groups of
# three, where that is a quarter too much.

# %%
three = torch.cartesian_prod(*[torch.arange(N)] * 3)
S_3, R_3, K_3 = S_tiny[three], rewards[three], K_tiny[three[:, :, None], three[:, None, :]]
loo_S = 1.5 * (S_3 - S_3.mean(1, keepdim=True))
terms_3 = loo_S[:, :, None] * K_3 * (R_3 - R_3.mean(1, keepdim=True))[:, None, :]
one_prompt = (terms_3.sum((1, 2)) - terms_3.diagonal(dim1=1, dim2=2).sum(1)) / 6
expected_one = pi[three].prod(1) @ one_prompt
first = pi[:N, None] * gradients[:N]
truth_one = (S_tiny[:N] @ first) @ (rewards[:N] @ first) * 2 / 3
print(f"expectation over {len(three)} groups / truth: {expected_one / truth_one:.6f}")

# %%
ledger.corrected("04.5", "2.2", "the U-statistic over responses of one prompt is unbiased (ratio to the truth, G = 3)",
                 correction="too large by 1 + 1/(G−1)², as the baselines share samples; and −η is missing",
                 measured=expected_one / truth_one, expected=1 + 1 / 4, as_printed=1, tolerance=1e-10, formulas=(19,))

# %% [markdown]
# ### Several prompts
#
# "We shouldn't do a naive U statistic across all samples", the notes say, and they are right. Two responses to one
# prompt are independent only *given* the prompt, and their product has the expectation $\mathbb E_p[x(p)\cdot y(p)]$,
# with $x(p),y(p)$ the prompt's own means, in place of $\mathbb E_p[x(p)]\cdot\mathbb E_p[y(p)]$. Of the $BG(BG-1)$
# ordered pairs a share of $(G-1)/(BG-1)$ is of that kind, so the bias <a id="04.7" href="#ledger-04.7">[04.7]</a> is
#
# $$ \mathbb E[\text{naive}]-T=\frac{G-1}{BG-1}\;\mathrm{Tr}\,\mathrm{Cov}_p\big(x(p),\,y(p)\big), $$
#
# and over prompt groups there is none <a id="04.6" href="#ledger-04.6">[04.6]</a>. To see this bias alone, we use each
# prompt's exact baselines here. All batches of two groups are enumerated.

# %%
mean_S, mean_R = ((pi * q).view(D, N).sum(1).repeat_interleave(N) for q in (S_tiny, rewards))
single_x, single_y = torch.diag(S_tiny - mean_S), torch.diag((rewards - mean_R) / longest.repeat_interleave(N))
of_pair = single_x @ K_tiny @ single_y
within = of_pair[members[:, 0], members[:, 1]] + of_pair[members[:, 1], members[:, 0]]
across = of_pair[members[:, None, :, None], members[None, :, None, :]].sum((2, 3))
over_all = (within[:, None] + within + across + across.T) / 12
over_groups = (across + across.T) / 8

# %%
prompt_x, prompt_y = ((pi[:, None] * w).view(D, N, -1).sum(1) for w in (single_x, single_y))
per_prompt = prompt_x @ K_tiny @ prompt_y.T
true_product = per_prompt.mean()
trace = per_prompt.diagonal().mean() - true_product
expected_naive, expected_grouped = (group_share @ u @ group_share for u in (over_all, over_groups))
print(f"T {true_product:+.4f}, over groups {expected_grouped:+.4f}, naive {expected_naive:+.4f}, "
      f"Tr Cov {trace:+.4f}")
ledger.holds("04.6", "2.2", "over prompt groups the U-statistic is unbiased, over all pairs of samples it is not",
             measured=expected_grouped, expected=true_product, tolerance=1e-10,
             rules_out={"over all pairs": expected_naive})
ledger.holds("04.7", "3", "the naive U-statistic is biased by (G−1)/(BG−1) Tr Cov_p(x, y)", source="deltah",
             measured=expected_naive - true_product, expected=trace * (G_two - 1) / (2 * G_two - 1), tolerance=1e-10,
             rules_out={"no bias": 0})

# %% [markdown]
# ## 4 · The variance
#
# The notes split $U-T$ after Hoeffding. With $h(p_n,p_m)$ the symmetrised expectation of the product over responses,
# and with the target $T=\mathbb E[h]$, they define
#
# $$ U=\frac1{B(B-1)}\sum_{n\ne m}h(p_n,p_m),\qquad \phi_1(p)=\mathbb E_{p'}[h(p,p')]-T,\qquad
#    \phi_2(p,p')=h-T-\phi_1(p)-\phi_1(p') . $$
#
# Of the two parts, $\phi_1$ is what a prompt does on average, and $\phi_2$ what only a pair does. Their variances are
# $\zeta_1=\mathrm{Var}(\phi_1(p))=\mathrm{Var}(\mathbb E[h(p,p')|p])$ and $\zeta_2=\mathrm{Var}(\phi_2(p,p'))$.

# %%
given_prompt = group_share.view(D, -1) * D
of_prompts = torch.einsum("pi,piqj,qj->pq", given_prompt, products.view(D, N**G_two, D, N**G_two), given_prompt)
h = (of_prompts + of_prompts.T) / 2
T, phi_1 = h.mean(), h.mean(1) - h.mean()
phi_2 = h - T - phi_1[:, None] - phi_1
zeta_1, zeta_2 = h.mean(1).var(correction=0), phi_2.square().mean()
print(f"T {T:+.4f}, ζ₁ {zeta_1:.5f}, ζ₂ {zeta_2:.5f}")
ledger.corrected("04.9", "2.2", "T = E[δH₁] = E[h]", correction="E[δH₁] = −η E[h]: a sign and the learning rate",
                 measured=grad_H @ mean_Y, expected=-T, as_printed=T, tolerance=1e-10, formulas=(23,))

# %% [markdown]
# Now every batch of $B=5$ prompts, drawn with replacement: $4^5=1024$ of them, equally likely. Two places in a batch
# may hold one prompt; they are still independent draws, so $h(p,p)$ counts there.

# %%
B_five = 5
batches = torch.cartesian_prod(*[torch.arange(D)] * B_five)
off_diagonal = ~torch.eye(B_five, dtype=torch.bool)
h_batch, phi_2_batch = (q[batches[:, :, None], batches[:, None, :]] * off_diagonal for q in (h, phi_2))
U = h_batch.sum((1, 2)) / (B_five * (B_five - 1))
linear, quadratic = phi_1[batches].sum(1), phi_2_batch.sum((1, 2))
print(f"{len(U)} batches: mean U {U.mean():+.4f}, standard deviation {U.std(correction=0):.4f}")

# %% [markdown]
# What the derivation arrives at is right <a id="04.21" href="#ledger-04.21">[04.21]</a>:
#
# $$ \mathrm{Var}(U)=\frac4B\zeta_1+\frac2{B(B-1)}\zeta_2 . $$
#
# One step on the way has a slip. For the sum of the remainders $Q=\sum_{n\ne m}\phi_2$, for which the notes use the
# letter $S$ again, they print
#
# $$ \mathrm{Var}(Q)=2\sum_{n\ne m}\mathrm{Var}(\phi_2(p_n,p_m))=B(B-1)\zeta_2 . $$
#
# The first equality is right, and there are $B(B-1)$ terms in it, so the second has lost the factor two
# <a id="04.19" href="#ledger-04.19">[04.19]</a>. It comes back in their following line. All other steps are among
# [the remaining equations](#remaining).

# %%
ledger.holds("04.21", "2.2", "Var(U) = 4ζ₁/B + 2ζ₂/(B(B−1)) for the prompt kernel h, ζ₁ = Var(E[h|p])",
             measured=U.var(correction=0), expected=4 / B_five * zeta_1 + 2 / (B_five * (B_five - 1)) * zeta_2,
             tolerance=1e-12, formulas=(31, 35), rules_out={"Var(h) for ζ₁": 4 / B_five * h.var(correction=0)})
ledger.corrected("04.19", "2.2", "Var(Σφ₂) = 2 Σ Var(φ₂) = B(B−1) ζ₂", correction="Var(Σφ₂) = 2B(B−1) ζ₂",
                 measured=quadratic.var(correction=0), expected=2 * B_five * (B_five - 1) * zeta_2,
                 as_printed=B_five * (B_five - 1) * zeta_2, tolerance=1e-10, formulas=(33,))

# %% [markdown]
# "So for large $B$ we are dominated by the first term and the variance goes as $1/B$." That needs $\zeta_1>0$, and
# then $B$ well above $1+\zeta_2/(2\zeta_1)$, where both terms are equal. It fails where prompts pull in opposite
# directions <a id="04.42" href="#ledger-04.42">[04.42]</a>. Take two prompts and one parameter $\theta$ that adds to
# the logit $a$ of the rewarded answer for one prompt, and takes off it for the other. At $\theta=0$ entropy and reward
# are both stationary, $\zeta_1=0$, and all there is falls as $1/B^2$. We list the $2^8$ and $2^{16}$ batches. A policy
# near a stationary point of both is near this case.

# %%
probability = 1 / (1 + math.exp(-1.0))
x_of_push, y_of_push = probability * (1 - probability) * 1.0, probability * (1 - probability)
spread = {}
for size in (8, 16):
    pushes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * size).sum(1)
    spread[size] = (x_of_push * y_of_push * (pushes**2 - size) / (size * (size - 1))).var(correction=0)
ledger.corrected("04.42", "2.2", "for large B, Var(U) goes as 1/B (two opposed prompts: Var at B = 8 over B = 16)",
                 correction="where ζ₁ > 0, and from B = 1 + ζ₂/(2ζ₁) on; where ζ₁ = 0, as 1/(B(B−1))",
                 measured=spread[8] / spread[16], expected=16 * 15 / (8 * 7), as_printed=2, tolerance=1e-10)

# %% [markdown]
# ### The unit of sampling is the group, not the prompt
#
# All this concerned a $U$ that knows the expectation over responses. The $U$ one can *compute* has $G$ sampled
# responses in each $X_n$, and their noise belongs in its variance. The decomposition needs no change: let its argument
# be the group $z=(p,t_1,\dots,t_G)$ in place of $p$ <a id="04.22" href="#ledger-04.22">[04.22]</a>. With our 196
# groups and $B=3$ there are $196^3$ batches, few enough to add up all of them.

# %%
of_groups = (products + products.T) / 2
group_phi_1 = of_groups @ group_share - T
group_phi_2 = of_groups - T - group_phi_1[:, None] - group_phi_1
group_zeta_1 = group_share @ group_phi_1.square()
group_zeta_2 = group_share @ group_phi_2.square() @ group_share
second_moment = 0.0
for first_group, weight in zip(of_groups, group_share, strict=True):
    u = (first_group[:, None] + first_group + of_groups) / 3
    second_moment += weight * (group_share @ u.square() @ group_share)
print(f"{len(of_groups)**3:,} batches; ζ₁ {zeta_1:.4f} of prompts, {group_zeta_1:.4f} of groups; "
      f"ζ₂ {zeta_2:.4f} of prompts, {group_zeta_2:.4f} of groups")

# %%
ledger.corrected("04.22", "2.2, 2.2.1", "Var(U) of the statistic that is computed, with sampled responses (B = 3)",
                 correction="ζ₁ and ζ₂ must be those of groups (prompt and its G responses), not of prompts",
                 measured=second_moment - T**2, expected=4 / 3 * group_zeta_1 + 1 / 3 * group_zeta_2,
                 as_printed=4 / 3 * zeta_1 + 1 / 3 * zeta_2, tolerance=1e-10)

# %%
sizes = torch.logspace(math.log10(3), 3, 60)
figure, axes = plt.subplots()
axes.loglog(sizes, (4 * group_zeta_1 / sizes).sqrt(), "--", color="C0", label=r"from $\phi_1$: $\sqrt{4\zeta_1/B}$")
axes.loglog(sizes, (2 * group_zeta_2 / (sizes * (sizes - 1))).sqrt(), "-.", color="C1",
            label=r"from $\phi_2$: $\sqrt{2\zeta_2/B(B-1)}$")
axes.loglog(sizes, (4 * group_zeta_1 / sizes + 2 * group_zeta_2 / (sizes * (sizes - 1))).sqrt(), color="0.2",
            label="standard deviation of U")
axes.axhline(abs(T), color="0.5", linestyle=":", label="|T|, what is to be seen")
axes.set(xlabel="prompts in the batch, B", ylabel="nats per unit of learning rate",
         title="Small batches suffer from the remainder, large ones from single prompts")
axes.legend()
dh.figures.save(figure, results, "04-two-terms")

# %% [markdown]
# *The enumerated policy with two responses a prompt, exact. Below the crossing at about*
# $B=1+\zeta_2/(2\zeta_1)$ *the error falls as* $1/B$*, above it as* $1/\sqrt B$*.*
#
# ### What the number of responses does
#
# Later the notes treat "each prompt group as an independent sample …, since the effects of $G$ on the overall variance
# are subleading". Treating the group as the sample is right, whatever $G$. The reason is not: $G$ acts on the *leading*
# term <a id="04.41" href="#ledger-04.41">[04.41]</a>. `group_moments` adds up all groups of a given size, and returns
# the mean and the second moment of the weights that they put on the 28 responses. As every product runs through $K$,
# nothing else is needed: from $C$, the centred second moment of $(x,y)$, the noise of $X$ along $\mathbb E[Y]$ and of
# $Y$ along $\mathbb E[X]$ make $\zeta_1$, and the noise of both makes $\zeta_2$.
#
# As $T$ itself grows with $G$ like $(G-1)/G$, what counts is
# $\zeta/T^2$; and as more responses cost more, $G\,\zeta_1/T^2$ and $G^2\zeta_2/T^2$ say which $G$ serves best at a
# fixed number $BG$ of responses.

# %%
of_size, kinds = {}, torch.stack([S_tiny.view(D, N), rewards.view(D, N) / longest[:, None]])
for G_group in (2, 3, 4, 5, 6, 8, 16):
    total, second = dh.exact.group_moments(pi.view(D, N), kinds, G_group)
    scale = torch.tensor([1 / (G_group - 1), 1 / G_group]).double().repeat_interleave(D * N)
    C, (m_x, m_y) = (second - torch.outer(total, total)) * torch.outer(scale, scale), (total * scale).view(2, -1)
    (C_xx, C_xy), (_, C_yy) = ([b @ K_tiny for b in half.split(D * N, 1)] for half in C.split(D * N))
    towards = torch.cat([K_tiny @ m_y, K_tiny @ m_x]) / 2
    both = (C_xx * C_yy.T).sum(), (C_xy * C_xy.T).sum()
    of_size[G_group] = float(m_x @ K_tiny @ m_y), float(towards @ C @ towards), float(sum(both)) / 2
by_G = pd.DataFrame(of_size, index=["T", "zeta_1", "zeta_2"]).T
by_G["ζ₁/T²"], by_G["ζ₂/T²"] = by_G.zeta_1 / by_G["T"] ** 2, by_G.zeta_2 / by_G["T"] ** 2
by_G["G ζ₁/T²"], by_G["G² ζ₂/T²"] = by_G["ζ₁/T²"] * by_G.index, by_G["ζ₂/T²"] * by_G.index**2
exact_prompts = float(zeta_1 / T**2)
print(f"prompts known exactly: ζ₁/T² {exact_prompts:.2f}, ζ₂/T² {float(zeta_2 / T**2):.2f}; groups of G:")
by_G.drop(columns=["zeta_1", "zeta_2"]).round(2)

# %%
ledger.refuted("04.41", "2.2.3", "the effects of G on the variance are subleading (ζ₁ of pairs over prompts ≤ 1.1)",
               counterexample="the enumerated policy: G multiplies the leading term, by 20 at G = 2 and, relative to "
               "T², by 4 at G = 8", measured=by_G.zeta_1[2] / zeta_1, expected=(0.0, 1.1), tolerance=1e-10)

# %%
figure, axes = plt.subplots()
axes.semilogx(by_G.index, by_G["ζ₁/T²"] / exact_prompts, "o-", color="C0", label="groups of G sampled responses")
axes.axhline(1, color="0.3", linestyle="--", label="prompts known exactly, G → ∞")
axes.set(xlabel="responses to each prompt, G", ylabel=r"$\zeta_1/T^2$, relative to exact prompts", ylim=(0, None),
         xticks=list(by_G.index), xticklabels=list(by_G.index),
         title="The number of responses acts on the leading term of the variance")
axes.minorticks_off()
axes.legend()
dh.figures.save(figure, results, "04-group-size")

# %% [markdown]
# *The enumerated policy, exact. With eight responses a prompt, three quarters of the leading variance still come from
# having sampled them.* At a fixed number of responses four to six for each prompt are best, for both terms, and the
# optimum is flat: two cost a fifth more in the leading term, eight a twentieth.
#
# ## 5 · Measuring ζ₁
#
# Two estimators are proposed. With the row average $r_n=\frac1{B-1}\sum_{m\ne n}h(p_m,p_n)$ and $\phi_n=r_n-U$, the
# spread of the rows and the jackknife are
#
# $$ \hat\zeta_1=\frac1{B-1}\sum_n\phi_n^2,\qquad
#    \widehat{\mathrm{Var}}(U)_{\rm jackknife}=\frac{B-1}B\sum_n\big(U_{(-n)}-\overline{U_{(-\cdot)}}\big)^2,\qquad
#    \hat\zeta_{1,\rm jackknife}=\frac B4\widehat{\mathrm{Var}}(U)_{\rm jackknife} . $$
#
# "I think what I will do is compute both of these and compare them." We do it on all 1024 batches of five prompts, so
# that the comparison is between expectations.

# %%
fits = [dh.u_statistic(h[b[:, None], b]) for b in batches]
estimators = ("zeta1_notes", "jackknife", "zeta1", "zeta2", "variance")
columns = {name: torch.tensor([getattr(f, name) for f in fits], dtype=torch.float64) for name in estimators}
mean = {name: column.mean() for name, column in columns.items()}
mean["jackknife ζ₁"] = B_five / 4 * mean["jackknife"]
pd.Series({"ζ₁, true": zeta_1, "ζ̂₁ of the rows": mean["zeta1_notes"], "ζ̂₁ of the jackknife": mean["jackknife ζ₁"],
           "ζ̂₁ unbiased": mean["zeta1"]}, name="expectation").astype(float).round(6).to_frame()

# %% [markdown]
# Neither hits $\zeta_1$. The reason is in the rows. Given its prompt, a row has the expectation $T+\phi_1(p_n)$; but
# $U$ contains that row too, and subtracting it leaves $\mathbb E[\phi_n|p_n]=(1-\tfrac2B)\,\phi_1(p_n)$: the rows are
# *pulled towards* $U$ <a id="04.27" href="#ledger-04.27">[04.27]</a>. On top of that each row carries the noise of
# $\phi_2$. Together (<a id="04.29" href="#ledger-04.29">[04.29]</a>, <a id="04.30" href="#ledger-04.30">[04.30]</a>),
#
# $$ \mathbb E\,\hat\zeta_1=\Big(\frac{B-2}{B-1}\Big)^2\zeta_1+\frac{B-2}{(B-1)^2}\,\zeta_2,\qquad
#    \mathbb E\,\hat\zeta_{1,\rm jackknife}=\zeta_1+\frac{\zeta_2}{B-2}. $$
#
# And comparing the two tells nothing. Insert $U_{(-n)}-\overline{U_{(-\cdot)}}=-\frac2{B-2}\phi_n$ into the jackknife:
# the second is $\big(\frac{B-1}{B-2}\big)^2$ times the first, in every batch, whatever the data.

# %%
rows_phi = torch.stack([f.contributions - f.value for f in fits])
seen_from_first = torch.stack([rows_phi[batches[:, 0] == p, 0].mean() for p in range(D)])
ledger.corrected("04.27", "2.2.1", "φ_n = r_n − U estimates φ₁(p_n) (ratio of E[φ_n|p_n] to φ₁)",
                 correction="E[φ_n|p_n] = (1 − 2/B) φ₁(p_n), as U contains the row",
                 measured=(seen_from_first / phi_1).max(), expected=1 - 2 / B_five, as_printed=1, tolerance=1e-10)
ledger.corrected("04.29", "2.2.1", "ζ̂₁ = Σφ_n²/(B−1) is an estimator of ζ₁ (expectation)", formulas=(41,),
                 correction="its expectation is ((B−2)/(B−1))² ζ₁ + (B−2)/(B−1)² ζ₂", measured=mean["zeta1_notes"],
                 expected=((B_five - 2) * zeta_1 + zeta_2) * (B_five - 2) / (B_five - 1) ** 2, as_printed=zeta_1,
                 tolerance=1e-10)
ledger.corrected("04.30", "2.2.1", "ζ̂₁ of the jackknife, B/4 of its variance, estimates ζ₁ (expectation)",
                 correction="its expectation is ζ₁ + ζ₂/(B−2)", measured=mean["jackknife ζ₁"],
                 expected=zeta_1 + zeta_2 / (B_five - 2), as_printed=zeta_1, tolerance=1e-10)

# %% [markdown]
# The jackknife *variance* therefore errs on the safe side, by $2\zeta_2/((B-1)(B-2))$
# <a id="04.32" href="#ledger-04.32">[04.32]</a>. An unbiased estimate needs one more ingredient, the residual of $h$
# after its rows are fitted, which estimates $\zeta_2$ and is never negative:
#
# $$ \hat\zeta_2=\frac1{B(B-3)}\sum_{n\ne m}\Big[h_{nm}-U-\tfrac{B-1}{B-2}(\phi_n+\phi_m)\Big]^2,\qquad
#    \hat\zeta_1=\hat\zeta_{1,\rm jackknife}-\frac{\hat\zeta_2}{B-2}. $$
#
# These are what `u_statistic` returns, and $\frac4B\hat\zeta_1+\frac2{B(B-1)}\hat\zeta_2$ is then an unbiased
# $\mathrm{Var}(U)$ <a id="04.35" href="#ledger-04.35">[04.35]</a>. It takes four prompts; with three, the jackknife is
# all there is.

# %%
variance_U = U.var(correction=0)
ledger.corrected("04.32", "2.2.1", "the jackknife estimates Var(U) (expectation)", formulas=(43,), tolerance=1e-10,
                 correction="it exceeds Var(U) by 2ζ₂/((B−1)(B−2))", measured=mean["jackknife"], as_printed=variance_U,
                 expected=variance_U + 2 * zeta_2 / ((B_five - 1) * (B_five - 2)))
ledger.holds("04.35", "5", "4ζ̂₁/B + 2ζ̂₂/(B(B−1)) is an unbiased estimate of Var(U)", source="deltah",
             measured=mean["variance"], expected=variance_U, tolerance=1e-12,
             rules_out={"the jackknife": mean["jackknife"]})

# %% [markdown]
# How far off are the three in practice? For groups of the enumerated policy we draw the expectations, which are exact,
# against the size of the batch.

# %%
from_four = torch.arange(4, 65, dtype=torch.float64)
relative = group_zeta_2 / group_zeta_1
figure, axes = plt.subplots()
axes.semilogx(from_four, 1 + relative / (from_four - 2), "--", color="C1", label="jackknife")
axes.semilogx(from_four, ((from_four - 2) + relative) * (from_four - 2) / (from_four - 1) ** 2, "-.", color="C0",
              label="rows, as in the notes")
axes.axhline(1, color="0.2", label="corrected for ζ₂: unbiased")
axes.set(xlabel="prompts in the batch, B", ylabel="expectation / ζ₁", ylim=(0, None),
         xticks=[4, 8, 16, 32, 64], xticklabels=[4, 8, 16, 32, 64],
         title="Both printed estimators take the remainder's noise for ζ₁")
axes.minorticks_off()
axes.legend()
dh.figures.save(figure, results, "04-zeta-estimators")

# %% [markdown]
# *The enumerated policy, groups of two, exact expectations in units of the true* $\zeta_1$*. The two printed curves
# differ by a factor known in advance; their distance from one is what matters, and it is not visible in a comparison
# of the two.*
#
# ## 6 · The shipped policy
#
# Now real rollouts: the shipped policy, or whatever `model` names, with $G$ responses to each of $B$ prompts, the
# advantage $A=R-\bar R$ and $L_{\max}$ the cap on new tokens.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
B, G = min(prompts_in_batch, len(table)), responses_per_prompt
rollouts = dh.sample(policy, table.select(range(B)), G, max_new_tokens, seed=seed)
A = dh.objectives.group_advantages(rollouts.rewards, rollouts.prompt_index, scale=False)
print(f"{len(rollouts)} rollouts, mean reward {rollouts.rewards.mean():.2f}, "
      f"{(A.view(B, G).abs().sum(1) == 0).sum()} of {B} groups without any advantage")

# %% [markdown]
# With the kernel of all responses, every product of two groups is a block of it between their weights. A group with
# itself, less each response with itself, is what the naive statistic would add.

# %%
with torch.no_grad():
    S = dh.score(policy, rollouts).log_probs.sum(1).double().view(B, G)
K = dh.fisher_kernel(policy, rollouts).double()
x = ((S - S.mean(1, keepdim=True)) / (G - 1)).flatten()
y = A.double() / (G * max_new_tokens)
terms = x[:, None] * K * y
shipped = terms.view(B, G, B, G).sum((1, 3)).cpu()
same_prompt = ((shipped.diagonal() - terms.diagonal().view(B, G).sum(1).cpu()) * G / (G - 1))

# %% [markdown]
# The entropy of a sequence changes by $-\eta U$ nats at first order. The naive statistic mixes in a share of
# $(G-1)/(BG-1)$ products from inside prompts. Whether those differ from the products across prompts is a question
# about a difference within one batch, so it is the difference that gets the error: prompt $n$ contributes what it has
# inside, less $2r_n-U$, its part in $U$.

# %%
def inside_and_across(count):
    """U of the first prompts, and by how much the products inside a prompt exceed those across, [count]."""
    u = dh.u_statistic(shipped[:count, :count])
    return u, dh.Estimate.mean(same_prompt[:count] - (2 * u.contributions - u.value))


statistic, excess = inside_and_across(B)
print(f"U over prompt groups                     {statistic}\n"
      f"inside a prompt, less across             {excess}\n"
      f"naive U, over all pairs, less U          {excess.value * (G - 1) / (B * G - 1):.2g}")

# %% [markdown]
# These data decide neither <a id="04.43" href="#ledger-04.43">[04.43]</a>: the interval of $U$ is as wide as its value
# or wider, and the excess inside a prompt is within its error of zero. What section 3 proves is that a bias is there;
# how large it is on this policy, 48 prompts do not say. Multiplying across prompts costs nothing, so there is no reason
# to find out first.

# %%
ledger.holds("04.43", "6", "on the shipped policy products inside a prompt exceed those across prompts (difference)",
             source="deltah", measured=excess, expected=(0.0, math.inf), rules_out=0.0)
counts = list(range(8, B + 1, 4))
growth = [inside_and_across(count) for count in counts]
figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7.0, 5.2))
for i, (axes, label) in enumerate(((top, "U, over prompt groups"), (bottom, "inside a prompt, less across"))):
    dh.figures.estimates(axes, counts, [pair[i] for pair in growth], i, f"{label}, 95% interval")
    axes.axhline(0, color="0.3", linewidth=1)
    axes.set(ylabel="nats per unit of η")
    axes.legend()
top.set(title="The interval narrows slowly; products inside a prompt are noisier")
bottom.set(xlabel="prompts in the batch, B")
dh.figures.save(figure, results, "04-shipped-policy")

# %% [markdown]
# *Growing batches of the same rollouts, so that neighbouring points share most of their data. The two panels have
# scales of their own: what is inside prompts has an error of another order than that of* $U$*, but enters the naive
# statistic with a weight of* $(G-1)/(BG-1)$*, 2% at 48 prompts.*
#
# ### How many prompts would be enough?
#
# From $\mathrm{Var}(U)$ with the estimated $\zeta_1,\zeta_2$ follows the batch in which one standard error is a given
# part of $U$. That number scales as $1/U^2$, and $U$ is what we hardly know. So the forecast is an interval: its lower
# end comes from the end of $U$'s interval that is farther from zero, and where the interval holds zero there is no
# upper end.

# %%
low, high = statistic.interval()
farthest, nearest = max(abs(low), abs(high)), 0.0 if low <= 0 <= high else min(abs(low), abs(high))
rows = []
for part in (0.5, 0.25, 0.1):
    needed = []
    for size in (farthest, nearest):
        wanted, z1, z2 = (part * size) ** 2, 4 * max(statistic.zeta1, 0), 2 * statistic.zeta2
        needed.append((z1 + math.sqrt(z1**2 + 4 * wanted * z2)) / (2 * wanted) if wanted else math.inf)
    ends = [f"{float(f'{end:.1g}'):,.0f}" if math.isfinite(end) else "no upper end" for end in needed]
    rows.append({"standard error, part of U": f"{part:.0%}", "prompts, at least": ends[0], "at most": ends[1]})
pd.DataFrame(rows).set_index("standard error, part of U")

# %% [markdown]
# The lower end is worth knowing: below it, a batch cannot show $U$ to that precision unless the $\zeta$ are badly off.
# A larger batch is the only way to an upper end. The estimated $\zeta$ have errors of their own, which these numbers
# leave out; take them as orders of magnitude.
#
# ## 7 · What the error bar is worth
#
# Unbiased is not the same as reliable. An interval also needs $U$ to be about normal, and its variance to be estimated
# well. `u_statistic` reports the root of the unbiased variance, but never less than the remainder's part
# $2\hat\zeta_2/(B(B-1))$, which matters where $\hat\zeta_1$ comes out negative.
#
# We draw batches from four populations whose $T$ is known exactly: normal vectors around a mean; the same with
# log-normal lengths, which have heavier tails; the groups of the enumerated policy; and the groups just sampled from
# the transformer, taken as if they were all there is. Where one of these 48 is drawn twice, its product with itself
# would come in, which holds each response with itself and never occurs in a real batch; what its row says of it,
# $2r_n-U$, stands in its place.

# %%
generator = torch.Generator().manual_seed(seed)
vectors = torch.randn(2, 1000, 10, generator=generator, dtype=torch.float64)
lengths = torch.randn(2, 1000, 1, generator=generator, dtype=torch.float64).mul(0.75).exp()
normal_x, normal_y = 0.5 + vectors
heavy_x, heavy_y = 0.5 + vectors * lengths
in_place = 2 * statistic.contributions - statistic.value
populations = {"normal": (normal_x @ normal_y.T, torch.ones(1000)),
               "log-normal": (heavy_x @ heavy_y.T, torch.ones(1000)),
               "enumerated, G = 2": (products, group_share),
               "transformer": (shipped.diagonal_scatter(in_place), torch.ones(B))}

# %%
coverage = {}
for name, (matrix, weights) in populations.items():
    chance = (weights / weights.sum()).double()
    exact_T = chance @ matrix @ chance
    for size in (8, 16, 32, 64) + ((256,) if name.startswith("enumerated") else ()):
        drawn = torch.multinomial(chance, replicates * size, True, generator=generator).view(replicates, size)
        unbiased = [dh.u_statistic(matrix[d[:, None], d]) for d in drawn]
        knives = [dh.Estimate(f.value, f.jackknife**0.5, f.count, skewness=f.skewness) for f in unbiased]
        for error, kind in (("unbiased", unbiased), ("jackknife", knives)):
            hits = torch.tensor([low <= exact_T <= high for low, high in (f.interval() for f in kind)])
            coverage[name, error, size] = dh.Estimate.mean(hits.double())
print(f"share of {replicates} intervals at 95% that hold the exact T; standard error "
      f"{coverage['normal', 'unbiased', 64].standard_error:.1%} where it is near 95%")
shares = pd.Series({key: f"{found.value:.0%}" for key, found in coverage.items()})
shares.rename_axis(["population", "error", "B"]).unstack("B").fillna("")

# %%
figure, axes = plt.subplots()
axes.axhspan(0.92, 0.98, color="0.88", label="92% to 98%")
for i, name in enumerate(populations):
    curve = {size: found for (which, error, size), found in coverage.items() if (which, error) == (name, "unbiased")}
    dh.figures.estimates(axes, list(curve), list(curve.values()), i, name)
axes.set(xscale="log", xticks=[8, 16, 32, 64, 256], xticklabels=[8, 16, 32, 64, 256], ylim=(0.5, 1.02),
         xlabel="prompts in the batch, B", ylabel="share of 95% intervals that hold T",
         title="Where rare groups decide, the interval needs hundreds of prompts")
axes.minorticks_off()
axes.legend(loc="lower right")
dh.figures.save(figure, results, "04-coverage")

# %% [markdown]
# *Intervals with the unbiased variance; the bars are the error of counting. From 16 prompts on normal vectors,
# log-normal ones and the transformer's groups lie within the band. Groups of the enumerated policy need hundreds.*
#
# The table says who is served by which error. The jackknife is wider and safer, and too wide where the remainder
# dominates. With normal vectors the interval is honest at 32 prompts <a id="04.37" href="#ledger-04.37">[04.37]</a>,
# with log-normal lengths at 64 <a id="04.38" href="#ledger-04.38">[04.38]</a>. In small batches no variance helps
# against the enumerated policy with two responses a prompt: a few improbable responses with a very negative $S$ carry
# $T$, most batches do not hold one, and such a batch has a small $U$ *and* a small error: at 32 prompts the interval
# covers less than 92% <a id="04.39" href="#ledger-04.39">[04.39]</a>. To measure $\zeta_1$ "in order to know if our
# batch size is big enough", as the notes advise, is necessary, then, and not sufficient: an interval is only as good as
# the batch's chance of having met what decides. With some hundreds of prompts it has, and the interval, which leans by
# the contributions' skewness, is honest again <a id="04.40" href="#ledger-04.40">[04.40]</a>.

# %%
within_band = {"expected": (0.92, 0.98), "rules_out": {"90%": 0.9}, "source": "deltah"}
ledger.holds("04.37", "7", "95% intervals cover 92% to 98%: normal vectors, 32 prompts",
             measured=coverage["normal", "unbiased", 32], **within_band)
ledger.holds("04.38", "7", "95% intervals cover 92% to 98%: log-normal lengths, 64 prompts",
             measured=coverage["log-normal", "unbiased", 64], **within_band)
ledger.holds("04.39", "7", "at 32 prompts of the enumerated policy with G = 2 the 95% interval covers less than 92%",
             measured=coverage["enumerated, G = 2", "unbiased", 32], expected=(0.0, 0.92), rules_out={"95%": 0.95},
             source="deltah")
ledger.holds("04.40", "7", "95% intervals cover 92% to 98%: the enumerated policy's groups, 256 prompts",
             measured=coverage["enumerated, G = 2", "unbiased", 256], **within_band)

# %% [markdown]
# ## What stands
#
# The plan is right: multiply only across prompt groups, and expect $\frac4B\zeta_1+\frac2{B(B-1)}\zeta_2$, with both
# variances taken over groups. What needs mending is small and matters: the sign of (6), the factor two in
# $\mathrm{Var}(Q)$, the single-prompt formula's $1+1/(G-1)^2$, the belief that $G$ is subleading, and the two
# estimators of $\zeta_1$, which are one estimator twice. The residuals of the rows give $\zeta_2$ at no cost, and with
# it an unbiased error.
#
# <a id="remaining"></a>
# ## The remaining equations
#
# What follows completes the proofs; here the notes are right throughout.
#
# ### Steps of the decomposition
#
# The notes take $h_0(p_n,p_m)$ to be the *expectation* of the product over responses, a function of two prompts,
#
# $$ h_0(p_n,p_m)=\frac G{L_{\max}(p_m)(G-1)}\,\mathbb E_{t_h,t_g}\big[(S(t_h|p_n)-\bar S_n)\,K\,A(t_g|p_m)\big] . $$
#
# Read with $\bar S_n$ as the mean of the group that holds $t_h$, the factor $G/(G-1)$ makes it exactly
# $\mathbb E[X|p_n]\cdot\mathbb E[Y|p_m]$ <a id="04.8" href="#ledger-04.8">[04.8]</a>. With $\bar S_n=\mathbb E[S]$, as
# section 2.1 defines it, the factor would have to go. Its symmetrised form is $h$, whose $U$ has the expectation $T$
# <a id="04.13" href="#ledger-04.13">[04.13]</a>.

# %%
raw_terms = minus_mean[:, :1] * K_tiny[members[:, 0]][:, members[:, 0]] * advantages[:, 0]
raw = torch.einsum("pi,piqj,qj->pq", given_prompt, raw_terms.view(D, N**G_two, D, N**G_two), given_prompt) / longest
ledger.holds("04.8", "2.2", "h₀(p_n, p_m) = E[X|p_n]·E[Y|p_m] (largest gap)", expected=0, tolerance=1e-10,
             measured=(raw * G_two / (G_two - 1) - of_prompts).abs().max(), formulas=(22,),
             rules_out={"without G/(G−1)": (raw - of_prompts).abs().max()})
ledger.holds("04.13", "2.2", "U = Σ h(p_n, p_m)/(B(B−1)) over n ≠ m has expectation T", measured=U.mean(), expected=T,
             tolerance=1e-12, formulas=(24,), rules_out={"with 1/B²": T * (B_five - 1) / B_five})

# %% [markdown]
# Batch by batch, each $\phi_1(p_n)$ occurs $2(B-1)$ times among the pairs
# <a id="04.16" href="#ledger-04.16">[04.16]</a>:
#
# $$ U-T=\frac1{B(B-1)}\sum_{n\ne m}\big[\phi_1(p_n)+\phi_1(p_m)+\phi_2(p_n,p_m)\big],\qquad
#    \sum_{n\ne m}\big[\phi_1(p_n)+\phi_1(p_m)\big]=2(B-1)\sum_n\phi_1(p_n), $$
#
# $$ U-T=\frac2B\sum_n\phi_1(p_n)+\frac1{B(B-1)}\sum_{n\ne m}\phi_2(p_n,p_m) . $$
#
# The two sums are uncorrelated, because $\phi_2$ has mean zero over either argument
# <a id="04.17" href="#ledger-04.17">[04.17]</a>:
#
# $$ \mathrm{Cov}\Big(\sum_n\phi_1(p_n),\sum_{m\ne l}\phi_2(p_m,p_l)\Big)
#    =\sum_{n,m\ne l}\mathbb E[\phi_1(p_n)\phi_2(p_m,p_l)]=0 . $$

# %%
phi_1_batch, pairs_in_batch = phi_1[batches], B_five * (B_five - 1)
pair_sums = ((phi_1_batch[:, :, None] + phi_1_batch[:, None, :]) * off_diagonal).sum((1, 2))
gap = torch.stack([U - T - (pair_sums + quadratic) / pairs_in_batch, pair_sums - 2 * (B_five - 1) * linear,
                   U - T - 2 / B_five * linear - quadratic / pairs_in_batch]).abs().max()
half_phi = (h_batch.sum((1, 2)) - pair_sums / 2) - pairs_in_batch * T
ledger.holds("04.16", "2.2", "U − T = Σ[φ₁ + φ₁ + φ₂]/(B(B−1)) = 2/B Σ φ₁ + Σ φ₂/(B(B−1)) (largest gap)",
             measured=gap, expected=0, tolerance=1e-12, formulas=(27, 28, 29),
             rules_out={"1/B in place of 2/B": (linear / B_five).abs().max()})
ledger.holds("04.17", "2.2", "Cov(Σ φ₁, Σ φ₂) = 0", measured=(linear * quadratic).mean(), expected=0, tolerance=1e-12,
             formulas=(25, 26, 30), rules_out={"φ₁ taken off once, not twice": (linear * half_phi).mean()})

# %% [markdown]
# So their variances add. That of the first is a sum over independent prompts
# <a id="04.18" href="#ledger-04.18">[04.18]</a>, and that of the second has its factor two back
# <a id="04.20" href="#ledger-04.20">[04.20]</a>:
#
# $$ \mathrm{Var}\Big(\frac2B\sum_n\phi_1(p_n)\Big)=\frac4{B^2}\,B\,\mathrm{Var}(\phi_1)=\frac4B\zeta_1,\qquad
#    \mathrm{Var}\Big(\frac Q{B(B-1)}\Big)=\frac2{B(B-1)}\zeta_2 . $$

# %%
ledger.holds("04.18", "2.2", "Var(2/B Σ φ₁) = 4ζ₁/B", measured=(2 / B_five * linear).var(correction=0),
             expected=4 / B_five * zeta_1, tolerance=1e-12, formulas=(32,),
             rules_out={"2ζ₁/B": 2 / B_five * zeta_1})
ledger.holds("04.20", "2.2", "Var(Σφ₂/(B(B−1))) = 2ζ₂/(B(B−1))", expected=2 / pairs_in_batch * zeta_2, tolerance=1e-12,
             measured=(quadratic / pairs_in_batch).var(correction=0), formulas=(34,),
             rules_out={"ζ₂/(B(B−1))": zeta_2 / pairs_in_batch})

# %% [markdown]
# ### Computing U and its rows
#
# None of the formulas for computing $U$ depends on what $X$ and $Y$ are, so we check them on a batch of groups drawn
# from the population, $B=12$, with the vectors themselves rather than their inner products. The cheap formula needs
# two running means and one inner product a prompt, nothing of size $B^2$
# <a id="04.23" href="#ledger-04.23">[04.23]</a>:
#
# $$ U=\frac B{B-1}\bar X\cdot\bar Y-\frac1{B(B-1)}\sum_nX_n\cdot Y_n . $$

# %%
B_twelve = 12
some = torch.multinomial(group_share, B_twelve, replacement=True, generator=torch.Generator().manual_seed(0))
X, Y = x_two[some] @ gradients, y_two[some] @ gradients
from_pairs = dh.u_statistic(X @ Y.T)
plug_in, diagonal = X.mean(0) @ Y.mean(0), (X * Y).sum() / (B_twelve * (B_twelve - 1))
ledger.holds("04.23", "2.2.1", "U = Σ_{n≠m} X_n·Y_m/(B(B−1)) = B/(B−1) X̄·Ȳ − ΣX_n·Y_n/(B(B−1))", formulas=(38,),
             measured=B_twelve / (B_twelve - 1) * plug_in - diagonal, expected=from_pairs.value, tolerance=1e-10,
             rules_out={"X̄·Ȳ": plug_in})

# %% [markdown]
# The row averages are all that a jackknife needs:
#
# $$ r_n=\frac1{B-1}\sum_{m\ne n}h(p_m,p_n)=\frac12(X_n\cdot\bar Y_{-n}+Y_n\cdot\bar X_{-n}),\qquad
#    \phi_n=r_n-U,\qquad U_{(-n)}=\frac{BU-2r_n}{B-2} . $$
#
# The vectors give the rows of $h$ <a id="04.24" href="#ledger-04.24">[04.24]</a>, whose mean is $U$, so that $\phi_n$
# has mean zero <a id="04.25" href="#ledger-04.25">[04.25]</a>, and the statistic without prompt $n$ needs no second
# look at the data <a id="04.26" href="#ledger-04.26">[04.26]</a>.

# %%
others_X, others_Y = ((Z.sum(0) - Z) / (B_twelve - 1) for Z in (X, Y))
r = ((X * others_Y).sum(1) + (Y * others_X).sum(1)) / 2
keep = [torch.arange(B_twelve) != n for n in range(B_twelve)]
left_out = torch.tensor([dh.u_statistic(X[k] @ Y[k].T).value for k in keep], dtype=torch.float64)
from_rows = (B_twelve * from_pairs.value - 2 * r) / (B_twelve - 2)
ledger.holds("04.24", "2.2.1", "r_n = ½(X_n·Ȳ₋ₙ + Y_n·X̄₋ₙ) is the row average of h (largest gap)", tolerance=1e-10,
             measured=(r - from_pairs.contributions).abs().max(), expected=0, formulas=(39,),
             rules_out={"X_n·Ȳ₋ₙ alone": ((X * others_Y).sum(1) - from_pairs.contributions).abs().max()})
ledger.holds("04.25", "2.2.1", "φ_n = r_n − U has mean zero", measured=(r - from_pairs.value).mean(), expected=0,
             tolerance=1e-10, formulas=(40,), rules_out={"X̄·Ȳ for U": from_pairs.value - plug_in})
ledger.holds("04.26", "2.2.1", "U₍₋ₙ₎ = (BU − 2r_n)/(B − 2) (largest gap)", expected=0, tolerance=1e-10,
             measured=(left_out - from_rows).abs().max(), formulas=(42,),
             rules_out={"U without n's row alone": (left_out - (B_twelve * from_pairs.value - r) / 11).abs().max()})

# %% [markdown]
# ### The parts of the unbiased variance
#
# One by one, over all 1024 batches of section 4: $\hat\zeta_1$ with its correction
# <a id="04.33" href="#ledger-04.33">[04.33]</a> and $\hat\zeta_2$ of the residuals
# <a id="04.34" href="#ledger-04.34">[04.34]</a> have the expectations that section 5 gives them.

# %%
ledger.holds("04.33", "5", "ζ̂₁ with the correction for ζ₂ is unbiased", measured=mean["zeta1"], expected=zeta_1,
             tolerance=1e-12, source="deltah", rules_out={"the jackknife's": mean["jackknife ζ₁"]})
ledger.holds("04.34", "5", "ζ̂₂ from the residuals is unbiased", measured=mean["zeta2"], expected=zeta_2,
             tolerance=1e-12, source="deltah", rules_out={"Var(h)": h.var(correction=0)})

# %% [markdown]
# ### Per token
#
# "We could also try measuring the per token entropy. This would involve introducing importance weights to account for
# the varying lengths of sequences." Lengths do have to be accounted for <a id="04.44" href="#ledger-04.44">[04.44]</a>.
# With $L$ for a response's length, its first EOS token included, the entropy per token is the ratio
# $\mathfrak h=\mathbb E[-S]/\mathbb E[L]$, and an update changes both expectations:
#
# $$ \partial\mathfrak h=-\frac{\mathbb E[(S+\mathfrak h L)\,\partial S]}{\mathbb E[L]} . $$
#
# So each response's length enters beside its log-prob, with the weight $\mathfrak h$, and this chapter holds with
# $S+\mathfrak h L$ in place of $S$. Weights $\pi_{\theta'}/\pi_\theta$ are not needed at first order; chapter 06 meets
# them where old rollouts measure a finite change.

# %%
response_lengths = responses.response_mask.sum(1).double()
mean_length = response_share @ response_lengths
per_token = -(response_share @ log_probs) / mean_length
of_lengths, of_log_probs = ((response_share * q).detach() @ gradients / mean_length.detach()
                            for q in (response_lengths, S_tiny))
ledger.holds("04.44", "2.2.2", "the entropy per token has to account for lengths: S + 𝔥L in place of S (change/η)",
             measured=flat_gradient(tiny, per_token) @ mean_Y, tolerance=1e-10,
             expected=-(of_log_probs + per_token.detach() * of_lengths) @ mean_Y,
             rules_out={"lengths left alone": -of_log_probs @ mean_Y})

# %% [markdown]
# ## Ledger

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Section 4 found four to six responses best on the enumerated policy. Give `tiny_policy` an `eos_logit` of 3, so
#    that long responses are rare. Where is the best $G$ now?
# 2. Replace the group mean in $A$ by the leave-one-out mean. Which entries of the ledger change?
# 3. For one prompt, let the baseline of each pair leave out *both* responses. Show that section 3's bias vanishes.
# 4. Raise `prompts_in_batch` until $U$ on the shipped policy is twice its error. Was the lower end of section 6 right?
#
# ## Further reading
#
# - Hoeffding, W. *A class of statistics with asymptotically normal distribution*, Annals of Mathematical Statistics
#   1948.
# - Efron, B. and Stein, C. *The jackknife estimate of variance*, Annals of Statistics 1981: why it errs upwards.
# - van der Vaart, A. *Asymptotic Statistics*, Cambridge 1998, chapters 11 and 12.
