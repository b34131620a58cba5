"""The page: one HTML file whose policy admits its own styles and scripts by hash, nothing else."""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent
# One way to mathematics for the server's page and this one: Temml, which makes MathML.
MATHEMATICS = HERE.parent / "serving" / "assets"


def digest(text: str) -> str:
  """The source expression by which a content security policy admits this very text."""
  return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


@functools.cache
def styles() -> Markup:
  return Markup((HERE / "page.css").read_text())  # noqa: S704, a file of ours


@functools.cache
def scripts() -> tuple[Markup, ...]:
  """Temml under its licence, what turns texts into nodes, and the viewer."""
  licence = (MATHEMATICS / "temml.LICENSE").read_text()
  parts = (
    f"/*\n{licence}*/\n" + (MATHEMATICS / "temml.min.js").read_text(),
    (MATHEMATICS / "proof.js").read_text(),
    (HERE / "viewer.js").read_text(),
  )
  assert not any("</script" in part or "<!--" in part for part in parts)
  return tuple(Markup(part) for part in parts)  # noqa: S704, files of ours


def policy(live: bool, served: bool) -> str:
  """The content security policy. live: with the viewer's scripts. served: from our own server,
  which is asked for texts."""
  parts = ["default-src 'none'", "img-src data:", f"style-src '{digest(styles())}'"]
  if live:
    sources = " ".join(f"'{digest(script)}'" for script in scripts())
    # MathML's style attributes; nothing else on the page has any.
    parts += [f"script-src {sources}", "style-src-attr 'unsafe-inline'"]
    parts += ["require-trusted-types-for 'script'", "trusted-types 'none'"]
  if served:
    parts.append("connect-src 'self'")
  return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


@functools.cache
def template() -> jinja2.Template:
  env = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return env.get_template("page.html.jinja")


PARTS = ("notes", "results", "stages", "groups", "config", "env", "benchmarks", "pairs", "judges")
PICTURES = ("scores", "length", "benchmark", "tokens", "judge")


def render(viewer: dict | None = None, *, served: bool = False, **parts) -> str:
  """The page of these parts; what is not given is empty. viewer: `viewer.packed`, or None for a
  page without problems to browse, and without scripts."""
  empty = dict.fromkeys(PARTS, ()) | {"pictures": dict.fromkeys(PICTURES)}
  return template().render(
    empty
    | {
      "css": styles(),
      "policy": policy(viewer is not None, served),
      "scripts": scripts() if viewer else (),
      "viewer": viewer,
    }
    | parts
  )
