"""What describes the package to others: its citation, container and environment agree with pyproject.toml."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sslcells

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_there_is_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert sslcells.__version__ == PROJECT["project"]["version"] == citation["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", sslcells.__version__)


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["keywords"] == PROJECT["project"]["keywords"]
    assert citation["title"] == PROJECT["project"]["name"]
    assert all(isinstance(value, str) for value in (citation["version"], citation["cff-version"]))


def test_the_environment_has_a_python_that_the_package_takes():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-e ."]}
    assert "pip" in conda
    (python,) = [one.removeprefix("python") for one in conda if one.startswith("python")]
    assert python.split(",")[0] == PROJECT["project"]["requires-python"]


def test_the_dockerfile_copies_all_that_the_wheel_holds():
    copied = {source for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    held = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
    assert held | {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} == copied
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_the_dockerfile_takes_its_base_as_an_argument():
    instructions = re.findall(r"^([A-Z]+) ", DOCKERFILE, re.M)
    assert instructions[:2] == ["ARG", "FROM"]
    assert re.search(r"^ARG BASE=\S+\nFROM \$\{BASE\}$", DOCKERFILE, re.M)
    assert set(instructions) <= {"ARG", "FROM", "ENV", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
    extras = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.M)[1].split(",")
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_shell_of_the_dockerfile_is_right(tmp_path):
    """Its commands parse, shellcheck finds nothing where it is installed, and each variable is declared before."""
    declared, scripts = {"PATH", "HOME"}, []
    for word, rest in instructions(DOCKERFILE.partition("\nFROM ")[2]):
        if word == "RUN":
            scripts.append(rest)
            assert set(re.findall(r"\$\{?(\w+)", rest)) <= declared, rest
        declared |= set(re.findall(r"(\w+)=", rest)) if word in ("ARG", "ENV") else set()
    assert scripts
    script = tmp_path / "run.sh"
    exported = [f"export {name}" for name in sorted(declared)]
    script.write_text("\n".join(["#!/bin/sh", *exported, *scripts, ""]), encoding="utf-8")
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stdout


def instructions(text):
    """Each instruction with what follows it, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return re.findall(r"^([A-Z]+) (.+)$", lines, re.M)


def test_the_container_starts_a_command_of_the_package():
    (entry,) = (json.loads(rest) for word, rest in instructions(DOCKERFILE) if word == "ENTRYPOINT")
    assert entry[0] in PROJECT["project"]["scripts"]


def test_the_citation_has_no_key_that_its_format_lacks():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() <= OF_CITATIONS


OF_CITATIONS = {
    *("cff-version", "message", "title", "authors", "type", "license", "version", "keywords", "abstract"),
    *("date-released", "doi", "identifiers", "repository-code", "url", "preferred-citation", "references", "contact"),
}
"""keys of the Citation File Format 1.2.0 that a software's citation may have"""


def test_pre_commit_takes_its_file_and_runs_what_ci_runs():
    clientlib = pytest.importorskip("pre_commit.clientlib", reason="pre-commit reads its own file")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    (repo,) = clientlib.load_config(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in repo["hooks"]:
        command = hook["entry"].removesuffix(" --fix").split()
        assert re.search(rf"^{' '.join(command)}\b", ci, re.M), hook["entry"]


def test_no_method_is_left_out_of_the_contract_that_methods_never_import_each_other():
    (contract,) = [one for one in PROJECT["tool"]["importlinter"]["contracts"] if one["type"] == "independence"]
    methods = sorted(path.stem for path in (ROOT / "sslcells/methods").glob("[!_]*.py"))
    assert contract["modules"] == [f"sslcells.methods.{method}" for method in methods]


def test_no_test_starts_after_the_time_of_ci():
    command = [sys.executable, "-m", "pytest", "-n0", "-rs", "-k", "test_pre_commit", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"SSLCELLS_TESTS_UNTIL": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert f"::{test_pre_commit_takes_its_file_and_runs_what_ci_runs.__name__} not started" in done.stdout
    assert "not started: SSLCELLS_TESTS_UNTIL is over" in done.stdout


def test_the_environment_can_be_solved_as_far_as_it_says():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment.keys() == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    conda = [Requirement(one) for one in environment["dependencies"] if isinstance(one, str)]
    (python,) = [one for one in conda if one.name == "python"]
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    minors = [f"3.{minor}" for minor in range(30) if python.specifier.contains(f"3.{minor}")]
    assert minors
    assert all(supported.contains(minor) for minor in minors)
