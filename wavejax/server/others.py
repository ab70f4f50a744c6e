"""The routes that generate nothing: models, tokens, health, metrics, and what is refused."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from wavejax.server.context import Context
from wavejax.server.errors import ApiError
from wavejax.server.schemas import TokenizeBody


def other_router(context: Context) -> APIRouter:
    """Make the routes."""
    router, service = APIRouter(), context.service

    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "wavejax",
            "max_model_len": service.context,
        }

    @router.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model()]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        service.unknown_model(name)
        return model()

    @router.post("/v1/embeddings")
    async def embeddings() -> Any:
        message = (
            f"{service.name} generates text, and makes no embeddings: send this to a server of an "
            "embedding model"
        )
        raise ApiError(400, message, code="unsupported_endpoint")

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Any:
        service.check_model(body)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give `prompt` or `messages`, one of them", param="prompt")
        if body.messages is not None:
            found = await run_in_threadpool(
                service.encode_messages, body.messages, body.chat_template_kwargs
            )
        else:
            found = await run_in_threadpool(
                service.encode_text, body.prompt or "", body.add_special_tokens
            )
        texts = [context.token_text.text_of(token) for token in found.ids]
        return {
            "count": len(found.ids),
            "max_model_len": service.context,
            "tokens": found.ids,
            "token_strs": texts if body.return_token_strs else None,
        }

    @router.get("/health")
    async def health() -> Any:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(context.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
