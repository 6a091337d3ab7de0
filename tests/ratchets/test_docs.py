"""The documentation is true: links resolve, commands and imports exist, generated pages are up to date."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.ratchets.source import ROOT, all_names, bound_names, modules
from tools.generate_docs import PAGES as PAGES_MADE

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Programs beside ours that a command of the documentation may start.
OTHER_PROGRAMS = {
    "git",
    "kubectl",
    "cd",
    "pip",
    "pytest",
    "mkdocs",
    "pre-commit",
    "cat",
    "curl",
    "echo",
    "mkdir",
    "ruff",
    "mypy",
    ".ci/run",
    "docker",
    "useradd",
    "source",
    "export",
    "install",
    "systemctl",
    "journalctl",
}
# Text that must not stand in the project: folders of one machine, package hosts, and trackers that a reader cannot see.
FORBIDDEN = (
    r"/ro" + r"ot/",
    r"/wo" + r"rk/",
    r"/ho" + r"me/\w",
    r"\bpypi" + r"\.",
    r"pythonhos" + r"ted",
    r"\bissue" + r" #?\d",
)
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".json", ".svg", ".jsonl", ""}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks(*languages: str) -> list[Block]:
    return [
        Block(page, page.read_text()[: match.start()].count("\n") + 1, match[1], match[2])
        for page in PAGES
        for match in FENCE.finditer(page.read_text())
        if match[1] in languages
    ]


def _commands() -> Iterator[tuple[Block, list[str]]]:
    """Every command of the shell blocks."""
    for block in _blocks("bash", "sh", "console"):
        text = re.sub(r"(<< *(\w+)$).*?^\2$", r"\1", block.text, flags=re.MULTILINE | re.DOTALL)  # what a command reads
        text = text.replace("\\\n", " ")
        for line in text.splitlines():
            line = line.split(" | ")[0].removeprefix("$ ")
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield block, words


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_links_resolve() -> None:
    wrong = []
    for page in PAGES:
        for target in LINK.findall(FENCE.sub("", page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target} does not exist")
            elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
                wrong.append(f"{page.relative_to(ROOT)}: {target} has no such heading")
    assert not wrong, "\n".join(wrong)


def test_navigation_lists_every_page() -> None:
    def leaves(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from leaves(value)
        elif isinstance(node, list):
            for value in node:
                yield from leaves(value)

    listed = set(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert listed == there


def test_commands_exist_with_their_options() -> None:
    """Every command line in the documentation parses: programs, make targets, scripts, options."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    folders: dict[str, Path] = {}
    for block, words in _commands():
        problem = None
        folder = folders.get(str(block), ROOT)
        program = words[0].removeprefix(".venv/bin/")
        if program == "vllm-omni":
            problem = _parse_problem(words[1:])
        elif program == "make":
            problem = next((f"no target {w}" for w in words[1:] if "=" not in w and w not in targets), None)
        elif program == "python":
            file = next((word for word in words[1:] if word.endswith(".py")), None)
            if file and not any((base / file).exists() for base in (folder, block.page.parent)):
                problem = f"{file} does not exist"
        elif program == "cd":
            folders[str(block)] = folder / words[1]
            problem = None if (folder / words[1]).is_dir() else "no such folder"
        elif program not in OTHER_PROGRAMS:
            problem = "unknown program; add it to OTHER_PROGRAMS"
        if problem:
            wrong.append(f"{block}: {shlex.join(words)}: {problem}")
    assert not wrong, "\n".join(wrong)


def _parse_problem(words: list[str]) -> str | None:
    import typer

    from vllm_omni.entrypoints.cli.main import COMMANDS, build_app

    if not words or words[0].startswith("-"):
        return None
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    command = typer.main.get_command(build_app(words[0]))
    try:
        for name in words[:2]:
            if not hasattr(command, "commands"):
                break
            command, words = command.commands[name], words[1:]
        command.make_context("vllm-omni", list(words))
    except typer.TyperException as error:
        return error.format_message()
    except (typer.Exit, SystemExit):
        return None  # --help
    return None


def test_python_blocks_compile_and_import_what_exists() -> None:
    wrong = []
    for block in _blocks("python"):
        wrong += _import_problems(block)
    assert not wrong, "\n".join(wrong)


def _import_problems(block: Block) -> Iterator[str]:
    known = {module.name: module for module in modules()}
    for node in ast.walk(ast.parse(block.text, str(block))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm_omni"):
            continue
        if node.module not in known:
            yield f"{block}: no module {node.module}"
            continue
        there = bound_names(known[node.module]) | all_names(known[node.module])
        yield from (f"{block}: {node.module} has no {alias.name}" for alias in node.names if alias.name not in there)


def test_stage_configurations_in_the_pages_parse() -> None:
    """Whole configurations; a fragment shows one stage alone."""
    from vllm_omni.config.stage import parse_pipeline

    found = [block for block in _blocks("yaml") if "stage_args:" in block.text and "stage_id: 0" in block.text]
    assert found
    for block in found:
        assert parse_pipeline(yaml.safe_load(block.text), {}, str(block)).stages


@pytest.mark.parametrize("page", sorted(PAGES_MADE))
def test_generated_pages_are_up_to_date(page: str) -> None:
    path = ROOT / "docs" / "user_guide" / f"{page}.md"
    assert path.read_text() == PAGES_MADE[page](), f"{path} is out of date: run make docs"


def _project_files() -> Iterator[Path]:
    folders = ("vllm_omni", "tests", "tools", "docs", "examples", "benchmarks", ".ci")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    for path in [*ROOT.glob("*"), *inside]:
        if path.is_file() and path.suffix in TEXT_SUFFIXES:
            yield path


def test_nothing_of_one_machine_stands_in_the_project() -> None:
    wrong = []
    for path in _project_files():
        text = path.read_text(errors="replace")
        for pattern in FORBIDDEN:
            for match in re.finditer(pattern, text, re.IGNORECASE):
                wrong.append(f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match[0]}")
    assert not wrong, "\n".join(wrong)
