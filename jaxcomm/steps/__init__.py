"""Functions of one rank's data that become steps of all ranks."""
