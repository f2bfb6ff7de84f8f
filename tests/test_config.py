"""The configuration: what is read, what is refused, and in which words."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf

from sslcells.config import PLUGINS, ConfigError, Run, Section, dump, load

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_no_argument_is_the_quickstart():
    assert load(None) == load(str(CONFIGS[0].parent / "quickstart.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_reads_and_reads_back_equal(path, tmp_path):
    run = load(str(path))
    (tmp_path / "config.yaml").write_text(dump(run))
    assert load(str(tmp_path / "config.yaml")) == run
    head = path.read_text().split("\n\n")[0]
    assert all(f"# {word}:" in head for word in ("command", "hardware", "time", "figure")), head


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.5}\ntrain: {global_batch: 64}\n")
    run = load(str(tmp_path / "a.yaml"), ["optim.lr=0.25", "method.name=triplet", "method.margin=0.7"])
    assert (run.optim.lr, run.train.global_batch, run.method.margin) == (0.25, 64, 0.7)


def test_an_override_replaces_a_whole_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {args: {width: 8}}\n")
    assert load(str(tmp_path / "a.yaml"), ["model.args={depth: 2}"]).model.args == {"depth": 2}
    assert load(str(tmp_path / "a.yaml"), ["model.args.depth=2"]).model.args == {"depth": 2, "width": 8}


def sections():
    """Every section that a configuration can have."""
    found, left = {}, [Run, *(plugin.config(name) for plugin in PLUGINS.values() for name in plugin.names())]
    while left:
        section = left.pop()
        if section not in found:
            found[section] = True
            kinds = [field.annotation for field in section.model_fields.values()]
            left += [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    return list(found)


def words(kind):
    """The strings that a type allows."""
    if get_origin(kind) is Literal:
        return [word for word in get_args(kind) if isinstance(word, str)]
    return [word for part in get_args(kind) for word in words(part)]


def test_no_choice_is_read_as_something_else():
    """YAML reads words such as `no`, `on` and `null` as no words."""
    fields = [(s.__name__, key, field.annotation) for s in sections() for key, field in s.model_fields.items()]
    choices = {(name, key, word) for name, key, kind in fields for word in words(kind)}
    assert len(choices) > 50
    changed = [choice for choice in choices if OmegaConf.create(f"x: {choice[2]}").x != choice[2]]
    assert changed == [("Train", "precision", "no")]  # the next test


def test_precision_no_is_not_false(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {precision: no}\n")
    assert load(str(tmp_path / "a.yaml")).train.precision == "no"
    assert load(None, ["train.precision=no"]).train.precision == "no"


def test_environment_variables_are_interpolated(monkeypatch):
    monkeypatch.setenv("CELLS", "here")
    assert load(None, ["name=${oc.env:CELLS}"]).name == "here"


def test_the_tree_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(None).optim.lr = 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr=1: no such key (did you mean optim.lr?)"),
        ("method.temprature=1", "method.temprature=1: no such key (did you mean method.temperature?)"),
        ("optm.lr=1", "no such key (did you mean optim?)"),
        ("train.global_batch=many", "train.global_batch='many'"),
        ("train.global_batch=1", "train.global_batch=1"),
        ("train.precision=fp8", "train.precision='fp8'"),
        ("data.kind=foldr", "kind='foldr' is not known (did you mean folder?)"),
        ("method.name=simclr2", "name='simclr2' is not known (did you mean simclr?); there are: "),
        ("augment.recipe=cell", "recipe='cell' is not known (did you mean cells?)"),
        ("optim.min_lr=1", "optim.min_lr=1.0 is above optim.lr"),
        ("name=a/b", "name='a/b'"),
        ("name=${oc.env:NO_SUCH_THING}", "NO_SUCH_THING"),
        ("data=[", "cannot be read"),
        ("train", "not section.key=value: 'train'"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_one(override, expected):
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert expected in str(error.value)


def test_all_mistakes_come_in_one_message():
    with pytest.raises(ConfigError, match="3 mistakes") as error:
        load(None, ["optim.lrr=1", "method.temprature=1", "train.workers=-1"])
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\xff"])
def test_a_file_that_is_no_configuration(text, tmp_path):
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        load(str(tmp_path / "a.yaml"))


def test_a_missing_file_suggests_the_nearest(tmp_path):
    (tmp_path / "simclr.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*simclr\.yaml"):
        load(str(tmp_path / "simlcr.yaml"))


@pytest.mark.parametrize("section", PLUGINS)
def test_every_choice_has_a_config_that_explains_itself(section):
    plugin = PLUGINS[section]
    assert plugin.default in plugin.names()
    for name in plugin.names():
        fields = plugin.config(name).model_fields
        assert fields[plugin.key].default == name
        assert all(field.description for key, field in fields.items() if key != plugin.key), name


@pytest.mark.slow
def test_the_command_tells_mistakes_once_and_exits_with_2():
    ranks = 2
    recipe = str(CONFIGS[0].parent / "simclr_bloodcells.yaml")
    command = [sys.executable, "-m", "sslcells.train", "--config", recipe, "optim.lrr=1", "method.temprature=1"]
    environment = [os.environ | {"RANK": str(r), "WORLD_SIZE": str(ranks)} for r in range(ranks)]
    done = [subprocess.run(command, env=e, capture_output=True, text=True, check=False) for e in environment]
    assert [d.returncode for d in done] == [2] * ranks
    assert "optim.lr?" in done[0].stderr
    assert "method.temperature?" in done[0].stderr
    assert all("Traceback" not in d.stderr for d in done)
    assert all(d.stderr == "" for d in done[1:])
