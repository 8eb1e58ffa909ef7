"""The style of figures and what chapters draw with: one file written whole, and wrong arguments named."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import deltah as dh
from deltah import figures

VALUES = [dh.Estimate(1.0, 0.1, 100), dh.Estimate(2.0, 0.2, 100)]


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.mark.parametrize("x", [[1, 2], (1.0, 2.0), np.array([1, 2]), pd.Series([1, 2], index=[5, 7]),
                               torch.tensor([1.0, 2.0])], ids=lambda x: type(x).__name__)
def test_estimates_are_drawn_with_their_intervals(axes, x):
    figures.estimates(axes, x, pd.Series(VALUES), np.int64(7), "curve")
    line, _, (bars,) = axes.containers[0]
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [1, 2]
    assert line.get_marker() == figures.MARKERS[1] and line.get_linestyle() == figures.DASHES[3]
    for segment, value in zip(bars.get_segments(), VALUES, strict=True):
        assert segment[:, 1].tolist() == pytest.approx(value.interval())


def test_a_figure_is_saved_whole(axes, tmp_path):
    figures.save(axes.figure, str(tmp_path), "01-name")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["01-name.png"]


def test_a_table_of_estimates_keeps_the_order_of_its_rows():
    table = pd.DataFrame({"rate": [1e-3, 1e-3, 1e-5, 1e-5], "side": ["own", "fresh"] * 2, "share": VALUES * 2})
    shown = figures.pivot(table, "share", index="rate", columns=["side"])
    assert shown.index.tolist() == ["0.001", "1e-05"] and shown["own"].tolist() == ["1.0 ± 0.1"] * 2
    for change, message in [({"values": "size"}, "values: expected one of rate, side, share, got 'size'"),
                            ({"index": "size"}, "index: expected one of"), ({"columns": ["size"]}, "columns: expected"),
                            ({"columns": "side"}, "columns: expected a list, got 'side'"),
                            ({"table": None}, "table: expected a DataFrame, got None")]:
        with pytest.raises((TypeError, ValueError), match=message):
            figures.pivot(**{"table": table, "values": "share", "index": "rate", "columns": ["side"]} | change)


@pytest.mark.parametrize("change, message", [
    ({"axes": None}, "axes: expected matplotlib axes, got None"), ({"x": 1.0}, "x: expected a list, got 1.0"),
    ({"x": [1, None]}, r"x\[1\]: expected a number, got None"),
    ({"x": [1]}, "values: expected 1, one for each x, got 2"),
    ({"values": [1.0, 2.0]}, r"values\[0\]: expected an Estimate, got 1.0"),
    ({"values": None}, "values: expected a list"),
    ({"index": -1}, "index: expected an integer ≥ 0, got -1"), ({"index": "1"}, "index: expected an integer"),
    ({"label": None}, "label: expected a string, got None"),
])
def test_wrong_curves_are_named(axes, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        figures.estimates(**{"axes": axes, "x": [1, 2], "values": VALUES, "index": 0, "label": "curve"} | change)
    assert not axes.containers


@pytest.mark.parametrize("change, message", [
    ({"figure": None}, "figure: expected a Figure, got None"),
    ({"results": None}, "results: expected a folder, got None"),
    ({"name": 1}, "name: expected a string, got 1"), ({"name": ""}, "name: expected a file's name"),
    ({"name": "../x"}, "name: expected a file's name without folder"),
])
def test_wrong_files_are_named(axes, tmp_path, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        figures.save(**{"figure": axes.figure, "results": tmp_path, "name": "x"} | change)
    assert not list(tmp_path.iterdir())
