"""What the engines in front of hosted APIs share: anthropic and bedrock.

`engine.HostedEngine` does everything but speak to the vendor; `conversation` says what to ask, `answer` turns what
comes back into deltas, both without I/O.
"""
