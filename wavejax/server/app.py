"""The application: all routes around one service."""

from fastapi import FastAPI

from wavejax.server.chat import chat_router
from wavejax.server.completions import completion_router
from wavejax.server.context import Context
from wavejax.server.errors import install
from wavejax.server.grammar import Grammars
from wavejax.server.metrics import Metrics
from wavejax.server.middleware import AccessLog, ApiKey, BodyLimits
from wavejax.server.others import other_router
from wavejax.server.page import page_router
from wavejax.server.responses import response_router
from wavejax.server.service import Service
from wavejax.server.token_text import TokenText


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Make the ASGI application of a service, whose engine has been started.

    Args:
        service: the model, its engine, its limits.
        api_key: which requests must show; None: none.
    """
    metrics = Metrics(service.name, service.engine.stats)
    context = Context(service, metrics, TokenText(service.tokenizer), Grammars(service))
    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="wavejax", docs_url=None, redoc_url=None)
    for router in (
        chat_router(context),
        completion_router(context),
        response_router(context),
        other_router(context),
        page_router(),
    ):
        app.include_router(router)
    install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimits, limits=service.limits)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    app.add_middleware(AccessLog, metrics=metrics)
    return app
