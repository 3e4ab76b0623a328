"""Credentials for registries, from every place that Docker's own client knows; and what engines say of a failed pull."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import LauncherError, LauncherUnavailable, LaunchRejected
from app.launchers.registry import Progress, auth_header, pull_error, registry_of, with_tag
from app.reason import Reason

HUB = "https://index.docker.io/v1/"
REGISTRY = "127.0.0.1:5000"
IMAGE = f"{REGISTRY}/team/agent:1"
SECRET = "s3cret:with/colon ü"  # noqa: S105 - nobody's
OTHER = "of-another-registry"
DIGEST = "sha256:" + "0" * 64


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def write(path: Path, content: Any) -> str:  # noqa: ANN401 - JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


async def credentials(image: str = IMAGE, file: str | None = None, **environ: str) -> Any:  # noqa: ANN401 - JSON
    """Read the header as an engine does; None if there is none."""
    header = await auth_header(image, file, environ)
    return header and json.loads(base64.urlsafe_b64decode(header))


def known(username: str = "agent", password: str = SECRET, registry: str = REGISTRY) -> dict[str, str]:
    return {"username": username, "password": password, "serveraddress": registry}


# Names.


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("busybox", HUB),
        ("busybox:1", HUB),
        ("team/agent", HUB),
        ("team/sub/agent:1", HUB),
        ("docker.io/team/agent", HUB),
        ("index.docker.io/team/agent", HUB),
        ("localhost/agent", "localhost"),
        ("localhost:5000/agent", "localhost:5000"),
        ("127.0.0.1:5000/team/agent:1", "127.0.0.1:5000"),
        ("registry.example.org/agent@" + DIGEST, "registry.example.org"),
        ("registry.example.org:443/team/agent:1", "registry.example.org:443"),
    ],
)
def test_an_image_names_its_registry(image: str, registry: str) -> None:
    assert registry_of(image) == registry


@pytest.mark.parametrize(
    ("image", "one"),
    [
        ("busybox", "busybox:latest"),
        ("busybox:1", "busybox:1"),
        ("localhost:5000/agent", "localhost:5000/agent:latest"),
        ("localhost:5000/agent:1", "localhost:5000/agent:1"),
        ("team/agent@" + DIGEST, "team/agent@" + DIGEST),
        ("localhost:5000/agent:1@" + DIGEST, "localhost:5000/agent:1@" + DIGEST),
    ],
)
def test_an_image_without_a_tag_is_the_latest(image: str, one: str) -> None:
    assert with_tag(image) == one


# The file that a pool names.


async def test_a_plain_file_is_for_whatever_registry_the_image_is_of(tmp_path: Path) -> None:
    file = write(tmp_path / "auth.json", {"username": "agent", "password": SECRET})
    assert await credentials(IMAGE, file) == known()
    assert await credentials("busybox", file) == known(registry=HUB)


@pytest.mark.parametrize(
    "entry",
    [
        {"auth": encoded(f"agent:{SECRET}")},
        {"username": "agent", "password": SECRET},
        {"auth": encoded(f"agent:{SECRET}"), "email": "a@example.org"},
    ],
)
@pytest.mark.parametrize("name", [REGISTRY, f"http://{REGISTRY}", f"https://{REGISTRY}/v1/", f"https://{REGISTRY}/v2/"])
async def test_a_docker_configuration_has_an_entry_for_each_registry(tmp_path: Path, name: str, entry: Any) -> None:  # noqa: ANN401
    auths = {"registry.example.org": {"auth": encoded(f"x:{OTHER}")}, name: entry}
    assert await credentials(file=write(tmp_path / "config.json", {"auths": auths})) == known()


@pytest.mark.parametrize("name", [HUB, "docker.io", "index.docker.io", "https://index.docker.io/v2/"])
async def test_the_hub_has_several_names(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "config.json", {"auths": {name: {"auth": encoded(f"agent:{SECRET}")}}})
    assert await credentials("team/agent", file) == known(registry=HUB)
    assert await credentials("docker.io/team/agent", file) == known(registry=HUB)


async def test_an_identity_token_stands_for_name_and_password(tmp_path: Path) -> None:
    entry = {"auth": encoded("00000000-0000-0000-0000-000000000000:"), "identitytoken": SECRET}
    file = write(tmp_path / "config.json", {"auths": {REGISTRY: entry}})
    assert await credentials(file=file) == {"identitytoken": SECRET, "serveraddress": REGISTRY}


async def test_a_file_without_this_registry_is_a_mistake_of_the_pool(tmp_path: Path) -> None:
    content = {"auths": {"registry.example.org": {"auth": encoded(f"x:{OTHER}")}}}
    file = write(tmp_path / "config.json", content)
    with pytest.raises(LaunchRejected, match=REGISTRY) as refused:
        await credentials(file=file)
    assert refused.value.reason == Reason.CONFIG_ERROR
    assert file in str(refused.value)
    assert OTHER not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        f'{{"auths": {{"{REGISTRY}": {{"auth": "{SECRET}"',
        f'"{SECRET}"',
        f'["{SECRET}"]',
        f'{{"auths": "{SECRET}"}}',
        f'{{"auths": ["{SECRET}"]}}',
        f'{{"auths": {{"{REGISTRY}": "{SECRET}"}}}}',
        f'{{"auths": {{"{REGISTRY}": {{"auth": "not base64 {SECRET}"}}}}}}',
        f'{{"auths": {{"{REGISTRY}": {{"auth": ["{SECRET}"]}}}}}}',
        f'{{"auths": {{"{REGISTRY}": {{"auth": "{encoded(SECRET)[:-1]}"}}}}}}',
        f'{{"auths": {{"{REGISTRY}": {{"auth": "/////w=="}}}}, "comment": "{SECRET}"}}',
        f'{{"credHelpers": "{SECRET}"}}',
        f'{{"credsStore": ["{SECRET}"]}}',
        f'{{"username": ["{SECRET}"], "password": 7}}',
        "",
    ],
)
async def test_a_file_that_cannot_be_used_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(LaunchRejected) as refused:
        await credentials(file=str(file))
    assert refused.value.reason == Reason.CONFIG_ERROR
    assert str(file) in str(refused.value)
    _tells_no_secret(refused.value)


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchRejected, match=r"missing\.json"):
        await credentials(file=str(tmp_path / "missing.json"))


def _tells_no_secret(error: BaseException | None) -> None:
    """Look through an error and all that it came of."""
    while error:
        assert "s3cret" not in f"{error!s} {error.args!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# The configuration of whoever runs the service.


async def test_without_a_file_the_docker_configuration_is_used_if_there_is_one(tmp_path: Path) -> None:
    auths = {"auths": {REGISTRY: {"auth": encoded(f"agent:{SECRET}")}}}
    assert await credentials(HOME=str(tmp_path)) is None
    write(tmp_path / ".docker" / "config.json", auths)
    assert await credentials(HOME=str(tmp_path)) == known()
    assert await credentials("busybox", HOME=str(tmp_path)) is None
    assert await credentials(HOME=str(tmp_path), DOCKER_CONFIG=str(tmp_path / "nowhere")) is None
    write(tmp_path / "other" / "config.json", {"auths": {REGISTRY: {"username": "other", "password": "p"}}})
    assert await credentials(HOME=str(tmp_path), DOCKER_CONFIG=str(tmp_path / "other")) == known("other", "p")
    assert await credentials() is None


async def test_a_pools_own_file_comes_before_the_docker_configuration(tmp_path: Path) -> None:
    write(tmp_path / ".docker" / "config.json", {"auths": {REGISTRY: {"auth": encoded("wrong:wrong")}}})
    file = write(tmp_path / "auth.json", {"username": "agent", "password": SECRET})
    assert await credentials(file=file, HOME=str(tmp_path)) == known()


# Helpers.


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credential helper called ``test``, first on the path; it keeps what it was asked."""
    program = tmp_path / "bin" / "docker-credential-test"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def answers(program: Path, output: str, code: int = 0) -> None:
    (program.parent / "answer").write_text(output)
    text = '#!/bin/sh\nhere=$(dirname "$0")\necho "$@" >"$here/order"\ncat >"$here/asked"\ncat "$here/answer"\n'
    program.write_text(f"{text}echo {SECRET} >&2\nexit {code}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("way", [{"credsStore": "test"}, {"credHelpers": {REGISTRY: "test"}, "credsStore": "missing"}])
async def test_a_helper_is_asked_by_dockers_protocol(tmp_path: Path, helper: Path, way: Any) -> None:  # noqa: ANN401 - JSON
    answers(helper, json.dumps({"ServerURL": REGISTRY, "Username": "agent", "Secret": SECRET}))
    assert await credentials(file=write(tmp_path / "config.json", way)) == known()
    assert (helper.parent / "order").read_text() == "get\n"
    assert (helper.parent / "asked").read_text().strip() == REGISTRY


async def test_a_helper_for_another_registry_is_not_asked(tmp_path: Path, helper: Path) -> None:
    answers(helper, json.dumps({"Username": "wrong", "Secret": "wrong"}))
    auths = {REGISTRY: {"auth": encoded(f"agent:{SECRET}")}}
    file = write(tmp_path / "config.json", {"credHelpers": {"registry.example.org": "test"}, "auths": auths})
    assert await credentials(file=file) == known()
    assert not (helper.parent / "asked").exists()


async def test_a_helper_may_give_a_token(tmp_path: Path, helper: Path) -> None:
    answers(helper, json.dumps({"ServerURL": REGISTRY, "Username": "<token>", "Secret": SECRET}))
    file = write(tmp_path / "config.json", {"credsStore": "test"})
    assert await credentials(file=file) == {"identitytoken": SECRET, "serveraddress": REGISTRY}


async def test_a_helper_without_credentials_leaves_it_to_the_file(tmp_path: Path, helper: Path) -> None:
    answers(helper, "credentials not found in native keychain\n", code=1)
    auths = {REGISTRY: {"auth": encoded(f"agent:{SECRET}")}}
    assert await credentials(file=write(tmp_path / "config.json", {"credsStore": "test", "auths": auths})) == known()
    write(tmp_path / "config.json", {"credsStore": "test", "auths": {REGISTRY: {}}})
    assert await credentials(DOCKER_CONFIG=str(tmp_path)) is None


@pytest.mark.parametrize("output", ["", SECRET, f'["{SECRET}"]', f'"{SECRET}"', f'{{"Username": "{SECRET}"}}'])
async def test_a_helper_that_talks_nonsense_is_named_and_not_quoted(tmp_path: Path, helper: Path, output: str) -> None:
    answers(helper, output)
    with pytest.raises(LaunchRejected, match="docker-credential-test") as refused:
        await credentials(file=write(tmp_path / "config.json", {"credsStore": "test"}))
    assert refused.value.reason == Reason.CONFIG_ERROR
    _tells_no_secret(refused.value)


async def test_a_helper_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchRejected, match="docker-credential-no-such-helper") as refused:
        await credentials(file=write(tmp_path / "config.json", {"credsStore": "no-such-helper"}))
    assert refused.value.reason == Reason.CONFIG_ERROR


# What engines say of pulls that failed: in the words of 20.10 and newer, of containerd's image store, of Podman.


NONE = [
    f"manifest for {IMAGE} not found: manifest unknown: manifest unknown",
    "manifest unknown: The named manifest is not known to the registry.",
    "name unknown: repository name not known to registry",
    f"{IMAGE}: not found",
    f'failed to resolve reference "{IMAGE}": {IMAGE}: not found',
    f"initializing source docker://{IMAGE}: reading manifest 1 in {REGISTRY}/team/agent: manifest unknown",
    "no matching manifest for linux/amd64 in the manifest list entries",
]
REFUSED = [  # and a registry does not tell whether there is one
    "pull access denied for team/agent, repository does not exist or may require 'docker login': denied: requested access",
    f"Head http://{REGISTRY}/v2/team/agent/manifests/1: no basic auth credentials",
    f'Head "https://{REGISTRY}/v2/team/agent/manifests/1": unauthorized: authentication required',
    "unauthorized: incorrect username or password",
    f"Error response from daemon: Get https://{REGISTRY}/v2/: denied: access forbidden",
    f'failed to resolve reference "{IMAGE}": pull access denied, repository does not exist or may require authorization',
    f"failed to authorize: failed to fetch oauth token: unexpected status from GET request to {REGISTRY}: 401 Unauthorized",
]
MALFORMED = ["invalid reference format", "invalid reference format: repository name must be lowercase"]
MAY_WORK_LATER = [
    f"Get http://{REGISTRY}/v2/: dial tcp {REGISTRY}: connect: connection refused",
    f'Get "https://{REGISTRY}/v2/": net/http: request canceled (Client.Timeout exceeded while awaiting headers)',
    "Get https://registry.example.org/v2/: dial tcp: lookup registry.example.org: no such host",
    "toomanyrequests: You have reached your pull rate limit. You may increase the limit by authenticating and upgrading",
    "received unexpected HTTP status: 503 Service Unavailable",
    "unexpected EOF",
    "context deadline exceeded",
    "write GetImageBlob123456789: no space left on device",
    f"Get http://{REGISTRY}/v2/denied-service/blobs/{DIGEST}: 502 Bad Gateway",
    f"failed to copy: content digest {DIGEST}: not found",  # lost on the way, and fetched anew
]


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        *((said, LaunchRejected, Reason.IMAGE_NOT_FOUND) for said in NONE),
        *((said, LaunchRejected, Reason.IMAGE_PULL_FAILED) for said in REFUSED),
        *((said, LaunchRejected, Reason.CONFIG_ERROR) for said in MALFORMED),
        *((said, LauncherUnavailable, Reason.IMAGE_PULL_FAILED) for said in MAY_WORK_LATER),
    ],
)
def test_a_failed_pull_is_told_by_the_engines_words(said: str, kind: type[LauncherError], reason: Reason) -> None:
    error = pull_error(IMAGE, said)
    assert type(error) is kind
    assert isinstance(error, LaunchRejected | LauncherUnavailable)
    assert error.reason == reason
    assert IMAGE in str(error)
    assert said in str(error)


def test_progress_is_summed_up_over_the_layers() -> None:
    progress = Progress("agent:1")
    assert str(progress) == "pulling agent:1"
    progress.feed({"status": "Pulling from team/agent", "id": "1"})
    progress.feed({"status": "Pulling fs layer", "progressDetail": {}, "id": "a"})
    progress.feed({"status": "Downloading", "progressDetail": {"current": 2**20, "total": 4 * 2**20}, "id": "a"})
    progress.feed({"status": "Downloading", "progressDetail": {"current": 2**20, "total": 6 * 2**20}, "id": "b"})
    progress.feed({"status": "Downloading", "progressDetail": {"current": 4 * 2**20, "total": 4 * 2**20}, "id": "a"})
    progress.feed({"status": "Extracting", "progressDetail": {"current": 1, "total": 2}, "id": "a"})
    progress.feed({"status": "Status: Downloaded newer image for agent:1"})
    assert str(progress) == "pulling agent:1: 5 of 10 MiB"
