"""Every tensor of the released layout goes to its stage, at the released sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.models.utils import WeightsMapper

from tests.ar_support import StageSet
from vllm_omni.engine.arg_utils import OmniEngineArgs
from vllm_omni.model_executor.layers.dense import load_dense_weights
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor
from vllm_omni.model_executor.models.qwen3_omni.talker import Qwen3OmniTalkerForConditionalGeneration
from vllm_omni.model_executor.models.qwen3_omni.thinker import Qwen3OmniThinkerForConditionalGeneration
from vllm_omni.model_executor.models.qwen3_omni.vocoder import Vocoder
from vllm_omni.model_executor.tiny_models.qwen3_omni import make_full_size_qwen3_omni

SHARED = {"thinker.model.embed_tokens.weight"}
"""The talker keeps a copy of the thinker's token embeddings, so that text reaches it as token ids."""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_full_size_qwen3_omni(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def config(full_size: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(full_size)


@pytest.fixture(scope="module")
def released(config: Any) -> dict[str, torch.Tensor]:
    """Names and (meta) tensors of the released checkpoint: transformers' modules, experts one by one."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3OmniMoeForConditionalGeneration(config)
    return dict(_released(model.state_dict()))


def _released(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                stem = f"{name.removesuffix('.gate_up_proj')}.{number}"
                yield f"{stem}.gate_proj.weight", gate
                yield f"{stem}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(tensor):
                yield f"{name.removesuffix('.down_proj')}.{number}.down_proj.weight", expert
        else:
            yield name, tensor


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_the_tiny_checkpoint_has_the_released_layout(checkpoint: Path, released: dict[str, torch.Tensor]) -> None:
    """Same names but for the counts of layers and experts."""
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        tiny = set(file.keys())

    def pattern(name: str) -> str:
        return ".".join("N" if part.isdigit() else part for part in name.split("."))

    assert {pattern(name) for name in tiny} == {pattern(name) for name in released}


def test_every_tensor_has_one_stage(released: dict[str, torch.Tensor]) -> None:
    def taken(mapper: WeightsMapper) -> set[str]:
        return {name for name in released if mapper.apply_list([name])}

    thinker = taken(Qwen3OmniThinkerForConditionalGeneration.hf_to_vllm_mapper)
    talker = taken(Qwen3OmniTalkerForConditionalGeneration.hf_to_vllm_mapper)
    code2wav = {name for name in released if name.startswith("code2wav.")}
    assert thinker | talker | code2wav == set(released)
    assert thinker & talker == SHARED
    assert not code2wav & (thinker | talker)


def test_vocoder(config: Any, released: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        vocoder = Vocoder(config.code2wav_config)
    own = below(released, "code2wav.")
    assert load_dense_weights(vocoder, own.items()) == set(dict(vocoder.named_parameters()))
    assert (vocoder.samples_per_frame, vocoder.lookahead) == (1920, 555)


def test_code_predictor(config: Any, released: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        predictor = CodePredictor(config.talker_config.code_predictor_config)
    own = below(released, "talker.code_predictor.")
    assert load_dense_weights(predictor, own.items()) == set(dict(predictor.named_parameters()))
    with pytest.raises(ValueError, match="has no parameter"):
        load_dense_weights(predictor, [("model.layers.0.mlp.extra.weight", torch.empty(1))])
    with pytest.raises(ValueError, match="needed"):
        load_dense_weights(predictor, [("model.norm.weight", torch.empty(3))])


def test_talker(start_stage: StageSet, checkpoint: Path, full_size: Path, released: dict[str, torch.Tensor]) -> None:
    """vLLM's loaders take every tensor at its released shape, and no parameter is left."""
    args = {
        "model_stage": "talker",
        "model_arch": "Qwen3OmniTalkerForConditionalGeneration",
        "hf_config_name": "talker_config",
        "skip_tokenizer_init": True,
    }
    start_stage(checkpoint, **args)  # vLLM's process groups, which its layers ask for
    vllm_config = OmniEngineArgs.from_stage(1, "ar", {"model": str(full_size), **args}).create_engine_config()
    with set_current_vllm_config(vllm_config), torch.device("meta"):
        talker = Qwen3OmniTalkerForConditionalGeneration(vllm_config=vllm_config)
        loaded = talker.load_weights(released.items())
    assert loaded == set(dict(talker.named_parameters()))
