from .catalogue import Found, fetch, find, sets, verify
from .declarations import DataSet, File
from .graph_sets import CitationGraph, load_citeseer, load_cora
from .image_sets import Images, load_cifar10, load_digits, load_fashion_mnist, load_mnist

__all__ = [
    "CitationGraph", "DataSet", "File", "Found", "Images", "fetch", "find", "load_cifar10", "load_citeseer", "load_cora", "load_digits",
    "load_fashion_mnist", "load_mnist", "sets", "verify",
]  # fmt: skip
