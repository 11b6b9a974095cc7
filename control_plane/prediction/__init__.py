"""What is to be expected of a request on a server, learned from what was observed. Pure; see README.md."""
