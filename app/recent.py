"""The runners that changed last, as they now are: those that are asked for most, and need no look into the database.

Held on the event loop, and set there after each commit, in the order of commits, so what is read here is what the database
has. That is so only where nobody else writes to it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from app.events import Change
from app.runner import Runner

MOST = 4096


class Recent:
    """Up to ``most`` runners."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._runners: OrderedDict[str, Runner] = OrderedDict()

    def get(self, runner_id: str) -> Runner | None:
        """Give a runner, if it is here."""
        return self._runners.get(runner_id)

    def changed(self, changes: Sequence[Change]) -> None:
        """Take up what was committed."""
        for change in changes:
            self._runners[change.runner.runner_id] = change.runner
            self._runners.move_to_end(change.runner.runner_id)
        while len(self._runners) > self._most:
            self._runners.popitem(last=False)

    def touch(self, runner_id: str, touched: Callable[[Runner], Runner]) -> None:
        """Take up what was committed of a runner beside its changes."""
        if runner := self._runners.get(runner_id):
            self._runners[runner_id] = touched(runner)

    def drop(self, runner_id: str) -> None:
        """Let go of a runner that is no longer known."""
        self._runners.pop(runner_id, None)
