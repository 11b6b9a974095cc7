"""Stream an answer with the generated stubs, without the SDK.

python clients/examples/stubs.py 127.0.0.1:7460 "What is modelyard?"
"""

import sys

import grpc

from modelyard.v1 import generation_pb2, orchestrator_pb2, task_pb2
from modelyard.v1.orchestrator_pb2_grpc import OrchestratorStub

address, prompt = [*sys.argv[1:], "127.0.0.1:7460", "What is modelyard?"][:2]

request = orchestrator_pb2.GenerateRequest(
    input=generation_pb2.GenerationInput(
        messages=[
            generation_pb2.Message(role=generation_pb2.ROLE_USER, content=[generation_pb2.ContentPart(text=prompt)])
        ]
    ),
    task_type=task_pb2.TASK_TYPE_CHAT,
)
with grpc.insecure_channel(address) as channel:
    try:
        for event in OrchestratorStub(channel).Generate(request, timeout=30):
            if event.HasField("delta"):
                print(event.delta.text, end="", flush=True)
            if event.HasField("summary"):  # the last piece may come with it
                summary = event.summary
                print(f"\n[{summary.server_id}/{summary.model}, {summary.usage.completion_tokens} tokens]")
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
