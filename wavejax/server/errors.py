"""Errors as OpenAI's API has them: a status, and a body that says what was wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from models.errors import InputError
from wavejax.engine.batching import EngineClosed, QueueFull

CLIENT_GONE = 499  # nginx's number; nobody receives it
_MOST_CHARACTERS = 600
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ClientGone(Exception):
    """Whoever asked has closed the connection: nobody reads an answer."""


class ApiError(HTTPException):
    """An answer that is an error.

    Attributes:
        status_code: of HTTP.
        message: for a person: what was given, what was expected, what to do.
        param: the field of the request that is at fault.
        code: for a program.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers) if headers else None)
        self.message, self.code = _line(message), code
        self.param = None if param is None else _line(param)

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        other = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _KINDS.get(self.status_code, other),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def _line(text: str) -> str:
    """Put a text on one line, not too long, of characters that UTF-8 has: some of it was sent."""
    text = " ".join(text.split())
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error; of one that nobody expected, nothing."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
        case InputError():
            return ApiError(400, str(error))
        case QueueFull():
            message = f"{error.waiting} requests wait already, and {error.limit} may: try again"
            return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        case EngineClosed():
            return ApiError(503, "the server is ending, and takes no more requests", code="closing")
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """Return the first thing that is wrong with a body."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"the body is no JSON: {reason}", code="invalid_json")
    if first["type"] == "value_error":
        return ApiError(400, str(first["ctx"]["error"]))
    if not place:
        message = "the body must be a JSON object, sent as Content-Type: application/json"
        return ApiError(400, message)
    # Of a field that takes several kinds, there is an error of each kind that was tried.
    name = place[0]
    reasons = [one["msg"] for one in errors if name in one["loc"]]
    return ApiError(400, f"{name}: {'; or '.join(dict.fromkeys(reasons))}", param=name)


def install(app: FastAPI) -> None:
    """Has every error of an application answered in this form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def nothing(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientGone, nothing)
    for kind in (HTTPException, RequestValidationError, InputError, QueueFull, EngineClosed):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)
