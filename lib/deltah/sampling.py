"""Sampling: responses of a policy to prompts, each token from a random number of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from deltah import checks, memory
from deltah.models.causal_lm import with_cache
from deltah.models.modes import evaluation
from deltah.models.prompts import Prompt, check_prompts, conversational, has_template
from deltah.policies import Policy
from deltah.rewards import Reward, Rows, find_reward, rewarded
from deltah.rollouts import Rollouts, check_rollouts, checked_temperature


def sample(policy: Policy, prompts: Dataset | Iterable[Prompt], responses_per_prompt: int = 8, max_new_tokens: int = 64,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
           batch_size: int | None = None, reward: str | Reward | None = None, chat: bool | None = None) -> Rollouts:
    """Sample responses to prompts, with a KV cache; the same seed gives the same tokens.

    Each rollout and position has one uniform number of its own, drawn on the CPU, which picks the token
    from the cumulative distribution. So the tokens depend neither on `batch_size` nor on the device, up to
    rounding of the model's logits; and more responses or longer ones extend those of a smaller call.

    Args:
        policy: the policy, with a tokenizer.
        prompts: B texts or conversations (lists of messages {"role", "content"}), or a Dataset with a `prompt` column
            of either. The tokenizer's chat template reads conversations.
        responses_per_prompt: responses to each prompt; rollouts of a prompt are adjacent.
        max_new_tokens: T at most; a response ends with its first EOS, which counts as a token, or here.
        temperature: divides the logits.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the smallest set of likeliest tokens whose probability reaches p. With either,
            the responses are not drawn from the distribution that `score` evaluates.
        seed: of the random numbers.
        batch_size: rollouts at a time; None: as many as suit the device.
        reward: a function of (texts, rows), with the N decoded responses and the Dataset's row of each as a dict
            ({"prompt": ...} without a Dataset), that returns N finite numbers; or the name of one in `deltah.rewards`:
            "answer", "last_number", "boxed" or "math". None: "answer" where a Dataset has that column, else none.
            The named ones read the column `answer`, before the first token is sampled too.
        chat: whether a plain text is the message of a user. None: it is in a Dataset, where the tokenizer has a chat
            template, and stands as it is in a list, where it may be formatted already.

    Returns:
        N = B · responses_per_prompt rollouts, on the policy's device; `rewards` are float32.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, no prompts, an empty one, one that does not fit the model's
            context with its response, messages without a chat template, an answer that is missing, or logits that
            are NaN.
        ImportError: "math" without the package math-verify.
        RewardError: the reward function failed. What was sampled is in the error's `rollouts`.

    >>> sample(policy, ["2+2="], responses_per_prompt=3, max_new_tokens=5).response_mask.shape  # doctest: +SKIP
    torch.Size([3, 5])
    >>> short = lambda texts, rows: [-len(text) for text in texts]                              # doctest: +SKIP
    >>> sample(policy, ["2+2="], responses_per_prompt=3, reward=short).rewards                  # doctest: +SKIP
    tensor([-7., -9., -7.])
    """
    checks.instance("policy", policy, Policy)
    responses_per_prompt = checks.integer("responses_per_prompt", responses_per_prompt, minimum=1)
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, minimum=1)
    seed = checks.integer("seed", seed, minimum=0)
    temperature = checked_temperature(temperature)
    top_k = top_k if top_k is None else checks.integer("top_k", top_k, minimum=1)
    top_p = top_p if top_p is None else checks.number("top_p", top_p, above=0, maximum=1)
    batch_size = batch_size if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    chat = chat if chat is None else checks.boolean("chat", chat)
    of_a_dataset = isinstance(prompts, Dataset)
    prompts, data = _prompts_and_rows(prompts)
    reward = find_reward(reward, data)
    if chat or chat is None and of_a_dataset and has_template(policy.tokenizer):
        prompts = conversational(prompts)
    encoded = policy.encode(prompts)
    _check_context(policy, encoded, max_new_tokens)

    warpers = [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None else []
    count = len(encoded) * responses_per_prompt
    prompt_index = torch.arange(len(encoded)).repeat_interleave(responses_per_prompt)
    uniforms = _uniforms(seed, len(encoded), responses_per_prompt, max_new_tokens)
    longest = max(map(len, encoded)) + max_new_tokens
    rows = batch_size or memory.rows_at_once(policy, longest, "sampling", logits=1)
    responses, masks = [], []
    with tqdm(total=count, desc="sample", unit="rollout", leave=False, delay=1) as progress, evaluation(
            policy.model):
        for start in range(0, count, rows):
            batch = slice(start, start + rows)
            tokens, mask = _sample_batch(policy, encoded, prompt_index[batch], uniforms[batch], temperature, warpers)
            responses.append(tokens)
            masks.append(mask)
            progress.update(len(tokens))
    response_ids, response_mask = torch.cat(responses), torch.cat(masks)
    width = int(response_mask.sum(1).max())
    response_ids, response_mask = response_ids[:, :width], response_mask[:, :width]
    prompt_ids, prompt_mask = _left_pad(encoded, policy.device)
    rows_of = prompt_index.tolist()
    prompt_index = prompt_index.to(policy.device)
    rollouts = Rollouts(
        input_ids=torch.cat([prompt_ids[prompt_index], response_ids], 1),
        attention_mask=torch.cat([prompt_mask[prompt_index], response_mask], 1),
        response_mask=response_mask, prompt_index=prompt_index, temperature=temperature)
    if reward is None:
        return rollouts
    return rewarded(rollouts, reward, policy.decode(response_ids, response_mask), [data[i] for i in rows_of])


@torch.no_grad()
def resample(policy: Policy, rollouts: Rollouts, keep: Tensor, uniforms: Tensor,
             parameters: Mapping[str, Tensor] | None = None, batch_size: int | None = None) -> Rollouts:
    """The same prompts, with the first `keep` tokens of each response kept and those after them sampled anew.

    Args:
        policy: the policy.
        rollouts: N rollouts; their rewards and advantages are left out of the result.
        keep: [N] integers between 1 and the response's length. A response that ends there with EOS stays as it is.
        uniforms: [N, T'] float64 in [0, 1), one for each position; T' is where responses are cut.
        parameters: values in place of the model's own, by name. None: the model's own.
        batch_size: rollouts at a time; None: as many as suit the device.

    Returns:
        N rollouts of at most T' tokens.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit each other, or numbers out of range.

    >>> resample(policy, rollouts, rollouts.lengths // 2 + 1, torch.rand(8, 64).double())       # doctest: +SKIP
    """
    checks.instance("policy", policy, Policy)
    count = len(checks.instance("rollouts", rollouts, Rollouts))
    checks.tensor("keep", keep, (count,), "integer")
    steps = checks.tensor("uniforms", uniforms, (count, "T'"), "floating").shape[1]
    batch_size = batch_size if batch_size is None else checks.integer("batch_size", batch_size, minimum=1)
    if not ((keep >= 1) & (keep <= rollouts.lengths.clamp(max=steps))).all():
        raise ValueError(f"keep: expected numbers between 1 and the response's length, and up to {steps}, "
                         f"got {int(keep.min())} to {int(keep.max())}")
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError("uniforms: expected numbers ≥ 0 and < 1")
    check_rollouts(policy, rollouts, steps)
    columns = torch.arange(steps, device=policy.device)
    tokens = torch.nn.functional.pad(rollouts.response_ids, (0, steps - rollouts.response_mask.shape[1]))
    mask = columns < keep[:, None]
    stops = torch.tensor(policy.eos_token_ids, device=policy.device)
    last = tokens.gather(1, keep[:, None] - 1)[:, 0]
    running = (~torch.isin(last, stops) & (keep < steps)).nonzero()[:, 0]
    prompts, known = rollouts.input_ids[:, :rollouts.prompt_length], rollouts.attention_mask[:, :rollouts.prompt_length]
    rows = batch_size or memory.rows_at_once(policy, rollouts.prompt_length + steps, "sampling", logits=1)
    for batch in running.split(rows) if len(running) else ():
        encoded = [prompts[i][known[i]].tolist() + tokens[i, :keep[i]].tolist() for i in batch.tolist()]
        # Column j of the continuation is position keep + j of the response.
        start = keep[batch]
        places = (start[:, None] + columns[:steps - int(start.min())]).clamp(max=steps - 1)
        numbers = uniforms.to(policy.device)[batch].gather(1, places)
        with evaluation(policy.model):
            drawn, alive = _sample_batch(policy, encoded, torch.arange(len(batch)), numbers, rollouts.temperature, [],
                                         parameters)
        back = (columns - start[:, None]).clamp(min=0, max=drawn.shape[1] - 1)
        after = columns >= start[:, None]
        tokens[batch] = torch.where(after, drawn.gather(1, back), tokens[batch])
        mask[batch] |= after & alive.gather(1, back)
    width = int(mask.sum(1).max())
    tokens, mask = torch.where(mask, tokens, 0)[:, :width], mask[:, :width]
    return Rollouts(torch.cat([prompts, tokens], 1), torch.cat([known, mask], 1), mask, rollouts.prompt_index,
                    temperature=rollouts.temperature)


def _prompts_and_rows(prompts: Dataset | Iterable[Prompt]) -> tuple[list[Prompt], Rows]:
    """B prompts, and what the data say about each, as dicts."""
    if not isinstance(prompts, Dataset):
        prompts = check_prompts(prompts)
        return prompts, [{"prompt": prompt} for prompt in prompts]
    if "prompt" not in prompts.column_names:
        raise ValueError(f"prompts: expected a column 'prompt', got {', '.join(prompts.column_names)}")
    return check_prompts(prompts["prompt"]), list(prompts)


def _check_context(policy: Policy, encoded: list[list[int]], max_new_tokens: int) -> None:
    if policy.context_length is None:
        return
    for i, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > policy.context_length:
            raise ValueError(f"prompts[{i}]: has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is more "
                             f"than the model's context of {policy.context_length}")


def _uniforms(seed: int, prompts: int, responses: int, tokens: int) -> Tensor:
    """[prompts · responses, tokens] float64 in [0, 1); a row depends on seed, prompt and response alone."""
    rows = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(b, r))).random(tokens)
            for b in range(prompts) for r in range(responses)]
    return torch.from_numpy(np.stack(rows))


def _left_pad(encoded: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in encoded)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in encoded], device=device)
    return ids, mask


@torch.no_grad()
def _sample_batch(policy: Policy, encoded: list[list[int]], prompt_index: Tensor, uniforms: Tensor,
                  temperature: float, warpers: list,
                  parameters: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and mask [n, T] of the rollouts at `prompt_index`."""
    count, steps = uniforms.shape
    uniforms = uniforms.to(policy.device)
    stops = torch.tensor(policy.eos_token_ids, device=policy.device)
    tokens = torch.zeros(count, steps, dtype=torch.long, device=policy.device)
    mask = torch.zeros(count, steps, dtype=torch.bool, device=policy.device)

    # Each prompt is read once, and its cache copied to every response of this batch.
    chosen, inverse = prompt_index.unique(return_inverse=True)
    inverse = inverse.to(policy.device)
    step_ids, attention = _left_pad([encoded[i] for i in chosen.tolist()], policy.device)
    output = policy.run_keeping(1, with_cache(policy.model, attention, input_ids=step_ids), parameters)
    cache, logits = getattr(output, "past_key_values", None), output.logits[inverse, -1]
    if cache is None:
        raise ValueError(f"policy: {type(policy.model).__name__} returns no past_key_values; sampling needs a cache")
    cache.reorder_cache(inverse)
    attention = attention[inverse]

    rows = torch.arange(count, device=policy.device)   # the rollouts that the cache holds
    running = torch.ones(count, dtype=torch.bool, device=policy.device)
    for step in range(steps):
        drawn = _draw(logits, uniforms[rows, step], temperature, warpers)
        tokens[rows, step] = torch.where(running, drawn, 0)
        mask[rows, step] = running
        running = running & ~torch.isin(drawn, stops)
        left = int(running.sum())
        if left == 0:
            break
        if left <= len(rows) // 2:
            # Copying the cache costs about as much as a step: worth it once half the rows have ended.
            cache.reorder_cache(running.nonzero()[:, 0])
            rows, drawn, attention, running = (x[running] for x in (rows, drawn, attention, running))
        if step + 1 < steps:
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
            arguments = with_cache(policy.model, attention, input_ids=drawn[:, None], past_key_values=cache)
            logits = policy.run(arguments, parameters).logits[:, -1]
    return tokens, mask


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, warpers: list) -> Tensor:
    """One token for each row of `logits` [n, V], by inverting the cumulative distribution at `uniforms` [n]."""
    # In float64, so that a vocabulary of any size leaves the order of magnitude of the noise to the logits.
    scores = logits.double() / temperature
    for warper in warpers:
        scores = warper(None, scores)
    cumulative = scores.softmax(-1).cumsum(-1)
    if cumulative[:, -1].isnan().any():
        raise ValueError("policy: the model's logits are NaN or all −inf, so there is nothing to sample from")
    # The first token whose cumulative probability exceeds the number: never one of probability zero.
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
