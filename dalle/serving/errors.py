"""What a client is told when something fails: OpenAI's envelope, whoever is at fault."""

from __future__ import annotations


class ServingError(Exception):
    """A failure that a client is told of, in OpenAI's envelope.

    Args:
        status: HTTP status.
        kind: the envelope's `type`.
        code: machine-readable reason.
        param: the field at fault.
        retry_after_s: seconds until it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ServingError:
    """A 400: what the client sent is at fault."""
    return ServingError(400, message, param=param, code=code)


def shutting_down(message: str) -> ServingError:
    """Return a 503: the server stops; another start may take the request."""
    return ServingError(503, message, kind="server_error", code="server_shutting_down", retry_after_s=5)
