"""What comes with the package: recipes by name, copies of launch files and templates, and the wheel by itself."""

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sslcells import __version__, shipped
from sslcells.cli import main
from sslcells.config import ConfigError, load

ROOT = Path(__file__).parent.parent
SMALL = ["data.train=40", "data.val=0", "data.test=10", "data.size=32", "augment.size=32", "train.global_batch=8"]


def written(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_recipe_is_found_by_its_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = load(str(ROOT / "configs" / "simclr_pbc28.yaml"))
    assert load("simclr_pbc28") == load("simclr_pbc28.yaml") == by_path
    (tmp_path / "simclr_pbc28").mkdir()  # a run's folder, say
    assert load("simclr_pbc28") == by_path
    (tmp_path / "folder").write_text("name: mine\n")
    assert load("folder").name == "mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("simclr_pcb28", "no such file, and no recipe of that name (did you mean simclr_pbc28?); `sslcells recipes`"),
        ("configs/simclr_pbc28.yaml", "no such file; the recipe of that name comes with sslcells: --config simclr_pbc"),
        ("here", "is a folder; expected a YAML file"),
    ],
)
def test_an_unknown_recipe(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError) as error:
        load(given)
    assert f"--config {given}: {words}" in str(error.value)


def test_recipes_are_listed_with_what_they_are_for(capsys):
    assert main(None, ["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert all(len(line.split()) > 4 and line.endswith(".") for line in lines), lines
    assert main(None, ["recipes", "debug"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "debug.yaml").read_text()


def test_init_writes_what_a_project_needs_and_keeps_what_was_changed(tmp_path, capsys):
    mine = tmp_path / "mine"
    assert main(None, ["init", str(mine)]) == 0
    first = written(mine)
    assert {"launch/gpu8.yaml", "slurm/common.sh", "docs/cluster.md", "configs/sweep_temperature.txt"} <= set(first)
    assert not any(name.startswith("configs/") and name.endswith(".yaml") for name in first)
    assert all((ROOT / name).read_bytes() == text for name, text in first.items())
    (mine / "slurm" / "site.sh").write_text("sbatch_options=(--partition=mine)\n")
    (mine / "launch" / "gpu1.yaml").unlink()
    capsys.readouterr()
    assert main(None, ["init", str(mine), "--recipes"]) == 0
    said = capsys.readouterr().out
    assert (mine / "slurm" / "site.sh").read_text() == "sbatch_options=(--partition=mine)\n"
    assert "it differs from the file of sslcells" in said
    assert said.count("slurm/site.sh\n") == 1
    assert (mine / "launch" / "gpu1.yaml").is_file()
    assert {f"configs/{name}.yaml" for name in shipped.recipes()} <= set(written(mine))
    assert main(None, ["init", str(mine), "--overwrite"]) == 0
    assert {name: written(mine)[name] for name in first} == first


def test_init_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(None, ["init", str(tmp_path / "file")]) == 2
    assert "file: cannot be written" in capsys.readouterr().err


ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that was built from it alone."""
    pytest.importorskip("hatchling", reason="hatchling builds the source distribution")
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder)]
    subprocess.run(build, env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    wheels = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheels, env=ENVIRONMENT, check=True)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.mark.slow
def test_the_source_distribution_holds_the_tree_and_the_wheel_what_runs(built):
    source, wheel = built
    with tarfile.open(source) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = set(done.stdout.splitlines())
    if not done.returncode:
        assert sources - tracked <= {"PKG-INFO"}  # nothing that only lies about
        assert {name for name in tracked - sources if not name.startswith(".git")} == set()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (email.message_from_bytes(archive.read(n)) for n in names if n.endswith(".dist-info/METADATA"))
        (points,) = (archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    held = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in held} == {"sslcells"}
    assert {f"sslcells/{path}" for path in ("py.typed", "cli.py", "_shipped/configs/folder.yaml")} <= held
    assert metadata["Version"] == __version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "sslcells = sslcells.cli:main" in points
    assert wheel.stat().st_size < 5 * 2**20


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel in an environment of its own, whose other packages are this one's; called with a command."""
    folder, environment = tmp_path_factory.mktemp("installed"), dict(ENVIRONMENT)
    _, wheel = built
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    install = [*PIP, "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=environment, check=True)
    ours = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    Path(ours, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files do not count
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"

    def run(*command, cwd, status=0):
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_the_wheel_by_itself_in_an_empty_folder(installed, tmp_path):
    where = installed("python", "-c", "import sslcells; print(sslcells.__file__)", cwd=tmp_path)
    assert "/venv/lib/" in where
    assert "name: quickstart" in installed("sslcells", "train", "--check", cwd=tmp_path)
    missing = installed("sslcells", "train", "--config", "simclr_pbc28", "--check", cwd=tmp_path, status=2)
    assert "pbc28.npz" in missing
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 600), ("val", 40), ("test", 40)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 28, 28, 3), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 8)[:, None].astype(np.uint8)
    np.savez(tmp_path / "cells.npz", **arrays)
    recipe = ["--config", "simclr_pbc28", "data.path=cells.npz"]
    assert "8 classes" in installed("sslcells", "train", "--check", *recipe, cwd=tmp_path)
    installed("sslcells", "train", *SMALL, "train.total_steps=2", "name=short", "evaluate.pictures=false", cwd=tmp_path)
    said = installed("sslcells", "export", "runs/short", cwd=tmp_path)
    assert "encoder.pt2" in said
    assert (tmp_path / "runs" / "short" / "export" / "load.py").is_file()


@pytest.mark.slow
def test_what_the_wheel_writes_launches_and_submits(installed, tmp_path):
    """`sbatch` says here what it was given; tests/slurm has a real one."""
    installed("sslcells", "init", "mine", "--recipes", cwd=tmp_path)
    mine = tmp_path / "mine"
    assert written(mine).keys() >= {"slurm/simclr.sh", "launch/debug.yaml", "configs/simclr_pbc28.yaml"}
    launch = ["python", "-m", "accelerate.commands.launch", "--config_file", "launch/debug.yaml", "-m"]
    assert "name: quickstart" in installed(*launch, "sslcells.train", "--check", cwd=mine)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "queued: $*"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    command = f'PATH={tmp_path}/bin:$PATH bash slurm/simclr.sh "$@"'
    said = installed("bash", "-c", command, "bash", "--config", "quickstart", "name=try", cwd=mine)
    assert "queued: --nodes=1 slurm/simclr.sh --config quickstart name=try" in said
    (mine / "configs" / "simclr_bloodcells.yaml").write_text("name: edited\ndata: {kind: folder, path: nowhere}\n")
    said = installed("bash", "-c", command, "bash", cwd=mine, status=2)
    assert "data.path='nowhere'" in said
    assert "queued" not in said
