"""Plans: topologies by name, collectives read from HLO, bytes against the compiler's, remedies."""

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import cache_rl, rl, sft
from qed_jax import flags, optim, sharding, train
from qed_jax.model import qwen3
from qed_jax.planning import chips, collectives, memory, remedies, roofline, table
from qed_jax.records import Batch

PLANS = json.loads((Path(__file__).parent / "goldens" / "plans.json").read_text())
COMPILED = [plan for plan in PLANS if plan["source"] == "compiled"]
PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
MODEL = memory.sizes(sft.get_config())


T = 80  # no other size of the small model


def small(job=sft, **changes):
  """A config whose step compiles in seconds: the plain one's fields, a small model's sizes."""
  config = job.get_config()
  config.batch.update(row_length=T, rows=8, microbatch_rows=0)
  config.model.update(score_chunk=16, dtype="float32")
  return remedies.changed(config, changes)


# --- topologies


@pytest.mark.parametrize(
  ("name", "known", "devices"),
  [
    ("v5p:4x4x4", "v5p:4x4x4", 64), ("v5p-128", "v5p:4x4x4", 64), ("v6e-64", "v6e:8x8", 64),
    ("v5litepod-8", "v5e:2x4", 8), ("v5e:1x1", "v5e:1x1", 1), ("h200:1", "h200:1", 1),
  ],
)  # fmt: skip
def test_topologies_go_by_libtpus_and_clouds_names(name, known, devices):
  topology = chips.parse(name)
  assert (topology.name, topology.devices) == (known, devices)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("v5p:4x4", r"no topology '4x4' of v5p .* try v5p:2x2x4"),
    ("v6e-60", r"no topology '60 chips' of v6e .* try v6e:8x8"),
    ("v5:4x4x4", r"no chip 'v5' .* use v5e, v5p, v6e, h100, h200"),
    ("h200", r"no topology '' of h200 .* try h200:1"),
    ("h200:3", r"try h200:(2|4)"),
    ("", "no chip ''"),
  ],
)
def test_a_topology_that_does_not_exist_is_answered_with_the_nearest(name, expected):
  with pytest.raises(ValueError, match=expected) as error:
    chips.parse(name)
  assert "\n" not in str(error.value)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12))
def test_any_other_text_is_refused_in_one_line(name):
  try:
    chips.parse(name)
  except ValueError as error:
    assert len(str(error).splitlines()) == 1


def test_every_chip_has_a_peak():
  from qed_jax import metrics

  assert {c.device_kind for c in chips.CHIPS.values()} <= metrics.PEAK_FLOPS.keys()


# --- what is impossible


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"mesh.tensor": 3}, "config.mesh.tensor is 3, which does not divide 64 devices: use 2 or 4"),
    ({"mesh.fsdp": 7}, "fsdp=7 .* 28 devices of 64: set fsdp=-1"),
    ({"mesh.tensor": 16}, "tensor is 16, the model has 8 key heads: use one of 1, 2, 4, 8"),
    ({"batch.microbatch_rows": 24}, "microbatch_rows is 24, which .* = 16 .* use 16 or 32"),
    ({"batch.rows": 40}, "config.batch.rows is 40, no multiple of .* 16"),
    ({"mesh.sequence": 4, "batch.row_length": 1001}, "row_length is 1001, .* use 1024"),
  ],
)  # fmt: skip
def test_a_mesh_that_divides_nothing_is_refused_with_values_that_do(changes, expected):
  config = remedies.changed(sft.get_config(), {"mesh.sequence": 1, "mesh.tensor": 4} | changes)
  with pytest.raises(ValueError, match=expected) as error:
    memory.check(config, MODEL, memory.mesh_sizes(config, 64))
  assert "\n" not in str(error.value)


def test_slots_that_replicas_do_not_share_are_refused():
  config = cache_rl.get_config()
  config.rollout.slots = 100
  mesh = memory.mesh_sizes(config, 64)
  with pytest.raises(ValueError, match="config.rollout.slots is 100, .* 16 replicas .* use 112"):
    memory.engine_shapes(config.rollout, mesh)


# --- collectives


LOOP = """HloModule jit_f

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%scatter (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %dynamic-slice.1 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1, %c), dynamic_slice_sizes={16,8}
}

%body (t: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %t = (s32[], bf16[64,8]{1,0}) parameter(0)
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}, metadata={op_name="jit(f)/while/body/dot"}
  %fusion.1 = bf16[16,8]{1,0} fusion(%all-gather.1), kind=kCustom, calls=%scatter
  ROOT %tuple = (s32[], bf16[64,8]{1,0}) tuple(%i, %y)
}

%cond (t: (s32[], bf16[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (q: bf16[64,8]) -> bf16[64,8] {
  %q = bf16[64,8]{1,0} parameter(0)
  %while.1 = (s32[], bf16[64,8]{1,0}) while(%start), condition=%cond, body=%body
  %collective-permute-start.1 = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[]{:S(2)}, u32[]) collective-permute-start(%z), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}, backend_config={}
  %all-to-all.1 = f32[10]{0} all-to-all(%z), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %all-reduce.2 = f32[] all-reduce(%s), replica_groups={}, to_apply=%sum
  ROOT %out = bf16[64,8]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_collectives_are_read_in_every_notation_and_counted_by_the_loops_around_them():
  found = collectives.collectives(LOOP, {"data": 2, "fsdp": 2, "tensor": 2})
  seen = {(c.kind, c.axes): (c.times, c.sent) for c in found}
  assert seen == {
    ("all-gather", ("data",)): (36, 1024 / 2),
    ("reduce-scatter", ("fsdp", "tensor")): (36, 1024 * 3 / 4),
    ("collective-permute", ("data",)): (1, 32),
    ("all-to-all", ("tensor",)): (1, 20),
    ("all-reduce", ("data", "fsdp", "tensor")): (1, 2 * 4 * 7 / 8),
  }


def placed(mesh, shape, spec):
  return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))


def compiled_text(mesh, run, *shapes):
  with jax.set_mesh(mesh):
    return jax.jit(run).lower(*shapes).compile().as_text()


@pytest.mark.parametrize("steps", [1, 5])
def test_a_scan_of_gathers_counts_its_steps(steps):
  """XLA's own text of a program with known traffic: a weight gathered over fsdp in each step."""
  mesh = sharding.make_mesh(1, 4, 2, jax.devices()[:8])

  def run(x, w):
    def one(x, w):
      w = jax.lax.with_sharding_constraint(w, P(None, None))
      return jax.numpy.tanh(x @ w), None

    return jax.lax.scan(one, x, w)[0]

  text = compiled_text(
    mesh, run, placed(mesh, (8, 32), P("fsdp")), placed(mesh, (steps, 32, 32), P(None, "fsdp"))
  )
  found = collectives.collectives(text, dict(mesh.shape))
  assert collectives.by_axes(found) == {"fsdp": steps * 32 * 32 * 4 * 3 / 4}


@functools.cache
def small_step(tiny_with, mesh_shape, second_moment="float32"):
  """The small config's training step, compiled for eight CPU devices."""
  data, fsdp, sequence, tensor = mesh_shape
  model = tiny_with(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_heads=8, num_kv_heads=4, head_dim=8,
    remat="layer",
  )  # fmt: skip
  config = small(**{"optimizer.second_moment": second_moment})
  mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[:8], sequence=sequence)
  optimizer = optim.make_optimizer(**train.optimizer_arguments(config))
  state = train.abstract_state(model, optimizer, mesh, "float32")
  shape = (config.batch.rows, config.batch.row_length)
  where = NamedSharding(mesh, sharding.spec(sharding.ACTIVATIONS, "BT", shape, mesh))
  ints, floats = (jax.ShapeDtypeStruct(shape, t, sharding=where) for t in (np.int32, np.float32))
  with jax.set_mesh(mesh):
    step = jax.jit(train.make_update(config, model, optimizer), donate_argnums=0)
    return model, mesh, step.lower(state, Batch(ints, ints, ints, floats)).compile()


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1, 1), (1, 2, 4, 1), (1, 2, 1, 4)], ids=str)
def test_no_activation_is_gathered_where_none_should_be(tiny_with, mesh_shape):
  """On meshes like those of the plain configs nothing of a row's tokens and the width of the model
  or of the MLP is gathered, but over `tensor`, where the residual stream is by design."""
  model, mesh, program = small_step(tiny_with, mesh_shape)
  found = collectives.collectives(program.as_text(), dict(mesh.shape))
  gathers = [c for c in found if c.kind == "all-gather" and "tensor" not in c.axes]
  widths = {model.hidden_size, model.intermediate_size}
  activations = [c for c in gathers for s in c.shapes if widths & set(s) and {T, 8 * T} & set(s)]
  assert not activations
  weights = {
    np.prod(shape[1:]) / mesh.shape["tensor"]
    for path, shape in qwen3.shapes(model).items()
    if path.endswith("_proj")
  }
  assert weights <= {np.prod(shape) for c in gathers for shape in c.shapes}


def test_an_activation_that_is_gathered_would_be_seen():
  """The same program with its residual stream pinned whole has an all-gather of [B, T, D]."""
  mesh = sharding.make_mesh(1, 8, 1, jax.devices()[:8])
  run = lambda x: jax.lax.with_sharding_constraint(x * 2, P())  # noqa: E731
  text = compiled_text(mesh, run, placed(mesh, (8, 64, 64), P("fsdp")))
  [gather] = collectives.collectives(text, dict(mesh.shape))
  assert (gather.kind, gather.axes, gather.shapes) == ("all-gather", ("fsdp",), ((8, 64, 64),))


# --- bytes


@pytest.mark.parametrize("second_moment", ["float32", "bfloat16"])
def test_state_bytes_are_those_of_the_compiled_step(tiny_with, second_moment):
  """Weights and moments of the estimate, against the arguments of the program."""
  config = small(**{"optimizer.second_moment": second_moment})
  model, mesh, program = small_step(tiny_with, (1, 2, 1, 4), second_moment)
  estimated = memory.estimate(config, model, memory.MeshSizes(dict(mesh.shape)))
  state = estimated.weights + estimated.optimizer + estimated.batch
  arguments = program.memory_analysis().argument_size_in_bytes
  assert abs(state / arguments - 1) < 0.05


def stored(result: dict):
  """The config of a stored result, its model and its mesh."""
  named, *overrides = result["config"].split(" ")
  path, _, variant = named.partition(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  changes = dict(w.removeprefix("--config.").split("=") for w in overrides)
  config = module.get_config(variant)
  typed = {}
  for name, value in changes.items():
    block = config
    for part in name.split("."):
      block = block[part]
    typed[name] = type(block)(value)
  config = remedies.changed(config, typed)
  topology = chips.parse(result["topology"], result["slices"])
  return config, memory.sizes(config), memory.mesh_sizes(config, topology.devices), topology


@pytest.mark.parametrize("result", COMPILED, ids=lambda r: f"{r['config']} {r['topology']}")
def test_the_estimate_is_within_15_percent_of_the_compiler(result):
  """Of stored results of libtpu for the presets as they are now."""
  config, model, mesh, _ = stored(result)
  estimated = memory.estimate(config, model, mesh).total / 1e9
  assert abs(estimated / result["needed_gb"] - 1) < 0.15


@pytest.mark.parametrize("result", PLANS, ids=lambda r: f"{r['config']} {r['topology']}")
def test_the_presets_fit_their_chips(result):
  config, _, mesh, topology = stored(result)
  flags.check(config)
  assert result["fits"] and result["needed_gb"] * 1e9 <= topology.chip.memory
  assert result["mesh"] == mesh.shape
  if result["topology"].startswith("v5p") and result["row_length"] == 16_384:
    assert result["mfu_bound"] >= 0.55


@pytest.mark.parametrize("job", [rl, cache_rl, sft])
def test_the_gpu_variants_fit_an_h200_by_the_estimate(job):
  config = job.get_config("gpu")
  needed = memory.estimate(config, MODEL, memory.mesh_sizes(config, 1), on_tpu=False).total
  assert needed < 0.96 * chips.CHIPS["h200"].memory


def test_the_presets_that_are_promised_were_compiled():
  promised = {
    ("configs/cache_rl.py", "v5p:4x4x4"), ("configs/cache_rl.py", "v6e:8x8"),
    ("configs/sft.py", "v5e:8x8"),
  }  # fmt: skip
  assert promised <= {(plan["config"], plan["topology"]) for plan in COMPILED}


def test_the_page_shows_what_is_stored():
  assert table.replaced(PAGE, PLANS) == PAGE


def test_each_lever_takes_less():
  config = sft.get_config()
  mesh = memory.mesh_sizes(config, 64)

  def needs(**changes):
    changed = remedies.changed(config, changes)
    return memory.estimate(changed, memory.sizes(changed), mesh).total

  order = [needs(**{"model.remat": name}) for name in qwen3.REMAT]
  assert order == sorted(order, reverse=True)
  plain = needs()
  for lever in ({"optimizer.second_moment": "factored"}, {"optimizer.mu_dtype": "bfloat16"}):
    assert needs(**lever) < plain


def test_a_lora_block_trains_adapters_only():
  """Gradients and moments are of the adapters; the weights stay."""
  config = sft.get_config()
  config.lora = ConfigDict({"rank": 16, "targets": "all-linear", "sampler": "unmerged"})
  mesh = memory.mesh_sizes(config, 64)
  adapted = memory.estimate(config, MODEL, mesh)
  plain = memory.estimate(sft.get_config(), MODEL, mesh)
  assert 0.5 * plain.weights < adapted.weights < 0.55 * plain.weights  # bfloat16, and adapters
  assert adapted.optimizer < 0.02 * plain.optimizer and adapted.gradients < 0.02 * plain.gradients
  config.lora.targets = "q_proj"
  assert memory.adapter_parameters(MODEL, config.lora) == 16 * 36 * (2560 + 32 * 128)


# --- time


def test_useful_work_does_not_count_remat():
  """More recomputation is more time and a lower bound, for the same model FLOPs."""
  config = remedies.changed(sft.get_config(), {"batch.row_length": 16_384, "mesh.sequence": 1})
  mesh = memory.mesh_sizes(config, 32)
  chip = chips.CHIPS["v5p"]
  line = lambda remat: roofline.training(  # noqa: E731
    config, dataclasses.replace(MODEL, remat=remat), mesh, chip, {}
  )
  lines = [line(remat) for remat in ("none", "dots", "attention", "layer")]
  assert len({x.flops for x in lines}) == 1
  assert [x.mfu for x in lines] == sorted((x.mfu for x in lines), reverse=True)
  assert 0.55 < lines[-1].mfu < lines[0].mfu < 1


def test_bytes_between_slices_are_slower():
  config = sft.get_config()
  mesh, chip = memory.mesh_sizes(config, 64), chips.CHIPS["v5e"]
  inside, across = (
    roofline.training(config, MODEL, mesh, chip, {name: 1e12}) for name in ("data", "dcn:data")
  )
  assert across.seconds > 10 * inside.ici and across.bound_by == "dcn"


# --- remedies


def test_a_remedy_fits_and_is_the_cheapest_of_its_kind():
  """cache RL as it is does not fit a v5e; what is proposed does, by the same estimate."""
  topology = chips.parse("v5e-64")
  config = cache_rl.get_config()
  assert memory.estimate(config, MODEL, memory.mesh_sizes(config, 64)).total > topology.chip.memory
  found = remedies.cheapest(config, topology)
  assert found.bytes <= topology.chip.memory
  changed = remedies.changed(config, found.changes)
  model, mesh = memory.sizes(changed), memory.mesh_sizes(changed, 64)
  memory.check(changed, model, mesh)
  assert memory.estimate(changed, model, mesh).total == found.bytes
  assert re.fullmatch(r"(--config\.[\w.]+=\w+ ?)+", found.flags)
  flags.check(changed)


def test_one_lever_is_preferred_to_two_and_none_is_found_where_none_helps():
  config = remedies.changed(sft.get_config(), {"batch.microbatch_rows": 0})
  found = remedies.cheapest(config, chips.parse("v5e-64"))
  assert len({name.split(".")[0] for name in found.changes}) == 1
  alone = remedies.changed(cache_rl.get_config(), {"mesh.tensor": 1})
  assert remedies.cheapest(alone, chips.parse("v5e:1x1")) is None
