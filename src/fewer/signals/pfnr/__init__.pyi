from .archive import SessionReport, VideoArchive
from .net.network import PFNR, PFNRConfig
from .net.subnetworks import FourierSubneuralOperator, SubnetConv2d, SubnetLinear
from .quality import psnr, ssim

__all__ = [
    "PFNR", "FourierSubneuralOperator", "PFNRConfig", "SessionReport", "SubnetConv2d", "SubnetLinear", "VideoArchive", "psnr", "ssim",
]  # fmt: skip
