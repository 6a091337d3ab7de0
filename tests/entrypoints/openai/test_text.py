"""A plain language model behind the server; its engine is killed in the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.ar_models import HIDDEN, LAYERS, save_lm
from tests.ar_support import SMALL
from tests.entrypoints.openai.server import Server, error_of

PATH = "/v1/chat/completions"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def save_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter; returns what it adds to the model's weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    weights, added = {}, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj"
        down = torch.randn(4, 96, generator=generator) * 0.3
        up = torch.randn(HIDDEN, 4, generator=generator) * 0.3
        weights[f"base_model.model.{name}.lora_A.weight"] = down
        weights[f"base_model.model.{name}.lora_B.weight"] = up
        added[name + ".weight"] = 2.0 * up @ down
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


class Reference:
    """What transformers makes of a prompt, with the adapter and without."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.model = save_lm(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.added = save_adapter(folder / "adapter")

    def tokens(self, prompt: str, count: int, tuned: bool) -> list[int]:
        """Greedy tokens after ``prompt``."""
        state = self.model.state_dict()
        for name, more in self.added.items():
            state[name] += more if tuned else 0 * more
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        made = self.model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        for name, more in self.added.items():
            state[name] -= more if tuned else 0 * more
        return list(made[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def lm(folder: Path, reference: Reference) -> Iterator[Server]:
    """One engine of vLLM's."""
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    row = {"stage_id": 0, "stage_type": "ar", "final_output": True, "final_output_type": "text", "engine_args": SMALL}
    row["default_sampling_params"] = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
    (folder / "stages.yaml").write_text(yaml.safe_dump({"stage_args": [row]}))
    server = Server(
        *(str(folder), "--stage-configs-path", str(folder / "stages.yaml"), "--served-model-name", "lm"),
        *("--enable-lora", "--max-lora-rank=8", "--lora-modules", f"tuned={folder / 'adapter'}"),
        *("--stage-overrides", '{"0": {"scheduling_policy": "priority"}}'),
    )
    yield server
    assert server.stop() == 0, server.log


def test_chat(lm: Server) -> None:
    answer = lm.openai.chat.completions.create(model="lm", messages=[{"role": "user", "content": "say it again"}])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "length"
    long = lm.openai.chat.completions.create(
        model="lm", messages=[{"role": "user", "content": "say"}], max_completion_tokens=9, seed=1
    )
    assert long.usage is not None
    assert long.usage.completion_tokens == 9


def test_adapters(lm: Server, reference: Reference) -> None:
    """A request that names an adapter gets its text, beside others; what is no adapter's name is refused."""
    turn = [{"role": "user", "content": "say it again"}]
    plain, tuned = (reference.tokens("say it again ", 6, tuned) for tuned in (False, True))
    assert tuned != plain
    for name, expected in (("tuned", tuned), ("lm", plain), ("tuned", tuned)):
        body = {"messages": turn, "model": name, "return_token_ids": True, "max_tokens": 6, "priority": 3}
        answer = lm.post(PATH, body).json()
        assert (answer["model"], answer["choices"][0]["token_ids"]) == (name, expected)
    completion = {"prompt": "say it again ", "model": "tuned", "return_token_ids": True, "max_tokens": 6}
    assert lm.post("/v1/completions", completion).json()["choices"][0]["token_ids"] == tuned
    cards = {card.id: card.model_dump() for card in lm.openai.models.list()}
    assert cards["tuned"]["parent"] == "lm"
    for name in ("../adapter", "adapter", "/etc", "tuned/../lm", "tuned\0"):
        refused = lm.post(PATH, {"messages": turn, "model": name})
        assert (refused.status_code, error_of(refused)["code"]) == (404, "model_not_found")


def test_model_that_does_not_speak(lm: Server) -> None:
    body = {"messages": [{"role": "user", "content": "say"}], "modalities": ["text", "audio"]}
    answer = lm.post(PATH, body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "modalities")
    assert lm.http.get("/v1/audio/voices").status_code == 400


def test_kill_of_the_engine(lm: Server) -> None:
    assert lm.http.get("/health").status_code == 200
    victims = [child for child in lm.children() if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    assert victims, lm.children()
    victims[0].kill()
    begun = time.monotonic()
    while (answer := lm.http.get("/health")).status_code == 200:
        assert time.monotonic() - begun < 1.0
    assert answer.status_code == 503
    error_of(answer)
    assert lm.post(PATH, {"messages": [{"role": "user", "content": "say"}]}).status_code == 503
