from .contraction import ContractingResidual, log_norm
from .finetuning import FineTuneConfig, FineTuned, finetune, load_finetuned
from .policy import FlowPolicy
from .solver import ReconstructionMLE, error_bound, flow_matching_loss, invert, iss_bound, odeint
from .velocity import ResidualField, VelocityMLP

__all__ = [
    "ContractingResidual",
    "FineTuneConfig",
    "FineTuned",
    "FlowPolicy",
    "ReconstructionMLE",
    "ResidualField",
    "VelocityMLP",
    "error_bound",
    "finetune",
    "flow_matching_loss",
    "invert",
    "iss_bound",
    "load_finetuned",
    "log_norm",
    "odeint",
]
