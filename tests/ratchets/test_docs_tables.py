"""Tables of the documentation against the code: fields of requests, windows of codes, measurements, options."""

import re

import pytest
import typer
import yaml
from pydantic import BaseModel
from transformers import Qwen3OmniMoeConfig

from tests.ratchets.source import PACKAGE, ROOT
from tests.ratchets.test_docs import FENCE, PAGES
from vllm_omni.entrypoints.cli.main import COMMANDS, build_app
from vllm_omni.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm_omni.entrypoints.openai.images import ImageGenerationRequest
from vllm_omni.entrypoints.openai.metrics import Metrics
from vllm_omni.entrypoints.openai.speech import SpeechRequest
from vllm_omni.entrypoints.openai.videos import VideoRequest
from vllm_omni.model_executor.stage_input_processors.codec_chunks import KEYS, ChunkSchedule
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import DEFAULT_CHUNKS
from vllm_omni.model_executor.stage_input_processors.qwen3_omni import CONV_CONTEXT

GUIDE = ROOT / "docs" / "user_guide"
# Options of other programs, and of scripts of this project, that the text of a page names.
OTHER_OPTIONS = {
    *("--gpus", "--shm-size", "--stop-timeout", "--init", "--read-only", "--tmpfs", "--cap-drop", "--security-opt"),
    *("--build-arg", "--format", "--now"),  # of docker, podman, buildah and systemctl
    *("--pdb", "--out", "--number", "--setting", "--strict"),
}


def section(page: str, head: str) -> str:
    """The text of a page from heading ``head`` to the next one of its rank."""
    text = (GUIDE / page).read_text()
    (found,) = re.findall(rf"^## {head}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def rows(text: str) -> dict[str, list[str]]:
    """First name of each row of the tables in ``text`` -> its other cells; a row of several names counts for each."""
    out = {}
    for line in re.findall(r"^\|(.*)\|$", text, re.MULTILINE):
        first, *others = [cell.strip() for cell in line.split(" | ")]
        out.update(dict.fromkeys(re.findall(r"`(\w+)`", first), others))
    return out


@pytest.mark.parametrize(
    ("page", "head", "body"),
    [
        ("api_reference.md", "Chats", ChatCompletionRequest),
        ("serving.md", "Pictures", ImageGenerationRequest),
        ("serving.md", "Speech", SpeechRequest),
    ],
)
def test_every_field_of_a_request_has_a_row(page: str, head: str, body: type[BaseModel]) -> None:
    assert set(body.model_fields) <= rows(section(page, head)).keys()


def test_every_field_of_a_video_is_named() -> None:
    assert set(VideoRequest.model_fields) <= set(re.findall(r"`(\w+)`", section("api_reference.md", "Videos")))


def _packaged(name: str) -> dict[str, int]:
    values = yaml.safe_load((PACKAGE / "model_executor" / "stage_configs" / f"{name}.yaml").read_text())
    extra: dict[str, int] = values["runtime"]["connectors"]["codes"]["extra"]
    return extra


def test_windows_are_those_of_the_packaged_configurations() -> None:
    told = rows(section("streaming.md", "Windows of codes"))
    assert set(KEYS) <= told.keys()
    for column, name in ((1, "qwen2_5_omni"), (2, "qwen3_omni_moe")):
        packaged = {**dict.fromkeys(KEYS, 0), **_packaged(name)}
        assert {key: int(told[key][column]) for key in KEYS} == packaged


def test_defaults_of_windows() -> None:
    """What counts when ``extra`` does not say; the packaged configurations say the same."""
    vocoder = Qwen3OmniMoeConfig().code2wav_config
    reach = vocoder.num_hidden_layers * (vocoder.sliding_window - 1) + CONV_CONTEXT
    defaults = {
        "qwen2_5_omni": (DEFAULT_CHUNKS, "qwen2_5_omni"),
        "qwen3_omni": ({"codec_left_context_frames": reach}, "qwen3_omni_moe"),
    }
    for page, (given, name) in defaults.items():
        schedule = ChunkSchedule.of({}, **given)
        told = rows(section(f"{page}.md", "Pieces as they are made"))
        shown = {key: told[key][0] for key in KEYS if key in told}
        assert shown == {key: str(getattr(schedule, key)) for key in shown}
        assert schedule == ChunkSchedule.of(_packaged(name))


def test_every_measurement_is_documented() -> None:
    made = {family.name for family in Metrics(lambda: 0, dict).registry.collect()}
    assert set(re.findall(r"`(vllm_omni_\w+)`", (GUIDE / "metrics.md").read_text())) == made


def _options(command: typer.main.TyperCommand) -> set[str]:  # type: ignore[name-defined]
    own = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return own.union(*(_options(sub) for sub in getattr(command, "commands", {}).values()))


def test_options_that_the_text_names_exist() -> None:
    """Those within blocks are parsed by ``test_docs``."""
    known = OTHER_OPTIONS.union(*(_options(typer.main.get_command(build_app(name))) for name in COMMANDS))
    wrong = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)
        wrong += [f"{page.relative_to(ROOT)}: {name}" for name in named if name not in known]
    assert not wrong, "\n".join(wrong)
