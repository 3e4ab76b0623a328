"""Schemathesis, with all its checks, against the running service with real local runners.

SCHEMATHESIS_EXAMPLES says how many requests are made up for each call; the number of cases is printed.
"""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import Serve, finished, launch_body, launched, local_pool

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "10")
CONFIG = """
parameters = {{ "path.runner_id" = "{runner_id}", "path.name" = "switched" }}

[checks]
# A schema can say what a path looks like, and not which directories there are: 422 is the answer to those that are not.
positive_data_acceptance.expected-statuses = ["2xx", "3xx", "401", "403", "404", "409", "410", "413", "422", "429", "503"]
"""


@pytest.mark.timeout(600)
async def test_the_service_is_what_its_description_says(
    serve: Serve, tmp_path: Path, slot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = {"local": local_pool(max_concurrency=200), "switched": local_pool()}
    async with serve(pools) as running, running.client() as client:
        runner = await finished(client, await launched(client, launch_body(slot)))
        config = tmp_path / "schemathesis.toml"
        config.write_text(CONFIG.format(runner_id=runner["runner_id"]))
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)),
            *("run", f"{running.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {running.token}", "--request-timeout", "60", "--seed", "1"),
            *("--max-examples", EXAMPLES, "--phases", "examples,coverage,fuzzing", "--no-color"),
        ]
        hooks = {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(Path(__file__).with_name("schemathesis"))}
        environment = {**os.environ, **hooks, "SCHEMATHESIS_SLOTS": str(slot.parent)}
        output = tmp_path / "schemathesis.txt"
        with output.open("w") as file:
            process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file, env=environment, cwd=tmp_path)
            status = await process.wait()
        text = output.read_text()
        assert status == 0, text
        cases = re.search(r"(\d+) generated", text)
        assert cases, text
        launches = len((await client.get("/runners", params={"limit": 500})).json()["items"])
        with capsys.disabled():
            print(f"\nSchemathesis: {cases[1]} cases, {launches} runners launched")  # noqa: T201 - for the note
        assert launches > 3
