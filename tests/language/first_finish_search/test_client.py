"""The client: against a server that is told what to send and when, and against a real model behind the smallest server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time

import pytest
import torch
from ffs_models import make, tokenizer

from fewer.language import AsyncFFS, FFSError, ffs_generate, ffs_request
from fewer.language.first_finish_search.serving.server import Server

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_open():
    """A socket or task that was left is told, as an error, when it is collected."""
    yield
    gc.collect()


class Script:
    """A server on the loopback address that answers the request with seed i as the i-th script says: steps of (seconds, what to send)."""

    def __init__(self, *scripts, kind="text/event-stream", status="200 OK"):
        self.scripts, self.kind, self.status = scripts, kind, status
        self.asked, self.hung_up, self.open = [], {}, 0
        self.everybody_left = asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        while self.open:
            await asyncio.sleep(0.001)
        self.server.close()
        await self.server.wait_closed()

    async def answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = json.loads(await reader.readexactly(int(head.split("content-length:")[1].split("\r")[0])))
        row = body["seed"] % 100
        self.asked.append((head.split()[1], body))
        self.open += 1
        script = self.scripts[row]
        if callable(script):
            script = script(sum(each["seed"] % 100 == row for _, each in self.asked))
        if script and isinstance(script[0], str):  # an answer of its own
            writer.write(script[0].encode())
            script = script[1:]
        else:
            writer.write(f"HTTP/1.1 {self.status}\r\nContent-Type: {self.kind}\r\nConnection: close\r\n\r\n".encode())
        gone = asyncio.create_task(reader.read(1))
        for seconds, said in script:
            done, _ = await asyncio.wait({gone}, timeout=seconds)
            if done:
                break
            writer.write(said if isinstance(said, bytes) else f"data: {said if isinstance(said, str) else json.dumps(said)}\n\n".encode())
        if gone.done():
            self.hung_up[row] = time.perf_counter()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.open -= 1
        if not self.open:
            self.everybody_left.set()


def say(text, reason=None, **words):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]} | words


def quick(text, at=0.0, reason="stop", usage=None):
    return [(at, say(text)), (0, say("", reason)), (0, {"choices": [], "usage": usage} if usage else "[DONE]"), (0, "[DONE]")]


NEVER = [(0, say("a")), (60, say("b"))]
BUSY = [
    'HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{"error": {"message": "worker died"}}'
]


def race(*scripts, k=1, n=None, words=None, server=None, **sampling):
    """(result, the script's server, when the race was over)."""

    async def run():
        async with Script(*scripts, **server or {}) as told:
            async with AsyncFFS(told.url, "m", n=n or len(scripts), **words or {}) as ffs:
                result = await ffs.generate("why?", k, 0, **sampling)
                over, client = time.perf_counter(), ffs._client
                await asyncio.wait_for(told.everybody_left.wait(), 5)
            assert client.is_closed, "no connection is kept"
            assert len(asyncio.all_tasks()) == 1, "no task is left"
            return result, told, over

    return asyncio.run(run(), debug=False)


def test_the_fastest_stop_wins_and_the_others_see_their_connections_closed():
    result, told, over = race(NEVER, quick("yes", 0.1), NEVER, NEVER, temperature=0.6)
    assert (result.text, result.winner, result.finished, result.answer) == ("yes", 1, True, None)
    assert [row.reason for row in result.rows] == ["stopped", "stop", "stopped", "stopped"]
    assert set(told.hung_up) == {0, 2, 3}
    assert max(told.hung_up.values()) - over < 0.1
    path, body = told.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "messages": [{"role": "user", "content": "why?"}], "model": "m", "stream": True, "stream_options": {"include_usage": True},
        "seed": body["seed"], "temperature": 0.6,
    }  # fmt: skip
    assert sorted(body["seed"] for _, body in told.asked) == [0, 1, 2, 3]


def test_a_faster_length_does_not_win():
    result, _, _ = race(quick("cut", 0.0, "length"), quick("whole", 0.1))
    assert (result.text, result.winner) == ("whole", 1)
    assert result.rows[0].reason == "length"
    assert not result.rows[0].finished


def test_where_all_are_cut_off():
    likely = [(0, {"choices": [{"delta": {"content": "b"}, "logprobs": {"content": [{"logprob": -0.1}]}, "finish_reason": "length"}]})]
    result, _, _ = race(quick("a", 0, "length"), likely)
    assert (result.text, result.finished, result.winner) == ("b", False, 1)
    with pytest.raises(FFSError, match="none of 2 requests ended by itself: cut off at max_tokens"):
        race(quick("a", 0, "length"), quick("b", 0, "length"), words={"on_truncate": "raise"})


def test_a_request_that_fails_is_tried_again_and_the_race_goes_on():
    result, told, _ = race(lambda attempt: quick("late") if attempt == 2 else BUSY, NEVER)
    assert (result.text, result.winner) == ("late", 0)
    cut = 'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\ndata: {"choices": [{"text": "ha"}]}\n\n'
    result, told, _ = race(lambda attempt: quick("late") if attempt == 2 else [cut])
    assert (result.text, result.sequential_tokens, result.total_tokens) == ("late", 1, 2), "what broke off was generated too"
    dropped = [(0, say("ha"))]  # the connection ends without an end
    result, told, _ = race(dropped, BUSY, quick("yes", 0.3), words={"max_retries": 0})
    assert result.text == "yes"
    assert [row.reason[:5] for row in result.rows] == ["error", "error", "stop"]
    assert "worker died" in result.rows[1].reason
    assert len(told.asked) == 3


def test_where_all_fail_the_causes_are_listed():
    refused = ['HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{"error": {"message": "no model m"}}']
    broken = [(0, "{cut")]
    with pytest.raises(
        FFSError, match=r"none of 3 requests ended by itself: .*404: no model m; .*no JSON object: \{cut; .*500: worker died"
    ):
        race(refused, broken, BUSY, words={"max_retries": 1})
    with pytest.raises(FFSError, match="answers text/html; expected text/event-stream: is it an OpenAI-compatible server"):
        race(quick("x"), server={"kind": "text/html"})

    async def nobody():
        async with AsyncFFS("http://127.0.0.1:9/v1", "m", n=2, max_retries=0) as ffs:
            await ffs.generate("x")

    with pytest.raises(FFSError, match="none of 2 requests"):
        asyncio.run(nobody())


def test_a_bad_chunk_or_an_error_in_the_stream_fails_that_request_alone():
    for bad in ("[1]", "{cut", {"error": {"message": "out of memory"}}, {"choices": 3}, {"choices": [3]}):
        result, _, _ = race([(0, bad), (5, "")], quick("yes", 0.1))
        assert result.winner == 1
        assert result.rows[0].reason.startswith("error: ")


def test_the_time_of_a_whole_race_is_kept():
    start = time.perf_counter()
    with pytest.raises(FFSError, match="no sample ended within 0.2 s"):
        race(NEVER, NEVER, words={"timeout": 0.2})
    assert time.perf_counter() - start < 3


def test_tokens_are_the_servers_count_or_the_tokenizers():
    usage = {"prompt_tokens": 5, "completion_tokens": 17}
    result, _, _ = race(quick("cde", 0.05, usage=usage), NEVER)
    assert (result.sequential_tokens, result.prefill_tokens) == (17, 5)
    assert result.total_tokens == 17 + 1, "a piece is a token where nobody counts"
    result, _, _ = race(quick("cde"), words={"tokenizer": tokenizer()})
    assert result.sequential_tokens == 3


def test_many_prompts_fail_with_the_error_of_the_first_that_does():
    async def run():
        async with Script(*[BUSY] * 3) as told, AsyncFFS(told.url, "m", n=1, max_retries=0) as ffs:
            with pytest.raises(FFSError, match="worker died"):
                await ffs.map(["a", "b", "c"], concurrency=2)
            assert len(asyncio.all_tasks()) == 1, "no task is left"

    asyncio.run(run())


def test_the_first_k_vote():
    result, told, _ = race(quick("7", 0.05), quick("8", 0.1), quick("7", 0.15), NEVER, k=3, words={"answer_fn": str})
    assert (result.answer, result.winner) == ("7", 0)
    assert set(told.hung_up) == {3}


def test_a_race_that_is_cancelled_closes_its_streams():
    async def run():
        async with Script(NEVER, NEVER) as told, AsyncFFS(told.url, "m", n=2) as ffs:
            racing = asyncio.create_task(ffs.generate("x"))
            while told.open < 2:
                await asyncio.sleep(0)
            racing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await racing
            await asyncio.wait_for(told.everybody_left.wait(), 5)
            return told

    assert set(asyncio.run(run()).hung_up) == {0, 1}


def test_rows_go_to_the_replicas_in_turn_and_texts_to_completions():
    async def run():
        async with Script(*[NEVER] * 4) as slow, Script(*[quick("fast", 0.05)] * 4) as fast:
            ffs = AsyncFFS([slow.url, fast.url], "m", n=4, chat=False, api_key="k")
            result = await ffs.generate("x")
            await ffs.aclose()
            return result, slow, fast

    result, slow, fast = asyncio.run(run())
    assert result.winner in (1, 3)
    assert sorted(body["seed"] for _, body in slow.asked) == [0, 2]
    assert {path for path, _ in fast.asked} == {"/v1/completions"}


async def served(model, work):
    server = Server(model, tokenizer())
    async with server.running() as url:
        done = await work(url)
        while server.engine.rows or server.told:
            await asyncio.sleep(0.01)
    return done, server


FREE = {"temperature": 1.0, "top_p": 1.0}


def test_a_real_model_behind_a_real_server():
    """Each row draws as in this process; what is cancelled stops; the server's count is the client's."""
    model = make(torch.float64)
    alone = [ffs_generate(model, "cde", tokenizer(), n=1, seed=s, max_new_tokens=24, **FREE)[0] for s in range(4)]

    async def work(url):
        async with AsyncFFS(url, "model", n=4, chat=False, answer_fn=str) as ffs:
            whole = await ffs.generate("cde", k=4, max_tokens=24, **FREE)
            first = await ffs.generate("cde", max_tokens=24, **FREE)
            many = await ffs.map(["cde", "fgh", "ijk"], concurrency=2, max_tokens=24, **FREE)
        return whole, first, many

    (whole, first, many), server = asyncio.run(served(model, work))
    assert [row.text for row in whole.rows] == [each.text for each in alone]
    assert whole.total_tokens == sum(each.total_tokens for each in alone)
    assert first.finished
    assert first.sequential_tokens <= max(row.tokens for row in whole.rows)
    assert first.text in [each.text for each in alone]
    assert len(many) == 3
    assert server.stopped >= 1, "those that lost were told to stop"


def test_what_the_server_cannot_do_is_told():
    async def work(url):
        with pytest.raises(FFSError, match="400: the model 'other' does not exist; this server has 'model'"):
            async with AsyncFFS(url, "other", n=2) as ffs:
                await ffs.generate("cde")
        with pytest.raises(FFSError, match="400: top_p is 7"):
            async with AsyncFFS(url, "model", n=2) as ffs:
                await ffs.generate("cde", top_p=7)

    asyncio.run(served(make(), work))


def test_without_an_event_loop():
    done = {}

    async def work(url):
        done["result"] = await asyncio.to_thread(ffs_request, "cde", url, "model", sampling={"max_tokens": 24}, n=2, chat=False)

    asyncio.run(served(make(), work))
    assert done["result"].rows[done["result"].winner].tokens == done["result"].sequential_tokens


def test_words_that_cannot_be():
    ffs = AsyncFFS("http://localhost:1/v1", "m")
    for words, said in (
        ({"k": 5}, "k is 5 and n 4"),
        ({"k": 2}, "k is 2 and there is no answer_fn"),
        ({"temperature": 0}, "temperature is 0 and n 4"),
        ({"temperature": -1}, "temperature is -1"),
    ):
        with pytest.raises(ValueError, match=said):
            asyncio.run(ffs.generate("x", **words))
    with pytest.raises(ValueError, match="the prompt is empty"):
        asyncio.run(ffs.generate(""))
    for words, said in (({"n": 0}, "n is 0"), ({"timeout": 0}, "timeout is 0"), ({"max_retries": -1}, "max_retries is -1")):
        with pytest.raises(ValueError, match=said):
            AsyncFFS("http://localhost:1/v1", "m", **words)
    with pytest.raises(ValueError, match="on_truncate is 'rase'; expected one of best, raise: did you mean 'raise'"):
        AsyncFFS("http://localhost:1/v1", "m", on_truncate="rase")
