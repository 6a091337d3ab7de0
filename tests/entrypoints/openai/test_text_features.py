"""What vLLM's serving code brings to chats, completions and tokens, over a language model that is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.ar_models import save_lm
from tests.ar_support import SMALL
from tests.entrypoints.openai.server import Server, error_of
from tests.entrypoints.openai.test_guide import Block, blocks, run_block

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TURN: list[Any] = [{"role": "user", "content": "say it again"}]
CALL = '<tool_call>{"name": "again", "arguments": {"it": "say"}}</tool_call>'
SCHEMA = {"type": "object", "properties": {"it": {"enum": ["say", "hear"]}}, "required": ["it"]}
SCHEMA["additionalProperties"] = False
TOOLS: list[Any] = [{"type": "function", "function": {"name": "again", "parameters": SCHEMA}}]
STRICT: list[Any] = [{"type": "function", "function": {"name": "again", "parameters": SCHEMA, "strict": True}}]
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['content'] or '' }}"
    "{% if m.get('tool_calls') %}{{ m['tool_calls'][0]['function']['name'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}say {% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
FREE = {"ignore_eos": False, "max_tokens": 100}


class Reference:
    """The checkpoint, its tokenizer, and what transformers makes of a prompt."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.model = save_lm(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)

    def tokens(self, prompt: str, count: int) -> list[int]:
        """Greedy tokens after ``prompt``."""
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        made = self.model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return list(made[0, ids.shape[1] :].tolist())

    def id(self, token: str) -> str:
        """A token's id, as a key of ``logit_bias``."""
        return str(self.tokenizer.convert_tokens_to_ids(token))

    def blanks(self) -> dict[str, float]:
        """A bias against white space, which a model that knows nothing would write for ever."""
        pieces = ((i, self.tokenizer.decode([i])) for i in range(len(self.tokenizer)))
        return {str(i): -100.0 for i, piece in pieces if piece.strip() != piece or not piece}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def lm(folder: Path, reference: Reference) -> Iterator[Server]:
    row = {"stage_id": 0, "stage_type": "ar", "final_output": True, "final_output_type": "text", "engine_args": SMALL}
    row["default_sampling_params"] = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    (folder / "stages.yaml").write_text(yaml.safe_dump({"stage_args": [row]}))
    server = Server(
        *(str(folder), "--stage-configs-path", str(folder / "stages.yaml"), "--served-model-name", "lm"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
        *("--default-chat-template-kwargs", '{"enable_thinking": false}', "--max-model-len", "240"),
    )
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


def ask(server: Server, path: str = CHAT, **body: Any) -> dict[str, Any]:
    """The answer to a chat, or to another request."""
    if path == CHAT:
        body.setdefault("messages", TURN)
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def stream(server: Server, path: str = CHAT, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    if path == CHAT:
        body.setdefault("messages", TURN)
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_text_is_that_of_the_model(lm: Server, reference: Reference) -> None:
    """The prompt is the template's, the tokens are transformers', whole and streamed."""
    prompt = "say it again say <think></think>"
    expected = reference.tokens(prompt, 6)
    answer = ask(lm, return_token_ids=True, return_prompt_text=True)
    assert answer["prompt_text"] == prompt
    assert answer["prompt_token_ids"] == reference.tokenizer.encode(prompt)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected
    text = reference.tokenizer.decode(expected, skip_special_tokens=True)
    assert text.startswith(choice["message"]["content"])  # which leaves half a character out
    assert len(choice["message"]["content"]) > 2
    chunks = stream(lm, return_token_ids=True, stream_options={"include_usage": True})
    tokens = [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids") or ()]
    assert tokens == expected
    assert chunks[-1]["usage"] == answer["usage"]


def test_default_length_is_no_demand(lm: Server) -> None:
    """A length that does not fit is cut where the context ends, as vLLM's server does."""
    long = [{"role": "user", "content": "say" + " it" * 230}]
    assert ask(lm, messages=long)["usage"]["total_tokens"] == 240
    assert ask(lm, messages=long, max_tokens=100)["usage"]["total_tokens"] == 240


def test_tools_that_the_model_may_call(lm: Server) -> None:
    """The call that the model writes is taken out of the text, by OpenAI's client, whole and streamed."""
    forced: Any = {"structured_outputs": {"choice": [CALL]}, "ignore_eos": False}
    body: Any = {"model": "lm", "messages": TURN, "tools": TOOLS, "max_tokens": 100, "extra_body": forced}
    answer = lm.openai.chat.completions.create(**body)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("again", {"it": "say"})
    name, arguments, ends = "", "", []
    for chunk in lm.openai.chat.completions.create(**body, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
        assert not chunk.choices[0].delta.content
        ends.append(chunk.choices[0].finish_reason)
    assert (name, json.loads(arguments), ends[-1]) == ("again", {"it": "say"}, "tool_calls")


def test_the_answer_of_a_tool_goes_back(lm: Server) -> None:
    first = lm.openai.chat.completions.create(
        model="lm", messages=TURN, tools=TOOLS, max_tokens=100, extra_body={"structured_outputs": {"choice": [CALL]}}
    )
    message = first.choices[0].message
    assert message.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "said"}
    answer = ask(lm, messages=[*TURN, message.model_dump(), result], return_prompt_text=True)
    assert answer["prompt_text"] == "say it again again said say <think></think>"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "again"}}])
@pytest.mark.parametrize("streams", [False, True])
def test_tools_that_the_model_must_call(lm: Server, reference: Reference, choice: Any, streams: bool) -> None:
    """A model that knows nothing is bound to the call's form and to the arguments' schema."""
    bias = {**reference.blanks(), str(reference.tokenizer.eos_token_id): 100.0}  # it ends where it may
    body = {"tools": STRICT, "tool_choice": choice, "logit_bias": bias, "max_tokens": 150, "ignore_eos": False}
    if streams:
        chunks = stream(lm, **body)
        parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls") or ()]
        name = "".join(part["function"].get("name") or "" for part in parts)
        arguments = "".join(part["function"].get("arguments") or "" for part in parts)
    else:
        (call,) = ask(lm, **body)["choices"][0]["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    assert name == "again"
    assert json.loads(arguments)["it"] in ("say", "hear")


def test_no_tools(lm: Server) -> None:
    """With tool_choice none the call stays text."""
    answer = ask(lm, tools=TOOLS, tool_choice="none", structured_outputs={"choice": [CALL]}, **FREE)
    assert answer["choices"][0]["message"]["content"] == CALL
    assert "tool_calls" not in answer["choices"][0]["message"]


def test_reasoning(lm: Server, reference: Reference) -> None:
    """What stands before the end of the reasoning is apart; without an end all of it is reasoning."""
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    end = reference.id("</think>")
    (choice,) = ask(lm, **think, logit_bias={end: -100.0})["choices"]
    assert choice["message"]["content"] is None
    made = choice["message"]["reasoning"]
    assert made
    chunks = stream(lm, **think, logit_bias={end: -100.0})
    assert "".join(c["choices"][0]["delta"].get("reasoning") or "" for c in chunks) == made
    hidden = ask(lm, **think, logit_bias={end: -100.0}, include_reasoning=False)
    assert "reasoning" not in hidden["choices"][0]["message"]
    assert ask(lm)["choices"][0]["message"]["content"]


def test_a_grammar_waits_for_the_end_of_the_reasoning(lm: Server, reference: Reference) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    bias = {**reference.blanks(), reference.id("</think>"): 100.0}
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = ask(lm, response_format=form, logit_bias=bias, **think, **FREE)
    assert json.loads(answer["choices"][0]["message"]["content"])["it"] in ("say", "hear")
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("form", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda text: len(text) == 3 and text.isdigit()),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: json.loads(text)["it"] in ("say", "hear")),
        ({"structured_outputs": {"grammar": 'root ::= "say" | "hear"'}}, lambda text: text in ("say", "hear")),
    ],
)
def test_bound_answers(lm: Server, reference: Reference, form: dict[str, Any], check: Any) -> None:
    close = {} if "structured_outputs" in form else {reference.id("}"): 50.0}
    answer = ask(lm, **form, **FREE, logit_bias={**reference.blanks(), **close})
    assert check(answer["choices"][0]["message"]["content"]), answer


def test_log_probabilities(lm: Server, reference: Reference) -> None:
    """They are the model's, whole and streamed."""
    prompt = "say it again say <think></think>"
    with torch.no_grad():
        logits = reference.model(torch.tensor([reference.tokenizer.encode(prompt)])).logits[0, -1]
    best = torch.log_softmax(logits.float(), -1).topk(2)
    rows = ask(lm, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [row["logprob"] for row in rows[0]["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-3)
    chunks = stream(lm, logprobs=True, top_logprobs=2)
    flat = [row for c in chunks for row in (c["choices"][0]["logprobs"] or {}).get("content", ())]
    assert [row["logprob"] for row in flat] == pytest.approx([row["logprob"] for row in rows], abs=1e-4)
    assert len(ask(lm, prompt_logprobs=1, max_tokens=1)["prompt_logprobs"]) == len(reference.tokenizer.encode(prompt))


def test_the_last_message_goes_on(lm: Server) -> None:
    begun = [*TURN, {"role": "assistant", "content": "say"}]
    form = {"add_generation_prompt": False, "continue_final_message": True, "chat_template_kwargs": {}}
    answer = ask(lm, messages=begun, echo=True, return_prompt_text=True, **form)
    assert answer["prompt_text"] == "say it again say"
    assert answer["choices"][0]["message"]["content"].startswith("say")


def test_stops_and_ids(lm: Server, reference: Reference) -> None:
    second = reference.tokens("say it again say <think></think>", 2)[1]
    answer = ask(lm, stop_token_ids=[second], request_id="mine.7")
    assert (answer["id"], answer["choices"][0]["finish_reason"]) == ("chatcmpl-mine.7", "stop")
    assert answer["choices"][0]["stop_reason"] == second
    assert answer["usage"]["completion_tokens"] == 2
    assert ask(lm, allowed_token_ids=[second], max_tokens=3, return_token_ids=True)["choices"][0]["token_ids"] == (
        [second] * 3
    )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
        ({"priority": 3}, "priority"),  # the stage serves requests as they come
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "../x"}}]}, "tools.0.function.name"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"say": 1}}, "logit_bias"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids.0"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"n": 2}, "n"),  # the same twice: greedy
        ({"n": 65}, "n"),
        ({"request_id": "../../x"}, "request_id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "audio_1"}}]}, "messages.0.audio"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_refused(lm: Server, change: dict[str, Any], param: str) -> None:
    answer = lm.post(CHAT, {"messages": TURN, **change})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param, answer.text
    assert lm.http.get("/health").json()["open_requests"] == 0


def test_completions(lm: Server, reference: Reference) -> None:
    """Several prompts, as text and as tokens, by OpenAI's client; streamed, too."""
    texts = ["say it", "you hear"]
    expected = [reference.tokens(text, 5) for text in texts]
    told: Any = {"return_token_ids": True, "ignore_eos": True}
    answer = lm.openai.completions.create(model="lm", prompt=texts, max_tokens=5, temperature=0, extra_body=told)
    assert [choice.model_dump()["token_ids"] for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    ids = [reference.tokenizer.encode(text) for text in texts]
    again = ask(lm, COMPLETIONS, prompt=ids, max_tokens=5, **told)["choices"]
    assert [choice["token_ids"] for choice in again] == expected
    made: list[list[int]] = [[], []]
    text = ["", ""]
    for chunk in lm.openai.completions.create(model="lm", prompt=texts, max_tokens=5, stream=True, extra_body=told):
        made[chunk.choices[0].index] += chunk.choices[0].model_dump()["token_ids"]
        text[chunk.choices[0].index] += chunk.choices[0].text
    assert made == expected
    assert text == [choice.text for choice in answer.choices]
    echoed = ask(lm, COMPLETIONS, prompt="say it", max_tokens=5, echo=True, logprobs=1)["choices"][0]
    assert echoed["text"] == "say it" + text[0]
    assert len(echoed["logprobs"]["tokens"]) == len(ids[0]) + 5


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": "say " * 300}, "prompt"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_refused_completions(lm: Server, body: dict[str, Any], param: str) -> None:
    answer = lm.post(COMPLETIONS, body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


def test_tokens(lm: Server, reference: Reference) -> None:
    made = ask(lm, "/tokenize", prompt="say it again", return_token_strs=True)
    assert made["tokens"] == reference.tokenizer.encode("say it again")
    assert (made["count"], made["max_model_len"]) == (3, 240)
    assert ask(lm, "/detokenize", tokens=made["tokens"])["prompt"] == "say it again"
    chat = ask(lm, "/tokenize", messages=TURN, tools=TOOLS)["tokens"]
    assert chat == reference.tokenizer.encode("again say it again say <think></think>")
    assert lm.post("/detokenize", {"tokens": [99999]}).status_code == 400
    assert lm.post("/tokenize", {"prompt": "x", "messages": TURN}).status_code == 400


def test_a_reader_that_leaves_ends_the_request(lm: Server) -> None:
    """Of a whole answer, and of several prompts at once."""
    import time

    import httpx

    for path, body in ((CHAT, {"messages": TURN}), (COMPLETIONS, {"prompt": ["say", "hear"]})):
        long = {**body, "max_tokens": 200, "ignore_eos": True}
        with httpx.Client(base_url=lm.url) as client, client.stream("POST", path, json={**long, "stream": True}) as got:
            next(got.iter_text())
        with httpx.Client(base_url=lm.url, timeout=0.05) as client, pytest.raises(httpx.TimeoutException):
            client.post(path, json=long)
        deadline = time.monotonic() + 10
        while lm.http.get("/health").json()["open_requests"]:
            assert time.monotonic() < deadline


def test_several_answers(lm: Server) -> None:
    """Whole and streamed, and as choices of completions; seeded ones are told apart and come again."""
    body: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 5}
    answer = ask(lm, **body)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 15
    made = ["", "", ""]
    for chunk in stream(lm, **body):
        for choice in chunk["choices"]:
            made[choice["index"]] += choice["delta"].get("content") or ""
    assert made == texts
    assert len(ask(lm, COMPLETIONS, prompt=["say", "hear"], **body)["choices"]) == 6


@pytest.mark.parametrize("block", blocks("lm"), ids=lambda b: b.language)
def test_reference(lm: Server, block: Block, tmp_path: Path) -> None:
    run_block(block, lm, tmp_path)


def test_fuzz(lm: Server, tmp_path: Path) -> None:
    from tests.entrypoints.openai.test_fuzz import fuzz

    fuzz(lm, tmp_path, "/v1/completions", "/tokenize", "/detokenize")
