import math

import numpy as np
import pytest
import torch

import deltah as dh
from deltah import vocabulary
from deltah.derivatives import taylor

SCALINGS = [{}, {"temperature": 0.7}, {"scale": 0.3}, {"scale": 2.0, "soft_cap": 3.0, "temperature": 1.3}]


def by_definition(hidden, weight, targets, temperature=1.0, bias=None, scale=1.0, soft_cap=None, moments=False):
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    found = log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    return found + ((2 * log_p).exp().sum(-1), ((2 * log_p).exp() * log_p).sum(-1)) if moments else found


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(vocabulary, "TILE_ON_CPU", 40)
        monkeypatch.setattr(vocabulary, "ROWS_ON_CPU", 4)


def case(bias, size=23):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, 5, dtype=torch.float64, generator=generator) for shape in ((7,), (size,)))
    targets = torch.randint(0, size, (7,), generator=generator)
    inputs = [hidden, weight] + [torch.randn(size, dtype=torch.float64, generator=generator)] * bias
    return [x.requires_grad_() for x in inputs], targets


def called(function, inputs, targets, options):
    hidden, weight, *bias = inputs
    return function(hidden, weight, targets, bias=bias[0] if bias else None, moments=True, **options)


@pytest.mark.parametrize("options", SCALINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_value_gradient_and_second_gradient(tiles, bias, options):
    inputs, targets = case(bias)
    weights = torch.linspace(-1, 2, 28, dtype=torch.float64).view(4, 7)
    found = []
    for function in (dh.linear_log_probs_and_entropies, by_definition):
        values = called(function, inputs, targets, options)
        gradients = torch.autograd.grad((weights * torch.stack(values)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
        found.append([*values, *gradients, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SCALINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_moments_that_are_not_differentiated_change_no_bit(tiles, bias, options, dtype):
    inputs, targets = case(bias)
    hidden, weight, *bias = (x.detach().to(dtype).requires_grad_() for x in inputs)
    given, found = dict(targets=targets, bias=bias[0] if bias else None, **options), []
    for moments in (False, True):
        values = dh.linear_log_probs_and_entropies(hidden, weight, moments=moments, **given)
        assert len(values) == 2 + 2 * moments and all(x.requires_grad for x in values)
        gradients = [g for x in values[:2] for g in torch.autograd.grad(x.square().sum(), [hidden, weight, *bias],
                                                                        retain_graph=True)]
        with torch.no_grad():
            values = [*values[:2], *dh.linear_log_probs_and_entropies(hidden, weight, moments=moments, **given)[:2]]
        found.append([*values, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("field", [2, 3])
def test_one_moment_is_differentiated_alone(tiles, field):
    inputs, targets = case(True)
    ours, theirs = (torch.autograd.grad(called(f, inputs, targets, {})[field].sum(), inputs)
                    for f in (dh.linear_log_probs_and_entropies, by_definition))
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("options", SCALINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_forward_mode_nested(tiles, bias, options, order):
    inputs, targets = case(bias)
    inputs = tuple(x.detach() for x in inputs)
    tangents = tuple(x.cos() for x in inputs)

    def derivatives(function):
        def along(f):
            return lambda x: torch.func.jvp(f, (x,), (tangents,))
        # Curved inputs, so that their own second derivatives count.
        nested = along(lambda x: called(function, tuple(z.sin() for z in x), targets, options))
        for _ in range(order - 1):
            nested = along(nested)
        return nested(inputs)

    torch.testing.assert_close(derivatives(dh.linear_log_probs_and_entropies), derivatives(by_definition),
                               atol=1e-11, rtol=1e-11)


def test_forward_over_reverse(tiles):
    inputs, targets = case(True)
    inputs = tuple(x.detach() for x in inputs)

    def products(function):
        def gradient(x):
            return torch.func.grad(lambda y: torch.stack(called(function, y, targets, {})).sum())(x)
        return torch.func.jvp(gradient, (inputs,), (inputs,))

    torch.testing.assert_close(products(dh.linear_log_probs_and_entropies), products(by_definition),
                               atol=1e-11, rtol=1e-11)


def test_a_large_vocabulary_in_float32_is_as_exact_as_float32_is():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 64, generator=generator), torch.randn(50_000, 64, generator=generator)
    targets = torch.randint(0, 50_000, (20,), generator=generator)
    for sharpness in (0.01, 0.3, 3.0):
        found = dh.linear_log_probs_and_entropies(sharpness * hidden, weight, targets, moments=True)
        wanted = by_definition(sharpness * hidden.double(), weight.double(), targets, moments=True)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-6)
    # Of a flat distribution they are as small as 1/V.
    found = dh.linear_log_probs_and_entropies(0.01 * hidden, weight, targets, moments=True)[2:]
    wanted = by_definition(0.01 * hidden.double(), weight.double(), targets, moments=True)[2:]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=0, rtol=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("gap", [0.0, 1.0, 10.0, 16.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("size", [2, 150_000])
def test_moments_from_uniform_to_certain(gap, size):
    """One token ahead of all others by some logits; known in closed form, and to float32's rounding near H = 0."""
    hidden, weight = torch.ones(1, 1), torch.zeros(size, 1)
    weight[-1] = gap
    rest = (size - 1) * math.exp(-gap)
    others, log_total = math.exp(-gap) / (1 + rest), math.log1p(rest)
    collisions = (1 + rest)**-2 + rest * others / (1 + rest)
    log_probs = -(1 + rest)**-2 * log_total - rest * others / (1 + rest) * (gap + log_total)
    found = dh.linear_log_probs_and_entropies(hidden, weight, torch.tensor([0]), moments=True)[2:]
    assert float(found[0]) == pytest.approx(collisions, rel=1e-6)
    # 1 + rest is summed in float32, in pairs.
    assert float(found[1]) == pytest.approx(log_probs, rel=1e-6, abs=4 * torch.finfo(torch.float32).eps)
    exact = dh.linear_log_probs_and_entropies(hidden.double(), weight.double(), torch.tensor([0]), moments=True)[2:]
    assert float(exact[0]) == pytest.approx(collisions, rel=1e-12)
    assert float(exact[1]) == pytest.approx(log_probs, rel=1e-12, abs=2.3e-16)


def test_bfloat16_gives_float32_and_gradients_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (6, 300))
    targets = torch.arange(6)
    found = dh.linear_log_probs_and_entropies(hidden, weight, targets, moments=True)
    wanted = by_definition(hidden.float(), weight.float(), targets, moments=True)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)
    # A logit is rounded by at most ε z / 2, so that each log p is off by at most δ = ε max abs(z).
    delta = torch.finfo(torch.bfloat16).eps * (hidden @ weight.T).abs().amax(1).float()
    _, _, collisions, log_probs = wanted
    assert ((found[2] - collisions).abs() <= (2 * delta).expm1() * collisions).all()
    bound = (2 * delta).expm1() * log_probs.abs() + (2 * delta).exp() * delta * collisions
    assert ((found[3] - log_probs).abs() <= bound).all()
    gradients = torch.autograd.grad(found[0].sum(), [hidden, weight])
    expected = torch.autograd.grad(wanted[0].sum(), [hidden, weight])
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_a_bias_of_minus_infinity_is_a_token_of_probability_zero(tiles):
    (hidden, weight, bias), targets = case(True)
    with torch.no_grad():
        bias[::3] = -math.inf
    targets = torch.tensor([1, 2, 4, 5, 7, 8, 10])
    kept = torch.arange(len(bias)) % 3 > 0
    found = dh.linear_log_probs_and_entropies(hidden, weight, targets, bias=bias, moments=True)
    place = kept.cumsum(0)[targets] - 1
    wanted = dh.linear_log_probs_and_entropies(hidden, weight[kept], place, bias=bias[kept], moments=True)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(sum(x.sum() for x in found), [hidden, weight]),
                    torch.autograd.grad(sum(x.sum() for x in wanted), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)

    def along(chosen, bias, targets):
        """Values and derivatives of first and second order, by forward mode."""
        def function(w):
            return dh.linear_log_probs_and_entropies(hidden.detach(), w, targets, bias=bias, moments=True)

        w = weight.detach()[chosen]
        return torch.func.jvp(lambda w: torch.func.jvp(function, (w,), (w.cos(),)), (w,), (w.cos(),))

    torch.testing.assert_close(along(slice(None), bias.detach(), targets), along(kept, bias.detach()[kept], place),
                               atol=1e-12, rtol=1e-12)


def test_memory_stays_far_below_the_logits():
    """No allocation of the forward pass comes to a tenth of the logits."""
    hidden, weight, targets = torch.randn(2000, 8), torch.randn(20_000, 8), torch.zeros(2000, dtype=torch.long)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        dh.linear_log_probs_and_entropies(hidden, weight, targets, moments=True)
    largest = max(event.cpu_memory_usage if hasattr(event, "cpu_memory_usage") else 0 for event in profile.events())
    assert 0 < largest < 2000 * 20_000 * 4 / 10


def test_bad_arguments_are_named():
    hidden, weight, targets = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)
    function = dh.linear_log_probs_and_entropies
    with pytest.raises(ValueError, match=r"weight: expected shape \[V, 4\], got \[5, 3\]"):
        function(hidden, torch.zeros(5, 3), targets)
    with pytest.raises(ValueError, match=r"targets: expected shape \[3\], got \[2\]"):
        function(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="targets: expected integers from 0 to 4, got 5 to 5"):
        function(hidden, weight, targets + 5)
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        function(hidden, weight, targets, temperature=0)
    with pytest.raises(ValueError, match="soft_cap: expected a number > 0, got -1"):
        function(hidden, weight, targets, soft_cap=-1)
    with pytest.raises(ValueError, match="weight: expected a row for each token of the vocabulary, got none"):
        function(hidden, weight[:0], targets)
    for size in (1, 4, 6):
        # A larger one was cut, and one number broadcast.
        with pytest.raises(ValueError, match=rf"bias: expected shape \[5\], got \[{size}\]"):
            function(hidden, weight, targets, bias=torch.zeros(size))
    for name, x in (("weight", weight.double()), ("bias", torch.zeros(5).bfloat16())):
        with pytest.raises(TypeError, match=f"{name}: expected the dtype of hidden, torch.float32, got {x.dtype}"):
            function(hidden, targets=targets, **{"weight": weight, name: x})
    for name in ("temperature", "scale", "soft_cap"):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name}: expected a number"):
                function(hidden, weight, targets, **{name: value})
        for value in ("1", [1.0], True):
            with pytest.raises(TypeError, match=f"{name}: expected a number"):
                function(hidden, weight, targets, **{name: value})
    for value in (None, 1, "yes"):
        with pytest.raises(TypeError, match="moments: expected True or False"):
            function(hidden, weight, targets, moments=value)
    for name, message in (("hidden", "floating-point"), ("weight", "floating-point"), ("targets", "integers")):
        for wrong, what in ((None, "a tensor"), ([1.0], "a tensor"), (torch.zeros(3).bool(), message)):
            with pytest.raises(TypeError, match=f"{name}: expected {what}"):
                function(**{"hidden": hidden, "weight": weight, "targets": targets, name: wrong})
    with pytest.raises(TypeError, match="targets: expected integers, got a float32 tensor"):
        function(hidden, weight, targets.float())


def test_numbers_of_numpy_are_welcome():
    inputs, targets = case(False)
    found = dh.linear_log_probs_and_entropies(*inputs, targets, temperature=np.float32(0.5), scale=np.int64(2))
    torch.testing.assert_close(found, dh.linear_log_probs_and_entropies(*inputs, targets, 0.5, scale=2.0))


@pytest.mark.parametrize("order", [1, 2])
def test_moments_along_a_direction_are_left_to_forward_mode(order):
    """Jets know no rule for them, and must not pass them by as constants."""
    inputs, targets = case(True)
    theta = {str(i): x.detach() for i, x in enumerate(inputs)}
    v = {name: x.cos() for name, x in theta.items()}

    def derivatives(function):
        def values(p):
            return called(function, [x.sin() for x in p.values()], targets, {}), p["0"]
        return taylor.derivatives_along(values, theta, v, order)[:order + 1]

    torch.testing.assert_close(derivatives(dh.linear_log_probs_and_entropies), derivatives(by_definition),
                               atol=1e-11, rtol=1e-11)
