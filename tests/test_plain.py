"""For people with curl: tables, `key: value` lines, errors as sentences, and ids that need not be written out."""

from pathlib import Path

import httpx
import pytest
from conftest import Service, finished, launch_body, launched, local_pool, problem, record_of
from hypothesis import given
from hypothesis import strategies as st

from app.api.plain import RUNNERS, table

FOREVER = "sleep 1000"
TEXT = {"Accept": "text/plain"}


async def text_of(client: httpx.AsyncClient, path: str, status: int = 200) -> str:
    answer = await client.get(path, headers=TEXT)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Vary"] == "Accept"
    assert answer.text.endswith("\n")
    return answer.text


async def test_a_list_is_an_aligned_table(client: httpx.AsyncClient, slot: Path) -> None:
    first = await finished(client, await launched(client, launch_body(slot, "exit 3", id="a-long-name")))
    second = await launched(client, launch_body(slot, FOREVER))
    head, *rows = (await text_of(client, "/runners")).splitlines()
    assert head.split() == [name.upper() for name in RUNNERS]
    assert [row.split()[:5] for row in rows] == [
        [second["runner_id"], "7", "local", "slot-1", "running"],
        [first["runner_id"], "a-long-name", "local", "slot-1", "failed"],
    ]
    assert rows[1].split()[6:8] == ["exit_nonzero", "3"]
    assert rows[0].split()[6:8] == ["-", "-"]
    for column in ("TASK_ID", "STATE", "CREATED_AT"):
        at = head.index(column)
        assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)


async def test_a_table_with_more_behind_it_says_how_to_go_on(client: httpx.AsyncClient, slot: Path) -> None:
    for _ in range(2):
        await finished(client, await launched(client, launch_body(slot)))
    *_, more = (await text_of(client, "/runners?limit=1")).splitlines()
    cursor = more.removeprefix("more: cursor=")
    assert len((await text_of(client, f"/runners?limit=1&cursor={cursor}")).splitlines()) == 2


async def test_a_record_is_lines_of_key_and_value(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await finished(client, await launched(client, launch_body(slot, "exit 3")))
    answer = await client.get(f"/runners/{runner['runner_id']}", headers=TEXT)
    said = dict(line.split(": ", 1) for line in answer.text.splitlines())
    values = {key: value.strip() for key, value in said.items()}
    assert values["runner_id"] == runner["runner_id"]
    assert values["exit_code"] == "3"
    assert values["oom_killed"] == "no"
    assert values["limits.enforced_by.cpu"] == "none"
    assert values["created_at"] == runner["created_at"][:23] + "Z"
    assert "signal" not in values
    assert len({len(line) - len(line.split(":", 1)[1].lstrip()) for line in answer.text.splitlines()}) == 1
    assert answer.headers["ETag"]


async def test_events_and_pools_are_tables_too(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await finished(client, await launched(client, launch_body(slot, "exit 3")))
    rows = (await text_of(client, f"/runners/{runner['runner_id']}/events")).splitlines()
    assert rows[0].split() == ["REVISION", "AT", "TYPE", "FROM", "TO", "REASON", "MESSAGE"]
    assert rows[-1].endswith("exited with code 3")
    head, row = (await text_of(client, "/pools")).splitlines()
    assert head.split()[:4] == ["POOL_NAME", "TYPE", "ENABLED", "CURRENT_RUNNING"]
    assert row.split()[:5] == ["local", "local-process", "yes", "0", "8"]
    assert "max_concurrency: 8" in await text_of(client, "/pools/local")


async def test_what_is_done_at_once_and_lists_of_nothing_are_told_too(client: httpx.AsyncClient) -> None:
    assert (await client.post("/engines/sweep?dry_run=true", headers=TEXT)).text == "engines hold nothing without a record\n"
    forgotten = await client.post("/retention?dry_run=true", headers=TEXT)
    assert "dry_run:   yes\n" in forgotten.text
    assert await text_of(client, "/webhooks") == "nobody is told of runners\n"


async def test_a_launch_and_a_stop_answer_in_text_too(client: httpx.AsyncClient, slot: Path) -> None:
    answer = await client.post("/runners", json=launch_body(slot, FOREVER), headers=TEXT)
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/runners/{answer.text.split()[1]}")
    stopped = await client.delete(answer.headers["Location"], headers=TEXT)
    assert stopped.status_code == 202
    assert stopped.text.startswith("runner_id:")


async def test_an_error_is_a_sentence(client: httpx.AsyncClient, slot: Path) -> None:
    await launched(client, launch_body(slot, FOREVER))
    answer = await client.post("/runners", json=launch_body(slot, FOREVER), headers=TEXT)
    assert answer.status_code == 409
    assert answer.headers["Location"]
    assert answer.text.startswith("Conflict (slot-busy): slot slot-1 is held by runner-")
    assert answer.text.endswith("; the same request may succeed later\n")
    text = await text_of(client, "/runners/runner-000000000000", 404)
    assert text == "Not Found (not-found): no runner runner-000000000000\n"
    refused = await client.get("/runners", headers={**TEXT, "Authorization": ""})
    assert refused.text == "Unauthorized (unauthenticated): a bearer token is needed: Authorization: Bearer TOKEN\n"


@pytest.mark.parametrize(
    ("accept", "plain"),
    [
        ("text/plain", True),
        ("TEXT/PLAIN; charset=utf-8", True),
        ("text/*", True),
        ("text/plain, */*;q=0.1", True),
        ("application/json;q=0.5, text/plain;q=0.9", True),
        ("*/*", False),
        ("application/json, text/plain, */*", False),
        ("text/plain;q=0", False),
        ("text/plain;q=some", False),
        ("", False),
        (";,=;q", False),
    ],
)
async def test_only_who_would_rather_have_text_gets_it(client: httpx.AsyncClient, accept: str, *, plain: bool) -> None:
    answer = await client.get("/pools", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith("text/plain" if plain else "application/json")


async def test_nothing_in_a_table_can_speak_to_a_terminal(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(command=["no\x1b[31m\nsuch"])}) as client:
        answer = await client.post("/runners", json=launch_body(slot), headers=TEXT)
        assert answer.status_code == 422
        for text in (answer.text, await text_of(client, "/runners")):
            assert "\x1b" not in text


@given(st.lists(st.lists(st.text(min_size=1), min_size=2, max_size=2), min_size=1))
def test_a_table_has_a_line_for_each_row_whatever_is_in_it(rows: list[list[str]]) -> None:
    text = table(("a", "b"), [dict(zip("ab", row, strict=True)) for row in rows])
    assert len(text.split("\n")) == len(rows) + 2
    assert text.replace("\n", "").isprintable()


# Ids.


async def test_an_id_may_be_shortened_where_it_is_read_or_stopped(client: httpx.AsyncClient, slot: Path) -> None:
    runner = await launched(client, launch_body(slot, FOREVER))
    whole = runner["runner_id"]
    for given_id in (whole, whole[:-1], whole.removeprefix("runner-"), whole.removeprefix("runner-")[:3]):
        for path in ("", "/events", "/logs"):
            assert (await client.get(f"/runners/{given_id}{path}")).status_code == 200
        assert (await record_of(client, {"runner_id": given_id}))["runner_id"] == whole
    answer = await client.delete(f"/runners/{whole[:10]}?grace=0")
    assert answer.json()["runner_id"] == whole
    await finished(client, runner)


async def test_an_id_that_more_than_one_begins_with_is_refused_with_those(service: Service, slot: Path) -> None:
    async with service({"local": local_pool(max_concurrency=20)}) as client:
        ids: list[str] = []
        while len({whole[7] for whole in ids}) == len(ids):
            body = launch_body(slot.with_name(f"slot-{len(ids)}"), FOREVER)
            ids.append((await launched(client, body))["runner_id"])
        first = ids[-1][7]
        for method in ("GET", "DELETE"):
            said = problem(await client.request(method, f"/runners/{first}"), 409, "ambiguous-id")
            for whole in ids:
                assert (whole in said["detail"]) == (whole[7] == first)


@pytest.mark.parametrize("given_id", ["zz", "runner-", "runner-%25", "f" * 12, "runner-ffffff_", "RUNNER-f"])
async def test_what_no_id_begins_with_is_not_found(client: httpx.AsyncClient, slot: Path, given_id: str) -> None:
    await finished(client, await launched(client, launch_body(slot)))
    problem(await client.get(f"/runners/{given_id}"), 404, "not-found")
