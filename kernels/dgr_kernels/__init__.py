"""Attention over packed and prefix-shared rows, and token scores without logits. Depends on JAX alone."""
