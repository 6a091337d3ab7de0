"""Written files: a PNG holds what made it; nothing is overwritten."""

from pathlib import Path

import pytest
from PIL import Image

from vllm_omni.entrypoints.cli.pictures import Recipe, free_path, read_recipe, save_png, slug
from vllm_omni.errors import RequestError

RECIPE = Recipe(
    prompt="a caf\u00e9 \u2615",
    negative_prompt="people",
    model="some/model",
    seed=2**63,
    sampling_params={"height": 64, "sigmas": [1.0, 0.5]},
    engine_args={"cfg_parallel_size": 2},
    index=1,
)


def test_recipe_survives_the_file(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECIPE)
    assert read_recipe(tmp_path / "a.png") == RECIPE
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_other_tools_can_read_the_chunks(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECIPE)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["prompt"] == RECIPE.prompt
        assert image.info["negative_prompt"] == "people"
        assert image.info["seed"] == str(2**63)
        assert image.info["model"] == "some/model"
        assert image.info["Software"].startswith("vllm-omni ")


def test_other_files_hold_no_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RequestError, match="holds no parameters"):
        read_recipe(tmp_path / "plain.png")
    with pytest.raises(RequestError, match="is not a picture"):
        read_recipe(tmp_path / "text.png")


def test_names(tmp_path: Path) -> None:
    assert slug("A cup of coffee, on the table!") == "a-cup-of-coffee-on-the-table"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("...") == "picture"
    assert len(slug("word " * 50)) <= 40
    (tmp_path / "a.png").touch()
    (tmp_path / "a-2.png").touch()
    assert free_path(tmp_path / "a.png") == tmp_path / "a-3.png"
    assert free_path(tmp_path / "b.png") == tmp_path / "b.png"
