"""How outputs of notebooks are compared: each rule, sabotage, and a small notebook through nbval."""

import os
import re
import shutil
import subprocess
import sys

import jupytext
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from deltah.book.comparison import Tolerance, differences

NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("stored, fresh", [
    ("0.25", "0.26"), ("10.0", "9.9"), ("x=0.5,", "x=0.6,"), ("93.1%", "93.2%"), ("−0.50", "-0.51"),
    ("9.9e-5", "1.0e-4"), ("1.2e-10", "1.3e-10"), ("1e-05", "9.99e-06"), ("1,234.5", "1,234.6"),
    ("-0.00", "0.00"), ("+0.00", "-0.01"), ("0.02", "0.0199"), ("1.", "0.9999"), ("[1. 0.]", "[ 0.9999 -0.    ]"),
    ("0.", "0.0001"), ("-0", "0"), ("1", "0.999"), (".93", ".94"),
    ("0.93 ± 0.09", "0.9 ± 0.1"), ("-2.4 ± 0.9", "-2 ± 1"), ("-1.23e-05 ± 9e-07", "-1.2e-05 ± 1e-06"),
    ("a  b\n  0.5", "a b 0.5"), ("<td>0.51 ± 0.02</td>", "<td>0.50 ± 0.02</td>"), ("nan", "nan"),
], ids=str)
def test_what_a_reader_would_not_mind_passes(stored, fresh):
    assert differences(stored, fresh) == differences(fresh, stored) == []


@pytest.mark.parametrize("stored, fresh", [
    ("0.25", "0.27"), ("10.0", "9.8"), ("x=0.5,", "x=0.7,"), ("93.1%", "93.3%"), ("9.8e-5", "1.1e-4"),
    ("1.2e-10", "1.2e-09"), ("0.04", "0.2"), ("0.02", "0.0198"), ("1.", "0.9998"), ("1.", "2."),
    ("3", "4"), ("-3", "3"), ("1,234", "1,235"), ("95%", "96%"), ("1", "0.998"), ("0", "0.1"), ("0", "1e-17"),
    ("0.01", "-0.01"), ("−0.50", "0.50"), ("+0.50", "0.50"), ("1.5+2.5j", "1.5-2.5j"), ("1.00 ± 0.05", "1.00 0.05"),
    ("nan", "0.5"), ("nan ± 0.1", "inf ± 0.1"), ("0.5", "nan"), ("-2 ± 6", "-3 ± 6"),
    ("holds", "refuted"), ("True", "False"), ("a b", "ab"), ("1 2", "12"), ("12 rows", "12 row"), ("", "0.5"),
    ("transformers 2.13.0", "transformers 2.13.1"), ("Qwen2.5", "Qwen2.6"), ("| 01.9 | x |", "| 01.8 | x |"),
    ("| 10.12 | x |", "| 10.13 | x |"), ("arXiv 2510.23142", "arXiv 2510.23143"),
    ("0.1 0.2 0.3", "0.1 0.2"), ("0.1 0.2", "0.1 0.2 0.3"), ("<td>0.5</td>", "<th>0.5</th>"),
], ids=str)
def test_what_a_reader_would_mind_fails(stored, fresh):
    assert differences(stored, fresh) and differences(fresh, stored)


def test_a_message_shows_what_was_stored_what_came_and_where():
    assert differences("slope\n 1.00, holds", "slope 1.02, holds") == ["stored '1.00', now '1.02', after 'slope'"]
    assert differences("a 1 b 2 c 3", "a 1 c 3") == ["stored 'b 2', now nothing, after 'a 1'"]
    assert differences("1 row", "2 rows") == ["stored '1', now '2', at the start",
                                              "stored 'row', now 'rows', after '1'"]


@given(st.integers(-10**6, 10**6), st.integers(0, 6), st.integers(-3, 3))
def test_the_last_digit_may_move_by_one(count, decimals, by):
    """Any decimal, moved by units of its last digit; a sign that changes fails whatever the distance."""
    stored, fresh = (f"x = {number / 10**decimals:.{decimals}f};" for number in (count, count + by))
    same = abs(by) <= (1 if decimals else 0) and count * (count + by) >= 0
    assert (differences(stored, fresh) == []) == same


@pytest.mark.parametrize("tag, expected", [
    ("tolerance=0.05", Tolerance(share=0.05)), ("tolerance=abs:0.002", Tolerance(units=0.002)),
    ("tolerance=abs:2e-3", Tolerance(units=0.002)), ("parameters", None),
])
def test_a_tolerance_is_read_from_a_cells_tags(tag, expected):
    assert Tolerance.read(["hide-input", tag]) == expected
    assert Tolerance.read([]) is None


@pytest.mark.parametrize("tags", [["tolerance"], ["tolerance=5%"], ["tolerance=0"], ["tolerance=1.5"],
                                  ["tolerance=-0.1"], ["tolerance=nan"], ["tolerance=rel:0.1"], ["tolerance 0.1"],
                                  ["tolerance=0.1", "tolerance=abs:0.1"]], ids=str)
def test_a_tolerance_that_is_none_is_refused(tags):
    with pytest.raises(ValueError, match="tags: expected one tolerance=SHARE"):
        Tolerance.read(tags)


def test_a_tolerance_loosens_decimals_and_nothing_else():
    share, units = Tolerance(share=0.05), Tolerance(units=0.002)
    assert not differences("100.00", "95.00", share) and differences("100.00", "94.90", share)
    assert not differences("0.0100", "0.0120", units) and differences("0.0100", "0.0122", units)
    assert not differences("0.0100", "0.0101", Tolerance(share=1e-6)), "a tolerance never forbids the last digit"
    wide = Tolerance(share=0.9, units=10.0)
    for stored, fresh in [("100", "101"), ("0.5", "-0.5"), ("holds", "refuted"), ("1.0", "nan"), ("1.0 2.0", "1.0")]:
        assert differences(stored, fresh, wide), (stored, fresh)


def test_wrong_arguments_are_named():
    for arguments, message in [((None, ""), "stored: expected a string, got None"),
                               (("", ["a"]), "fresh: expected a string, got list"),
                               (("", "", 0.1), "tolerance: expected a Tolerance, got 0.1")]:
        with pytest.raises(TypeError, match=message):
            differences(*arguments)
    for tags in (None, "tolerance=0.1", {"tolerance": 1}, [None]):
        with pytest.raises(TypeError, match="tags: expected"):
            Tolerance.read(tags)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="share: expected a number ≥ 0 and < 1"):
            Tolerance(share=wrong)
    with pytest.raises(TypeError, match="units: expected a number ≥ 0, got None"):
        Tolerance(units=None)


def outputs(notebook):
    """(place, text, tolerance) of every text that the stored notebook shows."""
    for number, cell in enumerate(nbformat.read(notebook, 4).cells):
        for output in cell.get("outputs", []):
            for kind, text in output.get("data", {"stream": output.get("text")}).items():
                if not kind.startswith("image"):
                    yield f"cell {number}, {kind}", text, Tolerance.read(cell.metadata.get("tags", []))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_sabotage_of_every_stored_output_is_found(notebook):
    """All digits changed, a word of each line, a row gone, a row twice: whatever tolerance the cell states."""
    stored = list(outputs(notebook))
    assert stored
    for place, text, tolerance in stored:
        assert differences(text, text, tolerance) == []
        if re.search(r"\d", text):
            assert differences(text, re.sub(r"\d", later, text), tolerance), f"{place}: digits"
        lines = [line for line in text.splitlines() if line.strip()]
        for line in lines:
            for word in re.findall(r"[^\W\d_]+", line)[-1:]:
                assert differences(line, line.replace(word, "else"), tolerance), f"{place}: {word}"
        for i in {0, len(lines) // 2, len(lines) - 1}:
            shorter, longer = lines[:i] + lines[i + 1:], lines[:i + 1] + lines[i:]
            assert differences(text, "\n".join(shorter), tolerance), f"{place}: without {lines[i]}"
            assert differences(text, "\n".join(longer), tolerance), f"{place}: twice {lines[i]}"


def later(digit):
    return str((int(digit[0]) + 1) % 10)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_decimal_of_the_stored_outputs_is_held_to_its_last_digit(notebook):
    """Moved by one unit it passes, by two it does not, nor with another sign; arXiv numbers and ids are names."""
    lines, decimals = {line for _, text, _ in outputs(notebook) for line in text.splitlines()}, 0
    for line in lines:
        for match in re.finditer(r"(?<![\w.,#])(?<!arXiv )(?<!ledger-)(?<!\">)(?!0\d)\d+\.\d+(?![\w.,])", line):
            decimals += 1
            unit = 10.0 ** -len(match[0].partition(".")[2])
            for by, same in ((1, True), (2, False)):
                moved = f"{float(match[0]) + by * unit:.{len(match[0].partition('.')[2])}f}"
                changed = line[:match.start()] + moved + line[match.end():]
                assert (differences(line, changed) == []) == same, f"{match[0]} as {moved} in {line}"
            sign = line[match.start() - 1:match.start()]
            if sign in ("+", "-", "−") and float(match[0]):
                changed = line[:match.start() - 1] + ("-" if sign == "+" else "+") + line[match.start():]
                assert differences(line, changed), f"the sign of {match[0]} in {line}"
        for match in re.finditer(r"(?<=ledger-)\d+\.\d+|(?<=#)\d+\.\d+|(?<=\">)\d+\.\d+(?=</a>)", line):
            assert differences(line, f"{line[:match.start()]}{match[0]}1{line[match.end():]}"), f"{match[0]} in {line}"
            moved = match[0][:-1] + later(match[0][-1])
            assert differences(line, line[:match.start()] + moved + line[match.end():]), f"{match[0]} in {line}"
    assert decimals


def write_notebook(path, *cells):
    """A notebook of (source, stored text, tags)."""
    code = [nbformat.v4.new_code_cell(source, metadata={"tags": tags}, execution_count=number, outputs=[
        nbformat.v4.new_output("stream", name="stdout", text=text)] if text else [])
        for number, (source, text, tags) in enumerate(cells, 1)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel}), path)


def through_nbval(folder, *arguments):
    """What pytest prints of the notebooks in a folder, with the project's own conftest."""
    shutil.copy(ROOT / "conftest.py", folder)
    return subprocess.run([sys.executable, "-m", "pytest", "--nbval", "--color=no", "-p", "no:cacheprovider", "-v",
                           *arguments, folder], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "lib")}).stdout


def test_a_notebook_through_nbval(tmp_path):
    """What passes, what fails, and what the failure shows. Takes seconds: a kernel and a pytest of its own."""
    write_notebook(tmp_path / "small.ipynb",
                   ("print('slope  0.51 ± 0.02')", "slope 0.50 ± 0.02\n", []),
                   ("print(1.3)", "1.0\n", ["tolerance=0.25"]),
                   ("print(1.3)", "1.0\n", []),
                   ("print('refuted')", "holds\n", ["tolerance=abs:5"]),
                   ("print(1.0)", "1.0\n", ["tolerance=5%"]),
                   ("pass", "1.0\n", []))
    shown = through_nbval(tmp_path)
    assert re.findall(r"Cell \d (PASSED|FAILED)", shown) == ["PASSED"] * 2 + ["FAILED"] * 4, shown
    assert "stdout: stored '1.0', now '1.3', at the start" in shown
    assert "stdout: stored 'holds', now 'refuted', at the start" in shown
    assert "tags: expected one tolerance=SHARE" in shown
    assert "Missing output fields from running code: {'stdout'}" in shown


def test_each_notebook_keeps_to_one_kernel_of_one_worker(tmp_path):
    """With the arguments of `make test`. Takes seconds: two workers, and a kernel for each notebook."""
    cells = [("x = 1", "", []), *[("x += 1; print(x)", f"{x}\n", []) for x in range(2, 8)]]
    for name in ("one", "two", "three"):
        write_notebook(tmp_path / f"{name}.ipynb", *cells)
    recipe = (ROOT / "Makefile").read_text()
    arguments = re.search(r"^PYTEST := .* --nbval (.*)$", recipe, re.M)[1].split()
    shown = through_nbval(tmp_path, *arguments)
    assert "21 passed" in shown.splitlines()[-1], shown
    workers = {name: set(re.findall(rf"\[(gw\d)\].*{name}::ipynb", shown)) for name in ("one", "two", "three")}
    assert all(len(found) == 1 for found in workers.values()) and len(set.union(*workers.values())) == 2, shown


def test_a_tolerance_survives_the_pairing_with_a_script():
    cell = nbformat.v4.new_code_cell("print(1.0)", metadata={"tags": ["tolerance=abs:0.002"]})
    script = jupytext.writes(nbformat.v4.new_notebook(cells=[cell]), fmt="py:percent")
    assert '# %% tags=["tolerance=abs:0.002"]' in script
    assert jupytext.reads(script, fmt="py:percent").cells[0].metadata["tags"] == ["tolerance=abs:0.002"]
