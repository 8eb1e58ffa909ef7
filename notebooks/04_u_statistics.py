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
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | a U-statistic over the responses of one prompt; equations (6), (7) over prompt groups | notes 2.2 |
# | 2 | the kernel $h_0$, the target $T$, the statistic $U$ | notes 2.2 |
# | 3 | $\phi_1$, $\phi_2$ and the decomposition of $U-T$ | notes 2.2 |
# | 4 | $\mathrm{Var}(U)=\frac4B\zeta_1+\frac2{B(B-1)}\zeta_2$ and the steps towards it | notes 2.2 |
# | 5 | $X_n$, $Y_n$, the cheap formula for $U$, the row averages $r_n$ | notes 2.2.1 |
# | 6 | $\hat\zeta_1$, the jackknife, and the plan to compare the two | notes 2.2.1 |
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
ledger = dh.Ledger("04", source="notes")

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
S, pi = scores.log_probs.sum(1), dh.exact.probabilities(scores).detach()
D, N = len(prompts), len(responses) // len(prompts)
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
longest = torch.tensor([8.0 - len(prompt) for prompt in prompts], dtype=torch.float64)
print(f"{D} prompts with {N} responses each; probabilities sum to {pi.view(D, N).sum(1).numpy().round(10)}")

# %% [markdown]
# The gradient of every response's log-prob $S(t|p)$ makes a matrix with one row for each response. Its Gram matrix is
# the Fisher kernel $K$ of chapter 08. Every inner product of this chapter is a weighted sum of entries of $K$.

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in S])
K, S_now = gradients @ gradients.T, S.detach()
print(f"gradients: {list(gradients.shape)}, kernel: {list(K.shape)}")

# %% [markdown]
# What we want is known from two more gradients: that of the entropy $\mathcal H$, averaged over prompts, and that of
# the objective $J$ with its normalisation by $L_{\max}(p)$. The step is $\delta\theta=\eta\,\nabla J$.

# %%
share = S.exp() / D
grad_H = flat_gradient(tiny, -(share * S).sum())
grad_J = flat_gradient(tiny, (share * rewards / longest.repeat_interleave(N)).sum())
print(f"dH/dη of one exact step: {grad_H @ grad_J:+.4f} nats per unit of learning rate")

# %% [markdown]
# ## 2 · Groups, and the vectors they contribute
#
# A batch does not hold responses; it holds *groups*, $G$ responses to one prompt. From each group the notes build
#
# $$ X_n=\frac1G\sum_{g\in G_n}(S_{n,g}-\bar S_{n,-g})\,g_{n,g},\qquad
#    Y_n=\frac1{L_{\max}(p_n)\,G}\sum_{g\in G_n}A_{n,g}\,g_{n,g}, $$
#
# with $\bar S_{n,-g}$ the mean over the *other* responses of the group and $A=R-\bar R$ the advantage as it enters the
# update. With $G=2$ there are 49 ordered groups for each prompt, 196 in all, and the probability of each is a
# product. We hold $X$ and $Y$ as weights over the 28 responses, so that $X_n\cdot Y_m$ is `x[n] @ K @ y[m]`.

# %%
G = 2
draws = torch.cartesian_prod(*[torch.arange(N)] * G)
members = (N * torch.arange(D)[:, None, None] + draws).flatten(0, 1)
group_share = pi[members].prod(1) / D
S_group, R_group = S_now[members], rewards[members]
leave_one_out = S_group - (S_group.sum(1, keepdim=True) - S_group) / (G - 1)
advantages = R_group - R_group.mean(1, keepdim=True)
L_group = longest.repeat_interleave(len(draws))[:, None]
x = torch.zeros(len(members), N * D, dtype=torch.float64).scatter_add(1, members, leave_one_out / G)
y = torch.zeros_like(x).scatter_add(1, members, advantages / (G * L_group))

# %% [markdown]
# The two expectations. $\mathbb E[X]$ is $-\nabla\mathcal H$: the leave-one-out baseline is independent of the
# response it is subtracted for, so it biases nothing. $\mathbb E[Y]$ is *not* $\nabla J$. The advantage subtracts a
# mean that holds the response's own reward, which shortens the expected update by $(G-1)/G$. As $Y$ is what training
# does, that is what a prediction should use; to read $\nabla J$ from it, one has to undo the factor.

# %%
mean_X, mean_Y = (group_share @ weights @ gradients for weights in (x, y))
ledger.holds("04.1", "2.2.1", "X_n with the leave-one-out baseline is an unbiased estimate of −∇H (largest gap)",
             measured=(mean_X + grad_H).abs().max(), expected=0, tolerance=1e-10)
ledger.corrected("04.2", "2.2.1", "E[Y_n] is the policy gradient ∇J, with A = R − R̄ (length ratio)",
                 correction="E[Y_n] = (G−1)/G ∇J: the mean R̄ includes the response's own reward",
                 measured=mean_Y.norm() / grad_J.norm(), expected=(G - 1) / G, as_printed=1, tolerance=1e-10)

# %% [markdown]
# Equation (7) writes the same with the *full* group mean $\bar S_n$ and the prefactor $1/(G(G-1))$. Since
# $S_g-\bar S_{-g}=\frac{G}{G-1}(S_g-\bar S)$, both are one thing. The sign in front of (6) is another matter: $X$
# estimates *minus* the entropy gradient, so the entropy change is $-\eta\,X\cdot Y$, and the printed $+\eta$ predicts
# collapse where there is growth.

# %%
full_mean = (S_group - S_group.mean(1, keepdim=True)) / (G - 1)
products = x @ K @ y.T
target = group_share @ products @ group_share
ledger.holds("04.3", "2.2 (7)", "mean baseline with 1/(G−1) is the leave-one-out baseline with 1/G",
             measured=(full_mean - leave_one_out / G).abs().max(), expected=0, tolerance=1e-12)
ledger.corrected("04.4", "2.2 (6), (7)", "E[δĤ₁]/η is the first-order entropy change along the expected update",
                 correction="the sign: −η in place of +η, as X estimates −∇H",
                 measured=grad_H @ mean_Y, expected=-target, as_printed=target, tolerance=1e-10)

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
# is $1+\frac1{(G-1)^2}$ times what it should be. We enumerate groups of three, where that is a quarter too much.

# %%
three = torch.cartesian_prod(*[torch.arange(N)] * 3)
S_3, R_3, K_3 = S_now[three], rewards[three], K[three[:, :, None], three[:, None, :]]
left = 1.5 * (S_3 - S_3.mean(1, keepdim=True))
pairs = left[:, :, None] * K_3 * (R_3 - R_3.mean(1, keepdim=True))[:, None, :]
one_prompt = (pairs.sum((1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(1)) / 6
expected_one = pi[three].prod(1) @ one_prompt
first = pi[:N, None] * gradients[:N]
truth = (S_now[:N] @ first) @ (rewards[:N] @ first) * 2 / 3
print(f"expectation over {len(three)} groups / truth: {expected_one / truth:.6f}")

# %%
ledger.corrected("04.5", "2.2", "the U-statistic over responses of one prompt is unbiased (ratio to the truth, G = 3)",
                 correction="too large by 1 + 1/(G−1)², as the baselines share samples; and −η is missing",
                 measured=expected_one / truth, expected=1 + 1 / 4, as_printed=1, tolerance=1e-10)

# %% [markdown]
# ### Several prompts
#
# The naive U-statistic runs over all pairs of the $BG$ responses in a batch. Two responses to one prompt are
# independent only *given* the prompt, and their product has the expectation $\mathbb E_p[x(p)\cdot y(p)]$, with
# $x(p),y(p)$ the prompt's own means, in place of $\mathbb E_p[x(p)]\cdot\mathbb E_p[y(p)]$. Of the $BG(BG-1)$ ordered
# pairs a share of $(G-1)/(BG-1)$ is of that kind, so the bias is
#
# $$ \mathbb E[\text{naive}]-T=\frac{G-1}{BG-1}\;\mathrm{Tr}\,\mathrm{Cov}_p\big(x(p),\,y(p)\big). $$
#
# To see this bias alone, we use each prompt's exact baselines here. All batches of two groups are enumerated.

# %%
mean_S, mean_R = ((pi * q).view(D, N).sum(1).repeat_interleave(N) for q in (S_now, rewards))
single_x, single_y = torch.diag(S_now - mean_S), torch.diag((rewards - mean_R) / longest.repeat_interleave(N))
pair = single_x @ K @ single_y
within = pair[members[:, 0], members[:, 1]] + pair[members[:, 1], members[:, 0]]
across = pair[members[:, None, :, None], members[None, :, None, :]].sum((2, 3))
both = across + across.T
naive = (within[:, None] + within + both) / 12
grouped = both / 8

# %%
prompt_x, prompt_y = ((pi[:, None] * w).view(D, N, -1).sum(1) for w in (single_x, single_y))
per_prompt = prompt_x @ K @ prompt_y.T
true_product = per_prompt.mean()
trace = per_prompt.diagonal().mean() - true_product
expected_naive, expected_grouped = (group_share @ u @ group_share for u in (naive, grouped))
print(f"T {true_product:+.4f}, over groups {expected_grouped:+.4f}, naive {expected_naive:+.4f}, "
      f"Tr Cov {trace:+.4f}")
ledger.holds("04.6", "2.2", "over prompt groups the U-statistic is unbiased",
             measured=expected_grouped, expected=true_product, tolerance=1e-10)
ledger.holds("04.7", "derived here", "the naive U-statistic is biased by (G−1)/(BG−1) Tr Cov_p(x, y)",
             measured=expected_naive - true_product, expected=trace * (G - 1) / (2 * G - 1), tolerance=1e-10)

# %% [markdown]
# ## 4 · The Hoeffding decomposition, term by term
#
# The notes take $h_0(p_n,p_m)$ to be the *expectation* of the product over responses, a function of two prompts. Read
# with $\bar S_n$ as the mean of the group that holds $t_h$, the factor $G/(G-1)$ makes it exactly
# $\mathbb E[X|p_n]\cdot\mathbb E[Y|p_m]$. (With $\bar S_n=\mathbb E[S]$, as section 2.1 defines it, the factor would
# have to go.)

# %%
given_prompt = group_share.view(D, -1) * D
product_given_prompts = torch.einsum("pi,piqj,qj->pq", given_prompt, products.view(D, N**G, D, N**G), given_prompt)
one_left = (S_group - S_group.mean(1, keepdim=True))[:, 0]
terms = one_left[:, None] * K[members[:, 0]][:, members[:, 0]] * advantages[:, 0]
h_0 = torch.einsum("pi,piqj,qj->pq", given_prompt, terms.view(D, N**G, D, N**G), given_prompt)
h_0 = h_0 * G / (G - 1) / longest
ledger.holds("04.8", "2.2", "h₀(p_n, p_m) = E[X|p_n]·E[Y|p_m] (largest gap)",
             measured=(h_0 - product_given_prompts).abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# Symmetrise, average, and split: $T=\mathbb E[h]$, $\phi_1(p)=\mathbb E_{p'}[h(p,p')]-T$, and
# $\phi_2(p,p')=h-T-\phi_1(p)-\phi_1(p')$. The target's sign is that of (6).

# %%
h = (h_0 + h_0.T) / 2
T, phi_1 = h.mean(), h.mean(1) - h.mean()
phi_2 = h - T - phi_1[:, None] - phi_1
zeta_1, zeta_2 = phi_1.square().mean(), phi_2.square().mean()
print(f"T {T:+.4f}, ζ₁ {zeta_1:.5f}, ζ₂ {zeta_2:.5f}")
ledger.corrected("04.9", "2.2", "T = E[δH₁] = E[h]", correction="E[δH₁] = −η E[h]: a sign and the learning rate",
                 measured=grad_H @ mean_Y, expected=-T, as_printed=T, tolerance=1e-10)
ledger.holds("04.10", "2.2", "φ₁ has mean zero", measured=phi_1.mean(), expected=0, tolerance=1e-12)
ledger.holds("04.11", "2.2", "φ₂ has mean zero over either argument (largest mean)",
             measured=phi_2.mean(0).abs().max() + phi_2.mean(1).abs().max(), expected=0, tolerance=1e-12)
ledger.holds("04.12", "2.2", "ζ₁ = Var φ₁(p) = Var(E[h(p,p′)|p])",
             measured=zeta_1, expected=h.mean(1).var(correction=0), tolerance=1e-12)

# %% [markdown]
# Now every batch of $B=5$ prompts, drawn with replacement: $4^5=1024$ of them, equally likely. Two places in a batch
# may hold one prompt; they are still independent draws, so $h(p,p)$ counts there.

# %%
B = 5
batches = torch.cartesian_prod(*[torch.arange(D)] * B)
off_diagonal = ~torch.eye(B, dtype=torch.bool)
h_batch = h[batches[:, :, None], batches[:, None, :]] * off_diagonal
phi_2_batch = phi_2[batches[:, :, None], batches[:, None, :]] * off_diagonal
phi_1_batch = phi_1[batches]
U = h_batch.sum((1, 2)) / (B * (B - 1))
linear, quadratic = phi_1_batch.sum(1), phi_2_batch.sum((1, 2))
print(f"{len(U)} batches: mean U {U.mean():+.4f}, standard deviation {U.std(correction=0):.4f}")

# %% [markdown]
# The displayed identities hold batch by batch:
#
# $$ U-T=\frac1{B(B-1)}\sum_{n\ne m}\big[\phi_1(p_n)+\phi_1(p_m)+\phi_2(p_n,p_m)\big]
#       =\frac2B\sum_n\phi_1(p_n)+\frac1{B(B-1)}\sum_{n\ne m}\phi_2(p_n,p_m). $$

# %%
pair_sums = ((phi_1_batch[:, :, None] + phi_1_batch[:, None, :]) * off_diagonal).sum((1, 2))
ledger.holds("04.13", "2.2", "U = Σ h(p_n, p_m)/(B(B−1)) over n ≠ m has expectation T",
             measured=U.mean(), expected=T, tolerance=1e-12)
ledger.holds("04.14", "2.2", "U − T as a sum over pairs of φ₁ + φ₁ + φ₂ (largest gap)", expected=0, tolerance=1e-12,
             measured=(U - T - (pair_sums + quadratic) / (B * (B - 1))).abs().max())
ledger.holds("04.15", "2.2", "Σ_{n≠m} φ₁(p_n) + φ₁(p_m) = 2(B−1) Σ φ₁(p_n) (largest gap)",
             measured=(pair_sums - 2 * (B - 1) * linear).abs().max(), expected=0, tolerance=1e-12)
ledger.holds("04.16", "2.2", "U − T = 2/B Σ φ₁ + Σ φ₂/(B(B−1)) (largest gap)", expected=0, tolerance=1e-12,
             measured=(U - T - 2 / B * linear - quadratic / (B * (B - 1))).abs().max())

# %% [markdown]
# And so do the variances, with one slip on the way. For the sum of the remainders $S=\sum_{n\ne m}\phi_2$ the notes
# print $\mathrm{Var}(S)=2\sum_{n\ne m}\mathrm{Var}(\phi_2)=B(B-1)\zeta_2$. The first step is right, and there are
# $B(B-1)$ terms in it, so the second has lost the factor two. It comes back in the following line, and the final
# formula $\mathrm{Var}(U)=\frac4B\zeta_1+\frac2{B(B-1)}\zeta_2$ is right.

# %%
ledger.holds("04.17", "2.2", "Cov(Σ φ₁, Σ φ₂) = 0", measured=(linear * quadratic).mean(), expected=0, tolerance=1e-12)
ledger.holds("04.18", "2.2", "Var(2/B Σ φ₁) = 4ζ₁/B",
             measured=(2 / B * linear).var(correction=0), expected=4 / B * zeta_1, tolerance=1e-12)
ledger.corrected("04.19", "2.2", "Var(S) = 2 Σ Var(φ₂) = B(B−1) ζ₂", correction="Var(S) = 2B(B−1) ζ₂",
                 measured=quadratic.var(correction=0), expected=2 * B * (B - 1) * zeta_2,
                 as_printed=B * (B - 1) * zeta_2, tolerance=1e-10)
ledger.holds("04.20", "2.2", "Var(S/(B(B−1))) = 2ζ₂/(B(B−1))", tolerance=1e-12,
             measured=(quadratic / (B * (B - 1))).var(correction=0), expected=2 / (B * (B - 1)) * zeta_2)
ledger.holds("04.21", "2.2", "Var(U) = 4ζ₁/B + 2ζ₂/(B(B−1)) for the prompt kernel h",
             measured=U.var(correction=0), expected=4 / B * zeta_1 + 2 / (B * (B - 1)) * zeta_2, tolerance=1e-12)

# %% [markdown]
# ### The unit of sampling is the group, not the prompt
#
# All this concerned a $U$ that knows the expectation over responses. The $U$ one can *compute* has $G$ sampled
# responses in each $X_n$, and their noise belongs in its variance. The decomposition needs no change: let its argument
# be the group $z=(p,t_1,\dots,t_G)$ in place of $p$. With our 196 groups and $B=3$ there are $196^3$ batches, few
# enough to add up all of them.

# %%
kernel = (products + products.T) / 2
group_phi_1 = kernel @ group_share - T
group_phi_2 = kernel - T - group_phi_1[:, None] - group_phi_1
group_zeta_1 = group_share @ group_phi_1.square()
group_zeta_2 = group_share @ group_phi_2.square() @ group_share
second_moment = 0.0
for first_group, weight in zip(kernel, group_share, strict=True):
    u = (first_group[:, None] + first_group + kernel) / 3
    second_moment += weight * (group_share @ u.square() @ group_share)
print(f"{len(kernel)**3:,} batches; ζ₁ {zeta_1:.4f} of prompts, {group_zeta_1:.4f} of groups; "
      f"ζ₂ {zeta_2:.4f} of prompts, {group_zeta_2:.4f} of groups")

# %%
ledger.corrected("04.22", "2.2", "Var(U) of the statistic that is computed, with sampled responses (B = 3)",
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
# ## 5 · Computing U and its rows
#
# None of the formulas for computing $U$ depends on what $X$ and $Y$ are, so we check them on a batch of groups drawn
# from the population, $B=12$, with the vectors themselves rather than their inner products.

# %%
B = 12
generator = torch.Generator().manual_seed(seed)
drawn = torch.multinomial(group_share, B, replacement=True, generator=generator)
X, Y = x[drawn] @ gradients, y[drawn] @ gradients
statistic = dh.u_statistic(X @ Y.T)
print(f"U = {statistic}, exact T = {T:.4f}")

# %% [markdown]
# The cheap formula needs two running means and one inner product a prompt, nothing of size $B^2$:
#
# $$ U=\frac B{B-1}\bar X\cdot\bar Y-\frac1{B(B-1)}\sum_nX_n\cdot Y_n . $$
#
# The row average $r_n=\frac1{B-1}\sum_{m\ne n}h(p_m,p_n)=\frac12(X_n\cdot\bar Y_{-n}+Y_n\cdot\bar X_{-n})$ is all that
# a jackknife needs, because the statistic without prompt $n$ is $U_{(-n)}=(BU-2r_n)/(B-2)$.

# %%
cheap = B / (B - 1) * X.mean(0) @ Y.mean(0) - (X * Y).sum() / (B * (B - 1))
others_X, others_Y = ((Z.sum(0) - Z) / (B - 1) for Z in (X, Y))
r = ((X * others_Y).sum(1) + (Y * others_X).sum(1)) / 2
keep = [torch.arange(B) != n for n in range(B)]
left_out = torch.tensor([dh.u_statistic(X[k] @ Y[k].T).value for k in keep], dtype=torch.float64)
ledger.holds("04.23", "2.2.1", "U = Σ_{n≠m} X_n·Y_m/(B(B−1)) = B/(B−1) X̄·Ȳ − ΣX_n·Y_n/(B(B−1))",
             measured=cheap, expected=statistic.value, tolerance=1e-10)
ledger.holds("04.24", "2.2.1", "r_n = ½(X_n·Ȳ₋ₙ + Y_n·X̄₋ₙ) is the row average of h (largest gap)", tolerance=1e-10,
             measured=(r - statistic.contributions).abs().max(), expected=0)
ledger.holds("04.25", "2.2.1", "the mean of r_n is U", measured=r.mean(), expected=statistic.value, tolerance=1e-10)
ledger.holds("04.26", "2.2.1", "U₍₋ₙ₎ = (BU − 2r_n)/(B − 2) (largest gap)", expected=0, tolerance=1e-10,
             measured=(left_out - (B * statistic.value - 2 * r) / (B - 2)).abs().max())

# %% [markdown]
# ## 6 · Measuring ζ₁
#
# Two estimators are proposed: the spread of the rows, $\hat\zeta_1=\frac1{B-1}\sum_n\phi_n^2$ with $\phi_n=r_n-U$, and
# $\frac B4$ times the jackknife variance. "I think what I will do is compute both of these and compare them." We do it
# on all 1024 batches of five prompts, so that the comparison is between expectations.

# %%
B = 5
fits = [dh.u_statistic(h[b[:, None], b]) for b in batches]
estimators = ("zeta1_notes", "jackknife", "zeta1", "zeta2", "variance")
columns = {name: torch.tensor([getattr(f, name) for f in fits], dtype=torch.float64) for name in estimators}
mean = {name: column.mean() for name, column in columns.items()}
jackknife_zeta = B / 4 * columns["jackknife"]
pd.Series({"ζ₁, true": zeta_1, "ζ̂₁ of the rows": mean["zeta1_notes"], "ζ̂₁ of the jackknife": jackknife_zeta.mean(),
           "ζ̂₁ unbiased": mean["zeta1"]}, name="expectation").astype(float).round(6).to_frame()

# %% [markdown]
# Neither hits $\zeta_1$. The reason is in the rows. Given its prompt, a row has the expectation $T+\phi_1(p_n)$; but
# $U$ contains that row too, and subtracting it leaves $\mathbb E[\phi_n|p_n]=(1-\tfrac2B)\,\phi_1(p_n)$: the rows are
# *pulled towards* $U$. On top of that each row carries the noise of $\phi_2$. Together,
#
# $$ \mathbb E\,\hat\zeta_1=\Big(\frac{B-2}{B-1}\Big)^2\zeta_1+\frac{B-2}{(B-1)^2}\,\zeta_2,\qquad
#    \mathbb E\,\hat\zeta_{1,\rm jackknife}=\zeta_1+\frac{\zeta_2}{B-2}. $$
#
# And comparing the two tells nothing. Insert $U_{(-n)}-\overline{U_{(-\cdot)}}=-\frac2{B-2}\phi_n$ into the jackknife:
# the second is $\big(\frac{B-1}{B-2}\big)^2$ times the first, in every batch.

# %%
rows_phi = torch.stack([f.contributions - f.value for f in fits])
seen_from_first = torch.stack([rows_phi[batches[:, 0] == p, 0].mean() for p in range(D)])
ledger.corrected("04.27", "2.2.1", "φ_n = r_n − U estimates φ₁(p_n) (ratio of E[φ_n|p_n] to φ₁)",
                 correction="E[φ_n|p_n] = (1 − 2/B) φ₁(p_n), as U contains the row",
                 measured=(seen_from_first / phi_1).max(), expected=1 - 2 / B, as_printed=1, tolerance=1e-10)
ledger.holds("04.28", "2.2.1", "Σ φ_n = 0 in every batch (largest sum)",
             measured=rows_phi.sum(1).abs().max(), expected=0, tolerance=1e-12)
ledger.corrected("04.29", "2.2.1", "ζ̂₁ = Σφ_n²/(B−1) is an estimator of ζ₁ (expectation)",
                 correction="its expectation is ((B−2)/(B−1))² ζ₁ + (B−2)/(B−1)² ζ₂", measured=mean["zeta1_notes"],
                 expected=((B - 2) * zeta_1 + zeta_2) * (B - 2) / (B - 1) ** 2, as_printed=zeta_1, tolerance=1e-10)
ledger.corrected("04.30", "2.2.1", "ζ̂₁ of the jackknife, B/4 of its variance, estimates ζ₁ (expectation)",
                 correction="its expectation is ζ₁ + ζ₂/(B−2)", measured=jackknife_zeta.mean(),
                 expected=zeta_1 + zeta_2 / (B - 2), as_printed=zeta_1, tolerance=1e-10)
ledger.corrected("04.31", "2.2.1", "the two estimates of ζ₁ can be compared (largest ratio among all batches)",
                 correction="their ratio is ((B−1)/(B−2))² in every batch, whatever the data",
                 measured=(jackknife_zeta / columns["zeta1_notes"]).nan_to_num().max(),
                 expected=((B - 1) / (B - 2)) ** 2, as_printed=1, tolerance=1e-10)

# %% [markdown]
# The jackknife *variance* therefore errs on the safe side, by $2\zeta_2/((B-1)(B-2))$. An unbiased estimate needs one
# more ingredient, the residual of $h$ after its rows are fitted, which estimates $\zeta_2$ and is never negative:
#
# $$ \hat\zeta_2=\frac1{B(B-3)}\sum_{n\ne m}\Big[h_{nm}-U-\tfrac{B-1}{B-2}(\phi_n+\phi_m)\Big]^2,\qquad
#    \hat\zeta_1=\hat\zeta_{1,\rm jackknife}-\frac{\hat\zeta_2}{B-2}. $$
#
# These are what `u_statistic` returns, and $\frac4B\hat\zeta_1+\frac2{B(B-1)}\hat\zeta_2$ is then an unbiased
# $\mathrm{Var}(U)$. It takes four prompts; with three, the jackknife is all there is.

# %%
ledger.corrected("04.32", "2.2.1", "the jackknife estimates Var(U) (expectation)",
                 correction="it exceeds Var(U) by 2ζ₂/((B−1)(B−2))", measured=mean["jackknife"],
                 expected=U.var(correction=0) + 2 * zeta_2 / ((B - 1) * (B - 2)), as_printed=U.var(correction=0),
                 tolerance=1e-10)
ledger.holds("04.33", "derived here", "ζ̂₁ with the correction for ζ₂ is unbiased",
             measured=mean["zeta1"], expected=zeta_1, tolerance=1e-12)
ledger.holds("04.34", "derived here", "ζ̂₂ from the residuals is unbiased",
             measured=mean["zeta2"], expected=zeta_2, tolerance=1e-12)
ledger.holds("04.35", "derived here", "4ζ̂₁/B + 2ζ̂₂/(B(B−1)) is an unbiased estimate of Var(U)",
             measured=mean["variance"], expected=U.var(correction=0), tolerance=1e-12)

# %% [markdown]
# How far off are the three in practice? For groups of the enumerated policy we draw the expectations, which are exact,
# against the size of the batch.

# %%
sizes = torch.arange(4, 65, dtype=torch.float64)
relative = group_zeta_2 / group_zeta_1
figure, axes = plt.subplots()
axes.semilogx(sizes, 1 + relative / (sizes - 2), "--", color="C1", label="jackknife")
axes.semilogx(sizes, ((sizes - 2) + relative) * (sizes - 2) / (sizes - 1) ** 2, "-.", color="C0",
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
# ## 7 · The shipped policy
#
# Now real rollouts: the shipped policy, or whatever `model` names, with $G$ responses to each of $B$ prompts, the
# advantage $A=R-\bar R$ and $L_{\max}$ the cap on new tokens. For comparison we also give every response a random
# advantage that has nothing to do with it. The expected update is then zero, and so is the true $T$.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
B, G = min(prompts_in_batch, len(table)), responses_per_prompt
rollouts = dh.sample(policy, table.select(range(B)), G, max_new_tokens, seed=seed)
A = dh.objectives.group_advantages(rollouts.rewards, rollouts.prompt_index, scale=False)
coins = torch.randn(B * G, generator=generator, dtype=torch.float64).to(A)
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
y, y_random = (weights.double() / (G * max_new_tokens) for weights in (A, coins))
terms, at_coins = (x[:, None] * K * weights for weights in (y, y_random))
shipped, random_products = (t.view(B, G, B, G).sum((1, 3)) for t in (terms, at_coins))
same_prompt = (shipped.diagonal() - terms.diagonal().view(B, G).sum(1)) * G / (G - 1)

# %%
statistic, at_random = dh.u_statistic(shipped), dh.u_statistic(random_products)
inside = dh.Estimate.mean(same_prompt)
naive = statistic.value + (G - 1) / (B * G - 1) * (inside.value - statistic.value)
of_zeta_1 = 4 * statistic.zeta1 / B / statistic.variance
print(f"U over prompt groups          {statistic}\n"
      f"products inside a prompt      {inside}\n"
      f"naive U over all responses    {naive:.3f}\n"
      f"U with random advantages      {at_random}")
print(f"ζ₁ {statistic.zeta1:.3f}, ζ₂ {statistic.zeta2:.2f}; ζ₁ makes {of_zeta_1:.0%} of the variance")
ledger.holds("04.36", "2.2", "on the transformer, U is 0 for advantages that are random (4 s.e.)",
             measured=at_random.value, expected=0, tolerance=4 * at_random.standard_error)

# %% [markdown]
# The entropy of a sequence changes by $-\eta U$ nats at first order. The naive statistic mixes in a share of
# $(G-1)/(BG-1)$ products from inside prompts, and these are of another size altogether. How does each behave as the
# batch grows? And how many prompts would be enough? From $\mathrm{Var}(U)$ with the estimated $\zeta_1,\zeta_2$
# follows the batch in which one standard error is a given part of $U$.

# %%
growth = [dh.u_statistic(shipped[:b, :b]) for b in range(8, B + 1, 4)]
mixed = [u.value + (G - 1) / (u.count * G - 1) * (float(same_prompt[:u.count].mean()) - u.value) for u in growth]
for part in (0.5, 0.25, 0.1):
    wanted = (part * statistic.value) ** 2
    z1, z2 = 4 * max(statistic.zeta1, 0), 2 * statistic.zeta2
    enough = (z1 + math.sqrt(z1**2 + 4 * wanted * z2)) / (2 * wanted)
    print(f"standard error of {part:.0%} of U: about {enough:.1g} prompts")

# %%
figure, axes = plt.subplots()
counts = [u.count for u in growth]
dh.figures.estimates(axes, counts, growth, 0, "U over prompt groups, 95% interval")
axes.plot(counts, mixed, "s--", color="C1", label="naive, over all pairs of responses")
axes.axhline(0, color="0.3", linewidth=1)
axes.set(xlabel="prompts in the batch, B", ylabel="U, nats per unit of learning rate",
         title="The naive statistic is off by products inside prompts, most in small batches")
axes.legend()
dh.figures.save(figure, results, "04-shipped-policy")

# %% [markdown]
# *Growing batches of the same rollouts, so that neighbouring points share most of their data. The interval narrows
# slowly; the distance between the curves is the naive statistic's bias.*
#
# ## 8 · What the error bar is worth
#
# Unbiased is not the same as reliable. An interval also needs $U$ to be about normal, and its variance to be estimated
# well. `u_statistic` reports the root of the unbiased variance, but never less than the remainder's part
# $2\hat\zeta_2/(B(B-1))$, which matters where $\hat\zeta_1$ comes out negative.
#
# We draw batches from four populations whose $T$ is known exactly: normal vectors around a mean; the same with
# log-normal lengths, which have heavier tails; the groups of the enumerated policy; and the groups just sampled from
# the transformer, taken as if they were all there is.

# %%
vectors = torch.randn(2, 1000, 10, generator=generator, dtype=torch.float64)
lengths = torch.randn(2, 1000, 1, generator=generator, dtype=torch.float64).mul(0.75).exp()
normal_x, normal_y = 0.5 + vectors
heavy_x, heavy_y = 0.5 + vectors * lengths
populations = {"normal": (normal_x @ normal_y.T, torch.ones(1000)),
               "log-normal": (heavy_x @ heavy_y.T, torch.ones(1000)),
               "enumerated, G = 2": (products, group_share), "transformer": (shipped.cpu(), torch.ones(B))}

# %%
rows = []
for name, (matrix, weights) in populations.items():
    share = (weights / weights.sum()).double()
    exact = share @ matrix @ share
    for size in (8, 16, 32, 64) + ((256,) if name.startswith("enumerated") else ()):
        draws = torch.multinomial(share, replicates * size, True, generator=generator).view(replicates, size)
        fits = [dh.u_statistic(matrix[d[:, None], d]) for d in draws]
        knives = [dh.Estimate(f.value, f.jackknife**0.5, f.count, skewness=f.skewness) for f in fits]
        for error, kind in (("unbiased", fits), ("jackknife", knives)):
            inside = sum(low <= exact <= high for low, high in (f.interval() for f in kind))
            rows.append({"population": name, "B": size, "error": error, "coverage": float(inside) / replicates})
coverage = pd.DataFrame(rows)
wide = coverage.pivot(index=["population", "error"], columns="B", values="coverage")
print(f"share of {replicates} intervals at 95% that hold the exact T")
wide.map(lambda share: "" if math.isnan(share) else f"{share:.0%}")

# %%
figure, axes = plt.subplots()
axes.axhspan(0.93, 0.97, color="0.88", label="93% to 97%")
for i, (name, curve) in enumerate(coverage[coverage.error == "unbiased"].groupby("population", sort=False)):
    axes.plot(curve["B"], curve["coverage"], color=f"C{i}", marker=dh.figures.MARKERS[i],
              linestyle=dh.figures.DASHES[i], label=name)
axes.set(xscale="log", xticks=[8, 16, 32, 64, 256], xticklabels=[8, 16, 32, 64, 256], ylim=(0.5, 1.02),
         xlabel="prompts in the batch, B", ylabel="share of 95% intervals that hold T",
         title="Enough prompts make the interval honest, unless rare groups decide")
axes.minorticks_off()
axes.legend(loc="lower right")
dh.figures.save(figure, results, "04-coverage")

# %% [markdown]
# *Intervals with the unbiased variance. Normal and log-normal vectors and the transformer's groups settle near 95% from
# a few dozen prompts on; groups of the enumerated policy need hundreds.*
#
# The table says who is served by which error. The jackknife is wider and safer, and too wide where the remainder
# dominates. In small batches no variance helps against the enumerated policy with two responses a prompt: a few
# improbable responses with a very negative $S$ carry $T$, most batches do not hold one, and such a batch has a small $U$
# *and* a small error. An interval is only as good as the batch's chance of having met what matters. With some hundreds
# of prompts it has, and the interval, which leans by the contributions' skewness, is honest again.

# %%
at = coverage[coverage.error == "unbiased"].set_index(["population", "B"])["coverage"]
ledger.holds("04.37", "derived here", "95% intervals cover 93% to 97%: normal vectors, 32 prompts",
             measured=at["normal", 32], expected=0.95, tolerance=0.02)
ledger.holds("04.38", "derived here", "95% intervals cover 93% to 97%: log-normal lengths, 64 prompts",
             measured=at["log-normal", 64], expected=0.95, tolerance=0.02)
ledger.refuted("04.39", "2.2.1", "with ζ₁ measured, one knows whether the batch is big enough",
               counterexample="the enumerated policy with G = 2: at 32 prompts most of the error is in what the batch "
               "has not met, and the 95% interval covers far less", measured=at["enumerated, G = 2", 32],
               expected=0.95, tolerance=0.02)
ledger.holds("04.40", "derived here", "95% intervals cover 93% to 97%: the enumerated policy's groups, 256 prompts",
             measured=at["enumerated, G = 2", 256], expected=0.95, tolerance=0.02)

# %% [markdown]
# ## What stands
#
# The plan is right: multiply only across prompt groups, and expect $\frac4B\zeta_1+\frac2{B(B-1)}\zeta_2$, with both
# variances taken over groups. What needs mending is small and matters: the sign of (6), the factor two in
# $\mathrm{Var}(S)$, the single-prompt formula's $1+1/(G-1)^2$, and the two estimators of $\zeta_1$, which are one
# estimator twice. The residuals of the rows give $\zeta_2$ at no cost, and with it an unbiased error.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Enumerate with $G=3$ (1372 groups). Which of $\zeta_1$ and $\zeta_2$ falls faster with $G$, and what does that say
#    about spending a budget of responses on $B$ or on $G$?
# 2. Replace the group mean in $A$ by the leave-one-out mean. Which entries of the ledger change?
# 3. For one prompt, let the baseline of each pair leave out *both* responses. Show that section 3's bias vanishes.
# 4. Raise `prompts_in_batch` until $U$ on the shipped policy is twice its error. Was the forecast of section 7 right?
#
# ## Further reading
#
# - Hoeffding, W. *A class of statistics with asymptotically normal distribution*, Annals of Mathematical Statistics
#   1948.
# - Efron, B. and Stein, C. *The jackknife estimate of variance*, Annals of Statistics 1981: why it errs upwards.
# - van der Vaart, A. *Asymptotic Statistics*, Cambridge 1998, chapters 11 and 12.
