"""Every tensor of the released layout goes to its stage, at the released sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config

from tests.ar_support import StageSet
from vllm_omni.engine.arg_utils import OmniEngineArgs
from vllm_omni.errors import ConfigError
from vllm_omni.model_executor.models.qwen2_5_omni.talker import Qwen2_5OmniTalkerStage
from vllm_omni.model_executor.models.qwen2_5_omni.thinker import Qwen2_5OmniThinkerStage
from vllm_omni.model_executor.models.qwen2_5_omni.token2wav import Qwen2_5OmniToken2WavModel
from vllm_omni.model_executor.models.qwen2_5_omni.voices import load_voices, read_voices
from vllm_omni.model_executor.tiny_models.qwen2_5_omni import VOICES, make_full_size_qwen2_5_omni

SHARED = "thinker.model.embed_tokens.weight"
"""The talker takes the rows of its text markers from the thinker's embeddings."""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_full_size_qwen2_5_omni(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def released(full_size: Path) -> dict[str, torch.Tensor]:
    """Names and (meta) tensors of the released checkpoint: transformers' own modules."""
    from transformers import AutoConfig, Qwen2_5OmniForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5OmniForConditionalGeneration(AutoConfig.from_pretrained(full_size))
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def process_groups(start_stage: StageSet, checkpoint: Path) -> None:
    """vLLM's layers ask for its process groups: any running stage brings them."""
    start_stage(checkpoint, "generation", **stage_args("token2wav"))


def stage_args(stage: str) -> dict[str, Any]:
    arch = {"thinker": "Qwen2_5OmniThinkerForConditionalGeneration", "token2wav": "Qwen2_5OmniToken2WavModel"}
    return {
        "model_stage": stage,
        "model_arch": arch.get(stage, "Qwen2_5OmniTalkerForConditionalGeneration"),
        "hf_config_name": f"{stage}_config",
    }


def build(cls: type[Any], full_size: Path, stage: str) -> Any:
    kind: Any = "generation" if stage == "token2wav" else "ar"
    args = {"model": str(full_size), **stage_args(stage)}
    if stage == "talker":
        args["skip_tokenizer_init"] = True
    config = OmniEngineArgs.from_stage(1, kind, args).create_engine_config()
    with set_current_vllm_config(config), torch.device("meta"):
        return cls(vllm_config=config)


def test_the_tiny_checkpoint_has_the_released_layout(checkpoint: Path, released: dict[str, torch.Tensor]) -> None:
    """Same names but for the counts of layers."""
    tiny: set[str] = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tiny |= set(file.keys())

    def pattern(name: str) -> str:
        return ".".join("N" if part.isdigit() else part for part in name.split("."))

    assert {pattern(name) for name in tiny} == {pattern(name) for name in released}


def test_every_tensor_has_one_stage(released: dict[str, torch.Tensor]) -> None:
    thinker = {name for name in released if Qwen2_5OmniThinkerStage.hf_to_vllm_mapper.apply_list([name])}
    talker = {name for name in released if Qwen2_5OmniTalkerStage.hf_to_vllm_mapper.apply_list([name])}
    token2wav = {name for name in released if name.startswith("token2wav.")}
    assert thinker | talker | token2wav == set(released)
    assert not thinker & talker
    assert not token2wav & (thinker | talker)
    assert SHARED in thinker


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize(
    ("stage", "cls"), [("talker", Qwen2_5OmniTalkerStage), ("token2wav", Qwen2_5OmniToken2WavModel)]
)
def test_released_shapes(full_size: Path, released: dict[str, torch.Tensor], stage: str, cls: type[Any]) -> None:
    """The loader takes every tensor at its released shape, and no parameter is left."""
    model = build(cls, full_size, stage)
    assert model.load_weights(released.items()) == set(dict(model.named_parameters()))
    own = {name: tensor for name, tensor in released.items() if name.startswith((stage, SHARED))}
    victim = next(name for name in own if name.endswith("proj.weight") and name.startswith(stage))
    with pytest.raises((ValueError, AssertionError, RuntimeError)):
        model.load_weights({**own, victim: torch.empty(3, 5, device="meta")}.items())


@pytest.mark.usefixtures("process_groups")
def test_token2wav_is_float32_whatever_the_stage(full_size: Path) -> None:
    model = build(Qwen2_5OmniToken2WavModel, full_size, "token2wav")
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert model.samples_per_code == 480


def test_voices(checkpoint: Path, tmp_path: Path) -> None:
    voices = load_voices(str(checkpoint))
    assert tuple(voices) == VOICES
    assert voices.default == "Chelsie"
    assert voices["Ethan"].bos_token != voices["Chelsie"].bos_token
    with pytest.raises(ConfigError, match=r"no spk_dict\.pt"):
        load_voices(str(tmp_path))
    path = tmp_path / "spk_dict.pt"
    path.write_bytes(b"not a tensor file")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_voices(path)
    torch.save({"A": {"cond": torch.zeros(1, 4)}}, path)
    with pytest.raises(ConfigError, match="voice 'A' needs"):
        read_voices(path)


def test_voices_are_data_not_code(tmp_path: Path) -> None:
    """A pickle that would run something is refused, not run."""
    trace = tmp_path / "ran"
    torch.save({"A": _Bomb(trace)}, tmp_path / "spk_dict.pt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_voices(tmp_path / "spk_dict.pt")
    assert not trace.exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)
