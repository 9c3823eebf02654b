"""RFC 6455 case by case, in the order and by the numbers of Autobahn's fuzzing client, as far as they mean something to binary messages.

A message is judged by what is in it: a PUBLISH of exactly that many bytes, which comes back. What Autobahn asks of text is asked of its refusal
[MQTT-6.0.0-1]; where Autobahn is stricter than the RFC (2.10: each of many pings answered) the RFC holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import pytest

from harness import wire
from harness.names import fresh
from harness.rfc6455 import BINARY, CLOSE, CONTINUE, PING, PONG, TEXT, Peer, close, fragments, frame, watch

KIB = 1024


class Say:
    """Packets that can be distinguished when they come back."""

    def __init__(self, topic: str):
        self.topic = topic
        self.sent: list[bytes] = []

    def __call__(self, size: int = 100) -> bytes:
        """A PUBLISH of `size` bytes."""
        bare = len(wire.publish(self.topic))
        payload = size - bare
        while len(wire.publish(self.topic, b"x" * payload)) > size:
            payload -= 1
        mark = len(self.sent)
        made = bytes((mark + n * 7 + n // 251) & 0xFF for n in range(payload))
        packet = wire.publish(self.topic, made)
        assert len(packet) == size, (len(packet), size)
        self.sent.append(made)
        return packet

    def behind(self) -> bytes:
        """A message that must never come back."""
        return frame(BINARY, wire.publish(self.topic, b"behind the end"))


@dataclass
class Case:
    section: str
    steps: Callable[[Say], list[bytes]]
    pongs: tuple[bytes, ...] = ()
    """Payloads that must come back in order; other payloads may come before them."""
    code: int = 0
    """The expected close code; 0 means no fault, and everything sent comes back."""
    chop: int = 0


CASES: dict[str, Case] = {}


def good(number: str, section: str, steps: Callable[[Say], list[bytes]], *pongs: bytes, chop: int = 0) -> None:
    assert number not in CASES
    CASES[number] = Case(section, steps, pongs, 0, chop)


def bad(number: str, section: str, steps: Callable[[Say], list[bytes]], code: int = 1002, chop: int = 0) -> None:
    assert number not in CASES
    CASES[number] = Case(section, lambda say: [*steps(say), say.behind()], (), code, chop)


# 1 Framing: text is refused, binary comes through at every size with another form of header.
for n, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), 1):
    bad(f"1.1.{n}", "5.6, [MQTT-6.0.0-1]", lambda say, size=size: [frame(TEXT, b"*" * size)], 1003)
good("1.2.1", "5.6", lambda say: [frame(BINARY, b"")])
for n, size in enumerate((125, 126, 127, 128, 65535, 65536), 2):
    good(f"1.2.{n}", "5.2", lambda say, size=size: [frame(BINARY, say(size))])
good("1.2.8", "5.2", lambda say: [frame(BINARY, say(65536))], chop=997)
good("1.2.9 two packets share a message, [MQTT-6.0.0-2]", "5.4", lambda say: [frame(BINARY, say(200) + say(300))])
good("1.2.10 a packet straddles messages, [MQTT-6.0.0-2]", "5.4", lambda say: [frame(BINARY, (p := say(300))[:1]), frame(BINARY, p[1:150]), frame(BINARY), frame(BINARY, p[150:])])
bad("1.3.1 not masked", "5.1", lambda say: [frame(BINARY, say(), masked=False)])
bad("1.3.2 a control frame not masked", "5.1", lambda say: [frame(PING, b"x", masked=False)])
bad("1.3.3 a length of 2^63", "5.2", lambda say: [frame(BINARY, b"x", length=1 << 63)], 1009)

# 2 Pings and pongs.
good("2.1", "5.5.2", lambda say: [frame(PING)], b"")
good("2.2", "5.5.2", lambda say: [frame(PING, b"Hello, world!")], b"Hello, world!")
good("2.3", "5.5.2", lambda say: [frame(PING, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")], b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")
good("2.4", "5.5", lambda say: [frame(PING, b"\xfe" * 125)], b"\xfe" * 125)
bad("2.5", "5.5", lambda say: [frame(PING, b"\xfe" * 126)])
good("2.6", "5.5", lambda say: [frame(PING, b"\xfe" * 125)], b"\xfe" * 125, chop=1)
good("2.7", "5.5.3", lambda say: [frame(PONG)])
good("2.8", "5.5.3", lambda say: [frame(PONG, b"unsolicited")])
good("2.9", "5.5.3", lambda say: [frame(PONG, b"unsolicited"), frame(PING, b"and a ping")], b"and a ping")
good("2.10", "5.5.3", lambda say: [b"".join(frame(PING, f"ping {n}".encode()) for n in range(10))], b"ping 9")
good("2.11", "5.5.3", lambda say: [b"".join(frame(PING, f"ping {n}".encode()) for n in range(10))], b"ping 9", chop=1)

# 3 Reserved bits, without an extension.
bad("3.1", "5.2", lambda say: [frame(BINARY, say(), rsv=1)])
bad("3.2", "5.2", lambda say: [frame(BINARY, say()), frame(BINARY, say(), rsv=2), frame(PING)])
bad("3.3", "5.2", lambda say: [frame(BINARY, say()) + frame(BINARY, say(), rsv=3) + frame(PING)])
bad("3.4", "5.2", lambda say: [frame(BINARY, say()) + frame(BINARY, say(), rsv=4) + frame(PING)], chop=1)
bad("3.5", "5.2", lambda say: [frame(BINARY, say(), rsv=5)])
bad("3.6", "5.2", lambda say: [frame(PING, b"x", rsv=6)])
bad("3.7", "5.2", lambda say: [frame(CLOSE, b"\x03\xe8", rsv=7)])

# 4 Opcodes: reserved ones, of data and of control.
for group, opcodes in (("4.1", range(3, 8)), ("4.2", range(11, 16))):
    shapes = (
        lambda say, op: [frame(op)],
        lambda say, op: [frame(op, b"reserved payload")],
        lambda say, op: [frame(BINARY, say()), frame(op), frame(PING)],
        lambda say, op: [frame(BINARY, say()), frame(op, b"reserved payload"), frame(PING)],
        lambda say, op: [frame(BINARY, say()) + frame(op, b"reserved payload") + frame(PING)],
    )
    for n, (op, shape) in enumerate(zip(opcodes, shapes), 1):
        bad(f"{group}.{n}", "5.2", lambda say, op=op, shape=shape: shape(say, op), chop=1 if n == 5 else 0)

# 5 Fragmentation.
bad("5.1", "5.5", lambda say: [frame(PING, b"frag", fin=False) + frame(CONTINUE, b"ment")])
bad("5.2", "5.5", lambda say: [frame(PONG, b"frag", fin=False) + frame(CONTINUE, b"ment")])
good("5.3", "5.4", lambda say: [b"".join(fragments(say(), 50))])
good("5.4", "5.4", lambda say: fragments(say(), 50))
good("5.5", "5.4", lambda say: fragments(say(), 50), chop=1)
good("5.6", "5.4", lambda say: [b"".join(fragments(say(), 50, frame(PING, b"between")))], b"between")
good("5.7", "5.4", lambda say: fragments(say(), 50, frame(PING, b"between")), b"between")
good("5.8", "5.4", lambda say: fragments(say(), 50, frame(PING, b"between")), b"between", chop=1)
for n, (fin, chop) in enumerate(((True, 0), (True, 1), (False, 0), (False, 1)), 9):
    bad(f"5.{n}", "5.4", lambda say, fin=fin: [frame(CONTINUE, b"of nothing", fin=fin) + frame(BINARY, say())], chop=chop)
for n, parts in enumerate(((True,), (False,), (False, True)), 15):
    bad(f"5.{n}", "5.4", lambda say, parts=parts: [*fragments(say(), 50), *(frame(CONTINUE, b"of nothing", fin=fin) for fin in parts), frame(BINARY, say())])
bad("5.18", "5.4", lambda say: [frame(BINARY, say()[:50], fin=False), frame(BINARY, say())])
good("5.19", "5.4", lambda say: fragments(say(500), 100, frame(PING, b"one") + frame(PONG) + frame(PING, b"two")), b"two")
good("5.20", "5.4", lambda say: fragments(say(500), 100, frame(PING, b"one") + frame(PING, b"two")), b"two", chop=1)
good("5.21 empty fragments", "5.4", lambda say: [frame(BINARY, fin=False), frame(CONTINUE, fin=False), frame(CONTINUE, say(), fin=False), frame(CONTINUE)])

# 6 UTF-8: text of any kind is refused by its first header, and close reasons are judged (7.5).
for number, text in (("6.1.1", b""), ("6.2.1", "Hello-µ@ßöäüàá-UTF-8!!".encode()), ("6.3.1", b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited"), ("6.4.1", b"\xce\xba\xf4\x90\x80\x80")):
    bad(number, "5.6, [MQTT-6.0.0-1]", lambda say, text=text: [frame(TEXT, text)], 1003)
bad("6.1.2", "5.6, [MQTT-6.0.0-1]", lambda say: [frame(TEXT, fin=False), frame(CONTINUE, fin=False), frame(CONTINUE)], 1003)
bad("6.4.2", "5.6, [MQTT-6.0.0-1]", lambda say: [frame(TEXT, b"\xce\xba\xf4", fin=False) + frame(CONTINUE, b"\x90\x80")], 1003, chop=1)
bad("6.9.1 text inside a binary message", "5.4", lambda say: [frame(BINARY, say()[:50], fin=False), frame(TEXT, b"x")])

# 7 Close: the code comes back, and bytes behind the close frame are ignored.
bad("7.1.2", "5.5.1", lambda say: [close(1000) + close(1001)], 1000)
bad("7.1.3", "5.5.1", lambda say: [close(1000) + frame(PING, b"too late")], 1000)
bad("7.1.4", "5.5.1", lambda say: [close(1000) + frame(TEXT, b"too late")], 1000)
bad("7.1.5", "5.5.1", lambda say: [frame(BINARY, say()[:50], fin=False), close(1000), frame(CONTINUE, b"too late")], 1000)
bad("7.1.6", "5.5.1", lambda say: [frame(BINARY, say(256 * KIB)), close(1000) + frame(PING)], 1000)
bad("7.3.1", "5.5.1", lambda say: [frame(CLOSE)], 1005)
bad("7.3.2", "5.5.1", lambda say: [frame(CLOSE, b"a")])
bad("7.3.3", "5.5.1", lambda say: [close(1000)], 1000)
bad("7.3.4", "5.5.1", lambda say: [close(1000, b"Hello World!")], 1000)
bad("7.3.5", "5.5", lambda say: [close(1000, b"*" * 123)], 1000)
bad("7.3.6", "5.5", lambda say: [close(1000, b"*" * 124)])
bad("7.3.7 in pieces", "5.5.1", lambda say: [close(1000, b"Hello World!")], 1000, chop=1)
bad("7.5.1", "5.5.1, 8.1", lambda say: [close(1000, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited")], 1007)
for n, code in enumerate((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999), 1):
    bad(f"7.7.{n}", "7.4", lambda say, code=code: [close(code)], code)
for n, code in enumerate((0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535), 1):
    bad(f"7.9.{n}", "7.4", lambda say, code=code: [close(code)])
    bad(f"7.9.{n} with a reason", "7.4", lambda say, code=code: [close(code, b"why")])

# 9 Limits, at small scale: sizes, sizes of fragments, sizes of writes, many messages, many pings; the limit itself.
for n, size in enumerate((64, 256, 1023), 1):
    good(f"9.2.{n}", "5.2", lambda say, size=size: [frame(BINARY, say(size * KIB))])
for n, size in enumerate((64, 256, 1024, 16 * KIB, 64 * KIB), 1):
    good(f"9.4.{n}", "5.4", lambda say, size=size: [b"".join(fragments(say(64 * KIB), size))])
for n, size in enumerate((64, 997, 4096), 1):
    good(f"9.6.{n}", "5.2", lambda say: [frame(BINARY, say(64 * KIB))], chop=size)
for n, size in enumerate((64, 1024), 1):
    good(f"9.8.{n}", "5.2", lambda say, size=size: [b"".join(frame(BINARY, say(size)) for _ in range(32))])
good("9.9.1 many pings between many messages", "5.5.3", lambda say: [b"".join(frame(BINARY, say(64)) + frame(PING, b"%d" % n) for n in range(64))], b"63")
bad("9.10.1 a message over the limit", "7.4.1", lambda say: [frame(BINARY, b"", length=(1024 + 64) * KIB + 1)], 1009)
bad("9.10.2 fragments over the limit", "7.4.1", lambda say: [frame(BINARY, b"\x32", fin=False), *(frame(CONTINUE, b"", fin=False) for _ in range(10)), frame(CONTINUE, b"", length=(1024 + 64) * KIB)], 1009)

# 10 Fragmentation by other frames in between.
good("10.1.1", "5.4", lambda say: fragments(say(64 * KIB), 1300))


@pytest.mark.parametrize("number", CASES)
def test_a_case_of_autobahn_passes(edge, number):
    case = CASES[number]
    with Peer(edge["ws"].port) as peer:
        say = Say(connect(peer))
        for step in case.steps(say):
            peer.send(step, case.chop)
        if case.code:
            outcome = watch(peer, lambda o: False)
            assert outcome.code == case.code, (case.section, outcome)
            # Packets before the end may come back, packets behind it may not.
            assert outcome.payloads == say.sent[: len(outcome.payloads)], case.section
            return
        outcome = watch(peer, lambda o: o.payloads == say.sent and o.pongs[-1:] == list(case.pongs[-1:]))
        assert outcome.close is None, (case.section, outcome)
        assert outcome.payloads == say.sent
        assert [p for p in outcome.pongs if p not in case.pongs and not p.startswith((b"ping ", b"one")) and not p.isdigit()] == []
        # The connection still works and ends in order.
        peer.send(frame(BINARY, wire.PING))
        assert watch(peer, lambda o: o.packets).packets[0].kind == wire.PINGRESP
        peer.send(close(1000))
        end = watch(peer, lambda o: False)
        assert (end.code, end.packets, end.pongs) == (1000, [], [])


def connect(peer: Peer) -> str:
    """Connects and subscribes; returns the topic."""
    topic = f"rfc/{fresh()}"
    peer.send(frame(BINARY, wire.connect(fresh("ws"))))
    assert watch(peer, lambda o: o.packets).packets[0].reason == 0
    peer.send(frame(BINARY, wire.subscribe(1, (topic, 0))))
    assert watch(peer, lambda o: o.packets).packets[0].kind == wire.SUBACK
    return topic


# 12, 13 Compression: whatever is offered, nothing is accepted, and a compressed frame is one with a reserved bit.
OFFERS = [
    "permessage-deflate",
    "permessage-deflate; client_max_window_bits",
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=9",
    "permessage-deflate; client_max_window_bits=15, permessage-deflate",
    "x-webkit-deflate-frame, permessage-bzip2",
]


@pytest.mark.parametrize("number", range(len(OFFERS)))
def test_12_and_13_compression_is_not_accepted(edge, number):
    with Peer(edge["ws"].port, f"Sec-WebSocket-Extensions: {OFFERS[number]}\r\n") as peer:
        assert "sec-websocket-extensions" not in peer.answer
        connect(peer)
        peer.send(frame(BINARY, b"\x6a\x05\x00", rsv=4))
        assert watch(peer, lambda o: False).code == 1002
