from .cascade import Call, band_guidance, cascade, cascade_calls, enlarge, split_bands
from .maps import MapReuseProcessor, MapStore, resize_map
from .pipeline import FreCaSPipeline, frecas
from .schedules import matched_flow_time, matched_sigma, matched_start, stage_times
from .stages import FreCaSConfig, Stage, cost

__all__ = [
    "Call",
    "FreCaSConfig",
    "FreCaSPipeline",
    "MapReuseProcessor",
    "MapStore",
    "Stage",
    "band_guidance",
    "cascade",
    "cascade_calls",
    "cost",
    "enlarge",
    "frecas",
    "matched_flow_time",
    "matched_sigma",
    "matched_start",
    "resize_map",
    "split_bands",
    "stage_times",
]
