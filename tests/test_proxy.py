"""Which way a request takes: through the environment's proxy, where there is one for its URL, and else straight."""

import asyncio

import pytest
from raw_server import RawServer, says

from dpo_cli.endpoint import client as endpoint
from dpo_cli.endpoint import http
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.http import Rejected
from dpo_cli.errors import UserError

ELSEWHERE = "http://model.invalid/v1"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(endpoint, "START_SECONDS", 0)
    monkeypatch.setattr(endpoint, "MAX_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def server():
    with RawServer(lambda _: (200, {}, says("yes"))) as server:
        yield server


def ask(url, folder, **options):
    async def main():
        async with Endpoint(
            url, ledger=folder / "ledger.jsonl", concurrency=1, timeout=5, **{"api_key_variable": None} | options
        ) as client:
            return await client.chat({"model": "writer", "messages": [{"role": "user", "content": "scene"}]})

    return asyncio.run(main()).choices[0].text


def test_the_proxy_of_the_environment_is_taken(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1").replace("//", "//name:word@"))
    assert ask(ELSEWHERE, tmp_path) == "yes"
    (request,) = server.requests
    assert request.path == f"{ELSEWHERE}/chat/completions"
    assert request.headers["proxy-authorization"] == "Basic bmFtZTp3b3Jk"


def test_a_proxy_is_not_told_the_key_where_the_server_has_tls(tmp_path, monkeypatch):
    asked = []

    async def refuse(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def main():
        proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
        async with Endpoint(
            ELSEWHERE.replace("http:", "https:"),
            api_key_variable="A_KEY",
            ledger=tmp_path / "ledger.jsonl",
            concurrency=1,
            timeout=5,
        ) as client:
            await client.chat({"model": "writer", "messages": [{"role": "user", "content": "scene"}]})

    monkeypatch.setenv("A_KEY", "abc")
    with pytest.raises((UserError, Rejected)):
        asyncio.run(main())
    assert asked
    assert all(request.startswith(b"CONNECT model.invalid:443") and b"abc" not in request for request in asked)


def test_where_it_is_not_meant_to_go_through_a_proxy(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
    assert ask(server.url, tmp_path) == "yes"  # this machine
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "model.invalid")
    with pytest.raises(UserError, match="no connection"):
        ask(ELSEWHERE, tmp_path / "other")
    assert len(server.requests) == 1


def test_without_a_proxy_nothing_is_looked_up_for_each_request(server, tmp_path, monkeypatch):
    """As aiohttp does with `trust_env`: a login in ~/.netrc is then in the way of the key."""
    (tmp_path / "netrc").write_text("default login somebody password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("A_KEY", "abc")
    monkeypatch.setattr(http, "is_local", lambda _: False)
    assert ask(server.url, tmp_path, api_key_variable="A_KEY") == "yes"
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer abc"


def test_a_proxy_of_another_kind_is_passed_over_with_a_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://name:word@127.0.0.1:1080")
    monkeypatch.setattr(http, "is_local", lambda _: False)
    said: list[str] = []
    assert ask(server.url, tmp_path, log=said.append) == "yes"
    assert [line for line in said if "without the proxy" in line] and "word" not in str(said)
