"""Pairs: the same noise from the same seed everywhere, parts that are whole, a run that goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from flows import Exact, randn
from torch import nn

from fewer.diffusion.rectified_flow_plus import EDMSampler, PairDataset, VelocityFromEDM, generate_pairs, real_pairs, sample
from fewer.diffusion.rectified_flow_plus.pairs import noise_of

SHAPE = (1, 4, 4)
SAMPLER = EDMSampler(steps=6)


class Labelled(nn.Module):
    """A velocity whose images say their label."""

    def forward(self, x, t, label):
        return (x - (label.to(x) / 10).reshape(-1, 1, 1, 1)) / t


def made(folder, n=25, **words):
    return generate_pairs(VelocityFromEDM(Exact(0.3)), n, SAMPLER, folder, SHAPE, **{"part": 10, "batch_size": 4} | words)


def test_noise_is_the_same_bits_in_every_process_and_batch(tmp_path):
    pairs = made(tmp_path)
    x, z = pairs.batch(torch.arange(25))
    for rows in (torch.tensor([7]), torch.tensor([3, 24, 0])):
        assert torch.equal(pairs.batch(rows)[1], z[rows])
        assert torch.equal(noise_of(pairs.z[rows], SHAPE), z[rows])
    assert torch.equal(pairs[7][1], z[7])
    other = generate_pairs(VelocityFromEDM(Exact(0.3)), 25, SAMPLER, tmp_path / "other", list(SHAPE), part=10)
    assert torch.equal(other.batch(torch.arange(25))[1], z)
    code = (
        "import sys; from fewer.diffusion.rectified_flow_plus import PairDataset\n"
        f"import torch; sys.stdout.buffer.write(PairDataset.open({str(tmp_path)!r}).batch(torch.arange(25))[1].numpy().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == z.numpy().tobytes()
    assert abs(float(z.std()) - 1) < 0.2
    assert len({each.numpy().tobytes() for each in z}) == 25
    assert x.dtype == torch.float32


def test_images_are_where_the_teachers_flow_ends_to_a_byte():
    z = randn(8, *SHAPE).float()
    teacher, fine = VelocityFromEDM(Exact(0.3)), EDMSampler(steps=240)
    x, scale = 80 * z, float((0.3**2 / (80**2 + 0.3**2)) ** 0.5)  # the exact flow of Gaussian data
    assert torch.allclose(fine(teacher, z), x * scale, atol=2e-3)
    assert (EDMSampler(18).calls, EDMSampler(40).calls) == (35, 79)
    calls = []
    EDMSampler(18)(lambda x, t: calls.append(float(t)) or x, z)
    assert len(calls) == 35
    assert calls[0] == pytest.approx(80 / 81)
    assert calls[-1] == pytest.approx(0.002 / 1.002)


def test_a_pair_costs_few_bytes_beside_its_image(tmp_path):
    pairs = made(tmp_path, n=40, part=40)
    with np.load(tmp_path / "part-00000.npz") as part:
        assert part["x"].dtype == np.uint8
        assert part["seed"].nbytes / 40 <= 33
    x, z = pairs.batch(torch.arange(40))
    wanted = SAMPLER(VelocityFromEDM(Exact(0.3)), z)
    assert (x - wanted.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-5


def test_a_run_that_broke_off_goes_on(tmp_path):
    whole = made(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done, n):
        if done > 10:
            raise Stop

    with pytest.raises(Stop):
        made(tmp_path / "broken", tell=stop)
    assert sorted(file.name for file in (tmp_path / "broken").iterdir()) == ["pairs.json", "part-00000.npz", "part-00001.npz"]
    with pytest.raises(FileNotFoundError, match="part-00002"):
        PairDataset.open(tmp_path / "broken")
    before = (tmp_path / "broken" / "part-00000.npz").stat().st_mtime_ns
    again = made(tmp_path / "broken")
    assert (tmp_path / "broken" / "part-00000.npz").stat().st_mtime_ns == before
    assert torch.equal(again.x, whole.x)
    assert torch.equal(again.z, whole.z)


def test_a_sampler_of_ones_own_is_known_again(tmp_path):
    """Also in another process, where its address is another."""

    class Own:
        def __call__(self, teacher, z):
            return z / 4

    made = [generate_pairs(VelocityFromEDM(Exact(0.3)), 5, sampler, tmp_path, SHAPE) for sampler in (Own(), Own())]
    assert torch.equal(made[0].x, made[1].x)
    with pytest.raises(ValueError, match="other sampler"):
        generate_pairs(VelocityFromEDM(Exact(0.3)), 5, SAMPLER, tmp_path, SHAPE)


@pytest.mark.parametrize("words", [{"n": 30}, {"seed": 1}])
def test_pairs_of_other_settings_are_not_mixed_in(tmp_path, words):
    made(tmp_path)
    with pytest.raises(ValueError, match="has pairs of other"):
        made(tmp_path, **words)
    with pytest.raises(ValueError, match="other sampler"):
        generate_pairs(VelocityFromEDM(Exact(0.3)), 25, EDMSampler(7), tmp_path, SHAPE, part=10, batch_size=4)


def test_labels_are_drawn_and_handed_to_the_teacher(tmp_path):
    pairs = generate_pairs(Labelled(), 50, SAMPLER, tmp_path, SHAPE, classes=5)
    x, _, label = pairs.batch(torch.arange(50))
    assert set(label.tolist()) == set(range(5))
    assert (x.mean((1, 2, 3)) - label / 10).abs().max() < 0.01


def test_real_images_get_the_noises_that_the_model_says():
    model, images = VelocityFromEDM(Exact(0.5)).train(), (0.5 * randn(12, *SHAPE)).clamp(-1, 1).float()
    pairs = real_pairs(model, images, steps=40, solver="heun", batch_size=5, generator=torch.Generator().manual_seed(0))
    assert model.training
    x, z = pairs.batch(torch.arange(12))
    assert torch.equal(x, images)
    assert torch.allclose(sample(model, z, 40, "heun"), images, atol=5e-3)
    assert torch.allclose(z, 2 * images, atol=0.05), "Gaussian data: noise is data over its deviation"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PairDataset(torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 3)), "expected as many of one shape"),
        (lambda: PairDataset(torch.zeros(3, 1, 2, 2), torch.arange(2)), "or a seed a pair"),
        (lambda: PairDataset(torch.zeros(3, 1, 2, 2, dtype=torch.int64), torch.zeros(3, 1, 2, 2)), "scale bytes"),
        (lambda: PairDataset(torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2, dtype=torch.int64)), "z is .* scale bytes"),
        (lambda: PairDataset(torch.zeros(3, 1, 2, 2), torch.arange(3), torch.zeros(3)), r"label is \(3,\) torch.float32; expected whole"),
        (lambda: real_pairs(VelocityFromEDM(Exact(1.0)), torch.zeros(3, 1, 2, 2, dtype=torch.uint8)), "scale bytes"),
        (lambda: EDMSampler(steps=1), "steps is 1"),
        (lambda: EDMSampler(sigma_min=80.0), "expected sigma_min below sigma_max"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_sampler_that_gives_something_else_is_refused_and_nothing_half_written(tmp_path):
    for sampler in (lambda teacher, z: z[..., :2], lambda teacher, z: z * float("nan")):
        with pytest.raises(ValueError, match="expected finite images"):
            generate_pairs(VelocityFromEDM(Exact(1.0)), 4, sampler, tmp_path / repr(id(sampler)), SHAPE)
        assert [file.name for file in (tmp_path / repr(id(sampler))).iterdir()] == ["pairs.json"]
    (tmp_path / "mine").mkdir()
    np.savez(tmp_path / "mine" / "part-00000.npz", x=np.zeros((10, *SHAPE), np.uint8), seed=np.arange(10))
    with pytest.raises(ValueError, match="parts without pairs.json"):
        made(tmp_path / "mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="expected a folder for the pairs"):
        made(tmp_path / "file")
    folder = tmp_path / "cut"
    made(folder)
    (folder / "part-00001.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="part-00001.npz cannot be read"):
        PairDataset.open(folder)
    (folder / "pairs.json").write_text(json.dumps({"pairs": 5}))
    with pytest.raises(ValueError, match="pairs.json"):
        PairDataset.open(folder)
