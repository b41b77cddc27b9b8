"""Films to train on: real ones with their real cuts, and synthetic ones whose truth is known."""

from datamodules.quality import ShotQuality
from datamodules.recall import IdentityRecall
from datamodules.shot_world import ShotWorld
from datamodules.videos import VideoFilms

__all__ = ["IdentityRecall", "ShotQuality", "ShotWorld", "VideoFilms"]
