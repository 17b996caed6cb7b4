"""The train step, and what runs and records it."""
