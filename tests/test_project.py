"""The files that hold the project together: three lists of packages, pairs of notebooks, the shipped data."""

import re
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import deltah as dh
from conftest import ROOT

CHAPTERS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {canonicalize_name(name): version for name, version in
        (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())}


def test_every_dependency_has_a_range_and_a_pin_inside_it():
    listed = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    for text in listed:
        requirement = Requirement(text)
        assert requirement.specifier, f"{text}: expected a range"
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{text}: constraints.txt does not pin it; run make lock"
        assert requirement.specifier.contains(pin), f"{text}: constraints.txt pins {pin}"
    assert PINS["torch"] == "2.13.0"


def test_conda_installs_the_same_from_the_same_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    extras = ",".join(PROJECT["optional-dependencies"])
    *conda, pip = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert pip == {"pip": ["--constraint constraints.txt", f"--editable .[{extras}]"]}
    assert f'--editable ".[{extras}]"' in (ROOT / "Makefile").read_text()


def test_make_installs_nothing_without_the_constraints():
    setup = re.search(r"\$\(READY\):.*?\n\n", (ROOT / "Makefile").read_text(), re.S).group()
    installs = [line for line in setup.splitlines() if "pip install" in line]
    assert installs and all("--constraint constraints.txt" in line for line in installs)


def test_what_is_installed_is_what_is_pinned():
    from importlib.metadata import version
    for text in PROJECT["dependencies"]:
        name = canonicalize_name(Requirement(text).name)
        assert SpecifierSet(f"=={PINS[name]}").contains(version(name)), f"{name}: run make setup"


def test_every_notebook_has_a_script_and_every_script_a_notebook():
    scripts = {path.stem for path in CHAPTERS}
    notebooks = {path.stem for path in ROOT.glob("notebooks/*.ipynb") if ".partial" not in path.name}
    assert scripts == notebooks and scripts, "run make sync"


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda path: path.stem)
def test_script_and_notebook_are_in_step(script):
    def cells(path):
        return [(cell.cell_type, cell.source.strip(), cell.metadata.get("tags", [])) for cell in
                jupytext.read(path).cells]
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent", "un-paired: run make sync"
    assert jupytext.read(script).metadata["jupytext"]["formats"] == "ipynb,py:percent", "un-paired: run make sync"
    assert cells(script) == cells(script.with_suffix(".ipynb")), "out of step: run make sync"


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_one_run_with_default_parameters(script):
    code = [cell for cell in nbformat.read(script.with_suffix(".ipynb"), 4).cells if cell.cell_type == "code"]
    tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run make sync"
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda path: path.stem)
def test_profiles_set_only_parameters_that_the_chapter_has(script):
    code = next(c.source for c in jupytext.read(script).cells if "parameters" in c.metadata.get("tags", []))
    known = set(re.findall(r"^(\w+) =", code, re.M))
    assert {"model", "problems", "device", "results", "seed"} <= known
    profiles = list(ROOT.glob("notebooks/profiles/*.yaml"))
    assert {"quick", "full"} <= {profile.stem for profile in profiles}
    for profile in profiles:
        sections = yaml.safe_load(profile.read_text()) or {}
        assert set(sections) <= {"all", "seeds"} | {path.name[:2] for path in CHAPTERS}
        assert isinstance(sections.get("seeds", 0), int)
        own = {**(sections.get("all") or {}), **(sections.get(script.name[:2]) or {})}
        assert set(own) <= known, f"{profile.name} sets {set(own) - known}"


def test_the_policy_is_small_and_as_its_card_says(shipped, problems):
    """Takes long: 2,048 rollouts, as the card itself was measured."""
    assert (ROOT / "data" / "policy" / "model.safetensors").stat().st_size <= 6_000_000
    assert shipped.model.config.model_type == "qwen2"
    rollouts = dh.sample(shipped, problems.select(range(256)), responses_per_prompt=8, max_new_tokens=80)
    with torch.no_grad():
        entropies = dh.score(shipped, rollouts).entropies
    lengths = rollouts.lengths.float()
    assert 0.35 <= rollouts.rewards.mean() <= 0.65
    assert rollouts.rewards.view(-1, 8).amax(1).mean() >= 0.8
    assert entropies.sum() / rollouts.response_mask.sum() >= 0.1
    assert lengths.std() >= 0.2 * lengths.mean()


def test_the_shipped_folder_holds_safetensors_only():
    assert {path.suffix for path in Path(ROOT / "data" / "policy").iterdir()} == {".json", ".safetensors"}
