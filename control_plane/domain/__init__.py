"""Value types of the control plane. Standard library only; no I/O, clock, log or randomness."""
