"""Each meter against something known."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from fewer import meters
from fewer.errors import UserError
from fewer.meters.energy import Energy, _spent, read_rapl, readings_of_nvml

MIB = 2**20


def busy(cpu_seconds: float) -> None:
    """A loop that ends when it has used that much processor time."""
    end = time.process_time() + cpu_seconds
    while time.process_time() < end:
        pass


@pytest.mark.alone
def test_processor_seconds_of_a_busy_loop():
    with meters.measure(energy=False) as cost:
        busy(0.2)
    figures = cost.figures()
    assert figures["cpu_seconds"] == pytest.approx(0.2, rel=0.05)
    assert figures["seconds"] >= figures["cpu_seconds"] * 0.95


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    with meters.measure(energy=False) as before:
        pass
    with meters.measure(energy=False) as cost:
        block = np.ones(200 * MIB // 8)
        del block
    grown = cost.figures()["peak_memory"] - before.figures()["peak_memory"]
    assert grown == pytest.approx(200 * MIB, rel=0.1)
    with meters.measure(energy=False) as after:
        pass
    assert after.figures()["peak_memory"] < cost.figures()["peak_memory"] - 100 * MIB


def test_an_inner_section_does_not_hide_the_peak_of_the_outer_one():
    with meters.peak_resident_memory() as outer:
        block = np.ones(100 * MIB // 8)
        del block
        with meters.peak_resident_memory() as inner:
            pass
    assert outer.peak > inner.peak + 50 * MIB


def test_flops_of_a_loop_of_matrix_products():
    a, b = torch.ones(7, 11), torch.ones(11, 13)
    with meters.count_flops() as flops:
        for _ in range(5):
            a @ b
    assert flops.total == 5 * 2 * 7 * 11 * 13
    with meters.count_flops() as flops:
        torch.zeros(7, 13).addmm_(torch.ones(7, 11), torch.ones(11, 13))  # in place, which torch's own table leaves out
    assert flops.total == 2 * 7 * 11 * 13


def test_counters_nest_and_close():
    with meters.counting() as outer:
        meters.count("queries", 2)
        with meters.counting() as inner:
            meters.count("queries")
            meters.count("bytes", 0.5)
    meters.count("queries", 100)
    assert outer == {"backward_passes": 0, "queries": 3, "bytes": 0.5}
    assert inner == {"backward_passes": 0, "queries": 1, "bytes": 0.5}


def test_backward_passes_are_counted_whichever_door_they_take():
    x = torch.ones(3, requires_grad=True)
    doors = torch.autograd.backward, torch.autograd.grad
    with meters.counting() as outer:
        (x * x).sum().backward()
        with meters.counting() as inner:
            torch.autograd.grad((x * x).sum(), x)
            torch.autograd.backward((x * x).sum())
    assert outer["backward_passes"] == 3
    assert inner["backward_passes"] == 2
    assert (torch.autograd.backward, torch.autograd.grad) == doors


def test_a_section_that_raises_is_measured_and_closed():
    with contextlib.suppress(RuntimeError), meters.measure(energy=False) as cost:
        meters.count("queries")
        raise RuntimeError("on purpose")
    assert cost.figures()["queries"] == 1
    assert cost.figures()["seconds"] > 0
    with meters.counting() as after:
        pass
    assert "queries" not in after


def small_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    return network, torch.optim.AdamW(network.parameters(), fused=True), torch.randn(64, 300), torch.randint(10, (64,))


def train_step(network, optimizer, x, y):
    F.cross_entropy(network(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_tensor_bytes_equal_those_of_torchs_own_tracker():
    network, optimizer, x, y = small_network()
    with meters.tensor_memory(network, optimizer) as peak:
        train_step(network, optimizer, x, y)
    network, optimizer, x, y = small_network()
    reference = MemTracker()
    reference.track_external(network, optimizer)
    with reference:
        train_step(network, optimizer, x, y)
    theirs = reference.get_tracker_snapshot("peak")[torch.device("cpu")]
    names = {"Parameter": "parameters", "Gradient": "gradients", "Optstate": "optimizer state", "Activation": "activations"}
    for kind, ours in names.items():
        assert peak.bytes.get(ours, 0) == next(value for key, value in theirs.items() if getattr(key, "value", key) == kind)
    assert peak.total == theirs["Total"]


def test_tensor_bytes_of_several_steps_and_of_an_optimizer_made_inside():
    network, _, x, y = small_network()
    weights = sum(4 * p.numel() for p in network.parameters())
    with meters.tensor_memory(network) as peak:
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(3):
            train_step(network, optimizer, x, y)
    assert peak.bytes["parameters"] == peak.bytes["gradients"] == weights
    assert peak.bytes["optimizer state"] == 2 * weights + 4 * 4  # two moments, and a step count for each of the four parameters


def test_tensor_bytes_of_an_allocation_of_known_size_and_of_a_label():
    data = torch.zeros(1000, 100)
    with meters.tensor_memory() as peak:
        batch = data[:10]  # a view of data from outside
        scratch = torch.zeros(MIB // 4)
        with meters.memory_for("kept inputs"):
            kept = batch.clone()
        del scratch
        later = torch.zeros(10)
    assert (kept.shape, later.shape) == ((10, 100), (10,))
    assert peak.bytes == {"activations": MIB, "kept inputs": 10 * 100 * 4}
    assert peak.allocator_peak is None


def test_tensor_bytes_beside_the_peak_have_a_peak_of_their_own():
    with meters.tensor_memory(beside=["kept inputs"]) as peak:
        with meters.memory_for("kept inputs"):
            first = torch.zeros(MIB // 4)
            second = torch.zeros(MIB // 4)
            del first
        third = torch.zeros(10)
        with meters.memory_for("kept inputs"):
            fourth = torch.zeros(MIB // 8)
    assert len(second) + len(third) + len(fourth) > 0
    assert peak.bytes == {"activations": 40}
    assert peak.total == 40
    assert peak.beside == {"kept inputs": 2 * MIB}


def test_tensor_bytes_without_autograd():
    weight = torch.zeros(50, 40)
    with meters.tensor_memory() as peak, torch.no_grad():
        optimizer = torch.optim.Adam([weight], fused=True)
        weight.grad = torch.ones(50, 40)
        optimizer.step()
    assert peak.bytes == {"parameters": 8000, "gradients": 8000, "optimizer state": 16004}


def test_rapl_is_read_and_its_wrap_around_mended(tmp_path):
    """On values recorded from an Intel machine's powercap folder: this machine has no RAPL to read."""
    for package, (energy, wraps) in {"intel-rapl:0": (262143328850, 262143328850), "intel-rapl:1": (1500000, 65712999613)}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / package / "max_energy_range_uj").write_text(f"{wraps}\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0: counted in it already
    start = read_rapl(tmp_path)
    assert [reading.joules for reading in start] == [262143.32885, 1.5]
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("2000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("4000000\n")
    spent = [_spent(a, b) for a, b in zip(start, read_rapl(tmp_path), strict=True)]
    assert spent == pytest.approx([2.0, 2.5])


def test_nvml_counts_in_millijoules():
    """On values recorded from a GPU: this machine has none."""
    start, end = readings_of_nvml([123_456_789])[0], readings_of_nvml([123_957_289])[0]
    assert _spent(start, end) == pytest.approx(500.5)


def test_energy_says_where_it_comes_from():
    with meters.measure() as cost:
        busy(0.5)
    figures = cost.figures()
    assert cost.energy_source == meters.energy_source()
    assert 0.1 < figures["joules"] < 500  # half a second of one core and the memory beside it: neither milliwatts nor kilowatts
    assert figures["co2e_kg"] == pytest.approx(figures["joules"] * 0.37 / 3.6e6, rel=0.2)  # the mean of the United States


def test_an_unknown_country_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("FEWER_COUNTRY", "ATLANTIS")
    with pytest.raises(UserError, match=r"FEWER_COUNTRY is 'ATLANTIS'; expected a country's three letters.*mend the variable"):
        _ = Energy(joules=1.0, source="rapl").co2e_kg


@pytest.mark.alone
def test_a_meter_costs_less_than_two_percent_of_a_section_of_two_seconds():
    """The processor time that is not the section's own: at its two ends, and in threads beside it. Pairs of runs would show the noise."""

    def share() -> float:
        process, entering = time.process_time(), time.thread_time()
        with meters.measure():
            began = time.thread_time()
            while time.thread_time() - began < 2:
                pass
            ended = time.thread_time()
        left = time.thread_time()
        beside = (time.process_time() - process) - (left - entering)
        return (began - entering + left - ended + beside) / (ended - began)

    share()  # the first one in a process looks around
    assert min(share() for _ in range(4)) < 0.02  # what else the machine does only adds


def test_the_room_is_light():
    code = "import sys, fewer.meters; fewer.meters.measure; assert not {'torch', 'numpy', 'codecarbon'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
