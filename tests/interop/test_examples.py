"""The programs in examples/, started as a newcomer starts them."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.js import chromium

ROOT = Path(__file__).resolve().parents[2]
MODULES = Path(__file__).parent / "node_modules"
STORY = ["offline", "session present", "opened", "closed"]


def run(*command: str, **more) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_python_example_prints_its_steps(edge):
    lines = run(sys.executable, str(ROOT / "examples" / "flap.py"), "127.0.0.1", str(edge["tcp"].port))
    assert [line.removeprefix("phone: ") for line in lines if line.startswith("phone")][-4:] == STORY


def test_the_node_example_prints_its_steps(edge, tmp_path):
    # The program lies beside the modules that it imports, as `npm install mqtt` puts them.
    shutil.copy(ROOT / "examples" / "flap.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(MODULES)
    lines = run("node", str(tmp_path / "flap.mjs"), f"ws://127.0.0.1:{edge['ws'].port}/mqtt")
    assert lines == ["phone: subscribed", "phone: offline", "phone: session present true", "phone: opened", "phone: closed"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.xdist_group("browser")
def test_the_page_connects(edge, tmp_path):
    shutil.copy(ROOT / "examples" / "browser" / "index.html", tmp_path)
    (tmp_path / "node_modules").symlink_to(MODULES)
    serve = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = f"http://127.0.0.1:{server.server_port}/index.html?url=ws://127.0.0.1:{edge['ws'].port}/mqtt"
            flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
            lines = run(chromium(), *flags, "--virtual-time-budget=4000", "--dump-dom", page)
        finally:
            server.shutdown()
            thread.join()
    assert any("connected, new session" in line for line in lines), lines
