from .catalogue import Found, fetch, find, sets, verify
from .declarations import DataSet, File
from .image_sets import Images, load_cifar10, load_digits, load_fashion_mnist, load_mnist

__all__ = [
    "DataSet", "File", "Found", "Images", "fetch", "find", "load_cifar10", "load_digits", "load_fashion_mnist", "load_mnist", "sets", "verify",
]  # fmt: skip
