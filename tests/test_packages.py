"""What describes the package to others: its citation, container and environment agree with pyproject.toml."""

import re
import tomllib
from pathlib import Path

import yaml

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
