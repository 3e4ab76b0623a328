"""Server-sent events, as the HTML standard has them, read as the service's events."""

import json
from collections.abc import AsyncIterator

from runner_launcher_client.records import Event


async def events_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[int | None, Event | None]]:
    """Give what a stream says: the place it has come to, and the event; None where it is not one of a runner's."""
    name, number, data = "", "", []
    async for line in _lines(pieces):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "id":
                number = value
            case "event":
                name = value
            case "data":
                data.append(value)
            case "" if not line:
                if data:
                    place = int(number) if number.isdecimal() else None
                    yield place, _event("\n".join(data), place, name)
                name, data = "", []
            case _:
                pass  # a comment, or a wish that we do not share


def _event(text: str, place: int | None, name: str) -> Event | None:
    try:
        return Event.from_dict({"revision": place, "type": name, **json.loads(text)})
    except (TypeError, ValueError, AttributeError):
        return None


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Cut a stream into lines; they may end with CR, LF or both."""
    rest = b""
    async for piece in pieces:
        rest += piece
        held = rest.endswith(b"\r")  # its LF may be in the next piece
        whole = (rest[:-1] if held else rest).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        rest = whole.pop() + (b"\r" if held else b"")
        for line in whole:
            yield line.decode(errors="replace")
