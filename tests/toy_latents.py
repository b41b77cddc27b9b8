"""Latents and text embeddings of the size of the tiny pretrained models, as a datamodule of one's own."""

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.loading import train_loader, val_loader
from experiments.tools.tiny_models import inputs


class ToyLatents(LightningDataModule):
    """Random films of two shots.

    Args:
        films: Films of an epoch.
        family: The tiny model that they are for.
    """

    def __init__(self, films: int = 3, family: str = "wan") -> None:
        super().__init__()
        self.films, self.family = films, family

    def summary(self) -> dict[str, Any]:
        return {"films": self.films}

    def _films(self, first: int, count: int) -> "Batches":
        batches = []
        for seed in range(first, first + count):
            given = inputs(self.family, seed=seed)
            latents = given.pop("hidden_states")
            arguments = {name: x for name, x in given.items() if name not in ("timestep", "return_dict")}
            batches.append({"latents": latents, "arguments": arguments, "shots": [2, 4]})
        return Batches(batches)

    def train_dataloader(self) -> DataLoader:
        return train_loader(self._films(0, self.films), 1, 0, 0, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return val_loader(self._films(1000, 1), 1, 0)


class Batches:
    """Whole batches, asked for one at a time."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        (number,) = numbers
        return self.batches[number % len(self)]  # every epoch has new numbers
