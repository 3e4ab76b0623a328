"""Takes one event to one target: signs it as Standard Webhooks has it, sends it once, and says what the target said."""

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

import httpx

from app.targets import LONGEST_WISH_SECONDS, Target

ANSWER_BYTES = 16_384
SHOWN = 200

Outcome = Literal["accepted", "refused", "unanswered"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a target said to one event; no ``error``: that it has it. ``retry_after`` is its wish in seconds."""

    error: str | None = None
    outcome: Outcome = "accepted"
    gone: bool = False
    retry_after: float = 0


class Courier:
    """Goes to all targets; none of them waits for a connection of another. Redirects are not followed."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._http = httpx.AsyncClient(
            timeout=None,  # noqa: S113 - a target says how long a try may take
            limits=httpx.Limits(max_connections=None),
            headers={"User-Agent": "runner-launcher", "Accept-Encoding": "identity"},
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, target: Target, event_id: str, body: bytes) -> Answer:
        """Send an event once; little of the answer is read."""
        headers = {
            "Content-Type": "application/cloudevents+json",
            **signed(event_id, int(self._now()), body, target.secrets),
        }
        response, said = None, b""
        try:
            async with (
                asyncio.timeout(target.timeout_seconds),
                self._http.stream("POST", target.url, content=body, headers=headers) as response,
            ):
                async for piece in response.aiter_raw():
                    said += piece
                    if len(said) > ANSWER_BYTES:
                        break
        except (httpx.HTTPError, TimeoutError) as error:
            if response is None:
                late = isinstance(error, TimeoutError | httpx.TimeoutException)
                words = f"no answer within {target.timeout_seconds:g} s" if late else str(error) or type(error).__name__
                return Answer(words, "unanswered")
        return _read(response, said, self._now())


def signed(event_id: str, timestamp: int, body: bytes, secrets: Iterable[bytes]) -> dict[str, str]:
    """Sign a message by each secret, in the headers of Standard Webhooks; the id and the time are signed with it."""
    content = f"{event_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, content, hashlib.sha256) for secret in secrets]
    signatures = " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
    return {"webhook-id": event_id, "webhook-timestamp": str(timestamp), "webhook-signature": signatures}


def _read(response: httpx.Response, said: bytes, now: float) -> Answer:
    if response.is_success:
        return Answer()
    text = said[:SHOWN].decode(errors="replace")  # which a target may have compressed all the same
    words = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    wish = _retry_after(response.headers.get("Retry-After", ""), now)
    status = response.status_code
    return Answer(
        f"HTTP {status}" + (f": {words}" if words else ""),
        "refused",
        gone=status == httpx.codes.GONE,
        retry_after=wish if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE) else 0,
    )


def _retry_after(header: str, now: float) -> float:
    """Read a wish in seconds or as a date (RFC 9110, 10.2.3); 0 for none."""
    try:
        seconds = float(header) if header.isdecimal() else parsedate_to_datetime(header).timestamp() - now
    except (ValueError, OverflowError):
        return 0
    return min(max(0.0, seconds), LONGEST_WISH_SECONDS)
