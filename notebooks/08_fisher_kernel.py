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
# ## In short
#
# - $K$ is blocky: entries within a prompt are larger than between prompts by 0.24 ± 0.07 in mean size
#   [08.18](#ledger-08.18). Allies they are not: $\sum_t\pi(t)K(t,t')=0$ makes distinct responses to one prompt rivals
#   on average. Between prompts, allies share *surprising* tokens: a rank correlation of 0.44 ± 0.05
#   [08.68](#ledger-08.68); within a prompt that is not decided.
# - As a random matrix $K$ has tens of parameters, not 844,160: the mean square correlation of different prompts is
#   0.017 ± 0.003 [08.22](#ledger-08.22). There is no crossover at $V^L\sim N_{\rm params}$ [08.10](#ledger-08.10).
# - Its diagonal is not of order one. It grows with the model, with an exponent of 0.5 to 1 in the number of parameters,
#   for four kinds of weights [08.40](#ledger-08.40).
# - The entropy is lowered by likely tokens of right answers, −16 ± 5% of the sizes of all tokens' shares
#   [08.60](#ledger-08.60), and by wrong answers' moderately unlikely ones, −17 ± 6% [08.61](#ledger-08.61). Wrong
#   answers' very unlikely tokens, Cui et al.'s, have −1 ± 2%: not decided [08.58](#ledger-08.58).
# - **What to do.** Before asking which rollouts move the entropy, look at the few tokens where the policy is open
#   ($H_k>0.5$ nats): they have most of it [08.64](#ledger-08.64). To slow its loss, look there at likely tokens of
#   right answers, not only at outliers of wrong ones.
# - **What to do.** Do not estimate an entropy change from the update's own rollouts. Of all terms the diagonal has
#   0.04 ± 0.03 on fresh responses to the same prompts [08.56](#ledger-08.56), but 0.41 ± 0.08 on the update's own,
#   where it is there by construction (first table of section 9). And expect that learning rates must fall as a model
#   grows, as the diagonal does not stay of order one.
#
# ## What is checked
#
# | statement | source | verdict |
# |---|---|---|
# | $K=w^Tw$ | notes 2.1 | holds [08.1](#ledger-08.1) |
# | $\delta\mathcal H_1$ from $K$; with $P$ | notes 2.1 | holds [08.3](#ledger-08.3), [08.66](#ledger-08.66) |
# | $\delta\log\pi(t)=\frac\eta B\sum_iK(t,t_i)A(t_i)$, enumerated | notes 2.1 | holds [08.4](#ledger-08.4) |
# | the same for real rollouts | notes 2.1 | holds [08.52](#ledger-08.52), [08.54](#ledger-08.54) |
# | zero eigenvalues once $V^L>N_{\rm params}$ | notes 2.1 | holds with a correction [08.6](#ledger-08.6) |
# | a Wishart matrix, nearly the identity at first | notes 2.1 | refuted [08.8](#ledger-08.8), [08.22](#ledger-08.22) |
# | a crossover at $V^L\sim N_{\rm params}$ | notes 2.1 | refuted [08.10](#ledger-08.10) |
# | long sequences: off-diagonal pairs count more | notes 2.1.1 | holds [08.12](#ledger-08.12) |
# | one prompt: larger entries | notes 2.1 | holds [08.18](#ledger-08.18) |
# | shared subsequences, different prompts | notes 2.1 | holds [08.68](#ledger-08.68) |
# | the same, one prompt | notes 2.1 | not decided by these data [08.24](#ledger-08.24) |
# | shared surprisal says more than shared tokens | own | holds [08.67](#ledger-08.67) |
# | the diagonal follows surprisal, not length | own | holds [08.26](#ledger-08.26) |
# | one token changed: highly correlated, enumerated | notes 2.1 | holds with a correction [08.16](#ledger-08.16) |
# | the same for real rollouts | notes 2.1 | refuted [08.28](#ledger-08.28), [08.29](#ledger-08.29) |
# | a diagonal of order one: two initialisations | notes 2.1 | refuted [08.40](#ledger-08.40), [08.41](#ledger-08.41) |
# | another, and after training | notes 2.1 | refuted [08.42](#ledger-08.42), [08.43](#ledger-08.43) |
# | matrix sketching | own | holds [08.44](#ledger-08.44) |
# | LoRA is a sketch | own | holds [08.47](#ledger-08.47), [08.48](#ledger-08.48), [08.49](#ledger-08.49) |
# | $K$ is likely not diagonal | notes 2.1 | holds [08.56](#ledger-08.56) |
# | Cui et al.'s tokens lower the entropy | notes 2.1.1 | not decided by these data [08.58](#ledger-08.58) |
# | other types do | notes 2.1.1 | holds [08.60](#ledger-08.60), [08.61](#ledger-08.61) |
# | one of these more than Cui et al.'s | own | holds [08.69](#ledger-08.69) |
# | sign and place of a token's share | own | holds [08.62](#ledger-08.62), [08.64](#ledger-08.64) |
# | the output layer's kernel | own | holds [08.34](#ledger-08.34) |
#
# **You need** chapter 03, which proved that no softmax policy has a diagonal kernel, and for Adam's preconditioner
# chapter 09. Everything is done for the plain kernel and for
# $K(t,t')=\sum_\alpha P_\alpha\,\partial_\alpha S(t)\,\partial_\alpha S(t')$; where both say the same, the ledger holds
# the plain one and the tables show both.

# %%
import math

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
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
stated = (model, problems, seed) == ("../data/policy", "../data/problems", 0)
ledger = dh.Ledger("08", source="notes", stated=stated, seeds="../data/seeds")
names, above_zero, below_zero = ["plain", "Adam's P"], (0.0, math.inf), (-math.inf, 0.0)
plain_sum = dh.objectives.Objective(dh.objectives.grpo, aggregation="constant", length=1)

# %% [markdown]
# `plain_sum` is the objective for which the notes' formulas hold to the letter: all tokens of a response weigh the
# same, and the loss is $-\frac1B\sum_iA_iS(t_i)$.
#
# ## 1 · Where every pair can be counted
#
# A random transformer over three tokens, four prompts of different lengths and all 60 responses of at most three
# tokens. $K=w^Tw$, with $w_{\alpha t}=\partial_\alpha S(t)$, is `fisher_kernel`
# <a id="08.1" href="#ledger-08.1">[08.1]</a>; its rows can also be single tokens. Advantages are the number of ones,
# centred for each prompt, and an AdamW step along the exact policy gradient supplies a preconditioner.

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
w = torch.stack([flat_gradient(tiny, s) for s in log_probs])
ledger.holds("08.1", "2.1", "K = wᵀw, as fisher_kernel computes it (largest gap, relative)", expected=0, formulas=(15,),
             tolerance=1e-10, measured=(tiny_K[0] - w @ w.T).abs().max() / tiny_K[0].max())

# %% [markdown]
# The exact first-order change is the sum over all pairs of
# $-\pi(t)\,(S(t)-\bar S)\,K(t,t')\,A(t')\,\pi(t')$, here averaged over prompts on both sides
# <a id="08.3" href="#ledger-08.3">[08.3]</a> <a id="08.66" href="#ledger-08.66">[08.66]</a>,
#
# $$ \delta\mathcal H_1=-\eta\,\mathbb E_t\,\mathbb E_{t'}\big[(S(t)-\bar S)\,K(t,t')\,A(t')\big] . $$
#
# We hold it against the gradient of the exact entropy and split it by kind of pair.

# %%
whole_H = flat_gradient(tiny, -(log_probs.exp() * log_probs).sum() / D)
together = responses.prompt_index[:, None] == responses.prompt_index
same_row = torch.eye(len(S), dtype=torch.bool)
pairs = {"same response": same_row, "same prompt": together & ~same_row, "other prompts": ~together}
split = pd.DataFrame(index=pairs, columns=names, dtype=float)

# %%
for name, K, v, id in zip(names, tiny_K, directions, ("08.3", "08.66"), strict=True):
    terms = -(pi * centred_S)[:, None] * K * (pi * A)
    split[name] = [float(terms[mask].sum() / terms.sum()) for mask in pairs.values()]
    ledger.holds(id, "2.1", f"δH₁ = −η E E′[(S − S̄) K A], {name} (per unit of η)", measured=terms.sum(),
                 expected=whole_H @ torch.cat([x.flatten() for x in v.values()]), tolerance=1e-10 * terms.abs().sum(),
                 rules_out={"the diagonal alone": terms.diagonal().sum()}, formulas=(14,))
split.round(1)

# %% [markdown]
# The table shows shares of $\delta\mathcal H_1$; they sum to one. And
# $\delta\log\pi(t)=\frac\eta B\sum_iK(t,t_i)A(t_i)$, in expectation $\eta\,\mathbb E'[KA]$, is the first term of a
# series: whatever is left must shrink as $\eta^2$ <a id="08.4" href="#ledger-08.4">[08.4]</a>.

# %%
predicted, left = tiny_K[0] @ (pi * A), []
for eta in (float(x / predicted.abs().max()) for x in (1e-3, 1e-4)):
    with torch.no_grad():
        after = dh.score(tiny, responses, tiny.shifted(directions[0], eta)).log_probs.sum(1)
    left.append((after - S - eta * predicted).abs().max())
ledger.holds("08.4", "2.1", "δ log π = η E′[K A] to first order: order of the rest (log-log slope)", expected=2,
             measured=(left[0] / left[1]).log10(), tolerance=0.02, rules_out={"half, or the other sign": 1},
             formulas=(16,))

# %% [markdown]
# ## 2 · Is there a crossover at $V^L\sim N_{\rm params}$?
#
# For a true Wishart matrix, with independent entries of variance $\sigma^2$ in $w$, the notes expect $K$ to go "from
# nearly the identity for $V^L<N_{\rm params}$ to very much not". Both halves can be tested where $V^L$ passes
# $N_{\rm params}$: a transformer small enough to count, with two tokens and responses of exactly $L$ of them. The
# notes call the model crude and doubt it; here is how far off it is. Three numbers for each $L$:
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
    tree_pi, ones = dh.exact.probabilities(dh.score(tinier, tree)).detach(), tree.response_ids.double().sum(1)
    tree = tree.replace(advantages=len(tree) * tree_pi * (ones - tree_pi @ ones))
    P = dh.update_direction(tinier, tree, plain_sum, optimizer=optimizer).preconditioner
    for name, preconditioner in zip(names, (None, P), strict=True):
        tree_kernels[L, name] = dh.fisher_kernel(tinier, tree, preconditioner=preconditioner)

# %%
rows = []
for (L, name), tree_K in tree_kernels.items():
    tree_S, ones = dh.score(tinier, trees[L]).log_probs.detach().sum(1), trees[L].response_ids.double().sum(1)
    tree_pi, off = tree_S.exp(), ~torch.eye(len(tree_S), dtype=torch.bool)
    tree_C = tree_K * tree_K.diagonal().rsqrt() * tree_K.diagonal().rsqrt()[:, None]
    eigenvalues = torch.linalg.eigvalsh(tree_K)
    terms = (tree_pi * (tree_S - tree_pi @ tree_S))[:, None] * tree_K * (tree_pi * (ones - tree_pi @ ones))
    apart = (trees[L].response_ids[:, None] != trees[L].response_ids).sum(2)
    rows.append({"L": L, "kernel": name, "responses": len(tree_S),
                 "rank": int((eigenvalues > 1e-14 * eigenvalues[-1]).sum()),
                 "mean square C": float(tree_C[off].square().mean()),
                 "directions": float((tree_pi @ tree_K.diagonal()) ** 2
                                     / (tree_pi[:, None] * tree_K * tree_K * tree_pi).sum()),
                 "of a Wishart matrix": float(1 / (tree_pi.square().sum() + 1 / size)),
                 "drawn twice": float(tree_pi.square().sum()),
                 "on the diagonal": float(terms.diagonal().abs().sum() / terms.abs().sum()),
                 "one token apart": float(tree_C[apart == 1].mean()),
                 "all tokens differ": float(tree_C[apart == L].mean())})

# %%
trees_table = pd.DataFrame(rows).set_index("L")
print(f"{size} parameters")
trees_table[trees_table["kernel"] == "plain"].drop(columns="kernel").round(3)

# %% [markdown]
# Nothing happens at the crossing. Before it, $K$ is as far from the identity as after
# <a id="08.8" href="#ledger-08.8">[08.8]</a>. The first zero eigenvalue is there from the start, because
# $\sum_t\pi(t)K(t,t')=0$: the rank is $V^L-1$ while it grows <a id="08.6" href="#ledger-08.6">[08.6]</a>. It stops
# growing well below $N_{\rm params}$, since parameters are not independent directions: position embeddings that are
# never read, biases that a softmax or a norm takes away, and scores that differ by less than the numbers can hold. And
# the number of directions that matter hardly grows at all: a few, for two responses and for five hundred
# <a id="08.10" href="#ledger-08.10">[08.10]</a>. With Adam's $P$ it is the same.

# %%
by_kernel = {name: trees_table[trees_table["kernel"] == name] for name in names}
plain_tree, last = by_kernel["plain"], max(trees)
ledger.corrected("08.6", "2.1", "K has zero eigenvalues once V^L > N_params (rank at V^L = 16)", expected=15,
                 as_printed=16, correction="from the start: the rank is V^L − 1, as E[∂S] = 0", tolerance=0.5,
                 measured=plain_tree["rank"][4])
ledger.refuted("08.8", "2.1", "as a Wishart matrix, K is nearly the identity for V^L < N_params (mean square "
               "correlation at V^L = 32)", measured=plain_tree["mean square C"][5], expected=(0.0, 1 / size),
               tolerance=0.03, counterexample=f"an enumerated transformer of {size} parameters")
ledger.refuted("08.10", "2.1", "as a Wishart matrix, K crosses over at V^L ~ N_params: effective directions at the "
               "largest V^L (ratio to a Wishart matrix's)", expected=(1.0, math.inf), tolerance=0.5,
               measured=plain_tree["directions"][last] / plain_tree["of a Wishart matrix"][last],
               counterexample="a few directions, at any V^L")

# %% [markdown]
# ### Long sequences
#
# The notes suspect that off-diagonal pairs become more important for long sequences, and call for theory. It is short.
# In the double expectation a pair $(t,t)$ has the weight $\pi(t)^2$: it counts only when the update has drawn the very
# response that is asked about. The diagonal's weight is $\sum_t\pi(t)^2$, the probability to draw a response twice, and
# that falls like $e^{-hL}$ with an entropy rate $h$. Entries off the diagonal fall much less, as their correlations
# hardly do. So the diagonal's share of $\sum|\ldots|$ must fall with the length
# <a id="08.12" href="#ledger-08.12">[08.12]</a>.

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
ledger.holds("08.12", "2.1.1", "in long sequences pairs off the diagonal become more important (the diagonal's share "
             "of Σ|terms|, largest L over smallest)", expected=(0.0, 0.25), tolerance=0,
             rules_out={"no change": 1, "half": 0.5},
             measured=plain_tree["on the diagonal"][last] / plain_tree["on the diagonal"][1])
ledger.corrected("08.16", "2.1", "sequences that differ by one token are highly correlated (mean C at L = 1 and V = 2)",
                 correction="not short ones: E[∂S] = 0 opposes them; the correlation grows with L", measured=plain_tree[
                     "one token apart"][1], expected=-1, as_printed=1, tolerance=1e-6)

# %% [markdown]
# The last columns of the table test the notes' example of two sequences that differ by one token. With $L=1$ they are
# all there is, and $E[\partial S]=0$ makes them opposite <a id="08.16" href="#ledger-08.16">[08.16]</a>. As responses
# grow, the tokens they share outweigh the one they do not. Sequences that differ everywhere are unrelated in the end.

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
above, equal = torch.ones(N, N, dtype=torch.bool).triu(1), together & (tokens[:, None] == tokens).all(2)
kinds = {"drawn twice": above & equal, "same prompt": above & together & ~equal, "other prompts": above & ~together}
rows = []

# %%
for kind, mask in list(kinds.items())[1:]:
    for name, C_all in corr.items():
        rows.append([kind, name, int(mask.sum()), float(C_all[mask].mean()), float(C_all[mask].abs().mean()),
                     1 / float(C_all[mask].square().mean())])
columns = ["pairs", "kernel", "count", "mean C", "mean |C|", "1 / mean C²"]
blocks = pd.DataFrame(rows, columns=columns).set_index(["pairs", "kernel"])
print(f"{int(kinds['drawn twice'].sum())} pairs of identical responses, left out")
blocks.round(2)

# %% [markdown]
# Two of the notes' guesses can be judged by independent samples. Within a prompt entries are larger than between
# prompts <a id="08.18" href="#ledger-08.18">[08.18]</a>: each of the update's prompts is compared with other prompts of
# its own. And for a Wishart matrix $\langle C^2\rangle$ would be $1/N_{\rm params}$
# <a id="08.22" href="#ledger-08.22">[08.22]</a>; the error of a mean over pairs is that of a U-statistic (chapter 04),
# over one response from each prompt.
#
# Within a prompt entries should also be "correlated". In the sign they cannot be, and no data are needed to see it. As
# $\sum_t\pi(t)K(t,t')=0$ and the diagonal is positive, two draws from one prompt that turn out distinct have
#
# $$ \mathbb E[K(t,t')\mid t\ne t']=-\frac{\sum_t\pi(t)^2K(t,t)}{1-\sum_t\pi(t)^2}<0 : $$
#
# the surer a policy is of its few likely responses, the stronger the rest are opposed to them. The same holds of $C$
# where the diagonal's elements are alike. How large it is here, as a mean of $C$, is printed below.

# %%
alone = torch.cat([(role == 0).nonzero()[::8, 0], (role == 2).nonzero()[:, 0]])
partner = torch.arange(N)[role == 2].tensor_split(update_prompts)
inside = [kinds["same prompt"] & (everything.prompt_index == n) for n in range(update_prompts)]
C, mine = corr["plain"], [everything.prompt_index == n for n in range(update_prompts)]
larger = torch.stack([C[pair].abs().mean() - C[own][:, others].abs().mean()
                      for pair, own, others in zip(inside, mine, partner, strict=True) if pair.any()])
signed = torch.stack([C[pair].mean() for pair in inside if pair.any()])
ledger.holds("08.18", "2.1", "matrix elements are larger if the prompts are the same (mean |C|, same less other)",
             measured=dh.Estimate.mean(larger), expected=above_zero, rules_out=0.0)
ledger.refuted("08.22", "2.1", "w as a Wishart matrix: mean C² of different prompts is 1/N_params",
               expected=1 / N_params, measured=dh.u_statistic(C[alone][:, alone].square()),
               counterexample=f"a transformer of {N_params:,} parameters")
print(f"distinct responses to one prompt: mean C {dh.Estimate.mean(signed)}")

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
# instead of a million independent directions, the table's last column has tens. The preconditioner leaves the blocks
# as they are.
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
# Is it chance? Between prompts, with one response from each, the error of a rank correlation over pairs comes from
# leaving out one prompt at a time: of the bag weighted by surprisal <a id="08.68" href="#ledger-08.68">[08.68]</a>, and
# of what it gains over the plain bag <a id="08.67" href="#ledger-08.67">[08.67]</a>. Within a prompt, where the notes
# expect it "even more so", the table mixes what differs between prompts with what differs between responses. So we take
# the rank correlation prompt by prompt, and their mean <a id="08.24" href="#ledger-08.24">[08.24]</a>.
#
# What is shared between prompts must be *surprising*. The output layer shows why. Its
# part of the token kernel is <a id="08.34" href="#ledger-08.34">[08.34]</a>
#
# $$ K^{\rm out}(k,l)=(e_k-\pi_k)\cdot(e_l-\pi_l)\;\;h_k\cdot h_l, $$
#
# with $e_k$ the token drawn and $h_k$ the hidden state. Any linear layer $Wx$ has this form. Its gradient is
# $G=\sum_kg_k\otimes x_k$, with $g_k$ what arrives at its output, so that $K$ is either the product of two such
# matrices, once they are formed, or $\sum_{kl}(g_k\cdot g'_l)(x_k\cdot x'_l)$ without forming them; `fisher_kernel`
# takes whichever is cheaper. At the output $g=e-\pi$: a token of probability one has no gradient at all, however often
# two responses share it. For the same reason the diagonal $K(t,t)$ should follow a response's surprisal and not its
# length <a id="08.26" href="#ledger-08.26">[08.26]</a>.

# %%
one_each, n = torch.ones(len(alone), len(alone), dtype=torch.bool).triu(1), len(alone)

def without(i, label):
    """The rank correlation with C over pairs of different prompts that leave out prompt i."""
    kept = one_each & (torch.arange(n) != i) & (torch.arange(n) != i)[:, None]
    return spearmanr(alike[label][alone][:, alone][kept], C[alone][:, alone][kept]).statistic

left_out = np.array([[without(i, label) for label in ("bag, surprisal", "bag of tokens")] for i in range(-1, n)])
left_out = np.c_[left_out[:, 0], left_out[:, 0] - left_out[:, 1]]
spread = ((n - 1) / n * ((left_out[1:] - left_out[1:].mean(0)) ** 2).sum(0)) ** 0.5
between, gain = (dh.Estimate(value, error, n) for value, error in zip(left_out[0], spread, strict=True))
within = torch.tensor([spearmanr(alike["bag, surprisal"][pair], C[pair]).statistic for pair in inside
                       if pair.sum() > 5], dtype=torch.float64)

# %%
ledger.holds("08.68", "2.1", "responses that share subsequences are more correlated, to different prompts: shared "
             "surprisal (rank correlation with C)", measured=between, expected=above_zero, rules_out=0.0)
ledger.holds("08.67", "derived here", "shared surprisal tells more of C than shared tokens (rank correlations, "
             "difference)", measured=gain, expected=above_zero, rules_out=0.0, source="deltah")
ledger.holds("08.24", "2.1", "the same for responses to one prompt (rank correlation, mean of prompts)",
             measured=dh.Estimate.mean(within[within.isfinite()]), expected=above_zero, rules_out=0.0)
print(f"different prompts: {between}, {gain} more than the plain bag; one prompt: "
      f"{dh.Estimate.mean(within[within.isfinite()])}")

# %%
x, y, z = -S[alone].clamp(max=-1e-6), kernels["plain"].diagonal()[alone], lengths[alone]
x, y, z = ((q.log() - q.log().mean()) / q.log().std() for q in (x, y, z))
ledger.holds("08.26", "derived here", "the diagonal follows surprisal rather than length (correlations of logarithms, "
             "difference)", expected=above_zero, rules_out=0.0, source="deltah", measured=dh.Estimate.smooth(
                 lambda e: e[0] / (e[2] * e[3]).sqrt() - e[1] / (e[2] * e[4]).sqrt(),
                 torch.stack([x * y, z * y, y * y, x * x, z * z], 1)))
print(*(f"{label} {float((q * y).mean()):.1f}" for label, q in (("correlation of log K(t,t) with log surprisal:", x),
                                                                 ("and with log length:", z))))
R = everything.rewards.cpu()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
edges = np.array([0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0001])
for k, name in enumerate(names):
    x, y = alike["bag, surprisal"][kinds["other prompts"]], corr[name][kinds["other prompts"]]
    bins = [(x >= low) & (x < high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    means = [(float(x[b].mean()), float(y[b].mean())) for b in bins if b.sum() > 9]
    left.plot(*zip(*means, strict=True), color=f"C{k}", marker=dh.figures.MARKERS[k], linestyle=dh.figures.DASHES[k],
              label=name)
left.axhline(0, color="0.4", linewidth=1)
left.set(xlabel="shared surprisal (cosine of weighted bags)", ylabel="mean correlation C",
         title="Different prompts: allies share surprising tokens")
for k, (label, right_answer) in enumerate({"wrong answer": 0, "right answer": 1}.items()):
    right.scatter(-S[R == right_answer], kernels["plain"].diagonal()[R == right_answer], s=26, alpha=0.7, color=f"C{k}",
                  marker=dh.figures.MARKERS[k], label=label)
right.set(xscale="log", yscale="log", xlabel="surprisal −log π(t), nats", ylabel="K(t,t), plain",
          title="The diagonal grows with surprisal")
for axes in (left, right):
    axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
dh.figures.save(figure, results, "08-likeness")

# %% [markdown]
# *Left: mean correlation of pairs of different prompts against what they share. Right: every rollout's own entry.*
#
# ### One token changed
#
# For "two sequences that differ by one token", "probably highly correlated", we make them: in a response to each of the
# prompts we put the likeliest other token in the place of one, once where the policy is least sure (the highest $H_k$)
# <a id="08.28" href="#ledger-08.28">[08.28]</a> and once where it is surest
# <a id="08.29" href="#ledger-08.29">[08.29]</a>.

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
    edited_K = dh.fisher_kernel(policy, edited.replace(input_ids=input_ids),
                                preconditioner=direction.preconditioner).cpu()
    sizes = edited_K.diagonal()
    for copy, place in enumerate(("least sure", "surest"), start=1):
        edited_C = edited_K.diagonal(copy * M)[:M] * (sizes[:M] * sizes[copy * M:(copy + 1) * M]).rsqrt()
        changed.append([place, name, dh.Estimate.mean(edited_C), float(edited_C.median())])
changed = pd.DataFrame(changed, columns=["changed where the policy is", "kernel", "mean C", "median C"])
changed.round(2)

# %%
for place, id in (("least sure", "08.28"), ("surest", "08.29")):
    here = changed[(changed["kernel"] == "plain") & (changed["changed where the policy is"] == place)]
    ledger.refuted(id, "2.1", f"two sequences that differ by one token, where the policy is {place}, are highly "
                   "correlated (C above 0.7)", measured=here["mean C"].iloc[0], expected=(0.7, 1.0),
                   counterexample="a few tokens carry most of a response's gradient, and any one may be such")

# %% [markdown]
# A change at an open position replaces one of the few tokens that carry the gradient; a change at a sure one adds a
# token of huge surprisal, which then carries most of it. Neither leaves the gradient in place. The token kernel
# of two answers to one prompt, one right and one wrong, shows how uneven it is.

# %%
mixed = [n for n in range(update_prompts) if 0 < update.rewards[8 * n:8 * n + 8].mean() < 1]
group = update.select(slice(8 * mixed[0], 8 * mixed[0] + 8))
two = torch.tensor([int(group.rewards.argmax()), int(group.rewards.argmin())])
few = 8 * mixed[0] + two
token_K = dh.fisher_kernel(policy, update.select(few), level="token").cpu()
row, k = update.select(few).response_mask.nonzero().T
open_token = entropies[role == 0][few][row, k] > 0.5
share = float(token_K.diagonal()[open_token].sum() / token_K.diagonal().sum())
print(f"tokens where H > 0.5 nats: {float(open_token.double().mean()):.0%} of all, {share:.0%} of the trace")

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
# A Wishart matrix from $N$ rollouts and $Q$ parameters has, divided by $Q\sigma^2$, all its eigenvalues between
# $(1-\sqrt{N/Q})^2$ and $(1+\sqrt{N/Q})^2$ when both are large: the law of Marchenko and Pastur. "Nearly the identity"
# means $N\ll Q$. To keep blocks out of it we take one response from each prompt, and compare the eigenvalues of $C$
# with random matrices of the same $N$: with $Q=N_{\rm params}$, and with the $Q$ that has the same mean square.

# %%
off = ~torch.eye(n, dtype=torch.bool)
generator, rows, bands = np.random.default_rng(seed), [], {}
spectra = {name: torch.linalg.eigvalsh(C_all[alone][:, alone]).flip(0) for name, C_all in corr.items()}
for name, C_all in corr.items():
    Q = round(1 / float(C_all[alone][:, alone][off].square().mean()))
    drawn = generator.standard_normal((200, n, Q)) / Q**0.5
    bands[name] = Q, np.quantile(np.linalg.eigvalsh(drawn @ drawn.transpose(0, 2, 1))[:, ::-1], (0.025, 0.975), axis=0)
    rows.append([name, Q, float(spectra[name][0]), bands[name][1][0, 0], bands[name][1][1, 0],
                 (1 + (n / N_params) ** 0.5) ** 2])
columns = ["kernel", "Q of the same mean C²", "largest eigenvalue", "2.5% at that Q", "97.5%", "edge at N_params"]
print(f"{n} responses to {n} prompts")
pd.DataFrame(rows, columns=columns).set_index("kernel").round(2)

# %%
figure, axes = plt.subplots()
for i, (name, eigenvalues) in enumerate(spectra.items()):
    Q, (low, high) = bands[name]
    axes.plot(range(1, n + 1), eigenvalues, color=f"C{i}", marker=dh.figures.MARKERS[i], markersize=4,
              label=f"K, {name}", linestyle="none")
    axes.fill_between(range(1, n + 1), low, high, color=f"C{i}", alpha=0.3, hatch=("", "//")[i], linewidth=0,
                      label=f"Wishart, Q = {Q}, 95% of draws")
axes.axhline(1, color="0.3", linestyle=":", label=f"Wishart, Q = {N_params:,}")
axes.set(xlabel="eigenvalue number", ylabel="eigenvalue of C", yscale="log", ylim=(0.02, None),
         title="Far from the identity")
axes.legend(fontsize="small")
dh.figures.save(figure, results, "08-spectrum")

# %% [markdown]
# *Eigenvalues of the correlations among responses to different prompts (symbols), and of random matrices of the same
# size: with as few parameters as match the mean square of the entries (bands), and with as many as the policy has.*
#
# With the policy's own number of parameters every eigenvalue would be one within a few hundredths. Matching the mean
# square brings the random matrix much nearer, though not to where the eigenvalues are. So "a very crude model" it can
# be, at a few dozen to a few hundred parameters.

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
# as $N_{\rm params}\propto d^2$ at a given depth.

# %%
settings = {"default": (True, None), "1/fan-in": (False, "fan-in"), "1/N_params": (False, "size"),
            "default, trained": (True, None)}
nets_of_widths = {}

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
    nets_of_widths[label, width] = dh.Policy(net.to(policy.device))

# %%
probe = everything.select((role == 2).nonzero()[:8, 0])
probe = probe.replace(advantages=torch.tensor([1.0, -1.0] * 4), prompt_index=torch.arange(8) // 2)

# %% [markdown]
# How fast the whole diagonal grows depends on the other layers and so on the initialisation. Five widths, two layers,
# the same rollouts and random weights of three kinds: transformers' default (0.02 everywhere, output tied to the
# input), variance $1/\text{fan-in}$, and literally $1/\sqrt{N_{\rm params}}$. Random weights are not trained ones:
# training aligns layers with each other and makes most tokens certain, which shrinks $|e-\pi|$. So the smaller models
# are trained, too, for a few steps on worked answers, at AdamW's learning rate $10^{-3}$. The slopes are
# those of $K(t,t)$ per token against the number of parameters, rollout by rollout: the hope means 0
# <a id="08.40" href="#ledger-08.40">[08.40]</a> <a id="08.41" href="#ledger-08.41">[08.41]</a>
# <a id="08.42" href="#ledger-08.42">[08.42]</a> <a id="08.43" href="#ledger-08.43">[08.43]</a>. The last column has
# the preconditioner of an AdamW step from the fresh model.

# %%
worked = [(policy.encode([row["prompt"]])[0], policy.encode([row["solution"]])[0] + [policy.eos_token_ids[0]])
          for row in table.select(range(128))]
pad = torch.nn.utils.rnn.pad_sequence

# %%
for width in [w for w in widths if w <= 256]:
    net = nets_of_widths["default, trained", width].model
    trainer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(training_steps):
        rows = [worked[(8 * step + i) % len(worked)] for i in range(8)]
        ids = pad([torch.tensor(p + a) for p, a in rows], batch_first=True).to(net.device)
        labels = pad([torch.tensor([-100] * len(p) + a) for p, a in rows], batch_first=True, padding_value=-100)
        trainer.zero_grad()
        net(input_ids=ids, labels=labels.to(net.device)).loss.backward()
        trainer.step()

# %%
growth = {}
for (label, width), net in nets_of_widths.items():
    if "trained" in label and width > 256:
        continue
    adam = torch.optim.AdamW(net.parameters.values(), lr=1e-3)
    P = dh.update_direction(net, probe, plain_sum, optimizer=adam).preconditioner
    size = sum(p.numel() for p in net.parameters.values())
    per_token = [dh.fisher_kernel(net, probe, preconditioner=p).diagonal().cpu().double() / probe.lengths
                 for p in (None, P)]
    growth.setdefault(label, []).append(torch.stack([torch.full((8,), size).double(), *per_token]))

# %%
rows = {}
for number, (label, sizes_and_K) in enumerate(growth.items()):
    x, *ys = torch.stack(sizes_and_K).log().unbind(1)
    x = x - x.mean(0)
    slopes = [dh.Estimate.mean((x * y).sum(0) / x.square().sum(0)) for y in ys]
    rows[label] = dict(zip(("plain", "Adam's P"), slopes, strict=True))
    ledger.refuted(f"08.{40 + number}", "2.1", f"w ~ 1/√N_params, so that the diagonal of K is of order one, weights "
                   f"{label}: log-log slope of K(t,t) per token", measured=slopes[0], expected=0.0,
                   counterexample=f"{len(x)} widths of one transformer")
pd.DataFrame(rows).T

# %%
figure, axes = plt.subplots()
for i, (label, sizes_and_K) in enumerate(growth.items()):
    x, y, _ = torch.stack(sizes_and_K).unbind(1)
    axes.loglog(x.mean(1), y.mean(1), color=f"C{i}", marker=dh.figures.MARKERS[i], linestyle=dh.figures.DASHES[i],
                label=label)
x = np.array([float(f(torch.stack([k[0, 0] for k in growth["default"]]))) for f in (torch.min, torch.max)])
low = min(float(k[1].mean()) for ks in growth.values() for k in ks)
axes.loglog(x, 0.4 * low * (x / x[0]) ** 0.5, color="0.4", linewidth=1, label="slope 1/2")
axes.loglog(x, 0 * x + 0.4 * low, color="0.4", linewidth=1, linestyle=":", label="slope 0, the hope")
axes.set(xlabel="parameters", ylabel="K(t,t) per token", title="The diagonal of the kernel grows with the model")
axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
dh.figures.save(figure, results, "08-scaling")

# %% [markdown]
# *The kernel's diagonal per token, over the same eight rollouts, for models of growing width.*
#
# The hope fails for every kind of weights, even for the literal $1/\sqrt{N_{\rm params}}$: with a norm before each
# layer the scale of weights cancels out of what the output layer sees. $K$ is not of order one, it grows with the model
# by about $\sqrt{N_{\rm params}}$ at best and almost in proportion at worst. That is a reason for learning rates that
# fall with width, and for comparing kernels as correlations. Adam's preconditioner, which at a first step is $1/|g|$,
# does not repair it for the first two kinds.
#
# ## 7 · Sketches, and adapters as one
#
# ### Sketching
#
# $K$ needs gradients only through their inner products, and those survive a random projection. `fisher_sketch` maps
# each gradient to $m$ numbers, $K\approx ss^T$ without bias, with a standard error of about
# $\sqrt{(K_{ii}K_{jj}+K_{ij}^2)/m}$ for an entry. The columns of a sketch are independent, so that one of 4096 numbers
# holds eight of 512 and 64 of 64. The squared error should fall as $1/m$: eight times less at 512
# <a id="08.44" href="#ledger-08.44">[08.44]</a>.

# %%
sketched, m = kernels["plain"][role == 0][:, role == 0][:16, :16], 4096
sketch = dh.fisher_sketch(policy, update.select(slice(0, 16)), m, seed=seed).cpu().double() * m**0.5

def relative_error(columns):
    return (columns @ columns.T / columns.shape[1] - sketched).square().sum() / sketched.square().sum()

small = torch.stack([torch.stack([relative_error(s) for s in block.split(64, 1)]).mean()
                     for block in sketch.split(512, 1)])
large = torch.stack([relative_error(block) for block in sketch.split(512, 1)])
errors = {64: float(small.mean() ** 0.5), 512: float(large.mean() ** 0.5), m: float(relative_error(sketch) ** 0.5)}

# %%
ledger.holds("08.44", "derived here", "matrix sketching: the squared error of K falls as 1/m (m = 64 over m = 512)",
             measured=dh.Estimate.ratio(small, large), expected=8.0, rules_out={"no fall": 1.0, "as 1/m²": 64.0},
             source="deltah")
pd.Series(errors, name="relative error of K by m").round(2)

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
# rank <a id="08.47" href="#ledger-08.47">[08.47]</a> <a id="08.48" href="#ledger-08.48">[08.48]</a>. The rows of $A$
# are independent, so that one draw of rank 16 holds two of rank 8 and sixteen of rank one.

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
expected = sum(torch.einsum("noi,moi->nm", g, g) for g in G.values()).cpu()

# %%
generator = torch.Generator().manual_seed(seed)
ranks, draws, whole = (1, 2, 4, 8, 16), 64, kernels[names[0]][index][:, index]
pairs = torch.ones(len(index), len(index)).triu(1).bool() & ~equal[index][:, index]
apart = pairs & ~together[index][:, index]
full_corr = whole * whole.diagonal().rsqrt() * whole.diagonal().rsqrt()[:, None]
of_rank_one = []

# %%
for _ in range(draws):
    adapted = 0.0
    for g in G.values():
        lens = torch.randn(max(ranks), g.shape[2], generator=generator, dtype=torch.float64).to(g)
        seen = (g @ lens.T).movedim(2, 0)
        adapted = adapted + seen @ seen.mT
    of_rank_one.append(adapted.cpu())

# %%
of_rank_one = torch.stack(of_rank_one).double()
lora = {r: of_rank_one.unflatten(1, (-1, r)).mean(2).flatten(0, 1) for r in ranks}
squared = {r: ((K - expected).square().sum((1, 2)) / expected.square().sum()).view(draws, -1).mean(1)
           for r, K in lora.items()}
along = (lora[8] * expected).sum((1, 2)) / expected.square().sum()
ledger.holds("08.47", "derived here", "E_A[K_LoRA] = α²σ²/r K_adapted (rank 8: part of K_adapted in it)",
             source="deltah", measured=dh.Estimate.mean(along), expected=1.0,
             rules_out={"zero": 0.0, "half": 0.5, "twice": 2.0})
ledger.holds("08.48", "derived here", "K_LoRA's squared error falls as 1/r (at rank 1 over that at 16)",
             source="deltah", measured=dh.Estimate.ratio(squared[1], squared[16]), expected=16.0,
             rules_out={"no fall": 1.0, "as 1/√r": 4.0, "half": 8.0, "twice": 32.0})

# %% [markdown]
# "I wonder how LoRA affects all of this". The number of directions hardly: even at rank one the adapters, of many
# layers, have far more parameters than the kernel has directions
# <a id="08.49" href="#ledger-08.49">[08.49]</a>.

# %%
rows, mean_square = [], {}
for label, Ks in {"all parameters": whole[None], "adapted layers": expected[None],
                  **{f"LoRA, r = {r}": K for r, K in lora.items()}}.items():
    scale = Ks.diagonal(dim1=1, dim2=2).rsqrt()
    C = Ks * scale[:, None] * scale[..., None]
    mean_square[label] = C[:, apart].square().mean(1)
    rows.append([label, float(1 / mean_square[label].mean()),
                 np.mean([spearmanr(c[pairs], full_corr[pairs]).statistic for c in C[:draws]])])
ratio = dh.Estimate.mean(mean_square["LoRA, r = 1"] / mean_square["adapted layers"])
ledger.holds("08.49", "derived here", "LoRA leaves the number of directions (mean C² at rank 1 over the adapted "
             "layers', 0.5 to 2)", measured=ratio, expected=(0.5, 2.0), source="deltah",
             rules_out={"as many as the rank": float(1 / mean_square["adapted layers"])})
columns = ["gradients of", "1 / mean C², other prompts", "rank correlation with K"]
pd.DataFrame(rows, columns=columns).set_index("gradients of").round(1)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3))
x = np.array(list(errors))
left.loglog(x, list(errors.values()), "o", color="C0", label="K of 16 rollouts")
left.loglog(x, errors[64] * (x / 64) ** -0.5, color="0.4", label="slope −1/2")
right.loglog(ranks, [float(e.mean() ** 0.5) for e in squared.values()], "s", color="C1",
             label=f"LoRA at its start, {draws} draws of 16")
right.loglog(ranks, float(squared[1].mean() ** 0.5) * np.array(ranks) ** -0.5, color="0.4", label="slope −1/2")
left.set(xlabel="numbers kept of each gradient, m", ylabel="relative error of K", title="A sketch of gradients")
right.set(xlabel="rank r", ylabel="relative error of the adapted layers' K", title="LoRA is a sketch of inputs")
for axes in (left, right):
    axes.legend(fontsize="small")
dh.figures.save(figure, results, "08-sketches")

# %% [markdown]
# *Error of the kernel (Frobenius norm, relative) from a sketch of $m$ numbers, and from adapters of rank $r$.*
#
# What LoRA leaves out is what it does not adapt, embeddings and the output layer, as the rank correlation of the second
# line shows. All of this is LoRA at its start; as $B$ moves, $A$ gets a gradient and the lens moves, too.

# %% [markdown]
# ## 8 · What a step does to each response
#
# With $K$ at hand, $\delta\log\pi(t)=\frac\eta B\sum_iK(t,t_i)A(t_i)$ needs nothing else. The update is the batch of
# section 3; we predict the fresh responses and those to other prompts, and measure with real steps of growing size, of
# the plain kernel <a id="08.52" href="#ledger-08.52">[08.52]</a> and of the part of an AdamW step that its rollouts
# make <a id="08.54" href="#ledger-08.54">[08.54]</a>. Both sides belong to the same responses; the error of a slope is
# what other prompts would make of it.

# %%
held_out, B = role > 0, int((role == 0).sum())
advantages = dh.objectives.group_advantages(update.rewards, update.prompt_index).double()
predicted = {name: K[held_out][:, role == 0] @ advantages / B for name, K in kernels.items()}
rows = []

# %%
for name, direction in directions.items():
    step = direction.parts["rollouts"]
    for largest in (0.01, 0.1, 1.0):
        eta = float(largest / predicted[name].abs().max())
        with torch.no_grad():
            after = dh.score(policy, everything.select(held_out), policy.shifted(step, eta)).log_probs.sum(1).cpu()
        actual, line = after - S[held_out], eta * predicted[name]
        slope = dh.Estimate.ratio(actual * line, line.square(), everything.prompt_index[held_out])
        rows.append([name, largest, slope, float(1 - (actual - line).square().sum() / actual.square().sum())])

# %%
columns = ["step", "largest change, nats", "slope", "R²"]
steps = pd.DataFrame(rows, columns=columns)
steps.assign(**{"R²": steps["R²"].round(3)}).pivot(index="largest change, nats", columns="step", values=["slope", "R²"])

# %%
for name, id in zip(names, ("08.52", "08.54"), strict=True):
    small = steps[(steps["step"] == name) & (steps["largest change, nats"] == 0.01)].iloc[0]
    ledger.holds(id, "2.1", f"δ log π(t) = η/B Σ K(t,t_i)A(t_i), {name}, steps of 0.01 nats: slope of measured on "
                 "predicted", measured=small["slope"], expected=(0.9, 1.1), formulas=(16,),
                 rules_out={"zero": 0.0, "half": 0.5, "twice": 2.0, "the other sign": -1.0})

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
# consists of responses that happen to be drawn again. "$K$ is likely not diagonal", say the notes; how far from it is
# the share of the terms' sizes on the diagonal <a id="08.56" href="#ledger-08.56">[08.56]</a>. $\bar S$ is the mean of
# the prompt's update rollouts.

# %%
S_bar = torch.stack([S[(role == 0) & (everything.prompt_index == n)].mean() for n in range(update_prompts)])
rows = []
for label, which in {"own rollouts": role == 0, "fresh, same prompts": role == 1}.items():
    centred, clusters = S[which] - S_bar[everything.prompt_index[which]], everything.prompt_index[which]
    relation = {"the same response": equal, "same prompt": together & ~equal, "other prompts": ~together}
    for name, K in kernels.items():
        sizes = (centred[:, None] * K[which][:, role == 0] * advantages).abs()
        rows.append([label, name, *(dh.Estimate.ratio((sizes * mask[which][:, role == 0]).sum(1), sizes.sum(1),
                                                      clusters) for mask in relation.values())])

# %%
diagonal = pd.DataFrame(rows, columns=["t among", "kernel", *relation]).set_index(["t among", "kernel"])
ledger.holds("08.56", "2.1", "K is likely not diagonal (the diagonal's share of Σ|terms|, fresh responses to the "
             "update's own prompts, below a half)", measured=diagonal.loc[("fresh, same prompts", "plain")].iloc[0],
             expected=(-math.inf, 0.5), rules_out={"half": 0.5, "diagonal": 1.0})
diagonal

# %% [markdown]
# On the update's own rollouts the diagonal is much; on fresh responses to the same prompts it is what the policy's
# sureness leaves, and most weight is on pairs of *different* responses. For the entropy over all prompts, of which a
# batch holds hardly any, only the last column remains.
#
# ### Tokens
#
# `attribution` gives every token of an update its share of the entropy change at prompts outside the update, with the
# low-variance estimators of chapters 05 and 06 in place of $S-\bar S$. The update has more prompts for this. A single
# token's share is noisy; sums over classes of tokens can be given an error, which has to count both batches: the
# prompts of the update and those where the entropy is looked at. A class's net change is the product of two means, of
# the entropy's gradient $u$ over one batch and of the class's part of the update over the other, and so chapter 05's
# `two_sample_product` gives it.

# %%
start = 16 + update_prompts + other_prompts
blame = dh.sample(policy, table.select(range(start, start + attribution_prompts)), 8, max_new_tokens, seed=seed + 1)
start = start + attribution_prompts
judge = dh.sample(policy, table.select(range(start, start + evaluation_prompts)), 1, max_new_tokens, seed=seed + 2)
with torch.no_grad():
    s, H = (x.cpu() for x in dh.score(policy, blame, batch_size=16))
shares = {}
for name, o in zip(names, (descent, optimizer), strict=True):
    direction = dh.update_direction(policy, blame, plain_sum, optimizer=o, batch_size=16)
    change = dh.entropy_change(policy, judge, direction, per="sequence", batch_size=16)
    shares[name] = dh.attribution(policy, judge, direction, change, batch_size=16).tokens.cpu()
mask, sign = blame.response_mask.cpu(), direction.token_weights.sign().cpu()

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
others = {"H > 0.5 nats": moved & (H > 0.5), "the first of these": moved & (H > 0.5) & (rank == 1),
          "later": moved & (H > 0.5) & (rank > 1)}

# %%
u, products = [], {name: {label: [] for label in classes} for name in names}
for part in torch.arange(len(judge)).chunk(12):
    log_probs, entropies = dh.score(policy, judge.select(part))
    loss = (change.score_weights[part] * log_probs).sum() + change.entropy_weight * entropies.sum()
    u.append(flat_gradient(policy, loss * len(judge) / len(part)))
scale = torch.cat([direction.preconditioner[name].flatten() for name in policy.parameters])
u = {"plain": torch.stack(u), "Adam's P": torch.stack(u) * scale}

# %%
for n in range(attribution_prompts):
    rows = slice(8 * n, 8 * n + 8)
    log_probs = dh.score(policy, blame.select(rows)).log_probs
    weight = direction.token_weights[rows][:, :log_probs.shape[1]] * attribution_prompts
    for label, m in classes.items():
        g = flat_gradient(policy, (weight * m[rows][:, :log_probs.shape[1]].to(weight) * log_probs).sum())
        for name in names:
            products[name][label].append((u[name] @ g).cpu())

# %%
nets, rows = {}, []
for name in names:
    scale = float(shares[name].abs().sum()) / 100
    products[name] = {label: torch.stack(columns, 1) / scale for label, columns in products[name].items()}
    nets[name] = {label: dh.two_sample_product(p) for label, p in products[name].items()}
for label, m in {**classes, **others}.items():
    rows.append([float(m.sum() / mask.sum()), *(float(x[m].abs().sum() / x.abs().sum()) for x in shares.values()),
                 *(nets[name].get(label, "") for name in names)])
columns = ["of tokens", *(f"of sizes, {name}" for name in names), *(f"net, {name}, %" for name in names)]
pd.DataFrame(rows, index=[*classes, *others], columns=columns).round(2)

# %% [markdown]
# Net changes are in percent of the sum of sizes; negative is less entropy. Do Cui et al.'s tokens close the policy, on
# balance <a id="08.58" href="#ledger-08.58">[08.58]</a>? And "are there other types of sequences which may contribute
# to entropy collapse?" We ask it of likely tokens of right answers <a id="08.60" href="#ledger-08.60">[08.60]</a>, of
# wrong answers' other unlikely tokens <a id="08.61" href="#ledger-08.61">[08.61]</a>, and whether the former take more
# than Cui et al.'s <a id="08.69" href="#ledger-08.69">[08.69]</a>. The covariance law's sign, $-A(\log\pi+H)$, is to be
# that of more than half of all sizes <a id="08.62" href="#ledger-08.62">[08.62]</a>, and the open tokens are to have
# more than half of them <a id="08.64" href="#ledger-08.64">[08.64]</a>.

# %%
cui, other, right_likely, *_ = products["plain"].values()
for id, source, statement, p in (
        ("08.58", "notes", "Cui et al.'s wrong answers with a very unlikely token (π < 0.1) lower the entropy", cui),
        ("08.60", "notes", "other types lower the entropy: likely tokens of right answers", right_likely),
        ("08.61", "notes", "other types lower the entropy: wrong answers' other unlikely tokens", other),
        ("08.69", "deltah", "right answers' likely tokens lower it more than those of 08.58", right_likely - cui)):
    ledger.holds(id, "derived here" if source == "deltah" else "2.1.1", statement + " (net, % of sizes)",
                 source=source, measured=dh.two_sample_product(p), expected=below_zero, rules_out=0.0)
x, clusters = shares["plain"], blame.prompt_index.cpu()
follows = (x.sign() == -(sign * (s + H)).sign()) & moved
for id, statement, m in (("08.62", "the sign of a token's share is mostly that of −A (log π + H)", follows),
                         ("08.64", "tokens with H > 0.5 nats carry most of the change", others["H > 0.5 nats"])):
    share = dh.Estimate.ratio((x.abs() * m).sum(1), x.abs().sum(1), clusters)
    ledger.holds(id, "derived here", statement + " (share of sizes)", measured=share, expected=(0.5, math.inf),
                 rules_out=0.5, source="deltah")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1.2, 1))
x, shown = shares["plain"], mask & (H > 0.5)
unit = x.abs().sum() / 100
for i, (label, m) in enumerate({"right answers, A > 0": ~wrong, "wrong answers, A < 0": wrong}.items()):
    m = m & shown & moved
    left.scatter((s + H)[m], x[m] / unit, s=20, alpha=0.6, color=f"C{i}", marker=dh.figures.MARKERS[i], label=label)
left.axhline(0, color="0.4", linewidth=1)
left.axvline(0, color="0.4", linewidth=1)
left.set(xlabel="log π + H: likelier than typical to the right, nats", ylabel="share of the entropy change, %",
         yscale="symlog", title="Single tokens, where the policy is open",
         yticks=[-10, -1, 0, 1, 10])
left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
height = np.arange(len(classes))
for i, name in enumerate(names):
    ends = np.array([e.interval() for e in nets[name].values()])
    values = np.array([e.value for e in nets[name].values()])
    right.barh(height + 0.2 - 0.4 * i, values, 0.38, xerr=np.abs(ends.T - values), color=f"C{i}",
               hatch=("", "//")[i], edgecolor="white", label=name, error_kw={"elinewidth": 1})
right.axvline(0, color="0.4", linewidth=1)
right.set(yticks=height, yticklabels=list(classes), xlabel="net entropy change, % of all sizes",
          title="Five classes of tokens")
right.invert_yaxis()
right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
dh.figures.save(figure, results, "08-causes")

# %% [markdown]
# What else do they have in common? They are *early*: the first open token of a response, where it chooses its style,
# has a large part of all sizes, for the few tokens that it is.
#
# ## The remaining equations
#
# The output layer's part of the token kernel, $(e_k-\pi_k)\cdot(e_l-\pi_l)\;h_k\cdot h_l$, which section 4 uses to
# explain why only surprising tokens count and section 6 why the diagonal grows, is checked on a fresh model with its
# own output matrix. All other parameters are left out of the kernel by a preconditioner that does not name them.

# %%
fresh, one = nets_of_widths["1/fan-in", widths[0]], probe.select(slice(0, 1))
ids, T = one.input_ids[one.attention_mask].to(policy.device), int(one.lengths[0])
with torch.no_grad():
    output = fresh.model(input_ids=ids[None], output_hidden_states=True)
h, probabilities = output.hidden_states[-1][0, -T - 1:-1], output.logits[0, -T - 1:-1].softmax(-1)
error = torch.nn.functional.one_hot(ids[-T:], fresh.vocabulary_size) - probabilities
by_hand = (error @ error.T) * (h @ h.T)
head = {"lm_head.weight": torch.ones_like(fresh.parameters["lm_head.weight"])}
from_library = dh.fisher_kernel(fresh, one, level="token", preconditioner=head)
ledger.holds("08.34", "derived here", "output layer: K(k,l) = (e_k − π_k)·(e_l − π_l) h_k·h_l (largest gap, relative)",
             measured=(by_hand - from_library).abs().max() / by_hand.max(), expected=0, tolerance=1e-4, source="deltah")

# %% [markdown]
# ## What stands
#
# The kernel form of $\delta\mathcal H_1$ is exact and, as a prediction of $\delta\log\pi$, right to first order on
# held-out responses. $K$ is blocky, as the notes guessed, but its entries have either sign inside a block, and a shared
# token counts by its surprisal. It is no Wishart matrix with $N_{\rm params}$ columns: across prompts it has the
# second moment of one with tens, so that the crossover is at as many responses, whatever $V^L$ is. Its diagonal is not
# of order one but grows with the model, because norms fix the size of activations instead of weights. LoRA is a sketch
# of the same kernel. The preconditioner changes sizes and leaves all of these conclusions.
#
# The diagonal matters for a batch's own rollouts and little else, the less the longer the responses.

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
