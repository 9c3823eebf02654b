#!/usr/bin/env python3
"""Makes docs/configuration.md from config/tidegate.toml, and checks documents against the repository.

    scripts/reference.py            writes docs/configuration.md
    scripts/reference.py --check    writes nothing; fails when that page is stale, when docs/metrics.md lacks
                                    a metric or a label value, when docs/limits.md quotes a log line that
                                    Tidegate does not write, when docs/dependencies.md lacks a crate, when
                                    a source file is named that does not exist, or when a relative link is broken

Needs Python 3.10 and nothing else.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "config" / "tidegate.toml"
PAGE = ROOT / "docs" / "configuration.md"
METRICS_PAGE = ROOT / "docs" / "metrics.md"
DEPENDENCIES_PAGE = ROOT / "docs" / "dependencies.md"
METRICS_SOURCE = ROOT / "src" / "telemetry"
LIMITS_PAGE = ROOT / "docs" / "limits.md"

HEAD = """\
# Configuration reference

<!-- Made from config/tidegate.toml by scripts/reference.py: edit that file, then run the script. -->

Tidegate reads one TOML file: `tidegate run --config FILE`. Without a file it runs with the values below,
on loopback and with the embedded broker. `tidegate check --config FILE` lists every mistake with its line and
the keys that are allowed there, and prints the memory that the configuration may use. An unknown key is an
error, never ignored. [config/minimal.toml](../config/minimal.toml) is a start, and
[config/tidegate.toml](../config/tidegate.toml) shows every key with its default.

- Durations have a unit: `"250ms"`, `"30s"`, `"10m"`, `"2h"`, `"7d"`.
- Sizes have a unit: `"64KiB"`, `"1MiB"`, `"10GiB"`; a bare number is bytes.
- Relative paths start at the directory of the configuration file.
- A change of a key takes effect at the next start. The column *file re-read* says when Tidegate reads the
  file behind a key again while it runs.
"""

KEY = re.compile(r"^(#?)([a-z0-9_]+) = (.*?)\s+# (.*)$")
KEY_ALONE = re.compile(r"^(#?)([a-z0-9_]+) = (.*)$")
SECTION = re.compile(r"^#?(\[{1,2}[a-z.]+\]{1,2})(?:\s+# (.*))?$")


@dataclass
class Key:
    """One key: its value in the file, and the text of its columns."""

    name: str
    default: str
    reload: str
    meaning: str


@dataclass
class Section:
    """One table of the file; the listeners are one section."""

    name: str
    about: str
    keys: dict[str, Key] = field(default_factory=dict)


def key_of(name: str, value: str, comment: str, has_default: bool) -> Key:
    """Sorts the sentences of a comment into columns."""
    default, reload, meaning = (f"`{value}`" if has_default else "none"), "", []
    for sentence in re.split(r"\. (?=[A-Z])", comment.rstrip(".")):
        if sentence == "Required":
            default = "required"
        elif sentence.startswith("Default: "):
            default = sentence.removeprefix("Default: ")
        elif sentence.startswith("Re-read "):
            reload = sentence.removeprefix("Re-read ")
        else:
            meaning.append(sentence)
    if default == value:
        default = f"`{value}`"
    elif not has_default:
        meaning.append(f"Example: `{value}`")
    return Key(name, default, reload, ". ".join(meaning) + ".")


def read_sections(text: str) -> list[Section]:
    """The sections in the order of the file."""
    top = Section("", "")
    sections, now, block = {"": top}, top, []
    for number, line in enumerate(text.splitlines(), 1):
        if found := SECTION.match(line):
            name, about = found[1], " ".join(block) if line.startswith("#") else (found[2] or "")
            now = sections.setdefault(name, Section(name, about))
            block = []
        elif found := KEY.match(line):
            commented, name, value, comment = found.groups()
            if name not in now.keys:
                now.keys[name] = key_of(name, value, comment, not commented)
        elif found := KEY_ALONE.match(line):
            if found[2] not in now.keys:
                raise SystemExit(f"{SOURCE}:{number}: {found[2]} has no comment")
        elif line.startswith("# ") and "----" not in line:
            block.append(line[2:])
        else:
            block = []
    return list(sections.values())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def configuration() -> str:
    """The whole page."""
    out = [HEAD]
    for section in read_sections(SOURCE.read_text()):
        about = section.about
        out.append(f"## `{section.name}`\n" if section.name else "## Top level\n")
        if about:
            out.append(about[0].upper() + about[1:].rstrip(".") + ".\n")
        reloads = any(key.reload for key in section.keys.values())
        out.append("| key | default | meaning |" + (" file re-read |" if reloads else ""))
        out.append("|---|---|---|" + ("---|" if reloads else ""))
        for key in section.keys.values():
            row = f"| `{key.name}` | {cell(key.default)} | {cell(key.meaning)} |"
            out.append(row + (f" {key.reload} |" if reloads else ""))
        out.append("")
    return "\n".join(out)


def stale_page() -> list[str]:
    now = PAGE.read_text() if PAGE.exists() else ""
    wanted = configuration()
    if now == wanted:
        return []
    diff = difflib.unified_diff(now.splitlines(), wanted.splitlines(), "docs/configuration.md", "made anew", lineterm="", n=0)
    return ["docs/configuration.md is stale: run scripts/reference.py", *list(diff)[:20]]


def metrics() -> list[str]:
    """Every metric and label value in the source is on the page, and no other."""
    source = "\n".join(path.read_text() for path in sorted(METRICS_SOURCE.rglob("*.rs")) if path.name != "tests.rs")
    named = set(re.findall(r'"(tidegate_[a-z0-9_]+)"', source)) - {"tidegate_"}
    values = set(re.findall(r'^\s+[A-Z][A-Za-z0-9]* = "([a-z0-9_]+)",$', source, re.M))
    page = METRICS_PAGE.read_text()
    told = set(re.findall(r"`(tidegate_[a-z0-9_]+)`", page))
    words = set(re.findall(r"`([a-z0-9_]+)`", page))
    if not named or not values:
        return [f"no metrics found below {METRICS_SOURCE.relative_to(ROOT)}: fix scripts/reference.py"]
    return (
        [f"docs/metrics.md: {name} is missing" for name in sorted(named - told)]
        + [f"docs/metrics.md: {name} is not in src/telemetry" for name in sorted(told - named)]
        + [f"docs/metrics.md: the label value {value} is missing" for value in sorted(values - words)]
    )


def log_lines() -> list[str]:
    """The log lines that the limits' page quotes must be in the source; "…" stands for a value."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.rs")))
    source = re.sub(r"\\\n\s*", "", source)
    problems = []
    for row in LIMITS_PAGE.read_text().partition("## The signs of each limit")[2].splitlines():
        cells = row.split(" | ")
        if len(cells) != 4:
            continue
        for line in re.findall(r'"([^"]{9,})"', re.sub(r"`[^`]*`", "", cells[2])):
            # Most lines are made of two texts: the event, and its reason.
            parts = [part.strip(" ()") for text in line.split(": ", 1) for part in text.split("…")]
            if any(part not in source for part in parts):
                problems.append(f"docs/limits.md: the log line is not in src: {line}")
    return problems


def dependencies() -> list[str]:
    """Every direct dependency of the root package has its reason."""
    section, names = "", []
    for line in (ROOT / "Cargo.toml").read_text().splitlines():
        if found := re.match(r"\[(.*)\]$", line):
            section = found[1]
        elif section in ("dependencies", "dev-dependencies") and (found := re.match(r"([\w-]+) *=", line)):
            names.append(found[1])
    page = DEPENDENCIES_PAGE.read_text()
    return [f"docs/dependencies.md: {name} is missing" for name in names if f"`{name}`" not in page]


def source_files() -> list[str]:
    """Source files that documents name exist, below src/ or tests/ where no directory is named."""
    bases = [ROOT, ROOT / "src", ROOT / "tests", ROOT / "tests" / "interop"]
    problems = []
    for page in [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for name in re.findall(r"`([\w./-]+\.(?:rs|py)|(?:src|tests|scripts|router|upstream|client|session)/[\w./-]*)`", page.read_text()):
            if not any((base / name).exists() for base in bases):
                problems.append(f"{page.relative_to(ROOT)}: {name} does not exist")
    return problems


def links() -> list[str]:
    """Relative links of all Markdown files lead to files of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )
    problems = []
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if not name or not path.exists():
            continue
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        text = re.sub(r"`[^`\n]*`", "", text)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:|#", target):
                continue
            file = (path.parent / target.split("#")[0]).resolve()
            if not file.exists() or ROOT not in file.parents:
                problems.append(f"{name}: {target} leads nowhere")
    return problems


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        problems = stale_page() + metrics() + log_lines() + dependencies() + source_files() + links()
        print("\n".join(problems) or "documents: in step with the repository")
        return 1 if problems else 0
    if sys.argv[1:]:
        print(__doc__.strip(), file=sys.stderr)
        return 64
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(configuration())
    return 0


if __name__ == "__main__":
    sys.exit(main())
