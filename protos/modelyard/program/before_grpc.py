"""Settings of the gRPC core that must stand before gRPC is imported: imported first by the programs.

Since 1.80 gRPC polls with its EventEngine under Python too. Each event then crosses one more thread
on its way to asyncio: a relayed call cost 1,080 µs of CPU instead of 850 (grpcio 1.85.1, 2 cores;
1.78 without it: 850). The older poller is still there and is what Python used for years. Whoever
sets GRPC_EXPERIMENTS keeps the say.
"""

from __future__ import annotations

import os

# A peer that ends is no news for people: its connections are told of in our words. Whoever sets it keeps the say.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener,-event_engine_callback_cq")
