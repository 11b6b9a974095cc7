"""Benchmarks, run by hand: `poe bench`. Never part of the tests: machines are noisy."""
