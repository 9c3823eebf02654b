"""Certificates by name, client certificates, tickets, and reloading while Tidegate runs; OpenSSL and aioquic are the clients."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time

import pytest

from harness.certs import Pki
from harness.edge import BINARY, Edge, config, listener, toml
from harness.names import fresh
from harness.pki import Authority, put
from harness.process import PATIENCE, run, wait_until
from harness.secure import Refused, way_in

TRANSPORTS = ("tls", "wss", "quic")
RELOADS = "tidegate_tls_reloads_total"
FAILED = "tidegate_handshakes_failed_total"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def servers(home):
    return Authority(home, "servers")


@pytest.fixture(scope="module")
def people(home):
    """Issues client certificates."""
    return Authority(home, "people")


@pytest.fixture(scope="module")
def leaves(people):
    known = {name: people.client(name) for name in ("device7", "late", "stolen", "anonymous", "alice")}
    known["late"] = people.client("late", start=-9, days=-1)
    return known | {
        "spiffe": people.client("spiffe", cn="", uris=("spiffe://fleet/one",)),
        "untrusted": Authority(people.directory, "others").client("untrusted"),
    }


@pytest.fixture(scope="module")
def secure(home, servers, people, leaves, broker):
    """Listeners by their demand: `tls`, `wss`, `quic` demand no certificate, `mtls-*` demand one; then `maybe`, `both`, `uri`."""
    names = [servers.server("default"), servers.server("a", dns=("a.example",)), servers.server("wide", dns=("*.example",)), servers.server("rsa", kind="rsa")]
    put(home / "people.crl", people.crl(leaves["stolen"]))
    users = home / "users"
    assert run([BINARY, "passwd", users, "alice"], input="wonder\n").returncode == 0
    asks = {"client_ca": people.ca, "crl": [home / "people.crl"]}
    entries = [{"name": leaf.cert.stem, "cert": leaf.cert, "key": leaf.key} for leaf in names]
    entries += [
        entries[0] | {"name": "required", "key_log": home / "keys.log"} | asks,
        entries[0] | {"name": "optional", "client_auth": "optional"} | asks,
        entries[0] | {"name": "uri", "identity": "san_uri"} | asks,
    ]
    everyone = [e["name"] for e in entries[:4]]
    table = config(
        broker.url,
        servers.pki(names[0]),
        tls=entries,
        listeners=[listener(t, tls=everyone) for t in TRANSPORTS]
        + [listener(t, f"mtls-{t}", tls="required", auth="mtls") for t in TRANSPORTS]
        + [listener("tls", "maybe", tls="optional", auth="mtls"), listener("tls", "both", tls="required", auth="file"), listener("tls", "uri", tls="uri", auth="mtls")],
        auth={"file": users, "acl": "rules"},
        acl=[{"who": "*", "allow": ["publish", "subscribe"], "topics": ["own/%u/#"]}],
    )
    edge = Edge(home / "edge", table, servers.pki(names[0])).start()
    yield edge
    edge.assert_sane()
    edge.close()


@pytest.fixture
def reach(secure):
    """`reach("tls", leaf, "listener")`: a new client of a listener."""

    def make(transport: str, leaf=None, name: str | None = None, **kwargs):
        return way_in(transport, secure[name or transport].port, secure.pki.ca, leaf, **kwargs)

    return make


def logged(edge: Edge, pattern: str, attempt) -> str:
    """The log line of an attempt; lines about refusals are limited in rate, so the attempt is repeated."""
    for _ in range(20):
        since = edge.mark()
        assert attempt()
        try:
            return edge.wait_log(pattern, since, 0.5)
        except AssertionError:
            continue
    raise AssertionError(f"never logged: {pattern}")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_name_selects_its_certificate(reach, transport):
    for name, expected in [("a.example", "a"), ("B.example", "wide"), ("localhost", "default"), ("unknown.test", "default"), ("x.a.example", "default")]:
        one = reach(transport)
        one.name = name
        visit = one.visit(fresh("id"))
        assert visit.server == expected, name
        visit.close()


def test_an_rsa_client_gets_the_rsa_certificate(secure):
    for algorithms, expected in [("ECDSA+SHA256:RSA-PSS+SHA256", "CN = default"), ("RSA-PSS+SHA256", "CN = rsa")]:
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{secure['tls'].port}", "-CAfile", secure.pki.ca, "-verify_return_error", "-tls1_3", "-sigalgs", algorithms],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
        )
        assert f"subject={expected}" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------- client certificates


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_client_certificate_names_the_principal(secure, reach, leaves, transport):
    me = fresh("id")
    visit = reach(transport, leaves["device7"], f"mtls-{transport}").visit(me, user="somebody else")
    assert secure.api(f"/api/v1/sessions/{me}")["principal"] == "device7"
    visit.close()


def test_acl_rules_apply_to_the_certificates_name(secure, client, leaves):
    """The client is paho, which is independent of this harness."""
    for name, transport in (("mtls-tls", "tls"), ("mtls-wss", "wss")):
        one = client(secure, transport, name=name, connect=False)
        one.client._ssl_context.load_cert_chain(leaves["device7"].cert, leaves["device7"].key)
        one.connect()
        one.subscribe("own/device7/#")
        one.subscribe("own/other/#", expect=[0x87])
        one.publish("own/device7/a", "x")
        assert one.next().text == "x"


REFUSED = [
    (None, "certificate_required", "missing"),
    ("late", "certificate_expired", "expired"),
    ("stolen", "certificate_revoked", "revoked"),
    ("untrusted", "unknown_ca", "untrusted"),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("who,alert,label", REFUSED)
def test_a_client_without_a_good_certificate_is_refused(secure, reach, leaves, transport, who, alert, label):
    name = f"mtls-{transport}"
    before = secure.metrics().sum(FAILED, reason=f"^client_certificate_{label}$")

    def attempt() -> bool:
        with pytest.raises(Refused) as refused:
            reach(transport, leaves.get(who), name).visit(fresh("id"))
        return refused.value.alert == alert

    logged(secure, rf"Handshake failed.*{name}.*127.0.0.1:.*client_certificate_{label}", attempt)
    assert secure.metrics().sum(FAILED, reason=f"^client_certificate_{label}$") > before


def test_tls_1_2_refuses_within_the_handshake(reach, leaves):
    for who, alert in [("late", "certificate_expired"), ("stolen", "certificate_revoked"), ("untrusted", "unknown_ca")]:
        with pytest.raises(Refused) as refused:
            reach("tls", leaves[who], "mtls-tls", version=ssl.TLSVersion.TLSv1_2).visit(fresh("id"))
        assert refused.value.alert == alert
    assert reach("tls", leaves["device7"], "mtls-tls", version=ssl.TLSVersion.TLSv1_2).visit(fresh("id")).connack.reason == 0


def test_a_client_certificate_may_be_optional(secure, reach, leaves):
    nobody = reach("tls", None, "maybe")
    logged(secure, "Connection refused.*the client gave no certificate", lambda: nobody.visit(fresh("id")).connack.reason == 0x87)
    assert reach("tls", leaves["device7"], "maybe").visit(fresh("id")).connack.reason == 0
    with pytest.raises(Refused):
        reach("tls", leaves["stolen"], "maybe").visit(fresh("id"))


def test_a_listener_may_demand_a_certificate_and_a_password(secure, reach, leaves):
    me = fresh("id")
    right = {"user": "alice", "password": b"wonder"}
    visit = reach("tls", leaves["device7"], "both").visit(me, **right)
    assert visit.connack.reason == 0 and secure.api(f"/api/v1/sessions/{me}")["principal"] == "alice"
    assert reach("tls", leaves["device7"], "both").visit(fresh("id"), user="alice", password=b"no").connack.reason == 0x86
    with pytest.raises(Refused):
        reach("tls", None, "both").visit(fresh("id"), **right)


def test_a_user_and_a_certificate_of_one_name_are_two_principals(secure, reach, leaves):
    """A user of the password file is called alice as well. Neither gets the other's session or topics."""
    me, topic = fresh("id"), fresh("t")
    user = reach("tls", leaves["device7"], "both").visit(me, user="alice", password=b"wonder", clean=False, expiry=300)
    assert user.connack.reason == 0
    for transport in ("mtls-tls", "mtls-wss", "mtls-quic"):
        assert reach(transport.removeprefix("mtls-"), leaves["alice"], transport).visit(me, clean=False).connack.reason == 0x85
    mine = secure.api(f"/api/v1/sessions/{me}")
    assert mine["principal"] == "alice" and not mine["by_certificate"]
    other = fresh("id")
    visit = reach("tls", leaves["alice"], "mtls-tls").visit(other)
    assert visit.connack.reason == 0
    theirs = secure.api(f"/api/v1/sessions/{other}")
    assert theirs["principal"] == "alice" and theirs["by_certificate"]


def test_other_fields_of_a_certificate_may_name_the_principal(secure, reach, leaves):
    me = fresh("id")
    visit = reach("tls", leaves["spiffe"], "uri").visit(me)
    assert visit.connack.reason == 0 and secure.api(f"/api/v1/sessions/{me}")["principal"] == "spiffe://fleet/one"
    visit.close()
    # Certificates without a URI, without a common name, and with an unknown name.
    for who, name, why in [("device7", "uri", "no URI"), ("spiffe", "mtls-tls", "no common name"), ("anonymous", "mtls-tls", "stands for")]:
        to = reach("tls", leaves[who], name)
        logged(secure, f"Connection refused.*{why}", lambda: to.visit(fresh("id")).connack.reason == 0x87)


# ---------------------------------------------------------------- resumption


@pytest.mark.parametrize("version", (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_handshake_is_resumed(secure, reach, leaves, transport, version):
    if transport == "quic" and version is ssl.TLSVersion.TLSv1_2:
        return  # QUIC is TLS 1.3
    for leaf, name in ((None, transport), (leaves["device7"], f"mtls-{transport}")):
        to = reach(transport, leaf, name, version=version)
        first = to.visit(fresh("id"))
        assert not first.resumed and first.ticket is not None
        me = fresh("id")
        again = to.visit(me, first.ticket)
        assert again.resumed
        # The ticket names the principal.
        assert secure.api(f"/api/v1/sessions/{me}")["principal"] == ("device7" if leaf else "anonymous")
        first.close(), again.close()


def test_early_data_is_not_offered(secure, reach):
    assert reach("quic").visit(fresh("id")).ticket.max_early_data_size is None
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{secure['tls'].port}", "-CAfile", secure.pki.ca, "-tls1_3"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
    )
    assert "Early data was not sent" in done.stdout


def test_a_ticket_is_good_no_longer_than_its_certificate(reach, people):
    leaf = people.client("brief", days=3 * PATIENCE / 86400)
    to = {t: reach(t, leaf, f"mtls-{t}") for t in TRANSPORTS}
    tickets = {t: one.visit(fresh("id")).ticket for t, one in to.items()}
    for transport, one in to.items():
        assert one.visit(fresh("id"), tickets[transport]).resumed
    # The test must wait for the clock itself.
    time.sleep(max(0.0, leaf.not_after + 1.1 - time.time()))
    for transport, one in to.items():
        with pytest.raises(Refused):
            one.visit(fresh("id"), tickets[transport])


# ---------------------------------------------------------------- key log


def secrets(text: str) -> set[str]:
    return {line for line in text.splitlines() if "TRAFFIC_SECRET_0" in line}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_key_log_equals_the_clients_keys(secure, reach, leaves, home, tmp_path, transport):
    mine = tmp_path / "mine.log"
    reach(transport, leaves["device7"], f"mtls-{transport}", keys=mine).visit(fresh("id")).close()
    wanted = secrets(mine.read_text())
    assert len(wanted) >= 2
    wait_until("the same lines", lambda: wanted <= secrets((home / "keys.log").read_text()))
    assert (home / "keys.log").stat().st_mode & 0o077 == 0
    secure.wait_log("WARN.*key_log is on.*required")


def test_an_environment_variable_alone_logs_no_keys(tmp_path, broker, servers):
    server = servers.server("plain")
    edge = Edge(tmp_path / "edge", config(broker.url, servers.pki(server), TRANSPORTS), servers.pki(server))
    edge.start(env={"SSLKEYLOGFILE": str(tmp_path / "keys.log")})
    for transport in TRANSPORTS:
        way_in(transport, edge[transport].port, servers.ca).visit(fresh("id")).close()
    assert edge.stop() == 0
    assert not (tmp_path / "keys.log").exists()


# ---------------------------------------------------------------- read again


class Renewed:
    """A binary whose files a test may change: one certificate, one authority, one revocation list."""

    def __init__(self, directory, broker, servers: Authority):
        self.directory, self.servers = directory, servers
        directory.mkdir()
        self.people = Authority(directory, "people")
        self.one, self.two = self.people.client("one"), self.people.client("two")
        self.cert, self.key, self.crl = (directory / f for f in ("edge.pem", "edge.key", "people.crl"))
        self.serve("first")
        put(self.crl, self.people.crl())
        tls = {"name": "default", "cert": self.cert, "key": self.key}
        asks = tls | {"name": "asks", "client_ca": self.people.ca, "crl": self.crl}
        pki = Pki(servers.ca, self.cert, self.key)
        listeners = [listener(t) for t in TRANSPORTS] + [listener(t, f"mtls-{t}", tls="asks", auth="mtls") for t in TRANSPORTS]
        self.edge = Edge(directory / "edge", config(broker.url, pki, tls=[tls, asks], listeners=listeners), pki).start()

    def serve(self, name: str, **kwargs):
        leaf = self.servers.server(name, **kwargs)
        put(self.key, leaf.key)
        put(self.cert, leaf.cert)
        return leaf

    def reach(self, transport: str, leaf=None, **kwargs):
        return way_in(transport, self.edge[f"mtls-{transport}" if leaf else transport].port, self.servers.ca, leaf, **kwargs)

    def count(self, result: str) -> float:
        return self.edge.metrics().sum(RELOADS, result=result)

    def reloaded(self, how: str, change, result: str = "success") -> int:
        """Makes a change and waits until it is loaded or refused."""
        before, since = self.count(result), self.edge.mark()
        change()
        if how == "SIGHUP":
            self.edge.service.kill(signal.SIGHUP)
        wait_until(f"a reload: {result}", lambda: self.count(result) > before)
        return since


@pytest.fixture
def renewed(tmp_path, broker, servers):
    one = Renewed(tmp_path / "renewed", broker, servers)
    yield one
    one.edge.assert_sane()
    one.edge.close()


@pytest.mark.parametrize("how", ("SIGHUP", "change"))
def test_a_new_certificate_is_loaded_while_clients_stay(renewed, how):
    to = {t: renewed.reach(t) for t in TRANSPORTS}
    held = {t: one.visit(fresh("id")) for t, one in to.items()}
    assert {v.server for v in held.values()} == {"first"}
    fresh_leaf = []
    since = renewed.reloaded(how, lambda: fresh_leaf.append(renewed.serve("second", days=60)))
    renewed.edge.wait_log(f"read again.*{'SIGHUP' if how == 'SIGHUP' else 'a file changed'}", since)
    for transport, old in held.items():
        assert to[transport].visit(fresh("id")).server == "second" and old.ping()
        # Another server certificate does not force a full handshake.
        assert to[transport].visit(fresh("id"), old.ticket).resumed
    shown = renewed.edge.metrics().series("tidegate_tls_certificate_expiry_timestamp_seconds")
    assert {v for _, v in shown} == {fresh_leaf[0].not_after}


def test_a_broken_file_keeps_the_old_configuration(renewed):
    held = renewed.reach("quic").visit(fresh("id"))
    whole = renewed.cert.read_bytes()
    odd = renewed.servers.server("odd").pem
    for how, broken, why in [("change", b"-----BEGIN CERTIFICATE-----\n", "edge.pem: "), ("SIGHUP", odd, "does not belong")]:
        since = renewed.reloaded(how, lambda: put(renewed.cert, broken), "failure")
        line = renewed.edge.wait_log("could not be read again", since)
        assert "ERROR" in line and why in line and "default" in line
        assert {renewed.reach(t).visit(fresh("id")).server for t in TRANSPORTS} == {"first"}
    # All or nothing: a good certificate is not loaded beside a bad list.
    put(renewed.crl, "nothing")
    renewed.reloaded("SIGHUP", lambda: put(renewed.cert, whole) or renewed.serve("second"), "failure")
    assert renewed.reach("tls").visit(fresh("id")).server == "first"
    renewed.reloaded("change", lambda: put(renewed.crl, renewed.people.crl()))
    assert {renewed.reach(t).visit(fresh("id")).server for t in TRANSPORTS} == {"second"}
    assert held.ping()


@pytest.mark.parametrize("how", ("SIGHUP", "change"))
def test_a_revoked_client_is_refused_even_with_a_ticket(renewed, how):
    to = {t: (renewed.reach(t, renewed.one), renewed.reach(t, renewed.two)) for t in TRANSPORTS}
    old = renewed.reach("tls", renewed.one, version=ssl.TLSVersion.TLSv1_2)
    before = {t: (one.visit(fresh("id")), two.visit(fresh("id"))) for t, (one, two) in to.items()}
    old_ticket = old.visit(fresh("id")).ticket
    assert to["tls"][0].visit(fresh("id"), before["tls"][0].ticket).resumed
    renewed.reloaded(how, lambda: put(renewed.crl, renewed.people.crl(renewed.one)))
    for transport, (one, two) in to.items():
        for ticket in (before[transport][0].ticket, None):
            with pytest.raises(Refused) as refused:
                one.visit(fresh("id"), ticket)
            assert refused.value.alert == "certificate_revoked", transport
        # The other client gets in by a full handshake.
        assert not two.visit(fresh("id"), before[transport][1].ticket).resumed
        # Connected clients stay.
        assert before[transport][0].ping()
    with pytest.raises(Refused):
        old.visit(fresh("id"), old_ticket)


def test_another_authority_is_loaded(renewed):
    other = Authority(renewed.directory / "other", "other")
    three = other.client("three")
    with pytest.raises(Refused):
        renewed.reach("tls", three).visit(fresh("id"))
    ticket = renewed.reach("quic", renewed.one).visit(fresh("id")).ticket

    def change():
        put(renewed.people.ca, other.ca)
        put(renewed.crl, other.crl())

    renewed.reloaded("SIGHUP", change)
    for transport in TRANSPORTS:
        assert renewed.reach(transport, three).visit(fresh("id")).connack.reason == 0
        with pytest.raises(Refused) as refused:
            renewed.reach(transport, renewed.one).visit(fresh("id"), ticket if transport == "quic" else None)
        assert refused.value.alert == "unknown_ca"


def test_an_expired_revocation_list_refuses_all_clients(renewed):
    since = renewed.reloaded("SIGHUP", lambda: put(renewed.crl, renewed.people.crl(days=-0.5)))
    renewed.edge.wait_log("ERROR.*revocation list expired.*every client certificate is refused", since)
    with pytest.raises(Refused) as refused:
        renewed.reach("tls", renewed.one).visit(fresh("id"))
    assert refused.value.alert == "unknown_ca"
    renewed.reloaded("SIGHUP", lambda: put(renewed.crl, renewed.people.crl()))
    assert renewed.reach("tls", renewed.one).visit(fresh("id")).connack.reason == 0


def test_directories_that_kubernetes_swaps_are_loaded(tmp_path, broker, servers):
    secret = tmp_path / "secret"
    secret.mkdir()

    def publish(name: str) -> None:
        leaf = servers.server(name)
        (secret / name).mkdir()
        for file, source in (("tls.crt", leaf.cert), ("tls.key", leaf.key)):
            (secret / name / file).write_bytes(source.read_bytes())
        (secret / "..new").symlink_to(name)
        os.replace(secret / "..new", secret / "..data")

    publish("k-first")
    for file in ("tls.crt", "tls.key"):
        (secret / file).symlink_to(f"..data/{file}")
    pki = Pki(servers.ca, secret / "tls.crt", secret / "tls.key")
    edge = Edge(tmp_path / "edge", config(broker.url, pki, ("tls",)), pki).start()
    try:
        to = way_in("tls", edge["tls"].port, servers.ca)
        assert to.visit(fresh("id")).server == "k-first"
        publish("k-second")
        edge.wait_metric("a reload", lambda m: m.sum(RELOADS, result="success") == 1)
        assert to.visit(fresh("id")).server == "k-second"
        assert edge.metrics().sum(RELOADS, result="failure") == 0
    finally:
        edge.close()


# ---------------------------------------------------------------- dates, and the output of `check`


@pytest.mark.parametrize("days,said", [(2, "WARN.*the certificate expires in 1day 23h"), (9, "WARN.*the certificate expires in 8days 23h"), (-1, "ERROR.*the certificate expired")])
def test_expiry_dates_are_shown(tmp_path, broker, servers, days, said):
    leaf = servers.server("dated", start=-90, days=days)
    pki = servers.pki(leaf)
    edge = Edge(tmp_path / "edge", config(broker.url, pki, ("tls",)), pki).start()
    try:
        edge.wait_log(said)
        shown = edge.metrics().series("tidegate_tls_certificate_expiry_timestamp_seconds")
        assert shown == [({"tls": "default"}, leaf.not_after)]
        done = run([BINARY, "check", "--config", edge.file])
        assert done.returncode == 0 and f"warning: [[tls]] \"default\": {leaf.cert}: the certificate expire" in done.stdout
    finally:
        edge.close()


def test_check_names_the_file_and_the_fault(tmp_path, servers, people):
    leaf, other = servers.server("checked"), servers.server("other")
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    good = {"name": "default", "cert": leaf.cert, "key": leaf.key, "client_ca": people.ca}
    crl = tmp_path / "good.crl"
    crl.write_bytes(people.crl())

    def check(**change):
        table = {"version": 1, "tls": [good | change], "listeners": [listener("tls")], "auth": {"acl": "open"}}
        file = tmp_path / "t.toml"
        file.write_text(toml(table))
        return run([BINARY, "check", "--config", file])

    done = check(crl=crl, key_log=tmp_path / "keys.log")
    assert done.returncode == 0, done.stderr
    assert "certificate required" in done.stdout and "certificate until 20" in done.stdout and "revocation list until 20" in done.stdout
    assert "warning: [[tls]] \"default\": key_log is on" in done.stdout
    assert not (tmp_path / "keys.log").exists(), "the check left a file behind"
    for change, why in [
        ({"key": other.key}, "other.key: this key does not belong"),
        ({"client_ca": junk}, "junk.pem: holds no certificate"),
        ({"crl": [crl, junk]}, "junk.pem: holds no revocation list"),
        ({"client_ca": tmp_path / "none.pem"}, "none.pem cannot be read"),
        ({"key_log": tmp_path}, "tls[0].key_log"),
    ]:
        done = check(**change)
        assert done.returncode == 64 and why in done.stderr, done.stderr
