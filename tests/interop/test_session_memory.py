"""memory.sessions: client identifiers, wills and subscriptions have an account, in which every address has a share."""

from __future__ import annotations

import pytest

from harness import wire
from harness.names import fresh
from harness.raw import Raw

MIB = 1 << 20
# 15 % of it are for sessions and filters; one address may have five eighths of that.
MEMORY = 64 * MIB
SESSIONS = MEMORY * 15 // 100
FOREVER = 0xFFFFFFFF


def refused(version: int) -> tuple[int, int]:
    """The codes of CONNACK and SUBACK for a full account."""
    return (0x97, 0x97) if version == 5 else (3, 0x80)


@pytest.mark.parametrize("version", (5, 4))
def test_detached_sessions_with_large_wills_and_filters_are_bounded(own_broker, own_edge, version):
    edge = own_edge(own_broker(quiet=True).url, memory={"max": f"{MEMORY}"}, limits={"connect_rate_max": 100_000}).start()
    port, base = edge["tcp"].port, fresh()
    no_session, no_filter = refused(version)
    filters = [f"{'x' * 240}/{n}" for n in range(1000)]
    kept, codes = [], b""
    for n in range(400):
        raw = Raw(port, version=version, timeout=60)
        connack = raw.connect(me := f"{base}-{n}", clean=False, expiry=FOREVER, keep_alive=0, will=(f"{base}/gone", b"w" * 15_000))
        if connack.reason:
            assert connack.reason == no_session, connack
            raw.close()
            break
        kept.append(me)
        if no_filter not in codes:
            codes += raw.subscribe(*((f"{base}/{n}/{f}", 1) for f in filters))
        raw.reset()
    assert no_filter in codes, "no filter was refused"
    assert 5 < len(kept) < 400, f"{len(kept)} sessions with their wills were kept"
    metrics = edge.metrics()
    assert metrics.sum("tidegate_session_bytes") <= SESSIONS * 5 // 8
    assert metrics.sum("tidegate_connects_refused_total", reason="session_memory") == 1
    assert metrics.sum("tidegate_subscribes_refused_total", reason="session_memory") == codes.count(no_filter)
    edge.wait_log(r"WARN.*Connection refused: memory.sessions is used up \(the share of the client's network\)")
    edge.wait_log(r"WARN.*A SUBSCRIBE was refused: memory.sessions is used up")
    # A client that comes back needs no more than it has.
    with Raw(port, version=version) as raw:
        assert raw.connect(kept[0], clean=False, expiry=FOREVER, will=(f"{base}/gone", b"w" * 15_000)).reason == 0
    # Another address has its share.
    with Raw(port, version=version, source="127.0.0.2") as raw:
        assert raw.connect(fresh(), clean=False, expiry=FOREVER, will=(f"{base}/gone", b"w" * 15_000)).reason == 0
        assert raw.subscribe((f"{base}/mine", 1)) == b"\x01"
    # Sessions that end give their bytes back.
    for me in kept:
        with Raw(port, version=version) as raw:
            assert raw.connect(me, clean=True).reason == 0
            raw.send(wire.packet(wire.DISCONNECT))
    edge.wait_metric("the wills are gone", lambda m: m.sum("tidegate_sessions", state="detached") <= 1, 10)
    with Raw(port, version=version) as raw:
        assert raw.connect(fresh(), clean=False, expiry=FOREVER, will=(f"{base}/gone", b"w" * 15_000)).reason == 0
    edge.assert_sane()


def test_one_address_cannot_fill_the_table_of_filters(own_broker, own_edge):
    edge = own_edge(own_broker(quiet=True).url, memory={"max": f"{MEMORY}"}, limits={"connect_rate_max": 100_000}).start()
    port, base = edge["tcp"].port, fresh()
    clients, codes = [], b""
    for n in range(1000):
        raw = Raw(port, timeout=60)
        clients.append(raw)
        if raw.connect(f"{base}-{n}", keep_alive=0).reason:
            break
        codes += raw.subscribe(*((f"{base}/{n}/{m}", 1) for m in range(1000)))
        if codes[-1] == 0x97:
            break
    assert codes[-1] == 0x97, f"{len(codes)} filters of one address are in the table"
    with Raw(port, source="127.0.0.2") as raw:
        assert raw.connect(fresh()).reason == 0
        assert raw.subscribe((f"{base}/mine", 1)) == b"\x01"
    for raw in clients:
        raw.close()
    edge.assert_sane()
