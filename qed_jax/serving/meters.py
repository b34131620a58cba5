"""What /metrics shows: requests as HTTP sees them, and the engine's own counters."""

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
GONE = 499  # nginx's status for a client that did not wait


class Meters:
  """Counters of this server, in a registry of their own. engine: () -> {name: value}."""

  def __init__(self, engine: Callable[[], Mapping[str, float]]):
    self.registry = CollectorRegistry()
    name, made = "qed_jax", {"registry": self.registry}
    self.requests = Counter(f"{name}_requests", "Requests answered", ["route", "status"], **made)
    self.seconds = Histogram(
      f"{name}_request_seconds", "Until the last byte", ["route"], buckets=SECONDS, **made
    )
    self.first_text = Histogram(
      f"{name}_first_text_seconds", "Until the first text of a stream", buckets=SECONDS, **made
    )
    self.prompt_tokens = Counter(f"{name}_prompt_tokens", "Tokens of prompts", **made)
    self.completion_tokens = Counter(f"{name}_completion_tokens", "Tokens of answers", **made)
    self.registry.register(EngineFigures(engine))

  def text(self) -> bytes:
    """All of them in Prometheus's format."""
    return generate_latest(self.registry)


class EngineFigures:
  """The engine's counters (names that end in _total) and gauges, as the last step left them."""

  def __init__(self, engine: Callable[[], Mapping[str, float]]):
    self._engine = engine

  def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
    """What prometheus_client asks for."""
    for name, value in self._engine().items():
      kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
      described = name.removesuffix("_total").replace("_", " ")
      yield kind(f"qed_jax_engine_{name}", f"Engine: {described}", value=value)


class Measured:
  """ASGI: counts every request under its route and status, and its seconds."""

  def __init__(self, app, meters: Meters):
    self.app, self.meters = app, meters

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    start, status = time.monotonic(), GONE

    async def watch(message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      await self.app(scope, receive, watch)
    finally:
      # A path that is no route is the client's invention, and labels must stay few.
      route = getattr(scope.get("route"), "path", "none")
      self.meters.requests.labels(route, status).inc()
      self.meters.seconds.labels(route).observe(time.monotonic() - start)
