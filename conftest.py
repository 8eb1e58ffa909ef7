"""How `make test` treats notebooks: an output may differ from the stored one as far as a reader would not mind."""

import copy
from collections import defaultdict
from functools import partial

from nbval.plugin import IPyNbCell

from deltah.book.comparison import Tolerance, differences

# A table that has lost its first row differs everywhere; this much shows what is wrong.
SHOWN = 12


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        item.compare_outputs = partial(compare_outputs, item)


def compare_outputs(cell, fresh, stored):
    """Compare texts as `deltah.book.comparison` does, and the rest (which outputs there are) as nbval does."""
    tolerance = Tolerance.read(cell.cell.metadata.get("tags", []))
    fresh, changes = copy.deepcopy(fresh), []
    expected, came = texts(stored), texts(fresh)
    for kind in expected.keys() & came.keys():
        if len(expected[kind]) == len(came[kind]):
            for (old, key), (new, _) in zip(expected[kind], came[kind], strict=True):
                found = differences(old[key], new[key], tolerance)
                changes += [f"{kind}: {change}" for change in found]
                # What says the same is handed to nbval as the same.
                new[key] = new[key] if found else old[key]
    same = IPyNbCell.compare_outputs(cell, fresh, stored)
    if changes:
        rest = [f"and {len(changes) - SHOWN} more"] if len(changes) > SHOWN else []
        cell.comparison_traceback = changes[:SHOWN] + rest
    return same


def texts(outputs):
    """Where outputs hold texts, by stream or MIME type: {kind: [(holder, key), ...]}."""
    found = defaultdict(list)
    for output in outputs:
        holder = output.get("data", output)
        for key, value in holder.items():
            if isinstance(value, str) and key not in ("image/png", "image/jpeg", "output_type", "name"):
                found[output.get("name", key)].append((holder, key))
    return found
