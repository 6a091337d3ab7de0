"""vLLM's mixture of experts, with this package's kernels for steps of a few rows.

``FewRowsMoERunner`` takes the place of vLLM's ``MoERunner`` in every autoregressive stage, through vLLM's registry of
out-of-tree layers; no model knows of it. Steps of more rows, and layers that the kernels cannot do (quantised, with
adapters, spread by experts, routed in another way), run as they do in vLLM. A choice of ``moe_backend`` is honoured:
then all steps run on that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP

from vllm_omni.model_executor.layers.experts import Experts

logger = init_logger(__name__)


@PluggableLayer.register_oot(name="MoERunner")
class FewRowsMoERunner(MoERunner):
    """vLLM's runner of a layer, but for steps of at most ``few_rows`` rows."""

    def __init__(self, *args: Any, shared_experts: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, shared_experts=shared_experts, **kwargs)
        # In a tuple: the base has it as a submodule already.
        self._shared = (shared_experts,)
        self._experts: Experts | None = None
        self.few_rows = 0

    def use_kernels(self, experts: Experts) -> None:
        """Run steps of a few rows on ``experts``, this layer's weights."""
        self._experts, self.few_rows = experts, experts.plan().rows

    def _forward_impl(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        """Results of the shared expert, if there is one, and of the chosen ones."""
        if self._experts is None or hidden_states.shape[0] > self.few_rows:
            return super()._forward_impl(hidden_states, router_logits, shared_experts_input, input_ids)
        from vllm_omni.model_executor.layers.expert_kernels import run_experts  # Triton: only where there is a GPU

        routed, shared = run_experts(hidden_states, self._experts)
        return routed if shared is None else (shared, routed)

    def weights(self) -> Experts | str:
        """This layer for the kernels, or why they cannot do it."""
        config, method, router = self.moe_config, self._quant_method, self.router
        parallel = config.moe_parallel_config
        refusals = {
            f"moe_backend={config.moe_backend!r}": config.moe_backend != "auto",
            "quantisation": type(method) is not UnquantizedFusedMoEMethod,
            "adapters": config.is_lora_enabled,
            "experts spread over GPUs": parallel.use_ep or parallel.dp_size > 1 or parallel.pcp_size > 1,
            "spread sequences": parallel.is_sequence_parallel,
            "batches that overlap": self.enable_dbo,
            "another routing": type(router) is not FusedTopKRouter or router.scoring_func != "softmax",
            "balanced experts": router.eplb_state is not None,
            "a router of the model's own": self.gate is None or self.shared_expert_gate is not None,
            "another activation": config.activation != MoEActivation.SILU or config.swiglu_limit is not None,
            "biases": config.has_bias,
            "transforms": self.routed_input_transform is not None or self.routed_output_transform is not None,
            "scaled results": self.routed_scaling_factor != 1.0,
        }
        reason = next((name for name, found in refusals.items() if found), None)
        if reason is None and method.unquantized_backend != UnquantizedMoeBackend.TRITON:
            reason = f"weights laid out for {method.unquantized_backend.value}"
        if reason is not None:
            return reason
        routed = self.routed_experts
        found = self.gate.weight, routed.w13_weight, routed.w2_weight, config.experts_per_token, router.renormalize
        shared = self._shared[0]
        if shared is None:
            return Experts(*found)
        if type(shared) is not Qwen3MoeMLP or shared.expert_gate is None:
            return f"a shared expert of class {type(shared).__name__}"
        return Experts(*found, shared.gate_up_proj.weight, shared.down_proj.weight, shared.expert_gate.weight)


def use_expert_kernels(model: nn.Module, device: torch.device) -> None:
    """Let the layers of a loaded model run steps of a few rows on the kernels, where they can and give the same."""
    if device.type != "cuda":
        return
    from vllm_omni.model_executor.layers.expert_kernels import check_experts  # Triton: only where there is a GPU

    wrong: str | None = None
    tried: set[tuple[object, ...]] = set()
    for module in model.modules():
        if not isinstance(module, FewRowsMoERunner):
            continue
        experts = module.weights()
        reason = experts if isinstance(experts, str) else experts.unfit()
        if isinstance(experts, str) or reason is not None:
            logger.info_once("steps of a few rows run on vLLM's experts: %s", reason)
            continue
        sizes = (*experts.down.shape, experts.shared_inner, experts.top_k, experts.renormalise)
        if sizes not in tried:
            tried.add(sizes)
            wrong = check_experts(experts)
            if wrong is not None:
                logger.warning("steps of a few rows run on vLLM's experts: %s", wrong)
        if wrong is None:
            module.use_kernels(experts)
