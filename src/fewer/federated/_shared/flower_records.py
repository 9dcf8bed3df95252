"""Flat vectors and Flower's records: what a message and a reply look like on the wire.

The global model travels as `arrays`, named as in `model.state_dict()`; any further vector as a record of its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fewer.federated._shared.algorithm import BUFFERS, Message, Reply, ServerState, Vectors
from fewer.federated._shared.flat_model import FlatModel

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
KEPT = "fewer.kept"  # what a client keeps between rounds, in context.state


def tensor_of(array: Array) -> Tensor:
    return torch.from_numpy(array.numpy())


@dataclass(frozen=True)
class Layout:
    """Which arrays of a model are its parameters and which its averaged statistics, in the order of the flat vectors, and further names of
    tied ones: pairs (name, first name)."""

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, flat: FlatModel) -> Layout:
        return cls(tuple(flat.shapes), tuple(flat.buffer_shapes), tuple(flat.tied.items()))

    def words(self) -> dict[str, str]:
        """The layout as settings that travel in a record."""
        return {"parameters": _lines(self.parameters), "buffers": _lines(self.buffers), "tied": _lines(map("\t".join, self.tied))}

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> Layout:
        parameters, buffers, tied = (
            tuple(filter(None, str(words.get(name, "")).split("\n"))) for name in ("parameters", "buffers", "tied")
        )
        pairs = (line.partition("\t") for line in tied)
        return cls(parameters, buffers, tuple((name, first) for name, _, first in pairs))

    def vector(self, names: Sequence[str], arrays: ArrayRecord) -> Tensor:
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"the arrays have no {missing[0]!r} (they have {', '.join(arrays)}); expected model.state_dict() of the model")
        flat = torch.cat([tensor_of(arrays[name]).reshape(-1) for name in names])
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def vectors(self, arrays: ArrayRecord) -> Vectors:
        """ "x", and the statistics where there are some."""
        found = {"x": self.vector(self.parameters, arrays)}
        return found | ({BUFFERS: self.vector(self.buffers, arrays)} if self.buffers else {})

    def arrays(self, x: Tensor, buffers: Tensor | None, like: ArrayRecord) -> ArrayRecord:
        """The arrays of `like` with the parameters (and statistics) of flat vectors in their places."""
        filled = dict(like)
        for names, flat in ((self.parameters, x), (self.buffers, buffers)):
            place = 0
            for name in names:
                assert flat is not None
                shape = like[name].shape
                size = int(torch.Size(shape).numel())
                filled[name] = Array(flat[place : place + size].view(shape).numpy())
                place += size
        filled.update({name: filled[first] for name, first in self.tied if name in like})
        return ArrayRecord(filled)


def _lines(words: Iterable[str]) -> str:
    return "\n".join(words)


def message_record(message: Message, arrays: ArrayRecord, config: Mapping[str, Any]) -> RecordDict:
    """What a client is sent: the global model by name, further vectors flat, settings."""
    records: dict[str, Any] = {ARRAYS: arrays, CONFIG: ConfigRecord(dict(config))}
    for name, vector in message.vectors.items():
        if name not in ("x", BUFFERS):
            records[name] = flat_record(vector)
    return RecordDict(records)


def read_message(record: RecordDict, layout: Layout, client: int) -> Message:
    """The message in a record."""
    vectors = layout.vectors(record.array_records[ARRAYS])
    for name, arrays in record.array_records.items():
        if name != ARRAYS:
            vectors[name] = tensor_of(arrays["vector"])
    settings: Any = record.config_records[CONFIG]
    return Message(client, int(settings["round"]), vectors, visit=int(settings["visit"]) if "visit" in settings else None)


def flat_record(vector: Tensor) -> ArrayRecord:
    return ArrayRecord({"vector": Array(vector.numpy())})


def reply_record(reply: Reply, gradients: float) -> RecordDict:
    """What a client sends back: each vector flat in a record of its name, and numbers."""
    records: dict[str, Any] = {name: flat_record(vector) for name, vector in reply.vectors.items()}
    numbers = {"num-examples": int(reply.metrics["examples"]), "drift": float(reply.metrics["drift"]), "gradients": float(gradients)}
    numbers |= {name: float(value) for name, value in reply.metrics.items() if name not in ("examples", "drift")}
    return RecordDict(records | {METRICS: MetricRecord(numbers)})


def read_reply(record: RecordDict, client: int) -> Reply:
    """The reply in a record."""
    metrics = next(iter(record.metric_records.values()), {})
    numbers = {"examples": metrics.get("num-examples", 1), "drift": metrics.get("drift", 0.0)}
    vectors = {name: tensor_of(arrays["vector"]) for name, arrays in record.array_records.items() if "vector" in arrays}
    return Reply(client, vectors, numbers)


def wire_bytes(
    names: Sequence[str], server: ServerState, arrays: ArrayRecord | None = None, lengths: Mapping[str, int] | None = None
) -> int:
    """Serialised bytes of a record with these vectors, of the model's size or of the given lengths; "x" as named arrays where they are given."""
    from fewer.federated._shared.traffic import record_bytes

    records: dict[str, Any] = {}
    for name in names:
        vector = server.x.new_zeros(lengths[name]) if lengths and name in lengths else server.x
        records[name] = arrays if name == "x" and arrays is not None else flat_record(vector)
    return record_bytes(RecordDict(records))
