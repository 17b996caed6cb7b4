"""Data sets: simulated, stored, read, and put into batches."""
