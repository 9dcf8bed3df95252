"""What this machine has, and what that means for each method."""

from __future__ import annotations

import importlib.util
import re
import shutil
from importlib.metadata import PackageNotFoundError, metadata, version

import msgspec

from fewer import papers
from fewer.study.environment import environment


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked for."""

    what: str
    found: bool
    means: str


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    wanted = []
    for requirement in metadata("fewer").get_all("Requires-Dist") or []:
        name, _, marker = requirement.partition(";")
        if re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", marker):
            wanted.append(re.split(r"[\s\[<>=!~(]", name.strip(), maxsplit=1)[0])
    return [name for name in wanted if name != "fewer" and not _installed(name)]


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def examine() -> list[Finding]:
    """Look for what the rooms of the house can use."""
    here = environment()
    findings = [
        Finding(
            f"{here['cores']} cores, {here['memory'] / 2**30:.0f} GiB, {here['processor']}",
            True,
            "studies at quick scale are made for 2 cores",
        )
    ]
    findings.append(_gpu())
    findings.append(_energy())
    for extra, use in (
        ("tuning", "fewer tune"),
        ("ray", "fewer run --engine ray"),
        ("parquet", "fewer export --format parquet"),
        ("mlflow", "fewer export --format mlflow"),
    ):
        lacking = missing_packages(extra)
        findings.append(Finding(f"extra {extra}", not lacking, use if not lacking else f"no `{use}`; pip install 'fewer[{extra}]'"))
    for client, brings in (
        ("pip", "data from Python packages"),
        ("npm", "data from npm packages"),
        ("apt-get", "data from Debian packages"),
    ):
        there = bool(shutil.which(client)) or (client == "pip" and importlib.util.find_spec("pip") is not None)
        findings.append(Finding(client, there, brings if there else f"no {brings}; `fewer data` shows the other ways"))
    return findings


def examine_methods() -> list[Finding]:
    """For each method, whether its extra is installed."""
    findings = []
    for card in papers.cards():
        lacking = missing_packages(card.extra)
        findings.append(
            Finding(
                card.slug, not lacking, "runs here" if not lacking else f"needs {', '.join(lacking)}: pip install 'fewer[{card.extra}]'"
            )
        )
    return findings


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("torch", False, "methods for networks need it; pip install 'fewer[forward-only]' brings it")
    if torch.cuda.is_available():
        return Finding(f"GPU: {torch.cuda.get_device_name()}", True, "--device auto takes it; --full studies are made for it")
    return Finding("GPU", False, "everything runs on the CPU; --full studies take long")


def _energy() -> Finding:
    from fewer import meters

    source = meters.energy_source()
    if source is None:
        return Finding("energy counter", False, "no joules; pip install 'fewer[energy]' estimates them")
    if "estimate" in source:
        return Finding("energy counter", False, f"joules are estimated ({source}), and marked so wherever they are shown")
    return Finding(f"energy counter: {source}", True, "joules are measured")
