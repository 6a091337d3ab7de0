"""Of `mkdocs build`: files of the project that pages link to become part of the site, below files/."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()[^)\s:#]+")


def _in_site(target: str, page: str) -> str | None:
    """Where the site has the file that ``page`` of the site links to; None when it is no file of the project."""
    here = page.removeprefix("files/") if page.startswith("files/") else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if path.startswith("..") or not (ROOT / path).is_file():
        return None
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def on_files(files: Any, config: Any) -> Any:
    """Add the files, and those that they link to."""
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for target in LINK.findall(page.content_string):
            path = _in_site(target, page.src_uri)
            if path is not None and files.get_file_from_path(path) is None:
                source = ROOT / path.removeprefix("files/")
                files.append(file := File.generated(config, path, abs_src_path=str(source)))
                pages += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point the links at them."""

    def moved(match: re.Match[str]) -> str:
        path = _in_site(match[0], page.file.src_uri)
        return match[0] if path is None else posixpath.relpath(path, posixpath.dirname(page.file.src_uri))

    return LINK.sub(moved, markdown)
