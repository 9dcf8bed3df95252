"""The verbs `fewer schedule-search` and `fewer schedule-show`: a pipeline in, solver schedules out; a schedule as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.devices import Device, choose_device
from fewer.files import made_whole

MOST = 100_000


def schedule_search(
    model_dir: Annotated[Path, typer.Argument(help="A diffusers pipeline: unet/ or transformer/, scheduler/, and what belongs to them.")],
    out: Annotated[Path, typer.Option(help="The directory to write a schedule for each number of calls into, and the scores.")],
    nfe: Annotated[list[int], typer.Option(min=2, max=1000, help="Network calls (repeat for more).")] = [5],  # noqa: B006
    budget: Annotated[int, typer.Option(min=1, max=MOST, help="Schedules that are scored, for each number of calls.")] = 300,
    ems: Annotated[Path | None, typer.Option(help="The model's statistics, as `fewer ems` writes them, for v3 steps.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images that the model was trained on: their mean may stand for the first call.")
    ] = None,
    predictor: Annotated[bool, typer.Option(help="Rank candidates before they are scored.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws noises and candidates.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    journal: Annotated[Path | None, typer.Option(help="A file for every score; a search that finds it goes on from it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what a former search wrote into the directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the solver schedule with which a diffusion model is sampled in so many network calls. Once a checkpoint, without training.

    Example: fewer schedule-search ddpm-cifar10 --nfe 5 --nfe 8 --budget 300 --out schedules
    """
    with made_whole(out, overwrite, inputs=[each for each in (model_dir, ems, images, journal) if each is not None]) as folder:
        from fewer.diffusion import ScheduleSearch
        from fewer.diffusion.solver_search.problems import of_pipeline

        problem = of_pipeline(model_dir, choose_device(device), ems or "", images or "")
        objective, fresh = problem.objectives(seed)
        calls = sorted(set(nfe))
        search = ScheduleSearch(problem.space(), objective, calls, budget * len(calls), predictor, seed, rescore=fresh, journal=journal)
        found = search.run()
        told = []
        for count, schedule in found.pareto.items():
            presets = [each.score for each in found.history if "preset" in each.schedule.meta and each.schedule.nfe == count]
            schedule.save(folder / f"schedule-{count}.json")
            told.append({"nfe": count, "error": problem.judge(schedule), "found": found.score[count], "best_preset": min(presets)})
        (folder / "scores.json").write_text(json.dumps({"schedules": told}, indent=1) + "\n", encoding="utf8")
    spent = objective.calls + fresh.calls + problem.reference_calls
    if as_json:
        print(json.dumps({"out": str(out), "schedules": told, "calls": spent, "dropped": found.dropped}))
        return
    for one in told:
        print(
            f"{one['nfe']} calls: error {one['found']:.4g} on the search noises (best named solver {one['best_preset']:.4g}), "
            f"{one['error']:.4g} on others"
        )
    print(
        f"schedules written to {out}; the search and its references took {spent:,} calls of one sample: paid after {spent:,} samples for each call that is saved"
    )


def schedule_show(
    file: Annotated[Path, typer.Argument(help="A schedule, as `fewer schedule-search` writes them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a solver schedule as a table, a row a step.

    Example: fewer schedule-show schedules/schedule-5.json
    """
    from fewer.diffusion import SolverSchedule

    schedule = SolverSchedule.load(file)
    print(schedule.to_json() if as_json else f"{schedule.nfe} network calls\n{schedule.table()}")


COMMANDS = {"schedule-search": schedule_search, "schedule-show": schedule_show}
