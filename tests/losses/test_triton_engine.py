"""The fused engine against whole matrices in float64: in Triton's interpreter, and on a GPU where there is one.

Whether kernels are interpreted is settled when Triton is imported, which another test may have done already: the
interpreter gets a process of its own, and this module imports the engine inside the checks alone.
"""

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sslcells import ranks
from sslcells.losses import HardNegativeLoss, NTXentLoss, engine
from sslcells.losses.torch_engine import Exclude

Run = Callable[..., None]

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}
TIE = 3e-7  # of float32 dot products of unit rows


class Case(NamedTuple):
    refs: int
    offset: int
    count: int
    width: int
    temperature: float = 0.1
    partner: bool = False
    source: bool = False
    lab: bool = False


CASES = [
    Case(2, 0, 2, 16, 1.0),
    Case(64, 0, 64, 64),
    Case(150, 0, 150, 48, 0.5, partner=True),
    Case(201, 67, 67, 100, 0.05, partner=True),
    Case(90, 45, 45, 100, 0.05),
    Case(140, 70, 35, 128, 0.1, partner=True, source=True),
    Case(131, 130, 1, 5, 0.2, source=True),
    Case(140, 70, 35, 64, 0.1, partner=True, lab=True),
    Case(101, 40, 33, 16, 0.2, source=True, lab=True),
]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # the process starts here
        yield pool


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a check, a function of the device and more, in the interpreter or on the GPU."""
    if request.param == "cuda":
        return _cuda_run()
    pool: ProcessPoolExecutor = request.getfixturevalue("interpreter")
    return lambda check, *args: pool.submit(check, "cpu", *args).result()


@pytest.fixture
def gpu() -> Run:
    return _cuda_run()


def _cuda_run() -> Run:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return lambda check, *args: check("cuda", *args)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(run: Run, case: Case, precision: str) -> None:
    run(check_sums, case, precision)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weighted_rows(run: Run, case: Case, precision: str) -> None:
    run(check_weighted_rows, case, precision)


@pytest.mark.parametrize("width", [16, 64, 256])
def test_weights_beyond_float16(run: Run, width: int) -> None:
    run(check_large_weights, width)


@pytest.mark.parametrize(("source", "lab"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("classes", ["some", "one", "singletons", "unknown"])
def test_hardest(run: Run, classes: str, source: bool, lab: bool) -> None:
    run(check_hardest, classes, source, lab)


def test_hardest_of_tight_classes(run: Run) -> None:
    run(check_tight_classes)


def test_no_tile_with_a_harder_row_is_left_out(run: Run) -> None:
    run(check_left_out_tiles)


def test_lowest_index_of_equals(run: Run) -> None:
    run(check_ties)


def test_splits_and_repeats(run: Run) -> None:
    run(check_splits)


def test_limits(run: Run) -> None:
    run(check_limits)


@pytest.mark.parametrize(
    ("temperature", "precision", "tolerance", "splits"), [(0.02, "fp32", 5e-5, 1), (0.003, "bf16", 3e-2, 3)]
)
def test_low_temperatures(run: Run, temperature: float, precision: str, tolerance: float, splits: int) -> None:
    run(check_low_temperature, temperature, precision, tolerance, splits)


@pytest.mark.parametrize("name", ["nt-xent", "hard negatives"])
def test_losses_of_two_ranks_at_low_temperatures(run: Run, name: str) -> None:
    run(check_low_loss, name)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]], ids=str)
def test_bf16_by_a_model_that_is_the_kernels_in_fp16(run: Run, case: Case) -> None:
    run(check_model, case)


def test_too_wide_rows_are_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_triton_engine", lambda: SimpleNamespace(available=lambda device: True, WIDEST=512))
    engine._too_wide.cache_clear()
    refs = torch.empty(4, 768, device="meta")
    assert engine.accurate(refs, 40.0).dtype == torch.float32
    assert engine.accurate(refs, 50.0).dtype == torch.float64
    (said,) = caplog.messages
    assert said.startswith("rows are 768 wide and the fused kernels take up to 512: the losses use torch operations")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-3), ("tf32", 3e-4)])
@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("width", [128, 512])
def test_gradient_on_tensor_cores(gpu: Run, precision: str, tolerance: float, temperature: float, width: int) -> None:
    gpu(check_nt_xent_gradient, precision, tolerance, temperature, width)


def test_gradient_in_bf16_by_the_model(run: Run) -> None:
    run(check_model_gradient)


def check_sums(device: str, case: Case, precision: str) -> None:
    from sslcells.losses import triton_engine

    refs, exclude = _batch(case)
    group = torch.arange(case.refs, dtype=torch.int32) % 5
    found = triton_engine.row_sums(*_at(device, case, refs, exclude), group.to(device), precision=precision)
    exponentials = _exponentials(refs, exclude, case.temperature)
    others = exponentials.masked_fill(group[:, None] == group, 0.0)
    for got, want in zip(found[:3], (exponentials.sum(1), exponentials.amax(1), others.amax(1)), strict=True):
        assert got.shape == (case.count,)
        assert got.dtype == torch.float32
        _close(got, want[case.offset :][: case.count], TOLERANCE[precision])
    alone = triton_engine.row_sums(*_at(device, case, refs, exclude), precision=precision)
    assert torch.equal(alone.total, found.total)
    assert torch.equal(alone.largest_negative, found.largest)
    bare = triton_engine.row_sums(*_at(device, case, refs, exclude), figures=False, precision=precision)
    assert torch.equal(bare.total, found.total)
    assert bare[1:] == (None, None, None)


def check_weighted_rows(device: str, case: Case, precision: str) -> None:
    from sslcells.losses import triton_engine

    refs, exclude = _batch(case)
    weight = torch.rand(case.refs, generator=torch.Generator().manual_seed(1))
    expected = _weighted(_exponentials(refs, exclude, case.temperature), weight, refs)[case.offset :][: case.count]
    at = _at(device, case, refs, exclude)
    out = triton_engine.weighted_rows(*at[:4], weight.to(device), at[4], precision=precision)
    assert out.shape == (case.count, case.width)
    assert out.dtype == torch.float32
    _close(out, expected, TOLERANCE[precision])


def check_large_weights(device: str, width: int) -> None:
    """Opposite rows, one's own side left out: E = e⁻⁸⁰ and 1 / ΣE = 10³³, far beyond float16, but not their product.

    The widths are those whose unit rows float16 holds exactly.
    """
    from sslcells.losses import triton_engine

    side = torch.tensor([1.0, -1.0]).repeat(20)
    refs = side[:, None] * torch.nn.functional.normalize(torch.ones(1, width))
    image = torch.arange(40, dtype=torch.int32)
    exclude = Exclude(None, image, (side > 0).int())
    weight = 1 / _exponentials(refs, exclude, 0.025).sum(1)
    assert weight.min() > 1e33
    out = triton_engine.weighted_rows(
        refs.to(device), 0, 40, 40.0, weight.float().to(device), _to(device, exclude), precision="fp16"
    )
    _close(out, -2 * refs, 2e-3)


def check_hardest(device: str, classes: str, source: bool, lab: bool) -> None:
    case = Case(150, 50, 50, 40)
    refs, _ = _batch(case)
    positive = {
        "some": torch.arange(150) % 7,
        "one": torch.zeros(150),
        "singletons": torch.arange(150),
        "unknown": torch.arange(150) % 5 - 2,
    }[classes].int()
    sources = (torch.arange(150) // 3 % 9).int() if source else None
    labs = (torch.arange(150) % 4 // 2).int() if lab else None
    _check_chosen(device, case, refs, positive, sources, labs)


def check_tight_classes(device: str) -> None:
    """Classes whose rows differ in the fourth digit, where the halves of bf16 rows have none left."""
    _check_chosen(device, Case(160, 0, 160, 96), *_tight(160, 4), None)


def check_left_out_tiles(device: str) -> None:
    """Of one anchor most tiles cannot improve on any row; the high halves alone would leave out some that do."""
    refs, positive = _tight(450, 150)
    for offset in range(0, 144, 12):
        _check_chosen(device, Case(450, offset, 1, 96), refs, positive, None)


def _tight(count: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positive = (torch.arange(count) % classes).int()
    centre = torch.randn(classes, 96, generator=generator)[positive]
    return torch.nn.functional.normalize(centre + 1e-2 * torch.randn(count, 96, generator=generator), dim=1), positive


def check_ties(device: str) -> None:
    """Rows of ±½ in four places: equal products are equal in any arithmetic, and far apart otherwise."""
    from sslcells.losses import triton_engine

    generator = torch.Generator().manual_seed(0)
    refs = torch.randint(0, 2, (180, 4), generator=generator) - 0.5
    positive = torch.randint(-1, 6, (180,), generator=generator).int()
    s, same, other = _relations(refs, positive, None)
    far = torch.where(same, s, 9.0).argmin(1).masked_fill(~same.any(1), -1)
    near = torch.where(other, s, -9.0).argmax(1)
    for splits in (1, 3):
        chosen = triton_engine.hardest(refs.to(device), 20, 140, positive.to(device), None, splits=splits)
        assert torch.equal(chosen[0].cpu(), far[20:160]), splits
        assert torch.equal(chosen[1].cpu(), near[20:160]), splits


def check_splits(device: str) -> None:
    from sslcells.losses import triton_engine

    case = Case(200, 30, 70, 48, partner=True)
    refs, exclude = _batch(case)
    at = _at(device, case, refs, exclude)
    weight = torch.rand(200, generator=torch.Generator().manual_seed(1)).to(device)
    positive = (torch.arange(200, device=device) % 7).int()
    calls: list[Callable[[int], Tensor]] = [
        lambda splits: torch.stack(triton_engine.row_sums(*at, precision="tf32", splits=splits)[:3]),
        lambda splits: triton_engine.weighted_rows(*at[:4], weight, at[4], precision="tf32", splits=splits),
        lambda splits: torch.stack(triton_engine.hardest(*at[:3], positive, None, splits=splits)),
    ]
    for call in calls:
        whole = call(1)
        assert torch.equal(whole, call(1))
        for splits in (3, 9):  # nine are more than there are tiles
            shared = call(splits)
            _close(shared, whole.double(), 1e-6)
            assert torch.equal(shared, call(splits)), splits


def check_limits(device: str) -> None:
    from sslcells.losses import triton_engine

    assert triton_engine.available(torch.device(device))
    for call in (triton_engine.row_sums, triton_engine.hardest):
        with pytest.raises(ValueError, match="513 wide; the fused kernels end at 512"):
            call(torch.ones(2, 513, device=device), 0, 2, 1.0, Exclude())
    for room in (75, 139, 203):
        for precision, size in (("bf16", 2), ("tf32", 4), ("exact", 4)):
            for width in (16, 32, 64, 128, 256, 512):
                for kernel in ("sums", "rows", "hardest"):
                    tiling = triton_engine._tiling(kernel, width, precision, room * 2**10)
                    assert min(tiling.rows, tiling.columns) >= 16
                    assert (tiling.rows + tiling.stages * tiling.columns) * width * size <= room * 2**10


def check_low_temperature(device: str, temperature: float, precision: str, tolerance: float, splits: int) -> None:
    """Where float32 has no number for exp(−2/τ), nor for most summands; row 40 has no references at all."""
    from sslcells.losses import triton_engine

    refs, exclude = _batch(Case(90, 0, 90, 24, partner=True, lab=True))
    exclude = exclude._replace(positive=torch.arange(90).int() % 45, lab=(torch.arange(90) == 40).int())
    group = torch.arange(90).int() % 5
    own, splitting = slice(30, 75), {"precision": precision, "splits": splits}
    logs = ((refs.double() @ refs.double().T - 1) / temperature).masked_fill(
        _exponentials(refs, exclude, 1.0) == 0, -torch.inf
    )
    assert logs[40].max() == -torch.inf
    at = refs.to(device), 0, 90, 1 / temperature, _to(device, exclude)
    found = triton_engine.row_sums(*at, group.to(device), **splitting)
    total, shift = found.total.cpu().double(), found.shift.cpu().double()
    assert found.total[40] == 0
    assert math.log(2) * shift[40] < -3 / temperature
    others = torch.arange(90) != 40
    _close((total.log() + math.log(2) * shift - logs.logsumexp(1))[others].exp(), torch.ones(89), tolerance)
    nearest = logs.masked_fill(group[:, None] == group, -torch.inf).amax(1)
    _close(found.largest_negative, (nearest - math.log(2) * shift).exp(), tolerance)
    assert torch.equal(found.largest.cpu(), others.float())

    weight = torch.rand(90, generator=torch.Generator().manual_seed(1)) * others
    of_row = (logs - logs.logsumexp(1, keepdim=True)).exp().nan_to_num() * weight[:, None]
    by_total = torch.where(found.total > 0, weight.to(device) / found.total, 0.0)
    to = refs.to(device), 30, 45, 1 / temperature, by_total, at[4], found.shift
    _close(triton_engine.weighted_rows(*to, **splitting), ((of_row + of_row.T) @ refs.double())[own], tolerance)


def check_low_loss(device: str, name: str) -> None:
    """Loss and gradient of two ranks through the kernels, as in float64 in one process without them."""
    from sslcells.losses import triton_engine

    build = {
        "nt-xent": lambda: NTXentLoss(0.01, precision="fp32"),
        "hard negatives": lambda: HardNegativeLoss(0.03, beta=0.5, precision="fp32"),  # one of two scales is low
    }[name]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, 16, generator=generator) + 0.4 * torch.randn(2, 20, 16, generator=generator)
    exact = z.double().requires_grad_()
    reference = build()
    want = reference(*exact)
    want.backward()

    def step(rank: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        own = slice(10 * rank, 10 * rank + 10)
        rows, values = z[:, own].to(device).requires_grad_(), []
        loss = build()
        for loss.figures in (True, False):
            rows.grad = None
            value = loss(*rows)
            value.backward()
            values.append((value.detach(), rows.grad, loss.stats))
        (value, grad, stats), bare = values
        assert torch.equal(value, bare[0])
        assert torch.equal(grad, bare[1])
        assert stats.keys() - bare[2].keys() == {"top1"}
        return value.cpu(), grad.cpu(), stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_fused", lambda refs: triton_engine if refs.dtype == torch.float32 else None)
        both = _in_turn(patch, step)
    _close(torch.stack([value for value, _, _ in both]).mean(), want.detach(), 1e-4)
    assert exact.grad is not None
    _close(torch.cat([grad for _, grad, _ in both], 1) / 2, exact.grad, 1e-4)
    top1 = sum(stats["top1"].item() for _, _, stats in both) / 2
    assert top1 == pytest.approx(reference.stats["top1"].item())


class _Waiting(Exception):
    """A rank needs what the other one has not computed yet."""


def _in_turn(patch: pytest.MonkeyPatch, step: Callable[[int], Any]) -> list[Any]:
    """What `step` returns on each of two ranks, which begin anew whenever they need a collective's next answer."""
    answers: list[Tensor] = []
    patch.setattr(ranks, "world", lambda: 2)
    patch.setattr(ranks, "same_count", lambda *_: None)
    while True:
        asked: list[Tensor] = []
        results = []
        for rank in range(2):
            calls = itertools.count()

            def gather(x: Tensor, calls: Iterator[int] = calls, asked: list[Tensor] = asked) -> Tensor:
                if (call := next(calls)) < len(answers):
                    return answers[call]
                asked.append(x.detach())
                raise _Waiting

            patch.setattr(ranks, "gather", gather)
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            try:
                results.append(step(rank))
            except _Waiting:
                continue
        if not asked:
            return results
        answers.append(torch.cat(asked))


def check_model(device: str, case: Case) -> None:
    """The model is the kernels in fp16, and in bf16 (which the interpreter's products get wrong) within its bounds."""
    from sslcells.losses import triton_engine

    refs, exclude = _batch(case)
    weight = torch.rand(case.refs, generator=torch.Generator().manual_seed(1))
    at, on_device = (case.offset, case.count, 1 / case.temperature), _to(device, exclude)
    for precision in ("fp16", "bf16") if device == "cuda" else ("fp16",):
        model = _Model(refs, exclude, precision)
        found = triton_engine.row_sums(refs.to(device), *at, on_device, precision=precision)
        _close(found.total, model.row_sums(*at).double(), 1e-6)
        out = triton_engine.weighted_rows(refs.to(device), *at, weight.to(device), on_device, precision=precision)
        _close(out, model.weighted_rows(*at, weight).double(), 2e-5)
    e = _exponentials(refs, exclude, case.temperature)
    own, model = slice(case.offset, case.offset + case.count), _Model(refs, exclude, "bf16")
    # Rounding moves a number by 2⁻⁹ of it, so a cosine of unit rows by no more than 2⁻⁸ and a little.
    most = math.expm1(2.0**-8 * 1.01 / case.temperature)
    sums, exact = model.row_sums(*at).double(), e.sum(1)[own]
    assert ((sums - exact).abs() <= most * exact).all()
    rows, exact = model.weighted_rows(*at, weight).double(), _weighted(e, weight, refs)[own]
    room = (most + 2.0**-8 * 1.01) * _weighted(e, weight, refs.abs())[own]
    assert ((rows - exact).abs() <= room).all()
    _close(rows, exact, 2e-2)


class _Model:
    """The kernels' arithmetic in torch: operands rounded, products and sums in float32, tile after tile."""

    def __init__(self, refs: Tensor, exclude: Exclude, precision: str) -> None:
        from sslcells.losses import triton_engine

        self._type = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._rows = refs.to(self._type).float()
        self._kept = _exponentials(refs, exclude, 1.0) > 0
        width = triton_engine._padded(refs.shape[1])
        self._columns = {
            kernel: triton_engine._tiling(kernel, width, precision, 200 * 2**10).columns for kernel in ("sums", "rows")
        }

    def _tiles(self, kernel: str, offset: int, count: int, inv_t: float) -> Iterator[tuple[slice, Tensor]]:
        own, scale = slice(offset, offset + count), inv_t * math.log2(math.e)
        for start in range(0, len(self._rows), self._columns[kernel]):
            tile = slice(start, start + self._columns[kernel])
            s = self._rows[own] @ self._rows[tile].T
            yield tile, torch.where(self._kept[own, tile], (s * scale - scale).exp2(), 0.0)

    def row_sums(self, offset: int, count: int, inv_t: float) -> Tensor:
        out = torch.zeros(count)
        for _, e in self._tiles("sums", offset, count, inv_t):
            out += e.sum(1)
        return out

    def weighted_rows(self, offset: int, count: int, inv_t: float, weight: Tensor) -> Tensor:
        out = torch.zeros(count, self._rows.shape[1])
        for tile, e in self._tiles("rows", offset, count, inv_t):
            p = e * (weight[offset : offset + count, None] + weight[tile])
            out += p.to(self._type).float() @ self._rows[tile]
        return out


def check_model_gradient(device: str) -> None:
    _check_gradient(2e-3, 0.1, 128, lambda refs, exclude: _Model(refs, exclude, "bf16"))


def check_nt_xent_gradient(device: str, precision: str, tolerance: float, temperature: float, width: int) -> None:
    from sslcells.losses import triton_engine

    class Kernels:
        def __init__(self, refs: Tensor, exclude: Exclude) -> None:
            self._refs, self._exclude = refs.to(device), _to(device, exclude)

        def row_sums(self, *at: Any) -> Tensor:
            return triton_engine.row_sums(self._refs, *at, self._exclude, precision=precision).total.cpu()

        def weighted_rows(self, *at: Any) -> Tensor:
            *numbers, weight = at
            weight = weight.to(device)
            return triton_engine.weighted_rows(self._refs, *numbers, weight, self._exclude, precision=precision).cpu()

    _check_gradient(tolerance, temperature, width, Kernels)


def _check_gradient(tolerance: float, temperature: float, width: int, build: Callable[[Tensor, Exclude], Any]) -> None:
    """Of the loss whose positive is out of the low-precision product: L_i = softplus(log Σ_j exp(s_ij) − s_i,pos)."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1000, width, generator=generator)
    views = [centre + 0.5 * torch.randn(1000, width, generator=generator) for _ in range(2)]
    refs = torch.nn.functional.normalize(torch.cat(views), dim=1)
    partner = (torch.arange(2000) + 1000) % 2000
    kernels, inv_t = build(refs, Exclude(partner)), 1 / temperature

    z = refs.double().requires_grad_()
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2000, dtype=torch.bool), -torch.inf)
    torch.nn.functional.cross_entropy(logits, partner, reduction="sum").backward()

    sums = kernels.row_sums(0, 2000, inv_t)
    positive = (refs * refs[partner]).sum(1) * inv_t
    pull = torch.sigmoid(sums.log() + inv_t - positive)  # −∂L/∂s_pos, and the negatives' share of the gradient
    grad = inv_t * (
        kernels.weighted_rows(0, 2000, inv_t, pull / sums) - (pull + pull[partner])[:, None] * refs[partner]
    )
    assert z.grad is not None
    _close(grad, z.grad, tolerance)


def _batch(case: Case) -> tuple[Tensor, Exclude]:
    """Clustered unit rows, two of them equal; partners are half a batch apart, the odd one out has none."""
    generator = torch.Generator().manual_seed(case.refs)
    centre = torch.randn(9, case.width, generator=generator)[torch.arange(case.refs) % 9]
    refs = torch.nn.functional.normalize(centre + torch.randn(case.refs, case.width, generator=generator), dim=1)
    refs[case.refs // 3] = refs[0]
    index = torch.arange(case.refs)
    half = case.refs // 2
    partner = torch.where(index < 2 * half, (index + half) % (2 * half), -1)
    image, source, lab = (index // 2).int(), (index // 8 % 5).int(), (index // 3 % 4).int()
    by_id = (image if case.source or case.lab else None, source if case.source else None, lab if case.lab else None)
    return refs, Exclude(partner if case.partner else None, *by_id)


def _at(device: str, case: Case, refs: Tensor, exclude: Exclude) -> tuple[Tensor, int, int, float, Exclude]:
    return refs.to(device), case.offset, case.count, 1 / case.temperature, _to(device, exclude)


def _to(device: str, exclude: Exclude) -> Exclude:
    return Exclude(*(array if array is None else array.to(device) for array in exclude))


def _exponentials(refs: Tensor, exclude: Exclude, temperature: float) -> Tensor:
    """(R, R) in float64, zero where a pair is excluded."""
    z = refs.double()
    e = ((z @ z.T - 1) / temperature).exp().fill_diagonal_(0)
    if exclude.partner is not None:
        e[torch.arange(len(z)) == exclude.partner[:, None]] = 0
    if exclude.positive is not None:
        other = exclude.positive[:, None] != exclude.positive
        if exclude.source is not None:
            e[(exclude.source[:, None] == exclude.source) & other] = 0
        if exclude.lab is not None:
            e[(exclude.lab[:, None] != exclude.lab) & other] = 0
    return e


def _weighted(e: Tensor, weight: Tensor, refs: Tensor) -> Tensor:
    return (e * (weight.double()[:, None] + weight.double())) @ refs.double()


def _relations(
    refs: Tensor, positive: Tensor, source: Tensor | None, lab: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Products in float64, who is whose positive, who is whose negative, (R, R) each."""
    z = refs.double()
    same = (positive[:, None] == positive) & (positive >= 0)
    other = ~same & ~torch.eye(len(z), dtype=torch.bool)
    if source is not None:
        other &= source[:, None] != source
    if lab is not None:
        other &= lab[:, None] == lab
    return z @ z.T, same.fill_diagonal_(False), other


def _check_chosen(
    device: str, case: Case, refs: Tensor, positive: Tensor, source: Tensor | None, lab: Tensor | None = None
) -> None:
    """The chosen rows are positives and negatives, and none is harder by more than float32's rounding."""
    from sslcells.losses import triton_engine

    own = slice(case.offset, case.offset + case.count)
    s, same, other = (x[own] for x in _relations(refs, positive, source, lab))
    ids = (None if x is None else x.to(device) for x in (source, lab))
    chosen = triton_engine.hardest(refs.to(device), case.offset, case.count, positive.to(device), *ids)
    for index, allowed, sign in zip(chosen, (same, other), (-1, 1), strict=True):
        assert index.dtype == torch.int64
        index, some = index.cpu(), allowed.any(1)
        assert torch.equal(index >= 0, some)
        assert allowed[some].gather(1, index[some, None]).all()
        hardest = torch.where(allowed, sign * s, -9.0)[some].amax(1)
        assert ((sign * s)[some].gather(1, index[some, None])[:, 0] >= hardest - TIE).all()


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Error's norm relative to the norm."""
    error = actual.detach().cpu().double() - expected.cpu()
    expected = expected.cpu().double()
    assert error.isfinite().all()
    assert error.norm() <= tolerance * expected.norm(), f"{error.norm() / expected.norm():.2e} > {tolerance}"
