import numpy as np
import pytest
import torch

from deltah import checks


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_integers_of_all_libraries(value):
    found = checks.integer("x", value, minimum=3, maximum=3)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [2.5, np.float32(2.5), torch.tensor(2.5), np.float64(2.5)])
def test_numbers_of_all_libraries(value):
    found = checks.number("x", value, above=2, below=3)
    assert found == 2.5 and type(found) is float


@pytest.mark.parametrize("value, error", [
    (True, TypeError), (None, TypeError), ("3", TypeError), ([3], TypeError), (torch.ones(1), TypeError),
    (2.5, ValueError), (float("nan"), ValueError), (-1, ValueError), (11, ValueError)])
def test_what_is_no_integer_in_range(value, error):
    with pytest.raises(error, match=r"^x: expected an integer ≥ 0 and ≤ 10, got "):
        checks.integer("x", value, minimum=0, maximum=10)


@pytest.mark.parametrize("value, error", [
    (True, TypeError), (None, TypeError), ("3", TypeError), (1j, TypeError), (torch.ones(2), TypeError),
    (float("nan"), ValueError), (float("inf"), ValueError), (0, ValueError), (1.5, ValueError),
    pytest.param(10**400, ValueError, id="huge")])
def test_what_is_no_number_in_range(value, error):
    with pytest.raises(error, match=r"^x: expected a number > 0 and ≤ 1, got "):
        checks.number("x", value, above=0, maximum=1)


def test_choices():
    assert checks.choice("order", 2, (1, 2)) == 2
    with pytest.raises(ValueError, match="order: expected one of 1, 2, got 3"):
        checks.choice("order", 3, (1, 2))
    for wrong in (None, True, [1], torch.tensor(1)):
        with pytest.raises(TypeError, match="order: expected one of 1, 2, got "):
            checks.choice("order", wrong, (1, 2))


@pytest.mark.parametrize("value, error, message", [
    ([1.0], TypeError, "a tensor, got list"),
    (torch.ones(2, dtype=torch.long), TypeError, r"floating-point numbers, got a int64 tensor of shape \[2\]"),
    (torch.ones(2, 3), ValueError, r"shape \[2\], got \[2, 3\]"),
    (torch.ones(3), ValueError, r"shape \[2\], got \[3\]"),
    (torch.tensor([1.0, float("nan")]), ValueError, "finite numbers, got NaN or infinity"),
    (torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn), ValueError, "finite numbers, got NaN or infinity")])
def test_tensors(value, error, message):
    with pytest.raises(error, match=f"^x: expected {message}"):
        checks.tensor("x", value, (2,), "floating", finite=True)


def test_tensors_with_any_number_of_leading_sizes():
    for x in (torch.ones(4), torch.ones(2, 3, 4)):
        assert checks.tensor("x", x, ("...", 4)) is x
    with pytest.raises(ValueError, match=r"expected shape \[..., 4\], got \[4, 2\]"):
        checks.tensor("x", torch.ones(4, 2), ("...", 4))


def test_instances():
    assert checks.instance("x", 1.0, (int, float)) == 1.0
    with pytest.raises(TypeError, match="x: expected a int or float, got 'a'"):
        checks.instance("x", "a", (int, float))
