"""Checkpoints: all that a training run needs to go on as if it had never stopped, in one safetensors file.

It holds the trainable parameters, the optimizer's state, the number of steps taken and the records so far. There is no
state of a generator: what a step draws follows from the run's seed and the step's number. A file takes the place of the
one before in one go, so that at every moment there is a whole one. It knows its run, and no other can start from it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from deltah import checks
from deltah.fingerprints import digest, fingerprint
from deltah.policies import Policy
from deltah.updates import state_of

FORMAT = "deltah.training/1"
ABOUT, PARAMETER, STATE = "deltah", "parameter/", "optimizer/"


def configuration(policy: Policy, problems: Dataset, optimizer: Optimizer, settings: Mapping[str, Any]
                  ) -> dict[str, Any]:
    """What makes a run the one that it is, as JSON has it: the model, the data and the optimizer as they are, settings.

    Args:
        policy, problems, optimizer: at the start of the run.
        settings: by name: numbers, text, functions, objectives.
    """
    rows = hashlib.sha256()
    for row in problems:
        rows.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    tensors, rest = _split(optimizer)
    found = {"model": [type(policy.model).__name__, str(policy.dtype), digest(state_of(policy))],
             "trainable parameters": digest(dict.fromkeys(policy.parameters)),
             "problems": [len(problems), rows.hexdigest()[:16]],
             "optimizer": [type(optimizer).__name__, rest, digest(fingerprint(tensors))],
             **{name: described(value) for name, value in settings.items()}}
    return json.loads(json.dumps(found))


def described(value: Any) -> Any:
    """What a setting is, as JSON has it; functions by their names and what a `functools.partial` has set.

    A lambda, or a function within a function, shares its name with others: of these the code counts too, with its
    defaults and the numbers, text and tensors that it closes over. What has no other description counts by its kind.

    >>> described(functools.partial(sorted, reverse=True))
    ['builtins.sorted', [], {'reverse': True}]
    """
    if isinstance(value, Tensor):
        return digest(fingerprint({"": value}))
    if isinstance(value, functools.partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if is_dataclass(value):
        return {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): described(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(x) for x in value]
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        name = f"{named.__module__}.{named.__qualname__}"
        if "<" not in name or not inspect.isfunction(value):
            return name
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        # Not what functions it closes over do: it may be one of them.
        bound = [x.__name__ if inspect.isfunction(x) else described(x) for x in cells]
        return [name, hashlib.sha256(repr(_code(value.__code__)).encode()).hexdigest()[:16],
                described(value.__defaults__), described(value.__kwdefaults__), bound]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if value is None or isinstance(value, (str, int, float)):
        return value
    # Not where in memory it is, which differs between processes.
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in repr(value) else repr(value)


def _code(code: CodeType) -> list[Any]:
    """What a function's code does, the same in every process."""
    constants = [_code(x) if isinstance(x, CodeType) else sorted(map(repr, x)) if isinstance(x, frozenset) else repr(x)
                 for x in code.co_consts]
    return [code.co_code, code.co_names, constants]


def save(path: Path, policy: Policy, optimizer: Optimizer, configuration: Mapping[str, Any], steps: int,
         records: list[dict[str, Any]]) -> None:
    """Write a checkpoint under a temporary name, which then takes the place of the one before.

    Raises:
        ValueError: an optimizer whose state has more in it than tensors and numbers.
    """
    tensors, rest = _split(optimizer)
    tensors = {STATE + name: x for name, x in tensors.items()}
    tensors |= {PARAMETER + name: p for name, p in policy.parameters.items()}
    about = {"format": FORMAT, "configuration": configuration, "steps": steps, "records": records, "optimizer": rest}
    partial = path.with_name(f".{path.name}.partial")
    # Copies, because the format refuses tensors that share memory.
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    # Under one name, as the order of several is left to chance.
    save_file(tensors, partial, {ABOUT: json.dumps(about)})
    # On the disk before its name is: a machine may stop too.
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path, policy: Policy, optimizer: Optimizer, configuration: Mapping[str, Any], steps: int
         ) -> tuple[int, list[dict[str, Any]]]:
    """Put policy and optimizer where a checkpoint of at most `steps` steps left them; returns its steps and records.

    Raises:
        ValueError: a file that is damaged, or no checkpoint, or that of another or a longer run. Nothing is changed
            then.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"checkpoint: expected a file written by training.train ({FORMAT}), got {str(path)!r}")
            _check_same(path, about["configuration"], configuration)
            if about["steps"] > steps:
                raise ValueError(f"steps: expected at least the {about['steps']} that {str(path)!r} has taken, "
                                 f"got {steps}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"checkpoint: {str(path)!r} is damaged or no checkpoint ({error})") from error
    saved = {name: x for name, x in tensors.items() if name.startswith(STATE)}
    with torch.no_grad():
        for name, p in policy.parameters.items():
            p.copy_(tensors[PARAMETER + name])
    _restore(optimizer, {name.removeprefix(STATE): x for name, x in saved.items()}, about["optimizer"])
    return about["steps"], about["records"]


def _check_same(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    differing = [name for name in saved | own if saved.get(name) != own.get(name)]
    if differing:
        listed = "; ".join("{} is {}, was {}".format(name, *_short(own.get(name), saved.get(name)))
                           for name in differing)
        hint = " (a run is taken up with the policy that it began with)" if "model" in differing else ""
        raise ValueError(f"checkpoint: {str(path)!r} is of another run: {listed}{hint}")


def _short(*values: Any) -> list[str]:
    """Values as text, of long ones the part where they begin to differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    start = max(0, len(os.path.commonprefix(texts)) - 20) if max(map(len, texts)) > 80 else 0
    return [("..." if start else "") + (text if len(text) <= 80 else text[:77] + "...")
            for text in (text[start:] for text in texts)]


def _split(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: tensors by "parameter's number/name", and the rest, with the groups' settings."""
    found = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, state in found["state"].items():
        for name, x in state.items():
            if isinstance(x, Tensor):
                tensors[f"{index}/{name}"] = x
            elif x is None or isinstance(x, (bool, int, float, str)):
                numbers[f"{index}/{name}"] = x
            else:
                raise ValueError(f"optimizer: a checkpoint holds tensors and numbers; {type(optimizer).__name__} has "
                                 f"{checks.shown(x)} as {name!r} in its state")
    groups = [{name: x.item() if isinstance(x, Tensor) else x for name, x in group.items() if name != "params"}
              for group in found["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def _restore(optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, x in {**tensors, **rest["numbers"]}.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = x
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, rest["groups"], strict=True):
        group |= {name: _like(group[name], x) for name, x in saved.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # It rounds the state to the parameters' dtype.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        own = optimizer.state[parameters[index]]
        own |= {key: x.to(own[key].device) for key, x in values.items() if isinstance(x, Tensor)}


def _like(own: Any, saved: Any) -> Any:
    """A setting of a parameter group as the optimizer had it: JSON has neither tensors nor tuples."""
    if isinstance(own, Tensor):
        return torch.full_like(own, saved)
    return tuple(saved) if isinstance(own, tuple) else saved
