"""No forgetting, bit for bit; what is used and what is free; the best state and not the last; files; and what is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from fewer.signals.pfnr import PFNR, PFNRConfig, VideoArchive, encoding, psnr
from fewer.signals.pfnr import archive as module

CONFIG = PFNRConfig(24, 32, 3, grid=(3, 4), grid_channels=8, stem=24, strides=(2, 2, 2), widths=(8, 10, 10))


def video(seed, frames=4, config=CONFIG):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (frames, 3, config.height, config.width), dtype=torch.uint8, generator=generator)


def an_archive(sessions=3, epochs=5, config=CONFIG, lr=2e-2, **options):
    """An archive of random clips, with what each decoded to right after its session."""
    archive = VideoArchive(config, torch.Generator().manual_seed(0))
    reports, right_after = [], []
    for session in range(sessions):
        reports.append(archive.add(video(session), f"clip {session}", epochs=epochs, lr=lr, **options))
        right_after.append(archive.decode(f"clip {session}"))
    return archive, reports, right_after


@pytest.fixture(scope="module")
def three():
    return an_archive()


@pytest.fixture
def archive(three):
    return copy.deepcopy(three[0])


def test_earlier_videos_decode_bit_for_bit_as_before(three, tmp_path):
    archive, _, right_after = three
    for session, expected in enumerate(right_after):
        assert torch.equal(archive.decode(f"clip {session}"), expected)
    archive.save(tmp_path / "archive", bits=None)
    again = VideoArchive.load(tmp_path / "archive")
    for session, expected in enumerate(right_after):
        assert torch.equal(again.decode(f"clip {session}"), expected)
    with torch.no_grad():  # not only after rounding to bytes
        for session in range(3):
            t = torch.tensor([0.25])
            assert torch.equal(again.net(t, session), archive.net(t, session))


def test_without_the_gradients_mask_they_would_not(monkeypatch):
    honest = module.fit
    monkeypatch.setattr(module, "fit", lambda net, videos, training, frozen, generator: honest(net, videos, training, None, generator))
    archive, _, right_after = an_archive(2)
    assert not torch.equal(archive.decode("clip 0"), right_after[0])


def test_a_quantised_archive_keeps_its_videos_when_it_grows(tmp_path):
    archive = VideoArchive(CONFIG, torch.Generator().manual_seed(0))
    for session in range(2):
        archive.add(video(session), f"clip {session}", epochs=5, lr=2e-2)
    archive.save(tmp_path / "two", bits=6)
    stored = VideoArchive.load(tmp_path / "two", torch.Generator().manual_seed(5))
    before = [stored.decode(f"clip {session}") for session in range(2)]
    for grown, bits in ((archive, 6), (stored, 6), (stored, 3), (stored, None)):
        if len(grown.names) == 2:
            grown.add(video(2), "clip 2", epochs=3, lr=2e-2)
        grown.save(tmp_path / "three", bits=bits, overwrite=True)
        again = VideoArchive.load(tmp_path / "three")
        for session in range(2):
            assert torch.equal(again.decode(f"clip {session}"), before[session]), bits
    assert torch.equal(again.decode("clip 2"), stored.decode("clip 2"))


def test_weights_in_use_never_change_and_are_reused():
    archive = VideoArchive(CONFIG, torch.Generator().manual_seed(1))
    union, reused, moved = None, 0, 0
    for session in range(3):
        weights = {name: weight.detach().clone() for name, weight in archive.net.weights().items()}
        used = archive.net.used
        report = archive.add(video(session), f"{session}", epochs=3, lr=2e-2)
        masks = archive.net.masks(session)
        for name, weight in archive.net.weights().items():
            assert torch.equal(weight[used[name]], weights[name][used[name]])
            moved += int((weight != weights[name])[~used[name]].sum())
            reused += int((masks[name] & used[name]).sum()) if session else 0
        new = sum(int((masks[name] & ~used[name]).sum()) for name in masks)
        assert report.new_weights == new > 0
        union = masks if union is None else {name: union[name] | masks[name] for name in masks}
        assert all(torch.equal(union[name], archive.net.used[name]) for name in masks)
        assert (
            archive.free_fraction
            == report.free_fraction
            == 1 - sum(int(each.sum()) for each in union.values()) / archive.net.masked_weights()
        )
    assert moved > 0
    assert reused > 0


def test_the_best_state_is_kept_and_its_masks_are_the_used_ones(monkeypatch):
    """The learning rate jumps in the last epochs, so that the best state is not the last."""
    honest = encoding.learning_rate
    monkeypatch.setattr(encoding, "learning_rate", lambda lr, epoch, epochs: 3 * lr if epoch >= 3 else honest(lr, epoch, epochs))
    archive = VideoArchive(CONFIG, torch.Generator().manual_seed(2))
    seen = []
    report = archive.add(video(0), "first", epochs=6, lr=5e-2, on_epoch=seen.append)
    assert len(seen) == 6
    assert report.psnr == max(seen)
    assert report.best_epoch == seen.index(max(seen)) + 1 < 6
    assert psnr(archive.decode("first"), video(0)) == pytest.approx(report.psnr, abs=0.05)
    first = archive.decode("first")
    for name, mask in archive.net.current_masks().items():
        assert torch.equal(mask, archive.net.masks(0)[name])
    archive.add(video(1), "second", epochs=6, lr=5e-2)
    assert torch.equal(archive.decode("first"), first)


def test_the_last_masks_for_the_union_would_forget(monkeypatch):
    """What the released code does: U of the last masks, decoding with the best; a weight in use is then free."""
    honest = encoding.learning_rate
    monkeypatch.setattr(encoding, "learning_rate", lambda lr, epoch, epochs: 3 * lr if epoch >= 3 else honest(lr, epoch, epochs))
    archive, every = VideoArchive(CONFIG, torch.Generator().manual_seed(2)), []
    report = archive.add(video(0), "first", epochs=6, lr=5e-2, on_epoch=lambda quality: every.append(archive.net.current_masks()))
    first, best, last = archive.decode("first"), archive.net.masks(0), every[-1]
    assert report.best_epoch < 6
    assert any((best[name] & ~last[name]).any() for name in best), "weights that decode and would be free"
    wrong = copy.deepcopy(archive)
    monkeypatch.setattr(PFNR, "used", property(lambda net: last))
    wrong.add(video(1), "second", epochs=6, lr=5e-2)
    assert not torch.equal(wrong.decode("first"), first)


def test_once_all_is_used_a_session_learns_its_mask_and_head():
    config = PFNRConfig(24, 32, 2, grid=(3, 4), grid_channels=8, stem=16, strides=(2, 2, 2), widths=(8, 8, 8), capacity=1.0)
    archive, reports, right_after = an_archive(2, epochs=2, config=config)
    assert [report.free_fraction for report in reports] == [0, 0]
    assert reports[1].new_weights == 0
    assert torch.equal(archive.decode("clip 0"), right_after[0])
    assert not torch.equal(archive.net.heads[0].weight, archive.net.heads[1].weight)


def test_a_session_that_breaks_leaves_the_archive_as_it_was(archive):
    archive = VideoArchive(CONFIG, torch.Generator().manual_seed(3))
    archive.add(video(0), "first", epochs=1)
    before = copy.deepcopy(archive.net.state_dict())

    def stop(quality):
        raise KeyboardInterrupt

    for error, options in ((FloatingPointError, {"lr": 1e30}), (KeyboardInterrupt, {"on_epoch": stop, "lr": 1e-2})):
        with pytest.raises(error):
            archive.add(video(1), "second", epochs=4, reinit_scores=True, **options)
        assert archive.names == ["first"]
        assert all(torch.equal(value, before[name]) for name, value in archive.net.state_dict().items())
        assert not archive.net.training
        assert all(parameter.grad is None for parameter in archive.net.parameters())


def test_frames_are_chosen_and_state_dicts_carry_the_masks(archive):
    whole = archive.decode("clip 1")
    assert torch.equal(archive.decode("clip 1", slice(1, 3)), whole[1:3])
    assert torch.equal(archive.decode("clip 1", [3, 0, -1]), whole[[3, 0, 3]])
    assert archive.decode("clip 1", []).shape == (0, 3, 24, 32)
    other = PFNR(CONFIG)
    other.load_state_dict(archive.net.state_dict())
    other.eval()
    with torch.no_grad():
        assert other.recorded == 3
        assert torch.equal(other(torch.tensor([0.5]), 1), archive.net(torch.tensor([0.5]), 1))
        times = torch.tensor([0, 1])  # whole ones, and finer ones, are times as well
        assert torch.equal(other(times, 1), other(times.float(), 1))
        assert torch.allclose(other(times.double(), 1), other(times.float(), 1), atol=1e-3)
    double = copy.deepcopy(archive)
    double.net.double()
    assert (double.decode("clip 1").int() - whole.int()).abs().max() <= 1


def test_other_placements_no_operator_and_small_losses_encode_too():
    for changes in ({"placement": "released"}, {"fso_block": None}, {"fso_block": 0}):
        config = PFNRConfig(**(CONFIG.__dict__ | changes))
        archive, _, right_after = an_archive(2, 1, config, loss="mse", batch_size=3)
        assert torch.equal(archive.decode("clip 0"), right_after[0])


def test_eight_and_sixteen_bits(three, tmp_path):
    archive, reports, right_after = three
    assert archive.quality("clip 1") == reports[1].psnr
    assert sum(archive.new_weights(name) for name in archive.names) == sum(int(each.sum()) for each in archive.net.used.values())
    sizes = {}
    for bits in (16, 8, 4, None):
        sizes[bits] = archive.save(tmp_path / "archive", bits=bits, overwrite=True)
        assert sizes[bits] == (tmp_path / "archive").stat().st_size
        if bits == 16:
            again = VideoArchive.load(tmp_path / "archive")
            for session in range(3):
                told = psnr(again.decode(f"clip {session}"), video(session))
                assert abs(told - psnr(right_after[session], video(session))) < 0.01
    assert archive.measure("clip 0", video(0)) == archive.quality("clip 0") == psnr(right_after[0], video(0))
    assert sizes[4] < sizes[8] < sizes[16] < sizes[None]
    used = sum(int(each.sum()) for each in archive.net.used.values())
    assert sizes[8] - sizes[4] == pytest.approx(used / 2, rel=0.05)


def test_widths_counts_and_sizes_are_the_papers():
    paper = PFNRConfig(720, 1280, max_sessions=8)
    assert paper.channels == (112, 96, 96, 96, 96)
    assert paper.modes == (22, 40)
    study = PFNRConfig(48, 64, 4, grid=(6, 8), grid_channels=16, stem=128, strides=(2, 2, 2), widths=(16, 24, 24))
    assert PFNR(study).masked_weights() == 222_464
    assert PFNR(PFNRConfig(**(study.__dict__ | {"fso_block": None, "stem": 192}))).masked_weights() == 221_952
    assert PFNR(PFNRConfig(**(study.__dict__ | {"fso_block": None}))).masked_weights() == 162_560
    assert PFNRConfig.from_json(study.to_json()) == study
    assert PFNRConfig.for_size(240, 320, 3).height == 240


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 25}, "height and width are 25 x 32; expected grid times the product of strides, 24 x 32"),
        ({"capacity": 0}, "capacity is 0; expected a share"),
        ({"capacity": 1.1}, "capacity is 1.1; expected a share"),
        ({"fso_block": 3}, "fso_block is 3; expected 0 to 2, or None"),
        ({"fso_block": -1}, "fso_block is -1; expected 0 to 2"),
        (
            {"grid": (1, 1), "strides": (8, 3), "widths": (4, 4), "height": 24, "width": 24, "fso_block": 0},
            "modes \\(0, 0\\); expected at least 1 each",
        ),
        ({"max_sessions": 0}, "max_sessions is 0; expected a whole number of at least 1"),
        ({"widths": (8, 8)}, "widths has 2 entries; expected 3, one a stride"),
        ({"strides": ()}, "strides is empty"),
        ({"placement": "middle"}, "placement is 'middle'; expected one of centred, released"),
        ({"frequencies": (0, 40)}, r"frequencies\[0\] is 0; expected a finite number above 0"),
    ],
)
def test_a_shape_that_is_none_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PFNRConfig(**(CONFIG.__dict__ | changes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decodes_but_is_not_trained(archive, dtype):
    whole = archive.decode("clip 1")
    archive.net.to(dtype)
    assert (archive.decode("clip 1").int() - whole.int()).abs().max() <= 255 * 5 * torch.finfo(dtype).eps
    fresh = VideoArchive(CONFIG)
    fresh.net.to(dtype)
    with pytest.raises(ValueError, match=f"the network is {dtype}, too coarse to train; expected float32 or float64"):
        fresh.add(video(0), "a")


def test_a_generator_of_its_own_draws_everything():
    before = torch.get_rng_state()
    archive = VideoArchive(CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        archive.add(video(0), "a", epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    other = VideoArchive(CONFIG, torch.Generator().manual_seed(0))
    other.add(video(0), "a", epochs=1)
    assert torch.equal(other.decode("a"), archive.decode("a"))


def test_what_cannot_be_added_or_decoded_is_named(archive, tmp_path):
    fresh = VideoArchive(CONFIG)
    for frames, name, options, message in (
        (video(0).float(), "a", {}, r"frames is torch.float32 \[4, 3, 24, 32\]; expected a uint8 tensor \[T, 3, 24, 32\]"),
        (video(0)[..., :-1], "a", {}, r"frames is torch.uint8 \[4, 3, 24, 31\]"),
        (video(0)[0], "a", {}, r"frames is torch.uint8 \[3, 24, 32\]"),
        (video(0).numpy(), "a", {}, "frames is ndarray"),
        (video(0)[:0], "a", {}, "frames has T = 0"),
        (video(0), "", {}, "name is ''; expected one that the archive has not yet"),
        (video(0), "a", {"epochs": 0}, "epochs is 0"),
        (video(0), "a", {"lr": -1}, "lr is -1"),
        (video(0), "a", {"batch_size": 0}, "batch_size is 0"),
        (video(0), "a", {"loss": "l2"}, "loss is 'l2'; expected one of ssim, mse"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.add(frames, name, **options)
    small = VideoArchive(PFNRConfig(8, 8, 1, grid=(4, 4), grid_channels=4, stem=8, strides=(2,), widths=(4,), fso_block=0))
    with pytest.raises(ValueError, match="frames are 8 x 8; expected at least 11 x 11, a window of SSIM: use loss='mse'"):
        small.add(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "a")
    with pytest.raises(ValueError, match="name is 'clip 1'; expected one that the archive has not yet"):
        archive.add(video(0), "clip 1")
    with pytest.raises(ValueError, match="the archive holds its 3 videos; expected no more"):
        archive.add(video(0), "clip 3")
    with pytest.raises(ValueError, match="there is no video 'clip'; expected one of clip 0, clip 1, clip 2: did you mean 'clip .'"):
        archive.decode("clip")
    with pytest.raises(ValueError, match="the archive is empty"):
        fresh.decode("a")
    for frames in ([4], [-5], [0.5]):
        with pytest.raises(ValueError, match="frame .* of clip 0 is asked for; expected whole numbers from 0 to 3"):
            archive.decode("clip 0", frames)
    for session in (3, -1, 0.5):
        with pytest.raises(ValueError, match="session is .*; expected 0 to 2, the sessions planned for"):
            archive.net(torch.zeros(1), session)
    with pytest.raises(ValueError, match="session is 0; expected one of the 0 that are recorded"):
        fresh.net.masks(0)
    with pytest.raises(ValueError, match="session is 0.5; expected one of the 3 that are recorded"):
        archive.net.masks(0.5)
    with pytest.raises(ValueError, match="3 sessions are recorded; expected no more than max_sessions"):
        archive.net.record(archive.net.current_masks())
    for bits in (1, 17, 7.5, True):
        with pytest.raises(ValueError, match="bits is .*; expected a whole number from 2 to 16"):
            archive.save(tmp_path / "archive", bits=bits)
    with pytest.raises(ValueError, match="the archive has no video"):
        fresh.save(tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


def test_files_that_are_no_archive_are_refused_in_one_line(archive, tmp_path):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "archive"
    archive.save(file)
    with pytest.raises(FileExistsError, match="path .*archive exists"):
        archive.save(file)
    whole, tensors = file.read_bytes(), load_file(file)
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut is no whole archive of videos|cut is no whole safetensors file"):
            VideoArchive.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="absent is no file; expected an archive of videos"):
        VideoArchive.load(tmp_path / "absent")
    videos = [{"name": f"clip {i}", "frames": 4, "psnr": 9.0, "bits": dict.fromkeys([*archive.net.weights(), "head"], 8)} for i in range(3)]
    about = {"format": "fewer.pfnr", "version": "1", "config": CONFIG.to_json(), "videos": json.dumps(videos)}
    save_file(tensors, tmp_path / "same", metadata=about)
    assert torch.equal(VideoArchive.load(tmp_path / "same").decode("clip 0"), VideoArchive.load(file).decode("clip 0"))
    name = "0.layers.0.weights.0"
    for changed, metadata, message in (
        ({}, {}, "is a safetensors file, but no archive of videos"),
        ({}, about | {"version": "2"}, "has version 2; expected 1: read it with the fewer that wrote it, or a newer one"),
        ({}, about | {"config": "{}"}, "does not say what it holds"),
        ({}, about | {"videos": json.dumps(videos[:1] * 2)}, "does not say what it holds"),
        ({}, about | {"videos": json.dumps([{"name": "a"}])}, "does not say what it holds"),
        ({"0.mask": tensors["0.mask"][:-5].clone()}, about, "is no whole archive"),
        ({"0.mask": tensors["1.mask"].clone()}, about, "is no whole archive"),
        ({name: tensors[name][:-1].clone()}, about, "is no whole archive"),
        ({f"{name}.scale": tensors[f"{name}.scale"][:, :-1].contiguous()}, about, "is no whole archive"),
        ({f"{name}.scale": tensors[f"{name}.scale"] * math.nan}, about, "is no whole archive"),
    ):
        save_file(tensors | changed, tmp_path / "other", metadata=metadata)
        with pytest.raises(ValueError, match=message):
            VideoArchive.load(tmp_path / "other")
    del tensors[name]
    save_file(tensors, tmp_path / "other", metadata=about)
    with pytest.raises(ValueError, match="is no whole archive"):
        VideoArchive.load(tmp_path / "other")
