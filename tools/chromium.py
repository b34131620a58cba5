"""Headless Chromium over its pipe, for tests and bench_report.py: no port, no driver, no network.

  python tools/chromium.py PAGE.html PICTURE.png

takes a picture of a page, and prints its title and its complaints as one line of JSON.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = (
  "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --mute-audio --no-first-run "
  "--proxy-server=direct:// --disable-background-networking --disable-component-update"
).split()


class Browser:
  """One page of a Chromium of its own. log: the events that came while it was waited for."""

  def __init__(self, size: tuple[int, int] = (900, 1100)):
    """size: of the window, in pixels."""
    self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    from_us, to_us = os.pipe(), os.pipe()
    flags = [*FLAGS, f"--user-data-dir={self.profile.name}", f"--window-size={size[0]},{size[1]}"]
    # The browser reads from descriptor 3 and writes to 4.
    command = 'exec "$@" 3<&"$IN" 4>&"$OUT"'
    self.process = subprocess.Popen(
      ["bash", "-c", command, "bash", PROGRAM, *flags, "about:blank"],
      pass_fds=(from_us[0], to_us[1]),
      env=os.environ | {"IN": str(from_us[0]), "OUT": str(to_us[1])},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(from_us[0])
    os.close(to_us[1])
    self.out, self.into = os.fdopen(from_us[1], "wb", 0), os.fdopen(to_us[0], "rb", 0)
    self.rest, self.count, self.session, self.log = b"", 0, None, []
    targets = self.call("Target.getTargets")["targetInfos"]
    target = next(t["targetId"] for t in targets if t["type"] == "page")
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self.session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **parameters) -> dict:
    """A command of the DevTools protocol -> its result."""
    self.count += 1
    message = {"id": self.count, "method": method, "params": parameters}
    message |= {"sessionId": self.session} if self.session else {}
    self.out.write(json.dumps(message).encode() + b"\0")
    while True:
      answer = self.read()
      if answer.get("id") == self.count:
        assert "error" not in answer, answer
        return answer["result"]
      self.log.append(answer)

  def read(self) -> dict:
    while b"\0" not in self.rest:
      part = self.into.read(1 << 16)
      assert part, "the browser has ended"
      self.rest += part
    message, _, self.rest = self.rest.partition(b"\0")
    return json.loads(message)

  def value(self, expression: str):
    """What the expression, or the promise that it is, has for a value in the page."""
    result = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
    )
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")

  def until(self, expression: str, seconds: float = 20.0):
    """Waits until it is true in the page -> its value."""
    end = time.monotonic() + seconds
    while not (found := self.value(f"(x => x instanceof Node || x)({expression})")):
      assert time.monotonic() < end, f"{expression}: {self.value('document.body.innerText')}"
      time.sleep(0.03)
    return found

  def open(self, url: str, ready: str = "true", **headers) -> None:
    """ready: an expression that becomes true when the page can be used."""
    self.log.clear()
    self.call("Network.setExtraHTTPHeaders", headers=headers)
    self.call("Page.navigate", url=url)
    self.until(f"document.readyState === 'complete' && ({ready})")

  def press(self, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
      self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

  def picture(self, path: Path, dark: bool = False) -> None:
    """A screenshot of what is in the window."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    self.call("Emulation.setEmulatedMedia", features=scheme)
    data = self.call("Page.captureScreenshot", format="png")["data"]
    path.write_bytes(base64.b64decode(data))

  def complaints(self) -> list[dict]:
    """Console errors, refused resources and exceptions."""
    self.value("1")
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [m["params"] for m in self.log if m.get("method") in kinds]

  def requests(self) -> list[str]:
    """The addresses outside of the page that were asked for since it was opened."""
    asked = [m["params"] for m in self.log if m.get("method") == "Network.requestWillBeSent"]
    urls = [params["request"]["url"] for params in asked]
    return [url for url in urls if not url.startswith("data:")]

  def close(self) -> None:
    self.process.terminate()
    self.process.wait(10)
    self.out.close()
    self.into.close()
    self.profile.cleanup()


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("page", type=Path)
  parser.add_argument("picture", type=Path)
  parser.add_argument("--dark", action="store_true")
  parser.add_argument("--at", default="", help="an anchor of the page, without #")
  parser.add_argument("--then", default="true", help="JavaScript to be run before the picture")
  parser.add_argument("--size", type=int, nargs=2, default=(1500, 1000), help="width and height")
  args = parser.parse_args()
  browser = Browser(args.size)
  browser.open(args.page.resolve().as_uri() + (f"#{args.at}" if args.at else ""))
  browser.value(args.then)
  time.sleep(0.5)
  browser.picture(args.picture, args.dark)
  print(json.dumps({"title": browser.value("document.title"), "complaints": browser.complaints()}))
  browser.close()
  return 0


if __name__ == "__main__":
  sys.exit(main())
