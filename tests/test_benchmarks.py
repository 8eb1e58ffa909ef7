"""That every side of the benchmarks runs and agrees, at tiny sizes; what they measure is for `make bench` to say."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from conftest import ROOT

SUBJECTS = ["scoring", "kernel", "second_order", "sampling", "entropy_change"]


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks, by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def tiny(benchmark, subject, results, *more):
    return benchmark("compare").main([
        "--only", subject, "--device", "cpu", "--size", "tiny", "--rounds", "1",
        "--threads", str(torch.get_num_threads()), "--results", str(results), *more])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_sides_run_and_agree_and_leave_a_page(benchmark, subject, tmp_path, capsys):
    assert tiny(benchmark, subject, tmp_path, "--no-memory") == 0
    expected = {"index.md", *(f"{subject}{suffix}" for suffix in (".json", ".md", ".png"))}
    assert {path.name for path in tmp_path.iterdir()} == expected
    page = (tmp_path / f"{subject}.md").read_text()
    assert page in capsys.readouterr().out
    for title, section in json.loads((tmp_path / f"{subject}.json").read_text())["sections"].items():
        assert f"## {title}" in page
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in section["main"]["seconds"].values())
        # Other libraries are not installed here; something besides them is there to agree with.
        assert "deltah" in section["main"]["differences"] or subject == "entropy_change"


@pytest.fixture
def toy(benchmark):
    """A section whose sides hold memory, or fail."""
    side_by_side = benchmark("side_by_side")

    def fails():
        raise RuntimeError("no such layer\nat all")

    def sides(case):
        return {"deltah": lambda: torch.ones(case.width), "peer": lambda: torch.ones(case.width) + 1e-3,
                "missing": lambda: side_by_side.peer("a_library_that_nobody_has"), "failing": fails}

    case = benchmark("cases").Case(width=4)
    return side_by_side.Section(
        title="Toy", about="", sides=sides, base="peer", case=case, cuda=case, tiny=case,
        targets=tuple(side_by_side.Target("deltah", base, limit)
                      for base, limit in (("peer", 1e9), ("peer", 0.0), ("missing", 1.0), (None, 1.0))),
        differences=lambda case, results: side_by_side.relative_differences(
            {name: [x] for name, x in results.items()}, [results["deltah"]]), tolerance=1e-5)


def test_pages_say_what_falls_short_and_what_is_absent(benchmark, toy, tmp_path):
    measured = benchmark("side_by_side").measure(toy, toy.case, rounds=3)
    assert measured.absent == {"missing": "not installed", "failing": "does not: RuntimeError: no such layer"}
    outcome = benchmark("report").Outcome(toy, measured, measured)
    verdicts = [row[2] for row in outcome.targets()]
    assert verdicts == ["met", "MISSED", "not measured; missing: not installed", "not measured", "DIFFER: peer"]
    page = benchmark("report").save("toy", "Toy", [outcome], tmp_path)
    assert all(verdict in page for verdict in verdicts)
    assert "| missing | not installed |" in page
    benchmark("report").index(tmp_path)
    assert "MISSED" in (tmp_path / "index.md").read_text()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_side_alone(benchmark):
    """The bare product makes logits of 40 MB here, in buffers of some MB; its inputs, of 41 MB, are held before.

    Takes seconds: a process of its own, which imports all libraries.
    """
    side_by_side, scoring = benchmark("side_by_side"), benchmark("scoring")
    case = benchmark("cases").Case(rollouts=4, prompt=0, response=100, width=400, layers=0, vocabulary=25_000)
    measured = side_by_side.Measurement(case, {scoring.PRODUCT: [1.0]}, {})
    side_by_side.add_memory(measured, "scoring", "forward")
    logits = 4 * 4 * 100 * 25_000
    assert logits <= measured.memory[scoring.PRODUCT] < 1.5 * logits
