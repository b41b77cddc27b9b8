"""Tiny pretrained models on disk: read back without a hub, sampled, attached."""

import re
from pathlib import Path

import pytest
import torch
from tiers import cases

import sparse_zoo as zoo
from experiments.tools.tiny_models import CONFIGS, PIPELINES, main, write
from sparse_zoo.bridge import family_names


@pytest.mark.slow
def test_every_family_is_written_and_read_back(tmp_path: Path):
    import diffusers

    folders = write(tmp_path)
    assert [folder.name for folder in folders] == list(CONFIGS)
    for folder in folders:
        model = getattr(diffusers, CONFIGS[folder.name][0]).from_pretrained(folder / "transformer")
        assert type(model).__name__ == CONFIGS[folder.name][0]


@pytest.mark.parametrize("family", cases(PIPELINES, ["wan"]))
def test_a_pipeline_samples_with_any_method(tmp_path: Path, family):
    from diffusers import DiffusionPipeline

    if family == "skyreels_v2":
        pytest.importorskip("ftfy", reason="needs the extra: pip install -e '.[pretrained]'")
    (folder,) = write(tmp_path, [family])
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    # HunyuanVideo 1.5 pads all prompts to one length of its own.
    length = {} if family == "hunyuan_video_15" else {"max_sequence_length": 7}

    def sample(prompt: str = "a ball") -> torch.Tensor:
        return pipe(
            prompt=prompt,
            negative_prompt="",
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=2,
            **length,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames

    original = sample()
    assert original.shape == (1, 9, 3, 64, 96)
    assert original.std() > 0
    assert not sample("a cube").equal(original)  # the prompt is read
    bridge = zoo.attach(pipe.transformer, "dense")
    assert (sample() - original).abs().max() <= 1e-5
    bridge.detach()
    bridge = zoo.attach(pipe.transformer, "moc", top_k=1)
    bridge.film(shots=[1, 2])
    assert not sample().equal(original)
    assert bridge.results[0].layout.films[0].shots[0].frames == 1


def test_the_command_refuses_an_unknown_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path), "wam"])
    assert error.value.code == 2
    assert "did you mean 'wan'?" in capsys.readouterr().err
    main([str(tmp_path), "skyreels_v2"])
    assert (tmp_path / "skyreels_v2" / "transformer" / "config.json").is_file()


def test_the_page_names_the_families_and_its_code_is_python():
    page = (Path(__file__).parent.parent / "docs" / "pretrained.md").read_text()
    assert all(f"`{family}`" in page for family in family_names())
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "docs/pretrained.md", "exec")
