"""How well a small learned model steers by a Newton-Raphson step a sample, and what networks cost as C.

Three parts: a mass-spring-damper against a tuned PID loop and LQR, a tendon-driven finger with hysteresis on a circle, and twelve networks
compiled. Every controller but LQR sees only recorded inputs and outputs: the predictive ones learn from 4,000 samples and have one weight
chosen on other plants, PID and LQR are tuned by 64,000 samples on the very references that they then follow. PID and LQR see the next sample
of the reference, the predictive ones twelve. All figures are of this machine; none is a microcontroller's.

Or of yours: `--set model=FILE` compiles your network, `--set log=FILE.npz` steers a larger network that is learned from the second half of
your recording, with controllers that learn from the first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import nn

from fewer.control._shared.emulator import controller_setup, cortex_m4_instructions, missing_tools, network_setup
from fewer.control._shared.plants import Plant, Trajectory, simulate
from fewer.control._shared.regulators import LQR, PID, tune_lqr, tune_pid
from fewer.control._shared.toolchain import measure_sizes
from fewer.control.smart_composites.controller import PredictiveController
from fewer.control.smart_composites.controller_c.compiled import compile_controller
from fewer.control.smart_composites.kinematics import ForwardKinematics
from fewer.control.smart_composites.peers import emlearn_c, emlearn_call, onnx_session
from fewer.control.smart_composites.problems import (
    CASES,
    CONTROL_HORIZON,
    DELAYS,
    DT,
    EXCITED,
    HORIZON,
    LAMBDA,
    STEPS,
    TRIALS,
    Recording,
    circle,
    finger,
    learned,
    learned_from,
    spring,
    spring_references,
)
from fewer.control.smart_composites.to_c.compiler import compile_to_c, network_of
from fewer.errors import UserError
from fewer.meters import median_seconds
from fewer.study import Bars, Figure, NotTestable, Results, Scale, Study, Trial

REFERENCES = ("steps", "sine 0.5 Hz", "sine 2 Hz", "swirl")
FLASH = 1e6  # bytes that the claim's percentage is of
CALLS = 200  # of a network, of which the median is taken
CONTROLLER = {"of": "controller"}
SHOWN = "mlp-10-32-32-4"  # the network whose figures the tables show; the page's races show the others

study = Study(
    "smart-composites",
    question="Does a small learned model, one Newton-Raphson step a sample, track better than a tuned PID loop, and does it fit a microcontroller?",
    baseline="pid",
    figures=[
        Figure("error", "RMS error / RMS of the reference, mean"),
        Figure("rms_error", "RMS error", "m"),
        Figure("largest_error", "largest error", "m", detail=True),
        Figure("effort", "RMS of the input", "N", "", detail=True),
        Figure("settling_time", "time to settle", "s"),
        Figure("cpu_seconds", "processor time a step", "s", at={"code": "python"}),
        Figure("cpu_seconds", "processor time a step as C, this machine", "s", at={"code": "C"}),
        Figure("circle_error", "finger, RMS error on a circle", "mm"),
        Figure("bytes", "flash", "bytes", at=CONTROLLER),
        Figure("ram_bytes", "RAM", "bytes", at=CONTROLLER),
        *(
            figure
            for network, name in ((SHOWN, SHOWN), ("yours", "your network"))
            for figure in (
                Figure("cpu_seconds", f"processor time of {name}", "s", at={"network": network}),
                Figure("bytes", f"flash of {name}", "bytes", at={"network": network}),
                Figure("ram_bytes", f"RAM of {name}", "bytes", at={"network": network}),
            )
        ),
        Figure("one_step_rmse", "one-step error of the model", "m", detail=True),
        Figure("deviation", "largest deviation from torch", "", detail=True),
        Figure("instructions", "instructions on an emulated Cortex-M4F", "", detail=True),
    ],
    charts=[Bars(("error", "circle_error"), title="Tracking errors beside the PID loop's")],
    time_limit=1800,
)


study.option("model", "", help="your own network, an .onnx or .pt2 file: what it takes as C")
study.option("log", "", help="a recording of your own plant, an .npz file with u [T, m] and y [T, p], u[n] applied from y[n] to y[n+1]")


@dataclass(frozen=True)
class Tracking:
    """What the controllers are to follow, and the networks that are compiled."""

    references: dict[str, np.ndarray]
    circle: np.ndarray | None
    steps: int
    recording: Recording | None = None
    yours: Path | None = None

    @property
    def about(self) -> np.ndarray | float:
        """What errors are relative to deviations from: zero, or the middle of a recording."""
        return self.recording.y.mean(axis=0) if self.recording else 0.0

    def plant(self, seed: int) -> Plant:
        return self.recording.plant(seed) if self.recording else spring(seed)

    def relative(self, run: Trajectory) -> float:
        return run.rms_error / float(np.sqrt(np.mean(np.sum((run.reference - self.about) ** 2, axis=1))))


@study.task
def task(scale: Scale, model: str = "", log: str = "") -> Tracking:
    try:
        if model:
            network_of(model)  # refused here, once
        recording = Recording.read(log) if log else None
    except (OSError, ValueError) as mistake:  # in the user's own files
        raise UserError(str(mistake)) from mistake
    steps, yours = STEPS if scale is Scale.QUICK else 10 * STEPS, Path(model) if model else None
    if recording:
        return Tracking(recording.references(recording.steps), None, recording.steps, recording, yours)
    return Tracking({}, None, 0, None, yours) if model else Tracking(spring_references(steps), circle(steps), steps)


def track(work: Tracking, trial: Trial, controller: Any) -> None:
    """Follow every reference with the mass, or with the recorded plant, and log how well."""
    relative, seconds = [], []
    for name, reference in work.references.items():
        run = simulate(work.plant(trial.seed), controller, reference, DT, work.steps, seed=1000 + trial.seed)
        log(trial, run, name)
        relative.append(work.relative(run))
        seconds.append(np.median(run.seconds))
    trial.log("error", float(np.mean(relative)))
    trial.log("cpu_seconds", float(np.median(seconds)), code="python")


def log(trial: Trial, run: Trajectory, name: str) -> None:
    trial.log("rms_error", run.rms_error, reference=name)
    trial.log("largest_error", run.largest_error, reference=name)
    trial.log("effort", run.effort, reference=name)
    if name == "steps":
        trial.log("settling_time", run.settling_time())


def predictive(plant: Plant, trial: Trial, model: ForwardKinematics, Lambda: float, **settings: Any) -> PredictiveController:
    trial.log("one_step_rmse", model.one_step_rmse, plant="finger" if plant.inputs == 2 else "spring")
    nd, dd = DELAYS
    return PredictiveController(
        model.model, HORIZON, CONTROL_HORIZON, 1.0, Lambda, (plant.lower, plant.upper), past_inputs=nd, past_outputs=dd, **settings
    )


def of_the_mass(work: Tracking, trial: Trial, **settings: Any) -> PredictiveController:
    """The controller of the mass, or of the recorded plant."""
    plant = work.plant(trial.seed)
    if work.recording:
        return predictive(plant, trial, learned_from(work.recording, trial.seed, 14), work.recording.change_weight, **settings)
    return predictive(plant, trial, learned(plant, trial.seed, 14), LAMBDA, **settings)


def steer(work: Tracking, trial: Trial, **settings: Any) -> None:
    """The learned controller on both plants, and the mass's as C."""
    if not work.references:
        return trial.note("left out", "a network alone has nothing to steer; --set log=FILE.npz gives a plant")
    controller = of_the_mass(work, trial, **settings)
    track(work, trial, controller)
    if shutil.which("gcc"):
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_controller(controller, folder, name="spring")
            reference = list(work.references.values())[-1]
            run = simulate(work.plant(trial.seed), compiled, reference, DT, work.steps, seed=1000 + trial.seed)
            trial.log("cpu_seconds", float(np.median(run.seconds)), code="C")
            trial.log("bytes", compiled.flash_bytes, **CONTROLLER)
            trial.log("ram_bytes", compiled.ram_bytes, **CONTROLLER)
            trial.log("parameters", controller.network.parameters, **CONTROLLER)
            if trial.scale is Scale.FULL and not missing_tools():
                counts = cortex_m4_instructions(compiled.sources, controller_setup("spring"), optimise="-O3")
                trial.log("instructions", float(np.median(counts)))
    if work.circle is not None:
        plant = finger(trial.seed)
        on_finger = predictive(plant, trial, learned(plant, trial.seed, 16), 1.0, **settings)
        run = simulate(finger(trial.seed), on_finger, work.circle, DT, work.steps, seed=1000 + trial.seed)
        trial.log("circle_error", settled_error(run))


def settled_error(run: Trajectory) -> float:
    """RMS error after the first second, in which the tip comes from rest onto the circle."""
    start = round(1 / DT)
    return float(np.sqrt(np.mean(np.sum((run.y - run.reference)[start:] ** 2, axis=1))))


study.arm_table(
    steer,
    {
        "nr-mpc-1": {"label": "NR-MPC, 1 iteration", "max_iter": 1},
        "nr-mpc-3": {"label": "NR-MPC, 3 iterations", "max_iter": 3},
        "gauss-newton": {"label": "Gauss-Newton, 1 iteration", "max_iter": 1, "gauss_newton": True},
    },
    against="pid",
)


@study.arm("nr-mpc-converged", label="NR-MPC, converged")
def converged(work: Tracking, trial: Trial) -> None:
    if work.references:
        track(work, trial, of_the_mass(work, trial, max_iter=20, rtol=1e-4))


def mean_error(work: Tracking, plant: Plant, controller: Any) -> float:
    """What PID and LQR are tuned by: the RMS error on every whole reference, relative to the reference's, mean."""
    return float(np.mean([work.relative(simulate(plant, controller, each, DT, work.steps)) for each in work.references.values()]))


def tuned(error_of: Callable[[Any], float], plant: Plant, trial: Trial, top: float, **more: Any) -> PID:
    """A PID loop tuned by `TRIALS` simulations, each of all that it will follow."""

    def loop(kp: float, ki: float, kd: float, smooth: float) -> PID:
        return PID(kp, ki, kd, DT, plant.lower, plant.upper, smooth=smooth, **more)

    gains = tune_pid(lambda *gains: error_of(loop(*gains)), TRIALS, trial.seed, top)
    trial.note("gains", "kp {:.4g}, ki {:.4g}, kd {:.4g}, smooth {:.2g}".format(*gains))
    return loop(*gains)


@study.arm("pid", label="PID, tuned")
def pid(work: Tracking, trial: Trial) -> None:
    plant, arm, circle = work.plant(trial.seed), finger(trial.seed), work.circle
    if not work.references or plant.inputs != plant.outputs:
        return trial.note("left out", "a PID loop needs a plant with an output for each input")
    top = 300.0
    if work.recording:
        top = 30 * float(np.mean((plant.upper - plant.lower) / work.recording.y.std(axis=0)))
    track(work, trial, tuned(lambda loop: mean_error(work, plant, loop), plant, trial, top))
    if circle is None:
        return None
    mixing = np.array([[1.0, -1.0], [-1.0, -1.0]]) / 60  # the difference of the tensions bends to the side, their sum shortens

    def finger_error(controller: PID) -> float:
        return settled_error(simulate(arm, controller, circle, DT, work.steps))

    loop = tuned(finger_error, arm, trial, 100.0, mixing=mixing, rest=0.5)
    trial.log("circle_error", settled_error(simulate(arm, loop, circle, DT, work.steps, seed=1000 + trial.seed)))


@study.arm("lqr", label="LQR, knows the plant, tuned")
def lqr(work: Tracking, trial: Trial) -> None:
    if work.circle is None:
        return trial.note("left out", "LQR needs the plant's equations, which a recording does not have")
    plant = spring(trial.seed)

    def regulator(r: float, noise: float) -> LQR:
        return LQR([[0, 1], [-5, -0.5]], [[0], [1]], [[1, 0]], DT, 1.0, r, noise, [-10], [10])

    r, noise = tune_lqr(lambda r, noise: mean_error(work, plant, regulator(r, noise)), TRIALS, trial.seed)
    trial.note("weights", f"r {r:.4g}, noise {noise:.4g}")
    track(work, trial, regulator(r, noise))


def networks(work: Tracking) -> Iterator[tuple[str, nn.Module | Path, torch.Tensor]]:
    """Name, network and an input: yours alone where there is one, none where there is a recording alone."""
    if work.yours:
        yield "yours", work.yours, torch.randn(1, *network_of(work.yours).input_shape, generator=torch.Generator().manual_seed(0))
    elif not work.recording:
        yield from ((name, *case.built()) for name, case in CASES.items())


@study.arm("c", against="onnxruntime", label="networks as C")
def as_c(work: Tracking, trial: Trial) -> None:
    for name, model, x in networks(work):
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_to_c(model, x, folder)
            values = x.numpy()
            seconds = median_seconds(lambda: compiled.predict(values), CALLS, processor=True)  # noqa: B023 - called at once
            trial.log("cpu_seconds", seconds, network=name)
            if isinstance(model, Path) and model.suffix == ".onnx":
                wanted = by_onnxruntime(model, x)
                trial.log(
                    "deviation", float(np.abs(np.ravel(compiled.predict(values)) - wanted).max() / np.abs(wanted).max()), network=name
                )
            trial.log("bytes", compiled.flash_bytes, network=name)
            trial.log("ram_bytes", compiled.ram_bytes, network=name)
            trial.log("parameters", compiled.network.parameters, network=name)
            if trial.scale is Scale.FULL and not missing_tools():
                counts = cortex_m4_instructions([compiled.source], network_setup("net"), optimise="-O3")
                trial.log("instructions", float(np.median(counts)), network=name)


@study.arm("emlearn", against="c", label="MLPs by emlearn")
def by_emlearn(work: Tracking, trial: Trial) -> None:
    """It reads scikit-learn's and Keras' MLPs alone; m2cgen reads no network, so that it has no arm."""
    if work.yours or work.recording:
        return
    for name in ("mlp-4-16-1", "mlp-10-32-32-4", "mlp-64-128-10"):  # those that a microcontroller holds
        model, x = CASES[name].built()
        assert isinstance(model, nn.Sequential)
        with tempfile.TemporaryDirectory() as folder:
            source, flags = emlearn_c(model, Path(folder))
            call, wanted = emlearn_call(source, flags, model, x), model(x).detach().numpy().ravel()
            trial.log("deviation", float(np.abs(call() - wanted).max() / np.abs(wanted).max()), network=name)
            trial.log("cpu_seconds", median_seconds(call, CALLS, processor=True), network=name)
            sizes = measure_sizes([source], flags=flags)
            trial.log("bytes", sizes.flash, network=name)
            trial.log("ram_bytes", max(sizes.static_ram, 1), network=name)


@study.arm("onnxruntime", label="onnxruntime, one thread")
def onnx(work: Tracking, trial: Trial) -> None:
    for name, model, x in networks(work):
        if isinstance(model, Path) and model.suffix != ".onnx":
            return trial.note("left out", "onnxruntime reads .onnx files alone")
        session = onnx_session(model, x)
        given = {session.get_inputs()[0].name: x.numpy()}
        seconds = median_seconds(lambda: session.run(None, given), CALLS, processor=True)  # noqa: B023 - called at once
        trial.log("cpu_seconds", seconds, network=name)
        if isinstance(model, Path):
            trial.log("deviation", 0.0, network=name)  # it is what the others are held against


def by_onnxruntime(model: Path, x: torch.Tensor) -> np.ndarray:
    session: Any = onnx_session(model, x)
    return np.ravel(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


# What the paper claims


def asked(results: Results) -> Results:
    """The results, unless they are about your own network or plant, of which the paper claims nothing."""
    if any({"yours", "recorded"} & {row.coordinates.get("network"), row.coordinates.get("reference")} for row in results.rows):
        raise NotTestable("this run was about your own network or plant; the claim is about the study's")
    return results


@study.claim(
    "NR-MPC tracks the mass-spring-damper with at most 0.7 of the tuned PID's RMS error (relative to the reference, mean over all)",
    paper="better tracking than PID",
    if_fails="most of what is left is on the steps, where the force stands at its bound and no controller can do more",
)
def better_than_pid(results: Results) -> Any:
    return asked(results).ratio("error", "nr-mpc-3", "pid") <= 0.7


@study.claim(
    "One iteration a sample is within 10 % of the converged solution's RMS error",
    paper="one Newton-Raphson step a sample",
    if_fails="near its bounds the force gets only part of the way in one Newton step, since the soft box is no parabola there: the softer the "
    "box, the smaller the gap",
)
def one_is_enough(results: Results) -> Any:
    return asked(results).ratio("error", "nr-mpc-1", "nr-mpc-converged") <= 1.1


@study.claim("A step as C takes less than a tenth of 1/120 s of processor time on this machine", paper=">= 120 Hz on a Cortex-M4F")
def quick_enough(results: Results) -> Any:
    return asked(results).mean("cpu_seconds", "nr-mpc-1", code="C") <= 1 / 120 / 10


@study.claim("Controller and network take at most 6.4 % of 1 MB of flash (compiled for this machine)", paper="<= 6.4 % of the flash")
def small_enough(results: Results) -> Any:
    return asked(results).mean("bytes", "nr-mpc-1", **CONTROLLER) <= 0.064 * FLASH


@study.claim("The finger's tip stays within 2 mm of a circle (RMS, simulated)", paper="<= 2 mm, measured on the tendon platform")
def on_the_circle(results: Results) -> Any:
    return asked(results).mean("circle_error", "nr-mpc-3") <= 2.0


@study.claim("At least 120 samples a second on a Cortex-M4F", paper=">= 120 Hz")
def rate(results: Results) -> Any:
    counted = "fewer run --full counts a step's instructions on an emulated Cortex-M4F where qemu-system-arm is installed"
    if asked(results).has("instructions", "nr-mpc-1"):
        counted = f"on an emulated Cortex-M4F a step takes {asked(results).mean('instructions', 'nr-mpc-1').value:.0f} instructions, which are no cycles"
    raise NotTestable(f"no microcontroller is here, and this machine's times are not a microcontroller's; {counted}")


@study.claim("45.4 mW of mean power on a Cortex-M4F", paper="45.4 mW")
def power(results: Results) -> Any:
    raise NotTestable("no microcontroller is here whose power could be measured")


@study.summary
def summary(results: Results) -> str:
    say = results.say
    if results.has("cpu_seconds", "c") and any(row.coordinates.get("network") == "yours" for row in results.rows):
        at = {"network": "yours"}
        return f"Your network as C takes {say('cpu_seconds', 'c', **at)} a call on this machine, {say('bytes', 'c', **at)} of flash and {say('ram_bytes', 'c', **at)} of RAM."
    learned_on = "your recording" if any(row.coordinates.get("reference") == "recorded" for row in results.rows) else f"{EXCITED} samples"
    told = (
        f"With a network of 14 units learned from {learned_on}, one Newton-Raphson step a sample left {say('error', 'nr-mpc-1', unit='%')} of the "
        f"reference as error, three {say('error', 'nr-mpc-3', unit='%')}, the tuned PID loop {say('error', 'pid', unit='%')}"
    )
    if results.has("circle_error", "pid"):
        told += (
            f", LQR on the true equations {say('error', 'lqr', unit='%')}. On the finger's circle: {say('circle_error', 'nr-mpc-3')}, PID "
            f"{say('circle_error', 'pid')}"
        )
    return (
        f"{told}. As C the controller takes {say('bytes', 'nr-mpc-1', **CONTROLLER)} of flash, {say('ram_bytes', 'nr-mpc-1', **CONTROLLER)} of RAM "
        f"and {say('cpu_seconds', 'nr-mpc-1', code='C')} a step on this machine."
    )
