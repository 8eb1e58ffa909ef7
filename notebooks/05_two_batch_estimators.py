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
# # 05 · Two-batch estimators
#
# To compare a predicted entropy change with a measured one, the notes set a second batch aside: batch U makes the
# update, batch E looks at its effect. This chapter settles what one batch for both would cost, what the variance of the
# two-batch estimate is, how to estimate that without bias, and how to split a budget between the batches.
#
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | the measured change $\widehat{\delta\mathcal H}$ on a second batch, and the bias of reusing the first | notes 2.2.3 |
# | 2 | $\widehat{\delta\mathcal H_1}=\eta\,\bar X\cdot\bar Y$, the means and covariances of $\bar X$ and $\bar Y$ | notes 2.2.3 |
# | 3 | the variance of $\widehat{\delta\mathcal H_1}$, three terms | notes 2.2.3 |
# | 4 | $\hat\Sigma_X$, $\hat V_X$, $\hat V_Y$ and their sum | notes 2.2.3 |
# | 5 | the third term is negligible; $B_E$ large with $G_E=1$ is the better bargain | notes 2.2.3 |
#
# **You need** chapter 04. **You will learn** why the two printed prefactors must change places, when the term that the
# notes drop is most of the error, and how many responses to draw for a prompt that only serves to measure.

# %%
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import t as student_t

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
update_prompts = 24               # B_U, with 8 responses each
evaluation_prompts = 64           # B_E
max_new_tokens = 64
replicates = 2000                 # pairs of batches behind each number of the coverage table

# %%
ledger = dh.Ledger("05", source="notes")
generator = torch.Generator().manual_seed(seed)

# %% [markdown]
# ## 1 · The population of chapter 04, once more
#
# A random transformer over three tokens, four prompts, and all 28 responses of at most two tokens with their exact
# probabilities, rewards and gradients. From every group of $G=2$ responses come $X_n$ and $Y_n$. In this section of the
# notes $X_n$ is the gradient of the entropy itself, the *negative* of chapter 04's, and with that the sign of
# $\widehat{\delta\mathcal H_1}=\eta\,\bar X\cdot\bar Y$ is right.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=5)
prompts = [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]]
responses = dh.exact.every_response(tiny, prompts, max_new_tokens=2)
scores = dh.score(tiny, responses)
log_probs, pi = scores.log_probs.sum(1), dh.exact.probabilities(scores).detach()
S, D, N = log_probs.detach(), len(prompts), len(responses) // len(prompts)
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
longest = torch.tensor([8.0 - len(prompt) for prompt in prompts], dtype=torch.float64)

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in log_probs])
grad_H = -flat_gradient(tiny, (log_probs.exp() * log_probs).sum() / D)
print(f"{len(responses)} responses, gradients {list(gradients.shape)}")

# %%
G = 2
draws = torch.cartesian_prod(*[torch.arange(N)] * G)
members = (N * torch.arange(D)[:, None, None] + draws).flatten(0, 1)
group_share = pi[members].prod(1) / D
centred_S, A = (q[members] - q[members].mean(1, keepdim=True) for q in (S, rewards))
L_group = longest.repeat_interleave(len(draws))[:, None]
empty = torch.zeros(len(members), N * D, dtype=torch.float64)
X = empty.scatter_add(1, members, -centred_S / (G - 1)) @ gradients
Y = empty.scatter_add(1, members, A / (G * L_group)) @ gradients
mu_X, mu_Y, products = group_share @ X, group_share @ Y, X @ Y.T
T = mu_X @ mu_Y

# %%
ledger.holds("05.1", "2.2.3", "δĤ₁ = η X̄·Ȳ with X the gradient of the entropy: E[X]·E[Y] = ∇H·E[Y]",
             measured=T, expected=grad_H @ mu_Y, tolerance=1e-10)
print(f"{len(products)} groups, E[X]·E[Y] = {T:.4f} nats per unit of learning rate")

# %% [markdown]
# ## 2 · What one batch for both would cost
#
# ### At first order
#
# If $\bar X$ and $\bar Y$ come from one batch of $B$ groups, the $B$ products of a group with itself take part, and
#
# $$ \mathbb E[\bar X\cdot\bar Y]=T+\frac1B\,\mathrm{Tr}\,\mathrm{Cov}(X,Y). $$
#
# This is the bias that chapter 04 removes by leaving out the diagonal. All $196^2$ batches of two groups confirm it.

# %%
own = products.diagonal()
trace_XY = group_share @ own - T
same_batch = (products + products.T + own[:, None] + own) / 4
expected_same = group_share @ same_batch @ group_share
print(f"T {T:.4f}, one batch of two groups for both {expected_same:.4f}, Tr Cov(X, Y) {trace_XY:.4f}")
ledger.holds("05.2", "2.2.3", "with one batch for both, E[X̄·Ȳ] = T + Tr Cov(X, Y)/B (B = 2)",
             measured=expected_same, expected=T + trace_XY / 2, tolerance=1e-10)

# %% [markdown]
# ### At a finite learning rate
#
# The measured change is the difference of two entropies,
#
# $$ \widehat{\delta\mathcal H}=\frac1{B_E}\sum_{p_n\in E}\widehat{\mathcal H}^{(G)}_{\theta+\delta_U\theta}(p_n)
#    -\frac1{B_E}\sum_{p_n\in E}\widehat{\mathcal H}^{(G)}_\theta(p_n), $$
#
# and here no diagonal can be left out. We let each of the 196 groups make its own update $\theta+\eta Y$ and measure
# the change in three ways: on the group's own responses, reweighted by $\pi_{\theta'}/\pi_\theta$; on fresh responses
# to the group's own prompt; and on fresh prompts.

# %%
rows, here = [], scores.log_probs.sum(1).detach()
H_before = -(pi * here).view(D, N).sum(1)
prompt_of = torch.arange(D).repeat_interleave(len(draws))
shapes = [(name, p.shape, p.numel()) for name, p in tiny.parameters.items()]
for eta in (1e-6, 1e-4, 1e-2, 1e-1):
    own_responses, own_prompt, fresh = [], [], []
    for z, step in enumerate(Y):
        parts = {name: v.view(shape) for (name, shape, _), v in
                 zip(shapes, step.split([size for *_, size in shapes]), strict=True)}
        with torch.no_grad():
            after = dh.score(tiny, responses, tiny.shifted(parts, eta)).log_probs.sum(1)
        change = -(after.exp() * after).view(D, N).sum(1) - H_before
        reweighted = -(after - here).exp() * after + here
        own_responses.append(reweighted[members[z]].mean())
        own_prompt.append(change[prompt_of[z]])
        fresh.append(change.mean())
    rows.append([eta] + [float(group_share @ torch.stack(kind)) / eta for kind in (own_responses, own_prompt, fresh)])
columns = ["η", "own responses", "own prompt, fresh responses", "fresh prompts"]
measured = pd.DataFrame(rows, columns=columns).set_index("η")
print("expected change of entropy / η, updates by one group")
measured.round(3)

# %%
figure, axes = plt.subplots()
for i, column in enumerate(columns[1:]):
    axes.semilogx(measured.index, measured[column], color=f"C{i}", marker=dh.figures.MARKERS[i],
                  linestyle=dh.figures.DASHES[i], label=column)
axes.axhline(float(T), color="0.3", linewidth=1, label="T, the first-order change")
axes.set(xlabel="learning rate η", ylabel="expected entropy change / η, nats",
         title="What one sees on the update's own responses never becomes the truth")
axes.legend()
dh.figures.save(figure, results, "05-reuse")

# %% [markdown]
# *Exact expectations over updates by one group, $B=1$. With larger batches the distances shrink as* $1/B$*.*
#
# The fresh column starts at $T$. The own-responses column starts somewhere else: its bias is of *first* order, so that
# no small learning rate removes it. Its limit is $\mathrm{Tr}\,\mathrm{Cov}$ again, with $X$ built as this estimator
# builds it, from $-(S+1)\nabla S$ without a baseline. Fresh responses to the same prompts do better, and still see the
# prompt twice.

# %%
raw_X = empty.scatter_add(1, members, -(S[members] + 1) / G) @ gradients
raw_trace = group_share @ (raw_X * Y).sum(1) - T
X_of_prompt = (X * group_share[:, None]).view(D, N**G, -1).sum(1) * D
Y_of_prompt = (Y * group_share[:, None]).view(D, N**G, -1).sum(1) * D
prompt_products = X_of_prompt @ Y_of_prompt.T
prompt_trace = prompt_products.diagonal().mean() - T
smallest = measured.iloc[0]
ledger.holds("05.3", "2.2.3", "measured on fresh prompts, δĤ/η tends to T as η → 0", expected=T, tolerance=1e-3,
             measured=smallest["fresh prompts"])
ledger.holds("05.4", "2.2.3", "on the update's own responses it is biased at first order, by Tr Cov(X, Y)/B",
             measured=smallest["own responses"] - smallest["fresh prompts"], expected=raw_trace, tolerance=1e-3)
ledger.holds("05.5", "derived here", "on its own prompts with fresh responses, by Tr Cov_p(X(p), Y(p))/B",
             measured=smallest["own prompt, fresh responses"] - smallest["fresh prompts"], expected=prompt_trace,
             tolerance=1e-3)

# %% [markdown]
# ## 3 · The variance, three terms
#
# From here on the batches are independent, of different sizes, and the argument needs nothing of $X$ and $Y$ but that
# their samples are independent and alike. So we take the smallest population that serves, the four prompts with
# $X(p)=\mathbb E[X|p]$ and $Y(p)=\mathbb E[Y|p]$, and enumerate all $4^4\cdot4^3=16384$ pairs of batches with
# $B_E=4$, $B_U=3$. Unequal sizes matter: they tell the prefactors apart.

# %%
B_E, B_U = 4, 3
E = torch.cartesian_prod(*[torch.arange(D)] * B_E)
U = torch.cartesian_prod(*[torch.arange(D)] * B_U)
by_row = prompt_products[E].mean(1)
estimates = by_row[:, U].mean(2)
x_centred, y_centred = X_of_prompt - mu_X, Y_of_prompt - mu_Y
from_Y = (y_centred @ mu_X).square().mean() / B_U
from_X = (x_centred @ mu_Y).square().mean() / B_E
from_both = (x_centred @ y_centred.T).square().mean() / (B_E * B_U)
print(f"{estimates.numel()} pairs of batches, mean {estimates.mean():.4f}; "
      f"variance {estimates.var(correction=0):.4f} = {from_X:.4f} + {from_Y:.4f} + {from_both:.4f}")

# %% [markdown]
# With $\mu$ and $\Sigma$ for means and covariances of single samples the notes state
#
# $$ \mathrm{Var}(\widehat{\delta\mathcal H_1})=\eta^2\Big(\frac{\mu_X\Sigma_Y\mu_X}{B_U}
#    +\frac{\mu_Y\Sigma_X\mu_Y}{B_E}+\frac{\mathrm{Tr}[\Sigma_X\Sigma_Y]}{B_EB_U}\Big), $$
#
# which is exact. The covariance of $\bar X$ is a matrix of 6768 rows; we compare it as the four vectors $Y(p)$ see it,
# and that of $\bar Y$ as the $X(p)$ see it. Printed variances are in units of $\eta^2$.

# %%
sigma_X, sigma_Y = (c.T @ c / D for c in (x_centred @ Y_of_prompt.T, y_centred @ X_of_prompt.T))
mean_X_seen, mean_Y_seen = prompt_products[E].mean(1), prompt_products.T[U].mean(1)
gap_X = (mean_X_seen.T.cov(correction=0) - sigma_X / B_E).abs().max()
gap_Y = (mean_Y_seen.T.cov(correction=0) - sigma_Y / B_U).abs().max()
ledger.holds("05.6", "2.2.3", "E[X̄] = μ_X and E[Ȳ] = μ_Y, so that δĤ₁ = η X̄·Ȳ is unbiased over two batches",
             measured=estimates.mean(), expected=T, tolerance=1e-10)
ledger.holds("05.7", "2.2.3", "Cov(X̄) = Σ_X/B_E and Cov(Ȳ) = Σ_Y/B_U (largest gap)",
             measured=max(gap_X, gap_Y), expected=0, tolerance=1e-10)
ledger.holds("05.8", "2.2.3", "Var(δĤ₁)/η² = μ_X Σ_Y μ_X/B_U + μ_Y Σ_X μ_Y/B_E + Tr[Σ_X Σ_Y]/(B_E B_U)",
             measured=estimates.var(correction=0), expected=from_X + from_Y + from_both, tolerance=1e-10)

# %% [markdown]
# ## 4 · Estimating it
#
# The notes insert sample means and the sample covariance
# $\hat\Sigma_X=\frac1{B_E-1}\sum_n(X_n-\bar X)(X_n-\bar X)^T$, and print
#
# $$ \hat V_X=\frac{\hat\mu_Y\hat\Sigma_X\hat\mu_Y}{B_E}=\frac1{B_U(B_E-1)}\sum_{n\in E}\big(\bar Y\cdot(X_n-\bar
# X)\big)^2,    \qquad \hat V_Y=\frac{\hat\mu_X\hat\Sigma_Y\hat\mu_X}{B_U}=\frac1{B_E(B_U-1)}\sum_{n\in U}\big(\bar
# X\cdot(Y_n-\bar Y)\big)^2 . $$
#
# The first equality sign in each is a definition, the second is wrong: dividing $\hat\Sigma_X$ by $B_E$ gives the
# prefactor $1/(B_E(B_E-1))$. The two batch sizes have changed places, which shows only where they differ. All of it
# comes from the matrix of inner products, whose centred row means are $\bar Y\cdot(X_n-\bar X)$.

# %%
fits = [[dh.two_sample_product(prompt_products[e[:, None], u]) for u in U] for e in E]
names = ("from_rows", "from_columns", "from_both", "variance")
parts = {name: torch.tensor([[getattr(fit, name) for fit in row] for row in fits], dtype=torch.float64)
         for name in names}
V_X, V_Y = parts["from_rows"] + parts["from_both"], parts["from_columns"] + parts["from_both"]
printed_X, printed_Y = V_X * B_E / B_U, V_Y * B_U / B_E

# %% [markdown]
# First the prefactors, on one pair of batches: $\hat\mu_Y\hat\Sigma_X\hat\mu_Y/B_E$ computed with the vectors
# themselves, against the printed sums.

# %%
i, j = 27, 6
x_e, y_u = X_of_prompt[E[i]], Y_of_prompt[U[j]]
direct_X = ((x_e - x_e.mean(0)) @ y_u.mean(0)).square().sum() / (B_E - 1) / B_E
direct_Y = ((y_u - y_u.mean(0)) @ x_e.mean(0)).square().sum() / (B_U - 1) / B_U
seen = prompt_products[E] - prompt_products[E].mean(1, keepdim=True)
sigma_hat = torch.einsum("enp,enq->epq", seen, seen) / (B_E - 1)
ledger.holds("05.9", "2.2.3", "Σ̂_X with 1/(B_E−1) is an unbiased estimate of Σ_X (largest gap)",
             measured=(sigma_hat.mean(0) - sigma_X).abs().max(), expected=0, tolerance=1e-10)
ledger.corrected("05.10", "2.2.3", "V̂_X = μ̂_Y Σ̂_X μ̂_Y/B_E = Σ (Ȳ·(X_n − X̄))²/(B_U(B_E−1))",
                 correction="the prefactor is 1/(B_E(B_E−1))", measured=direct_X, expected=V_X[i, j],
                 as_printed=printed_X[i, j], tolerance=1e-10)
ledger.corrected("05.11", "2.2.3", "V̂_Y = μ̂_X Σ̂_Y μ̂_X/B_U = Σ (X̄·(Y_n − Ȳ))²/(B_E(B_U−1))",
                 correction="the prefactor is 1/(B_U(B_U−1))", measured=direct_Y, expected=V_Y[i, j],
                 as_printed=printed_Y[i, j], tolerance=1e-10)

# %% [markdown]
# With the right prefactors, is the sum unbiased? Inserting the *sample* mean $\hat\mu_Y$ for $\mu_Y$ adds its own
# noise: $\mathbb E[\hat\mu_Y\hat\Sigma_X\hat\mu_Y]=\mu_Y\Sigma_X\mu_Y+\mathrm{Tr}[\Sigma_X\Sigma_Y]/B_U$. So
#
# $$ \mathbb E\,\hat V_X=\frac{\mu_Y\Sigma_X\mu_Y}{B_E}+\frac{\mathrm{Tr}[\Sigma_X\Sigma_Y]}{B_EB_U}, $$
#
# and likewise for $\hat V_Y$. The notes drop the third term "assuming it is negligible", and in fact have it *twice*:
# the sum overestimates by one $\mathrm{Tr}/(B_EB_U)$. The doubly centred products $c_{nm}$, what is left of
# $X_n\cdot Y_m$ after row means and column means, estimate the term by itself, and taking it off once makes the
# variance unbiased:
#
# $$ \hat V=\hat V_X+\hat V_Y-\frac{\sum_{nm}c_{nm}^2}{B_EB_U(B_E-1)(B_U-1)} . $$

# %%
truth = estimates.var(correction=0)
table = {"true variance": truth, "V̂_X + V̂_Y as printed": (printed_X + printed_Y).mean(),
         "V̂_X + V̂_Y, right prefactors": (V_X + V_Y).mean(), "less the doubly centred term": parts["variance"].mean()}
ledger.corrected("05.12", "2.2.3", "Var(δĤ₁) ≈ V̂_X + V̂_Y (expectation, right prefactors)",
                 correction="the sum exceeds the variance by Tr[Σ_X Σ_Y]/(B_E B_U)", measured=(V_X + V_Y).mean(),
                 expected=truth + from_both, as_printed=truth, tolerance=1e-10)
ledger.holds("05.13", "derived here", "E V̂_X = μ_Y Σ_X μ_Y/B_E + Tr[Σ_X Σ_Y]/(B_E B_U)",
             measured=V_X.mean(), expected=from_X + from_both, tolerance=1e-10)
ledger.holds("05.14", "derived here", "the doubly centred products estimate Tr[Σ_X Σ_Y]/(B_E B_U) without bias",
             measured=parts["from_both"].mean(), expected=from_both, tolerance=1e-10)
ledger.holds("05.15", "derived here", "V̂_X + V̂_Y less that term is an unbiased variance",
             measured=parts["variance"].mean(), expected=truth, tolerance=1e-10)
pd.Series(table, name="expectation, nats²").astype(float).round(3).to_frame()

# %% [markdown]
# ## 5 · Is the third term negligible?
#
# The first two terms fall as one over a batch size, the third as one over the product of both: it is small for large
# enough batches. How large, depends on $\mathrm{Tr}[\Sigma_X\Sigma_Y]$, where the noise of *all* parameters meets,
# against noise along two directions only. For the groups of the enumerated policy the exact share is in reach.

# %%
X_noise, Y_noise = (X - mu_X) @ mu_Y, (Y - mu_Y) @ mu_X
along = group_share @ X_noise.square() + group_share @ Y_noise.square()
everywhere = group_share @ ((X - mu_X) @ (Y - mu_Y).T).square() @ group_share
sizes = torch.tensor([4, 8, 16, 32, 64, 128, 256, 1024], dtype=torch.float64)
share_of_third = everywhere / (everywhere + sizes * along)
pd.DataFrame({"B_E = B_U": sizes.int(), "share of the third term": share_of_third}).set_index("B_E = B_U").T.round(3)

# %% [markdown]
# Now the shipped policy. Batch U has 8 responses a prompt, as in training; batch E has other prompts, also with 8
# responses so that we may choose among them. A group's $X_n$ and $Y_n$ cost one backward pass each.

# %%
policy = dh.load_policy(model, device, dtype)
data = dh.load_problems(problems, "train").shuffle(seed=seed)
B_U = min(update_prompts, len(data) // 2)
B_E = min(evaluation_prompts, len(data) - B_U)
update = dh.sample(policy, data.select(range(B_U)), 8, max_new_tokens, seed=seed)
evaluation = dh.sample(policy, data.select(range(B_U, B_U + B_E)), 8, max_new_tokens, seed=seed + 1)
advantages = dh.objectives.group_advantages(update.rewards, update.prompt_index, scale=False)
print(f"U: {B_U} prompts, mean reward {update.rewards.mean():.2f}; E: {B_E} prompts")

# %%
with torch.no_grad():
    S_U, S_E = (dh.score(policy, batch).log_probs.sum(1).double().view(-1, 8) for batch in (update, evaluation))
y = (advantages.double() / (8 * max_new_tokens)).view(-1, 8)
same_K, K = (dh.fisher_kernel(policy, batch, update).double() for batch in (update, evaluation))

# %% [markdown]
# With the kernel between two batches, all products $X_n\cdot Y_m$ are sums of its blocks (chapter 08 says how it comes
# without holding gradients). Of batch E we make one row for each prompt from all its eight responses, and another from
# the first two.

# %%
found = []
for S_n, kernel in ((S_U, same_K), (S_E, K), (S_E[:, :2], K.view(B_E, 8, -1)[:, :2])):
    count, size = S_n.shape
    x = -(S_n - S_n.mean(1, keepdim=True)) / (size - 1)
    found.append(torch.einsum("ng,ngmh,mh->nm", x, kernel.view(count, size, B_U, 8), y).cpu())
same, with_8, with_2 = found
S_E = S_E.cpu()

# %%
ustat = dh.u_statistic(same)
fit = dh.two_sample_product(with_8)
print(f"one batch, X̄·Ȳ with the diagonal:   {same.mean():.3f}\n"
      f"one batch, U-statistic:             {ustat}\n"
      f"two batches, X̄·Ȳ:                   {fit}")
third = fit.from_both / fit.variance
print(f"variance by parts: E {fit.from_rows:.5f}, U {fit.from_columns:.5f}, both {fit.from_both:.5f}: "
      f"the third is {third:.0%} of all")
ledger.refuted("05.16", "2.2.3", "the term of order 1/(B_E B_U) is negligible (its share of the variance)",
               counterexample="the shipped policy with the batches above", measured=third, expected=0, tolerance=0.1)

# %% [markdown]
# At these sizes the dropped term is the larger part. Nothing is odd about that: among so many
# parameters the noise of a gradient has little to do with a *mean* gradient, but much with another gradient's noise.
# With the term counted twice the notes' error is too wide; and where one of the other parts comes out negative, it is
# a part that the noise of this batch hides.
#
# How do the estimates compare when a fixed number of prompts is split unevenly? For groups of the enumerated policy all
# expectations are exact.

# %%
split = torch.arange(4, 61, dtype=torch.float64)
rest, toward_Y, toward_X = 64 - split, group_share @ X_noise.square(), group_share @ Y_noise.square()
both = everywhere / (split * rest)
right_X, right_Y = toward_Y / split + both, toward_X / rest + both
exact = right_X + right_Y - both
curves = {"as printed": (right_X * split / rest + right_Y * rest / split) / exact,
          "right prefactors": (right_X + right_Y) / exact, "third term taken off once": exact / exact}

# %%
figure, axes = plt.subplots()
for i, (label, curve) in enumerate(curves.items()):
    axes.plot(split, curve, color=f"C{i}", linestyle=dh.figures.DASHES[i], label=label)
axes.set(xlabel="prompts in batch E, of 64 in both", ylabel="expected estimate / true variance", ylim=(0, None),
         title="The printed prefactors mislead by the ratio of the batch sizes")
axes.legend(loc="upper center")
dh.figures.save(figure, results, "05-prefactors")

# %% [markdown]
# *Groups of the enumerated policy, exact expectations. As printed, the estimate agrees with the right prefactors at
# equal sizes only; those leave the third term, counted twice, and taking it off once leaves nothing.*
#
# ## 6 · Do the intervals hold?
#
# We draw pairs of batches of unequal size from four populations whose $T$ is known: normal vectors, the same with
# log-normal lengths, the products just measured on the transformer, taken as all there is, and the groups of the
# enumerated policy, where rare responses decide and batches must be large. Each number is the share of 95% intervals that
# hold $T$, with Welch's degrees of freedom throughout.

# %%
vectors = torch.randn(2, 1000, 10, generator=generator, dtype=torch.float64)
lengths = torch.randn(2, 1000, 1, generator=generator, dtype=torch.float64).mul(0.75).exp()
(x_n, y_n), (x_h, y_h) = 0.5 + vectors, 0.5 + vectors * lengths
populations = {"normal": x_n @ y_n.T, "log-normal": x_h @ y_h.T, "transformer": with_8, "enumerated": products}
sizes = {name: ((8, 8), (8, 32), (32, 8), (64, 16)) for name in populations} | {"enumerated": ((64, 16), (384, 128))}
rows = []
for name, matrix in populations.items():
    shares = [group_share] * 2 if name == "enumerated" else [torch.ones(n, dtype=torch.float64) for n in matrix.shape]
    truth = float(shares[0] @ matrix.double().cpu() @ shares[1] / shares[0].sum() / shares[1].sum())
    for b_e, b_u in sizes[name]:
        e, u = (torch.multinomial(share, replicates * b, True, generator=generator).view(replicates, b)
                for share, b in zip(shares, (b_e, b_u), strict=True))
        fits = [dh.two_sample_product(matrix[i[:, None], j]) for i, j in zip(e, u, strict=True)]
        drawn = pd.DataFrame({k: [getattr(f, k) for f in fits] for k in ("value", "standard_error", "count", *names)})
        v_x, v_y = drawn.from_rows + drawn.from_both, drawn.from_columns + drawn.from_both
        reach = student_t.ppf(0.975, drawn["count"] - 1)
        errors = {"as printed": (v_x * b_e / b_u + v_y * b_u / b_e) ** 0.5, "right prefactors": (v_x + v_y) ** 0.5,
                  "unbiased": drawn.standard_error}
        inside = {kind: ((drawn.value - truth).abs() <= reach * error).mean() for kind, error in errors.items()}
        inside["two_sample_product"] = float(np.mean([f.interval()[0] <= truth <= f.interval()[1] for f in fits]))
        rows += [{"population": name, "B_E, B_U": f"{b_e}, {b_u}", "error": kind, "coverage": share}
                 for kind, share in inside.items()]

# %%
coverage = pd.DataFrame(rows)
wide = coverage.pivot(index=["population", "error"], columns="B_E, B_U", values="coverage")
wide = wide[["8, 8", "8, 32", "32, 8", "64, 16", "384, 128"]]
print(f"share of {replicates} intervals at 95% that hold the exact T")
wide.map(lambda share: "" if np.isnan(share) else f"{share:.0%}")

# %% [markdown]
# `two_sample_product` is the unbiased error with an interval that leans by the skewness of both sides; it is what closes
# the gap where rare groups decide, given batches that hold some of them.

# %%
ours = wide.xs("two_sample_product", level="error")
for i, (name, size) in enumerate((("normal", "64, 16"), ("log-normal", "64, 16"), ("enumerated", "384, 128"))):
    ledger.holds(f"05.{17 + i}", "derived here", f"95% intervals cover 93% to 97%: {name}, B_E and B_U {size}",
                 measured=ours[size][name], expected=0.95, tolerance=0.02)

# %% [markdown]
# ## 7 · Many prompts, one response each?
#
# For a *measured* entropy the notes advise $B_E$ large and $G_E=1$. The variance of a mean over $B$ prompts with $G$
# responses each is $(\sigma_b^2+\sigma_w^2/G)/B$, with $\sigma_b^2$ between prompts and $\sigma_w^2$ inside them. For a
# fixed number $BG$ of responses this is least at $G=1$, always; how much is gained depends on the two. On the shipped
# policy:

# %%
within = S_E.var(1).mean()
between = S_E.mean(1).var() - within / 8
for g in (1, 2, 8):
    ratio = g * (between + within / g) / (between + within)
    print(f"G_E = {g}: variance of the entropy, same number of responses, relative to G_E = 1: {ratio:.2f}")
gain = 8 * (between + within / 8) / (between + within)
ledger.holds("05.20", "2.2.3", "for the entropy itself, G_E = 1 beats G_E = 8 at equal cost (shortfall from 1)",
             measured=(1 - gain).clamp(min=0), expected=0, tolerance=1e-9)

# %% [markdown]
# For the *predicted* change it is less simple, because $X_n$ needs a baseline and the leave-one-out baseline needs a
# second response. With $G_E=1$ it has to come from elsewhere: zero, one constant for all prompts (what a mean over the
# other prompts amounts to), or the prompt's true mean, which nobody has. For the enumerated policy we get the variance
# of $X\cdot\mu_Y$, times $G_E$ to make it one for equal numbers of responses, exactly.

# %%
toward, prompt_mean = gradients @ mu_Y, (pi * S).view(D, N).sum(1).repeat_interleave(N)
variances = {}
for name, level in (("zero", 0.0), ("one constant", (pi @ S) / D), ("the prompt's true mean", prompt_mean)):
    single = -(S - level) * toward
    variances[f"G = 1, baseline: {name}"] = (pi / D) @ single.square() - T**2
for g in (2, 3, 4):
    picks = N * torch.arange(D)[:, None, None] + torch.cartesian_prod(*[torch.arange(N)] * g)
    centred = S[picks] - S[picks].mean(-1, keepdim=True)
    projected = -(centred * toward[picks]).sum(-1) / (g - 1)
    variances[f"G = {g}, leave-one-out"] = g * ((pi[picks].prod(-1) / D * projected.square()).sum() - T**2)
pd.Series(variances, name="variance × G, nats²").astype(float).round(1).to_frame()

# %% [markdown]
# One response a prompt is the better bargain here too, *if* a baseline is at hand, and a single constant is nearly as
# good as the prompt's own mean. Without any, it is the worst choice of all; among leave-one-out groups the larger ones
# do better, since their baselines are less noisy. On the shipped policy we compare two batches E of equal cost.

# %%
leave_one_out = [value for name, value in variances.items() if "leave" in name]
constant, none = variances["G = 1, baseline: one constant"], variances["G = 1, baseline: zero"]
ledger.holds("05.21", "2.2.3", "G_E = 1 with a constant baseline beats leave-one-out groups (excess over their best)",
             measured=(constant - min(leave_one_out)).clamp(min=0), expected=0, tolerance=1e-9)
ledger.refuted("05.22", "2.2.3", "G_E = 1 is the better bargain for X whatever its baseline (variance against G_E = 4)",
               counterexample="without a baseline: leave-one-out does not exist at G_E = 1, and a baseline must come "
               "from other prompts", measured=none / leave_one_out[-1], expected=1, tolerance=0.1)
few = B_E // 4
print(f"{few:3} prompts with 8 responses: {dh.two_sample_product(with_8[:few])}\n"
      f"{B_E:3} prompts with 2 responses: {dh.two_sample_product(with_2)}\n"
      f"{B_E:3} prompts with 8 responses: {fit}")

# %% [markdown]
# Neither split is visibly better at these sizes: the update batch contributes to all three errors, and eight responses
# to *as many* prompts narrow the interval for four times the cost.
#
# ## What stands
#
# A second batch is needed whenever entropy is *measured*: what the update's own responses show is biased at first
# order. The variance formula is exact. Of its estimate, the prefactors have to change places and the third term has to
# come off once; that term is not negligible at the sizes one can afford, and the matrix of inner products gives it for
# nothing. One response a prompt serves the measurement best, and the prediction too once a baseline is brought along.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Choose $B_E$ and $B_U$ for the shipped policy so that the third term is a tenth of the variance. What does it cost?
# 2. In section 2 let updates be made by two groups. Does every distance to $T$ halve?
# 3. Draw batch E from the prompts of batch U with fresh responses, on the shipped policy. How large is the bias that
#    section 2 predicts, against the standard error?
# 4. Replace Welch's degrees of freedom by $\min(B_E,B_U)-1$ in section 6. Which intervals become too wide?
#
# ## Further reading
#
# - Welch, B. L. *The generalization of Student's problem when several different population variances are involved*,
#   Biometrika 1947.
# - Goodman, L. A. *On the exact variance of products*, Journal of the American Statistical Association 1960: the same
#   three terms for numbers, and the unbiased estimate.
# - Owen, A. *Monte Carlo theory, methods and examples*, chapters 8 and 9: reweighting, and when it goes wrong.
