"""The Makefile, with stand-ins for Python: what reaches the programs, and that nothing of it is run."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

# Writes its arguments down, in place of .venv/bin/python.
STAND_IN = """#!/bin/sh
case "$1" in -c) exec "{python}" "$@";; esac
exec "{python}" -c 'import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("called.json", "w"))' "$@"
"""
HOSTILE = ["x;touch pwned", "$(touch pwned)", "`touch pwned`", "$(shell touch pwned)", "'; touch pwned; '",
           '"; touch pwned; "', "a b  c", "$HOME", "x|touch pwned", "x&touch pwned", "*", "x\\", "$$(touch pwned)"]


@pytest.fixture
def make(tmp_path):
    """A function that calls make in a folder whose name has spaces, and returns arguments and environment."""
    root = tmp_path / "a folder with spaces"
    for environment in (".venv", ".venv-bench"):
        python = root / environment / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN.format(python=sys.executable))
        python.chmod(0o755)
    (root / "benchmarks").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "benchmarks/requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    for environment in (".venv", ".venv-bench"):
        (root / environment / ".ready").touch()

    def call(*arguments, cwd=root, **environment):
        clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "OMP_NUM_THREADS")}
        done = subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True,
                              env={**clean, "PWD": str(cwd), **environment})
        assert done.returncode == 0, done.stdout + done.stderr
        assert not list(tmp_path.rglob("pwned")) and not os.path.exists("pwned")
        return json.loads((root / "called.json").read_text())

    call.root = root
    return call


@pytest.mark.parametrize("value", HOSTILE)
def test_values_arrive_as_they_were_typed(make, value):
    """From the command line and from the environment; none is a command, none is a pattern."""
    names = ("CHAPTER", "PROFILE", "MODEL", "PROBLEMS", "DEVICE")
    expected = ["notebooks/run.py", "run", f"--profile={value}", f"--chapter={value}", "--set", f"model={value}",
                f"problems={value}", f"device={value}"]
    assert make("run", *(f"{name}={value}" for name in names))[0] == expected
    assert make("run", **dict.fromkeys(names, value))[0] == expected
    arguments = make("bench", f"ONLY={value}", f"MODEL={value}", f"DEVICE={value}", f"ROUNDS={value}")[0]
    assert arguments == ["benchmarks/compare.py", "--only", *value.split(), f"--model={value}", f"--device={value}",
                         f"--rounds={value}"]
    assert make("sync", f"CHAPTER={value}")[0] == ["notebooks/run.py", "sync", f"--chapter={value}"]
    subprocess.run(["make", "help", f"PROFILE={value}"], cwd=make.root, check=True, capture_output=True)
    assert not (make.root / "pwned").exists()


def test_what_is_not_given_is_not_passed_on(make):
    assert make("run")[0] == ["notebooks/run.py", "run", "--profile=quick", "--set"]
    assert make("bench")[0] == ["benchmarks/compare.py"]


def test_a_python_in_a_folder_with_spaces_sets_up(make):
    """`make setup` calls it by its name, for nothing else than a virtual environment."""
    python = make.root / "my python" / "python3"
    python.parent.mkdir()
    shutil.copy(make.root / ".venv" / "bin" / "python", python)
    (make.root / ".venv" / ".ready").unlink()
    make("setup", f"SYSTEM_PYTHON={python}")
    assert (make.root / ".venv" / ".ready").exists()


def test_the_callers_directory_is_known_where_make_changes_it(make, tmp_path):
    assert make("-C", str(make.root), "run", cwd=tmp_path)[1]["CALLER"] == str(tmp_path)


def test_two_workers_share_the_cores_unless_the_caller_says_otherwise(make):
    arguments, environment = make("test")
    assert arguments[:3] == ["-m", "pytest", "--nbval"] and "--doctest-modules" in arguments
    assert arguments[arguments.index("--numprocesses") + 1] == "2" and "loadfile" in arguments
    assert environment["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))
    assert make("test", OMP_NUM_THREADS="3")[1]["OMP_NUM_THREADS"] == "3"


def test_peers_are_tested_in_the_environment_that_has_them(make):
    assert make("test-peers")[0] == ["-m", "pytest", "--confcutdir=tests/peers", "tests/peers"]
    assert (ROOT / ".ci" / "run").read_text().split("\n")[-3:-1] == ["make test", "make test-peers"]
