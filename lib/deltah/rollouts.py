"""Rollouts: responses to prompts, as one frozen dataclass of tensors; saved, loaded, and checked against a policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltah import checks
from deltah.policies import Policy, find_device

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
        rewards: [N] floating, or None; integers, booleans and eight-bit numbers become float32.
        advantages: [N] floating, or None; integers and eight-bit numbers become float32.
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
        object.__setattr__(self, "temperature", checked_temperature(self.temperature))
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
        if isinstance(rows, slice):
            try:
                rows = range(len(self))[rows]
            except (TypeError, ValueError) as error:
                raise type(error)(f"rows: expected a slice of integers, got {rows} ({error})") from error
        rows = self._indices(rows)
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
            # A copy, because tensors have no negative strides.
            rows = rows.copy() if isinstance(rows, np.ndarray) else rows
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
    checks.dense(name, value)
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
        if value.is_floating_point() and value.dtype.itemsize == 1:
            # There is no arithmetic in eight bits.
            value = value.float()
        if not value.is_floating_point():
            boolean = value.dtype == torch.bool and name == "rewards"
            value = (value if boolean else checks.tensor(name, value, kind="number")).float()
        checks.tensor(name, value, finite=True)
    return value.clone() if value.is_inference() else value


def checked_temperature(temperature: Any) -> float:
    """A positive number, of which a tensor or an array may hold one."""
    single = isinstance(temperature, (Tensor, np.ndarray)) and temperature.reshape(-1).shape == (1,)
    return checks.number("temperature", temperature.item() if single else temperature, above=0)


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
