"""A workdir belongs to one config, and says which versions and machine it came from."""

import json
import os
import subprocess

import pytest

from qed_jax import workdir

CONFIG = {
  "job": "sft",
  "steps": 10,
  "optim": {"lr": 1e-3, "betas": (0.9, 0.95), "clip": None},
  "log": {"every": 5},
}


def test_same_config_passes_and_a_new_workdir_too(tmp_path):
  """Nothing there, or the same values (tuples come back as lists): no complaint."""
  workdir.check_same_config(tmp_path / "new", CONFIG)
  workdir.write_run_files(tmp_path / "new", CONFIG)
  workdir.check_same_config(tmp_path / "new", CONFIG)
  assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "env.json"]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"job": "rl"}, ['job: "sft" there, "rl" here']),
    ({"steps": 11}, ["steps: 10 there, 11 here"]),
    ({"steps": True}, ["steps: 10 there, true here"]),
    ({"optim": {"lr": 2e-3, "betas": (0.9, 0.95), "clip": 1.0}},
     ["optim.lr: 0.001 there, 0.002 here", "optim.clip: null there, 1.0 here"]),
    ({"optim": {"lr": 1e-3, "clip": None}}, ["optim.betas: [0.9, 0.95] there, absent here"]),
    ({"optim": {}}, ["optim.lr: 0.001 there, absent here", "optim: absent there, {} here"]),
    ({"new": {"field": 1}}, ["new.field: absent there, 1 here"]),
    ({"log": {"every": 6}}, ["log.every: 5 there, 6 here"]),
  ],
)  # fmt: skip
def test_another_config_is_refused_with_the_fields(tmp_path, change, said):
  """Every differing field is named with both values, in one line; nothing is changed on disk."""
  workdir.write_run_files(tmp_path, CONFIG)
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(ValueError) as error:
    workdir.check_same_config(tmp_path, CONFIG | change)
  message = str(error.value)
  assert all(text in message for text in said) and "\n" not in message
  assert str(tmp_path) in message and "--workdir" in message
  assert (tmp_path / "config.json").read_text() == before


def test_ignored_fields_may_differ(tmp_path):
  """`ignore` names fields or whole blocks, and no field that merely begins alike."""
  workdir.write_run_files(tmp_path, CONFIG | {"logs": 1})
  changed = CONFIG | {"logs": 1, "log": {"every": 6, "more": 1}, "steps": 20}
  workdir.check_same_config(tmp_path, changed, ignore=("log", "steps"))
  with pytest.raises(ValueError, match="logs: 1 there, 2 here"):
    workdir.check_same_config(tmp_path, changed | {"logs": 2}, ignore=("log", "steps"))


def test_damaged_config_file_is_named(tmp_path):
  """A config.json that is not JSON is an error that says which file."""
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not JSON"):
    workdir.check_same_config(tmp_path, CONFIG)


def test_env_file_names_versions_and_never_the_environment(tmp_path, monkeypatch):
  """env.json holds an allow-list; a secret in the environment does not reach the workdir."""
  monkeypatch.setenv("QED_TEST_API_KEY", "sk-canary-1234")
  workdir.write_run_files(tmp_path, CONFIG)
  env = json.loads((tmp_path / "env.json").read_text())
  assert set(env) == {
    "python", "packages", "platform", "device_kind", "devices", "processes", "git"
  }  # fmt: skip
  assert env["packages"]["jax"] and env["packages"]["orbax-checkpoint"]
  assert all("canary" not in p.read_text() for p in tmp_path.iterdir())


def test_git_commit(tmp_path, monkeypatch):
  """The commit of the code's own repository, marked when changed; none when it is not tracked."""
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
  monkeypatch.setattr(workdir, "__file__", str(tmp_path / "workdir.py"))
  assert workdir._git_commit() is None
  (tmp_path / "workdir.py").write_text("x = 1\n")
  subprocess.run([*git, "init", "-q"], check=True)
  assert workdir._git_commit() is None
  subprocess.run([*git, "add", "workdir.py"], check=True)
  subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
  done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
  assert workdir._git_commit() == done.stdout.strip()
  (tmp_path / "workdir.py").write_text("x = 2\n")
  assert workdir._git_commit() == done.stdout.strip() + "+"


def test_a_workdir_of_before_a_field_resumes(tmp_path):
  """What its absence meant is what the field now says, and nothing else is."""
  config = {"mesh": {"data": 1, "sequence": 1, "tensor": 2}}
  (tmp_path / "config.json").write_text(json.dumps({"mesh": {"data": 1, "tensor": 2}}))
  workdir.check_same_config(tmp_path, config)
  config["mesh"]["sequence"] = 2
  with pytest.raises(ValueError, match="mesh.sequence: 1 there, 2 here"):
    workdir.check_same_config(tmp_path, config)
