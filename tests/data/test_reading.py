import threading

import pytest

from memseg_jax.data.reading import map_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_order_is_kept_and_few_are_ahead(threads):
    started = []
    results = map_ahead(lambda i: (started.append(i), 10 * i)[1], range(50), threads)
    assert next(results) == 0
    assert len(started) <= 2 * max(threads, 1) + 1
    assert list(results) == [10 * i for i in range(1, 50)]


def test_exception_comes_in_its_place():
    def fail_at_two(i):
        if i == 2:
            raise KeyError(i)
        return i

    results = map_ahead(fail_at_two, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)


def test_stopping_early_leaves_no_thread():
    before = threading.active_count()
    results = map_ahead(lambda i: i, range(1000), 4)
    next(results)
    results.close()
    assert threading.active_count() == before
