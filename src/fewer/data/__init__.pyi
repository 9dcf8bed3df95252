from .catalogue import Found, fetch, find, sets, verify
from .declarations import DataSet, File
from .graph_sets import CitationGraph, load_citeseer, load_cora
from .image_sets import Images, load_cifar10, load_digits, load_fashion_mnist, load_mnist
from .made_once import WEIGHTS, folder_of, made_once, measured_once
from .motion_sets import load_handwriting
from .operator_sets import Fields, load_burgers, load_darcy
from .pretrained import fetch_smollm2
from .sequence_sets import Promoter, load_e_coli, load_peptides, load_promoters
from .text_sets import load_state_of_the_union
from .video_sets import load_clips

__all__ = [
    "WEIGHTS", "CitationGraph", "DataSet", "Fields", "File", "Found", "Images", "Promoter", "fetch", "fetch_smollm2", "find",
    "folder_of", "load_burgers", "load_cifar10", "load_citeseer", "load_clips", "load_cora", "load_darcy", "load_digits", "load_e_coli",
    "load_fashion_mnist", "load_handwriting", "load_mnist", "load_peptides", "load_promoters", "load_state_of_the_union", "made_once", "measured_once",
    "sets", "verify",
]  # fmt: skip
