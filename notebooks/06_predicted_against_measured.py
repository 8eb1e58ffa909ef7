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
# # 06 · Predicted against measured
#
# The entropy after a step can be predicted from derivatives at $\theta$, and it can be measured after moving there. This
# chapter settles which form of the prediction is the exact linearisation of the measurement, over which learning rates
# the two agree, how precise either can be, and which rollouts and tokens of a real update made the entropy change.
#
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | $\mathcal H=\sum_k\mathbb E[H_k]$, its gradient, and the score identity with entropy-to-go and baseline | notes 2.3 |
# | 2 | the optimal baseline is $\mathbb E[G_k\mid t_{<k}]$; $b_k=H_k$ and $H_k+\mu_k$ | notes 2.3 |
# | 3 | $H(\theta+\eta v)=\mathbb E_{\pi_\theta}[wH]$, and the estimators per token and per sequence | notes 2.4 |
# | 4 | the boxed linearisation $\delta H_1/\eta$, and the term that comes from the denominator | notes 2.4 |
# | 5 | AdamW's step as a sum of two parts; the critical learning rate $\eta^*$ | notes 2.5 |
# | 6 | below $\eta^*$, measured and predicted changes are proportional: slope and $R^2$ in logarithms | notes 2.4, 2.5 |
#
# **You need** chapters 02, 03 and 05. **You will learn** why the two sides should share their samples and when they
# must not, why a value function is not the best baseline, what rounding leaves of a small change, and how to read
# which rollouts of an update did what.

# %%
import copy

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import linregress
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
training_rate = 1e-4              # η of the optimizer that trains; learning rates below are relative to it
training_steps = 3
update_prompts = 16               # of each training step and of batch U, with 8 responses each
evaluation_prompts = 144          # B_E, with one response each
max_new_tokens = 64
replicates = 2000                 # samples behind each coverage

# %%
ledger = dh.Ledger("06", source="notes")
generator = torch.Generator().manual_seed(seed)

# %% [markdown]
# ## 1 · The entropy, token by token
#
# We begin where expectations are sums: a random transformer over three tokens, token 2 ends a response, three prompts
# of different lengths, all responses of at most four tokens, at temperature 0.7. `q` holds the probability of each
# response, prompts being equally likely. The direction $v$ is the policy gradient for a reward that counts the ones in a
# response. One pass in forward mode gives, at every token, the derivatives $\nabla_vS_k$ and $\nabla_vH_k$ along it.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=2)
responses = dh.exact.every_response(tiny, [[0], [1, 0], [0, 0, 1]], max_new_tokens=4, temperature=0.7)
scores = dh.score(tiny, responses)
log_pi, mask, T = scores.log_probs.sum(1), responses.response_mask, responses.lengths.double()
share = dh.exact.probabilities(scores) / 3
q, H_k = share.detach(), scores.entropies.detach()
rewards = ((responses.response_ids == 1) & mask).double().sum(1)
v = {name: torch.empty_like(p) for name, p in tiny.parameters.items()}
vector_to_parameters(flat_gradient(tiny, share @ rewards), v.values())
own = tiny.shifted(v, 0.0)
_, (s, dH_k) = torch.func.jvp(lambda p: tuple(dh.score(tiny, responses, p)), (own,), (v,))
print(f"{len(responses)} responses of {T @ q:.2f} tokens on average, {q @ H_k.sum(1):.3f} nats each")

# %% [markdown]
# With $H_k$ the entropy of the distribution that token $k$ is drawn from, the notes write
#
# $$ \mathcal H=\sum_{k=1}^L\mathbb E[H_k],\qquad
#    \partial_\alpha\mathcal H=\mathbb E\Big[\sum_k\partial_\alpha H_k\Big]
#    +\mathbb E\Big[\Big(\sum_kH_k\Big)\partial_\alpha\log\pi(t|p)\Big]. $$
#
# A response that ends early has no $H_k$ after its end. The referee is $-\sum\pi\log\pi$ over whole responses, which
# knows of no tokens, and its gradient.

# %%
H = -(share * log_pi).sum()
grad_H, H_i = flat_gradient(tiny, H), H_k.sum(1)
two_terms = flat_gradient(tiny, q @ scores.entropies.sum(1) + q @ (H_i * log_pi))
ledger.holds("06.1", "2.3", "H = Σ_k E[H_k]", measured=q @ H_i, expected=H.detach(), tolerance=1e-10)
ledger.holds("06.2", "2.3", "∂H = E[Σ ∂H_k] + E[(Σ H_k) ∂ log π] (gap relative to |∂H|)", expected=0, tolerance=1e-10,
             measured=(two_terms - grad_H).norm() / grad_H.norm())

# %% [markdown]
# In the second term a token only needs to answer for what comes after it. With the entropy-to-go
# $G_k=\sum_{k'\ge k}H_{k'}$ and any function $b_k$ of prompt and earlier tokens,
#
# $$ \mathbb E\Big[\Big(\sum_kH_k\Big)\partial_\alpha\log\pi\Big]
#    =\mathbb E\Big[\sum_k(G_k-b_k)\,\partial_\alpha\log\pi(t_k|t_{<k})\Big]. $$
#
# To have conditional expectations at hand we number the prefixes, so that two tokens share a number if they were drawn
# after the same prompt and tokens. `given` averages over them. For $\mu_k$, which the notes keep as a moving average
# of $G_k-H_k$, we take what it tends to, the mean at position $k$.

# %%
position = torch.arange(4).expand(mask.shape)
digits = (responses.response_ids + 1) * mask * 4**position
keys = torch.stack([responses.prompt_index[:, None].expand(mask.shape), position, digits.cumsum(1) - digits], -1)
prefix = keys.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(mask.shape)
member = torch.nn.functional.one_hot(prefix).double() * mask[..., None]
reach = torch.einsum("n,nkp->p", q, member).clamp(min=1e-300)


def given(x):
    """E[x_k | t_<k] for every token."""
    return (torch.einsum("n,nkp,nk->p", q, member, x) / reach)[prefix] * mask


# %%
G_k = H_k.flip(1).cumsum(1).flip(1)
mu_k = (q @ (G_k - H_k)) / (q @ mask.double())
random = torch.randn(int(prefix.max()) + 1, generator=generator, dtype=torch.float64)
baselines = {"0": torch.zeros_like(G_k), "H_k": H_k, "H_k + μ_k": (H_k + mu_k) * mask, "E[G_k | t_<k]": given(G_k)}
second_term = flat_gradient(tiny, q @ (H_i * log_pi))
gaps = [flat_gradient(tiny, q @ ((G_k - b) * scores.log_probs).sum(1)) - second_term
        for b in (*baselines.values(), random[prefix] * mask)]
ledger.holds("06.3", "2.3", "E[(Σ H_k) ∂ log π] = E[Σ (G_k − b_k) ∂ log π(t_k)], for five baselines (largest gap)",
             measured=torch.stack(gaps).abs().max() / second_term.abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# The fifth baseline is a random number for each prefix: it adds no bias either. Baselines differ by variance alone.
#
# ## 2 · Which baseline is best?
#
# The notes: "The optimal is $\mathbb E[G_k|t_{<k}]$". That is the best *prediction* of $G_k$. But $G_k$ enters
# multiplied by $s_k=\nabla_vS_k$, and where a token has a large $|s_k|$ the baseline should fit better. Taking every
# token's term by itself, $\sum_k\mathbb E[(G_k-b_k)^2s_k^2]$ is least for
#
# $$ b_k=\frac{\mathbb E[G_ks_k^2\mid t_{<k}]}{\mathbb E[s_k^2\mid t_{<k}]} . $$
#
# That is not the end of it. What an estimate suffers from is the variance of the *sum* over $k$. The factors $s_k$ are
# uncorrelated among each other, as $\mathbb E[s_k|t_{<k}]=0$. The terms $(G_k-b_k)s_k$ are not, as $G_k$ holds
# tokens yet to be drawn. Write $y=\sum_jG_js_j$. In $\mathrm{Var}(y-\sum_kb_ks_k)$ the $s_k$ of different prefixes are
# orthogonal, so that every prefix has a least-squares problem of its own, and the minimum is at
#
# $$ b_k=\frac{\mathbb E\big[s_k\sum_jG_js_j\mid t_{<k}\big]}{\mathbb E[s_k^2\mid t_{<k}]} . $$
#
# Here $j$ runs over all positions, those before $k$ included. We enter both formulas, and let a least-squares solver
# that knows neither find the minima over all functions of the prefix.

# %%
y = (G_k * s).sum(1)
baselines["least for single terms"] = given(G_k * s**2) / given(s**2).clamp(min=1e-300)
baselines["least for the sum"] = given(s * y[:, None]) / given(s**2).clamp(min=1e-300)
root = q.sqrt()[:, None, None] * s[..., None] * member
targets = root.flatten(0, 1), (q.sqrt()[:, None] * G_k * s).flatten()
singles = torch.linalg.lstsq(*targets, driver="gelsd").solution
whole = torch.linalg.lstsq(root.sum(1), q.sqrt() * y, driver="gelsd").solution
least_singles = (targets[1] - targets[0] @ singles).square().sum()
least_whole = (q.sqrt() * y - root.sum(1) @ whole).square().sum() - (q @ y) ** 2

# %%
rows = {}
for name, b in baselines.items():
    term = (G_k - b) * s
    rows[name] = {"single terms": q @ (term**2).sum(1), "their sum": q @ term.sum(1) ** 2 - (q @ y) ** 2,
                  "with ∇H_k": q @ (term + dH_k).sum(1) ** 2 - (q @ (term + dH_k).sum(1)) ** 2}
variances = pd.DataFrame(rows).T.astype(float)
(variances / variances.loc["H_k"]).round(3).rename_axis("variance relative to b_k = H_k")

# %%
value_function = variances.loc["E[G_k | t_<k]"]
ledger.corrected("06.4", "2.3", "the optimal baseline is E[G_k|t_<k]: least Σ_k E[(G_k − b_k)² s_k²]",
                 correction="E[G_k s_k²|t_<k] / E[s_k²|t_<k]", expected=least_singles, tolerance=1e-8,
                 measured=variances.loc["least for single terms", "single terms"],
                 as_printed=value_function["single terms"])
ledger.corrected("06.5", "2.3", "the optimal baseline is E[G_k|t_<k]: least Var Σ_k (G_k − b_k) s_k",
                 correction="E[s_k Σ_j G_j s_j|t_<k] / E[s_k²|t_<k], as terms of different k are correlated",
                 measured=variances.loc["least for the sum", "their sum"], expected=least_whole, tolerance=1e-8,
                 as_printed=value_function["their sum"])
ledger.holds("06.6", "2.3", "b_k = H_k + μ_k does better than b_k = H_k (excess of variance, relative)",
             measured=(variances["their sum"]["H_k + μ_k"] / variances["their sum"]["H_k"] - 1).clip(min=0),
             expected=0, tolerance=1e-10)

# %% [markdown]
# The baselines that the notes propose are well chosen: the learnable part beyond them is smaller than what they
# remove. But a value function, however well learned, stops short of the best, and it need not even beat the crude
# $H_k+\mu_k$.
#
# ## 3 · Measuring with the old samples
#
# The change is $H(\theta+\eta v)-H(\theta)$, and both are measured on responses drawn at $\theta$:
#
# $$ H(\theta+\eta v)=\mathbb E_{t\sim\pi_\theta}[w\,H(t)],\qquad w=\frac{\pi_{\theta+\eta v}(t)}{\pi_\theta(t)} . $$
#
# The $H(t)=\sum_kH_k$ inside is that of the *shifted* policy. With the old policy's the formula would be missing
# $\nabla H_k$. Since $H_k$ depends on nothing but the prefix, its weight may do so too,
# $w_{<k}=\prod_{j<k}\pi_{\theta+\eta v}(t_j)/\pi_\theta(t_j)$: the future only adds noise. That is what
# `measured_entropy_change` does, and to first order it is the same as going from $b_k=-\sum_{j<k}H_j$ to $b_k=H_k$.

# %%
rows, old = [], scores.log_probs.detach()
for eta in (1e-4, 1e-3, 3e-3, 1e-2):
    new = [x.detach() for x in dh.score(tiny, responses, tiny.shifted(v, eta))]
    ratio, H_new = new[0] - old, new[1]
    before = torch.cat([torch.zeros_like(ratio[:, :1]), ratio.cumsum(1)[:, :-1]], 1).exp()
    w, truth = ratio.sum(1).exp(), -(new[0].sum(1).exp() / 3) @ new[0].sum(1)
    kinds = {"whole": w * H_new.sum(1), "prefix": (before * H_new).sum(1), "old H": w * H_i}
    rows.append({"η": eta, "ΔH": truth - H.detach()} | {f"error, {k}": q @ x - truth for k, x in kinds.items()}
                | {k: q @ (x - H_i) ** 2 - (q @ (x - H_i)) ** 2 for k, x in kinds.items()})
weighted = pd.DataFrame(rows).set_index("η").astype(float)
weighted["variance, prefix / whole"] = weighted["prefix"] / weighted["whole"]
weighted[["ΔH", "error, old H", "variance, prefix / whole"]].round(4)

# %%
ledger.holds("06.7", "2.4", "H(θ + ηv) = E_θ[w H(t)], with H(t) of the shifted policy (largest error over η)",
             measured=weighted["error, whole"].abs().max(), expected=0, tolerance=1e-10)
ledger.holds("06.8", "derived here", "E_θ[Σ_k w_<k H_k] is the same (largest error over η)",
             measured=weighted["error, prefix"].abs().max(), expected=0, tolerance=1e-10)
ledger.holds("06.9", "derived here", "weights of prefixes give the change less variance (largest excess over η)",
             measured=(weighted["variance, prefix / whole"].max() - 1).clip(min=0), expected=0, tolerance=1e-10)

# %% [markdown]
# Per token, the notes measure $\mathbb E[H]/\mathbb E[T]$, and both need weights:
#
# $$ H(\theta+\eta v)\to\sum_{t_i\in E}\frac{w_i}{\sum_jw_jT_j}\sum_kH_k,\qquad
#    H^{\text{per tok}}=\frac1{T_{\text{tot}}}\sum_{t_i\in E}\frac{w_iH_i}{\sum_jw_jT_j} . $$
#
# The first is right. The second divides by the number of tokens twice: at $\eta=0$ it is the entropy per token, over
# $T_{\text{tot}}$. On a sampled batch E of 64 responses we build the first, and the self-normalised one per sequence,
# $\sum w_iH_i/\sum w_i$, as functions of the parameters.

# %%
drawn = torch.multinomial(q, 64, replacement=True, generator=generator)
batch, T_E, s_E, dH_E, H_E = responses.select(drawn), T[drawn], s[drawn].sum(1), dH_k[drawn].sum(1), H_i[drawn]


def reweighted(parameters):
    """Entropy per token and per sequence of the policy at `parameters`, from the batch drawn at θ."""
    new, entropies = dh.score(tiny, batch, parameters)
    w = (new - old[drawn]).sum(1).exp()
    return (w @ entropies.sum(1)) / (w @ T_E), (w @ entropies.sum(1)) / w.sum()


# %%
(h, H_bar), (slope_token, slope_sequence) = torch.func.jvp(reweighted, (own,), (v,))
population = (q * w) @ H_new.sum(1) / ((q * w) @ T)
ledger.holds("06.10", "2.4", "Σ w_i H_i / Σ w_j T_j over the population is E[H]/E[T] of the shifted policy",
             measured=population, expected=truth / (new[0].sum(1).exp() @ T / 3), tolerance=1e-10)
ledger.corrected("06.11", "2.4", "H per token = (1/T_tot) Σ w_i H_i / Σ w_j T_j (a batch at η = 0)",
                 correction="Σ w_i H_i / Σ w_j T_j: the weights' denominator is the only normalisation", measured=h,
                 expected=H_E.sum() / T_E.sum(), as_printed=H_E.sum() / T_E.sum() ** 2, tolerance=1e-10)

# %% [markdown]
# ## 4 · The linearisation
#
# A prediction to hold against this measurement should be its derivative at $\eta=0$. The notes arrive at
#
# $$ \boxed{\delta H_1/\eta\to\frac1{T_{\text{tot}}}\sum_{t_i\in E}\sum_k(G_k-b_k)\nabla_vS_k+\nabla_vH_k
#    -T_iH_k\nabla_vS} $$
#
# with $S=\sum_kS_k$. The last term, from the denominator, cannot be right: $T_iH_k$ is nats times tokens, where the
# others are nats. By the quotient rule the derivative of $\sum w_iH_i/\sum w_jT_j$ is
#
# $$ \frac1{T_{\text{tot}}}\sum_{t_i\in E}\Big[H_i\nabla_vS+\sum_k\nabla_vH_k-h\,T_i\nabla_vS\Big],\qquad
#    h=\frac{\sum_iH_i}{T_{\text{tot}}}, $$
#
# with the batch's entropy per token in place of the sum of $H_k$. The first term is the box's with
# $b_k=-\sum_{j<k}H_j$, a function of the prefix; other baselines have the same expectation.

# %%
per_token = (H_E * s_E + dH_E - h * T_E * s_E).sum() / T_E.sum()
printed = (H_E * s_E + dH_E - T_E * H_E * s_E).sum() / T_E.sum()
ledger.corrected("06.12", "2.4 (box)", "δH₁/η, last term −T_i H_k ∇S (a batch, against its autograd derivative)",
                 correction="−h T_i ∇S once for each response, with h the batch's entropy per token",
                 measured=slope_token, expected=per_token, as_printed=printed, tolerance=1e-10)
ledger.corrected("06.13", "2.4", "the denominator's term is zero per sequence (a batch, against its derivative)",
                 correction="−H̄ mean(∇S): zero in expectation, not in a batch", measured=slope_sequence,
                 expected=(H_E * s_E + dH_E - H_bar * s_E).mean(), as_printed=(H_E * s_E + dH_E).mean(),
                 tolerance=1e-10)
print(f"per token: derivative {slope_token:.2f}, corrected {per_token:.2f}, as printed {printed:.2f}\n"
      f"per sequence: derivative {slope_sequence:.2f}, without the denominator {(H_E * s_E + dH_E).mean():.2f}")

# %% [markdown]
# In expectation the corrected box is the derivative of $\mathbb E[H]/\mathbb E[T]$, whatever the baseline. The term
# $-hT_i$ can be treated as $H_i$ was, token by token: a token answers for the tokens that follow it, and
#
# $$ \frac{dh}{d\eta}=\frac1{\mathbb E[T]}\,\mathbb E\Big[\sum_k\Big(\sum_{j>k}(H_j-h)-b_k\Big)\nabla_vS_k+\nabla_vH_k\Big].
# $$
#
# `entropy_change(per="token")` is that. We compare it with the gradient of the exact ratio, and the library's number
# on the sampled batch with the same sum over the batch.

# %%
per_token_entropy, lengths = (share @ scores.entropies.sum(1)) / (share @ T), q @ T
exact = flat_gradient(tiny, per_token_entropy) @ parameters_to_vector(v.values())
h_all = per_token_entropy.detach()
ledger.holds("06.14", "2.4 (box)", "the corrected box has expectation d(E[H]/E[T])/dη, for four baselines (largest gap)",
             measured=max(abs(q @ (((G_k - b) * s + dH_k).sum(1) - h_all * T * s.sum(1)) / lengths - exact)
                          for b in list(baselines.values())[:4]), expected=0, tolerance=1e-10)
excess = H_k - h_all * mask
after = excess.flip(1).cumsum(1).flip(1) - excess
ledger.holds("06.15", "derived here", "so has (1/E[T]) E[Σ_k Σ_{j>k} (H_j − h) ∇S_k + ∇H_k]", expected=exact,
             measured=q @ (after * s + dH_k).sum(1) / lengths, tolerance=1e-10)

# %%
change = dh.entropy_change(tiny, batch, v, baseline="entropy")
excess_E = (H_k[drawn] - h * mask[drawn])
after_E = excess_E.flip(1).cumsum(1).flip(1) - excess_E
ledger.holds("06.16", "derived here", "entropy_change per token is that sum over a batch", measured=change.value,
             expected=((after_E * s[drawn]).sum() + dH_E.sum()) / T_E.sum(), tolerance=1e-10)
print(f"exact {exact:.2f}, from 64 responses {change}; the linearised measurement on them gives {slope_token:.2f}")

# %% [markdown]
# Do the intervals hold? We draw samples of 256 responses many times over and count how often the 95% interval holds
# the exact derivative, per sequence and, as a ratio of means, per token.

# %%
contributions = dh.entropy_change(tiny, responses, v, per="sequence", baseline="entropy").contributions
tokens_after = (T[:, None] - 1 - position) * mask
samples = torch.stack([H_i, T, contributions, (tokens_after * s).sum(1)], 1)
estimators = {"sequence": (lambda i: dh.Estimate.mean(contributions[i]), grad_H @ parameters_to_vector(v.values())),
              "token": (lambda i: dh.Estimate.smooth(lambda m: (m[2] - m[0] / m[1] * m[3]) / m[1], samples[i]), exact)}
for n, (per, (estimator, target)) in enumerate(estimators.items()):
    covered = dh.exact.coverage(estimator, q, 256, float(target), replicates=replicates, seed=seed)
    print(f"per {per}: {covered:.1%} of {replicates} intervals hold the exact derivative")
    ledger.holds(f"06.{17 + n}", "derived here", f"95% intervals of dH/dη per {per} cover 92.5% to 97.5%",
                 measured=covered, expected=0.95, tolerance=0.025)

# %% [markdown]
# ## 5 · How far does the first order reach?
#
# For a preconditioned gradient step $\delta\theta=\eta Pg$ the second order is small against the first where
#
# $$ \eta\ll\eta^*=\frac{2\,|(\nabla H)^T(Pg)|}{|(Pg)^T(\nabla^2H)(Pg)|} . $$
#
# With Adam the step is $\delta\theta_t\approx-\eta(\alpha_tg_t+\beta_tm_t)=-\eta s_t$ and $s_t$ takes the place of
# $Pg$. Read with $m$ the moment *before* the step, this is exact: $\alpha=(1-\beta_1)/(1-\beta_1^t)/(\sqrt{\hat v}+\epsilon)$
# for each parameter, and the factor of $m$ is $\beta_1/(1-\beta_1)$ times as large. AdamW's weight decay would come on top; here
# it is off. We train a copy of the policy for two steps, predict its third, and take it.

# %%
trained = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=2)
small_batch = batch.replace(rewards=rewards[drawn])
optimizer = torch.optim.AdamW(trained.parameters.values(), lr=1e-3, weight_decay=0.0)
for _ in range(3):
    step = dh.update_direction(trained, small_batch, "dr_grpo", optimizer=optimizer, old_log_probs=old[drawn])
    theta = parameters_to_vector(trained.parameters.values()).detach().clone()
    g = parameters_to_vector(step.parts["rollouts"].values()) / parameters_to_vector(step.preconditioner.values())
    m = [optimizer.state[p]["exp_avg"].flatten() for p in trained.parameters.values() if p in optimizer.state]
    m = torch.cat(m).clone() if m else torch.zeros_like(theta)
    dh.training.policy_gradient_step(trained, small_batch, old[drawn], "dr_grpo", optimizer)
moved = parameters_to_vector(trained.parameters.values()).detach() - theta
alpha = parameters_to_vector(step.preconditioner.values())
ledger.holds("06.19", "2.5", "Adam's real step is −η(α g + β m) with m from before the step (gap relative to the step)",
             measured=(moved - 1e-3 * alpha * (g - 9 * m)).norm() / moved.norm(), expected=0, tolerance=1e-10)

# %% [markdown]
# For $\eta^*$ we differentiate the exact entropy twice along $v$, in forward mode, and take steps of $\eta^*/100$ and
# $\eta^*/1000$. What the first order misses should be these fractions of it.

# %%
def exact_entropy(parameters):
    whole = dh.score(tiny, responses, parameters).log_probs.sum(1)
    return -(whole.exp() * whole).sum() / 3


def exact_slope(parameters):
    return torch.func.jvp(exact_entropy, (parameters,), (v,))[1]


first, second = torch.func.jvp(exact_slope, (own,), (v,))
critical = 2 * first.abs() / second.abs()
fractions = torch.tensor([1e-2, 1e-3], dtype=torch.float64)
changes = torch.stack([exact_entropy(tiny.shifted(v, float(x * critical))) for x in fractions]) - H.detach()
missed = (changes / (fractions * critical * first) - 1).abs() / fractions
print(f"first-order change {first:.2f} η, η* = {critical:.4f}; missed, in units of η/η*: {missed[0]:.3f}, {missed[1]:.3f}")
ledger.holds("06.20", "2.5", "at η = x η* the first order misses the share x of the change (x = 1/1000, in units of x)",
             measured=missed[1], expected=1, tolerance=0.02)

# %% [markdown]
# `critical_learning_rate` estimates $\eta^*$ from rollouts; chapter 07 is about it.
#
# ## 6 · A real update
#
# Now the shipped policy. It takes a few AdamW steps of GRPO, so that the optimizer remembers something. Then batch U
# makes an update direction from the optimizer's state, and batch E, other prompts with one response each, tells what
# that direction does to the entropy. A second batch E′ has yet other prompts, with two responses each.

# %%
policy = dh.load_policy(model, device, dtype)
data = dh.load_problems(problems, "train").shuffle(seed=seed)
ends = np.cumsum([0] + [update_prompts] * (training_steps + 1) + [evaluation_prompts, evaluation_prompts // 2])
parts = [data.select(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
optimizer = torch.optim.AdamW(policy.parameters.values(), lr=training_rate)
for step in range(training_steps):
    rollouts = dh.sample(policy, parts[step], 8, max_new_tokens, seed=seed + step)
    with torch.no_grad():
        old_log_probs = dh.score(policy, rollouts).log_probs
    dh.training.policy_gradient_step(policy, rollouts, old_log_probs, "grpo", optimizer)

# %%
update, evaluation, other = (dh.sample(policy, part, responses, max_new_tokens, seed=seed + 100 + responses)
                             for part, responses in zip(parts[-3:], (8, 1, 2), strict=True))
direction = dh.update_direction(policy, update, "grpo", optimizer=optimizer)
predicted = dh.entropy_change(policy, evaluation, direction)
elsewhere = dh.entropy_change(policy, other, direction)
entropy = dh.entropy(dh.score(policy, evaluation), evaluation, per="token")
print(f"{direction}\nentropy {entropy} nats a token\n"
      f"predicted change per unit of η: {predicted} from E, {elsewhere} from E′, in nats a token")

# %% [markdown]
# Times the learning rate, this is $\delta H_1$. Next to it goes the measured change on the same batch E, at learning
# rates from a thousandth of the training rate to ten times it: by weights of prefixes, and at the larger rates also by
# coupled sampling, which draws new responses from the moved policy and shares with the old ones what can be shared.

# %%
rates = training_rate * 10.0 ** np.arange(-3, 1.25, 0.5)
measured = dh.measured_entropy_change(policy, evaluation, direction, rates)
coupled = dh.measured_entropy_change(policy, evaluation, direction, rates[[-3, -1]], method="coupled", seed=seed,
                                     max_new_tokens=max_new_tokens)
half = evaluation.select(torch.arange(len(evaluation) // 2))
critical = dh.critical_learning_rate(predicted, dh.entropy_change(policy, half, direction, order=2))
measured["predicted"] = predicted.value * measured["learning_rate"]
low, high = critical.interval()
print(f"critical learning rate {critical}, 95% interval {low:.1g} to {high:.1g}")
measured[["learning_rate", "predicted", "change", "standard_error", "effective_sample_size"]].map("{:.2g}".format)

# %% [markdown]
# ## 7 · Slope and straightness
#
# If the first order is right, $\log|\Delta H|$ against $\log|\delta H_1|$ is a line of slope one. For a model of 1.5
# billion parameters the notes' author found slopes of 0.93 to 1.06 and $R^2$ of 0.996 to 1.000. We fit windows of two
# decades each. The first ends at a tenth of the training rate, far below every plausible $\eta^*$; the last reaches ten
# times the training rate.

# %%
fits = []
for start in (0, 2, 4):
    window = measured.iloc[start:start + 5].dropna()
    fit = linregress(np.log(window["predicted"].abs()), np.log(window["change"].abs()))
    fits.append({"η from": window["learning_rate"].min(), "to": window["learning_rate"].max(), "slope": fit.slope,
                 "R²": fit.rvalue**2})
fits = pd.DataFrame(fits)
ledger.holds("06.21", "2.4, 2.5", "two decades up to a tenth of the training rate: slope of log |ΔH| on log |δH₁|",
             measured=fits["slope"][0], expected=1, tolerance=0.03)
ledger.holds("06.22", "2.4, 2.5", "R² of that fit", measured=fits["R²"][0], expected=1, tolerance=1e-3)
fits.round({"slope": 3, "R²": 4}).map("{:.4g}".format)

# %% [markdown]
# The slopes are that close because prediction and measurement *share their noise*. Both are functions of one batch: a
# response of E that happens to reach an open token moves both alike. The ratio of the two is then a constant, off from
# one by what the learned baseline does and the weights do not. None of it says that either number is right about the
# policy. For that the samples have to differ. Here batch E′ predicts what batch E measures, and coupled sampling
# draws its own continuations; the distances are in units of the combined standard error.

# %%
at = measured.iloc[4]
both = (at["standard_error"] ** 2 + (at["learning_rate"] * elsewhere.standard_error) ** 2) ** 0.5
z = (at["change"] - at["learning_rate"] * elsewhere.value) / both
print(f"η = {at['learning_rate']:.1g}: measured on E {at['change']:.2g}, predicted on E′ "
      f"{at['learning_rate'] * elsewhere.value:.2g}, apart by {abs(z):.1f} standard errors")
methods = measured.merge(coupled, on="learning_rate", suffixes=("", "_coupled")).dropna()
errors = (methods["standard_error"] ** 2 + methods["standard_error_coupled"] ** 2) ** 0.5
distance = (methods["change"] - methods["change_coupled"]).abs() / errors
ledger.holds("06.23", "derived here", "predicted on one batch, measured on another: distance in standard errors",
             measured=abs(z), expected=0, tolerance=4)
ledger.holds("06.24", "derived here", "weights against coupled sampling: largest distance in standard errors",
             measured=distance.max(), expected=0, tolerance=4)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
left.loglog(rates, rates * abs(predicted.value), color="0.4", linestyle="--", label="predicted, first order")
for i, (label, table) in enumerate({"measured, weights": measured, "measured, coupled": coupled}.items()):
    style = {"color": f"C{i}", "marker": dh.figures.MARKERS[i], "linestyle": "none"}
    left.loglog(table["learning_rate"] * 1.06**i, table["change"].abs(), label=label, **style)
    first_order = table["learning_rate"] * predicted.value
    right.errorbar(table["learning_rate"] * 1.06**i, table["change"] / first_order, capsize=3,
                   yerr=1.96 * table["standard_error"] / first_order.abs(), **style)
reach = 1.96 * predicted.standard_error / abs(predicted.value)
right.axhspan(1 - reach, 1 + reach, color="0.85", label="95% of the prediction")
for axes in (left, right):
    axes.axvline(critical.value, color="0.4", linestyle=":", label="estimated η*")
left.set(xlim=(rates[0] / 2, rates[-1] * 10), xlabel="learning rate η", ylabel="|entropy change|, nats per token",
         title="A line over decades ...")
right.set(xscale="log", xlim=(rates[0] / 2, rates[-1] * 10), ylim=(-1.5, 3.5), xlabel="learning rate η",
          ylabel="measured / predicted", title="... and where it bends")
left.legend()
right.legend(loc="lower left")
dh.figures.save(figure, results, "06-predicted-measured")

# %% [markdown]
# *Left: the change of the entropy per token along one AdamW direction, on one batch E. Right: the same divided by the
# prediction; bars and band are 95% intervals, and one error moves all points measured with weights together. The bend
# begins well before η\*, where the second order is as large as the first: a tenth of the way there, a tenth of the
# prediction is already wrong.*
#
# ## 8 · How small a change can be seen?
#
# To the left of the figure something must give: the entropy after a tiny step differs from that before by less than
# its rounding. We take $\Delta H$ from the notes' own estimator $\sum w_iH_i/\sum w_jT_j$, of which the corrected box
# is the exact derivative, so that the relative deviation $|\Delta H/\delta H_1-1|$ shows rounding, which falls as
# $1/\eta$, and the second order, which rises as $\eta$, and nothing else. The same few rollouts and the same direction go
# through three copies of the policy: in float32; with float64 weights, where transformers keep float32 inside (RMS norm,
# rotary positions); and in float64 throughout, as `dh.exact.exact_policy` makes it.

# %%
few, v = evaluation.select(torch.arange(24)), direction.vector
versions = {"float32": dh.Policy(copy.deepcopy(policy.model).float()),
            "float64 weights": dh.Policy(copy.deepcopy(policy.model).double()),
            "float64 throughout": dh.exact.exact_policy(copy.deepcopy(policy.model))}
precise, T_few = versions["float64 throughout"], few.lengths.double()
v = {name: x.double() for name, x in v.items()}
(_, H), (s, dH) = torch.func.jvp(lambda p: tuple(dh.score(precise, few, p)), (precise.shifted(v, 0.0),), (v,))
box = (((H.sum(1) - H.sum() / T_few.sum() * T_few) * s.sum(1) + dH.sum(1)).sum() / T_few.sum()).item()

# %%
small_rates = 10.0 ** np.arange(-11, -2.75, 0.5)
deviations = {}
for name, version in versions.items():
    v = {n: x.to(version.dtype) for n, x in direction.vector.items()}
    entropies = []
    with torch.no_grad():
        start = dh.score(version, few)
        for eta in (0.0, *small_rates):
            new = dh.score(version, few, version.shifted(v, eta))
            w = (new.log_probs.double() - start.log_probs.double()).sum(1).exp()
            entropies.append((w @ new.entropies.double().sum(1) / (w @ T_few)).item())
    deviations[name] = np.abs((np.array(entropies[1:]) - entropies[0]) / (small_rates * box) - 1)

# %%
figure, axes = plt.subplots()
for i, (name, deviation) in enumerate(deviations.items()):
    axes.loglog(small_rates, deviation, color=f"C{i}", marker=dh.figures.MARKERS[i], linestyle=dh.figures.DASHES[i],
                label=name)
axes.set(xlabel="learning rate η", ylabel="|ΔH / δH₁ − 1|", title="Rounding on the left, second order on the right")
axes.legend(loc="lower right")
dh.figures.save(figure, results, "06-precision")

# %% [markdown]
# *Relative deviation of the measured change from its own linearisation, one batch of rollouts in three precisions. On
# the right all three lie on the second order. Going left, float32 leaves it first. Float64 weights gain a decade at
# best, rather than nine: what rounds is inside the model. Only float64 throughout follows the second order on down.*

# %%
clean = (small_rates > 3e-9) & (small_rates < 3e-7)
rise = linregress(np.log(small_rates[clean]), np.log(deviations["float64 throughout"][clean])).slope
ledger.holds("06.25", "2.4 (box)", "ΔH/δH₁ − 1 falls as η, in float64 throughout (log-log slope, 1e-8 to 1e-7)",
             measured=rise, expected=1, tolerance=0.05)
ledger.holds("06.26", "2.4 (box)", "ΔH/δH₁ = 1 at the best η, in float64 throughout",
             measured=deviations["float64 throughout"].min(), expected=0, tolerance=1e-6)
ledger.refuted("06.27", "derived here", "float64 weights make a float64 model: ΔH/δH₁ is off by 1e-3 at none of the η ≤ 1e-9",
               counterexample="the shipped policy, as transformers runs it: float32 inside", tolerance=0.5, expected=0,
               measured=(deviations["float64 weights"][small_rates < 2e-9] > 1e-3).sum())

# %% [markdown]
# For practice: to check a prediction in float32, step far enough that $\Delta H$ stands clear of rounding, which averages
# out over many tokens and so is kinder to large batches.
#
# ## 9 · What the baselines are worth here
#
# The variance of the score-function term decides how many rollouts a prediction costs. At equal samples, those of
# batch E, we compare four baselines: none, $H_k$, $H_k+\mu_k$ and the learned one of `entropy_change`. The direction is
# AdamW's, or the plain gradient of the same batch U; the entropy is per sequence, or per token with $H_j-h$ in place
# of $H_j$. `score_weights` are the learned $(F_k-b_k)$, up to a constant.

# %%
plain = dh.update_direction(policy, update, "grpo", optimizer=torch.optim.SGD(policy.parameters.values(), lr=1.0))
mask, rows, N = evaluation.response_mask, [], len(evaluation)
for name, v in {"plain gradient": plain.vector, "AdamW": direction.vector}.items():
    with policy.forward_mode():
        (_, H), (s, _) = torch.func.jvp(lambda p: tuple(dh.score(policy, evaluation, p)), (policy.shifted(v, 0.0),), (v,))
    for per, x in {"sequence": H, "token": H - H.sum() / mask.sum() * mask}.items():
        learned = dh.entropy_change(policy, evaluation, v, per=per) if per + name != "tokenAdamW" else predicted
        G = x.flip(1).cumsum(1).flip(1)
        F = (G - x) * mask
        size = mask.sum() if per == "token" else N
        rest = {"none": G * mask, "H_k": F, "H_k + μ_k": (F - F.sum(0) / mask.sum(0)) * mask,
                "learned": learned.score_weights * size}
        rows += [(f"{name}, per {per}", baseline, r * s) for baseline, r in rest.items()]

# %% [markdown]
# The table gives how many times smaller the variance is than with $b_k=H_k$: more is better.

# %%
sums = {row[:2]: row[2].sum(1) for row in rows}
ratios = []
for (case, baseline), x in sums.items():
    of_H_k = sums[case, "H_k"]
    moments = torch.stack([of_H_k**2, of_H_k, x**2, x], 1)
    gain = dh.Estimate.smooth(lambda m: (m[0] - m[1] ** 2) / (m[2] - m[3] ** 2), moments)
    ratios.append({"direction": case, "baseline": baseline, "gain": gain})
gains = pd.DataFrame(ratios).pivot(index="direction", columns="baseline", values="gain")
gains[["none", "H_k + μ_k", "learned"]]

# %% [markdown]
# How many times depends on the direction, the unit, and the few rollouts that decide: other seeds change the table by
# more than one would like. The learned baseline does no harm beyond the error of the comparison. Threefold, which is
# what we had hoped for, it can reach per sequence, and does not for every batch; per token it stays below, and hardly
# passes what $\mu_k$ finds. To see why, we ask where the variance sits: the share of
# $\sum((F_k-b_k)s_k)^2$ at open tokens, whose entropy is above 0.325 nats, that of a choice of nine to one; and the
# share of the ten largest rollouts.

# %%
open_token = H > 0.325
shares = []
for case, baseline, term in rows:
    squares, total = (term**2)[mask], (term.sum(1) - term.sum(1).mean()) ** 2
    shares.append({"direction": case, "baseline": baseline, "open tokens": squares[open_token[mask]].sum() / squares.sum(),
                   "largest ten rollouts": total.sort().values[-10:].sum() / total.sum()})
print(f"open tokens are {open_token.sum() / mask.sum():.0%} of all")
shares = pd.DataFrame(shares).set_index(["direction", "baseline"]).astype(float)
shares.loc[(slice(None), ["H_k", "learned"]), :].map("{:.0%}".format).unstack()

# %%
learned = [row["gain"] for row in ratios if row["baseline"] == "learned"]
ledger.holds("06.28", "2.3", "a learned baseline is no worse than b_k = H_k (largest shortfall, in standard errors)",
             measured=max(max(0.0, (1 - g.value) / g.standard_error) for g in learned), expected=0, tolerance=4)
ledger.refuted("06.29", "derived here", "it lowers the variance threefold whatever the direction and the unit (least gain)",
               counterexample="the entropy per token, where single open tokens decide",
               measured=min(g.value for g in learned), expected=3, tolerance=0.5)
pairs = elsewhere.contributions.view(-1, 2)
within, means = pairs.var(1).mean(), pairs.mean(1).var()
print(f"between prompts lies {max(0.0, float((means - within / 2) / (means + within / 2))):.0%} of the variance on E′")

# %% [markdown]
# Nearly all of it is at open tokens, one in eight or so, and a handful of rollouts hold a large part. An open token is
# a fork: one more term or the result, this digit or that. A baseline can remove what both branches have in common. What
# then varies is how the branches differ, which is the signal itself, and whether a response comes to such a fork at
# all. That is settled by earlier tokens, and no function of $t_{<k}$ at the fork can take it back. Per token there is
# less in common to begin with: with $h$ taken off every $H_j$, a longer rest is no longer a larger one.
#
# ## 10 · Who did it?
#
# The prediction is linear in the direction, and the direction is a sum over the tokens of batch U, what the optimizer
# remembers, and weight decay. `attribution` takes the change apart along that sum.

# %%
causes = dh.attribution(policy, evaluation, direction, predicted)
whole = causes.tokens.sum().item() + causes.momentum + causes.weight_decay
print(f"change {predicted.value:.2f} per unit of η: batch U {causes.tokens.sum():.2f}, momentum {causes.momentum:.2f}, "
      f"weight decay {causes.weight_decay:.3f}")
ledger.holds("06.30", "derived here", "the parts of the update add up to δH₁/η (gap relative to the largest part)",
             measured=(whole - predicted.value) / max(abs(causes.tokens.sum().item()), abs(causes.momentum)),
             expected=0, tolerance=1e-6)

# %% [markdown]
# Momentum is no footnote: earlier batches have a say of the same order as the present one, and a step's entropy change
# cannot be read off its own rollouts alone. Of those, here are the three that lowered the entropy most and the three
# that raised it most, each with its two decisive tokens: text, probability, and effect on the entropy.

# %%
chance = dh.score(policy, update).log_probs.detach().exp()
advantages = dh.objectives.group_advantages(update.rewards, update.prompt_index)
effect, rows = causes.tokens.sum(1), []
for i in effect.argsort()[[0, 1, 2, -3, -2, -1]].tolist():
    decisive = causes.tokens[i].abs().argsort(descending=True)[:2].tolist()
    tokens = [f"{policy.tokenizer.decode(update.response_ids[i, k:k + 1])!r} p={chance[i, k]:.2f} "
              f"{causes.tokens[i, k]:+.2f}" for k in decisive]
    text = policy.decode(update.response_ids[i:i + 1], update.response_mask[i:i + 1])[0]
    rows.append([f"{effect[i]:+.2f}", f"{advantages[i]:+.1f}", ", ".join(tokens), text.replace("\n", " | ")])
pd.DataFrame(rows, columns=["effect", "advantage", "decisive tokens", "response"])

# %% [markdown]
# Raising what is likely should lower the entropy, and so should lowering what is unlikely; the other two combinations
# should raise it. That is the rule of thumb for a single softmax (chapter 11 tests it). In a network with shared
# parameters the signs below are a result, not a given.

# %%
signs = {"A > 0": (advantages > 0)[:, None], "A < 0": (advantages < 0)[:, None]}
likely = {"p ≥ 0.5": chance >= 0.5, "p < 0.5": chance < 0.5}
table = {name: {label: f"{causes.tokens[update.response_mask & sign & kind].sum():+.2f} from "
                       f"{int((update.response_mask & sign & kind).sum())} tokens" for label, kind in likely.items()}
         for name, sign in signs.items()}
felt = predicted.token_contributions.abs()
open_E = dh.score(policy, evaluation).entropies > 0.325
print(f"on the side of E, open tokens hold {felt[open_E].sum() / felt.sum():.0%} of the absolute change")
pd.DataFrame(table).T

# %% [markdown]
# A few unlikely tokens weigh as much as the many likely ones, which is why clipping rules, the subject of chapters 10 to
# 12, look at them first.
#
# ## What stands
#
# The gradient with entropy-to-go and the weights of section 2.4 are exact. Three things in the printed formulas change:
# the estimator per token has one normalisation too many, the box's last term must hold the batch's entropy per token,
# and per sequence that term is zero in expectation only. The best baseline is not the expected entropy-to-go. On the
# shipped policy, prediction and measurement on one batch are proportional over decades below the training rate, and
# agree within their errors on different ones. Rounding sets a floor that float64 weights alone barely lower.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Repeat section 7 with `per="sequence"`. Why can its slope be far from one although nothing is wrong?
# 2. Draw E with eight responses a prompt instead of one, at equal cost. What happens to the error of the prediction?
# 3. Show that the least-squares baseline of section 2 becomes $\mathbb E[G_k|t_{<k}]$ for the last token of a response
#    of fixed length if $H_k$ is all that is left.
# 4. Set `training_steps = 0`, so that the optimizer has no memory. Which rollouts change places in section 10?
# 5. In section 8, double the rollouts. Which branch of which curve moves, and by how much?
#
# ## Further reading
#
# - Greensmith, E., Bartlett, P. and Baxter, J. *Variance reduction techniques for gradient estimates in reinforcement
#   learning*, Journal of Machine Learning Research 2004: optimal baselines, and why a value function is not one.
# - Owen, A. *Monte Carlo theory, methods and examples*, chapter 9: self-normalised importance sampling.
# - Higham, N. *Accuracy and stability of numerical algorithms*, chapter 1: rounding against truncation.
