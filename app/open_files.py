"""How many files this process may have open: it needs one for every live local runner, and for every connection."""

import functools
import resource


@functools.cache
def raise_limit() -> str:
    """Raise it as far as this process may; gives what it was before, in the words of `ulimit`, for those it starts.

    The first call is the one that counts, so it has to come before there are threads.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
