"""Who the ranks are, and how they talk on the host."""
