"""Leaves in, schedule out: no JAX, no environment, no transport."""
