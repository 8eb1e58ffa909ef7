"""How much memory is free, what a sequence takes of it, and so how many sequences run at a time.

One call may take a quarter of what is free. What a sequence of L tokens takes is estimated from the model's shapes. Let
w be the sum of a matrix's inputs and outputs over the matrices that a token meets in a block, and a = heads · L² where
attention keeps its weights, else 0. In numbers,

    forward     the widest block's tensors:                                   1.5 w L + 4 a
    backward    what every block saves, and the widest block's tensors:       Σ (2 w L + 3 a) + forward
    series      order + 1 coefficients, attention in its mathematical form:   (order + 1) (1.5 w L + 4 heads L²)
    sampling    a forward, and what attention remembers of every token

The factors are those of the models in the tests, whose tensors are counted there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltah.policies import Policy

# Of what is free, what one call may take.
SHARE = 0.25
# Entries of its widest tensor that one batch may hold: past 2^22 the CPU spends its time on fresh memory, below 2^28 a
# GPU idles.
WIDEST_ON_CPU, WIDEST_ON_GPU = 2**22, 2**28
# Numbers in float64 that become of one logit: its probability, their sum, and what is done between.
OF_A_LOGIT = 5
# Of a control group, by version: where it is mounted, its limit, what it uses, and what of that is cached files.
CGROUPS = {1: (("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
           2: (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file")}


def free(device: torch.device) -> int:
    """Bytes that are to be had on a device, within the limits of this process's control groups.

    >>> free(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        # What PyTorch keeps for itself, and does not use.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return min([psutil.virtual_memory().available, *_left_in_cgroups(Path("/"))])


def budget(device: torch.device, share: float = 1.0) -> int:
    """Bytes that one call may take, or some part of it."""
    return int(share * SHARE * free(device))


def numbers(device: torch.device, dtype: torch.dtype, most: int, share: float) -> int:
    """How many numbers a part of a call may hold that gains nothing from more than `most`."""
    return min(most, budget(device, share) // dtype.itemsize)


def rows_at_once(policy: Policy, length: int, kind: str, order: int = 0, logits: int = 0, share: float = 1.0,
                 held: int = 0) -> int:
    """How many sequences to run in one batch: as many as are fast, and fit a share of the budget; at least one.

    Args:
        policy: the policy.
        length: tokens in the longest of them, prompt and response.
        kind: "forward", "backward", "series" or "sampling".
        order: of a series.
        logits: positions of each sequence that logits are made at.
        share: of the budget.
        held: bytes of it that other things take.
    """
    entries = policy.vocabulary_size * logits
    if kind != "sampling":  # which spends its time on single tokens
        widest = max((matrix.widest for block in _matrices(policy.model).values() for matrix in block), default=0)
        entries = (order + 1) * max(entries, widest * length)
    fast = (WIDEST_ON_CPU if policy.device.type == "cpu" else WIDEST_ON_GPU) // max(1, entries)
    room = budget(policy.device, share) - held
    return max(1, min(fast, room // sequence_bytes(policy, length, kind, order, logits)))


def sequence_bytes(policy: Policy, length: int, kind: str, order: int = 0, logits: int = 0) -> int:
    """What one sequence takes while it runs, estimated; arguments as for `rows_at_once`.

    >>> sequence_bytes(policy, 194, "backward") / 2**20                      # doctest: +SKIP
    498.7
    """
    size, blocks = policy.dtype.itemsize, [sum(m.met for m in block) for block in _matrices(policy.model).values()]
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    # The softmax of attention runs in float32 at least; its mask is shared by all heads.
    square = max(4, size) * length**2
    weights = heads * square if kind == "series" or _keeps_weights(policy) else 0
    made = logits * policy.vocabulary_size * (size + 8 * OF_A_LOGIT)
    total = (order + 1) * (1.5 * max(blocks, default=0) * length * size + 4 * weights + square + made)
    if kind == "backward":
        total += 2 * sum(blocks) * length * size + 3 * len(blocks) * weights
    if kind == "sampling":
        total += 2 * _cache_numbers(config, heads) * length * size
    return int(total)


def gradient_bytes(policy: Policy) -> int:
    """A batch's gradient of all parameters, and the sum of the earlier ones."""
    return 2 * sum(p.numel() * max(4, p.element_size()) for p in policy.parameters.values())


def position_bytes(policy: Policy) -> int:
    """What goes into each matrix at one position of a sequence, and the gradient of what comes out of it."""
    total = sum(matrix.met for block in _matrices(policy.model).values() for matrix in block)
    return int(total) * max(4, policy.dtype.itemsize)


class _Matrix(NamedTuple):
    """What a token meets of a parameter: its inputs and outputs, over the experts that the token is sent to."""

    met: float
    widest: int


def _matrices(model: PreTrainedModel) -> dict[str, list[_Matrix]]:
    """The matrices of each block of a model, by the block's name; embeddings and output layer apart."""
    config, blocks = model.config.get_text_config(), defaultdict(list)
    apart = {*model.get_output_embeddings().modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module in apart:
            continue
        path = name.split(".")
        block = ".".join(path[:next((i + 1 for i, part in enumerate(path) if part.isdigit()), 0)])
        for p in module.parameters(recurse=False):
            if p.ndim > 1:
                # Of a convolution, its channels.
                sides = p.shape[-2:] if p.ndim == 2 or "experts" in path else p.shape[:1] * 2
                blocks[block].append(_Matrix(sum(sides) * _times(config, path, p), max(sides)))
    return blocks


def _times(config, path: list[str], p: Tensor) -> float:
    """How often a token meets a matrix: experts are slices of a parameter, or the modules of a list."""
    if "experts" not in path:
        return 1.0
    count = _first(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    chosen = _first(config, "num_experts_per_tok", "moe_topk", "top_k") or count
    return chosen if p.ndim == 3 else chosen / count


def _first(config, *names: str):
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _keeps_weights(policy: Policy) -> bool:
    """Whether attention forms its weights, for every pair of positions; fused kernels do not, save float64 on GPUs."""
    implementation = getattr(policy.model.config.get_text_config(), "_attn_implementation", None)
    return implementation in ("eager", None) or policy.device.type == "cuda" and policy.dtype == torch.float64


def _cache_numbers(config, heads: int) -> int:
    """Keys and values of one token."""
    layers = getattr(config, "num_hidden_layers", None) or 1
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
    return 2 * layers * width * (_first(config, "num_key_value_heads", "num_kv_heads") or heads)


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left under the limit of each control group that this process is in, and of those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts, *files = CGROUPS[1 if controllers else 2]
        group = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            # A container may see its own group as the root.
            for folder in dict.fromkeys((group, *group.parents, PurePosixPath())):
                yield from _left(root / mount / folder, *files)


def _left(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    try:
        found, use = ((folder / name).read_text().strip() for name in (limit, used))
        # Cached files give way to whoever needs the memory.
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such group, or none with a limit
        return
    if found != "max":
        yield max(0, int(found) - int(use) + int(statistics.get(cached, 0)))
