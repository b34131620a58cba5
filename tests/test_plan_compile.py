"""tools/plan.py against the real TPU compiler, on a model of two layers: `make aot`."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import cache_rl, sft
from qed_jax import sharding
from qed_jax.model import presets
from qed_jax.planning import chips, memory, remedies

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: `make aot` does it"
)


def small(job, **changes):
  """The plain config with few and short rows; its model has two layers of 0.6B's."""
  config = remedies.changed(job.get_config(), {
    "batch.row_length": 2048, "batch.rows": 8, "batch.microbatch_rows": 4, **changes,
  })  # fmt: skip
  sizes = {"dtype": "bfloat16", "remat": config.model.remat, "attention": "auto"}
  model = presets.from_preset("qwen3-0.6b", **sizes)
  return config, dataclasses.replace(model, num_layers=2, vocab_size=4096)


@pytest.mark.aot
@needs_libtpu
def test_a_step_of_each_kind_compiles_and_needs_what_the_estimate_says():
  """Cache RL on eight v5e chips: training, init, reshard, prefill and decode. Weights, moments and
  pages are those of the estimate; gradients and activations move between chips over the mesh's axes
  and nothing else."""
  import plan_programs

  config, model = small(cache_rl, **{
    "mesh.tensor": 2, "rollout.max_length": 2048, "rollout.slots": 16, "rollout.pages": 64,
    "rollout.problems": 1, "rollout.attempts": 4,
  })  # fmt: skip
  topology = chips.parse("v5e:2x4")
  lines = []
  found = plan_programs.compile_all(config, model, topology, lines.append)
  assert set(found) == {"train step", "optimizer init", "weight reshard", "prefill", "decode"}
  assert len(lines) == 2 * len(found) and not any(c.refused for c in found.values())
  estimated = memory.estimate(config, model, memory.mesh_sizes(config, 8))
  state = estimated.weights + estimated.optimizer + estimated.batch
  assert abs(found["train step"].arguments / state - 1) < 0.05
  assert found["train step"].aliased > 0.9 * (estimated.weights + estimated.optimizer)  # donated
  assert abs(found["weight reshard"].outputs / estimated.sampler - 1) < 0.05
  pages = found["decode"].aliased
  assert pages >= estimated.kv > 0.5 * pages  # the state of the slots is beside the pages
  assert found["decode"].temporaries < 0.5 * estimated.kv
  assert found["prefill"].aliased >= estimated.kv > 2 * found["prefill"].temporaries  # no copy
  assert {"fsdp", "tensor"} <= set("+".join(found["train step"].sent).split("+"))
  assert "fsdp" in found["weight reshard"].sent


@pytest.mark.aot
@needs_libtpu
def test_remat_policies_do_what_they_say_on_a_tpu():
  """ "attention" keeps more than "layer"; "offload" keeps layers' inputs in the host's memory."""
  import plan_programs

  scratch, host = {}, {}
  for remat in ("attention", "layer", "offload"):
    config, model = small(sft, **{
      "model.remat": remat, "mesh.sequence": 1, "batch.rows": 4, "batch.microbatch_rows": 0,
      "batch.row_length": 8192,
    })  # fmt: skip
    model = dataclasses.replace(model, num_layers=8)
    programs = plan_programs.programs(config, model, chips.parse("v5e:2x2"))
    name, lower, mesh = next(iter(programs))
    compiled = plan_programs.compiled(lower, mesh)
    scratch[remat], host[remat] = compiled.temporaries, compiled.host
  assert scratch["attention"] > scratch["layer"] > scratch["offload"]
  assert host["offload"] >= 8 * 8192 * 1024 * 2 > host["layer"]


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("name", ["v6e:8x8", "v5e:8x8", "v5p:4x4x4"])
@pytest.mark.parametrize(("sequence", "tensor"), [(1, 4), (4, 1), (1, 2), (2, 2)])
def test_meshes_of_the_plain_configs_can_be_laid_over_pods(name, sequence, tensor):
  """jax.make_mesh refuses tensor=4 on 8 x 8 chips of a v6e."""
  import plan_programs

  chips_of_pod = plan_programs.devices(chips.parse(name))
  mesh = sharding.make_mesh(1, -1, tensor, chips_of_pod, sequence=sequence)
  assert mesh.size == 64 and len({d.id for d in mesh.devices.flat}) == 64


@pytest.mark.aot
@needs_libtpu
def test_a_program_that_is_too_large_is_reported_not_raised():
  import plan_programs

  mesh = sharding.make_mesh(1, 1, 1, plan_programs.devices(chips.parse("v5e:1x1")))
  size = jax.ShapeDtypeStruct((5 << 30,), "float32", sharding=sharding.whole(mesh))
  compiled = plan_programs.compiled(lambda: jax.jit(lambda x: x + 1).lower(size), mesh)
  assert "15.75G" in compiled.refused
  assert compiled.temporaries > chips.CHIPS["v5e"].memory


def plan(*words):
  command = [sys.executable, "tools/plan.py", *words]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_tool_says_fits_and_does_not_fit(tmp_path):
  """Exit codes 0, 1 and 2; the last line is JSON, a refusal one line of its own."""
  saved = tmp_path / "plans.json"
  page = tmp_path / "page.md"
  page.write_text("a\n<!-- plans:begin -->\nold\n<!-- plans:end -->\nz\n")
  good = plan(
    "--config=configs/sft.py:gpu", "--topology=h200:1", f"--save={saved}", f"--table={page}"
  )
  assert good.returncode == 0, good.stderr
  result = json.loads(good.stdout.splitlines()[-1])
  assert result["fits"] and result["source"] == "estimate" and "ESTIMATED" in good.stdout
  assert json.loads(saved.read_text()) == [result]
  assert "`configs/sft.py:gpu`" in page.read_text() and "old" not in page.read_text()
  bad = plan("--config=configs/sft.py:gpu", "--topology=h100:1")
  result = json.loads(bad.stdout.splitlines()[-1])
  assert bad.returncode == 1 and not result["fits"] and "DOES NOT FIT" in bad.stdout
  assert result["remedy"]["flags"] in bad.stdout
  wrong = plan("--config=configs/sft.py", "--topology=v5p:4x4")
  assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1
  assert "v5p:2x2x4" in wrong.stderr
