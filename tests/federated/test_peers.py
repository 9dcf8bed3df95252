"""Four processes that average with their neighbours by gloo: they equal the engine, send what they say, and do not outlive each other."""

from __future__ import annotations

import networkx
import pytest
import torch
from federations import net
from peer_processes import CONFIG, COUNT, SEED, UNEVEN, Killed, Silent, fails, has_nan, is_refused, lives, sends, shards, trains

from fewer.federated import DFedSAMAlgorithm, load_checkpoint, ring, run_peer, simulate_decentralized

pytestmark = pytest.mark.xdist_group("flower")
NEIGHBOURS = networkx.from_dict_of_lists(dict(enumerate(ring(COUNT).neighbors(1))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    answers = lives(trains, tmp_path_factory.mktemp("trained"))
    assert [kind for kind, _ in answers.values()] == ["done"] * COUNT, answers
    return [told for _, told in answers.values()]


@pytest.mark.parametrize("graph", ["plain", "star", "random"])
def test_four_processes_equal_the_engine(trained, graph):
    topology = UNEVEN.get(graph, ring(COUNT))
    expected = simulate_decentralized(DFedSAMAlgorithm(CONFIG), net, shards(), 3, topology=topology, seed=SEED)
    assert (expected.x[0] - expected.x[2]).norm() > 1e-3
    for told, x in zip(trained, expected.x, strict=True):
        assert (told[graph] - x).abs().max() <= 1e-6


def test_processes_that_resume_equal_those_that_did_not_stop(trained):
    for told in trained:
        assert torch.equal(told["resumed"], told["plain"])


def test_a_process_that_comes_back_with_an_old_state_goes_on_with_the_others(trained):
    for told in trained:
        (warned,) = told["warned"]
        assert "the clients [0] come back after round 1 and others after round 3; all go on with round 4" in warned


def test_a_process_does_not_take_up_the_checkpoint_of_another(trained):
    assert not any("took another's checkpoint" in told for told in trained)


def test_what_goes_over_the_wire_is_what_is_counted(tmp_path):
    """Q = 2 steps in 3 rounds to two neighbours; by the kernel's count of the sockets' bytes, at every process alike."""
    answers = [told for _, told in lives(sends, tmp_path).values()]
    for told in answers:
        assert told["counted"] == 3 * 2 * 2 * told["size"]
        assert told["bytes"] == pytest.approx(4 * told["counted"], rel=0.01)
    assert max(told["bytes"] for told in answers) <= 1.01 * min(told["bytes"] for told in answers)


def test_a_killed_process_ends_the_others_with_its_name(tmp_path):
    """Client 2 dies in round 2. Its neighbours say so; the one that is not, names the neighbour that left because of it."""
    answers = lives(fails, tmp_path, Killed(CONFIG))
    assert answers.pop(2) == ("gone", "")
    for rank, (kind, said) in answers.items():
        assert kind == "ConnectionError", answers
        named = int(said.partition("its neighbour ")[2].split()[0])
        assert named in NEIGHBOURS[rank]
        assert said.startswith(f"round 2: client {rank} heard nothing from its neighbour")
        state, _ = load_checkpoint(tmp_path / f"{rank}.pt", COUNT)
        assert state.round == 1
    assert any("its neighbour 2 " in said for _, said in answers.values()), answers


def test_a_process_that_never_answers_ends_the_others_in_time(tmp_path):
    answers = lives(fails, tmp_path, Silent(CONFIG), 4.0, awaited=(0, 1, 3))
    for rank, (kind, said) in answers.items():
        assert kind == "ConnectionError", answers
        assert f"round 2: client {rank} heard nothing from its neighbour" in said
        assert "within 4 s" in said
    assert any("its neighbour 2 " in said for _, said in answers.values()), answers


def test_a_process_whose_model_is_nan_sends_nothing(tmp_path):
    answers = lives(has_nan, tmp_path)
    assert answers[1][0] == "RuntimeError"
    assert "client 1 came out of round 1 with NaN" in answers[1][1]
    assert [answers[rank][0] for rank in (0, 2, 3)] == ["ConnectionError"] * 3


def test_processes_that_do_not_fit_are_refused_by_all(tmp_path):
    for rank, (kind, said) in lives(is_refused, tmp_path).items():
        assert kind == "done"
        assert said["size"] == "rank 3 has a model of 28 parameters and rank 0 one of 21; expected the same model"
        assert said["start"].startswith("rank 2 starts from another model than rank 0")
        assert said["settings"].startswith("rank 1 runs with another algorithm, topology, seed or rounds than rank 0")
        assert said["processes"] == "the group has 4 processes and ring(5) 5 clients; expected one each"
        assert said["timeout"].startswith("timeout is 0.0")
        assert "expected a label an example" in said["labels"], rank


def test_without_a_process_group_it_says_how_to_make_one():
    with pytest.raises(RuntimeError, match=r"no process group; expected one: torch.distributed.init_process_group"):
        run_peer(DFedSAMAlgorithm(), net, (torch.zeros(2, 6), torch.zeros(2).long()), 1, topology=ring(4))
