"""Our losses, miners and figures under the names of lightly, pytorch-metric-learning and solo-learn.

A pytest plugin of `peer_tests.py`. If the environment names a peer, importing this file replaces the peer's code by
adapters before its tests are collected. An adapter maps the names of arguments and calls our code. If it cannot map a
call, the test is not applicable and is skipped with the reason; if a test compares several forms, the peer's own code
computes that form. A test that calls none of our code is not counted.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from sslcells import augment, losses, methods, optim
from sslcells.augment import simclr as simclr_recipe
from sslcells.config import Optim
from sslcells.data.sampler import Groups
from sslcells.errors import ConfigError
from sslcells.evaluation.knn import knn_scores
from sslcells.losses import engine
from sslcells.losses._rows import codes
from sslcells.methods import Outputs, byol, dino, simsiam
from sslcells.methods.margin import distance_weighted
from sslcells.models.heads import Prototypes, projection

NOT_APPLICABLE = "not applicable: "
_PLANTED = os.environ.get("PEER_TESTS_PLANTED") == "1"
_FIRST = os.environ.get("LOCAL_RANK", "0") == "0"
"""Lightning starts pytest itself again for the second rank; one report is enough."""
_called: set[str] = set()
_reports: dict[str, dict[str, Any]] = {}


def use(ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call our code and note that it was called; with `--planted`, spoil what it computes."""
    _called.add(getattr(ours, "__qualname__", type(ours).__qualname__))
    out = ours(*args, **kwargs)
    if not _PLANTED:
        return out
    if isinstance(out, tuple):
        return tuple(spoilt(x) for x in out)
    return spoilt(out)


def spoilt(x: Any) -> Any:
    """5 % too much, or every index one too far."""
    if isinstance(x, Tensor):
        return x * 1.05 + 0.01 if x.is_floating_point() else x.roll(1, 0)
    return x * 1.05 + 0.01 if isinstance(x, float) else x


def not_applicable(why: str) -> NoReturn:
    """End the test: it needs a feature that we lack."""
    pytest.skip(NOT_APPLICABLE + why)


def put(package: str, name: str, adapter: Any) -> None:
    """Put an adapter wherever a loaded module of the package has the thing that `name`, module and attribute, names."""
    module, attribute = name.rsplit(".", 1)
    theirs = getattr(importlib.import_module(module), attribute)
    for known, loaded in list(sys.modules.items()):
        if known == package or known.startswith(f"{package}."):
            for key, value in list(vars(loaded).items()):
                if value is theirs:
                    setattr(loaded, key, adapter)


@contextlib.contextmanager
def as_assertion() -> Iterator[None]:
    """Our errors for a user's mistake, under the peer's type."""
    try:
        yield
    except (ValueError, ConfigError) as error:
        raise AssertionError(str(error)) from error


# What two of the peers have


def negative_cosine(predicted: Tensor, given: Tensor, predicted1: Tensor | None = None, given1: Any = None) -> Tensor:
    """SimSiam's loss: predictions of both views, and the rows of the views that each is compared with."""
    other, others = (predicted, given) if predicted1 is None else (predicted1, given1)
    method = simsiam.Method(simsiam.Config(hidden=1, dimension=2, bottleneck=1), 1, None)
    # ours compares a prediction with the row of the other view: the second view's stand first
    rows = torch.cat([torch.cat([predicted, other]), torch.cat([others, given])], 1)
    return use(method.loss, Outputs(rows), None, 0.0)[0]


def dino_loss(
    student: list[Tensor], teacher: list[Tensor], centre: Tensor, temperatures: tuple[float, float], momentum: float
) -> tuple[Tensor, Tensor]:
    """DINO's loss of views (B, K) each and the centre that comes after it."""
    if len(teacher) != 2:
        not_applicable("there are always two full-size views")
    count, outputs = len(student), student[0].shape[1]
    config = dino.Config(
        prototypes=outputs,
        local_views=count - 2,
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        final_teacher_temperature=temperatures[1],
        centre_momentum=momentum,
        hidden=1,
        dimension=2,
    )
    method = dino.Method(config, 1, None)
    method.centre = centre
    loss = use(method.loss, Outputs(torch.cat(student), torch.cat(teacher)), None, 0.0)[0]
    return loss, method.centre


# lightly


class _Loss(nn.Module):
    """A loss of two views under lightly's names."""

    def __init__(self, *args: Any, gather_distributed: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.loss = use(self.build, *args, **kwargs)

    def build(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        with as_assertion():
            return use(self.loss, x0, x1)


class LightlyNTXent(_Loss):
    def build(self, temperature: float = 0.5, memory_bank_size: Any = 0) -> nn.Module:
        if memory_bank_size:
            not_applicable("no memory bank beside NT-Xent; MoCoLoss has a queue, and the batch's keys as negatives too")
        return losses.NTXentLoss(temperature)


class LightlyDCL(_Loss):
    def build(self, temperature: float = 0.1, weight_fn: Any = None) -> nn.Module:
        if weight_fn is not None:
            not_applicable("no weights of positives in the decoupled loss")
        return losses.DCLLoss(temperature)


class LightlyBarlow(_Loss):
    def build(self, lambda_param: float = 5e-3) -> nn.Module:
        return losses.BarlowTwinsLoss(lambda_param)


class LightlyVICReg(_Loss):
    def build(
        self, lambda_param: float = 25.0, mu_param: float = 25.0, nu_param: float = 1.0, eps: float = 1e-4
    ) -> nn.Module:
        return losses.VICRegLoss(lambda_param, mu_param / 2, nu_param, epsilon=eps)  # lightly halves the variance


class LightlyNegativeCosine(nn.Module):
    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return negative_cosine(x0, x1)


class LightlySymmetricCosine(nn.Module):
    def forward(self, out0: tuple[Tensor, Tensor], out1: tuple[Tensor, Tensor]) -> Tensor:
        return negative_cosine(out0[1], out1[0], out1[1], out0[0])

    def _neg_cosine_simililarity(self, x: Tensor, y: Tensor) -> Tensor:
        return negative_cosine(x, y)


class LightlyDINO(nn.Module):
    def __init__(
        self, output_dim: int, teacher_temp: float = 0.04, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.center = torch.zeros(output_dim)
        self.numbers = teacher_temp, student_temp, center_momentum

    def forward(self, teacher_out: list[Tensor], student_out: list[Tensor], teacher_temp: Any = None) -> Tensor:
        default, student, momentum = self.numbers
        temperatures = student, float(default if teacher_temp is None else teacher_temp)
        loss, self.center = dino_loss(student_out, teacher_out, self.center, temperatures, momentum)
        return loss

    def update_center(self, teacher_out: Tensor) -> None:
        not_applicable("the centre moves with the loss, and not by itself")


def lightly_knn(
    feature: Tensor,
    feature_bank: Tensor,
    feature_labels: Tensor,
    num_classes: int,
    knn_k: int = 200,
    knn_t: float = 0.1,
) -> Tensor:
    """All classes, the likeliest first."""
    votes = use(knn_scores, feature, feature_bank.t(), feature_labels, num_classes, knn_k, knn_t)
    return votes.argsort(dim=-1, descending=True, stable=True)


def lightly_cosine(step: int, max_steps: int, start_value: float, end_value: float, period: Any = None) -> float:
    return lightly_warmup(step, max_steps, start_value, end_value, 0, 0.0, None, period)


def lightly_warmup(
    step: int,
    max_steps: int,
    start_value: float,
    end_value: float,
    warmup_steps: int,
    warmup_start_value: float,
    warmup_end_value: Any = None,
    period: Any = None,
) -> float:
    if period is not None:
        not_applicable("the learning rate has no periods")
    if not 0 <= step < max_steps:
        not_applicable("the learning rate is one of steps 0..steps-1, which the loop alone asks for")
    if step < warmup_steps and warmup_end_value not in (None, start_value):
        not_applicable("the warm-up ends at the rate that the cosine begins with")
    return use(optim.learning_rate, Optim(lr=start_value, min_lr=end_value), step, max_steps, warmup_steps)


def lightly_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    use(methods.Teacher.follow, model_ema, model, nn.Identity(), m)


def head(layers: int, norm: Any, last: bool = False) -> Callable[..., nn.Module]:
    """A head of lightly's with the first three arguments (input, hidden, output)."""

    def build(
        input_dim: int, hidden_dim: int, output_dim: int, num_layers: int = layers, batch_norm: bool = norm == "batch"
    ) -> nn.Module:
        kind = "batch" if batch_norm else "none"
        return use(projection, input_dim, hidden_dim, output_dim, num_layers, kind, last)

    return build


def lightly_dino_head(theirs: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Head and prototypes; lightly's own where it is asked to freeze prototypes, which the method does here."""

    def build(
        input_dim: int, hidden_dim: int, bottleneck_dim: int, output_dim: int, batch_norm: bool = False, **rest: Any
    ) -> nn.Module:
        if rest:
            return theirs(input_dim, hidden_dim, bottleneck_dim, output_dim, batch_norm, **rest)
        rows = use(projection, input_dim, hidden_dim, bottleneck_dim, 3, "batch" if batch_norm else "none")
        return nn.Sequential(rows, Prototypes(bottleneck_dim, output_dim))

    return build


class LightlySimCLR:
    """Views of a PIL image, as a list."""

    views = 2

    def __init__(self, input_size: int) -> None:
        self.augment = augment.Augment(simclr_recipe.Config(size=input_size), [0.5] * 3, [0.5] * 3)

    def __call__(self, image: Any) -> Any:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self.pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)[None]
        return list(self.some(self.augment, self.views))

    def some(self, recipe: augment.Augment, views: int, first: int = 0) -> Tensor:
        return use(recipe, self.pixels, torch.tensor([0]), seed=0, step=0, views=views, first=first)


class LightlySimCLRView(LightlySimCLR):
    views = 1

    def __call__(self, image: Any) -> Tensor:
        return super().__call__(image)[0]


class LightlyDINOViews(LightlySimCLR):
    def __init__(self, global_crop_size: int = 224, local_crop_size: int = 96, n_local_views: int = 6) -> None:
        super().__init__(global_crop_size)
        self.local, self.count = self.augment.local(local_crop_size, (0.05, 0.4)), n_local_views

    def __call__(self, image: Any) -> list[Tensor]:
        return super().__call__(image) + list(self.some(self.local, self.count, 2))


class LightlyDINOView(LightlySimCLRView):
    def __init__(self, crop_size: int = 224) -> None:
        super().__init__(crop_size)


def put_lightly() -> None:
    """Adapters into lightly."""
    for module in ("benchmarking.knn_classifier", "benchmarking.benchmark_module", "scheduler"):
        importlib.import_module(f"lightly.utils.{module}")
    heads = importlib.import_module("lightly.models.modules.heads")
    for name, adapter in {
        "loss.ntx_ent_loss.NTXentLoss": LightlyNTXent,
        "loss.dcl_loss.DCLLoss": LightlyDCL,
        "loss.barlow_twins_loss.BarlowTwinsLoss": LightlyBarlow,
        "loss.vicreg_loss.VICRegLoss": LightlyVICReg,
        "loss.negative_cosine_similarity.NegativeCosineSimilarity": LightlyNegativeCosine,
        "loss.sym_neg_cos_sim_loss.SymNegCosineSimilarityLoss": LightlySymmetricCosine,
        "loss.dino_loss.DINOLoss": LightlyDINO,
        "utils.benchmarking.knn.knn_predict": lightly_knn,
        "utils.scheduler.cosine_schedule": lightly_cosine,
        "utils.scheduler.cosine_warmup_schedule": lightly_warmup,
        "models.utils.update_momentum": lightly_momentum,
        "models.modules.heads.BarlowTwinsProjectionHead": head(3, "batch"),
        "models.modules.heads.BYOLProjectionHead": head(2, "batch"),
        "models.modules.heads.BYOLPredictionHead": head(2, "batch"),
        "models.modules.heads.MoCoProjectionHead": head(2, "none"),
        "models.modules.heads.SimCLRProjectionHead": head(2, "batch"),
        "models.modules.heads.SimSiamProjectionHead": head(3, "batch", last=True),
        "models.modules.heads.SimSiamPredictionHead": head(2, "batch"),
        "models.modules.heads.DINOProjectionHead": lightly_dino_head(heads.DINOProjectionHead),
        "transforms.simclr_transform.SimCLRTransform": LightlySimCLR,
        "transforms.simclr_transform.SimCLRViewTransform": LightlySimCLRView,
        "transforms.dino_transform.DINOTransform": LightlyDINOViews,
        "transforms.dino_transform.DINOViewTransform": LightlyDINOView,
    }.items():
        put("lightly", f"lightly.{name}", adapter)
    helpers = importlib.import_module("tests.ddp_helpers")
    global _start_ranks
    _start_ranks, helpers.setup_ddp = helpers.setup_ddp, start_ranks


_start_ranks: Callable[[int, int], None]


def start_ranks(rank: int, world_size: int) -> None:
    """Start a process as lightly does; that it imports this file to find the function gives it the adapters too."""
    _start_ranks(rank, world_size)


# pytorch-metric-learning


def kind_of(distance: Any) -> str | None:
    """Our name of a distance of pytorch-metric-learning's between unit rows, none where there is no such."""
    if not distance.normalize_embeddings or distance.p != 2:
        return None
    kinds = {("CosineSimilarity", 1): "cosine", ("LpDistance", 1): "euclidean", ("LpDistance", 2): "sqeuclidean"}
    return kinds.get((type(distance).__name__, distance.power))


def labelled(theirs: Any, build: Callable[[Any, str], nn.Module | None]) -> Any:
    """Their loss, which is ours for labelled rows of one batch where `build` finds the same; the name stays theirs."""

    def forward(
        self: Any,
        embeddings: Tensor,
        labels: Any = None,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: Any = None,
    ) -> Tensor:
        kind, plain = kind_of(self.distance), labels is not None and indices_tuple is None and ref_emb is None
        reducers = getattr(self.reducer, "reducers", {"": self.reducer}).values()
        usual = {type(r) for r in reducers} == {type(self.get_default_reducer())} and self.embedding_regularizer is None
        loss = build(self, kind) if plain and usual and kind is not None else None
        if loss is None:
            return theirs.forward(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return use(loss, embeddings, labels).to(embeddings.dtype)  # ours is float32 for half rows

    return type(theirs.__name__, (theirs,), {"forward": forward})


def sup_con(theirs: Any, kind: str) -> nn.Module | None:
    return losses.SupConLoss(theirs.temperature) if kind == "cosine" else None


def contrastive(theirs: Any, kind: str) -> nn.Module | None:
    near, far = theirs.pos_margin, theirs.neg_margin
    if kind == "cosine":  # ours is a distance, theirs a similarity
        near, far = 1 - near, 1 - far
    return losses.PairLoss(far, near, squared=False, distance=kind) if 0 <= near < far else None


def triplet(theirs: Any, kind: str) -> nn.Module | None:
    if theirs.swap or theirs.smooth_loss or theirs.triplets_per_anchor != "all":
        return None
    return losses.BatchAllTripletLoss(theirs.margin, kind)


def put_pytorch_metric_learning() -> None:
    """Adapters into pytorch-metric-learning."""
    pml = importlib.import_module("pytorch_metric_learning.losses")
    miners = importlib.import_module("pytorch_metric_learning.miners")
    samplers = importlib.import_module("pytorch_metric_learning.samplers")

    class VICRegLoss(pml.VICRegLoss):
        def forward(self, embeddings: Tensor, *, ref_emb: Tensor) -> Tensor:
            weights = self.invariance_lambda, self.variance_mu / 2, self.covariance_v  # they halve the variance
            loss = losses.VICRegLoss(*weights, epsilon=self.eps)
            return use(loss, embeddings, ref_emb).to(embeddings.dtype)

    class BatchHardMiner(miners.BatchHardMiner):
        def forward(self, embeddings: Tensor, labels: Tensor, ref_emb: Any = None, ref_labels: Any = None) -> Any:
            if kind_of(self.distance) is None or ref_emb is not None:
                return super().forward(embeddings, labels, ref_emb, ref_labels)
            rows = losses.unit(embeddings)
            far, near = use(engine.hardest, rows, 0, len(rows), codes(labels), None, "exact")
            anchor = ((far >= 0) & (near >= 0)).nonzero()[:, 0]
            return anchor, far[anchor], near[anchor]

    class DistanceWeightedMiner(miners.DistanceWeightedMiner):
        def forward(self, embeddings: Tensor, labels: Tensor, ref_emb: Any = None, ref_labels: Any = None) -> Any:
            if ref_emb is not None:
                return super().forward(embeddings, labels, ref_emb, ref_labels)
            generator = torch.Generator().manual_seed(0)
            rows = embeddings.detach().float()
            return use(distance_weighted, rows, labels, self.cutoff, generator, self.nonzero_loss_cutoff)

    class MPerClassSampler(samplers.MPerClassSampler):
        def __init__(
            self, labels: Tensor, m: int, batch_size: Any = None, length_before_new_iter: int = 100000
        ) -> None:
            batch = batch_size or m * len(labels.unique())
            self.batches, self.batch, self.step = length_before_new_iter // batch, batch, 0
            assert self.batches, "the length of an iteration is a thing of theirs"
            with as_assertion():
                self.groups = use(Groups, labels, "class", m, batch, 0)

        def __len__(self) -> int:
            return self.batches * self.batch

        def __iter__(self) -> Iterator[int]:
            for _ in range(self.batches):
                _called.add("Groups.batch")
                yield from self.groups.batch(self.step).tolist()
                self.step += 1

    for name, adapter in {
        "losses.SupConLoss": labelled(pml.SupConLoss, sup_con),
        "losses.ContrastiveLoss": labelled(pml.ContrastiveLoss, contrastive),
        "losses.TripletMarginLoss": labelled(pml.TripletMarginLoss, triplet),
        "losses.VICRegLoss": VICRegLoss,
        "miners.BatchHardMiner": BatchHardMiner,
        "miners.DistanceWeightedMiner": DistanceWeightedMiner,
        "samplers.MPerClassSampler": MPerClassSampler,
    }.items():
        put("pytorch_metric_learning", f"pytorch_metric_learning.{name}", adapter)


# solo-learn


def solo_barlow(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    return scale_loss * use(losses.BarlowTwinsLoss(lamb), z1, z2)


def solo_vicreg(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    return use(losses.VICRegLoss(sim_loss_weight, var_loss_weight, cov_loss_weight), z1, z2)


def solo_simclr(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    return use(losses.SupConLoss(temperature), z, indexes)


def solo_mocov3(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    return 2 * temperature * use(losses.MoCoLoss(temperature), query, key)


def solo_mocov2(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    return use(losses.MoCoLoss(temperature), query, key, queue.T)


def solo_byol(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    method = byol.Method(byol.Config(hidden=1, dimension=2), 1, None)
    return use(method.loss, Outputs(p.repeat(2, 1), z.repeat(2, 1)), None, 0.0)[0] / 2  # theirs is of one direction


def solo_simsiam(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    return negative_cosine(p, z)


def put_solo_learn() -> None:
    """Adapters into solo-learn."""
    importlib.import_module("solo.methods")
    theirs = importlib.import_module("solo.losses.dino").DINOLoss
    knn = importlib.import_module("solo.utils.knn").WeightedKNNClassifier

    class DINOLoss(theirs):
        def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
            temperatures = self.student_temp, float(self.teacher_temp_schedule[self.epoch])
            views = list(student_output.chunk(self.num_large_crops)), list(teacher_output.chunk(2))
            loss, centre = dino_loss(*views, self.center[0], temperatures, self.center_momentum)
            self.center = centre[None]
            return loss

    class WeightedKNNClassifier(knn):
        def compute(self) -> tuple[float, float]:
            if self.distance_fx != "cosine":
                return super().compute()
            bank, labels, query, true = (
                torch.cat(x) for x in (self.train_features, self.train_targets, self.test_features, self.test_targets)
            )
            votes = use(knn_scores, query, bank, labels, int(labels.max()) + 1, self.k, self.T)
            right = votes.argsort(dim=1, descending=True, stable=True)[:, :5] == true[:, None]
            self.reset()
            return 100 * right[:, 0].float().mean().item(), 100 * right.any(1).float().mean().item()

    for name, adapter in {
        "losses.barlow.barlow_loss_func": solo_barlow,
        "losses.vicreg.vicreg_loss_func": solo_vicreg,
        "losses.simclr.simclr_loss_func": solo_simclr,
        "losses.mocov3.mocov3_loss_func": solo_mocov3,
        "losses.mocov2plus.mocov2plus_loss_func": solo_mocov2,
        "losses.byol.byol_loss_func": solo_byol,
        "losses.simsiam.simsiam_loss_func": solo_simsiam,
        "losses.dino.DINOLoss": DINOLoss,
        "utils.knn.WeightedKNNClassifier": WeightedKNNClassifier,
    }.items():
        put("solo", f"solo.{name}", adapter)


PEERS = {
    "lightly": put_lightly,
    "pytorch-metric-learning": put_pytorch_metric_learning,
    "solo-learn": put_solo_learn,
}

if peer := os.environ.get("PEER_TESTS_PEER"):
    PEERS[peer]()


# The plugin


def pytest_runtest_setup(item: Any) -> None:
    """A new test: none of our code was called yet."""
    _called.clear()


def pytest_runtest_logreport(report: Any) -> None:
    """Keep how a test ended, in which phase ever, and what of ours it called."""
    kept = _reports.setdefault(report.nodeid, {"outcome": "passed", "why": "", "called": []})
    kept["called"] = sorted(_called)
    if report.outcome != "passed":
        kept["outcome"] = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        kept["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(crash.message if crash else "")


def pytest_sessionfinish(session: Any) -> None:
    """Write the reports."""
    if _FIRST and (path := os.environ.get("PEER_TESTS_REPORT")):
        Path(path).write_text(json.dumps(_reports), encoding="utf-8")
