"""The page over HTTP on this machine, its texts whole, read from the runs' files when asked for."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qed_jax.reporting import viewer

HOST = "127.0.0.1"


def make(page: bytes, policy: str, sources: list, port: int) -> ThreadingHTTPServer:
  """A server of the page at / and of text i at /texts/i.

  sources: `viewer.sources`. port: 0 takes a free one. Raises OSError where it is taken.
  """

  class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "qed_jax", ""

    def do_GET(self) -> None:
      at = self.server.server_address[1]
      # A page elsewhere whose name was made to lead here must not read the runs.
      if self.headers.get("host") not in (f"{HOST}:{at}", f"localhost:{at}"):
        self.answer(403, b"ask for this page by the address that it was started with\n")
      elif self.path == "/":
        self.answer(200, page, "text/html; charset=utf-8")
      elif (i := index(self.path, len(sources))) is not None:
        text = json.dumps(viewer.text(sources[i], longest=None), ensure_ascii=False)
        self.answer(200, text.encode(), "application/json; charset=utf-8")
      else:
        self.answer(404, b"there is no such page here\n")

    def answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
      self.send_response(status)
      headers = {
        "content-type": kind,
        "content-length": str(len(body)),
        "content-security-policy": f"{policy}; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
      }
      for header, value in headers.items():
        self.send_header(header, value)
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_) -> None:
      """Quiet: nobody reads a line a text."""

  server = ThreadingHTTPServer((HOST, port), Handler)
  server.daemon_threads = True
  return server


def index(path: str, count: int) -> int | None:
  """The i of /texts/i, None for everything else."""
  digits = path.removeprefix("/texts/")
  plain = digits != path and digits.isascii() and digits.isdecimal() and len(digits) < 10
  return int(digits) if plain and int(digits) < count else None
