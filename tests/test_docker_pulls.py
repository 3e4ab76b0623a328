"""Pulls, on a real engine and from real registries, through the front door.

``TEST_REGISTRY=127.0.0.1:5000`` is a registry that anybody may push to, ``TEST_REGISTRY_AUTH=user:password@127.0.0.1:5001``
one that asks who it is.
"""

import base64
import json
import logging
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
from conftest import Json, Service, finished, launch_body, launched, problem, record_of, until
from docker_engine import HOST, IMAGE, Api
from engines import missing
from test_docker_faults import SECONDS, Deed, Docker, Proxy, asked_for, history, slot_of

from app.launchers.container import context_archive

MANIFEST = r"^(GET|HEAD) /v2/\S+/manifests/"
BLOB = r"^GET /v2/\S+/blobs/"


@dataclass
class Registry:
    """A registry, its proxy, and who may pull from it."""

    api: Api
    host: str
    proxy: Proxy
    repository: str
    user: str = ""
    password: str = ""

    @property
    def image(self) -> str:
        """The one image there is, as it is pulled by the proxy."""
        return f"{self.proxy.address}/{self.repository}:1"

    def on_engine(self) -> bool:
        """Say whether the engine has the image."""
        return self.api.has_image(self.image)

    def forget(self) -> None:
        """Make the engine forget the image."""
        self.api.ask(f"/images/{self.image}", method="DELETE", params={"force": "1"}, passes=(404,))

    def pulls(self) -> int:
        """Count the pulls: each asks for the manifest by its tag once, whatever it asks for by digest then."""
        return self.proxy.count(rf"^(GET|HEAD) /v2/{self.repository}/manifests/1$")

    def login(self, path: Path, password: str | None = None) -> Path:
        """Write a Docker configuration with these credentials."""
        auth = base64.b64encode(f"{self.user}:{password or self.password}".encode()).decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"auths": {self.proxy.address: {"auth": auth}}}))
        return path


@contextmanager
def pushed(api: Api, host: str, user: str, password: str, folder: Path) -> Iterator[str]:
    """Push an image of a name of its own, which no engine has afterwards; gives the repository."""
    repository = f"runner-launcher-test-{secrets.token_hex(4)}"
    image, layer = f"{host}/{repository}:1", context_archive(secrets.token_bytes(2**20))
    made = api.ask("/containers/create", method="POST", json={"Image": IMAGE, "Cmd": ["true"]})
    changes = {"container": made["Id"], "repo": f"{host}/{repository}", "tag": "1"}
    environment = {"PATH": os.environ["PATH"], "DOCKER_CONFIG": str(folder), "DOCKER_HOST": HOST}
    try:
        api.ask(f"/containers/{made['Id']}/archive", method="PUT", params={"path": "/"}, content=layer)
        api.ask("/commit", method="POST", params=changes)
        if user:
            login = ["docker", "login", "--username", user, "--password-stdin", host]
            subprocess.run(login, env=environment, input=password.encode(), check=True, capture_output=True)
        subprocess.run(["docker", "push", "--quiet", image], env=environment, check=True, capture_output=True)
    finally:
        api.remove(made["Id"])
        api.ask(f"/images/{image}", method="DELETE", params={"force": "1"}, passes=(404,))
        shutil.rmtree(folder)
    yield repository


@pytest.fixture(scope="module")
def _open_repository(docker_engine: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    host = os.environ.get("TEST_REGISTRY") or missing("registry", "TEST_REGISTRY names no registry that anybody may push to")
    with pushed(docker_engine, host, "", "", tmp_path_factory.mktemp("docker")) as repository:
        yield host, repository


@pytest.fixture(scope="module")
def _closed_repository(docker_engine: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    named = os.environ.get("TEST_REGISTRY_AUTH") or missing(
        "registry", "TEST_REGISTRY_AUTH names no registry that asks who comes"
    )
    credentials, _, host = named.rpartition("@")
    user, _, password = credentials.partition(":")
    with pushed(docker_engine, host, user, password, tmp_path_factory.mktemp("docker")) as repository:
        yield host, repository, user, password


async def _registry(api: Api, host: str, *about: str) -> AsyncIterator[Registry]:
    name, _, port = host.partition(":")
    proxy = Proxy((name, int(port)))
    await proxy.open()
    registry = Registry(api, host, proxy, *about)
    yield registry
    await proxy.close()
    registry.forget()


@pytest.fixture
async def registry(docker_engine: Api, _open_repository: tuple[str, str]) -> AsyncIterator[Registry]:
    """A registry with an image that the engine has not."""
    async for registry in _registry(docker_engine, *_open_repository):
        yield registry


@pytest.fixture
async def closed_registry(docker_engine: Api, _closed_repository: tuple[str, ...]) -> AsyncIterator[Registry]:
    """A registry that asks who it is, with an image that the engine has not."""
    host, *about = _closed_repository
    async for registry in _registry(docker_engine, host, *about):
        yield registry


@pytest.fixture
def docker(docker_engine: Api) -> Iterator[Docker]:
    """The machine's own engine; a test that leaves a container on it fails."""
    docker = Docker(docker_engine, HOST)
    yield docker
    assert not docker.remove_all()


def kept(state_dir: Path) -> bytes:
    """Give all that the service has written down, its database's write-ahead log included."""
    return b"\n".join(path.read_bytes() for path in state_dir.rglob("*") if path.is_file())


async def test_a_missing_image_is_pulled_once_and_the_events_tell_of_it(
    service: Service, docker: Docker, registry: Registry, slot: Path
) -> None:
    pools = docker.pools(image=registry.image, pull_policy="if-not-present")
    async with service(pools, installation=docker.installation) as client:
        for number in range(2):
            runner = await launched(client, launch_body(slot_of(slot, number), "exit 3", pool="docker"))
            record = await finished(client, runner, SECONDS)
            assert (record["exit_code"], record["attempts"]) == (3, [])
            assert "@sha256:" in record["image_digest"]
            told = [event["message"] for event in await history(client, runner) if event["type"] == "progress"]
            assert (told[:1], told[-1:]) == (
                ([f"pulling {registry.image}"], [f"pulled {registry.image}"]) if number == 0 else ([], [])
            )
        assert registry.pulls() == 1
        await docker.all_free(client, slot)


async def test_the_policy_always_asks_the_registry_each_time(
    service: Service, docker: Docker, registry: Registry, slot: Path
) -> None:
    pools = docker.pools(image=registry.image, pull_policy="always")
    async with service(pools, installation=docker.installation) as client:
        for number in range(2):
            runner = await launched(client, launch_body(slot, "exit 3", pool="docker"))
            assert (await finished(client, runner, SECONDS))["exit_code"] == 3
            assert registry.pulls() == number + 1
        await docker.all_free(client, slot)


async def test_the_policy_never_asks_no_registry(service: Service, docker: Docker, registry: Registry, slot: Path) -> None:
    pools = docker.pools(image=registry.image, pull_policy="never")
    async with service(pools, installation=docker.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        said = problem(answer, 422, "launch-rejected", words=registry.image)
        assert (said["runner"]["reason"], said["retryable"]) == ("image_not_found", False)
        assert "pull_policy is never" in said["detail"]
        assert not registry.proxy.asked
        await docker.all_free(client, slot)


@pytest.mark.parametrize("policy", ["if-not-present", "always"])
async def test_ten_launches_of_a_missing_image_make_one_pull(
    service: Service, docker: Docker, registry: Registry, slot: Path, policy: str
) -> None:
    registry.proxy.spoil(MANIFEST, "wait")
    slots = [slot_of(slot, number) for number in range(10)]
    async with service(docker.pools(image=registry.image, pull_policy=policy), installation=docker.installation) as client:
        runners = [await asked_for(client, launch_body(each, "exit 3", pool="docker")) for each in slots]
        for runner in runners:
            await until(partial(says, client, runner, f"pulling {registry.image}"), SECONDS)
        registry.proxy.heal()
        records = [await finished(client, runner, SECONDS) for runner in runners]
        assert [record["exit_code"] for record in records] == [3] * 10
        assert registry.pulls() == 1
        await docker.all_free(client, *slots[:1])


async def says(client: httpx.AsyncClient, runner: Json, words: str) -> bool:
    """Say whether a record's message has these words."""
    return words in ((await record_of(client, runner))["message"] or "")


@pytest.mark.parametrize("what", ["no-such-repository:1", "{repository}:no-such-tag", "{repository}@sha256:" + "0" * 64])
async def test_an_image_that_the_registry_has_not_is_not_asked_for_again(
    service: Service, docker: Docker, registry: Registry, slot: Path, what: str
) -> None:
    image = f"{registry.proxy.address}/{what.format(repository=registry.repository)}"
    pools = docker.pools(image=image, pull_policy="if-not-present")
    async with service(pools, installation=docker.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        said = problem(answer, 422, "launch-rejected", words=f"{image}: there is no such image")
        assert (said["runner"]["reason"], said["retryable"]) == ("image_not_found", False)
        assert len(said["runner"]["attempts"]) == 1
        await docker.all_free(client, slot)


# Credentials.


@pytest.mark.parametrize("place", ["registry_auth", "registry_auth plain", "DOCKER_CONFIG", "HOME"])
async def test_credentials_open_a_registry_and_are_told_nobody(
    *,
    service: Service,
    docker: Docker,
    closed_registry: Registry,
    slot: Path,
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    config: Json = {"image": closed_registry.image, "pull_policy": "always"}
    if place.startswith("registry_auth"):
        path = closed_registry.login(tmp_path / "pull.json")
        if "plain" in place:
            path.write_text(json.dumps({"username": closed_registry.user, "password": closed_registry.password}))
        config["registry_auth"] = str(path)
    else:
        monkeypatch.setenv(place, str(tmp_path / "home"))
        closed_registry.login(tmp_path / "home" / ("" if place == "DOCKER_CONFIG" else ".docker") / "config.json")
    async with service(docker.pools(**config), installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, "env; exit 3", pool="docker"))
        record = await finished(client, runner, SECONDS)
        assert record["exit_code"] == 3
        await docker.all_free(client)
        told = json.dumps([record, await history(client, runner), (await client.get("/pools")).json()])
        told += (await client.get(f"/runners/{runner['runner_id']}/logs")).text
        assert not secrets_in(closed_registry, told.encode() + kept(state_dir) + caplog.text.encode())


def secrets_in(registry: Registry, told: bytes) -> list[bytes]:
    """Find a registry's password, however it is written."""
    plain = registry.password.encode()
    pair = f"{registry.user}:{registry.password}".encode()
    header = json.dumps({"username": registry.user, "password": registry.password}).encode()
    return [each for each in (plain, *(base64.b64encode(it).rstrip(b"=")[:-1] for it in (pair, header))) if each in told]


@pytest.mark.parametrize("wrong", ["none", "wrong"])
async def test_a_registry_that_refuses_us_is_told_of_and_not_asked_again(
    *,
    service: Service,
    docker: Docker,
    closed_registry: Registry,
    slot: Path,
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    config: Json = {"image": closed_registry.image, "pull_policy": "if-not-present"}
    if wrong == "wrong":
        closed_registry.password = f"wrong-{secrets.token_hex(8)}"
        config["registry_auth"] = str(closed_registry.login(tmp_path / "pull.json"))
    async with service(docker.pools(**config), installation=docker.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        said = problem(answer, 422, "launch-rejected", words=f"{closed_registry.image}: the pull was refused")
        assert (said["runner"]["reason"], said["retryable"]) == ("image_pull_failed", False)
        assert len(said["runner"]["attempts"]) == 1
        assert not secrets_in(closed_registry, answer.content + kept(state_dir) + caplog.text.encode())
        await docker.all_free(client, slot)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file or directory"),
        ("secret-word", "JSON"),
        ('["secret-word"]', "JSON"),
        ('{"auths": {"registry.example.org": {"auth": "c2VjcmV0LXdvcmQ="}}}', "holds no credentials for"),
        ('{"auths": {"ADDRESS": {"auth": "secret-word!"}}}', "is not base64"),
    ],
)
async def test_a_credentials_file_of_no_use_is_told_without_what_it_holds(
    *, service: Service, docker: Docker, registry: Registry, slot: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "pull.json"
    if text:
        path.write_text(text.replace("ADDRESS", registry.proxy.address))
    pools = docker.pools(image=registry.image, pull_policy="if-not-present", registry_auth=str(path))
    async with service(pools, installation=docker.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        said = problem(answer, 422, "launch-rejected", words=words)
        assert str(path) in said["detail"]
        assert said["runner"]["reason"] == "config_error"
        assert "secret-word" not in answer.text
        assert not registry.proxy.asked
        await docker.all_free(client, slot)


# A registry that is down, slow, or breaks off.


async def test_a_registry_that_is_down_is_asked_again_and_told_with_each_attempt(
    service: Service, docker: Docker, registry: Registry, slot: Path
) -> None:
    await registry.proxy.close()
    pools = docker.pools(image=registry.image, pull_policy="if-not-present", retry_attempts=2, retry_base_seconds=0)
    async with service(pools, installation=docker.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        said = problem(answer, 503, "image-pull-failed", words="connection refused")
        assert (said["runner"]["reason"], said["retryable"]) == ("image_pull_failed", True)
        errors = [attempt["error"] for attempt in said["runner"]["attempts"]]
        assert len(errors) == 2
        assert all(error.startswith(f"{registry.image}: the pull failed: ") for error in errors)
        await docker.all_free(client, slot)


@pytest.mark.parametrize(("call", "deed"), [(MANIFEST, "refuse"), (MANIFEST, "fail"), ("GET /v2/$", "fail")])
async def test_a_pull_that_fails_once_is_repeated(
    *, service: Service, docker: Docker, registry: Registry, slot: Path, call: str, deed: Deed
) -> None:
    registry.proxy.spoil(call, deed, 2)
    pools = docker.pools(image=registry.image, pull_policy="if-not-present", retry_attempts=5, retry_base_seconds=0.05)
    async with service(pools, installation=docker.installation) as client:
        runner = await launched(client, launch_body(slot, "exit 3", pool="docker"))
        record = await finished(client, runner, SECONDS)
        assert record["exit_code"] == 3
        assert all("the pull failed" in attempt["error"] for attempt in record["attempts"])
        await docker.all_free(client, slot)


@pytest.mark.parametrize("call", ["GET /v2/$", MANIFEST, BLOB], ids=["ping", "manifest", "blob"])
async def test_a_registry_that_never_answers_is_a_launch_timeout_which_says_what_it_was_at(
    service: Service, docker: Docker, registry: Registry, slot: Path, call: str
) -> None:
    registry.proxy.spoil(call, "hang", None)
    pools = docker.pools(image=registry.image, pull_policy="if-not-present", launch_timeout_seconds=6)
    async with service(pools, installation=docker.installation) as client:
        answer = await client.post("/runners", json=launch_body(slot, pool="docker"))
        said = problem(answer, 503, "launch-timeout", words="not started within 6 s")
        assert said["runner"]["reason"] == "launch_timeout"
        assert f"pulling {registry.image}" in said["detail"]
        await docker.all_free(client, slot)


async def test_a_stop_during_a_pull_ends_it_at_once_and_the_engine_pulls_no_more(
    service: Service, docker: Docker, registry: Registry, slot: Path
) -> None:
    registry.proxy.spoil(MANIFEST, "wait", None)
    pools = docker.pools(image=registry.image, pull_policy="if-not-present")
    async with service(pools, installation=docker.installation) as client:
        runner = await asked_for(client, launch_body(slot, "exit 3", pool="docker"))
        await registry.proxy.seen(MANIFEST)
        await client.delete(f"/runners/{runner['runner_id']}")
        record = await finished(client, runner, 5)
        assert (record["state"], record["reason"]) == ("failed", "cancelled")
        registry.proxy.heal()
        await docker.all_free(client, slot)
        await until(lambda: not registry.proxy.open_calls(), SECONDS)
        assert not registry.on_engine()


async def test_one_stopped_during_a_pull_that_others_wait_for_leaves_it_to_them(
    service: Service, docker: Docker, registry: Registry, slot: Path
) -> None:
    registry.proxy.spoil(MANIFEST, "wait", None)
    pools = docker.pools(image=registry.image, pull_policy="if-not-present")
    async with service(pools, installation=docker.installation) as client:
        first = await asked_for(client, launch_body(slot, "exit 3", pool="docker"))
        await registry.proxy.seen(MANIFEST)
        second = await asked_for(client, launch_body(slot_of(slot, 2), "exit 4", pool="docker"))
        await until(lambda: says(client, second, f"pulling {registry.image}"), SECONDS)
        await client.delete(f"/runners/{first['runner_id']}")
        assert (await finished(client, first, 5))["reason"] == "cancelled"
        registry.proxy.heal()
        assert (await finished(client, second, SECONDS))["exit_code"] == 4
        assert registry.pulls() == 1
        await docker.all_free(client, slot)
