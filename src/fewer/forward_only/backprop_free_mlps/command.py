"""The verbs `fewer train-local` and `fewer predict-local`: arrays in, a model or predictions out."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewer.devices import Device, choose_device

if TYPE_CHECKING:
    import numpy as np

    from fewer.fitting import Epoch

MANY, WIDEST = 10**9, 10**6
KEPT = 4  # copies of the weights that training holds: with their gradients and two averages of these


class MethodName(StrEnum):
    """The choices of `--method`."""

    mono_forward = "mono-forward"
    forward_forward = "forward-forward"
    cascaded_forward = "cascaded-forward"
    backpropagation = "backpropagation"


def train_local(
    train: Annotated[Path, typer.Argument(help="An .npz file with the arrays `x` [N, ...] and `y` [N].")],
    out: Annotated[Path, typer.Option(help="The folder to write the model into.")],
    method: Annotated[MethodName, typer.Option(help="How to train; backpropagation to compare with.")] = MethodName.mono_forward,
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers, with commas between.")] = "1000,1000",
    channels: Annotated[str, typer.Option(help="Channels of the blocks of cascaded-forward, with commas between.")] = "32,128,512",
    lr: Annotated[float | None, typer.Option(min=1e-9, max=10, help="Learning rate; the method's own by default.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Passes over the data at most (for each layer in turn); the method's own.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seeds the initial weights, the order, and the tenth of the rows kept for validation.")
    ] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")] = Device.cpu,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into the folder before.")] = False,
) -> None:
    """Train a network layer by layer, without backpropagation, on the arrays of a file.

    Writes the weights (safetensors) and config.json. A tenth of the rows is kept for early stopping.

    Example: fewer train-local train.npz --method mono-forward --hidden 1000,1000 --out model
    """
    from fewer.checks import check_choice, check_positive
    from fewer.files import check_new
    from fewer.inputs import read_arrays

    check_choice(list(MethodName), **{"--method": method})
    if lr is not None:
        check_positive(**{"--lr": lr})
    widths, blocks, place = _sizes("--hidden", hidden), _sizes("--channels", channels), choose_device(device)
    check_new(out, overwrite, inputs=[train])
    arrays = read_arrays(train, ["x", "y"])
    x, y = _features(arrays["x"], train), _labels(arrays["y"], train)
    images = _image_shape(x, train) if method == MethodName.cascaded_forward else None
    _check_memory(x, widths if images is None else blocks, images)
    from fewer.forward_only.backprop_free_mlps.estimator.classifier import LocalLearningClassifier
    from fewer.forward_only.backprop_free_mlps.estimator.saved_form import save_model

    classifier = LocalLearningClassifier(
        MethodName(method).value,
        hidden_sizes=widths,
        channels=blocks,
        image_shape=images,
        lr=lr,
        epochs=epochs,
        device=place,
        random_state=seed,
    )
    with Progress() as progress:
        classifier.fit(x.reshape(len(x), -1), y, callbacks=[progress.show])
    save_model(classifier, out, overwrite=overwrite)
    history = classifier.history_
    for note in history.notes:
        print(f"note: {note}")
    shown = [line for line in history.epochs if line.stage == history.epochs[-1].stage]
    kept = shown[history.best[shown[-1].stage] - 1]
    print(f"{method}: {100 * kept.validation_accuracy:.1f} % of the validation rows right ({kept.stage}), after {history.seconds:.1f} s")
    print(f"written to {out}")


def predict_local(
    folder: Annotated[Path, typer.Argument(help="A folder that `fewer train-local` wrote.")],
    test: Annotated[Path, typer.Argument(help="An .npz file with the array `x`, and `y` where it is known.")],
    out: Annotated[Path | None, typer.Option(help="An .npz file to write the predictions into, as the array `y`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of predictions.")] = False,
) -> None:
    """Predict with a network that train-local wrote, and say how many are right where the file has `y`.

    Example: fewer predict-local model test.npz --out predictions.npz
    """
    from fewer.files import check_new_file, whole_file
    from fewer.inputs import read_arrays

    inputs = [test, folder]
    if out is not None:
        check_new_file(out, overwrite, inputs=inputs)
    arrays = read_arrays(test, ["x"], ["y"])
    x = _features(arrays["x"], test)
    y = _labels(arrays["y"], test) if "y" in arrays else None
    if y is not None and y.shape != (len(x),):
        raise ValueError(f"{test}: y is {y.shape} for {len(x)} rows of x; expected ({len(x)},): one label a row")
    import numpy as np

    from fewer.forward_only.backprop_free_mlps.estimator.saved_form import load_model

    predicted = load_model(folder).predict(x.reshape(len(x), -1))
    result: dict[str, Any] = {"rows": len(x)}
    if y is not None:
        result["accuracy"] = float(np.mean(predicted == y))
    if out is not None:
        with whole_file(out, overwrite, inputs=inputs) as part, part.open("wb") as file:
            np.savez(file, y=predicted)
        result["out"] = str(out)
    if as_json:
        print(json.dumps(result if out is not None else result | {"predictions": predicted.tolist()}))
        return
    if "accuracy" in result:
        print(f"{100 * result['accuracy']:.2f} % of {len(x)} rows right")
    if out is not None:
        print(f"written to {out}")
    elif "accuracy" not in result:
        print(*predicted.tolist(), sep="\n")


COMMANDS = {"train-local": train_local, "predict-local": predict_local}


class Progress:
    """A line about each epoch: on a terminal one that moves, elsewhere one for each stage; all on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bars
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, disable=not console.is_terminal
        )
        self._task = self._bars.add_task("beginning", total=None)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, line: Epoch) -> None:
        """Take in an epoch."""
        told = f"{line.stage}, epoch {line.epoch}: loss {line.train_loss:.4f}"
        if line.validation_accuracy == line.validation_accuracy:  # not nan
            told += f", {100 * line.validation_accuracy:.1f} % of the validation rows right"
        self._bars.update(self._task, description=told)
        if self._bars.disable:
            self._bars.console.print(told, soft_wrap=True)


def _features(x: np.ndarray, file: Path) -> np.ndarray:
    if x.ndim < 2 or x.dtype.kind not in "fiub" or len(x) == 0:
        raise ValueError(f"{file}: x is {x.shape} {x.dtype}; expected numbers [N, ...] with N >= 1: one row an example")
    return x.astype("float32") if x.dtype.kind != "f" else x


def _labels(y: np.ndarray, file: Path) -> np.ndarray:
    if y.dtype.kind not in "iubU":
        raise ValueError(f"{file}: y is {y.dtype}; expected integers, booleans or strings: one class an example")
    return y


def _sizes(option: str, words: str) -> tuple[int, ...]:
    """The numbers of "1000,1000"."""
    wanted = f"expected whole numbers from 1 to {WIDEST:,} with commas between, such as 1000,1000"
    if len(words) > 1000:
        raise ValueError(f"{option} has {len(words)} characters; {wanted}")
    try:
        sizes = tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ValueError(f"{option} is {words!r}; {wanted}") from None
    if not all(1 <= size <= WIDEST for size in sizes):
        raise ValueError(f"{option} is {words!r}; {wanted}")
    return sizes


def _check_memory(x: np.ndarray, sizes: tuple[int, ...], images: tuple[int, int, int] | None) -> None:
    """ValueError where the network's weights, or the features of images that it keeps, are more than the memory that is free."""
    import psutil

    features, step = (x[0].size, 1) if images is None else (images[0], 9)
    numbers = KEPT * step * sum(into * out for into, out in zip((features, *sizes), sizes, strict=False))
    if images is not None:
        numbers += max(len(x) * out * (images[1] >> place) * (images[2] >> place) for place, out in enumerate(sizes))
    needed, free = 4 * numbers, psutil.virtual_memory().available
    if needed > free:
        option = "--hidden" if images is None else "--channels"
        raise ValueError(
            f"{option} {','.join(map(str, sizes))} takes {needed / 1e9:,.1f} GB for {len(x)} rows of {x[0].size} numbers, but {free / 1e9:,.1f} GB "
            "are free; expected a network that fits: take smaller numbers"
        )


def _image_shape(x: np.ndarray, file: Path) -> tuple[int, int, int]:
    """(channels, height, width) of the images [N, H, W] or [N, C, H, W]."""
    if x.ndim not in (3, 4):
        raise ValueError(f"{file}: x is {x.shape}; cascaded-forward expects images [N, H, W] or [N, C, H, W]: reshape it")
    channels, height, width = (1, *x.shape[1:]) if x.ndim == 3 else x.shape[1:]
    return channels, height, width
