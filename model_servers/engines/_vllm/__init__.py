"""What only the vLLM engine needs: its metrics, what it can do, and the process where the engine owns it."""
