from .mezo import MeZO, StepResult, Update, ZO2Config
from .runs import ZO2Trainer, replay
from .streaming import ZO2

__all__ = ["ZO2", "MeZO", "StepResult", "Update", "ZO2Config", "ZO2Trainer", "replay"]
