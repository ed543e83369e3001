"""Job URLs: two kinds are served, and nothing listens on a network without TLS and token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.tree import is_generated, package_files
from weightsync.certs import make_certs
from weightsync.client import Job, Source
from weightsync.errors import ConfigError
from weightsync.service.address import TcpAddress, UnixAddress, open_channel, parse_url
from weightsync.service.credentials import load_member, load_server
from weightsync.service.listen import open_listener
from weightsync.settings import Settings, check_job_url


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:/run/job", UnixAddress(Path("/run/job"))),
        ("unix:a@b", UnixAddress(Path("a@b"))),
        ("grpcs://trainer-0:7431", TcpAddress("trainer-0", 7431)),
        ("grpcs://10.0.0.1:1", TcpAddress("10.0.0.1", 1)),
        ("grpcs://[fd00::1]:65535", TcpAddress("fd00::1", 65535)),
        ("grpcs://a.b_c:0", TcpAddress("a.b_c", 0)),
    ],
)
def test_good_urls(url: str, address: object) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    ["grpcs://a", "grpcs://a:", "grpcs://:1", "grpcs://a:x", "grpcs://a:65536", "grpcs://fd00::1:1",
     "grpcs://a:1/path", "grpcs://a b:1", "grpcs:///a:1"],
)  # fmt: skip
def test_urls_without_host_and_port(url: str) -> None:
    with pytest.raises(ConfigError, match="write grpcs://HOST:PORT"):
        parse_url(url)


def test_addresses_print_as_urls_write_them() -> None:
    assert str(TcpAddress("fd00::1", 5)) == "[fd00::1]:5"
    assert str(TcpAddress("a", 5)) == "a:5"
    assert TcpAddress("0.0.0.0", 5).is_wildcard
    assert TcpAddress("::", 5).is_wildcard
    assert not TcpAddress("a", 5).is_wildcard


@pytest.mark.parametrize("url", ["grpcs://s3cret@a:1", "http://user:s3cret@a", "grpc://s3cret@a:1"])
def test_a_secret_in_a_url_is_refused_and_not_shown(url: str) -> None:
    for refuse in (check_job_url, parse_url, Job.connect):
        with pytest.raises(ConfigError, match="carries no user and no token") as caught:
            refuse(url)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["grpc://0.0.0.0:1", "grpc://127.0.0.1:1", "grpc://trainer-0:1"])
def test_plain_grpc_is_refused_everywhere(url: str) -> None:
    for use in (Job.start, Job.connect, lambda u: Source({}, job=u, rank=0, world_size=1)):
        with pytest.raises(ConfigError, match=r"neither TLS nor a token.*grpcs://.*certs"):
            use(url)


def test_nothing_is_served_on_a_network_without_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WEIGHTSYNC_TOKEN_FILE", raising=False)
    for url in ("grpcs://0.0.0.0:0", "grpcs://127.0.0.1:0"):
        with pytest.raises(ConfigError, match="weightsync certs"):
            open_listener(url, None)
        with pytest.raises(ConfigError, match=r"weightsync certs.*token_file="):
            Job.start(url)
        with pytest.raises(ConfigError, match="no token and no CA"):
            open_channel(url, None)


def test_insecure_calls_of_grpc_are_for_unix_sockets_only() -> None:
    lines = [
        line.strip()
        for path in package_files()
        if not is_generated(path)
        for line in path.read_text(encoding="ascii").splitlines()
        if re.search("insecure_(channel|port)|local_(server|channel)_cred|insecure_server", line)
    ]
    assert lines == [
        'return grpc.insecure_channel(f"unix:{address.path}", options=CHANNEL_OPTIONS)',
        "server.add_insecure_port(self.url)",
    ]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("certs") / "job"
    make_certs(folder, ["trainer-0", "fd00::1"])
    return Settings.resolve(token_file=folder / "token", environ={})


@pytest.mark.parametrize("url", ["grpcs://0.0.0.0:7431", "grpcs://[::]:7431", "grpcs://a:0"])
def test_nobody_connects_to_where_only_a_server_listens(settings: Settings, url: str) -> None:
    with pytest.raises(ConfigError, match=r"only a server listens there.*Job\.url"):
        open_channel(url, load_member(settings))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("grpcs://0.0.0.0:7431", "grpcs://trainer-0:7431"),
        ("grpcs://[::]:7431", "grpcs://trainer-0:7431"),
        ("grpcs://[fd00::1]:7431", "grpcs://[fd00::1]:7431"),
        ("grpcs://localhost:7431", "grpcs://localhost:7431"),
    ],
)
def test_the_url_of_a_job_is_one_that_members_accept(
    settings: Settings, url: str, shown: str
) -> None:
    assert open_listener(url, load_server(settings)).url == shown


def test_this_hosts_name_comes_first(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    found = open_listener("grpcs://0.0.0.0:1", load_server(settings))
    assert found.url == "grpcs://localhost:1"


def test_a_certificate_for_other_hosts_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"for trainer-0, .*not for 10\.0\.0\.9.*--host 10"):
        open_listener("grpcs://10.0.0.9:0", load_server(settings))
    folder = make_certs(tmp_path / "job", ["*.example"]).folder
    only_loopback = Settings.resolve(token_file=folder / "token", environ={})
    with pytest.raises(ConfigError, match="names no host that others could reach"):
        open_listener("grpcs://0.0.0.0:0", load_server(only_loopback))
