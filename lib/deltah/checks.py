"""One way to refuse a wrong argument: its name, what was expected, and what came.

Each function returns the argument in the form that the library goes on with. A wrong kind of thing is a TypeError, a
wrong value a ValueError; numbers of numpy, and tensors of one number, are numbers.

>>> integer("seed", -1, minimum=0)
Traceback (most recent call last):
    ...
ValueError: seed: expected an integer ≥ 0, got -1
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = {"floating": "floating-point numbers", "integer": "integers", "boolean": "booleans", "number": "numbers"}


def shown(value: Any) -> str:
    """A value as a message shows it: short, and a tensor by its dtype and shape.

    >>> shown(torch.zeros(2, 3)), shown("grpo"), shown([1, 2])
    ('a float32 tensor of shape [2, 3]', "'grpo'", 'list')
    """
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, (bool, str, numbers.Number, np.generic)):
        return repr(value.item() if isinstance(value, np.generic) else value)[:80]
    return type(value).__name__


def integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """An integer, or a number equal to one of numpy's or of a tensor; not a boolean."""
    noun = "an integer" + _bounds(minimum=minimum, maximum=maximum)
    value = _item(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {noun}, got {shown(value)}")
    if not isinstance(value, numbers.Integral) or not _within(value, minimum, None, maximum, None):
        raise ValueError(f"{name}: expected {noun}, got {shown(value)}")
    return int(value)


def number(name: str, value: Any, minimum: float | None = None, above: float | None = None,
           maximum: float | None = None, below: float | None = None) -> float:
    """A finite number, within bounds that count (`minimum`, `maximum`) or do not (`above`, `below`)."""
    noun = "a number" + _bounds(minimum, above, maximum, below)
    value = _item(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {noun}, got {shown(value)}")
    try:
        found = float(value)
    except OverflowError:  # an integer that no floating-point number holds
        found = math.inf
    if not math.isfinite(found) or not _within(value, minimum, above, maximum, below):
        raise ValueError(f"{name}: expected {noun}, got {shown(value)}")
    return found


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """One of `allowed`, which are strings or integers."""
    listed = ", ".join(map(str, allowed))
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Integral)):
        raise TypeError(f"{name}: expected one of {listed}, got {shown(value)}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {listed}, got {shown(value)}")
    return value


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def instance(name: str, value: Any, kinds: type | tuple[type, ...], noun: str | None = None) -> Any:
    """An object of one of these classes, which messages call `noun`."""
    if not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        noun = noun or "a " + " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: expected {noun}, got {shown(value)}")
    return value


def tensor(name: str, value: Any, shape: Sequence[int | str] | None = None, kind: str | None = None,
           finite: bool = False) -> Tensor:
    """A tensor.

    Args:
        name, value: of the argument.
        shape: sizes, or a letter for one that may be any; `...` as the first stands for any number of them. None: any.
        kind: "floating", "integer" (booleans left out), "boolean" or "number" (floating or integer); None: any.
        finite: refuse NaN and infinity.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {shown(value)}")
    is_boolean, is_floating = value.dtype == torch.bool, value.is_floating_point()
    fits = {None: True, "floating": is_floating, "boolean": is_boolean,
            "integer": not (is_boolean or is_floating or value.is_complex()),
            "number": not (is_boolean or value.is_complex())}[kind]
    if not fits:
        raise TypeError(f"{name}: expected {KINDS[kind]}, got {shown(value)}")
    if shape is not None:
        sizes = list(shape[1:] if shape and shape[0] == "..." else shape)
        actual = list(value.shape[len(value.shape) - len(sizes):] if len(sizes) < len(shape) else value.shape)
        if len(actual) != len(sizes) or any(isinstance(s, int) and s != a for s, a in zip(sizes, actual, strict=True)):
            raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(value.shape)}")
    # PyTorch does not ask this of eight-bit numbers.
    if finite and not torch.isfinite(value.float() if is_floating and value.dtype.itemsize == 1 else value).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return value


def dense(name: str, value: Any) -> Tensor:
    """A tensor whose values are there, each in a place of its own: not sparse, nor on the device "meta"."""
    if tensor(name, value).is_meta or value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor with values, got {value.layout} on {value.device}")
    return value


def _item(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return value.item()
    return value.item() if isinstance(value, np.generic) else value


def _within(value: float, minimum: float | None, above: float | None, maximum: float | None,
            below: float | None) -> bool:
    return ((minimum is None or value >= minimum) and (above is None or value > above)
            and (maximum is None or value <= maximum) and (below is None or value < below))


def _bounds(minimum: float | None = None, above: float | None = None, maximum: float | None = None,
            below: float | None = None) -> str:
    found = [f"{sign} {bound}" for sign, bound in (("≥", minimum), (">", above), ("≤", maximum), ("<", below))
             if bound is not None]
    return " " + " and ".join(found) if found else ""
