"""The files of ``examples/deployment``: their commands parse, work, and name what exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from tests.entrypoints.openai.server import Server, picture_stages
from vllm_omni.entrypoints.cli.main import USAGE_STATUS, build_app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deployment"
METRICS = ROOT / "docs" / "user_guide" / "metrics.md"
SUFFIX = "_(total|bucket|sum|count)$"
PAGE = ROOT / "docs" / "user_guide" / "deployment.md"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(FOLDER / name)
    return parser


def options(words: list[str]) -> dict[str, object]:
    """What ``vllm-omni serve`` makes of these words."""
    command = typer.main.get_command(build_app("serve")).commands["serve"]  # type: ignore[attr-defined]
    parsed: dict[str, object] = command.make_context("serve", list(words)).params
    return parsed


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in their order, lines joined."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def container() -> dict[str, str]:
    """The last instruction of each kind."""
    return dict(instructions())


def test_the_service_drains_before_it_is_killed() -> None:
    service = unit("vllm-omni.service")["Service"]
    program, command, *words = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("vllm-omni", "serve")
    parsed = options(words)
    assert float(service["TimeoutStopSec"]) > float(str(parsed["drain_timeout"]))
    assert service["KillMode"] == "mixed"
    assert int(service["RestartPreventExitStatus"]) == USAGE_STATUS
    assert f":{parsed['port']}/ready" in service["ExecStartPost"]
    assert f":{parsed['port']}/health" in unit("vllm-omni-health.service")["Service"]["ExecStart"]


def test_a_start_that_fails_is_not_waited_for() -> None:
    """What waits for readiness ends when the server's process has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    wait = shlex.split(unit("vllm-omni.service")["Service"]["ExecStartPost"].replace(":8000", ":1"))
    env = {"PATH": "/usr/bin:/bin", "MAINPID": str(ended.pid)}
    assert subprocess.run(wait, env=env, capture_output=True, timeout=10).returncode == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for path in FOLDER.glob("vllm-omni*.*r*"):
        if path.suffix in (".service", ".timer"):
            (tmp_path / path.name).write_text(
                path.read_text().replace("/opt/vllm-omni/.venv/bin/vllm-omni", "/bin/true")
            )
    files = sorted(map(str, tmp_path.iterdir()))
    assert len(files) == 3
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True)
    wrong = [line for line in done.stderr.splitlines() if "vllm-omni" in line]
    assert wrong == []


def test_commands_of_the_service_against_a_server(tmp_path: Path) -> None:
    """With the unit's own flags; what asks for readiness and health succeeds, and fails when a stage is gone."""
    service = unit("vllm-omni.service")["Service"]
    flags = shlex.split(service["ExecStart"])[3:]
    flags[flags.index("--port") + 1] = "0"
    server = Server("--stage-configs-path", picture_stages(tmp_path), "--model", "none", *flags)
    look = unit("vllm-omni-health.service")["Service"]["ExecStart"].replace("/usr/bin/systemctl", "exit 7; true")
    commands = [
        shlex.split(line.replace("http://127.0.0.1:8000", server.url)) for line in (service["ExecStartPost"], look)
    ]
    try:
        for command in commands:
            assert subprocess.run(command, timeout=30).returncode == 0
        (stage,) = [child for child in server.children() if child.name().startswith("omni-stage")]
        stage.kill()
        stage.wait(10)
        assert subprocess.run(commands[1], capture_output=True, timeout=30).returncode == 7, "it restarts"
    finally:
        assert server.stop() == 0


def test_the_image_has_what_it_needs() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for source in line.split()]
    for source in copied:
        assert (ROOT / source).exists(), source
    built = container()
    program, command, *words = json.loads(built["ENTRYPOINT"])
    assert (program, command) == ("vllm-omni", "serve")
    parsed = options(words)
    assert (parsed["host"], str(parsed["port"])) == ("0.0.0.0", built["EXPOSE"])
    assert f":{parsed['port']}/health" in built["HEALTHCHECK"]
    run = next(line for line in PAGE.read_text().splitlines() if line.startswith("docker run"))
    options(shlex.split(run.partition(" vllm-omni ")[2]))


def test_a_change_of_the_package_leaves_the_layer_of_its_dependencies() -> None:
    """They are installed from two files, by options that the installer has; no layer keeps pip's or apt's cache."""
    steps = instructions()
    runs = [at for at, (word, rest) in enumerate(steps) if word == "RUN" and "install.py" in rest]
    assert len(runs) == 2
    dependencies, package = (shlex.split(steps[at][1]) for at in runs)
    assert "--only-dependencies" in dependencies
    assert "--only-dependencies" not in package
    before = [rest.split()[:-1] for word, rest in steps[: runs[0]] if word == "COPY"]
    assert before == [["pyproject.toml"], ["tools/install.py"]]
    assert all("PIP_NO_CACHE_DIR=1" in words for words in (dependencies, package))
    assert all("rm -rf /var/lib/apt/lists" in rest for word, rest in steps if word == "RUN" and "apt-get" in rest)
    usage = subprocess.run([sys.executable, ROOT / "tools" / "install.py", "--help"], capture_output=True, text=True)
    known = set(re.findall(r"--[a-z-]+", usage.stdout))
    assert {word for word in (*dependencies, *package) if word.startswith("--")} <= known


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    words = [line for line in lines if not line.startswith("#")]
    assert words[0] == "*", "everything is left out ..."
    seen = {word[1:] for word in words if word.startswith("!")}
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert seen == copied, "... but this"


def test_kubernetes_runs_the_image() -> None:
    """The manifest and the page agree with the server's flags, its paths and the image's user."""
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (one,) = pod["containers"]
    parsed = options(one["args"])
    assert pod["terminationGracePeriodSeconds"] > float(str(parsed["drain_timeout"]))
    assert str(pod["securityContext"]["runAsUser"]) == container()["USER"]
    (port,) = one["ports"]
    assert str(port["containerPort"]) == container()["EXPOSE"]
    probes = {name: one[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: get["path"] for name, get in probes.items()} == {
        "startupProbe": "/ready",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    names = {port["name"]}
    assert {get["port"] for get in probes.values()} | {item["targetPort"] for item in service["spec"]["ports"]} == names
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert one["securityContext"]["readOnlyRootFilesystem"]
    home = dict(word.split("=") for word in container()["ENV"].split())["HOME"]
    assert {mount["mountPath"] for mount in one["volumeMounts"]} == {"/models", "/dev/shm", "/tmp", home}
    assert pod["enableServiceLinks"] is False, "VLLM_OMNI_PORT and the like are not settings"


def test_the_copied_files_make_the_package(tmp_path: Path) -> None:
    """setuptools finds every package and its data with nothing but what the image copies."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "vllm_omni").symlink_to(ROOT / "vllm_omni")
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "--quiet", "build_py", "--build-lib", str(tmp_path / "built")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "built" / "vllm_omni"
    assert (built / "entrypoints" / "openai" / "playground" / "index.html").is_file()
    assert (built / "data" / "default_model" / "model_index.json").is_file()


def known_metrics() -> set[str]:
    """The names on the page about metrics, which another test compares with what a server has."""
    return set(re.findall(r"^\| `(vllm_omni_\w+)`", METRICS.read_text(), re.MULTILINE))


def test_metrics_that_are_asked_for_exist() -> None:
    rules = yaml.safe_load((FOLDER / "vllm-omni-rules.yml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    expressions += [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "vllm_omni_" in line]
    asked = {name for expression in expressions for name in re.findall(r"vllm_omni_\w+", expression)}
    assert len(asked) >= 7
    known = known_metrics()
    unknown = {name for name in asked if name not in known and re.sub(SUFFIX, "", name) not in known}
    assert unknown == set()
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert (FOLDER / scrape["rule_files"][0]).is_file()


def test_the_proxy_passes_streams_on() -> None:
    text = (FOLDER / "nginx.conf").read_text()
    assert re.search(r"proxy_buffering\s+off;", text)
    assert float(re.search(r"proxy_read_timeout (\d+)s", text)[1]) > 300  # type: ignore[index]
