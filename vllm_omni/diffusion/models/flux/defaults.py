"""What FLUX.1 takes when a request does not say."""

from vllm_omni.diffusion.models.common.sampling import SamplingDefaults

DEV = SamplingDefaults(
    num_inference_steps=28,
    guidance_scale=3.5,
    true_cfg_scale=1.0,
    max_sequence_length=512,
    max_sequence_length_limit=512,
)
SCHNELL = SamplingDefaults(
    num_inference_steps=4,
    guidance_scale=None,
    true_cfg_scale=1.0,
    max_sequence_length=256,
    max_sequence_length_limit=256,
)

DEFAULTS = {"black-forest-labs/FLUX.1-dev": DEV, "black-forest-labs/FLUX.1-schnell": SCHNELL}
"""By released checkpoint."""
