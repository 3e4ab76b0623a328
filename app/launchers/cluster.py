"""One namespace of one Kubernetes API: calls, streams and a way into a container; all as plain JSON, with one set of errors.

The only place that knows kubernetes_asyncio, which is used for what it is good at: kubeconfig files, credentials and the
in-cluster configuration. It is imported in a thread at the first call, because that takes a second.

``LauncherUnavailable`` is raised when the API did not answer or asks for patience, ``Refused`` when it answered with a no.
"""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from typing_extensions import override

from app.errors import LauncherUnavailable

if TYPE_CHECKING:
    from kubernetes_asyncio.client import ApiClient, Configuration

Json = dict[str, Any]
Query = Mapping[str, str | int] | Sequence[tuple[str, str | int]]

CALLS = 32
"""How many calls are asked of the API at once; the others wait here and not there."""

CALL_SECONDS = 30.0
CONNECT_SECONDS = 5.0
TELL_SECONDS = 10.0
CREDENTIALS_SECONDS = 15.0
"""How long a plugin for credentials may take."""

PAUSE_SECONDS = 30.0
"""As long as the API may wish us all to wait; orders to end runners wait for it, too."""

RENEW_SECONDS = 60.0
"""How old a service account's token may get before its file is read again."""

_TOO_MANY = 429
_UNAUTHORIZED = 401
_SERVER_ERROR = 500
_MERGE = "application/merge-patch+json"
TOLD = "told"
"""What a script says when it is about to do what it is run for."""


class Refused(Exception):
    """The API's no: its status, its reason in one word, and its message."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Cluster:
    """Asks the API of a cluster about one namespace. ``kubeconfig`` None: the service account of the pod we run in."""

    def __init__(self, kubeconfig: Path | None, context: str | None, namespace: str) -> None:
        self.namespace = namespace
        self._kubeconfig = kubeconfig
        self._context = context
        self._api: ApiClient | None = None
        self._retired: list[ApiClient] = []
        self._streams: set[aiohttp.ClientResponse] = set()
        self._opening = asyncio.Lock()
        self._calls = asyncio.Semaphore(CALLS)
        self._loaded_at = 0.0
        self._unloaded: tuple[float, LauncherUnavailable] | None = None
        self._paused_until = 0.0
        self._closed = False

    def path(self, kind: str, name: str = "", part: str = "") -> str:
        """Where the objects of a kind are, or one of them, or a part of that one."""
        group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
        return "/".join(filter(None, (f"{group}/namespaces/{self.namespace}/{kind}", name, part)))

    async def call(self, method: str, path: str, body: Json | None = None, query: Query = ()) -> Json:
        """Make one call and give its answer. PATCH is a merge patch."""
        pause = self._paused_until - time.monotonic()
        if pause > 0:
            raise LauncherUnavailable("the API asked for a pause", acted=False, retry_after=pause)
        kind = _MERGE if method == "PATCH" else "application/json"
        async with self._calls:
            timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS)
            async with self._response(method, path, query, timeout, body, kind) as response:
                with _translated():
                    answer: Json = json.loads(await response.read())
                return answer

    @asynccontextmanager
    async def stream(self, path: str, query: Query, *, silence: float | None) -> AsyncIterator[AsyncIterator[bytes]]:
        """Read an answer that goes on; more than so many seconds of silence end it with LauncherUnavailable."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        async with self._response("GET", path, query, timeout) as response:
            self._streams.add(response)
            try:
                yield _chunks(response)
            finally:
                self._streams.discard(response)

    async def tell(self, pod: str, container: str, script: str) -> None:
        """Run a shell script in a container; returns once it says ``TOLD``, without waiting for its end.

        Its end cannot be waited for: engines lose it when the container ends with it. Raises Refused if it does not say so.
        """
        api = await self._client()
        words = ("sh", "-c", script)
        query = [("container", container), ("stdout", 1), ("stderr", 1), *(("command", word) for word in words)]
        url = f"{api.configuration.host}{self.path('pods', pod, 'exec')}?{urlencode(query)}"
        session = api.rest_client.pool_manager
        try:
            with _translated():
                async with asyncio.timeout(TELL_SECONDS):
                    socket = await session.ws_connect(
                        url, headers=await _headers(api), protocols=("v4.channel.k8s.io",), **_way(api)
                    )
                    try:
                        await _heard(socket)
                    finally:
                        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                            async with asyncio.timeout(1):
                                await socket.close()
        except aiohttp.WSServerHandshakeError as error:
            if error.status == _UNAUTHORIZED:
                await self._client(renew=True)
                raise LauncherUnavailable("the API does not accept our credentials", acted=False) from error
            raise Refused(error.status, "", f"no way into the container: {error.message}") from error

    async def permitted(self, verb: str, kind: str) -> bool:
        """Whether we may do this to objects of this kind, by the API's own review. A part is written ``pods/log``."""
        resource, _, part = kind.partition("/")
        asked = {"namespace": self.namespace, "verb": verb, "resource": resource, "subresource": part}
        group = {"group": "batch"} if resource == "jobs" else {}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {**asked, **group}},
        }
        answer = await self.call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
        return bool(answer["status"]["allowed"])

    async def aclose(self) -> None:
        """Close all connections; what still reads from them is told so."""
        self._closed = True
        for response in self._streams:
            response.close()  # closing the session alone leaves its readers waiting
        async with self._opening:
            for api in [*self._retired, *([self._api] if self._api else [])]:
                await api.close()
            self._retired, self._api = [], None

    @asynccontextmanager
    async def _response(  # noqa: PLR0917 - what a request is made of
        self,
        method: str,
        path: str,
        query: Query,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - of aiohttp
        body: Json | None = None,
        kind: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, with fresh credentials once if they are refused, and give an answer that is a yes."""
        renewed = False
        while True:
            api = await self._client(renew=renewed)
            with _translated():
                response = await api.rest_client.pool_manager.request(
                    method,
                    f"{api.configuration.host}{path}?{urlencode(query)}",
                    data=None if body is None else io.BytesIO(json.dumps(body).encode()),
                    headers={**await _headers(api), "Content-Type": kind, "Accept": "application/json"},
                    timeout=timeout,
                    **_way(api),
                )
            async with response:
                if response.status == _UNAUTHORIZED and not renewed:
                    renewed = True
                    continue
                if response.status >= 300:  # noqa: PLR2004 - the statuses that are no yes
                    await self._refuse(response)
                yield response
                return

    async def _refuse(self, response: aiohttp.ClientResponse) -> None:
        """Say no as the API did: a lasting one as Refused, one that may pass as LauncherUnavailable."""
        with _translated():
            text = (await response.read()).decode(errors="replace")
        try:
            status = json.loads(text)
            reason, message = str(status.get("reason", "")), str(status.get("message", ""))
        except (ValueError, AttributeError):
            reason, message = "", text[:500]
        message = message or f"HTTP status {response.status}"
        wish = response.headers.get("Retry-After", "")
        retry_after = float(wish) if wish.isdigit() else None
        if response.status == _TOO_MANY:
            self._paused_until = time.monotonic() + min(retry_after or 1, PAUSE_SECONDS)
            raise LauncherUnavailable(message, acted=False, retry_after=retry_after or 1)
        if response.status == _UNAUTHORIZED:
            raise LauncherUnavailable(f"the API does not accept our credentials: {message}", acted=False)
        if response.status >= _SERVER_ERROR:
            raise LauncherUnavailable(message, retry_after=retry_after)
        raise Refused(response.status, reason, message)

    async def _client(self, *, renew: bool = False) -> "ApiClient":
        """Give the client, made at first use; with ``renew`` its credentials are read again, though not all the time.

        Who waited while another's attempt at that failed takes its answer, and does not begin one more.
        """
        asked_at = time.monotonic()
        async with self._opening:
            if self._closed:
                raise LauncherUnavailable("this launcher is closed", acted=False)
            age = time.monotonic() - self._loaded_at
            in_cluster = self._kubeconfig is None
            if self._api and age < (1 if renew else RENEW_SECONDS if in_cluster else float("inf")):
                return self._api
            if self._unloaded and self._unloaded[0] >= asked_at:
                raise LauncherUnavailable(str(self._unloaded[1]), acted=False) from self._unloaded[1]
            try:
                loaded = await asyncio.to_thread(_configuration, self._kubeconfig, self._context)
            except Exception as error:  # whatever a plugin for credentials, a file or the library finds wrong
                unloaded = LauncherUnavailable(f"no credentials for the cluster: {error}", acted=False)
                self._unloaded = time.monotonic(), unloaded
                raise unloaded from error
            self._loaded_at = time.monotonic()
            known = self._api.configuration if self._api else None
            if self._api and known and (known.host, known.cert_file) == (loaded.host, loaded.cert_file):
                known.api_key = loaded.api_key
                return self._api
            if self._api:
                self._retired.append(self._api)  # others may still be reading from it
            self._api = _open(loaded)
            return self._api


def _open(configuration: "Configuration") -> "ApiClient":
    from kubernetes_asyncio.client import ApiClient  # noqa: PLC0415 - loaded by now

    api = ApiClient(configuration)
    rest, theirs = api.rest_client, api.rest_client.pool_manager
    # Theirs would look for a proxy and into ~/.netrc before every request, each in a thread.
    rest.pool_manager = aiohttp.ClientSession(connector=theirs.connector)
    theirs.detach()
    if proxy := rest.proxy or _proxy_before(str(configuration.host)):
        rest.proxy = proxy
    return api


def _proxy_before(host: str) -> str | None:
    """Give the proxy that the environment names for a URL."""
    place = urlsplit(host)
    return None if proxy_bypass(place.hostname or "") else getproxies().get(place.scheme)


async def _headers(api: "ApiClient") -> dict[str, str]:
    headers = {"User-Agent": "runner-launcher"}
    await api.update_params_for_auth(headers, [], ["BearerToken"])
    return headers


def _way(api: "ApiClient") -> dict[str, Any]:
    """How the server is reached, as the kubeconfig says."""
    rest = api.rest_client
    way = {"server_hostname": rest.server_hostname, "proxy": rest.proxy, "proxy_headers": rest.proxy_headers}
    return {key: value for key, value in way.items() if value}


def _configuration(kubeconfig: Path | None, context: str | None) -> "Configuration":
    """Read credentials, running a plugin for them if the file says so. Blocks: for a thread."""
    from kubernetes_asyncio import config  # noqa: PLC0415 - takes a second, and not on the loop
    from kubernetes_asyncio.client import Configuration  # noqa: PLC0415

    configuration = Configuration()
    configuration.connection_pool_maxsize = 0  # watches and followers hold one each; calls have a bound of their own
    if kubeconfig is None:
        config.load_incluster_config(configuration, try_refresh_token=False)  # type: ignore[no-untyped-call]
    else:
        loading = config.load_kube_config(
            str(kubeconfig), context=context, client_configuration=configuration, persist_config=False
        )
        with asyncio.Runner(loop_factory=_PluginLoop) as runner:
            runner.run(_in_time(loading))
    configuration.api_key = {name: key.strip() for name, key in configuration.api_key.items()}
    return configuration


class _PluginLoop(asyncio.SelectorEventLoop):
    """A loop that knows the plugins run on it: the library starts them, and leaves one alone that it does not wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.plugins: list[asyncio.SubprocessTransport] = []

    @override
    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        transport, protocol = await super().subprocess_exec(*args, **kwargs)
        self.plugins.append(transport)
        return transport, protocol


async def _in_time(loading: Awaitable[object]) -> None:
    """Wait for credentials, though not for ever, and end the plugin that has not given them by then."""
    try:
        async with asyncio.timeout(CREDENTIALS_SECONDS):
            await loading
    except TimeoutError as error:
        raise TimeoutError(f"they were not given within {CREDENTIALS_SECONDS:g} s") from error
    finally:
        loop = asyncio.get_running_loop()
        for plugin in loop.plugins if isinstance(loop, _PluginLoop) else ():
            with contextlib.suppress(ProcessLookupError):  # it has ended, as it should
                plugin.kill()
            while plugin.get_returncode() is None:  # noqa: ASYNC110 - nothing else tells of it
                await asyncio.sleep(0.01)
            plugin.close()


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    with _translated():
        async for chunk in response.content.iter_any():
            yield chunk


async def _heard(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Wait until the script speaks. The first byte of a message is its channel: 1 is output, 2 complaints, 3 the verdict."""
    complaints = b""
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.BINARY:
            continue
        channel, data = message.data[:1], message.data[1:]
        if channel == b"\1" and data.startswith(TOLD.encode()):
            return
        if channel in {b"\2", b"\3"}:
            complaints += data
    raise Refused(0, "", complaints.decode(errors="replace") or "the container does not answer")


@contextlib.contextmanager
def _translated() -> Any:  # noqa: ANN401 - a generator, made a context manager
    """Turn the ways in which an API does not answer into LauncherUnavailable."""
    try:
        yield
    except aiohttp.WSServerHandshakeError:
        raise
    except aiohttp.ClientConnectorError as error:
        raise LauncherUnavailable(f"the API cannot be reached: {error}", acted=False) from error
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RuntimeError) as error:
        raise LauncherUnavailable(f"the API did not answer: {str(error) or type(error).__name__}") from error
