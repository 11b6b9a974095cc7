"""A stand-in for `vllm serve`, in the wire format of vLLM 0.32 as its server answers it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any, ClassVar

from aiohttp import web

from model_servers.engines.simulated.answer import Answer
from model_servers.engines.simulated.text import count_tokens, render_prompt
from modelyard.openai import wire
from tests.standins import openai
from tests.standins.openai import OpenAIStandIn, Refused

_KINDS = {400: "BadRequestError", 404: "NotFoundError", 429: "TooManyRequests", 500: "InternalServerError"}
VERSION = "0.32.0"

_METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="{model}"}} {running}.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="{model}"}} {waiting}.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="{model}",reason="capacity"}} {waiting}.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="{model}"}} {cache}
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{{engine="0",model_name="{model}"}} {queries}.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.001",model_name="{model}"}} 0.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="{model}"}} {queries}.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="5461"}} 1.0
"""


class VllmStandIn(OpenAIStandIn):
    """One base model and a LoRA adapter of it."""

    model = "yardling"
    adapter = "yardling-polite"
    embedding_model = "yardling"
    owner = "vllm"
    least_cached: ClassVar[int] = 0
    cache_block: ClassVar[int] = 16
    most_stops: ClassVar[int] = 4
    unknown_arguments: ClassVar[tuple[str, ...]] = ()
    answers_raw_prompts: ClassVar[bool] = True

    def __init__(
        self,
        *,
        context_length: int = 4096,
        token_seconds: float = 0.0,
        max_num_seqs: int = 4,
        tools: bool = True,
        prompt_tokens_details: bool = True,
        vision: bool = False,
        embeds: bool = False,
        key: str = "",
    ) -> None:
        """`tools`: started with --enable-auto-tool-choice; `embeds`: with --runner pooling; `key`: with --api-key."""
        super().__init__(context_length=context_length, token_seconds=token_seconds, slots=max_num_seqs)
        self.tools, self.details, self.vision, self.embeds = tools, prompt_tokens_details, vision, embeds
        self.key = key
        self.healthy = True
        self.foreign = 0
        """Requests that others have running."""
        self.adapters = [self.adapter]

    def add_routes(self, router: web.UrlDispatcher) -> None:
        for path, handler in (
            ("/health", self.health),
            ("/metrics", self.metrics),
            ("/version", self.version),
            ("/openapi.json", self.openapi),
        ):
            router.add_get(path, handler)
        router.add_get("/v1/models", self._told(self.models))
        router.add_post("/tokenize", self._told(self.tokenize))
        if self.embeds:
            router.add_post("/v1/embeddings", self._told(self.embeddings))
        else:
            router.add_post("/v1/chat/completions", self._told(self.chat))
            router.add_post("/v1/completions", self._told(self.completions))

    def can_fail(self, request: web.Request) -> bool:
        return self.everywhere or (request.path.startswith("/v1/") and request.method == "POST")

    def check_key(self, request: web.Request) -> None:
        sent = request.headers.get("Authorization", "")
        if self.key and request.path.startswith("/v1") and sent != f"Bearer {self.key}":
            raise web.HTTPUnauthorized(text='{"error":"Unauthorized"}', content_type="application/json")

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
        kind = _KINDS.get(status, "InternalServerError")
        return web.json_response(
            {"error": {"message": message, "type": kind, "param": param, "code": status}}, status=status
        )

    def error_answer(self, status: int) -> web.Response:
        if status == 401:
            return web.json_response({"error": "Unauthorized"}, status=401)
        return self.error(status, "The stand-in was told to fail.", "model" if status == 404 else None)

    # ---------------------------------------------------- what it tells ---

    def listed(self) -> list[dict[str, Any]]:
        permission = [{"id": "modelperm-1", "object": "model_permission", "created": 1, "allow_sampling": True}]
        common = {"object": "model", "created": 1, "owned_by": "vllm", "permission": permission}
        base = {"id": self.model, "root": "/models/yardling", "parent": None, "max_model_len": self.context_length}
        return [
            {**common, **base},
            *({**common, "id": name, "root": f"/loras/{name}", "parent": self.model, "max_model_len": None}
              for name in self.adapters),
        ]  # fmt: skip

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def openapi(self, request: web.Request) -> web.Response:
        generating = {"/v1/chat/completions": {}, "/v1/completions": {}, "/v1/responses": {}}
        paths = {"/health": {}, "/metrics": {}, "/tokenize": {}, "/v1/models": {}}
        return web.json_response({"paths": {**paths, **({"/v1/embeddings": {}} if self.embeds else generating)}})

    async def metrics(self, request: web.Request) -> web.Response:
        running = self.slots.running + self.foreign
        text = _METRICS.format(
            model=self.model,
            running=running,
            waiting=self.slots.waiting,
            cache=min(1.0, running / 10),
            queries=len(self.generations),
        )
        return web.Response(text=text, content_type="text/plain")

    async def tokenize(self, request: web.Request) -> web.Response:
        raw = json.loads(await request.read())
        self.check_model(raw.get("model") or self.model)
        if "messages" in raw:
            body = wire.ChatRequest(model=self.model, messages=[])
            parsed = await self.body(request, _Tokenize)
            body.messages, body.tools = parsed.messages, parsed.tools
            self.check_images(body)
            prompt = render_prompt(openai._request_of_chat(body))
        else:
            prompt = raw["prompt"]
        count = count_tokens(prompt)
        tokens = list(range(count))
        return web.json_response(
            {"count": count, "max_model_len": self.context_length, "tokens": tokens, "token_strs": None}
        )

    # -------------------------------------------------------------- checks ---

    def check_model(self, name: str, *, embeds: bool = False) -> None:
        if name not in (self.model, *self.adapters):
            message = f"The model `{name}` does not exist. Valid aliases: {self.model}."
            raise Refused(404, message, param="model")

    def check_images(self, body: wire.ChatRequest) -> None:
        shown = any(
            part.image_url is not None
            for message in body.messages
            if isinstance(message.content, list)
            for part in message.content
        )
        if shown and not self.vision:
            raise Refused(400, f"{self.model} is not a multimodal model")

    def check_chat(self, body: wire.ChatRequest) -> None:
        self.check_images(body)
        if body.tools and not self.tools and body.tool_choice != "none":
            raise Refused(400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        if body.tool_choice not in (None, "none") and not body.tools:
            raise Refused(400, "When using `tool_choice`, `tools` must be set.", param="tool_choice")

    def check_room(self, tokens: int, max_tokens: int | None) -> None:
        if max_tokens and max_tokens > self.context_length:
            message = f"max_tokens={max_tokens} cannot be greater than max_model_len={self.context_length}."
            raise Refused(400, f"{message} Please request fewer output tokens.", param="max_tokens")
        if tokens + (max_tokens or 1) > self.context_length:
            raise Refused(
                400,
                f"This model's maximum context length is {self.context_length} tokens. However, your prompt contains "
                f"at least {tokens} input tokens. Please reduce the length of the input prompt.",
                param="input_tokens",
            )

    def usage(self, prompt_tokens: int, cached: int, answer: Answer) -> dict[str, Any]:
        counted = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + answer.tokens,
            "completion_tokens": answer.tokens,
        }
        return {**counted, "prompt_tokens_details": {"cached_tokens": cached} if self.details else None}


class _Tokenize(wire.Wire):
    messages: list[wire.ChatMessage]
    tools: list[wire.Tool] | None = None


async def _serve() -> None:
    """As a program, with the arguments of vLLM's own that matter here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--enable-prompt-tokens-details", action="store_true")
    parser.add_argument("--fail", default="")
    given = parser.parse_args()
    print(f"loading {given.model}", flush=True)
    if given.fail:
        sys.exit(given.fail)
    VllmStandIn.model = given.served_model_name
    standin = VllmStandIn(prompt_tokens_details=given.enable_prompt_tokens_details, token_seconds=0.002)
    standin._port = given.port
    await standin.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
