"""Races among the samples of a prompt, many at a time in one model."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewer.language.first_finish_search.engine.rows import Batch
from fewer.language.first_finish_search.engine.sampling import RaceConfig, draw_tokens, uniforms
from fewer.language.first_finish_search.traces import FINISHED, Trace


@dataclass(frozen=True)
class Ends:
    """What ends a sample, and what is written in place of an end where it may not end yet (budget forcing).

    Attributes:
        token_ids: end tokens.
        strings: texts, looked for in what the tokenizer makes of the tokens as they come.
        continuation: tokens that take the place of an end, so many `times`.
    """

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    tokenizer: Any = None
    continuation: tuple[int, ...] = ()
    times: int = 0
    before: frozenset[int] = frozenset()  # tokens before which the continuation is written, beside end tokens


class Row:
    """One sample in the making."""

    def __init__(self, race: Race, number: int) -> None:
        self.race, self.number = race, number
        self.uniforms = uniforms(race.config.seed, race.prompt, number)
        self.tokens: list[int] = []
        self.logprob, self.sampled, self.reason = 0.0, 0, ""
        self.forced: deque[int] = deque()  # tokens to be written whatever is drawn
        self.times = race.ends.times
        self.read = ""
        self.reader = _reader() if race.ends.strings else None

    def take(self, drawn: int, logprob: float) -> None:
        """Write a drawn token down, and see whether the sample has ended with it."""
        config, ends = self.race.config, self.race.ends
        if not self.forced and self.times and drawn in ends.token_ids | ends.before:
            self.forced.extend(ends.continuation)
            self.times -= 1
        if self.forced:
            token = self.forced.popleft()
        else:
            token = drawn
            self.logprob, self.sampled = self.logprob + logprob, self.sampled + 1
        self.tokens.append(token)
        if token in ends.token_ids or (self._reads_end(token) and len(self.tokens) > config.min_new_tokens):
            self.reason = FINISHED
        elif len(self.tokens) == self.race.longest:
            self.reason = "length"

    def _reads_end(self, token: int) -> bool:
        """Whether a stop string has come whole with this token; one may span several, and a character too."""
        if self.reader is None:
            return False
        strings = self.race.ends.strings
        piece = self.reader.step(self.race.ends.tokenizer.backend_tokenizer, token)
        if not piece:  # part of a character
            return False
        old = self.read[-max(map(len, strings)) :]
        self.read = old + piece
        return any(self.read.find(string, max(0, len(old) - len(string) + 1)) >= 0 for string in strings)

    @property
    def mean_logprob(self) -> float:
        return self.logprob / self.sampled if self.sampled else float("-inf")


def _reader() -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=False)


class Race:
    """The samples of one prompt.

    Args:
        prompt: its number, which its rows' random numbers come from.
        wait: how many must finish before the others are stopped; n waits for all.
        longest: tokens at which a row is cut off.
        openings: tokens that each row's turn opens with.
    """

    def __init__(
        self,
        ids: Sequence[int],
        config: RaceConfig,
        ends: Ends,
        *,
        prompt: int = 0,
        wait: int = 1,
        longest: int = 1,
        openings: Sequence[Sequence[int]] = (),
    ) -> None:
        self.ids, self.config, self.ends, self.prompt, self.wait, self.longest = list(ids), config, ends, prompt, wait, longest
        self.openings = [openings[row % len(openings)] for row in range(config.n)] if openings else []
        self.rows = [Row(self, number) for number in range(config.n)]
        self.started, self.seconds = time.perf_counter(), 0.0
        self.prefilled = len(self.ids) + sum(map(len, self.openings))

    def settle(self) -> bool:
        """Whether the race is over; those that still run are stopped then."""
        running = [row for row in self.rows if not row.reason]
        if running and len(self.order()) < self.wait:
            return False
        for row in running:
            row.reason = "stopped"
        self.seconds = time.perf_counter() - self.started
        return True

    def order(self) -> list[int]:
        """The rows that have finished, first to last; of those that finished in one step the likelier goes first, then the lower row."""
        finished = [row for row in self.rows if row.reason == FINISHED]
        return [row.number for row in sorted(finished, key=lambda row: (len(row.tokens), -row.mean_logprob, row.number))]

    def traces(self, tokenizer: Any = None) -> list[Trace]:
        """The samples as far as they came."""
        traces = []
        for row in self.rows:
            opening = list(self.openings[row.number]) if self.openings else []
            text = tokenizer.decode(opening + row.tokens, skip_special_tokens=True) if tokenizer else ""
            traces.append(Trace(text, tuple(row.tokens), len(row.tokens), row.mean_logprob, row.reason))
        return traces


@dataclass
class Engine:
    """Races in one model: rows come and go between any two steps, and no row of a race that is over is ever stepped again.

    Attributes:
        rows: in the order of the model's batch.
        peak_rows: most rows that were in the model at a time.
        row_steps: rows that were passed through the model, summed over the decoding steps.
        steps: decoding steps.
    """

    model: Any
    rows: list[Row] = field(default_factory=list)
    batch: Batch | None = None
    peak_rows: int = 0
    row_steps: int = 0
    steps: int = 0

    def admit(self, race: Race) -> None:
        """Start a race: its prompt is passed through the model once, and what the model keeps of it is repeated for its rows."""
        place = self.model.get_input_embeddings().weight.device
        batch = Batch(self.model, torch.tensor(race.ids, device=place))
        if race.openings:
            batch = self._opened(batch, race.openings)
        else:
            batch.repeat(len(race.rows))
        if self.batch is None:
            self.batch = batch
        else:
            self.batch.join(batch)
        self.rows += race.rows
        self.peak_rows = max(self.peak_rows, len(self.rows))

    def step(self) -> list[Race]:
        """One token for every row: draw it, see which races are over, take their rows out, and pass the others' tokens on."""
        assert self.batch is not None
        tokens, logprobs = self._draw(self.batch.logits)
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.take(token, logprob)
        over = [race for race in dict.fromkeys(row.race for row in self.rows if row.reason) if race.settle()]
        self._compact()
        if self.batch is not None:
            self.batch.feed(torch.tensor([[row.tokens[-1]] for row in self.rows], device=tokens.device))
            self.row_steps, self.steps = self.row_steps + len(self.rows), self.steps + 1
        return over

    def stop(self, race: Race) -> None:
        """End a race whose answer nobody waits for any more."""
        for row in race.rows:
            row.reason = row.reason or "stopped"
        self._compact()

    def _compact(self) -> None:
        """Take out the rows that have ended."""
        kept = [place for place, row in enumerate(self.rows) if not row.reason]
        if self.batch is not None and len(kept) < len(self.rows):
            self.rows = [self.rows[place] for place in kept]
            if kept:
                self.batch.keep(kept)
            else:
                self.batch = None

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's token, and its log-probability before temperature and filters."""
        logprobs = logits.log_softmax(-1)
        if logprobs.isnan().any():
            raise FloatingPointError("the model gives NaN or infinite logits; expected finite numbers: load it in float32 or bfloat16")
        u = torch.tensor([next(row.uniforms) for row in self.rows], dtype=torch.float64, device=logits.device)
        early = [place for place, row in enumerate(self.rows) if len(row.tokens) < row.race.config.min_new_tokens]
        if early:
            logits = logits.clone()
            for place in early:
                logits[place, sorted(self.rows[place].race.ends.token_ids)] = -torch.inf
        configs = [row.race.config for row in self.rows]
        if all(config is configs[0] for config in configs):
            tokens = draw_tokens(logits, u, configs[0])
        else:  # requests of a server, each with wishes of its own
            tokens = torch.cat([draw_tokens(logits[[place]], u[[place]], config) for place, config in enumerate(configs)])
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)

    def _opened(self, batch: Batch, openings: Iterable[Sequence[int]]) -> Batch:
        """A row for each opening, read on from where the prompt ends."""
        rows = []
        for opening in openings:
            row = copy.copy(batch)
            row.cache = copy.deepcopy(batch.cache)
            if opening:
                row.feed(torch.tensor([opening], device=batch.mask.device))
            rows.append(row)
        for row in rows[1:]:
            rows[0].join(row)
        return rows[0]
