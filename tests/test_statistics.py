import itertools
import math

import pytest
import torch

from deltah import Estimate
from deltah.statistics import two_sample_product, u_statistic


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean_over_tuples(h, size, term):
    tuples = list(itertools.permutations(range(len(h)), size))
    return sum(float(term(h, *indices)) for indices in tuples) / len(tuples)


@pytest.mark.parametrize("count", [4, 5, 7])
def test_agrees_with_sums_over_pairs_triples_and_quadruples(count):
    products = random(count, count, seed=count)
    h = (products + products.T) / 2
    p2 = mean_over_tuples(h, 2, lambda h, i, j: h[i, j] ** 2)
    p3 = mean_over_tuples(h, 3, lambda h, i, j, k: h[i, j] * h[i, k])
    p4 = mean_over_tuples(h, 4, lambda h, i, j, k, m: h[i, j] * h[k, m])
    u = mean_over_tuples(h, 2, lambda h, i, j: h[i, j])
    result = u_statistic(products)
    assert result.value == pytest.approx(u, abs=1e-13)
    assert result.zeta1 == pytest.approx(p3 - p4, abs=1e-13)
    assert result.zeta2 == pytest.approx(p2 - 2 * p3 + p4, abs=1e-13)
    assert result.variance == pytest.approx(u**2 - p4, abs=1e-13)
    assert result.variance == pytest.approx(4 / count * result.zeta1 + 2 / (count * (count - 1)) * result.zeta2)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_the_jackknife_is_the_one_of_leaving_prompts_out(count):
    products = random(count, count, seed=count)
    off_diagonal = ~torch.eye(count, dtype=torch.bool)
    without = []
    for n in range(count):
        kept = torch.arange(count) != n
        without.append(products[kept][:, kept][off_diagonal[kept][:, kept]].mean())
    without = torch.stack(without)
    by_hand = (count - 1) / count * (without - without.mean()).square().sum()
    result = u_statistic(products)
    assert result.jackknife == pytest.approx(float(by_hand), rel=1e-12)
    assert result.zeta1_notes * 4 * (count - 1) ** 2 / (count * (count - 2) ** 2) == pytest.approx(result.jackknife)
    assert torch.allclose(result.contributions, (count * result.value - (count - 2) * without) / 2, atol=1e-12)
    assert float(result.contributions.mean()) == pytest.approx(result.value, abs=1e-13)


@pytest.mark.parametrize("size, count", [(4, 4), (3, 5)])
def test_every_estimate_has_its_expectation_over_all_samples(size, count):
    """All size^count samples with replacement from a finite population: expectations without sampling noise."""
    h0 = random(size, size, seed=3) + 0.5
    h = (h0 + h0.T) / 2
    target, phi1 = h.mean(), h.mean(1) - h.mean()
    phi2 = h - target - phi1 - phi1[:, None]
    zeta1, zeta2 = float(phi1.square().mean()), float(phi2.square().mean())
    results = [u_statistic(h0[list(chosen)][:, list(chosen)])
               for chosen in itertools.product(range(size), repeat=count)]

    def mean(name):
        return sum(getattr(result, name) for result in results) / len(results)

    truth = sum((result.value - float(target)) ** 2 for result in results) / len(results)
    assert mean("value") == pytest.approx(float(target), abs=1e-12)
    assert truth == pytest.approx(4 / count * zeta1 + 2 / (count * (count - 1)) * zeta2, abs=1e-12)
    assert mean("variance") == pytest.approx(truth, abs=1e-12)
    assert mean("zeta1") == pytest.approx(zeta1, abs=1e-12)
    assert mean("zeta2") == pytest.approx(zeta2, abs=1e-12)
    expected = (count - 2) / (count - 1) ** 2 * ((count - 2) * zeta1 + zeta2)
    assert mean("zeta1_notes") == pytest.approx(expected, abs=1e-12)
    assert mean("jackknife") - truth == pytest.approx(2 * zeta2 / ((count - 1) * (count - 2)), abs=1e-12)


def test_two_samples_have_their_expectations_over_all_samples():
    x, y = random(3, 2, seed=1), random(3, 2, seed=2) + 1
    rows, columns = 4, 3
    mu_x, mu_y = x.mean(0), y.mean(0)
    sigma_x, sigma_y = ((z - z.mean(0)).T @ (z - z.mean(0)) / len(z) for z in (x, y))
    parts = {"from_rows": mu_y @ sigma_x @ mu_y / rows, "from_columns": mu_x @ sigma_y @ mu_x / columns,
             "from_both": (sigma_x * sigma_y).sum() / (rows * columns)}
    results = [two_sample_product(x[list(e)] @ y[list(u)].T) for e in itertools.product(range(3), repeat=rows)
               for u in itertools.product(range(3), repeat=columns)]
    truth = sum((result.value - float(mu_x @ mu_y)) ** 2 for result in results) / len(results)
    assert truth == pytest.approx(float(sum(parts.values())), abs=1e-12)
    for name, expected in (parts | {"variance": truth}).items():
        measured = sum(getattr(result, name) for result in results) / len(results)
        assert measured == pytest.approx(float(expected), abs=1e-12), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_low_precision_input_is_summed_in_float64(dtype):
    products = (random(40, 40) * 50 + 1000).to(dtype)
    for function in (u_statistic, two_sample_product):
        low, high = function(products), function(products.double())
        assert (low.value, low.standard_error, low.count) == (high.value, high.standard_error, high.count)


def test_a_large_common_value_does_not_spoil_the_error():
    products = random(10, 10)
    near, far = u_statistic(products), u_statistic(products + 1e6)
    assert far.standard_error == pytest.approx(near.standard_error, rel=1e-6)
    assert far.zeta1 == pytest.approx(near.zeta1, rel=1e-6)


def test_the_diagonal_does_not_enter():
    products = random(6, 6)
    assert u_statistic(products).value == u_statistic(products.clone().fill_diagonal_(1e9)).value


def test_three_prompts_have_the_jackknife_only():
    result = u_statistic(random(3, 3))
    assert math.isnan(result.zeta1) and math.isnan(result.zeta2) and math.isnan(result.variance)
    assert result.standard_error == pytest.approx(math.sqrt(result.jackknife))


def test_equal_products_have_no_error():
    assert repr(u_statistic(torch.ones(5, 5))) == "1 ± 0"
    constant = two_sample_product(torch.full((3, 4), 2.0))
    assert repr(constant) == "2 ± 0" and constant.count == 3


@pytest.mark.parametrize("function", [u_statistic, two_sample_product])
def test_no_graph_of_the_products_is_kept(function):
    products = random(4, 4)
    found = function(products.clone().requires_grad_())
    assert not found.contributions.requires_grad and found.value == function(products).value


def test_the_standard_error_keeps_to_what_the_noise_of_both_sides_brings():
    """Without means, ζ₁ is 0 and the unbiased variance is often negative; the error never is."""
    negative = 0
    for seed in range(100):
        products = random(8, 5, seed=seed) @ random(5, 8, seed=1000 + seed)
        one, two = u_statistic(products), two_sample_product(products)
        negative += one.variance <= 0
        assert one.standard_error**2 == pytest.approx(max(one.variance, 2 * one.zeta2 / 56))
        assert two.standard_error**2 == pytest.approx(max(two.variance, two.from_both))
    assert negative > 5


def test_a_statistic_is_an_estimate():
    result = u_statistic(random(20, 20))
    assert isinstance(result, Estimate) and result.count == 20
    assert result.interval() == Estimate(result.value, result.standard_error, 20, skewness=result.skewness).interval()
    assert repr(result) == repr(Estimate(result.value, result.standard_error, 20))
    assert isinstance(two_sample_product(random(4, 5)), Estimate)


def test_intervals_lean_towards_the_tail_of_either_side():
    tail = torch.tensor([0.0] * 19 + [20.0], dtype=torch.float64)
    others = torch.ones(20, dtype=torch.float64)
    for products in (tail[:, None] * others, others[:, None] * tail):
        for result in (two_sample_product(products), u_statistic(products)):
            low, high = result.interval()
            assert result.skewness > 3 and high - result.value > 1.2 * (result.value - low)


def test_welch_counts_the_noisier_side():
    noisy_rows = two_sample_product((1 + random(12, 1)) @ torch.ones(1, 30, dtype=torch.float64))
    assert noisy_rows.count == 12
    noisy_columns = two_sample_product(torch.ones(12, 1, dtype=torch.float64) @ (1 + random(1, 30)))
    assert noisy_columns.count == 30


@pytest.mark.parametrize("function", [u_statistic, two_sample_product])
@pytest.mark.parametrize("products", [torch.ones(2, 2), torch.ones(5), torch.ones(3, 3, 3), torch.ones(0, 0),
                                      torch.full((4, 4), math.nan), torch.full((4, 4), math.inf)])
def test_bad_products_are_named(function, products):
    with pytest.raises(ValueError, match="products: expected"):
        function(products)


def test_one_batch_needs_a_square_matrix():
    with pytest.raises(ValueError, match=r"products: expected a square matrix \[B, B\], got shape \[4, 5\]"):
        u_statistic(torch.ones(4, 5))


@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize("rows, columns", [(24, 24), (64, 64), (48, 16)])
def test_intervals_cover_at_their_level(rows, columns, tails):
    """2,000 batches of 10-dimensional X and Y, correlated within a prompt where there is one batch."""
    generator = torch.Generator().manual_seed(rows + columns)
    replicates, dimensions = 2000, 10

    def noise(count):
        z = torch.randn(replicates, count, dimensions, generator=generator, dtype=torch.float64)
        scale = torch.randn(replicates, count, 1, generator=generator, dtype=torch.float64)
        return z * (0.5 * scale).exp() if tails == "heavy" else z

    x, y = 0.5 + noise(rows), 0.5 + noise(columns)
    if rows == columns:
        y = y - 0.5 * (x - 0.5)
    function = u_statistic if rows == columns else two_sample_product
    target, covered = 0.25 * dimensions, 0
    for products in x @ y.mT:
        low, high = function(products).interval(0.95)
        covered += low <= target <= high
    assert 0.93 <= covered / replicates <= 0.97


@pytest.mark.parametrize("function", [u_statistic, two_sample_product])
@pytest.mark.parametrize("wrong", [None, 3, "products", [[1.0]], {"a": 1}, torch.ones(4, 4).bool(),
                                   torch.ones(4, 4, dtype=torch.complex64)])
def test_wrong_types_are_named(function, wrong):
    with pytest.raises(TypeError, match="^products: expected (a tensor|numbers), got"):
        function(wrong)


@pytest.mark.parametrize("function", [u_statistic, two_sample_product])
def test_integers_are_numbers(function):
    products = torch.arange(16).view(4, 4).square()
    assert function(products).value == function(products.double()).value
