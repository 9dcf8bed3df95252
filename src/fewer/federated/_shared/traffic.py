"""Bytes that travel: counted on the serialised records of Flower's messages, beside the ideal 4 bytes a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto

BYTES_A_NUMBER = 4  # float32


def record_bytes(record: RecordDict) -> int:
    """The length of a message's content as a protobuf, in bytes.

    Examples:
        >>> from flwr.app import MetricRecord
        >>> record_bytes(RecordDict({"metrics": MetricRecord({"loss": 0.5})})) > 8
        True
    """
    return len(recorddict_to_proto(record).SerializeToString())


def ideal_bytes(parameters: int, vectors: int = 1) -> int:
    """What so many model-sized vectors take at 4 bytes a number.

    Examples:
        >>> ideal_bytes(1000, vectors=2)
        8000
    """
    return BYTES_A_NUMBER * parameters * vectors


def ideal_bytes_of(record: RecordDict) -> int:
    """4 bytes for each number in a message's arrays."""
    return ideal_bytes(sum(math.prod(array.shape) for arrays in record.array_records.values() for array in arrays.values()))


class Transfer(NamedTuple):
    """One client's bytes in one round, down to it and up from it (0 where no reply came), each beside the ideal count."""

    round: int
    client: int
    down: int
    ideal_down: int
    up: int = 0
    ideal_up: int = 0


@dataclass
class Traffic:
    """Every client's bytes in every round.

    Attributes:
        transfers: a line a round and client.
    """

    transfers: list[Transfer] = field(default_factory=list)

    def sent(self, round: int, client: int, record: RecordDict) -> None:
        """A message went down to a client."""
        self.transfers.append(Transfer(round, client, record_bytes(record), ideal_bytes_of(record)))

    def came(self, client: int, record: RecordDict) -> None:
        """That client's reply came up."""
        place = next(place for place in reversed(range(len(self.transfers))) if self.transfers[place].client == client)
        self.transfers[place] = self.transfers[place]._replace(up=record_bytes(record), ideal_up=ideal_bytes_of(record))

    def total(self, rounds: Sequence[int] | None = None) -> tuple[int, int]:
        """(bytes down, bytes up), in all or in some rounds."""
        chosen = [each for each in self.transfers if rounds is None or each.round in rounds]
        return sum(each.down for each in chosen), sum(each.up for each in chosen)
