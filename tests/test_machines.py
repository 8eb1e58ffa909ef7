"""`make test-machines`, with a stand-in for pytest."""

import sys

import pytest

import machines

# Passes but under avx2, for as long as there is no file `mended`; notes each call.
STAND_IN = """
import os, pathlib, sys
called = [f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "MKL_CBWR") if name in os.environ]
with open("calls", "a") as calls:
    calls.write((called or ["OMP_NUM_THREADS=" + os.environ["OMP_NUM_THREADS"]])[0] + "\\n")
assert "notebooks" in sys.argv and "--ignore=tests/test_project.py" in sys.argv
failed = called == ["ATEN_CPU_CAPABILITY=avx2"] and not pathlib.Path("mended").exists()
print("==== 1 failed, 6 passed in 2.50s ====" if failed else "==== 7 passed, 2 warnings in 2.50s (0:00:02) ====")
sys.exit(failed)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in machines.SETTINGS:
        monkeypatch.delenv(name[0], raising=False)
    (tmp_path / "notebooks").mkdir()
    for name in ("conftest.py", "pyproject.toml", "constraints.txt", "notebooks/01.ipynb"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_every_setting_runs_once_until_it_passes(root, capsys):
    command = [sys.executable, "-c", STAND_IN]
    settings = [f"{name}={value}" for name, value in machines.SETTINGS]

    def run():
        (root / "calls").write_text("")
        return machines.main(command, root), capsys.readouterr().out.splitlines(), (root / "calls").read_text().split()

    status, lines, called = run()
    assert status == 1 and called == settings
    assert [line.split()[0] for line in lines[:-1]] == settings
    assert "7 passed, 2 warnings, " in lines[0] and "FAILED: 1 failed, 6 passed, " in lines[4]
    assert "see results/machines/ATEN_CPU_CAPABILITY=avx2.log" in lines[4]
    assert lines[-1] == "5 of 6 settings pass; not ATEN_CPU_CAPABILITY=avx2"
    (root / "mended").write_text("")
    status, lines, called = run()
    assert status == 0 and called == ["ATEN_CPU_CAPABILITY=avx2"] and lines[-1] == "6 of 6 settings pass"
    assert lines[0].endswith("(before)") and run()[2] == []
    (root / "notebooks" / "01.ipynb").write_text("changed")
    assert run()[2] == settings


@pytest.mark.parametrize("status", [0, 3])
def test_what_has_no_closing_line_fails(root, capsys, status):
    assert machines.main([sys.executable, "-c", f"raise SystemExit({status})"], root) == 1
    assert f"FAILED: no closing line, exit status {status}" in capsys.readouterr().out


def test_the_tests_left_out_exist():
    for name in machines.NO_ARITHMETIC:
        assert (machines.ROOT / "tests" / f"test_{name}.py").is_file()
