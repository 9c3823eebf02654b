"""Unique names for topics and client ids."""

from __future__ import annotations

import itertools
import os
import re

_serial = itertools.count(1)


def fresh(what: str = "t") -> str:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    test = re.sub(r"\W+", "-", os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0])[:40].strip("-")
    return f"{what}-{worker}-{test}-{next(_serial)}"
