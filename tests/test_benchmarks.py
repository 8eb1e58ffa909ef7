"""That benchmarks run; what they measure is for `make bench` to say."""

import importlib.util

from conftest import ROOT


def test_every_side_of_the_entropy_change_benchmark_runs(shipped):
    spec = importlib.util.spec_from_file_location("entropy_change", ROOT / "benchmarks" / "entropy_change.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    taken = benchmark.times(shipped, benchmark.random_rollouts(shipped, count=5, prompt=4, response=4), rounds=1)
    assert list(taken) == ["forward and backward", "first order", "second order"]
    assert all(len(values) == 1 and values[0] > 0 for values in taken.values())
