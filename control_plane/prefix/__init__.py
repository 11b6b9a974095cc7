"""Which server has the beginning of a prompt in its cache."""
