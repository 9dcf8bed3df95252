"""Networks as C: equal to torch, clean, exact in their weights, honest about their size."""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fewer.control import PredictiveController, UnsupportedLayer, compile_controller, compile_to_c
from fewer.control._shared.emulator import controller_setup, cortex_m4_instructions, missing_tools, network_setup
from fewer.control._shared.toolchain import STRICT
from fewer.control.smart_composites.problems import CASES, LastStep
from fewer.control.smart_composites.to_c import compiler

torch.set_num_threads(1)


def test_weights_in_the_text_are_the_tensors_bit_for_bit_and_the_text_is_the_same_each_time(tmp_path):
    model, x = CASES["mlp-10-32-32-4"].built()
    first, second = (compile_to_c(model, x, tmp_path / name) for name in "ab")
    assert [file.read_bytes() for file in first.files] == [file.read_bytes() for file in second.files]
    text = first.source.read_text()
    for index, layer in zip((0, 1, 2), (model[0], model[2], model[4]), strict=True):
        body = re.search(rf"net_w{index}\[\d+\] = {{(.*?)}};", text, re.S)[1]
        read = np.array([np.float32(word.strip().removesuffix("f")) for word in body.split(",")])
        outputs, inputs = layer.weight.shape
        panel = 16 if outputs >= 16 else outputs
        unpacked = read.reshape(outputs // panel, inputs, panel).transpose(0, 2, 1).reshape(outputs, inputs)
        assert np.array_equal(unpacked, layer.weight.detach().numpy())
        body = re.search(rf"net_w{index}_bias\[\d+\] = {{(.*?)}};", text, re.S)[1]
        assert np.array_equal([np.float32(word.strip().removesuffix("f")) for word in body.split(",")], layer.bias.detach().numpy())


def test_weights_of_a_convolution_and_a_gru_read_back_bit_for_bit_as_panels(tmp_path):
    """Channels and gates in panels of 16 and one of the rest, groups one after the other."""
    torch.manual_seed(0)
    conv, gru = nn.Conv2d(6, 38, 3, groups=2), nn.GRU(3, 7, batch_first=True)
    text = compile_to_c(conv, torch.zeros(1, 6, 8, 8), tmp_path / "a").source.read_text()
    text += compile_to_c(LastStep(gru, 1), torch.zeros(1, 2, 3), tmp_path / "b", name="g").source.read_text()
    for name, rows in (("net_w0", conv.weight.reshape(2, 19, -1)), ("g_w0_hh", gru.weight_hh_l0[None])):
        body = re.search(rf"{name}\[\d+\] = {{(.*?)}};", text, re.S)[1]
        read, at = np.array([np.float32(word.strip().removesuffix("f")) for word in body.split(",")]), 0
        for group in rows.detach().numpy():
            for start in range(0, len(group), 16):
                panel = group[start : start + 16]
                assert np.array_equal(read[at : at + panel.size].reshape(panel.shape[1], -1).T, panel)
                at += panel.size
        assert at == read.size


@pytest.mark.parametrize("name", ["mlp-10-32-32-4", "cnn-4-12", "signal-cnn-8", "gru-4-16", "lstm-4-16", "rnn-4-16"])
def test_onnx_round_trip_equals_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = CASES[name].built()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"])
    compiled = compile_to_c(tmp_path / "m.onnx", None, tmp_path / "c", test=True)
    wanted = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})[0][0]
    assert np.abs(compiled.predict(x) - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 0.1)
    command = ["gcc", *STRICT, "-O2", *(str(file) for file in compiled.files if file.suffix == ".c"), "-o", str(tmp_path / "t"), "-lm"]
    subprocess.run(command, check=True)
    assert "0 of" in subprocess.run([str(tmp_path / "t")], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", ["mlp-64-128-10", "cnn-8-28", "gru-4-16"])
def test_reported_sizes_are_the_measured_ones(name, tmp_path):
    model, x = CASES[name].built()
    compiled = compile_to_c(model, x, tmp_path / "c")
    (tmp_path / "size.c").write_text(
        '#include "net.h"\n#include <stdio.h>\nint main(void) { printf("%d %d", (int)sizeof(net_state), NET_RAM_BYTES); return 0; }'
    )
    source = str(compiled.source)
    subprocess.run(["gcc", "-Os", f"-I{tmp_path / 'c'}", str(tmp_path / "size.c"), source, "-o", str(tmp_path / "s"), "-lm"], check=True)
    measured, defined = map(int, subprocess.run([str(tmp_path / "s")], capture_output=True, text=True, check=True).stdout.split())
    assert measured == defined == compiled.ram_bytes
    subprocess.run(["gcc", "-std=c99", "-Os", "-c", source, "-o", str(tmp_path / "n.o")], check=True)
    sections = subprocess.run(["size", "-A", str(tmp_path / "n.o")], capture_output=True, text=True, check=True).stdout
    flash = sum(int(line.split()[1]) for line in sections.splitlines() if line.startswith((".text", ".rodata")))
    assert abs(compiled.flash_bytes - flash) <= 0.05 * flash


PAINT = """#include "@header"
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
static unsigned char stack[1 << 16];
static ucontext_t here, there;
@setup
static void nothing(void) {}
static int depth(void (*f)(void))
{
    int free = 0;
    memset(stack, 0xA5, sizeof stack);
    getcontext(&there);
    there.uc_stack.ss_sp = stack; there.uc_stack.ss_size = sizeof stack; there.uc_link = &here;
    makecontext(&there, f, 0);
    swapcontext(&here, &there);
    while (stack[free] == 0xA5) free++;
    return (int)sizeof stack - free;
}
int main(void) { prepare(); call(); printf("%d", (int)sizeof state + depth(call) - depth(nothing)); return 0; }
"""


@pytest.mark.parametrize("name", ["mlp-64-128-10", "signal-cnn-8", "the controller"])
def test_buffers_and_stack_are_what_a_painted_stack_shows(name, tmp_path):
    if name == "the controller":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 1)).double()
        controller = PredictiveController(model, (1, 12), 4, bounds=(-1, 1), past_inputs=1, past_outputs=3, max_iter=1)
        compiled, header, setup = compile_controller(controller, tmp_path / "c"), "net_mpc.h", controller_setup("net")
        sources = compiled.sources
    else:
        compiled, header, setup = compile_to_c(*CASES[name].built(), tmp_path / "c"), "net.h", network_setup("net")
        sources = [compiled.source]
    (tmp_path / "paint.c").write_text(PAINT.replace("@header", header).replace("@setup", setup))
    program = str(tmp_path / "paint")
    files = [str(tmp_path / "paint.c"), *map(str, sources)]
    subprocess.run(["gcc", "-Os", f"-I{tmp_path / 'c'}", *files, "-o", program, "-lm"], check=True)
    painted = int(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    assert abs(compiled.ram_bytes + compiled.sizes.stack - painted) <= 0.1 * painted
    assert (
        f"{compiled.sizes.flash} bytes of code and constants, {compiled.sizes.stack} bytes of stack"
        in (tmp_path / "c" / "README.md").read_text()
    )


@pytest.mark.skipif(bool(missing_tools()), reason=missing_tools())
def test_an_emulated_cortex_m4_runs_the_c_in_a_counted_number_of_instructions(tmp_path):
    compiled = compile_to_c(*CASES["mlp-10-32-32-4"].built(), tmp_path)
    first, *others = cortex_m4_instructions([compiled.source], network_setup("net"), 3, "-O3")
    assert compiled.macs < first < 10 * compiled.macs
    assert all(abs(other - first) <= 80 for other in others)


def test_without_the_emulator_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt install gcc-arm-none-eabi"):
        cortex_m4_instructions([tmp_path / "net.c"], "")


def test_two_networks_link_into_one_program_and_cxx_takes_the_headers(tmp_path):
    model, x = CASES["mlp-4-16-1"].built()
    first, second = (compile_to_c(model, x, tmp_path / name, name=name) for name in ("left", "right"))
    text = '#include "left.h"\n#include "right.h"\nleft_state a; right_state b; float x[4], y[1];\n'
    text += "int main() { left_reset(&a); right_reset(&b); left_predict(x, y, &a); right_predict(x, y, &b); return 0; }"
    (tmp_path / "main.c").write_text(text)
    folders = [f"-I{tmp_path / name}" for name in ("left", "right")]
    command = ["gcc", *STRICT, *folders, str(tmp_path / "main.c"), str(first.source), str(second.source), "-o", str(tmp_path / "m"), "-lm"]
    subprocess.run(command, check=True)
    if shutil.which("g++"):
        (tmp_path / "main.cc").write_text(text)
        subprocess.run(["g++", "-Wall", "-Werror", *folders, "-c", str(tmp_path / "main.cc"), "-o", str(tmp_path / "m.o")], check=True)


@pytest.mark.parametrize(("settings", "tolerance"), [({"quantize": "int8"}, 0.05), ({"dtype": "q15"}, 1e-3)])
def test_quantized_weights_are_smaller_and_near(settings, tolerance, tmp_path):
    model, x = CASES["mlp-64-128-10"].built()
    plain, small = compile_to_c(model, x, tmp_path / "a"), compile_to_c(model, x, tmp_path / "b", **settings)
    wanted = plain.predict(x)
    assert np.abs(small.predict(x) - wanted).max() <= tolerance * np.abs(wanted).max()
    assert small.flash_bytes < 0.6 * plain.flash_bytes


def test_generated_derivatives_equal_autograd(tmp_path):
    import ctypes

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 7), nn.GELU(), nn.Linear(7, 6), nn.Softplus(), nn.Linear(6, 3), nn.Sigmoid()
    )
    compiled = compile_to_c(model.double(), torch.zeros(1, 5).double(), tmp_path, dtype="double", derivatives=True)
    library, x, w, v = ctypes.CDLL(str(compiled.build())), torch.randn(5).double(), torch.randn(3).double(), torch.randn(5).double()
    jacobian, hessian, value, product = np.zeros((3, 5)), np.zeros((3, 5, 5)), np.zeros(3), np.zeros(5)

    def call(name, *arrays):
        library[name](*(ctypes.c_void_p(each.ctypes.data) for each in arrays))

    call("net_jacobian", x.numpy(), jacobian)
    true = torch.func.jacrev(model)(x).detach().numpy()
    assert np.abs(jacobian - true).max() < 1e-12
    call("net_hessian", x.numpy(), value, jacobian, hessian)
    curved = torch.func.jacfwd(torch.func.jacrev(model))(x).detach().numpy()
    assert np.abs(hessian - curved).max() < 1e-12
    assert np.abs(jacobian - true).max() < 1e-12
    assert np.abs(value - model(x).detach().numpy()).max() < 1e-12
    call("net_hvp", x.numpy(), w.numpy(), v.numpy(), product)
    assert np.abs(product - np.einsum("o,oij,j", w.numpy(), curved, v.numpy())).max() < 1e-12


# Bad input


class Two(nn.Module):
    def forward(self, x):
        return x + 1.0, x


class Cosine(nn.Module):
    def forward(self, x):
        return torch.cos(x)


@pytest.mark.parametrize(
    ("model", "example", "name", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), Cosine()), torch.zeros(1, 2), "net", "1: the operation aten.cos"),
        (nn.Linear(2, 2), torch.zeros(3, 2), "net", r"\[1, ...\]"),
        (LastStep(nn.GRU(2, 3, num_layers=2, batch_first=True), 1), torch.zeros(1, 4, 2), "net", "layer: .*num_layers=2"),
        (LastStep(nn.GRU(2, 3, batch_first=False), 1), torch.zeros(1, 4, 2), "net", "batch_first=False"),
        (nn.LSTM(2, 3, bidirectional=True, batch_first=True), torch.zeros(1, 4, 2), "net", "bidirectional=True"),
        (nn.Linear(2, 2, dtype=torch.complex64), torch.zeros(1, 2, dtype=torch.complex64), "net", "complex"),
        (Two(), torch.zeros(1, 2), "net", "2 outputs"),
        (nn.Linear(2, 2), torch.zeros(1, 2), "while", "keyword"),
        (nn.Linear(2, 2), torch.zeros(1, 2), "2nd", "C identifier"),
    ],
)
def test_what_has_no_c_is_refused_and_nothing_is_left(model, example, name, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        compile_to_c(model, example, tmp_path / "out", name=name)
    if isinstance(caught.value, UnsupportedLayer):
        assert "supported are: Linear" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_and_dynamic_shapes_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    exported = torch.export.export(model, (torch.zeros(3, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, tmp_path / "m.pt2")
    with pytest.raises(ValueError, match="dynamic shape"):
        compile_to_c(tmp_path / "m.pt2", None, tmp_path / "out")
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0: weight holds NaN"):
        compile_to_c(model, torch.zeros(1, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_float_is_refused(tmp_path):
    model = nn.Linear(2, 2).double()
    model.weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match="beyond float; expected smaller ones, or dtype='double'"):
        compile_to_c(model, torch.zeros(1, 2).double(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    compile_to_c(model, torch.zeros(1, 2).double(), tmp_path / "out", dtype="double")


def test_a_folder_of_the_users_is_left_alone_and_one_of_ours_is_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite, message in ((False, "not empty"), (True, "holds mine.txt")):
        with pytest.raises(FileExistsError, match=message):
            compile_to_c(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path, overwrite=overwrite)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]
    compile_to_c(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "c", test=True)
    compile_to_c(nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "c", name="other", overwrite=True)
    assert not (tmp_path / "c" / "net.c").exists()


def test_a_write_that_fails_midway_leaves_what_was_there_before(tmp_path):
    """The disk takes 4 kB a file: the header fits, the weights do not."""
    old = compile_to_c(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    assert {file.name for file in old.files} < set(before)
    context = multiprocessing.get_context("fork")  # nothing is imported again
    ours, theirs = context.Pipe()

    def with_little_room() -> None:
        compiler.sizes_of = lambda texts: None
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for folder in ("old", "a/new"):
            try:
                compile_to_c(nn.Linear(64, 64), torch.zeros(1, 64), tmp_path / folder, overwrite=True)
            except OSError as error:
                theirs.send(str(error))

    child = context.Process(target=with_little_room)
    child.start()
    child.join(100)
    theirs.close()
    for _ in range(2):
        assert "File too large" in ours.recv()
    assert child.exitcode == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


def test_without_a_compiler_the_text_is_written_and_build_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    compiled = compile_to_c(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "out")
    assert compiled.source.exists()
    with pytest.raises(RuntimeError, match="install gcc"):
        compiled.build()


def test_the_verb_writes_c_and_refuses_in_one_line(fewer, tmp_path):
    torch.export.save(torch.export.export(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (torch.zeros(1, 3),)), tmp_path / "m.pt2")
    said = json.loads(fewer("compile-c", "m.pt2", "--out", "c", "--name", "arm", "--test", "--json").stdout)
    assert said["macs"] == 12
    assert {".fewer.json", "arm.h", "arm.c", "arm_test.c", "CMakeLists.txt", "library.json", "README.md"} == {
        each.name for each in (tmp_path / "c").iterdir()
    }
    done = fewer("compile-c", "m.pt2", "--out", "c", status=2)
    assert "is not empty" in done.stderr
    assert done.stderr.count("\n") == 1
    (tmp_path / "m.h5").write_text("")
    assert "Keras HDF5" in fewer("compile-c", "m.h5", "--out", "d", status=2).stderr
    assert not (tmp_path / "d").exists()
    assert "dependency-free C" in " ".join(fewer("show", "smart-composites").stdout.split())
