"""memory.sessions: client identifiers, wills and subscriptions have an account, in which every address has a share."""

from __future__ import annotations

import pytest

from harness import wire
from harness.names import fresh
from harness.process import PATIENCE, wait_until
from harness.raw import Raw

MIB = 1 << 20
# 15 % of it are for sessions and filters; one address may have five eighths of that.
MEMORY = 64 * MIB
SESSIONS = MEMORY * 15 // 100
FOREVER = 0xFFFFFFFF
# memory.sessions of the tests that fill it with sessions alone.
TABLE = 512 * 1024


def refused(version: int) -> tuple[int, int]:
    """The codes of CONNACK and SUBACK for a full account."""
    return (0x97, 0x97) if version == 5 else (3, 0x80)


@pytest.mark.parametrize("version", (5, 4))
def test_detached_sessions_with_large_wills_and_filters_are_bounded(own_broker, own_edge, version):
    edge = own_edge(own_broker(quiet=True).url, memory={"max": f"{MEMORY}"}, limits={"connect_rate_max": 100_000}).start()
    port, base = edge["tcp"].port, fresh()
    no_session, no_filter = refused(version)
    # As many as one client may have.
    filters = [f"{'x' * 240}/{n}" for n in range(2100)]
    kept, codes = [], b""
    for n in range(400):
        raw = Raw(port, version=version, timeout=60)
        connack = raw.connect(me := f"{base}-{n}", clean=False, expiry=FOREVER, keep_alive=0, will=(f"{base}/gone", b"w" * 15_000))
        if connack.reason:
            assert connack.reason == no_session, connack
            raw.close()
            break
        kept.append(me)
        # The later ones have more, so that a filter is refused before a session.
        if no_filter not in codes:
            codes += raw.subscribe(*((f"{base}/{n}/{f}", 1) for f in filters[: 950 if n < 6 else 2100]))
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


def fill(edge, base: str, version: int) -> list[str]:
    """Clients from many addresses connect and go, until one gets no session that is kept. Returns the others."""
    kept = []
    while True:
        # An address of its own for each, so that no share is used up before the whole is.
        source = f"127.1.{len(kept) // 250}.{len(kept) % 250 + 1}"
        raw = Raw(edge["tcp"].port, version=version, source=source)
        connack = raw.connect(me := f"{base}-{len(kept):05}", clean=False, expiry=FOREVER)
        raw.close()
        if connack.reason:
            assert connack.reason == refused(version)[0], connack
            return kept
        kept.append(me)
        assert len(kept) < 5000, "sessions are in no account"


@pytest.mark.parametrize("version", (5, 4))
def test_the_last_tenth_is_not_for_new_sessions_that_are_kept(own_broker, own_edge, client, version):
    edge = own_edge(own_broker(quiet=True).url, memory={"sessions": f"{TABLE}"}, limits={"connect_rate_max": 100_000}).start()
    base, end = fresh(), {"expiry": 0} if version == 5 else {}
    kept = fill(edge, base, version)
    metrics = edge.metrics()
    assert TABLE * 0.88 < metrics.sum("tidegate_session_bytes") <= TABLE * 0.9
    assert metrics.sum("tidegate_memory_budget_bytes", account="sessions") == TABLE
    assert metrics.sum("tidegate_connects_refused_total", reason="session_memory") == 1
    edge.wait_log(r"WARN.*Connection refused: memory.sessions is used up \(all of it\) to nine tenths, and no further session is kept")
    # Clients that come back get their sessions, with Clean Start too, and may subscribe.
    back = client(edge, client_id=kept[7], clean=False, version=version, **({"expiry": 300} if version == 5 else {}))
    assert back.session_present
    back.subscribe(f"{base}/news")
    with Raw(edge["tcp"].port, version=version) as raw:
        assert raw.connect(kept[8], clean=version == 5, expiry=FOREVER).reason == 0
    # Sessions that end with their connection still find room.
    passing = client(edge, clean=True, version=version, **end)
    passing.publish(f"{base}/news", "hello", 1)
    assert back.next().text == "hello"
    # Until the account is full.
    raws, codes = [], set()
    while not codes:
        raws.append(Raw(edge["tcp"].port, version=version, source=f"127.2.0.{len(raws) % 250 + 1}"))
        connack = raws[-1].connect(f"{base}-passing-{len(raws)}", clean=True, expiry=0)
        codes |= {connack.reason} - {0}
    assert codes == {refused(version)[0]} and len(raws) > 20
    edge.wait_log(r"WARN.*Connection refused: memory.sessions is used up \(all of it\): raise it")
    again = client(edge, client_id=kept[9], clean=False, version=version, **({"expiry": 300} if version == 5 else {}))
    assert again.session_present
    for raw in raws:
        raw.close()
    edge.assert_sane()


@pytest.mark.parametrize("version", (5, 4))
def test_the_least_recently_connected_session_ends_for_a_new_one(own_broker, own_edge, client, version):
    # Longer than it takes to fill so small a table.
    table, after = 128 * 1024, 5 * PATIENCE
    sections = {"memory": {"sessions": f"{table}"}, "session": {"evict_after": f"{after:.0f}s"}, "limits": {"connect_rate_max": 100_000}}
    edge = own_edge(own_broker(quiet=True).url, **sections).start()
    port, base, how = edge["tcp"].port, fresh(), {"expiry": 300} if version == 5 else {}
    here = client(edge, client_id=f"{base}-here", clean=False, version=version, **how)
    again, first = f"{base}-again", f"{base}-first"
    for n, me in enumerate((again, first)):
        with Raw(port, version=version) as raw:
            assert raw.connect(me, clean=False, expiry=FOREVER).reason == 0
        edge.wait_metric("it is away", lambda m: m.sum("tidegate_sessions", state="detached") == n + 1)
    kept = fill(edge, base, version)
    # One client is back for a moment, and so is not the one that has been away longest.
    with Raw(port, version=version) as raw:
        assert raw.connect(again, clean=False, expiry=FOREVER).body[0] & 1 == 1
    # A CONNECT that is refused changes nothing. One finds room as soon as the first session may end.
    def newer():
        with Raw(port, version=version) as raw:
            connack = raw.connect(f"{base}-newer", clean=False, expiry=FOREVER)
        assert connack.reason in (0, refused(version)[0]), connack
        return connack if connack.reason == 0 else None

    connack = wait_until("a session ends for the new client", newer, 5 + 30, 0.1)
    assert connack.body[0] & 1 == 0
    status = {me: edge.http(f"/api/v1/sessions/{me}")[0] for me in (again, first, kept[0], kept[-1])}
    assert status == {again: 200, first: 404, kept[0]: 200, kept[-1]: 200}
    metrics = edge.metrics()
    assert metrics.sum("tidegate_sessions_ended_total", reason="memory") == 1
    assert metrics.sum("tidegate_session_bytes") <= table * 0.9
    edge.wait_log(r"WARN.*A session was ended for others: memory.sessions is used up to nine tenths")
    assert edge.http(f"/api/v1/sessions/{base}-here")[0] == 200 and not here.ended.is_set()
    edge.assert_sane()
