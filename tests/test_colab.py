"""The notebook: few cells to the first step, and cells that run here with the tiny world."""

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from qed_jax import flags

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "tools" / "colab.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def settings(**changes) -> str:
  """The first cell with other values."""
  text = CODE[0]
  for name, value in changes.items():
    text, found = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", text, flags=re.M)
    assert found == 1, name
  return text


def test_four_cells_lead_to_the_first_step():
  """The fourth trains; all are plain Python, were saved without results, and import no jax."""
  [first] = [i for i, text in enumerate(CODE) if 'train("sft")' in text]
  assert first < 4 and NOTEBOOK["nbformat"] == 4
  for cell in NOTEBOOK["cells"]:
    assert not cell.get("outputs") and cell.get("execution_count") is None
  for text in CODE:
    imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in imported for a in n.names} | {
      getattr(n, "module", "") for n in imported
    }
    assert not any(name.split(".")[0] in ("jax", "qed_jax", "flax") for name in names if name)


VARIANTS = json.loads(re.search(r"VARIANT.*@param (.*)", CODE[0])[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_choices_and_fields_are_those_of_the_configs(variant):
  """Every variant that can be chosen, and each field that a cell sets, exists."""
  jobs = re.findall(r'train\("(\w+)"', "".join(CODE))
  assert jobs == ["sft", "cache_rl"]
  configs = [importlib.import_module(f"configs.{job}").get_config(variant) for job in jobs]
  for config in configs:
    flags.check(config)
  for field in re.findall(r"--config\.([\w.]+)=", "".join(CODE)):
    node = configs[1]
    for part in field.split("."):
      assert part in node, field
      node = node[part]


class Hub:
  """A repository of the hub that is a folder."""

  folder: Path

  def create_repo(self, name, private, exist_ok):
    assert private and exist_ok and name == "someone/runs"
    self.folder.mkdir(exist_ok=True)

  def snapshot_download(self, name, local_dir):
    shutil.copytree(self.folder, local_dir)

  def upload_folder(self, repo_id, folder_path, ignore_patterns, delete_patterns):
    assert delete_patterns == "*"
    shutil.rmtree(self.folder)
    shutil.copytree(folder_path, self.folder, ignore=shutil.ignore_patterns(*ignore_patterns))


@pytest.mark.slow
def test_the_cells_train_and_go_on_after_the_session_is_lost(tmp_path, monkeypatch, capsys):
  """Cells 1 to 6 with the tiny world and a hub; then a new session, which has the hub alone."""
  monkeypatch.delenv("XLA_FLAGS")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
  Hub.folder = tmp_path / "hub"
  monkeypatch.setattr(huggingface_hub, "HfApi", Hub)

  def session(name, cells):
    here = tmp_path / name
    here.mkdir()
    monkeypatch.chdir(here)
    own = {"VARIANT": "tiny", "STEPS": 21, "KEEP_IN": "hub", "HUB_REPOSITORY": "someone/runs"}
    space = {}
    for text in [settings(**own, SOURCE=str(ROOT)), *cells]:
      exec(compile(text, "cell", "exec"), space)
    return capsys.readouterr().out

  out = session("first", CODE[1:6])
  assert "finished at step 21" in out and "loss" in out and "wrote " in out
  assert (tmp_path / "hub" / "sft" / "checkpoints" / "21").is_dir()
  assert list((tmp_path / "hub" / "export").glob("*.safetensors"))
  shutil.rmtree(tmp_path / "first")
  assert "resuming" in session("second", CODE[1:4])


def test_a_place_without_the_program_is_one_line(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  space = {}
  exec(settings(VARIANT="tiny"), space)
  with pytest.raises(ValueError, match="set SOURCE in the first cell"):
    exec(CODE[1], space)


def test_a_program_that_fails_stops_the_cell(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  space = {}
  exec(settings(VARIANT="tiny"), space)
  exec(CODE[1], space)
  with pytest.raises(RuntimeError, match="exit code 3"):
    space["run"](space["sys"].executable, "-c", "print('said'); raise SystemExit(3)")
  assert "said" in capsys.readouterr().out
