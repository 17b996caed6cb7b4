"""The command line and the launcher. Nothing here imports JAX at the top."""
