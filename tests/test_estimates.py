import itertools
import math

import numpy as np
import pytest
import torch

from deltah import Estimate


def test_prints_the_error_with_one_digit_and_the_value_to_match():
    assert repr(Estimate(-0.01234, 0.00041, 9)) == "-0.0123 ± 0.0004"
    assert repr(Estimate(1234.5, 56.0, 9)) == "1230 ± 60"
    assert repr(Estimate(0.5, 0.0096, 9)) == "0.50 ± 0.01"
    assert repr(Estimate(-0.4, 10.0, 9)) == "0 ± 10"
    assert repr(Estimate(2.0, 0.0, 9)) == "2 ± 0"


def test_mean_of_independent_samples_has_the_textbook_error():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    estimate = Estimate.mean(x)
    assert estimate.value == pytest.approx(float(x.double().mean()), abs=1e-12)
    assert estimate.standard_error == pytest.approx(float(x.double().std()) / math.sqrt(50), rel=1e-12)
    assert estimate.count == 50
    assert torch.equal(estimate.contributions, x.double())


def test_equal_clusters_count_as_their_means():
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + torch.randn(30, 1)
    clustered = Estimate.mean(x.flatten(), torch.arange(30).repeat_interleave(4))
    means = Estimate.mean(x.mean(1))
    assert clustered.count == 30
    assert clustered.standard_error == pytest.approx(means.standard_error, rel=1e-12)


@pytest.mark.parametrize("responses", [1, 4])
def test_intervals_cover_at_their_level(responses):
    generator = torch.Generator().manual_seed(2)
    replicates, prompts, covered = 2000, 20, 0
    clusters = torch.arange(prompts).repeat_interleave(responses)
    for _ in range(replicates):
        shared = torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
        x = 0.3 + shared + torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
        low, high = Estimate.mean(x.flatten(), clusters).interval(0.95)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / replicates <= 0.97


def test_intervals_of_skewed_samples_cover_too():
    """Log-normal samples of skewness 6: the symmetric interval falls a point and a half short at this size."""
    generator = torch.Generator().manual_seed(4)
    replicates, covered, symmetric = 4000, 0, 0
    for x in torch.randn(replicates, 200, generator=generator, dtype=torch.float64).exp():
        estimate = Estimate.mean(x)
        low, high = estimate.interval()
        covered += low <= math.exp(0.5) <= high
        symmetric += abs(estimate.value - math.exp(0.5)) <= 1.97 * estimate.standard_error
    assert symmetric / replicates + 0.01 < covered / replicates
    assert 0.94 <= covered / replicates <= 0.97


def test_without_skewness_the_interval_is_students():
    low, high = Estimate(1.0, 0.5, 10).interval(0.9)
    assert (low, high) == pytest.approx((1 - 1.8331 * 0.5, 1 + 1.8331 * 0.5), abs=1e-4)


@pytest.mark.parametrize("skewness", [-2.0, 2.0])
def test_skewness_takes_an_interval_further_in_the_long_tail_alone(skewness):
    plain, lean = (Estimate(0.0, 1.0, 20, skewness=x).interval() for x in (0.0, skewness))
    far, near = (1, 0) if skewness > 0 else (0, 1)
    assert lean[near] == plain[near] and abs(lean[far]) > 1.05 * abs(plain[far])


def test_skewness_close_to_zero_changes_nothing():
    for skewness in (1e-9, -1e-12, 1e-7):
        assert Estimate(0.0, 1.0, 20, skewness=skewness).interval() == pytest.approx(
            Estimate(0.0, 1.0, 20).interval(), rel=1e-6)


def test_equal_samples_have_no_error_and_no_skewness():
    estimate = Estimate.mean(torch.full((5,), 0.3))
    assert (estimate.standard_error, estimate.skewness) == (0, 0)
    assert estimate.interval() == (estimate.value, estimate.value)


def test_one_cluster_leaves_the_error_unknown():
    estimate = Estimate.mean(torch.tensor([1.0, 2.0]), torch.tensor([7, 7]))
    assert estimate.value == 1.5 and math.isnan(estimate.standard_error)
    assert estimate.interval() == (-math.inf, math.inf)


@pytest.mark.parametrize("contributions", [torch.tensor([]), torch.ones(2, 2), torch.tensor([1.0, math.nan])])
def test_bad_contributions_are_named(contributions):
    with pytest.raises(ValueError, match="contributions: expected"):
        Estimate.mean(contributions)


def test_drawing_without_replacement_has_the_variance_of_two_stages():
    """Every draw of two of three clusters, of every pair of their values: the mean error squared is the variance."""
    population = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.5, 4.0], [7.0, 9.0, 9.5]], dtype=torch.float64)
    clusters, truth = torch.tensor([0, 0, 1, 1]), float(population.mean())
    drawn, infinite = [], []
    for pair in itertools.combinations(population, 2):
        for values in itertools.product(pair[0], pair[0], pair[1], pair[1]):
            drawn.append(Estimate.mean(torch.stack(values), clusters, population=3))
            infinite.append(Estimate.mean(torch.stack(values), clusters))
    squares = np.mean([(e.value - truth) ** 2 for e in drawn])
    assert np.mean([e.standard_error**2 for e in drawn]) == pytest.approx(squares, rel=1e-12)
    assert np.mean([e.standard_error**2 for e in infinite]) > 2 * squares


def test_a_whole_population_leaves_only_what_its_clusters_leave_open():
    values, clusters = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    # Variances within of 2 and 8, over two samples each, averaged over two clusters.
    assert Estimate.mean(values, clusters, population=2).standard_error == pytest.approx(math.sqrt((1 + 4) / 4))
    assert (Estimate.mean(values, clusters, population=10**9).standard_error
            == pytest.approx(Estimate.mean(values, clusters).standard_error))


@pytest.mark.parametrize("clusters, population, message", [
    (torch.tensor([0, 0, 1, 1]), 1, "population"),
    (torch.tensor([0, 0, 1, 2]), 9, "population: expected clusters of two samples"),
    (None, 9, "population: expected clusters of two samples")])
def test_bad_populations_are_named(clusters, population, message):
    with pytest.raises(ValueError, match=message):
        Estimate.mean(torch.ones(4), clusters, population)


def test_bad_clusters_and_levels_are_named():
    with pytest.raises(ValueError, match="clusters: expected shape"):
        Estimate.mean(torch.ones(3), torch.zeros(2))
    with pytest.raises(ValueError, match="level: expected"):
        Estimate(0.0, 1.0, 3).interval(95)


def test_a_ratio_covers_the_ratio_of_expectations():
    """Means 2 and 5, so 0.4; clusters of three share part of both."""
    generator = torch.Generator().manual_seed(3)
    replicates, covered = 2000, 0
    clusters = torch.arange(40).repeat_interleave(3)
    for _ in range(replicates):
        shared = torch.rand(40, 1, generator=generator, dtype=torch.float64)
        below = (4 + shared + torch.rand(40, 3, generator=generator, dtype=torch.float64)).flatten()
        above = 0.4 * below + (torch.rand(40, 1, generator=generator, dtype=torch.float64) - 0.5).repeat(1, 3).flatten()
        low, high = Estimate.ratio(above, below, clusters).interval(0.95)
        covered += low <= 0.4 <= high
    assert 0.93 <= covered / replicates <= 0.97


def test_bad_ratios_are_named():
    with pytest.raises(ValueError, match="denominators: expected a mean other than 0"):
        Estimate.ratio(torch.ones(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"denominators: expected shape \[2\], got \[3\]"):
        Estimate.ratio(torch.ones(2), torch.ones(3))


def test_a_smooth_function_of_means_has_the_error_of_its_linearisation():
    generator = torch.Generator().manual_seed(0)
    truth, covered, errors, values = math.log(2.0) * 3.0, 0, [], []
    for _ in range(1000):
        samples = torch.stack([2 + torch.randn(200, generator=generator), 3 + torch.randn(200, generator=generator)], 1)
        estimate = Estimate.smooth(lambda means: means[0].log() * means[1], samples)
        low, high = estimate.interval()
        covered += low <= truth <= high
        errors.append(estimate.standard_error)
        values.append(estimate.value)
    assert 0.93 <= covered / 1000 <= 0.97
    assert sum(errors) / 1000 == pytest.approx(float(torch.tensor(values).std()), rel=0.07)
    assert float(estimate.contributions.mean()) == pytest.approx(estimate.value)
    with torch.no_grad():
        assert Estimate.smooth(lambda means: means[0].log() * means[1], samples).value == estimate.value
    with pytest.raises(ValueError, match=r"samples\[:, 1\]: expected finite numbers"):
        Estimate.smooth(lambda means: means.sum(), torch.tensor([[0.0, math.nan]]))


WRONG = (None, "1", [1.0], {"a": 1}, np.ones(3), torch.ones(3), True, Estimate(1.0, 0.1, 9))


def test_an_estimate_is_made_of_numbers():
    right = {"value": 1.0, "standard_error": 0.1, "count": 9, "skewness": 0.0}
    for name in right:
        for wrong in WRONG:
            with pytest.raises(TypeError, match=f"^{name}: expected a"):
                Estimate(**right | {name: wrong})
    for name, wrong in (("standard_error", -0.1), ("standard_error", -math.inf), ("count", 0), ("count", 2.5),
                        ("count", math.nan)):
        with pytest.raises(ValueError, match=f"^{name}: expected a"):
            Estimate(**right | {name: wrong})
    for wrong in WRONG[1:]:
        if not isinstance(wrong, torch.Tensor):
            with pytest.raises(TypeError, match="^contributions: expected a tensor"):
                Estimate(1.0, 0.1, 9, wrong)
    found = Estimate(np.float32(0.5), torch.tensor(0.25), np.int64(3), skewness=np.float64(1.0))
    assert found == Estimate(0.5, 0.25, 3, skewness=1.0) and type(found.value) is float and type(found.count) is int
    # What is not known may be said so.
    assert math.isnan(Estimate(math.nan, math.nan, 1).value) and math.isinf(Estimate(-math.inf, math.inf, 2).value)


def test_wrong_types_are_named():
    x = torch.ones(4)
    for wrong in (None, 3, "x", [1.0], {"a": 1}, np.ones(4), torch.ones(4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="^contributions: expected"):
            Estimate.mean(wrong)
        with pytest.raises(TypeError, match="^numerators: expected"):
            Estimate.ratio(wrong, x)
        with pytest.raises(TypeError, match="^denominators: expected"):
            Estimate.ratio(x, wrong)
        with pytest.raises(TypeError, match="^function: expected a function of the means, got"):
            Estimate.smooth(wrong, torch.ones(4, 1))
        with pytest.raises(TypeError, match="^samples: expected"):
            Estimate.smooth(torch.sum, wrong)
        if wrong is not None:
            with pytest.raises(TypeError, match="^clusters: expected"):
                Estimate.mean(x, wrong)
    with pytest.raises(TypeError, match="^clusters: expected integers, got a float32 tensor"):
        Estimate.mean(x, x)
    with pytest.raises(ValueError, match=r"^samples: expected shape \[N, M\], got \[4\]"):
        Estimate.smooth(torch.sum, x)
    for wrong in (0, 1, -0.5, math.nan, "0.95", None, [0.95], True):
        with pytest.raises((TypeError, ValueError), match="^level: expected a number > 0 and < 1, got"):
            Estimate(0.0, 1.0, 3).interval(wrong)
    assert Estimate(0.0, 1.0, 3).interval(np.float32(0.5)) == Estimate(0.0, 1.0, 3).interval(0.5)
