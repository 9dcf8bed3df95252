"""Joules: from counters of the machine where it lets us read them, otherwise CodeCarbon's estimate, which is then called one."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewer.errors import UserError

ESTIMATE = "codecarbon estimate"
POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KILOWATT_HOUR = 3.6e6
SECONDS_BETWEEN_SAMPLES = 10


@dataclass
class Energy:
    """What `energy` found; set when its block ends.

    Attributes:
        joules: None where nothing can tell.
        source: "rapl", "nvml", "rapl + nvml", "codecarbon estimate", or None.
    """

    joules: float | None = None
    source: str | None = None

    @property
    def co2e_kg(self) -> float | None:
        """Kilograms of CO2 equivalent at the mean of the country in FEWER_COUNTRY (three letters, "USA" by default); needs CodeCarbon."""
        intensity = _carbon_intensity(os.environ.get("FEWER_COUNTRY", "USA"))
        return None if self.joules is None or intensity is None else self.joules * intensity


def energy_source() -> str | None:
    """Where joules come from on this machine: "rapl", "nvml", "rapl + nvml" (measured), "codecarbon estimate", or None."""
    metered = [name for name, counter in (("rapl", _rapl()), ("nvml", _nvml())) if counter]
    if metered:
        return " + ".join(metered)
    return ESTIMATE if _codecarbon() else None


@contextlib.contextmanager
def energy() -> Iterator[Energy]:
    """Joules spent inside the block.

    RAPL counts the processor packages of the whole machine, NVML the GPU. The estimate is CodeCarbon's: the processor's rated power
    times this process's share of it, and a fixed power for the memory; the first one in a process takes two seconds to look around,
    before the block begins.
    """
    spent = Energy(source=energy_source())
    if spent.source == ESTIMATE:
        tracker = _tracker()
        tracker.start()
        try:
            yield spent
        finally:
            tracker.stop()
            data = getattr(tracker, "final_emissions_data", None)
            spent.joules = data.energy_consumed * JOULES_PER_KILOWATT_HOUR if data else None
        return
    counters = [counter for counter in (_rapl(), _nvml()) if counter]
    before = [counter() for counter in counters]
    try:
        yield spent
    finally:
        if counters:
            spent.joules = sum(
                _spent(start, end)
                for counter, starts in zip(counters, before, strict=True)
                for start, end in zip(starts, counter(), strict=True)
            )


@dataclass(frozen=True)
class Reading:
    """One counter at one moment."""

    joules: float
    wraps_at: float = float("inf")  # joules; the counter then starts again from 0


def _spent(start: Reading, end: Reading) -> float:
    """Joules between two readings of one counter, which may have wrapped around once."""
    return end.joules - start.joules + (end.wraps_at if end.joules < start.joules else 0.0)


Counter = Callable[[], list[Reading]]


def read_rapl(folder: Path) -> list[Reading]:
    """The energy counters of the processor packages under a powercap folder; OSError where they may not be read."""
    packages = sorted(path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1)
    return [
        Reading(int((package / "energy_uj").read_text()) / 1e6, int((package / "max_energy_range_uj").read_text()) / 1e6)
        for package in packages
    ]


def readings_of_nvml(millijoules: list[int]) -> list[Reading]:
    """NVML's counters, in millijoules since the driver was loaded."""
    return [Reading(each / 1e3) for each in millijoules]


@functools.cache
def _rapl() -> Counter | None:
    try:
        return functools.partial(read_rapl, POWERCAP) if read_rapl(POWERCAP) else None
    except OSError:
        return None


@functools.cache
def _nvml() -> Counter | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

        def read() -> list[Reading]:
            return readings_of_nvml([pynvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in devices])

        return read if read() else None
    except Exception:  # no package, no driver, no device, a device without the counter: NVML has an error class for each
        return None


@functools.cache
def _codecarbon() -> Any:
    """The package, or None where it is not installed."""
    try:
        import codecarbon
    except ImportError:
        return None
    return codecarbon


def _tracker() -> Any:
    """A tracker that writes no file, asks no network, and says nothing."""
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = _codecarbon().OfflineEmissionsTracker(
        country_iso_code=os.environ.get("FEWER_COUNTRY", "USA"),
        output_methods=[],
        log_level="critical",
        measure_power_secs=3600,
        allow_multiple_runs=True,
        tracking_mode="process",
    )
    sampler = getattr(tracker, "_scheduler_monitor_power", None)
    if sampler is not None:  # samples count by the time they stand for, so rare ones do, and cost less than 1 % of the section
        sampler.interval = SECONDS_BETWEEN_SAMPLES
    return tracker


@functools.cache
def _carbon_intensity(country: str) -> float | None:
    """Kilograms of CO2 equivalent per joule, by CodeCarbon's table; None without CodeCarbon."""
    if not _codecarbon():
        return None
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy as KilowattHours
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    table = DataSource()
    if country not in table.get_global_energy_mix_data():
        raise UserError(
            f"FEWER_COUNTRY is {country!r}; expected a country's three letters, as in POL or USA: mend the variable or unset it"
        )
    place = GeoMetadata(country_iso_code=country, country_name=country)
    return Emissions(table).get_country_emissions(KilowattHours.from_energy(kWh=1), place) / JOULES_PER_KILOWATT_HOUR
