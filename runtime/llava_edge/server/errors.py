"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

from llava_edge.errors import ContextFullError, InputError, LlavaEdgeError, MissingExtraError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(LlavaEdgeError):
    """A request that is answered with an error.

    ``param`` names the field that was wrong, ``code`` says it for programs, ``retry_after`` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        hint: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = f"{self} {self.hint}" if self.hint else str(self)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


def as_api_error(error: BaseException) -> ApiError:
    """What a failed answer means for the client; a defect tells no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextFullError):
        return ApiError(400, f"{error}.", param="messages", code="context_length_exceeded")
    if isinstance(error, (InputError, MissingExtraError)):  # what else fails is the server's own fault
        return ApiError(400, f"{error}.", hint=error.hint)
    return ApiError(500, "The server failed; its log says more.", code="internal_error")
