"""Which model on which server serves a request: filter, score, pick. Pure; see README.md."""
