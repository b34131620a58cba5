"""Scaffolds by name, with their sources' parameters: get("reasoning_cache")."""

from ml_collections import ConfigDict


def get(name: str, tiny: bool = False) -> ConfigDict:
  """The scaffold's parameters; `name` in them says which. tiny: for the tiny world's budgets."""
  if name not in ("direct", "reasoning_cache"):
    raise ValueError(f"no scaffold {name!r}: use direct or reasoning_cache")
  c = ConfigDict({"name": name})
  c.prompt = "reason"
  c.reason = ConfigDict({"max_tokens": 49_152, "temperature": 0.8, "top_p": 0.95, "top_k": 20})
  if tiny:
    c.prompt = "tiny_reason"
    c.reason.max_tokens = 22
  if name == "reasoning_cache":
    c.turns = 6 if tiny else 3
    c.summarise = "tiny_summarise" if tiny else "summarise"
    c.summary = ConfigDict({
      "max_tokens": 26 if tiny else 2_048, "temperature": 0.7, "top_p": 0.8, "top_k": 20
    })  # fmt: skip
  return c
