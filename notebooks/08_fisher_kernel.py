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
# # 08 · The Fisher kernel
#
# The kernel $K(t,t')=\sum_\alpha\partial_\alpha S(t)\,\partial_\alpha S(t')$ says what an update made by one response
# does to another. This chapter looks at it: which pairs it couples, how its spectrum compares with a random matrix, how
# it grows with the model, what adapters make of it, and which rollouts and tokens move the entropy through it.
#
# **What is checked**
#
# | | statement | source |
# |---|---|---|
# | 1 | $\delta\mathcal H_1$ from $K$, its diagonal, pairs of one prompt and of two | notes 2.1, 2.1.1 |
# | 2 | $K$ nearly the identity for $V^L<N_{\rm params}$, and a crossover there | notes 2.1 |
# | 3 | long sequences: off-diagonal pairs become more important | notes 2.1.1 |
# | 4 | blocks; correlations with the same prompt, shared subsequences, one token changed | notes 2.1 |
# | 5 | the spectrum of a Wishart matrix | notes 2.1 |
# | 6 | $w_{\alpha t}\sim1/\sqrt{N_{\rm params}}$, and a diagonal of order one | notes 2.1 |
# | 7 | "I wonder how LoRA affects all of this"; matrix sketching | notes 2.1, 2.1.1 |
# | 8 | $\delta\log\pi(t)=\frac\eta B\sum_iK(t,t_i)A(t_i)$, predicted and measured | notes 2.1 |
# | 9 | who else, beyond wrong answers with an unlikely token, lowers the entropy | notes 2.1.1, arXiv 2505.22617 |
#
# Everything is done for the plain kernel and with Adam's preconditioner,
# $K(t,t')=\sum_\alpha P_\alpha\,\partial_\alpha S(t)\,\partial_\alpha S(t')$. **You need** chapter 03, which proved
# that no softmax policy has a diagonal kernel, and for $P$ chapter 09. **You will learn** to read a kernel, how few
# directions a policy's updates live in, and to tell the tokens that close a policy from those that open it.

# %%
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import spearmanr, wishart
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

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
update_prompts = 10               # of the kernel, with 8 responses each, and 3 fresh ones
other_prompts = 32                # of the kernel, with one response each
attribution_prompts = 16          # of section 9's update, with 8 responses each
evaluation_prompts = 96           # of section 9's entropy, with one response each
widths = (32, 64, 128, 256, 384)  # of section 6's models
training_steps = 40               # of those up to 256 wide
max_new_tokens = 64

# %%
ledger, mechanism = dh.Ledger("08", source="notes"), "arXiv 2505.22617"
names = ["plain", "Adam's P"]
plain_sum = dh.objectives.Objective(dh.objectives.grpo, aggregation="constant", length=1)

# %% [markdown]
# `plain_sum` is the objective for which the notes' formulas hold to the letter: all tokens of a response weigh the
# same, and the loss is $-\frac1B\sum_iA_iS(t_i)$.
#
# ## 1 · Where every pair can be counted
#
# A random transformer over three tokens, four prompts of different lengths and all 60 responses of at most three
# tokens. $K$ is `fisher_kernel`; its rows can also be single tokens. As $S$ is the sum of its tokens' log-probs, a
# response's entry is the sum over a block of the token kernel. Advantages are the number of ones, centred for each
# prompt, and an AdamW step along the exact policy gradient supplies a preconditioner.

# %%
tiny = dh.exact.tiny_policy(vocabulary_size=3, eos_token_id=2, context_length=8, seed=seed + 2)
responses = dh.exact.every_response(tiny, [[0], [1, 0], [0, 0, 1], [1, 1, 0, 1]], max_new_tokens=3)
log_probs, D = dh.score(tiny, responses).log_probs.sum(1), 4
S, pi = log_probs.detach(), log_probs.detach().exp() / D
rewards = ((responses.response_ids == 1) & responses.response_mask).double().sum(1)
A, centred_S = (x - D * (pi * x).view(D, -1).sum(1).repeat_interleave(len(S) // D) for x in (rewards, S))
exact = responses.replace(advantages=len(S) * pi * A)
optimizers = [torch.optim.SGD(tiny.parameters.values(), lr=1.0), torch.optim.AdamW(tiny.parameters.values(), lr=1e-3)]
directions = [dh.update_direction(tiny, exact, plain_sum, optimizer=o).parts["rollouts"] for o in optimizers]
preconditioners = [dh.update_direction(tiny, exact, plain_sum, optimizer=o).preconditioner for o in optimizers]

# %%
tiny_K = [dh.fisher_kernel(tiny, responses, preconditioner=P) for P in preconditioners]
token_K = dh.fisher_kernel(tiny, responses, level="token")
w = torch.stack([flat_gradient(tiny, s) for s in log_probs])
member = torch.nn.functional.one_hot(responses.response_mask.nonzero()[:, 0]).double().T
ledger.holds("08.1", "2.1", "K = wᵀw, as fisher_kernel computes it (largest gap, relative)", expected=0,
             tolerance=1e-10, measured=(tiny_K[0] - w @ w.T).abs().max() / tiny_K[0].max())
ledger.holds("08.2", "derived here", "K of responses is the block sum of the tokens' (largest gap, relative)",
             measured=(tiny_K[0] - member @ token_K @ member.T).abs().max() / tiny_K[0].max(), expected=0,
             tolerance=1e-10)

# %% [markdown]
# The exact first-order change is the sum over all pairs of
# $-\pi(t)\,(S(t)-\bar S)\,K(t,t')\,A(t')\,\pi(t')$, here averaged over prompts on both sides. We hold it against
# the gradient of the exact entropy and split it by kind of pair.

# %%
whole_H = flat_gradient(tiny, -(log_probs.exp() * log_probs).sum() / D)
together = responses.prompt_index[:, None] == responses.prompt_index
same_row = torch.eye(len(S), dtype=torch.bool)
pairs = {"same response": same_row, "same prompt": together & ~same_row, "other prompts": ~together}
split, gaps = pd.DataFrame(index=pairs, columns=names, dtype=float), []

# %%
for name, K, v in zip(names, tiny_K, directions, strict=True):
    terms = -(pi * centred_S)[:, None] * K * (pi * A)
    exact_change = whole_H @ torch.cat([x.flatten() for x in v.values()])
    gaps.append(float((terms.sum() - exact_change).abs() / terms.abs().sum()))
    split[name] = [float(terms[mask].sum() / terms.sum()) for mask in pairs.values()]
ledger.holds("08.3", "2.1", "δH₁ = −η E E′[(S − S̄) K A], plain and with P (larger gap, relative)", measured=max(gaps),
             expected=0, tolerance=1e-10)
split.round(1)

# %% [markdown]
# The table shows shares of $\delta\mathcal H_1$; they sum to one. And $\delta\log\pi(t)=\eta\,\mathbb E'[K A]$ itself
# is the first term of a series: whatever is left must shrink as $\eta^2$.

# %%
for name, K, v in zip(names, tiny_K, directions, strict=True):
    predicted, left = K @ (pi * A), []
    for eta in (float(x / predicted.abs().max()) for x in (1e-3, 1e-4)):
        with torch.no_grad():
            after = dh.score(tiny, responses, tiny.shifted(v, eta)).log_probs.sum(1)
        left.append((after - S - eta * predicted).abs().max())
    ledger.holds(f"08.{4 + names.index(name)}", "2.1", f"δ log π = η E′[K A] to first order, {name}: order of the rest "
                 "(log-log slope)", measured=(left[0] / left[1]).log10(), expected=2, tolerance=0.02)

# %% [markdown]
# ## 2 · Is there a crossover at $V^L\sim N_{\rm params}$?
#
# For a true Wishart matrix, with independent entries of variance $\sigma^2$ in $w$, the notes expect $K$ to go "from
# nearly the identity for $V^L<N_{\rm params}$ to very much not". Both halves can be tested where $V^L$ passes
# $N_{\rm params}$: a transformer small enough to count, with two tokens and responses of exactly $L$ of them.
# Three numbers for each $L$:
#
# - the numerical *rank* of $w$, its singular values above $10^{-7}$ of the largest;
# - the mean square of the correlations $C(t,t')=K(t,t')/\sqrt{K(t,t)K(t',t')}$ off the diagonal, $1/N_{\rm params}$ for
#   a Wishart matrix;
# - the *effective number of directions* $(\mathrm{tr}F)^2/\mathrm{tr}F^2$ of the Fisher matrix
#   $F=w\,\mathrm{diag}(\pi)\, w^T$ (chapter 03: the $\pi$ belongs there). Junk responses have no weight in it, as the
#   notes ask. For a Wishart matrix it would be $1/(\sum\pi^2+1/N_{\rm params})$.

# %%
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(seed)
    tinier = dh.exact.exact_policy(GPT2LMHeadModel(GPT2Config(
        vocab_size=2, n_positions=10, n_embd=4, n_layer=1, n_head=2, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None)))
size = sum(p.numel() for p in tinier.parameters.values())
trees = {L: dh.exact.every_response(tinier, [[0]], L) for L in range(1, 10)}

# %%
optimizer = torch.optim.AdamW(tinier.parameters.values(), lr=1e-3)
tree_kernels = {}
for L, tree in trees.items():
    pi, ones = dh.exact.probabilities(dh.score(tinier, tree)).detach(), tree.response_ids.double().sum(1)
    tree = tree.replace(advantages=len(tree) * pi * (ones - pi @ ones))
    P = dh.update_direction(tinier, tree, plain_sum, optimizer=optimizer).preconditioner
    for name, preconditioner in zip(names, (None, P), strict=True):
        tree_kernels[L, name] = dh.fisher_kernel(tinier, tree, preconditioner=preconditioner)

# %%
rows = []
for (L, name), K in tree_kernels.items():
    S, ones = dh.score(tinier, trees[L]).log_probs.detach().sum(1), trees[L].response_ids.double().sum(1)
    pi, off = S.exp(), ~torch.eye(len(S), dtype=torch.bool)
    C = K * K.diagonal().rsqrt() * K.diagonal().rsqrt()[:, None]
    eigenvalues = torch.linalg.eigvalsh(K)
    terms = (pi * (S - pi @ S))[:, None] * K * (pi * (ones - pi @ ones))
    apart = (trees[L].response_ids[:, None] != trees[L].response_ids).sum(2)
    rows.append({"L": L, "kernel": name, "responses": len(S),
                 "rank": int((eigenvalues > 1e-14 * eigenvalues[-1]).sum()),
                 "mean square C": float(C[off].square().mean()),
                 "directions": float((pi @ K.diagonal()) ** 2 / (pi[:, None] * K * K * pi).sum()),
                 "of a Wishart matrix": float(1 / (pi.square().sum() + 1 / size)),
                 "drawn twice": float(pi.square().sum()),
                 "on the diagonal": float(terms.diagonal().abs().sum() / terms.abs().sum()),
                 "one token apart": float(C[apart == 1].mean()), "all tokens differ": float(C[apart == L].mean())})

# %%
trees_table = pd.DataFrame(rows).set_index("L")
print(f"{size} parameters")
trees_table[trees_table["kernel"] == "plain"].drop(columns="kernel").round(3)

# %% [markdown]
# Nothing happens at the crossing. Before it, $K$ is as far from the identity as after. The first zero eigenvalue is
# there from the start, because $\sum_t\pi(t)K(t,t')=0$: the rank is $V^L-1$ while it grows. It stops growing well below
# $N_{\rm params}$, since parameters are not independent directions: position embeddings that are never read, biases
# that a softmax or a norm takes away, and scores that differ by less than the numbers can hold. And the number of
# directions that matter hardly grows at all: a few, for two responses and for five hundred.

# %%
by_kernel = {name: trees_table[trees_table["kernel"] == name] for name in names}
plain_tree, last = by_kernel["plain"], max(trees)
ledger.corrected("08.6", "2.1", "K has zero eigenvalues once V^L > N_params (rank at V^L = 16)", expected=15,
                 as_printed=16, correction="from the start: the rank is V^L − 1, as E[∂S] = 0", tolerance=0.5,
                 measured=plain_tree["rank"][4])
ledger.refuted("08.7", "2.1", "the rank of K reaches N_params once V^L > N_params (rank over N_params)", tolerance=0.2,
               measured=plain_tree["rank"][last] / size, expected=1,
               counterexample=f"V^L = {2**last}, {size} parameters: many never matter")

# %%
for number, name in enumerate(names):
    here = by_kernel[name]
    ledger.refuted(f"08.{8 + number}", "2.1", f"K is nearly the identity for V^L < N_params, {name} (mean square "
                   "correlation at V^L = 32)", measured=here["mean square C"][5], expected=1 / size, tolerance=0.03,
                   counterexample=f"an enumerated transformer of {size} parameters")
    ledger.refuted(f"08.{10 + number}", "2.1", f"a crossover at V^L ~ N_params, {name}: effective directions at the "
                   "largest V^L as of a Wishart matrix (ratio)", expected=1, tolerance=0.5,
                   measured=here["directions"][last] / here["of a Wishart matrix"][last],
                   counterexample="the same: a few directions, at any V^L")

# %% [markdown]
# ### Long sequences
#
# The notes suspect that off-diagonal pairs become more important for long sequences, and call for theory. It is short.
# In the double expectation a pair $(t,t)$ has the weight $\pi(t)^2$: it counts only when the update has drawn the very
# response that is asked about. The diagonal's weight is $\sum_t\pi(t)^2$, the probability to draw a response twice, and
# that falls like $e^{-hL}$ with an entropy rate $h$. Entries off the diagonal do not fall, as their correlations do
# not. So the diagonal's share of $\sum|\ldots|$ must fall as the collision probability does.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
left.loglog(plain_tree["responses"], np.minimum(plain_tree["responses"], size), color="0.5", linestyle=":",
            label="rank, Wishart")
left.loglog(plain_tree["responses"], plain_tree["of a Wishart matrix"], color="0.5", linestyle="-.",
            label="effective directions, Wishart")
for i, (name, here) in enumerate(by_kernel.items()):
    style = {"marker": dh.figures.MARKERS[i], "linestyle": dh.figures.DASHES[i]}
    left.loglog(here["responses"], here["rank"], color="C0", **style, label=f"rank, {name}")
    left.loglog(here["responses"], here["directions"], color="C1", **style, label=f"effective directions, {name}")
    right.semilogy(here.index, here["on the diagonal"], color=f"C{i}", **style, label=f"diagonal's share, {name}")
left.axvline(size, color="0.3", linewidth=1)
left.set(xlabel="number of responses V^L (line: number of parameters)", ylabel="directions",
         title="No crossover: a few directions from first to last")
right.semilogy(plain_tree.index, plain_tree["drawn twice"], color="0.5", linestyle=":", label="Σπ², to draw one twice")
right.set(xlabel="tokens in a response, L", ylabel="share of Σ |terms of δH₁|",
          title="Long responses leave the diagonal")
for axes in (left, right):
    axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
dh.figures.save(figure, results, "08-crossover")

# %% [markdown]
# *Left: rank and effective number of directions of the exact kernel as responses outgrow the parameters, and what a
# Wishart matrix of the same shape and weights would have. Right: how much of the entropy change's terms sits on the
# diagonal.*

# %%
for number, (name, here) in enumerate(by_kernel.items()):
    order = spearmanr(here["on the diagonal"], here["drawn twice"]).statistic
    ledger.holds(f"08.{12 + 2 * number}", "2.1.1", "in long sequences pairs off the diagonal become more important, "
                 f"{name} (the diagonal's share of Σ|terms|, largest L over smallest)", expected=0, tolerance=0.25,
                 measured=here["on the diagonal"][last] / here["on the diagonal"][1])
    ledger.holds(f"08.{13 + 2 * number}", "derived here", f"that share falls as Σπ² does, {name} (rank correlation)",
                 measured=order, expected=1, tolerance=0.25)

# %%
ledger.corrected("08.16", "2.1", "sequences that differ by one token are highly correlated (mean C at L = 1 and V = 2)",
                 correction="not short ones: E[∂S] = 0 opposes them; the correlation grows with L", measured=plain_tree[
                     "one token apart"][1], expected=-1, as_printed=1, tolerance=1e-6)
ledger.holds("08.17", "2.1", "the same at the largest L (mean C)", measured=plain_tree["one token apart"][last],
             expected=1, tolerance=0.5)

# %% [markdown]
# The last columns of the table test the notes' example of two sequences that differ by one token. With $L=1$ they are
# all there is, and $E[\partial S]=0$ makes them opposite. As responses grow, the tokens they share outweigh the one
# they do not. Sequences that differ everywhere are opposed at first, and unrelated later.
#
# %% [markdown]
# ## 3 · Real rollouts
#
# Now the shipped policy. Four AdamW steps on prompts of their own give the optimizer a memory; everything after is at
# that point. The kernel is taken over one set of rollouts with three roles: groups of eight that make an *update*,
# three *fresh* responses to each of the same prompts, and one response to each of many *other* prompts.

# %%
policy = dh.load_policy(model, device, dtype)
table = dh.load_problems(problems, "train").shuffle(seed=seed)
optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-4)
for step in range(4):
    batch = dh.sample(policy, table.select(range(4 * step, 4 * step + 4)), 8, max_new_tokens, seed=seed + step)
    with torch.no_grad():
        old_log_probs = dh.score(policy, batch).log_probs
    dh.training.policy_gradient_step(policy, batch, old_log_probs, "grpo", optimizer)
N_params = sum(p.numel() for p in policy.parameters.values())

# %%
numbers = [n for n in range(update_prompts) for _ in range(11)] + list(
    range(update_prompts, update_prompts + other_prompts))
role = torch.tensor(([0] * 8 + [1] * 3) * update_prompts + [2] * other_prompts)
everything = dh.sample(policy, table.select([16 + n for n in numbers]), 1, max_new_tokens, seed=seed)
everything = everything.replace(prompt_index=torch.tensor(numbers)).to("cpu")
update = everything.select(role == 0)
descent = torch.optim.SGD(policy.parameters.values(), lr=1.0)

# %%
directions = {name: dh.update_direction(policy, update, plain_sum, optimizer=o, batch_size=16)
              for name, o in zip(names, (descent, optimizer), strict=True)}
kernels = {name: dh.fisher_kernel(policy, everything, preconditioner=d.preconditioner).cpu()
           for name, d in directions.items()}
with torch.no_grad():
    log_probs, entropies = (x.cpu() for x in dh.score(policy, everything, batch_size=16))
S, N = log_probs.sum(1), len(everything)
print(f"{N} rollouts, {N_params:,} parameters, mean reward {everything.rewards.mean():.2f}, "
      f"mean length {everything.lengths.double().mean():.1f}")

# %% [markdown]
# Correlations $C_{ij}=K_{ij}/\sqrt{K_{ii}K_{jj}}$ put all entries on one scale. For a Wishart matrix their mean square
# off the diagonal is $1/N_{\rm params}$. Turned round, $1/\langle C^2\rangle$ is the number of parameters of the
# Wishart matrix that would look like this one: an *effective number of directions*, and we take it for each kind of
# pair.

# %%
corr = {name: K * K.diagonal().rsqrt() * K.diagonal().rsqrt()[:, None] for name, K in kernels.items()}
tokens = torch.where(everything.response_mask, everything.response_ids, -1)
together = everything.prompt_index[:, None] == everything.prompt_index
above, equal = torch.ones(N, N).triu(1).bool(), together & (tokens[:, None] == tokens).all(2)
kinds = {"drawn twice": above & equal, "same prompt": above & together & ~equal, "other prompts": above & ~together}
rows = []

# %%
for kind, mask in list(kinds.items())[1:]:
    for name, C in corr.items():
        mean = dh.Estimate.mean(C[mask], everything.prompt_index[mask.nonzero()[:, 0]])
        rows.append([kind, name, int(mask.sum()), mean, float(C[mask].abs().mean()),
                     1 / float(C[mask].square().mean())])
columns = ["pairs", "kernel", "count", "mean C", "mean |C|", "1 / mean C²"]
blocks = pd.DataFrame(rows, columns=columns).set_index(["pairs", "kernel"])
print(f"{int(kinds['drawn twice'].sum())} pairs of identical responses, left out")
blocks.round(3)

# %%
effective = {name: blocks.loc[("other prompts", name), "1 / mean C²"] for name in names}
for number, name in enumerate(names):
    size_same, size_other = (blocks.loc[(kind, name), "mean |C|"] for kind in ("same prompt", "other prompts"))
    ledger.holds(f"08.{18 + number}", "2.1",
                 f"matrix elements are correlated if the prompts are the same, {name}: in size "
                 "(mean |C|, other prompts over same)", measured=size_other / size_same, expected=0, tolerance=0.5)
    ledger.refuted(f"08.{20 + number}", "2.1", f"the same, {name}: in sign (mean C of distinct responses)", expected=1,
                   tolerance=0.5, measured=blocks.loc[("same prompt", name), "mean C"].value,
                   counterexample="Σ_t π(t)K(t,t′) = 0: for every pair that agrees another is opposed")
    ledger.refuted(f"08.{22 + number}", "2.1", f"w as a Wishart matrix, {name}: 1/mean C² is N_params (log₁₀, other "
                   "prompts)", measured=np.log10(effective[name]), expected=np.log10(N_params), tolerance=1,
                   counterexample=f"a transformer of {N_params:,} parameters")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4.3))
kept = (role == 0).nonzero()[:, 0]
kept = kept[sorted(range(len(kept)), key=lambda i: (numbers[kept[i]], float(everything.rewards[kept[i]]),
                                                      float(S[kept[i]])))]
for axis, name in zip(axes, names, strict=False):
    image = axis.imshow(corr[name][kept][:, kept], cmap="cividis", vmin=-1, vmax=1)
    axis.set(xticks=range(0, 8 * update_prompts, 16), yticks=range(0, 8 * update_prompts, 16), xlabel="rollout",
             ylabel="rollout", title=f"K, {name}: blocks of prompts")
    axis.grid(False)
figure.colorbar(image, ax=axes[:2], label="correlation C", shrink=0.8)
edges = np.linspace(-1, 1, 41)
for i, (kind, name) in enumerate((k, n) for k in ("same prompt", "other prompts") for n in names):
    axes[2].stairs(np.histogram(corr[name][kinds[kind]], edges, density=True)[0], edges, color=f"C{i // 2}",
                   linewidth=2, linestyle=dh.figures.DASHES[i], label=f"{kind}, {name}")
axes[2].set(xlabel="correlation C", ylabel="density", yscale="log", title="Same prompt: strong ties of either sign")
axes[2].legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
dh.figures.save(figure, results, "08-blocks")

# %% [markdown]
# *Left and middle: correlations of the update's rollouts, eight a prompt, ordered by reward and probability in each
# block (bright: aligned, dark: opposed). Right: their distribution, identical responses left out.*
#
# So the guess of blocks is right and that of positive correlation is not. Responses to one prompt have much to do with
# each other, as allies or as rivals. The allies are mostly the identical ones, and $\sum_t\pi(t)K(t,t')=0$ demands
# that the others, on balance, be rivals. Between prompts a pair shares little, but not as little as in a random matrix:
# instead of a million independent directions, the table's last column has tens or hundreds. The preconditioner
# leaves the blocks as they are and raises the number of directions between prompts.
#
# In the notes' terms, the crossover is where responses, drawn for different prompts, outnumber *those* directions.
# Every batch of any use is far beyond it, and it never depended on $V^L$.
#
# ## 4 · What goes with an entry
#
# What makes two rollouts allies? The notes propose shared subsequences. We give each pair four measures of likeness:
# the shared prefix, in tokens; bags of tokens, compared by their cosine; the same two with every token weighted by its
# surprisal $-\log\pi$; and closeness in length. Rank correlations with $C$:

# %%
surprisal = -log_probs
shared = (tokens[:, None] == tokens) & (tokens[:, None] >= 0)
prefix = shared.long().cumprod(2).to(S)
weighted_prefix = (prefix * surprisal[:, None]).sum(2) / (S[:, None] * S).sqrt()
alike = {"prefix, tokens": prefix.sum(2), "prefix, surprisal": weighted_prefix}
for label, weight in (("bag of tokens", everything.response_mask.to(S)), ("bag, surprisal", surprisal)):
    bags = S.new_zeros(N, policy.vocabulary_size).scatter_add(1, everything.response_ids, weight)
    bags = torch.nn.functional.normalize(bags, dim=1)
    alike[label] = bags @ bags.T

# %%
lengths = everything.lengths.to(S)
alike["length"] = -(lengths[:, None] - lengths).abs()
rows = {label: {(kind, name): spearmanr(x[kinds[kind]], corr[name][kinds[kind]]).statistic
                for kind in ("same prompt", "other prompts") for name in names} for label, x in alike.items()}
likeness = pd.DataFrame.from_dict(rows, orient="index")
likeness.round(2)

# %% [markdown]
# What is shared must be *surprising*. A plain bag of tokens, or the length of a common prefix, says little; weighted by
# surprisal, the same bag is the best of the measures. The output layer shows why. Its part of the token kernel is
#
# $$ K^{\rm out}(k,l)=(e_k-\pi_k)\cdot(e_l-\pi_l)\;\;h_k\cdot h_l, $$
#
# with $e_k$ the token drawn and $h_k$ the hidden state. Any linear layer $Wx$ has this form. Its gradient is
# $G=\sum_kg_k\otimes x_k$, with $g_k$ what arrives at its output, so that $K$ is either the product of two such
# matrices, once they are formed, or $\sum_{kl}(g_k\cdot g'_l)(x_k\cdot x'_l)$ without forming them; `fisher_kernel`
# takes whichever is cheaper. At the output $g=e-\pi$: a token of probability one has no gradient at all, however often
# two responses share it.
#
# Rewards do not enter $K$, but right and wrong answers part ways at the tokens that matter:

# %%
R, (i, j) = everything.rewards.cpu(), kinds["same prompt"].nonzero().T
answers = {"both right": (R[i] == 1) & (R[j] == 1), "both wrong": (R[i] == 0) & (R[j] == 0),
           "one of each": R[i] != R[j]}
by_reward = pd.DataFrame({name: {kind: dh.Estimate.mean(corr[name][i, j][mask], everything.prompt_index[i][mask])
                                 for kind, mask in answers.items()} for name in names})
by_reward

# %% [markdown]
# The entries of one right and one wrong answer are negative on average. And the diagonal? Rank correlations of
# $K(t,t)$:

# %%
with_diagonal = pd.DataFrame({name: {label: spearmanr(x, K.diagonal()).statistic for label, x in {
    "length": lengths, "surprisal −log π": -S, "largest surprisal of a token": surprisal.amax(1), "reward": R}.items()}
                              for name, K in kernels.items()})
with_diagonal.round(2)

# %%
for number, name in enumerate(names):
    gain = min(likeness.loc["bag, surprisal", (kind, name)] for kind in ("same prompt", "other prompts"))
    ledger.holds(f"08.{24 + number}", "2.1", f"responses that share subsequences are more correlated, {name}: shared "
                 "surprisal (smaller rank correlation with C, shortfall from 0.1)", measured=max(0.0, 0.1 - gain),
                 expected=0, tolerance=1e-9)
    size_of_diagonal = spearmanr(-S, kernels[name].diagonal()).statistic
    ledger.holds(f"08.{26 + number}", "derived here", f"the diagonal grows with surprisal rather than length, {name} "
                 "(rank correlations, shortfall)", expected=0, tolerance=1e-9, measured=max(
                     0.0, spearmanr(lengths, kernels[name].diagonal()).statistic - size_of_diagonal))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
edges = np.array([0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0001])
for k, (kind, name) in enumerate((k, n) for k in ("same prompt", "other prompts") for n in names):
    x, C = alike["bag, surprisal"][kinds[kind]], corr[name][kinds[kind]]
    bins = [(x >= low) & (x < high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    means = [(float(x[b].mean()), float(C[b].mean())) for b in bins if b.sum() > 9]
    left.plot(*zip(*means, strict=True), color=f"C{k // 2}", marker=dh.figures.MARKERS[k],
              linestyle=dh.figures.DASHES[k],
              label=f"{kind}, {name}")
left.axhline(0, color="0.4", linewidth=1)
left.set(xlabel="shared surprisal (cosine of weighted bags)", ylabel="mean correlation C",
         title="Allies share surprising tokens")
for k, (label, right_answer) in enumerate({"wrong answer": 0, "right answer": 1}.items()):
    right.scatter(-S[R == right_answer], kernels["plain"].diagonal()[R == right_answer], s=26, alpha=0.7, color=f"C{k}",
                  marker=dh.figures.MARKERS[k], label=label)
right.set(xscale="log", yscale="log", xlabel="surprisal −log π(t), nats", ylabel="K(t,t), plain",
          title="The diagonal grows with surprisal")
for axes in (left, right):
    axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
dh.figures.save(figure, results, "08-likeness")

# %% [markdown]
# *Left: mean correlation of pairs against what they share. Right: every rollout's own entry.*
#
# ### One token changed
#
# For "two sequences that differ by one token" we make them: in a response to each of the prompts we put the likeliest
# other token in the place of one, once where the policy is least sure (the highest $H_k$) and once where it is surest.

# %%
chosen = torch.cat([(role == 2).nonzero()[:16, 0], (role == 0).nonzero()[::8, 0]])
edited = everything.select(chosen.repeat(3))
input_ids, M = edited.input_ids.clone(), len(chosen)
for row in range(M):
    ids, T = edited.input_ids[row][edited.attention_mask[row]], int(edited.lengths[row])
    with torch.no_grad():
        logits = policy.logits(ids[None].to(policy.device), T + 1)[0, :T].double().cpu()
    inside = entropies[chosen[row], :max(T - 1, 1)]
    for copy, k in enumerate((int(inside.argmax()), int(inside.argmin())), start=1):
        logits[k, ids[len(ids) - T + k]] = -torch.inf
        input_ids[row + copy * M, edited.prompt_length + k] = logits[k].argmax()

# %%
changed = []
for name, direction in directions.items():
    K = dh.fisher_kernel(policy, edited.replace(input_ids=input_ids), preconditioner=direction.preconditioner).cpu()
    for copy, place in enumerate(("least sure", "surest"), start=1):
        C = K.diagonal(copy * M)[:M] * (K.diagonal()[:M] * K.diagonal()[copy * M:(copy + 1) * M]).rsqrt()
        changed.append([place, name, dh.Estimate.mean(C), float(C.median())])
changed = pd.DataFrame(changed, columns=["changed where the policy is", "kernel", "mean C", "median C"])
changed.round(2)

# %%
for number, name in enumerate(names):
    least, surest = (changed[changed["kernel"] == name]["mean C"].iloc[k].value for k in range(2))
    ledger.refuted(f"08.{28 + number}", "2.1", f"two sequences that differ by one token are highly correlated, {name} "
                   "(mean C, larger of the two places)", measured=max(least, surest), expected=1, tolerance=0.2,
                   counterexample="a few tokens carry most of a response's gradient, and any one may be such")

# %% [markdown]
# A change at an open position replaces one of the few tokens that carry the gradient; a change at a sure one adds a
# token of huge surprisal, which then carries most of it. Neither leaves the gradient in place. The token kernel of two
# responses shows how uneven it is: they answer the same prompt, one rightly and one wrongly.

# %%
mixed = [n for n in range(update_prompts) if 0 < update.rewards[8 * n:8 * n + 8].mean() < 1]
group = update.select(slice(8 * mixed[0], 8 * mixed[0] + 8))
two = torch.tensor([int(group.rewards.argmax()), int(group.rewards.argmin())])
few = torch.cat([8 * mixed[0] + two] + [torch.tensor([8 * n]) for n in range(update_prompts) if n != mixed[0]][:2])
token_K = dh.fisher_kernel(policy, update.select(few), level="token").cpu()
where = update.select(few).response_mask.nonzero()

# %%
H = entropies[role == 0][few][where[:, 0], where[:, 1]]
share = float(token_K.diagonal()[H > 0.5].sum() / token_K.diagonal().sum())
pairs_share = float(token_K.abs()[H > 0.5][:, H > 0.5].sum() / token_K.abs().sum())
print(f"tokens where H > 0.5 nats: {(H > 0.5).double().mean():.0%} of all; they have {share:.0%} of the kernel's "
      f"trace, and pairs of them {pairs_share:.0%} of Σ|K|")
largest = token_K.diagonal().sort(descending=True).values
ledger.holds("08.30", "derived here", "the token kernel's trace sits at a few tokens (share of the largest tenth)",
             measured=largest[:len(largest) // 10].sum() / largest.sum(), expected=1, tolerance=0.3)

# %%
figure, axes = plt.subplots(figsize=(8.5, 6))
n_right, n_wrong = (int(x) for x in update.lengths[few[:2]])
block = token_K[:n_right, n_right:n_right + n_wrong]
sequences = [update.response_ids[row][update.response_mask[row]] for row in few[:2]]
labels = [[policy.tokenizer.decode([int(t)]).replace("\n", "⏎").replace("<|endoftext|>", "end") for t in sequence]
          for sequence in sequences]
reach = float(block.abs().max())
image = axes.imshow(block.sign() * (1 + block.abs()).log10(), cmap="cividis", vmin=-np.log10(1 + reach),
                    vmax=np.log10(1 + reach), aspect="auto")
axes.set(yticks=range(n_right), xticks=range(n_wrong), xlabel="tokens of the wrong answer",
         ylabel="tokens of the right answer", title="Two responses touch each other at a few tokens")
axes.set_yticklabels(labels[0], fontsize="x-small")
axes.set_xticklabels(labels[1], fontsize="x-small", rotation=90)
axes.grid(False)
figure.colorbar(image, label="sign(K) · log₁₀(1 + |K|)", shrink=0.8)
dh.figures.save(figure, results, "08-tokens")

# %% [markdown]
# *The token kernel of a right and a wrong answer to one prompt (bright: a step on one raises the other; dark: lowers
# it), on a logarithmic scale.*
# %% [markdown]
# ## 5 · The spectrum
#
# A Wishart matrix from $N$ rollouts and $P$ parameters has, divided by $P\sigma^2$, all its eigenvalues between
# $(1-\sqrt{N/P})^2$ and $(1+\sqrt{N/P})^2$ when both are large: the law of Marchenko and Pastur. "Nearly the identity"
# means $N\ll P$. To keep blocks out of it we take one response from each prompt, and compare the eigenvalues of $C$
# with two random matrices of the same $N$: one with $P=N_{\rm params}$, and one with the $P$ that has the same mean
# square of entries.

# %%
alone = torch.cat([(role == 0).nonzero()[::8, 0], (role == 2).nonzero()[:, 0]])
n, off = len(alone), ~torch.eye(len(alone), dtype=torch.bool)
ratio, many = 0.1, 4000
drawn = np.linalg.eigvalsh(wishart(many, np.eye(int(ratio * many))).rvs(random_state=seed) / many)
edge = (1 + ratio**0.5) ** 2
ledger.holds("08.31", "derived here", "a Wishart matrix with N = P/10: largest eigenvalue, at Marchenko–Pastur's edge",
             measured=drawn[-1], expected=edge, tolerance=0.1)
spectra, rows = {}, []

# %%
for name, C in corr.items():
    few_directions = 1 / float(C[alone][:, alone][off].square().mean())
    spectra[name] = torch.linalg.eigvalsh(C[alone][:, alone]).flip(0)
    rows.append([name, few_directions, float(spectra[name][0]), (1 + (n / few_directions) ** 0.5) ** 2,
                 (1 + (n / N_params) ** 0.5) ** 2, float(spectra[name].sum() ** 2 / spectra[name].square().sum())])
columns = ["kernel", "P of the same mean C²", "largest eigenvalue", "edge at that P", "edge at N_params", "directions"]
print(f"{n} responses to {n} prompts")
pd.DataFrame(rows, columns=columns).set_index("kernel").round(2)

# %%
figure, axes = plt.subplots()
for i, (name, eigenvalues) in enumerate(spectra.items()):
    axes.plot(range(1, n + 1), eigenvalues, color=f"C{i}", marker=dh.figures.MARKERS[i], markersize=4,
              label=f"K, {name}",
              linestyle="none")
generator = np.random.default_rng(seed)
for i, P in enumerate((round(rows[0][1]), round(rows[1][1]))):
    w = generator.standard_normal((n, P)) / P**0.5
    axes.plot(range(1, n + 1), np.linalg.eigvalsh(w @ w.T)[::-1], color=f"C{i}", linestyle=dh.figures.DASHES[i],
              label=f"Wishart, P = {P}")
random = np.linalg.eigvalsh(wishart(N_params, np.eye(n)).rvs(random_state=seed) / N_params)[::-1]
axes.plot(range(1, n + 1), random, color="0.3", linestyle=":", label=f"Wishart, P = {N_params:,}")
axes.set(xlabel="eigenvalue number", ylabel="eigenvalue of C", yscale="log", ylim=(0.02, None),
         title="Far from the identity, and higher at the top than a random matrix")
axes.legend(fontsize="small")
dh.figures.save(figure, results, "08-spectrum")

# %% [markdown]
# *Eigenvalues of the correlations among responses to different prompts (symbols), and of random matrices of the same
# size (lines): with as many parameters as the policy, and with as few as match the mean square of the entries.*
#
# With the policy's own number of parameters every eigenvalue would be one within a few hundredths. Matching the mean
# square brings the random matrix close, but not at the top: a few directions are shared by many prompts. So "a crude
# model" it can be, at a few dozen to a few hundred parameters.

# %%
for number, (name, _, largest, _, at_size, _) in enumerate(rows):
    ledger.refuted(f"08.{32 + number}", "2.1", f"a Wishart matrix: the spectrum ends at (1 + √(N/N_params))², {name} "
                   "(largest eigenvalue)", measured=largest, expected=at_size, tolerance=0.5,
                   counterexample=f"{n} responses to as many prompts")

# %% [markdown]
# ## 6 · Growing the model
#
# "The matrix elements $w_{\alpha t}$ hopefully scale like $1/\sqrt{N_{\rm params}}$", because weights do; "then the
# diagonal elements of $K$ would be of order one". The argument fails at the output layer already. Its gradient for one
# token is $(e_k-\pi_k)\otimes h_k$, and the norm before it makes $|h_k|^2=d$, the width, *whatever the scale of the
# weights*. So for a fresh model with its own output matrix
#
# $$ K(k,k)\ \ge\ |e_k-\pi_k|^2\,d\ \propto\ \sqrt{N_{\rm params}}\,, $$
#
# as $N_{\rm params}\propto d^2$ at a given depth. That is a bound, and its first part an identity.

# %%
settings = {"default": (True, None), "1/fan-in": (False, "fan-in"), "1/N_params": (False, "size"),
            "default, trained": (True, None)}
nets = {}

# %%
for label, width in [(label, width) for label in settings for width in widths]:
    (tied, spread), heads = settings[label], {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=policy.vocabulary_size, hidden_size=width, intermediate_size=3 * width, **heads,
                         num_hidden_layers=2, rms_norm_eps=1e-12, tie_word_embeddings=tied, bos_token_id=None,
                         max_position_embeddings=2048, eos_token_id=policy.eos_token_ids[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = Qwen2ForCausalLM(config)
        size = sum(p.numel() for p in net.parameters())
        for name, p in net.named_parameters():
            if p.ndim == 2 and spread:
                p.normal_(std=size**-0.5 if spread == "size" else 1.0 if "embed" in name else p.shape[1] ** -0.5)
    nets[label, width] = dh.Policy(net.to(policy.device))

# %%
probe = everything.select((role == 2).nonzero()[:8, 0])
probe = probe.replace(advantages=torch.tensor([1.0, -1.0] * 4), prompt_index=torch.arange(8) // 2)
fresh, one, width = nets["1/fan-in", widths[0]], probe.select(slice(0, 1)), widths[0]
ids, T = one.input_ids[one.attention_mask].to(policy.device), int(one.lengths[0])
with torch.no_grad():
    output = fresh.model(input_ids=ids[None], output_hidden_states=True)
h, probabilities = output.hidden_states[-1][0, -T - 1:-1], output.logits[0, -T - 1:-1].softmax(-1)
error = torch.nn.functional.one_hot(ids[-T:], fresh.vocabulary_size) - probabilities
by_hand = (error @ error.T) * (h @ h.T)
head = {"lm_head.weight": torch.ones_like(fresh.parameters["lm_head.weight"])}
from_library = dh.fisher_kernel(fresh, one, level="token", preconditioner=head)

# %%
ledger.holds("08.34", "derived here", "output layer: K(k,l) = (e_k − π_k)·(e_l − π_l) h_k·h_l (largest gap, relative)",
             measured=(by_hand - from_library).abs().max() / by_hand.max(), expected=0, tolerance=1e-4)
ledger.holds("08.35", "derived here", "|h|² is the width, at any scale of the weights (mean over d)", tolerance=1e-3,
             measured=h.square().sum(-1).mean() / width, expected=1)

# %% [markdown]
# How fast the whole diagonal grows depends on the other layers and so on the initialisation. Five widths, two layers,
# the same rollouts and random weights of three kinds: transformers' default (0.02 everywhere, output tied to the
# input), variance $1/\text{fan-in}$, and literally $1/\sqrt{N_{\rm params}}$. Random weights are not trained ones:
# training aligns layers with each other and makes most tokens certain, which shrinks $|e-\pi|$. So the smaller models
# are trained, too, for a few steps on worked answers, at AdamW's learning rate $10^{-3}$. The slopes are those of
# the root mean square of $\partial_\alpha S$ per token, for which the notes hope for $-\frac12$; of $K(t,t)$ per token,
# for which that means 0; and of the same with the preconditioner of an AdamW step from the fresh model.

# %%
worked = [(policy.encode([row["prompt"]])[0], policy.encode([row["solution"]])[0] + [policy.eos_token_ids[0]])
          for row in table.select(range(128))]
pad = torch.nn.utils.rnn.pad_sequence

# %%
for width in [w for w in widths if w <= 256]:
    net = nets["default, trained", width].model
    trainer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(training_steps):
        rows = [worked[(8 * step + i) % len(worked)] for i in range(8)]
        ids = pad([torch.tensor(p + a) for p, a in rows], batch_first=True).to(net.device)
        labels = pad([torch.tensor([-100] * len(p) + a) for p, a in rows], batch_first=True, padding_value=-100)
        trainer.zero_grad()
        net(input_ids=ids, labels=labels.to(net.device)).loss.backward()
        trainer.step()

# %%
growth = []
for (label, width), net in nets.items():
    if "trained" in label and width > 256:
        continue
    adam = torch.optim.AdamW(net.parameters.values(), lr=1e-3)
    P = dh.update_direction(net, probe, plain_sum, optimizer=adam).preconditioner
    size = sum(p.numel() for p in net.parameters.values())
    per_token = [float((dh.fisher_kernel(net, probe, preconditioner=p).diagonal().cpu() / probe.lengths).mean())
                 for p in (None, P)]
    growth.append([label, size, (per_token[0] / size) ** 0.5, *per_token])

# %%
columns = ["weights", "parameters", "rms of ∂S", "K per token, plain", "K per token, Adam's P"]
growth = pd.DataFrame(growth, columns=columns)
slopes = pd.DataFrame({column: {label: np.polyfit(np.log(g["parameters"]), np.log(g[column]), 1)[0] for label, g in
                                growth.groupby("weights", sort=False)} for column in columns[2:]})
slopes.round(1) + 0.0

# %%
for number, label in enumerate(settings):
    ledger.refuted(f"08.{36 + number}", "2.1", f"w ~ 1/√N_params, weights {label}: log-log slope of the rms of ∂S",
                   measured=slopes.loc[label, "rms of ∂S"], expected=-0.5, tolerance=0.1,
                   counterexample=f"{len(growth[growth['weights'] == label])} widths of one transformer")
    ledger.refuted(f"08.{40 + number}", "2.1", f"the diagonal of K is of order one, weights {label}: log-log slope of "
                   "K(t,t) per token", measured=slopes.loc[label, "K per token, plain"], expected=0, tolerance=0.2,
                   counterexample="the same")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
for i, (label, g) in enumerate(growth.groupby("weights", sort=False)):
    for axes, column in ((left, columns[2]), (right, columns[3])):
        axes.loglog(g["parameters"], g[column], color=f"C{i}", marker=dh.figures.MARKERS[i],
                    linestyle=dh.figures.DASHES[i], label=label)
x = growth["parameters"].agg(["min", "max"])
left.loglog(x, growth["rms of ∂S"].min() * (x / x.max()) ** -0.5, color="0.4", linewidth=1,
             label="slope −1/2, the hope")
right.loglog(x, 0.4 * growth[columns[3]].min() * (x / x.min()) ** 0.5, color="0.4", linewidth=1, label="slope 1/2")
left.set(xlabel="parameters", ylabel="root mean square of ∂S, per token", title="Scores shrink more slowly than hoped")
right.set(xlabel="parameters", ylabel="K(t,t) per token", title="so that the diagonal grows")
for axes in (left, right):
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
dh.figures.save(figure, results, "08-scaling")

# %% [markdown]
# *The size of single derivatives and of the kernel's diagonal, over the same rollouts, for models of growing width.*
#
# The hope fails for every kind of weights, even for the literal $1/\sqrt{N_{\rm params}}$: with a norm before each
# layer the scale of weights cancels out of what the output layer sees. $K$ is not of order one, it grows with the model
# by about $\sqrt{N_{\rm params}}$ at best and almost in proportion at worst. That is a reason for learning rates that
# fall with width, and for comparing kernels as correlations. Adam's preconditioner, which at a first step is $1/|g|$,
# does not repair it: for the default and for $1/\text{fan-in}$ the diagonal grows faster still.
#
# ## 7 · Sketches, and adapters as one
#
# ### Sketching
#
# $K$ needs gradients only through their inner products, and those survive a random projection. `fisher_sketch` maps
# each gradient to $m$ numbers, $K\approx ss^T$ without bias, with a standard error of about
# $\sqrt{(K_{ii}K_{jj}+K_{ij}^2)/m}$ for an entry.

# %%
sketched = update.select(slice(0, 16))
rows = []
for name, direction in directions.items():
    K = kernels[name][role == 0][:, role == 0][:16, :16]
    stated = (K.diagonal()[:, None] * K.diagonal() + K.square()).sqrt()
    for m in (64, 512, 4096):
        s = dh.fisher_sketch(policy, sketched, m, preconditioner=direction.preconditioner, seed=seed).cpu()
        rows.append([name, m, float((s @ s.T - K).norm() / K.norm()), float(
            ((s @ s.T - K) / stated * m**0.5).square().mean().sqrt())])

# %%
sketches = pd.DataFrame(rows, columns=["kernel", "m", "relative error", "error over stated"])
decay = [np.polyfit(np.log(g["m"]), np.log(g["relative error"]), 1)[0] for _, g in sketches.groupby("kernel")]
ledger.holds("08.44", "2.1.1", "matrix sketching: the relative error falls as 1/√m (log-log slope, both kernels)",
             measured=np.mean(decay), expected=-0.5, tolerance=0.2)
ledger.holds("08.45", "derived here", "the stated standard error is the measured one (root mean square ratio)",
             measured=sketches["error over stated"].pow(2).mean() ** 0.5, expected=1, tolerance=0.5)
sketches.pivot(index="m", columns="kernel", values=["relative error", "error over stated"]).round(2)

# %% [markdown]
# ### Adapters
#
# LoRA freezes $W$ and trains $W+\frac\alpha rBA$ with a random $A$ of $r$ rows and $B=0$. At the start $A$ has no
# gradient, as $B$ stands in front of it. With the gradient $G=\sum_kg_k\otimes x_k$ of the full matrix,
# $\partial S/\partial B=\frac\alpha rGA^T$, and
#
# $$ K_{\rm LoRA}(t,t')=\sum_{\rm layers}\frac{\alpha^2}{r^2}\sum_{kl}(g_k\cdot g'_l)\,(Ax_k\cdot Ax'_l),\qquad
#    \mathbb E_A[K_{\rm LoRA}]=\frac{\alpha^2\sigma^2}r\,K_{\rm adapted}, $$
#
# for entries of variance $\sigma^2$. So LoRA does to the inputs of each layer what a sketch does to gradients. It is
# not a smaller policy with another kernel but the *same kernel*, of the adapted layers, seen through a random lens
# whose error falls as $1/\sqrt r$; and with $\alpha$ fixed it shrinks as $1/r$, so that a learning rate must be found
# anew for each rank, unless one divides by $\sqrt r$ instead. We check it with gradients of 24 rollouts, all linear
# layers of the blocks adapted, $\sigma=1$ and $\alpha=\sqrt r$, so that the expectation is $K_{\rm adapted}$ at every
# rank.

# %%
linear = {name: module for name, module in policy.model.named_modules()
          if isinstance(module, torch.nn.Linear) and module is not policy.model.get_output_embeddings()}
index = torch.cat([(role == 0).nonzero()[:84:7, 0], (role == 2).nonzero()[:12, 0]])
lora_rollouts = everything.select(index)
weights = [f"{name}.weight" for name in linear]
G = {name: [] for name in weights}
for row in range(len(index)):
    value = dh.score(policy, lora_rollouts.select(slice(row, row + 1))).log_probs.sum()
    for name, g in zip(weights, torch.autograd.grad(value, [policy.parameters[name] for name in weights]), strict=True):
        G[name].append(g)

# %%
G = {name: torch.stack(g) for name, g in G.items()}
ones = {name: torch.ones_like(policy.parameters[name]) for name in weights}
expected = sum(torch.einsum("noi,moi->nm", g, g) for g in G.values()).cpu()
from_library = dh.fisher_kernel(policy, lora_rollouts, preconditioner=ones).cpu()
ledger.holds("08.46", "derived here", "K of the adapted layers alone, as fisher_kernel has it (largest gap, relative)",
             measured=(from_library - expected).abs().max() / expected.max(), expected=0,
             tolerance=1e4 * torch.finfo(policy.dtype).eps)

# %%
generator = torch.Generator().manual_seed(seed)
ranks, draws, whole = (1, 2, 4, 8, 16), 24, kernels[names[0]][index][:, index]
pairs = torch.ones(len(index), len(index)).triu(1).bool() & ~equal[index][:, index]
apart = pairs & ~together[index][:, index]
full_corr = whole * whole.diagonal().rsqrt() * whole.diagonal().rsqrt()[:, None]
lora = {}

# %%
for r in ranks:
    for _ in range(draws):
        K = 0.0
        for g in G.values():
            lens = torch.randn(r, g.shape[2], generator=generator, dtype=torch.float64).to(g)
            seen = (g @ lens.T).flatten(1)
            K = K + seen @ seen.T / r
        lora.setdefault(r, []).append(K.cpu())

# %%
lora = {r: torch.stack(K) for r, K in lora.items()}
error = {r: float((K - expected).square().sum((1, 2)).mean().sqrt() / expected.norm()) for r, K in lora.items()}
bias = {r: float((K.mean(0) - expected).norm() / expected.norm()) / (error[r] / draws**0.5) for r, K in lora.items()}

# %%
rows, sets = [], {"all parameters": whole[None], "adapted layers": expected[None]}
for label, Ks in (sets | {f"LoRA, r = {r}": K for r, K in lora.items()}).items():
    scale = Ks.diagonal(dim1=1, dim2=2).rsqrt()
    C = Ks * scale[:, None] * scale[..., None]
    directions_of_C = C.diagonal(dim1=1, dim2=2).sum(1) ** 2 / C.square().sum((1, 2))
    rows.append([label, float(directions_of_C.mean()), float((1 / C[:, apart].square().mean(1)).mean()),
                 np.mean([spearmanr(c[pairs], full_corr[pairs]).statistic for c in C])])
columns = ["gradients of", "directions of C", "1 / mean C², other prompts", "rank correlation with K"]
ledger.holds("08.47", "derived here", "E_A[K_LoRA] = α²σ²/r K_adapted (error of the mean of draws over what scatter "
             "allows, mean over r)", measured=np.mean(list(bias.values())), expected=1, tolerance=0.5)
ledger.holds("08.48", "derived here", "K_LoRA's relative error falls as 1/√r (log-log slope)", expected=-0.5,
             measured=np.polyfit(np.log(ranks), np.log(list(error.values())), 1)[0], tolerance=0.15)
lora_table = pd.DataFrame(rows, columns=columns).set_index("gradients of")
lora_table.round(2)

# %%
ledger.holds("08.49", "2.1", "how LoRA affects all of this: not in the number of directions (log₁₀ of 1/mean C², "
             "rank 8, against the adapted layers')", expected=np.log10(lora_table.iloc[1, 1]), tolerance=0.2,
             measured=np.log10(lora_table.loc["LoRA, r = 8"].iloc[1]))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3))
for i, (name, g) in enumerate(sketches.groupby("kernel", sort=False)):
    left.loglog(g["m"], g["relative error"], color=f"C{i}", marker=dh.figures.MARKERS[i], linestyle="none", label=name)
x = sketches["m"].agg(["min", "max"])
left.loglog(x, sketches["relative error"].max() * (x / x.min()) ** -0.5, color="0.4", label="slope −1/2")
right.loglog(ranks, list(error.values()), "o", color="C2", label="LoRA at its start, root mean square over draws")
right.loglog(ranks, error[1] * np.array(ranks) ** -0.5, color="0.4", label="slope −1/2")
left.set(xlabel="numbers kept of each gradient, m", ylabel="relative error of K", title="A sketch of gradients")
right.set(xlabel="rank r", ylabel="relative error of the adapted layers' K", title="LoRA is a sketch of inputs")
for axes in (left, right):
    axes.legend(fontsize="small")
dh.figures.save(figure, results, "08-sketches")

# %% [markdown]
# *Error of the kernel (Frobenius norm, relative) from a sketch of $m$ numbers, and from adapters of rank $r$.*
#
# The rank of $K$ has not become an issue: even at $r=1$ the adapters have far more parameters than the kernel has
# directions. What LoRA leaves out is what it does not adapt, embeddings and the output layer, as the rank correlation
# of the second line shows.
#
# Then $B$ moves, and $A$ gets a gradient. With the adapters as a module, we train rank 8 for three AdamW steps, at a
# learning rate usual for adapters, and split the kernel into $B$'s part and $A$'s.

# %%
class LowRank(torch.nn.Module):
    def __init__(self, layer, rank):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), rank**-0.5
        self.A = torch.nn.Parameter(torch.randn(rank, layer.in_features).to(layer.weight) * layer.in_features**-0.5)
        self.B = torch.nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + self.scale * x @ self.A.T @ self.B.T

# %%
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(seed)
    adapters = dh.load_policy(model, device, dtype)
    adapters.model.load_state_dict(policy.model.state_dict())
    adapters.model.requires_grad_(False)
    for name in linear:
        setattr(adapters.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2],
                LowRank(adapters.model.get_submodule(name), 8))

# %%
lens = {name: adapters.parameters[f"{name}.A"].detach().clone() for name in linear}
start = dh.fisher_kernel(adapters, lora_rollouts).cpu()
predicted = sum((g @ lens[name.removesuffix(".weight")].T).flatten(1) @ (
    g @ lens[name.removesuffix(".weight")].T).flatten(1).T / 8 for name, g in G.items()).cpu()
ledger.holds("08.50", "derived here", "a fresh adapter's kernel is the formula's, A without a gradient (largest gap, "
             "relative)", measured=(start - predicted).abs().max() / predicted.max(), expected=0,
             tolerance=1e4 * torch.finfo(policy.dtype).eps)

# %%
trainer = torch.optim.AdamW(adapters.parameters.values(), lr=1e-3)
few_updates = update.select(slice(0, 32)).to(policy.device)
for _ in range(3):
    with torch.no_grad():
        old = dh.score(adapters, few_updates).log_probs
    dh.training.policy_gradient_step(adapters, few_updates, old, "grpo", trainer)
P = dh.update_direction(adapters, few_updates, plain_sum, optimizer=trainer).preconditioner
parts, rows = {}, []

# %%
for name in names:
    scale = {n: P[n] if name == names[1] else torch.ones_like(p) for n, p in adapters.parameters.items()}
    for part in ("A", "B"):
        only = {n: x for n, x in scale.items() if n.endswith(part)}
        parts[name, part] = dh.fisher_kernel(adapters, lora_rollouts, preconditioner=only).cpu()
    K, reference = parts[name, "A"] + parts[name, "B"], kernels[name][index][:, index]
    C, C_full = (x * x.diagonal().rsqrt() * x.diagonal().rsqrt()[:, None] for x in (K, reference))
    rows.append([name, float(parts[name, "A"].trace() / K.trace()), 1 / float(C[apart].square().mean()),
                 1 / float(C_full[apart].square().mean()), spearmanr(C[pairs], C_full[pairs]).statistic])
columns = ["kernel", "A's share of the trace", "1 / mean C², adapters", "of the full kernel",
           "rank correlation of the two"]
pd.DataFrame(rows, columns=columns).set_index("kernel").round(3)

# %% [markdown]
# In the plain kernel $A$'s part is still small after these steps, of order $|B|^2/|A|^2$. Adam divides each gradient by
# its own size and so brings $A$ forward: with a preconditioner the lens itself starts to move, and with it the
# directions that the adapters can see.
#
# ## 8 · What a step does to each response
#
# With $K$ at hand, $\delta\log\pi(t)=\frac\eta B\sum_iK(t,t_i)A(t_i)$ needs nothing else. The update is the batch of
# section 3; we predict the fresh responses and those to other prompts, and measure with real steps of growing size. The
# preconditioned step is the part of an AdamW step that its rollouts make (chapter 09 has the rest). First an identity
# that ties kernel and step together, $\sum_\alpha v_\alpha^2/P_\alpha=\frac1{B^2}A^TKA$.

# %%
held_out, B = role > 0, int((role == 0).sum())
advantages = dh.objectives.group_advantages(update.rewards, update.prompt_index).double()
predicted = {name: K[held_out][:, role == 0] @ advantages / B for name, K in kernels.items()}
rows, gaps = [], []

# %%
for name, direction in directions.items():
    step, P = direction.parts["rollouts"], direction.preconditioner
    own = kernels[name][role == 0][:, role == 0]
    gaps.append(float(sum((v.square() / P[n]).sum() for n, v in step.items() if n in P) / (
        advantages @ own @ advantages)))
    for largest in (0.01, 0.1, 1.0):
        eta = float(largest / predicted[name].abs().max())
        with torch.no_grad():
            after = dh.score(policy, everything.select(held_out), policy.shifted(step, eta)).log_probs.sum(1).cpu()
        actual, line = after - S[held_out], eta * predicted[name]
        rows.append([name, largest, float(actual @ line / (line @ line)), float(
            1 - (actual - line).square().sum() / actual.square().sum())])

# %%
columns = ["step", "largest change, nats", "slope", "R²"]
steps = pd.DataFrame(rows, columns=columns)
steps.pivot(index="largest change, nats", columns="step", values=["slope", "R²"]).round(3)

# %%
ledger.holds("08.51", "derived here", "Σ v²/P = AᵀKA/B² for the steps of section 3 (both, ratio)", expected=1,
             measured=max(gaps, key=lambda x: abs(x * B**2 - 1)) * B**2, tolerance=1e-5)
for number, name in enumerate(names):
    small = steps[(steps["step"] == name) & (steps["largest change, nats"] == 0.01)].iloc[0]
    ledger.holds(f"08.{52 + 2 * number}", "2.1", f"δ log π(t) = η/B Σ K(t,t_i)A(t_i), {name}, steps of 0.01 nats: "
                 "slope of measured on predicted", measured=small["slope"], expected=1, tolerance=0.02)
    ledger.holds(f"08.{53 + 2 * number}", "2.1", f"the same: R², {name}", measured=small["R²"], expected=1,
                 tolerance=0.02)

# %% [markdown]
# At small steps the prediction is right for responses that the update never saw, with either kernel; when the largest
# change comes to a nat, the rest of the series shows.
#
# ## 9 · Who moves the entropy
#
# ### The diagonal
#
# How much of $\delta\mathcal H_1=-\frac\eta B\sum_i\mathbb E_t[(S(t)-\bar S)K(t,t_i)A(t_i)]$ does the diagonal give? It
# depends on who $t$ is. If $t$ runs over the update's *own* rollouts, the diagonal is there by construction, and the
# result is not an estimate of $\delta\mathcal H_1$ but biased by it (chapter 05). If $t$ is *fresh*, the diagonal
# consists of responses that happen to be drawn again. $\bar S$ is the mean of the prompt's update rollouts.

# %%
S_bar = torch.stack([S[(role == 0) & (everything.prompt_index == n)].mean() for n in range(update_prompts)])
rows = []
for label, which in {"own rollouts": role == 0, "fresh, same prompts": role == 1}.items():
    centred = S[which] - S_bar[everything.prompt_index[which]]
    relation = {"the same response": equal, "same prompt": together & ~equal, "other prompts": ~together}
    for name, K in kernels.items():
        terms = -centred[:, None] * K[which][:, role == 0] * advantages / (B * len(centred))
        masks = [mask[which][:, role == 0] for mask in relation.values()]
        rows.append([label, name, *(float(terms[m].abs().sum() / terms.abs().sum()) for m in masks), *(
            dh.Estimate.mean((terms * m).sum(1) * len(centred) / terms.abs().sum(), everything.prompt_index[which])
            for m in masks)])

# %%
columns = pd.MultiIndex.from_product([["share of Σ|terms|", "net"], relation])
diagonal = pd.DataFrame([row[2:] for row in rows], columns=columns,
                        index=pd.MultiIndex.from_tuples([row[:2] for row in rows], names=["t among", "kernel"]))
diagonal.round(2)

# %%
for number, name in enumerate(names):
    ledger.refuted(f"08.{56 + number}", "2.1.1", f"the diagonal gives δH₁, {name} (its share of Σ|terms|, fresh "
                   "responses to the update's own prompts)",
                   measured=diagonal.loc[("fresh, same prompts", name)].iloc[0],
                   expected=1, tolerance=0.5, counterexample="it needs the same response to be drawn again")

# %% [markdown]
# Net sums, relative to the sum of all sizes, hardly stand out from their errors at this number of prompts: terms of
# both signs nearly cancel. Sizes are clear. On the update's own rollouts the diagonal is much; on fresh responses to
# the same prompts it is what the policy's sureness leaves, and most weight is on pairs of *different* responses. For
# the entropy over all prompts, of which a batch holds hardly any, only the last column remains.
#
# ### Tokens
#
# `attribution` gives every token of an update its share of the entropy change at prompts outside the update, with the
# low-variance estimators of chapters 05 and 06 in place of $S-\bar S$. The update has more prompts for this; the
# evaluation is done twice, with different prompts, to see what is noise. Where the two agree poorly, a single token's
# share says little, and only sums over many tokens are to be read.

# %%
start = 16 + update_prompts + other_prompts
blame = dh.sample(policy, table.select(range(start, start + attribution_prompts)), 8, max_new_tokens, seed=seed + 1)
half, start = evaluation_prompts // 2, start + attribution_prompts
halves = [dh.sample(policy, table.select(range(first, first + half)), 1, max_new_tokens, seed=seed + 2)
          for first in (start, start + half)]
with torch.no_grad():
    s, H = (x.cpu() for x in dh.score(policy, blame, batch_size=16))
tokens_moved, changes = {}, {}

# %%
for name, o in zip(names, (descent, optimizer), strict=True):
    direction = dh.update_direction(policy, blame, plain_sum, optimizer=o, batch_size=16)
    changes[name] = [dh.entropy_change(policy, E, direction, per="sequence", batch_size=16) for E in halves]
    tokens_moved[name] = torch.stack([dh.attribution(policy, E, direction, change, batch_size=16).tokens.cpu()
                                      for E, change in zip(halves, changes[name], strict=True)])
mask, sign = blame.response_mask.cpu(), direction.token_weights.sign().cpu()
for name, x in tokens_moved.items():
    print(f"{name:9} correlation of the two halves: tokens {torch.corrcoef(x[:, mask])[0, 1]:.2f}, "
          f"rollouts {torch.corrcoef(x.sum(2))[0, 1]:.2f}")

# %% [markdown]
# Which tokens are these? Nearly all of $\sum|\ldots|$ sits where the policy is open. There, the covariance law of
# chapter 03 suggests an order: a step raises or lowers $\log\pi$ of a token according to its advantage, and that closes
# the distribution if the token was *likelier than typical*, $\log\pi>-H_k$, and opens it otherwise. With the sign of
# $A$ this makes four classes. Cui et al.'s, a wrong answer's very unlikely token, is a corner of one of them; we cut it
# out at $\pi<0.1$.

# %%
likely, wrong, moved = s > -H, sign < 0, mask & (sign != 0)
classes = {"wrong, π < 0.1 (Cui et al.)": moved & wrong & (s < np.log(0.1)),
           "wrong, other unlikely": moved & wrong & ~likely & (s >= np.log(0.1)),
           "right, likely": moved & ~wrong & likely, "wrong, likely": moved & wrong & likely & (s >= np.log(0.1)),
           "right, unlikely": moved & ~wrong & ~likely}
rank = (mask & (H > 0.5)).long().cumsum(1)
repeats = (blame.response_ids[:, None] == blame.response_ids).all(2).cpu() & (
    blame.prompt_index[:, None] == blame.prompt_index).cpu()

# %%
rate = blame.rewards.view(-1, 8).mean(1).repeat_interleave(8).cpu()[:, None]
last_token = torch.arange(mask.shape[1]) == (blame.lengths - 1).cpu()[:, None]
others = {"H > 0.5 nats": moved & (H > 0.5), "the first of these": moved & (H > 0.5) & (rank == 1),
          "the second": moved & (H > 0.5) & (rank == 2), "later": moved & (H > 0.5) & (rank > 2),
          "responses drawn twice": moved & (repeats.sum(1) > 1)[:, None],
          "drawn once": moved & (repeats.sum(1) == 1)[:, None], "hard prompts (under half right)": moved & (rate < 0.5),
          "easy prompts": moved & (rate >= 0.5)}

# %%
rows = []
for m in {**classes, **others}.values():
    row = {"of tokens": float(m.sum() / mask.sum())}
    for name, x in tokens_moved.items():
        mean, size = x.mean(0), x.mean(0).abs().sum()
        row[f"size, {name}"] = float(mean[m].abs().sum() / size)
        row[f"net, {name}"] = dh.Estimate.mean((mean * m).sum(1) * len(blame) / size, blame.prompt_index.cpu())
    rows.append(row)

# %%
shares = pd.DataFrame(rows, index=[*classes, *others])
for name, x in tokens_moved.items():
    last_share = x.mean(0)[mask & last_token].abs().sum() / x.mean(0).abs().sum()
    print(f"last tokens (EOS or cut), share of size, {name}: {last_share:.2f}")
shares.round(2)

# %% [markdown]
# All numbers are relative to the sum of sizes; negative is less entropy, errors are over the update's prompts. The
# first three classes tend to close the policy, the next two open it, and the net change of the entropy is a small
# difference of the two. Cui et al.'s tokens have a size that is large for their number, but they are few, and what they
# take is a small part of the whole. *Likely tokens of right answers* close the policy as well, and so do wrong answers'
# moderately unlikely ones: neither has an outlier in it, and both have a larger size.

# %%
for number, name in enumerate(names):
    x, net = tokens_moved[name].mean(0), shares[f"net, {name}"]
    closing = [net.iloc[i].value for i in range(3)]
    follows = (x.sign() == -(sign * (s + H)).sign()) & moved
    ledger.corrected(f"08.{58 + number}", "2.1.1", f"wrong answers with an unlikely token close the policy, {name}: "
                     "their share of what the closing classes take",
                     correction="they are one class of three: add likely "
                     "tokens of right answers, and wrong answers' other unlikely ones",
                     measured=closing[0] / sum(closing),
                     expected=1 / 6, as_printed=1, tolerance=0.4, source=mechanism)
    ledger.holds(f"08.{60 + number}", "2.1.1", f"other types that lower the entropy, {name}: likely tokens of right "
                 "answers, by the same measure", measured=closing[2] / sum(closing), expected=0.45, tolerance=0.4)
    follow = float(x[follows].abs().sum() / x.abs().sum())
    ledger.holds(f"08.{62 + number}", "derived here",
                 f"sign of a token's share is mostly that of −A (log π + H), {name} "
                 "(share of size, shortfall from 0.6)", measured=max(0.0, 0.6 - follow), expected=0, tolerance=1e-9)
    print(f"{name}: the sign of −A (log π + H) is right for {follow:.0%} of the size")
    ledger.holds(f"08.{64 + number}", "derived here", f"tokens with H > 0.5 nats carry the change, {name} (share of "
                 "size)", measured=shares.loc["H > 0.5 nats", f"size, {name}"], expected=1, tolerance=0.25)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1.2, 1))
x, shown = tokens_moved["plain"].mean(0), mask & (H > 0.5)
unit = x.abs().sum() / 100
for i, (label, m) in enumerate({"right answers, A > 0": ~wrong, "wrong answers, A < 0": wrong}.items()):
    m = m & shown & moved
    left.scatter((s + H)[m], x[m] / unit, s=20, alpha=0.6, color=f"C{i}", marker=dh.figures.MARKERS[i], label=label)
left.axhline(0, color="0.4", linewidth=1)
left.axvline(0, color="0.4", linewidth=1)
left.set(xlabel="log π + H: likelier than typical to the right, nats", ylabel="share of the entropy change, %",
         yscale="symlog", title="Right and likely, or wrong and unlikely: the policy closes",
         yticks=[-10, -1, 0, 1, 10])
left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
height = np.arange(len(classes))
for i, name in enumerate(names):
    net = shares[f"net, {name}"].iloc[:len(classes)]
    right.barh(height + 0.2 - 0.4 * i, [100 * e.value for e in net], 0.38, xerr=[100 * e.standard_error for e in net],
               color=f"C{i}", hatch=("", "//")[i], edgecolor="white", label=name, error_kw={"elinewidth": 1})
right.axvline(0, color="0.4", linewidth=1)
right.set(yticks=height, yticklabels=list(classes), xlabel="net entropy change, % of all sizes",
          title="Five classes of tokens")
right.invert_yaxis()
right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
dh.figures.save(figure, results, "08-causes")

# %% [markdown]
# *Left: the share of single tokens of the update in the entropy change at other prompts, plain steps, where the policy
# is open; the four quadrants are the classes. Right: the classes' net effect, with standard errors over the update's
# prompts.*
#
# What else do they have in common? They are *early*. The first open token of a response, where it chooses its style,
# often has half of the size, and its net is not what closes the policy: styles are opened at least as much as closed.
# The last token has no part in it. Responses that a group drew twice or more, which are likely ones, tend to close the
# policy.
# How hard a prompt is makes no clear difference, once it has both kinds of answers. With Adam's preconditioner the
# classes keep their signs.
#
# ## What stands
#
# The kernel form of $\delta\mathcal H_1$ is exact and, as a prediction of $\delta\log\pi$, right to first order on
# held-out responses. $K$ is blocky, as the notes guessed, but its entries have either sign inside a block, and a shared
# token counts by its surprisal. It is no Wishart matrix with $N_{\rm params}$ columns: across prompts it has the
# second moment of one with tens to hundreds, so that the crossover is at as many responses, whatever $V^L$ is. Its
# diagonal is not of order one but grows with the model, because norms fix the size of activations instead of
# weights. LoRA is a sketch of the same kernel. The preconditioner changes sizes, raises the number of directions, and
# leaves all of these conclusions.
#
# The diagonal matters for a batch's own rollouts and little else, the less the longer the responses. Beside wrong
# answers with an outlier there is a larger class that lowers the entropy: right answers' likely tokens at the few
# places where the policy was undecided.

# %%
ledger.save(results)
ledger

# %% [markdown]
# ## Exercises
#
# 1. In section 2 give the policy an EOS token. Which of the columns still depend on $L$?
# 2. Show that the mean of $C$ over distinct responses of one prompt is negative, if all $K(t,t)$ are equal.
# 3. Repeat section 6 with depth instead of width. What does the bound from the output layer say then?
# 4. Adapt only the attention layers in section 7. Does the rank correlation with the full kernel fall?
# 5. Clip the advantages of the class "right, likely" to zero in section 9. What is left of the net change, and what
#    does it cost in reward?
#
# ## Further reading
#
# - Jacot, A., Gabriel, F. and Hongler, C. *Neural tangent kernel*, arXiv 1806.07572: the same kernel for a network's
#   outputs, and its scaling with width.
# - Marchenko, V. A. and Pastur, L. A. *Distribution of eigenvalues for some sets of random matrices*, 1967.
# - Hu, E. J. et al. *LoRA*, arXiv 2106.09685; Kalajdzievski, D. *A rank stabilization scaling factor for fine-tuning
#   with LoRA*, arXiv 2312.03732: why $\alpha/\sqrt r$.
# - Yang, G. et al. *Tensor programs V*, arXiv 2203.03466: learning rates that fall with width.
# - Cui, G. et al. *The entropy mechanism of reinforcement learning for reasoning language models*, arXiv 2505.22617.
