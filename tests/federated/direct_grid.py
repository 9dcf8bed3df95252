"""A Flower grid whose nodes are called in this process: for what needs no processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class DirectGrid(Grid):
    """Nodes with the partition-ids 0, 1, ...; each has a context of its own.

    `spoil(message, reply)` may change a reply. `hold(message, newest)` keeps back the reply to a message that was pushed, as long as it is
    true; `newest` is the latest round that any node was sent.
    """

    def __init__(
        self,
        app,
        nodes: int,
        spoil: Callable[[Message, Message], Message] | None = None,
        hold: Callable[[Message, int], bool] | None = None,
    ) -> None:
        self.app, self.spoil, self.hold, self.messages = app, spoil, hold or (lambda message, newest: False), []
        self.out: dict[str, tuple[Message, Message]] = {}
        self.newest = self.count = 0
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1  # whom this process speaks for, as Flower's runtimes say
        self.contexts = {
            1000 - client: Context(7, 1000 - client, {"partition-id": client, "num-partitions": nodes}, RecordDict(), {})
            for client in range(nodes)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._answer(message) for message in messages][::-1]

    def _answer(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(code=0, reason=str(error)), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        self.messages.append((message, reply))
        return self.spoil(message, reply) if self.spoil else reply

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = str(self.count)
            self.newest = max(self.newest, int(str(message.content.config_records["config"].get("round", 0))))
            self.out[str(self.count)] = message, self._answer(message)
            ids.append(str(self.count))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [each for each in message_ids if each in self.out and not self.hold(self.out[each][0], self.newest)]
        return [self.out.pop(each)[1] for each in ready]

    def set_run(self, run) -> None: ...
    @property
    def run(self): ...
    def create_message(self, *args, **kwargs): ...
    def get_nodes(self): ...
