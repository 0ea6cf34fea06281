"""The middleware of a safe server, in its order."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from fusion_edge.runtime.serve.api_keys import RequireKey
from fusion_edge.runtime.serve.arrival import NoteArrival
from fusion_edge.runtime.serve.browsers import BrowserRules, RefusePages
from fusion_edge.runtime.serve.limits import LimitRequests
from fusion_edge.runtime.serve.safety import SafetySettings


def middleware(settings: SafetySettings, when_crowded: Callable[[], object] = lambda: None) -> list[Middleware]:
    """Return the middleware of the application, outermost first.

    ``when_crowded`` is called for every request that is refused because too many bytes are being received.

    CORS comes before the keys, because a browser sends no key with its preflight request; keys come before the limits,
    because these receive the body.
    """
    rules = BrowserRules(settings.origins, local_hosts_only=settings.keys is None)
    layers = [Middleware(NoteArrival), Middleware(RefusePages, rules=rules)]
    if settings.origins:
        layers += [
            Middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("Retry-After", "Retry-After-Ms", "X-Request-Id", "X-Should-Retry"),
            )
        ]
    if settings.keys is not None:
        layers += [Middleware(RequireKey, keys=settings.keys)]
    return [*layers, Middleware(LimitRequests, limits=settings.requests, when_crowded=when_crowded)]
