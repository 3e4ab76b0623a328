"""The route of all events: as a stream, as pages, as text."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api import plain, streams
from app.api.answers import Service, Who, next_cursor, next_link, place_of, problems
from app.caller import Caller
from app.journal import Line
from app.models import JournalPage

MAX_PAGE = 500

router = APIRouter(tags=["events"])


@router.get(
    "/events",
    summary="What happens to all runners",
    description=(
        "`Accept: text/event-stream` gives a stream of server-sent events: the `id` of each is its revision, its `data` the "
        "event as JSON; `hello` comes first and `bye` last. A client that comes back with `Last-Event-ID` misses nothing "
        "and gets nothing twice, also when the service was restarted meanwhile; 410 says that the history does not reach "
        "back so far. Without `Last-Event-ID` and `since` the stream begins now.\n\n"
        "Otherwise a page of events behind `since` is given, the oldest first, or with `follow` lines of text as they come."
    ),
    response_model=JournalPage,
    responses={200: streams.STREAM, **problems(410, 422)},
)
async def events(
    request: Request,
    response: Response,
    service: Service,
    who: Who,
    *,
    since: Annotated[int | None, Query(ge=0, le=2**62, description="a revision: only what followed it")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: str | None = None,
    follow: Annotated[bool, Query(description="go on, in lines of text, until the service ends")] = False,
    last_event_id: streams.LastEventId = None,
) -> JournalPage | Response:
    journal = service.journal
    if streams.is_wanted(request) or follow:
        place = await journal.place(since if last_event_id is None else streams.revision(last_event_id))
        lines = _seen(journal.follow(place, streams.IDLE_SECONDS), who)
        return streams.told(request, lines, place, _farewell)
    begin = place_of(cursor) if cursor else since
    place = await journal.oldest() if begin is None else await journal.place(begin)
    page = await journal.after(place, limit + 1)
    items = [line.record for line in page[:limit] if who.sees(line.pool_name)]
    place = page[:limit][-1].revision if page else place
    more = next_cursor(place) if len(page) > limit else None
    if more:
        response.headers["Link"] = next_link(request, more)
    answer = JournalPage(items=items, next_cursor=more, revision=place)
    return plain.shown(request, response, answer) or answer


async def _seen(batches: streams.Lines, who: Caller) -> AsyncIterator[Sequence[Line]]:
    """Leave out what is none of the caller's business."""
    async for lines in batches:
        yield [line for line in lines if who.sees(line.pool_name)]


async def _farewell() -> str:
    return streams.GOING_DOWN
