"""Prompt templates: text files with {name} placeholders, so that a diff of them reads as prose."""

import pathlib
import re

_FOLDER = pathlib.Path(__file__).parent
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def load(name_or_path: str) -> str:
  """The template called so here ("judge"), or the text of the file at that path.

  One newline at the end of the file is the editor's and not part of the template. Raises ValueError
  in one line when there is no such template or it is not UTF-8 text.
  """
  ours = sorted(path.stem for path in _FOLDER.glob("*.md"))
  path = _FOLDER / f"{name_or_path}.md" if name_or_path in ours else pathlib.Path(name_or_path)
  try:
    return path.read_text(encoding="utf-8").removesuffix("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"no prompt template {name_or_path!r} ({type(error).__name__}): "
      f"give the path of a text file or one of {', '.join(ours)}"
    ) from error


def fields(template: str) -> frozenset[str]:
  """Names of the template's placeholders: lower-case letters and underscores between braces."""
  return frozenset(_PLACEHOLDER.findall(template))


def render(template: str, **values: str) -> str:
  r"""The template with each {name} replaced by its value.

  One pass over the template alone: braces in a value, such as \frac{a}{b} or even {problem}, are
  left as they are. Values that the template does not ask for are passed over. Raises ValueError in
  one line for a placeholder without a value. A template that needs a literal {word} has { word }.
  """
  if missing := sorted(fields(template) - values.keys()):
    given = ", ".join(f"{{{name}}}" for name in sorted(values)) or "no placeholder"
    raise ValueError(f"the prompt template asks for {{{missing[0]}}}: what it can have is {given}")
  return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
