"""The parts of the Ollama engine."""
