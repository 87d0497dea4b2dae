"""Two runs in lockstep: one of them waits, in a thread of its own, wherever it hands something over."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a run whose items are no longer wanted."""


def handed_over(run: Callable[[Callable[[T], None]], object]) -> Generator[T]:
    """Yield what a function hands to its callback, each item when the function has got there.

    The function runs in a thread of its own and waits in its callback until the next item is asked for, so that it and the
    caller never run at the same time. What it raises is raised here.
    """
    items: queue.SimpleQueue[list[T] | BaseException | None] = queue.SimpleQueue()  # [an item], an error, or the end
    wanted, stopped = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        wanted.acquire()
        if stopped.is_set():
            raise _Stopped

    def hand_over(item: T) -> None:
        items.put([item])
        wait()

    def work() -> None:
        try:
            wait()
            run(hand_over)
            items.put(None)
        except BaseException as error:
            items.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        wanted.release()
        while (found := items.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found.pop()
            wanted.release()
    finally:
        stopped.set()
        wanted.release()
        thread.join()
