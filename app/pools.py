"""Agent pools: the pool file, what a pool may say, and the questions about its capacity.

A pool file is checked whole when it is read: everything wrong with it is told at once, with the path of each key, so that no
launch ever fails over a typing mistake. Files of the system before us load unchanged, so a key that we do not know is no
fault: a scalar is the runner's (``RUNNER_<KEY>``), anything else is ignored with a warning.

A pool can also come with a request, from somebody who may launch but does not own this machine. Such an inline pool is
judged by what it may name before anything else of it is looked at: some keys read files.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlencode

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import override

from app import job_template
from app.errors import ConfigurationError, Fault, InvalidRequest
from app.models import Identifier, Text
from app.runner import Policy
from app.settings import PREFIX, WebAddress
from app.spelling import meant

RESERVED = frozenset(
    {
        "RUNNER_ID",
        "TASK_CONTEXT",
        "POOL_NAME",
        "TASK_CONTEXT_FILE",
        "RUNNER_LAUNCHER_URL",
        "RUNNER_TOKEN",
        "TRACEPARENT",
    }
)
"""The variables by which the launcher tells a runner what it is; no pool may set them."""

MAX_VARIABLE_BYTES = 131_072
"""What the kernel takes as one ``NAME=value`` with its closing zero byte (MAX_ARG_STRLEN)."""

DOCKER_HOST = "unix:///var/run/docker.sock"

_MEBIBYTE = 2**20
_ROUNDING = 1e-9
_LONGEST = 1e9
_SHOWN = 20
_MANY = 1_000_000
_SELDOM = 1e-5
_MOST_CORES = 1e6
_MOST_MEBIBYTES = 2**43
_NOTE = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"\+?((?:\d{1,20}\.?\d{0,20}|\.\d{1,20})(?:[eE][+-]?\d{1,2})?)([numkMGTPE]|[KMGTPE]i)?", re.ASCII)
_DECIMAL = {"n": -3, "u": -2, "m": -1, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}

_Location = tuple[int | str, ...]
_Wrong = tuple[_Location, str]
_Scalar = str | int | float | bool | None

_log = logging.getLogger(__name__)


class PoolType(StrEnum):
    """Where a pool's runners run."""

    LOCAL_PROCESS = "local-process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


# The words that pools are written in.


def _without_zero(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a zero byte")
    return text


def _as_text(value: object) -> object:
    """Python's `str` of a scalar: how every scalar of a pool is told to its runner."""
    return str(value) if isinstance(value, int | float) else value


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path")
    return path


def _runnable(command: list[str]) -> list[str]:
    if not command or not command[0]:
        raise ValueError("must name a program")
    return command


def _located(name: str, info: ValidationInfo) -> str:
    """Find a file that a pool names: beside the pool file, else where the service was started, as the old system did."""
    here = Path(os.path.expanduser(name))  # noqa: PTH111 -- leaves an unknown user's ~ alone instead of raising
    beside = (info.context or {}).get("folder", Path()) / here
    return str((here if here.exists() and not beside.exists() else beside).absolute())


def _quantity(value: object, unit: int) -> Fraction:
    """Read a bare number, which counts units, or a Kubernetes quantity; exactly."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError("must be a positive number or a quantity such as 500m or 2Gi")
    number, suffix = match.groups()
    if not suffix:
        return Fraction(number) * unit
    scale = Fraction(1024) ** _BINARY[suffix] if suffix in _BINARY else Fraction(1000) ** _DECIMAL[suffix]
    return Fraction(number) * scale


def _cores(value: object) -> float:
    return float(_quantity(value, 1))


def _mebibytes(value: object) -> int:
    """Whole MiB, rounded down: a limit is never above what was asked for."""
    return int(_quantity(value, _MEBIBYTE) / _MEBIBYTE)


def _template(name: object, info: ValidationInfo) -> object:
    if not isinstance(name, str):
        raise ValueError("must be the name of a YAML file")  # noqa: TRY004 -- pydantic collects ValueErrors
    path = Path(_located(name, info))
    template, twice = _parse(path)
    if twice:
        raise ValueError(f"{path}: {_dotted(twice[0])} is given twice")
    if not isinstance(template, dict):
        raise ValueError(f"{path}: must be a YAML mapping")  # noqa: TRY004 -- likewise
    wrong = [f"{_dotted(where)} {detail}" for where, detail in job_template.faults(template, RESERVED)]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    return template


String = Annotated[Text, AfterValidator(_without_zero)]
Word = Annotated[String, Field(min_length=1)]
Command = Annotated[list[String], AfterValidator(_runnable)]
Environment = dict[str, Annotated[str, BeforeValidator(_as_text)]]
AbsolutePath = Annotated[String, AfterValidator(_absolute)]
File = Annotated[Word, AfterValidator(_located)]
User = Annotated[Word, BeforeValidator(_as_text)]
JobTemplate = Annotated[dict[str, JsonValue], BeforeValidator(_template)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Cores = Annotated[float, Field(gt=0, le=_MOST_CORES)]
Mebibytes = Annotated[int, Field(ge=1, le=_MOST_MEBIBYTES)]
AskedCores = Annotated[Cores, BeforeValidator(_cores)]
AskedMebibytes = Annotated[Mebibytes, BeforeValidator(_mebibytes)]
Seconds = Annotated[float, Field(gt=0, le=_LONGEST)]
SomeSeconds = Annotated[float, Field(ge=0, le=_LONGEST)]
Count = Annotated[int, Field(ge=1, le=_MANY)]
PerSecond = Annotated[float, Field(ge=_SELDOM, le=_MANY)]

# What stands below a key describes it: `make reference` writes docs/pools.md of that.
_CLOSED = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)
_OPEN = ConfigDict(strict=True, frozen=True, extra="allow", hide_input_in_errors=True)


class Resources(BaseModel):
    """What one runner gets, as a process or a container."""

    model_config = _CLOSED

    cpu_limit: AskedCores | None = None
    """For each runner."""
    memory_limit: AskedMebibytes | None = None
    """For each runner; of a container swap included."""


class Amounts(BaseModel):
    """Amounts of what a pod can have; what is neither of these two passes as it is written."""

    model_config = _OPEN
    __pydantic_extra__: dict[str, Annotated[String, BeforeValidator(_as_text)]] = Field(init=False)

    cpu: AskedCores | None = None
    memory: AskedMebibytes | None = None


class PodResources(BaseModel):
    """What one runner gets, as a pod."""

    model_config = _CLOSED

    requests: Amounts = Amounts()
    """Half of the limits, unless given."""
    limits: Amounts = Amounts()
    """What the pod may use at most; other kinds (`nvidia.com/gpu`) pass as they are."""


class NoWorkspace(BaseModel):
    """An empty directory, gone with the pod."""

    model_config = _CLOSED

    kind: Literal["none"] = "none"


class ClaimWorkspace(BaseModel):
    """The slot as a part of a volume: `root` is the path that the volume has where slots are named."""

    model_config = _CLOSED

    kind: Literal["pvc"]
    claim: ObjectName
    """The name of the volume claim."""
    root: AbsolutePath = "/"
    """The path that the volume has where slots are named."""
    read_only: bool = False
    """Whether the runner may not write there."""


class HostWorkspace(BaseModel):
    """The slot's path on the node."""

    model_config = _CLOSED

    kind: Literal["host_path"]
    read_only: bool = False
    """Whether the runner may not write there."""


class GitWorkspace(BaseModel):
    """A clone of the slot's repository. `credentials` is a Secret with `username` and `password`, or `ssh-privatekey`."""

    model_config = _CLOSED

    kind: Literal["git"]
    image: Word = "alpine/git:latest"
    """Needs `git` and `sh`."""
    credentials: ObjectName | None = None
    """A Secret with `username` and `password`, or `ssh-privatekey` and perhaps `known_hosts`."""
    depth: Count | None = None
    """How much history is fetched; all of it where nothing is said."""


class _AnyWorkspace(BaseModel):
    """What says by which keys the others are judged."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    kind: Literal["none", "pvc", "host_path", "git"] = "none"


_WORKSPACES: dict[str, type[BaseModel]] = {
    "none": NoWorkspace,
    "pvc": ClaimWorkspace,
    "host_path": HostWorkspace,
    "git": GitWorkspace,
}


def _of_its_kind(workspace: object) -> object:
    if not isinstance(workspace, dict):
        return workspace
    return _WORKSPACES[_AnyWorkspace.model_validate(workspace).kind].model_validate(workspace)


Workspace = Annotated[NoWorkspace | ClaimWorkspace | HostWorkspace | GitWorkspace, BeforeValidator(_of_its_kind)]
"""How a pod comes by the slot."""


class PoolConfig(BaseModel):
    """The keys of every type. What is no field here or below is not the launcher's."""

    model_config = _OPEN

    environment: Environment = Field(default_factory=dict, repr=False)
    """Variables for the runner."""
    labels: dict[str, String] = Field(default_factory=dict)
    """Labels of the record, and of the container or Job; ours cannot be replaced."""
    launch_timeout_seconds: Seconds = 300
    """How long a launch may take until its runner runs."""
    run_timeout_seconds: Seconds | None = None
    """How long a runner may run, from when its engine took it; it is then stopped, and told as `deadline_exceeded`."""
    heartbeat_timeout_seconds: Seconds | None = None
    """How long a runner that has beaten once may be silent."""
    retry_attempts: Count = 3
    """How often one launch is tried."""
    retry_base_seconds: SomeSeconds = 0.2
    """The bound of the first wait between attempts; it doubles with each."""
    stop_grace_seconds: SomeSeconds = 10
    """From TERM to KILL, where a stop does not say."""
    queue_limit: int = Field(default=0, ge=0, le=_MANY)
    """How many launches may wait for a place in a full pool; beyond that 429."""
    launching_limit: Count | None = None
    """How many launches may be under way at once, not yet taken by the engine; beyond that 429, or the queue."""
    launch_rate: PerSecond | None = None
    """Launches a second, and as many at once (0.1: one in ten seconds); beyond that 429, or the queue."""
    log_max_mib: Count = 50
    """MiB of its log that are kept, the newest."""
    public_url: WebAddress | None = None
    """How a runner there reaches the service; `PUBLIC_URL`, or what `LISTEN` says, where it is not given."""


class LocalProcessConfig(PoolConfig):
    """A process on this machine."""

    command: Command | None = None
    """What runs; the service's `RUNNER_COMMAND` where it is not given."""
    python_path: Word | None = None
    """Takes the place of a leading `python`."""
    working_dir: AbsolutePath | None = None
    """Where it runs; in the slot where nothing is said."""
    node: Word | None = None
    """The node whose service alone runs it, where several share a database; the one that reads this file otherwise."""
    user: User | None = None
    """A name or `UID[:GID]` to run as; the service must be root."""
    resources: Resources | None = None
    """What each runner gets; the pool's quotas then bound the sum."""


class DockerConfig(PoolConfig):
    """A container on a Docker Engine."""

    image: Word = "necrocode/runner:latest"
    """Without a tag or digest: `latest`."""
    command: Command | None = None
    """Takes the place of the image's `CMD`, and is given to its `ENTRYPOINT` if it has one."""
    pull_policy: Literal["always", "if-not-present", "never"] = "if-not-present"
    """`always` asks once per launch."""
    registry_auth: File | None = None
    """Credentials for the registry, beside the pool file."""
    mount_repo_pool: bool = True
    """Whether the slot is mounted at `/workspace`, read-write; it is then the working directory."""
    network: Word | None = None
    """A network's name, or `host`, or `none`; the engine's default where nothing is said."""
    volumes: dict[Word, AbsolutePath] = Field(default_factory=dict)
    """`{HOST: CONTAINER}`, read-write; a path on the engine's machine or a volume's name. Neither is made."""
    resources: Resources | None = None
    """What each runner gets; the pool's quotas then bound the sum."""
    runtime: Word | None = None
    """Such as `runsc` or `kata`; told in the record as `isolation`."""
    gpus: Annotated[Word, BeforeValidator(_as_text)] | None = None
    """As `docker run --gpus`: a number, `all`, or `device=ID,ID`."""
    user: User | None = None
    """`UID`, `UID:GID`, a name the image knows, or `image`: whom the image says. Otherwise the slot's owner."""
    cap_add: list[Word] = Field(default_factory=list)
    """Capabilities given back, such as `NET_ADMIN`."""
    pids_limit: int | None = Field(default=None, ge=1)
    """Processes and threads at once; 4096 where nothing is said."""
    docker_host: Annotated[str, Field(pattern=r"^(unix|tcp|http|https)://[!-~]+$")] = DOCKER_HOST
    """Or `tcp://HOST:PORT`, `http://...`, `https://...`."""
    slot_path_map: dict[AbsolutePath, AbsolutePath] = Field(default_factory=dict)
    """`{OURS: THE ENGINE'S}`, for where the two see slots under different paths."""
    node: Word | None = None
    """The node whose service alone runs it, where several share a database; the one that reads this file otherwise."""

    @field_validator("docker_host")
    @classmethod
    def _owner_known(cls, host: str, info: ValidationInfo) -> str:
        if info.data.get("user") is None and info.data.get("mount_repo_pool") and not host.startswith("unix://"):
            raise ValueError("is another machine, where it cannot be seen who owns a slot; user is needed (or user: image)")
        return host


class KubernetesConfig(PoolConfig):
    """A Job with one pod. `job_template` is the parsed file. The last two keys are the old system's, and set aside."""

    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "necrocode-agents"
    """Must exist; each is an engine of its own."""
    image: Word = "necrocode/runner:latest"
    """The image of the pod's container `runner`."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """As Kubernetes has it."""
    command: Command | None = None
    """The image's own where it is not given; `$` reaches the program as it is written."""
    job_template: JobTemplate | None = None
    """A Job in YAML that ours is merged into, beside the pool file."""
    service_account: ObjectName | None = None
    """None, and no token in the pod, where nothing is said."""
    image_pull_secrets: list[ObjectName] = Field(default_factory=list)
    """Names of Secrets in the namespace."""
    node_selector: dict[str, String] = Field(default_factory=dict)
    """Labels of the nodes it may run on."""
    tolerations: list[dict[str, JsonValue]] = Field(default_factory=list)
    """As Kubernetes writes them."""
    resources: PodResources | None = None
    """What each runner gets; the pool's quotas then bound the sum."""
    env_from: list[dict[str, JsonValue]] = Field(default_factory=list)
    """As Kubernetes writes it; it never beats the launcher's variables."""
    annotations: dict[str, String] = Field(default_factory=dict)
    """Of Job and pod."""
    run_as_user: int = Field(default=65532, ge=0)
    """Such a user has no home in most images: set `HOME`."""
    fs_group: int | None = Field(default=None, ge=0)
    """The group that volumes belong to; `run_as_user` where nothing is said."""
    workspace: Workspace = NoWorkspace()
    """What is mounted at `/workspace`."""
    ttl_seconds: int | None = Field(default=None, ge=0)
    """The cluster removes an ended Job after this time; one that is gone before it was read is `lost`. Better left out."""
    kubeconfig: File | None = None
    """How the cluster is reached; the one that the service runs in where nothing is said."""
    context: Word | None = None
    """One of the kubeconfig's contexts."""
    restart_policy: JsonValue = Field(default=None, exclude=True)
    """Set aside: a runner is never started again."""
    backoff_limit: JsonValue = Field(default=None, exclude=True)
    """Set aside likewise."""

    @field_validator("labels", "annotations", "node_selector")
    @classmethod
    def _with_valid_keys(cls, notes: dict[str, str]) -> dict[str, str]:
        for key in notes:
            if not _NOTE.fullmatch(key):
                raise ValueError(f"{key!r} is not a key that Kubernetes takes")
            if key in job_template.OWN_LABELS or key.startswith(job_template.OWN_PREFIX):
                raise ValueError(f"{key} is the launcher's")
        return notes


@dataclass(frozen=True, slots=True)
class KubernetesEngine:
    """A namespace of a cluster, as an engine: `kubernetes:NAMESPACE`, `kubernetes:NAMESPACE?kubeconfig=FILE&context=NAME`.

    Without a kubeconfig it is the cluster that we run in.
    """

    namespace: str
    kubeconfig: Path | None = None
    context: str | None = None

    @override
    def __str__(self) -> str:
        keys = {"kubeconfig": str(self.kubeconfig or ""), "context": self.context or ""}
        query = urlencode({key: value for key, value in keys.items() if value}, safe="/:@")
        return f"kubernetes:{self.namespace}" + (f"?{query}" if query else "")

    @classmethod
    def parse(cls, engine: str) -> Self:
        """Read what `str` wrote."""
        namespace, _, query = engine.partition(":")[2].partition("?")
        keys = dict(parse_qsl(query))
        return cls(namespace, Path(keys["kubeconfig"]) if "kubeconfig" in keys else None, keys.get("context"))


_SET_ASIDE = ("restart_policy", "backoff_limit")
_CONFIGS: dict[str, type[PoolConfig]] = {
    PoolType.LOCAL_PROCESS: LocalProcessConfig,
    PoolType.DOCKER: DockerConfig,
    PoolType.KUBERNETES: KubernetesConfig,
}


def bound_to_node(engine: str) -> bool:
    """Whether an engine can be reached on its own machine alone."""
    return engine == "local-process" or engine.startswith("docker:unix:")


# A pool.


def _count(number: float, one: str, many: str | None = None) -> str:
    return f"{number:g} {one if number == 1 else many or one + 's'}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What the runners placed in a pool hold together: their number, cores and MiB; ``launching``: not yet accepted."""

    runners: int = 0
    cpu: float = 0
    memory_mib: int = 0
    launching: int = 0


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many launches begun in any so many seconds."""

    launches: int
    seconds: float


class Pool(BaseModel):
    """An agent pool: where runners run, what each gets, and how many fit."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)

    name: Identifier
    type: PoolType = Field(strict=False)
    """Where runners run; it says which keys `config` has."""
    max_concurrency: Count = 1
    """Live runners at once; beyond that 429, or the queue."""
    cpu_quota: Cores | None = None
    """For each runner; with `config.resources` for all of them together."""
    memory_quota: Mebibytes | None = None
    """For each runner; with `config.resources` for all of them together."""
    enabled: bool = True
    """Whether it takes launches; a switch by `PATCH /pools/NAME` beats the file."""
    config: LocalProcessConfig | DockerConfig | KubernetesConfig
    """By type, below."""

    @field_validator("config", mode="before")
    @classmethod
    def _of_its_type(cls, config: object, info: ValidationInfo) -> object:
        if "type" not in info.data:
            return LocalProcessConfig()  # the type is what is wrong; nobody knows by which keys to judge this
        kind = _CONFIGS[info.data["type"]]
        if isinstance(config, dict):  # a null stands for a key left out
            config = {key: value for key, value in config.items() if value is not None or key not in kind.model_fields}
        return kind.model_validate(config, context=info.context)

    @model_validator(mode="after")
    def _can_run_one(self) -> Self:
        refusal = self.refusal(Usage())
        if refusal:
            raise ValueError(f"can never run anything: {refusal}")
        if isinstance(self.config.resources, PodResources):
            requests = self.config.resources.requests
            for asked, limit in zip((requests.cpu, requests.memory), self.demand, strict=True):
                if asked is not None and limit is not None and asked > limit:
                    raise ValueError(f"config.resources.requests asks for {asked}, and the limit is {limit}")
        return self

    @property
    def resources(self) -> tuple[float | None, int | None]:
        """The cores and MiB that the pool's configuration gives each runner."""
        match self.config.resources:
            case Resources(cpu_limit=cpu, memory_limit=memory) | PodResources(limits=Amounts(cpu=cpu, memory=memory)):
                return cpu, memory
            case None:
                return None, None

    @property
    def demand(self) -> tuple[float | None, int | None]:
        """The cores and MiB that one runner gets; None: no limit. A quota without `resources` is each runner's limit."""
        cpu, memory = self.resources
        return self.cpu_quota if cpu is None else cpu, self.memory_quota if memory is None else memory

    def refusal(self, usage: Usage) -> str | None:
        """Say why one more runner does not fit beside these now; None if it does. With `resources`, quotas bound the sum."""
        if usage.runners >= self.max_concurrency:
            held = _count(usage.runners, "runner")
            return f"pool {self.name} holds {held}, and its max_concurrency is {self.max_concurrency}"
        limit = self.config.launching_limit
        if limit is not None and usage.launching >= limit:
            under_way = _count(usage.launching, "launch", "launches")
            return f"pool {self.name} has {under_way} under way, and its launching_limit is {limit}"
        cpu, memory = self.resources
        if cpu and self.cpu_quota and usage.cpu + cpu > self.cpu_quota + _ROUNDING:
            return (
                f"a runner of pool {self.name} gets {_count(cpu, 'core')}, and {usage.cpu:g} of {self.cpu_quota:g} are taken"
            )
        if memory and self.memory_quota and usage.memory_mib + memory > self.memory_quota:
            return f"a runner of pool {self.name} gets {memory} MiB, and {usage.memory_mib} of {self.memory_quota} are taken"
        return None

    @property
    def rate(self) -> Rate | None:
        """How fast launches may begin."""
        rate = self.config.launch_rate
        if rate is None:
            return None
        at_once = max(1, int(rate))
        return Rate(at_once, at_once / rate)

    @property
    def plain_settings(self) -> dict[str, str]:
        """The scalars that are not the launcher's, as its runners are told them."""
        told = self.config.model_extra or {}
        return {_variable(key): str(value) for key, value in told.items() if isinstance(value, _Scalar)}

    @property
    def policy(self) -> Policy:
        """What the pool says about time and tries."""
        config = self.config
        return Policy(
            launch_timeout_seconds=config.launch_timeout_seconds,
            run_timeout_seconds=config.run_timeout_seconds,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
            retry_attempts=config.retry_attempts,
            retry_base_seconds=config.retry_base_seconds,
            stop_grace_seconds=config.stop_grace_seconds,
        )

    @property
    def engine(self) -> str:
        """The engine that runs it; pools that say the same share one launcher."""
        match self.config:
            case LocalProcessConfig():
                return "local-process"
            case DockerConfig(docker_host=host):
                return f"docker:{host}"
            case KubernetesConfig(namespace=namespace, kubeconfig=file, context=context):
                return str(KubernetesEngine(namespace, Path(file) if file else None, context))

    @property
    def node(self) -> str | None:
        """The node whose service alone may run it, where the pool names one."""
        return None if isinstance(self.config, KubernetesConfig) else self.config.node

    @property
    def works_in_slot(self) -> bool:
        """Whether its runners start in the slot's path or have it mounted, on whatever machine they run.

        A local pool with a `working_dir` starts there and is only told of the slot.
        """
        match self.config:
            case LocalProcessConfig(working_dir=elsewhere):
                return elsewhere is None
            case DockerConfig(mount_repo_pool=mounted):
                return mounted
            case KubernetesConfig(workspace=workspace):
                return workspace.kind in ("pvc", "host_path")

    @property
    def enters_slot(self) -> bool:
        """Whether its runners work in the slot on this machine, so that its path must exist here.

        A Docker Engine behind a network address and a cluster have file systems of their own.
        """
        match self.config:
            case LocalProcessConfig():
                return self.works_in_slot
            case DockerConfig(docker_host=host):
                return self.works_in_slot and host.startswith("unix://")
            case KubernetesConfig():
                return False


# Pools and where they come from.


@dataclass(frozen=True, slots=True)
class Pools:
    """The configured pools by name, and what was odd about their file without being wrong."""

    by_name: Mapping[str, Pool] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load_pools(path: Path | None) -> Pools:
    """Read a pool file, or raise ConfigurationError with everything that is wrong with it."""
    if path is None:
        return Pools()
    try:
        document, twice = _parse(path)
    except ValueError as error:
        setting = f"{PREFIX}POOLS_FILE: " if isinstance(error.__cause__, OSError) else ""
        raise ConfigurationError(f"{setting}{error}") from error
    wrong: list[_Wrong] = [(where, "is given twice") for where in twice if where[0] == "agent_pools"]
    odd: list[_Wrong] = []
    by_name = {}
    entries, faults = _entries(document)
    wrong += faults
    for name, data in entries.items():
        at = ("agent_pools", name)
        if not isinstance(data, dict):
            wrong.append((at, "must be a mapping with a type"))
            continue
        pool, faults = _build({**data, "name": name}, path.parent)
        wrong += [((*at, *where), detail) for where, detail in faults]
        odd += [((*at, *where), detail) for where, detail in _oddities(data)]
        if pool:
            by_name[name] = pool
    if wrong:
        raise ConfigurationError("\n".join(f"{path}: {_dotted(where)}: {detail}" for where, detail in wrong))
    warnings = tuple(f"{path}: {_dotted(where)}: {detail}" for where, detail in odd)
    for warning in warnings:
        _log.warning("%s", warning)
    return Pools(by_name, warnings)


def resolve(pools: Pools, asked: str | dict[str, Any], *, allow_inline: bool) -> Pool:
    """Find the pool that a request means: a configured one by its name, else the object itself where that is allowed."""
    name = asked if isinstance(asked, str) else asked["name"]
    if name in pools.by_name:
        return pools.by_name[name]
    if isinstance(asked, str):
        text = unknown_pool(name, pools.by_name)
        raise InvalidRequest(text, Fault("/pool", text), code="unknown-pool")
    if not allow_inline:
        text = f"no pool named {name} is configured, and inline pools are off"
        raise InvalidRequest(text, Fault("/pool", text), code="inline-pools-off")
    return inline_pool(asked)


def unknown_pool(name: str, known: Iterable[str]) -> str:
    """Say that there is no such pool, and which there are."""
    names = sorted(known)
    some = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"no pool named {name} is configured; " + (f"there are: {some}" if some else "there is none")


def inline_pool(data: dict[str, Any]) -> Pool:
    """Make a pool of an object in a request, or raise InvalidRequest with everything that is wrong with it."""
    pool, wrong = None, list(_not_inline(data))
    if not wrong:
        pool, wrong = _build(data, Path())
    if pool is None or wrong:
        faults = [Fault.at(("pool", *where), detail) for where, detail in wrong]
        raise InvalidRequest("the inline pool cannot be used", *faults)
    return pool


def _kind(data: Mapping[str, Any]) -> type[PoolConfig] | None:
    name = data.get("type")
    return _CONFIGS.get(name) if isinstance(name, str) else None


def _entries(document: object) -> tuple[dict[str, object], list[_Wrong]]:
    """Give what a file says of pools, and what is wrong with how it says that."""
    keys = document if isinstance(document, dict) else {}
    if "agent_pools" not in keys:
        close = [(key, nearest) for key in map(str, keys) if (nearest := meant(key, ["agent_pools"]))]
        misspelt: list[_Wrong] = [((key,), f"is not a key of a pool file{nearest}") for key, nearest in close]
        return {}, misspelt or [(("agent_pools",), "is missing")]
    entries = keys["agent_pools"]
    if entries is not None and not isinstance(entries, dict):
        return {}, [(("agent_pools",), "must be a mapping of names to pools")]
    return entries or {}, []


def _build(data: dict[str, Any], folder: Path) -> tuple[Pool | None, list[_Wrong]]:
    """Make a pool, and say everything that is wrong with it."""
    wrong = [(("config", *where), detail) for where, detail in _variables_refused(data)]
    said = {key: value for key, value in data.items() if value is not None}
    try:
        return Pool.model_validate({"config": {}, **said}, context={"folder": folder}), wrong
    except ValidationError as error:
        for line in error.errors():
            if line["type"] == "invalid_key":
                continue  # told above, in words that help with `on:`, which YAML reads as true
            where = line["loc"][:-1] if line["loc"][-1:] == ("[key]",) else line["loc"]
            wrong.append((where, line["msg"].removeprefix("Value error, ")))
    return None, wrong


def _variables_refused(data: Mapping[str, Any]) -> Iterator[_Wrong]:
    """Say which variables of a pool, from keys that are not ours or from its environment, cannot be set."""
    config, kind = data.get("config"), _kind(data)
    if kind is None or not isinstance(config, dict):
        return
    keys: dict[str, str] = {}
    for key, value in config.items():
        if not isinstance(key, str):
            yield (str(key),), "is not text; put it in quotes"
        elif key not in kind.model_fields and isinstance(value, _Scalar):
            name = _variable(key)
            if name in keys:
                yield (key,), f"would be told as {name}, and so would {keys[name]}"
            yield from (((key,), f"cannot be told: {refusal}") for refusal in _refused(name, str(value)))
            keys[name] = key
    environment = config.get("environment")
    if isinstance(environment, dict):
        for name, value in environment.items():
            yield from ((("environment", name), refusal) for refusal in _refused(str(name), str(value)))


def _refused(name: str, value: str) -> Iterator[str]:
    if name in RESERVED:
        yield f"{name} is set by the launcher"
    if not _VARIABLE.fullmatch(name):
        yield f"{name!r} is not a name for an environment variable"
    try:
        size = len(f"{name}={value}\0".encode())
    except UnicodeEncodeError:
        yield "must not hold half of a surrogate pair"
        return
    if "\0" in value:
        yield "must not hold a zero byte"
    if size > MAX_VARIABLE_BYTES:
        yield f"is longer than {MAX_VARIABLE_BYTES} bytes, the most that one variable can hold"


def _variable(key: str) -> str:
    return f"RUNNER_{key.upper()}"


def _oddities(data: Mapping[str, Any]) -> Iterator[_Wrong]:
    """Say what in a pool of the file is probably not meant, though nothing in it is wrong."""
    known = [key for key in Pool.model_fields if key != "name"]
    kind = _kind(data)
    for key in data:
        if key not in known:
            belongs = "; it belongs under config" if kind and key in kind.model_fields else meant(key, known)
            yield (key,), f"is not a key of a pool, and ignored{belongs}"
    config = data.get("config")
    if kind is None or not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in kind.model_fields:
            if key in _SET_ASIDE:
                yield ("config", key), "is set aside: a Job has one pod, which is never started again"
        elif not isinstance(value, _Scalar):
            yield ("config", key), f"is not a key of a {data['type']} pool, and ignored{meant(key, kind.model_fields)}"
        elif nearest := meant(key, kind.model_fields):
            yield ("config", key), f"is not the launcher's, and told to runners as {_variable(key)}{nearest}"


def _not_inline(data: Mapping[str, Any]) -> Iterator[_Wrong]:
    """Say which keys of an object in a request are for the pool file alone."""
    for key in data:
        if key not in Pool.model_fields:
            yield (key,), "is not a key of an inline pool"
    config, kind = data.get("config"), _kind(data)
    if kind is None or not isinstance(config, dict):
        return
    allowed = {"image", "command", "environment", "labels", "resources"}
    if kind is LocalProcessConfig:
        allowed -= {"command", "environment"}
    for key, value in config.items():
        if key in kind.model_fields and key not in allowed:
            yield ("config", key), "is not for inline pools"
        elif key not in kind.model_fields and not isinstance(value, _Scalar):
            yield ("config", key), f"is not a key of a {data['type']} pool, and not a scalar to tell to its runners"


def _dotted(where: _Location) -> str:
    return ".".join(map(str, where))


# YAML.


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves dates and `1000:50` (a user and group, not 60050) as they are written."""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> object:
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_MERGE = "tag:yaml.org,2002:merge"


def _parse(path: Path) -> tuple[object, list[_Location]]:
    """Read a YAML file; with it, the keys given twice, of which YAML itself would silently take the last."""
    try:
        with path.open("rb") as file:
            loader = _Loader(file)
            try:
                root = loader.get_single_node()
                twice = _given_twice(root)  # before constructing, which merges keys into the nodes
                return loader.construct_document(root) if root else None, twice
            finally:
                loader.dispose()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error


def _given_twice(root: yaml.Node | None) -> list[_Location]:
    """Find repeated keys among the nodes as written. Overriding a key merged with `<<` is no repetition."""
    twice: list[_Location] = []
    seen: set[int] = set()
    pending: list[tuple[_Location, yaml.Node | None]] = [((), root)]
    for at, node in pending:
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [((*at, index), item) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
            times = Counter((key.tag, key.value) for key in scalars)
            twice += [(*at, name) for (_, name), count in times.items() if count > 1]
            pending += [((*at, str(key.value)), value) for key, value in node.value]
    return twice
