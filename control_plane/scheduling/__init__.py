"""When a request runs: fair queue, circuit breaker, retry policy, runtime statistics. Pure; see README.md."""
