"""Test certificates, made by openssl, so that Tidegate's own code does not judge itself."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Pki:
    ca: Path
    cert: Path
    key: Path


def make(directory: Path, name: str = "edge", names: str = "DNS:localhost,IP:127.0.0.1", days: str = "30") -> Pki:
    """A certificate authority and one server certificate signed by it."""
    directory.mkdir(parents=True, exist_ok=True)
    ca_key, ca, key, request, cert = (directory / f for f in ("ca.key", "ca.pem", f"{name}.key", f"{name}.csr", f"{name}.pem"))
    extensions = directory / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n")
    ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    steps = [
        ["req", "-x509", *ec, "-keyout", ca_key, "-out", ca, "-days", "30", "-subj", f"/CN=Test CA of {name}",
         "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
        ["req", "-new", *ec, "-keyout", key, "-out", request, "-subj", f"/CN={name}"],
        ["x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-out", cert, "-days", days, "-extfile", extensions],
    ]
    for step in steps:
        subprocess.run(["openssl", *map(str, step)], check=True, capture_output=True)
    return Pki(ca, cert, key)
