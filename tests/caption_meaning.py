"""Whether embeddings of captions train a better model than hashed words: `python tests/caption_meaning.py --seeds 4`.

A made-up task in which only a caption's meaning helps: the latents of a film show one of eight subjects, each a fixed
pattern in noise, and a caption names the subject. A small model is trained on four captions of each subject and samples
films of two others that share no word with those but articles and prepositions. The measure is the share of sampled
films whose nearest pattern is that of the caption's subject (1/8 by chance), on captions of training and on new ones.

`words`: a fixed random vector for each hashed word, as wide as MiniLM's; what the model reads them with is learned, so
that this is a learned table of words. `minilm`: `--text-encoder minilm` of `zoo encode`, unless `--encoder` names
another folder. Both see the same films in the same order.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from datamodules.encoders import MINILM, TextEncoder, text_encoder_folder
from datamodules.text import tokenize
from lit_modules import Euler, LitVideoDiT
from sparse_zoo.layout import Layout, Shot

# Of each subject four captions to train on, then two new ones.
SUBJECTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("a dog runs", "the dog barks", "a big dog", "the dog sleeps at home"), ("a puppy", "the hound is howling")),
    (("a car on the road", "the car stops", "a fast car", "the red car"), ("an automobile", "a sedan in traffic")),
    (("a boat sails", "the boat at sea", "a small boat", "the old boat"), ("a ship", "the yacht in the harbour")),
    (("rain falls", "the rain is heavy", "cold rain", "rain and clouds"), ("a wet storm", "a downpour")),
    (("a fire burns", "the fire is hot", "fire and smoke", "a bright fire"), ("flames", "a blaze")),
    (("a child plays", "the child laughs", "a happy child", "the child at school"), ("a kid", "the toddler crawls")),
    (("a tree grows", "the tree is tall", "a green tree", "leaves of the tree"), ("an oak", "pines of a forest")),
    (("bread on a table", "the fresh bread", "a loaf of bread", "bread for lunch"), ("a baguette", "some toast")),
)
CHANNELS, FRAMES, SIDE, WIDTH, NOISE = 4, 2, 4, 384, 0.5
VOCABULARY = 2**16
MODEL: dict[str, Any] = {"dim": 48, "depth": 2, "heads": 2, "attention": {"name": "dense"}}
TRAINING, NEW = 0, 1


def hashed_words(captions: Sequence[str]) -> dict[str, Tensor]:
    """A random vector of about length 1 for each word, (n, WIDTH)."""

    def vector(word: int) -> Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(word)) / WIDTH**0.5

    return {one: torch.stack([vector(int(word)) for word in tokenize(one, VOCABULARY, 77)]) for one in captions}


def encoded(captions: Sequence[str], given: str) -> dict[str, Tensor]:
    """A text encoder's embeddings, (n, width), of mean length 1."""
    with tempfile.TemporaryDirectory() as cache:
        encoder = TextEncoder(text_encoder_folder(Path(given), Path(cache)), torch.device("cpu"), 77)
        found = {one: encoder.encode(one)[0] for one in captions}
    length = torch.cat(list(found.values())).norm(dim=1).mean()
    return {one: text / length for one, text in found.items()}


def batch(pairs: Sequence[tuple[int, str]], texts: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Any]:
    """Films of one shot in one stream: of each (subject, caption) its pattern in noise."""
    own = [texts[caption] for _, caption in pairs]
    noise = torch.randn(len(pairs), 1, FRAMES, CHANNELS, SIDE, SIDE, generator=draw)
    return {
        "layout": Layout.pack([Layout.film([Shot(FRAMES, SIDE // 2, SIDE // 2, len(text))]) for text in own]),
        "clips": [patterns()[subject] + NOISE * one for (subject, _), one in zip(pairs, noise, strict=True)],
        "text": torch.cat(own)[None],
    }


def patterns() -> Tensor:
    """(subjects, 1, 1, C, H, W)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(len(SUBJECTS), 1, 1, CHANNELS, SIDE, SIDE, generator=draw)


def accuracy(lit: LitVideoDiT, kind: int, texts: Mapping[str, Tensor], seed: int) -> float:
    """The share of sampled films that show the subject of their caption."""
    pairs = [(subject, caption) for subject, kinds in enumerate(SUBJECTS) for caption in kinds[kind]]
    given = batch(pairs, texts, torch.Generator().manual_seed(1))
    made = torch.stack(Euler(steps=10).sample(lit.model, lit.flow, given, seed=seed)).mean((1, 2))
    distance = (made[:, None] - patterns()[:, 0, 0][None]).flatten(2).norm(dim=2)
    return float((distance.argmin(1) == torch.tensor([subject for subject, _ in pairs])).float().mean())


def train(texts: Mapping[str, Tensor], seed: int, steps: int) -> LitVideoDiT:
    """A model that has seen `steps` batches of 16 films of the training captions."""
    pl.seed_everything(seed)
    width = next(iter(texts.values())).shape[1]
    shape = {"channels": CHANNELS, "patch": (1, 2, 2), "vocabulary": 0, "text_dim": width}
    lit = LitVideoDiT({**MODEL, **shape}, optim={"lr": 2e-3, "warmup_steps": 20, "ema_decay": 0.99})
    pairs = [(subject, caption) for subject, kinds in enumerate(SUBJECTS) for caption in kinds[TRAINING]]
    draw = torch.Generator().manual_seed(seed)
    films = [
        batch([pairs[i] for i in torch.randint(len(pairs), (16,), generator=draw).tolist()], texts, draw)
        for _ in range(steps)
    ]
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(lit, torch.utils.data.DataLoader(films, batch_size=None))  # type: ignore[arg-type]
    return lit.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--encoder", default=MINILM, help="folder of a text encoder, or minilm")
    asked = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    captions = [caption for kinds in SUBJECTS for kind in kinds for caption in kind]
    for name, texts in (("words", hashed_words(captions)), ("encoder", encoded(captions, asked.encoder))):
        for seed in range(asked.seeds):
            lit = train(texts, seed, asked.steps)
            scores = {what: accuracy(lit, kind, texts, seed) for what, kind in (("training", TRAINING), ("new", NEW))}
            print(json.dumps({"captions": name, "seed": seed, **scores}), flush=True)


if __name__ == "__main__":
    main()
