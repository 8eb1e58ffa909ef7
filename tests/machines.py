"""Run the tests that print numbers as on other machines: what `make test-machines` does.

    python tests/machines.py COMMAND...        # such as: python -m pytest --nbval

Processors differ in their vector instructions, in how many threads share a sum, and in which of a library's routines
they take. The settings below make one machine compute as others do. Each is one run of COMMAND over the notebooks and
the tests of the library; its output goes to results/machines/. What has passed is not run again until a file changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [("OMP_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "2"), ("OMP_NUM_THREADS", "4"),
            ("ATEN_CPU_CAPABILITY", "default"), ("ATEN_CPU_CAPABILITY", "avx2"), ("MKL_CBWR", "COMPATIBLE")]
# These compare words, files and messages only.
NO_ARITHMETIC = ("benchmarks", "checks", "comparison", "figures", "ledger", "machines", "makefile", "project", "runner")


def main(command: list[str], root: Path = ROOT) -> int:
    logs = root / "results" / "machines"
    logs.mkdir(parents=True, exist_ok=True)
    command = [*command, "notebooks", "tests", *(f"--ignore=tests/test_{name}.py" for name in NO_ARITHMETIC)]
    mark, failed = fingerprint(root, command), []
    for name, value in SETTINGS:
        setting, log = f"{name}={value}", logs / f"{name}={value}.log"
        outcome = passed_before(log, mark)
        if outcome is None:
            outcome, passed = run(command, root, {name: value}, log)
            if passed:
                log.with_suffix(".json").write_text(json.dumps({"fingerprint": mark, "outcome": outcome}))
            else:
                failed.append(setting)
                outcome = f"FAILED: {outcome}; see {log.relative_to(root)}"
        else:
            outcome += " (before)"
        print(f"{setting:28} {outcome}", flush=True)
    print(f"{len(SETTINGS) - len(failed)} of {len(SETTINGS)} settings pass"
          + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run(command: list[str], root: Path, setting: dict[str, str], log: Path) -> tuple[str, bool]:
    """Run the tests under a setting; returns pytest's closing line and whether they passed."""
    log.with_suffix(".json").unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(command, cwd=root, env={**os.environ, **setting}, stdout=file,
                                stderr=subprocess.STDOUT).returncode
    closing = re.findall(r"^=* ?(\d+ (?:passed|failed|error).*?) in [\d.]+s", log.read_text(), re.M)
    counts = closing[-1] if closing else f"no closing line, exit status {status}"
    return f"{counts}, {time.monotonic() - started:.0f} s", status == 0 and bool(closing)


def passed_before(log: Path, mark: str) -> str | None:
    try:
        stored = json.loads(log.with_suffix(".json").read_text())
        return stored["outcome"] if stored["fingerprint"] == mark else None
    except (OSError, ValueError, KeyError):
        return None


def fingerprint(root: Path, command: list[str]) -> str:
    """Changes whenever the command, the library, the notebooks, the data or the tests do."""
    digest = hashlib.sha256(json.dumps(command).encode())
    files = (path for folder in ("data", "lib", "notebooks", "tests") for path in (root / folder).rglob("*"))
    for path in sorted({root / "conftest.py", root / "pyproject.toml", root / "constraints.txt", *files}):
        if path.is_file() and "__pycache__" not in path.parts and not path.match("*.egg-info/*"):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
