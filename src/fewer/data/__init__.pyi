from .catalogue import Found, fetch, find, sets, verify
from .declarations import DataSet, File
from .graph_sets import CitationGraph, load_citeseer, load_cora
from .image_sets import Images, load_cifar10, load_digits, load_fashion_mnist, load_mnist
from .made_once import WEIGHTS, folder_of, made_once
from .pretrained import fetch_smollm2
from .text_sets import load_state_of_the_union

__all__ = [
    "WEIGHTS", "CitationGraph", "DataSet", "File", "Found", "Images", "fetch", "fetch_smollm2", "find", "folder_of", "load_cifar10",
    "load_citeseer", "load_cora", "load_digits", "load_fashion_mnist", "load_mnist", "load_state_of_the_union", "made_once", "sets", "verify",
]  # fmt: skip
