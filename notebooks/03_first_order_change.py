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
# # 03 · First-order change
#
# One step of policy gradient changes the entropy of a policy's responses, to first order, by a product of two
# gradients: a sum over pairs of responses, joined by a kernel. This chapter settles which of the printed forms of that
# sum are exact, what the noise of a sampled step adds, how far the kernel is from diagonal, and how much of the change
# the covariances of single tokens see.
#
# ## In short
#
# - **The chain from (1) to the kernel form is right**, for every response and every group. Two of its uses need a
#   correction: the printed form for several prompts lacks the pairs *between* prompts and the entropy's average over
#   prompts (on four tiny prompts 9.09 nats per unit of learning rate; with the pairs 12.92, with the average too the
#   right 3.23), and GRPO's own-mean advantage shrinks the step by $(G-1)/G$.
# - **No policy's kernel is diagonal**: $\sum_t\pi(t)K(t,t')=0$. On the shipped policy the gradients of different
#   responses to a prompt have a mean |cosine| of 0.34 ± 0.03, where random ones would have 0.001. On balance they
#   oppose each other, as they then must (mean cosine −0.15 ± 0.05).
# - **Covariances of tokens see only the change at fixed prefixes**, on the shipped policy a share of 0.01 ± 0.09 of
#   the whole first-order change, −2.1 ± 0.5 nats per unit of learning rate. The rest is the *entropy to go*: other
#   prefixes. With other rollouts and updates, of ten other seeds, the share was between −0.8 and 0.2. On seven of them
#   it was less than half beyond doubt: not decided [03.43](#ledger-03.43).
# - **Atypical responses cannot be left out.** The least typical tenth of the probability holds 53% of the change on
#   a tiny policy.
# - **What to do.** Average over pairs of responses of all prompts; multiply by $G/(G-1)$ where the baseline is the
#   group's own mean; and before trusting the covariance of tokens as a sign of collapse, add the entropy to go.
#
# **What is checked**
#
# | statement | source | verdict |
# |---|---|---|
# | the entropy and its gradient | notes | holds [03.1](#ledger-03.1) [03.3](#ledger-03.3) [03.4](#ledger-03.4) |
# | the policy gradient, for a fixed $A$ | notes 2, 2.1 | holds [03.5](#ledger-03.5) |
# | $\delta\mathcal H$ of an exact and a noisy step | notes 2.1 | holds [03.9](#ledger-03.9), [03.12](#ledger-03.12) |
# | on expectation the same | notes 2.1 | holds [03.10](#ledger-03.10) |
# | the same, with GRPO's $A$ | notes 2.1 | holds with a correction [03.11](#ledger-03.11) |
# | $A$ is already baseline subtracted | notes 2.1 | holds with a correction [03.39](#ledger-03.39) |
# | kernel; $\delta\log\pi(t)$ | notes | holds [03.15](#ledger-03.15) [03.16](#ledger-03.16) [03.37](#ledger-03.37) |
# | $F=ww^T$ | notes 2.1 | holds with a correction [03.18](#ledger-03.18) |
# | the form for several prompts | notes 2.1 | holds with a correction [03.20](#ledger-03.20) |
# | $K$ is likely not diagonal, and blocky | notes 2.1 | holds [03.22](#ledger-03.22), [03.35](#ledger-03.35) |
# | studied on the transformer: its own entry does not explain how a response moves | notes 2.1 | not decided by these data [03.36](#ledger-03.36) |
# | diagonal $K$: $\mathrm{Cov}(S,A)$ | notes 2.1 | holds with a correction [03.27](#ledger-03.27) |
# | the same, for a constant diagonal | notes 2.1 | refuted [03.28](#ledger-03.28) |
# | most sequences are junk | notes 2.1 | holds [03.40](#ledger-03.40) |
# | atypical ones can be ignored | notes 2.1 | refuted [03.41](#ledger-03.41) |
# | the covariance of probability and change in logits | 2505.22617 | holds with a correction [03.30](#ledger-03.30) |
# | it matches the entropy difference exactly | 2505.22617 | holds with a correction [03.32](#ledger-03.32) |
# | it sees less than half of the change | our own | not decided by these data [03.43](#ledger-03.43) |
#
# **You need** gradients of expectations, and chapter 02's two ways to write the entropy. **You will learn** why no
# softmax policy has a diagonal kernel, what the token-level covariance leaves out, and which responses moved a given
# one.

# %%
import math

import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch.nn.utils import vector_to_parameters

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
prompts_in_batch = 16             # B
responses_per_prompt = 8          # G
max_new_tokens = 64
update_prompts = 64               # the update of section 12, whose first B prompts make the kernel
evaluation_prompts = 128          # fresh ones that judge it, 8 responses each

# %%
ledger = dh.Ledger("03", source="notes", seeds="../data/seeds",
                   stated=(model, problems, seed) == ("../data/policy", "../data/problems", 0))
mechanism = "arXiv 2505.22617"

# %% [markdown]
# ## 1 · The gradient of the entropy
#
# We start where every expectation is a sum: a random transformer over three tokens, of which token 2 ends a response,
# one prompt, and all its responses of at most three tokens. The notes fix the length of a response; nothing below
# needs that, as long as $t$ is a whole response. With $S(t)=\log\pi(t|p)$ the entropy is
#
# $$ \mathcal H=-\mathbb E_{t\sim\pi(\cdot|p)}[\log\pi(t|p)]=-\mathbb E[S]. $$
#
# We compare it with the expected sum of the next-token entropies, which the model computes without any response's
# probability <a id="03.1" href="#ledger-03.1">[03.1]</a>.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=2)
responses = dh.exact.every_response(tiny, [[0, 0, 1]], max_new_tokens=3)
scores = dh.score(tiny, responses)
log_probs, N = scores.log_probs.sum(1), len(responses)
S, pi = log_probs.detach(), log_probs.detach().exp()
H = -(log_probs.exp() * log_probs).sum()
print(f"{N} responses, probabilities {pi.min():.4f} to {pi.max():.3f}, entropy {H:.4f} nats")
ledger.holds("03.1", "2", "H = −E[log π(t|p)], the expected sum of next-token entropies", formulas=(1,), rules_out=0,
             measured=H.detach(), expected=pi @ scores.entropies.detach().sum(1), tolerance=1e-10)

# %% [markdown]
# A step $\delta\theta$ changes it by
#
# $$ \delta\mathcal H\approx\sum_\alpha\partial_\alpha\mathcal H\,\delta\theta_\alpha
#    =-\sum_\alpha\delta\theta_\alpha\,\partial_\alpha\sum_t\pi\log\pi
#    =-\sum_\alpha\delta\theta_\alpha\sum_t\partial_\alpha\pi\log\pi
#    =-\sum_\alpha\delta\theta_\alpha\,\mathbb E[\log\pi\,\partial_\alpha\log\pi], $$
#
# equations (1) to (4) of the notes: the second and third are <a id="03.3" href="#ledger-03.3">[03.3]</a>, the last is
# <a id="03.4" href="#ledger-03.4">[03.4]</a>, and the first waits for a step to be taken, in section 3. The product
# rule would leave another term, $\sum_t\pi\,\partial_\alpha\log\pi$. It is $\sum_t\partial_\alpha\pi$, the derivative
# of one <a id="03.2" href="#ledger-03.2">[03.2]</a>. We differentiate three things: the entropy, every $\pi(t)$ and
# every $S(t)$. The last make a matrix with one row for each response, $w^T$ in the notes.

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in log_probs])
grad_pi = torch.stack([flat_gradient(tiny, p) for p in log_probs.exp()])
grad_H = flat_gradient(tiny, H)
print(f"gradients: {list(gradients.shape)}")

# %%
ledger.holds("03.2", "2.1", "Σ_t ∂π(t) = 0 (largest component)", measured=grad_pi.sum(0).abs().max(), expected=0,
             tolerance=1e-10, rules_out={"one response's": float(grad_pi[0].abs().max())})
ledger.holds("03.3", "2.1 (2), (3)", "∂H = −∂ Σ π log π = −Σ ∂π log π (largest gap)", formulas=(6, 7),
             measured=(grad_H + S @ grad_pi).abs().max(), expected=0, tolerance=1e-10,
             rules_out={"the other sign": float((grad_H - S @ grad_pi).abs().max())})
ledger.holds("03.4", "2.1 (4)", "∂H = −E[log π ∂ log π] (largest gap)", formulas=(8, 9),
             measured=(grad_H + (pi * S) @ gradients).abs().max(), expected=0, tolerance=1e-10,
             rules_out={"the other sign": float((grad_H - (pi * S) @ gradients).abs().max())})

# %% [markdown]
# ## 2 · The gradient of the objective
#
# Training climbs $J=\mathbb E_{t\sim\pi}[A(t)]$, the expected advantage:
#
# $$ \theta_\alpha\to\theta_\alpha+\delta\theta_\alpha=\theta_\alpha+\eta\,\partial_\alpha J,\qquad
#    \partial_\alpha J=\partial_\alpha\sum_t\pi(t)A(t)=\sum_t\pi\,\frac{\partial_\alpha\pi}{\pi}\,A
#    =\mathbb E[\partial_\alpha\log\pi(t)\,A(t)]. $$
#
# Let the reward be the number of ones in a response, and $A=R-\mathbb E[R]$ for now. In $J$ the advantage has to be a
# fixed number for each response <a id="03.5" href="#ledger-03.5">[03.5]</a>. If one differentiates through the baseline
# as well, $J=\mathbb E[R-\mathbb E[R]]$ is zero for every $\theta$, and so is its gradient. We measure $\partial J$
# along the formula, relative to the formula's own length: one if it is right, zero for the other reading.

# %%
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
A, differentiable_pi = rewards - pi @ rewards, log_probs.exp()
grad_J, exact_weights = flat_gradient(tiny, differentiable_pi @ A), pi * A
through = flat_gradient(tiny, differentiable_pi @ (rewards - differentiable_pi @ rewards))
formula = exact_weights @ gradients
along_formula = [round(float(gradient @ formula / formula.square().sum()), 12) for gradient in (grad_J, through)]
print(f"|∂J| = {grad_J.norm():.2f}; largest gap zero to ten decimals: {(grad_J - formula).abs().max() < 1e-10}")
ledger.holds("03.5", "2", "J = E[A]: ∂J = ∂ Σ π A = E[∂ log π A] for a fixed A (∂J along the formula, relative)",
             measured=along_formula[0], expected=1, tolerance=1e-10, formulas=(3, 10),
             rules_out={"differentiated through A": along_formula[1], "the other sign": -1})

# %% [markdown]
# ## 3 · One exact step
#
# Put together, the step along the exact policy gradient changes the entropy by
#
# $$ \delta\mathcal H=-\eta\sum_\alpha\mathbb E[\log\pi\,\partial_\alpha\log\pi]\times
#    \mathbb E[\partial_\alpha\log\pi\,A]+\mathcal O(\eta^2) $$
#
# <a id="03.9" href="#ledger-03.9">[03.9]</a>. To see the order of the rest we take the step and look. For later we also
# need the curvature: products $\partial S(t)\cdot\nabla^2\mathcal H\,\partial S(t')$, one Hessian-vector product for
# each response, from a second backward pass through the exact entropy.

# %%
parameters = list(tiny.parameters.values())
with_graph = torch.cat([g.flatten() for g in torch.autograd.grad(H, parameters, create_graph=True)])
curvature = torch.stack([flat_gradient(tiny, with_graph @ g) for g in gradients]) @ gradients.T
first = float(-((pi * S) @ gradients) @ (exact_weights @ gradients))
second = float(exact_weights @ curvature @ exact_weights / 2)
print(f"δH = {first:+.3f} η {second:+.4g} η² + ...")

# %% [markdown]
# A noisy step is the subject of the next section; we measure it along with this one. It is made by a group of $G=2$
# responses, $\delta\theta=\frac\eta G\sum_iA(t_i)\,\partial S(t_i)$, and there are 120 groups, each with its
# probability. We hold a step as its weights over the 15 responses; the exact step has the weights $\pi A$.

# %%
G = 2
groups = torch.combinations(torch.arange(N), G, with_replacement=True)
group_pi = pi[groups].prod(1) * torch.where(groups[:, 0] == groups[:, 1], 1, 2)
noisy = torch.zeros(len(groups), N, dtype=torch.float64).scatter_add(1, groups, A[groups] / G)
steps = torch.cat([exact_weights[None], noisy])
print(f"{len(groups)} groups, probabilities sum to {group_pi.sum():.10f}")

# %% [markdown]
# Each step is taken forwards and backwards, at four learning rates. Half the difference of the two entropy changes has
# the odd orders only, half their sum the even ones.

# %%
direction = {name: torch.empty_like(p) for name, p in tiny.parameters.items()}
etas = torch.logspace(-5.5, -3, 4, dtype=torch.float64)
changes = torch.zeros(len(steps), len(etas), 2, dtype=torch.float64)
for row, weights in enumerate(steps):
    vector_to_parameters(weights @ gradients, direction.values())
    for column, eta in enumerate(etas):
        for side, sign in enumerate((1, -1)):
            with torch.no_grad():
                after = dh.score(tiny, responses, tiny.shifted(direction, sign * float(eta))).log_probs.sum(1)
            changes[row, column, side] = -(after.exp() * after).sum() - H.detach()
odd, even = (changes[..., 0] - changes[..., 1]) / 2 / etas, changes.mean(2) / etas**2

# %%
exact_change, mean_change = changes[0], torch.tensordot(group_pi, changes[1:], 1)
pd.DataFrame({"η": etas, "exact step": exact_change[:, 0], "first order": etas * first,
              "noisy steps, mean": mean_change[:, 0]}).map("{:.3g}".format)

# %% [markdown]
# At the smallest rate the odd part over $\eta$ is the formula's, and the even part over $\eta^2$ is
# $\frac12v\cdot\nabla^2\mathcal H\,v$ with $v=\partial J$ <a id="03.38" href="#ledger-03.38">[03.38]</a>: the rest is
# of the second order, as printed.

# %%
ledger.holds("03.9", "2.1", "δH = Σ ∂H δθ = −η E[log π ∂log π]·E[∂log π A] (measured change, relative to the formula)",
             measured=odd[0, 0] / first, expected=1, tolerance=1e-3, formulas=(2, 4, 5, 11),
             rules_out={"zero": 0, "half": 0.5, "the other sign": -1})
ledger.holds("03.38", "2.1", "the rest is O(η²): ½η² v·∇²H·v (measured, relative)", measured=even[0, 0] / second,
             expected=1, tolerance=1e-2, rules_out={"no second order": 0, "the other sign": -1})

# %% [markdown]
# ## 4 · One noisy step
#
# A training step has only a sample of the policy gradient. With $g^{\mathcal H}=-S\,\partial S$ and
# $g^J=A\,\partial S$ the notes write
#
# $$ \delta\mathcal H_1\to\eta\sum_\alpha\mathbb E_t[g^{\mathcal H}_\alpha(t)]\times
#    \frac1G\sum_{i=1}^Gg^J_\alpha(t_i), $$
#
# which is right for each of the 120 groups <a id="03.12" href="#ledger-03.12">[03.12]</a>. They say that on expectation
# this is the earlier line. It is <a id="03.10" href="#ledger-03.10">[03.10]</a>, for an advantage whose baseline does
# not depend on the sample. GRPO's does: $A_i=R_i-\bar R$ with the group's own mean. A response is then compared to
# itself in one part out of $G$, and the expected step, and with it $\delta\mathcal H_1$, shrinks by $(G-1)/G$
# <a id="03.11" href="#ledger-03.11">[03.11]</a>. Chapter 04 meets the same factor. For groups of two it is a half.

# %%
centred_rewards = rewards[groups] - rewards[groups].mean(1, keepdim=True)
grpo_steps = torch.zeros_like(noisy).scatter_add(1, groups, centred_rewards / G)
g_H = -S[:, None] * gradients
delta_H_1 = noisy @ gradients @ (pi @ g_H)
gaps = [float((odd[1:, 0] - sign * delta_H_1).abs().max() / delta_H_1.abs().max()) for sign in (1, 0, -1)]
ledger.holds("03.12", "2.1", "δH₁ = η Σ E[g^H] (1/G) Σ g^J(t_i) for every group (largest gap, relative)",
             formulas=(12,), measured=gaps[0], expected=0, tolerance=1e-3,
             rules_out={"zero": gaps[1], "the other sign": gaps[2]})
ledger.holds("03.10", "2.1", "E[δH₁] over groups is the exact step's δH₁, for A = R − E[R] (ratio)",
             measured=group_pi @ delta_H_1 / first, expected=1, tolerance=1e-10, rules_out={"(G−1)/G": (G - 1) / G})
ledger.corrected("03.11", "2.1", "E[δH₁] is the exact step's, for GRPO's A = R − R̄ (ratio)",
                 correction="(G−1)/G of it: the group's mean holds the response's own reward",
                 measured=group_pi @ (grpo_steps @ gradients @ grad_H) / first, expected=(G - 1) / G, as_printed=1,
                 tolerance=1e-10)

# %% [markdown]
# "That won't be true to second order": the step enters twice, and so does its noise. Expanding,
#
# $$ \mathbb E[\delta\mathcal H]=\delta\mathcal H(\text{mean step})
#    +\frac{\eta^2}2\,\frac{\mathrm{Tr}\big[\nabla^2\mathcal H\;\mathrm{Cov}(g^J)\big]}G+\mathcal O(\eta^3). $$
#
# The trace needs the curvature along single responses only. We hold it against the even part of the entropies measured
# above, averaged over groups <a id="03.13" href="#ledger-03.13">[03.13]</a>.

# %%
trace = float((pi * A**2) @ curvature.diagonal() - exact_weights @ curvature @ exact_weights)
from_noise = group_pi @ even[1:, 0] - even[0, 0]
ledger.holds("03.13", "2.1", "at second order noise adds: ½η² Tr[∇²H Cov(g^J)]/G (measured, relative)",
             measured=from_noise / (trace / (2 * G)), expected=1, tolerance=1e-2,
             rules_out={"zero": 0, "half": 0.5, "the other sign": -1})
print(f"second-order coefficient: exact step {second:.4g}, noisy steps {second + trace / (2 * G):.4g}")

# %%
figure, axes = plt.subplots()
for i, (label, change) in enumerate({"exact step": exact_change, "mean over noisy steps, G = 2": mean_change}.items()):
    axes.loglog(etas, (change[:, 0] - etas * first).abs(), color=f"C{i}", marker=dh.figures.MARKERS[i], label=label,
                linestyle="none")
coefficients = {"½|vᵀ∇²H v| η²": abs(second), "with Tr[∇²H Cov]/2G": abs(second + trace / (2 * G))}
for i, (label, coefficient) in enumerate(coefficients.items()):
    axes.loglog(etas, coefficient * etas**2, color=f"C{i}", linestyle=dh.figures.DASHES[i], label=label)
axes.loglog(etas, abs(first) * etas, color="0.4", linestyle=":", label="the first-order change itself")
axes.set(xlabel="learning rate η", ylabel="|entropy change − first order|, nats",
         title="The first order knows nothing of the step's noise, the second does")
axes.legend()
dh.figures.save(figure, results, "03-second-order")

# %% [markdown]
# *What the first-order formula misses, exact over all responses and all groups; lines are the second order from the
# Hessian. Both kinds of step have the same first order. The noise multiplies what comes next.*
#
# ## 5 · Baselines
#
# Since $\mathbb E[\partial S]=0$, any constant may be subtracted from $S$ next to it,
#
# $$ -\mathbb E_t[g^{\mathcal H}_\alpha(t)]=\mathbb E_t[S\,\partial_\alpha S]
#    =\mathbb E_t\big[(S-\mathbb E[S])\,\partial_\alpha S\big] $$
#
# <a id="03.14" href="#ledger-03.14">[03.14]</a>. The expectation stays, the variance does not.

# %%
S_bar = pi @ S
ledger.holds("03.14", "2.1", "−E[g^H] = E[S ∂S] = E[(S − E[S]) ∂S] (largest gap to the entropy's own gradient)",
             measured=(grad_H + (pi * (S - S_bar)) @ gradients).abs().max(), expected=0, tolerance=1e-10,
             formulas=(13,), rules_out={"the other sign": float((grad_H - (pi * (S - S_bar)) @ gradients).abs().max())})
along_J = gradients @ grad_J
spread_S = [float(pi @ ((S - level) * along_J) ** 2 - first**2) for level in (0.0, S_bar)]
print(f"variance of one response's term with baseline E[S], relative to none: {spread_S[1] / spread_S[0]:.2f}")

# %% [markdown]
# "The advantage is already baseline subtracted so we don't need to do this for $g^J$." For the expectation nothing is
# needed. For the variance the mean reward is one constant among others. The term of one response in
# $\delta\mathcal H_1$ is $(R-b)\,\kappa$ with $\kappa(t)=\partial S(t)\cdot\partial\mathcal H$, and as
# $\mathbb E[\kappa]=0$ its mean does not know $b$, so that
#
# $$ \mathrm{Var}\big((R-b)\kappa\big)=\mathrm{Var}\big((R-b^*)\kappa\big)+(b-b^*)^2\,\mathbb E[\kappa^2],\qquad
#    b^*=\frac{\mathbb E[R\,\kappa^2]}{\mathbb E[\kappa^2]}. $$
#
# The best constant weights rewards by how much a response matters for the entropy
# <a id="03.39" href="#ledger-03.39">[03.39]</a>.

# %%
kappa, mean_reward = gradients @ grad_H, float(pi @ rewards)
best = float(pi @ (rewards * kappa**2) / (pi @ kappa**2))
spread_R = {b: float(pi @ ((rewards - b) * kappa) ** 2 - first**2) for b in (0.0, mean_reward, best)}
gain = (mean_reward - best) ** 2 * float(pi @ kappa**2) / spread_R[mean_reward]
print(f"mean reward {mean_reward:.2f}, best constant {best:.2f}; variance relative to no baseline: "
      f"{spread_R[mean_reward] / spread_R[0.0]:.2f} and {spread_R[best] / spread_R[0.0]:.2f}")
ledger.corrected("03.39", "2.1", "A is already baseline subtracted: g^J needs no more (variance, best b to mean)",
                 correction="no more for the expectation; for the variance b* = E[R κ²]/E[κ²] does better than E[R]",
                 measured=spread_R[best] / spread_R[mean_reward], expected=1 - gain, as_printed=1, tolerance=1e-10)

# %% [markdown]
# ## 6 · The kernel
#
# Now exchange the sums. Parameters appear only in inner products of two gradients, the kernel
#
# $$ \delta\mathcal H_1=-\frac\eta G\sum_{i=1}^G\mathbb E_t\big[(S(t)-\bar S)\,K_1(t,t_i)\,A(t_i)\big],\qquad
#    K_1(t,t')=\sum_\alpha\partial_\alpha S(t)\,\partial_\alpha S(t') $$
#
# <a id="03.15" href="#ledger-03.15">[03.15]</a>. It holds group by group. And it says what a response in the batch does
# to any other: to first order
#
# $$ \delta\log\pi(t)=\eta\,\frac1B\sum_{i=1}^BK(t,t_i)\,A(t_i) $$
#
# <a id="03.16" href="#ledger-03.16">[03.16]</a>, with $B$ here the number of responses in the update. We compare the
# first with the slope of the exact entropy along each group's step, and the second with the derivative of every
# $\log\pi(t)$ along one, from one pass in forward mode; neither sees a kernel.

# %%
K = gradients @ gradients.T
kernel_form, slope_of_H = -(noisy @ K) @ (pi * (S - S_bar)), noisy @ gradients @ grad_H
ledger.holds("03.15", "2.1", "δH₁ = −η/G Σ_i E_t[(S(t) − S̄) K(t,t_i) A(t_i)] (largest gap over groups)",
             measured=(kernel_form - slope_of_H).abs().max(), expected=0, tolerance=1e-10, formulas=(14, 15),
             rules_out={"the other sign": float((kernel_form + slope_of_H).abs().max())})

# %%
unlikely = noisy[group_pi.argmin()]
own = tiny.shifted(direction, 0.0)
vector_to_parameters(unlikely @ gradients, direction.values())
_, slopes = torch.func.jvp(lambda p: dh.score(tiny, responses, p).log_probs.sum(1), (own,), (direction,))
ledger.holds("03.16", "2.1", "δ log π(t) = η/B Σ_i K(t,t_i) A(t_i) for every response (largest gap)",
             measured=(slopes - K @ unlikely).abs().max(), expected=0, tolerance=1e-10, formulas=(15, 16),
             rules_out={"the other sign": float((slopes + K @ unlikely).abs().max())})
print(f"the least likely group moves log π by {slopes.min():.1f} to {slopes.max():.1f} nats per unit of learning rate")

# %% [markdown]
# ## 7 · Several prompts
#
# For batches of prompts with Dr. GRPO's normalisation the notes print
#
# $$ \delta\mathcal H_1\to-\eta\,\frac1{BG}\sum_{p\in B}\frac1{L_{\max}(p)}\sum_{i=1}^G\mathbb E_{t\sim\pi(\cdot|p)}
#    \big[(S(t)-\bar S)\,K_1(t,t_i)\,A(t_i)\big]. $$
#
# Here $t$ is a response to the *same* prompt as $t_i$. But a step made for one prompt changes the policy on all of
# them, as they share parameters. For the entropy averaged over prompts, a second sum is needed, with its own average:
# $\mathbb E_{p'}\mathbb E_{t\sim\pi(\cdot|p')}[(S(t|p')-\bar S_{p'})\,K_1\,A]$ inside
# <a id="03.20" href="#ledger-03.20">[03.20]</a>. We take four prompts of different lengths, for $L_{\max}(p)$ what the
# prompt leaves of the context, and groups so large that their means are expectations. For a single prompt the two forms
# agree.

# %%
prompts = [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]]
D = len(prompts)
everything = dh.exact.every_response(tiny, prompts, max_new_tokens=3)
all_scores = dh.score(tiny, everything)
all_log_probs = all_scores.log_probs.sum(1)
all_S, all_pi = all_log_probs.detach(), all_log_probs.detach().exp()
all_gradients = torch.stack([flat_gradient(tiny, s) for s in all_log_probs])
all_rewards = ((everything.response_ids == 1) & everything.response_mask).double().sum(1)
longest = torch.tensor([8.0 - len(prompt) for prompt in prompts], dtype=torch.float64)

# %%
mean_S, mean_R = ((all_pi * q).view(D, N).sum(1).repeat_interleave(N) for q in (all_S, all_rewards))
all_A, all_K = all_rewards - mean_R, all_gradients @ all_gradients.T
all_weights = all_pi * all_A / (D * longest.repeat_interleave(N))
pairs = -(all_pi * (all_S - mean_S))[:, None] * all_K * all_weights
blocks = pairs.view(D, N, D, N).sum((1, 3))

# %% [markdown]
# The table holds one number for each pair of prompts: what the update made by the responses to one prompt (columns)
# does to the entropy at another (rows), in nats per unit of learning rate. The printed formula adds up its diagonal,
# 9.09. All pairs make 12.92, and the entropy's average over the four prompts is a quarter of that, 3.23. So the formula
# lacks two things, the pairs between prompts and this average.

# %%
all_grad_H = flat_gradient(tiny, -(all_log_probs.exp() * all_log_probs).sum() / D)
names = [str(prompt) for prompt in prompts]
ledger.corrected("03.20", "2.1", "δH₁ = −η/(BG) Σ_p 1/L_max(p) Σ_i E_{t∼π(·|p)}[(S − S̄) K A]", formulas=(17,),
                 correction="t ranges over the responses to every prompt, averaged: E_p′ E_{t∼π(·|p′)}",
                 measured=all_grad_H @ (all_weights @ all_gradients), expected=blocks.sum() / D,
                 as_printed=blocks.diagonal().sum(), tolerance=1e-10)
pd.DataFrame(blocks, index=names, columns=names).rename_axis(index="entropy at", columns="updated by").astype(
    float).round(2)

# %% [markdown]
# ## 8 · Could the kernel be diagonal?
#
# The notes connect their formula with the covariance law of Cui et al. by imagining $K$ diagonal, and say that it
# likely is not. Two questions: can it be, and what would follow?
#
# **It cannot.** For every $t'$,
#
# $$ \sum_t\pi(t)K(t,t')=\Big(\sum_t\pi(t)\,\partial S(t)\Big)\cdot\partial S(t')=0 . $$
#
# If $K$ were diagonal, only $t=t'$ would be left of the sum, $\pi(t')K(t',t')=0$. A response of positive probability
# would then have $|\partial S(t')|^2=0$: nothing could be learned about it. So no policy, of any architecture and size,
# has a diagonal kernel <a id="03.22" href="#ledger-03.22">[03.22]</a>, other than one that does not depend on its
# parameters. A preconditioner changes nothing about it. What a response gains, others lose, and the kernel records
# both.
#
# The sum vanishes for $t'$ of another prompt as well, so that every prompt contributes a null direction. The rank of
# $K$ is then at most the number of responses less that of prompts, for one prompt less one
# <a id="03.24" href="#ledger-03.24">[03.24]</a>, and at most the number of parameters. The notes expect the first zero
# eigenvalue where responses outnumber parameters; it is there from the start.

# %%
sums_by_prompt = (all_pi[:, None] * all_K).view(D, N, D * N).sum(1)
ledger.holds("03.22", "2.1", "K is likely not diagonal: no policy's is, as Σ_t π(t|p) K(t,t′) = 0 for each t′ "
             "of any prompt (relative to the diagonal term)", expected=0, tolerance=1e-10,
             measured=sums_by_prompt.abs().max() / (all_pi * all_K.diagonal()).max(), rules_out={"a diagonal K": 1})
ledger.holds("03.24", "derived here", "the rank of K for one prompt is the number of responses less one",
             measured=torch.linalg.matrix_rank(K), expected=N - 1, tolerance=0.5, source="deltah",
             rules_out={"full rank": N})

# %% [markdown]
# **What would follow?** The notes print
#
# $$ \mathbb E[\delta\mathcal H_1]\to\mathrm{Cov}(S(t),A(t)). $$
#
# Insert $K=\kappa(t)\,\delta_{tt'}$ into the kernel form, with $t'$ drawn from $\pi$ too:
#
# $$ \mathbb E[\delta\mathcal H_1]=-\eta\sum_t\pi(t)^2\,\kappa(t)\,(S(t)-\bar S)\,A(t). $$
#
# One $\pi$ is the probability of drawing $t$, the other that of the update having drawn *the same* response. This is
# a covariance under $\pi$ if $\kappa=1/\pi$, and then with a minus sign: raising what is already likely lowers the
# entropy <a id="03.27" href="#ledger-03.27">[03.27]</a>. The freest policy there is comes closest: a softmax with one
# logit for each whole response, in the natural metric, where $\partial S\,\partial S'$ has $F^+$ in its middle. There
# $K=\delta_{tt'}/\pi(t)-1$, diagonal but for the $-1$ that the theorem demands
# <a id="03.26" href="#ledger-03.26">[03.26]</a>. With a constant diagonal the result is no covariance of $S$ and $A$
# <a id="03.28" href="#ledger-03.28">[03.28]</a>: we show that with an advantage uncorrelated with $S$.

# %%
dS = torch.eye(N, dtype=torch.float64) - pi
K_natural = dS @ torch.linalg.pinv(dS.T @ (pi[:, None] * dS), hermitian=True) @ dS.T
natural_formula = torch.diag(1 / pi) - 1
ledger.holds("03.26", "derived here", "tabular softmax, natural gradient: K = δ/π(t) − 1 (gap relative to the largest)",
             measured=(K_natural - natural_formula).abs().max() / K_natural.max(), expected=0, tolerance=1e-10,
             source="deltah", rules_out={"diagonal": float(1 / K_natural.max())})

# %%
centred_S = pi * (S - S_bar)
natural_change, covariance = float(-centred_S @ K_natural @ exact_weights), float(centred_S @ A)
uncorrelated = A - covariance / (centred_S @ S) * (S - S_bar)
ledger.corrected("03.27", "2.1", "for diagonal K, E[δH₁] → Cov(S, A)", formulas=(18,),
                 correction="−η Cov(S, A), and for K = δ/π (natural gradient), not for a constant diagonal",
                 measured=natural_change, expected=-covariance, as_printed=covariance, tolerance=1e-10)
ledger.refuted("03.28", "2.1", "for a constant diagonal, E[δH₁] is proportional to Cov(S, A)",
               counterexample="an advantage with Cov(S, A) = 0; the change is −η Σ π² (S − S̄) A",
               measured=-(centred_S * pi) @ uncorrelated, expected=0, tolerance=1e-10)
print(f"Cov(S, A) = {covariance:+.3f}: the natural gradient changes the entropy by {natural_change:+.3f} η")

# %% [markdown]
# ## 9 · The covariance law for tokens
#
# "The entropy mechanism" states its law for single tokens. For a softmax with logits $z$ and any change $\delta z$,
#
# $$ \delta\mathcal H=-\mathrm{Cov}_{a\sim\pi}\big(\log\pi(a),\,\delta z_a\big)+\mathcal O(\delta z^2). $$
#
# The abstract speaks of the action *probability*, which would be another number, and of a change in logits
# *proportional to the advantage*. For the plain policy gradient of a tabular softmax
# $\delta z_a=\eta\,\pi(a)(A_a-\mathbb E[A])$, proportional to $\pi A$ <a id="03.29" href="#ledger-03.29">[03.29]</a>;
# the natural gradient has $\delta z_a=\eta A_a$ up to a constant. And $\mathbb E[A]$ must be taken off *before*
# multiplying by $\pi$: adding a constant to $A$ does not change the step, but it does change
# $\mathrm{Cov}(\log\pi,\pi A)$.

# %%
logits = S.clone().requires_grad_()
log_p = logits.log_softmax(0)
change_of_logits, = torch.autograd.grad(log_p.exp() @ A, logits, retain_graph=True)
tabular_grad_H, = torch.autograd.grad(-(log_p.exp() * log_p).sum(), logits)
tabular = tabular_grad_H @ change_of_logits
ledger.corrected("03.29", "abstract", "the change in logits is proportional to the advantage (∂H along the step)",
                 correction="to π(A − E[A]) for the plain gradient, giving −Cov(log π, π(A − E[A])); to A for the "
                 "natural one", measured=tabular, expected=-(centred_S @ exact_weights), as_printed=-covariance,
                 tolerance=1e-10, source=mechanism)
print(f"−Cov(log π, πA) {-(centred_S @ exact_weights):+.4f}, with A + 1 for A {-(centred_S @ (pi * (A + 1))):+.4f}; "
      f"true change {tabular:+.4f}")

# %% [markdown]
# Now a transformer, where a token's logits depend on the tokens before it and all share parameters. We follow the exact
# step of section 3 in forward mode: $\delta z$ at every position of every response. The covariance at each, with its
# sign turned, is exactly the change of that next-token entropy <a id="03.30" href="#ledger-03.30">[03.30]</a>.

# %%
vector_to_parameters(grad_J, direction.values())
z, dz = torch.func.jvp(lambda p: tiny.logits(responses.input_ids, 4, p)[:, :-1], (own,), (direction,))
token_pi, token_log_pi = z.softmax(-1), z.log_softmax(-1)
centred_dz = dz - (token_pi * dz).sum(-1, keepdim=True)
positions = responses.response_mask.double()
per_token, with_probability = (-pi @ ((token_pi * q * centred_dz).sum(-1) * positions).sum(1)
                               for q in (token_log_pi, token_pi))
fixed_prefixes = flat_gradient(tiny, pi @ scores.entropies.sum(1)) @ grad_J
ledger.corrected("03.30", "abstract", "driven by the covariance between action probability and change in logits",
                 correction="log-probability, for the change of next-token entropies at fixed prefixes",
                 measured=fixed_prefixes, expected=per_token, as_printed=with_probability, tolerance=1e-10,
                 source=mechanism)

# %% [markdown]
# At *fixed prefixes*. But a step also changes which prefixes occur. With $\mathcal H=\mathbb E[\sum_kH_k]$ and $s_j$
# the log-prob of token $j$,
#
# $$ \partial\mathcal H=\mathbb E\Big[\sum_k\partial H_k\Big]+\mathbb E\Big[\sum_j\partial s_j\sum_{k>j}H_k\Big] $$
#
# <a id="03.31" href="#ledger-03.31">[03.31]</a>. The second term rewards tokens that lead to where much is still open:
# an *entropy to go*. Earlier $H_k$ drop out, as they are known when token $j$ is drawn. Tokens' covariances hold the
# first term only. For the four prompts, each with its own exact step:

# %%
all_H_k = all_scores.entropies.detach()
all_to_go = all_H_k.sum(1, keepdim=True) - all_H_k.cumsum(1)
parts = []
for n, name in enumerate(names):
    mine = slice(n * N, (n + 1) * N)
    its_pi, its_R = all_pi[mine], all_rewards[mine]
    its_step = (its_pi * (its_R - its_pi @ its_R)) @ all_gradients[mine]
    whole = -(its_pi * all_S[mine]) @ all_gradients[mine] @ its_step
    at_prefixes = flat_gradient(tiny, its_pi @ all_scores.entropies[mine].sum(1)) @ its_step
    moved = flat_gradient(tiny, its_pi @ (all_scores.log_probs[mine] * all_to_go[mine]).sum(1)) @ its_step
    parts.append([name, float(whole), float(at_prefixes), float(moved), float(moved / whole)])
columns = ["prompt", "∂H along the step", "at fixed prefixes", "entropy to go", "share that tokens miss"]
parts = pd.DataFrame(parts, columns=columns).set_index("prompt")
parts.round(2)

# %% [markdown]
# The share that tokens miss is not small, and for the prompt of the earlier sections it is more than all: the
# covariance of tokens is positive, so that it announces a falling entropy, and the entropy rises. What the abstract
# reports as an exact match can be one at fixed prefixes only <a id="03.32" href="#ledger-03.32">[03.32]</a>.
#
# "The difference with Cui et al's result is this is per-sequence, not per-token", say the notes. It is a difference of
# substance. A whole response is a single draw, there is no prefix to move, and
# $-\mathrm{Cov}_t(S,\delta\log\pi(t))$ is all of the first-order change, for any step and any kernel
# <a id="03.33" href="#ledger-03.33">[03.33]</a>. We put $\delta\log\pi(t)$ together from the $\delta z$ of its tokens.

# %%
whole, at_prefixes, moved = (parts[name] for name in columns[1:4])
ledger.holds("03.31", "derived here", "∂H = E[Σ ∂H_k] + E[Σ_j ∂s_j Σ_{k>j} H_k] (largest gap over prompts)",
             measured=(whole - at_prefixes - moved).abs().max(), expected=0, tolerance=1e-10, source="deltah",
             rules_out={"fixed prefixes alone": (whole - at_prefixes).abs().max()})
ledger.corrected("03.32", "abstract", "the covariance term and the entropy difference match exactly (first order)",
                 correction="at fixed prefixes; for responses add the entropy to go, E[Σ_j ∂s_j Σ_{k>j} H_k]",
                 measured=grad_H @ grad_J, expected=per_token + moved.iloc[2], as_printed=per_token,
                 tolerance=1e-10, source=mechanism)
delta_log_pi = (centred_dz.gather(-1, responses.response_ids[..., None])[..., 0] * positions).sum(1)
ledger.holds("03.33", "derived here", "for whole responses, −Cov_t(S, δ log π(t)) is all of the first-order change",
             measured=-centred_S @ delta_log_pi, expected=first, tolerance=1e-10, source="deltah",
             rules_out={"what tokens see": float(per_token)})

# %% [markdown]
# ## 10 · Typical responses
#
# There are $V^L$ responses, and the notes hope that few of them count: "most sequences are junk, so most of the matrix
# is irrelevant", as "the typical sequences dominate the expectation values, so matrix elements for atypical sequences
# can basically be ignored". We take all responses of up to seven tokens to one prompt, call those typical whose $S$ is
# closest to $\bar S$, and ask what share of the responses, and of $\delta\mathcal H_1$ for the exact step, the typical
# ones hold that have a given probability together. The step rewards token 2.

# %%
lengths, masses = (3, 5, 7), (0.9, 0.99, 0.999)
larger, shares = dh.exact.tiny_policy(vocabulary_size=3, context_length=8, seed=0), {}
for length in lengths:
    of_length = dh.exact.every_response(larger, [[0]], max_new_tokens=length)
    log_pi = dh.score(larger, of_length).log_probs.sum(1)
    its_S, its_pi = log_pi.detach(), log_pi.detach().exp()
    reward = (of_length.response_ids == 2).double().mean(1)
    gradient = torch.autograd.grad((its_pi * (reward - its_pi @ reward)) @ log_pi, list(larger.parameters.values()))
    v = dict(zip(larger.parameters, gradient, strict=True))
    _, slope = torch.func.jvp(lambda p, which=of_length: dh.score(larger, which, p).log_probs.sum(1),
                              (larger.shifted(v, 0.0),), (v,))
    deviation = its_S - its_pi @ its_S
    order = deviation.abs().argsort()
    held, held_change = its_pi[order].cumsum(0), (-its_pi * deviation * slope)[order].cumsum(0)
    for mass in masses:
        last = int((held < mass).sum())
        shares[length, mass] = [(last + 1) / len(of_length), float(held_change[last] / held_change[-1])]

# %%
by_length = pd.DataFrame.from_dict(shares, "index", columns=["of the responses", "of δH₁"])
by_length.index = pd.MultiIndex.from_tuples(by_length.index, names=["tokens", "probability of the typical"])
by_length.unstack(0).round(2)

# %% [markdown]
# The first half is right: nine tenths of the probability need ever fewer of the responses
# <a id="03.40" href="#ledger-03.40">[03.40]</a>. The second is not. In $\delta\mathcal H_1$ a response counts with
# $(S-\bar S)\,K_1$, which is largest where responses are *not* typical, likely ones included. Here the least typical
# tenth of the probability holds about half of the change <a id="03.41" href="#ledger-03.41">[03.41]</a>. How much
# depends on the policy. Were $S$ normal and $\partial_vS$ in proportion to $S-\bar S$, a share $\varepsilon$ of
# probability outside $\pm z$ standard deviations would hold $\varepsilon+2z\varphi(z)$ of the change: 44% for the
# tenth, 8% for the hundredth. Projecting on typical responses is fine once they hold 99.9%.

# %%
least_typical = {length: 1 - shares[length, 0.9][1] for length in lengths}
ledger.holds("03.40", "2.1", "most sequences are junk (share of the responses that holds 90% of the probability, "
             "at most a half)", measured=shares[7, 0.9][0], expected=(0.0, 0.5), tolerance=1e-10,
             rules_out={"all alike": 0.9})
ledger.refuted("03.41", "2.1", "atypical sequences can basically be ignored: the least typical tenth holds at most as "
               "much of δH₁", counterexample="a random transformer, 2,187 responses: they enter with (S − S̄) K",
               measured=least_typical[7], expected=(-math.inf, 0.1), tolerance=1e-10)

# %% [markdown]
# ## 11 · The kernel of the shipped policy
#
# How far from diagonal is a trained transformer's kernel? `dh.fisher_kernel` takes $K$ from one backward pass over all
# rollouts (chapter 08). We take those of the first prompts of an update that section 12 will use whole. "Diagonal" has
# to mean *the same response*: where the policy is sure of itself a batch holds
# identical ones, and we count those as the diagonal too.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
B, U = prompts_in_batch, min(update_prompts, len(table) // 2)
everyone = dh.sample(policy, table.select(range(U)), responses_per_prompt, max_new_tokens, seed=seed)
batch = everyone.select(everyone.prompt_index < B)
batch_A = dh.objectives.group_advantages(batch.rewards, batch.prompt_index, scale=False).to(policy.dtype)
batch_log_probs, batch_K = dh.score(policy, batch).log_probs.sum(1), dh.fisher_kernel(policy, batch)
parameter_count = sum(p.numel() for p in policy.parameters.values())
print(f"{len(batch)} rollouts, mean reward {batch.rewards.mean():.2f}, {parameter_count:,} parameters")

# %% [markdown]
# To put the entries on one scale we divide by the lengths of the two gradients, which leaves their cosine. For a random
# matrix $w$, the notes' crude model, it would be of size $1/\sqrt{N_{\rm params}}$ off the diagonal, and $K$ nearly the
# identity as long as there are fewer responses than parameters. The notes doubt this themselves and expect blocks.

# %%
tokens = torch.where(batch.response_mask, batch.response_ids, -1)
prompt = batch.prompt_index
together = prompt[:, None] == prompt
equal = together & (tokens[:, None] == tokens).all(2)
kinds = {"same response": equal, "same prompt": together & ~equal, "other prompts": ~together}
cosine = (batch_K / batch_K.diagonal().sqrt()[:, None] / batch_K.diagonal().sqrt()).round(decimals=9)
shift = batch_K @ batch_A / len(batch)

# %%
rows = {}
for kind, chosen in kinds.items():
    pair_counts, by_kind = chosen.double().sum(1), shift * ((batch_K * chosen) @ batch_A) / len(batch)
    rows[kind] = [int(pair_counts.sum()), dh.Estimate.ratio((cosine.abs() * chosen).sum(1), pair_counts, prompt),
                  dh.Estimate.ratio((cosine * chosen).sum(1), pair_counts, prompt),
                  dh.Estimate.ratio(by_kind, shift.square(), prompt)]
summary = pd.DataFrame.from_dict(rows, "index", columns=["pairs", "|cosine|", "cosine", "share of δ log π"])
summary

# %% [markdown]
# The last column splits what the update does to its own rollouts, $\delta\log\pi(t_i)=\frac\eta{BG}\sum_jK_{ij}A_j$,
# into the parts of its three kinds of pairs, each projected on the whole. Errors take a prompt as the unit. Inside a
# prompt the kernel is anything but a random matrix's <a id="03.34" href="#ledger-03.34">[03.34]</a>. By the theorem,
# the entries off the diagonal have to make up for the one on it: on balance, gradients of different responses to one
# prompt must *oppose* each other. How much is for the data to say, and here their mean cosine is −0.15 ± 0.05. Another
# question is what this means for an update. Whether a response's own entry explains all of how it moves, or only part,
# so few prompts do not settle <a id="03.36" href="#ledger-03.36">[03.36]</a>, as a few responses with large gradients
# make up most of the sum.
#
# "Blocky" is about pairs of prompts: the mean $|\cos|$ inside two prompts less that between them, a U-statistic of
# chapter 04's kind <a id="03.35" href="#ledger-03.35">[03.35]</a>. For the size of the diagonal the notes hope for
# order one in the number of parameters, which one size of model cannot tell (exercise 4).

# %%
in_blocks = cosine.abs().view(B, responses_per_prompt, B, responses_per_prompt)
different = kinds["same prompt"].double().view_as(in_blocks)
inside = (in_blocks * different).sum((1, 3)).diagonal() / different.sum((1, 3)).diagonal().clamp(min=1)
excess = dh.u_statistic((inside[:, None] + inside) / 2 - in_blocks.mean((1, 3)))
random_cosine = (2 / torch.pi / parameter_count) ** 0.5
ledger.holds("03.34", "2.1", "a totally random w is a poor approximation (mean |cosine| of different responses to a "
             "prompt)", measured=rows["same prompt"][1], expected=(random_cosine, math.inf), rules_out=random_cosine)
ledger.holds("03.35", "2.1", "K is blocky: |cosine| inside prompts less that between them", measured=excess,
             expected=(0.0, math.inf), rules_out=0.0)
ledger.holds("03.36", "2.1", "studied on the transformer: a response's own entry explains less than all of δ log π "
             "(share)", measured=rows["same response"][3], expected=(-math.inf, 1.0), rules_out={"all": 1.0})

# %% [markdown]
# Does $\frac1{BG}\sum_iK(t,t_i)A_i$ predict what a step does? We take two, one in which no rollout's log-prob is to
# move by more than 0.05 nats and one twenty times larger, and score both the update's rollouts and fresh ones: to the
# same prompts, and to as many others. The slope of actual on predicted changes should be one; for the small step and
# fresh responses to other prompts it enters the ledger, where within a tenth counts as right
# <a id="03.37" href="#ledger-03.37">[03.37]</a>.

# %%
fresh = dh.sample(policy, table.select(range(2 * B)), 4, max_new_tokens, seed=seed + 1)
step = {name: torch.empty_like(p) for name, p in policy.parameters.items()}
vector_to_parameters(flat_gradient(policy, batch_log_probs @ batch_A / len(batch)), step.values())
with torch.no_grad():
    batch_S, fresh_S = (dh.score(policy, which).log_probs.sum(1) for which in (batch, fresh))
fresh_shift = dh.fisher_kernel(policy, fresh, batch) @ batch_A / len(batch)
seen = fresh.prompt_index < B
samples = {"the update's rollouts": (batch, batch_S, shift), "fresh, same prompts": (
    fresh.select(seen), fresh_S[seen], fresh_shift[seen]), "fresh, other prompts": (
    fresh.select(~seen), fresh_S[~seen], fresh_shift[~seen])}

# %%
slopes_found, points = {}, {}
for largest in (0.05, 1.0):
    eta = float(largest / shift.abs().max())
    for name, (which, before, expected) in samples.items():
        with torch.no_grad():
            actual = dh.score(policy, which, policy.shifted(step, eta)).log_probs.sum(1) - before
        predicted = eta * expected
        points[largest, name] = predicted.cpu(), actual.cpu()
        slopes_found[f"{largest:g}", name] = dh.Estimate.ratio(actual * predicted, predicted.square(),
                                                               which.prompt_index)
ledger.holds("03.37", "2.1", "δ log π = η/B Σ K A on the transformer, for steps up to 0.05 nats (slope, fresh prompts)",
             measured=slopes_found["0.05", "fresh, other prompts"], expected=(0.9, 1.1), formulas=(16,),
             rules_out={"zero": 0.0, "half": 0.5, "the other sign": -1.0})
pd.Series(slopes_found).unstack(0).rename_axis(columns="largest change, nats")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
by_reward = sorted(range(len(batch)), key=lambda i: (int(prompt[i]), float(batch.rewards[i]), float(batch_S[i])))
image = left.imshow(cosine[by_reward][:, by_reward].cpu(), cmap="cividis", vmin=-1, vmax=1)
figure.colorbar(image, ax=left, label="cosine of two gradients", shrink=0.85)
ticks = [responses_per_prompt * (n + 0.5) - 0.5 for n in range(B)]
left.set(xticks=ticks, yticks=ticks, xticklabels=range(1, B + 1), yticklabels=range(1, B + 1), xlabel="prompt",
         ylabel="prompt", title="Inside a prompt, different responses often oppose each other")
left.grid(False)
for i, name in enumerate(samples):
    right.scatter(*points[1.0, name], s=24, alpha=0.75, color=f"C{i}", marker=dh.figures.MARKERS[i], label=name)
right.axline((0, 0), slope=1, color="0.3", linewidth=1)
right.set(xlabel="predicted change of log π(t), nats", ylabel="actual change, nats",
          title="First order against truth, for a step of up to one nat")
right.legend(loc="upper left")
dh.figures.save(figure, results, "03-kernel")

# %% [markdown]
# *Left: the normalised kernel of the rollouts with its sign, ordered by prompt, reward and log-prob. The middle grey is
# zero; bright squares at the diagonal are identical responses, dark ones beside them are responses of which one gains
# what the other loses. Right: prediction against truth for the larger of the two steps, where the largest change was to
# be one nat; on the line the first order is exact, and far below it the change is
# no longer small.*
#
# ## 12 · What token covariances see of the shipped policy's entropy
#
# Section 9 splits the first-order change in two: next-token entropies at fixed prefixes, which is all that covariances
# of tokens hold, and the entropy to go, which comes from other prefixes. How large is each on a trained transformer?
# The update $v$ is now the policy gradient of all the rollouts, as the part of it that is noise has no reason to move
# the entropy one way. On fresh prompts we take a small step along $v$ and the opposite one; half the difference of the
# next-token entropies is the change at fixed prefixes. The entropy to go needs the change of each token's log-prob
# beside it. As baseline we subtract the mean of the other responses to the prompt at the same position, which biases
# nothing.

# %%
update_A = dh.objectives.group_advantages(everyone.rewards, everyone.prompt_index, scale=False).to(policy.dtype)
update = {name: torch.zeros_like(p) for name, p in policy.parameters.items()}
for minibatch in torch.arange(len(everyone)).chunk(4):
    surrogate = dh.score(policy, everyone.select(minibatch)).log_probs.sum(1) @ update_A[minibatch] / len(everyone)
    vector_to_parameters(flat_gradient(policy, surrogate), step.values())
    update = {name: total + step[name] for name, total in update.items()}
length_of_update = math.sqrt(sum(float(v.square().sum()) for v in update.values()))
print(f"{len(everyone)} rollouts of {U} prompts; |v| = {length_of_update:.1f}")

# %%
size, each = 4e-3 / length_of_update, 8
unseen = table.select(range(U, min(U + evaluation_prompts, len(table))))
judges = dh.sample(policy, unseen, each, max_new_tokens, seed=seed + 2)
with torch.no_grad():
    up, down, here = (dh.score(policy, judges, policy.shifted(update, eta)) for eta in (size, -size, 0.0))
to_go = here.entropies.sum(1, keepdim=True) - here.entropies.cumsum(1)
by_prompt = to_go.view(len(unseen), each, -1)
others_to_go = ((by_prompt.sum(1, keepdim=True) - by_prompt) / (each - 1)).flatten(0, 1)
seen_by_tokens = (up.entropies - down.entropies).sum(1) / (2 * size)
missed = ((up.log_probs - down.log_probs) / (2 * size) * (to_go - others_to_go)).sum(1)

# %%
members = judges.prompt_index
whole_change = seen_by_tokens + missed
for name, part in {"at fixed prefixes": seen_by_tokens, "entropy to go": missed, "both": whole_change}.items():
    print(f"{name:18} {dh.Estimate.mean(part, members)} nats per unit of learning rate")
share_seen = dh.Estimate.ratio(seen_by_tokens, whole_change, members)
print(f"share of the whole that token covariances see: {share_seen}")

# %% [markdown]
# The second line belongs to the change of the entropy as much as the first, and no covariance of tokens holds it
# <a id="03.44" href="#ledger-03.44">[03.44]</a>. Here it is most of the change: of the whole first order, tokens'
# covariances see less than half <a id="03.43" href="#ledger-03.43">[03.43]</a>. Both parts come from the same rollouts,
# so that the error of their ratio is that of paired samples. Ten other seeds agree in the sign of the second line and
# in the smallness of the share, but not each of them is sure of it with so few rollouts, and so the ledger leaves both
# open. For a single small batch the two parts may have any size and sign; try `update_prompts = 8`. Chapter 06
# measures the whole.

# %%
ledger.holds("03.43", "derived here", "token covariances see less than half of δH₁ (share at fixed prefixes)",
             source="deltah", measured=share_seen, expected=(-math.inf, 0.5), rules_out={"half": 0.5, "all": 1.0})
ledger.holds("03.44", "derived here", "the entropy to go, which they miss, lowers the entropy (nats per unit of η)",
             source="deltah", measured=dh.Estimate.mean(missed, members), expected=(-math.inf, 0.0), rules_out=0.0)

# %% [markdown]
# ## What stands
#
# The chain from (1) to the kernel form is right, for every response and every group. Of the printed formulas, the
# Fisher information lacks its probabilities, the form for several prompts lacks the cross terms between them and the
# entropy's average over them, and the covariance has lost its sign and holds for the natural gradient of a table. The
# supposition behind it cannot be met: no policy's kernel is diagonal. For tokens the covariance law is exact where
# prefixes stay as they are; what it leaves out, the entropy to go, can turn the sign; for whole responses the
# covariance of log-probability and its own change leaves out nothing.
#
# ## The remaining equations
#
# **$J$ is not $\mathbb E[SA]$**, as the notes remind themselves. Indeed $\partial\,\mathbb E[SA]=\mathbb E[A\,\partial
# S]+\mathbb E[SA\,\partial S]$, and the second term is no small matter <a id="03.7" href="#ledger-03.7">[03.7]</a>.
# What makes $SA$ useful nevertheless is that its gradient is right once the samples are *held fixed*: that is the
# surrogate which a training loop differentiates.

# %%
grad_SA = flat_gradient(tiny, differentiable_pi @ (log_probs * A))
extra = (exact_weights * S) @ gradients
ledger.holds("03.7", "2", "J isn't E[SA]: the gradients differ by E[SA ∂S] (length relative to ∂J)", rules_out=0,
             measured=(grad_SA - grad_J).norm() / grad_J.norm(), expected=extra.norm() / grad_J.norm(), tolerance=1e-10)
print(f"cosine of the two gradients {torch.cosine_similarity(grad_SA, grad_J, dim=0):+.2f}")

# %% [markdown]
# **Kernel and Fisher information.** With $w_{\alpha t}=\partial_\alpha S(t)$ the notes set $K=w^Tw$ and $F=ww^T$. The
# first is the definition. The second has lost the probabilities <a id="03.18" href="#ledger-03.18">[03.18]</a>: the
# Fisher information is an expectation,
#
# $$ F=\mathbb E[\partial S\,\partial S^T]=w\,\mathrm{diag}(\pi)\,w^T=-\mathbb E[\partial\partial S], $$
#
# and so it shares its nonzero eigenvalues with $\mathrm{diag}(\sqrt\pi)\,K\,\mathrm{diag}(\sqrt\pi)$, not with $K$
# <a id="03.19" href="#ledger-03.19">[03.19]</a>. The last form of $F$ is a second derivative and knows nothing of $w$:
# we let it act on the eigenvectors that the small matrix predicts.

# %%
eigenvalues, vectors = torch.linalg.eigh(pi.sqrt()[:, None] * K * pi.sqrt())
kept = eigenvalues > 1e-9 * eigenvalues.max()
u = (vectors[:, kept] * pi.sqrt()[:, None] / eigenvalues[kept].sqrt()).T @ gradients
expected_S = torch.autograd.grad(pi @ log_probs, parameters, create_graph=True)
expected_S = torch.cat([g.flatten() for g in expected_S])
F_u = -torch.stack([flat_gradient(tiny, expected_S @ eigenvector) for eigenvector in u])
print(f"{int(kept.sum())} nonzero eigenvalues for {N} responses, "
      f"{eigenvalues[kept].min():.3g} to {eigenvalues.max():.4g}")

# %%
ledger.corrected("03.18", "2.1", "F = w wᵀ (its quadratic form along the leading eigenvector)",
                 correction="F = w diag(π) wᵀ: the Fisher information is an expectation", measured=u[-1] @ F_u[-1],
                 expected=eigenvalues[-1], as_printed=(gradients @ u[-1]).square().sum(), tolerance=1e-8)
ledger.holds("03.19", "derived here", "F has the nonzero spectrum of diag(√π) K diag(√π) (largest residual of Fu = λu)",
             measured=(F_u - eigenvalues[kept, None] * u).abs().max(), expected=0, tolerance=1e-9, source="deltah",
             rules_out={"half the spectrum": float((F_u - eigenvalues[kept, None] * u / 2).abs().max())})

# %% [markdown]
# **Dr. GRPO's loss.** Where $L_{\max}$ is one constant for all prompts, the step of section 7 is what Dr. GRPO's loss
# gives: the surrogate, summed over tokens and divided by that constant. The gradient of
# `aggregate(losses, mask, "constant", length)` is the step with its sign turned, since a loss is minimised
# <a id="03.21" href="#ledger-03.21">[03.21]</a>. We check it on a sampled batch, eight responses to each prompt.

# %%
each, longest_response = 8, 3
drawn = torch.multinomial(all_pi.view(D, N), each, replacement=True, generator=torch.Generator().manual_seed(seed))
members = (drawn + N * torch.arange(D)[:, None]).flatten()
few = everything.select(members)
advantages = dh.objectives.group_advantages(all_rewards[members], few.prompt_index, scale=False)
token_log_probs = dh.score(tiny, few).log_probs
losses = dh.objectives.grpo(token_log_probs, token_log_probs.detach(), advantages, few.response_mask)
loss = dh.objectives.aggregate(losses, few.response_mask, "constant", length=longest_response)
ascent = (advantages / (D * each * longest_response)) @ all_gradients[members]
ledger.holds("03.21", "2.1", "Dr. GRPO's loss, divided by one constant length, has the gradient −Σ A ∂S/(BG L_max) "
             "(largest gap)", measured=(flat_gradient(tiny, loss) + ascent).abs().max(), expected=0, tolerance=1e-10,
             rules_out={"the other sign": float((flat_gradient(tiny, loss) - ascent).abs().max())})

# %% [markdown]
# **A table's kernel under plain gradients** is not even nearly diagonal:
# $K=\delta_{tt'}-\pi(t)-\pi(t')+\sum\pi^2$ <a id="03.25" href="#ledger-03.25">[03.25]</a>.

# %%
plain_formula = torch.eye(N) - pi[:, None] - pi + pi.square().sum()
ledger.holds("03.25", "derived here", "tabular softmax: K = δ − π(t) − π(t′) + Σπ² (largest gap)", source="deltah",
             measured=(dS @ dS.T - plain_formula).abs().max(), expected=0, tolerance=1e-10,
             rules_out={"diagonal": float((plain_formula - torch.eye(N)).abs().max())})

# %% [markdown]
# ## The ledger

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. Divide the advantages of section 4 by the group's standard deviation. Is the expected step still parallel to
#    $\partial J$?
# 2. Let $L_{\max}(p)$ be the longest response *of the group* instead of a constant. Show that the expected step is no
#    longer $\partial J/L_{\max}$, by enumerating groups.
# 3. Replace $\log\pi(a)$ in the token covariance by $\log\pi(a)-G(a)$, with $G(a)$ the expected entropy to go after
#    token $a$. Show that the sum over positions is then the whole of $\partial\mathcal H$.
# 4. Widen the tiny policy. How do the diagonal entries of $K$ grow with the number of parameters?
# 5. Repeat section 10 with other seeds of the tiny policy. When does the least typical tenth hold little of the change?
#
# ## Further reading
#
# - Cui, G. et al. *The entropy mechanism of reinforcement learning for reasoning language models*, arXiv 2505.22617.
# - Amari, S. *Natural gradient works efficiently in learning*, Neural Computation 1998.
# - Jaakkola, T. and Haussler, D. *Exploiting generative models in discriminative classifiers*, NIPS 1998: the Fisher
#   kernel.
# - Kakade, S. *A natural policy gradient*, NIPS 2001.
