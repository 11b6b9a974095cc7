"""Inside of the MLX engine; the public face is `model_servers.engines.mlx`.

`settings` the options; `loading` weights and tokenizer; `prompting` messages to tokens; `grammar` JSON and forced
tool calls; `sampling` how a token is drawn; `markup` and `answer` tokens to deltas; `prefixes` the prompt cache;
`embedding` text to vectors; `jobs` what event loop and thread exchange; `batch` the sequences being generated; `worker`
the one thread on which MLX runs.
"""
