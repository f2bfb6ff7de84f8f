"""The configuration of a run: one frozen typed tree, from YAML and `section.key=value` arguments.

`values` reads words, the fields say what they are, pydantic checks. Every mistake is collected into one ConfigError
that names the offending key and value and the nearest right one. Nothing here touches a device or a process group.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from sslcells import shipped, values
from sslcells.errors import ConfigError as ConfigError


class Section(BaseModel):
    """Base of every part of the tree: frozen, unknown keys refused, defaults checked too.

    A field that is a string takes what was typed, whatever YAML would make of it: see `values.fitted`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
    )
    changes_sections: ClassVar[bool] = False
    """whether its mappings hold sections, whose fields say later what a word is"""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return values.plain(given)
        read = dict[str, Any]()
        for key, value in given.items():
            field = cls.model_fields.get(key)
            read[key] = values.plain(value) if field is None else values.fitted(value, field.annotation)
            if cls.changes_sections and isinstance(read[key], dict):
                read[key] = values.unread(value.value if isinstance(value, values.Word) else value)
        return read


class Plugin(NamedTuple):
    """A section whose fields depend on a choice: `key` names a module of `package`, whose Config is the section."""

    package: str
    key: str
    default: str

    def names(self) -> list[str]:
        """The choices: the modules of the package that declare a Config."""
        folder = Path(next(iter(importlib.import_module(self.package).__path__)))
        names = (module.name for module in pkgutil.iter_modules([str(folder)]))
        return sorted(n for n in names if "\nclass Config(" in (folder / f"{n}.py").read_text(encoding="utf-8"))

    def choice(self, section: Mapping[str, Any]) -> str:
        """What a section chooses."""
        return str(section.get(self.key, self.default))

    def config(self, name: str) -> type[Section]:
        """The Config of one choice."""
        config: type[Section] = importlib.import_module(f"{self.package}.{name}").Config
        return config


RENAMED = {
    "checkpoint.every_steps": "checkpoint.every_steps",
    "compare.total_epochs": "compare.total_epochs",
    "evaluate.every_epochs": "evaluate.every_epochs",
    "log.every_steps": "log.every_steps",
    "train.total_epochs": "train.total_epochs",
    "train.total_steps": "train.total_steps",
    "train.timeout_minutes": "train.timeout_minutes",
}
"""Keys of earlier versions, and what they are called now that a key names its unit."""

PLUGINS = {
    "data": Plugin("sslcells.data", "kind", "synthetic"),
    "augment": Plugin("sslcells.augment", "recipe", "cells"),
    "method": Plugin("sslcells.methods", "name", "simclr"),
}


def chosen(section: str) -> BeforeValidator:
    """Validator of a plugin's section: looks the choice up, and lets its Config check the rest."""
    plugin = PLUGINS[section]

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name, names = plugin.choice(value), plugin.names()
        if name not in names:
            near = nearest(name, names)
            raise ValueError(f"{plugin.key}={name!r} is not known{near}; there are: {', '.join(names)}")
        return plugin.config(name).model_validate({plugin.key: name, **value})

    return BeforeValidator(check)


class Recipe(Section):
    """What every augmentation recipe has."""

    size: int = Field(48, ge=8)
    """Height and width of the views, and of the images that are evaluated, in pixels."""


class Model(Section):
    """The encoder: a backbone from timm."""

    backbone: str = "test_resnet"
    """timm's name of the backbone, or `small_cnn` for MNIST-like images."""
    args: dict[str, Any] = {}
    """Further keyword arguments of timm.create_model, such as {drop_path_rate: 0.1}."""
    stem: Literal["timm", "small"] = "timm"
    """`small` replaces a ResNet's stem by a 3×3 convolution with stride 1 and no max-pool: for images under 64 px."""
    pretrained: bool = False
    """Start from timm's published weights."""
    encoder: str | None = None
    """Start from the encoder of this folder, that of a finished run or an export: fine-tuning."""
    freeze: bool = False
    """Train the head alone, on the encoder as it is, in eval mode: a linear probe."""
    mean: tuple[float, ...] = (0.5,)
    """Per channel, of pixels in 0..1; one value stands for all channels."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.25,)
    """Per channel, of pixels in 0..1; one value stands for all channels."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.pretrained and self.encoder is not None:
            raise ValueError("pretrained=true and encoder are two starts: give one")
        return self


class Optim(Section):
    """The optimizer, from timm, and its schedule: linear warm-up, then cosine, both in global steps."""

    name: str = "adamw"
    """timm's name of the optimizer: adamw, sgd, lars, lamb, …"""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate, for the global batch as it is: nothing rescales it."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the last step, where the warm-up leaves room for a descent."""
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases, normalisation parameters, and what timm's model leaves out: positions, tokens."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and LARS; first beta of Adam-like optimizers is set by args."""
    args: dict[str, Any] = {}
    """Further keyword arguments of the optimizer."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Length of the linear warm-up."""
    encoder_scale: float = Field(1.0, gt=0)
    """The encoder's learning rate is this times the head's: under 1 to fine-tune gently."""
    clip_norm: float | None = Field(None, gt=0)
    """Gradients are scaled down to this global norm; none for no clipping."""


class Train(Section):
    """Size and numerics of the optimisation."""

    global_batch: int = Field(256, ge=2)
    """Images per optimizer step over all ranks."""
    micro_batch: int | None = Field(None, ge=1)
    """Images per rank and forward pass, for batches larger than the cards hold; the loss still sees the whole batch."""
    total_epochs: float = Field(10.0, gt=0)
    """Passes over the training images."""
    total_steps: int | None = Field(None, ge=1)
    """Optimizer steps; when given, it takes the place of `total_epochs`."""
    precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    """Mixed precision of the networks; losses are always float32. `auto`: bf16 where the device has it in hardware."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory format of images and convolutions; `auto`: where it is faster, by device and precision."""
    deterministic: Literal["warn"] | bool = False
    """Equal runs on equal machines are equal to the last bit on CUDA too, as on a CPU: slower, and an operation that
    cannot be ends the run; with `warn` it is only named."""
    compile: bool = False
    """torch.compile the encoder."""
    sync_batchnorm: bool = True
    """BatchNorm statistics over all ranks, where the device has it (CUDA)."""
    label_fraction: float = Field(1.0, gt=0, le=1)
    """Train on this part of each class's labelled images, drawn by `seed`, whole sources together; 1 for all images."""
    workers: int = Field(1, ge=0)
    """Data loader processes per rank."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Threads per rank that compute on the CPU: auto for OMP_NUM_THREADS where a user set it, else the rank's cores."""
    timeout_minutes: float = Field(10.0, gt=0)
    """Minutes that a rank waits for the others before it takes one for lost."""
    device: Literal["auto", "cpu"] = "auto"
    """`cpu` trains on the CPU even where there is an accelerator."""


class Sampler(Section):
    """Which images come together in a global batch; an epoch is images // global_batch steps, whatever they show."""

    kind: Literal["shuffle", "balanced", "classes", "sources"] = "shuffle"
    """Every image once an epoch; every class equally often; per_class images of some; or per_source of some sources."""
    per_class: int = Field(4, ge=1)
    """With classes: K different images of each of global_batch / K classes."""
    per_source: int = Field(1, ge=1)
    """With sources: so many images of each source in a global batch; 1 so that no two are of the same."""


class Checkpoint(Section):
    """Saved states to go on from."""

    every_steps: int = Field(100, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    keep: int = Field(2, ge=1)
    """How many of the newest are kept."""


class Log(Section):
    """What is written while it trains."""

    every_steps: int = Field(10, ge=1)
    """Steps between lines."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Besides the console and metrics.jsonl, which are always written."""
    project: str = "sslcells"
    """W&B project."""
    entity: str | None = None
    """W&B entity (user or team)."""
    tags: tuple[str, ...] = ()
    """W&B tags."""


class Evaluate(Section):
    """Figures about the encoder: of val before training, while it trains and at its end; then of `split`."""

    every_epochs: float = Field(5.0, gt=0)
    """Epochs between evaluations."""
    k: int = Field(20, ge=1)
    """Neighbours that vote in the weighted kNN."""
    temperature: float = Field(0.07, gt=0)
    """Of the votes: weight exp(cosine / temperature), as in arXiv 1805.01978."""
    batch: int = Field(256, ge=1)
    """Images per rank and forward pass."""
    max_images: int | None = Field(None, ge=2)
    """At most this many images of each split, evenly spread; none for all."""
    holdout: float = Field(0.1, ge=0, le=0.5)
    """Part of train that is held out, by source and class, where labels are known and there is no val split: never
    trained on, and asked in val's place. 0 holds nothing out: train itself is asked, leave-one-out."""
    split: Literal["val", "test"] = "test"
    """The labelled split that `sslcells evaluate` and `compare` ask, at their end; while it trains val is asked."""
    pictures: bool = True
    """Draw augmented views at the start, and curves, a map and nearest neighbours at the end."""
    umap: bool = False
    """`sslcells evaluate` also draws UMAP's maps; needs the extra umap."""
    bootstrap: int = Field(1000, ge=100)
    """Resamples behind the 95 % intervals of `sslcells evaluate`."""


class Compare(Section):
    """The classifiers of `sslcells compare`, and of `evaluate --fine-tune`: all see the same data and as many steps."""

    changes_sections: ClassVar[bool] = True

    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.01, 0.1, 1.0), min_length=1)
    """Parts of the labels of train."""
    seeds: int = Field(3, ge=1)
    """Trainings of each model on each part, each with labels of its own, from the run's seed on."""
    total_epochs: float = Field(10.0, gt=0)
    """Passes over the labelled images."""
    min_steps: int = Field(200, ge=1)
    """At least so many optimizer steps, however few the labels."""
    global_batch: int = Field(128, ge=2)
    """Images per optimizer step over all ranks; fewer where there are fewer labels."""
    classifier: dict[str, Any] = {}
    """Sections of a run that all three classifiers change, such as {method: {class_weights: balanced}}. Another
    augment.recipe takes nothing over from the run's but the size."""
    supervised: dict[str, Any] = {}
    """Sections that the model from scratch changes."""
    probe: dict[str, Any] = {"method": {"standardise": True}, "augment": {"recipe": "none"}}
    """Sections that the probe on the frozen encoder changes."""
    fine_tuned: dict[str, Any] = {"optim": {"encoder_scale": 0.3}}
    """Sections that the fine-tuned model changes."""


class Run(Section):
    """Everything that decides a run; equal trees give equal runs."""

    name: str = Field("quickstart", pattern=r"^[\w.\-]+$")
    """Name of the run, and of its folder."""
    out: str = "runs"
    """The run's folder is out/name."""
    seed: int = Field(0, ge=0)
    """Of the weights, the order of the images, and every augmentation."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest whole checkpoint of the run's folder; `never` refuses a folder that has one."""
    data: Annotated[SerializeAsAny[Section], chosen("data")]
    augment: Annotated[SerializeAsAny[Recipe], chosen("augment")]
    model: Model = Model()
    method: Annotated[SerializeAsAny[Section], chosen("method")]
    optim: Optim = Optim()
    train: Train = Train()
    sampler: Sampler = Sampler()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return values.place(self.out) / self.name

    @model_validator(mode="after")
    def _min_lr_below_lr(self) -> Self:
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}")
        return self


def nearest(name: str, names: Sequence[str]) -> str:
    """` (did you mean x?)`, whatever its case, or nothing where no name is near."""
    spelt = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.5)
    return f" (did you mean {spelt[close[0]]}?)" if close else ""


def extra(module: str, name: str, purpose: str) -> ModuleType:
    """A module of one of the package's extras.

    Raises:
        ConfigError: where it is not installed, with the command that does it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {module.split('.')[0]}: pip install 'sslcells[{name}]'") from None


def installed(module: str, name: str, purpose: str) -> None:
    """As `extra`, without importing the module; for one that is no extra, `name` is empty."""
    if importlib.util.find_spec(module) is None:
        package = f"'sslcells[{name}]'" if name else module
        raise ConfigError(f"{purpose} needs {module}: pip install {package}")


def check_tracker(log: Log) -> None:
    """Raise a ConfigError where what the tracker needs is not installed."""
    if log.tracker == "wandb":
        installed("wandb", "", "log.tracker=wandb")
    elif log.tracker == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
        installed("tensorboard", "tensorboard", "log.tracker=tensorboard")


def load(file: str | None = None, overrides: Sequence[str] = ()) -> Run:
    """The run that a YAML file, or a recipe's name, and `section.key=value` overrides describe.

    Raises:
        ConfigError: with every mistake in one message.
    """
    return validated(_merge(file, overrides), f" in {file}" if file else "")


def validated(tree: dict[str, Any], where: str = "") -> Run:
    """The run that a whole tree describes; `where` says in a message where it comes from.

    Raises:
        ConfigError: with every mistake in one message.
    """
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        mistakes = sorted({_explain(e, tree) for e in error.errors()})
        title = f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)} in the configuration{where}:"
        raise ConfigError("\n".join([title, *(f"  {m}" for m in mistakes)])) from None


def dump(run: Run) -> str:
    """The whole tree as YAML; `load` reads it back equal."""
    return values.write(_written(run, run.model_dump(mode="json")))


def _written(section: BaseModel, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a section, where a string that reads like an empty field stands between quotes."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            tree[key] = _written(value, tree[key])
        elif isinstance(value, str) and values.fitted(values.Word(value, value), field.annotation) is None:
            tree[key] = values.Quoted(value)
    return tree


def _merge(file: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    tree = {} if file is None else _file(file)
    wrong = [o for o in overrides if "=" not in o or not all(o.split("=", 1)[0].split("."))]
    if wrong:
        raise ConfigError(f"not section.key=value: {', '.join(map(repr, wrong))}")
    for override in overrides:
        _put(tree, override)
    try:
        tree = values.interpolated(tree)
    except ValueError as error:
        raise ConfigError(f"the configuration cannot be read: {error}") from None
    for section in PLUGINS:
        tree.setdefault(section, {})
    return tree


def _file(given: str) -> dict[str, Any]:
    file = shipped.recipe(given)
    if file is None:
        raise ConfigError(f"--config {given}: {no_recipe(given)}")
    try:
        tree = values.read(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--config {given} is not readable YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {given} holds no sections: expected lines such as `data:` and `train:`")
    return {key: {} if value is None or _is_null(value) else value for key, value in tree.items()}


def _is_null(value: Any) -> bool:
    return isinstance(value, values.Word) and value.value is None


def no_recipe(given: str) -> str:
    """Why there is no such file or recipe, with the nearest of both."""
    file, names = values.place(given), shipped.recipes()
    if file.stem in names and file.suffix == ".yaml":
        return f"no such file; the recipe of that name comes with sslcells: --config {file.stem}"
    if file.is_dir():
        return "is a folder; expected a YAML file, or the name of a recipe"
    beside = [str(path) for path in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
    near = nearest(given, [*names, *beside])
    return f"no such file, and no recipe of that name{near}; `sslcells recipes` lists them"


def _put(tree: dict[str, Any], override: str) -> None:
    """Set what an override says; a {…} replaces what a recipe says, and is not added to it."""
    key, text = override.split("=", 1)
    *sections, last = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if isinstance(below, values.Word):
            below = tree[section] = {} if below.value is None else below.value
        if not isinstance(below, dict):
            raise ConfigError(f"{override}: {section} is {values.plain(below)!r}, which has no keys: give it whole")
        tree = below
    tree[last] = values.typed(text)


def _explain(error: Any, tree: dict[str, Any]) -> str:
    """One line for one of pydantic's errors, with the nearest right name where a name is wrong."""
    path = [p for p in error["loc"] if p != "function-wrap"]
    key = ".".join(map(str, path))
    value = error["input"]
    if error["type"] == "extra_forbidden":
        fields = list(_fields(path[:-1], tree))
        elsewhere = [".".join([*map(str, path[:-1]), f]) for f in fields]
        if key in RENAMED:
            return f"{key}={value!r}: this key is now {RENAMED[key]}"
        return f"{key}={value!r}: no such key{_other_choices(path, tree) or _near(key, elsewhere)}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(value, dict):
        return f"{key}: {message}" if key else message
    return f"{key}={value!r} {message}" if message.startswith("is ") else f"{key}={value!r}: {message}"


def _near(key: str, keys: Sequence[str]) -> str:
    return nearest(key, keys) or f"; there are: {', '.join(k.rpartition('.')[2] for k in keys)}"


def _other_choices(path: Sequence[Any], tree: dict[str, Any]) -> str:
    """Which other choices of a plugin's section have the key that the one chosen has not."""
    if len(path) != 2 or path[0] not in PLUGINS:
        return ""
    section, key = path
    plugin = PLUGINS[section]
    chosen = plugin.choice(_mapping(tree[section]))
    having = [name for name in plugin.names() if name != chosen and key in plugin.config(name).model_fields]
    if not having:
        return ""
    way = "" if "folder" not in having else "; --config folder is a recipe for a folder of images"
    drawn = ", whose images the program draws itself" if (section, chosen) == ("data", "synthetic") else ""
    return f" in {section}.{plugin.key}={chosen}{drawn}, but in {section}.{plugin.key}={' or '.join(having)}{way}"


def _mapping(value: Any) -> Mapping[str, Any]:
    value = value.value if isinstance(value, values.Word) else value
    return value if isinstance(value, dict) else {}


def _fields(path: Sequence[Any], tree: dict[str, Any]) -> dict[str, FieldInfo]:
    """The known keys of the section at `path`."""
    if not path:
        return Run.model_fields
    section = str(path[0])
    if section in PLUGINS:
        plugin = PLUGINS[section]
        return plugin.config(plugin.choice(_mapping(tree[section]))).model_fields
    annotation = Run.model_fields[section].annotation
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}
