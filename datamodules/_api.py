"""The public classes of `datamodules`; the package imports them when the first is used."""

from datamodules.latent_films import LatentFilms
from datamodules.quality import ShotQuality
from datamodules.recall import IdentityRecall
from datamodules.shot_world import ShotWorld
from datamodules.videos import VideoFilms

__all__ = ["IdentityRecall", "LatentFilms", "ShotQuality", "ShotWorld", "VideoFilms"]
