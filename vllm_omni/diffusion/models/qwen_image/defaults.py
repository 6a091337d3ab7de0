"""What Qwen-Image takes when a request does not say."""

from vllm_omni.diffusion.models.common.sampling import SamplingDefaults

QWEN_IMAGE = SamplingDefaults(
    num_inference_steps=50,
    guidance_scale=None,
    true_cfg_scale=4.0,
    max_sequence_length=512,
    max_sequence_length_limit=1024,
)

DEFAULTS = {"Qwen/Qwen-Image": QWEN_IMAGE, "Qwen/Qwen-Image-2512": QWEN_IMAGE}
"""By released checkpoint."""
