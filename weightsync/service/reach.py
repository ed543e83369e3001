"""Why a coordinator could not be reached, as an error that says what to do.

gRPC reports every failure to connect as "unavailable" with a text that changes between releases.
So a failed connection is tried once more with Python's own TLS, which names the reason.
"""

from __future__ import annotations

import socket
import ssl
from typing import Final

import grpc

from weightsync.errors import AuthError, PeerLostError, WeightSyncError
from weightsync.service.address import TcpAddress, parse_url
from weightsync.service.credentials import MemberCredentials

__all__ = ["explain", "no_answer"]

_PROBE_S: Final = 3.0
# Of OpenSSL's x509_vfy.h.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OTHER_NAME: Final = (62, 64)


def explain(
    error: grpc.RpcError, url: str, credentials: MemberCredentials | None, *, was_joined: bool
) -> WeightSyncError:
    """The typed error for a failed call. May block for a few seconds, to find the reason.

    Args:
        error: What gRPC raised.
        url: Job URL.
        credentials: That the call used.
        was_joined: The coordinator had answered before: it is lost, not wrong.
    """
    code, details = _code(error), _details(error)
    if code == grpc.StatusCode.UNAUTHENTICATED and credentials is not None:
        return AuthError(
            f"the coordinator at {url} refused the token in {credentials.token_file}: it is of "
            "another job, or older than the last `weightsync certs --force`; copy the token file "
            "from the host that serves the job",
            peer=url,
        )
    if was_joined:
        return PeerLostError(f"lost the coordinator at {url}: {details}", peer=url)
    if credentials is not None and code == grpc.StatusCode.UNAVAILABLE:
        address = parse_url(url)
        if isinstance(address, TcpAddress):
            found = _probe(address, url, credentials)
            if found is not None:
                return found
    return PeerLostError(f"no coordinator at {url}: {details}", peer=url)


def no_answer(url: str, timeout_s: float) -> PeerLostError:
    """The error for a coordinator that said nothing at all in `timeout_s`."""
    hint = "is the job running?"
    address = parse_url(url)
    if isinstance(address, TcpAddress):
        hint = (
            f"is the job running, is {address.host} up, and do routes and firewalls let port "
            f"{address.port} through?"
        )
    return PeerLostError(f"no coordinator answered at {url} in {timeout_s:g} s; {hint}", peer=url)


def _probe(address: TcpAddress, url: str, credentials: MemberCredentials) -> WeightSyncError | None:
    """Connect as gRPC would, up to the certificate; None if that works. Sends no token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
    context.set_alpn_protocols(["h2"])
    where = f"the coordinator at {url}"
    try:
        context.load_verify_locations(cadata=credentials.ca_pem.decode("ascii", "ignore"))
        with (
            _connected(address, url) as connection,
            context.wrap_socket(connection, server_hostname=address.host),
        ):
            return None
    except PeerLostError as error:
        return error
    except ssl.SSLCertVerificationError as error:
        return AuthError(_why_refused(where, error, address, credentials), peer=url)
    except ssl.SSLError as error:
        if not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return AuthError(
                f"{where}: what listens there does not speak TLS as a coordinator does "
                f"({error.reason}); check host and port",
                peer=url,
            )
        return _hung_up(where, url, error)
    except OSError as error:
        return _hung_up(where, url, error)


def _connected(address: TcpAddress, url: str) -> socket.socket:
    """A plain connection; a PeerLostError says which part of the way is missing."""
    where = f"no coordinator at {url}"
    try:
        return socket.create_connection((address.host, address.port), _PROBE_S)
    except socket.gaierror as error:
        why = (
            f"the name {address.host} is not known here ({error.strerror}); check the URL, DNS and "
            "/etc/hosts"
        )
    except ConnectionRefusedError:
        why = (
            f"nothing listens on port {address.port} of {address.host}; is the job running, and is "
            "the port right?"
        )
    except OSError as error:
        why = (
            f"{error.strerror or error}; check that {address.host} is up, and routes and firewalls "
            f"between here and port {address.port}"
        )
    raise PeerLostError(f"{where}: {why}", peer=url)


def _hung_up(where: str, url: str, error: OSError) -> PeerLostError:
    # Somebody listens but does not answer: a coordinator that starts, ends or is frozen.
    return PeerLostError(f"{where} did not finish the TLS handshake: {error}", peer=url)


def _why_refused(
    where: str,
    error: ssl.SSLCertVerificationError,
    address: TcpAddress,
    credentials: MemberCredentials,
) -> str:
    if error.verify_code == _EXPIRED:
        return (
            f"{where} has an expired certificate: run `weightsync certs --renew` where it was made "
            "and start the job again; if it is not expired, mend this host's clock"
        )
    if error.verify_code == _NOT_YET_VALID:
        return f"{where} has a certificate that is not valid yet: compare the clocks of both hosts"
    if error.verify_code in _OTHER_NAME:
        return (
            f"{where} has no certificate for {address.host}: connect under a name that it has, or "
            f"add this one with `weightsync certs --renew --host {address.host}` and start the job "
            "again"
        )
    return (
        f"{where} has a certificate of another CA than {credentials.ca_file} "
        f"({error.verify_message}): copy ca.pem and token from the host that serves the job; if "
        "they are the same, somebody else answers there"
    )


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    code = getattr(error, "code", None)
    found = code() if callable(code) else None
    return found if isinstance(found, grpc.StatusCode) else None


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)
