"""Prompt files: every line is a prompt or a reported error."""

import io
import sys
from pathlib import Path

import pytest

from vllm_omni.entrypoints.cli.prompts import BadRow, PromptRow, read_rows
from vllm_omni.errors import RequestError


def test_text_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('a cup\n\n  {"not": "json here"}  \n# a heading\n')
    assert [(row.line, row.prompt) for row in read_rows(str(file))] == [
        (1, "a cup"),
        (3, '{"not": "json here"}'),
        (4, "# a heading"),
    ]


def test_json_lines_override_flags(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a cup", "negative_prompt": "tea", "seed": 7, "output": "cup.png"}\n{"prompt": "a tree"}\n'
    )
    first, second = read_rows(str(file))
    assert isinstance(first, PromptRow)
    assert isinstance(second, PromptRow)
    assert first.as_prompt() == {"prompt": "a cup", "negative_prompt": "tea"}
    assert first.output == "cup.png"
    params = first.sampling_params({"seed": 1, "height": 64})
    assert (params.seed, params.height) == (7, 64)
    assert second.as_prompt() == "a tree"
    assert second.sampling_params({"seed": 1}).seed == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('["a"]', "expected an object"),
        ('{"seed": 1}', "'prompt' is missing"),
        ('{"prompt": 3}', "prompt=3: expected text"),
        ('{"prompt": "a", "sede": 1}', "did you mean 'seed'"),
        ('{"prompt": "a", "generator": 1}', "unknown key 'generator'"),
    ],
)
def test_a_bad_line_is_reported_and_the_others_go_on(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    rows = list(read_rows(str(file)))
    assert [row.line for row in rows] == [1, 2, 3]
    assert isinstance(rows[1], BadRow)
    assert message in str(rows[1].error)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"height": 3}, "height=3: allowed is 16"),
        ({"height": "64"}, "height='64'"),
        ({"return_trajectory_latents": "yes"}, "return_trajectory_latents='yes'"),
        ({"sigmas": "a"}, "sigmas='a'"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
)
def test_values_of_a_row_are_checked(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PromptRow(1, "a", overrides=overrides).sampling_params({})


def test_standard_input_takes_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('a cup\n{"prompt": "a tree", "seed": 2}\n'))
    first, second = read_rows("-")
    assert isinstance(first, PromptRow)
    assert isinstance(second, PromptRow)
    assert (first.prompt, second.prompt, second.overrides) == ("a cup", "a tree", {"seed": 2})
