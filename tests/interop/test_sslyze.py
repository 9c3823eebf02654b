"""An independent scanner, sslyze, checks TLS against Mozilla's profile."""

from __future__ import annotations

import pytest
from sslyze import ScanCommand as C
from sslyze import ScanCommandsExtraArguments, Scanner, ServerNetworkLocation, ServerScanRequest
from sslyze.mozilla_tls_profile.tls_config_checker import (
    SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
    MozillaTlsConfiguration,
    ServerNotCompliantWithTlsConfiguration,
    TlsConfigurationEnum,
    check_server_against_tls_configuration,
)
from sslyze.plugins.certificate_info.implementation import CertificateInfoExtraArgument

pytestmark = [
    pytest.mark.xdist_group("sslyze"),  # one scan for all
    pytest.mark.filterwarnings("ignore:Parsed a serial number"),  # in the trust stores that it brings
]
COMMANDS = SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER | {C.SESSION_RESUMPTION, C.TLS_1_3_EARLY_DATA}


def scan(edge) -> dict:
    """Scans both listeners at once."""
    scanner = Scanner(concurrent_server_scans_limit=2)
    names, requests = {}, []
    for transport in ("tls", "wss"):
        location = ServerNetworkLocation("localhost", edge[transport].port, "127.0.0.1")
        trust = ScanCommandsExtraArguments(certificate_info=CertificateInfoExtraArgument(custom_ca_file=edge.pki.ca))
        request = ServerScanRequest(location, scan_commands=COMMANDS, scan_commands_extra_arguments=trust)
        names[request.uuid] = transport
        requests.append(request)
    scanner.queue_scans(requests)
    return {names[one.uuid]: one for one in scanner.get_results()}


@pytest.fixture(scope="module")
def scanned(shared_edge):
    return scan(shared_edge)


@pytest.mark.parametrize("transport", ("tls", "wss"))
def test_mozillas_intermediate_profile_is_met(scanned, transport):
    profile = MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_INTERMEDIATE)
    try:
        check_server_against_tls_configuration(scanned[transport], profile)
    except ServerNotCompliantWithTlsConfiguration as found:
        assert found.issues == {}


@pytest.mark.parametrize("transport", ("tls", "wss"))
def test_tls_versions_and_resumption_go_beyond_the_profile(scanned, transport):
    result = scanned[transport].scan_result
    versions = [v for v in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3") if getattr(result, f"{v}_cipher_suites").result.is_tls_version_supported]
    assert versions == ["tls_1_2", "tls_1_3"]
    assert not result.session_renegotiation.result.is_vulnerable_to_client_renegotiation_dos
    if transport == "wss":  # the scanner's attempt is an HTTP request
        assert not result.tls_1_3_early_data.result.supports_early_data
    # For TLS 1.2. The scanner does not count a resumption that issues a new ticket; test_tls.py covers tickets.
    assert result.session_resumption.result.session_id_resumption_result.name == "FULLY_SUPPORTED"
