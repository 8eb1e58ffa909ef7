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
# weight decay pulls. This chapter settles which formulas for such a step are exact, what one may ignore of them, and
# how much of a real step's entropy change the newest batch is to blame for.
#
# ## In short
#
# - The printed AdamW step and its first-order entropy change are exact. The nonlocal kernel as printed is not: without
#   the weights of the mean $m$ its sum over steps is −218 instead of −42.5 nats per unit of $\eta$ in the example below
#   [09.9](#ledger-09.9).
# - A step points mostly elsewhere than its newest gradient: 81 ± 2% of its squared length is the past's
#   [09.26](#ledger-09.26).
# - May one ignore momentum? Not where a few steps change the policy by much: at $\eta=0.005$ on the enumerable policy
#   the newest gradient alone has half the effect of the step. In 32 real steps the mean effect of a gradient over the
#   one to seven steps after its own is 0.9 ± 0.5 of what it was: not decided [09.34](#ledger-09.34).
# - AdamW's preconditioner leaves the structure of the kernel: entries with and without it have a correlation of
#   0.990 ± 0.005 within a prompt and 0.97 ± 0.01 between prompts [09.28](#ledger-09.28), [09.29](#ledger-09.29).
# - **What to do.** To explain or control *one* step, use the whole direction with the optimizer's state, not the
#   gradient of its batch. Leave $P$ out when the question is which rollouts pull together, and keep it for sizes.
# - **What to do.** Do not read a rollout's share as what it would change if it were larger, before $v$ has seen about
#   $1/(1-\beta_2)$ steps [09.17](#ledger-09.17). And look at an entropy through many prompts: 24 a step are too few to
#   see what one batch does to it.
#
# ## What is checked
#
# | statement | source | verdict |
# |---|---|---|
# | $\delta\theta^t$ of AdamW, $m^t$ and "similarly for $v$" | notes 2.7 | holds [09.2](#ledger-09.2) |
# | it is $-\eta s_t$ of section 2.5, and weight decay | own | holds [09.4](#ledger-09.4) |
# | $\delta\mathcal H_1^t$ without weight decay | notes 2.7 | holds [09.7](#ledger-09.7) |
# | the nonlocal kernel $K^{nl}$ | notes 2.7 | holds with a correction [09.9](#ledger-09.9) |
# | $\mathbb E[K^{nl}]=0$ on either side | own | holds [09.14](#ledger-09.14) |
# | $\eta^*$ along $s_t$ | notes 2.5 | holds [09.15](#ledger-09.15) |
# | "pretend $v$ is constant" | notes 2.7 | holds with a correction [09.17](#ledger-09.17) |
# | the same, with weights as after 1000 steps (not made) | notes 2.7 | holds [09.32](#ledger-09.32) |
# | what $v$ takes back of a share | own | holds [09.16](#ledger-09.16) |
# | without momentum and weight decay it is RMSprop | notes 2.7 | holds with a correction [09.18](#ledger-09.18) |
# | AdamW steps change the entropy as first order predicts | notes 2.7 | holds [09.20](#ledger-09.20) |
# | linear order is a good enough estimate | notes 2.1.1 | holds [09.22](#ledger-09.22) |
# | ignoring momentum leaves means, in a real run | notes 2.7 | not decided by these data [09.34](#ledger-09.34) |
# | a gradient keeps its effect, mean of the next seven steps | own | not decided by these data [09.35](#ledger-09.35) |
# | a step's direction is mostly its past's | own | holds [09.26](#ledger-09.26) |
# | its entropy change is | own | not decided by these data [09.27](#ledger-09.27) |
# | the newest batch alone changes more than the step | own | not decided by these data [09.25](#ledger-09.25) |
# | $P$ changes little in $K$'s structure: one prompt | notes 2.1.1 | holds [09.28](#ledger-09.28) |
# | the same: E with U; blocks | notes 2.1.1 | holds [09.29](#ledger-09.29), [09.30](#ledger-09.30) |
# | `update_direction`'s parts | own | holds [09.5](#ledger-09.5) |
# | the causes' changes sum to the whole | notes 2.7 | holds [09.23](#ledger-09.23) |
#
# **You need** chapter 03. **You will learn** to split one optimizer step by batch, to tell a share of a step from
# a sensitivity, and in which sense momentum may be ignored.

# %%
import math
from types import SimpleNamespace

import pandas as pd
import torch
from matplotlib import pyplot as plt
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
steps = 32                        # of that run
update_prompts = 4                # a step, with 8 responses each
evaluation_prompts = 24           # a step, with one response each
kernel_prompts = 8                # of the kernel, with 8 responses each, and 24 with one
max_new_tokens = 40

# %%
stated = (model, problems, seed) == ("../data/policy", "../data/problems", 0)
ledger = dh.Ledger("09", source="notes", stated=stated, seeds="../data/seeds")
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
responses = dh.exact.every_response(tiny, [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]], max_new_tokens=3)
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
T, D = 5, 4
N = len(responses) // D
theta_start = parameters_to_vector(tiny.parameters.values()).detach().clone()
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
# The notes write <a id="09.2" href="#ledger-09.2">[09.2]</a>
#
# $$ \delta\theta_\alpha^t=\eta\Big(\frac{m_\alpha^t}{\sqrt{v_\alpha^t}+\epsilon}-\lambda\theta_\alpha^t\Big),\qquad
#    m_\alpha=\frac{1-\beta_1}{1-\beta_1^t}\sum_{t'=1}^t\beta_1^{t-t'}g_\alpha^{t'}, $$
#
# and "similarly for v". The weights in $m$ sum to one: it is a true mean of gradients. "Similarly" gives $v$ the same
# normalisation, $v=\frac{1-\beta_2}{1-\beta_2^t}\sum\beta_2^{t-t'}(g^{t'})^2$, which is often written $\hat v$. We form
# both for all five steps at once and compare with the distance that the parameters really moved. It matters: with
# $v$ as RMSprop has it, without the normalisation, the first steps would be many times as long.

# %%
number = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
age = number - number.T
W1, W2 = (torch.where(age >= 0, (1 - b) / (1 - b**number) * b ** age.clamp(min=0), 0.0) for b in betas)
g, theta, moved = (torch.stack([getattr(v, key) for v in versions]) for key in ("g", "theta", "moved"))
m, v_hat = W1 @ g, W2 @ g.square()
own_roots = v_hat.sqrt() + epsilon
printed = eta * (m / own_roots - weight_decay * theta)
ledger.holds("09.2", "2.7", "δθ = η(m/(√v+ε) − λθ), m and v normalised alike, is torch's AdamW step (largest gap of "
             "five steps, relative)", expected=0, tolerance=1e-10, formulas=(94, 95),
             measured=(moved - printed).abs().max() / moved.abs().max())
raw = eta * (m / ((v_hat * (1 - beta2**number)).sqrt() + epsilon) - weight_decay * theta)
print("length of the step without the normalisation of v, relative to the real one:",
      *(f"{float(ratio):.1f}" for ratio in raw.norm(dim=1) / moved.norm(dim=1)))

# %% [markdown]
# Section 2.5 has another form, for Adam, with $g=\partial L=-\partial J$ and the optimizer's memory $m_t$:
# $\delta\theta_t\approx-\eta(\alpha_tg_t+\beta_tm_t)=-\eta s_t$. Chapters 06 and 07 check it there. Here we ask
# whether it is the step of the formula above. It is, once two things are understood. The numbers $\alpha_t$ and
# $\beta_t$ are one for each *parameter*, and $m_t$ is what the optimizer remembers from *before* the step, the
# unnormalised $\sum_{t'<t}(1-\beta_1)\beta_1^{t-1-t'}g^{t'}$:
#
# $$ \alpha_t=\frac{1-\beta_1}{1-\beta_1^t}\,\frac1{\sqrt{\hat v^t}+\epsilon},\qquad
#    \beta_t=\frac{\beta_1}{1-\beta_1^t}\,\frac1{\sqrt{\hat v^t}+\epsilon}. $$
#
# And AdamW has weight decay besides: its step is $-\eta s_t-\eta\lambda\theta$
# <a id="09.4" href="#ledger-09.4">[09.4]</a>. We compare what the two do to the exact entropy, to first order.

# %%
root, last = own_roots[-1], versions[-1]
alpha, beta = ((1 - beta1) / (1 - beta1**T) / root, beta1 / (1 - beta1**T) / root)
memory = (1 - beta1) * beta1 ** (T - 1 - number[:-1, 0]) @ g[:-1]
by_hand = {"rollouts": alpha * g[-1], "momentum": beta * memory, "weight_decay": -weight_decay * theta[-1]}
shares = pd.Series({name: float(last.grad_H @ part) for name, part in by_hand.items()}, name="nats per unit of η")
ledger.holds("09.4", "derived here", "the AdamW step of formula 94 is −ηs − ηλθ: its first-order entropy change",
             source="deltah", measured=last.grad_H @ moved[-1] / eta, expected=shares.sum(), tolerance=1e-9,
             rules_out={"−ηs alone": shares.sum() - shares["weight_decay"]})
shares.round(4).to_frame()

# %% [markdown]
# ## 3 · What it does to the entropy
#
# ### To first order
#
# With weight decay left out the notes have <a id="09.7" href="#ledger-09.7">[09.7]</a>
#
# $$ \delta\mathcal H_1^t=-\eta\sum_\alpha\frac1{\sqrt{v_\alpha^t}+\epsilon}\,\frac{1-\beta_1}{1-\beta_1^t}\,
#    \mathbb E_{\pi_t}[S_t\,\partial_\alpha S_t]\sum_{t'=1}^t\beta_1^{t-t'}g_\alpha^{t'} . $$
#
# Against it stands the gradient of the exact entropy, from automatic differentiation, along the real step without its
# weight decay. The preconditioner is *today's*, $v^t$, for old gradients as well. Were each gradient divided by the
# $v^{t'}$ of its own day, we would get another number, and the check would see it.

# %%
weights = beta1 ** (T - number[:, 0])
formula = -(((last.pi * last.S) @ last.scores) / root) @ (weights @ g) * (1 - beta1) / (1 - beta1**T)
own_day = W1[-1] @ ((g / own_roots) @ last.grad_H)
ledger.holds("09.7", "2.7", "δH₁ of an AdamW step without weight decay, as printed (per unit of η)", formulas=(96,),
             measured=last.grad_H @ (moved[-1] / eta + weight_decay * theta[-1]), expected=formula, tolerance=1e-9,
             rules_out={"each gradient under its own day's v": own_day, "the newest alone": shares["rollouts"]})
print(f"as printed {formula:.2f}, each gradient under its own day's v {own_day:.2f} nats per unit of η")

# %% [markdown]
# ### The nonlocal kernel
#
# Insert $g^{t'}=\mathbb E_{\pi_{t'}}[A\,\partial S_{t'}]$, and the parameters disappear into what the notes call the
# nonlocal kernel,
#
# $$ K^{nl}(X,P,t|X',P',t')=\sum_\alpha\frac1{\sqrt{v_\alpha^t}+\epsilon}\,\partial_\alpha S_t\partial_\alpha S_{t'} $$
#
# A sequence now has a date: $X$ is scored by today's model, $X'$ by the one that drew it. As printed it lacks something
# <a id="09.9" href="#ledger-09.9">[09.9]</a>. Put in the place of $K$ and summed over steps, it counts every gradient
# with weight one. The weights of the mean $m$ belong inside it, or beside it:
#
# $$ \frac{\delta\mathcal H_1^t}\eta=-\sum_{t'\le t}\frac{1-\beta_1}{1-\beta_1^t}\,\beta_1^{t-t'}\;
#    \mathbb E_{\pi_t}\mathbb E_{\pi_{t'}}\big[(S_t-\bar S_t)\,K^{nl}A\big]. $$

# %%
kernels = [(last.scores / root) @ v.scores.T for v in versions]
unweighted = torch.stack([-(last.pi * last.centred_S) @ K @ (v.pi * v.A)
                          for K, v in zip(kernels, versions, strict=True)])
ledger.corrected("09.9", "2.7", "K^nl in the place of K, summed over steps, gives δH₁ (nats per unit of η)",
                 correction="each step with its weight (1−β₁)/(1−β₁ᵗ) β₁^(t−t′), which K^nl as printed lacks",
                 measured=W1[-1] @ unweighted, expected=formula, as_printed=unweighted.sum(), tolerance=1e-9,
                 formulas=(97,))
print(f"with the weights {W1[-1] @ unweighted:.2f}, as printed {unweighted.sum():.2f} nats per unit of η\n"
      "by the gradient's step, oldest first:", *(f"{float(x):+.2f}" for x in W1[-1] * unweighted))

# %% [markdown]
# Is it a kernel? At one preconditioner, yes: over all pairs of a response and a version it is a Gram matrix. But its
# definition ties the preconditioner to the *first* argument's step, so exchanging the arguments changes the value. And
# the block between two versions, which is what momentum needs, is a corner of the Gram matrix: it has no reason to be
# symmetric or positive, and is neither. "A simple generalization of the SGD version", as the notes say, it is in what
# survives: chapter 03's theorem holds on each side, with the probabilities of that side's version
# <a id="09.14" href="#ledger-09.14">[09.14]</a>. $\mathbb E_{\pi_t}[K^{nl}]=0$ over $X$, and
# $\mathbb E_{\pi_{t'}}[K^{nl}]=0$ over $X'$.

# %%
cross, exchanged = kernels[0], (versions[0].scores / own_roots[0]) @ last.scores.T
spectrum = torch.linalg.eigvalsh(cross + cross.T)
own_side, other_side = (max((p.view(D, N, 1) * K.reshape(D, N, -1)).sum(1).abs().max() / cross.abs().max()
                            for p, K in zip(sides, (cross, cross.T), strict=True))
                        for sides in ((last.pi, versions[0].pi), (versions[0].pi, last.pi)))
ledger.holds("09.14", "derived here", "E[K^nl] = 0 over either side, each with its own version's π (largest, relative)",
             measured=own_side, expected=0, tolerance=1e-10, source="deltah",
             rules_out={"with the other side's π": other_side})
print(f"block of step {T} with step 1: asymmetry {(cross - cross.T).norm() / cross.norm():.2f}, "
      f"lowest eigenvalue {spectrum.min() / spectrum.max():.3f} of the largest\n"
      f"with the arguments exchanged it changes by {(cross - exchanged.T).norm() / cross.norm():.1f} times its size")

# %% [markdown]
# ### How far first order reaches
#
# The learning rate at which the second order has caught up is, with $s_t$ in the place of $Pg$
# <a id="09.15" href="#ledger-09.15">[09.15]</a>,
#
# $$ \eta^*=\frac{2|\nabla H\cdot s_t|}{|s_t\cdot\nabla^2H\,s_t|} . $$
#
# We compute it by differentiating the exact entropy twice along the whole step, weight decay included. Then we walk
# from the last version along $+s$ and $-s$ and separate odd and even parts of the true entropy.

# %%
vector = parameters_to_vector(last.direction.vector.values())
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
             measured=seen / eta_star, tolerance=0.01, rules_out={"without the 2": 0.5}, formulas=(88,))
print(f"η* = {eta_star:.2g}; the steps above were made with η = {eta}")

# %% [markdown]
# ## 4 · Pretending that $v$ is constant
#
# "We're going to pretend $v$ is constant", say the notes. The formulas of section 3 need no such pretence: with the
# *new* $v^t$ inserted they are exact, as a decomposition of a step that was taken. But $v^t$ contains $(g^t)^2$, so the
# step is not linear in $g^t$, and a share is not a sensitivity. Let the newest gradient be multiplied by $s$. Then, at
# $s=1$ <a id="09.16" href="#ledger-09.16">[09.16]</a>,
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
# does not care for the size of a gradient <a id="09.17" href="#ledger-09.17">[09.17]</a>.

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
table.round(3) + 0.0

# %%
gap = (table["share"] + table["taken back by v"] - table["true derivative"]).abs().max()
ledger.holds("09.16", "derived here", "dδH₁/ds is the share less what v takes back (largest gap over the steps)",
             measured=gap, expected=0, tolerance=1e-9, source="deltah")
ledger.corrected("09.17", "2.7", "v may be taken as constant: what δH₁ gains per unit of a gradient's size, over its "
                 "share, at the first step", correction="after some 1/(1−β₂) steps: at the first, v takes all back",
                 measured=table["true derivative"].iloc[0] / table["share"].iloc[0], expected=0, as_printed=1,
                 tolerance=1e-4)
print("ρ at steps 1, 10, 100, 1000, 10000:", *(
    f"{(1 - beta2) / (1 - beta2**t) * (1 - beta1**t) / (1 - beta1):.3f}" for t in (1, 10, 100, 1000, 10000)))

# %% [markdown]
# With time the pretence becomes a good one: once $v$ has seen some $1/(1-\beta_2)$ steps, a single gradient is a
# hundredth part of its influence on $m$. To see both ends we double one response's gradient, each of the 60 in turn,
# and compare what $\delta\mathcal H_1$ gains with the response's share: at the first step, at the fifth, and at the
# fifth again as if the same $m$ and $v$ had come out of a thousand steps: these are not made, only the newest
# gradient's weights in $m$ and $v$ are those of the thousandth
# <a id="09.32" href="#ledger-09.32">[09.32]</a>.

# %%
doubled, slopes = {}, {}
for label, t, count in (("first step", 0, 1), ("fifth step", 4, 5), ("as if after 1000 steps", 4, 1000)):
    v, w1, w2 = versions[t], (1 - beta1) / (1 - beta1**count), (1 - beta2) / (1 - beta2**count)
    extra = (v.pi * v.A)[:, None] * v.scores
    squares = v_hat[t] + w2 * ((g[t] + extra).square() - g[t].square())
    after = (m[t] + w1 * extra) / (squares.sqrt() + epsilon)
    gained, share = (after - m[t] / own_roots[t]) @ v.grad_H, (w1 * extra / own_roots[t]) @ v.grad_H
    doubled[label], slopes[label] = (share, gained), float(share @ gained / (share @ share))
    print(f"{label:24} gain against share: slope {slopes[label]:+.2f}, "
          f"correlation {float(torch.corrcoef(torch.stack([share, gained]))[0, 1]):+.2f}")
ledger.holds("09.32", "2.7", "v may be taken as constant as if after 1000 steps, with m and v of the fifth and the "
             "newest gradient's weights at the 1000th: gain over share (slope)", expected=1, tolerance=0.02,
             measured=slopes["as if after 1000 steps"], rules_out={"zero": 0, "half": 0.5})

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
# To start with, the notes want to keep the preconditioner only, "which i guess is RMSPROP". Its rule,
# $\delta\theta=-\eta\,g/(\sqrt v+\epsilon)$, has the $v$ *without* normalisation. So AdamW with $\beta_1=0$ and
# $\lambda=0$ is RMSprop with $\eta\sqrt{1-\beta_2^t}$ for $\eta$ and $\epsilon\sqrt{1-\beta_2^t}$ for $\epsilon$,
# neither of which stays constant <a id="09.18" href="#ledger-09.18">[09.18]</a>. We run PyTorch's own two optimizers on
# our five gradients.

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
ledger.corrected("09.18", "2.7", "AdamW without momentum and weight decay is RMSprop (ratio of RMSprop's step to it)",
                 correction="up to 1/√(1−β₂ᵗ), since RMSprop's v is not normalised, and ε√(1−β₂ᵗ) for ε",
                 measured=by_rms.norm() / by_adam.norm(), expected=1 / factor, as_printed=1, tolerance=1e-9)
print(f"RMSprop's fifth step is {by_rms.norm() / by_adam.norm():.1f} times as long; after 5000 steps it would be "
      f"{1 / math.sqrt(1 - beta2**5000):.3f} times")

# %% [markdown]
# The difference is one number for all parameters, a warm-up in reverse. It has no influence on any direction or on the
# structure of the kernel, and it is gone after a few thousand steps; the guess is right in spirit.

# %% [markdown]
# ## 6 · May one ignore momentum?
#
# ### Where everything is exact
#
# "I suspect any qualitative lessons will not be very different if we ignore momentum." So we set against the step the
# *same* preconditioner on the newest gradient alone, at full weight,
# $\delta\theta=\eta\,g^t/(\sqrt{\hat v^t}+\epsilon)$. On the enumerable policy nothing is sampled, so this is the mean
# effect of a batch. The five steps are made again at several learning rates, and the fifth is compared.

# %%
rows, rates = [], (5e-3, 5e-4, 5e-5, 5e-6, 5e-7, 5e-8)
for rate in rates:
    vector_to_parameters(theta_start.clone(), tiny.parameters.values())
    optimizer = torch.optim.AdamW(tiny.parameters.values(), lr=rate, betas=betas, eps=epsilon,
                                  weight_decay=weight_decay)
    g = []
    for _ in range(T):
        log_probs = dh.score(tiny, responses).log_probs.sum(1)
        pi = log_probs.detach().exp() / D
        A = rewards - (D * pi * rewards).view(D, N).sum(1).repeat_interleave(N)
        grad_H = flat_gradient(tiny, -(log_probs.exp() * log_probs).sum() / D)
        g.append(flat_gradient(tiny, (pi * A) @ log_probs))
        for p, minus_g in zip(tiny.parameters.values(), (-g[-1]).split(sizes), strict=True):
            p.grad = minus_g.view_as(p)
        optimizer.step()
    g = torch.stack(g)
    root = (W2[-1] @ g.square()).sqrt() + epsilon
    rows.append([f"{rate:.0e}", *(float(grad_H @ (x / root)) for x in (W1[-1] @ g, g[-1]))])

# %%
momentum = pd.DataFrame(rows, columns=["η", "with momentum", "newest alone"]).set_index("η")
momentum["newest over whole"] = momentum["newest alone"] / momentum["with momentum"]
momentum.round(3)

# %% [markdown]
# As $\eta\to0$ the ratio goes to one, which it must: a policy that does not move has one gradient, and $m=g$. So the
# conjecture is right about means in a limit, and the limit has a meaning: nothing may change over the memory of $m$,
# some ten steps. Old gradients then are what a new one would be. Where five steps change the entropy by much, as
# in section 1, the newest gradient alone has quite another effect than the step.
#
# ### A real run
#
# Now the shipped policy, trained with AdamW on GRPO's loss, with fresh prompts for each step. Batch U makes the step.
# Batch E, other prompts with one response each, looks at it before it is taken. Each half of E by itself gives the
# gradient of the entropy (chapter 06),
#
# $$ u=\frac1n\sum_i\sum_k(F_k-b_k)\,\partial S_k+\partial H_k,\qquad F_k=\sum_{j>k}H_j, $$
#
# with the mean of $F_k$ over the half's other responses for $b_k$. Then $u\cdot v$ is $\delta\mathcal H_1/\eta$ along
# the whole step, and $u\cdot(P\circ g^{t'})$ is what the gradient of any earlier step does now. What one half says,
# multiplied by what the other says, is free of either's noise on average. So effects are told from errors below.
# All entropies are of whole responses, and all changes are in thousandths of a nat, at the learning rate of the run.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
B_U, half = update_prompts, evaluation_prompts // 2
optimizer = torch.optim.AdamW(policy.parameters.values(), lr=learning_rate, betas=betas, eps=epsilon,
                              weight_decay=weight_decay)
sizes = [p.numel() for p in policy.parameters.values()]
prompt = torch.cat([torch.arange(B_U).repeat_interleave(8), torch.arange(B_U, B_U + 2 * half)])
batches = {"U": slice(8 * B_U), "E1": slice(8 * B_U, 8 * B_U + half), "E2": slice(8 * B_U + half, None)}
unit, history, run = 1e3 * learning_rate, [], []
print(f"{sum(sizes):,} parameters; {steps} steps, U: {B_U} prompts, 8 responses each, E: 2 × {half} prompts, one each")

# %%
for t in range(steps):
    rows = [(t * (B_U + 2 * half) + int(n)) % len(table) for n in prompt]
    drawn = dh.sample(policy, table.select(rows), 1, max_new_tokens, seed=1000 * seed + t)
    update, *halves = (drawn.replace(prompt_index=prompt.to(policy.device)).select(s) for s in batches.values())
    direction = dh.update_direction(policy, update, "grpo", optimizer=optimizer)
    whole, newest = (parameters_to_vector(x.values()) for x in (direction.vector, direction.parts["rollouts"]))
    u = []
    for E in halves:
        log_probs, entropies = dh.score(policy, E)
        to_go = (entropies.flip(1).cumsum(1).flip(1) - entropies).detach()
        advantage = (to_go - to_go.mean(0)) * half / (half - 1)
        u.append(flat_gradient(policy, (advantage * log_probs + entropies).sum() / half))
    u, weight = unit * torch.stack(u), (1 - beta1) / (1 - beta1 ** (t + 1))
    P = parameters_to_vector(direction.preconditioner.values()) / weight
    history.append(newest / P / weight)
    run.append(SimpleNamespace(whole=u @ whole, effects=torch.stack([(u * P) @ g for g in history[::-1]]), measured=[
        dh.measured_entropy_change(policy, E, direction, [learning_rate, learning_rate / 10], "sequence")["change"]
        for E in halves] if t % 4 == 0 else None, cosine=float(torch.cosine_similarity(whole, newest, dim=0))))
    for p, minus_g in zip(policy.parameters.values(), (-history[-1]).split(sizes), strict=True):
        p.grad = minus_g.view_as(p)
    optimizer.step()

# %% [markdown]
# Everything below is made of tables over steps: the whole step's first-order change, that of the newest gradient alone
# at full weight, that of every older one, and the measurement, on every fourth step, with importance weights at the
# learning rate and at a tenth of it. `cross` multiplies what the two halves say, past the first step, whose past is
# empty.

# %%
whole, newest = (torch.stack(x).double().cpu() for x in ([r.whole for r in run], [r.effects[0] for r in run]))
weights = torch.tensor([(1 - beta1) / (1 - beta1 ** (t + 1)) for t in range(steps)], dtype=torch.float64)[:, None]
earlier = whole - weights * newest
at_rate, at_tenth = (1e3 * torch.tensor([[float(E[k]) for E in r.measured] for r in run[::4]]).flatten()
                     for k in (0, 1))
predicted = whole[::4].flatten()

def cross(x, y):
    return (x * y.flip(1)).mean(1)[1:]

# %% [markdown]
# Does first order hold at the learning rate of the run? The step's change is set against the prediction on the same
# rollouts <a id="09.20" href="#ledger-09.20">[09.20]</a>, and against ten times the change at a tenth of the step
# <a id="09.22" href="#ledger-09.22">[09.22]</a>. Both pairs share their rollouts and so their noise. That is meant:
# the question here is whether one function of the parameters is straight, not how well it is known. The two halves of
# a step share its direction, so that steps are the independent samples. Weights that are normalised by their own mean
# over $n$ rollouts see $1-1/n$ of the prediction, which is expected of the first pair.

# %%
rivals = {"zero": 0.0, "half": 0.5, "twice": 2.0, "the other sign": -1.0}
of_step = torch.arange(len(predicted)) // 2
slopes = {name: dh.Estimate.ratio(at_rate * x.sign(), x.abs(), of_step)
          for name, x in (("predicted", predicted), ("ten times the change at η/10", 10 * at_tenth))}
ledger.holds("09.20", "2.7", "an AdamW step changes the entropy as first order predicts (measured over predicted)",
             measured=slopes["predicted"], expected=1 - 1 / half, rules_out=rivals)
ledger.holds("09.22", "2.1.1", "linear order is a good enough estimate of the change per step, at this learning rate "
             "(measured over ten times that at η/10)", measured=slopes["ten times the change at η/10"], expected=1.0,
             rules_out=rivals)
pd.Series(slopes, name="measured change over it").to_frame()

# %% [markdown]
# ### Whose doing was it?
#
# What part of a step's entropy change, in mean square over steps, comes from earlier gradients
# <a id="09.27" href="#ledger-09.27">[09.27]</a>? And does the newest batch alone, at full weight, scatter more than the
# step, as one batch does beside a mean of several <a id="09.25" href="#ledger-09.25">[09.25]</a>? The step's direction
# has no noise: it is what the optimizer does. If the gradients of batches were orthogonal and of one length, its cosine
# with the newest gradient's part would go to $\sqrt{1-\beta_1^2}$, about 0.44, and the part of its squared length that
# lies elsewhere to $\beta_1^2$, about 0.81 <a id="09.26" href="#ledger-09.26">[09.26]</a>.

# %%
past_share = dh.Estimate.ratio(cross(earlier, whole), cross(whole, whole))
scatter = dh.Estimate.mean((cross(newest, newest) - cross(whole, whole)) / cross(whole, whole).mean())
elsewhere = dh.Estimate.mean(1 - torch.tensor([r.cosine for r in run[10:]], dtype=torch.float64).square())
ledger.holds("09.27", "derived here", "a step owes most of its entropy change to the past (share in mean square)",
             measured=past_share, expected=(0.5, math.inf), rules_out=0.5, source="deltah")
ledger.holds("09.25", "derived here", "the newest batch alone changes the entropy more than the step does (mean "
             "squares, excess over the step's)", measured=scatter, expected=(0.0, math.inf), rules_out=0.0,
             source="deltah")
ledger.holds("09.26", "derived here", "a step points mostly elsewhere than its newest gradient (1 − cos², after ten "
             "steps)", measured=elsewhere, expected=(0.5, math.inf), rules_out=0.5, source="deltah")
noise = 1 - cross(newest, newest).mean() / newest.mean(1)[1:].square().mean()
print(f"share of the past {past_share}; excess of the newest alone {scatter}; direction elsewhere {elsewhere}")
print(f"of what one sees of the newest batch alone, {float(noise):.0%} of the mean square is noise of E")

# %% [markdown]
# Now the conjecture itself. It is right about means if a gradient has the same effect on the entropy when it is old as
# when it is new. Every gradient is compared with itself: its effect at its own step, and the mean of its effects at the
# next seven, of which the optimizer still remembers half. First the mean over gradients, older to newest
# <a id="09.34" href="#ledger-09.34">[09.34]</a>. Then what is left of a gradient's own effect, whichever sign it has:
# the mean product of old and new effect over the mean square of the new, again across halves
# <a id="09.35" href="#ledger-09.35">[09.35]</a>.

# %%
aged = torch.stack([torch.stack([run[t + age].effects[age] for age in range(1, 8)]) for t in range(1, steps - 7)])
aged, new = aged.double().cpu(), newest[1:steps - 7]
mean_left = dh.Estimate.ratio(aged.mean((1, 2)), new.mean(1))
kept = dh.Estimate.ratio(aged.mean((1, 2)) * new.mean(1), new.prod(1))
ledger.holds("09.34", "2.7", "ignoring momentum leaves means as they are: a gradient's mean effect one to seven steps "
             "later is the same (older over newest)", measured=mean_left, expected=1.0, rules_out={"gone": 0.0})
ledger.holds("09.35", "derived here", "a gradient keeps its effect on the entropy (what is left, mean of the next "
             "seven steps)", measured=kept, expected=1.0, rules_out={"gone": 0.0, "half": 0.5}, source="deltah")
print(f"mean effect of a gradient in 10⁻³ nats: new {dh.Estimate.mean(new.mean(1))}, "
      f"one to seven steps old {dh.Estimate.mean(aged.mean((1, 2)))}; what is left of an effect: {kept}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
shared = torch.stack([cross(whole, whole).mean(), cross(newest, newest).mean()])
total = torch.stack([whole.mean(1)[1:].square().mean(), newest.mean(1)[1:].square().mean()])
left.bar([0, 1], shared, 0.6, color="C0", label="both halves of E agree on it", edgecolor="white")
left.bar([0, 1], total - shared, 0.6, bottom=shared, color="C1", hatch="//", label="noise of E", edgecolor="white")
left.set(xticks=[0, 1], xticklabels=["the step", "newest batch alone"], ylabel="mean square, (10⁻³ nats)²",
         title="How much of it both halves of E see")
by_age = [dh.Estimate.ratio(aged[:, a].mean(1) * new.mean(1), new.prod(1)) for a in range(7)]
dh.figures.estimates(right, range(1, 8), by_age, 0, "measured, 95% intervals")
right.axhline(1, color="C1", linestyle="--", label="an effect that does not age")
right.axhline(0, color="0.4", linewidth=1)
right.set(xlabel="age of the gradient, steps", ylabel="what is left of its effect",
          title="What a gradient's age does is not decided")
for axes in (left, right):
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
dh.figures.save(figure, results, "09-ages")

# %% [markdown]
# *Left: mean square of the first-order entropy change over the steps of the run, of the whole step and of the newest
# gradient alone at full weight; most of the latter is noise of E. Right: the effect of gradients one to seven steps
# later, relative to their own step.*

# %%
figure, axes = plt.subplots(figsize=(9, 4.4))
number = torch.arange(1, steps + 1)
for i, (label, values) in enumerate({"the step": whole, "newest batch alone": newest}.items()):
    values = values.cpu()
    axes.errorbar(number + 0.2 * i, values.mean(1), yerr=(values[:, 0] - values[:, 1]).abs() / 2, color=f"C{i}",
                  marker=dh.figures.MARKERS[i], markersize=4, linestyle=("-", "none")[i], linewidth=1, label=label)
axes.axhline(0, color="0.4", linewidth=1)
axes.set(xlabel="step", ylabel="first-order entropy change, 10⁻³ nats",
         title="The step, and what its newest batch alone would do")
axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
dh.figures.save(figure, results, "09-run")

# %% [markdown]
# *First-order change at every step of the run, and what it would be for a step made of the newest gradient alone. The
# bars end at what each half of E says by itself.*
#
# So what survives? The direction of a step is four fifths elsewhere than its newest gradient's. First order holds at
# this learning rate. Of the *entropy*, the run's data leave open whether most of a step's change comes from the past,
# whether the newest batch alone would do more, and whether a gradient's effect ages: a few steps, of which one half of
# E sees much and the other little, decide the mean squares, and what one sees of the newest batch alone is mostly the
# noise of E. A larger batch E would help before more steps do; the ledger says how many of these would.

# %% [markdown]
# ## 7 · Does the preconditioner change the kernel?
#
# The notes' other conjecture: conditioning factors matter, "though maybe it doesn't make much of a difference in the
# structure of fisher kernel". At the last step of the run, how different are the factors?

# %%
inverse = 1 / P
spread = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=P.dtype, device=P.device)
levels = inverse.sort().values[(spread * (len(inverse) - 1)).long()]
print("√v + ε at its 1, 10, 50, 90, 99% quantiles:", *(f"{float(x):.0e}" for x in levels))
print(f"share of parameters with √v below ε: {float((inverse < 2 * epsilon).double().mean()):.0%}")

# %% [markdown]
# They span orders of magnitude. The smallest belong to embeddings of tokens that no batch has used so far: there
# $\epsilon$ alone is in the denominator, and their $P$ is the largest that there can be, until a batch uses the token.
#
# Now the kernel, with and without $P$, of new responses from the policy as it is: groups of eight, U, and single ones
# to other prompts, E. Pairs of E with U are what $\delta\mathcal H_1$ is made of. As in chapter 03 the entries are
# compared as cosines, since the scale of $P$ is a matter of the learning rate; identical responses are left out. Each
# prompt of U is paired with three of E that no other is paired with, so that prompts of U are independent samples.

# %%
D_U, start = kernel_prompts, steps * (B_U + 2 * half)
prompt = torch.cat([torch.arange(D_U).repeat_interleave(8), torch.arange(D_U, 4 * D_U)])
drawn = dh.sample(policy, table.select([(start + int(n)) % len(table) for n in prompt]), 1, max_new_tokens, seed=seed)
cosine = {}
for name, shape in (("plain", None), ("with P", direction.preconditioner)):
    K = dh.fisher_kernel(policy, drawn, preconditioner=shape).double().cpu()
    cosine[name] = K * K.diagonal().rsqrt() * K.diagonal().rsqrt()[:, None]
group = torch.cat([prompt[:8 * D_U], torch.arange(3 * D_U) // 3])
in_U = torch.arange(len(prompt)) < 8 * D_U
distinct = torch.ones(len(prompt), len(prompt)).triu(1).bool() & (cosine["plain"] < 1 - 1e-6)
same = distinct & (group[:, None] == group)
kinds = {"U with U, same prompt": same & in_U[:, None] & in_U, "E with U": same & (in_U[:, None] != in_U)}

# %% [markdown]
# The correlation of the entries with and without $P$ is taken in each kind of pair
# <a id="09.28" href="#ledger-09.28">[09.28]</a> <a id="09.29" href="#ledger-09.29">[09.29]</a>. The other feature of
# the structure is its blocks: entries within a prompt are larger than those with other prompts, also with $P$
# <a id="09.30" href="#ledger-09.30">[09.30]</a>.

# %%
rows = {}
for (kind, mask), id in zip(kinds.items(), ("09.28", "09.29"), strict=True):
    x, y = (C[mask] for C in cosine.values())
    clusters = group[mask.nonzero()[:, 0]]
    moments = torch.stack([x, y, x * x, y * y, x * y], 1)
    correlation = dh.Estimate.smooth(
        lambda e: (e[4] - e[0] * e[1]) / ((e[2] - e[0] ** 2) * (e[3] - e[1] ** 2)).sqrt(), moments, clusters)
    rows[kind] = {"pairs": len(x), "correlation": correlation, "same sign": dh.Estimate.mean(
        (x * y > 0).double(), clusters), "mean |cosine|, plain": round(float(x.abs().mean()), 2),
        "with P": round(float(y.abs().mean()), 2)}
    ledger.holds(id, "2.1.1", f"P makes little difference to K's structure, {kind}: correlation of its entries with "
                 "and without, above 0.5", measured=correlation, expected=(0.5, math.inf),
                 rules_out={"half": 0.5, "none": 0})
C, inside, between = cosine["with P"].abs(), *kinds.values()
excess = torch.stack([C[inside & (group == n)].mean() - C[between & (group == n)].mean() for n in range(D_U)])
ledger.holds("09.30", "2.1.1", "with P too, entries within a prompt are larger than with another's (mean |cosine|, "
             "difference)", measured=dh.Estimate.mean(excess), expected=(0.0, math.inf), rules_out=0.0)
pd.DataFrame(rows).T

# %%
figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2))
for axis, (name, C) in zip(axes, cosine.items(), strict=False):
    image = axis.imshow(C, cmap="PuOr", vmin=-1, vmax=1)
    for edge in [*range(8, 8 * D_U, 8), 8 * D_U]:
        axis.axhline(edge - 0.5, color="0.3", linewidth=2 if edge == 8 * D_U else 0.5)
        axis.axvline(edge - 0.5, color="0.3", linewidth=2 if edge == 8 * D_U else 0.5)
    axis.set(xticks=[4 * D_U, 9.5 * D_U], yticks=[4 * D_U, 9.5 * D_U], xticklabels=["U", "E"], yticklabels=["U", "E"],
             xlabel="response", ylabel="response", title=f"K, {name}")
    axis.grid(False)
figure.colorbar(image, ax=axes[:2], label="cosine of two gradients", shrink=0.8)
for i, (kind, mask) in enumerate(kinds.items()):
    axes[2].scatter(cosine["plain"][mask], cosine["with P"][mask], s=14, alpha=0.6, color=f"C{i}",
                    marker=dh.figures.MARKERS[i], label=kind)
axes[2].axline((0, 0), slope=1, color="0.3", linewidth=1)
axes[2].set(xlabel="cosine, plain", ylabel="cosine, with P", title="Entry by entry")
axes[2].legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))
dh.figures.save(figure, results, "09-kernel")

# %% [markdown]
# *The kernel without and with AdamW's preconditioner, and its entries off the diagonal against each other. Lines
# separate the prompts of U, eight responses each; the thick one separates U from E, one response a prompt.*
#
# The blocks stay, and so do most signs and most of the order among entries. Whoever wants to know which rollouts pull
# together may leave $P$ out; whoever wants the size of an effect may not.
#
# ## The remaining equations
#
# `update_direction` splits a step as section 2 does: `preconditioner` is $\alpha_t$, the notes' $P$ in
# $\delta\theta\to\eta P\,\partial J$, and its three parts are $\alpha g$, $\beta m$ and $-\lambda\theta$
# <a id="09.5" href="#ledger-09.5">[09.5]</a>. And on the transformer the effects of all gradients, each with its
# weight, and of weight decay sum to the whole step's, as formula 96 says
# <a id="09.23" href="#ledger-09.23">[09.23]</a>.

# %%
named = {name: parameters_to_vector(part.values()) for name, part in last.direction.parts.items()}
ledger.holds("09.5", "derived here", "update_direction's three parts are αg, βm and −λθ (largest gap, relative)",
             measured=max((named[k] - by_hand[k]).abs().max() / vector.abs().max() for k in named), expected=0,
             tolerance=1e-10, source="deltah")
by_age = beta1 ** torch.arange(steps).to(u) @ run[-1].effects.to(u) * weight
decay = u @ parameters_to_vector(direction.parts["weight_decay"].values())
ledger.holds("09.23", "2.7", "on the transformer, the old gradients' shares and weight decay sum to δH₁ (larger gap, "
             "relative)", measured=(by_age + decay - run[-1].whole.to(u)).abs().max() / run[-1].whole.abs().max(),
             expected=0, tolerance=max(1e-6, 1e5 * torch.finfo(policy.dtype).eps))


# %% [markdown]
# ## What stands
#
# The printed step is AdamW's, when $v$ is normalised like $m$; the first-order change follows exactly, with today's $v$
# under all gradients, old ones too, and the nonlocal kernel once each step has its weight. A constant $v$ is a fiction
# that the split does not need; but whoever reads shares as sensitivities needs it, and early in training it is false.
# RMSprop is the momentum-free version up to one factor for all parameters.
#
# Ignoring momentum is right for means as long as little changes within its memory, and wrong for the direction of a
# step: momentum averages over batches whose gradients are close to orthogonal. What that does to the entropy change of
# a single step, this run does not decide.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Set $\beta_1=0$ in the parameters. Which ledger entries must fail, and why?
# 2. Plot what is left of a gradient's effect for a longer run and up to age thirty. At which age does a gradient stop
#    having an effect, and does that depend on the learning rate?
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
