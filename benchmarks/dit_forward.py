"""W1: one transformer forward at full size, ours next to diffusers, same random weights, in one process.

Contenders run interleaved (ABBA), each round is timed with CUDA events; inputs are random normal numbers. Reported are
medians, ratios by round, the cosine of the outputs, and the floor W0: the model's matrix products and attention calls
alone, replayed as one CUDA graph.

    python benchmarks/dit_forward.py --family flux qwen-image --json out.json
    python benchmarks/dit_forward.py --tiny --device cpu
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.distributed import parallel_state
from vllm_omni.diffusion.forward_context import set_forward_context
from vllm_omni.diffusion.models.common.transformer import DiTInputs, DiTModel
from vllm_omni.platforms import get_platform

LAYOUTS = Path(__file__).parent / "layouts"
TINY = {
    "flux": {"num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 48, "pooled_projection_dim": 32},
    "qwen-image": {"num_layers": 3, "joint_attention_dim": 64},
}
TEXT_TOKENS = {"flux": 512, "qwen-image": 128}
STEPS = {"flux": 28, "qwen-image": 50}
TIMESTEP = 611.0
GUIDANCE = 3.5


@dataclass
class Case:
    """One family at one size."""

    family: str
    config: dict[str, Any]
    grid: tuple[int, int]
    text_tokens: int
    batch: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        tokens = self.grid[0] * self.grid[1]
        self.latents = normal(self.batch, tokens, self.config.get("in_channels", 64))
        self.text = normal(self.batch, self.text_tokens, self.config["joint_attention_dim"])
        self.pooled = normal(self.batch, self.config.get("pooled_projection_dim", 768))
        self.timestep = torch.tensor([TIMESTEP], device=self.device)

    @property
    def guided(self) -> bool:
        """Whether the model embeds guidance."""
        return bool(self.config.get("guidance_embeds"))

    def reference_kwargs(self) -> dict[str, Any]:
        """Arguments of diffusers' transformer, as its pipeline passes them."""
        timestep = self.timestep.expand(self.batch).to(self.dtype) / 1000
        common = {"hidden_states": self.latents, "encoder_hidden_states": self.text, "timestep": timestep}
        if self.family == "qwen-image":
            return {**common, "img_shapes": [[(1, *self.grid)]] * self.batch, "return_dict": False}
        ids = torch.zeros(*self.grid, 3, device=self.device, dtype=self.dtype)
        ids[..., 1] += torch.arange(self.grid[0], device=self.device)[:, None]
        ids[..., 2] += torch.arange(self.grid[1], device=self.device)[None, :]
        return {
            **common,
            "pooled_projections": self.pooled,
            "img_ids": ids.view(-1, 3),
            "txt_ids": torch.zeros(self.text_tokens, 3, device=self.device, dtype=self.dtype),
            "guidance": torch.full((self.batch,), GUIDANCE, device=self.device) if self.guided else None,
            "return_dict": False,
        }

    def modulation(self, model: DiTModel, steps: int = 1) -> torch.Tensor:
        """Modulation of ``steps`` timesteps."""
        if self.family == "qwen-image":
            return model.modulate(self.timestep.expand(steps))
        guidance = torch.full((self.batch,), GUIDANCE, device=self.device) if self.guided else None
        return model.modulate(self.timestep.expand(steps), self.pooled, guidance)

    def inputs(self, model: DiTModel) -> DiTInputs:
        """Inputs of our transformer."""
        return DiTInputs(self.latents, self.text, self.modulation(model)[0], self.grid)


def reference_class(family: str) -> Any:
    import diffusers

    return {"flux": diffusers.FluxTransformer2DModel, "qwen-image": diffusers.QwenImageTransformer2DModel}[family]


def our_class(family: str) -> type[DiTModel]:
    from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
    from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel

    return {"flux": FluxTransformer2DModel, "qwen-image": QwenImageTransformer2DModel}[family]


def build(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def build_reference(case: Case) -> Any:
    """diffusers' transformer with random weights, made on the device."""
    # On the device and not on "meta": the rotary tables of Qwen-Image are plain attributes, made by the constructor.
    model = build(lambda: reference_class(case.family).from_config(case.config), case.device, case.dtype)
    generator = torch.Generator(case.device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(1.0 if parameter.numel() <= 256 else 0.0, 0.05, generator=generator)
    return model


def build_ours(case: Case, reference: Any, share: Any | None) -> Any:
    """Our transformer with the reference's weights; with ``share`` on a GPU it has the very tensors of that one."""
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs

    cls = our_class(case.family)
    kwargs = get_transformer_config_kwargs(case.config, cls)
    od_config = OmniDiffusionConfig(
        model=".",
        device=case.device.type,
        dtype=str(case.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    shared = share is not None and case.device.type == "cuda"
    with parallel_state.vllm_config_context(), set_forward_context(od_config, phase="load"):
        model = build(lambda: cls(**kwargs), torch.device("meta") if shared else case.device, case.dtype)
    if shared:
        model.load_state_dict(share.state_dict(keep_vars=True), assign=True)
        return model
    model.load_weights(reference.state_dict().items())
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
    return model


def share_reference(case: Case, reference: Any) -> Any:
    """A second diffusers transformer on the same tensors, to be compiled beside the eager one."""
    if case.device.type != "cuda":
        twin = build(lambda: reference_class(case.family).from_config(case.config), case.device, case.dtype)
        twin.load_state_dict(reference.state_dict())
        return twin
    with torch.device("meta"):
        twin = reference_class(case.family).from_config(case.config).eval()
    twin.load_state_dict(reference.state_dict(keep_vars=True), assign=True)
    twin.pos_embed = reference.pos_embed
    return twin


def floor(case: Case) -> Callable[[], None]:
    """W0: the matrix products and attention calls of one forward, as one CUDA graph (plain calls on a CPU)."""
    from vllm_omni.diffusion.attention.layer import Attention

    heads, size = case.config["num_attention_heads"], case.config["attention_head_dim"]
    dim, batch = heads * size, case.batch
    img, txt = batch * case.grid[0] * case.grid[1], batch * case.text_tokens
    products: list[tuple[int, int, int]] = []
    for rows in (img, txt):
        double = [(rows, dim, 3 * dim), (rows, dim, dim), (rows, dim, 4 * dim), (rows, 4 * dim, dim)]
        products += double * case.config["num_layers"]
    singles = case.config.get("num_single_layers", 0)
    products += [(img + txt, dim, 7 * dim), (img + txt, 5 * dim, dim)] * singles

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=case.device).to(case.dtype)

    shapes = sorted(set(products))
    # Three weights of each shape in turn: more than the cache holds, as in the model.
    weights = {shape: [normal(shape[2], shape[1]) * shape[1] ** -0.5 for _ in range(3)] for shape in shapes}
    inputs = {shape: normal(shape[0], shape[1]) for shape in shapes}
    tokens = case.grid[0] * case.grid[1] + case.text_tokens
    q, k, v = (normal(batch, tokens, heads, size) for _ in range(3))
    od_config = OmniDiffusionConfig(
        model=".",
        device=case.device.type,
        dtype=str(case.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    with set_forward_context(od_config, phase="load"):
        attention = build(lambda: Attention(heads, size), case.device, case.dtype)

    def run() -> None:
        for i, shape in enumerate(products):
            torch.nn.functional.linear(inputs[shape], weights[shape][i % 3])
        for _ in range(case.config["num_layers"] + singles):
            attention(q, k, v)

    if case.device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Milliseconds of one call, mean of ``repeats`` in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1000 / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / repeats


def interleave(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Times by contender, one a round; every second round runs in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders) if i % 2 == 0 else list(reversed(contenders))
        for name in names:
            times[name].append(timed(contenders[name], device, repeats))
    return times


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def padded_batch_cosine(case: Case, model: Any) -> float | None:
    """Two requests with texts of different length in one forward, against the shorter one alone."""
    short = case.text_tokens // 2
    row = case.modulation(model)[0][:1]
    alone = model(DiTInputs(case.latents[:1], case.text[:1, :short], row, case.grid))
    text = torch.cat(
        (torch.nn.functional.pad(case.text[:1, :short], (0, 0, 0, case.text_tokens - short)), case.text[:1])
    )
    both = model(
        DiTInputs(case.latents[:1].repeat(2, 1, 1), text, row, case.grid, text_lengths=(short, case.text_tokens))
    )
    return cosine(both[:1], alone)


def first_call(call: Callable[[], Any], device: torch.device) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    out = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    reference = build_reference(case)
    twin = share_reference(case, reference)
    twin.compile_repeated_blocks(fullgraph=True, backend=args.compile_backend)
    ours = build_ours(case, reference, None)
    compiled = build_ours(case, reference, ours)
    for module in compiled.modules():
        if type(module).__name__ in compiled._repeated_blocks:
            module.compile(backend=args.compile_backend)
    kwargs, inputs = case.reference_kwargs(), case.inputs(ours)
    calls: dict[str, Callable[[], Any]] = {
        "diffusers_eager": lambda: reference(**kwargs)[0],
        "diffusers_compiled": lambda: twin(**kwargs)[0],
        "ours_eager": lambda: ours(inputs),
        "ours_compiled": lambda: compiled(inputs),
    }
    outputs, cold = {}, {}
    for name, call in calls.items():
        outputs[name], cold[name] = first_call(call, case.device)
    base = outputs["diffusers_eager"]
    parity = {
        name: {"cosine": cosine(out, base), "max_abs": float((out - base).abs().max())}
        for name, out in outputs.items()
        if name != "diffusers_eager"
    }
    parity["padded_batch"] = {"cosine": padded_batch_cosine(case, ours)}
    calls["floor_W0"] = floor(case)
    calls["modulation_one_step"] = lambda: case.modulation(ours)
    calls["modulation_all_steps"] = lambda: case.modulation(ours, STEPS[case.family])
    for _ in range(args.warmup):
        for call in calls.values():
            call()
    times = interleave(calls, case.device, args.rounds, args.repeats)
    return {
        **summarise(case, times),
        "parity_to_diffusers_eager": parity,
        "first_call_s": cold,
        "attention_backend": next(m.backend.name for m in ours.modules() if type(m).__name__ == "Attention"),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if case.device.type == "cuda" else None,
    }


def summarise(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in times.items()}
    amortised = median["modulation_all_steps"] / STEPS[case.family]

    def ratio(a: str, b: str, plus: float = 0.0) -> dict[str, float]:
        values = [x / (y + plus) for x, y in zip(times[a], times[b], strict=True)]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        "family": case.family,
        "latent_tokens": case.grid[0] * case.grid[1],
        "text_tokens": case.text_tokens,
        "batch": case.batch,
        "ms": {
            name: {"median": median[name], "min": min(values), "max": max(values)} for name, values in times.items()
        },
        "modulation_ms_a_step": amortised,
        # Ours is charged its share of the modulation table, which is made once a request.
        "ratios": {
            "diffusers_eager / ours_eager": ratio("diffusers_eager", "ours_eager", amortised),
            "diffusers_eager / ours_compiled": ratio("diffusers_eager", "ours_compiled", amortised),
            "diffusers_compiled / ours_compiled": ratio("diffusers_compiled", "ours_compiled", amortised),
            "ours_compiled / floor_W0": ratio("ours_compiled", "floor_W0"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=sorted(STEPS), default=sorted(STEPS))
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, help="default: 512 for flux, 128 for qwen-image")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2, help="forwards in a row a round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--compile-backend", help="default: inductor, on a CPU eager")
    parser.add_argument("--tiny", action="store_true", help="tiny layers and pictures, to try the script")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.compile_backend = args.compile_backend or ("eager" if cpu else "inductor")
    device = get_platform(args.device).device()
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    parallel_state.init_parallel(DiffusionParallelConfig(), backend=get_platform(args.device).dist_backend)
    results = []
    with torch.no_grad():
        for family in args.family:
            config = json.loads((LAYOUTS / family / "transformer" / "config.json").read_text())
            size = (args.height, args.width)
            if args.tiny:
                config.update(num_attention_heads=4, attention_head_dim=32, axes_dims_rope=[8, 12, 12], **TINY[family])
                size = (128, 128)
            case = Case(
                family,
                config,
                (size[0] // 16, size[1] // 16),
                args.text_tokens or (16 if args.tiny else TEXT_TOKENS[family]),
                args.batch,
                device,
                dtype,
            )
            results.append(run_case(case, args))
            print(json.dumps(results[-1], indent=2), flush=True)
            torch._dynamo.reset()
            if not cpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    parallel_state.destroy_parallel()
    if args.json:
        machine = torch.cuda.get_device_name() if not cpu else platform.processor() or platform.machine()
        report = {"device": machine, "torch": torch.__version__, "dtype": str(dtype), "cases": results}
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
