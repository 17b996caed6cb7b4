"""Evaluation of reconstructions on held-out materials, beyond one number."""
