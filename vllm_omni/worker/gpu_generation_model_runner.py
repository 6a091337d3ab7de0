"""``GPUGenerationModelRunner``: a stage of one pass, such as a vocoder: payloads in, outputs out, no tokens.

A request is one placeholder token, so vLLM's scheduler runs it in one step whatever its length; the batch is up to
``max_num_seqs``. There is no KV cache and nothing to capture.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_omni.errors import ConfigError, OmniError, OutOfMemoryError
from vllm_omni.model_executor.models.interfaces import OmniGenerator, OmniRequestState
from vllm_omni.worker.emission import Emission, Row
from vllm_omni.worker.model_runner import OmniGPUModelRunner

TASK = "plugin"
"""vLLM's name for a pooling task whose output is the model's own."""


class GPUGenerationModelRunner(OmniGPUModelRunner):
    """Runs ``omni_generate`` on the payloads of a batch."""

    _generator: OmniGenerator

    def _find_hooks(self, model: torch.nn.Module) -> None:
        if not isinstance(model, OmniGenerator):
            raise ConfigError(f"{type(model).__name__} has no omni_generate; use stage_type: ar", field="stage_type")
        self._generator = model

    def get_supported_tasks(self) -> tuple[str, ...]:
        """The one task that requests of a generation stage carry."""
        return (TASK,)

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None
    ) -> ModelRunnerOutput | None:
        """Run the scheduled requests to their end."""
        self._update_omni(scheduler_output)
        req_ids = list(scheduler_output.num_scheduled_tokens)
        if not req_ids:
            return EMPTY_MODEL_RUNNER_OUTPUT
        states = [self.omni_states[req_id] for req_id in req_ids]
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
            sampled_token_ids=[[] for _ in req_ids],
            pooler_output=self._generate(states),
        )

    def _generate(self, states: list[OmniRequestState]) -> list[torch.Tensor | None]:
        rows = [Row(i, state, i, i + 1, 0, partial=False) for i, state in enumerate(states)]
        emission = Emission(self._sender(), len(rows), [], {}, [])
        emission.steps = [row for row in rows if row.state.error is None]
        if emission.steps:
            emission.outputs = self._run([row.state for row in emission.steps])
            emission.steps = [row for row in emission.steps if row.state.error is None]
        if self.device.type != "cpu":
            emission.to_host()
            torch.cuda.current_stream().synchronize()
        payloads = emission.payloads()
        emission.fail(payloads, rows)
        return payloads

    def _run(self, states: list[OmniRequestState]) -> Any:
        """Outputs of the batch; when it fails, of each request alone, so that only the guilty one fails."""
        try:
            return self._generator.omni_generate(states)
        except (OmniError, torch.OutOfMemoryError) as error:
            if len(states) == 1:
                states[0].error = _typed(error, self.omni_config.stage_id)
                return []
        if self.device.type != "cpu":
            torch.cuda.empty_cache()
        outputs: list[Any] = []
        for state in states:
            out = self._run([state])
            if state.error is None:
                outputs.append({name: value[0] for name, value in out.items()} if isinstance(out, dict) else out[0])
        return outputs

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Never called: ``execute_model`` returns the output."""
        raise RuntimeError("a generation stage samples no tokens")

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to measure: there is no KV cache to size."""

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing to warm up in vLLM's way; see ``omni_warm_up``."""
        empty = torch.empty(0, device=self.device)
        return empty, empty

    def _dummy_sampler_run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Nothing is sampled."""
        return torch.empty(0, device=self.device)

    def capture_model(self) -> int:
        """No graphs."""
        return 0


def _typed(error: OmniError | torch.OutOfMemoryError, stage_id: int) -> OmniError:
    if isinstance(error, OmniError):
        return error
    return OutOfMemoryError(f"stage {stage_id}: the request does not fit: {error}", stage_id=stage_id)
