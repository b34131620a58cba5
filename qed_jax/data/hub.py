"""Folders of the Hugging Face hub at a pinned revision, with errors of one line."""

import pathlib
import re
from collections.abc import Sequence

import huggingface_hub


def is_hub_id(name: str) -> bool:
  """Whether a name could be a hub repository: "owner/name" or "name"."""
  return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def fetch(
  repo_id: str, *, kind: str, revision: str | None, patterns: Sequence[str]
) -> pathlib.Path:
  """Downloads the files that match `patterns` and returns the local folder that holds them.

  kind: "model" or "dataset". Files already in the local cache are not fetched again. Raises
  ValueError in one line without a revision or when the hub does not give the files.
  """
  if not revision:
    raise ValueError(f"hub {kind} {repo_id!r} needs a revision; give the commit hash to read")
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repo_id, repo_type=kind, revision=revision, allow_patterns=list(patterns)
      )
    )
  except Exception as error:
    # The client raises its own kinds, httpx's and OSErrors, many of them over several lines.
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    raise ValueError(
      f"hub {kind} {repo_id!r} at revision {revision!r} could not be fetched ({reason}); "
      "check the names and the network, or give a local path"
    ) from error
