"""The trainer: python -m qed_jax.train --config=configs/sft.py:tiny --workdir=runs/sft

SFT, rubric RL and cache RL are one loop: a stream of Batches and an objective. Run the same command
again to resume. SIGTERM saves and exits with code 0. Metrics go to metrics.jsonl and tb/, graded
rollouts to samples.jsonl, both in the workdir. On several hosts, run the same command on each.
"""

import dataclasses
import functools
import signal
import time

import jax
import jax.numpy as jnp
from etils import epath

from qed_jax import flags, hosts, optim, sharding, workdir
from qed_jax.chat import Unavailable
from qed_jax.checkpoint import Checkpoints
from qed_jax.data import packing
from qed_jax.evaluation.held_out import HeldOut
from qed_jax.model import flops, lora, qwen3
from qed_jax.objectives import merge, policy_gradient, sft
from qed_jax.rollout import jobs, policy
from qed_jax.rollout.step_log import Step, StepLog
from qed_jax.tracing import Trace

# Fields that may change between two runs of a workdir.
RESUMABLE = ("log", "checkpoint", "judge", "profile", "eval")


def main(config, folder: str) -> None:
  root = epath.Path(folder)

  # --- What to train, and whether this machine can ---------------------------------------------
  workdir.check_same_on_hosts(folder, config.to_dict())
  workdir.check_same_config(root, config.to_dict(), ignore=RESUMABLE)
  jobs.check_shares(config)
  trace = Trace(root / "profile", config.profile.steps)
  adapter = lora.from_config(config.lora)
  policy.check_memory(config)
  mesh, sampling_mesh = jobs.meshes(config)
  start = policy.locate(config.init, config.init_revision)
  model = policy.sizes(start, config.model)
  policy.check_adapter(adapter, start, model)
  examples = jobs.data(config)
  tokenizer = jobs.tokenizer(config, start, root)
  policy.check_vocabulary(model, tokenizer)

  # --- Optimizer and state ---------------------------------------------------------------------
  optimizer = optim.make_optimizer(**optimizer_arguments(config))
  abstract = abstract_state(model, optimizer, mesh, config.model.param_dtype, adapter)
  checkpoints = Checkpoints(root / "checkpoints", keep=config.checkpoint.keep)
  restored = checkpoints.restore_latest(abstract)
  frozen = {}
  if adapter is not None:
    frozen, base = policy.load_frozen(adapter, start, model, mesh, config.seed)
    policy.save_adapter(root / policy.DESCRIPTION, adapter, base)
    print(f"training {lora.describe(adapter, model)}; {base.name} stays as it is", flush=True)
  if restored is None:
    first, host_state = 0, None
    params = policy.load_trained(adapter, start, model, abstract["params"], config.seed)
    opt_state = jax.jit(optimizer.transform.init, out_shardings=layout(abstract["opt_state"]))(
      params
    )
    state = {"params": params, "opt_state": opt_state}
  else:
    first, state, host_state = restored
    print(f"resuming {root} from step {first}", flush=True)

  workdir.write_run_files(root, config.to_dict())
  workdir.check_shared(root)
  policy.save_description(root / "model", model, tokenizer)

  # --- The stream of batches, and what to do with one -----------------------------------------
  stopped = hosts.stopping(on_sigterm())
  whole = abstract["params"]
  if adapter is not None:
    whole = policy.abstract_params(model, mesh, model.dtype)
  stream = jobs.stream(
    config, model, sampling_mesh, tokenizer, examples, start, whole, root, stopped
  )
  if host_state is not None:
    stream.restore(host_state["stream"])
  update = jax.jit(
    make_update(config, model, optimizer, adapter),
    donate_argnums=0,
    out_shardings=(layout(abstract), None),
  )

  add_reference = reference_scorer(config, model, mesh, start, abstract["params"], adapter, frozen)
  balance = functools.partial(
    packing.balanced,
    shards=max(1, sharding.rows_divisor(mesh) // hosts.count()),
    rows_at_once=config.batch.microbatch_rows // hosts.count(),
    overhead=flops.keys_per_token(model),
  )
  for_sampler = sampler_view(config, adapter, frozen)

  # --- The loop ------------------------------------------------------------------------------
  log = StepLog(root, config, model, first, stream.lag)
  held_out = HeldOut(config, model, mesh, tokenizer, root, first, stopped)
  step, fault = first, None
  for step in range(first, config.steps):
    if held_out.due(step) and not held_out.evaluate(step, for_sampler(state["params"]), log):
      break
    if trace.before(step):
      log.settle()
      trace.stop()
    began = time.perf_counter()
    try:
      produced = stream.next(for_sampler(state["params"]), step)
    except Unavailable as error:  # a judge that somebody has to mend: keep what was reached
      if hosts.count() > 1:
        raise  # the others cannot save a step with a host that ends here
      produced, fault = None, error
    if produced is None:
      break
    batch, info, rollouts = produced
    dispatched = time.perf_counter()
    info["seconds/data"] = dispatched - began
    placed = sharding.put(mesh, balance(batch), "BT")
    on_device = add_reference(sharding.in_turns(mesh, placed, config.batch.microbatch_rows))
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
      state, measured = update(state, on_device, frozen)
    log.add(Step(step, batch, info, rollouts, measured, dispatched))
    checkpoints.check()
    if (step + 1) % config.checkpoint.every == 0:
      log.settle()
      checkpoints.save(step + 1, state, {"stream": stream.state()})
  else:
    step = config.steps
    held_out.evaluate(step, state["params"], log)

  # --- The end, or SIGTERM ---------------------------------------------------------------------
  log.settle()
  trace.stop()
  checkpoints.wait()
  if step > (hosts.gather(checkpoints.latest_step())[0] or 0):
    checkpoints.save(step, state, {"stream": stream.state()})
  checkpoints.close()
  stream.close()
  log.close()
  held_out.close()
  if fault is not None:
    raise fault
  print(f"{'stopped' if step < config.steps else 'finished'} at step {step}: {root}", flush=True)


def make_update(config, model, optimizer, adapter=None):
  """(state, batch, frozen) -> (state, summed metrics): gradients over microbatches, one step.

  adapter: what is trained of `frozen`, the parameters that stay; None trains all, of nothing.
  """
  objective = dict(config.objective) if config.job != "sft" else {}
  temperature = config.rollout.temperature if config.job != "sft" else 1.0

  def loss(trained, batch, frozen):
    params = lora.whole(adapter, frozen, trained)
    logp_BT, entropy_BT = qwen3.score(model, params, batch, temperature, config.model.score_chunk)
    if config.job == "sft":
      return sft.loss(logp_BT, entropy_BT, batch)
    names = ("policy_loss", "eps_low", "eps_high", "kl_coef", "entropy_coef", "clamp_log_ratio")
    return policy_gradient.loss(
      logp_BT, entropy_BT, batch, **{name: objective[name] for name in names}
    )

  def gradients(params, batch, frozen):
    rows = batch.tokens_BT.shape[0]
    at_once = config.batch.microbatch_rows or rows
    if at_once >= rows:
      (_, measured), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, frozen)
      return grads, measured
    parts = jax.tree.map(lambda x: x.reshape(rows // at_once, at_once, *x.shape[1:]), batch)

    def one(total, part):
      part = jax.tree.map(lambda x: sharding.constrain(x, "BT"), part)
      (_, measured), grads = jax.value_and_grad(loss, has_aux=True)(params, part, frozen)
      summed = jax.tree.map(jnp.add, total[0], grads)
      return (summed, merge(total[1], measured)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    shape = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], parts), frozen)[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    (grads, measured), _ = jax.lax.scan(one, (zeros, nothing), parts)
    return grads, measured

  def update(state, batch, frozen=None):
    grads, measured = gradients(state["params"], batch, frozen)
    with jax.named_scope("optimizer"):
      params, opt_state, applied = optim.apply_updates(
        optimizer, state["params"], state["opt_state"], grads, measured["loss"]
      )
    return {"params": params, "opt_state": opt_state}, measured | applied

  return update


def sampler_view(config, adapter, frozen):
  """What is trained -> the parameters to sample from.

  An adapter stays apart: that needs no second copy of the weights, and bfloat16 weights would lose
  changes smaller than their spacing. Merged, each linear layer is one product instead of three.
  """
  if adapter is None or config.lora.sampler == "unmerged":
    return lambda trained: lora.whole(adapter, frozen, trained)
  merge = jax.jit(lora.merge, static_argnums=1)
  return lambda trained: merge(lora.whole(adapter, frozen, trained), config.model.dtype)


def reference_scorer(config, model, mesh, start, abstract, adapter, frozen):
  """Batch -> Batch with log-probs of the policy that the run began from, where KL asks for them.

  The reference is kept in the compute dtype.
  """
  if config.job == "sft" or config.objective.kl_coef == 0:
    return lambda batch: batch
  compute = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, config.model.dtype, sharding=x.sharding), abstract
  )
  first = policy.load_trained(adapter, start, model, compute, config.seed)
  reference = lora.whole(adapter, frozen, first)
  temperature, chunk = config.rollout.temperature, config.model.score_chunk
  score = jax.jit(lambda params, batch: qwen3.score(model, params, batch, temperature, chunk)[0])

  def add(batch):
    with jax.set_mesh(mesh):
      return dataclasses.replace(batch, reference_logp_BT=score(reference, batch))

  return add


def optimizer_arguments(config) -> dict:
  """The optimizer block under optim.make_optimizer's names."""
  fields = dict(config.optimizer)
  return {"peak_lr": fields.pop("lr"), "total_steps": config.steps, **fields}


def abstract_state(model, optimizer, mesh, param_dtype: str, adapter=None) -> dict:
  """Shapes, dtypes and shardings of everything that is trained; nothing is allocated."""
  params = policy.abstract_trained(adapter, model, mesh, param_dtype)
  shapes = jax.eval_shape(optimizer.transform.init, params)
  placed = optim.state_shardings(optimizer, params, layout(params), sharding.whole(mesh))
  opt_state = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed
  )
  return {"params": params, "opt_state": opt_state}


def layout(abstract):
  """The shardings of an abstract tree."""
  return jax.tree.map(lambda x: x.sharding, abstract)


def on_sigterm():
  """A function that says whether SIGTERM has come; asked between steps and while sampling."""
  seen = []
  signal.signal(signal.SIGTERM, lambda *_: seen.append(time.time()))
  return lambda: bool(seen)


if __name__ == "__main__":
  flags.run(main, on_hosts=True)
