"""The verbs `fewer train-local` and `fewer predict-local`: arrays in, a model or predictions out."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from fewer.forward_only.backprop_free_mlps.training import Epoch


def train_local(
    train: Annotated[Path, typer.Argument(help="An .npz file with the arrays `x` [N, ...] and `y` [N].")],
    out: Annotated[Path, typer.Option(help="The folder to write the model into.")],
    method: Annotated[
        str, typer.Option(help="mono-forward, forward-forward, cascaded-forward, or backpropagation to compare with.")
    ] = "mono-forward",
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers.")] = "1000,1000",
    channels: Annotated[str, typer.Option(help="Channels of the blocks of cascaded-forward.")] = "32,128,512",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the method's own by default.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data at most (for each layer in turn); the method's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the initial weights, the order, and the tenth of the rows kept for validation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that stands in the folder.")] = False,
) -> None:
    """Train a network layer by layer, without backpropagation, on the arrays of a file.

    Writes the weights (safetensors) and config.json. A tenth of the rows is kept for early stopping.

    Example: fewer train-local train.npz --method mono-forward --hidden 1000,1000 --out model
    """
    from fewer.forward_only.backprop_free_mlps.classifier import METHODS, LocalLearningClassifier
    from fewer.forward_only.backprop_free_mlps.model_files import check_writable, save_model
    from fewer.forward_only.backprop_free_mlps.training import check_choice

    check_choice("--method", method, list(METHODS))
    check_writable(out, overwrite=overwrite)
    arrays = read_arrays(train, ["x", "y"])
    x, y = _features(arrays["x"], train), _labels(arrays["y"], train)
    classifier = LocalLearningClassifier(
        method,  # pyright: ignore[reportArgumentType] - checked above
        hidden_sizes=_sizes("--hidden", hidden),
        channels=_sizes("--channels", channels),
        image_shape=_image_shape(x, train) if method == "cascaded-forward" else None,
        lr=lr,
        epochs=epochs,
        device=device,
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
    import numpy as np

    from fewer.forward_only.backprop_free_mlps.model_files import load_model

    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; expected a new file: choose another, or --overwrite")
    arrays = read_arrays(test, ["x"])
    x = _features(arrays["x"], test)
    classifier = load_model(folder)
    predicted = classifier.predict(x.reshape(len(x), -1))
    result: dict[str, Any] = {"rows": len(x)}
    if "y" in arrays:
        y = _labels(arrays["y"], test)
        if y.shape != (len(x),):
            raise ValueError(f"{test}: y is {y.shape} for {len(x)} rows of x; expected ({len(x)},): one label a row")
        result["accuracy"] = float(np.mean(predicted == y))
    if out is not None:
        _write(out, predicted)
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


def read_arrays(file: Path, needed: list[str]) -> dict[str, np.ndarray]:
    """The arrays x and y of an .npz file, never unpickled; ValueError or FileNotFoundError where they cannot be had."""
    import numpy as np

    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; expected an .npz file with the arrays {' and '.join(needed)}")
    try:
        with np.load(file, allow_pickle=False) as opened:
            names = list(opened.files)
            arrays = {name: opened[name] for name in ("x", "y") if name in names}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{file} cannot be read as an .npz file of plain arrays ({why}); write it with numpy.savez(file, x=..., y=...), no array of objects"
        ) from error
    for name in needed:
        if name not in arrays:
            raise ValueError(
                f"{file} has no array {name!r} (it has {', '.join(names) or 'none'}); write it with numpy.savez(file, x=..., y=...)"
            )
    return arrays


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
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ValueError(f"{option} is {words!r}; expected whole numbers with commas between, such as 1000,1000") from None


def _image_shape(x: np.ndarray, file: Path) -> tuple[int, int, int]:
    """(channels, height, width) of the images [N, H, W] or [N, C, H, W]."""
    if x.ndim not in (3, 4):
        raise ValueError(f"{file}: x is {x.shape}; cascaded-forward expects images [N, H, W] or [N, C, H, W]: reshape it")
    channels, height, width = (1, *x.shape[1:]) if x.ndim == 3 else x.shape[1:]
    return channels, height, width


def _write(out: Path, predicted: np.ndarray) -> None:
    """Write the predictions; the file appears whole or not at all."""
    import numpy as np

    handle, unfinished = tempfile.mkstemp(dir=out.absolute().parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, y=predicted)
        os.replace(unfinished, out)
    except BaseException:
        os.unlink(unfinished)
        raise
