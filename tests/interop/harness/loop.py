"""One asyncio loop in a thread, for the forwarders of a test process."""

from __future__ import annotations

import asyncio
import threading

from .process import PATIENCE

_loop: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True, name="forwarders").start()
        return _loop


def call(coroutine, timeout: float = 15):
    """Runs a coroutine on the loop and waits for it in the caller's thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop()).result(timeout * PATIENCE)
