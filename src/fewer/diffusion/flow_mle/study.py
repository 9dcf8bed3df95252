"""Fine-tuned flows beside flows as trained: motions that a policy must hit, images that a generator draws in few steps, a robot's arm.

The base fields are trained once a seed by flow matching; every arm starts from them. Motions are judged by their distance to
demonstrations that were held out, images by Frechet distances beside that of one half of the images to the other, and by the
reconstruction of held-out images from their latents. All arms are judged at other numbers of steps, too, and by a better solver.
At full scale policies of a robot's arm are judged by where they put things down, beside one that regresses its actions.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewer.devices import one_thread
from fewer.diffusion.flow_mle import problems
from fewer.diffusion.flow_mle.contraction import along_paths
from fewer.diffusion.flow_mle.finetuning import FineTuneConfig, finetune
from fewer.diffusion.flow_mle.policy import FlowPolicy
from fewer.diffusion.flow_mle.problems import DISTURBED, Problem, Robot, Training, contracting, fit_flow, regressed
from fewer.diffusion.flow_mle.solver import METHODS, invert, iss_bound, odeint
from fewer.errors import MissingExtra, UserError
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.study.results import All, bootstrap
from fewer.tasks import frechet_distance
from fewer.tasks.image_judges import Judge, floor_of, judges_of

K = 2  # steps that the motions are tuned for
MOTION_STEPS, IMAGE_STEPS = (1, 2, 4, 20), (1, 2, 4, 8, 30)
NOISES, DISTURBANCE, SHIFT_STEPS = 8, 0.5, 4
UPDATES, LONGER = 400, 800  # of a fine-tuning at K = 2, and of as many calls of flow matching
TUNED = {"ft-invert": ((1, 400), (4, 200)), "ft-random": ((1, 200),), "resft": ((4, 200),)}  # images: (K, updates)
OWN = (1, 4)  # K of the images' claims
CALLS, RIVAL = (1, 2, 4, 10, 50), 10  # of the network for a chunk of the robot's actions; the flow's that 1 and 2 are held against
ONCE = ("fm", "fm-longer", "regression")  # arms whose policy is the same for any number of calls
SAID = {"spread": "share of the actions' variance that the condition leaves", "gate": "the residual's gate, calls {}"}
PARTS = ("motions", "images", "manipulation")


def own(steps: int) -> dict[str, Any]:
    """Images of a field tuned for so many steps, drawn in as many."""
    return {"tuned": steps, "steps": steps}


def acting(calls: int, noise: str = "none", solver: str = "euler") -> dict[str, Any]:
    """A policy that calls its network so often for a chunk of actions, tuned for that where it is tuned."""
    return {"calls": calls, "noise": noise, "solver": solver}


study = Study(
    "flow-mle",
    question="What does fine-tuning on reconstructions gain where a flow is sampled in few steps?",
    baseline="fm",
    figures=[
        Figure("rmse", "motions, 2 steps: RMSE to held-out demonstrations (units of 50 mm)", at={"steps": K}),
        Figure("rmse", "motions, 20 steps", at={"steps": 20}),
        Figure("end_error", "motions, 2 steps: error of the end point", at={"steps": K}),
        Figure("shift", "motions: shift of the output under a disturbance of norm 0.5"),
        Figure("spread", "motions: deviation over noises", better=""),
        Figure("log_norm", "motions: mu_2 of the Jacobian, mean along paths", better=""),
        Figure("certified_rate", "what the residual lowers mu_2 by (gate x rate), for certain", better=""),
        Figure("frechet", "images: Frechet distance in pixels, tuned for and drawn in 1 step", at=own(1)),
        Figure("frechet", "tuned for and drawn in 4 steps", at=own(4)),
        Figure("frechet_features", "in features, 1 step", at=own(1)),
        Figure("frechet_features", "in features, 4 steps", at=own(4)),
        Figure("floor", "of half the images to the other half"),
        Figure("reconstruction", "held-out images from their latents, MSE, 1 step", at={"tuned": 1}),
        Figure("reconstruction", "4 steps", at={"tuned": 4}),
        Figure("precise", "robot, 1 call: put down within 1 cm", "%", "higher", at=acting(1)),
        Figure("precise", "2 calls", "%", "higher", at=acting(2)),
        Figure("precise", "10 calls", "%", "higher", at=acting(10)),
        Figure("precise", "2 calls, noise of actions", "%", "higher", at=acting(2, "action")),
        Figure("precise", "2 calls, noise of observations", "%", "higher", at=acting(2, "observation")),
        Figure("success", "2 calls: within 5 cm", "%", "higher", at=acting(2)),
        Figure("distance", "2 calls: median distance to the goal (m)", at=acting(2)),
        Figure("nfe", "2 calls a chunk: calls an action", at=acting(2)),
        Figure("milliseconds", "2 calls: ms an action", at=acting(2)),
        Figure("cpu_seconds", "processor time of the further training", "s", at={"data": "motions"}),
        Figure("latent_std", "deviation of the images' latents", better="", detail=True),
        Figure("rmse", "RMSE over steps", detail=True),
        Figure("rmse_midpoint", "motions by the midpoint rule, of as many calls", detail=True),
        Figure("frechet", "Frechet distance over steps", detail=True),
        Figure("precise", "robot: put down within 1 cm, over calls", "%", "higher", detail=True),
        Figure("success", "within 5 cm, over calls", "%", "higher", detail=True),
        Figure("distance", "median distance to the goal (m), over calls", detail=True),
        Figure("milliseconds", "ms an action, over calls", detail=True),
    ],
    charts=[
        Curve("rmse", over="steps", log=True, title="Motions: error to held-out demonstrations"),
        Curve("frechet", over="steps", log=True, at={"tuned": 1}, title="Images, tuned for 1 step"),
        Curve("frechet", over="steps", log=True, at={"tuned": 4}, title="Images, tuned for 4 steps"),
        Curve("precise", over="calls", at={"noise": "none", "solver": "euler"}, log_x=True, title="Robot: put down within 1 cm"),
    ],
    time_limit=8 * 3600,
)
study.option("data", "", help="your own images: FILE.npz with x [N, H, W] or [N, C, H, W], uint8 or floats in [-1, 1]")
study.option(
    "part", "all", ["all", *PARTS], "what is run; manipulation, of a robot's arm, at full scale alone, where its simulator is installed"
)


@dataclass(frozen=True, eq=False)
class Task:
    motions: Problem | None  # a user's images are judged alone
    images: Problem | None
    judges: dict[str, Judge]
    samples: int
    times: int  # how much longer everything is trained
    robot: Robot | None = None
    missing: str = ""  # why there is no robot though there should be one


@study.task
def task(scale: Scale, data: str, part: str = "all") -> Task:
    full = scale is Scale.FULL
    if data and part not in ("all", "images"):
        raise UserError(f"--set part={part} beside your own images; expected images, which alone are made of them: leave part out")
    if part == "manipulation" and not full:
        raise UserError("--set part=manipulation at quick scale; expected full scale, as policies act for some minutes: add --full")
    parts, robot, missing = {"images"} if data else set(PARTS) if part == "all" else {part}, None, ""
    if full and "manipulation" in parts:
        try:
            problems.pick_and_place().close()
            robot = Robot()
        except MissingExtra as absent:
            if part == "manipulation":
                raise
            missing = str(absent)
    try:
        learnt = problems.images(data, full) if "images" in parts else None
    except (OSError, ValueError) as mistake:  # in the user's own file
        raise UserError(str(mistake)) from mistake
    seen = judges_of(learnt.train[0], "" if data else "mnist28" if full else "digits8") if learnt else {}
    motions = problems.motions(full) if "motions" in parts else None
    return Task(motions, learnt, seen, 10_000 if full else 2000, 10 if full else 1, robot, missing)


def further(
    problem: Problem, trial: Trial, arm: str, steps: int, updates: int, pairing: str, times: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The base field trained further in an arm's way, and what was said of it; a regression, trained as long in all."""
    if arm == "regression":
        return regressed(problem, problem.training.updates + LONGER * times, trial.seed, trial.device), {}
    base, latents = problem.kept(trial.seed, trial.device)
    data, lr, batch = problem.on(trial.device), 5e-4, problem.training.batch
    if arm == "fm":
        return base, {}
    if arm == "fm-longer":
        return fit_flow(base, data, Training(LONGER * times, batch, lr, problem.training.ema), 1000 + trial.seed), {}
    residual = None
    if arm in ("resft", "contracting"):
        make = problem.make_residual if arm == "resft" else lambda: contracting(problem)
        residual = problem.seeded(make, trial.seed).to(trial.device)
    modes: dict[str, Any] = {"resft": "residual", "contracting": "contracting"}
    made = finetune(
        base,
        data[0] if data[1] is None else (data[0], data[1]),
        steps=steps,
        mode=modes.get(arm, "full"),
        pairing=pairing,  # pyright: ignore[reportArgumentType]
        force=True,
        latents=None if pairing == "random" else latents,
        residual=residual,
        config=FineTuneConfig(updates=updates * times, batch=batch, seed=trial.seed),
    )
    return made.field, made.report


def arm(job: Task, trial: Trial, name: str, pairing: str = "random") -> None:
    if job.motions is None:
        trial.note("motions", "left out: other things are judged")
    else:
        with one_thread():  # layers so small that two threads wait for each other most of the time
            job.motions.kept(trial.seed, trial.device)
            started = time.process_time()
            field, report = further(job.motions, trial, name, K, UPDATES, pairing, job.times)
            trial.log("cpu_seconds", time.process_time() - started, data="motions")
            judge_motions(job.motions, trial, field, report)
    if job.images is not None:
        of_images(job, job.images, trial, name)
    manipulation(job, trial, name, pairing)


def of_images(job: Task, problem: Problem, trial: Trial, name: str) -> None:
    if name == "contracting":
        trial.note("images", "left out: noise onto images that spread cannot contract")
        return
    if name in ("fm", "fm-longer"):
        field, _ = further(problem, trial, name, 0, 0, "", job.times)
        judge_images(job, problem, trial, field, OWN)
        return
    for steps, updates in TUNED[name]:
        how = "random" if name == "ft-random" else "invert"
        field, report = further(problem, trial, name, steps, updates, how, job.times)
        judge_images(job, problem, trial, field, (steps,))
        if "latent_std" in report:
            trial.log("latent_std", report["latent_std"])


def manipulation(job: Task, trial: Trial, name: str, pairing: str = "random") -> None:
    """A robot's arm, by a policy that is tuned for each number of calls of its own."""
    if job.robot is None:
        if job.missing or name == "regression":
            trial.note("manipulation", f"left out: {job.missing or 'it is judged at full scale'}")
        return
    (problem, policy), env = job.robot.lesson(trial.seed), job.robot.environment()
    field, report, on = None, {}, RIVAL * UPDATES // LONGER
    for done, calls in enumerate(CALLS):
        trial.progress(done, len(CALLS), f"the robot's arm, {calls} calls a chunk")
        with one_thread(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the condition leaves")  # it is told below
            if field is None or name not in ONCE:
                field, report = further(problem, trial, name, calls, UPDATES, pairing, on if name in ONCE else 1)
            policy.field, taken = field.cpu().eval(), 1 if name == "regression" else calls  # rows of one are not for a GPU
            for solver, (_, each) in METHODS.items():
                if solver == "euler" or (name in ("fm", "fm-longer") and calls % each == 0):  # others are tuned for Euler's steps
                    policy.steps, policy.method = taken // each, solver
                    judge_acting(job.robot, trial, env, policy, calls, solver)
        trial.log("nfe", taken / policy.execute, **acting(calls))
        for word in {"spread", "gate"} & report.keys():
            trial.note(f"robot: {SAID[word].format(calls)}", f"{report[word]:.3f}")
    if name in ("fm-longer", "regression"):
        trial.note("robot", f"trained for as many calls as flow matching and then the tuning for {RIVAL} steps")


def judge_acting(robot: Robot, trial: Trial, env: Any, policy: FlowPolicy, calls: int, solver: str) -> None:
    """Log what comes of a policy, undisturbed and, by Euler, disturbed."""
    for noise in DISTURBED if solver == "euler" else ("none",):
        for figure, value in robot.judged(env, policy, trial.seed, noise).items():
            trial.log(figure, value, **acting(calls, noise, solver))


def judge_motions(problem: Problem, trial: Trial, field: nn.Module, report: dict[str, Any]) -> None:
    """Log how near motions come, and what a disturbance of the field moves them by."""
    x1, cond = (torch.cat([each] * NOISES) for each in problem.on(trial.device, test=True) if each is not None)
    draw = torch.Generator().manual_seed(5000 + trial.seed)
    x0, push = (torch.randn(x1.shape, generator=draw).to(trial.device) for _ in range(2))
    push = DISTURBANCE * push / push.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def drawn(steps: int, method: str = "euler", by: Tensor | float = 0.0) -> Tensor:
        return odeint(lambda t, x, c: field(t, x, c) + by, x0, steps, method=method, cond=cond)

    for steps in MOTION_STEPS:
        ends = drawn(steps)
        trial.log("rmse", float((ends - x1).square().mean().sqrt()), steps=steps)
        trial.log("end_error", float((ends - x1)[:, -2:].norm(dim=1).mean()), steps=steps)
        if steps % 2 == 0:
            trial.log("rmse_midpoint", float((drawn(steps // 2, "midpoint") - x1).square().mean().sqrt()), steps=steps)
        if steps == K:
            trial.log("spread", float(ends.reshape(NOISES, -1, ends.shape[1]).std(0).mean()))
    moved = (drawn(SHIFT_STEPS, by=push) - drawn(SHIFT_STEPS)).norm(dim=1)
    trial.log("shift", float(moved.mean()))
    trial.log("certified_rate", report.get("certified_rate", 0.0))
    norms = along_paths(field, x0, SHIFT_STEPS, cond)
    trial.log("log_norm", float(norms.mean()))
    contracting = norms.amax(0) < 0
    trial.log("contracting_paths", float(contracting.double().mean()))
    if bool(contracting.any()):
        rates = -norms.amax(0)[contracting]
        trial.log("iss_bound", sum(iss_bound(0.0, DISTURBANCE, c) for c in rates.tolist()) / len(rates))


def judge_images(job: Task, problem: Problem, trial: Trial, field: nn.Module, tuned: tuple[int, ...]) -> None:
    """Log the distances of samples at every number of steps, and the reconstruction of held-out images."""
    draw = torch.Generator().manual_seed(6000 + trial.seed)
    x0 = torch.randn(job.samples, *problem.train[0].shape[1:], generator=draw).to(trial.device)
    test, _ = problem.on(trial.device, test=True)
    base, _ = problem.kept(trial.seed, trial.device)
    real = {figure: seen(problem.train[0]) for figure, seen in job.judges.items()}
    for figure, rows in real.items():
        trial.log(figure.replace("frechet", "floor"), floor_of(rows))
    with torch.no_grad():
        for steps in IMAGE_STEPS:
            ends = odeint(field, x0, steps).cpu()
            for figure, seen in job.judges.items():
                value = frechet_distance(seen(ends), real[figure])
                for each in tuned:
                    trial.log(figure, value, tuned=each, steps=steps)
            if steps in tuned:
                trial.show(ends, f"images tuned for and drawn in {steps} step{'s' if steps > 1 else ''}")
        latents = invert(base, test, steps=problem.latents)
        for each in tuned:
            trial.log("reconstruction", float((odeint(field, latents, each) - test).square().mean()), tuned=each)


study.arm_table(
    arm,
    {
        "fm": {"label": "flow matching, as trained", "name": "fm"},
        "fm-longer": {"label": "flow matching, trained on (as many calls)", "name": "fm-longer"},
        "ft-random": {"label": "FT-FM, fresh noise", "name": "ft-random"},
        "ft-invert": {"label": "FT-FM, latents", "name": "ft-invert", "pairing": "invert"},
        "resft": {"label": "ResFT-FM (motions: fresh noise; images: latents)", "name": "resft"},
        "contracting": {"label": "contracting residual, fresh noise", "name": "contracting", "against": "resft"},
    },
)
study.arm_table(manipulation, {"regression": {"label": "regression of actions (robot's arm)", "name": "regression"}})


# What the paper claims

POLICIES = "higher success rates on Push-T, Franka Kitchen and Robomimic (its figures could not be checked)"
IMAGES = "a better FID on CIFAR-10 (its figures could not be checked)"


def need(results: Results, figure: str, why: str) -> None:
    if figure not in results.figures and results.rows:
        raise NotTestable(why)


def need_motions(results: Results) -> None:
    need(results, "rmse", "motions were not judged: run it without --set")


def need_images(results: Results) -> None:
    need(results, "frechet", "images were not judged: run it without --set part")


@study.claim("Motions in 2 steps: FT-FM has at most 0.65 of the error of flow matching trained as much longer", paper=POLICIES)
def precise(results: Results) -> Any:
    need_motions(results)
    return results.ratio("rmse", "ft-random", "fm-longer", steps=K) <= 0.65


@study.claim(
    "A contracting residual shifts at most 0.95 of a free one's under a disturbance, at no more error in 2 steps",
    paper="the contraction-aware design is most robust (its figures could not be checked)",
)
def robust(results: Results) -> Any:
    need_motions(results)
    return (results.ratio("shift", "contracting", "resft") <= 0.95) & (results.ratio("rmse", "contracting", "resft", steps=K) <= 1)


@study.claim("Images in 1 step: FT-FM on latents has at most 0.25 of flow matching's Frechet distance", paper=IMAGES)
def one_step(results: Results) -> Any:
    need_images(results)
    return results.ratio("frechet", "ft-invert", "fm", **own(1)) <= 0.25


@study.claim("Images in 4 steps: it has at most half of it", paper=IMAGES)
def four_steps(results: Results) -> Any:
    need_images(results)
    return results.ratio("frechet", "ft-invert", "fm", **own(4)) <= 0.5


@study.claim("Held-out images come back from their latents with at most half of the squared error, in 1 and in 4 steps", paper=IMAGES)
def reconstructed(results: Results) -> Any:
    need_images(results)
    one, four = (results.ratio("reconstruction", "ft-invert", "fm", tuned=steps) for steps in OWN)
    return (one <= 0.5) & (four <= 0.5)


@study.claim("Flow matching trained longer changes the Frechet distance in 1 and in 4 steps by less than 15 %")
def longer(results: Results) -> Any:
    need_images(results)
    one, four = (results.ratio("frechet", "fm-longer", "fm", **own(steps)) for steps in OWN)
    return (one > 0.85) & (one < 1.15) & (four > 0.85) & (four < 1.15)


@study.claim("Fresh noise does not lower the images' distance in 1 step below 0.9 of flow matching's: the pairing decides")
def pairing_decides(results: Results) -> Any:
    need_images(results)
    return results.ratio("frechet", "ft-random", "fm", **own(1)) >= 0.9


@study.claim(
    "In 1 and in 2 steps FT-FM picks and places as precisely as flow matching in as many, and in 10 but for 5 points",
    paper=POLICIES,
    if_fails="by one step from fresh noise the flow becomes a regression, which takes longer than a short tuning (400 updates: 8 % within "
    "1 cm on one seed; 4,000: 57 %)",
)
def manipulated(results: Results) -> Any:
    needs = "a robot's arm is judged at full scale (`--full --set part=manipulation`), where its simulator is installed: pip install"
    need(results, "precise", f"{needs} gymnasium-robotics==1.4.2 mujoco==3.3.7")
    same = [results.difference("precise", "ft-random", "fm", **acting(calls)) >= 0 for calls in (1, 2)]
    return All((*same, *(beside_rival(results, calls) >= -0.05 for calls in (1, 2))))


def beside_rival(results: Results, calls: int) -> Any:
    """The share that FT-FM puts down precisely in few calls minus that of flow matching in many."""
    ours, rival = results.values("precise", "ft-random", **acting(calls)), results.values("precise", "fm", **acting(RIVAL))
    if len(ours) != len(rival):
        raise NotTestable("ft-random and fm were run with different seeds")
    return bootstrap(lambda a, b: a - b, ours, rival, what=f"put down within 1 cm, FT-FM in {calls} - flow matching in {RIVAL} calls")


@study.claim("FID of CIFAR-10; success on Push-T, Franka Kitchen and Robomimic", paper="its figures could not be checked")
def elsewhere(results: Results) -> Any:
    raise NotTestable("days of training on a GPU, and demonstrations that no package brings")


@study.summary
def summary(results: Results) -> str:
    said = []
    if results.has("frechet", "ft-invert"):
        said.append(
            f"Fine-tuned on latents, images drawn in 1 step had {results.say('frechet', 'ft-invert', 'fm', **own(1))} of flow matching's "
            f"Frechet distance and in 4 steps {results.say('frechet', 'ft-invert', 'fm', **own(4))} (with fresh noise in 1 step "
            f"{results.say('frechet', 'ft-random', 'fm', **own(1))})."
        )
    if results.has("rmse", "ft-random"):
        said.append(
            f"Motions in 2 steps came as near as {results.say('rmse', 'ft-random', 'fm-longer', steps=K)} of the error of flow matching "
            f"trained as much longer. A contracting residual shifted {results.say('shift', 'contracting', 'resft')} of what a free one did "
            "under a disturbance."
        )
    if results.has("precise", "ft-random"):
        by = {(arm, calls): results.say("precise", arm, **acting(calls)) for arm in ("ft-random", *ONCE) for calls in (1, 2, RIVAL)}
        said.append(
            f"A robot's arm put {by['ft-random', 2]} down within 1 cm by 2 calls of the tuned flow, {by['fm', 2]} by 2 of flow matching "
            f"({by['fm-longer', 2]} where it was trained longer), {by['fm', RIVAL]} by {RIVAL}, and {by['regression', 1]} by a regression."
        )
    return " ".join(said)
