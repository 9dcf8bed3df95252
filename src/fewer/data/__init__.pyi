from .catalogue import Found, fetch, find, sets, verify
from .declarations import DataSet, File
from .graph_sets import CitationGraph, load_citeseer, load_cora
from .image_sets import Images, load_cifar10, load_digits, load_fashion_mnist, load_mnist
from .pretrained import fetch_smollm2
from .text_sets import load_state_of_the_union

__all__ = [
    "CitationGraph", "DataSet", "File", "Found", "Images", "fetch", "fetch_smollm2", "find", "load_cifar10", "load_citeseer", "load_cora", "load_digits",
    "load_fashion_mnist", "load_mnist", "load_state_of_the_union", "sets", "verify",
]  # fmt: skip
