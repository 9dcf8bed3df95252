"""First Finish Search as a client: n streaming requests to one or several servers, the first that ends by itself wins, the others are closed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from fewer.checks import check_choice, check_not_negative, check_positive, check_whole
from fewer.errors import WorkFailed, require
from fewer.language.first_finish_search.traces import FINISHED, AnswerFn, FFSResult, Trace, choose, likeliest

BACK_OFF = 0.1  # seconds before a request is tried again, twice that the next time
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers of a server that may be otherwise next time
FOREVER = 10**9  # seconds that a socket may be silent: the race has a clock of its own


class FFSError(WorkFailed):
    """No request of a race came to an answer; the message has each one's cause."""


@dataclass
class Stream:
    """One request as far as it came."""

    text: list[str] = field(default_factory=list)
    pieces: int = 0
    usage: Mapping[str, Any] | None = None
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""
    lost: int = 0  # pieces of attempts that broke off

    def take(self, chunk: Mapping[str, Any]) -> None:
        """Read a chunk of the server's: a piece of text, the end, or the usage; FFSError where it is none."""
        if "error" in chunk:
            raise FFSError(_words(chunk))
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = f"{delta.get('reasoning_content') or ''}{delta.get('content') or ''}" or choice.get("text") or ""
            if piece:
                self.text.append(piece)
                self.pieces += 1
            listed = (choice.get("logprobs") or {}).get("content") or ()
            self.logprobs += [each["logprob"] for each in listed]
            self.reason = choice.get("finish_reason") or self.reason

    def trace(self, tokenizer: Any) -> Trace:
        """The tokens are the server's count where it has sent one, else the tokenizer's, else the pieces (there may be several a piece)."""
        text = "".join(self.text)
        counted = (self.usage or {}).get("completion_tokens")
        if counted is None:
            counted = len(tokenizer(text, add_special_tokens=False).input_ids) if tokenizer else self.pieces
        mean = sum(self.logprobs) / len(self.logprobs) if self.logprobs else math.nan
        return Trace(text, (), int(counted), mean, self.reason or "stopped")


class AsyncFFS:
    """First Finish Search over any OpenAI-compatible server: vLLM, the server of llama.cpp, `transformers serve`, ...

    Finish is by the clock here: a faster replica may beat a briefer trace.

    Args:
        base_url: up to "/v1", or several; row i goes to the i-th in turn.
        model: its name there.
        api_key: sent as a bearer token.
        n: samples of a prompt.
        timeout: seconds for a whole race.
        max_retries: how often a request is tried again where the connection breaks or the server is busy.
        chat: chat completions; else completions of a text.
        tokenizer: counts tokens where the server does not.
        on_truncate: what to do where all samples are cut off: "best" (of the largest mean log-probability where the server sends them
            (`logprobs=True`), else the first) or "raise".

    Examples:
        async with AsyncFFS("http://localhost:8000/v1", "deepseek-r1", n=4) as ffs:
            result = await ffs.generate("How many primes are below 100?", max_tokens=8192, temperature=0.6, top_p=0.95)
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        api_key: str | None = None,
        n: int = 4,
        timeout: float = 600.0,
        max_retries: int = 2,
        chat: bool = True,
        *,
        tokenizer: Any = None,
        answer_fn: AnswerFn | None = None,
        on_truncate: Literal["best", "raise"] = "best",
    ) -> None:
        check_whole(n=n)
        check_whole(0, max_retries=max_retries)
        check_positive(timeout=timeout)
        check_choice(("best", "raise"), on_truncate=on_truncate)
        self.httpx: Any = require("httpx", "language")
        self.urls = [self._checked(url) for url in ([base_url] if isinstance(base_url, str) else base_url)]
        if not self.urls or not model:
            raise ValueError(
                f"base_url is {base_url!r} and model {model!r}; expected an address such as http://localhost:8000/v1 and a name"
            )
        self.model, self.n, self.timeout, self.max_retries, self.chat = model, n, timeout, max_retries, chat
        self.tokenizer, self.answer_fn, self.on_truncate = tokenizer, answer_fn, on_truncate
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: Any = None

    def _checked(self, url: str) -> str:
        try:
            parsed = self.httpx.URL(url)
        except (self.httpx.InvalidURL, TypeError):
            parsed = None
        if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"base_url is {url!r}; expected an address such as http://localhost:8000/v1")
        return str(url).rstrip("/")

    async def __aenter__(self) -> AsyncFFS:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def generate(self, messages_or_prompt: Any, k: int = 1, seed: int = 0, *, wait: int | None = None, **sampling: Any) -> FFSResult:
        """Race n samples of a prompt; the first k that end by themselves vote, and the other connections are closed.

        Args:
            messages_or_prompt: a text, or a list of messages.
            seed: row i is asked for with seed + i.
            wait: how many must end before the others are closed, k by default; n records all.
            sampling: what the server takes: temperature, top_p, max_tokens, stop, ...

        Raises:
            FFSError: every request failed, the time ran out, or all samples were cut off and on_truncate is "raise".
        """
        check_whole(k=k)
        if k > self.n:
            raise ValueError(f"k is {k} and n {self.n}; expected k of at most n")
        if k > 1 and self.answer_fn is None:
            raise ValueError(f"k is {k} and there is no answer_fn; expected one, as parsed answers vote: AsyncFFS(..., answer_fn=...)")
        if "temperature" in sampling:
            check_not_negative(temperature=sampling["temperature"])
            if sampling["temperature"] == 0 and self.n > 1:
                raise ValueError(f"temperature is 0 and n {self.n}: all samples would be equal; expected one above 0, or n=1")
        if not messages_or_prompt:
            raise ValueError("the prompt is empty; expected a text or messages")
        started, streams = time.perf_counter(), [Stream() for _ in range(self.n)]
        order: list[int] = []
        tasks = {asyncio.create_task(self._request(row, streams, messages_or_prompt, seed + row, sampling)): row for row in range(self.n)}
        try:
            async with asyncio.timeout(self.timeout):
                waiting = set(tasks)
                while waiting and len(order) < (wait or k):
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()  # what is no failure of the server's is ours, and is raised
                    order += sorted(tasks[task] for task in done if streams[tasks[task]].reason == FINISHED)
        except TimeoutError:
            if not order:
                raise FFSError(f"no sample ended within {self.timeout:g} s; give it more time, or fewer tokens") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # each has closed its connection by then
        return self._result(streams, order, k, time.perf_counter() - started)

    async def map(self, prompts: Sequence[Any], concurrency: int = 8, **words: Any) -> list[FFSResult]:
        """`generate` for many prompts, so many at a time; row i of prompt p is asked for with seed + p n + i."""
        check_whole(concurrency=concurrency)
        turns, seed = asyncio.Semaphore(concurrency), words.pop("seed", 0)

        async def one(number: int, prompt: Any) -> FFSResult:
            async with turns:
                return await self.generate(prompt, seed=seed + number * self.n, **words)

        tasks = [asyncio.create_task(one(*each)) for each in enumerate(prompts)]
        try:
            return await asyncio.gather(*tasks)
        finally:  # where one failed the others are not waited for
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _result(self, streams: Sequence[Stream], order: Sequence[int], k: int, seconds: float) -> FFSResult:
        traces = [stream.trace(self.tokenizer) for stream in streams]
        if not order:
            cut = [row for row, trace in enumerate(traces) if trace.reason == "length"]
            if not cut or self.on_truncate == "raise":
                causes = dict.fromkeys("cut off at max_tokens" if row in cut else trace.reason for row, trace in enumerate(traces))
                raise FFSError(f"none of {self.n} requests ended by itself: {'; '.join(causes)}")
            row = cut[likeliest([traces[row] for row in cut])]
            answer = self.answer_fn(traces[row].text) if self.answer_fn else None
        else:
            row, answer = choose(traces, order, k, self.answer_fn, False)
        won = traces[row]
        asked = sum(int((stream.usage or {}).get("prompt_tokens") or 0) for stream in streams)
        total = sum(trace.tokens + stream.lost for trace, stream in zip(traces, streams, strict=True))
        cost = (max(traces[each].tokens for each in order[:k] or [row]), total, asked, seconds)
        return FFSResult(won.text, (), won.finished, row, *cost, tuple(traces), answer)

    async def _request(self, row: int, streams: list[Stream], prompt: Any, seed: int, sampling: Mapping[str, Any]) -> None:
        """One sample: its pieces go into its stream as they come; tried again from the start where that may help."""
        if self.chat:
            path, body = "chat/completions", {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        else:
            path, body = "completions", {"prompt": prompt}
        body |= {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, "seed": seed} | dict(sampling)
        url = f"{self.urls[row % len(self.urls)]}/{path}"
        for attempt in range(self.max_retries + 1):
            stream = streams[row] = Stream(lost=streams[row].lost + streams[row].pieces)
            try:
                async with contextlib.aclosing(cast(Any, self._chunks(url, body))) as chunks:
                    async for chunk in chunks:
                        stream.take(chunk)
                if not stream.reason:
                    raise FFSError(f"{url}: the stream ended without a finish_reason")
                return
            except _Busy as busy:
                stream.reason = f"error: {busy}"
            except self.httpx.HTTPError as broken:
                stream.reason = f"error: {url}: {broken or type(broken).__name__}"
            except (FFSError, ValueError, TypeError, AttributeError, KeyError) as error:
                stream.reason = f"error: {error}"
                return
            if attempt < self.max_retries:
                await asyncio.sleep(BACK_OFF * 2**attempt)

    async def _chunks(self, url: str, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """The chunks of a streamed answer; its connection is closed when the loop over them is left."""
        if self._client is None:
            limits = self.httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._client = self.httpx.AsyncClient(timeout=FOREVER, limits=limits)
        async with self._client.stream("POST", url, json=body, headers=self.headers) as answer:
            if answer.status_code != 200:
                said = f"{url}: {answer.status_code}: {_words(_parsed(await answer.aread()))}"
                raise _Busy(said) if answer.status_code in AGAIN else FFSError(said)
            if "text/event-stream" not in (kind := answer.headers.get("content-type", "")):
                raise FFSError(f"{url} answers {kind or 'nothing'}; expected text/event-stream: is it an OpenAI-compatible server?")
            async for line in answer.aiter_lines():
                if line.startswith("data:") and (words := line[5:].strip()) != "[DONE]":
                    chunk = _parsed(words)
                    if not isinstance(chunk, dict):
                        raise FFSError(f"{url} sent a chunk that is no JSON object: {words[:80]}")
                    yield chunk


class _Busy(Exception):
    """A server's answer that may be otherwise next time."""


def _parsed(words: bytes | str) -> Any:
    try:
        return json.loads(words)
    except ValueError:
        return words.decode(errors="replace") if isinstance(words, bytes) else words


def _words(answer: Any) -> str:
    """What a server says went wrong."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    return " ".join(str(error.get("message", error) if isinstance(error, dict) else error).split())[:300]


def ffs_request(
    prompt: Any,
    base_url: str | Sequence[str],
    model: str,
    *,
    k: int = 1,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    **words: Any,
) -> FFSResult:
    """`AsyncFFS(base_url, model, **words).generate(prompt, k, seed, **sampling)` for code that is not asynchronous."""

    async def ask() -> FFSResult:
        async with AsyncFFS(base_url, model, **words) as ffs:
            return await ffs.generate(prompt, k, seed, **sampling or {})

    return asyncio.run(ask())
