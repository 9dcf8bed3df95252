"""The verbs, clips of every kind, and every arm of the study on made clips."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewer.signals.pfnr import PFNRConfig, VideoArchive, psnr
from fewer.signals.pfnr.problems import Recipe, dense, read_clip, read_clips, resized, weigh
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec

TINY = PFNRConfig(16, 16, 4, grid=(4, 4), grid_channels=8, stem=16, strides=(2, 2), widths=(8, 8))


def moving(frames, height=16, width=16, phase=0.0):
    """A smooth pattern that moves, uint8 [T, 3, H, W]."""
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    channels = [np.sin(0.3 * x + 0.5 * t + phase + c) * np.cos(0.2 * y + c) for c in range(3)]
    return torch.from_numpy(np.stack(channels, axis=1) * 100 + 128).round().to(torch.uint8)


@pytest.fixture
def clips(tmp_path):
    """A folder with the same clip as an .npz file, as pictures, and as a video."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    frames = moving(5, 32, 48)
    folder = tmp_path / "clips"
    (folder / "b pictures").mkdir(parents=True)
    rows = frames.permute(0, 2, 3, 1).numpy()
    np.savez(folder / "a.npz", frames=rows)
    for number, row in enumerate(rows):
        Image.fromarray(row).save(folder / "b pictures" / f"{number}.png")
    video = cv2.VideoWriter(str(folder / "c.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    for row in rows:
        video.write(np.ascontiguousarray(row[..., ::-1]))
    video.release()
    (folder / "notes.txt").write_text("no clip")
    return folder, frames


def test_clips_are_read_from_files_folders_and_videos(clips):
    folder, frames = clips
    assert torch.equal(read_clip(folder / "a.npz"), frames)
    assert torch.equal(read_clip(folder / "b pictures"), frames)
    video = read_clip(folder / "c.avi")
    assert video.shape == frames.shape
    assert psnr(video, frames) > 25, "red, green, blue; a video loses a little"
    found = read_clips(folder, TINY, frames=3)
    assert [each.shape for each in found] == [(3, 3, 16, 16)] * 3
    np.savez(folder / "d.npz", frames=frames.numpy())
    assert torch.equal(read_clip(folder / "d.npz"), frames)


def test_frames_are_cut_in_the_middle_and_averaged():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 8, 32).expand(1, 3, 8, 32)
    found = resized(frames, 4, 4)
    assert found.shape == (1, 3, 4, 4)
    middle = frames[..., 12:20].float()
    assert found[0, 0, 0, 0] == round(float(middle[0, 0, :2, :2].mean()))
    assert torch.equal(resized(frames, 8, 32), frames)
    assert resized(frames[..., :1, :], 144, 16).shape == (1, 3, 144, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.mp4", "absent.mp4 is no file; expected a folder of pictures"),
        ("notes.txt", "notes.txt is no clip; expected a folder of pictures"),
        ("broken.mp4", "broken.mp4 has no frame that OpenCV can read"),
        ("floats.npz", "frames is float64 .*; expected uint8"),
        ("flat.npz", "frames is uint8 .*; expected uint8 \\[T, H, W, 3\\]"),
        ("other.npz", "has no array 'frames'"),
        ("empty", "has no pictures"),
    ],
)
def test_what_is_no_clip_is_refused(clips, name, message):
    folder, _ = clips
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "empty").mkdir()
    np.savez(folder / "floats.npz", frames=np.ones((2, 3, 4, 4)))
    np.savez(folder / "flat.npz", frames=np.ones((2, 4, 4), dtype=np.uint8))
    np.savez(folder / "other.npz", x=np.ones(3))
    with pytest.raises((ValueError, OSError), match=message):
        read_clip(folder / name)


def test_the_verbs_encode_decode_and_list(fewer, tmp_path):
    for number in range(2):
        np.savez(tmp_path / f"clip{number}.npz", frames=moving(3, 32, 48, number).permute(0, 2, 3, 1).numpy())
    words = ("--epochs", "2", "--sessions", "2", "--size", "32x32")
    first = json.loads(fewer("videos", "encode", "archive", "clip0.npz", *words, "--json").stdout)
    assert first["name"] == "clip0"
    assert first["bytes"] == (tmp_path / "archive").stat().st_size
    fewer("videos", "decode", "archive", "clip0", "--out", "before")
    told = fewer("videos", "encode", "archive", "clip1.npz", "--name", "second", "--minutes", "0.01").stdout
    assert "2 of 2 clips" in told
    fewer("videos", "decode", "archive", "clip0", "--out", "after")
    for number in range(3):
        name = f"{number:04d}.png"
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    listed = json.loads(fewer("videos", "list", "archive", "--json").stdout)
    assert [each["name"] for each in listed["clips"]] == ["clip0", "second"]
    assert listed["clips"][0]["psnr"] == first["psnr"]
    assert 0 < sum(each["bytes"] for each in listed["clips"]) < listed["bytes"]
    assert all(each["new_weights"] > 0 for each in listed["clips"])
    assert "2 of 2 clips of 32 x 32" in fewer("videos", "list", "archive").stdout
    whole = (tmp_path / "archive").read_bytes()
    for refused, message in (
        (("encode", "archive", "clip0.npz", "--name", "third", "--epochs", "1"), "the archive holds its 2 videos"),
        (("encode", "other", "clip0.npz", "--epochs", "1", "--size", "31x37"), "share too few factors"),
        (("encode", "other", "clip0.npz", "--size", "31"), "--size '31'; expected HEIGHTxWIDTH"),
        (("encode", "clip0.npz", "clip1.npz", "--epochs", "1"), "no whole archive of videos"),
        (("decode", "archive", "secnd", "--out", "new"), "did you mean 'second'"),
        (("list", "clip0.npz"), "no whole archive of videos"),
    ):
        done = fewer("videos", *refused, status=2)
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert (tmp_path / "archive").read_bytes() == whole
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "new").exists()


def test_a_file_is_weighed_with_its_masks():
    clips = [moving(3), moving(3, phase=1)]
    archive = VideoArchive(TINY, torch.Generator().manual_seed(0))
    for number, clip in enumerate(clips):
        archive.add(clip, f"clip {number}", epochs=1, loss="mse")
    found = weigh(archive.net, clips)
    used = sum(int(mask.sum()) for mask in archive.net.used.values())
    assert found.mask_bytes >= 2 * archive.net.masked_weights() / 8 * 0.9
    assert used + found.mask_bytes < found.bytes < used + found.mask_bytes + 30_000
    full = dense(TINY)
    assert (full.capacity, full.fso_block) == (1.0, None)


def test_every_arm_logs_what_the_claims_ask_for(monkeypatch):
    from fewer.signals.pfnr import study as module
    from fewer.study import Results, judge
    from fewer.study.results import Row

    monkeypatch.setattr(module, "SAME_WEIGHTS", 24)
    monkeypatch.setattr(module, "THIN", 64)
    work = module.Work([moving(4, phase=phase) for phase in range(3)], dataclasses.replace(TINY, max_sessions=3), Recipe(epochs=2))
    rows, options = [], {"wsn": "same-weights"}
    for name, arm in module.study.arms.items():
        for scale in (Scale.QUICK, Scale.FULL) if name == "fine-tune" else (Scale.QUICK,):
            events = []
            spec = TrialSpec("study", "pfnr", name, 0, scale, options | arm.defaults(scale, {}))
            arm.run(work, Trial(spec, events.append))
            rows += [Row(name, 0, each.name, each.coordinates, each.value) for each in events if isinstance(each, FigureEvent)]
    results = Results(rows, list(module.study.arms))
    verdicts = judge(module.study, results)
    assert verdicts[0].verdict == "holds", "lossless"
    assert {verdict.verdict for verdict in verdicts[1:4]} <= {"holds", "fails"}
    assert verdicts[4].verdict == "not testable here"
    assert {figure.name for figure in module.study.figures} <= {row.figure for row in rows}
    assert results.mean("changed", "fine-tune").value == 2
    assert results.mean("psnr_joint", "fine-tune").value > 5
    assert results.mean("parameters", "separate").value == 3 * results.mean("parameters", "fine-tune").value
    assert "All clips in one network of PFNR" in module.study.summarise(results)


def test_clips_of_ones_own_set_the_sessions(clips):
    from fewer.signals.pfnr import study as module

    work = module.task(Scale.QUICK, clips=str(clips[0]), capacity=0.3, placement="released")
    assert work.config.max_sessions == len(work.clips) == 3
    assert (work.config.capacity, work.config.placement) == (0.3, "released")
    with pytest.raises(NotADirectoryError, match="is no folder; expected one with clips"):
        module.task(Scale.QUICK, clips=str(clips[0] / "absent"))
    (clips[0] / "b pictures" / "none").mkdir()
    with pytest.raises(ValueError, match="has no clips"):
        module.task(Scale.QUICK, clips=str(clips[0] / "b pictures" / "none"))
