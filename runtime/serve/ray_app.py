"""Replicas of the server on Ray Serve. Needs the extra ``ray``.

    serve run fusion_edge.runtime.serve.ray_app:app bundle=BUNDLE replicas=2

A request passes Ray Serve's HTTP proxy, a router, and a replica with a model of its own. The router sends questions
about a picture to the replica that has its features cached. If a replica dies before its response has begun, the router
asks another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.responses import JSONResponse

from fusion_edge.runtime.serve.api_keys import read_keys
from fusion_edge.runtime.serve.app import make_app
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.middleware import middleware
from fusion_edge.runtime.serve.safety import SafetySettings
from fusion_edge.runtime.serve.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPLICA = "Replica"
"""Name of the deployment with the models."""
REPLICA_HEADER = b"x-fusion-replica"
"""Header of responses: which replica answers."""
OPEN_REQUESTS = 1000
"""Requests that the router passes on at once; the replicas' queues bound them long before."""
TRIES = 3
"""Replicas that are asked until a response begins."""
_PICTURE = re.compile(rb'"url"\s*:\s*"([^"]*)"')
_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string", "headers",
    "client", "server",
)  # fmt: skip
"""Keys of a scope that another process can read."""


class Arguments(BaseModel):
    """Arguments of ``serve run``, or ``args`` of an application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    bundle: Path
    """Folder that ``fusion-export`` wrote; on every node the same."""
    model_name: str | None = None
    """Id of the model in requests. Default: the bundle's name."""
    replicas: int = Field(default=1, ge=1)
    """Replicas, or the least number of them with ``max_replicas``."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Most replicas; their number then follows the requests that wait or run."""
    target_requests: float = Field(default=2.0, gt=0)
    """Requests for each replica that autoscaling aims at."""
    queue: int = Field(default=8, ge=1)
    """Limit of requests that wait in a replica."""
    cached_images: int = Field(default=4, ge=1)
    """Limit of pictures whose features a replica keeps."""
    api_key_file: Path | None = None
    """File of API keys, as ``--api-key-file`` of ``fusion-serve``, on the node that runs ``serve run``. Without one, a
    request must name this machine in its ``Host``."""
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a replica. Default: ``num_cpus``."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves for a replica."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for a replica."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Arguments:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; expected at least replicas, {self.replicas}.")
        return self


def app(args: Arguments) -> Application:
    """Return the application that ``serve run`` starts.

    Raises :class:`UsageError` for a wrong file of keys.
    """
    keys = None if args.api_key_file is None else read_keys(args.api_key_file)
    safety = SafetySettings(keys)
    settings = ServeSettings(
        args.bundle.absolute(),
        args.model_name or args.bundle.resolve().name,
        queue=args.queue,
        cached_images=args.cached_images,
        safety=safety,
        device=args.device,
        threads=args.threads or max(1, int(args.num_cpus)),
    )
    scale: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=args.replicas,
                max_replicas=args.max_replicas,
                target_ongoing_requests=args.target_requests,
            )
        }
    replicas = serve.deployment(name=REPLICA)(Replica).options(
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=args.queue + 1,
        max_queued_requests=args.queue,
        **scale,
    )
    router = serve.deployment(name="Router", max_ongoing_requests=OPEN_REQUESTS)(
        serve.ingress(lambda: _router(safety))()
    )
    return router.bind(replicas.bind(settings))


class Replica:
    """A model behind the ASGI application of :func:`.app.make_app`."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        """Load the model. An error of the load is Ray Serve's error of the deployment."""
        self._app = make_app(settings)
        self._lifespan = AsyncExitStack()
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
        await self._app.state.engine.loaded
        # Ray Serve tells routers the keys of this cache. It evicts the one used longest ago, as the image cache does.
        self._picture: Any = serve.multiplexed(max_num_models_per_replica=settings.cached_images)(_remember)

    async def __call__(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Run the application on a request; yield the messages of its response."""
        if digest := serve.get_multiplexed_model_id():
            await self._picture(digest)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        run = asyncio.create_task(self._app(scope, _receive(body, left), messages.put))
        run.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    replica = serve.get_replica_context().replica_tag.encode()
                    message["headers"] = [*message["headers"], (REPLICA_HEADER, replica)]
                yield message
            await run
        finally:
            left.set()  # after a cancel: the application sees its client leave, and ends
            await asyncio.wait([run])

    async def __del__(self) -> None:
        """Free the model."""
        await self._lifespan.aclose()


async def _remember(digest: str) -> str:
    return digest


def _receive(body: bytes, left: asyncio.Event) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    return receive


def _router(safety: SafetySettings) -> ASGIApp:
    """Return the application of the router: keys and limits of bodies as in a replica, then the choice of a replica."""
    replicas = serve.get_deployment_handle(REPLICA, serve.get_replica_context().app_name)
    application: ASGIApp = partial(_forward, replicas.options(stream=True))
    for layer in reversed(middleware(safety)):
        application = layer.cls(application, *layer.args, **layer.kwargs)
    return application


async def _forward(replicas: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a request to a replica, and its response to the client."""
    if scope["type"] != "http":
        return
    body = (await receive())["body"]
    head = {key: scope[key] for key in _SCOPE if key in scope}
    chosen = replicas.options(multiplexed_model_id=picture_digest(body))
    has_begun = False
    try:
        for tried in range(1, TRIES + 1):
            try:
                async for message in chosen.remote(head, body):
                    await send(message)
                    has_begun = True
                return
            except RayActorError:
                if has_begun or tried == TRIES:
                    raise
    except BackPressureError:
        message = "All replicas are busy and the queue is full; ask again later."
        error = ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
    except (RayActorError, DeploymentUnavailableError):
        if has_begun:
            raise  # the proxy closes the connection: the client sees that its response is not complete
        error = ApiError(503, "No replica answers; ask again later.", code="no_replica", headers={"Retry-After": "1"})
    await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)


def picture_digest(body: bytes) -> str:
    """Return a digest of the first picture's URL in a body of JSON; empty without one.

    It only chooses the replica, so the body need not be valid.
    """
    found = _PICTURE.search(body)
    return hashlib.sha256(found[1]).hexdigest() if found else ""
