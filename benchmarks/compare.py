"""Run the benchmarks: what `make bench` does.

    python benchmarks/compare.py [--only scoring kernel] [--device cuda] [--model FOLDER_OR_HUB_ID] [--rounds 5]

Each subject leaves a page, its numbers and a figure in results/bench/, and index.md gathers what was to be reached.
The exit status is 1 where two sides give different numbers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import report
import torch
from cases import ROOT, Case
from side_by_side import Measurement, Section, add_memory, measure
from tqdm import tqdm
from transformers.utils import logging

TITLES = {"scoring": "Scoring", "kernel": "Fisher kernel", "second_order": "Second-order products",
          "sampling": "Sampling", "entropy_change": "Entropy change"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES), metavar="SUBJECT",
                        help=", ".join(TITLES))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--model", help="in place of the shipped policy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: only to see that all runs")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    disagree = False
    for subject in options.only:
        sections = importlib.import_module(subject).SECTIONS
        outcomes = [compare(subject, name, section, options) for name, section in sections.items()]
        print(report.save(subject, TITLES[subject], outcomes, options.results))
        disagree |= any(verdict.startswith("DIFFER") for o in outcomes for _, _, verdict in o.targets())
    report.index(options.results)
    print(f"Wrote {options.results / 'index.md'}")
    return int(disagree)


def compare(subject: str, name: str, section: Section, options: argparse.Namespace) -> report.Outcome:
    """One section, at full size and as it grows."""
    tiny = options.size == "tiny"
    case = section.tiny if tiny else section.cuda if options.device == "cuda" and not options.model else section.case
    if options.model and case.width is None:
        case = replace(case, model=options.model)
    case = replace(case, device=options.device)
    main = measure(section, case, options.rounds)
    heavy = main
    if section.memory_case and not tiny:
        heavy = Measurement(replace(section.memory_case, device=options.device), main.seconds, main.absent)
    if not options.no_memory:
        add_memory(heavy, subject, name)
    outcome = report.Outcome(section, main, heavy)
    if section.growth is None:
        return outcome
    start = section.tiny if tiny else section.growth
    for axis, (field, values) in section.axes.items():
        if tiny:
            values = (getattr(start, field), 2 * getattr(start, field))
        points = tqdm(values, desc=f"{section.title}: {axis}", leave=False, disable=None)
        outcome.growth[axis] = [_point(subject, name, section, replace(start, device=options.device, **{field: value}),
                                       options) for value in points]
    return outcome


def _point(subject: str, name: str, section: Section, case: Case, options: argparse.Namespace) -> Measurement:
    measurement = measure(section, case, max(1, options.rounds // 2), check=False)
    if not options.no_memory:
        add_memory(measurement, subject, name)
    return measurement


if __name__ == "__main__":
    sys.exit(main())
