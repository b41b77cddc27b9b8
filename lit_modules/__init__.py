"""A video diffusion transformer on registered attention, its training and its sampling, for Lightning."""

from lit_modules.callbacks import EMA, AttentionCost, SampleFilms, StepTimer, film_strip
from lit_modules.dit import DiTOutput, VideoDiT
from lit_modules.flow import FlowLoss, RectifiedFlow
from lit_modules.metrics import LossByTime
from lit_modules.module import LitVideoDiT, NonFiniteLoss
from lit_modules.pretrained import LitPretrained
from lit_modules.routing_watch import RoutingWatch
from lit_modules.sampling import Drawn, Euler
from lit_modules.settings import Optim, Pretrained

__all__ = [
    "EMA",
    "AttentionCost",
    "DiTOutput",
    "Drawn",
    "Euler",
    "FlowLoss",
    "LitPretrained",
    "LitVideoDiT",
    "LossByTime",
    "NonFiniteLoss",
    "Optim",
    "Pretrained",
    "RectifiedFlow",
    "RoutingWatch",
    "SampleFilms",
    "StepTimer",
    "VideoDiT",
    "film_strip",
]
