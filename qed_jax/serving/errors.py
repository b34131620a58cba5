"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping

from fastapi.responses import JSONResponse

LONGEST = 500  # characters of a message, which may quote what a client sent


class ApiError(Exception):
  """What a client is told. status: of HTTP. param: the field at fault. code: for programs."""

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = dict(headers or {})

  @property
  def body(self) -> dict:
    """As JSON; streams send it as an event."""
    kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
    kind = "server_error" if self.status >= 500 else kind
    message = " ".join(self.message.split())[:LONGEST]
    return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def response(error: ApiError) -> JSONResponse:
  """The error as an answer."""
  return JSONResponse(error.body, error.status, error.headers)
