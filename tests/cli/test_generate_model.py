"""``vllm-omni generate`` with a real engine and a tiny checkpoint: every form of output, and what the model refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vllm_omni.diffusion.tiny_models import make_tiny_model
from vllm_omni.entrypoints.cli.main import run
from vllm_omni.entrypoints.cli.pictures import read_recipe

ROWS = [
    {"prompt": "latent", "output_type": "latent"},
    {"prompt": "tensor", "output_type": "pt"},
    {"prompt": "array", "output_type": "np", "num_outputs_per_prompt": 2},
    {"prompt": "path", "return_trajectory_latents": True},
    {"prompt": "guided", "negative_prompt": "blur", "true_cfg_scale": 3},
    {"prompt": "odd", "height": 100},
    {"prompt": "extra", "extra_args": {"foo": 1}},
]


def test_every_form_of_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "tiny", tmp_path / "out"
    make_tiny_model("flux", model)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    options = ["--height", "64", "--width", "96", "--num-inference-steps", "3", "--seed", "5", "--dtype", "float32"]
    status = run(
        [
            "generate",
            "--prompts-file",
            f"{tmp_path}/rows.jsonl",
            "--model",
            f"{model}",
            "--output-dir",
            f"{out}",
            *options,
        ]
    )
    captured = capfd.readouterr()

    assert status == 1
    assert sorted(captured.out.splitlines()) == sorted(str(path) for path in out.iterdir())
    refused = {line.split(":")[0]: line for line in captured.err.splitlines() if line.startswith("line ")}
    assert set(refused) == {"line 6", "line 7"}
    assert "such as 96 or 112" in refused["line 6"]
    assert "extra_args['foo']" in refused["line 7"]

    assert load_file(out / "00001-latent.safetensors")["latents"].shape == (1, 4 * 6, 64)
    assert load_file(out / "00002-tensor.safetensors")["image"].shape == (3, 64, 96)
    pair = [np.load(out / f"00003-array-{number}.npy") for number in (1, 2)]
    assert [array.shape for array in pair] == [(64, 96, 3)] * 2
    assert not np.array_equal(*pair), "two outputs of one prompt have noise of their own"
    trajectory = load_file(out / "00004-path.trajectory.safetensors")
    assert trajectory["latents"].shape == (3, 1, 4 * 6, 64)
    assert trajectory["timesteps"].shape == (3,)
    recipe = read_recipe(out / "00005-guided.png")
    assert recipe.negative_prompt == "blur"
    assert recipe.sampling_params["true_cfg_scale"] == 3
    assert recipe.engine_args == {"model": str(model), "dtype": "float32"}
