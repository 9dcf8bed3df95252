"""A Flower grid whose nodes are called in this process: for what needs no processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class DirectGrid(Grid):
    """Nodes with the partition-ids 0, 1, ...; each has a context of its own. `spoil(message, reply)` may change a reply."""

    def __init__(self, app, nodes: int, spoil: Callable[[Message, Message], Message] | None = None) -> None:
        self.app, self.spoil, self.messages = app, spoil, []
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1  # whom this process speaks for, as Flower's runtimes say
        self.contexts = {
            1000 - client: Context(7, 1000 - client, {"partition-id": client, "num-partitions": nodes}, RecordDict(), {})
            for client in range(nodes)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            context = self.contexts[message.metadata.dst_node_id]
            try:
                reply = self.app(message, context)
            except Exception as error:
                reply = Message(Error(code=0, reason=str(error)), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            self.messages.append((message, reply))
            replies.append(self.spoil(message, reply) if self.spoil else reply)
        return replies[::-1]

    def set_run(self, run) -> None: ...
    @property
    def run(self): ...
    def create_message(self, *args, **kwargs): ...
    def get_nodes(self): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...
