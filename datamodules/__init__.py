"""Films to train on: real ones with their real cuts, as pixels or latents, and synthetic ones of known truth."""

from datamodules.latent_films import LatentFilms
from datamodules.quality import ShotQuality
from datamodules.recall import IdentityRecall
from datamodules.shot_world import ShotWorld
from datamodules.videos import VideoFilms

__all__ = ["IdentityRecall", "LatentFilms", "ShotQuality", "ShotWorld", "VideoFilms"]
