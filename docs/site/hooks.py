"""Lets pages link to files of the repository as they do on a code host: ``../benchmarks/README.md``.

What a page links to and lies outside of ``docs/`` becomes part of the site, under its path in the repository; Markdown
as a page, and so on from there. Links to folders are text. ``deploy/README.md`` is in the navigation where it exists.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
OPTIONAL = ("deploy/README.md",)
#: A link or an image: text, target without anchor, anchor.
LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|[#/])([^()\s#]+)(#[^()\s]*)?\)")

# Below the name "mkdocs", so that --strict counts the warnings.
logger = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to."""
    for path in OPTIONAL:
        if (ROOT / path).exists():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            assert config.nav is not None
            config.nav.append(path)
    for path in config.nav or ():
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    to_read = list(files.documentation_pages())
    while to_read:
        page = to_read.pop()
        for _, target, _ in LINK.findall(page.content_string):
            path = in_repository(page.src_uri, target)
            if (ROOT / path).is_file() and files.get_file_from_path(in_site(path)) is None:
                linked = File.generated(config, in_site(path), abs_src_path=str(ROOT / path))
                files.append(linked)
                to_read += [linked] if linked.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads the links to where the files are in the site."""

    def lead(link: re.Match[str]) -> str:
        path = in_repository(page.file.src_uri, link[2])
        if (ROOT / path).is_dir():
            return link[1]
        if not (ROOT / path).exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_uri, link[2])
        place = posixpath.relpath(in_site(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"[{link[1]}]({place}{link[3] or ''})"

    return LINK.sub(lead, markdown)


def in_repository(page: str, target: str) -> str:
    """The path in the repository of what a page of the site links to."""
    at = page if (ROOT / page).exists() else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(at), target))


def in_site(path: str) -> str:
    """The path in the site of a file of the repository."""
    return path.removeprefix("docs/")
