"""Who may ask: a key on every route but /health, or this machine alone."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import re

from starlette.datastructures import Headers

from qed_jax.serving import errors
from qed_jax.serving.errors import ApiError

OPEN = "/health"


def read_key(variable: str) -> str:
  """The key in an environment variable, "" for none. Raises ValueError, one line, without it."""
  if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", variable):  # it may be the key itself
    raise ValueError(
      "config.api_key_env must be the NAME of an environment variable, such as QED_JAX_API_KEY"
    )
  key = os.environ.get(variable, "").strip()
  if not (key.isascii() and (key.isprintable() or not key)):
    raise ValueError(f"the environment variable {variable} holds no key: give one line of ASCII")
  return key


def check_address(host: str, key: str, variable: str) -> None:
  """Raises ValueError where others could reach a server without a key."""
  if not key and not is_loopback(host):
    raise ValueError(
      f"--host={host} lets others in: set a key in the environment variable {variable}, or keep "
      "to 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
  """Whether a name or address is this machine's own."""
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return host.lower() == "localhost"


class Guard:
  """ASGI: denies by default, before any route is looked for.

  With a key: `Authorization: Bearer KEY`, or Basic with the key as the password, which browsers ask
  for by themselves when the page is opened. Without one: only what is addressed to this machine,
  since a web page elsewhere may point a name of its own here.
  """

  def __init__(self, app, key: str):
    self.app, self._digest = app, digest(key.encode()) if key else b""

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] == "websocket":  # there is none here
      return await send({"type": "websocket.close", "code": 1008})
    refusal = None
    if scope["type"] == "http" and scope["path"] != OPEN:
      refusal = self._refusal(Headers(scope=scope))
    if refusal is not None:
      return await errors.response(refusal)(scope, receive, send)
    await self.app(scope, receive, send)

  def _refusal(self, headers: Headers) -> ApiError | None:
    if not self._digest:
      host = re.sub(r":\d*$", "", headers.get("host", ""))
      if is_loopback(host):
        return None
      return ApiError(403, "without a key this server answers to localhost only", code="host")
    for given in credentials(headers.get("authorization", "")):
      if hmac.compare_digest(digest(given), self._digest):
        return None
    challenge = {"www-authenticate": 'Basic realm="qed_jax", charset="UTF-8"'}
    message = "a key is needed: Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers=challenge)


def credentials(header: str) -> list[bytes]:
  """The key that an Authorization header holds, if any."""
  scheme, _, value = header.partition(" ")
  if scheme.lower() == "bearer":
    return [value.strip().encode("latin-1")]
  if scheme.lower() == "basic":
    try:
      return [base64.b64decode(value.strip(), validate=True).partition(b":")[2]]
    except (binascii.Error, ValueError):
      return []
  return []


def digest(key: bytes) -> bytes:
  """Of equal length for all keys, so that comparing them tells nothing of the length either."""
  return hashlib.sha256(key).digest()
