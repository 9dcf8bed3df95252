"""Figures out of a store: CSV, Parquet, or an MLflow server."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from fewer.errors import UserError, require
from fewer.files import whole_file
from fewer.plain import plain
from fewer.study.store import Store

FORMATS = ("csv", "parquet", "mlflow")


def export(store: Store, target: str, kind: str, slug: str | None = None, *, overwrite: bool = False) -> int:
    """Write every figure of every finished trial; how many there were.

    Args:
        store: the store to read.
        target: a file for csv and parquet; the tracking address (a URL, or sqlite:///FILE) for mlflow.
        kind: "csv", "parquet" or "mlflow".
        slug: one study's figures only.
        overwrite: replace the file where it is there.

    Raises:
        UserError: an unknown kind, or nothing to export.
        OSError, ValueError: the file is there already, or cannot be written.
        MissingExtra: pyarrow or mlflow is not installed.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: expected one of {', '.join(FORMATS)}")
    table = store.table(slug)
    if not table:
        raise UserError(f"{store.path} holds no finished trial{f' of {slug}' if slug else ''}; `fewer run SLUG` makes some")
    if kind == "mlflow":
        if not target:
            raise UserError("--out is empty; expected the tracking address of an MLflow server, such as sqlite:///mlflow.db")
        _to_mlflow(table, target)
        return len(table)
    with whole_file(target, overwrite) as part:
        {"csv": _to_csv, "parquet": _to_parquet}[kind](table, part)
    return len(table)


def _to_csv(table: list[dict[str, Any]], part: Path) -> None:
    with part.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)


def _to_parquet(table: list[dict[str, Any]], part: Path) -> None:
    pyarrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    parquet.write_table(pyarrow.Table.from_pylist(table), part)


def _to_mlflow(table: list[dict[str, Any]], target: str) -> None:
    """An experiment per study, a run per trial; a figure over one coordinate of whole numbers becomes a curve, others carry theirs in the name."""
    mlflow = require("mlflow", "mlflow")
    try:
        mlflow.set_tracking_uri(target)
        mlflow.search_experiments(max_results=1)
    except Exception as error:  # whatever the client and what stands behind it raise
        raise UserError(
            f"--out {target}: no MLflow server or store answers there ({plain(str(error)).splitlines()[0]}); name another"
        ) from error
    trials: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in table:
        trials[tuple(row[name] for name in ("slug", "arm", "seed", "scale", "device", "settings"))].append(row)
    for (slug, arm, seed, scale, device, settings), rows in trials.items():
        mlflow.set_experiment(f"fewer/{slug}")
        with mlflow.start_run(run_name=f"{arm}, seed {seed}"):
            mlflow.log_params({"arm": arm, "seed": seed, "scale": scale, "device": device} | json.loads(settings))
            for row in rows:
                if math.isnan(row["value"]):
                    mlflow.set_tag(f"nan.{_metric(row)[0]}", "NaN")
                    continue
                name, step = _metric(row)
                mlflow.log_metric(name, row["value"], step=step)


def _metric(row: dict[str, Any]) -> tuple[str, int]:
    """An MLflow metric's name and step for a figure."""
    coordinates = json.loads(row["coordinates"])
    if len(coordinates) == 1 and isinstance(next(iter(coordinates.values())), int):
        return row["figure"], next(iter(coordinates.values()))
    return "/".join([row["figure"], *(f"{name}-{value}" for name, value in coordinates.items())]), 0
