"""The plotting style that chapters share, and where their figures go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltah import checks
from deltah.estimates import Estimate

# One marker and one dash for each colour, so that a figure survives being printed in grey.
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")


def use_style() -> None:
    """Set the style of every figure that follows: colours that colour-blind readers can tell apart."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={
        "figure.figsize": (7.0, 4.2), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.35,
        "axes.titlesize": "medium", "axes.titlelocation": "left", "legend.frameon": False})


def save(figure: Figure, results: str | Path, name: str) -> None:
    """Write a figure to `<results>/figures/<name>.png`.

    Raises:
        TypeError: something else than a figure, a folder and a name.
        ValueError: a name that is empty or leads to another folder.
    """
    checks.instance("figure", figure, Figure)
    folder = Path(checks.instance("results", results, (str, Path), "a folder")) / "figures"
    if Path(checks.instance("name", name, str, "a string")).name != name or not name:
        raise ValueError(f"name: expected a file's name without folder and ending, got {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.partial.png"
    figure.savefig(partial, dpi=160)
    os.replace(partial, folder / f"{name}.png")


def estimates(axes: Axes, x: Sequence[float], values: Sequence[Estimate], index: int, label: str) -> None:
    """Draw estimates with their 95% intervals as curve number `index`, which decides colour, marker and dash.

    Raises:
        TypeError: something else than axes, numbers, Estimates, an integer and a string.
        ValueError: another number of x than of values, or an index below 0.
    """
    checks.instance("axes", axes, Axes, "matplotlib axes")
    index, label = checks.integer("index", index, minimum=0), checks.instance("label", label, str, "a string")
    x, values = _listed("x", x), _listed("values", values)
    if len(x) != len(values):
        raise ValueError(f"values: expected {len(x)}, one for each x, got {len(values)}")
    x = [checks.number(f"x[{i}]", number) for i, number in enumerate(x)]
    for i, value in enumerate(values):
        checks.instance(f"values[{i}]", value, Estimate, "an Estimate")
    centre, intervals = [e.value for e in values], [e.interval() for e in values]
    reach = [[c - low for c, (low, _) in zip(centre, intervals, strict=True)],
             [high - c for c, (_, high) in zip(centre, intervals, strict=True)]]
    axes.errorbar(x, centre, yerr=reach, capsize=3, label=label, color=f"C{index}",
                  marker=MARKERS[index % len(MARKERS)], linestyle=DASHES[index % len(DASHES)])


def pivot(table: pd.DataFrame, values: str, index: str, columns: Sequence[str]) -> pd.DataFrame:
    """A table of estimates, printed as `value ± error`, with one row for each `index`.

    Raises:
        TypeError: something else than a table and names.
        ValueError: names that are no columns of the table.
    """
    checks.instance("table", table, pd.DataFrame)
    for argument, names in (("values", [values]), ("index", [index]), ("columns", _listed("columns", columns))):
        for name in names:
            checks.choice(argument, name, list(table.columns))
    shown = table.assign(**{values: table[values].map(repr), index: table[index].map("{:g}".format)})
    return shown.pivot(index=index, columns=list(columns), values=values).loc[shown[index].unique()]


def _listed(name: str, value: Iterable[Any]) -> list[Any]:
    if isinstance(value, (str, dict)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list, got {checks.shown(value)}")
    return list(value)
