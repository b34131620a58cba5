"""Attention and scoring kernels in Pallas; imports jax only: other programs can use them alone.

  flash_attention/    training and prefill: packed rows, forward and backward
  decode_attention/   new tokens of every sequence against a paged KV cache
  score_head/         log-probabilities and entropies from hidden states, forward and backward

Each holds reference.py (plain jax.numpy: what the others are tested against), xla.py (for every
device, and the fallback) and pallas_tpu.py; those of attention also pallas_gpu.py, which share
hopper.py. The public function, in __init__, picks one. In qed_jax, model/attention.py and
model/head.py are the only callers.

The folder above has no __init__.py, on purpose. transformers asks whether a module `kernels` can be
imported and, if so, takes it for the package of that name. A folder without __init__.py loses to
an installed package and counts as nothing where there is none (tests/test_kernels_name.py).
"""
