"""Why a runner ended, in one closed word each (the list may grow).

A reason says what happened; whether the same launch could succeed if it were asked for again is a property of the reason,
so that a Dispatcher and a person reading the record get the same answer.
"""

from enum import StrEnum
from typing import Self

from typing_extensions import override


class Reason(StrEnum):
    """How a finished runner ended when it did not complete."""

    EXIT_NONZERO = "exit_nonzero"
    SIGNALLED = "signalled"
    OOM_KILLED = "oom_killed"
    CANCELLED = "cancelled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    HEARTBEAT_LOST = "heartbeat_lost"
    LAUNCH_REJECTED = "launch_rejected"
    LAUNCH_TIMEOUT = "launch_timeout"
    QUEUE_TIMEOUT = "queue_timeout"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_PULL_FAILED = "image_pull_failed"
    CONFIG_ERROR = "config_error"
    INIT_FAILED = "init_failed"
    UNSCHEDULABLE = "unschedulable"
    QUOTA_EXCEEDED = "quota_exceeded"
    EVICTED = "evicted"
    PREEMPTED = "preempted"
    NODE_LOST = "node_lost"
    DELETED = "deleted"
    LOST = "lost"

    @classmethod
    @override
    def _missing_(cls, value: object) -> Self | None:
        """Take a word of a newer version, on a record that it has written, for what it is."""
        if not isinstance(value, str):
            return None
        reason = str.__new__(cls, value)
        reason._name_, reason._value_ = value.upper(), value
        return reason

    @property
    def retryable(self) -> bool:
        """Whether the same request may well succeed later: the cause lay outside the task, its pool and its caller."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        Reason.HEARTBEAT_LOST,
        Reason.LAUNCH_TIMEOUT,
        Reason.QUEUE_TIMEOUT,
        Reason.ENGINE_UNAVAILABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.UNSCHEDULABLE,
        Reason.QUOTA_EXCEEDED,
        Reason.EVICTED,
        Reason.PREEMPTED,
        Reason.NODE_LOST,
        Reason.DELETED,
        Reason.LOST,
    }
)
