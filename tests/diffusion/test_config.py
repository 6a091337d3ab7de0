"""Names that users of the field bring along are refused with what to use here instead."""

import pytest

from vllm_omni.diffusion.data import INSTEAD, OmniDiffusionConfig
from vllm_omni.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_batch_size", "use max_num_seqs"),
        ("device_map", "use devices, or a parallel size"),
        ("enable_cpu_offload", "there is no offloading yet, use"),
        ("enable_layerwise_offload", "there is no offloading yet, use"),
        ("lora_path", "there are no adapters"),
        ("load_format", "use diffusion_load_format"),
        ("output_type", "sampling parameters of a request"),
    ],
)
def test_a_name_from_elsewhere(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{name}'; .*{hint}") as caught:
        OmniDiffusionConfig.from_kwargs(model="m", **{name: 1})
    assert caught.value.details["field"] == name


def test_what_is_a_setting_is_no_foreign_name() -> None:
    """A hint has to go when the setting comes."""
    assert not set(INSTEAD) & set(OmniDiffusionConfig.__dataclass_fields__)
