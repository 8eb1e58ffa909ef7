"""Sides that compute the same, in turns within one run: seconds, peak memory, and whether their numbers agree.

Whatever slows the machine slows all sides of a round, so ratios are taken within rounds: the median over rounds, and
the range. Peak memory is each side's own, in a fresh process, above what the process held before the side began.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import Case
from tqdm import tqdm

Sides = dict[str, Callable[[], Any]]
OURS = "deltah"


class Absent(Exception):
    """A side that does not run here; the message is what its row of the table says."""


def peer(module: str) -> ModuleType:
    """A module of another library."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent("not installed") from error


@dataclass(frozen=True)
class Target:
    """`side` takes at most `limit` times what `base` takes; without a base, `limit` of the section's memory units."""

    side: str
    base: str | None
    limit: float
    what: str = "time"


@dataclass(frozen=True)
class Section:
    """One comparison.

    Attributes:
        title: of its part of the page.
        about: what is computed, and how the sides differ.
        sides: the sides of a case by name. Those whose names begin with "deltah" must run; others may be `Absent`.
        base: the side that ratios in the table are to.
        case, cuda, tiny: the sizes, on the CPU, on CUDA, and for a test.
        targets: what the project set itself.
        differences: how far each side's numbers are from the reference's, from the case and the sides' results.
        tolerance: of these differences, which are in `difference_unit`.
        growth: the case that growth starts from; None: no growth is measured.
        axes: what grows: the fields of the case, their values, by the axis' label.
        units: of work that a result stands for; seconds are per unit, which `unit` names.
        memory_case: where memory is held against the targets; None: at `case`.
        memory_unit: bytes that memory targets count in, of the case; `memory_label` names them.
        memory_inputs: memory units that are held already when a side begins.
    """

    title: str
    about: str
    sides: Callable[[Case], Sides]
    base: str
    case: Case
    cuda: Case
    tiny: Case
    targets: tuple[Target, ...]
    differences: Callable[[Case, Mapping[str, Any]], dict[str, float]]
    tolerance: float
    difference_unit: str = "relative"
    growth: Case | None = None
    axes: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    units: Callable[[Any], float] = lambda _: 1.0
    unit: str = "seconds"
    memory_case: Case | None = None
    memory_unit: Callable[[Case], float] = lambda _: 1e6
    memory_label: str = "MB"
    memory_inputs: float = 0.0


@dataclass
class Measurement:
    """Of one case: by side, seconds of every round, why it is absent, differences, and peak memory in bytes."""

    case: Case
    seconds: dict[str, list[float]]
    absent: dict[str, str]
    differences: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, base: str) -> tuple[float, float, float]:
        """Median, least and largest over the rounds of what `side` takes over what `base` takes."""
        ratios = [a / b for a, b in zip(self.seconds[side], self.seconds[base], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def measure(section: Section, case: Case, rounds: int, check: bool = True) -> Measurement:
    """Times every side in turns, after one round that warms up and whose numbers are compared."""
    sides = section.sides(case)
    results, absent = {}, {}
    for name, side in sides.items():
        try:
            results[name] = side()
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # whatever stops another library is its result
            if name.startswith(OURS):
                raise
            absent[name] = f"does not: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    measurement = Measurement(case, {name: [] for name in results}, absent)
    if check:
        measurement.differences = section.differences(case, results)
    results.clear()
    for _ in tqdm(range(rounds), desc=f"{section.title}: rounds", leave=False, disable=None):
        for name, seconds in measurement.seconds.items():
            _wait(case)
            begin = time.perf_counter()
            result = sides[name]()
            _wait(case)
            seconds.append((time.perf_counter() - begin) / section.units(result))
            del result
    return measurement


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def add_memory(measurement: Measurement, module: str, name: str, case: Case | None = None) -> None:
    """Measures the peak memory of the sides that ran, of `module.SECTIONS[name]`, at `case`."""
    case = case or measurement.case
    if case.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return
    # Bars of other processes would write over this one's.
    os.environ["TQDM_DISABLE"] = "1"
    # A server that has the imports behind it forks a fresh process for each side.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deltah", "transformers.models.qwen2.modeling_qwen2"])
    for side in tqdm(measurement.seconds, desc=f"{name}: memory", leave=False, disable=None):
        with ProcessPoolExecutor(1, context) as pool:
            measurement.memory[side] = pool.submit(_peak, module, name, case, side, torch.get_num_threads()).result()


def _peak(module: str, name: str, case: Case, side: str, threads: int) -> int:
    """Bytes that `side` takes at its peak above what is held before it."""
    torch.set_num_threads(threads)
    section = importlib.import_module(module).SECTIONS[name]
    # Imports, and buffers of the libraries, are there before the count begins.
    section.sides(replace(section.tiny, device=case.device))[side]()
    run = section.sides(case)[side]
    gc.collect()
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    # What was freed goes back to the system, or the side would take it without a trace.
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def relative_differences(results: Mapping[str, Any], reference: Iterable[torch.Tensor | None],
                         view: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> dict[str, float]:
    """Of each side's tensors, largest deviation from the reference's over the reference's largest entry.

    Results that are None, and parts that are, have nothing to compare; `view` is the part of them to look at.
    """
    reference = list(reference)
    found = {}
    for name, parts in results.items():
        if parts is None:
            continue
        pairs = [(view(a).double(), b.double()) for a, b in zip(parts, reference, strict=True)
                 if a is not None and b is not None]
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return found
