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
# # 09 · Adam preconditioning
#
# An AdamW step is not the gradient of its own batch: each parameter has its own scale, old batches still push, and
# weight decay pulls. This chapter settles which of the formulas for such a step are exact, what one may ignore of them,
# and how much of a real step's entropy change the newest batch is to blame for.
#
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | $\delta\theta^t$ of AdamW, $m^t$ and "similarly for $v$" | notes 2.7 |
# | 2 | $\delta\theta_t\approx-\eta(\alpha_tg_t+\beta_tm_t)=-\eta s_t$, and $\eta^*$ along $s_t$ | notes 2.5 |
# | 3 | $\delta\mathcal H_1^t$ without weight decay, and the nonlocal kernel $K^{nl}$ | notes 2.7 |
# | 4 | "pretend $v$ is constant" | notes 2.7 |
# | 5 | without momentum and weight decay it is RMSprop | notes 2.7 |
# | 6 | a preconditioner makes little difference to the structure of the kernel | notes 2.1.1 |
# | 7 | qualitative lessons will not be very different if we ignore momentum | notes 2.7 |
#
# **You need** chapter 03. **You will learn** to split one optimizer step by batch, to tell a share of a step from
# a sensitivity, and in which sense momentum may be ignored.

# %%
import math
from types import SimpleNamespace

import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
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
betas = (0.9, 0.999)              # β₁, β₂
weight_decay = 0.1                # λ
learning_rate = 1e-4              # η of the transformer's run
steps = 7                         # of that run
update_prompts = 8                # a step, with 8 responses each
evaluation_prompts = 56           # a step, with one response each
max_new_tokens = 64

# %%
ledger = dh.Ledger("09", source="notes")
(beta1, beta2), epsilon = betas, 1e-8

# %% [markdown]
# ## 1 · A short training with nothing left to chance
#
# The enumerable transformer of the earlier chapters: three tokens, four prompts of different lengths, all 60 responses
# of at most three tokens. It is trained for five steps of AdamW on the *exact* gradient of $J$, with every version of
# the policy kept. The notes call both a step and a sequence $t$, and regret it; here steps are $t$, $t'$ and sequences
# $X$, $X'$, as in their kernel. Gradients ascend, $g^{t'}=\mathbb E_p\,\mathbb E_{\pi_{t'}}[A\,\partial S_{t'}]$, so
# that the optimizer, which descends, is given $-g$.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=seed + 5)
prompts = [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]]
responses = dh.exact.every_response(tiny, prompts, max_new_tokens=3)
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
T, D, N = 5, len(prompts), len(responses) // len(prompts)
sizes = [p.numel() for p in tiny.parameters.values()]
eta = 0.005
optimizer = torch.optim.AdamW(tiny.parameters.values(), lr=eta, betas=betas, eps=epsilon, weight_decay=weight_decay)
exact_J = dh.objectives.Objective(dh.objectives.grpo, aggregation="constant", length=1)

# %% [markdown]
# `exact_J` is a plain sum: with advantages $\pi A$ instead of $A$, the "batch" of all responses gives the expectation.
# So `update_direction`, made for sampled batches, can be held against the exact gradient as well.

# %%
versions = []
for _ in range(T):
    log_probs = dh.score(tiny, responses).log_probs.sum(1)
    S, pi = log_probs.detach(), log_probs.detach().exp() / D
    A, centred_S = (q - (D * pi * q).view(D, N).sum(1).repeat_interleave(N) for q in (rewards, S))
    scores = torch.stack([flat_gradient(tiny, s) for s in log_probs])
    grad_H = flat_gradient(tiny, -(log_probs.exp() * log_probs).sum() / D)
    theta, g = parameters_to_vector(tiny.parameters.values()).detach().clone(), (pi * A) @ scores
    direction = dh.update_direction(tiny, responses.replace(advantages=D * N * pi * A), exact_J, optimizer=optimizer)
    for p, minus_g in zip(tiny.parameters.values(), (-g).split(sizes), strict=True):
        p.grad = minus_g.view_as(p)
    optimizer.step()
    moved = parameters_to_vector(tiny.parameters.values()).detach() - theta
    versions.append(SimpleNamespace(S=S, pi=pi, A=A, centred_S=centred_S, scores=scores, grad_H=grad_H, theta=theta,
                                    g=g, direction=direction, moved=moved))
print("entropy at each step:", *(f"{-float(v.pi @ v.S):.3f}" for v in versions), "nats")

# %% [markdown]
# ## 2 · The step
#
# The notes write
#
# $$ \delta\theta_\alpha^t=\eta\Big(\frac{m_\alpha^t}{\sqrt{v_\alpha^t}+\epsilon}-\lambda\theta_\alpha^t\Big),\qquad
#    m_\alpha=\frac{1-\beta_1}{1-\beta_1^t}\sum_{t'=1}^t\beta_1^{t-t'}g_\alpha^{t'}, $$
#
# and "similarly for v". The weights in $m$ sum to one: it is a true mean of gradients. Read literally, "similarly"
# gives $v$ the same normalisation, $v=\frac{1-\beta_2}{1-\beta_2^t}\sum\beta_2^{t-t'}(g^{t'})^2$, which is often
# written $\hat v$. We form both for all five steps at once and compare with the distance that the parameters really
# moved; and once more without the normalisation of $v$, as RMSprop has it.

# %%
number = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
age = number - number.T
W1, W2 = (torch.where(age >= 0, (1 - b) / (1 - b**number) * b ** age.clamp(min=0), 0.0) for b in betas)
g, theta, moved = (torch.stack([getattr(v, key) for v in versions]) for key in ("g", "theta", "moved"))
m, v_hat = W1 @ g, W2 @ g.square()
printed = eta * (m / (v_hat.sqrt() + epsilon) - weight_decay * theta)
raw = eta * (m / ((v_hat * (1 - beta2**number)).sqrt() + epsilon) - weight_decay * theta)

# %%
ledger.holds("09.1", "2.7", "m, with its normalisation, is a mean: its weights sum to 1 (largest gap)", expected=0,
             measured=(W1.sum(1) - 1).abs().max(), tolerance=1e-10)
ledger.holds("09.2", "2.7", "δθ = η(m/(√v+ε) − λθ), v normalised like m, is torch's AdamW step (largest gap, relative)",
             measured=(moved - printed).abs().max() / moved.abs().max(), expected=0, tolerance=1e-10)
ledger.refuted("09.3", "2.7", "\"similarly for v\", without the normalisation (length of that step to the real one)",
               counterexample="the fifth step: without it √v is too small by √(1−β₂ᵗ)", expected=1, tolerance=0.1,
               measured=raw[-1].norm() / moved[-1].norm())
print("length of the step without the normalisation of v, relative to the real one:",
      *(f"{float(ratio):.1f}" for ratio in raw.norm(dim=1) / moved.norm(dim=1)))

# %% [markdown]
# Section 2.5 has another form, with $g=\partial L=-\partial J$ and the optimizer's memory $m_t$:
# $\delta\theta_t\approx-\eta(\alpha_tg_t+\beta_tm_t)=-\eta s_t$. It is exact but for weight decay, when $\alpha_t$ and
# $\beta_t$ are understood as one number for each *parameter*, and $m_t$ as what the optimizer remembers from *before*
# the step, the unnormalised $\sum_{t'<t}(1-\beta_1)\beta_1^{t-1-t'}g^{t'}$:
#
# $$ \alpha_t=\frac{1-\beta_1}{1-\beta_1^t}\,\frac1{\sqrt{\hat v^t}+\epsilon},\qquad
#    \beta_t=\frac{\beta_1}{1-\beta_1^t}\,\frac1{\sqrt{\hat v^t}+\epsilon}. $$
#
# `update_direction` splits in the same way: `preconditioner` is $\alpha_t$, which is the notes' $P$ in
# $\delta\theta\to\eta P\,\partial J$.

# %%
root, last = v_hat[-1].sqrt() + epsilon, versions[-1]
alpha, beta = ((1 - beta1) / (1 - beta1**T) / root, beta1 / (1 - beta1**T) / root)
memory = (1 - beta1) * beta1 ** (T - 1 - number[:-1, 0]) @ g[:-1]
parts = {name: parameters_to_vector(part.values()) for name, part in last.direction.parts.items()}
vector = parameters_to_vector(last.direction.vector.values())
mine = {"rollouts": alpha * g[-1], "momentum": beta * memory, "weight_decay": -weight_decay * theta[-1]}
gap = max((parts[name] - mine[name]).abs().max() / vector.abs().max() for name in parts)

# %%
adam_part = mine["rollouts"] + mine["momentum"]
ledger.holds("09.4", "2.5", "δθ = −η(α g + β m) = −ηs, g = ∂L, m from before the step, less weight decay (largest gap)",
             measured=(moved[-1] / eta - adam_part - mine["weight_decay"]).abs().max(), expected=0, tolerance=1e-10)
ledger.holds("09.5", "derived here", "update_direction's three parts are αg, βm and −λθ (largest gap, relative)",
             measured=gap, expected=0, tolerance=1e-10)
ledger.holds("09.6", "derived here", "they sum to v, the real step over η (largest gap)", expected=0, tolerance=1e-10,
             measured=(sum(parts.values()) - moved[-1] / eta).abs().max())

# %% [markdown]
# ## 3 · What it does to the entropy
#
# ### To first order
#
# With weight decay left out the notes have
#
# $$ \delta\mathcal H_1^t=-\eta\sum_\alpha\frac1{\sqrt{v_\alpha^t}+\epsilon}\,\frac{1-\beta_1}{1-\beta_1^t}\,
#    \mathbb E_{\pi_t}[S_t\,\partial_\alpha S_t]\sum_{t'=1}^t\beta_1^{t-t'}g_\alpha^{t'} . $$
#
# Against it stands the gradient of the exact entropy, from automatic differentiation, along the real step without its
# weight decay. What weight decay adds is $-\eta\lambda\,\theta\cdot\nabla\mathcal H$; the whole is the sum.

# %%
weights = beta1 ** (T - number[:, 0])
formula = -(((last.pi * last.S) @ last.scores) / root) @ (weights @ g) * (1 - beta1) / (1 - beta1**T)
decay = -weight_decay * theta[-1] @ last.grad_H
ledger.holds("09.7", "2.7", "δH₁ of an AdamW step without weight decay, as printed (per unit of η)",
             measured=last.grad_H @ (moved[-1] / eta + weight_decay * theta[-1]), expected=formula, tolerance=1e-9)
ledger.holds("09.8", "derived here", "weight decay adds −λ θ·∇H, and the parts' changes sum to the whole's",
             measured=last.grad_H @ moved[-1] / eta, expected=formula + decay, tolerance=1e-9)
shares = pd.Series({name: float(last.grad_H @ part) for name, part in parts.items()} | {"together": float(
    last.grad_H @ vector)}, name="entropy change, nats per unit of η")
shares.round(4).to_frame()

# %% [markdown]
# ### The nonlocal kernel
#
# Insert $g^{t'}=\mathbb E_{\pi_{t'}}[A\,\partial S_{t'}]$, and the parameters disappear into
#
# $$ K^{nl}(X,P,t|X',P',t')=\sum_\alpha\frac1{\sqrt{v_\alpha^t}+\epsilon}\,\partial_\alpha S_t\,\partial_\alpha S_{t'},
#    \qquad \frac{\delta\mathcal H_1^t}\eta=-\frac{1-\beta_1}{1-\beta_1^t}\sum_{t'\le t}\beta_1^{t-t'}\,
#    \mathbb E_{\pi_t}\mathbb E_{\pi_{t'}}\big[(S_t-\bar S_t)\,K^{nl}A\big]. $$
#
# A sequence now has a date: $X$ is scored by today's model, $X'$ by the one that drew it. The second formula is not in
# the notes but is what the kernel is for, and the expectations are over prompts too, on both sides. The preconditioner
# under the sum is *today's*, $v^t$, for old gradients as well. Were each gradient divided by the $v^{t'}$ of its own
# day, we would get another number.

# %%
kernels = [(last.scores / root) @ v.scores.T for v in versions]
by_age = torch.stack([-w * (last.pi * last.centred_S) @ K @ (v.pi * v.A) for w, K, v in
                      zip(W1[-1], kernels, versions, strict=True)])
own_roots = v_hat.sqrt() + epsilon
own_day = W1[-1] @ ((g / own_roots) @ last.grad_H)
print("entropy change by the gradient's step, oldest first:", *(f"{float(x):+.2f}" for x in by_age))

# %%
ledger.holds("09.9", "2.7", "δH₁ = −η(1−β₁)/(1−β₁ᵗ) Σ β₁^(t−t′) E E[(S − S̄) K^nl A], K^nl as printed",
             measured=by_age.sum(), expected=formula, tolerance=1e-9)
ledger.refuted("09.10", "derived here", "with v of each gradient's own step under K^nl, δH₁ is the same (ratio)",
               counterexample="five steps of AdamW: old gradients too are divided by today's √v", expected=1,
               measured=own_day / formula, tolerance=0.02)

# %% [markdown]
# Is it a kernel? At one preconditioner, yes: over all pairs of a response and a version, $K^{nl}$ is a Gram matrix,
# symmetric and without negative eigenvalues. But its definition ties the preconditioner to the *first* argument's step,
# and so exchanging the arguments changes the value. And the block between two versions, which is what momentum needs,
# is a corner of the Gram matrix: it has no reason to be symmetric or positive, and is neither. What survives is
# chapter 03's theorem, on each side with the probabilities of that side's version: $\mathbb E_{\pi_t}[K^{nl}]=0$ over
# $X$, and $\mathbb E_{\pi_{t'}}[K^{nl}]=0$ over $X'$.

# %%
everything = torch.cat([v.scores for v in versions]) / root.sqrt()
spectrum = torch.linalg.eigvalsh(everything @ everything.T)
cross, exchanged = kernels[0], (versions[0].scores / own_roots[0]) @ last.scores.T
lowest = torch.linalg.eigvalsh(cross + cross.T).min() / torch.linalg.eigvalsh(cross + cross.T).max()
sums = torch.cat([last.pi.view(D, N, 1).mul(cross.view(D, N, -1)).sum(1).flatten(),
                  versions[0].pi.view(D, N, 1).mul(cross.T.reshape(D, N, -1)).sum(1).flatten()])
print(f"block of step {T} with step 1: asymmetry {(cross - cross.T).norm() / cross.norm():.2f}, "
      f"lowest eigenvalue {lowest:.3f} of the largest")

# %%
ledger.holds("09.11", "derived here", "at one v, K^nl over responses of all versions is positive (lowest eigenvalue)",
             measured=(spectrum.min() / spectrum.max()).clamp(max=0), expected=0, tolerance=1e-10)
ledger.refuted("09.12", "2.7", "K^nl is a simple generalization of K: symmetric in its arguments (relative difference)",
               counterexample="v belongs to the first argument's step", expected=0, tolerance=0.05,
               measured=(cross - exchanged.T).norm() / cross.norm())
ledger.refuted("09.13", "2.7", "likewise: positive, also between versions (lowest eigenvalue over the largest, or 0)",
               counterexample=f"steps {T} and 1", measured=lowest.clamp(max=0), expected=0, tolerance=1e-4)
ledger.holds("09.14", "derived here", "E[K^nl] = 0 over either side, each with its own version's π (largest, relative)",
             measured=sums.abs().max() / cross.abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# ### How far first order reaches
#
# The learning rate at which the second order has caught up is, with $s_t$ in the place of $Pg$,
#
# $$ \eta^*=\frac{2\,|(\nabla\mathcal H)^Ts_t|}{|s_t^T(\nabla^2\mathcal H)s_t|} . $$
#
# The Hessian enters through one Hessian-vector product, as the notes plan. To check the whole expression we step from
# the last version along $+s$ and $-s$ and separate odd and even parts of the true entropy.

# %%
vector_to_parameters(last.theta, tiny.parameters.values())
log_probs = dh.score(tiny, responses).log_probs.sum(1)
H = -(log_probs.exp() * log_probs).sum() / D
with_graph = torch.cat([q.flatten() for q in torch.autograd.grad(H, list(tiny.parameters.values()), create_graph=True)])
curvature = flat_gradient(tiny, with_graph @ vector) @ vector
eta_star = 2 * (last.grad_H @ vector).abs() / curvature.abs()
sides = []
for sign in (1, -1):
    with torch.no_grad():
        after = dh.score(tiny, responses, tiny.shifted(last.direction.vector, sign * 1e-4)).log_probs.sum(1)
    sides.append(-(after.exp() * after).sum() / D - H.detach())
seen = 1e-4 * abs(sides[0] - sides[1]) / abs(sides[0] + sides[1])
ledger.holds("09.15", "2.5", "η* = 2|∇H·s|/|sᵀ∇²H s| along AdamW's step, from entropies at ±η (ratio)", expected=1,
             measured=seen / eta_star, tolerance=0.01)
print(f"η* = {eta_star:.2g}; the steps above were made with η = {eta}")

# %% [markdown]
# ## 4 · Pretending that $v$ is constant
#
# The formulas of section 3 hold with the *new* $v^t$ inserted, whatever it is; as a decomposition of a step that was
# taken they are exact. But $v^t$ contains $(g^t)^2$, so the step is not linear in $g^t$, and a share is not a
# sensitivity. Let the newest gradient be multiplied by $s$. Then, at $s=1$,
#
# $$ \frac{d}{ds}\frac{\delta\mathcal H_1}\eta=\nabla\mathcal H\cdot\Big[\alpha\,g
#    -\frac{1-\beta_2}{1-\beta_2^t}\,\frac{m\,g^2}{\sqrt v(\sqrt v+\epsilon)^2}\Big]: $$
#
# the share, and what $v$ takes back. Against the first, the second is of the relative size
#
# $$ \rho_t\,\frac{m\,g}{\sqrt v(\sqrt v+\epsilon)},\qquad
#    \rho_t=\frac{1-\beta_2}{1-\beta_2^t}\Big/\frac{1-\beta_1}{1-\beta_1^t},\qquad\rho_1=1,\qquad
#    \rho_\infty=\frac{1-\beta_2}{1-\beta_1} . $$
#
# At the first step $m=g$ and $\sqrt v=|g|$, and $v$ takes back everything: the step is $\eta\,\mathrm{sign}(g)$ and
# does not care for the size of a gradient.

# %%
rows = []
for t, v in enumerate(versions):
    s = torch.ones((), dtype=torch.float64, requires_grad=True)
    reached = v_hat[t] > 0
    newest = torch.where(torch.arange(T)[:, None] == t, s, 1.0) * g
    step = (W1[t] @ newest)[reached] / ((W2[t] @ newest.square())[reached].sqrt() + epsilon)
    true, = torch.autograd.grad(v.grad_H[reached] @ step, s)
    share = W1[t, t] * (v.grad_H * g[t] / own_roots[t]).sum()
    taken_back = -W2[t, t] * (v.grad_H * m[t] * g[t] ** 2 / own_roots[t] ** 2)[reached] @ (1 / v_hat[t][reached].sqrt())
    rows.append([t + 1, float(W2[t, t] / W1[t, t]), float(share), float(taken_back), float(true)])
table = pd.DataFrame(rows, columns=["step", "ρ", "share", "taken back by v", "true derivative"]).set_index("step")
table.round(3)

# %%
gap = (table["share"] + table["taken back by v"] - table["true derivative"]).abs().max()
ledger.holds("09.16", "derived here", "dδH₁/ds is the share less what v takes back (largest gap over the steps)",
             measured=gap, expected=0, tolerance=1e-9)
ledger.refuted("09.17", "2.7", "v may be taken as constant: a gradient's share is what δH₁ gains per unit of its size "
               "(ratio of the two)", counterexample="the first step, whose length knows nothing of the gradient's",
               measured=table["true derivative"].iloc[0] / table["share"].iloc[0], expected=1, tolerance=0.5)
print("ρ at steps 1, 10, 100, 1000, 10000:", *(
    f"{(1 - beta2) / (1 - beta2**t) * (1 - beta1**t) / (1 - beta1):.3f}" for t in (1, 10, 100, 1000, 10000)))

# %% [markdown]
# With time the pretence becomes a good one: once $v$ has seen some $1/(1-\beta_2)$ steps, a single gradient is a
# hundredth part of its influence on $m$. To see both ends we double one response's gradient, each of the 60 in turn,
# and compare what $\delta\mathcal H_1$ gains with the response's share: at the first step, at the fifth, and at the
# fifth again as if the same $m$ and $v$ had come out of a thousand steps.

# %%
doubled = {}
for label, t, count in (("first step", 0, 1), ("fifth step", 4, 5), ("as if after 1000 steps", 4, 1000)):
    v, w1, w2 = versions[t], (1 - beta1) / (1 - beta1**count), (1 - beta2) / (1 - beta2**count)
    extra = (v.pi * v.A)[:, None] * v.scores
    squares = v_hat[t] + w2 * ((g[t] + extra).square() - g[t].square())
    after = (m[t] + w1 * extra) / (squares.sqrt() + epsilon)
    gained, share = (after - m[t] / own_roots[t]) @ v.grad_H, (w1 * extra / own_roots[t]) @ v.grad_H
    doubled[label] = share, gained
    print(f"{label:24} gain against share: slope {float(share @ gained / (share @ share)):+.2f}, "
          f"correlation {float(torch.corrcoef(torch.stack([share, gained]))[0, 1]):+.2f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.9))
for i, (axis, (label, (share, gained))) in enumerate(zip(axes, doubled.items(), strict=True)):
    axis.scatter(share, gained, color=f"C{i}", marker=dh.figures.MARKERS[i], s=26, alpha=0.8)
    reach = 1.15 * float(torch.cat([share, gained]).abs().max())
    axis.plot([-reach, reach], [-reach, reach], color="0.3", linewidth=1)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), title=label, xlabel="share of δH₁/η, nats")
axes[0].set(ylabel="gain of δH₁/η by doubling it, nats")
dh.figures.save(figure, results, "09-share")

# %% [markdown]
# *One point a response of the enumerated policy, exact. On the line, doubling a response's gradient adds its share once
# more, which is what a constant $v$ would give. Early in training shares and effects are different things.*
#
# ## 5 · Is it RMSprop?
#
# To start with, the notes want to keep the preconditioner only, "which I guess is RMSPROP". Its rule,
# $\delta\theta=-\eta\,g/(\sqrt v+\epsilon)$, has the $v$ *without* normalisation. So AdamW with $\beta_1=0$ and
# $\lambda=0$ is RMSprop with $\eta\sqrt{1-\beta_2^t}$ for $\eta$ and $\epsilon\sqrt{1-\beta_2^t}$ for $\epsilon$,
# neither of which stays constant. We run PyTorch's own two optimizers on our five gradients.

# %%
factor = math.sqrt(1 - beta2**T)
adam_x, rms_x = (torch.zeros_like(g[0], requires_grad=True) for _ in range(2))
adam = torch.optim.AdamW([adam_x], lr=1.0, betas=(0.0, beta2), eps=epsilon, weight_decay=0.0)
rms = torch.optim.RMSprop([rms_x], lr=1.0, alpha=beta2, eps=epsilon * factor)
for gradient in g:
    before = adam_x.detach().clone(), rms_x.detach().clone()
    adam_x.grad, rms_x.grad = -gradient, -gradient
    adam.step()
    rms.step()
by_adam, by_rms = adam_x.detach() - before[0], rms_x.detach() - before[1]

# %%
ledger.corrected("09.18", "2.7", "AdamW without momentum and weight decay is RMSprop (ratio of RMSprop's step to it)",
                 correction="up to 1/√(1−β₂ᵗ), since RMSprop's v is not normalised, and ε√(1−β₂ᵗ) for ε",
                 measured=by_rms.norm() / by_adam.norm(), expected=1 / factor, as_printed=1, tolerance=1e-9)
ledger.holds("09.19", "derived here", "with both factors it is RMSprop, parameter by parameter (largest gap)",
             measured=(factor * by_rms - by_adam).abs().max(), expected=0, tolerance=1e-10)
print(f"RMSprop's fifth step is {by_rms.norm() / by_adam.norm():.1f} times as long; after 5000 steps it would be "
      f"{1 / math.sqrt(1 - beta2**5000):.3f} times")

# %% [markdown]
# The difference is one number for all parameters, a warm-up in reverse. It has no influence on any direction or on the
# structure of the kernel, and it is gone after a few thousand steps; the guess is right in spirit.

# %% [markdown]
# ## 6 · A real run
#
# Now the shipped policy, trained for a few steps of AdamW on GRPO's loss, with fresh prompts for each step. Batch U
# makes the step. Batch E, other prompts with one response each, looks at it, before it is taken:
#
# - $\delta\mathcal H_1$ along the whole direction, from `entropy_change`;
# - the gradient $u$ of the entropy behind that estimate, one backward pass, with which $u\cdot(P\circ g^{t'})$ is what
#   the gradient of any earlier step does now;
# - the change that the step makes at its learning rate, from importance weights.
#
# The first and the last share their batch, so their errors go together. All entropies are of whole responses, and all
# changes are in thousandths of a nat, at the learning rate of the run. We hand the optimizer the gradient that
# `update_direction` has computed anyway; the last step, at the end of the chapter, is made by the training loop and has
# to agree.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
B_U = min(update_prompts, len(table) // (2 * steps))
B_E = min(evaluation_prompts, len(table) // steps - B_U)
optimizer = torch.optim.AdamW(policy.parameters.values(), lr=learning_rate, betas=betas, eps=epsilon,
                              weight_decay=weight_decay)
sizes = [p.numel() for p in policy.parameters.values()]
print(f"{sum(sizes):,} parameters; {steps} steps, U: {B_U} prompts, 8 responses each, E: {B_E} prompts, one each")

# %%
history, causes, run, thousandths = [], [], [], 1e3 * learning_rate
for t in range(1, steps + 1):
    if t > 1:
        optimizer.step()
    start = (t - 1) * (B_U + B_E)
    update = dh.sample(policy, table.select(range(start, start + B_U)), 8, max_new_tokens, seed=seed + t)
    evaluation = dh.sample(policy, table.select(range(start + B_U, start + B_U + B_E)), 1, max_new_tokens,
                           seed=seed + 1000 + t)
    direction = dh.update_direction(policy, update, "grpo", optimizer=optimizer)
    change = dh.entropy_change(policy, evaluation, direction, per="sequence")
    table_E = dh.measured_entropy_change(policy, evaluation, direction, [learning_rate, learning_rate / 10],
                                          per="sequence")
    log_probs, entropies = dh.score(policy, evaluation)
    u = flat_gradient(policy, (change.score_weights * log_probs).sum() + change.entropy_weight * entropies.sum())
    flat = {name: parameters_to_vector(part.values()) for name, part in direction.parts.items()}
    P = parameters_to_vector(direction.preconditioner.values())
    history.append(flat["rollouts"] / P)
    causes.append([thousandths * float(u @ (P * old)) * beta1**age for age, old in enumerate(history[::-1])])
    run.append(SimpleNamespace(change=change, measured=table_E, reward=float(update.rewards.mean()),
                               decay=thousandths * float(u @ flat["weight_decay"]), cosine=float(
        torch.cosine_similarity(sum(flat.values()), flat["rollouts"], dim=0))))
    for p, minus_g in zip(policy.parameters.values(), (-history[-1]).split(sizes), strict=True):
        p.grad = minus_g.view_as(p)

# %% [markdown]
# ### Predicted and measured
#
# First, does the prediction for the whole direction hold where it is used, at the learning rate of the run? The last
# column measures a tenth of the step on the same rollouts. Sampling noise is nearly the same in the last two, so their
# difference is what the step has beyond first order, seen more sharply than through the difference to the prediction.

# %%
predicted = [dh.Estimate(thousandths * r.change.value, thousandths * r.change.standard_error, r.change.count)
             for r in run]
actual, tenth = ([dh.Estimate(k * r.measured["change"][row], k * r.measured["standard_error"][row], r.change.count)
                  for r in run] for row, k in enumerate((1e3, 1e4)))
pd.DataFrame({"step": range(1, steps + 1), "mean reward": [round(r.reward, 2) for r in run],
              "predicted": map(repr, predicted), "measured": map(repr, actual),
              "10 times measured at η/10": map(repr, tenth)}).set_index("step")

# %%
apart = [(a.value - p.value) / math.hypot(a.standard_error, p.standard_error)
         for a, p in zip(actual, predicted, strict=True)]
gap = sum(a.value - p.value for a, p in zip(actual, predicted, strict=True))
error = math.sqrt(sum(a.standard_error**2 + p.standard_error**2 for a, p in zip(actual, predicted, strict=True)))
ledger.holds("09.20", "2.7", "AdamW steps change the entropy as first order predicts (largest gap in standard errors)",
             measured=max(map(abs, apart)), expected=0, tolerance=4)
ledger.holds("09.21", "2.7", "the same for the sum over the run (gap in standard errors)", measured=gap / error,
             expected=0, tolerance=4)
both = pd.DataFrame({"predicted": [p.value for p in predicted], "measured": [a.value for a in actual],
                     "tenth": [a.value for a in tenth]})
beyond = float((both.measured - both.tenth).pow(2).mean() ** 0.5 / both.measured.pow(2).mean() ** 0.5)
ledger.holds("09.22", "2.1.1", "linear order is a good enough estimate of the change per step (the rest's share, rms)",
             measured=beyond, expected=0, tolerance=0.3)
print(f"sum over the run: predicted {both.predicted.sum():+.0f}, measured {both.measured.sum():+.0f}, combined error "
      f"{error:.0f} thousandths of a nat\ncorrelation over steps {both.corr().iloc[0, 1]:.2f}; beyond first order: "
      f"{beyond:.0%} of the measured change (root mean square)")

# %% [markdown]
# ### Whose doing was it?
#
# The causes add up: every past gradient with its weight $\frac{1-\beta_1}{1-\beta_1^t}\beta_1^{t-t'}$ under today's
# $1/(\sqrt{\hat v^t}+\epsilon)$, and weight decay. To have errors, we also estimate both large parts of the last step
# by themselves. They share the rollouts of batch E and do not add up as independent errors would.

# %%
number = range(1, steps + 1)
shares = pd.DataFrame([row + [float("nan")] * (steps - len(row)) for row in causes], index=number)
weights = pd.DataFrame([[(1 - beta1) / (1 - beta1**t) * beta1**age if age < t else float("nan")
                         for age in range(steps)] for t in number], index=number)
whole, decay = (pd.Series(x, index=number) for x in ([p.value for p in predicted], [r.decay for r in run]))
gap = (shares.sum(axis=1) + decay - whole).abs().max() / whole.abs().max()
ledger.holds("09.23", "2.7", "on the transformer, the old gradients' shares and weight decay sum to δH₁ (largest gap, "
             "relative)", measured=gap, expected=0,
             tolerance=max(1e-6, 1e5 * torch.finfo(policy.dtype).eps))

# %%
alone = {name: dh.entropy_change(policy, evaluation, direction.parts[name], per="sequence")
         for name in ("rollouts", "momentum")}
for name, part in {"whole step": change, **alone}.items():
    print(f"{name:13}{dh.Estimate(thousandths * part.value, thousandths * part.standard_error, part.count)}")
print(f"weight decay {decay.iloc[-1]:.2f}")

# %% [markdown]
# Weight decay is too weak to matter at this length of run. For the rest we look at all steps.

# %%
groups = {"this batch": shares[0], "one step old": shares[1], "two or three": shares[[2, 3]].sum(axis=1),
          "older": shares.loc[:, 4:].sum(axis=1), "weight decay": decay}
unit = shares / weights
typical = float(unit.iloc[1:].stack().pow(2).mean() ** 0.5)
by_age = pd.DataFrame({"root mean square over steps": shares.iloc[1:].pow(2).mean() ** 0.5,
                       "same effect at any age, times its weight": typical * weights.iloc[1:].pow(2).mean() ** 0.5})

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
up, down = 0 * whole, 0 * whole
for i, (label, height) in enumerate(groups.items()):
    height = height.fillna(0.0)
    left.bar(number, height, bottom=up.where(height > 0, down), color=f"C{i}", label=label, edgecolor="white",
             hatch=("", "//", "..", "xx", "")[i], linewidth=0.5)
    up, down = up + height.clip(lower=0), down + height.clip(upper=0)
left.plot(number, whole, "D", color="black", label="whole step")
left.use_sticky_edges = False
left.margins(y=0.08)
left.set(xlabel="step", ylabel="first-order entropy change, 10⁻³ nats", title="Who moved the entropy")
left.legend(ncols=3, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
for age in shares:
    right.plot([age] * (steps - 1), shares[age].iloc[1:].abs(), ".", color="0.6")
for i, column in enumerate(by_age):
    right.plot(by_age.index, by_age[column], color=f"C{i}", marker=dh.figures.MARKERS[i], label=column,
               linestyle=dh.figures.DASHES[i])
right.set(xlabel="age of the gradient, steps", ylabel="size of its share, 10⁻³ nats", ylim=(0, None),
          title="Shares shrink with age as weights do")
right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
dh.figures.save(figure, results, "09-ages")

# %% [markdown]
# *Left: the first-order change of each step by the age of what caused it; positive and negative shares are stacked
# apart, weight decay is too small to see, and the black diamond is the sum. Right: the size of the shares by age, the
# first step left out (grey: single steps), and what it would be if every gradient had the same typical effect times its
# weight in* $m$*.*
#
# Within the scatter of so few steps, a gradient does not lose its effect on the entropy by getting older; it loses its
# weight. That makes momentum easy to think of: it is a *mean over batches*, in effect of $1/\sum w^2$ of them. The mean
# effect of a step is that of a single batch, its scatter from batch to batch is smaller by $\sqrt{\sum w^2}$, and the
# newest batch is one voice of several.
#
# ### May one ignore momentum?
#
# So we set against the whole step the *same* preconditioner on the newest gradient alone, at full weight,
# $\delta\theta=\eta\,g^t/(\sqrt{\hat v^t}+\epsilon)$. The first step has no past and is left out.

# %%
current, w2 = unit[0].iloc[1:], weights.pow(2).sum(axis=1)
later, older = whole.iloc[1:], (shares.sum(axis=1) - shares[0]).iloc[1:] / (1 - weights[0].iloc[1:])
difference = dh.Estimate.mean(torch.tensor((current - older).to_numpy()))
ratio = float((later.pow(2).mean() / current.pow(2).mean()) ** 0.5)
missing = float((current - later).pow(2).mean() ** 0.5 / later.pow(2).mean() ** 0.5)
print(f"newest batch alone and whole step: same sign in {int((current * later > 0).sum())} of {len(later)} steps, "
      f"correlation {current.corr(later):+.2f}\n"
      f"size of the whole step's change to that of the newest batch alone: {ratio:.2f}; "
      f"a mean of independent batches: {float(w2.iloc[1:].mean() ** 0.5):.2f}\n"
      f"newest batch less the mean of older ones, on average over steps: {difference} thousandths of a nat")

# %% [markdown]
# The directions tell the same. If the gradients of different batches were orthogonal and of one length, the cosine of
# a step with its newest part would be $w_0/\sqrt{\sum w^2}$.

# %%
cosines = pd.DataFrame({"cosine of the step with its newest part": [r.cosine for r in run],
                        "if batches were orthogonal": weights[0] / w2**0.5}, index=number)
ledger.holds("09.24", "2.7", "ignoring momentum changes no mean: a new gradient and older ones move the entropy alike "
             "(gap in standard errors)", measured=difference.value / difference.standard_error, expected=0, tolerance=4)
ledger.refuted("09.25", "2.7", "ignoring momentum, a single step keeps its entropy change (rms error over rms change)",
               counterexample="the run: the newest batch alone scatters more than a mean of batches", measured=missing,
               expected=0, tolerance=0.25)
ledger.refuted("09.26", "2.7", "ignoring momentum, a step keeps its direction (cosine, last step)", expected=1,
               counterexample="the run", measured=run[-1].cosine, tolerance=0.2)
ledger.holds("09.27", "derived here", "that cosine is w₀/√Σw², as for orthogonal batches", measured=run[-1].cosine,
             expected=cosines.iloc[-1, 1], tolerance=0.25)
cosines.T.round(2)

# %%
figure, axes = plt.subplots()
for i, (label, values) in enumerate({"predicted": predicted, "measured": actual}.items()):
    dh.figures.estimates(axes, [t + 0.12 * (2 * i - 1) for t in number], values, i, label)
axes.plot(number, unit[0], color="C2", marker=dh.figures.MARKERS[2], linestyle=":", label="newest batch alone")
axes.axhline(0, color="0.4", linewidth=1)
axes.set(xlabel="step", ylabel="entropy change of the step, 10⁻³ nats",
         title="First order holds; one batch is not the step")
axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
dh.figures.save(figure, results, "09-run")

# %% [markdown]
# *First-order prediction and measurement for every step of the run, with 95% intervals, and what the prediction would
# be for a step made of the newest gradient alone at full weight.*
#
# The answer then depends on the question. For *expectations*, such as whether a kind of rollout raises or lowers the
# entropy, momentum changes nothing. For the entropy change of *one step*, and for the blame of the rollouts in its
# batch, it changes nearly everything: most of what happens at a step was decided before it.

# %% [markdown]
# ## 7 · Does the preconditioner change the kernel?
#
# The notes' other conjecture: conditioning factors matter, "though maybe it doesn't make much of a difference in the
# structure of fisher kernel". At the last step of the run, how different are the factors?

# %%
inverse = (1 - beta1) / (1 - beta1**steps) / P
spread = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=P.dtype, device=P.device)
in_order = inverse.sort().values
levels = in_order[(spread * (len(in_order) - 1)).long()]
print("√v + ε at its 1, 10, 50, 90, 99% quantiles:", *(f"{float(x):.0e}" for x in levels))
print(f"share of parameters with √v below ε: {float((inverse < 2 * epsilon).double().mean()):.1%}")

# %% [markdown]
# They span orders of magnitude. The smallest belong to embeddings of tokens that no batch has used so far: there
# $\epsilon$ alone is in the denominator, and their $P$ is the largest that there can be, until a batch uses the token.
#
# Now the kernel, with and without $P$, over 48 responses of the last step: 24 of batch U, from three prompts, and 24
# of batch E, one a prompt. Pairs of E with U are what $\delta\mathcal H_1$ is made of. As in chapter 03 the entries are
# compared as cosines, since the scale of $P$ is a matter of the learning rate; identical responses are left out.

# %%
from_U, from_E, K = update.select(slice(24)), evaluation.select(slice(24)), {}
for name, shape in (("plain", None), ("preconditioned", direction.preconditioner)):
    within_U, between, within_E = (dh.fisher_kernel(policy, a, b, shape) for a, b in (
        (from_U, None), (from_U, from_E), (from_E, None)))
    K[name] = torch.cat([torch.cat([within_U, between], 1), torch.cat([between.T, within_E], 1)])
cosine = {name: (k / k.diagonal().sqrt()[:, None] / k.diagonal().sqrt()).cpu() for name, k in K.items()}
in_U = torch.arange(48) < 24
group = torch.where(in_U, torch.arange(48) // 8, -1)
above = torch.ones(48, 48, dtype=torch.bool).triu(1) & (cosine["plain"] < 1 - 1e-6)
together = above & in_U & (group[:, None] == group)
kinds = {"U with U, same prompt": together, "U with U, other prompts": above & in_U[:, None] & in_U & ~together,
         "E with U": above & in_U[:, None] & ~in_U, "E with E": above & ~in_U[:, None] & ~in_U}

# %%
rows = []
for kind, mask in kinds.items():
    plain, shaped = (cosine[name][mask] for name in K)
    rows.append([kind, int(mask.sum()), float(plain.abs().mean()), float(shaped.abs().mean()),
                 float(spearmanr(plain, shaped).statistic), float((plain * shaped > 0).double().mean())])
columns = ["pairs of", "count", "mean |cosine|, plain", "mean |cosine|, with P", "rank correlation", "same sign"]
structure = pd.DataFrame(rows, columns=columns).set_index("pairs of")
structure.round(2)

# %%
ranks, sizes_P = structure["rank correlation"], structure["mean |cosine|, with P"]
ledger.holds("09.28", "2.1.1", "P makes little difference to K's structure: rank correlation of its entries with and "
             "without, same prompt", measured=ranks.iloc[0], expected=1, tolerance=0.3)
ledger.holds("09.29", "2.1.1", "the same for pairs of E with U, which δH₁ is made of", measured=ranks["E with U"],
             expected=1, tolerance=0.5)
ledger.holds("09.30", "2.1.1", "with P too, entries inside a prompt are larger than between (excess of the latter)",
             measured=max(0.0, sizes_P.iloc[1] - sizes_P.iloc[0]), expected=0, tolerance=1e-9)

# %%
figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2))
for axis, name in zip(axes, K, strict=False):
    image = axis.imshow(cosine[name], cmap="PuOr", vmin=-1, vmax=1)
    axis.set(xticks=[11.5, 35.5], yticks=[11.5, 35.5], xticklabels=["U", "E"], yticklabels=["U", "E"],
             xlabel="response", ylabel="response", title=f"K, {name}")
    axis.grid(False)
figure.colorbar(image, ax=axes[:2], label="cosine of two gradients", shrink=0.8)
for i, (kind, mask) in enumerate(list(kinds.items())[:3]):
    axes[2].scatter(cosine["plain"][mask], cosine["preconditioned"][mask], s=14, alpha=0.6, color=f"C{i}",
                    marker=dh.figures.MARKERS[i], label=kind)
axes[2].axline((0, 0), slope=1, color="0.3", linewidth=1)
axes[2].set(xlabel="cosine, plain", ylabel="cosine, preconditioned", title="Entry by entry")
axes[2].legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))
dh.figures.save(figure, results, "09-kernel")

# %% [markdown]
# *The kernel of 48 responses without and with AdamW's preconditioner, and its entries off the diagonal against each
# other. Blocks are prompts of batch U.*
#
# The blocks stay, and so do most signs and most of the order among entries; between prompts, cosines become somewhat
# smaller with $P$. Does it matter to the question of *who* moves the entropy? We ask `attribution` for the share
# of every rollout and token of batch U, with the preconditioner and for plain gradient descent.

# %%
descent = torch.optim.SGD(policy.parameters.values(), lr=1.0)
plain_direction = dh.update_direction(policy, update, "grpo", optimizer=descent)
with_P = dh.attribution(policy, evaluation, direction, change)
plain_change = dh.entropy_change(policy, evaluation, plain_direction, per="sequence")
plain = dh.attribution(policy, evaluation, plain_direction, plain_change)
for name, shaped, simple in (("rollouts", with_P.tokens.sum(1), plain.tokens.sum(1)),
                             ("tokens", with_P.tokens.flatten(), plain.tokens.flatten())):
    x, y = (shares.cpu()[(simple != 0).cpu()] for shares in (shaped, simple))
    same = (x * y > 0).double()
    print(f"{name:8} rank correlation {spearmanr(x, y).statistic:.2f}, same sign {float(same.mean()):.0%}, "
          f"in the larger half {float(same[y.abs() >= y.abs().median()].mean()):.0%}")

# %% [markdown]
# Both come from batch E and differ by $P$ and by what the learned baseline makes of each direction. Most of the noise is
# common to both, and the agreement says nothing about whether either attribution is *right*.
#
# Finally the last step, taken by the training loop from the same state. The change of the parameters is the direction
# that everything above was made of.

# %%
before = parameters_to_vector(policy.parameters.values()).detach().clone()
with torch.no_grad():
    old_log_probs = dh.score(policy, update).log_probs
dh.training.policy_gradient_step(policy, update, old_log_probs, "grpo", optimizer)
real = (parameters_to_vector(policy.parameters.values()).detach() - before) / learning_rate
expected = parameters_to_vector(direction.vector.values())
ledger.holds("09.31", "2.7", "the training loop's AdamW step is update_direction's v (length of the gap, relative)",
             measured=(real - expected).norm() / expected.norm(), expected=0,
             tolerance=1e3 * torch.finfo(policy.dtype).eps / learning_rate)

# %% [markdown]
# ## What stands
#
# The printed step is AdamW's, when $v$ is normalised like $m$; the first-order change and the nonlocal kernel follow
# exactly, with today's $v$ under all gradients, old ones too. The kernel between versions is neither symmetric nor
# positive. A constant $v$ is a fiction that the split does not need; but whoever reads shares as sensitivities needs
# it, and early in training it is false. RMSprop is the momentum-free version up to one factor for all parameters.
#
# On the transformer the preconditioner keeps the blocks and most signs of the kernel. Ignoring momentum is right for
# means and wrong for steps: momentum averages over batches whose gradients are close to orthogonal, so that a single
# step owes its entropy change mostly to the past.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Set $\beta_1=0$ in the parameters. Which ledger entries must fail, and why?
# 2. Normalise each gradient's share by its weight and plot it against age for a longer run. At which age does a
#    gradient stop having an effect, and does that depend on the learning rate?
# 3. In section 4 give the optimizer $\epsilon=1$. What does $v$ take back at the first step, and what is the rule then?
# 4. Replace $\epsilon$ by $10^{-6}$ in section 6. Does the kernel of section 7 come closer to the plain one?
#
# ## Further reading
#
# - Loshchilov, I. and Hutter, F. *Decoupled weight decay regularization*, arXiv 1711.05101.
# - Kingma, D. P. and Ba, J. *Adam: a method for stochastic optimization*, arXiv 1412.6980: section 3 derives the
#   normalisation of $m$ and $v$.
# - Balles, L. and Hennig, P. *Dissecting Adam: the sign, magnitude and variance of stochastic gradients*, arXiv
#   1705.07774.
# - Tieleman, T. and Hinton, G. *Lecture 6.5, rmsprop*, Coursera 2012.
