"""The OpenAI-compatible face of the control plane: HTTP in, requests of the contract inside."""
