"""What a result can be asked, for both kinds of stages."""

from vllm.outputs import CompletionOutput, RequestOutput

from vllm_omni.outputs import OmniRequestOutput


def test_output_of_an_autoregressive_stage() -> None:
    completion = CompletionOutput(0, "hello", [5, 6], None, None, finish_reason="stop")
    made = RequestOutput(
        "r",
        "hi",
        [1, 2],
        None,
        [completion],
        finished=True,
        encoder_prompt_token_ids=[9],
        num_cached_tokens=1,
        kv_transfer_params={"block": 3},
    )
    out = OmniRequestOutput.from_pipeline(2, "text", made)
    assert (out.request_id, out.stage_id, out.final_output_type, out.finished, out.prompt) == (
        "r",
        2,
        "text",
        True,
        "hi",
    )
    assert out.is_pipeline_output
    assert not out.is_diffusion_output
    assert out.outputs == [completion]
    assert (out.prompt_token_ids, out.encoder_prompt_token_ids, out.prompt_logprobs) == ([1, 2], [9], None)
    assert (out.num_cached_tokens, out.kv_transfer_params, out.num_images) == (1, {"block": 3}, 0)


def test_output_of_a_diffusion_stage() -> None:
    out = OmniRequestOutput.from_diffusion("r", ["picture"], "a prompt", {"seed": 1})
    assert out.images == out.outputs == out.request_output[0].images == ["picture"]
    assert out.request_output[0].metrics == {"seed": 1}
    assert (out.final_output_type, out.num_images, out.prompt) == ("image", 1, "a prompt")
    assert out.is_diffusion_output
    assert not out.is_pipeline_output
    assert out.prompt_token_ids is out.encoder_prompt_token_ids is out.kv_transfer_params is None
    assert out.to_dict()["num_images"] == 1
