"""What a chapter is executed with: parameters from a profile and the command line, checked, and the fingerprint of all.

A mistake ends the run with one line that names what was given, before anything is executed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# The parameters that may name a file or a folder. Nothing else is ever taken for a path.
PATHS = ("model", "problems")
# Values of these are text, whatever they look like.
TEXTS = (*PATHS, "device", "dtype")


def parameter_names(chapter: Path) -> list[str]:
    """The names that a chapter's `parameters` cell binds; where results go is the runner's to say."""
    cell = re.search(r'^# %%[^\n]*"parameters"[^\n]*\n(.*?)(?=^# %%|\Z)', chapter.read_text(), re.M | re.S)
    return [name for name in re.findall(r"^(\w+) =", cell[1] if cell else "", re.M) if name != "results"]


def read_changes(changes: Sequence[str], chapters: Sequence[Path]) -> dict[str, Any]:
    """The NAME=VALUE pairs of the command line, paths made absolute, as notebooks run elsewhere."""
    known = list(dict.fromkeys(name for chapter in chapters for name in parameter_names(chapter)))
    read = {}
    for change in changes:
        name, _, value = change.partition("=")
        if not name or not value:
            sys.exit(f"--set: expected NAME=VALUE, got {change!r}")
        if name not in known:
            sys.exit(f"--set: there is no parameter {name!r}; there are {', '.join(known)}")
        read[name] = find_path(value, callers_folders()) if name in PATHS else _value(name, value)
    return read


def _value(name: str, text: str) -> Any:
    """Numbers, lists and the like as Python writes them; anything else is text."""
    try:
        return text if name in TEXTS else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def callers_folders() -> list[Path]:
    """Where relative paths are meant from: the caller's directory, which `make -C` leaves."""
    return [Path(folder) for folder in (os.environ.get("CALLER"), Path.cwd()) if folder]


def find_path(value: str, folders: Iterable[Path]) -> str:
    """The absolute path of what exists in one of the folders; other values, such as hub ids, as they are."""
    for folder in folders:
        path = folder / Path(value).expanduser()
        if path.exists():
            return str(path.resolve())
    return value


def read_parameters(notebooks: Path, profile: str, chapter: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A profile's parameters for a chapter: those of its section `all`, those of its own, those of the command line."""
    sections = _read_profile(notebooks, profile)
    own = {**(sections.get("all") or {}), **(sections.get(chapter.name.split("_")[0]) or {})}
    own.update((name, find_path(own[name], [notebooks])) for name in PATHS if name in own)
    return {**own, **of_chapter(chapter, changes), "results": str(notebooks.parent / "results" / profile)}


def read_seeds(notebooks: Path, profile: str) -> int:
    """On how many other seeds a profile tries what the estimates of a chapter say."""
    return _read_profile(notebooks, profile).get("seeds", 0)


def of_chapter(chapter: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Those of the changes that a chapter has a parameter for."""
    names = parameter_names(chapter)
    return {name: value for name, value in changes.items() if name in names}


def _read_profile(notebooks: Path, profile: str) -> dict[str, Any]:
    import yaml

    profiles = {path.stem: path for path in sorted(notebooks.glob("profiles/*.yaml"))}
    if profile not in profiles:
        sys.exit(f"PROFILE: there is no profile {profile!r}; there are {', '.join(profiles)}")
    return yaml.safe_load(profiles[profile].read_text()) or {}


def check(chapters: Sequence[Path], parameters: Sequence[dict[str, Any]]) -> None:
    """End the run unless the models, problems and devices that were given can be used, without loading any weights."""
    # Problems have to hold what these chapters read of them.
    splits = sorted({split for chapter in chapters
                     for split in re.findall(r'load_problems\(problems, "(\w+)"\)', chapter.read_text())})
    for name, test in (("device", _check_device), ("model", _check_model), ("problems", _check_problems)):
        for value in {p[name]: None for p in parameters if name in p}:
            try:
                if name in PATHS and value.startswith((".", "/", "~")) and not Path(value).exists():
                    raise FileNotFoundError("there is no such file or folder")
                test(value, *([splits] if name == "problems" else []))
            except Exception as error:  # libraries raise many types; each means that the value cannot be used
                reason = " ".join(str(error).split())[:300]
                sys.exit(f"{name.upper()}: {value!r} cannot be used: {reason}")


def _check_device(value: str) -> None:
    import torch

    if value != "auto":
        torch.empty(0, device=value)


def _check_model(value: str) -> None:
    """Configuration and tokenizer load, the architecture is a causal LM's, and a folder holds safetensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(value, trust_remote_code=False)
    AutoTokenizer.from_pretrained(value, trust_remote_code=False)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if Path(value).is_dir() and not any(Path(value).glob("*.safetensors")):
        raise FileNotFoundError("the folder holds no *.safetensors")


def _check_problems(value: str, splits: Sequence[str]) -> None:
    from deltah import load_problems

    for split in splits:
        load_problems(value, split)


def fingerprint(root: Path, chapter: Path, parameters: dict[str, Any], seeds: bool = True) -> str:
    """Changes whenever the chapter, its parameters, the library, the shipped data or the user's own files do.

    Args:
        seeds: whether the verdicts on other seeds are among the data. The verdicts themselves do not depend on them.
    """
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True, default=repr).encode())
    verdicts = root / "data" / "seeds"
    shipped = [chapter, *root.glob("lib/deltah/**/*.py"),
               *(path for path in root.glob("data/**/*") if verdicts not in path.parents)]
    if seeds:
        shipped.append(verdicts / f"{chapter.name.split('_')[0]}.json")
    for path in sorted(shipped):
        _add(digest, path, root)
    for given in (Path(parameters[name]) for name in PATHS if name in parameters):
        # A hub id stands for what it names.
        if given.is_absolute():
            for path in sorted([given, *given.rglob("*")]):
                _add(digest, path, given)
    return digest.hexdigest()


def _add(digest: Any, path: Path, root: Path) -> None:
    name = path.relative_to(root)
    if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
        with path.open("rb") as file:
            digest.update(str(name).encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
