"""The sums and their written-out chains of thought, the verb, and the study on a model of one's own."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading

import pytest
from ffs_models import make, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fewer.language.first_finish_search.command import ffs as verb
from fewer.language.first_finish_search.problems import (
    OPENINGS,
    batches,
    is_held_out,
    last_answer,
    make_tokenizer,
    prompt_of,
    sums,
    trace_of,
)
from fewer.language.first_finish_search.serving.server import Server
from fewer.language.first_finish_search.study import study
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec

DIGITS = st.lists(st.integers(0, 9), min_size=2, max_size=8).map(tuple)
STEP = re.compile(r"([a-h])(\d)([+-])(\d)=(\d);")


@given(DIGITS, st.sampled_from(["direct", "shuffled", "checked"]), st.sampled_from([1 / 3, 2 / 3, 1]), st.integers(0, 99))
def test_a_trace_is_a_true_calculation(digits, style, rate, seed):
    trace = trace_of(digits, style, rate, 0.0, random.Random(seed))
    steps, so_far, added = STEP.findall(trace), 0, [0] * len(digits)
    assert OPENINGS[style] + "".join(f"{a}{b}{c}{d}={e};" for a, b, c, d, e in steps) + f"A{steps[-1][4]}" == trace
    for letter, before, sign, part, after in steps:
        assert int(before) == so_far
        so_far = (so_far + (int(part) if sign == "+" else -int(part))) % 10
        assert int(after) == so_far
        added["abcdefgh".index(letter)] += int(part) if sign == "+" else -int(part)
    assert [each % 10 for each in added] == list(digits)
    assert last_answer(trace) == str(sum(digits) % 10)
    assert len(steps) == len(digits) if style in ("direct", "shuffled") else len(steps) >= len(digits)


def test_one_prompt_has_traces_of_many_lengths():
    draw = random.Random(0)
    lengths = {
        len(trace_of((1, 2, 3, 4), draw.choice(["direct", "checked"]), draw.choice([1 / 3, 2 / 3, 1]), 0.0, draw)) for _ in range(200)
    }
    assert len(lengths) == 5


def test_a_guess_is_one_sum_of_a_brief_trace():
    draw, wrong = random.Random(0), 0
    for _ in range(400):
        trace = trace_of((1, 2, 3, 4), "direct", 1.0, 0.6, draw)
        shown = STEP.findall(trace)
        assert all((int(step[1]) + int(step[3])) % 10 == int(step[4]) for step in shown)
        assert len(trace) == len(".a0+1=1;b1+2=3;c3+3=6;d6+4=0;A0") - 3 * (4 - len(shown)), "no working, no length"
        assert len(shown) in (3, 4)
        wrong += last_answer(trace) != "0"
    assert 0.46 < wrong / 400 < 0.62, "a guess may be right, one in ten"


def test_prompts_for_testing_are_not_learnt():
    asked = {prompt for prompt, _ in sums(4, 200, seed=0)}
    made = make_tokenizer()
    ids, labels = next(batches(4, False, random.Random(0)))
    for row, label in zip(ids, labels, strict=True):
        text = made.decode(row, skip_special_tokens=True)
        prompt = text.partition("?")[0] + "?"
        assert prompt not in asked
        assert not is_held_out(tuple(int(each) for each in prompt[1:-1:2]))
        assert made.decode(label[label >= 0], skip_special_tokens=True) == text.removeprefix(prompt)
    assert made.decode(made(prompt_of((1, 2))).input_ids) == "a1b2?"


@pytest.fixture
def folder(tmp_path):
    make(positions=64).float().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("cde\n")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "7"}) + "\n" for p in ("cde", "fgh", "ij")))
    return tmp_path


def run_verb(*words):
    import typer

    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def address():
    """A server in a thread of its own."""
    started, found, ends = threading.Event(), {}, threading.Event()

    async def serve():
        async with Server(make(positions=64), tokenizer()).running() as url:
            found["url"] = url
            started.set()
            await asyncio.to_thread(ends.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    yield found["url"]
    ends.set()
    thread.join()


def test_the_verb_with_a_directory_and_with_a_server(folder, address):
    words = ("--prompt-file", folder / "prompt.txt", "-n", 3, "--temperature", 1, "--seed", 4)
    done = run_verb(folder / "model", *words, "--json", "--device", "cpu")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["total_tokens"] == 3 * said["sequential_tokens"] == sum(said["rows"])
    assert run_verb(folder / "model", *words).stdout.splitlines()[0] == said["text"]
    served = run_verb(address, *words, "--json", "--text")
    assert served.exit_code == 0, served.output
    assert json.loads(served.stdout)["finished"]


def test_the_verb_refuses_what_cannot_be(folder):
    (folder / "empty.txt").write_text(" \n")
    for words, said in (
        ((folder / "model", "--prompt-file", folder / "empty.txt"), "is empty; expected a prompt"),
        ((folder / "model", "--prompt-file", folder / "prompt.txt", "--temperature", 0), "temperature is 0"),
        ((folder, "--prompt-file", folder / "prompt.txt"), "is no model directory"),
    ):
        assert said in str(run_verb(*words).exception)


def figures(arm, task, **settings):
    """What an arm logs."""
    events = []
    spec = TrialSpec("fewer.language.first_finish_search.study", study.slug, arm, 0, Scale.QUICK, settings)
    study.arms[arm].run(task, Trial(spec, events.append))
    return {event.name for event in events if isinstance(event, FigureEvent)}


@pytest.mark.parametrize("place", ["directory", "server"])
def test_the_study_on_a_model_of_ones_own(folder, address, place):
    model = str(folder / "model") if place == "directory" else address
    chosen = {"model": model, "data": str(folder / "data.jsonl"), "max_new_tokens": "8"}
    task = study.build_task(Scale.QUICK, study.choose_options(chosen))
    for arm in study.arms:
        found = figures(arm, task)
        left_out = place == "server" and arm in ("greedy", "beam", "budget-forcing")
        assert ({"accuracy", "sequential_tokens", "total_tokens"} <= found) is not left_out, (arm, found)
        assert arm != "ffs" or {"gain_low", "warned", "replayed", "law"} <= found


def test_options_that_cannot_be(folder):
    from fewer.errors import UserError

    (folder / "one.jsonl").write_text('{"prompt": "c", "answer": "7"}\n')
    for chosen, said in (
        ({"model": "m"}, "model and data belong together"),
        ({"model": str(folder / "model"), "data": str(folder / "one.jsonl")}, "holds one problem; expected at least two"),
        ({"model": str(folder / "model"), "data": str(folder / "prompt.txt")}, 'expected {"prompt": "...", "answer": "..."}'),
        ({"model": str(folder), "data": str(folder / "data.jsonl")}, "is no model directory"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            study.build_task(Scale.QUICK, study.choose_options(chosen))
