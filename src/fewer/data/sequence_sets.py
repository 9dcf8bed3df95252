"""Real biological sequences: peptides with and without antimicrobial effect, what stands before the fly's genes, a bacterium's genome."""

from __future__ import annotations

import gzip
import re
from typing import NamedTuple

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import obtain

PEPTIDES = DataSet(
    "peptides",
    title="Peptides: 2,600 antimicrobial ones and 2,600 other pieces of proteins",
    licence="BSD-3-Clause (modlAMP)",
    citation="Mueller et al. 2017, modlAMP: Python for antimicrobial peptides",
    files=(
        File(
            "AMPvsUniProt.csv",
            "e1db3dd659179118dcfca63723385f2f0c95c49d27060a90f7a9d5848250eb48",
            191_952,
            (Source("installed", "modlamp", "data/AMPvsUniProt.csv"), Source("pip", "modlamp==4.3.3", "modlamp/data/AMPvsUniProt.csv")),
        ),
    ),
)
PROMOTERS = DataSet(
    "fly-promoters",
    title="Fruit-fly promoters: the 2,000 bases upstream of 26,454 transcripts (dm3)",
    licence="Artistic-2.0 (Biostrings)",
    citation="Pages et al., Biostrings: efficient manipulation of biological strings",
    files=(
        File(
            "dm3_upstream2000.fa.gz",
            "78076ae22e0084cfb4d6775b000ed9d8fadcefe2469aacce76b78f5a427a08f4",
            11_525_633,
            (Source("apt", "r-bioc-biostrings", "usr/lib/R/site-library/Biostrings/extdata/dm3_upstream2000.fa.gz"),),
        ),
    ),
)
E_COLI = DataSet(
    "e-coli",
    title="Escherichia coli 536: the complete genome, 4,938,920 bases",
    licence="Artistic-2.0 (bowtie-examples); the sequence is GenBank's NC_008253",
    citation="Langmead et al. 2009, Bowtie: ultrafast and memory-efficient alignment of short DNA sequences",
    files=(
        File(
            "NC_008253.fna.gz",
            "b5f5e726fa79caeeb12c19f3697faf7af437f57daf4195419056d639fb36a334",
            1_476_523,
            (Source("apt", "bowtie-examples", "usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz"),),
        ),
    ),
)
SETS = (PEPTIDES, PROMOTERS, E_COLI)


class Promoter(NamedTuple):
    chromosome: str
    strand: str  # "f" or "r"
    sequence: str  # upper case; ends before the start site


def load_peptides() -> list[tuple[str, int]]:
    """(sequence, 1 where it is antimicrobial), each sequence once, in the file's order.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    rows: dict[str, int] = {}
    for line in obtain(PEPTIDES)["AMPvsUniProt.csv"].read_text("utf8").splitlines()[1:]:  # the first line counts
        sequence, label = line.split(",")
        rows.setdefault(sequence.strip(), int(label))
    return list(rows.items())


def load_promoters() -> list[Promoter]:
    """Each upstream region with its chromosome and strand; letters that are none of ACGT are N.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    with gzip.open(obtain(PROMOTERS)["dm3_upstream2000.fa.gz"], "rt", encoding="utf8") as file:
        records = file.read().split(">")[1:]
    found = []
    for record in records:
        head, _, body = record.partition("\n")
        place = re.search(r"_up_2000_(chr\w+?)_-?\d+_([fr]) ", head)
        assert place is not None, head
        found.append(Promoter(place[1], place[2], body.replace("\n", "").upper()))
    return found


def load_e_coli() -> str:
    """The genome as one string of A, C, G and T.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    with gzip.open(obtain(E_COLI)["NC_008253.fna.gz"], "rt", encoding="ascii") as file:
        return "".join(line.strip() for line in file if not line.startswith(">")).upper()
