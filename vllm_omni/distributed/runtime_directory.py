"""One folder for everything with a name that one launch of a vLLM engine makes.

vLLM's sockets, the file over which ranks find each other and, on CPU, their named shared memory outlive processes that
are killed. Here all of them bear the name of one folder, which goes away with the engine. When driver and engine are
killed together it stays until the next launch finds that nobody holds it any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import psutil

from vllm_omni.errors import ConfigError

PREFIX = "vllm-omni-engine-"
SHARED_MEMORY = Path("/dev/shm")
_SETTING = "VLLM_RPC_BASE_PATH"
_SOCKET_NAME = 36
"""Characters of the name that vLLM gives to a socket."""
_LONGEST_PATH = 107
"""Characters that the kernel allows in the path of a socket."""
_launching = threading.Lock()


class RuntimeDirectory:
    """The folder of one engine. Whoever made it holds a lock on it, which the kernel drops when that process ends, so
    that it is known from outside whether it is in use.

    Raises:
        ConfigError: the path that ``VLLM_RPC_BASE_PATH`` names is no folder, or too long for sockets.
    """

    def __init__(self) -> None:
        parent = _parent()
        sweep(parent)
        self.path, lock = _make(parent)
        self._adopted: set[Path] = set()
        self._finalizer = weakref.finalize(self, _close, self.path, lock, self._adopted, os.getpid())

    @contextlib.contextmanager
    def entered(self, more: Mapping[str, str] | None = None) -> Iterator[None]:
        """Have vLLM make its sockets here, in this process and in those that are started meanwhile; ``more`` is put
        into their environment, too."""
        values = {**(more or {}), _SETTING: str(self.path)}
        with _launching:
            before = {name: os.environ.get(name) for name in values}
            os.environ.update(values)
            try:
                yield
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value

    def adopt(self, pid: int) -> None:
        """Remember what the engine of process ``pid`` and its ranks share under names of Python's (queues, locks), so
        that it goes with the folder: Python removes it no earlier than this process ends, if they are killed."""
        engine = psutil.Process(pid)
        for process in (engine, *engine.children(recursive=True)):
            self._adopted |= _shared_names(process.pid)
        self._adopted -= _shared_names(os.getpid())

    def remove(self) -> None:
        """Remove it, and the shared memory of the engine. Idempotent."""
        self._finalizer()


def child_environment(more: Mapping[str, str], without: Collection[str] = ()) -> dict[str, str]:
    """This process's environment with ``more`` and ``without`` some, and nothing of an engine that another thread is
    starting."""
    with _launching:
        kept = {name: value for name, value in os.environ.items() if name not in without}
    return {**kept, **more}


def rendezvous(path: str) -> str:
    """Where the ranks of the engine of folder ``path`` find each other; vLLM names their shared memory after it."""
    return f"file://{path}/{os.path.basename(path)}"


def unlink_shared_memory(path: str) -> None:
    """Take the names of the shared memory of the engine of folder ``path`` away; who has it mapped keeps it."""
    for segment in SHARED_MEMORY.glob(f"{os.path.basename(path)}*"):
        segment.unlink(missing_ok=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove the folder of an engine that has ended. Idempotent."""
    unlink_shared_memory(os.fspath(path))
    shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the folders below ``parent`` whose owners are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = _locked(folder)
        except OSError:  # in use, somebody else's, or just removed
            continue
        remove_folder(folder)
        os.close(lock)


def _close(path: Path, lock: int, adopted: set[Path], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        for segment in adopted:
            segment.unlink(missing_ok=True)
        remove_folder(path)
        os.close(lock)


def _shared_names(pid: int) -> set[Path]:
    """Files of shared memory that process ``pid`` has mapped; none where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = (line[line.find("/") :] for line in lines if f" {SHARED_MEMORY}/" in line)
    return {Path(path) for path in paths if not path.endswith(" (deleted)")}


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = _locked(path)
        except OSError:  # a launch at the same time took it for one without an owner
            continue
        if path.exists():
            return path, lock
        os.close(lock)


def _locked(path: Path) -> int:
    """A descriptor of the folder that holds its lock.

    Raises:
        OSError: another process holds it, or the folder cannot be opened.
    """
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _parent() -> Path:
    """The folder in which the folders of engines are made.

    ``VLLM_RPC_BASE_PATH`` when it is set, else that of temporary files, or ``/tmp`` where its path is too long.
    """
    given = os.environ.get(_SETTING)
    if given is not None:
        if not os.path.isdir(given) or not _fits(given):
            raise ConfigError(
                f"{_SETTING}={given!r}: must be a folder with a path of at most {_LONGEST_PATH - _below()} characters",
                field=_SETTING,
            )
        return Path(given)
    temporary = tempfile.gettempdir()
    return Path(temporary if _fits(temporary) else "/tmp")


def _below() -> int:
    """Characters that come after the parent in the path of a socket."""
    random = 8
    return len(f"/{PREFIX}") + random + len("/") + _SOCKET_NAME


def _fits(parent: str) -> bool:
    return len(os.fsencode(parent)) + _below() <= _LONGEST_PATH
