"""Attention kernels in Pallas; imports jax only, so that other programs can use them alone.

  flash_attention/    training and prefill: packed rows, forward and backward
  decode_attention/   one new token a sequence against a paged KV cache

Each holds reference.py (plain jax.numpy: what the others are tested against, and the fallback),
pallas_tpu.py, pallas_gpu.py and shapes.py (shared by tests and benchmarks); its __init__ is the
public function, which picks one. In qed_jax, model/attention.py is the only caller.

The folder above has no __init__.py, on purpose. transformers asks whether a module `kernels` can be
imported and, if so, takes it for the package of that name. A folder without __init__.py loses to
an installed package and counts as nothing where there is none (tests/test_kernels_name.py).
"""
