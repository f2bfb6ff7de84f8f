"""The configuration of a run: one frozen typed tree, from YAML and `section.key=value` arguments.

`values` reads the words, the types of the fields interpret them, and pydantic checks them. One ConfigError reports all
mistakes, each with its key, its value and the nearest valid name. Nothing here touches a device or a process group.
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
    """Base class of every section: frozen, refuses unknown keys, and checks defaults too.

    A string field takes the text as typed, even where YAML would read a number or a date: see `values.fitted`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )
    changes_sections: ClassVar[bool] = False
    """True if its mappings hold changes to other sections, whose fields interpret the words later"""

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
    """A section whose fields depend on a choice: the value of `key` names a module of `package` with its Config."""

    package: str
    key: str
    default: str

    def names(self) -> list[str]:
        """The choices: the public modules of the package that declare a Config."""
        folder = Path(next(iter(importlib.import_module(self.package).__path__)))
        names = (module.name for module in pkgutil.iter_modules([str(folder)]) if not module.ispkg)
        return sorted(
            n for n in names if n[0] != "_" and "\nclass Config(" in (folder / f"{n}.py").read_text(encoding="utf-8")
        )

    def choice(self, section: Mapping[str, Any]) -> str:
        """The choice that a section makes, or the default."""
        return str(section.get(self.key, self.default))

    def config(self, name: str) -> type[Section]:
        """The Config of one choice."""
        config: type[Section] = importlib.import_module(f"{self.package}.{name}").Config
        return config


RENAMED = {
    "checkpoint.every": "checkpoint.every_steps",
    "compare.epochs": "compare.total_epochs",
    "evaluate.every": "evaluate.every_epochs",
    "log.every": "log.every_steps",
    "train.epochs": "train.total_epochs",
    "train.steps": "train.total_steps",
    "train.timeout": "train.timeout_minutes",
}
"""Keys of earlier versions → their present names, which carry the unit."""

PLUGINS = {
    "data": Plugin("sslcells.data", "kind", "synthetic"),
    "augment": Plugin("sslcells.augment", "recipe", "cells"),
    "method": Plugin("sslcells.methods", "name", "simclr"),
}


def chosen(section: str) -> BeforeValidator:
    """Validator of a plugin section: looks up the choice, then checks the section against its Config."""
    plugin = PLUGINS[section]

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name, names = plugin.choice(value), plugin.names()
        if name not in names:
            near = nearest(name, names)
            raise ValueError(f"{plugin.key}={name!r} is not known{near}; choose from: {', '.join(names)}")
        return plugin.config(name).model_validate({plugin.key: name, **value})

    return BeforeValidator(check)


class Recipe(Section):
    """Fields that every augmentation recipe has."""

    of_others: ClassVar[bool] = False
    """True if a view takes something of other images, and has to know where the cell is"""

    size: int = Field(48, ge=8)
    """Height and width in pixels, of views during training and of images during evaluation."""


class Standardise(Section):
    """Input that laboratories have in common: colours, and the cell's size and place; fitted to train, without labels.

    It is part of the encoder: training, figures, embed, search and export prepare images alike.
    """

    colour: Literal["none", "background", "two_point", "three_point", "reinhard", "macenko", "percentiles"] = "none"
    """`background`: the background becomes white, or black in fluorescence. `two_point`: also the mean density of
    the nucleus becomes that of train. `three_point`, for blood smears: the densities of red cells and of the nucleus
    become those of train, in each channel by a power law. `reinhard` gives an image the colour statistics of train,
    `macenko` its two dyes. `percentiles`: the 0.1 and 99.9 percentiles of each channel become 0 and 1."""
    channels: Literal["all", "red_green"] = "all"
    """`red_green`: blue becomes the mean of red and green; a nucleus absorbs little of it, and cameras differ most in
    it."""
    scale: Literal["none", "nucleus"] = "none"
    """`nucleus` magnifies the cell so that its nucleus has `diameter`."""
    diameter: float = Field(0.4, ge=0.05, le=0.9)
    """With scale=nucleus: diameter of the disc with the nucleus's area, as a fraction of the image's shorter side."""
    centre: bool = False
    """Move the nucleus to the middle of the image."""
    size: int | None = Field(None, ge=16)
    """With scale or centre: pixels a side of the square around the cell; none for the image's shorter side. A smaller
    one makes what follows faster."""
    outside: Literal["keep", "blank"] = "keep"
    """What surrounds the cell in the middle; `blank` replaces it by the colour of the background."""
    stain: Literal["giemsa", "haematoxylin-eosin", "dark", "bright"] = "giemsa"
    """How the nucleus is found: by the first dye of a stain, as the darkest part, or (fluorescence) the brightest."""
    by: Literal["image", "lab"] = "image"
    """`image`: colours and the size of the nucleus are measured in each image by itself. `lab`: once for each
    laboratory, plate or scanner, as the median of its images; the percentiles are those of all their pixels. Cells of
    one laboratory then keep their differences."""

    @property
    def active(self) -> bool:
        """True if it changes images."""
        changes = self.colour != "none", self.channels != "all", self.scale != "none", self.outside != "keep"
        return self.centre or any(changes)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stain == "bright" and self.colour in ("reinhard", "macenko"):
            raise ValueError(f"colour={self.colour} is for light that dyes absorb; stain=bright says fluorescence")
        if self.colour == "three_point" and self.stain != "giemsa":
            raise ValueError(f"colour=three_point is for blood smears, stain=giemsa; stain={self.stain}: two_point")
        if self.by == "lab" and self.colour == "none" and self.scale == "none":
            raise ValueError("by=lab: nothing is measured of a laboratory; set colour, or scale=nucleus")
        return self


def _frozen(value: Any) -> Any:
    """The value of model.freeze, if it can be one."""
    value = values.plain(values.typed(value)) if isinstance(value, str) else value
    fits = isinstance(value, bool) or (isinstance(value, int) and value > 0)
    if not fits and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError("expected true, false, a number of layers from 1, or a fraction of them between 0 and 1")
    return value


class Model(Section):
    """The encoder: a backbone from timm."""

    backbone: str = "test_resnet"
    """Name of a timm model, or `small_cnn` for MNIST-like images."""
    args: dict[str, Any] = {}
    """More keyword arguments for timm.create_model, such as {drop_path_rate: 0.1}."""
    stem: Literal["timm", "small"] = "timm"
    """`small` replaces the stem of a ResNet with a 3×3 convolution, stride 1, no max-pool: for images under 64 px."""
    norm: Literal["timm", "group"] = "timm"
    """`group`: GroupNorm in place of the backbone's BatchNorm, in 32 groups, or in one if a layer's channels do not
    divide by 32. It knows no statistics of the training images, so none of their laboratory. `timm`: as timm has it."""
    grad_checkpointing: bool = False
    """Keep the input of each block in memory alone, and run the block again for its gradient: several times larger
    batches or networks fit, for about a third more time. For backbones without BatchNorm, which would count its
    statistics twice; the gradients are the same."""
    pretrained: bool = False
    """Start from the weights that timm publishes for the backbone; the same as weights= with the backbone's name."""
    weights: str | None = None
    """Start from published weights: a name of timm's with or without tag, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or a
    file (safetensors, pth, pt) in one of the known layouts. Every tensor must fit."""
    weights_key: str | None = None
    """Which network of a checkpoint that holds several: teacher, student, backbone, …"""
    allow_missing: tuple[str, ...] = ()
    """Tensors of the encoder that the weights may lack or have in another shape, by name or pattern (`blocks.*`); they
    keep their random first values."""
    allow_left_over: tuple[str, ...] = ()
    """Published tensors that may be left over, by name or pattern; parts known to be heads or decoders are always."""
    encoder: str | None = None
    """Start from the encoder in this folder (a finished run, or an export), to fine-tune it."""
    freeze: Annotated[bool | int | float, BeforeValidator(_frozen)] = False
    """Train only the head; the encoder stays fixed, in eval mode: a linear probe. A number freezes so many of its first
    layers, the stem and then blocks; one below 1 that fraction of its layers."""
    lora_rank: int | None = Field(None, ge=1)
    """Rank of low-rank adapters (LoRA) of the encoder's linear layers; all else of it stays fixed, and they are merged
    in what is exported. none: the weights themselves learn."""
    lora_alpha: float | None = Field(None, gt=0)
    """Scale of the adapters, times the rank; none: the rank, for a scale of 1."""
    lora_layers: tuple[str, ...] = Field(("*",), min_length=1)
    """Which linear layers have an adapter, by name or pattern, such as `*.attn.*` and `*.mlp.*`."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, for pixels in 0..1; a single value is used for all channels. none: the one of the weights
    that training starts from, or 0.5."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Standard deviation of each channel, likewise; none: that of the weights, or 0.25."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How whole images are resized to augment.size, for evaluation and embedding; none: as for the weights, or
    bilinear."""
    crop: float | None = Field(None, gt=0, le=1)
    """Central part of the height and width of whole images to keep, for evaluation and embedding; none: as for the
    weights, or 1."""

    @property
    def lora_scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by: alpha over rank, 1 unless alpha is set."""
        return self.lora_alpha / self.lora_rank if self.lora_alpha and self.lora_rank else 1.0

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = ["pretrained=true"] * self.pretrained + ["weights"] * (self.weights is not None)
        starts += ["encoder"] * (self.encoder is not None)
        if len(starts) > 1:
            raise ValueError(f"{' and '.join(starts)} are both a starting point: set only one")
        if self.start is None and (self.weights_key or self.allow_missing or self.allow_left_over):
            raise ValueError("weights_key, allow_missing and allow_left_over say how weights= is read: set weights")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_layers != ("*",)):
            raise ValueError("lora_alpha and lora_layers are for adapters: set lora_rank")
        if self.lora_rank is not None and self.freeze is True:
            raise ValueError(f"freeze=true fixes the encoder, and lora_rank={self.lora_rank} trains it: set only one")
        if self.lora_rank is not None and not starts:
            raise ValueError(
                f"lora_rank={self.lora_rank} adapts weights that are there: set weights, pretrained or encoder"
            )
        if self.pretrained and self.norm == "group":
            raise ValueError(
                "norm=group and pretrained=true: the published weights go with the statistics of their BatchNorm. Keep "
                "norm=timm; some backbones have weights learned with GroupNorm, such as backbone=resnet50_gn"
            )
        return self

    @property
    def adapts(self) -> bool:
        """True if training changes weights that were there: published ones, or an encoder's."""
        return (self.start is not None or self.encoder is not None) and self.freeze is not True

    @property
    def start(self) -> str | None:
        """The published weights to start from; None for none."""
        return self.backbone if self.pretrained else self.weights


class Optim(Section):
    """A timm optimizer, and its schedule: linear warm-up, then cosine decay."""

    name: str = "adamw"
    """Name of a timm optimizer: adamw, sgd, lars, lamb, …"""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate. It is used as given, not scaled by the batch size."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the last step, if the warm-up ends before it."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay; not applied to biases, normalisation layers, or position and token embeddings of timm models."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and LARS; for Adam-like optimizers set betas in `args`."""
    args: dict[str, Any] = {}
    """More keyword arguments for the optimizer."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Length of the linear warm-up, in epochs."""
    encoder_scale: float = Field(1.0, gt=0)
    """Learning rate of the encoder, as a multiple of the head's; below 1 for gentle fine-tuning."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of each layer of the encoder, as a multiple of the next one's; the last has that of
    `encoder_scale`. 1: the same for all; 0.65 to 0.8 are usual for fine-tuning vision transformers."""
    clip_norm: float | None = Field(None, gt=0)
    """Clip the gradient to this global norm; none for no clipping."""


class Train(Section):
    """Batch size, length and precision of the training."""

    global_batch: int = Field(256, ge=2)
    """Images per optimizer step over all ranks."""
    micro_batch: int | None = Field(None, ge=1)
    """Images per rank and forward pass, for batches that exceed GPU memory; the loss still uses the global batch."""
    total_epochs: float = Field(10.0, gt=0)
    """Passes over the training images."""
    total_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; replaces `total_epochs` when set."""
    precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    """Mixed precision of the network; the loss is always float32. `auto`: bf16 if the device has it in hardware."""
    channels_last: Literal["auto"] | bool = "auto"
    """Use the channels-last memory format; `auto`: when it is faster on this device with this precision."""
    deterministic: Literal["warn"] | bool = False
    """Make runs on CUDA repeatable to the last bit (on a CPU they always are). It is slower, and an operation that has
    no deterministic version stops the run; with `warn` it only prints a warning."""
    compile: bool = False
    """torch.compile the encoder."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each rank keeps: the whole network (`ddp`), or its part of parameters, gradients and optimizer state, for
    networks that do not fit on one device (`fsdp`, FSDP2). The gradient is the same."""
    sync_batchnorm: bool = True
    """Compute BatchNorm statistics over all ranks (CUDA only)."""
    label_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of each class's labels to use, drawn by `seed` in whole sources; 1 for all images."""
    without_labs: tuple[str, ...] = ()
    """Laboratories that are left out of train and val, and stay in test: asked about, but never learned from."""
    workers: int = Field(1, ge=0)
    """Data loader processes per rank."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """CPU threads per rank; auto: OMP_NUM_THREADS if you set it, else the rank's share of the cores."""
    timeout_minutes: float = Field(10.0, gt=0)
    """Minutes that a rank waits for the others before it reports one as lost."""
    device: Literal["auto", "cpu"] = "auto"
    """`cpu` trains on the CPU even if there is a GPU."""


class Sampler(Section):
    """How images are drawn into global batches. An epoch is always images // global_batch steps."""

    kind: Literal["shuffle", "balanced", "classes", "sources", "labs"] = "shuffle"
    """`shuffle`: every image once an epoch; `balanced`: every class equally often; `classes`: `per_class` images of
    each of several classes; `sources`: `per_source` images of each of several sources; `labs`: images of every
    laboratory, as `labs` says."""
    block: int | None = Field(None, ge=1)
    """With kind=shuffle: the number of images that follow each other in the data set and are drawn at about the same
    time, where reading far apart is slow. 16 such blocks or more are mixed at a time; none mixes all images."""
    per_class: int = Field(4, ge=1)
    """With kind=classes: different images of a class in a global batch, from global_batch / per_class classes."""
    per_source: int = Field(1, ge=1)
    """With kind=sources: images of a source in a global batch; with 1 no two images share a source."""
    labs: Literal["equal", "natural"] = "equal"
    """With kind=labs: as many images of each laboratory in a global batch (`equal`), or every image once an epoch, and
    of each laboratory its share of the images in every batch (`natural`)."""

    @model_validator(mode="after")
    def _block_is_of_shuffle(self) -> Self:
        if self.block is not None and self.kind != "shuffle":
            raise ValueError(f"block={self.block} is for kind=shuffle, not for kind={self.kind}")
        return self


class Checkpoint(Section):
    """Checkpoints, from which a stopped run resumes."""

    every_steps: int = Field(100, ge=1)
    """Steps between checkpoints; the last step always writes one."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""


class Log(Section):
    """Logging during training."""

    every_steps: int = Field(10, ge=1)
    """Steps between log lines."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Tracker to use in addition to the console and metrics.jsonl."""
    project: str = "sslcells"
    """W&B project."""
    entity: str | None = None
    """W&B entity (user or team)."""
    tags: tuple[str, ...] = ()
    """W&B tags."""


class Evaluate(Section):
    """Evaluation of the encoder: on val before, during and after training; on `split` by `sslcells evaluate`."""

    every_epochs: float = Field(5.0, gt=0)
    """Epochs between evaluations."""
    k: int = Field(20, ge=1)
    """Number of neighbours in the weighted kNN."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the kNN's votes: weight exp(cosine / temperature), as in arXiv 1805.01978."""
    batch: int = Field(256, ge=1)
    """Images per rank and forward pass."""
    max_images: int | None = Field(None, ge=2)
    """Read at most this many images of each split, drawn at random, the same always; none for all."""
    bank: int | None = Field(20_000, ge=2)
    """During training, search neighbours among at most this many images of train, drawn by class, the same at every
    look; none for all. `sslcells evaluate` searches in all that it reads."""
    queries: int | None = Field(10_000, ge=2)
    """Measure figures that compare images with images on at most this many of val or test, drawn by class, the same at
    every look; none for all."""
    holdout: float = Field(0.1, ge=0, le=0.5)
    """Fraction of train to hold out as val if there are labels but no val split: in whole sources, from every class,
    never trained on. 0 holds nothing out; train itself is then evaluated, leave-one-out."""
    split: Literal["val", "test"] = "test"
    """The labelled split that `sslcells evaluate` and `compare` report on; during training it is always val."""
    pictures: bool = True
    """Draw augmented views at the start, and curves, a map and nearest neighbours at the end."""
    umap: bool = False
    """Also draw UMAP maps in `sslcells evaluate`; needs the extra umap."""
    bootstrap: int = Field(1000, ge=100)
    """Number of bootstrap resamples for the 95 % intervals of `sslcells evaluate`."""
    untrained: bool = True
    """In `sslcells evaluate` also measure the same network with random weights, on at most `bank` images of train."""


class Compare(Section):
    """The classifiers of `sslcells compare` and `evaluate --fine-tune`; all get the same data and number of steps."""

    changes_sections: ClassVar[bool] = True

    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.01, 0.1, 1.0), min_length=1)
    """Fractions of the train labels to use, one after the other."""
    seeds: int = Field(3, ge=1)
    """Number of trainings of each model on each fraction; each draws its own labels. Seeds count up from the run's."""
    total_epochs: float = Field(10.0, gt=0)
    """Passes over the labelled images."""
    min_steps: int = Field(200, ge=1)
    """Minimum number of optimizer steps, however few the labels."""
    global_batch: int = Field(128, ge=2)
    """Images per optimizer step over all ranks; reduced if there are fewer labels."""
    classifier: dict[str, Any] = {}
    """Changes to the run's sections for all three classifiers, such as {method: {class_weights: balanced}}. If it
    changes augment.recipe, only the size is taken from the run's augmentation."""
    supervised: dict[str, Any] = {}
    """Further changes for the model trained from scratch."""
    probe: dict[str, Any] = {"method": {"standardise": True}, "augment": {"recipe": "none"}}
    """Further changes for the probe on the frozen encoder."""
    fine_tuned: dict[str, Any] = {"optim": {"encoder_scale": 0.3}}
    """Further changes for the fine-tuned model."""


class Run(Section):
    """The whole configuration of a run; equal configurations give equal runs."""

    name: str = Field("quickstart", pattern=r"^[\w.\-]+$")
    """Name of the run and of its folder."""
    out: str = "runs"
    """Parent of the run's folder, which is out/name."""
    seed: int = Field(0, ge=0)
    """Seed of the weights, the order of the images, and all augmentation."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest complete checkpoint in the run's folder; `never` refuses a folder that has one."""
    data: Annotated[SerializeAsAny[Section], chosen("data")]
    standardise: Standardise = Standardise()
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
        """The run's folder, out/name."""
        return values.place(self.out) / self.name

    @model_validator(mode="after")
    def _min_lr_below_lr(self) -> Self:
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}")
        return self


def nearest(name: str, names: Sequence[str]) -> str:
    """` (did you mean x?)` for the most similar name, ignoring case; empty if none is similar."""
    spelt = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.5)
    return f" (did you mean {spelt[close[0]]}?)" if close else ""


def extra(module: str, name: str, purpose: str) -> ModuleType:
    """Import a module of one of the package's extras.

    Raises:
        ConfigError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {module.split('.')[0]}: pip install 'sslcells[{name}]'") from None


def installed(module: str, name: str, purpose: str) -> None:
    """Like `extra`, but does not import the module; `name` is empty for a package that is not one of our extras."""
    if importlib.util.find_spec(module) is None:
        package = f"'sslcells[{name}]'" if name else module
        raise ConfigError(f"{purpose} needs {module}: pip install {package}")


def check_tracker(log: Log) -> None:
    """Raise a ConfigError if the tracker's package is not installed."""
    if log.tracker == "wandb":
        installed("wandb", "", "log.tracker=wandb")
    elif log.tracker == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
        installed("tensorboard", "tensorboard", "log.tracker=tensorboard")


def load(file: str | None = None, overrides: Sequence[str] = ()) -> Run:
    """Read a YAML file, or a recipe by name, apply the `section.key=value` overrides, and return the run.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    return validated(_merge(file, overrides), f" in {file}" if file else "")


def validated(tree: dict[str, Any], where: str = "") -> Run:
    """The run that a complete tree describes; messages end their title with `where`, the tree's origin.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        mistakes = sorted({_explain(e, tree) for e in error.errors()})
        title = f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)} in the configuration{where}:"
        raise ConfigError("\n".join([title, *(f"  {m}" for m in mistakes)])) from None


def dump(run: Run) -> str:
    """The complete configuration as YAML, which `load` reads back unchanged."""
    return values.write(_written(run, run.model_dump(mode="json")))


def _written(section: BaseModel, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a section; a string that would be read as an empty field, such as "none", is quoted."""
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
        raise ConfigError(f"not of the form section.key=value: {', '.join(map(repr, wrong))}")
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
    """Why `given` is no file or recipe, with the most similar name of either."""
    file, names = values.place(given), shipped.recipes()
    if file.stem in names and file.suffix == ".yaml":
        return f"no such file; the recipe of that name comes with sslcells: --config {file.stem}"
    if file.is_dir():
        return "is a folder; expected a YAML file, or the name of a recipe"
    beside = [str(path) for path in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
    near = nearest(given, [*names, *beside])
    return f"no such file, and no recipe of that name{near}; `sslcells recipes` lists them"


def _put(tree: dict[str, Any], override: str) -> None:
    """Apply one override to the tree; a mapping {…} replaces the recipe's, it is not merged into it."""
    key, text = override.split("=", 1)
    *sections, last = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if isinstance(below, values.Word):
            below = tree[section] = {} if below.value is None else below.value
        if not isinstance(below, dict):
            raise ConfigError(
                f"{override}: {section} is {values.plain(below)!r}, which has no keys: set {section} itself"
            )
        tree = below
    tree[last] = values.typed(text)


def _explain(error: Any, tree: dict[str, Any]) -> str:
    """One line for one of pydantic's errors, with the most similar valid name if the key is unknown."""
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
    return nearest(key, keys) or f"; choose from: {', '.join(k.rpartition('.')[2] for k in keys)}"


def _other_choices(path: Sequence[Any], tree: dict[str, Any]) -> str:
    """Names the other choices of a plugin section that do have the unknown key; empty if there are none."""
    if len(path) != 2 or path[0] not in PLUGINS:
        return ""
    section, key = path
    plugin = PLUGINS[section]
    chosen = plugin.choice(_mapping(tree[section]))
    having = [name for name in plugin.names() if name != chosen and key in plugin.config(name).model_fields]
    if not having:
        return ""
    way = "" if "folder" not in having else "; --config folder is a recipe for a folder of images"
    drawn = " (generated images)" if (section, chosen) == ("data", "synthetic") else ""
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
        fields = plugin.config(plugin.choice(_mapping(tree[section]))).model_fields
    else:
        fields = _of_section(Run.model_fields[section])
    for key in path[1:]:
        fields = _of_section(fields[key]) if key in fields else {}
    return fields


def _of_section(field: FieldInfo) -> dict[str, FieldInfo]:
    """The keys of a field that is a section; empty for others."""
    annotation = field.annotation
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}
