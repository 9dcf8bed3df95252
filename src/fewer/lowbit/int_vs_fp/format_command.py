"""The verb `fewer formats`: what the formats of few bits are, what they lose on files and models, packing and unpacking."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from fewer.lowbit.int_vs_fp.model.capture import ModelReport

app = typer.Typer(help="Formats of few bits: list, show, error, pack, unpack, model.")

FILE = Annotated[Path, typer.Argument(help="A safetensors file.")]
NEW_FILE = Annotated[Path, typer.Argument(help="The safetensors file to write.")]
FORMATS_OPTION = Annotated[str, typer.Option("--formats", help="Names of formats, with commas between them.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ABOUT = "fewer.packed"  # the key of a packed file's header: which tensors are packed, and their dtypes
WIDTH = 24  # of a bar
MANY = 10**6


@app.callback(invoke_without_command=True)
def formats(context: typer.Context, as_json: JSON = False) -> None:
    """Formats of few bits: what they are, what they lose on tensors and models, packing. Without an action: list them.

    Example: fewer formats
    """
    if context.invoked_subcommand is None:
        list_formats(as_json)


@app.command("list")
def list_formats(as_json: JSON = False) -> None:
    """All block formats: element, values a block, scales, bits a value; and the element formats.

    Example: fewer formats list
    """
    from fewer.lowbit import ELEMENTS, FORMATS

    if as_json:
        print(json.dumps({name: _about(name) for name in FORMATS} | {name: {"bits": each.bits} for name, each in ELEMENTS.items()}))
        return
    print(f"{'block format':14}{'element':10}{'block':>7}  {'scale':6}{'bits a value':>13}")
    for name, fmt in FORMATS.items():
        block = {-1: "row", None: "tensor"}.get(fmt.block, str(fmt.block))
        print(
            f"{name:14}{fmt.element:10}{block:>7}  {fmt.scale:6}{fmt.bits_per_value:13.2f}{' + a tensor scale' if fmt.tensor_scale else ''}"
        )
    print(f"\n{'element':18}{'bits':>5}{'largest':>13}{'smallest':>13}")
    for name, each in ELEMENTS.items():
        print(f"{name:18}{each.bits:5}{each.max:13.6g}{each.min_subnormal:13.6g}")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A block format or an element format.")], as_json: JSON = False) -> None:
    """All values of a format, by code.

    Example: fewer formats show mxfp4
    """
    from fewer.checks import check_choice
    from fewer.lowbit import ELEMENTS, FORMATS

    check_choice([*FORMATS, *ELEMENTS], name=name)
    about = _about(name) if name in FORMATS else {}
    element = ELEMENTS[FORMATS[name].element if name in FORMATS else name]
    values = element.values.tolist()
    if as_json:
        print(json.dumps(about | {"element": element.name, "values": [value if math.isfinite(value) else str(value) for value in values]}))
        return
    for word, value in about.items():
        print(f"{word}: {value}")
    print(f"{element.name}: {element.bits} bits, largest {element.max:g}, smallest {element.min_subnormal:g}")
    digits = -(-element.bits // 4)
    cells = [f"{code:0{digits}X} {value:g}" for code, value in enumerate(values)]
    width = max(map(len, cells)) + 2
    across = 8 if element.bits > 4 else 4
    for start in range(0, len(cells), across):
        print("".join(cell.ljust(width) for cell in cells[start : start + across]).rstrip())


@app.command("error")
def error(
    file: FILE,
    chosen: FORMATS_OPTION = "mxfp4,nvfp4,nvint4,mxint8",
    rotate: Annotated[int, typer.Option(min=0, max=MANY, help="Turn rows by a Hadamard matrix of this size first; 0: not.")] = 0,
    as_json: JSON = False,
) -> None:
    """What each format loses on each tensor of a file: signal over noise, bytes, and the share beyond the largest code.

    Blocks lie along the last dimension. A tensor whose last dimension the rotation does not divide is cast as it is.

    Example: fewer formats error model.safetensors --formats mxfp4,nvint4 --rotate 32
    """
    from fewer.lowbit import fake_quantize, hadamard, qsnr, saturation

    names = _names(chosen)
    if rotate & (rotate - 1):
        raise ValueError(f"--rotate {rotate}; expected a power of two, such as 32, or 0")
    told: dict[str, dict[str, dict[str, float]]] = {}
    for name, x in _float_tensors(file):
        turned = hadamard(x, rotate) if rotate and x.shape[-1] % rotate == 0 else x
        found = {}
        for fmt in names:
            found[fmt] = {
                "qsnr": qsnr(turned, fake_quantize(turned, fmt)),
                "bytes": _bytes(fmt, x),
                "saturation": saturation(turned, fmt),
            }
        told[name] = found
        if not as_json:
            words = "  ".join(
                f"{fmt} {each['qsnr']:6.2f} dB {each['bytes']:,.0f} B {each['saturation']:.2%}" for fmt, each in found.items()
            )
            print(f"{name} {list(x.shape)}  {words}", flush=True)
    if as_json:
        print(json.dumps({name: {fmt: _plain(each) for fmt, each in found.items()} for name, found in told.items()}))


@app.command("pack")
def pack(
    source: FILE,
    out: NEW_FILE,
    fmt: Annotated[str, typer.Option("--format", help="The block format.")],
    overwrite: OVERWRITE = False,
) -> None:
    """Pack the matrices of a safetensors file (blocks along the last dimension); vectors, integers and numbers of 8 bits are kept.

    Example: fewer formats pack model.safetensors small.safetensors --format nvfp4
    """
    from safetensors.torch import save_file

    from fewer.files import check_new_file, whole_file
    from fewer.lowbit import quantize
    from fewer.lowbit._shared.blocks import block_format

    block_format(fmt)
    check_new_file(out, overwrite, inputs=[source], option="OUT")
    tensors, metadata = _read(source)
    if ABOUT in metadata:
        raise ValueError(f"{source} is packed already; expected a file of plain tensors: unpack it first")
    packed = {name: x for name, x in tensors.items() if x.is_floating_point() and x.dtype.itemsize > 1 and x.ndim >= 2 and x.numel()}
    kept = {name: x for name, x in tensors.items() if name not in packed}
    written = dict(kept)
    for name, x in packed.items():
        written |= {f"{name}.{part}": each.contiguous() for part, each in quantize(x, fmt).to_dict().items()}
    if len(written) != len(kept) + sum(4 if f"{name}.tensor_scale" in written else 3 for name in packed):
        raise ValueError(
            f"{source} has tensors whose names end like a packed tensor's parts (.codes, .scales); expected others: rename them"
        )
    about = {name: str(x.dtype).removeprefix("torch.") for name, x in packed.items()}
    with whole_file(out, overwrite, inputs=[source], option="OUT") as part:
        save_file(written, part, metadata=metadata | {ABOUT: json.dumps(about)})
    before, after = (sum(x.numel() * x.element_size() for x in each.values()) for each in (tensors, written))
    print(f"{len(packed)} of {len(tensors)} tensors packed: {after:,} bytes of {before:,} ({after / max(1, before):.1%}), written to {out}")


@app.command("unpack")
def unpack(source: FILE, out: NEW_FILE, overwrite: OVERWRITE = False) -> None:
    """Undo `pack`: tensors of their first dtypes, with the values that the format holds.

    Example: fewer formats unpack small.safetensors model.safetensors
    """
    from safetensors.torch import save_file

    from fewer.files import check_new_file, whole_file
    from fewer.lowbit import QuantizedTensor
    from fewer.lowbit._shared import formats as elements

    check_new_file(out, overwrite, inputs=[source], option="OUT")
    tensors, metadata = _read(source)
    dtypes_of = {str(dtype).removeprefix("torch."): dtype for dtype in elements.FLOATS}
    try:
        dtypes = json.loads(metadata.pop(ABOUT))
        plain = {name: dtypes_of[dtype] for name, dtype in dtypes.items()}
    except (KeyError, ValueError, AttributeError, TypeError) as trouble:
        raise ValueError(f"{source} is no packed file; expected what `fewer formats pack` writes") from trouble
    made = {}
    for name, dtype in plain.items():
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in ("codes", "scales", "about", "tensor_scale")}
        made[name] = QuantizedTensor.from_dict({part: x for part, x in parts.items() if x is not None}).dequantize(dtype)
    with whole_file(out, overwrite, inputs=[source], option="OUT") as part:
        save_file(tensors | made, part, metadata=metadata)
    print(f"{len(made)} tensors unpacked, {len(tensors)} kept, written to {out}")


@app.command("model")
def model(
    model_dir: Annotated[Path, typer.Argument(help="A transformers model directory with its tokenizer.")],
    text: Annotated[list[Path] | None, typer.Option("--text", help="UTF-8 text to read; by default State of the Union addresses.")] = None,
    pairs: Annotated[str, typer.Option(help="Which pairs of formats: mx8, mx6, mx4, nv4, with commas between them.")] = "mx8,mx4,nv4",
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens to read.")] = 256,
    rotate: Annotated[bool, typer.Option("--rotate", help="Turn operands by a Hadamard matrix of the block's size first.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws the window.")] = 0,
    as_json: JSON = False,
) -> None:
    """Layer by layer: the crest factor of inputs and weights, and which format of each pair keeps more of them, with a chart.

    Bars show how many dB the better format is ahead: to the right the integer one, to the left the other.

    Example: fewer formats model ./model --text notes.txt
    """
    from fewer.checks import check_choice
    from fewer.lowbit.int_vs_fp.model.capture import analyse_model
    from fewer.lowbit.int_vs_fp.problems import model_and_text
    from fewer.lowbit.int_vs_fp.theory import PAIRS

    wanted = [pair for pair in pairs.split(",") if pair]
    for pair in wanted:
        check_choice(list(PAIRS), pair=pair)
    if not wanted:
        raise ValueError("--pairs is empty; expected one or more of mx8, mx6, mx4, nv4")
    given = model_and_text(str(model_dir), [str(file) for file in text or []], window=window)
    names = [name for pair in wanted for name in PAIRS[pair]]
    batches = given.windows(seed)
    report = analyse_model(given.model(), batches, names, "block" if rotate else None, backward=False)
    if as_json:
        layers = {name: _layer(report.of_layer(name), names) for name in report.layers}
        print(json.dumps({"layers": layers, "recommended": report.recommended}))
        return
    for line in layer_lines(report, wanted):
        print(line)


def layer_lines(report: ModelReport, pairs: list[str]) -> Iterator[str]:
    """A table with a bar a layer for each pair."""
    from fewer.lowbit.int_vs_fp.theory import PAIRS

    wide = max(map(len, report.layers))
    first = PAIRS[pairs[0]][0]
    yield f"{'layer':{wide}}  crest  " + "  ".join(
        f"{'better':10} {PAIRS[pair][1]} < > {PAIRS[pair][0]}".ljust(WIDTH + 12) for pair in pairs
    )
    advantages = {name: {pair: _advantage(report.of_layer(name), pair) for pair in pairs} for name in report.layers}
    most = {pair: max(abs(each[pair]) for each in advantages.values()) or 1.0 for pair in pairs}
    for name in report.layers:
        cells = []
        for pair in pairs:
            ahead = advantages[name][pair]
            better = PAIRS[pair][0 if ahead > 0 else 1]
            cells.append(f"{better:10} {bar(ahead / most[pair])} {ahead:+6.2f}")
        yield f"{name:{wide}}  {report.of_layer(name).mean_kappa(first, ('X', 'W')):5.2f}  " + "  ".join(cells)
    for pair in pairs:
        best = [own[pair] for own in report.recommended.values()]
        integer, floating = PAIRS[pair]
        yield f"{integer} suits {best.count(integer)} of {len(best)} layers, {floating} the others"


def bar(share: float) -> str:
    """A bar from the middle, to the right for positive shares of the whole.

    >>> bar(0.5), bar(-1.0)
    ('            |██████      ', '████████████|            ')
    """
    half = WIDTH // 2
    length = 0 if math.isnan(share) else min(half, round(abs(share) * half))
    filled = "█" * length
    return f"{filled if share < 0 else '':>{half}}|{filled if share > 0 else '':{half}}"


def _advantage(own: ModelReport, pair: str) -> float:
    from fewer.lowbit.int_vs_fp.theory import PAIRS

    ours, theirs = (own.mean_qsnr(fmt, ("X", "W")) for fmt in PAIRS[pair])
    return ours - theirs


def _layer(own: ModelReport, names: list[str]) -> dict[str, Any]:
    return {fmt: _plain({"crest": own.mean_kappa(fmt), "qsnr": own.mean_qsnr(fmt)}) for fmt in names}


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    """NaN and inf as null, which JSON has."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _about(name: str) -> dict[str, Any]:
    from fewer.lowbit import FORMATS

    fmt = FORMATS[name]
    return {
        "element": fmt.element,
        "block": {-1: "row", None: "tensor"}.get(fmt.block, fmt.block),
        "scale": fmt.scale + (" under a float32 tensor scale" if fmt.tensor_scale else ""),
        "bits a value": fmt.bits_per_value,
    }


def _names(chosen: str) -> list[str]:
    from fewer.checks import check_choice
    from fewer.lowbit import FORMATS

    names = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in names:
        check_choice(list(FORMATS), **{"--formats": name})
    if not names:
        raise ValueError(f"--formats is empty; expected one or more of {', '.join(FORMATS)}")
    return names


def _float_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    tensors, _ = _read(file)
    there = False
    for name, x in sorted(tensors.items()):
        if x.is_floating_point() and x.dtype.itemsize > 1 and x.ndim and x.numel():
            there = True
            yield name, x
    if not there:
        raise ValueError(f"{file} has no tensor of floating point numbers; expected one or more")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's words of a safetensors file."""
    from safetensors import safe_open

    from fewer.files import read_weights

    tensors = read_weights(file)
    with safe_open(file, framework="pt") as opened:
        return tensors, dict(opened.metadata() or {})


def _bytes(fmt: str, x: Tensor) -> int:
    from fewer.lowbit import FORMATS
    from fewer.lowbit._shared.block_formats import SCALES

    kind = FORMATS[fmt]
    rows = x.numel() // x.shape[-1]
    blocks = 1 if kind.block is None else rows if kind.block == -1 else rows * -(-x.shape[-1] // kind.block)
    return -(-x.numel() * kind.elements.bits // 8) + blocks * SCALES[kind.scale] // 8 + (4 if kind.tensor_scale else 0)
