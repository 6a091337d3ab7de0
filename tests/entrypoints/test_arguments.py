"""Every argument of ``Omni`` does what it says, or is refused with a reason."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.graphs import ask, chain, stage, write
from vllm_omni import Omni
from vllm_omni.config.schema import field_docs
from vllm_omni.entrypoints.omni_args import (
    DIFFUSION_ENGINE,
    OmniArgs,
    default_model,
    device_table,
    resolve,
    stage_engine_args,
)
from vllm_omni.errors import ConfigError, DeadlineError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder that looks like a diffusion checkpoint; nothing is loaded from it."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return str(tmp_path)


def engine_args(**values: Any) -> dict[str, Any]:
    return stage_engine_args(resolve(values).pipeline.stages[0])


def test_a_checkpoint_folder_needs_no_yaml(tiny: str) -> None:
    setup = resolve({"model": tiny, "dtype": "float32", "tensor_parallel_size": 2})
    (only,) = setup.pipeline.stages
    assert (only.stage_type, only.final_output, only.final_output_type) == ("diffusion", True, "image")
    assert stage_engine_args(only) == {"model": tiny, "dtype": "float32", "tensor_parallel_size": 2}
    rows = {path: (value, source) for path, value, source in setup.rows()}
    assert rows["stage_args[0].engine_args.dtype"] == ("float32", "Omni() argument")
    assert rows["stage_args[0].engine_args.vae_use_tiling"] == (False, "default")
    assert rows["stage_args[0].engine_args.parallel_config.cfg_parallel_size"] == (1, "default")
    assert rows["init_timeout"] == (600.0, "default")


def test_sources_may_be_told_apart(tiny: str) -> None:
    setup = resolve({"model": tiny, "dtype": "float32"}, {"model": "argument MODEL", "dtype": "flag --dtype"})
    rows = {path: source for path, _, source in setup.rows()}
    assert rows["model"] == "argument MODEL"
    assert rows["stage_args[0].engine_args.dtype"] == "flag --dtype"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtpye": "float32"}, "unknown key 'dtpye'; did you mean 'dtype'?"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"cache_backend": "tea_cache"}, "cache_backend='tea_cache': only \"none\" is there yet"),
        ({"cache_config": {"rel_l1_thresh": 0.2}}, "cache_config needs a cache_backend"),
        ({"num_gpus": 2}, "num_gpus=2 but the parallel sizes make 1 rank(s)"),
        ({"worker_backend": "ray"}, 'worker_backend="ray" is not there yet'),
        ({"worker_backend": "threads"}, "worker_backend='threads'"),
        ({"ray_address": "auto"}, "ray_address='auto'"),
        ({"stage_init_timeout": 0}, "stage_init_timeout=0.0: must be above 0"),
        ({"init_timeout": -1}, "init_timeout=-1.0: must be above 0"),
        ({"shm_threshold_bytes": -1}, "shm_threshold_bytes=-1: must not be negative"),
        ({"shm_threshold_bytes": "big"}, "shm_threshold_bytes='big'"),
        ({"batch_timeout": -1}, "batch_timeout=-1.0: must not be negative"),
        ({"log_stats": "perhaps"}, "log_stats='perhaps'"),
        ({"default_sampling_params": {"3": {}}}, "no stage '3'; there are 0"),
        ({"default_sampling_params": {"0": 4}}, "stage 0: expected names and values, got 4"),
        ({"default_sampling_params": "{"}, "default_sampling_params: not JSON"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(tiny: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"model": tiny, **values})
    assert message in caught.value.message


def test_arguments_with_another_name_or_form(tiny: str) -> None:
    torch = pytest.importorskip("torch")
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    parallel = DiffusionParallelConfig(tensor_parallel_size=2)
    args = engine_args(model=tiny, cache_backend="none", dtype=torch.bfloat16, parallel_config=parallel, num_gpus=2)
    assert args["dtype"] == "bfloat16"
    assert args["parallel_config"]["tensor_parallel_size"] == 2
    assert set(args) == {"model", "dtype", "parallel_config"}
    assert engine_args(model=Path(tiny))["model"] == tiny


def test_without_a_model() -> None:
    assert engine_args()["model"] == default_model()
    assert Path(default_model(), "model_index.json").is_file()
    with pytest.raises(ConfigError, match="neither a folder nor a checkpoint in the local hub cache"):
        Omni("no-such/model")


def test_a_folder_that_is_no_diffusion_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model_index\.json nor config\.json"):
        Omni(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ConfigError, match="no stage configuration for model_type 'unheard_of'"):
        Omni(str(tmp_path))


def test_model_goes_to_the_stages_that_name_none(tmp_path: Path) -> None:
    stages = [stage(0, engine={"model": "own"}), stage(1, [0], "text")]
    setup = resolve({"model": "given", "stage_configs_path": write(tmp_path, stages)})
    assert [stage_engine_args(item)["model"] for item in setup.pipeline.stages] == ["own", "given"]


def test_engine_arguments_go_to_the_diffusion_stages_of_a_file(tmp_path: Path) -> None:
    plain = {"stage_id": 1, "stage_type": "diffusion", "engine_input_source": [0], "final_output": True}
    path = write(tmp_path, [stage(0), {**plain, "engine_args": {"dtype": "bfloat16", "model": "m"}}])
    setup = resolve({"stage_configs_path": path, "dtype": "float32"})
    assert [item.engine_args.get("dtype") for item in setup.pipeline.stages] == [None, "float32"]
    rows = {row[0]: row[2] for row in setup.rows()}
    assert rows["stage_args[1].engine_args.dtype"] == "Omni() argument"
    assert rows["stage_args[1].engine_args.model"].startswith(f"{path}:")
    with pytest.raises(ConfigError, match="dtpye"):
        resolve({"stage_configs_path": path, "dtpye": "float32"})
    with pytest.raises(ConfigError, match="dtype: no stage takes it"):
        resolve({"stage_configs_path": write(tmp_path, chain(1)), "dtype": "float32"})
    with pytest.raises(ConfigError, match="model is missing"):
        resolve({"stage_configs_path": write(tmp_path, [{**plain, "engine_input_source": []}])})


def test_the_engine_of_a_diffusion_stage_is_the_diffusion_engine() -> None:
    from vllm_omni.engine.stage_engine import StageEngine
    from vllm_omni.engine.stage_process import load_class

    assert issubclass(load_class(DIFFUSION_ENGINE), StageEngine)


def test_runtime_reaches_the_engine(tmp_path: Path) -> None:
    stages = chain(1, engine={"report": True}, runtime={"devices": "0", "max_batch_size": 3})
    with Omni(stage_configs_path=write(tmp_path, stages)) as omni:
        (state,) = omni.collective_rpc("arguments")
    assert (state["devices"], state["max_num_seqs"]) == ("0", 3)
    stages[0]["engine_args"]["max_num_seqs"] = 4
    with pytest.raises(ConfigError, match=r"engine_args\.max_num_seqs=4 but runtime says 3"):
        Omni(stage_configs_path=write(tmp_path, stages))


def test_devices_count_within_cuda_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    stages = chain(2, runtime={"devices": "1,0"})
    path = write(tmp_path, stages)
    assert device_table(resolve({"stage_configs_path": path}).pipeline)[0] == (0, "1,0", "GPU-abc,4")
    with Omni(stage_configs_path=path):
        assert any("GPU-abc,4" in line for line in log)
    stages[1]["runtime"]["devices"] = "2"
    with pytest.raises(ConfigError, match="stage 1: devices: 2 is beyond CUDA_VISIBLE_DEVICES=4,GPU-abc"):
        Omni(stage_configs_path=write(tmp_path, stages))
    stages[1]["runtime"]["devices"] = "GPU-abc"
    with pytest.raises(ConfigError, match="'GPU-abc' is no index"):
        Omni(stage_configs_path=write(tmp_path, stages))


@pytest.mark.parametrize("name", ["stage_init_timeout", "init_timeout"])
def test_start_up_timeouts(tmp_path: Path, name: str) -> None:
    stages = chain(2)
    stages[1]["engine_args"]["load_seconds"] = 60
    began = time.monotonic()
    kwargs: dict[str, Any] = {name: 1.5}
    with pytest.raises(DeadlineError, match=rf"stage 1 is not ready after 1\.5 s \({name}\)") as caught:
        Omni(stage_configs_path=write(tmp_path, stages), **kwargs)
    assert time.monotonic() - began < 10
    assert caught.value.details == {"phase": "start", "stage_id": 1}


def test_log_stats(tmp_path: Path, log: list[str]) -> None:
    path = write(tmp_path, chain(1))
    with Omni(stage_configs_path=path) as quiet:
        quiet.generate("x", use_tqdm=False)
    assert not any("run_s" in line for line in log)
    with Omni(stage_configs_path=path, log_stats=True) as loud:
        loud.generate(["x", "y"], use_tqdm=False)
    assert sum("run_s" in line and line.startswith("request ") for line in log) == 2


def test_batch_timeout_gathers_a_batch(tmp_path: Path) -> None:
    path = write(tmp_path, chain(1, engine={"report": True}, runtime={"max_batch_size": 2}))

    with Omni(stage_configs_path=path, batch_timeout=0.6) as omni:
        began = time.monotonic()
        omni.generate("alone", use_tqdm=False)
        assert time.monotonic() - began >= 0.6, "an idle stage waits for a second request"
        began = time.monotonic()
        outputs = omni.generate(["a", "b"], use_tqdm=False)
        assert time.monotonic() - began < 0.6, "a full batch does not wait"
        assert isinstance(outputs, list)
        assert [output.multimodal_output["seen"]["batch"] for output in outputs] == [2, 2]
        assert omni.collective_rpc("state")[0]["batches"] == [1, 2]
    with Omni(stage_configs_path=path) as omni:
        began = time.monotonic()
        omni.generate("alone", use_tqdm=False)
        assert time.monotonic() - began < 0.6


@pytest.mark.parametrize("given", [{"0": {"seed": 9}}, '{"0": {"seed": 9}}', {0: {"seed": 9}}])
def test_default_sampling_params(tmp_path: Path, given: Any) -> None:
    path = write(tmp_path, [stage(0, None, "text", default_sampling_params={"seed": 1, "height": 64})])
    setup = resolve({"stage_configs_path": path, "default_sampling_params": given})
    from vllm_omni.entrypoints.params import default_params

    assert default_params(setup.pipeline) == {0: OmniDiffusionSamplingParams(seed=9, height=64)}
    rows = {row[0]: row[2] for row in setup.rows()}
    assert rows["stage_args[0].default_sampling_params.seed"] == "Omni() argument"
    assert rows["stage_args[0].default_sampling_params.height"].startswith(path)


def test_wrong_default_sampling_params(tmp_path: Path) -> None:
    path = write(tmp_path, chain(1))
    with pytest.raises(ConfigError, match="default_sampling_params: unknown sampling parameter 'sed'"):
        Omni(stage_configs_path=path, default_sampling_params={"0": {"sed": 1}})
    with pytest.raises(ConfigError, match="default_sampling_params: height=1: allowed is"):
        Omni(stage_configs_path=path, default_sampling_params={"0": {"height": 1}})


@pytest.mark.parametrize(("threshold", "shared"), [(1000, True), (10_000_000, False)])
def test_shm_threshold_bytes(tmp_path: Path, threshold: int, shared: bool) -> None:
    np = pytest.importorskip("numpy")
    with Omni(stage_configs_path=write(tmp_path, chain(2)), shm_threshold_bytes=threshold) as omni:
        (output,) = omni.generate(ask(array=np.arange(50_000)), use_tqdm=False)
        array = output.multimodal_output["additional_information"]["array"]
        assert array.sum() == 50_000 * 49_999 // 2
        assert (omni._async._arena.stats()["mapped"] > 0) is shared
        assert array.flags.owndata, "the caller may keep it without holding shared memory"


def test_every_argument_is_documented() -> None:
    assert set(field_docs(OmniArgs)) == set(OmniArgs.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs", r"^diffusion stage: max_num_seqs=0: must be at least 1$"),
        ({"ray_address": "auto"}, "ray_address", r"^Omni\(\): ray_address='auto': "),
    ],
)
def test_a_setting_out_of_range_is_named_alone(values: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(values)
    assert caught.value.details["field"] == field
