"""What the control plane answers, by FastAPI. What touches an optimizer is done by the server's thread."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Match

import gpu_adam
from gpu_adam.devices.telemetry import Telemetry
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, ServiceError
from gpu_adam.rules import shown
from gpu_adam.service.answers import (
    Assignment,
    Checkpoint,
    Failure,
    Gpu,
    Health,
    Hyperparameter,
    Optimizer,
    Overview,
    Service,
    Variable,
)
from gpu_adam.service.gatekeeper import failure
from gpu_adam.service.messages import SETTABLE
from gpu_adam.service.metrics import Metrics
from gpu_adam.service.served import ServedOptimizer
from gpu_adam.service.server import Server

CALL_SECONDS = 5.0
"""How long a request waits for the server's thread, which may be at work on a step or a checkpoint."""

SAVE_SECONDS = 600.0
"""How long a request waits for its checkpoint."""

EVENT_SECONDS = 1.0
"""Between two events of a stream."""

MOST_STREAMS = 16
"""Of events, at once."""

_Result = TypeVar("_Result")


class RefusedError(Exception):
    """A request is answered by a failure.

    Args:
        status: of the answer.
        error: what it says.
    """

    def __init__(self, status: int, error: GpuAdamError) -> None:
        super().__init__(status, error)
        self.status, self.error = status, error


class Access:
    """How endpoints reach the service.

    Args:
        server: the service.

    Attributes:
        server: as above.
        metrics: what Prometheus scrapes.
        streams: how many streams of events there are.
        ending: set when streams are to end.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.streams, self.ending = server, 0, asyncio.Event()
        self._telemetry = Telemetry.open(server.device)
        self.metrics = Metrics(server, *self._names())
        self._looking = asyncio.Lock()
        self._overview: tuple[float, Overview] | None = None

    def _names(self) -> tuple[str, str]:
        """Index and UUID of the GPU."""
        device = self.server.device
        if device.name == "host":
            return "", ""
        names = None if self._telemetry is None else self._telemetry.names()
        return names or (device.name.rpartition(":")[2], device.identity)

    async def call(self, function: Callable[[], _Result], seconds: float | None = None) -> _Result:
        """What a function returns that the server's thread calls.

        Args:
            function: to be called.
            seconds: how long to wait for it; None for CALL_SECONDS.

        Raises:
            RefusedError: the service ends, or its thread was at work on something else for so long; then the function
                is not called any more.
            What the function raises.
        """
        if self.server.is_draining:
            raise RefusedError(503, ServiceError("the service", "must not be ending", "it is", "ask the next one"))
        seconds = CALL_SECONDS if seconds is None else seconds
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.server.call(function)), seconds)
        except asyncio.TimeoutError:
            rule, remedy = f"must come to it within {seconds:g} s", "try again"
            error = ServiceError("the service", rule, "it is at work on a step or a checkpoint", remedy)
            raise RefusedError(503, error) from None

    async def optimizer(
        self, name: str, function: Callable[[ServedOptimizer], _Result], seconds: float | None = None
    ) -> _Result:
        """The same, of a function of an optimizer.

        Raises:
            As `call`; RefusedError: there is no such optimizer.
        """
        optimizers = self.server.optimizers
        if name not in optimizers:
            rule = f"must be one of {', '.join(optimizers)}"
            raise RefusedError(404, ArgumentValueError("the optimizer", rule, shown(name), "name one of them"))
        return await self.call(lambda: function(optimizers[name]), seconds)

    async def after(self, name: str, change: Callable[[ServedOptimizer], object]) -> Optimizer:
        """An optimizer as it is after a change."""

        def changed(served: ServedOptimizer) -> Optimizer:
            change(served)
            return self.described(served)

        return await self.optimizer(name, changed)

    def described(self, optimizer: ServedOptimizer) -> Optimizer:
        """An optimizer at this moment. In the server's thread."""
        found = optimizer.description()
        if found["loss"] is not None and not math.isfinite(found["loss"]):
            found["loss"] = None  # JSON has no number for it
        return Optimizer(**found, clients=self.server.clients_of(optimizer.name))

    async def overview(self) -> Overview:
        """The service and its optimizers, not older than half the time between events, for all who look."""
        async with self._looking:
            now = time.monotonic()
            if self._overview is None or now - self._overview[0] > EVENT_SECONDS / 2:
                gpu = await asyncio.to_thread(self._gpu)
                self._overview = now, await self.call(lambda: self._overview_of(gpu))
            return self._overview[1]

    def _overview_of(self, gpu: Gpu | None) -> Overview:
        server = self.server
        service = Service(
            version=gpu_adam.__version__,
            device=server.device.name,
            clients=server.clients,
            client_bytes=server.client_bytes,
            gpu=gpu,
        )
        return Overview(service=service, optimizers=[self.described(each) for each in server.optimizers.values()])

    def _gpu(self) -> Gpu | None:
        if self._telemetry is None:
            return None
        found = self._telemetry.read()
        return Gpu(
            watts=found.watts,
            sm_mhz=found.sm_mhz,
            memory_mhz=found.memory_mhz,
            celsius=found.celsius,
            throttles=list(found.throttles),
        )


def _access(request: Request) -> Access:
    found: Access = request.app.state.access
    return found


_Reach = Annotated[Access, Depends(_access)]
_Name = Annotated[str, InPath(description="The optimizer's name.")]
_Hyper = Annotated[str, InPath(description="What is meant.", json_schema_extra={"enum": list(SETTABLE)})]


def _failures(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    return {status.value: {"model": Failure, "description": status.phrase} for status in statuses}


_ANYWHERE = _failures(HTTPStatus.FORBIDDEN, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.SERVICE_UNAVAILABLE)
_OF_OPTIMIZER = _failures(HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY)

health = APIRouter(prefix="/v1/health", tags=["health"], responses=_ANYWHERE)
known = APIRouter(prefix="/v1", responses=_ANYWHERE)


@health.get("/live", operation_id="live", summary="Whether the process answers")
async def live() -> Health:
    """It does where this is answered."""
    return Health(status="live")


@health.get("/ready", operation_id="ready", summary="Whether clients are taken")
async def ready(access: _Reach) -> Health:
    """503 from the moment on at which the service begins to end."""
    if access.server.is_draining:
        raise RefusedError(503, ServiceError("the service", "must not be ending", "it is", "ask the next one"))
    return Health(status="ready")


@known.get("/service", operation_id="get_service", tags=["service"], summary="The service")
async def get_service(access: _Reach) -> Service:
    """Its version, device and clients."""
    return (await access.overview()).service


@known.get(
    "/events",
    operation_id="stream_events",
    tags=["service"],
    summary="Server-sent events: an Overview each second",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "model": None}},
)
async def stream_events(access: _Reach) -> StreamingResponse:
    """Each event's data is an Overview as JSON. The stream ends with an event `end` where the service ends."""
    await access.overview()  # a failure is to be an answer, not a stream
    if access.streams >= MOST_STREAMS:
        rule, remedy = f"must be at most {MOST_STREAMS} at once", "close a page"
        raise RefusedError(503, ServiceError("the streams of events", rule, "one more", remedy))
    return StreamingResponse(_events(access), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(access: Access) -> AsyncIterator[str]:
    access.streams += 1
    try:
        while not (access.server.is_draining or access.ending.is_set()):
            try:
                yield f"data: {(await access.overview()).model_dump_json()}\n\n"
            except RefusedError:
                yield ": the service is at work\n\n"
            try:
                await asyncio.wait_for(access.ending.wait(), EVENT_SECONDS)
            except asyncio.TimeoutError:
                continue
        yield "event: end\ndata: {}\n\n"
    finally:
        access.streams -= 1


@known.get("/optimizers", operation_id="list_optimizers", tags=["optimizers"], summary="All optimizers")
async def list_optimizers(access: _Reach) -> list[Optimizer]:
    """At this moment."""
    optimizers = access.server.optimizers.values()
    return await access.call(lambda: [access.described(each) for each in optimizers])


@known.get(
    "/optimizers/{optimizer}",
    operation_id="get_optimizer",
    tags=["optimizers"],
    summary="An optimizer",
    responses=_OF_OPTIMIZER,
)
async def get_optimizer(access: _Reach, optimizer: _Name) -> Optimizer:
    """At this moment."""
    return await access.optimizer(optimizer, access.described)


@known.get(
    "/optimizers/{optimizer}/variables",
    operation_id="list_variables",
    tags=["optimizers"],
    summary="An optimizer's variables",
    responses=_OF_OPTIMIZER,
)
async def list_variables(access: _Reach, optimizer: _Name) -> list[Variable]:
    """Names, shapes and dtypes. Values are not to be had here."""

    def listed(served: ServedOptimizer) -> list[Variable]:
        places = zip(served.variables, served.places, strict=True)
        return [Variable(name=name, shape=list(place.shape), dtype=place.dtype) for name, place in places]

    return await access.optimizer(optimizer, listed)


@known.get(
    "/optimizers/{optimizer}/hyperparameters",
    operation_id="list_hyperparameters",
    tags=["hyperparameters"],
    summary="An optimizer's hyperparameters",
    responses=_OF_OPTIMIZER,
)
async def list_hyperparameters(access: _Reach, optimizer: _Name) -> list[Hyperparameter]:
    """All that may be assigned."""

    def listed(served: ServedOptimizer) -> list[Hyperparameter]:
        return [Hyperparameter(name=name, value=served.get(name)) for name in SETTABLE]

    return await access.optimizer(optimizer, listed)


@known.get(
    "/optimizers/{optimizer}/hyperparameters/{name}",
    operation_id="get_hyperparameter",
    tags=["hyperparameters"],
    summary="A hyperparameter",
    responses=_OF_OPTIMIZER,
)
async def get_hyperparameter(access: _Reach, optimizer: _Name, name: _Hyper) -> Hyperparameter:
    """A schedule is its configuration."""
    return await access.optimizer(optimizer, lambda served: Hyperparameter(name=name, value=served.get(name)))


@known.put(
    "/optimizers/{optimizer}/hyperparameters/{name}",
    operation_id="set_hyperparameter",
    tags=["hyperparameters"],
    summary="Assign a hyperparameter",
    responses={**_OF_OPTIMIZER, **_failures(HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_TIMEOUT)},
)
async def set_hyperparameter(access: _Reach, optimizer: _Name, name: _Hyper, new: Assignment) -> Hyperparameter:
    """Steps from the next one on have it. The rules are those of the optimizer, and what breaks one changes nothing."""

    def assigned(served: ServedOptimizer) -> Hyperparameter:
        served.set(name, new.value)
        return Hyperparameter(name=name, value=served.get(name))

    return await access.optimizer(optimizer, assigned)


@known.post(
    "/optimizers/{optimizer}/checkpoint",
    operation_id="save_checkpoint",
    tags=["optimizers"],
    summary="Write a checkpoint now",
    responses={**_OF_OPTIMIZER, **_failures(HTTPStatus.CONFLICT, HTTPStatus.INTERNAL_SERVER_ERROR)},
)
async def save_checkpoint(access: _Reach, optimizer: _Name) -> Checkpoint:
    """And wait until it is written. Where steps of pushes that were added up are due, they are made before."""
    return await access.optimizer(optimizer, lambda served: Checkpoint(path=str(served.save())), SAVE_SECONDS)


@known.post(
    "/optimizers/{optimizer}/pause",
    operation_id="pause_optimizer",
    tags=["optimizers"],
    summary="Make no steps until resumed",
    responses=_OF_OPTIMIZER,
)
async def pause_optimizer(access: _Reach, optimizer: _Name) -> Optimizer:
    """Pushes are kept, and their clients wait."""
    return await access.after(optimizer, ServedOptimizer.pause)


@known.post(
    "/optimizers/{optimizer}/resume",
    operation_id="resume_optimizer",
    tags=["optimizers"],
    summary="Make steps again",
    responses=_OF_OPTIMIZER,
)
async def resume_optimizer(access: _Reach, optimizer: _Name) -> Optimizer:
    """Of the pushes that were kept first, in their order."""
    return await access.after(optimizer, ServedOptimizer.resume)


metrics = APIRouter(responses=_ANYWHERE)


@metrics.get(
    "/metrics",
    operation_id="get_metrics",
    tags=["service"],
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def get_metrics(access: _Reach) -> Response:
    """In Prometheus' text format."""
    return Response(await access.call(access.metrics.text), media_type=CONTENT_TYPE_LATEST)


ROUTERS = (health, known, metrics)


def make_application(server: Server, *, has_token: bool) -> FastAPI:
    """The endpoints of a service.

    Args:
        server: the service.
        has_token: whether requests must bring one, for the endpoints' description.
    """
    application = FastAPI(
        title="gpu_adam",
        version=gpu_adam.__version__,
        summary="A service of optimizers: look at them, and change what may be changed while they work.",
        description="Arrays do not travel here: clients share memory with the service.",
        openapi_url=None,  # it is an endpoint among others, and behind the same door
        docs_url=None,  # these pages load scripts of other sites
        redoc_url=None,
    )
    application.state.access = Access(server)
    bearer = Security(HTTPBearer(auto_error=False, description="What the file of --token-file has."))
    for router in ROUTERS:
        if has_token and router is not health:
            application.include_router(router, responses=_failures(HTTPStatus.UNAUTHORIZED), dependencies=[bearer])
        else:
            application.include_router(router)
    page, policy = _page()

    @application.get("/", include_in_schema=False)
    async def get_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})

    description = _with_names(application.openapi(), list(server.optimizers))

    @application.get("/v1/openapi.json", include_in_schema=False)
    async def get_description() -> JSONResponse:
        return JSONResponse(description)

    application.add_exception_handler(RefusedError, _refused)
    application.add_exception_handler(GpuAdamError, _forbidden)
    application.add_exception_handler(OSError, _failed)
    application.add_exception_handler(RequestValidationError, _invalid)
    application.add_exception_handler(HTTPException, _http_error)
    return application


def _with_names(description: dict[str, Any], optimizers: list[str]) -> dict[str, Any]:
    """A description of the endpoints, with the names that this service's optimizers have."""
    for methods in description["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "optimizer":
                    parameter["schema"]["enum"] = optimizers
    return description


def _page() -> tuple[str, str]:
    """The page, and what a browser may do with it: run its own script, apply its own style, ask this service."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    own = "; ".join(f"{tag}-src 'sha256-{value}'" for tag, value in hashes.items())
    nothing = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, f"default-src 'none'; {own}; connect-src 'self'; img-src data:; {nothing}"


# What goes wrong, as an answer.


async def _refused(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(failure(error.error), error.status)


async def _forbidden(_: Request, error: Any) -> JSONResponse:
    """What a rule of the optimizer forbids is the request's fault; what its configuration does not allow is not."""
    is_argument = isinstance(error, (ArgumentTypeError, ArgumentValueError))
    return JSONResponse(failure(error), 422 if is_argument else 409)


async def _failed(_: Request, error: Any) -> JSONResponse:
    refused = ServiceError("the checkpoint", "must be written", error, "look at the service's disk, and its log")
    return JSONResponse(failure(refused), 500)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    place, got = ".".join(map(str, first["loc"])), shown(first.get("input"))
    wrong = ArgumentValueError(place, f"must be right: {first['msg']}", got, "see /v1/openapi.json")
    return JSONResponse(failure(wrong), 422)


async def _http_error(request: Request, error: Any) -> JSONResponse:
    what, rule = f"{request.method} {shown(request.url.path)}", "must be an endpoint's"
    if error.status_code == HTTPStatus.BAD_REQUEST:
        what, rule = "the body", "must be JSON in UTF-8"
    wrong = ServiceError(what, rule, error.detail, "see /v1/openapi.json")
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette names the first route's alone
        headers = {"Allow": ", ".join(_methods_of(request))}
    return JSONResponse(failure(wrong), error.status_code, headers)


def _methods_of(request: Request) -> list[str]:
    """What may be done at a path that exists."""
    routes = [each for router in ROUTERS for each in router.routes if isinstance(each, APIRoute)]
    here = [each.methods or set() for each in routes if each.matches(request.scope)[0] is not Match.NONE]
    return sorted(set[str]().union(*here) or {"GET"})
