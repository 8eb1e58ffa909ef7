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
# # 07 · Second order and the critical learning rate
#
# A first-order prediction of the entropy change is worth something only up to some learning rate, and the second
# derivative is to tell up to which. This chapter settles what the second derivative of a sampled entropy is, and what
# $\eta^*$, at which both orders are equal, does and does not promise.
#
# ## In short
#
# - **$\eta^*$ is not known from a batch of the usual size.** For AdamW's next step on the shipped policy, 64
#   rollouts put it between 0.0005 and infinity, 512 between 0.003 and infinity: here it does not say where the line
#   ends. Along another update, in chapter 06, 512 rollouts knew it to a factor of two, and it was right. A single
#   rollout may bring nine tenths of the variance of the second derivative.
# - **Where it is known it is necessary, not sufficient.** To leading order the first order misses $\eta/\eta^*$ of itself
#   [07.23](#ledger-07.23). But an update whose curvature cancels has $\eta^*=\infty$ and its first order fails all the same
#   [07.24](#ledger-07.24).
# - **The second order's formula** in terms of entropy to go has five terms, of which the notes print one
#   [07.5](#ledger-07.5). Their simple formula is complete [07.8](#ledger-07.8), and needs five times the responses for the
#   same error.
# - **Whether the second order is enough** on the shipped policy is not decided by 512 rollouts: where 0.87 ± 0.07 of
#   the line is left, its share of the bend is 0.1 ± 0.8 [07.31](#ledger-07.31).
# - **What to do.** Measure the change at the learning rate you use and at a tenth of it, on the same rollouts
#   (`dh.linearity`): the ratio tells how much of the line is left, with all orders in it, for three scorings. As a rule
#   across updates, limit the KL divergence of a step rather than $\eta/\eta^*$: over thirty updates of an enumerable
#   policy, $\sqrt{\mathrm{KL}}$ where a fifth is missed varies by 0.08 decades, $\eta/\eta^*$, with the exact $\eta^*$, by
#   0.38. The order was the same on ten other seeds, but thirty updates are enough to be sure of it on three of them only
#   [07.30](#ledger-07.30). Read $\eta^*$ only with its interval.
#
# **What is checked**
#
# | statement | source | verdict |
# |---|---|---|
# | the expansion of $\delta\mathcal H$, and the order of what is left | notes 2.6 | first order: holds [07.1](#ledger-07.1); $\mathcal O(\eta^2)$ after two orders: holds with a correction, $\mathcal O(\eta^3)$ [07.2](#ledger-07.2) |
# | $\partial_\alpha H$ with entropy to go and baseline, and its simpler form | notes 2.6 | holds [07.3](#ledger-07.3) [07.4](#ledger-07.4) |
# | $\partial_\alpha\partial_\beta H=\dots$ | notes 2.6 | holds, with the dots spelled out [07.5](#ledger-07.5) |
# | $v^T\nabla^2H\,v$, the simple formula with $S$ of the whole response | notes 2.6 | holds [07.8](#ledger-07.8) |
# | Hessian-vector products | notes 2.5, 2.6 | holds [07.14](#ledger-07.14) [07.15](#ledger-07.15) |
# | $\delta\theta=-\eta P\,\partial L$; Adam's $s_t=\alpha_tg_t+\beta_tm_t$ | notes 2.5 | holds [07.20](#ledger-07.20) [07.21](#ledger-07.21) [07.17](#ledger-07.17); one $g$ for both: holds with a correction, the sign [07.22](#ledger-07.22) |
# | the first order's error is $\eta/\eta^*$ of itself | notes 2.5 | holds for $\eta\to0$ [07.23](#ledger-07.23) |
# | where the second order is small the linear order is good | notes 2.5 | refuted [07.24](#ledger-07.24) |
# | the second order correction will be enough | notes 2.5 | not decided by these data [07.31](#ledger-07.31) [07.32](#ledger-07.32) |
#
# **You need** chapter 03, and the entropy to go of chapter 02. **You will learn** why the first of five terms is no
# approximation to their sum, how a library's layer norm can spoil a second derivative without any warning, and how many
# rollouts it takes to know $\eta^*$.

# %%
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch.func import jvp
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPT2LMHeadModel

import deltah as dh
from deltah.baselines import to_go
from deltah.exact import flat_gradient

dh.figures.use_style()

# %% tags=["parameters"]
model = "../data/policy"          # a folder or a Hugging Face hub id
problems = "../data/problems"     # a folder, a file or a hub id
device = "auto"
dtype = "float64"                 # float32 for large models
results = "../results/default"
seed = 0
training_steps = 3                # of AdamW before the step that is studied
prompts_in_batch = 12             # B_U, with 8 responses each
evaluation_prompts = 512          # B_E, with one response each
training_rate = 1e-4              # AdamW's learning rate
max_new_tokens = 64
replicates = 2000                 # samples behind each number of the coverage table

# %%
ledger = dh.Ledger("07", source="notes", seeds="../data/seeds",
                   stated=(model, problems, seed) == ("../data/policy", "../data/problems", 0))
generator = torch.Generator().manual_seed(seed)

# %% [markdown]
# ## 1 · The expansion
#
# As before we start with a policy that can be enumerated: a random transformer over three tokens, one of which ends a
# response, three prompts of different lengths, and all responses of at most four tokens, at temperature 0.8. A prompt
# is drawn first and then a response, so that the weights $\pi$ of all 93 responses sum to one. The direction $v$ is the
# exact gradient of the expected reward, the number of ones in a response.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=5)
prompts = [[0], [1, 0], [0, 0, 1]]
responses = dh.exact.every_response(tiny, prompts, max_new_tokens=4, temperature=0.8)
scores, D, N = dh.score(tiny, responses), len(prompts), len(responses) // len(prompts)
S, mask = scores.log_probs.sum(1), responses.response_mask
pi = dh.exact.probabilities(scores).detach() / D
rewards = ((responses.response_ids == 1) & mask).double().sum(1)
A = rewards - (D * pi * rewards).view(D, N).sum(1).repeat_interleave(N)
grad_J = flat_gradient(tiny, (pi * A) @ S)
v = {name: torch.empty_like(p) for name, p in tiny.parameters.items()}
vector_to_parameters(grad_J, v.values())

# %% [markdown]
# The referee of this chapter owes nothing to any formula for sampled responses. It writes the entropy as the sum over
# responses that it is, $-\sum\pi\log\pi$, and differentiates twice in reverse. From $\nabla\mathcal H$ and
# $\nabla^2\mathcal H\,v$ come the first and the second derivative along $v$.

# %%
def exact_entropy(policy, at=None):
    log_probs = dh.score(policy, responses, at).log_probs.sum(1)
    return -(log_probs.exp() * log_probs).sum() / D


# %%
H = exact_entropy(tiny)
parameters = list(tiny.parameters.values())
grad_H = torch.cat([g.flatten() for g in torch.autograd.grad(H, parameters, create_graph=True)])
exact_gradient, hessian_v = grad_H.detach(), flat_gradient(tiny, grad_H @ grad_J)
first, second = exact_gradient @ grad_J, hessian_v @ grad_J
print(f"entropy {H:.4f} nats, first derivative {first:.4f}, second derivative {second:.2f}")

# %% [markdown]
# The notes expand <a id="07.2" href="#ledger-07.2">[07.2]</a>
#
# $$ \delta\mathcal H=\sum_\alpha\partial_\alpha\mathcal H\,\delta\theta_\alpha
#    +\frac12\sum_{\alpha\beta}\partial_\alpha\partial_\beta\mathcal H\,\delta\theta_\alpha\delta\theta_\beta
#    +\mathcal O(\eta^2), $$
#
# and the last symbol cannot be meant: the second sum *is* of order $\eta^2$, as what the first leaves shows.
# <a id="07.1" href="#ledger-07.1">[07.1]</a> What is left of both is of order $\eta^3$. The slope of the rest in a
# log-log plot tells; from slopes over two neighbouring steps, Richardson's extrapolation
# takes the next order out.

# %%
etas, rest = 0.5 ** torch.arange(9.0, 14.0, dtype=torch.float64), []
for eta in etas:
    with torch.no_grad():
        change = exact_entropy(tiny, tiny.shifted(v, float(eta))) - H
    rest.append([(change - eta * first).abs(), (change - eta * first - eta**2 * second / 2).abs()])
slopes = -torch.tensor(rest, dtype=torch.float64).log2().diff(dim=0)
extrapolated = 2 * slopes[-1] - slopes[-2]
pd.DataFrame(slopes, columns=["after one order", "after two"], index=[f"{eta:.2g}" for eta in etas[1:]]).round(3)

# %%
ledger.holds("07.1", "2.6", "after the first order of δH the rest is of order η² (log-log slope)",
             measured=extrapolated[0], expected=2, tolerance=0.02, rules_out=3.0)
ledger.corrected("07.2", "2.6", "δH = Σ ∂H δθ + ½ ΣΣ ∂∂H δθ δθ + O(η²) (log-log slope of the rest)",
                 correction="the rest is of order η³", measured=extrapolated[1], expected=3, as_printed=2,
                 tolerance=0.02, formulas=(89,))

# %% [markdown]
# ## 2 · The first derivative, twice
#
# A second derivative starts from a first. The notes have two, with $G_k=\sum_{k'\ge k}H_{k'}$ the entropy to go,
# $S_k$ the log-prob of token $k$, and $b_k$ any function of the tokens before it:
# <a id="07.3" href="#ledger-07.3">[07.3]</a> <a id="07.4" href="#ledger-07.4">[07.4]</a>
#
# $$ \partial_\alpha H=\mathbb E\Big[\sum_k(G_k-b_k)\,\partial_\alpha S_k+\partial_\alpha H_k\Big],\qquad
#    \partial_\alpha H=\mathbb E\Big[\sum_kH_k\,\partial_\alpha S+\partial_\alpha H_k\Big]. $$
#
# Both are compared with the referee in every component. For the baseline we take something arbitrary: a sine of what
# was drawn before, on top of $H_k$.

# %%
S_k, H_k = scores
G = to_go(H_k.detach())
b = torch.where(mask, H_k + 2 * (5 * (S_k.cumsum(1) - S_k)).sin(), 0.0).detach()
with_baseline = flat_gradient(tiny, pi @ ((G - b) * S_k + H_k).sum(1))
simpler = flat_gradient(tiny, pi @ (H_k.detach().sum(1) * S + H_k.sum(1)))
scale = exact_gradient.abs().max()
ledger.holds("07.3", "2.6", "∂H = E[Σ (G_k − b_k) ∂S_k + ∂H_k] for an arbitrary baseline (largest gap, relative)",
             measured=(with_baseline - exact_gradient).abs().max() / scale, expected=0, tolerance=1e-10, formulas=(90,))
ledger.holds("07.4", "2.6", "∂H = E[Σ H_k ∂S + ∂H_k] (largest gap, relative)",
             measured=(simpler - exact_gradient).abs().max() / scale, expected=0, tolerance=1e-10, formulas=(92,))

# %% [markdown]
# ## 3 · What the dots stand for
#
# Of the second derivative the notes write down one term, <a id="07.5" href="#ledger-07.5">[07.5]</a>
#
# $$ \partial_\alpha\partial_\beta H=\mathbb E\Big[\sum_k(G_k-b_k)\,\partial_\alpha\partial_\beta S_k\Big]+\dots, $$
#
# and stop there. We go on, along $v$, with $F_k=G_k-H_k$ for what is to come *after* token $k$ and $s_k=\nabla_vS_k$.
# The first derivative $\mathbb E[\sum_kF_ks_k+\nabla_vH_k]$ depends on $\theta$ in three places: in $F_k$, in $s_k$ and
# $H_k$, and in the probability of the response, which brings a factor $\sum_is_i$:
#
# $$ H''=\mathbb E\Big[\sum_kF'_ks_k+F_k\nabla_vs_k+\nabla_v^2H_k+\sum_i s_i\sum_k\big(F_ks_k+\nabla_vH_k\big)\Big]. $$
#
# A product with $s_i$ vanishes where everything else in it was decided before token $i$. So $s_i\nabla_vH_k$ needs
# $k>i$, which makes a second $F'_is_i$; and of $s_is_kH_j$ what stays has $j$ behind both, which gives
# $F_k(s_k^2+2s_ks_{<k})$ with $s_{<k}=\sum_{i<k}s_i$. With baselines, one for each product,
# <a id="07.6" href="#ledger-07.6">[07.6]</a>
#
# $$ H''=\mathbb E\Big[\sum_k(F_k-b_k)\,Q_k+2(F'_k-c_k)\,s_k+\nabla_v^2H_k\Big],\qquad
#    Q_k=\nabla_v^2S_k+s_k^2+2s_ks_{<k}. $$
#
# A baseline multiplies the whole of $Q_k$, whose mean is zero given the tokens before; its single terms have other
# means. Here all derivatives along $v$ come from nesting forward mode, `jvp` of `jvp`; `entropy_change` gets the same,
# of all tokens at once, from one pass that carries Taylor series.

# %%
scored, own = partial(dh.score, tiny, responses), tiny.shifted(v, 0.0)
(_, once), (_, twice) = jvp(lambda p: jvp(scored, (p,), (v,)), (own,), (v,))
(dS, dH), (ddS, ddH) = once, twice
before = dS.cumsum(1) - dS
F, dF = to_go(H_k.detach()) - H_k.detach(), to_go(dH) - dH
terms = pd.DataFrame({
    kind: {"(G − b) ∇²S": float(pi @ (rest * ddS).sum(1)), "(G − b) (∇S)²": float(pi @ (rest * dS**2).sum(1)),
           "2 (G − b) ∇S ∇S before": float(pi @ (2 * rest * dS * before).sum(1)),
           "2 (F′ − c) ∇S": float(pi @ (2 * (dF - c) * dS).sum(1)), "∇²H": float(pi @ ddH.sum(1))}
    for kind, rest, c in (("b = 0", G, 0 * b), ("b = H", F, 0 * b), ("arbitrary b", G - b, b))})
shares = terms / float(second)
pd.concat([shares, shares.sum().to_frame("sum").T]).round(3)

# %% [markdown]
# The columns are three choices of the baseline and the rows the terms' shares of $H''$. The sum is one in every column,
# while the printed first row changes with a baseline that is supposed to change nothing: from $b=0$ to $b=H$ by
# $\mathbb E[\sum_kH_ks_k^2]$. <a id="07.7" href="#ledger-07.7">[07.7]</a> By itself it is no approximation to the sum.
# To see that the formula holds for all pairs $\alpha,\beta$ and not only along the gradient, we repeat the check along
# random directions: a symmetric form is known by its squares.

# %%
gaps = []
for _ in range(3):
    u = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in own.items()}
    (_, (s, dH_u)), (_, (ds, ddH_u)) = jvp(lambda p, u=u: jvp(scored, (p,), (u,)), (own,), (u,))
    Q, to_come = ds + s**2 + 2 * s * (s.cumsum(1) - s), to_go(dH_u) - dH_u
    full = pi @ ((G - b) * Q + 2 * (to_come - b) * s + ddH_u).sum(1)
    flat = parameters_to_vector(u.values())
    gaps.append(full / (flat_gradient(tiny, grad_H @ flat) @ flat) - 1)
ledger.holds("07.5", "2.6", "∂∂H = E[Σ (G_k − b_k) ∂∂S_k] + …, with the dots spelled out (along ∂J, ratio to ∂∂H)",
             measured=shares["b = H"].sum(), expected=1, tolerance=1e-10, formulas=(91,), rules_out={
                 "the printed term alone": shares["b = H"].iloc[0], "without it": shares["b = H"].iloc[1:].sum()})
ledger.holds("07.6", "derived here", "the full formula along random directions, arbitrary b and c (largest gap)",
             measured=max(abs(gap) for gap in gaps), expected=0, tolerance=1e-9, source="deltah")
ledger.holds("07.7", "derived here", "from b = 0 to b = H the printed term alone changes by E[Σ H_k (∂S_k)²], the sum by "
             "nothing", source="deltah", measured=(terms["b = H"] - terms["b = 0"]).iloc[0], tolerance=1e-8,
             expected=pi @ (H_k.detach() * dS**2).sum(1), rules_out=0.0)

# %% [markdown]
# ## 4 · The simple formula
#
# The notes turn to the other first derivative, without entropy to go, and differentiate once more:
# <a id="07.8" href="#ledger-07.8">[07.8]</a>
#
# $$ v^T(\nabla^2H)v=\mathbb E\Big[\sum_kv^T(\nabla^2H_k)v+2\nabla_vS\,\nabla_vH_k+H_k\nabla_v(\nabla_vS)
#    +H_k(\nabla_vS)^2\Big], $$
#
# where $S$ is the whole response's log-prob. This is complete. We compare it with the referee, the referee with
# differences of the exact entropy (five points, extrapolated) <a id="07.9" href="#ledger-07.9">[07.9]</a>, and all of
# them with the library.

# %%
whole, curved = dS.sum(1), ddS.sum(1)
H_sum, dH_sum = H_k.detach().sum(1), dH.sum(1)
simple = {1: H_sum * whole + dH_sum, 2: ddH.sum(1) + 2 * whole * dH_sum + H_sum * (curved + whole**2)}
five = []
for h in (2e-4, 1e-4):
    with torch.no_grad():
        entropies = torch.stack([exact_entropy(tiny, tiny.shifted(v, i * h)) for i in range(-2, 3)])
    five.append(entropies @ torch.tensor([-1.0, 16, -30, 16, -1], dtype=torch.float64) / (12 * h**2))
ledger.holds("07.8", "2.6", "vᵀ∇²H v = E[Σ ∇²H_k + 2∇S ∇H_k + H_k ∇∇S + H_k (∇S)²] (ratio to the referee)",
             measured=pi @ simple[2] / second, expected=1, tolerance=1e-10, formulas=(93,))
ledger.holds("07.9", "derived here", "the referee agrees with differences of the exact entropy (ratio)",
             measured=(16 * five[1] - five[0]) / 15 / second, expected=1, tolerance=1e-5, source="deltah")

# %% [markdown]
# Right in expectation says nothing about noise. From the exact probabilities follow the exact standard deviations of
# one response's contribution: of the simple formula, of entropy to go with $b=0$, and of $b_k=H_k$, for which
# $G_k-b_k$ is $F_k$. The library's forms have the exact expectation, <a id="07.10" href="#ledger-07.10">[07.10]</a>
# <a id="07.11" href="#ledger-07.11">[07.11]</a> and the simple one the most noise.
# <a id="07.12" href="#ledger-07.12">[07.12]</a>

# %%
forms = {(kind, order): dh.entropy_change(tiny, responses, v, order, "sequence", kind).contributions
         for kind in ("none", "entropy") for order in (1, 2)}
forms |= {("simple", order): x for order, x in simple.items()}
truth = {1: first, 2: second}
noise = {key: (pi @ (x - truth[key[1]]) ** 2).sqrt() / truth[key[1]].abs() for key, x in forms.items()}
table = pd.Series({key: float(x) for key, x in noise.items()}).unstack().loc[["simple", "none", "entropy"]]
table.columns = ["order 1", "order 2"]
print("standard deviation of one response's contribution / the derivative")
table.round(2)

# %%
for i, kind in enumerate(("none", "entropy")):
    ledger.holds(f"07.{10 + i}", "derived here", f"entropy_change of order 2, baseline {kind}, has the exact "
                 "expectation (ratio)", measured=pi @ forms[kind, 2] / second, expected=1, tolerance=1e-10,
                 source="deltah")
ledger.holds("07.12", "derived here", "E[Σ H_k ∂S] and the simple second order are noisier than b = H (shortfall)",
             measured=max(0.0, 1 - float((table.loc["simple"] / table.loc["entropy"]).min())), expected=0,
             tolerance=1e-9, source="deltah")
print("simple / b = H, in responses needed:", (table.loc["simple"] / table.loc["entropy"]).pow(2).round(1).to_dict())

# %% [markdown]
# The gain comes from two sides: tokens no longer answer for entropy that lies behind them, nor for the entropy of the
# very distribution they were drawn from. In a long response there is much more of both.
#
# ### Per token
#
# The entropy per token is $h=H/L$ with $L$ the expected length, which moves too. Its second derivative follows from
# $H=hL$ by the product rule, and $L',L''$ from the formulas above with $1$ in the place of $H_k$, whose derivatives
# along $v$ are zero: <a id="07.13" href="#ledger-07.13">[07.13]</a>
#
# $$ h'=\frac{H'-hL'}L,\qquad h''=\frac{H''-2h'L'-hL''}L . $$

# %%
ones = mask.double()
left, Q = to_go(ones) - ones, ddS + dS**2 + 2 * dS * before
L, dL, ddL = pi @ ones.sum(1), pi @ (left * dS).sum(1), pi @ (left * Q).sum(1)
h = H.detach() / L
slope_token = (first - h * dL) / L
curvature_token = (second - 2 * slope_token * dL - h * ddL) / L
per_token = H / ((S.exp() @ ones.sum(1)) / D)
slope = torch.cat([g.flatten() for g in torch.autograd.grad(per_token, parameters, create_graph=True)])
ledger.holds("07.13", "derived here", "h″ = (H″ − 2h′L′ − hL″)/L for the entropy per token (ratio to the referee)",
             measured=curvature_token / (flat_gradient(tiny, slope @ grad_J) @ grad_J), expected=1, tolerance=1e-10,
             source="deltah", rules_out={"without L′ and L″": second / L / curvature_token})
print(f"per token: h {h:.4f}, h′ {slope_token:.4f}, h″ {curvature_token:.2f}; without L′ and L″: {second / L:.2f}")

# %% [markdown]
# ## 5 · The critical learning rate
#
# ### Whose gradient, which sign
#
# With $L=-J$ and a diagonal preconditioner the notes have <a id="07.20" href="#ledger-07.20">[07.20]</a>
# <a id="07.21" href="#ledger-07.21">[07.21]</a> <a id="07.22" href="#ledger-07.22">[07.22]</a>
#
# $$ \delta\theta_\alpha=-\eta P_\alpha\partial_\alpha L $$
#
# and "more simply $\delta\theta=\eta Pg$". So $g=\partial J$, the gradient that climbs. A few lines on, for Adam,
# <a id="07.17" href="#ledger-07.17">[07.17]</a>
#
# $$ \delta\theta_t\approx-\eta(\alpha_tg_t+\beta_tm_t)=-\eta s_t, $$
#
# where $g$ must be $\partial L$. Nothing that follows depends on it, but a program does. Also to be settled: whether
# $m_t$ is the momentum before or after the step, and what the $\approx$ leaves out. We train a copy of the policy for
# some steps with AdamW, whose step is Adam's and a decay of the weights besides, and look at the parameters after real
# optimizer steps on the same batch of 24 responses.

# %%
student = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=5)
adamw = torch.optim.AdamW(student.parameters.values(), lr=1e-3, weight_decay=0.1)
for _ in range(4):
    rows = torch.multinomial(pi, 24, replacement=True, generator=generator).sort().values
    batch = responses.select(rows).replace(rewards=rewards[rows])
    old_log_probs = dh.score(student, batch).log_probs.detach()
    start = {name: p.detach().clone() for name, p in student.parameters.items()}
    momentum = [adamw.state[p]["exp_avg"].clone() for p in student.parameters.values() if p in adamw.state]
    direction = dh.update_direction(student, batch, "dr_grpo", optimizer=adamw)
    dh.training.policy_gradient_step(student, batch, old_log_probs, "dr_grpo", adamw)

# %%
theta, states = parameters_to_vector(start.values()), [adamw.state[p] for p in student.parameters.values()]
moved = parameters_to_vector(student.parameters.values()).detach() - theta
g, m = parameters_to_vector(p.grad for p in student.parameters.values()), parameters_to_vector(momentum)
(beta_1, beta_2), t = adamw.param_groups[0]["betas"], int(states[0]["step"])
root = (parameters_to_vector(s["exp_avg_sq"] for s in states) / (1 - beta_2**t)).sqrt() + adamw.param_groups[0]["eps"]
alpha_t, beta_t = ((1 - beta_1) / (1 - beta_1**t) / root, beta_1 / (1 - beta_1**t) / root)
s_t, decay = alpha_t * g + beta_t * m, 0.1 * theta
parts = {name: parameters_to_vector(part.values()) for name, part in direction.parts.items()}
new_m = parameters_to_vector(s["exp_avg"] for s in states)
doubled = alpha_t * g + beta_t * new_m

# %% [markdown]
# Here `g` is the gradient of the loss, as PyTorch keeps it, and `m` the momentum before the last step. Adam's
# coefficients are
#
# $$ \alpha_t=\frac{1-\beta_1}{1-\beta_1^t}\,\frac1{\sqrt{\hat v_t}+\epsilon},\qquad
#    \beta_t=\frac{\beta_1}{1-\beta_1^t}\,\frac1{\sqrt{\hat v_t}+\epsilon}, $$
#
# diagonal matrices that hold the *new* second moment. With these the $\approx$ is an equality. With the new momentum
# the same step is $\beta_tm_t/\beta_1$ and $\alpha_t$ must be zero, or the gradient counts twice. AdamW adds
# $-\eta\lambda\theta$, which is taken off here; the library's parts have it.
# <a id="07.19" href="#ledger-07.19">[07.19]</a>

# %%
step_of_adam = moved + 1e-3 * decay
ledger.holds("07.17", "2.5", "Adam: δθ = −η(α_t g_t + β_t m_t), m the momentum before the step (gap to a real step, "
             "relative)", measured=(step_of_adam + 1e-3 * s_t).norm() / step_of_adam.norm(), expected=0, tolerance=1e-9,
             rules_out={"m after the step": (doubled - s_t).norm() / s_t.norm()}, formulas=(87,))
pairs = {"rollouts": -alpha_t * g, "momentum": -beta_t * m, "weight_decay": -decay}
ledger.holds("07.19", "derived here", "update_direction's parts are −α g, −β m and −λθ (largest gap, relative)",
             source="deltah", expected=0,
             measured=max((parts[k] - x).abs().max() / x.abs().max() for k, x in pairs.items()), tolerance=1e-10)

# %% [markdown]
# Then the simpler rules: plain SGD, $P=1$, and RMSprop, $P=1/(\sqrt s+\epsilon)$. From here on all directions start at
# the student's present parameters, and AdamW keeps the state that it has.

# %%
here = {name: p.detach().clone() for name, p in student.parameters.items()}
old_log_probs = dh.score(student, batch).log_probs.detach()
optimizers = {"SGD": torch.optim.SGD(student.parameters.values(), lr=1e-3),
              "RMSprop": torch.optim.RMSprop(student.parameters.values(), lr=1e-3), "AdamW": adamw}
directions = {name: dh.update_direction(student, batch, "dr_grpo", optimizer=o) for name, o in optimizers.items()}
real, slopes_L = {}, {}
for name, optimizer in optimizers.items():
    dh.training.policy_gradient_step(student, batch, old_log_probs, "dr_grpo", optimizer)
    real[name] = parameters_to_vector(student.parameters.values()).detach() - parameters_to_vector(here.values())
    slopes_L[name] = parameters_to_vector(p.grad for p in student.parameters.values())
    vector_to_parameters(parameters_to_vector(here.values()), student.parameters.values())

# %%
P = {name: parameters_to_vector(d.preconditioner.values()) for name, d in directions.items()}
for i, name in enumerate(("SGD", "RMSprop")):
    ledger.holds(f"07.{20 + i}", "2.5", f"δθ = −ηP ∂L for a real step of {name} (largest gap, relative)", expected=0,
                 formulas=(84,),
                 measured=(real[name] + 1e-3 * P[name] * slopes_L[name]).abs().max() / real[name].abs().max(),
                 tolerance=1e-9)
cosine = partial(torch.cosine_similarity, dim=0)
ledger.corrected("07.22", "2.5", "δθ = ηPg, and later δθ = −η(αg + βm) with one g (cosine of SGD's real step and ∂J)",
                 correction="g is ∂J in the first and ∂L = −∂J in the second", measured=cosine(real["SGD"],
                 -slopes_L["SGD"]), expected=1, as_printed=-1, tolerance=1e-9)

# %% [markdown]
# ### What happens at $\eta^*$
#
# The linear order is good, say the notes, for <a id="07.23" href="#ledger-07.23">[07.23]</a>
#
# $$ \eta\ll\eta^*=\frac{2\,|(\nabla H)^T(Pg)|}{|(Pg)^T(\nabla^2H)(Pg)|}\qquad\text{or}\qquad
#    \frac{2\,|\nabla H\cdot s_t|}{|s_t\cdot\nabla^2H\cdot s_t|} . $$
#
# At $\eta^*$ the two orders are of equal size; for AdamW $s$ is the whole direction, with weight decay. To second order
# the first order misses a fraction $\eta/\eta^*$ of itself: all of it at $\eta^*$, a tenth at $\eta^*/10$. What is the
# true fraction?

# %%
rows, now = {}, exact_entropy(student).detach()
for name, d in directions.items():
    _, (slope, bend) = jvp(lambda p, u=d.vector: jvp(partial(exact_entropy, student), (p,), (u,)), (here,), (d.vector,))
    eta = float(2 * slope.abs() / bend.abs())
    steps = [(exact_entropy(student, student.shifted(d.vector, f * eta)) - now).item() / (f * eta * slope).item() - 1
             for f in (1, 0.5, 0.1, 0.01, 0.001)]
    rows[name] = [eta] + [abs(step) for step in steps]
errors = pd.DataFrame.from_dict(rows, "index", columns=["η*", "at η*", "η*/2", "η*/10", "η*/100", "η*/1000"])
print("error of the first order, relative to itself")
errors.map("{:.3g}".format)

# %%
ledger.holds("07.23", "2.5", "the first order's error is η/η* of itself as η → 0: SGD, RMSprop, AdamW "
             "(largest gap of the ratio from 1, at η*/1000)", expected=0, tolerance=0.05, formulas=(85, 88),
             measured=(1000 * errors["η*/1000"] - 1).abs().max())

# %% [markdown]
# Three directions are anecdotes. Every gradient of a reward at this policy is a combination of the 93 gradients
# $\partial S(t)$, so that one Hessian-vector product each tells the first and second derivative of *every* update that
# a batch could make. We draw thirty batches of 24 responses and follow the error of each.

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in S])
toward_H = gradients @ exact_gradient
curvature = torch.stack([flat_gradient(tiny, grad_H @ g) for g in gradients]) @ gradients.T
drawn = torch.multinomial(pi, 24 * 30, replacement=True, generator=generator).view(30, 24)
weights = torch.zeros(30, D * N, dtype=torch.float64).scatter_add(1, drawn, A[drawn] / 24)
slope, bend = weights @ toward_H, ((weights @ curvature) * weights).sum(1)
eta_star, fractions = 2 * slope.abs() / bend.abs(), torch.logspace(-3, 0.5, 15, dtype=torch.float64)
missed = torch.empty(2, len(weights), len(fractions), dtype=torch.float64)
kl = torch.empty_like(missed[0])
for i, w in enumerate(weights):
    vector_to_parameters(w @ gradients, u.values())
    for j, f in enumerate(fractions):
        eta = float(f * eta_star[i])
        with torch.no_grad():
            log_probs = dh.score(tiny, responses, tiny.shifted(u, eta)).log_probs.sum(1)
        change = -(log_probs.exp() @ log_probs) / D - H.detach()
        missed[:, i, j] = torch.stack([change, change - eta**2 * bend[i] / 2]) / (eta * slope[i]) - 1
        kl[i, j] = pi @ (S.detach() - log_probs)
missed = missed.abs()

# %%
figure, axes = plt.subplots()
for i, (label, errors_of) in enumerate(zip(("first order", "second order"), missed, strict=True)):
    low, middle, high = errors_of.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0)
    axes.fill_between(fractions, low, high, color=f"C{i}", alpha=0.2)
    axes.loglog(fractions, middle, color=f"C{i}", marker=dh.figures.MARKERS[i], linestyle=dh.figures.DASHES[i],
                label=f"{label}: median and 80% of the updates")
axes.loglog(fractions, fractions, color="0.3", linewidth=1, linestyle=":", label="η/η*")
axes.set(xlabel="learning rate / η*", ylabel="error / first-order change",
         title="Far below η* the second order helps; near it, a third takes over")
axes.legend(loc="lower right")
dh.figures.save(figure, results, "07-error")

# %% [markdown]
# *Thirty sampled updates of the enumerated policy, exact changes. Blue: what the first order misses, along the
# dotted line as long as the second order is all that is missing. Orange: what remains with both orders.*

# %%
tenth = missed[0, :, 8]
print(f"at η*/10 the first order misses {tenth.quantile(0.1):.0%} to {tenth.quantile(0.9):.0%} (80% of the updates)")

# %% [markdown]
# Does something else tell better how far the line reaches? A trust region in KL may.
# <a id="07.30" href="#ledger-07.30">[07.30]</a> For each update we look up where the first order first misses a fifth,
# once in units of its own *exact* $\eta^*$, and once by the divergence $\mathrm{KL}(\pi_\theta\|\pi_{\theta+\eta v})$
# that the policy has gone by then. As it grows as $\eta^2$, we take half of its logarithm.

# %%
reach = []
for i in range(len(weights)):
    j = int((missed[0, i] > 0.2).double().argmax())
    between = (np.log(0.2) - missed[0, i, j - 1].log()) / (missed[0, i, j].log() - missed[0, i, j - 1].log())
    reach.append([x[j - 1].log10() + between * (x[j].log10() - x[j - 1].log10())
                  for x in (fractions, fractions * eta_star[i], kl[i].sqrt())])
reach = torch.tensor(reach, dtype=torch.float64)
squares = (reach - reach.mean(0)).square()
ledger.holds("07.30", "derived here", "where a fifth is missed, on an enumerable policy, √KL varies less between "
             "updates than η/η* (variances of log10, difference)", expected=(0.0, np.inf),
             measured=dh.Estimate.mean(squares[:, 0] - squares[:, 2]), rules_out={"as much": 0.0}, source="deltah")
spread = pd.Series(squares.mean(0).sqrt().numpy()[[1, 0, 2]], index=["η", "η / η*", "√KL"])
print("where the first order misses a fifth, standard deviation of log10 between updates")
spread.round(2)

# %% [markdown]
# Below the tenth of $\eta^*$ the rule works for most updates. The exceptions are those with an accidentally small
# $s^T\nabla^2H\,s$: there $\eta^*$ is large, and the third order takes over long before. The extreme case has a zero:
# the updates by two single responses of opposite curvature, mixed so that it cancels. Then $\eta^*$ is infinite. But
# the entropy of at most four tokens lies between $0$ and $4\log3$ whatever happens to the parameters, and the first
# order has failed at the latest where it leaves that range. So $\eta\ll\eta^*$ is necessary for a good first order, not
# sufficient. <a id="07.24" href="#ledger-07.24">[07.24]</a>

# %%
i, j = int(curvature.diagonal().argmax()), int(curvature.diagonal().argmin())
a, b_ij, c = curvature[i, i], curvature[i, j], curvature[j, j]
mix = torch.zeros(D * N, dtype=torch.float64)
mix[i], mix[j] = 1.0, (-b_ij + (b_ij**2 - a * c).sqrt()) / c
flat_slope, flat_bend = float(mix @ toward_H), mix @ curvature @ mix
vector_to_parameters(mix @ gradients, u.values())
bound = 2 * 4 * float(np.log(3)) / abs(flat_slope)
with torch.no_grad():
    error = (exact_entropy(tiny, tiny.shifted(u, bound)) - H) / (bound * flat_slope) - 1
print(f"curvature of the two responses {a:.3g} and {c:.3g}, of the mixture {abs(flat_bend) / a:.6f} of the first\n"
      f"first derivative of the mixture {flat_slope:.3g}, first order's error at η = {bound:.2g}: {abs(error):.0%}")
ledger.refuted("07.24", "2.5", "where the second order is smaller than the first, the linear order is good (its error)",
               counterexample="an update with sᵀ∇²H s = 0: η* is infinite, yet the entropy is bounded",
               measured=abs(error), expected=0, tolerance=0.1)

# %% [markdown]
# ## 6 · Do the intervals hold?
#
# The contributions of all responses, computed once, are a population to draw samples from. For the direction of section
# 1 we draw samples of several sizes and count how many 95% intervals hold the exact derivative; for $\eta^*$ the
# interval is Fieller's, made for ratios: all values that both derivatives and the correlation of their errors allow. It
# has no upper end where the second derivative may be zero. <a id="07.25" href="#ledger-07.25">[07.25]</a>
# <a id="07.26" href="#ledger-07.26">[07.26]</a> <a id="07.27" href="#ledger-07.27">[07.27]</a>

# %%
changes = [dh.entropy_change(tiny, responses, v, order, "sequence", "entropy") for order in (1, 2)]
exact = [float(pi @ change.contributions) for change in changes]
for order, (change, value) in enumerate(zip(changes, exact, strict=True), start=1):
    z = change.contributions - value
    print(f"order {order}: kurtosis of the contributions {(pi @ z**4) / (pi @ z**2) ** 2:.1f} (3 for a normal one)")

# %%
def critical(rows):
    drawn = (replace(change, **vars(dh.Estimate.mean(change.contributions[rows])), prompt_index=torch.arange(len(rows)))
             for change in changes)
    return dh.critical_learning_rate(*drawn)


# %%
covered, exact_eta = {}, 2 * abs(exact[0] / exact[1])
for size in (8, 32, 128, 512):
    drawing = {"weights": pi, "size": size, "replicates": replicates, "seed": seed}
    covered[size] = [dh.exact.coverage(lambda rows, x=change.contributions: dh.Estimate.mean(x[rows]), truth=value,
                                       **drawing) for change, value in zip(changes, exact, strict=True)]
    covered[size].append(dh.exact.coverage(critical, truth=exact_eta, **drawing))
coverage = pd.DataFrame.from_dict(covered, "index", columns=["order 1", "order 2", "η*"]).rename_axis("responses")
coverage.map("{:.1%}".format)

# %%
for i, (name, share) in enumerate(coverage.items()):
    hits = (torch.arange(replicates) < round(share[512] * replicates)).double()
    ledger.holds(f"07.{25 + i}", "derived here", f"95% intervals of {name} from 512 responses cover 92% to 98%",
                 measured=dh.Estimate.mean(hits), expected=(0.92, 0.98), rules_out={"90%": 0.90}, source="deltah")

# %% [markdown]
# The contributions of the second order have the heavier tails, as they hold squares of $\nabla_vS$. Here that does no
# harm. In a small sample the rarest responses are missing, with their contribution and with their share of the error,
# and no interval can know.
#
# ## 7 · The shipped policy
#
# Now a trained transformer, some steps of AdamW at `training_rate` into reinforcement learning, so that the optimizer
# has a momentum and second moments. On one batch U the next step is made in two ways, by plain gradient descent and by
# AdamW from its real state, without being taken. Other prompts, with one response each, make batch E. A second
# derivative costs about one and a half times a first; float32 is enough for it and twice as fast, so we convert the
# policy once everything is drawn.

# %%
policy = dh.load_policy(model, device, dtype)
data = dh.load_problems(problems, "train").shuffle(seed=seed)
B_U = min(prompts_in_batch, len(data) // (2 * training_steps + 2))
optimizer = torch.optim.AdamW(policy.parameters.values(), lr=training_rate)
for step in range(training_steps + 1):
    U = dh.sample(policy, data.select(range(B_U * step, B_U * step + B_U)), 8, max_new_tokens, seed=seed + step)
    if step < training_steps:
        with torch.no_grad():
            old_log_probs = dh.score(policy, U).log_probs
        dh.training.policy_gradient_step(policy, U, old_log_probs, "grpo", optimizer)
used = B_U * (training_steps + 1)
fresh = data.select(range(used, min(used + evaluation_prompts, len(data))))
E = dh.sample(policy, fresh, 1, max_new_tokens, seed=seed + training_steps + 1)

# %%
sgd = torch.optim.SGD(policy.parameters.values(), lr=1.0)
directions = {"SGD": dh.update_direction(policy, U, "grpo", optimizer=sgd).vector,
              "AdamW": dh.update_direction(policy, U, "grpo", optimizer=optimizer).vector}
policy.model.float()
few = E.select(slice(0, max(5, len(E) // 8)))
batches = {f"{len(few)} rollouts": few, f"{len(E)} rollouts": E}
orders = {(name, size): [dh.entropy_change(policy, batch, v, order, baseline="running_mean") for order in (1, 2)]
          for name, v in directions.items() for size, batch in batches.items()}

# %% [markdown]
# All numbers are for the entropy per token, in nats per unit of $\eta$ or $\eta^2$. The last column is the share of the
# second derivative's variance that a single rollout, the most influential one, is responsible for.

# %%
critical_rates, rows = {}, {}
for key, (one, two) in orders.items():
    critical_rates[key] = dh.critical_learning_rate(one, two)
    spread_of = (two.contributions - two.value).square()
    rows[key] = [one, two, "{:.1g} to {:.1g}".format(*critical_rates[key].interval()),
                 f"{spread_of.max() / spread_of.sum():.0%}"]
pd.DataFrame.from_dict(rows, "index", columns=["dH/dη", "d²H/dη²", "95% interval of η*", "one rollout"])

# %% [markdown]
# A batch of the usual size does not know $\eta^*$. Where the interval of the second derivative holds zero, Fieller's
# interval rightly has no upper end: such a batch says that $\eta^*$ is *at least* something, and a number printed
# without its interval may be off by any factor. Eight times the rollouts give it no upper end here, where a single
# rollout still brings a large part of the variance. For another update, that of chapter 06, as many were enough for a
# factor of two, and both orders together went through every measured point. So $\eta^*$ is worth reading, with its
# interval.
#
# ### Measure at two rates
#
# There is a question that a batch can answer. `linearity` divides the measured $\Delta H(\eta)/\eta$ by the same at a
# small learning rate, on the same rollouts: 1 where the change is a line, and to second order $1+\tfrac12\eta H''/H'$.
# It needs no derivative and three scorings, and what it measures has all orders in it. Learning rates for SGD are
# scaled so that the first order promises the same as for AdamW.

# %%
largest = f"{len(E)} rollouts"
factors, size = np.array([0.1, 1.0, 2.0, 3.0, 6.0, 10.0]), {"AdamW": training_rate}
size["SGD"] = training_rate * abs(orders["AdamW", largest][0].value / orders["SGD", largest][0].value)
straightness, predicted, rows = {}, {}, {}
for name, along in directions.items():
    one, two = orders[name, largest]
    curve = dh.Estimate.ratio(two.contributions, one.contributions)
    straightness[name] = dh.linearity(policy, E, along, factors * size[name])
    predicted[name] = [dh.Estimate.mean(1 + 0.5 * x * size[name] * curve.contributions) for x in factors]
    for x in (1, 3):
        rows[name, f"{x * size[name]:.1g}"] = [straightness[name][x], predicted[name][x]]
pd.DataFrame.from_dict(rows, "index", columns=["linearity, measured", "first and second order"])

# %% [markdown]
# On equal rollouts the measured ratio is known at least as well, and needs no derivative. "Hopefully the second order
# correction … will be enough to have a good approximation in reasonable ranges of the learning rate", say the notes.
# <a id="07.31" href="#ledger-07.31">[07.31]</a> <a id="07.32" href="#ledger-07.32">[07.32]</a> We ask which share of
# the measured bend the second order accounts for, at the largest of these learning rates where importance weights hold.
# Bend and second derivative come from one batch: the question is what higher orders add, not what the curvature is.

# %%
for i, name in enumerate(("AdamW", "SGD")):
    last = max(x for x in range(len(factors)) if np.isfinite(straightness[name][x].value))
    accounted = dh.Estimate.ratio(predicted[name][last].contributions - 1, straightness[name][last].contributions - 1)
    ledger.holds(f"07.{31 + i}", "2.5", f"{name}: the second order correction is enough (its share of the measured bend, "
                 "at the largest learning rate where weights hold)", measured=accounted, expected=1.0,
                 rules_out={"nothing": 0.0, "half": 0.5, "the other sign": -1.0})
    print(f"{name}, η = {factors[last] * size[name]:.1g}: {straightness[name][last]} of the line is left, and the second "
          f"order has {accounted} of the bend")

# %% [markdown]
# Neither is decided: the second derivative is the part that is not known, and that is the answer to the notes' hope.
# With several times the rollouts it may be known, for this update or another; then the change is known at that learning
# rate long since. Where importance weights collapse, coupled sampling goes on; it no longer shares its noise with the
# smallest rate. Here are all of them in one picture.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
for axes, name in zip(panels, ("AdamW", "SGD"), strict=True):
    rates, points = factors * size[name], [x for x in straightness[name] if np.isfinite(x.value)]
    dh.figures.estimates(axes, rates[:len(points)], points, 0, "measured, importance weights")
    far = dh.measured_entropy_change(policy, E, directions[name], 30 * size[name] * np.array([1 / 3, 1]), seed=seed,
                                     method="coupled", max_new_tokens=max_new_tokens)
    one, two = orders[name, largest]
    kept = far.change / far.learning_rate / one.value
    kept_errors = np.hypot(far.standard_error / far.learning_rate / one.value, kept * one.standard_error / one.value)
    axes.errorbar(far.learning_rate * 1.05, kept, yerr=1.96 * kept_errors, capsize=3, color="C1", marker="s",
                  linestyle="none", label="measured, coupled")
    fine = np.geomspace(rates[0], 40 * size[name], 100)
    curve = dh.Estimate.ratio(two.contributions, one.contributions)
    axes.axhline(1, color="C2", linestyle="--", label="first order")
    axes.semilogx(fine, 1 + 0.5 * fine * curve.value, color="C3", linestyle="-.", label="first and second order")
    axes.fill_between(fine, *(1 + 0.5 * fine * end for end in curve.interval()), color="C3", alpha=0.15)
    low, high = critical_rates[name, largest].interval()
    axes.axvspan(low, min(high, fine[-1]), color="0.5", alpha=0.2, label="95% interval of η*")
    axes.set(xscale="log", xlabel=f"learning rate η of {name}", title=name, xlim=(rates[0] / 1.3, fine[-1]), ylim=(-1, 2))
panels[0].set_ylabel("ΔH(η)/η, relative to small η")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
dh.figures.save(figure, results, "07-reach")

# %% [markdown]
# *What is left of a linear change, on batch E. A first-order prediction is the line at 1. Bars and bands are 95%
# intervals; circles and the band share batch E, and the bars of squares have the errors of both the change and the
# first order that it is divided by. The grey region is what that batch knows of* $\eta^*$; *where it reaches the right
# edge it may have no end.*

# %% [markdown]
# ## The remaining equations
#
# **Hessian-vector products.** There are "some nice tricks", say the notes, to compute
# <a id="07.14" href="#ledger-07.14">[07.14]</a>
#
# $$ (\nabla^2H)(Pg) . $$
#
# The Hessian is never formed. One may differentiate twice in reverse, as the referee does; go forward through the
# backward pass, which also gives the whole vector; or go forward twice, which gives the number $v^T\nabla^2H\,v$ only,
# and needs no memory for a backward pass. <a id="07.15" href="#ledger-07.15">[07.15]</a> For the exact entropy all
# three must agree.

# %%
entropy = partial(exact_entropy, tiny)
_, forward_reverse = jvp(torch.func.grad(entropy), (own,), (v,))
_, (_, forward_forward) = jvp(lambda p: jvp(entropy, (p,), (v,)), (own,), (v,))
gap = (parameters_to_vector(forward_reverse.values()) - hessian_v).abs().max() / hessian_v.abs().max()
ledger.holds("07.14", "2.5", "∇²H v forward over reverse equals reverse over reverse (largest gap, relative)",
             measured=gap, expected=0, tolerance=1e-10, formulas=(86,))
ledger.holds("07.15", "2.6", "vᵀ∇²H v forward over forward equals reverse over reverse (ratio)",
             measured=forward_forward / second, expected=1, tolerance=1e-10)

# %% [markdown]
# One warning. PyTorch's fused layer norm has a forward-mode rule that is right once. When it is differentiated again it
# takes the mean and the deviation that it had saved for constants, and the second derivative comes out slightly wrong,
# without any message. Every GPT-2-like model is concerned. Inside `policy.forward_mode()` the library writes layer norm
# out in elementary operations. <a id="07.16" href="#ledger-07.16">[07.16]</a> We take the same weights in an untouched
# model, differentiate forward twice outside and inside of it, and ask finite differences of the entropy who is right.

# %%
untouched = GPT2LMHeadModel(tiny.model.config).double()
untouched.set_attn_implementation("eager")
untouched.load_state_dict(tiny.model.state_dict())
raw = dh.Policy(untouched)
nested = []
for context in (nullcontext(), raw.forward_mode()):
    with context:
        nested += jvp(lambda p: jvp(partial(exact_entropy, raw), (p,), (v,))[1], (own,), (v,))[1:]
outside, inside = nested
differences = (16 * five[1] - five[0]) / 15
print(f"jvp twice, PyTorch's layer norm: {outside:.1f}\njvp twice, written out:          {inside:.1f}\n"
      f"finite differences:              {differences:.1f}")
ledger.holds("07.16", "derived here", "with layer norm written out, jvp twice gives the second difference (ratio)",
             measured=inside / differences, expected=1, tolerance=1e-5, source="deltah",
             rules_out={"PyTorch's": outside / differences})

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Write down the third derivative with entropy to go. How many terms are there, and which baselines?
# 2. Replace $b_k=H_k$ in section 4 by the exact $\mathbb E[G_k|t_{<k}]$. How much do orders 1 and 2 gain?
# 3. Which tokens of batch E make $d^2H/d\eta^2$? Sort `token_contributions` of the second order and decode them.
# 4. Compute `linearity` for the negated direction as well. Half the sum of both bends is even in $\eta$, half the
#    difference odd. Which of them is the larger at the training rate, and which can a second derivative see?
#
# ## Further reading
#
# - Pearlmutter, B. *Fast exact multiplication by the Hessian*, Neural Computation 1994.
# - Fieller, E. C. *Some problems in interval estimation*, Journal of the Royal Statistical Society B 1954.
# - Furmston, T., Lever, G. and Barber, D. *Approximate Newton methods for policy search in Markov decision processes*,
#   Journal of Machine Learning Research 2016: the same Hessian for a reward.
# - Foerster, J. et al. *DiCE: the infinitely differentiable Monte Carlo estimator*, ICML 2018.
