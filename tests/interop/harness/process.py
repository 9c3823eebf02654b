"""A child process whose output is read line by line, so that tests wait for events, not for time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ANSI = re.compile(r"\x1b\[[0-9;]*m")
# One factor for every deadline. A slow machine sets it higher; a test that passes never waits for it.
PATIENCE = float(os.environ.get("TIDEGATE_TEST_PATIENCE", "1"))


@dataclass
class Line:
    stream: str
    text: str


class Service:
    """Starts `argv`, keeps its lines, ends it by its own process id."""

    def __init__(self, name: str, argv: list[str], cwd: Path | None = None, env: dict | None = None, stdin: bool = False, log: Path | None = None):
        self.name = name
        self.argv = [str(a) for a in argv]
        self._lines: list[Line] = []
        self._changed = threading.Condition()
        self._open_streams = 2
        self._log = open(log, "a", encoding="utf-8") if log else None
        # If this process is killed, its children end, too.
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.argv],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )
        self._threads = []
        for stream, pipe in (("out", self.process.stdout), ("err", self.process.stderr)):
            thread = threading.Thread(target=self._read, args=(stream, pipe), daemon=True, name=f"{name}-{stream}")
            thread.start()
            self._threads.append(thread)

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, text: str) -> None:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def mark(self) -> int:
        """A place in the output at which a later search can begin."""
        with self._changed:
            return len(self._lines)

    def lines(self, since: int = 0, stream: str | None = None) -> list[str]:
        with self._changed:
            return [line.text for line in self._lines[since:] if stream in (None, line.stream)]

    def text(self, since: int = 0, stream: str | None = None) -> str:
        return "\n".join(self.lines(since, stream))

    def grep(self, pattern: str, since: int = 0, stream: str | None = None) -> list[str]:
        wanted = re.compile(pattern)
        return [line for line in self.lines(since, stream) if wanted.search(line)]

    def wait_lines(self, pattern: str, count: int = 1, timeout: float = 10, since: int = 0) -> list[str]:
        """Waits until at least `count` lines match. Returns all lines that match by then.

        A client can see the effect of an event before the line about it is read here.
        """
        wait_until(f"{count} lines like /{pattern}/ of {self.name}", lambda: len(self.grep(pattern, since)) >= count, timeout)
        return self.grep(pattern, since)

    def wait_line(self, pattern: str, timeout: float = 10, since: int = 0, stream: str | None = None) -> re.Match:
        """Waits for the first line after `since` that matches; fails at once if the process has ended."""
        wanted = re.compile(pattern)
        end = time.monotonic() + timeout * PATIENCE
        at = since
        with self._changed:
            while True:
                while at < len(self._lines):
                    line = self._lines[at]
                    at += 1
                    if stream in (None, line.stream) and (found := wanted.search(line.text)):
                        return found
                left = end - time.monotonic()
                if left <= 0 or self._open_streams == 0:
                    why = "ended" if self._open_streams == 0 else f"said nothing like it in {timeout} s"
                    tail = "\n  ".join(f"{line.stream}: {line.text}" for line in self._lines[since:][-60:])
                    raise AssertionError(f"{self.name} {why}: /{pattern}/\n  {tail}")
                self._changed.wait(left)

    def wait_exit(self, timeout: float = 15) -> int:
        try:
            code = self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end in {timeout} s\n{self.text()[-4000:]}") from None
        for thread in self._threads:
            thread.join(2)
        return code

    def kill(self, number: int) -> None:
        if self.alive():
            os.kill(self.pid, number)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 15) -> int:
        """Ends the process. If it does not end in time, it is killed and the test fails."""
        self.kill(number)
        try:
            return self.wait_exit(timeout)
        except AssertionError:
            self.kill(signal.SIGKILL)
            self.process.wait(10)
            raise
        finally:
            if self._log:
                self._log.flush()

    def end_quietly(self) -> None:
        """Kills the process and its children, for a fixture's tear-down."""
        # The process leads a group of its own. A broker that a script starts outlives the script.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(10)
        for pipe in (self.process.stdin,):
            if pipe:
                try:
                    pipe.close()
                except OSError:
                    pass

    def rss_bytes(self) -> int:
        """Private resident memory in bytes, as the kernel counts it."""
        total = 0
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) * 1024
        return total

    def _read(self, stream: str, pipe) -> None:
        for raw in pipe:
            text = ANSI.sub("", raw.rstrip("\n"))
            with self._changed:
                self._lines.append(Line(stream, text))
                self._changed.notify_all()
            if self._log:
                self._log.write(f"{stream}: {text}\n")
        with self._changed:
            self._open_streams -= 1
            self._changed.notify_all()


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Returns a loopback port that was free a moment ago."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(what: str, check, timeout: float = 10, every: float = 0.02):
    """Polls `check` until it returns a true value, and returns that value."""
    end = time.monotonic() + timeout * PATIENCE
    last = None
    while True:
        try:
            if value := check():
                return value
            last = value
        except (OSError, KeyError) as error:
            last = error
        if time.monotonic() > end:
            raise AssertionError(f"timed out after {timeout} s waiting for {what} (last value: {last!r})")
        time.sleep(every)


def run(argv: list[str], timeout: float = 20, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command to its end, bounded in time."""
    return subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=timeout * PATIENCE, **kwargs)
