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
# sum are exact, what the noise of a sampled step adds, and how far the kernel is from diagonal, which is what the
# covariance law of the entropy mechanism needs.
#
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | the entropy gradient, equations (1) to (4); the policy gradient, and what $J$ is not | notes 2, 2.1 |
# | 2 | $\delta\mathcal H$ for an exact step and $\delta\mathcal H_1$ for a noisy one | notes 2.1 |
# | 3 | the baseline, the kernel form, $\delta\log\pi(t)$ | notes 2.1 |
# | 4 | $K=w^Tw$ and the Fisher information | notes 2.1 |
# | 5 | the form for several prompts with Dr. GRPO's normalisation | notes 2.1 |
# | 6 | diagonal $K$ and $\mathrm{Cov}(S,A)$ | notes 2.1 |
# | 7 | the covariance of log-probability and change of logits, for tokens | arXiv 2505.22617, abstract |
#
# **You need** gradients of expectations, and chapter 02's two ways to write the entropy. **You will learn** why no
# softmax policy has a diagonal kernel, what the token-level covariance leaves out, and which responses moved a given
# one.

# %%
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
prompts_in_batch = 8              # B
responses_per_prompt = 8          # G
max_new_tokens = 64

# %%
ledger = dh.Ledger("03", source="notes")
mechanism = "arXiv 2505.22617"

# %% [markdown]
# ## 1 · The gradient of the entropy
#
# We start where every expectation is a sum: a random transformer over three tokens, of which token 2 ends a response,
# one prompt, and all its responses of at most three tokens. The notes fix the length of a response; nothing below
# needs that, as long as $t$ is a whole response. With $S(t)=\log\pi(t|p)$ the entropy is
#
# $$ \mathcal H=-\mathbb E_{t\sim\pi(\cdot|p)}[\log\pi(t|p)]=-\mathbb E[S]. $$

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=2)
responses = dh.exact.every_response(tiny, [[0, 0, 1]], max_new_tokens=3)
scores = dh.score(tiny, responses)
log_probs, N = scores.log_probs.sum(1), len(responses)
S, pi = log_probs.detach(), log_probs.detach().exp()
H = -(log_probs.exp() * log_probs).sum()
print(f"{N} responses, probabilities {pi.min():.4f} to {pi.max():.3f}, entropy {H:.4f} nats")
ledger.holds("03.1", "2", "H = −E[log π(t|p)], the expected sum of next-token entropies",
             measured=H.detach(), expected=pi @ scores.entropies.detach().sum(1), tolerance=1e-10)

# %% [markdown]
# A step $\delta\theta$ changes it by
#
# $$ \delta\mathcal H\approx\sum_\alpha\partial_\alpha\mathcal H\,\delta\theta_\alpha
#    =-\sum_\alpha\delta\theta_\alpha\,\partial_\alpha\sum_t\pi\log\pi
#    =-\sum_\alpha\delta\theta_\alpha\sum_t\partial_\alpha\pi\log\pi
#    =-\sum_\alpha\delta\theta_\alpha\,\mathbb E[\log\pi\,\partial_\alpha\log\pi], $$
#
# equations (1) to (4). The product rule would leave another term, $\sum_t\pi\,\partial_\alpha\log\pi$. It is
# $\sum_t\partial_\alpha\pi$, the derivative of one. We differentiate three things: the entropy, every $\pi(t)$ and
# every $S(t)$. The last make a matrix with one row for each response, $w^T$ in the notes.

# %%
gradients = torch.stack([flat_gradient(tiny, s) for s in log_probs])
grad_pi = torch.stack([flat_gradient(tiny, p) for p in log_probs.exp()])
grad_H = flat_gradient(tiny, H)
print(f"gradients: {list(gradients.shape)}")

# %%
ledger.holds("03.2", "2.1", "Σ_t ∂π(t) = 0 (largest component)",
             measured=grad_pi.sum(0).abs().max(), expected=0, tolerance=1e-10)
ledger.holds("03.3", "2.1 (2), (3)", "∂H = −∂ Σ π log π = −Σ ∂π log π (largest gap)",
             measured=(grad_H + S @ grad_pi).abs().max(), expected=0, tolerance=1e-10)
ledger.holds("03.4", "2.1 (4)", "∂H = −E[log π ∂ log π] (largest gap)",
             measured=(grad_H + (pi * S) @ gradients).abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# ## 2 · The gradient of the objective
#
# Training climbs $J=\mathbb E[A]$, the expected advantage: $\theta\to\theta+\eta\,\partial J$. Let the reward be the
# number of ones in a response, and $A=R-\mathbb E[R]$ for now. In
#
# $$ \partial_\alpha J=\partial_\alpha\sum_t\pi(t)A(t)=\mathbb E[\partial_\alpha S(t)\,A(t)] $$
#
# the advantage is a fixed number for each response. That is worth a check of its own: if one differentiates through
# the baseline as well, $J=\mathbb E[R-\mathbb E[R]]$ is zero for every $\theta$, and so is its gradient.

# %%
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
A, differentiable_pi = rewards - pi @ rewards, log_probs.exp()
grad_J = flat_gradient(tiny, differentiable_pi @ A)
through = flat_gradient(tiny, differentiable_pi @ (rewards - differentiable_pi @ rewards))
ledger.holds("03.5", "2", "∂J = ∂ Σ π A = E[∂S A] for a fixed A (largest gap)",
             measured=(grad_J - (pi * A) @ gradients).abs().max(), expected=0, tolerance=1e-10)
ledger.holds("03.6", "derived here", "with the baseline differentiated too, ∂E[R − E[R]] = 0 (largest component)",
             measured=through.abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# The notes remind themselves that $J$ is not $\mathbb E[SA]$. Indeed $\partial\,\mathbb E[SA]=\mathbb E[A\,\partial S]+
# \mathbb E[SA\,\partial S]$, and the second term is no small matter. What makes $SA$ useful nevertheless is that its
# gradient is right once the samples are *held fixed*: that is the surrogate which a training loop differentiates.

# %%
grad_SA = flat_gradient(tiny, differentiable_pi @ (log_probs * A))
extra, surrogate = (pi * S * A) @ gradients, flat_gradient(tiny, pi @ (log_probs * A))
ledger.holds("03.7", "2", "J isn't E[SA]: the gradients differ by E[SA ∂S] (length relative to ∂J)", tolerance=1e-10,
             measured=(grad_SA - grad_J).norm() / grad_J.norm(), expected=extra.norm() / grad_J.norm())
ledger.holds("03.8", "derived here", "with its samples held fixed, E[SA] has the gradient ∂J (largest gap)",
             measured=(surrogate - grad_J).abs().max(), expected=0, tolerance=1e-10)
print(f"|∂E[SA] − ∂J| is {(grad_SA - grad_J).norm() / grad_J.norm():.2f} times |∂J|; "
      f"cosine of the two gradients {torch.cosine_similarity(grad_SA, grad_J, dim=0):+.2f}")

# %% [markdown]
# ## 3 · One exact step
#
# Put together, the step along the exact policy gradient changes the entropy by
#
# $$ \delta\mathcal H=-\eta\sum_\alpha\mathbb E[S\,\partial_\alpha S]\;\mathbb E[\partial_\alpha S\,A]
#    +\mathcal O(\eta^2). $$
#
# To see the order of the rest we take the step and look. For later we also need the curvature: products
# $\partial S(t)\cdot\nabla^2\mathcal H\,\partial S(t')$, one Hessian-vector product for each response, from a second
# backward pass through the exact entropy.

# %%
parameters = list(tiny.parameters.values())
with_graph = torch.cat([g.flatten() for g in torch.autograd.grad(H, parameters, create_graph=True)])
curvature = torch.stack([flat_gradient(tiny, with_graph @ g) for g in gradients]) @ gradients.T
first = -((pi * S) @ gradients) @ ((pi * A) @ gradients)
second = (pi * A) @ curvature @ (pi * A) / 2
print(f"δH = {first:+.3f} η {second:+.4g} η² + ...")

# %% [markdown]
# A noisy step is the subject of the next section; we measure it along with this one. It is made by a group of $G=2$
# responses, $\delta\theta=\frac\eta G\sum_iA(t_i)\,\partial S(t_i)$, and there are 120 groups, each with its
# probability. We hold a step as its weights over the 15 responses; the exact step has the weights $\pi A$.

# %%
G = 2
groups = torch.combinations(torch.arange(N), G, with_replacement=True)
share = pi[groups].prod(1) * torch.where(groups[:, 0] == groups[:, 1], 1, 2)
noisy = torch.zeros(len(groups), N, dtype=torch.float64).scatter_add(1, groups, A[groups] / G)
steps = torch.cat([(pi * A)[None], noisy])
print(f"{len(groups)} groups, probabilities sum to {share.sum():.10f}")

# %%
direction = {name: torch.empty_like(p) for name, p in tiny.parameters.items()}
etas = torch.logspace(-5.5, -3, 6, dtype=torch.float64)
changes = torch.zeros(len(steps), len(etas), 2, dtype=torch.float64)
for row, weights in enumerate(steps):
    vector_to_parameters(weights @ gradients, direction.values())
    for column, eta in enumerate(etas):
        for side, sign in enumerate((1, -1)):
            with torch.no_grad():
                after = dh.score(tiny, responses, tiny.shifted(direction, sign * float(eta))).log_probs.sum(1)
            changes[row, column, side] = -(after.exp() * after).sum() - H.detach()

# %%
exact_change, mean_change = changes[0], torch.tensordot(share, changes[1:], 1)
rest = (exact_change[:, 0] - etas * first).abs()
slope = (rest[1] / rest[0]).log() / (etas[1] / etas[0]).log()
pd.DataFrame({"η": etas, "exact step": exact_change[:, 0], "first order": etas * first,
              "noisy steps, mean": mean_change[:, 0]}).map("{:.3g}".format)

# %%
ledger.holds("03.9", "2.1 (1)", "δH = −η E[S ∂S]·E[∂S A] + O(η²): order of the rest (log-log slope)",
             measured=slope, expected=2, tolerance=0.02)

# %% [markdown]
# ## 4 · One noisy step
#
# A training step has only a sample of the policy gradient. With $g^{\mathcal H}=-S\,\partial S$ and
# $g^J=A\,\partial S$ the notes write
#
# $$ \delta\mathcal H_1\to\eta\sum_\alpha\mathbb E_t[g^{\mathcal H}_\alpha(t)]\cdot
#    \frac1G\sum_{i=1}^Gg^J_\alpha(t_i), $$
#
# and say that on expectation this is the earlier line. It is, for an advantage whose baseline does not depend on the
# sample. GRPO's does: $A_i=R_i-\bar R$ with the group's own mean. A response is then compared to itself in one part out
# of $G$, and the expected step, and with it $\delta\mathcal H_1$, shrinks by $(G-1)/G$. Chapter 04 meets the same
# factor. For groups of two it is a half.

# %%
centred = rewards[groups] - rewards[groups].mean(1, keepdim=True)
grpo_steps = torch.zeros_like(noisy).scatter_add(1, groups, centred / G)
g_H = -S[:, None] * gradients
delta_H_1 = noisy @ gradients @ (pi @ g_H)
ledger.holds("03.10", "2.1", "E[δH₁] over groups is the exact step's δH₁, for A = R − E[R]",
             measured=share @ delta_H_1, expected=first, tolerance=1e-10)
ledger.corrected("03.11", "2.1", "E[δH₁] is the exact step's, for GRPO's A = R − R̄ (ratio)",
                 correction="(G−1)/G of it: the group's mean holds the response's own reward",
                 measured=share @ (grpo_steps @ gradients @ grad_H) / first, expected=(G - 1) / G, as_printed=1,
                 tolerance=1e-10)

# %% [markdown]
# "That won't be true to second order": the step enters twice, and so does its noise. Expanding,
#
# $$ \mathbb E[\delta\mathcal H]=\delta\mathcal H(\text{mean step})
#    +\frac{\eta^2}2\,\frac{\mathrm{Tr}\big[\nabla^2\mathcal H\;\mathrm{Cov}(g^J)\big]}G+\mathcal O(\eta^3). $$
#
# The trace needs the curvature along single responses only. We check it against the average over groups, and both
# against the entropies measured above; there, the mean of a step and its opposite removes all odd orders.

# %%
mean_step = pi * A
trace = (pi * A**2) @ curvature.diagonal() - mean_step @ curvature @ mean_step
over_groups = share @ ((noisy @ curvature) * noisy).sum(1) - mean_step @ curvature @ mean_step
even = (mean_change - exact_change).mean(1) / etas**2
ledger.holds("03.12", "2.1", "at second order, noise adds ½η² Tr[∇²H Cov(g^J)]/G (exact, over groups)",
             measured=over_groups / 2 / trace, expected=1 / (2 * G), tolerance=1e-10)
ledger.holds("03.13", "2.1", "the same, from entropies after steps of size ±η (ratio to the trace formula)",
             measured=even[0] / (trace / (2 * G)), expected=1, tolerance=1e-2)
print(f"second-order coefficient: exact step {second:.4g}, noisy steps {second + trace / (2 * G):.4g}")

# %%
figure, axes = plt.subplots()
for i, (label, change) in enumerate({"exact step": exact_change, "mean over noisy steps, G = 2": mean_change}.items()):
    axes.loglog(etas, (change[:, 0] - etas * first).abs(), color=f"C{i}", marker=dh.figures.MARKERS[i], label=label,
                linestyle="none")
coefficients = {"½|vᵀ∇²H v| η²": second.abs(), "with Tr[∇²H Cov]/2G": (second + trace / (2 * G)).abs()}
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
# ## 5 · Baseline and kernel
#
# Since $\mathbb E[\partial S]=0$, any constant may be subtracted from $S$ next to it:
# $-\mathbb E[g^{\mathcal H}]=\mathbb E[S\,\partial S]=\mathbb E[(S-\mathbb E[S])\,\partial S]$. The expectation stays,
# the variance does not.

# %%
S_bar = pi @ S
ledger.holds("03.14", "2.1", "−E[g^H] = E[S ∂S] = E[(S − E[S]) ∂S] (largest gap)", expected=0, tolerance=1e-10,
             measured=(pi @ g_H + (pi * (S - S_bar)) @ gradients).abs().max())
along = gradients @ grad_J
spread = {b: (pi @ ((S - level) * along) ** 2 - first**2) for b, level in (("none", 0.0), ("E[S]", S_bar))}
print(f"variance of one response's term with baseline E[S], relative to none: {spread['E[S]'] / spread['none']:.2f}")

# %% [markdown]
# Now exchange the sums. Parameters appear only in inner products of two gradients, the kernel
#
# $$ K_1(t,t')=\sum_\alpha\partial_\alpha S(t)\,\partial_\alpha S(t'),\qquad
#    \delta\mathcal H_1=-\frac\eta G\sum_{i=1}^G\mathbb E_t\big[(S(t)-\bar S)\,K_1(t,t_i)\,A(t_i)\big]. $$
#
# It holds group by group. And it says what a response in the batch does to any other: to first order
# $\delta\log\pi(t)=\frac\eta B\sum_iK(t,t_i)A(t_i)$, with $B$ here the number of responses in the update. We compare
# that with the derivative of every $\log\pi(t)$ along the step, from one pass in forward mode, which sees no kernel.

# %%
K = gradients @ gradients.T
kernel_form = -(noisy @ K) @ (pi * (S - S_bar))
ledger.holds("03.15", "2.1", "δH₁ = −η/G Σ_i E_t[(S(t) − S̄) K(t,t_i) A(t_i)] (largest gap over groups)",
             measured=(kernel_form - delta_H_1).abs().max(), expected=0, tolerance=1e-10)

# %%
unlikely = noisy[share.argmin()]
own = tiny.shifted(direction, 0.0)
vector_to_parameters(unlikely @ gradients, direction.values())
_, moved = torch.func.jvp(lambda p: dh.score(tiny, responses, p).log_probs.sum(1), (own,), (direction,))
ledger.holds("03.16", "2.1", "δ log π(t) = η/B Σ_i K(t,t_i) A(t_i) for every response (largest gap)",
             measured=(moved - K @ unlikely).abs().max(), expected=0, tolerance=1e-10)
print(f"the least likely group moves log π by {moved.min():.1f} to {moved.max():.1f} nats per unit of learning rate")

# %% [markdown]
# ## 6 · Kernel and Fisher information
#
# With $w_{\alpha t}=\partial_\alpha S(t)$ the notes set $K=w^Tw$ and $F=ww^T$. The first is the definition. The second
# has lost the probabilities: the Fisher information is an expectation,
#
# $$ F=\mathbb E[\partial S\,\partial S^T]=w\,\mathrm{diag}(\pi)\,w^T=-\mathbb E[\partial\partial S], $$
#
# and so it shares its nonzero eigenvalues with $\mathrm{diag}(\sqrt\pi)\,K\,\mathrm{diag}(\sqrt\pi)$, not with $K$. The
# last form of $F$ is a second derivative and knows nothing of $w$: we let it act on the eigenvectors that the small
# matrix predicts.

# %%
eigenvalues, x = torch.linalg.eigh(pi.sqrt()[:, None] * K * pi.sqrt())
kept = eigenvalues > 1e-9 * eigenvalues.max()
u = (x[:, kept] * pi.sqrt()[:, None] / eigenvalues[kept].sqrt()).T @ gradients
expected_S = torch.autograd.grad(pi @ log_probs, parameters, create_graph=True)
expected_S = torch.cat([g.flatten() for g in expected_S])
F_u = -torch.stack([flat_gradient(tiny, expected_S @ v) for v in u])
print(f"{int(kept.sum())} nonzero eigenvalues for {N} responses, "
      f"{eigenvalues[kept].min():.3g} to {eigenvalues.max():.4g}")

# %%
ledger.holds("03.17", "2.1", "K₁(t,t′) = Σ_α ∂S(t) ∂S(t′) = wᵀw, symmetric and positive (lowest eigenvalue, or 0)",
             measured=torch.linalg.eigvalsh(K).min().clamp(max=0) / K.diagonal().max(), expected=0, tolerance=1e-10)
ledger.corrected("03.18", "2.1", "F = w wᵀ (its quadratic form along the leading eigenvector)",
                 correction="F = w diag(π) wᵀ: the Fisher information is an expectation", measured=u[-1] @ F_u[-1],
                 expected=eigenvalues[-1], as_printed=(gradients @ u[-1]).square().sum(), tolerance=1e-8)
ledger.holds("03.19", "derived here", "F has the nonzero spectrum of diag(√π) K diag(√π) (largest residual of Fu = λu)",
             measured=(F_u - eigenvalues[kept, None] * u).abs().max(), expected=0, tolerance=1e-9)

# %% [markdown]
# One eigenvalue fewer than responses. The missing direction will turn out to matter in section 8.
#
# ## 7 · Several prompts
#
# For batches of prompts with Dr. GRPO's normalisation the notes print
#
# $$ \delta\mathcal H_1\to-\eta\,\frac1{BG}\sum_{p\in B}\frac1{L_{\max}(p)}\sum_{i=1}^G\mathbb E_{t\sim\pi(\cdot|p)}
#    \big[(S(t)-\bar S)\,K_1(t,t_i)\,A(t_i)\big]. $$
#
# Here $t$ is a response to the *same* prompt as $t_i$. But a step made for one prompt changes the policy on all of
# them, as they share parameters. For the entropy averaged over prompts, a second sum is needed, with its own average:
# $\mathbb E_{p'}\mathbb E_{t\sim\pi(\cdot|p')}[(S(t|p')-\bar S_{p'})\,K_1\,A]$ inside. We take four prompts of
# different lengths, for $L_{\max}(p)$ what the prompt leaves of the context, and groups so large that their means are
# expectations. For a single prompt the two forms agree.

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
weights = all_pi * all_A / (D * longest.repeat_interleave(N))
terms = -(all_pi * (all_S - mean_S))[:, None] * all_K * weights
blocks = terms.view(D, N, D, N).sum((1, 3))

# %% [markdown]
# The table holds one number for each pair of prompts: what the update made by the responses to one prompt (columns)
# does to the entropy at another (rows), in nats per unit of learning rate. The printed formula adds up its diagonal.
# The entropy's average over prompts is a quarter of the whole.

# %%
all_grad_H = flat_gradient(tiny, -(all_log_probs.exp() * all_log_probs).sum() / D)
names = [str(prompt) for prompt in prompts]
ledger.corrected("03.20", "2.1", "δH₁ = −η/(BG) Σ_p 1/L_max(p) Σ_i E_{t∼π(·|p)}[(S − S̄) K A]",
                 correction="t must range over the responses to every prompt, E_p′ E_{t∼π(·|p′)}",
                 measured=all_grad_H @ (weights @ all_gradients), expected=blocks.sum() / D,
                 as_printed=blocks.diagonal().sum(), tolerance=1e-10)
pd.DataFrame(blocks, index=names, columns=names).rename_axis(index="entropy at", columns="updated by").astype(
    float).round(2)

# %% [markdown]
# Where $L_{\max}$ is one constant for all prompts, the step is what Dr. GRPO's loss gives: the surrogate, summed over
# tokens and divided by that constant. The gradient of `aggregate(losses, mask, "constant", length)` is the step with
# its sign turned, since a loss is minimised. We check it on a sampled batch, $G=8$.

# %%
G, generator = 8, torch.Generator().manual_seed(seed)
drawn = torch.multinomial(all_pi.view(D, N), G, replacement=True, generator=generator)
members = (drawn + N * torch.arange(D)[:, None]).flatten()
batch = everything.select(members)
advantages = dh.objectives.group_advantages(all_rewards[members], batch.prompt_index, scale=False)
token_log_probs = dh.score(tiny, batch).log_probs
losses = dh.objectives.grpo(token_log_probs, token_log_probs.detach(), advantages, batch.response_mask)
loss = dh.objectives.aggregate(losses, batch.response_mask, "constant", length=3)
step = (advantages / (D * G * 3)) @ all_gradients[members]
ledger.holds("03.21", "2.1", "Dr. GRPO's loss, divided by one constant length, has the gradient −Σ A ∂S/(BG L_max) "
             "(largest gap)", measured=(flat_gradient(tiny, loss) + step).abs().max(), expected=0, tolerance=1e-10)

# %% [markdown]
# ## 8 · Could the kernel be diagonal?
#
# The notes connect their formula with the covariance law of Cui et al. by imagining $K$ diagonal. Two questions: what
# would follow, and can it be?
#
# **It cannot.** For every $t'$,
#
# $$ \sum_t\pi(t)K(t,t')=\Big(\sum_t\pi(t)\,\partial S(t)\Big)\cdot\partial S(t')=0 . $$
#
# If $K$ were diagonal, only $t=t'$ would be left of the sum, $\pi(t')K(t',t')=0$. A response of positive probability
# would then have $|\partial S(t')|^2=0$: nothing could be learned about it. So no policy, of any architecture and size,
# has a diagonal kernel, other than one that does not depend on its parameters. A preconditioner changes nothing about
# it. What a response gains, others lose, and the kernel records both.
#
# The sum vanishes for $t'$ of another prompt as well, so that every prompt contributes a null direction. The rank of
# $K$ is then at most the number of responses less that of prompts, and at most the number of parameters. The notes
# expect the first zero eigenvalue where responses outnumber parameters; it is there from the start.

# %%
column_sums = (pi @ K).abs() / (pi * K.diagonal())
ledger.refuted("03.22", "2.1", "K may be diagonal: then Σ_t π(t) K(t,t′) = π(t′) K(t′,t′) (largest ratio of the two)",
               counterexample="every policy: the sum is 0, as E[∂S] = 0", measured=column_sums.max(), expected=1,
               tolerance=1e-10)
sums_by_prompt = (all_pi[:, None] * all_K).view(D, N, D * N).sum(1)
ledger.holds("03.23", "derived here", "Σ_t π(t|p) K(t,t′) = 0 for every t′, also of other prompts (largest, relative)",
             measured=sums_by_prompt.abs().max() / all_K.abs().max(), expected=0, tolerance=1e-10)
ledger.holds("03.24", "derived here", "the rank of K for one prompt is the number of responses less one",
             measured=torch.linalg.matrix_rank(K), expected=N - 1, tolerance=0.5)

# %% [markdown]
# **How close can it come?** Take the freest policy there is, a softmax with one logit for each whole response. Plain
# gradients give $K=\delta_{tt'}-\pi(t)-\pi(t')+\sum\pi^2$. In the natural metric, where $\partial S\,\partial S'$ has
# $F^+$ in its middle, it is $K=\delta_{tt'}/\pi(t)-1$, diagonal but for the $-1$ that the theorem demands.

# %%
dS = torch.eye(N, dtype=torch.float64) - pi
K_plain, F = dS @ dS.T, dS.T @ (pi[:, None] * dS)
K_natural = dS @ torch.linalg.pinv(F, hermitian=True) @ dS.T
plain_formula = torch.eye(N) - pi[:, None] - pi + pi.square().sum()
natural_formula = torch.diag(1 / pi) - 1
ledger.holds("03.25", "derived here", "tabular softmax: K = δ − π(t) − π(t′) + Σπ² (largest gap)",
             measured=(K_plain - plain_formula).abs().max(), expected=0, tolerance=1e-10)
ledger.holds("03.26", "derived here", "tabular softmax, natural gradient: K = δ/π(t) − 1 (gap relative to the largest)",
             measured=(K_natural - natural_formula).abs().max() / K_natural.max(), expected=0, tolerance=1e-10)

# %% [markdown]
# **What would follow?** The notes print $\mathbb E[\delta\mathcal H_1]\to\mathrm{Cov}(S,A)$. Insert
# $K=\kappa(t)\,\delta_{tt'}$ into the kernel form, with $t'$ drawn from $\pi$ too:
#
# $$ \mathbb E[\delta\mathcal H_1]=-\eta\sum_t\pi(t)^2\,\kappa(t)\,(S(t)-\bar S)\,A(t). $$
#
# One $\pi$ is the probability of drawing $t$, the other that of the update having drawn *the same* response. This is
# a covariance under $\pi$ if $\kappa=1/\pi$, the natural gradient, and then with a minus sign: raising what is already
# likely lowers the entropy. With a constant diagonal it is no covariance of $S$ and $A$. To show that, we
# take an advantage uncorrelated with $S$.

# %%
centred_S = pi * (S - S_bar)
natural_change, covariance = -centred_S @ K_natural @ (pi * A), centred_S @ A
uncorrelated = A - covariance / (centred_S @ S) * (S - S_bar)
constant_diagonal = -(centred_S * pi) @ uncorrelated
ledger.corrected("03.27", "2.1", "for diagonal K, E[δH₁] → Cov(S, A)",
                 correction="−η Cov(S, A), and for K = δ/π (natural gradient), not for a constant diagonal",
                 measured=natural_change, expected=-covariance, as_printed=covariance, tolerance=1e-10)
ledger.refuted("03.28", "2.1", "for a constant diagonal, E[δH₁] is proportional to Cov(S, A)",
               counterexample="an advantage with Cov(S, A) = 0; the change is −η Σ π² (S − S̄) A",
               measured=constant_diagonal, expected=-(centred_S @ uncorrelated), tolerance=1e-3)
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
# $\delta z_a=\eta\,\pi(a)(A_a-\mathbb E[A])$, proportional to $\pi A$; the natural gradient has $\delta z_a=\eta A_a$
# up to a constant. And $\mathbb E[A]$ must be taken off *before* multiplying by $\pi$: adding a constant to $A$ does
# not change the step, but it does change $\mathrm{Cov}(\log\pi,\pi A)$.

# %%
logits = S.clone().requires_grad_()
log_p = logits.log_softmax(0)
change_of_logits, = torch.autograd.grad(log_p.exp() @ A, logits, retain_graph=True)
slope_of_H, = torch.autograd.grad(-(log_p.exp() * log_p).sum(), logits)
tabular = slope_of_H @ change_of_logits
ledger.corrected("03.29", "abstract", "the change in logits is proportional to the advantage (∂H along the step)",
                 correction="to π(A − E[A]) for the plain gradient, giving −Cov(log π, π(A − E[A])); to A for the "
                 "natural one", measured=tabular, expected=-(centred_S @ (pi * A)), as_printed=-covariance,
                 tolerance=1e-10, source=mechanism)
print(f"−Cov(log π, πA) {-(centred_S @ (pi * A)):+.4f}, with A + 1 for A {-(centred_S @ (pi * (A + 1))):+.4f}; "
      f"true change {tabular:+.4f}")

# %% [markdown]
# Now a transformer, where a token's logits depend on the tokens before it and all share parameters. We follow the exact
# step of section 3 in forward mode: $\delta z$ at every position of every response. The covariance at each, with its
# sign turned, is exactly the change of that next-token entropy.

# %%
vector_to_parameters(grad_J, direction.values())
z, dz = torch.func.jvp(lambda p: tiny.logits(responses.input_ids, 4, p)[:, :-1], (own,), (direction,))
p, log_p = z.softmax(-1), z.log_softmax(-1)
centred_dz = dz - (p * dz).sum(-1, keepdim=True)
positions = responses.response_mask.double()
per_token, with_probability = (-pi @ ((p * q * centred_dz).sum(-1) * positions).sum(1) for q in (log_p, p))
fixed_prefixes = flat_gradient(tiny, pi @ scores.entropies.sum(1)) @ grad_J
ledger.corrected("03.30", "abstract", "driven by the covariance between action probability and change in logits",
                 correction="log-probability, for the change of next-token entropies at fixed prefixes",
                 measured=fixed_prefixes, expected=per_token, as_printed=with_probability, tolerance=1e-10,
                 source=mechanism)

# %% [markdown]
# At *fixed prefixes*. But a step also changes which prefixes occur. With $\mathcal H=\mathbb E[\sum_kH_k]$ and $s_j$
# the log-prob of token $j$,
#
# $$ \partial\mathcal H=\mathbb E\Big[\sum_k\partial H_k\Big]+\mathbb E\Big[\sum_j\partial s_j\sum_{k>j}H_k\Big]. $$
#
# The second term rewards tokens that lead to where much is still open: an *entropy to go*. Earlier $H_k$ drop out, as
# they are known when token $j$ is drawn. Tokens' covariances hold the first term only. For the four prompts, each with
# its own exact step:

# %%
H_k = all_scores.entropies.detach()
to_go = H_k.sum(1, keepdim=True) - H_k.cumsum(1)
rows = []
for n, name in enumerate(names):
    mine = slice(n * N, (n + 1) * N)
    own_pi, own_R = all_pi[mine], all_rewards[mine]
    update = (own_pi * (own_R - own_pi @ own_R)) @ all_gradients[mine]
    whole = -(own_pi * all_S[mine]) @ all_gradients[mine] @ update
    at_prefixes = flat_gradient(tiny, own_pi @ all_scores.entropies[mine].sum(1)) @ update
    moving = flat_gradient(tiny, own_pi @ (all_scores.log_probs[mine] * to_go[mine]).sum(1)) @ update
    rows.append([name, float(whole), float(at_prefixes), float(moving), float(moving / whole)])
columns = ["prompt", "∂H along the step", "at fixed prefixes", "entropy to go", "share that tokens miss"]
parts = pd.DataFrame(rows, columns=columns).set_index("prompt")
parts.round(2)

# %% [markdown]
# The share that tokens miss is not small, and for the prompt of the earlier sections it is more than all: the
# covariance of tokens is positive, so that it announces a falling entropy, and the entropy rises.
#
# "The difference with Cui et al's result is this is per-sequence, not per-token", say the notes. It is a difference of
# substance. A whole response is a single draw, there is no prefix to move, and
# $-\mathrm{Cov}_t(S,\delta\log\pi(t))$ is all of the first-order change, for any step and any kernel. We put
# $\delta\log\pi(t)$ together from the $\delta z$ of its tokens.

# %%
gap = parts["∂H along the step"] - parts["at fixed prefixes"] - parts["entropy to go"]
ledger.holds("03.31", "derived here", "∂H = E[Σ ∂H_k] + E[Σ_j ∂s_j Σ_{k>j} H_k] (largest gap over prompts)",
             measured=gap.abs().max(), expected=0, tolerance=1e-10)
ledger.corrected("03.32", "abstract", "the covariance term and the entropy difference match exactly (first order)",
                 correction="at fixed prefixes; for responses add the entropy to go, E[Σ_j ∂s_j Σ_{k>j} H_k]",
                 measured=grad_H @ grad_J, expected=per_token + parts["entropy to go"].iloc[2], as_printed=per_token,
                 tolerance=1e-10, source=mechanism)
delta_log_pi = (centred_dz.gather(-1, responses.response_ids[..., None])[..., 0] * positions).sum(1)
ledger.holds("03.33", "derived here", "for whole responses, −Cov_t(S, δ log π(t)) is all of the first-order change",
             measured=-centred_S @ delta_log_pi, expected=first, tolerance=1e-10)

# %% [markdown]
# ## 10 · The kernel of the shipped policy
#
# How far from diagonal is a trained transformer's kernel? `dh.fisher_kernel` takes $K$ from one backward pass over all
# rollouts (chapter 08). "Diagonal" has to mean *the same response*: where the policy is sure of itself a batch holds
# identical ones, and we count those as the diagonal too.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
B, G = min(prompts_in_batch, len(table) // 2), responses_per_prompt
rollouts = dh.sample(policy, table.select(range(B)), G, max_new_tokens, seed=seed)
A = dh.objectives.group_advantages(rollouts.rewards, rollouts.prompt_index, scale=False).to(policy.dtype)
S, K = dh.score(policy, rollouts).log_probs.sum(1), dh.fisher_kernel(policy, rollouts)
parameters = sum(p.numel() for p in policy.parameters.values())
print(f"{B * G} rollouts, mean reward {rollouts.rewards.mean():.2f}, {parameters:,} parameters")

# %% [markdown]
# To put the entries on one scale we divide by the lengths of the two gradients, which leaves their cosine. For a random
# matrix $w$, the notes' crude model, it would be of size $1/\sqrt{N_{\rm params}}$ off the diagonal, and $K$ nearly the
# identity as long as there are fewer responses than parameters. The notes doubt this themselves and expect blocks.

# %%
tokens = torch.where(rollouts.response_mask, rollouts.response_ids, -1)
together = rollouts.prompt_index[:, None] == rollouts.prompt_index
equal = together & (tokens[:, None] == tokens).all(2)
kinds = {"same response": equal, "same prompt": together & ~equal, "other prompts": ~together}
cosine = K / K.diagonal().sqrt()[:, None] / K.diagonal().sqrt()
shift = K @ A / (B * G)
summary = {kind: [int(mask.sum()), float(K[mask].mean()), float(cosine[mask].abs().mean()),
                  float(shift @ ((K * mask) @ A / (B * G)) / (shift @ shift))] for kind, mask in kinds.items()}
summary = pd.DataFrame.from_dict(summary, "index", columns=["pairs", "mean K", "mean |cosine|", "share of δ log π"])
summary.round({"mean K": 1, "mean |cosine|": 2, "share of δ log π": 2})

# %% [markdown]
# The last column splits what the update does to its own rollouts, $\delta\log\pi(t_i)=\frac\eta{BG}\sum_jK_{ij}A_j$,
# into the parts of its three kinds of pairs, each projected on the whole. Inside a prompt the kernel is anything but
# diagonal: by the theorem, the entries off the diagonal have to make up for it, and here one sees how. The first row's
# mean $K$ is the typical $|\partial S|^2$; the notes hope for order one in the number of parameters, which one size
# of model cannot tell (exercise 4).

# %%
sizes = summary["mean |cosine|"]
ledger.refuted("03.34", "2.1", "as for a random w, K is nearly the identity (mean |cosine| inside a prompt)",
               counterexample=f"{B * G} rollouts of a transformer with {parameters:,} parameters",
               measured=sizes["same prompt"], expected=parameters**-0.5, tolerance=0.1)
ledger.holds("03.35", "2.1", "K is blocky: entries between prompts are smaller than inside (excess of mean |cosine|)",
             measured=max(0.0, sizes["other prompts"] - sizes["same prompt"]), expected=0, tolerance=1e-9)
ledger.refuted("03.36", "2.1", "K is diagonal: the share of δ log π that a response's own entry explains",
               counterexample="the transformer, on the update's own rollouts",
               measured=summary["share of δ log π"]["same response"], expected=1, tolerance=0.1)

# %% [markdown]
# Does $\frac1{BG}\sum_iK(t,t_i)A_i$ predict what a step does? We take two, one in which no rollout's log-prob is to
# move by more than 0.05 nats and one twenty times larger, and score both the update's rollouts and fresh ones: to the
# same prompts, and to as many others.

# %%
fresh = dh.sample(policy, table.select(range(2 * B)), G // 2, max_new_tokens, seed=seed + 1)
direction = {name: torch.empty_like(p) for name, p in policy.parameters.items()}
vector_to_parameters(flat_gradient(policy, S @ A / (B * G)), direction.values())
with torch.no_grad():
    S, S_fresh = (dh.score(policy, which).log_probs.sum(1) for which in (rollouts, fresh))
shift_fresh = dh.fisher_kernel(policy, fresh, rollouts) @ A / (B * G)
seen = fresh.prompt_index < B
samples = {"the update's rollouts": (rollouts, S, shift), "fresh, same prompts": (
    fresh.select(seen), S_fresh[seen], shift_fresh[seen]), "fresh, other prompts": (
    fresh.select(~seen), S_fresh[~seen], shift_fresh[~seen])}

# %%
rows, points = [], []
for largest in (0.05, 1.0):
    eta = float(largest / shift.abs().max())
    for name, (which, before, predicted) in samples.items():
        with torch.no_grad():
            actual = dh.score(policy, which, policy.shifted(direction, eta)).log_probs.sum(1) - before
        error = (actual - eta * predicted).square().mean().sqrt() / (eta * predicted).square().mean().sqrt()
        rows.append([f"{largest:g}", name, float(error)])
        points.append((largest, name, (eta * predicted).cpu(), actual.cpu()))
errors = pd.DataFrame(rows, columns=["largest change, nats", "rollouts", "relative error"])
errors = errors.pivot(index="rollouts", columns="largest change, nats", values="relative error")
ledger.holds("03.37", "2.1", "δ log π = η/B Σ K A on the transformer, for steps up to 0.05 nats (relative error)",
             measured=errors["0.05"]["the update's rollouts"], expected=0, tolerance=0.1)
errors.round(3)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
order = sorted(range(B * G), key=lambda i: (int(rollouts.prompt_index[i]), float(rollouts.rewards[i]), float(S[i])))
image = left.imshow(cosine[order][:, order].abs().cpu(), cmap="cividis", vmin=0, vmax=1)
figure.colorbar(image, ax=left, label="|cosine| of two gradients", shrink=0.85)
ticks = [G * n + G / 2 - 0.5 for n in range(B)]
left.set(xticks=ticks, yticks=ticks, xticklabels=range(1, B + 1), yticklabels=range(1, B + 1), xlabel="prompt",
         ylabel="prompt", title="The kernel is a matrix of blocks, one a prompt")
left.grid(False)
chosen = [(name, predicted, actual) for largest, name, predicted, actual in points if largest == 1.0]
for i, (name, predicted, actual) in enumerate(chosen):
    right.scatter(predicted, actual, s=24, alpha=0.75, color=f"C{i}", marker=dh.figures.MARKERS[i], label=name)
right.axline((0, 0), slope=1, color="0.3", linewidth=1)
right.set(xlabel="predicted change of log π(t), nats", ylabel="actual change, nats", aspect="equal",
          title="It predicts what a step does to each response")
right.legend()
dh.figures.save(figure, results, "03-kernel")

# %% [markdown]
# *Left: the normalised kernel of the rollouts, ordered by prompt, reward and log-prob; bright squares beside the
# diagonal are identical responses. Right: prediction against truth for the larger of the two steps, where the largest
# change was to be one nat; on the line the first order is exact.*
#
# ### And the entropy?
#
# The estimate of $\delta\mathcal H_1/\eta$ from pairs of different prompts is chapter 04's subject; it leaves out every
# block of the heat map. Taking $K$ for diagonal means the opposite: it keeps the pairs of a response with itself.

# %%
X = (S - S.view(B, G).mean(1).repeat_interleave(G)) / (G - 1)
terms = -X[:, None] * K * A / G
change = dh.u_statistic(terms.view(B, G, B, G).sum((1, 3)))
print(f"pairs from different prompts, U-statistic:  {change} nats per unit of learning rate")
for kind, mask in list(kinds.items())[:2]:
    print(f"what pairs of the {kind} would add:  {float((terms * mask).sum()) / B**2:+.1f}")

# %% [markdown]
# With so few prompts the first number is mostly noise, as its error says. The others estimate nothing: a response
# paired with itself tells what the step does to the update's own batch. In the formula $t$ is a fresh response to a
# fresh prompt, and the chance that the batch holds just that one is what $\pi(t)^2$ stood for in section 8.
#
# Fresh prompts can also show the two parts of section 9. On them we take a small step along $v$ and the opposite one;
# half the difference of the next-token entropies is the change at fixed prefixes, what the tokens' covariances see. The
# entropy to go needs the change of each token's log-prob beside it. As baseline we subtract the mean of the other
# responses to the prompt at the same position, which biases nothing.

# %%
eta = float(0.05 / shift.abs().max())
others = table.select(range(2 * B, min(2 * B + 64, len(table))))
fresh = dh.sample(policy, others, 8, max_new_tokens, seed=seed + 2)
with torch.no_grad():
    up, down, here = (dh.score(policy, fresh, policy.shifted(direction, step)) for step in (eta, -eta, 0.0))
at_prefixes = (up.entropies - down.entropies).sum(1) / (2 * eta)
to_go = here.entropies.sum(1, keepdim=True) - here.entropies.cumsum(1)
by_prompt = to_go.view(len(others), 8, -1)
level = ((by_prompt.sum(1, keepdim=True) - by_prompt) / 7).flatten(0, 1)
moving = ((up.log_probs - down.log_probs) / (2 * eta) * (to_go - level)).sum(1)
for name, part in {"at fixed prefixes": at_prefixes, "entropy to go": moving, "both": at_prefixes + moving}.items():
    print(f"{name:18} {dh.Estimate.mean(part, fresh.prompt_index)} nats per unit of learning rate")

# %% [markdown]
# The second line belongs to the change of the entropy as much as the first, and no covariance of tokens holds it.
# Before leaving it out, compare its size and its error with those of the first. Chapter 06 measures the whole with more
# prompts.
#
# ## What stands
#
# The chain from (1) to the kernel form is right, for every response and every group. Of the printed formulas, the
# Fisher information lacks its probabilities, the form for several prompts lacks the cross terms between them, and the
# covariance has lost its sign and holds for the natural gradient of a table. The supposition behind it cannot be met:
# no policy's kernel is diagonal. For tokens the covariance law is exact where prefixes stay as they are; what it leaves
# out, the entropy to go, can turn the sign; for whole responses the covariance of log-probability and its own change
# leaves out nothing.

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
#
# ## Further reading
#
# - Cui, G. et al. *The entropy mechanism of reinforcement learning for reasoning language models*, arXiv 2505.22617.
# - Amari, S. *Natural gradient works efficiently in learning*, Neural Computation 1998.
# - Jaakkola, T. and Haussler, D. *Exploiting generative models in discriminative classifiers*, NIPS 1998: the Fisher
#   kernel.
# - Kakade, S. *A natural policy gradient*, NIPS 2001.
