"""The configuration: what is read, what is refused, and in which words."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from sslcells import values
from sslcells.config import PLUGINS, RENAMED, ConfigError, Run, Section, dump, load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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
    choices = {(kind, word) for _, _, kind in fields for word in words(kind)}
    assert len(choices) > 50
    for kind, word in choices:
        assert values.fitted(values.read(f"x: {word}")["x"], kind) == values.fitted(values.typed(word), kind) == word


def test_precision_no_is_not_false(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {precision: no}\n")
    assert load(str(tmp_path / "a.yaml")).train.precision == "no"
    assert load(None, ["train.precision=no"]).train.precision == "no"


def test_files_take_environment_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLS", "here")
    (tmp_path / "a.yaml").write_text("name: ${oc.env:CELLS}\nout: runs/${optim.lr}\noptim: {lr: 0.5}\n")
    run = load(str(tmp_path / "a.yaml"), ["optim.lr=0.25"])
    assert (run.name, run.out) == ("here", "runs/0.25")
    (tmp_path / "a.yaml").write_text("name: ${oc.env:NO_SUCH_THING}\n")
    with pytest.raises(ConfigError, match="NO_SUCH_THING"):
        load(str(tmp_path / "a.yaml"))


TYPED = [
    *("2024", "2024_01", "[x] (1)", "null", "None", "yes", "no", "1e3", "0x10", "010", "1:30", "2024-01-02", "${x}"),
    *(
        "${oc.env:HOME}",
        "\\${x}",
        "\\\\${x}",
        "${",
        "'q'",
        '"q"',
        "a,b",
        "a: b",
        "{a: 1}",
        "[",
        "{",
        "ü",
        " lead",
        "trail ",
    ),
    *(
        "a=b",
        "=",
        "#c",
        "a #b",
        "~",
        "~/x",
        "-",
        "???",
        "*x",
        "&x",
        "!!int 3",
        "%",
        "@",
        "`",
        "|",
        ">",
        "\t",
        "\n",
        "\x07",
    ),
    *("<<", "...", "---", "x: ", "[]", "'", '"', "\u2028", "\x85", "\ufeff", "none.", "./none"),
]


def random_texts(count):
    letters, draw = "${}\\'\"[]:,#&*!|>%@`~ -_.01ex\nnoéü\u2028\t\x85=?<", random.Random(0)
    return ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("texts", [TYPED, random_texts(60)], ids=["known", "random"])
def test_a_string_is_exactly_what_was_typed_and_is_written_as_such(texts, tmp_path):
    for text in texts:
        keys = ("data.path", "data.sources", "model.encoder", "log.project", "log.entity")
        run = load(None, ["data.kind=folder", *(f"{key}={text}" for key in keys)])
        read = run.data.path, run.data.sources, run.model.encoder, run.log.project, run.log.entity
        assert set(read) == {text}
        (tmp_path / "config.yaml").write_text(dump(run), encoding="utf-8")
        assert load(str(tmp_path / "config.yaml")) == run, text
    assert load(None, ["data.kind=folder", f"data.path={'[' * 3000}"]).data.path == "[" * 3000


def test_a_string_of_a_file_keeps_its_text(tmp_path):
    for text in ("2024", "2024_01", "0x10", "yes", "no", "1e3", "1:30", "2024-01-02", "on", "1.50", ".5", "=", "010"):
        written = (
            f"data: {{kind: folder, path: {text}, sources: {text}}}\nlog: {{project: {text}, tags: [{text}, b]}}\n"
        )
        (tmp_path / "a.yaml").write_text(written)
        run = load(str(tmp_path / "a.yaml"))
        assert (run.data.path, run.data.sources, run.log.project, run.log.tags) == (text, text, text, (text, "b"))
    (tmp_path / "a.yaml").write_text("data: {kind: folder, path: }\n")
    with pytest.raises(ConfigError, match=r"data\.path=None: Input should be a valid string"):
        load(str(tmp_path / "a.yaml"))


def test_plugins_on_the_same_line_decide_what_a_word_is(tmp_path):
    run = load(None, ["data.path=2024_01", "data.kind=medmnist", "data.class_names=[no, 1_0]", "data.long_tail=1_0"])
    assert (run.data.path, run.data.class_names, run.data.long_tail) == ("2024_01", ("no", "1_0"), 10)
    run = load(None, ["data={kind: folder, path: 2024_01}", "data.sources=1e3", "data.size=[1_0, 20]"])
    assert (run.data.path, run.data.sources, run.data.size) == ("2024_01", "1e3", (10, 20))
    run = load(None, ["compare.supervised={data: {path: 2024_01}, train: {precision: no, total_steps: 5}}"])
    assert run.compare.supervised == {"data": {"path": "2024_01"}, "train": {"precision": "no", "total_steps": 5}}


def test_a_number_is_what_it_looks_like():
    run = load(None, ["train.global_batch=010", "optim.lr=1e-3", "train.total_steps=1e3", "train.workers=0x2"])
    assert (run.train.global_batch, run.optim.lr, run.train.total_steps, run.train.workers) == (10, 1e-3, 1000, 2)
    with pytest.raises(ConfigError, match=r"train\.total_steps='1:30'"):
        load(None, ["train.total_steps=1:30"])


def optional_fields():
    """Every field that may be empty, with what its section needs besides."""
    needs = {"table": ["data.table=x"], "medmnist": ["data.set=bloodmnist"]}
    needs |= {kind: ["data.path=x"] for kind in ("folder", "pack", "parquet", "webdataset")}
    for section in sections():
        where = next((s for s, f in Run.model_fields.items() if f.annotation is section), None)
        for name, plugin in PLUGINS.items():
            chosen = next((n for n in plugin.names() if plugin.config(n) is section), None)
            if chosen:
                yield from ((f"{name}.{k}", [f"{name}.{plugin.key}={chosen}", *needs.get(chosen, [])], f)
                            for k, f in section.model_fields.items())  # fmt: skip
        if where:
            yield from ((f"{where}.{k}", [], f) for k, f in section.model_fields.items())


def test_every_field_that_may_be_empty_takes_none(tmp_path):
    keys = [(key, need) for key, need, field in optional_fields() if type(None) in get_args(field.annotation)]
    assert {"optim.clip_norm", "data.size", "data.sources", "model.encoder", "data.long_tail"} <= {k for k, _ in keys}
    for key, need in keys:
        if f"{key}=" in "".join(need) or key in ("data.path", "data.set"):
            continue  # one of the two must be given
        section, field = key.split(".")
        kinds = get_args(type(getattr(load(None, need), section)).model_fields[field].annotation)
        for text in ("none",) if str in kinds else ("none", "None", "null", "~"):
            assert getattr(getattr(load(None, [*need, f"{key}={text}"]), section), field) is None, (key, text)
        (tmp_path / "a.yaml").write_text(f"{section}: {{{field}: none}}\n")
        assert getattr(getattr(load(str(tmp_path / "a.yaml"), need), section), field) is None


def test_none_between_quotes_is_a_name(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {encoder: 'none'}\n")
    run = load(str(tmp_path / "a.yaml"))
    assert run.model.encoder == "none"
    (tmp_path / "b.yaml").write_text(dump(run))
    assert load(str(tmp_path / "b.yaml")) == run


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
        ("method.name=simclr2", "name='simclr2' is not known (did you mean simclr?); choose from: "),
        ("augment.recipe=cell", "recipe='cell' is not known (did you mean cells?)"),
        ("optim.min_lr=1", "optim.min_lr=1.0 is above optim.lr"),
        ("name=a/b", "name='a/b'"),
        ("name=${oc.env:NO_SUCH_THING}", "name='${oc.env:NO_SUCH_THING}'"),
        ("data=[", "data='['"),
        ("optim.lr.x=1", "optim.lr: Input should be a valid number"),
        ("data.size=[x] (1)", "data.size='[x] (1)'"),
        ("train..steps=1", "not of the form section.key=value: 'train..steps=1'"),
        ("data.path=x", "no such key in data.kind=synthetic (generated images), but in"),
        ("data.path=x", "--config folder"),
        ("method.margin=1", "no such key in method.name=simclr, but in method.name=arcface or"),
        ("train", "not of the form section.key=value: 'train'"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_one(override, expected):
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert expected in str(error.value)


OLD_KEYS = {"checkpoint.every", "compare.epochs", "evaluate.every", "log.every"} | {
    f"train.{key}" for key in ("epochs", "steps", "timeout")
}


@pytest.mark.parametrize("old", sorted(OLD_KEYS))
def test_a_renamed_key_is_refused_with_its_new_name(old):
    new = RENAMED[old]
    with pytest.raises(ConfigError) as error:
        load(None, [f"{old}=3"])
    assert str(error.value).splitlines()[1:] == [f"  {old}=3: this key is now {new}"]
    section, key = new.split(".")
    assert getattr(getattr(load(None, [f"{new}=3"]), section), key) == 3


def test_every_renamed_key_is_tested():
    assert set(RENAMED) == OLD_KEYS


def test_nothing_that_is_shipped_uses_an_old_key():
    """Recipes are also loaded whole, above; this reads their comments, the documentation and the templates too."""
    patterns = ("README.md", "docs/**/*.md", "configs/*", "launch/*", "slurm/*", "sslcells/**/*.py")
    texts = [file for pattern in patterns for file in ROOT.glob(pattern) if file.is_file()]
    assert {"README.md", "config.py", "debug.yaml", "cluster.md", "common.sh"} <= {file.name for file in texts}
    old = re.compile(rf"\b(run\.)?({'|'.join(map(re.escape, sorted(OLD_KEYS)))})\b(?![.(])")
    assert old.search("accelerate launch -m sslcells.train train.epochs=3")
    table = re.compile(r"^RENAMED = \{.*?^\}", re.DOTALL | re.MULTILINE)
    assert not [(file.name, found[0]) for file in texts for found in old.finditer(table.sub("", file.read_text()))]


@pytest.mark.parametrize("word", ["inf", ".inf", "-.inf", "nan", ".nan"])
def test_a_number_is_finite(word):
    for key in ("optim.lr", "optim.weight_decay", "train.total_epochs", "method.temperature"):
        with pytest.raises(ConfigError, match=rf"{key}=.*finite number"):
            load(None, [f"{key}={word}"])


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
    address = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment = [os.environ | address | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    done = [subprocess.run(command, env=e, capture_output=True, text=True, check=False) for e in environment]
    assert [d.returncode for d in done] == [2] * ranks
    assert "optim.lr?" in done[0].stderr
    assert "method.temperature?" in done[0].stderr
    assert all("Traceback" not in d.stderr for d in done)
    assert all(d.stderr == "" for d in done[1:])
