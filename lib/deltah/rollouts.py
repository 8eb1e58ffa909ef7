"""Rollouts: responses sampled from a policy, as one frozen dataclass of tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from deltah import checks, memory
from deltah.modes import evaluation
from deltah.policies import Policy, find_device
from deltah.prompts import Prompt, check_prompts, conversational, has_template
from deltah.rewards import Reward, Rows, find_reward, rewarded

FORMAT = "deltah.rollouts/1"
KINDS = {"input_ids": "integer", "attention_mask": "mask", "response_mask": "mask", "prompt_index": "integer",
         "rewards": "number", "advantages": "number"}


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N responses of at most T tokens to prompts of at most P tokens.

    Attributes:
        input_ids: [N, P+T] int64; prompts left-padded, responses right-padded.
        attention_mask: [N, P+T] bool, True at the tokens of prompt and response.
        response_mask: [N, T] bool, True from the response's first token to its first EOS, inclusive.
        prompt_index: [N] int64; rollouts of one prompt share it: the unit of sampling.
        rewards: [N] floating, or None; integers and booleans become float32.
        advantages: [N] floating, or None; integers become float32.
        temperature: at which the responses were sampled, and are to be scored.

    Tensors made under `torch.inference_mode` are copied into normal ones, which can take part in a backward pass.

    Raises:
        ValueError: shapes that do not fit each other, tensors on several devices, a mask with a hole, an empty prompt
            or response, rewards or advantages that are not finite, or a temperature that is not positive.
        TypeError: a field of the wrong type.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    prompt_index: Tensor
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        # Without inference mode, so that what is converted here can take part in a backward pass.
        with torch.inference_mode(False):
            for name, kind in KINDS.items():
                object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        object.__setattr__(self, "temperature", _one_number("temperature", self.temperature))
        for name, value in self._tensors().items():
            if value.device != self.input_ids.device:
                raise ValueError(f"{name}: expected it on {self.input_ids.device}, where input_ids are, "
                                 f"got {value.device}")
        if self.input_ids.ndim != 2 or 0 in self.input_ids.shape:
            raise ValueError(f"input_ids: expected shape [N, P+T], got {list(self.input_ids.shape)}")
        n, width = self.input_ids.shape
        if self.response_mask.ndim != 2 or len(self.response_mask) != n or not 0 < self.response_mask.shape[1] < width:
            raise ValueError(f"response_mask: expected shape [{n}, T] with 0 < T < {width}, "
                             f"got {list(self.response_mask.shape)}")
        for name, shape in (("attention_mask", (n, width)), ("prompt_index", (n,)), ("rewards", (n,)),
                            ("advantages", (n,))):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
        prompt, response = self.attention_mask.split([self.prompt_length, self.response_mask.shape[1]], dim=1)
        _check_runs("attention_mask: prompts are left-padded; row {} has padding after a token",
                    prompt[:, :-1] & ~prompt[:, 1:])
        _check_runs("attention_mask: expected a prompt token in every row; row {} has none", ~prompt[:, -1:])
        _check_runs("response_mask: responses are right-padded; row {} has a token after padding",
                    ~self.response_mask[:, :-1] & self.response_mask[:, 1:])
        _check_runs("response_mask: expected a token in every response; row {} is empty", ~self.response_mask[:, :1])
        _check_runs("attention_mask: expected True wherever response_mask is; row {} is not",
                    self.response_mask & ~response)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_length(self) -> int:
        """P, the width of the padded prompts."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_ids(self) -> Tensor:
        """[N, T], the responses' tokens."""
        return self.input_ids[:, self.prompt_length:]

    @property
    def lengths(self) -> Tensor:
        """[N], tokens in each response, its EOS included."""
        return self.response_mask.sum(1)

    def replace(self, **changes: Any) -> Rollouts:
        """A copy with some fields changed, such as `advantages`."""
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(f"{name}: expected one of the fields {', '.join(names)}")
        return replace(self, **changes)

    def select(self, rows: Tensor | Sequence[int] | slice) -> Rollouts:
        """The rollouts at `rows`, in that order: a slice, indices, or a mask [N].

        Raises:
            ValueError: no rows, indices out of range, or a mask of another length. TypeError: anything else.
        """
        if not isinstance(rows, slice):
            rows = self._indices(rows)
        elif not range(len(self))[rows]:
            raise ValueError("rows: expected at least one rollout, got none")
        return replace(self, **{name: value[rows] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rollouts on another device, named as in `load_policy`. ValueError: there is no such device."""
        checks.instance("device", device, (str, torch.device))
        device = find_device(device)
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, under a temporary name that then takes the file's place.

        Raises:
            FileNotFoundError: no folder to write to. IsADirectoryError: a folder at `path`.
        """
        path = Path(checks.instance("path", path, (str, os.PathLike)))
        if path.is_dir():
            raise IsADirectoryError(f"path: expected a file to write, got the folder {str(path)!r}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path: no folder {str(path.parent)!r} to write to")
        partial = path.with_name(f".{path.name}.partial")
        # Copies, because the format refuses tensors that share memory.
        tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                   for name, value in self._tensors().items()}
        try:
            save_file(tensors, partial, metadata={"format": FORMAT, "temperature": repr(self.temperature)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Rollouts:
        """Read what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: nothing at `path`, or a folder.
            ValueError: a file that is truncated, or holds something else than rollouts.
        """
        path = Path(checks.instance("path", path, (str, os.PathLike)))
        if not path.is_file():
            raise FileNotFoundError(f"path: no rollouts file at {str(path)!r}")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"path: expected a file written by Rollouts.save ({FORMAT}), got {str(path)!r} "
                                     f"with format {metadata.get('format')}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"path: {str(path)!r} is truncated or no safetensors file ({error})") from error
        try:
            return cls(**tensors, temperature=float(metadata["temperature"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {str(path)!r} does not hold what Rollouts.save writes ({error})") from error

    def _indices(self, rows: Tensor | Sequence[int]) -> Tensor:
        if not isinstance(rows, (Tensor, np.ndarray, Sequence)) or isinstance(rows, str):
            raise TypeError(f"rows: expected a slice, indices or a mask, got {checks.shown(rows)}")
        try:
            rows = torch.as_tensor(rows, device=self.input_ids.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"rows: expected a slice, indices or a mask, got {checks.shown(rows)} ({error})") from error
        if rows.dtype == torch.bool:
            rows = checks.tensor("rows", rows, (len(self),)).nonzero()[:, 0]
        if rows.numel() == 0:
            raise ValueError("rows: expected at least one rollout, got none")
        rows = checks.tensor("rows", rows, ("n",), "integer").long()
        if rows.min() < -len(self) or rows.max() >= len(self):
            raise ValueError(f"rows: expected indices of {len(self)} rollouts, got {int(rows.min())} to "
                             f"{int(rows.max())}")
        return rows

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _checked(name: str, value: Tensor | None, kind: str) -> Tensor | None:
    """A field of the dtype that it has from now on, and no tensor of inference mode."""
    if value is None and kind == "number":
        return None
    checks.tensor(name, value)
    if value.is_meta or value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor with values, got {value.layout} on {value.device}")
    if kind == "integer":
        value = checks.tensor(name, value, kind="integer").long()
    elif kind == "mask":
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name}: expected booleans, got {checks.shown(value)}")
        # Masks of 0 and 1 are what tokenizers return.
        if value.dtype != torch.bool and not ((value == 0) | (value == 1)).all():
            raise ValueError(f"{name}: expected booleans, got integers other than 0 and 1")
        value = value.bool()
    else:
        if not value.is_floating_point():
            boolean = value.dtype == torch.bool and name == "rewards"
            value = (value if boolean else checks.tensor(name, value, kind="number")).float()
        checks.tensor(name, value, finite=True)
    return value.clone() if value.is_inference() else value


def _one_number(name: str, value: Any) -> float:
    single = isinstance(value, (Tensor, np.ndarray)) and value.reshape(-1).shape == (1,)
    return checks.number(name, value.item() if single else value, above=0)


def _check_runs(message: str, wrong: Tensor) -> None:
    if wrong.any():
        raise ValueError(message.format(int(wrong.any(1).nonzero()[0])))


def check_rollouts(policy: Policy, rollouts: Rollouts, response_length: int | None = None) -> None:
    """Refuse rollouts that the policy cannot run: tokens that it does not have, or more of them than its context.

    Args:
        policy: the policy.
        rollouts: N rollouts.
        response_length: tokens that every response may grow to; None: as long as they are.

    Raises:
        TypeError: no Policy, no Rollouts. ValueError: what the policy cannot run.
    """
    checks.instance("policy", policy, Policy)
    ids = checks.instance("rollouts", rollouts, Rollouts).input_ids
    if ids.max() >= policy.vocabulary_size or ids.min() < 0:
        raise ValueError(f"rollouts: expected token ids below the policy's vocabulary size {policy.vocabulary_size}, "
                         f"got {int(ids.min())} to {int(ids.max())}")
    if policy.context_length is None:
        return
    lengths = rollouts.attention_mask.sum(1)
    if response_length is not None:
        lengths = lengths - rollouts.lengths + response_length
    if lengths.max() > policy.context_length:
        grown = "" if response_length is None else f" with a response of {response_length}"
        raise ValueError(f"rollouts: expected at most the {policy.context_length} tokens of the model's context, "
                         f"prompt and response; the longest, rollout {int(lengths.argmax())}, has "
                         f"{int(lengths.max())}{grown}")


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
    temperature = _one_number("temperature", temperature)
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
    output = policy.run_keeping(1, policy.generation_arguments(attention, input_ids=step_ids), parameters)
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
            arguments = policy.generation_arguments(attention, input_ids=drawn[:, None], past_key_values=cache)
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
