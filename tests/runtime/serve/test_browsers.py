"""Web pages may not ask, unless their origin is allowed."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from support.asgi import call

from fusion_edge.runtime.serve.api_keys import ApiKeys
from fusion_edge.runtime.serve.middleware import middleware
from fusion_edge.runtime.serve.safety import SafetySettings

PAGE = "https://chat.example"
KEYS = ApiKeys((hashlib.sha256(b"k" * 20).digest(),))
KEY = {"authorization": "Bearer " + "k" * 20}


def ask(settings: SafetySettings, method: str = "POST", **headers: str) -> tuple[int, dict[str, str]]:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(await request.json())

    app = Starlette(routes=[Route("/v1/x", endpoint, methods=["POST"])], middleware=middleware(settings))
    given = {"host": "localhost:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return call(app, method, "/v1/x", given, b"{}")[:2]


LOCAL = SafetySettings()
KEYED = SafetySettings(keys=KEYS)
OPEN = SafetySettings(keys=KEYS, origins=(PAGE, "app://obsidian.md"))


def test_programs_may_ask() -> None:
    assert ask(LOCAL)[0] == 200
    assert ask(KEYED, **KEY)[0] == 200


@pytest.mark.parametrize(
    "origin", [PAGE, "null", "http://localhost:8000", "http://127.0.0.1", "", "https://chat.example "]
)
def test_pages_may_not(origin: str) -> None:
    status, headers = ask(LOCAL, origin=origin)
    assert status == 403
    assert "access-control-allow-origin" not in headers
    assert ask(KEYED, origin=origin, **KEY)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "127.1.2.3", "[::1]", "[::1]:8000"])
def test_this_machine_has_these_names(host: str) -> None:
    assert ask(LOCAL, host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "0.0.0.0",
        ),
        *(
            "[::2]",
            "localhost:x",
            "localhost:",
            "",
            "[",
            "[]",
            "user@localhost",
            "localhost@evil.example",
            "127.1",
            "::1",
        ),
    ],
)
def test_a_rebound_name_is_refused(host: str) -> None:
    """A page of evil.example, whose name resolves to 127.0.0.1 after it is loaded, sends no foreign origin."""
    assert ask(LOCAL, host=host)[0] == 421
    assert ask(KEYED, host=host, **KEY)[0] == 200  # it has no key


def test_an_allowed_origin_may_ask() -> None:
    status, headers = ask(OPEN, origin=PAGE, **KEY)
    assert (status, headers["access-control-allow-origin"], headers["vary"]) == (200, PAGE, "Origin")
    assert headers["access-control-expose-headers"] == "Retry-After, Retry-After-Ms, X-Request-Id, X-Should-Retry"
    assert "access-control-allow-credentials" not in headers
    assert ask(OPEN, origin="https://chat.example.evil.example", **KEY)[0] == 403
    assert ask(OPEN, origin="http://chat.example", **KEY)[0] == 403
    assert ask(OPEN, origin="app://obsidian.md", **KEY)[0] == 200


def test_an_allowed_origin_reads_why_it_is_refused() -> None:
    status, headers = ask(OPEN, origin=PAGE)
    assert (status, headers["access-control-allow-origin"]) == (401, PAGE)


def test_preflight_needs_no_key_but_an_allowed_origin() -> None:
    preflight: dict[str, Any] = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type,x-stainless-os",
    }
    status, headers = ask(OPEN, "OPTIONS", origin=PAGE, **preflight)
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in headers["access-control-allow-headers"]
    assert ask(OPEN, "OPTIONS", origin="https://evil.example", **preflight)[0] == 403
    assert ask(KEYED, "OPTIONS", origin=PAGE, **preflight)[0] == 403
    delete = preflight | {"access_control_request_method": "DELETE"}
    assert ask(OPEN, "OPTIONS", origin=PAGE, **delete)[0] == 400
