"""Rollouts: sampling, the sampler on the device, the engine that keeps its slots busy."""
