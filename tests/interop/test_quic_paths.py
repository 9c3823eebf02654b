"""Addresses of QUIC clients: the server validates an address before it sends much there (RFC 9000 sections 8 and 9), and tokens outlive a restart."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from aioquic.tls import Epoch

from harness import wire
from harness.edge import listener
from harness.loop import call
from harness.names import fresh
from harness.phone import Phone, first_flight
from harness.pki import Authority
from harness.process import PATIENCE, free_port, wait_until

# Another network: there the server starts from scratch and allows 3 s for a validation. For another port of the same network it
# keeps its measurements of the path, and a validation takes tenths of a second.
OTHER = "127.0.0.2"
MESSAGES = 20
SIZE = 10_000
DATAGRAM = 1200


class Line:
    """A phone's socket: it counts all datagrams, and the test decides where they go."""

    def __init__(self, phone: Phone, validations=lambda: 1):
        self.under = phone.protocol._transport
        self.sent = self.got = 0
        # Datagrams beyond three times the sent bytes, as (got, sent).
        self.over: list[tuple[int, int]] = []
        self.way = self.out
        phone.protocol._transport = self
        receive = phone.protocol.datagram_received

        def received(raw: bytes, addr) -> None:
            had, sent = self.got, self.sent
            self.got += len(raw)
            receive(raw, addr)
            # The library checks before each datagram whether there is room for one byte of it. If a validation has failed,
            # which takes seconds, it begins to count anew.
            if had >= 3 * sent + DATAGRAM * (validations() - 1):
                self.over.append((had, sent))

        phone.protocol.datagram_received = received

    def sendto(self, raw: bytes, addr=None) -> None:
        self.way(raw, addr)

    def out(self, raw: bytes, addr=None) -> None:
        self.sent += len(raw)
        self.under.sendto(raw, addr)

    def lost(self, raw: bytes, addr=None) -> None:
        pass

    def __getattr__(self, name):
        return getattr(self.under, name)


class Answers:
    """Whether a phone answers PATH_CHALLENGE; the test may keep the answer back."""

    def __init__(self, phone: Phone, keep: bool = False):
        self.phone, self.keep = phone, keep
        self.seen: list[bytes] = []
        answer = phone.quic._write_path_response_frame

        def challenged(builder, challenge: bytes) -> None:
            self.seen.append(challenge)
            if not self.keep:
                answer(builder=builder, challenge=challenge)

        phone.quic._write_path_response_frame = challenged

    def give(self) -> None:
        self.keep = False
        self.phone.do(lambda quic: quic._network_paths[0].remote_challenges.append(self.seen[-1]))


class Elsewhere:
    """A silent address from which somebody forwards a phone's datagrams."""

    def __init__(self, port: int, host: str = OTHER):
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.sock.bind((host, 0))
        self.sock.connect(("127.0.0.1", port))
        self.sent = self.got = self.last = 0

    def send(self, raw: bytes, addr=None) -> None:
        self.sent += self.sock.send(raw)

    def hear(self, patience: float) -> bool:
        """Whether a datagram came."""
        self.sock.settimeout(patience)
        try:
            self.last = len(self.sock.recv(65536))
        except TimeoutError:
            return False
        self.got += self.last
        return True

    def hear_out(self, patience: float) -> None:
        """Waits until no datagram has come for that long."""
        while self.hear(patience):
            pass

    def check(self, more: int = 0) -> None:
        """Asserts that the address got at most three times its sent bytes, `more`, and the rest of the last datagram."""
        assert self.got - self.last < 3 * (self.sent + more), (self.got, self.sent, more)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()


def pass_on(one: Phone, line: Line, via: Elsewhere, raw: bytes, then=None) -> None:
    """Sends the phone's bytes on stream 8 from elsewhere; later datagrams of the phone are lost."""
    before, was = via.sent, line.way

    def once(datagram: bytes, addr) -> None:
        # An acknowledgement may come first.
        if len(datagram) < len(raw):
            return was(datagram, addr)
        line.way = then or line.lost
        via.send(datagram)

    line.way = once
    one.send(8, raw)
    wait_until("it is passed on", lambda: via.sent > before)


def payload(n: int) -> bytes:
    return b"%d:" % n + bytes(SIZE)


def moved(one: Phone, knowing: bool) -> tuple[Line, Answers]:
    """Moves the phone to the other network, and returns its new socket before a datagram is sent there."""

    async def run():
        await one._move(knowing, OTHER)
        answers = Answers(one, keep=True)
        return Line(one, lambda: len(set(answers.seen))), answers

    return call(run())


def publish_all(pub, topic: str) -> None:
    for n in range(MESSAGES):
        pub.publish(topic, payload(n), qos=1)


def all_come_once(one: Phone, pub, topic: str) -> None:
    pub.publish(topic, "end", qos=1)
    got = []
    while not got or got[-1] != b"end":
        packet = one.recv()
        if packet.kind == wire.PUBLISH:
            got.append(packet.payload)
    assert got == [payload(n) for n in range(MESSAGES)] + [b"end"], [p[:10] for p in got]


@pytest.fixture
def phone(edge):
    """A phone with a subscription on the control stream; messages that wait on another stream move there after a second."""
    made = []

    def make(topic: str) -> Phone:
        one = Phone(edge["quic"].port, edge.pki.ca)
        made.append(one)
        one.connect(fresh("id"))
        one.subscribe(0, (topic, 1))
        return one

    yield make
    for one in made:
        one.__exit__()


@pytest.fixture
def elsewhere(edge):
    with Elsewhere(edge["quic"].port) as one:
        yield one


@pytest.mark.parametrize("knowing", (True, False), ids=("move", "rebind"))
def test_a_client_that_moves_gets_little_until_it_has_answered_the_challenge(edge, client, phone, knowing):
    """The client acknowledges datagrams and sends PINGREQ, but only PATH_RESPONSE opens the path for waiting messages."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    line, answers = moved(one, knowing)
    one.send(0, wire.PING)
    wait_until("a challenge", lambda: answers.seen)
    publish_all(pub, topic)
    for _ in range(5):
        one.send(0, wire.PING)
        time.sleep(0.1)
    over, got = list(line.over), line.got
    assert not over and got < MESSAGES * SIZE / 4, (over, got, line.sent)
    answers.give()
    all_come_once(one, pub, topic)


@pytest.mark.parametrize("host", ("127.0.0.1", OTHER))
def test_a_client_that_moves_is_challenged_at_once(edge, client, phone, host):
    """Every change of address is challenged anew; then the client is served."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    answers = Answers(one)
    for _ in range(3):
        before = set(answers.seen)
        one.move(host)
        one.send(0, wire.PING)
        wait_until("another challenge", lambda: set(answers.seen) > before)
        assert one.recv().kind == wire.PINGRESP
    publish_all(pub, topic)
    all_come_once(one, pub, topic)


def unheard(one: Phone, pub, topic: str, pause: float) -> Line:
    """The phone falls silent in the middle of a delivery; the server repeats its datagrams less and less often."""
    line = Line(one)
    line.way = line.lost
    publish_all(pub, topic)
    wait_until("something comes", lambda: line.got)
    time.sleep(pause)
    return line


@pytest.mark.parametrize("host", ("127.0.0.1", OTHER))
def test_a_client_that_moves_after_an_outage_is_served_soon(edge, client, phone, host):
    """The client is served soon, whatever the server was waiting for on the old path, and for however long."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    unheard(one, pub, topic, 0.8)
    began = time.monotonic()
    one.move(host)
    one.send(0, wire.PING)
    all_come_once(one, pub, topic)
    assert time.monotonic() - began < 5 * PATIENCE


def test_an_address_that_never_answers_gets_little_and_the_client_goes_on(edge, client, phone, elsewhere):
    """RFC 9000 sections 9.3.1 and 9.3.2: waiting messages are not sent to an attacker who forwards a client's packets; afterwards they come to the client, once."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    line = Line(one)
    pass_on(one, line, elsewhere, wire.publish(topic + "/none", bytes(800)))
    assert elsewhere.hear(5 * PATIENCE)
    before = line.got
    publish_all(pub, topic)
    for size in (400, 800):
        elsewhere.hear_out(0.2)
        elsewhere.check()
        pass_on(one, line, elsewhere, wire.publish(topic + "/none", bytes(size)))
    elsewhere.hear_out(0.5)
    # The server has given that path up and sends to the client's last address, before the client sends again.
    wait_until("its old address is served", lambda: line.got > before + DATAGRAM)
    line.way = line.out
    one.send(0, wire.PING)
    all_come_once(one, pub, topic)
    elsewhere.hear_out(0.01)
    elsewhere.check()


def test_a_delivery_goes_on_after_a_failed_validation(edge, client, phone):
    """Packets come from another port of the client's own network in the middle of a delivery: the server gives that path up within tenths of a second."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    line = unheard(one, pub, topic, 0)
    with Elsewhere(edge["quic"].port, "127.0.0.1") as near:
        pass_on(one, line, near, wire.publish(topic + "/none", bytes(800)))
        assert near.hear(5 * PATIENCE)
        before = line.got
        near.hear_out(0.2)
        near.check()
        wait_until("its old address is served", lambda: line.got > before + DATAGRAM)
        line.way = line.out
        one.send(0, wire.PING)
        all_come_once(one, pub, topic)
        near.hear_out(0.01)
        near.check()


@pytest.mark.parametrize("host", ("127.0.0.1", OTHER))
def test_a_client_at_its_old_address_is_still_served(edge, client, phone, host):
    """RFC 9000 section 9.3.3: the server challenges the old address, too, and the client's answer from there ends the attack before the validation would fail."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    line, answers = Line(one), Answers(one)
    began = time.monotonic()
    with Elsewhere(edge["quic"].port, host) as other:
        pass_on(one, line, other, wire.publish(topic + "/none", bytes(800)), line.out)
        publish_all(pub, topic)
        all_come_once(one, pub, topic)
        assert answers.seen
        other.hear_out(0.01)
        # Meanwhile the library counts datagrams from the client's address for the new one.
        assert other.got < MESSAGES * SIZE / 4, (other.sent, other.got)
    assert time.monotonic() - began < 3 * PATIENCE


def test_an_answer_from_the_old_address_raises_the_new_ones_limit_little(edge, client, phone, elsewhere):
    """RFC 9000 section 9.3.1 demands that the answer raises no limit; the library counts bytes from any address, and no more than that."""
    topic = fresh()
    one = phone(topic)
    line, answers = Line(one), Answers(one)
    # An acknowledgement with the answer would end the attack.
    wait_until("nothing is left to acknowledge", lambda: one.quic._spaces[Epoch.ONE_RTT].ack_at is None)
    one.quic._ack_delay = 5 * PATIENCE

    def response_only(raw: bytes, addr) -> None:
        if len(raw) == DATAGRAM:
            line.out(raw, addr)

    line.sent = 0
    pass_on(one, line, elsewhere, wire.publish(topic + "/none", bytes(800)), response_only)
    wait_until("it has answered", lambda: answers.seen and line.sent >= DATAGRAM)
    publish_all(client(edge), topic)
    elsewhere.hear_out(0.5)
    elsewhere.check(line.sent)


def test_a_client_that_comes_back_from_an_outage_loses_no_message(edge, client, phone, elsewhere):
    """One packet comes from another network, and its validation fails; then the client is back at its old address, while the library may still wait for the old path."""
    topic = fresh()
    pub = client(edge)
    one = phone(topic)
    line = unheard(one, pub, topic, 0.3)
    pass_on(one, line, elsewhere, wire.publish(topic + "/none", bytes(800)))
    elsewhere.hear_out(3.3)
    elsewhere.check()
    line.way = line.out
    before = line.got
    one.send(0, wire.PING)
    wait_until("it is heard", lambda: line.got > before, 30)
    all_come_once(one, pub, topic)


def test_a_client_without_spare_identifiers_can_move(edge):
    """The client offers no identifiers and has used up the server's: it is served nevertheless, as behind a NAT."""
    one = Phone(edge["quic"].port, edge.pki.ca, wait=False)
    one.quic._replenish_connection_ids = lambda: None
    one.do().wait("the handshake", lambda: one.handshake)
    with one:
        one.connect(fresh("id"))
        for _ in range(3):
            one.do(lambda quic: quic._peer_cid_available.clear())
            one.move()
            one.pinged()
        assert len(one.quic._host_cids) == 1


def peer_of(edge, client_id: str) -> int:
    return int(edge.api(f"/api/v1/sessions/{client_id}")["peer"].rpartition(":")[2])


@pytest.mark.parametrize("how", ("move", "rebind"))
def test_a_moved_client_goes_on_and_is_shown_where_it_is(edge, client, how):
    """With another connection identifier, like a phone that changes networks, and without one, as behind a NAT."""
    topic, me = fresh(), fresh("id")
    watcher, pub = client(edge), client(edge)
    watcher.subscribe(f"{topic}/up")
    before = edge.metrics().sum("tidegate_quic_migrations_total")
    mark = edge.mark()
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(me)
        one.subscribe(4, (f"{topic}/down", 1))
        assert peer_of(edge, me) == one.port
        for n in range(3):
            was = one.port
            pub.publish(f"{topic}/down", f"{n}")
            getattr(one, how)()
            assert one.port != was
            one.send(8, wire.publish(f"{topic}/up", b"%d" % n, 1, 1 + n))
            assert one.recv(8).packet_id == 1 + n
            assert one.recv(4).payload == b"%d" % n
            wait_until("its address is shown", lambda: peer_of(edge, me) == one.port)
            assert watcher.next().text == f"{n}"
        assert edge.metrics().sum("tidegate_quic_migrations_total") == before + 3
        line = edge.wait_log(rf"Client's address changed.*{me}|{me}.*Client's address changed", mark)
        assert "peer=127.0.0.1:" in line
        # The path is validated: the server has challenged it and received the answer.
        one.pinged()
        assert one.closed is None
    edge.wait_log(rf"Connection ended.*{me}.*peer=127.0.0.1:{one.port}|{me}.*peer=127.0.0.1:{one.port}.*Connection ended", mark)


def test_a_silent_address_gets_at_most_three_times_its_bytes(edge):
    """RFC 9000 section 8.1: an attacker who forges a source address can aim no more bytes at it, repetitions after 1 and 3 s included."""
    flight = first_flight(edge["quic"].port, edge.pki.ca)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", edge["quic"].port))
        sent = sum(sock.send(raw) for raw in flight)
        got, last, end = 0, 0, time.monotonic() + 3.3
        while (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                last = len(sock.recv(65536))
                got += last
            except TimeoutError:
                break
    # The library checks before each datagram whether there is room for one byte of it.
    assert 0 < got - last < 3 * sent, (sent, got)


def pressed(edge, held: list[socket.socket]) -> None:
    """Opens unfinished handshakes from another network until the server demands proof of addresses."""

    def asked() -> bool:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.append(sock)
        sock.bind((OTHER, 0))
        for raw in first_flight(edge["quic"].port, edge.pki.ca):
            sock.sendto(raw, ("127.0.0.1", edge["quic"].port))
        return retries(edge) > 0

    wait_until("it is under pressure", asked, every=0.05)


def retries(edge) -> float:
    return edge.metrics().sum("tidegate_quic_retries_total")


def restart(edge, kept: bool) -> None:
    """Restarts the binary as after a crash; its secrets are kept or lost."""
    edge.stop(signal.SIGKILL)
    if not kept:
        text = edge.file.read_text()
        assert 'data_dir = "data"' in text
        edge.file.write_text(text.replace('data_dir = "data"', 'data_dir = "other"'))
    edge.start()


@pytest.fixture
def held():
    made: list[socket.socket] = []
    yield made
    for sock in made:
        sock.close()


def at_a_fixed_port(**more) -> list[dict]:
    return [listener("quic", bind=f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}", **more)]


@pytest.mark.parametrize("kept", (True, False), ids=("kept", "lost"))
def test_the_token_of_a_retry_outlives_a_restart(own_edge, held, kept):
    """RFC 9000 section 17.2.5.2: a client accepts one Retry, so a second one would end the connection. With other secrets a second one comes, which shows that this test can fail."""
    edge = own_edge("embedded:", listeners=at_a_fixed_port(), limits={"handshakes_max": 4}).start()
    pressed(edge, held)
    asked, waiting = [], []
    with Phone(edge["quic"].port, edge.pki.ca, wait=False) as one:
        line, take = Line(one), one.quic._receive_retry_packet

        def told_to_retry(**packet) -> None:
            asked.append(packet["header"].token)
            take(**packet)
            line.way = lambda *datagram: waiting.append(datagram)

        one.quic._receive_retry_packet = told_to_retry
        one.do()
        wait_until("its second Initial", lambda: waiting)
        assert len(asked) == 1 and asked[0] in waiting[0][0]
        restart(edge, kept)
        pressed(edge, held)
        before = retries(edge)
        line.way = line.out
        one.do(lambda _: line.out(*waiting[0]))
        if kept:
            one.wait("the handshake", lambda: one.handshake)
            one.connect(fresh("id"))
            assert (len(asked), retries(edge)) == (1, before)
        else:
            wait_until("another Retry", lambda: len(asked) > 1 and retries(edge) > before)
            assert not one.handshake


def test_the_tokens_of_a_connection_outlive_a_restart_and_are_good_once(tmp_path, own_edge):
    """NEW_TOKEN: a client with a token has proved its address, and so gets more than three times its sent bytes at once."""
    authority = Authority(tmp_path)
    # The certificate takes more than three datagrams.
    leaf = authority.server("edge", dns=("localhost", *(f"{n}.{'long' * 10}.example" for n in range(120))))
    tls = [{"name": "default", "cert": str(leaf.cert), "key": str(leaf.key)}]
    edge = own_edge("embedded:", listeners=at_a_fixed_port(), tls=tls).start()

    def believed(token: bytes) -> bool:
        flight = first_flight(edge["quic"].port, authority.ca, token=token)
        with Elsewhere(edge["quic"].port, "127.0.0.1") as one:
            for raw in flight:
                one.send(raw)
            assert one.hear(5 * PATIENCE)
            while one.got - one.last < 3 * one.sent:
                if not one.hear(0.5 * PATIENCE):
                    return False
            return True

    tokens: list[bytes] = []
    with Phone(edge["quic"].port, authority.ca, wait=False) as one:
        one.quic._token_handler = tokens.append
        one.do()
        wait_until("tokens", lambda: len(tokens) > 1)
    first, second = tokens[:2]
    assert not believed(b"")
    assert believed(first)
    assert not believed(first)
    restart(edge, True)
    assert believed(second)
    restart(edge, False)
    assert not believed(second) and not believed(first)
