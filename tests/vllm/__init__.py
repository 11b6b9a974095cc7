"""Real vLLM on this machine's CPU: `poe test-vllm`. Not part of the normal tests: its environment takes 2.5 GB."""
