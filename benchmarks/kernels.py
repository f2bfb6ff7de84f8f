"""What the loss kernels become on a GPU that is not there: registers, spills and shared memory, by compiling alone.

    python benchmarks/kernels.py --out benchmarks/RESULTS.md
    python benchmarks/kernels.py --kernels rows --widths 128 --rows 128 --columns 32 64 --registers 128 255

Each row is a kernel with the tiles that the engine takes at that width and precision, or with those of the options. A
spill is a register's value that goes through local memory; `serialised` is ptxas's notice that tensor cores wait after
each product. Two programs share a processor where both fit its 65,536 registers and 227 KiB of shared memory.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from _measure import markdown, section, show
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sslcells.losses import triton_engine

KERNELS = ["sums", "rows", "hardest"]
CAPABILITY = 90
ROOM = 203 * 2**10
"""bytes for rows: an H100's or H200's shared memory of a program, less what the engine leaves to Triton"""
ELEMENTS = {"bf16": "*bf16", "fp16": "*fp16", "tf32": "*fp32", "fp32": "*fp32", "exact": "*fp16"}
COLUMNS = ["kernel", "precision", "width", "rows × columns", "warps", "stages", "registers", "spilled bytes"]
COLUMNS += ["shared KiB", "programs a processor", "serialised"]


class Compiled(NamedTuple):
    """What ptxas and Triton say of one kernel."""

    registers: int
    """of a thread"""
    spilled: int
    """bytes of a thread, stored and loaded"""
    shared: int
    """bytes of a program"""
    serialised: bool

    def together(self, warps: int) -> int:
        """Programs that fit a processor at once."""
        return min(65_536 // (self.registers * 32 * warps), 227 * 2**10 // (self.shared + 2**10))


def kernel(name: str, precision: str, low: bool, figures: bool) -> tuple[Any, dict[str, str | None], dict[str, Any]]:
    """(kernel, types of its arrays, constants) of NT-Xent's partners, or of mining by ids."""
    rows = ELEMENTS[precision]
    if name == "sums":
        largest = "*fp32" if figures or low else None
        arrays = {"rows": rows, "partner": "*i64", "out": "*fp32", "out_largest": largest}
        return triton_engine._row_sums_kernel, arrays, {"LOW": low}
    if name == "rows":
        shift = "*fp32" if low else None
        arrays = {"rows": rows, "weight": "*fp32", "shift": shift, "partner": "*i64", "out": "*fp32"}
        return triton_engine._weighted_rows_kernel, arrays, {}
    lows = rows if precision == "exact" else None
    arrays = {"highs": rows, "lows": lows, "positive": "*i32", "value": "*fp32", "index": "*i32"}
    return triton_engine._hardest_kernel, arrays, {}


def compiled(
    name: str, precision: str, width: int, tiling: Any, *, low: bool = False, figures: bool = True
) -> Compiled:
    """Compile a kernel for Hopper with these tiles."""
    function, arrays, constants = kernel(name, precision, low, figures)
    constants |= {"WIDTH": width, "ROWS": tiling.rows, "COLUMNS": tiling.columns}
    constants |= {"DOT": "tf32" if precision == "tf32" else "ieee"}
    numbers = {"offset": "i32", "count": "i32", "total": "i32", "span": "i32", "scale": "fp32"}
    types = {name: arrays.get(name) or numbers.get(name) or "constexpr" for name in function.arg_names}
    at = {name: (i,) for i, name in enumerate(function.arg_names)}
    fixed = {at[name]: constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    aligned = {at[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "maxnreg": tiling.registers}
    source = ASTSource(function, types, fixed, aligned)
    target = GPUTarget("cuda", CAPABILITY, 32)
    made = triton.compile(source, target, {key: value for key, value in options.items() if value is not None})
    said = assembled(made.asm["ptx"])
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None, said
    assert spilled is not None, said
    return Compiled(int(registers[1]), sum(map(int, spilled.groups())), made.metadata.shared, "C7512" in said)


def assembled(ptx: str) -> str:
    """What ptxas prints of a program."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        ptxas = triton.knobs.nvidia.ptxas.path
        command = [ptxas, "-v", f"--gpu-name=sm_{CAPABILITY}a", str(file), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def line(name: str, precision: str, width: int, tiling: Any, low: bool, figures: bool) -> list[str]:
    """A row of the table."""
    start = [name + (", low τ" if low else "") + ("" if figures else ", no figures"), precision, str(width)]
    start += [f"{tiling.rows} × {tiling.columns}", str(tiling.warps), str(tiling.stages)]
    try:
        found = compiled(name, precision, width, tiling, low=low, figures=figures)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        return [*start, f"failed: {type(error).__name__}", *[""] * 4]
    counts = [found.registers, found.spilled, f"{found.shared / 2**10:.0f}", found.together(tiling.warps)]
    return [*start, *map(str, counts), "yes" if found.serialised else ""]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "tf32", "exact"], choices=list(ELEMENTS))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="powers of two")
    parser.add_argument("--low", action="store_true", help="as at a temperature below 0.025")
    parser.add_argument("--no-figures", action="store_true", help="sums without the largest summands")
    for name in ("rows", "columns", "warps", "stages", "registers"):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", help="in place of the engine's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the section to this file")
    return parser.parse_args()


def main() -> None:
    """Compile, and print the table."""
    args = arguments()
    lines = []
    for name, precision, width in itertools.product(args.kernels, args.precisions, args.widths):
        if (precision == "exact") != (name == "hardest"):
            continue
        usual = triton_engine._tiling(name, width, precision, ROOM)
        changes = [getattr(args, field) or [getattr(usual, field)] for field in usual._fields]
        for values in itertools.product(*changes):
            lines.append(line(name, precision, width, type(usual)(*values), args.low, not args.no_figures))
            print(" ".join(lines[-1]), flush=True)
    text = section(
        "Kernels compiled for Hopper",
        "cpu",
        f"By Triton {triton.__version__} for compute capability 9.0, without a GPU; partners left out, no ids.",
        [markdown(COLUMNS, lines)],
    )
    show(text, args.out)


if __name__ == "__main__":
    main()
