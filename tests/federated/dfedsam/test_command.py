"""`fewer topology`: what it says of a graph, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fewer.federated.dfedsam.command import COMMANDS


@pytest.fixture
def topology():
    import typer

    app = typer.Typer()
    app.command("topology")(COMMANDS["topology"])

    def run(*words):
        return CliRunner().invoke(app, words)

    return run


def test_a_ring(topology):
    said = topology("ring", "--clients", "16", "--parameters", "13258").stdout
    assert "ring(16): 16 clients, 16 links, 2 neighbours each" in said
    assert "lambda   0.9493" in said
    assert "133 leave 0.001" in said
    assert "104 KiB sent by a client, 1.62 MiB by all (13,258 parameters of 4 bytes, 1 gossip step)" in said


def test_json_of_each_graph(topology):
    told = {
        graph: json.loads(topology(graph, "--gossip-steps", "4", "--json").stdout) for graph in ("ring", "torus", "exponential", "complete")
    }
    assert {graph: each["lambda"] for graph, each in told.items()} == pytest.approx(
        {"ring": 0.949253, "torus": 0.6, "exponential": 0.5, "complete": 0}, abs=1e-6
    )
    assert {graph: each["bytes_of_a_client"] // 16_000_000 for graph, each in told.items()} == {
        "ring": 2,
        "torus": 4,
        "exponential": 7,
        "complete": 15,
    }
    drawn = json.loads(topology("random", "--degree", "2", "--seed", "3", "--json").stdout)
    assert drawn["topology"] == "random_graph(16, 2, seed=3)"
    assert drawn["degrees"][0] >= 2
    assert 2 * drawn["links"] * 4_000_000 == drawn["bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["torus", "--clients", "13"], "m is 13, a prime; expected a product of two sides"),
        (["random", "--clients", "4", "--degree", "4"], "degree is 4 for 4 clients; expected 1 to 3"),
        (["ring", "--tol", "1.5"], "--tol is 1.5; expected a number between 0 and 1"),
    ],
)
def test_what_is_no_graph_is_refused(topology, words, message):
    assert message in str(topology(*words).exception)


def test_other_words_are_refused(topology):
    assert topology("star").exit_code == 2
    assert topology("ring", "--clients", "1").exit_code == 2
