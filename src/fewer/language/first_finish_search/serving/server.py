"""The smallest OpenAI-compatible server: streamed completions over the engine, on the loopback address, for studies and tests.

Each request is a race of one row; all requests share the model's batch, and one whose client hangs up leaves it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import torch

from fewer.language.first_finish_search.engine.races import Engine, Race
from fewer.language.first_finish_search.engine.sampling import RaceConfig
from fewer.language.first_finish_search.search import ends_of, room, token_rows

SAMPLING = ("temperature", "top_p", "top_k", "seed")
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Server:
    """Serves a model in eval mode.

    Attributes:
        generated: tokens that were generated for all requests so far.
        stopped: requests that were left before their end.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model") -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.engine, self.generated, self.stopped = Engine(model), 0, 0
        self.asked, self.told = asyncio.Event(), {}
        self.arriving: list[Race] = []
        self.leaving: list[Race] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Its address up to "/v1", inside the block."""
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        stepping = asyncio.create_task(self._step_for_ever())
        try:
            async with server:
                yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)

    async def _step_for_ever(self) -> None:
        """Requests come and go between two steps of the model, which runs in a thread."""
        while True:
            await self.asked.wait()
            arriving, self.arriving, leaving, self.leaving = self.arriving, [], self.leaving, []
            try:
                await asyncio.to_thread(self._step, arriving, leaving)
            except Exception as error:  # a client is told, and the next request finds the server empty
                self.engine = Engine(self.model)
                for row in (row for race in self.told for row in race.rows):
                    row.reason = row.reason or f"error: {error}"
            for race in list(self.told):
                self.told[race].set()
            if not self.engine.rows and not self.arriving:
                self.asked.clear()

    @torch.no_grad()
    def _step(self, arriving: list[Race], leaving: list[Race]) -> None:
        for race in leaving:
            self.engine.stop(race)
        for race in arriving:
            self.engine.admit(race)
        if self.engine.rows:
            self.generated += len(self.engine.rows)
            self.engine.step()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request on one connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").lower()
            length = int(head.partition("content-length:")[2].partition("\r")[0] or 0)
            try:
                race, chat = self._race(head.split()[1], json.loads(await reader.readexactly(length)))
            except (ValueError, KeyError, TypeError) as error:
                words = json.dumps({"error": {"message": str(error)}}).encode()
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n" + words)
                await writer.drain()
                return
            writer.write(STREAM)
            gone = asyncio.create_task(reader.read(1))  # ends when the client hangs up
            try:
                await self._tell(race, chat, writer, gone)
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _race(self, path: str, body: dict[str, Any]) -> tuple[Race, bool]:
        """What a request asks for; ValueError in words for its sender."""
        if body.get("model") != self.name:
            raise ValueError(f"the model {body.get('model')!r} does not exist; this server has {self.name!r}")
        chat = path.endswith("/chat/completions")
        if chat and not getattr(self.tokenizer, "chat_template", None):
            prompt = "".join(message["content"] for message in body["messages"])
        else:
            prompt = body["messages"] if chat else body["prompt"]
        given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
        stop = body.get("stop") or ()
        words: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0} | given
        config = RaceConfig(n=1, max_new_tokens=body.get("max_tokens"), stop_strings=stop, **words)
        (ids,) = token_rows(prompt, self.tokenizer)
        ends = ends_of(self.model, self.tokenizer, config)
        return Race(ids, config, ends, longest=room(self.model, len(ids), config)), chat

    async def _tell(self, race: Race, chat: bool, writer: asyncio.StreamWriter, gone: asyncio.Task[bytes]) -> None:
        """Send what is written of a race as it comes, and at its end the usage."""
        (row,), sent, grown = race.rows, "", asyncio.Event()
        self.told[race] = grown
        self.arriving.append(race)
        self.asked.set()
        try:
            while not row.reason:
                growing = asyncio.create_task(grown.wait())
                await asyncio.wait({growing, gone}, return_when=asyncio.FIRST_COMPLETED)
                growing.cancel()
                if gone.done():
                    raise ConnectionResetError
                grown.clear()
                text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
                if row.reason or not text.endswith("\ufffd"):  # not inside a character
                    _send(writer, chat, text[len(sent) :], None)
                    sent = text
                await writer.drain()
            _send(writer, chat, "", row.reason)
            usage = {"prompt_tokens": len(race.ids), "completion_tokens": len(row.tokens)}
            writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
            await writer.drain()
        except ConnectionError:
            self.stopped += 1
            self.leaving.append(race)
            self.asked.set()
        finally:
            del self.told[race]


def _send(writer: asyncio.StreamWriter, chat: bool, piece: str, reason: str | None) -> None:
    said = {"delta": {"content": piece}} if chat else {"text": piece}
    writer.write(f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': reason} | said]})}\n\n".encode())
