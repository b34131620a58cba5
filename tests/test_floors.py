"""Imports go down only: the picture of the house in README.md, held by the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAINS = {"train", "evaluate", "serve", "convert", "report", "curate"}
# A floor imports lower floors; the parts of the ground also one another, without cycles.
GROUND = {
  "records", "sharding", "breaker", "chat", "prompts", "metrics", "optim", "checkpoint",
  "checksums", "estimates", "flags", "host_memory", "host_state", "hosts", "journal", "replies",
  "tracing",
  "workdir",
}  # fmt: skip
MIDDLE = {"model", "data", "objectives", "rewards", "scaffolds"}
ABOVE_ROLLOUT = {"serving", "evaluation", "curation", "reporting", "planning"}
FLOORS = (GROUND, MIDDLE, {"rollout"}, ABOVE_ROLLOUT, MAINS)
KERNELS_CALLERS = ("qed_jax/model/attention.py", "qed_jax/model/head.py")
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "qed_kernels"}
ORBAX_CALLER = "qed_jax/checkpoint.py"


def floor(part: str) -> int:
  return next((i for i, parts in enumerate(FLOORS) if part in parts), -1)


def imported(source: str, package: tuple[str, ...]) -> set[str]:
  """Dotted names that a file imports anywhere in it; `package` is where its relative ones start."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else ()
      start = ".".join((*above, *filter(None, [node.module])))
      names |= {f"{start}.{alias.name}" for alias in node.names}
  return names


def parts_of(names: set[str]) -> set[str]:
  """The parts of qed_jax among dotted names: qed_jax.model.qwen3 is of the part model."""
  return {name.split(".")[1] for name in names if name.startswith("qed_jax.")}


def violations(sources: dict[str, str]) -> list[str]:
  """What is against the picture, in files given as {path from the root: text}."""
  found, ground = [], {}
  for path, source in sources.items():
    place = Path(path).with_suffix("").parts
    package = place[1:-1] if place[0] == "kernels" else place[:-1]
    names = imported(source, package)
    roots = {name.split(".")[0] for name in names}
    if "qed_kernels" in roots and path not in KERNELS_CALLERS and place[0] != "kernels":
      found.append(f"{path}: only {' and '.join(KERNELS_CALLERS)} import qed_kernels")
    if "orbax" in roots and path.startswith("qed_jax/") and path != ORBAX_CALLER:
      found.append(f"{path}: only {ORBAX_CALLER} touches orbax")
    if place[0] == "kernels":
      extra = {r for r in roots - KERNELS_MAY_IMPORT if r not in sys.stdlib_module_names}
      found += [f"{path}: kernels import jax only, not {root}" for root in extra]
    elif place[0] == "configs":
      extra = {r for r in roots - {"ml_collections", "configs"} if r not in sys.stdlib_module_names}
      found += [f"{path}: configs import ml_collections only, not {root}" for root in extra]
    elif place[0] == "qed_jax" and place[1] != "__init__":
      part, below = place[1], parts_of(names) - {place[1]}
      if floor(part) < 0:
        found.append(f"{path}: {part} is on no floor of tests/test_floors.py")
      if part in GROUND:
        ground.setdefault(part, set()).update(below & GROUND)
        below -= GROUND
      found += [f"{path}: {part} imports {b}" for b in below if floor(b) >= floor(part)]
  return found + [f"a cycle through {part}" for part in ground if part in reach(ground, part)]


def reach(edges: dict[str, set[str]], start: str) -> set[str]:
  """What can be reached from `start` in one step or more."""
  seen, queue = set(), list(edges[start])
  while queue:
    if (part := queue.pop()) not in seen:
      seen.add(part)
      queue += edges.get(part, ())
  return seen


def test_imports_go_down():
  """No file of the packages and configs imports a floor that is not below its own."""
  paths = [p for top in ("qed_jax", "kernels", "configs") for p in (ROOT / top).rglob("*.py")]
  sources = {p.relative_to(ROOT).as_posix(): p.read_text() for p in paths}
  assert len(sources) > 20
  assert violations(sources) == []


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("qed_jax/model/qwen3.py", "from qed_jax import rollout"),
    ("qed_jax/model/qwen3.py", "from qed_jax.data import problems"),
    ("qed_jax/rewards/exact.py", "def f():\n  import qed_jax.data.tiny_world"),
    ("qed_jax/rollout/engine.py", "from qed_jax.train import main"),
    ("qed_jax/rollout/engine.py", "from .. import serve"),
    ("qed_jax/evaluate.py", "from qed_jax import report"),
    ("qed_jax/records.py", "from qed_jax.model.qwen3 import Qwen3Config"),
    ("qed_jax/model/layers.py", "import qed_kernels.flash_attention"),
    ("qed_jax/train.py", "import orbax.checkpoint as ocp"),
    ("qed_jax/helpers.py", "x = 1"),
    ("configs/sft.py", "import jax"),
    ("configs/sft.py", "from qed_jax import flags"),
    ("kernels/qed_kernels/flash_attention/reference.py", "from qed_jax import sharding"),
    ("kernels/qed_kernels/flash_attention/reference.py", "import flax"),
  ],
)
def test_a_breach_is_seen(path, source):
  """The check notices each kind of import that the picture forbids."""
  assert violations({path: source})


def test_a_cycle_on_the_ground_is_seen():
  """Parts of the ground floor may import one another, but not in a circle."""
  down = {"qed_jax/chat.py": "from qed_jax import records", "qed_jax/records.py": ""}
  assert violations(down) == []
  assert violations(down | {"qed_jax/records.py": "from qed_jax.chat import HttpChat"})


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("qed_jax/model/attention.py", "import qed_kernels"),
    ("qed_jax/model/head.py", "from qed_kernels.score_head import score_head"),
    ("qed_jax/model/qwen3.py", "from qed_jax.model import layers\nimport qed_jax.sharding"),
    ("qed_jax/rollout/engine.py", "from qed_jax.model import qwen3\nfrom . import sampler"),
    ("qed_jax/train.py", "from qed_jax.rollout import engine\nfrom qed_jax import records"),
    ("configs/rl.py", "import dataclasses\nfrom configs import common\nimport ml_collections"),
    ("kernels/qed_kernels/decode_attention/__init__.py", "import math\nfrom . import reference"),
  ],
)  # fmt: skip
def test_what_goes_down_is_allowed(path, source):
  """The check has nothing against the imports that the picture asks for."""
  assert violations({path: source}) == []
