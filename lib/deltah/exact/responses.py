"""Every response, every group of responses, and expectations over them: exact, as all of them are there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltah import checks
from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import TokenScores

# More responses than this are a slip of the arguments, not a policy to enumerate.
MOST_RESPONSES = 2**20


def every_response(policy: Policy, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                   temperature: float = 1.0) -> Rollouts:
    """Every response of at most `max_new_tokens` tokens to each prompt.

    Args:
        policy: the policy; its EOS tokens end a response.
        prompts: B lists of token ids, of any lengths.
        max_new_tokens: the length at which a response without EOS is cut.
        temperature: at which to score the responses.

    Returns:
        Rollouts; `probabilities(score(policy, rollouts))` sums to 1 for each prompt.

    Raises:
        ValueError: more than 2^20 responses, or prompts that do not fit the policy.

    >>> from deltah.exact import tiny_policy
    >>> len(every_response(tiny_policy(vocabulary_size=3), [[0], [1, 2]], max_new_tokens=2))
    18
    """
    checks.instance("policy", policy, Policy)
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, minimum=1)
    temperature = checks.number("temperature", temperature, above=0)
    prompts = _checked_prompts(policy, prompts)
    if len(prompts) * policy.vocabulary_size**max_new_tokens > MOST_RESPONSES:
        raise ValueError(f"max_new_tokens: {policy.vocabulary_size}^{max_new_tokens} responses to {len(prompts)} "
                         f"prompts are more than {MOST_RESPONSES}")
    responses = _every_sequence(policy.vocabulary_size, set(policy.eos_token_ids), max_new_tokens)
    width = max(len(prompt) for prompt in prompts)
    if policy.context_length is not None and width + max_new_tokens > policy.context_length:
        raise ValueError(f"max_new_tokens: {width} tokens of a prompt and {max_new_tokens} more do not fit the model's "
                         f"context of {policy.context_length}")
    rows, attention, masks = [], [], []
    for prompt in prompts:
        padding = width - len(prompt)
        for response in responses:
            cut = max_new_tokens - len(response)
            rows.append([0] * padding + list(prompt) + response + [0] * cut)
            attention.append([False] * padding + [True] * (len(prompt) + len(response)) + [False] * cut)
            masks.append([True] * len(response) + [False] * cut)
    return Rollouts(torch.tensor(rows), torch.tensor(attention), torch.tensor(masks),
                    torch.arange(len(prompts)).repeat_interleave(len(responses)), temperature=temperature)


def _checked_prompts(policy: Policy, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    expected = "prompts: expected one or more non-empty lists of token ids, got"
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, (Sequence, Tensor)):
        raise TypeError(f"{expected} {checks.shown(prompts)}")
    if len(prompts) == 0:
        raise ValueError(f"{expected} none")
    checked = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, (str, Mapping)) or not isinstance(prompt, (Sequence, Tensor)):
            raise TypeError(f"{expected} {checks.shown(prompt)} at {i}")
        if len(prompt) == 0:
            raise ValueError(f"{expected} an empty one at {i}")
        checked.append([checks.integer(f"prompts[{i}][{k}]", token, 0, policy.vocabulary_size - 1)
                        for k, token in enumerate(prompt)])
    return checked


def _every_sequence(size: int, stops: set[int], length: int) -> list[list[int]]:
    done, running = [], [[]]
    for _ in range(length):
        grown = [sequence + [token] for sequence in running for token in range(size)]
        done += [sequence for sequence in grown if sequence[-1] in stops]
        running = [sequence for sequence in grown if sequence[-1] not in stops]
    return done + running


def probabilities(scores: TokenScores) -> Tensor:
    """The probability π(t|p) of each response, [N], from its token log-probs."""
    return checks.instance("scores", scores, TokenScores).log_probs.sum(1).exp()


def every_group(probabilities: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every group of `size` independent responses to one prompt, but for their order.

    Args:
        probabilities: [N] of the prompt's responses, float64.
        size: G, responses in a group.

    Returns:
        counts [M, N], how often each response occurs in each group, and the groups' probabilities [M]; both of the
        dtype of `probabilities`, with M = (N + G − 1)!/(G! (N − 1)!).

    Raises:
        ValueError: more than 2^20 groups.

    >>> every_group(torch.tensor([0.5, 0.5]), size=2)
    (tensor([[2., 0.],
            [1., 1.],
            [0., 2.]]), tensor([0.2500, 0.5000, 0.2500]))
    """
    checks.tensor("probabilities", probabilities, ("N",), "floating", finite=True)
    size, count = checks.integer("size", size, minimum=1), len(probabilities)
    if math.comb(count + size - 1, size) > MOST_RESPONSES:
        raise ValueError(f"size: groups of {size} out of {count} responses are more than {MOST_RESPONSES}")
    members = torch.tensor(list(itertools.combinations_with_replacement(range(count), size)))
    counts = torch.zeros(len(members), count).to(probabilities)
    counts.scatter_add_(1, members, torch.ones_like(members).to(probabilities))
    orders = (math.lgamma(size + 1) - torch.lgamma(counts + 1).sum(1)).exp()
    return counts, orders * probabilities[members].prod(1)


def group_moments(probabilities: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and second moment of the weights that a group's centred values put on the responses.

    A group of `size` responses to one of D prompts, which are equally likely, puts c_t (q_t − q̄) on response t, which
    occurs c_t times in it, with q̄ the group's mean. Divided by G − 1, the weights of the log-probs times the gradients
    of the log-probs are X_n of the notes; divided by G L_max, those of the rewards are Y_n.

    Args:
        probabilities: [D, N], of each prompt's responses.
        values: [K, D, N], K kinds of values q.
        size: G, responses in a group.

    Returns:
        The mean [K·D·N] and the second moment [K·D·N, K·D·N] of the weights.

    Source: chapter 04, section 4.

    >>> mean, second = group_moments(torch.tensor([[0.5, 0.5]]), torch.tensor([[[1.0, 3.0]]]), size=2)
    >>> mean
    tensor([-0.5000,  0.5000])
    """
    checks.tensor("probabilities", probabilities, ("D", "N"), "floating", finite=True)
    checks.tensor("values", values, ("K", *probabilities.shape), "floating", finite=True)
    kinds, prompts, responses = values.shape
    mean = values.new_zeros(kinds, prompts, responses)
    second = values.new_zeros(kinds, prompts, responses, kinds, prompts, responses)
    for p, (chances, q) in enumerate(zip(probabilities, values.unbind(1), strict=True)):
        counts, share = every_group(chances, size)
        weights = torch.stack([counts * (row - (counts @ row / size)[:, None]) for row in q], 1)
        mean[:, p] = torch.einsum("m,mkn->kn", share, weights) / prompts
        flat = weights.flatten(1)
        moment = (share[:, None] * flat).T @ flat / prompts
        second[:, p, :, :, p] = moment.view(kinds, responses, kinds, responses)
    return mean.flatten(), second.view(mean.numel(), -1)


def prefixes(rollouts: Rollouts) -> Tensor:
    """A number for what each response token was drawn after, [N, T]: equal after the same prompt and tokens.

    >>> from deltah.exact import tiny_policy
    >>> prefixes(every_response(tiny_policy(vocabulary_size=2), [[0]], max_new_tokens=2))
    tensor([[0, 1],
            [0, 1],
            [0, 2],
            [0, 2]])
    """
    checks.instance("rollouts", rollouts, Rollouts)
    tokens = torch.where(rollouts.response_mask, rollouts.response_ids, -1)
    numbers, used = torch.empty_like(tokens), 0
    for k in range(tokens.shape[1]):
        known = torch.cat([rollouts.prompt_index[:, None], tokens[:, :k]], 1)
        numbers[:, k] = used + known.unique(dim=0, return_inverse=True)[1]
        used = int(numbers[:, k].max()) + 1
    return numbers


def conditional_mean(values: Tensor, rollouts: Rollouts, weights: Tensor, tokens: int) -> Tensor:
    """E[values | prompt and the first `tokens` tokens of the response], [N], at each of the enumerated responses.

    Args:
        values: [N], one for each response.
        rollouts: every response, from `every_response`.
        weights: [N] probabilities of the responses.
        tokens: how many tokens of a response are given; 0: the prompt alone.

    >>> from deltah.exact import tiny_policy
    >>> every = every_response(tiny_policy(vocabulary_size=2), [[0]], 2)        # 00, 01, 10, 11
    >>> conditional_mean(torch.tensor([1.0, 3.0, 2.0, 0.0]), every, torch.ones(4) / 4, tokens=1)
    tensor([2., 2., 1., 1.])
    """
    checks.instance("rollouts", rollouts, Rollouts)
    for name, tensor in (("values", values), ("weights", weights)):
        checks.tensor(name, tensor, (len(rollouts),), "floating")
    tokens = checks.integer("tokens", tokens, minimum=0)
    given = torch.cat([rollouts.prompt_index[:, None], rollouts.response_ids[:, :tokens]], 1)
    _, index = given.unique(dim=0, return_inverse=True)
    sums = values.new_zeros(int(index.max()) + 1, 2).index_add(0, index, torch.stack([weights * values, weights], 1))
    return (sums[:, 0] / sums[:, 1])[index]


def given_prefix(x: Tensor, rollouts: Rollouts, weights: Tensor) -> Tensor:
    """E[x_k | prompt and tokens before k] for each response token, [N, T]; 0 outside the mask.

    Args:
        x: [N, T].
        rollouts: N responses, such as `every_response`.
        weights: [N], their probabilities, up to a factor.
    """
    checks.instance("rollouts", rollouts, Rollouts)
    mask = rollouts.response_mask
    checks.tensor("x", x, mask.shape, "floating")
    checks.tensor("weights", weights, (len(x),), "floating")
    return torch.where(mask, torch.stack([conditional_mean(column, rollouts, weights, k)
                                          for k, column in enumerate(x.unbind(1))], 1), 0.0)


def covariance(x: Tensor, weights: Tensor) -> Tensor:
    """Covariance matrix [T, T] of T quantities `x` [N, T] over N responses of probability `weights` [N].

    >>> covariance(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.tensor([0.5, 0.5]))
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    checks.tensor("x", x, ("N", "T"), "floating")
    checks.tensor("weights", weights, (len(x),), "floating")
    centred = x - weights @ x
    return torch.einsum("n,ni,nj->ij", weights, centred, centred)


def flat_gradient(policy: Policy, quantity: Tensor) -> Tensor:
    """The gradient [P] of a scalar with respect to the policy's parameters, flattened, by one backward pass.

    >>> from deltah import score
    >>> from deltah.exact import tiny_policy
    >>> policy = tiny_policy()
    >>> log_probs = score(policy, every_response(policy, [[0]], 1)).log_probs
    >>> flat_gradient(policy, log_probs[0, 0]).shape == (sum(p.numel() for p in policy.parameters.values()),)
    True
    """
    checks.instance("policy", policy, Policy)
    checks.tensor("quantity", quantity, (), "floating")
    if not quantity.requires_grad:
        raise ValueError("quantity: expected a number that depends on the policy's parameters; was it made without "
                         "gradients?")
    gradients = torch.autograd.grad(quantity, list(policy.parameters.values()), retain_graph=True,
                                    materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
