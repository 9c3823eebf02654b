"""Examples in the documents: configurations that Tidegate knows, and alert rules that Prometheus accepts."""

from __future__ import annotations

import re
import subprocess

import pytest

from harness.edge import BINARY, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(text, id=f"{page.stem}-{n}")
    for page in PAGES
    for n, text in enumerate(re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.M | re.S), 1)
]
# An example shows a part of a configuration and names files of the reader.
LACKS = [
    "cannot be read",
    "no [[tls]] is named",
    "can be reached from other machines",
    '"file" needs auth.file',
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_configuration_in_the_documents_has_only_keys_that_exist(text, tmp_path):
    file = tmp_path / "example.toml"
    file.write_text(text)
    done = subprocess.run([BINARY, "check", "--config", file], capture_output=True, text=True, timeout=20)
    wrong = [line for line in done.stderr.splitlines() if not any(known in line for known in LACKS)]
    assert done.returncode in (0, 64) and not wrong, done.stderr


def test_promtool_accepts_the_alert_rules():
    rules = ROOT / "docs" / "alerts.yml"
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alert_rules_name_only_documented_metrics():
    rules = (ROOT / "docs" / "alerts.yml").read_text()
    documented = (ROOT / "docs" / "metrics.md").read_text()
    names = {name.removesuffix("_bucket") for name in re.findall(r"\b(?:tidegate|process)_[a-z_]+", rules)}
    assert len(names) > 5
    assert [name for name in sorted(names) if f"`{name}`" not in documented] == []
