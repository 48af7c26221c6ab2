"""Reading ahead with threads."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def map_ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """Yields `function(item)` in order while threads work on the next few.

    Args:
        function: what to do; an exception is raised where its result would be yielded.
        items: any number; few results are held at a time.
        threads: at least one is used.
    """
    threads = max(threads, 1)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        items = iter(items)
        waiting = collections.deque(
            pool.submit(function, item) for item in itertools.islice(items, 2 * threads)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)
