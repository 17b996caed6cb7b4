"""Python objects between ranks: over MPI, or over jax.distributed."""
