"""Latents and text embeddings of the size of the tiny pretrained models, as a datamodule of one's own."""

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

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

    def _loader(self, seeds: range) -> DataLoader:
        batches = []
        for seed in seeds:
            given = inputs(self.family, seed=seed)
            latents = given.pop("hidden_states")
            arguments = {name: x for name, x in given.items() if name not in ("timestep", "return_dict")}
            batches.append({"latents": latents, "arguments": arguments, "shots": [2, 4]})
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._loader(range(self.films))

    def val_dataloader(self) -> DataLoader:
        return self._loader(range(1000, 1001))
