"""The public classes of `lit_modules`; the package imports them when the first is used."""

from lit_modules.callbacks import EMA, AttentionCost, SampleFilms, StepTimer
from lit_modules.dit import DiTOutput, VideoDiT
from lit_modules.flow import FlowLoss, RectifiedFlow
from lit_modules.metrics import LossByTime
from lit_modules.module import LitVideoDiT, NonFiniteLoss
from lit_modules.pretrained import Distill, LitPretrained, LoRA
from lit_modules.routing_watch import RoutingWatch
from lit_modules.sampling import Drawn, Euler
from lit_modules.settings import Optim
from sparse_zoo.strips import film_strip

__all__ = [
    "EMA",
    "AttentionCost",
    "DiTOutput",
    "Distill",
    "Drawn",
    "Euler",
    "FlowLoss",
    "LitPretrained",
    "LitVideoDiT",
    "LoRA",
    "LossByTime",
    "NonFiniteLoss",
    "Optim",
    "RectifiedFlow",
    "RoutingWatch",
    "SampleFilms",
    "StepTimer",
    "VideoDiT",
    "film_strip",
]
