"""The routes: chats, completions, models, health, metrics and the page."""

import asyncio
import contextlib
from pathlib import Path

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from qed_jax.serving import errors, generation, protocol
from qed_jax.serving.access import Guard
from qed_jax.serving.answers import ChatAnswers, CompletionAnswers
from qed_jax.serving.errors import ApiError
from qed_jax.serving.generation import Service
from qed_jax.serving.meters import GONE, Measured

ASSETS = Path(__file__).parent / "assets"
FILES = {
  "page.js": "text/javascript",
  "proof.js": "text/javascript",
  "page.css": "text/css",
  "temml.min.js": "text/javascript",
}
# Nothing from elsewhere and no script but these files; MathML sets style attributes.
POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "
  "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
  "content-security-policy": POLICY,
  "cache-control": "no-cache",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
}


def create_app(service: Service, *, key: str) -> FastAPI:
  """The application. key: asked for on every route but /health; "" for none."""

  @contextlib.asynccontextmanager
  async def lifespan(_):
    service.driver.start()
    yield
    await service.driver.stop(service.limits.grace_s)
    service.words.shutdown(wait=False, cancel_futures=True)

  app = FastAPI(
    lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
  )
  app.add_middleware(Guard, key=key)
  app.add_middleware(Measured, meters=service.meters)
  app.add_exception_handler(ApiError, api_error)
  app.add_exception_handler(HTTPException, http_error)
  app.add_exception_handler(ClientDisconnect, client_gone)
  app.add_exception_handler(Exception, internal_error)

  @app.post("/v1/chat/completions")
  async def chat(request: Request) -> Response:
    body = protocol.read(protocol.ChatBody, await read(request, service.limits), service.limits)
    thinking = body.thinking(service.sampling.thinking)
    encode = lambda: [service.tokenizer.chat(body.turns, thinking=thinking)]  # noqa: E731
    return await generation.answer(service, request, body, ChatAnswers, encode)

  @app.post("/v1/completions")
  async def completions(request: Request) -> Response:
    data = await read(request, service.limits)
    body = protocol.read(protocol.CompletionBody, data, service.limits)

    def encode() -> list[list[int]]:
      texts = body.prompts
      return [service.tokenizer.encode(p) if isinstance(p, str) else p for p in texts]

    return await generation.answer(service, request, body, CompletionAnswers, encode)

  def model() -> dict:
    length = service.driver.engine.max_length
    return {
      "id": service.name,
      "object": "model",
      "created": service.created,
      "owned_by": "qed_jax",
      "max_model_len": length,
    }

  @app.get("/v1/models")
  async def models() -> Response:
    return JSONResponse({"object": "list", "data": [model()]})

  @app.get("/v1/models/{name:path}")
  async def one_model(name: str) -> Response:
    generation.check_model(service, name)
    return JSONResponse(model())

  @app.get("/health")
  async def health() -> Response:
    driver = service.driver
    if driver.failure:
      return errors.response(ApiError(503, driver.failure, code="engine_failed"))
    if driver.step_seconds > service.limits.step_s:
      message = f"the engine has not come back from a step for {driver.step_seconds:.0f} s"
      return errors.response(ApiError(503, message, code="engine_stuck"))
    return JSONResponse({"status": "ok"})

  @app.get("/metrics")
  async def metrics() -> Response:
    content_type = prometheus_client.CONTENT_TYPE_LATEST
    return Response(service.meters.text(), headers={"content-type": content_type})

  @app.get("/")
  async def page() -> Response:
    return Response((ASSETS / "page.html").read_bytes(), 200, PAGE_HEADERS, "text/html")

  @app.get("/assets/{name}")
  async def asset(name: str) -> Response:
    if name not in FILES:
      raise HTTPException(404)
    return Response((ASSETS / name).read_bytes(), 200, PAGE_HEADERS, FILES[name])

  return app


async def read(request: Request, limits) -> bytes:
  """The body. Raises ApiError when it is not JSON by its type, too large or too slow in coming."""
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    # Also what keeps web pages out: they cannot send this type elsewhere without being asked.
    raise ApiError(415, "the content type must be application/json")
  too_large = ApiError(413, f"the body has more than {limits.body_bytes} bytes")
  length = request.headers.get("content-length", "")
  if length.isdecimal() and int(length) > limits.body_bytes:
    raise too_large
  data = bytearray()
  try:
    async with asyncio.timeout(limits.body_s):
      async for part in request.stream():
        data += part
        if len(data) > limits.body_bytes:
          raise too_large
  except TimeoutError:
    raise ApiError(408, f"the body did not come within {limits.body_s:g} s") from None
  return bytes(data)


async def api_error(_, error: ApiError) -> Response:
  """What this package says."""
  return errors.response(error)


async def client_gone(*_) -> Response:
  """Nobody reads it; the status is for the counters."""
  return Response(status_code=GONE)


async def http_error(_, error: HTTPException) -> Response:
  """What the router says: 404, 405."""
  said = {404: "there is no such route here", 405: "the route does not take this method"}
  message = said.get(error.status_code, str(error.detail))
  return errors.response(ApiError(error.status_code, message, headers=error.headers))


async def internal_error(_, error: Exception) -> Response:
  """A mistake of this program; the traceback goes to the log, not to the client."""
  return errors.response(ApiError(500, f"internal error ({type(error).__name__})"))
