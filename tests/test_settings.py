"""Settings: what the environment says, and what is said back when it cannot be used."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.settings import PREFIX, load_settings

Say = Callable[..., None]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(PREFIX + name, value)

    return set_variables


def test_nothing_said(tmp_path: Path) -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert settings.state_dir == tmp_path / ".local/state/runner-launcher"
    assert settings.database == f"sqlite:///{settings.state_dir}/runners.db"
    assert settings.runner_command == ("python", "-m", "necrocode.agent_runner")
    assert settings.slot_roots == ()
    assert settings.auth == "on"
    assert not settings.allow_inline_pools
    assert (settings.pools_file, settings.tokens_file, settings.webhooks_file, settings.public_url) == (None,) * 4
    assert settings.node


def test_everything_said(say: Say) -> None:
    say(
        LISTEN="[::1]:0",
        STATE_DIR="/var/lib/launcher",
        DATABASE_URL="postgresql+psycopg://db/runners",
        POOLS_FILE="pools.yaml",
        RUNNER_COMMAND="agent --name 'two words'",
        SLOT_ROOTS="/slots:/more slots:",
        ALLOW_INLINE_POOLS="true",
        AUTH="off",
        TOKENS_FILE="/etc/tokens.yaml",
        PUBLIC_URL="https://launcher.example/",
        NODE="node-1",
    )
    settings = load_settings()
    assert (settings.host, settings.port) == ("::1", 0)
    assert settings.database == "postgresql+psycopg://db/runners"
    assert settings.runner_command == ("agent", "--name", "two words")
    assert settings.slot_roots == (Path("/slots"), Path("/more slots"))
    assert settings.allow_inline_pools
    assert settings.public_url == "https://launcher.example"
    assert settings.node == "node-1"


def test_an_empty_variable_is_not_set(say: Say) -> None:
    say(POOLS_FILE="", RUNNER_COMMAND="", STATE_DIR="", AUTH="")
    settings = load_settings()
    assert settings.pools_file is None
    assert settings.runner_command[0] == "python"
    assert settings.auth == "on"


@pytest.mark.parametrize(("home", "expected"), [("/xdg", "/xdg/runner-launcher"), ("relative", None)])
def test_the_state_home_is_where_the_xdg_rules_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str, expected: str | None
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", home)
    assert load_settings().state_dir == Path(expected or tmp_path / ".local/state/runner-launcher")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LISTEN", "8080"),
        ("LISTEN", ":8080"),
        ("LISTEN", "::1:8080"),
        ("LISTEN", "127.0.0.1:"),
        ("LISTEN", "127.0.0.1:65536"),
        ("LISTEN", "127.0.0.1:-1"),
        ("LISTEN", "127.0.0.1:²"),
        ("SLOT_ROOTS", "/slots:relative"),
        ("RUNNER_COMMAND", "agent 'no end"),
        ("RUNNER_COMMAND", " "),
        ("ALLOW_INLINE_POOLS", "perhaps"),
        ("AUTH", "maybe"),
        ("PUBLIC_URL", "launcher.example"),
        ("PUBLIC_URL", "http://"),
        ("PUBLIC_URL", "http://a b"),
        ("PUBLIC_URL", "http://[::1"),
    ],
)
def test_what_cannot_be_used_is_named(say: Say, name: str, value: str) -> None:
    say(**{name: value})
    with pytest.raises(ConfigurationError, match=rf"^RUNNER_LAUNCHER_{name}: \w"):
        load_settings()


def test_all_that_cannot_be_used_is_told_at_once(say: Say) -> None:
    say(LISTEN="nowhere", AUTH="maybe", PUBLIC_URL="ftp://x")
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "RUNNER_LAUNCHER_LISTEN",
        "RUNNER_LAUNCHER_AUTH",
        "RUNNER_LAUNCHER_PUBLIC_URL",
    ]


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_auth_may_be_off_on_loopback(say: Say, listen: str) -> None:
    say(LISTEN=listen, AUTH="off")
    assert load_settings().auth == "off"


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "launcher.example:1"])
def test_auth_may_not_be_off_elsewhere(say: Say, listen: str) -> None:
    say(LISTEN=listen, AUTH="off")
    with pytest.raises(ConfigurationError, match="RUNNER_LAUNCHER_AUTH: off is for loopback only"):
        load_settings()


def test_a_variable_that_is_no_setting_is_warned_about(say: Say, caplog: pytest.LogCaptureFixture) -> None:
    say(SLOT_ROOT="/slots", COLOUR="blue", PORT="9000", URL="http://x", TOKEN="t")  # noqa: S106 -- no password
    with caplog.at_level(logging.WARNING, "app.settings"):
        load_settings()
    assert caplog.messages == [
        "RUNNER_LAUNCHER_COLOUR is not a setting",
        "RUNNER_LAUNCHER_PORT is not a setting",
        "RUNNER_LAUNCHER_SLOT_ROOT is not a setting; did you mean RUNNER_LAUNCHER_SLOT_ROOTS?",
    ]


def test_what_kubernetes_injects_for_a_service_of_our_name_is_no_setting_and_no_surprise(
    say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    say(SERVICE_HOST="10.0.0.1", SERVICE_PORT="8080", PORT="tcp://10.0.0.1:8080", PORT_8080_TCP_ADDR="10.0.0.1")
    assert load_settings().port == 8080
    assert not caplog.messages


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://10.0.0.7:8080", "http://10.0.0.7:8080"),
        ("http://fd00::7:8080", "http://[fd00::7]:8080"),  # as a pod's address comes
        ("http://[fd00::7]:8080/", "http://[fd00::7]:8080"),
        ("https://replica-1.example", "https://replica-1.example"),
    ],
)
def test_a_replica_has_an_address_of_its_own(monkeypatch: pytest.MonkeyPatch, given: str, url: str) -> None:
    monkeypatch.setenv("RUNNER_LAUNCHER_REPLICA_URL", given)
    assert load_settings().replica_url == url
