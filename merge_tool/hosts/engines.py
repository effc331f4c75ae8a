"""Engines: any concurrent.futures.Executor makes the pieces; processes of this machine, Ray and Dask by name."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from merge_tool.errors import MergeToolError, OutputError, RecipeError, install, reason, shown
from merge_tool.hosts.receipts import PartsFolder
from merge_tool.hosts.worker import make_parts

_LOOK_SECONDS = 0.5  # how often receipts are counted
PARTS_A_WORKER = 4  # more parts than workers, so that a slow host delays the merge less
_RETRIES = 3  # for a task whose node is lost


def make_on(
    executor: Executor,
    path: Path,
    parts: PartsFolder,
    missing: Sequence[int],
    *,
    memory_bytes: int | None,
    jobs: int | None,
    on_piece: Callable[[int], None],
) -> None:
    """Make the missing pieces of the plan in `path` by tasks of an executor, a task for each part. `on_piece(number)`
    is called for each piece when its receipt is there.

    Raises the first MergeToolError of a task; OutputError if the engine itself fails.
    """
    wanted, left = set(missing), set(missing)
    shares = [[number for number in part if number in wanted] for part in parts.plan.parts]
    futures: set[Future[Any]] = set()
    try:
        for share in shares:
            if share:
                futures.add(executor.submit(make_parts, str(path), share, memory_bytes, jobs))
        while futures:
            done, futures = wait(futures, timeout=_LOOK_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            for number in sorted(left):
                if parts.receipt(number).exists():
                    left.discard(number)
                    on_piece(number)
    except MergeToolError:
        raise
    except Exception as e:
        raise OutputError(
            f"The engine {type(executor).__name__} has failed ({type(e).__name__}: {reason(e)}). Finished parts are "
            "kept: run the same command, it continues."
        ) from e
    finally:
        wait([future for future in futures if not future.cancel()])  # a running task still writes into the work folder


# ------------------------------------------------------------------------------------------- by name


@contextmanager
def engine(text: str, *, memory_bytes: int | None, jobs: int | None) -> Iterator[tuple[Executor, int]]:
    """The executor that `processes:N`, `ray[:ADDRESS]` or `dask:ADDRESS` names, and the number of its workers.

    Raises RecipeError for other names, and for an engine that is not installed or cannot be reached.
    """
    name, _, address = text.partition(":")
    if name not in _ENGINES:
        raise RecipeError(
            f"--executor is '{shown(text)}', expected processes:N (N processes), ray, ray:ADDRESS or dask:ADDRESS."
        )
    with _ENGINES[name](address, memory_bytes, jobs) as pair:
        yield pair


@contextmanager
def _processes(count: str, memory_bytes: int | None, jobs: int | None) -> Iterator[tuple[Executor, int]]:
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise RecipeError(f"--executor is 'processes:{shown(count)}', expected processes:N, as in processes:4.")
    with ProcessPoolExecutor(int(count), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool, int(count)


@contextmanager
def _dask(address: str, memory_bytes: int | None, jobs: int | None) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError as e:
        raise RecipeError(f"Dask is not installed. {install('dask')}") from e
    try:
        client = Client(address or None, timeout="30s")
    except (OSError, TimeoutError, ValueError) as e:
        raise RecipeError(f"The Dask scheduler {shown(address)} cannot be reached ({reason(e)}).") from e
    with client:
        workers = client.scheduler_info()["workers"]
        yield client.get_executor(pure=False, retries=_RETRIES), max(1, len(workers))


@contextmanager
def _ray(address: str, memory_bytes: int | None, jobs: int | None) -> Iterator[tuple[Executor, int]]:
    try:
        import ray
    except ImportError as e:
        raise RecipeError(f"Ray is not installed. {install('ray')}") from e
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(address=address or None, log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as e:
            raise RecipeError(f"The Ray cluster {shown(address)} cannot be reached ({reason(e)}).") from e
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        yield RayExecutor(num_cpus=jobs or 1, memory=memory_bytes), max(1, cores // (jobs or 1))
    finally:
        if is_ours:
            ray.shutdown()


class RayExecutor(Executor):
    """Ray's tasks as futures: each takes `num_cpus` cores and `memory` bytes, and is tried again on another node if
    its own is lost. What a task returns is small; the weights never pass through Ray's object store."""

    def __init__(self, *, num_cpus: float = 1, memory: int | None = None) -> None:
        import ray

        self._remote = partial(ray.remote, num_cpus=num_cpus, memory=memory, max_retries=_RETRIES)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._remote()(fn).remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Does nothing: `_ray` ends Ray if it has started it."""


_ENGINES = {"processes": _processes, "ray": _ray, "dask": _dask}
