"""Hooks of mkdocs: the site also shows pages of the repository that lie outside docs/."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Page of the site: file of the repository, whose text stands there alone.
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
# Folders that pages link to: benchmarks/results/ stands beside docs/ in the repository, and below it on the site.
FOLDERS = ("benchmarks/results",)
LINK = re.compile(r"(\]\()([^)#:\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {**PAGES, **{str(p.relative_to(ROOT)): str(p.relative_to(ROOT)) for p in outside()}}
    for page, source in pages.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def outside() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site: docs/ is its root."""
    place = page.file.src_uri
    source = PAGES.get(place) or (place if place.startswith(FOLDERS) else f"docs/{place}")
    return LINK.sub(lambda found: found[1] + moved(found[2], source, place), markdown)


def moved(link: str, source: str, place: str) -> str:
    """The link from a file of the repository, for the page of the site that shows it."""
    target = (ROOT / source).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
    named = {file: page for page, file in PAGES.items()}
    target = named.get(target, target.removeprefix("docs/"))
    return os.path.relpath(target, Path(place).parent)
