"""Hooks of mkdocs: links that leave docs/ work on the code host and on the site.

A page may link to any file of the repository by its relative path. For the site, each file outside docs/
that a page links to is added below repository/, and the link is rewritten to it. A link to a directory
leads to its README.md on the site, or is plain text where there is none.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS, OUTSIDE = "docs/", "repository/"
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def in_repository(src_uri: str) -> str:
    """The path in the repository of a file of the site."""
    return src_uri.removeprefix(OUTSIDE) if src_uri.startswith(OUTSIDE) else DOCS + src_uri


def site_path(path: str) -> str:
    """The path on the site of a file of the repository."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else OUTSIDE + path


def target_of(page: str, link: str) -> str | None:
    """The file or directory of the repository that a relative link of a page leads to."""
    if re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / path / "README.md").is_file():
        return path + "/README.md"
    return path if (ROOT / path).exists() else None


def on_files(files: Files, config, **_) -> Files:
    """Adds files outside docs/ that pages link to, and the files that these link to."""
    pages = [DOCS + file.src_uri for file in files if file.is_documentation_page()]
    while pages:
        page = pages.pop()
        for _, link, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = target_of(page, link)
            if path is None or path.startswith(DOCS) or (ROOT / path).is_dir():
                continue
            if files.get_file_from_path(site_path(path)):
                continue
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Rewrites the links to where their files are on the site."""
    here = page.file.src_uri

    def rewrite(found: re.Match) -> str:
        text, link, anchor = found.groups()
        path = target_of(in_repository(here), link)
        if path is None:
            return found[0]
        if (ROOT / path).is_dir():
            return text
        relative = posixpath.relpath(site_path(path), posixpath.dirname(here) or ".")
        return f"[{text}]({relative}{anchor or ''})"

    return LINK.sub(rewrite, markdown)
