"""Stage configurations: what is read, where it came from, and what is refused with file, line and path."""

from pathlib import Path
from typing import Any

import pytest

from vllm_omni.config import stage as config
from vllm_omni.config.schema import field_docs
from vllm_omni.config.stage import load_stage_configs, parse_pipeline
from vllm_omni.errors import ConfigError

THREE_STAGES = """\
# As in the field's documentation.
async_chunk: true
stage_args:
  - stage_id: 0
    stage_type: llm
    is_comprehension: true
    final_output: true
    final_output_type: text
    runtime:
      process: true
      devices: 0
      max_batch_size: 1
    engine_args:
      model_stage: thinker
      model_arch: SomeThinker
      limit_mm_per_prompt: {image: 1, video: 1}
    default_sampling_params: {temperature: 0.4}
    output_connectors:
      to_stage_1: shm
  - stage_id: 1
    stage_type: ar
    engine_input_source: [0]
    custom_process_input_func: some.module.thinker2talker
    input_connectors:
      from_stage_0: shm
  - stage_id: 2
    stage_type: generation
    engine_input_source: 1
    custom_process_input_func: some.module.talker2code2wav
    final_output: true
    final_output_type: audio
runtime:
  enabled: true
  defaults:
    max_inflight: 4
  connectors:
    shm:
      name: SharedMemoryConnector
      extra:
        shm_threshold_bytes: 65536
  edges:
    - {from: 1, to: 2, window_size: -1}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    read = load_stage_configs(write(tmp_path, THREE_STAGES))
    thinker, talker, vocoder = read.stages
    assert thinker.stage_type == "ar", "llm is an alias"
    assert thinker.runtime.devices == "0"
    assert thinker.engine_args["limit_mm_per_prompt"] == {"image": 1, "video": 1}
    assert (talker.engine_input_source, vocoder.engine_input_source) == ((0,), (1,))
    assert (vocoder.final_output, vocoder.final_output_type) == (True, "audio")
    assert (read.window(0, 1), read.window(1, 2)) == (1, -1)
    connector = read.connector(0, 1)
    assert connector is not None
    assert (connector.name, connector.extra) == ("SharedMemoryConnector", {"shm_threshold_bytes": 65536})
    assert read.connector(1, 2) is None
    assert read.runtime.defaults.max_inflight == 4


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, THREE_STAGES)
    rows = {row[0]: row[1:] for row in load_stage_configs(path).rows()}
    lines = THREE_STAGES.splitlines()
    for name, text in [
        ("async_chunk", "async_chunk: true"),
        ("stage_args[0].engine_args.model_stage", "model_stage: thinker"),
        ("stage_args[0].engine_args.limit_mm_per_prompt.video", "limit_mm_per_prompt"),
        ("stage_args[2].final_output_type", "final_output_type: audio"),
        ("runtime.connectors.shm.extra.shm_threshold_bytes", "shm_threshold_bytes"),
        ("runtime.edges[0].window_size", "window_size: -1"),
    ]:
        file, _, number = rows[name][1].rpartition(":")
        assert file == str(path)
        assert text in lines[int(number) - 1], name
    assert rows["stage_args[1].final_output"] == (False, "default")
    assert rows["stage_args[1].runtime.max_batch_size"] == (None, "default")
    assert rows["runtime.defaults.window_size"] == (None, "default")


@pytest.mark.parametrize(
    ("chunk", "defaults", "edge", "window"),
    [(False, None, None, -1), (True, None, None, 1), (8, None, None, 8), (8, 3, None, 3), (8, 3, -1, -1)],
)
def test_how_outputs_are_handed_over(chunk: Any, defaults: int | None, edge: int | None, window: int) -> None:
    stages = [
        {"stage_id": 0, "stage_type": "diffusion"},
        {"stage_id": 1, "stage_type": "diffusion", "engine_input_source": [0], "final_output": True},
    ]
    edges = [{"from": 0, "to": 1, "window_size": edge}]
    runtime = {"defaults": {"window_size": defaults}, "edges": edges}
    read = parse_pipeline({"async_chunk": chunk, "stage_args": stages, "runtime": runtime}, {}, "test")
    assert read.window(0, 1) == window


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage_args:", "stage_arg:", ":3: stage_arg: unknown key 'stage_arg'; did you mean 'stage_args'?"),
        ("    is_comprehension: true", "    is_comprehention: true", ":6: stage_args[0].is_comprehention: unknown key"),
        ("max_batch_size: 1", "max_batchsize: 1", "stage_args[0].runtime.max_batchsize: unknown key"),
        ("max_batch_size: 1", "max_batch_size: 0", "stage_args[0].runtime.max_batch_size: must be at least 1"),
        ("max_batch_size: 1", "max_batch_size: many", "max_batch_size='many'"),
        ("process: true", "process: false", ":10: stage_args[0].runtime.process: a stage always has its own process"),
        ("stage_type: llm", "stage_type: lmm", "stage_type='lmm'"),
        ("  - stage_id: 1\n", "  - \n", "stage_args[1]: stage_id is missing"),
        ("stage_id: 2", "stage_id: 1", "stage_id 1 stands twice"),
        ("stage_id: 2", "stage_id: -2", "-2 is negative"),
        ("engine_input_source: 1", "engine_input_source: 7", "there is no stage 7; there are [0, 1, 2]"),
        ("engine_input_source: 1", "engine_input_source: 2", "the stages form a circle: 2 <- 2"),
        ("engine_input_source: [0]", "engine_input_source: [2]", "the stages form a circle: 1 <- 2 <- 1"),
        ("engine_input_source: [0]", "engine_input_source: [0, 0]", "a stage stands twice"),
        (
            "    custom_process_input_func: some.module.talker2code2wav\n",
            "",
            "stage 2 needs custom_process_input_func, because its source is of another type",
        ),
        ("    engine_input_source: [0]\n", "", ":22: stage_args[1].custom_process_input_func: stage 1 gets the user's"),
        ("final_output_type: audio", "final_output_type: sound", "final_output_type='sound'"),
        ("    final_output: true\n    final_output_type: audio", "", "the output of stage 2 goes nowhere"),
        ("    stage_type: generation", "    stage_type: generation\n    is_comprehension: true", "only an ar stage"),
        ("to_stage_1: shm", "to_stage_2: shm", "stage 0 has no such edge; it has to_stage_1"),
        ("to_stage_1: shm", "to_stage_1: smh", "no connector 'smh' in runtime.connectors; there are shm"),
        ("    output_connectors:\n      to_stage_1: shm\n", "", "sends to stage 1 over 'the default connector'"),
        ("enabled: true", "enabled: false", "stages always run as processes"),
        ("max_inflight: 4", "max_inflight: 0", "runtime.defaults.max_inflight: must be at least 1"),
        ("max_inflight: 4", "max_infligt: 4", "did you mean 'max_inflight'?"),
        ("from: 1, to: 2", "from: 0, to: 2", "no edge 0 -> 2; there are 0 -> 1, 1 -> 2"),
        ("window_size: -1", "window_size: 0", "0: allowed are -1 (all) and 1 or more"),
        ("from: 1, to: 2", "form: 1, to: 2", "unknown key 'form'; did you mean 'from'?"),
        ("name: SharedMemoryConnector", "nam: SharedMemoryConnector", "unknown key 'nam'; did you mean 'name'?"),
        ("async_chunk: true", "async_chunk: often", "async_chunk: 'often'"),
        ("async_chunk: true", "async_chunk: -1", "async_chunk: -1"),
        ("    stage_type: ar\n", "    stage_type: ar\n    stage_type: ar\n", "key 'stage_type' stands twice"),
        ("async_chunk: true", "async_chunk: [", "s.yaml"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert THREE_STAGES.count(old) >= 1
    path = write(tmp_path, THREE_STAGES.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_stage_configs(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("text", ["", "- 1", "stage_args: []", "stage_args: 3", "stage_args: [3]"])
def test_files_without_stages(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_stage_configs(write(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml"):
        load_stage_configs(tmp_path / "none.yaml")


def test_a_merge_needs_a_function() -> None:
    stages = [{"stage_id": i, "stage_type": "diffusion"} for i in range(3)]
    stages[2] |= {"engine_input_source": [0, 1], "final_output": True}
    with pytest.raises(ConfigError, match="because it has several sources"):
        parse_pipeline({"stage_args": stages}, {}, "test")


@pytest.mark.parametrize(
    "cls",
    [
        config.StageRuntime,
        config.ConnectorConfig,
        config.EdgeConfig,
        config.RuntimeDefaults,
        config.RuntimeConfig,
        config.StageConfig,
        config.PipelineConfig,
    ],
)
def test_every_field_is_documented(cls: type) -> None:
    assert set(field_docs(cls)) == set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
