"""What an independent scanner says of our TLS: sslyze, with Mozilla's profile as the measure."""

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

COMMANDS = SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER | {C.SESSION_RESUMPTION, C.TLS_1_3_EARLY_DATA}


def scan(edge) -> dict:
    """Both listeners at once."""
    scanner = Scanner(concurrent_server_scans_limit=2)
    names = {}
    for transport in ("tls", "wss"):
        location = ServerNetworkLocation("localhost", edge[transport].port, "127.0.0.1")
        trust = ScanCommandsExtraArguments(certificate_info=CertificateInfoExtraArgument(custom_ca_file=edge.pki.ca))
        request = ServerScanRequest(location, scan_commands=COMMANDS, scan_commands_extra_arguments=trust)
        names[request.uuid] = transport
        scanner.queue_scans([request])
    return {names[one.uuid]: one for one in scanner.get_results()}


@pytest.fixture(scope="module")
def scanned(shared_edge):
    return scan(shared_edge)


@pytest.mark.parametrize("transport", ("tls", "wss"))
def test_mozillas_intermediate_profile(scanned, transport):
    profile = MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_INTERMEDIATE)
    try:
        check_server_against_tls_configuration(scanned[transport], profile)
    except ServerNotCompliantWithTlsConfiguration as found:
        assert found.issues == {}


@pytest.mark.parametrize("transport", ("tls", "wss"))
def test_beyond_the_profile(scanned, transport):
    result = scanned[transport].scan_result
    versions = [v for v in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3") if getattr(result, f"{v}_cipher_suites").result.is_tls_version_supported]
    assert versions == ["tls_1_2", "tls_1_3"]
    assert not result.tls_1_3_early_data.result.supports_early_data
    assert not result.session_renegotiation.result.is_vulnerable_to_client_renegotiation_dos
    resumption = result.session_resumption.result
    assert resumption.tls_ticket_resumption_result.name == "FULLY_SUPPORTED"
