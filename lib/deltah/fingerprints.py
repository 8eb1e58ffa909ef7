"""What tensors hold, as one word each: by it a result knows whether what it was made from is still the same.

A version counter does not see every write to a parameter (not those of fused optimizers, nor through `.data`), and
another object may hold the same numbers. So the values themselves are summed up, chunk by chunk, mod 2^64:

    Σ_i b_i k_i,    b_i the values' bits, 32 at a time, k_i fixed random numbers of 64 bits

which two chunks that differ share with a probability of 2^-33 at most, whatever the difference: a changed sign, a
factor of two, two values exchanged. What counts is the value, not its dtype: a float32 tensor and its float64 copy are
the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# Values summed at a time: what stays in a processor's cache.
CHUNK = 2**16


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A word for each tensor's shape and values, by name; for 100 million float32 numbers a third of a second.

    >>> x = torch.tensor([0.1, 0.2])
    >>> fingerprint({"x": x}) == fingerprint({"x": x.double()}), fingerprint({"x": x}) == fingerprint({"x": -x})
    (True, False)
    """
    keys = torch.randint(-2**63, 2**63 - 1, (2 * CHUNK,), generator=torch.Generator().manual_seed(0))
    keys_on: dict[torch.device, Tensor] = {}
    return {name: _word(x.detach(), keys_on.setdefault(x.device, keys.to(x.device))) for name, x in tensors.items()}


def digest(found: Mapping[str, object]) -> str:
    """One word for a fingerprint, or for more by name.

    >>> digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}), digest({"x": 1}) == digest({"y": 1})
    (True, False)
    """
    return _hashed(repr(sorted(found.items())).encode())


def _word(x: Tensor, keys: Tensor) -> str:
    sums = []
    for chunk in (torch.view_as_real(x) if x.is_complex() else x).reshape(-1).split(CHUNK):
        bits = _bits(chunk)
        sums.append((bits * keys[:len(bits)]).sum())
    return _hashed(repr(list(x.shape)).encode() + torch.stack(sums).cpu().numpy().tobytes())


def _bits(x: Tensor) -> Tensor:
    """The bits of values [n], as int32 [n] or [2 n]."""
    if x.dtype == torch.float64:
        single = x.float()
        x = single if torch.equal(single.double(), x) else x
    elif x.is_floating_point():
        x = x.float()
    elif x.dtype != torch.int64:
        x = x.int()
    return x.contiguous().view(torch.int32)


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
