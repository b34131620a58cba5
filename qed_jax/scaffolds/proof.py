"""Where the reasoning of a completion ends and its proof begins."""

THINK, THINK_END = "<think>", "</think>"


def split_proof(text: str) -> tuple[str, str]:
  """(reasoning, proof): before the first and after the last </think>, stripped.

  A completion that was cut inside its reasoning has no delimiter: all of it is reasoning, and the
  proof is empty. The prompt already ended with <think>, so the text normally has no opening tag.
  """
  reasoning, found, _ = text.partition(THINK_END)
  proof = text.rpartition(THINK_END)[2] if found else ""
  return reasoning.replace(THINK, "").strip(), proof.strip()
