"""The scripts of the first screen, and the module for web apps, used from outside the repository."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess

import pytest

from harness.edge import ROOT

MODULES = ROOT / "tests" / "interop" / "node_modules"


@pytest.mark.parametrize("script", ("scripts/run", "scripts/test"))
@pytest.mark.parametrize("version,refused", [("1.63.0", True), ("1.94.9", True), (None, True)])
def test_the_scripts_say_that_rust_is_too_old(tmp_path, script, version, refused):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "sed", "sort", "cut", "dirname", "env", "id", "mkdir"):
        (tools / tool).symlink_to(shutil.which(tool))
    if version:
        cargo = tools / "cargo"
        cargo.write_text(f"#!/bin/sh\necho 'cargo {version} (0 2022-01-01)'\n")
        cargo.chmod(cargo.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run([ROOT / script], env={"PATH": str(tools), "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "Rust 1." in done.stderr and "https://rustup.rs" in done.stderr, done.stderr
    if version:
        assert version in done.stderr and "rustup update" in done.stderr


def test_the_first_commands_name_the_package_that_they_need():
    ready = (ROOT / "src" / "runtime" / "ready.rs").read_text()
    assert "mosquitto_sub" in ready and "install mosquitto-clients" in ready


def test_a_web_app_outside_bundles_the_module(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    (app / "package.json").write_text('{ "name": "app", "type": "module" }')
    module = ROOT / "clients" / "mqtt-webtransport"
    quiet = ["--offline", "--no-audit", "--no-fund", "--ignore-scripts", "--legacy-peer-deps"]
    done = subprocess.run(["npm", "install", *quiet, str(module)], cwd=app, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # The app's own packages: MQTT.js, and nothing that the module could borrow.
    (app / "node_modules" / "mqtt").symlink_to(MODULES / "mqtt")
    (app / "app.js").write_text(
        "import mqtt from 'mqtt'\n"
        "import { connect } from 'tidegate-mqtt-webtransport'\n"
        "connect(mqtt, 'wss://edge.example.com:8084/mqtt', { protocolVersion: 5, webTransport: 'https://edge.example.com:14567/mqtt' })\n"
    )
    esbuild = MODULES / ".bin" / "esbuild"
    done = subprocess.run([esbuild, "app.js", "--bundle", "--format=esm", "--outfile=bundle.js"], cwd=app, capture_output=True, text=True, timeout=60, env=os.environ | {"NODE_PATH": ""})
    assert done.returncode == 0, done.stderr
    bundle = (app / "bundle.js").read_text()
    assert "WebTransport" in bundle and "from 'readable-stream'" not in bundle
