"""Policies small enough to enumerate: every expectation exactly, in float64. The referee of all estimators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from deltah.policies import Policy
from deltah.rollouts import Rollouts
from deltah.scoring import TokenScores

# More responses than this are a slip of the arguments, not a policy to enumerate.
MOST_RESPONSES = 2**20


def tiny_policy(vocabulary_size: int = 4, eos_token_id: int | None = None, context_length: int = 16,
                seed: int = 0) -> Policy:
    """A random GPT-2 of a few thousand parameters in float64, without a tokenizer.

    GPT-2's layers compute in the dtype of their weights throughout; RMS norms and rotary positions, as
    transformers writes them, fall back to float32.

    Args:
        vocabulary_size: V.
        eos_token_id: the token that ends a response; None: responses end at the length asked for.
        context_length: tokens of prompt and response together.
        seed: of the weights.

    >>> tiny_policy().vocabulary_size
    4
    """
    config = GPT2Config(vocab_size=vocabulary_size, n_positions=context_length, n_embd=16, n_layer=2, n_head=2,
                        initializer_range=0.4, bos_token_id=None, eos_token_id=eos_token_id,
                        attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(GPT2LMHeadModel(config).double())


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

    >>> len(every_response(tiny_policy(vocabulary_size=3), [[0], [1, 2]], max_new_tokens=2))
    18
    """
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"prompts: expected one or more non-empty lists of token ids, got {prompts}")
    if len(prompts) * policy.vocabulary_size**max_new_tokens > MOST_RESPONSES:
        raise ValueError(f"max_new_tokens: {policy.vocabulary_size}^{max_new_tokens} responses to {len(prompts)} "
                         f"prompts are more than {MOST_RESPONSES}")
    responses = _every_sequence(policy.vocabulary_size, set(policy.eos_token_ids), max_new_tokens)
    width = max(len(prompt) for prompt in prompts)
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


def _every_sequence(size: int, stops: set[int], length: int) -> list[list[int]]:
    done, running = [], [[]]
    for _ in range(length):
        grown = [sequence + [token] for sequence in running for token in range(size)]
        done += [sequence for sequence in grown if sequence[-1] in stops]
        running = [sequence for sequence in grown if sequence[-1] not in stops]
    return done + running


def probabilities(scores: TokenScores) -> Tensor:
    """The probability π(t|p) of each response, [N], from its token log-probs."""
    return scores.log_probs.sum(1).exp()


def covariance(x: Tensor, weights: Tensor) -> Tensor:
    """Covariance matrix [T, T] of T quantities `x` [N, T] over N responses of probability `weights` [N].

    >>> covariance(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.tensor([0.5, 0.5]))
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    centred = x - weights @ x
    return torch.einsum("n,ni,nj->ij", weights, centred, centred)
