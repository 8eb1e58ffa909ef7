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
# ## In short
#
# - **A measured change needs fresh prompts.** On the update's own responses it is biased at first order: 7.6 nats per
#   unit of learning rate in place of 0.9 where one group makes the update <a href="#ledger-05.4">[05.4]</a>. No small
#   learning rate removes that. Fresh responses to the update's prompts still see 1.6
#   <a href="#ledger-05.5">[05.5]</a>.
# - **The variance formula is exact** <a href="#ledger-05.8">[05.8]</a>. In its estimate the *leading factors* $1/B_U$
#   and $1/B_E$ have to change places (<a href="#ledger-05.10">[05.10]</a>, <a href="#ledger-05.11">[05.11]</a>), and
#   the third term, which the notes mean to drop, is in their sum twice <a href="#ledger-05.12">[05.12]</a>.
# - **That term is negligible with groups of eight**, the notes' own size: 2.6% of the variance for 64 and 24 of them on
#   the enumerated policy <a href="#ledger-05.28">[05.28]</a>. With groups of two it is not, 12.6%
#   <a href="#ledger-05.16">[05.16]</a>. It falls with the product of the batch sizes. On the shipped policy these
#   batches do not say how large it is <a href="#ledger-05.27">[05.27]</a>.
# - **One response a prompt** is the better batch E for a measured entropy <a href="#ledger-05.24">[05.24]</a>. For a
#   predicted change it is, *if* a baseline comes from other prompts: leave-one-out groups are best at five responses,
#   where they still have 1.3 times its variance, and get worse on either side <a href="#ledger-05.21">[05.21]</a>.
# - **What to do**: draw batch E from other prompts, one response each, with one constant as baseline; take the error
#   from `dh.two_sample_product`, which needs all inner products and returns the three parts. Where entropy is only
#   predicted, not measured, one batch of twice the size with a U-statistic is never worse
#   <a href="#ledger-05.25">[05.25]</a>.
#
# **What is checked**
#
# | statement | source | verdict |
# |---|---|---|
# | the measured change $\widehat{\delta\mathcal H}$ on a second batch; the bias of reusing the first | notes 2.2.3 | holds [05.3](#ledger-05.3), [05.4](#ledger-05.4) |
# | $\widehat{\delta\mathcal H_1}=\eta\,\bar X\cdot\bar Y$ with the $X$ of 2.2.1 | notes 2.2.3 | holds with a correction [05.1](#ledger-05.1) |
# | its mean; means and covariances of $\bar X$, $\bar Y$ | notes 2.2.3 | holds [05.6](#ledger-05.6), [05.7](#ledger-05.7) |
# | the variance of $\widehat{\delta\mathcal H_1}$, three terms | notes 2.2.3 | holds [05.8](#ledger-05.8) |
# | $\hat\Sigma_X$ | notes 2.2.3 | holds [05.9](#ledger-05.9) |
# | $\hat V_X$, $\hat V_Y$ | notes 2.2.3 | holds with a correction [05.10](#ledger-05.10), [05.11](#ledger-05.11) |
# | $\widehat{\mathrm{Var}}\approx\hat V_X+\hat V_Y$ | notes 2.2.3 | holds with a correction [05.12](#ledger-05.12) |
# | the third term is negligible | notes 2.2.3 | holds [05.28](#ledger-05.28) with groups of eight; holds with a correction [05.16](#ledger-05.16) for groups of two; on the shipped policy not decided by these data [05.27](#ledger-05.27) |
# | two vectors and a backward pass for each prompt suffice | notes 2.2.3 | holds [05.26](#ledger-05.26) |
# | $B_E$ large with $G_E=1$ gives more mileage | notes 2.2.3 | holds [05.24](#ledger-05.24) |
#
# **You need** chapter 04. **You will learn** why two printed factors must change places, when the term that the
# notes drop matters, and how many responses to draw for a prompt that only serves to measure.

# %%
import math

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
stated = (model, problems, seed) == ("../data/policy", "../data/problems", 0)
ledger = dh.Ledger("05", source="notes", stated=stated, seeds="../data/seeds")

# %% [markdown]
# ## 1 · The population of chapter 04, once more
#
# A random transformer over three tokens, four prompts, and all 28 responses of at most two tokens with their exact
# probabilities, rewards and gradients.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=5)
prompts = [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]]
responses = dh.exact.every_response(tiny, prompts, max_new_tokens=2)
scores = dh.score(tiny, responses)
log_probs, pi = scores.log_probs.sum(1), dh.exact.probabilities(scores).detach()
S_tiny, D, N = log_probs.detach(), len(prompts), len(responses) // len(prompts)
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
longest = torch.tensor([8.0 - len(prompt) for prompt in prompts], dtype=torch.float64)

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in log_probs])
grad_H = -flat_gradient(tiny, (log_probs.exp() * log_probs).sum() / D)
print(f"{len(responses)} responses, gradients {list(gradients.shape)}")

# %% [markdown]
# From every group of $G=2$ responses come $X_n$ and $Y_n$. The notes *continue to use* the $X_n$ of their section 2.2.1
# and call it the gradient of the entropy. As defined there it estimates *minus* that gradient (chapter 04), so that
#
# $$ \widehat{\delta\mathcal H_1}=\eta\,\bar X\cdot\bar Y,\qquad \bar X=\frac1{B_E}\sum_{n\in E}X_n,\qquad
#    \bar Y=\frac1{B_U}\sum_{p\in U}Y_p $$
#
# needs the same correction of its sign as equation (6): $-\eta$ with that $X$
# <a id="05.1" href="#ledger-05.1">[05.1]</a>. Or one takes the words for the definition. We do: from here on $X_n$ is
# the gradient of the entropy, the negative of chapter 04's, and the formula is right as it stands. The entropy's change
# along the expected update, $\mathbb E[X]\cdot\mathbb E[Y]$, we call $T$.

# %%
G_two = 2
pairs_drawn = torch.cartesian_prod(*[torch.arange(N)] * G_two)
members = (N * torch.arange(D)[:, None, None] + pairs_drawn).flatten(0, 1)
group_share = pi[members].prod(1) / D
centred_S, centred_R = (q[members] - q[members].mean(1, keepdim=True) for q in (S_tiny, rewards))
L_group = longest.repeat_interleave(len(pairs_drawn))[:, None]
empty = torch.zeros(len(members), N * D, dtype=torch.float64)
X = empty.scatter_add(1, members, -centred_S / (G_two - 1)) @ gradients
Y = empty.scatter_add(1, members, centred_R / (G_two * L_group)) @ gradients
mu_X, mu_Y, products = group_share @ X, group_share @ Y, X @ Y.T
T = mu_X @ mu_Y

# %%
ledger.corrected("05.1", "2.2.3", "δĤ₁ = η X̄·Ȳ with the X of section 2.2.1 (expectation, ∇H·E[Y])", formulas=(46,),
                 correction="−η with that X, which estimates −∇H; +η where X is the gradient of the entropy",
                 measured=grad_H @ mu_Y, expected=T, as_printed=-T, tolerance=1e-10)
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
# This is the bias that chapter 04 removes by leaving out the diagonal. All $196^2$ batches of two groups confirm it
# <a id="05.2" href="#ledger-05.2">[05.2]</a>.

# %%
with_itself = products.diagonal()
trace_XY = group_share @ with_itself - T
same_batch = (products + products.T + with_itself[:, None] + with_itself) / 4
expected_same = group_share @ same_batch @ group_share
print(f"T {T:.4f}, one batch of two groups for both {expected_same:.4f}, Tr Cov(X, Y) {trace_XY:.4f}")
ledger.holds("05.2", "2", "with one batch for both, E[X̄·Ȳ] = T + Tr Cov(X, Y)/B (B = 2)", source="deltah",
             measured=expected_same, expected=T + trace_XY / 2, tolerance=1e-10, rules_out={"no bias": T})

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
# to the group's own prompt; and on fresh prompts. The smallest $\eta$ is taken with either sign: the mean of both
# has no error of first order in $\eta$, and stands for the limit.

# %%
H_before = -(pi * S_tiny).view(D, N).sum(1)
prompt_of = torch.arange(D).repeat_interleave(len(pairs_drawn))
shapes = [(name, p.shape, p.numel()) for name, p in tiny.parameters.items()]
found = {}
for eta in (-1e-6, 1e-6, 1e-4, 1e-2, 1e-1):
    seen = []
    for z, step in enumerate(Y):
        flat = step.split([size for *_, size in shapes])
        parts = {name: v.view(shape) for (name, shape, _), v in zip(shapes, flat, strict=True)}
        with torch.no_grad():
            after = dh.score(tiny, responses, tiny.shifted(parts, eta)).log_probs.sum(1)
        change = -(after.exp() * after).view(D, N).sum(1) - H_before
        reweighted = -(after - S_tiny).exp() * after + S_tiny
        seen.append(torch.stack([reweighted[members[z]].mean(), change[prompt_of[z]], change.mean()]))
    found[eta] = group_share @ torch.stack(seen) / eta

# %%
columns = ["own responses", "own prompt, fresh responses", "fresh prompts"]
limit = (found[1e-6] + found.pop(-1e-6)) / 2
measured = pd.DataFrame({eta: row.tolist() for eta, row in found.items()}, index=columns).T.rename_axis("η")
print("expected change of entropy / η, updates by one group")
measured.round(3)

# %%
figure, axes = plt.subplots()
for i, column in enumerate(columns):
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
# The fresh column starts at $T$ <a id="05.3" href="#ledger-05.3">[05.3]</a>. The own-responses column starts somewhere
# else: "we get a bias and we can't eliminate it", and it is of *first* order, so that no small learning rate removes it
# <a id="05.4" href="#ledger-05.4">[05.4]</a>. Its limit is $\mathrm{Tr}\,\mathrm{Cov}$ again, with $X$ built as this
# estimator builds it, from $-(S+1)\nabla S$ without a baseline. Fresh responses to the same prompts do better, and
# still see the prompt twice <a id="05.5" href="#ledger-05.5">[05.5]</a>.

# %%
raw_X = empty.scatter_add(1, members, -(S_tiny[members] + 1) / G_two) @ gradients
raw_trace = group_share @ (raw_X * Y).sum(1) - T
X_of_prompt, Y_of_prompt = ((Z * group_share[:, None]).view(D, N**G_two, -1).sum(1) * D for Z in (X, Y))
prompt_products = X_of_prompt @ Y_of_prompt.T
prompt_trace = prompt_products.diagonal().mean() - T
ledger.holds("05.3", "2.2.3", "measured on fresh prompts, δĤ/η tends to T as η → 0", measured=limit[2], expected=T,
             tolerance=1e-6, formulas=(44,), rules_out={"the own responses' limit": T + raw_trace})
ledger.holds("05.4", "2.2.3", "on the update's own responses it is biased at first order, by Tr Cov(X, Y)/B",
             measured=limit[0] - limit[2], expected=raw_trace, tolerance=1e-6, rules_out={"no bias": 0})
ledger.holds("05.5", "2", "on its own prompts with fresh responses, by Tr Cov_p(X(p), Y(p))/B", source="deltah",
             measured=limit[1] - limit[2], expected=prompt_trace, tolerance=1e-6, rules_out={"no bias": 0})

# %% [markdown]
# ## 3 · The variance, three terms
#
# From here on the batches are independent, of different sizes, and the argument needs nothing of $X$ and $Y$ but that
# their samples are independent and alike. So we take the smallest population that serves, the four prompts with
# $X(p)=\mathbb E[X|p]$ and $Y(p)=\mathbb E[Y|p]$, and enumerate all $4^4\cdot4^3=16384$ pairs of batches with
# $B_E=4$, $B_U=3$. Unequal sizes matter: they tell the two apart. Over all pairs $\bar X\cdot\bar Y$ has the mean $T$
# <a id="05.6" href="#ledger-05.6">[05.6]</a>.

# %%
four, three = 4, 3
E_all, U_all = (torch.cartesian_prod(*[torch.arange(D)] * count) for count in (four, three))
estimates = prompt_products[E_all].mean(1)[:, U_all].mean(2)
x_centred, y_centred = X_of_prompt - mu_X, Y_of_prompt - mu_Y
along_X, along_Y = y_centred @ mu_X, x_centred @ mu_Y
from_U, from_E = along_X.square().mean() / three, along_Y.square().mean() / four
from_both = (x_centred @ y_centred.T).square().mean() / (four * three)
true_variance = estimates.var(correction=0)
print(f"{estimates.numel()} pairs of batches, mean {estimates.mean():.4f}; "
      f"variance {true_variance:.4f} = {from_E:.4f} + {from_U:.4f} + {from_both:.4f}")

# %% [markdown]
# With $\mu$ and $\Sigma$ for means and covariances of single samples the notes state
#
# $$ \mathrm{Var}(\widehat{\delta\mathcal H_1})=\eta^2\Big(\frac{\mu_X\Sigma_Y\mu_X}{B_U}
#    +\frac{\mu_Y\Sigma_X\mu_Y}{B_E}+\frac{\mathrm{Tr}[\Sigma_X\Sigma_Y]}{B_EB_U}\Big), $$
#
# which is exact <a id="05.8" href="#ledger-05.8">[05.8]</a>. Printed variances are in units of $\eta^2$. The
# covariances that go into it are among [the remaining equations](#remaining).

# %%
ledger.holds("05.6", "2.2.3", "X̄·Ȳ of two batches has the mean μ_X·μ_Y", measured=estimates.mean(), expected=T,
             tolerance=1e-10, formulas=(45,), rules_out={"one batch": T + prompt_trace / four})
ledger.holds("05.8", "2.2.3", "Var(δĤ₁)/η² = μ_X Σ_Y μ_X/B_U + μ_Y Σ_X μ_Y/B_E + Tr[Σ_X Σ_Y]/(B_E B_U)",
             measured=true_variance, expected=from_E + from_U + from_both, tolerance=1e-10, formulas=(48,),
             rules_out={"without the third": from_E + from_U,
                        "B_E and B_U exchanged": from_E * four / three + from_U * three / four + from_both})

# %% [markdown]
# ### What a second batch costs
#
# "It's unfortunate that we have to use two batches instead of one." How unfortunate can be said exactly. Compare two
# batches of $b$ with one of $2b$ under chapter 04's U-statistic. With $P=X\cdot\mu_Y$ and $Q=Y\cdot\mu_X$, and $c$,
# $c'$ for the second moments of the doubly centred products, straight and against their transpose, the difference
#
# $$ \frac{\mathrm{Var}(P-Q)}{2b}+\frac c{b^2}-\frac{c+c'}{2b(2b-1)} $$
#
# is never negative, as $c'\le c$ <a id="05.25" href="#ledger-05.25">[05.25]</a>. So where only the *predicted* change
# is wanted, one batch is the better one. The second is the price of a measured change beside it.

# %%
b = 2
two_of_2 = along_Y.square().mean() / b + along_X.square().mean() / b + from_both * four * three / b**2
off_diagonal = ~torch.eye(2 * b, dtype=torch.bool)
in_batch = prompt_products[E_all[:, :, None], E_all[:, None, :]] * off_diagonal
one_of_4 = (in_batch.sum((1, 2)) / (2 * b * (2 * b - 1))).var(correction=0)
doubly = x_centred @ y_centred.T
c, c_crossed = doubly.square().mean(), (doubly * doubly.T).mean()
saving = (along_Y - along_X).square().mean() / (2 * b) + c / b**2 - (c + c_crossed) / (2 * b * (2 * b - 1))
print(f"variance of two batches of 2 prompts {two_of_2:.4f}, of the U-statistic on 4 prompts {one_of_4:.4f}")
ledger.holds("05.25", "3", "two batches of b have a variance larger than U on 2b, by the formula above (b = 2)",
             source="deltah", measured=two_of_2 - one_of_4, expected=saving, tolerance=1e-10, rules_out={"no cost": 0})

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
# The first equality sign in each is a definition, the second is wrong: dividing $\hat\Sigma_X$ by $B_E$ gives
# $1/(B_E(B_E-1))$. Only the *leading* factors, $1/B_U$ of the one and $1/B_E$ of the other, have changed places; the
# $B_E-1$ and $B_U-1$ stand where they should (<a id="05.10" href="#ledger-05.10">[05.10]</a>,
# <a id="05.11" href="#ledger-05.11">[05.11]</a>). All of it comes from the matrix of inner products, whose centred row
# means are $\bar Y\cdot(X_n-\bar X)$. We compare on one pair of batches with the vectors themselves.

# %%
fits = [[dh.two_sample_product(prompt_products[e[:, None], u]) for u in U_all] for e in E_all]
names = ("from_rows", "from_columns", "from_both", "variance")
of_pair = {name: torch.tensor([[getattr(fit, name) for fit in row] for row in fits], dtype=torch.float64)
           for name in names}
V_X, V_Y = of_pair["from_rows"] + of_pair["from_both"], of_pair["from_columns"] + of_pair["from_both"]
printed_X, printed_Y = V_X * four / three, V_Y * three / four

# %%
i, j = 27, 6
x_e, y_u = X_of_prompt[E_all[i]], Y_of_prompt[U_all[j]]
direct_X = ((x_e - x_e.mean(0)) @ y_u.mean(0)).square().sum() / (four - 1) / four
direct_Y = ((y_u - y_u.mean(0)) @ x_e.mean(0)).square().sum() / (three - 1) / three
ledger.corrected("05.10", "2.2.3", "V̂_X = μ̂_Y Σ̂_X μ̂_Y/B_E = Σ (Ȳ·(X_n − X̄))²/(B_U(B_E−1))",
                 correction="the leading factor is 1/B_E: 1/(B_E(B_E−1))", measured=direct_X, expected=V_X[i, j],
                 as_printed=printed_X[i, j], tolerance=1e-10, formulas=(50,))
ledger.corrected("05.11", "2.2.3", "V̂_Y = μ̂_X Σ̂_Y μ̂_X/B_U = Σ (X̄·(Y_n − Ȳ))²/(B_E(B_U−1))",
                 correction="the leading factor is 1/B_U: 1/(B_U(B_U−1))", measured=direct_Y, expected=V_Y[i, j],
                 as_printed=printed_Y[i, j], tolerance=1e-10, formulas=(51,))

# %% [markdown]
# With the right factors, is the sum $\widehat{\mathrm{Var}}(\delta\mathcal H_1)\approx\hat V_X+\hat V_Y$ unbiased?
# Inserting the *sample* mean $\hat\mu_Y$ for $\mu_Y$ adds its own noise:
# $\mathbb E[\hat\mu_Y\hat\Sigma_X\hat\mu_Y]=\mu_Y\Sigma_X\mu_Y+\mathrm{Tr}[\Sigma_X\Sigma_Y]/B_U$. So
#
# $$ \mathbb E\,\hat V_X=\frac{\mu_Y\Sigma_X\mu_Y}{B_E}+\frac{\mathrm{Tr}[\Sigma_X\Sigma_Y]}{B_EB_U}, $$
#
# and likewise for $\hat V_Y$. The notes drop the third term "assuming it is negligible", and in fact have it *twice*:
# the sum overestimates by one $\mathrm{Tr}/(B_EB_U)$ <a id="05.12" href="#ledger-05.12">[05.12]</a>. The doubly centred
# products $c_{nm}$, what is left of $X_n\cdot Y_m$ after row means and column means, estimate the term by itself, and
# taking it off once makes the variance unbiased <a id="05.15" href="#ledger-05.15">[05.15]</a>:
#
# $$ \hat V=\hat V_X+\hat V_Y-\frac{\sum_{nm}c_{nm}^2}{B_EB_U(B_E-1)(B_U-1)} . $$

# %%
rows = {"true variance": true_variance, "V̂_X + V̂_Y as printed": (printed_X + printed_Y).mean(),
        "V̂_X + V̂_Y, right factors": (V_X + V_Y).mean(), "less the doubly centred term": of_pair["variance"].mean()}
ledger.corrected("05.12", "2.2.3", "Var(δĤ₁) ≈ V̂_X + V̂_Y (expectation, right factors)", formulas=(52,),
                 correction="the sum exceeds the variance by Tr[Σ_X Σ_Y]/(B_E B_U)", measured=(V_X + V_Y).mean(),
                 expected=true_variance + from_both, as_printed=true_variance, tolerance=1e-10)
ledger.holds("05.15", "4", "V̂_X + V̂_Y less that term is an unbiased variance", source="deltah", tolerance=1e-10,
             measured=of_pair["variance"].mean(), expected=true_variance,
             rules_out={"V̂_X + V̂_Y": (V_X + V_Y).mean()})
pd.Series(rows, name="expectation, nats²").astype(float).round(3).to_frame()

# %% [markdown]
# How far off are the printed factors? By
#
# $$ (B_E-B_U)\Big(\frac{\hat V_X}{B_U}-\frac{\hat V_Y}{B_E}\Big), $$
#
# which vanishes at equal sizes, and once more where $\hat V_Y/\hat V_X=B_E/B_U$
# <a id="05.23" href="#ledger-05.23">[05.23]</a>. An error that agrees with the right one in a test at such sizes proves
# nothing. For groups of the enumerated policy, with 64 prompts split unevenly, all expectations are exact.

# %%
distance = printed_X + printed_Y - V_X - V_Y
ledger.holds("05.23", "4", "the printed sum is off by (B_E − B_U)(V̂_X/B_U − V̂_Y/B_E) in every pair of batches (gap)",
             source="deltah", measured=(distance - (four - three) * (V_X / three - V_Y / four)).abs().max(),
             expected=0, tolerance=1e-10, rules_out={"no distance": distance.abs().max()})
toward_Y = group_share @ ((X - mu_X) @ mu_Y).square()
toward_X = group_share @ ((Y - mu_Y) @ mu_X).square()
everywhere = group_share @ ((X - mu_X) @ (Y - mu_Y).T).square() @ group_share
in_E = torch.arange(4, 61, 0.5, dtype=torch.float64)
in_U, third = 64 - in_E, everywhere / (in_E * (64 - in_E))
right_X, right_Y = toward_Y / in_E + third, toward_X / in_U + third
difference = right_X / in_U - right_Y / in_E
crossing = in_E[difference.abs().argmin()]
print(f"V̂_Y/V̂_X = B_E/B_U at about {crossing:.0f} and {64 - crossing:.0f}")

# %%
exact = right_X + right_Y - third
curves = {"as printed": (right_X + right_Y + (in_E - in_U) * difference) / exact,
          "right factors": (right_X + right_Y) / exact, "third term taken off once": exact / exact}
figure, axes = plt.subplots()
for k, (label, curve) in enumerate(curves.items()):
    axes.plot(in_E, curve, color=f"C{k}", linestyle=dh.figures.DASHES[k], label=label)
for at, label, left in ((32.0, "equal sizes", 17), (float(crossing), "$V_Y/V_X=B_E/B_U$", 42)):
    height = float(curves["right factors"][in_E == at])
    axes.plot(at, height, "ko", markersize=5)
    axes.annotate(label, (at, height), xytext=(left, 1.9), arrowprops={"arrowstyle": "-", "color": "0.4"})
axes.set(xlabel="prompts in batch E, of 64 in both", ylabel="expected estimate / true variance", ylim=(0, None),
         title="Far from equal sizes the printed factors mislead")
axes.legend(loc="upper center")
dh.figures.save(figure, results, "05-prefactors")

# %% [markdown]
# *Groups of two of the enumerated policy, exact expectations. As printed, the estimate agrees with the right factors
# where the curves cross, at 32 and 32 and again at about 41 and 23, and nearly so between. Both are 17% too large
# there: the right factors leave the third term, counted twice; taking it off once leaves nothing.*
#
# ### What it takes to compute them
#
# "If we keep [$\bar X$, $\bar Y$] around (only two parameter-sized vectors), then it's pretty easy to also compute
# $\hat V_{X,Y}$ … We'd have to do a backward for every prompt." So it is: with the two vectors at hand, each prompt's
# gradient is formed, multiplied with one of them, and forgotten <a id="05.26" href="#ledger-05.26">[05.26]</a>. That is
# a second pass over both batches, $B_E+B_U$ backward passes. What it does not give is the third term: $c_{nm}$ is a
# matter of all pairs, and two means know nothing of them. The Fisher kernel between the batches does
# (`dh.fisher_kernel`), which forms every gradient once and holds none, and from it all three parts are sums of blocks.

# %%
drawn = torch.multinomial(group_share, 12, True, generator=torch.Generator().manual_seed(0))
in_batch_E, in_batch_U = drawn[:7], drawn[7:]
X_mean, Y_mean = X[in_batch_E].mean(0), Y[in_batch_U].mean(0)
streamed = {"E": [], "U": []}
values = {"E": -centred_S, "U": centred_R / (G_two * L_group)}
for batch, groups, mean in (("E", in_batch_E, Y_mean), ("U", in_batch_U, X_mean)):
    for z in groups:
        gradient = flat_gradient(tiny, (values[batch][z] * log_probs[members[z]]).sum())
        streamed[batch].append(gradient @ mean)
V_streamed = sum(torch.stack(v).var() / len(v) for v in streamed.values())
pair_fit = dh.two_sample_product(products[in_batch_E[:, None], in_batch_U])
ledger.holds("05.26", "2.2.3", "X̄, Ȳ and a backward pass for every prompt give V̂_X + V̂_Y", measured=V_streamed,
             expected=pair_fit.variance + pair_fit.from_both, tolerance=1e-10,
             rules_out={"the unbiased variance": pair_fit.variance})

# %% [markdown]
# ## 5 · Is the third term negligible?
#
# The first two terms fall as one over a batch size, the third as one over the product of both: it is small for large
# enough batches. How large, depends on $\mathrm{Tr}[\Sigma_X\Sigma_Y]$, where the noise of *all* parameters meets,
# against noise along two directions only. For the enumerated policy the exact share is in reach, for groups of any
# size (`group_moments`, as in chapter 04).

# %%
K_tiny = gradients @ gradients.T
kinds = torch.stack([-S_tiny.view(D, N), rewards.view(D, N) / longest[:, None]])
of_size = {}
for G_group in (2, 3, 4, 5, 6, 8, 16):
    total, second = dh.exact.group_moments(pi.view(D, N), kinds[:1], G_group)
    of_size["X", G_group] = total / (G_group - 1), (second - torch.outer(total, total)) / (G_group - 1) ** 2
for G_group in (2, 8):
    total, second = dh.exact.group_moments(pi.view(D, N), kinds[1:], G_group)
    of_size["Y", G_group] = total / G_group, (second - torch.outer(total, total)) / G_group**2

# %%
rows = {}
for G_group in (2, 8):
    (m_x, C_x), (m_y, C_y) = of_size["X", G_group], of_size["Y", G_group]
    noise_E, noise_U = m_y @ K_tiny @ C_x @ K_tiny @ m_y, m_x @ K_tiny @ C_y @ K_tiny @ m_x
    meeting = ((C_x @ K_tiny) * (C_y @ K_tiny).T).sum()
    rows[f"G = {G_group}"] = {f"{b_e}, {b_u}": float(meeting / (meeting + b_u * noise_E + b_e * noise_U))
                              for b_e, b_u in ((8, 8), (64, 24), (64, 64), (256, 24), (256, 256))}
shares = pd.DataFrame(rows).T.rename_axis(columns="B_E, B_U")
print("exact share of the third term in the variance, enumerated policy")
shares.map("{:.1%}".format)

# %% [markdown]
# Call a term negligible that is at most 5% of the variance. The notes train with eight responses in every group, and
# there it is, for 64 and 24 groups <a id="05.28" href="#ledger-05.28">[05.28]</a>. At as many groups of two it is an
# eighth of the variance <a id="05.16" href="#ledger-05.16">[05.16]</a>, the same whether moments of groups are added up
# or the 196 groups themselves; only from some hundreds on may it be left out. The assumption is one about sizes, and
# the notes' formula, which holds the term twice, is wrong by the share that the table shows.

# %%
of_two, of_eight = shares["64, 24"]
third_of_two = everywhere / (64 * 24)
ledger.holds("05.28", "2.2.3", "the term of order 1/(B_E B_U) is negligible (share at most 5%, 64 and 24 groups of 8)",
             measured=of_eight, expected=(0.0, 0.05), tolerance=1e-10, rules_out={"groups of two": of_two})
ledger.corrected("05.16", "2.2.3", "the term is negligible, at most 5%, whatever G (share, 64 and 24 groups of 2)",
                 correction="with groups of eight (2.6%), not with groups of two (12.6%)", measured=of_two,
                 expected=third_of_two / (toward_Y / 64 + toward_X / 24 + third_of_two), as_printed=0.05,
                 tolerance=1e-10)

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

# %% [markdown]
# With the kernel between two batches, all products $X_n\cdot Y_m$ are sums of its blocks (chapter 08 says how it comes
# without holding gradients).

# %%
with torch.no_grad():
    S_E = dh.score(policy, evaluation).log_probs.sum(1).double().view(B_E, 8)
y = (advantages.double() / (8 * max_new_tokens)).view(B_U, 8)
K = dh.fisher_kernel(policy, evaluation, update).double().view(B_E, 8, B_U, 8)
x = -(S_E - S_E.mean(1, keepdim=True)) / 7
with_8 = torch.einsum("ng,ngmh,mh->nm", x, K, y).cpu()
fit = dh.two_sample_product(with_8)
print(f"two batches, X̄·Ȳ: {fit}")

# %% [markdown]
# And the third term's share? A share of estimated variances has an error of its own, and a large one. We leave out
# each prompt of either batch in turn; the jackknife of both sides together is the error
# <a id="05.27" href="#ledger-05.27">[05.27]</a>.

# %%
def third_share(matrix):
    parts = dh.two_sample_product(matrix)
    return parts.from_both / parts.variance


spread = 0.0
for matrix in (with_8, with_8.T):
    without = torch.tensor([third_share(torch.cat([matrix[:n], matrix[n + 1:]])) for n in range(len(matrix))])
    spread += (len(matrix) - 1) * float(without.var(correction=0))
share = dh.Estimate(third_share(with_8), math.sqrt(spread), min(with_8.shape))
print(f"share of the third term, {B_E} and {B_U} prompts of the shipped policy: {share}")
ledger.refuted("05.27", "2.2.3", "the term of order 1/(B_E B_U) is negligible on the shipped policy (share at most 5%)",
               counterexample="these batches", measured=share, expected=(0.0, 0.05), rules_out={"half": 0.5})

# %% [markdown]
# The interval holds both nothing and all of the variance: from batches like these one does not learn which part of the
# error one looks at. One need not. The unbiased sum of the three is what to report, and `two_sample_product` reports
# the third alone where the sum comes out smaller.
#
# ## 6 · Do the intervals hold?
#
# We draw pairs of batches of unequal size from four populations whose $T$ is known: normal vectors, the same with
# log-normal lengths, the products just measured on the transformer, taken as all there is, and the groups of the
# enumerated policy, where rare responses decide and batches must be large. Each number is the share of 95% intervals
# that hold $T$, with Welch's degrees of freedom throughout.

# %%
generator = torch.Generator().manual_seed(seed)
vectors = torch.randn(2, 1000, 10, generator=generator, dtype=torch.float64)
lengths = torch.randn(2, 1000, 1, generator=generator, dtype=torch.float64).mul(0.75).exp()
(x_n, y_n), (x_h, y_h) = 0.5 + vectors, 0.5 + vectors * lengths
populations = {"normal": x_n @ y_n.T, "log-normal": x_h @ y_h.T, "transformer": with_8, "enumerated": products}
splits = {name: ((8, 8), (8, 32), (32, 8), (64, 16)) for name in populations} | {"enumerated": ((64, 16), (384, 128))}

# %%
coverage = {}
for name, matrix in populations.items():
    chances = [group_share] * 2 if name == "enumerated" else [torch.ones(n).double() / n for n in matrix.shape]
    exact_T = float(chances[0] @ matrix @ chances[1])
    for b_e, b_u in splits[name]:
        e, u = (torch.multinomial(chance, replicates * size, True, generator=generator).view(replicates, size)
                for chance, size in zip(chances, (b_e, b_u), strict=True))
        drawn_fits = [dh.two_sample_product(matrix[n[:, None], m]) for n, m in zip(e, u, strict=True)]
        wanted = ("value", "standard_error", "count", *names)
        table = pd.DataFrame({k: [getattr(f, k) for f in drawn_fits] for k in wanted})
        v_x, v_y = table.from_rows + table.from_both, table.from_columns + table.from_both
        errors = {"as printed": (v_x * b_e / b_u + v_y * b_u / b_e) ** 0.5, "right factors": (v_x + v_y) ** 0.5,
                  "unbiased": table.standard_error}
        reach = student_t.ppf(0.975, table["count"] - 1)
        hits = {kind: (table.value - exact_T).abs() <= reach * error for kind, error in errors.items()}
        hits["two_sample_product"] = [low <= exact_T <= high for low, high in (f.interval() for f in drawn_fits)]
        for kind, inside in hits.items():
            coverage[name, kind, f"{b_e}, {b_u}"] = dh.Estimate.mean(torch.tensor(list(inside)).double())

# %%
print(f"share of {replicates} intervals at 95% that hold the exact T, for B_E, B_U")
wide = pd.Series({key: f"{found.value:.0%}" for key, found in coverage.items()})
wide.rename_axis(["population", "error", "B_E, B_U"]).unstack("B_E, B_U", sort=False).fillna("")

# %% [markdown]
# `two_sample_product` is the unbiased error with an interval that leans by the skewness of both sides; it is what
# closes the gap where rare groups decide, given batches that hold some of them. It covers at its level for normal
# vectors <a id="05.17" href="#ledger-05.17">[05.17]</a>, with log-normal lengths
# <a id="05.18" href="#ledger-05.18">[05.18]</a>, and for large batches of enumerated groups
# <a id="05.19" href="#ledger-05.19">[05.19]</a>.

# %%
for i, (name, size) in enumerate((("normal", "64, 16"), ("log-normal", "64, 16"), ("enumerated", "384, 128"))):
    ledger.holds(f"05.{17 + i}", "6", f"95% intervals cover 92% to 98%: {name}, B_E and B_U {size}", source="deltah",
                 measured=coverage[name, "two_sample_product", size], expected=(0.92, 0.98), rules_out={"90%": 0.9})

# %% [markdown]
# ## 7 · Many prompts, one response each?
#
# ### For the entropy
#
# "For the purposes of estimating the entropy, we get more mileage out of increasing $B_E$ and keeping $G_E=1$." The
# variance of a mean over $B$ prompts with $G$ responses each is $(\sigma_b^2+\sigma_w^2/G)/B$, with $\sigma_b^2$
# between prompts and $\sigma_w^2$ inside them. For a fixed number $BG$ of responses it grows with $G$ by the factor
# $1+(G-1)\,\sigma_b^2/(\sigma_b^2+\sigma_w^2)$. How much is lost depends on whether prompts differ at all, which the
# shipped policy answers <a id="05.24" href="#ledger-05.24">[05.24]</a>. Products of *different* responses to a prompt
# give $\sigma_b^2$ without the noise inside.

# %%
S_now = S_E.cpu()
by_prompt = torch.stack([(S_now.sum(1) ** 2 - S_now.square().sum(1)) / 56, S_now.square().mean(1), S_now.mean(1)], 1)
for g in (2, 8):
    lost = dh.Estimate.smooth(lambda m, g=g: 1 + (g - 1) * (m[0] - m[2] ** 2) / (m[1] - m[2] ** 2), by_prompt)
    print(f"variance of the entropy with G_E = {g}, relative to the same number of responses with G_E = 1: {lost}")
ledger.holds("05.24", "2.2.3", "for the entropy, G_E = 1 gives more mileage: variance at G_E = 8 over it, same cost",
             measured=lost, expected=(1.0, math.inf), rules_out={"no difference": 1.0})

# %% [markdown]
# ### For the predicted change
#
# Here it is less simple, because $X_n$ needs a baseline and the leave-one-out baseline needs a second response. With
# $G_E=1$ it has to come from elsewhere: one constant for all prompts (what a mean over the other prompts amounts to),
# or the prompt's true mean, which nobody has. What counts is batch E's whole part in the variance, the noise along
# $\mu_Y$ *and* its share of the trace term: $\mathrm{Tr}[\Sigma_XM]/B_E$ with $M=\mu_Y\mu_Y^T+\Sigma_Y/B_U$. Times
# $G_E$ it compares equal numbers of responses. A leave-one-out group is a sample covariance of $S$ and $\nabla S$,
# whose variance is known in closed form:
#
# $$ G\,\mathrm{Tr}[\Sigma_X^{(G)}M]=\mathrm{Tr}[\Sigma_X^{(1)}M]+(G-1)\,\sigma_b^2+\frac{\beta}{G-1},\qquad
#    \beta=\mathbb E_p\big[\mathrm{Var}(S)\,\mathrm{Tr}(V_pM)+w_p^TMw_p\big], $$
#
# with $\Sigma_X^{(1)}$ of one response with its prompt's true mean, $\sigma_b^2$ the variance *between* prompts of
# $w_p=\mathrm{Cov}(S,\nabla S\,|\,p)$ as $M$ sees it, and $V_p=\mathbb E[\nabla S\,\nabla S^T|p]$. So one response with
# that baseline always wins, and leave-one-out groups are best at $G=1+\sqrt{\beta/\sigma_b^2}$, beyond which they get
# worse <a id="05.21" href="#ledger-05.21">[05.21]</a>.

# %%
mean_Y_weights, C_Y = of_size["Y", 2]
along = torch.outer(K_tiny @ mean_Y_weights, K_tiny @ mean_Y_weights)
M_seen = along + K_tiny @ C_Y @ K_tiny / 24
prompt_mean = (pi * S_tiny).view(D, N).sum(1).repeat_interleave(N)
costs = {}
for name, level in (("zero", 0.0), ("one constant", (pi @ S_tiny) / D), ("the prompt's true mean", prompt_mean)):
    w = pi / D * (S_tiny - level)
    C_single = torch.diag(pi / D * (S_tiny - level) ** 2) - torch.outer(w, w)
    costs[f"G = 1, baseline: {name}"] = [float((C_single * M).sum()) for M in (along, M_seen)]
for G_group in (2, 3, 4, 5, 6, 8, 16):
    C_group = of_size["X", G_group][1]
    costs[f"G = {G_group}, leave-one-out"] = [G_group * float((C_group * M).sum()) for M in (along, M_seen)]
costs = pd.DataFrame(costs, index=["along E[Y]", "with trace term"]).T
print("variance of X as the update sees it, times G, nats²; trace term for B_U = 24")
costs.round(2)

# %%
weights = pi * (S_tiny - prompt_mean)
of_w = torch.stack([torch.zeros(D * N).double().index_put((k,), weights[k]) for k in torch.arange(D * N).view(D, N)])
w_M_w = of_w @ M_seen @ of_w.T
between = w_M_w.diagonal().mean() - w_M_w.mean()
Var_S, Tr_V = ((pi * q).view(D, N).sum(1) for q in ((S_tiny - prompt_mean) ** 2, M_seen.diagonal()))
beta = (Var_S * Tr_V + w_M_w.diagonal()).mean()
trace_costs = costs["with trace term"]
print(f"best leave-one-out group: G = {1 + (beta / between).sqrt():.2f}")
ledger.holds("05.21", "7", "leave-one-out groups lose (G−1)σ_b² + β/(G−1) to G_E = 1 with the prompt's mean (G = 5)",
             source="deltah", measured=trace_costs["G = 5, leave-one-out"] - trace_costs.iloc[2],
             expected=4 * between + beta / 4, tolerance=1e-10, rules_out={"no loss": 0})

# %%
figure, axes = plt.subplots()
loo = trace_costs[trace_costs.index.str.contains("leave")]
G_drawn = [int(name.split()[2].rstrip(",")) for name in loo.index]
G_all = torch.arange(2, 33, dtype=torch.float64)
axes.semilogx(G_all, trace_costs.iloc[2] + (G_all - 1) * between + beta / (G_all - 1), color="C0")
axes.semilogx(G_drawn, loo, "o", color="C0", label="groups of G, leave-one-out: enumerated, and formula")
for k, name in enumerate(("zero", "one constant", "the prompt's true mean")):
    axes.axhline(trace_costs[f"G = 1, baseline: {name}"], color=f"C{k + 1}", linestyle=dh.figures.DASHES[k + 1],
                 label=f"G = 1, baseline: {name}")
axes.set(xlabel="responses to each prompt, G", ylabel="variance × G, nats²", ylim=(0, None), xticks=[2, 4, 8, 16, 32],
         xticklabels=[2, 4, 8, 16, 32], title="One response with a constant baseline beats leave-one-out groups")
axes.minorticks_off()
axes.legend()
dh.figures.save(figure, results, "05-group-size")

# %% [markdown]
# *The enumerated policy, exact; batch E's part in the variance at an equal number of responses, trace term with*
# $B_U=24$ *groups of two. Among leave-one-out groups five responses are best; two cost a fifth more, sixteen
# nearly a third.*
#
# One response a prompt is the better bargain here too, *if* a baseline is at hand, and a single constant is nearly as
# good as the prompt's own mean. Without any baseline it is the worst choice in the table.
#
# ## What stands
#
# A second batch is needed whenever entropy is *measured*: what the update's own responses show is biased at first
# order. The variance formula is exact. Of its estimate, the leading factors have to change places and the third term
# has to come off once; the matrix of inner products gives it for nothing. One response a prompt serves the measurement
# best, and the prediction too once a baseline is brought along.
#
# <a id="remaining"></a>
# ## The remaining equations
#
# The variance formula rests on the moments of the two means,
#
# $$ \mathbb E_E[\bar X]=\mu_X,\quad \mathrm{Cov}_E(\bar X)=\frac{\Sigma_X}{B_E},\quad
#    \mathbb E_U[\bar Y]=\mu_Y,\quad \mathrm{Cov}_U(\bar Y)=\frac{\Sigma_Y}{B_U} . $$
#
# The covariance of $\bar X$ is a matrix of 6768 rows; we compare it as the four vectors $Y(p)$ see it, and that of
# $\bar Y$ as the $X(p)$ see it <a id="05.7" href="#ledger-05.7">[05.7]</a>. In the same way the sample covariance
#
# $$ \hat\Sigma_X^{\alpha\beta}=\frac1{B_E-1}\sum_{n\in E}(X_n-\bar X)^\alpha(X_n-\bar X)^\beta $$
#
# has the mean $\Sigma_X$ over all batches <a id="05.9" href="#ledger-05.9">[05.9]</a>.

# %%
Sigma_X, Sigma_Y = (q.T @ q / D for q in (x_centred @ Y_of_prompt.T, y_centred @ X_of_prompt.T))
X_bar_seen, Y_bar_seen = prompt_products[E_all].mean(1), prompt_products.T[U_all].mean(1)
gaps = [(X_bar_seen.mean(0) - mu_X @ Y_of_prompt.T).abs().max(),
        (Y_bar_seen.mean(0) - mu_Y @ X_of_prompt.T).abs().max(),
        (X_bar_seen.T.cov(correction=0) - Sigma_X / four).abs().max(),
        (Y_bar_seen.T.cov(correction=0) - Sigma_Y / three).abs().max()]
seen_rows = prompt_products[E_all] - prompt_products[E_all].mean(1, keepdim=True)
Sigma_hat = torch.einsum("enp,enq->epq", seen_rows, seen_rows).mean(0) / (four - 1)
ledger.holds("05.7", "2.2.3", "X̄ and Ȳ have means μ_X, μ_Y and covariances Σ_X/B_E, Σ_Y/B_U (largest gap)",
             measured=max(gaps), expected=0, tolerance=1e-10, formulas=(47,),
             rules_out={"Σ_X/B_U": (Sigma_X / four - Sigma_X / three).abs().max()})
ledger.holds("05.9", "2.2.3", "Σ̂_X with 1/(B_E−1) is an unbiased estimate of Σ_X (largest gap)", tolerance=1e-10,
             measured=(Sigma_hat - Sigma_X).abs().max(), expected=0, formulas=(49,),
             rules_out={"with 1/B_E": Sigma_X.abs().max() / four})

# %% [markdown]
# The parts of the unbiased variance, one by one: $\hat V_X$ holds the third term once
# <a id="05.13" href="#ledger-05.13">[05.13]</a>, and the doubly centred products give it alone
# <a id="05.14" href="#ledger-05.14">[05.14]</a>.

# %%
ledger.holds("05.13", "4", "E V̂_X = μ_Y Σ_X μ_Y/B_E + Tr[Σ_X Σ_Y]/(B_E B_U)", source="deltah", tolerance=1e-10,
             measured=V_X.mean(), expected=from_E + from_both, rules_out={"without the trace": from_E})
ledger.holds("05.14", "4", "the doubly centred products estimate Tr[Σ_X Σ_Y]/(B_E B_U) without bias", source="deltah",
             measured=of_pair["from_both"].mean(), expected=from_both, tolerance=1e-10, rules_out={"nothing": 0})

# %% [markdown]
# ## Ledger

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Choose $B_E$ and $B_U$ for the enumerated policy, $G=8$, so that the third term is a hundredth of the variance.
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
