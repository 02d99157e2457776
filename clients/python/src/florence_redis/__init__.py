"""Typed clients of Florence for Redis over redis-py: `Florence` blocks, `AsyncFlorence` awaits.

Both take a redis-py client, also a cluster's, and have the same calls. Every job is given its key
here, so that a command whose reply was lost can be sent again, as redis-py does by default, and
makes no second job. WAIT is sent for a second at a time, or for half of a shorter socket time-out.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import redis
import redis.asyncio
from redis.client import NEVER_DECODE
from redis.exceptions import ResponseError

from . import jobs, questions
from .jobs import *
from .jobs import Call, Commands, End
from .questions import *
from .questions import T, Tasks

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["AsyncFlorence", "Florence", *jobs.__all__, *questions.__all__]

#: Jobs that tasks wait for, and how the tasks are told.
Wanted = dict[str, list["asyncio.Future[Job[Any]]"]]

#: What makes the keys of jobs that are given none.
PREFIX = "florence:"


def _tell(waiting: Iterable[asyncio.Future[Job[Any]]], end: End) -> None:
    for future in waiting:
        if future.done():
            continue
        if isinstance(end, Job):
            future.set_result(end)
        else:
            future.set_exception(end)


def _options(commands: Commands) -> dict[str, Any]:
    """What redis-py is told with a command."""
    return {NEVER_DECODE: True} if commands.binary else {}


class _Client(Tasks):
    """What both know of their redis-py client."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._prefix = prefix
        self._owns = False
        self._is_cluster = not hasattr(client, "connection_pool")
        if self._is_cluster:
            settings = client.get_connection_kwargs()
        else:
            settings = client.connection_pool.connection_kwargs
            if client.connection:
                # It has one connection, on which everybody would wait for each WAIT.
                client = type(client)(connection_pool=client.connection_pool)
        self._client = client
        self._slice = jobs.slice_below(settings.get("socket_timeout", 5))

    def _key(self, image: Image, key: str | None) -> str:
        return jobs.new_key(self._prefix, image) if key is None else key


class Florence(_Client):
    """The blocking client. Threads may share it, as they may share redis-py's."""

    def __init__(self, client: redis.Redis | redis.RedisCluster, *, prefix: str = PREFIX) -> None:
        super().__init__(client, prefix)

    @classmethod
    def from_url(cls, url: str, *, prefix: str = PREFIX, **settings: Any) -> Self:
        """Connects by itself, with the settings of `redis.Redis.from_url`.

        It sends again what got no reply, as `redis.Redis` does but its `from_url` does not.
        """
        settings.setdefault("retry", redis.Redis().get_retry())
        florence = cls(redis.Redis.from_url(url, **settings), prefix=prefix)
        florence._owns = True
        return florence

    def close(self) -> None:
        """Closes the connections, if they are its own."""
        if self._owns:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self,
        image: Image,
        question: Question[T],
        *,
        key: str | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> T:
        """Submits and waits: the answer, or an exception that says why there is none."""
        return self.wait(self.submit(image, question, key=key, **options), timeout).answer

    def submit(
        self,
        image: Image,
        question: Question[T],
        *,
        key: str | None = None,
        **options: Unpack[Options],
    ) -> JobKey[T]:
        """Creates a job: its key. The same request again under the same key changes nothing."""
        return self._run(jobs.submit(self._key(image, key), image, question, options))

    def get(self, key: JobKey[T]) -> Job[T] | None:
        """The job as it is now; None if there is no such key."""
        return self._run(jobs.get(key))

    def wait(self, key: JobKey[T], timeout: float | None = None) -> Job[T]:
        """The job when it has ended, in whatever way."""
        return next(self.as_completed([key], timeout))

    def wait_many(self, keys: Iterable[JobKey[T]], timeout: float | None = None) -> list[Job[T]]:
        """The jobs when all have ended, in the order of the keys."""
        keys = list(keys)
        ended: dict[str, Job[T]] = {job.key: job for job in self.as_completed(keys, timeout)}
        return [ended[key] for key in keys]

    def as_completed(
        self, keys: Iterable[JobKey[T]], timeout: float | None = None
    ) -> Iterator[Job[T]]:
        """Each job when it ends; at last, as an exception, what is no job."""
        until = None if timeout is None else time.monotonic() + timeout
        pending, problem = dict.fromkeys(keys), None
        while pending:
            left = self._slice if until is None else min(self._slice, until - time.monotonic())
            # When the time is over, what has ended until then is told.
            ends = self._run(jobs.look(list(pending), self._is_cluster, left))
            for key, end in ends.items():
                del pending[JobKey[T](key)]
                if isinstance(end, Job):
                    yield end
                else:
                    problem = problem or end
            if left <= 0 and pending:
                raise jobs.waited_too_long(list(pending))
        if problem:
            raise problem

    def pieces(self, key: JobKey[Any], timeout: float | None = None) -> Iterator[Piece]:
        """The text of a job that was submitted with ``tokens=``, as it grows, until the job ends.

        It looks twenty times a second. What was told before is told first.
        """
        until = None if timeout is None else time.monotonic() + timeout
        told = jobs.Told(key)
        while True:
            pieces = self._run(told.look())
            yield from pieces
            if told.has_ended:
                return
            if until is not None and time.monotonic() >= until:
                raise jobs.waited_too_long([key])
            if not pieces:
                time.sleep(told.PAUSE)

    def cancel(self, *keys: str) -> int:
        """Ends jobs that have not ended: how many."""
        return self._run(jobs.change("FLORENCE.CANCEL", keys, self._is_cluster))

    def retry(self, *keys: str) -> int:
        """Queues jobs again that failed, expired or were cancelled: how many."""
        return self._run(jobs.change("FLORENCE.RETRY", keys, self._is_cluster))

    def thumbnail(self, key: str) -> bytes | None:
        """The small copy of a job's picture, a JPEG file, if it has one: see ``thumbnail=``."""
        return self._run(jobs.thumbnail(key))

    def jobs(
        self, state: JobState | Literal["ended"] | None = None, count: int | None = None
    ) -> list[Listed]:
        """Unfinished jobs, those in a state, or those that have ended, the newest end first.

        In a cluster those of all masters, at most ``count`` of each.
        """
        return self._run(jobs.listed(state, count))

    def stats(self) -> list[dict[str, Any]]:
        """The counters of every master."""
        return self._run(jobs.stats())

    def latencies(self) -> list[list[dict[str, Any]]]:
        """Histograms of the phases of jobs by task, of every master."""
        return self._run(jobs.tables("LATENCY"))

    def ends(self) -> list[list[dict[str, Any]]]:
        """How many jobs ended in which way, by task and code, on every master."""
        return self._run(jobs.tables("JOBS"))

    def model(self) -> list[dict[str, Any]]:
        """The model of every master."""
        return self._run(jobs.model())

    def _run(self, call: Call[T]) -> T:
        replies: Any = None
        while True:
            try:
                commands = call.send(replies)
            except StopIteration as end:
                return cast(T, end.value)
            replies = self._send(commands)

    def _send(self, commands: Commands) -> list[Any]:
        client = self._client
        if commands.everywhere and self._is_cluster:
            (command,), nodes = commands.all, client.get_primaries()
            return [[client.execute_command(*command, target_nodes=node) for node in nodes]]
        if len(commands.all) > 1:
            pipeline = client.pipeline() if self._is_cluster else client.pipeline(False)
            with pipeline:
                for command in commands.all:
                    pipeline.execute_command(*command)
                return cast("list[Any]", pipeline.execute(raise_on_error=False))
        try:
            reply = client.execute_command(*commands.all[0], **_options(commands))
        except ResponseError as error:
            reply = error
        return [[reply] if commands.everywhere else reply]


class AsyncFlorence(_Client):
    """The same calls for asyncio. Any number of tasks may share it: it takes few connections."""

    #: Connections that wait for jobs, and those that other commands take, at most.
    _WAITING = 8
    _OTHERS = 32
    #: Below so many seconds to wait, jobs are looked at once before.
    _SHORT = 0.1

    def __init__(
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster,
        *,
        prefix: str = PREFIX,
    ) -> None:
        super().__init__(client, prefix)
        #: What tasks wait for that no connection waits for yet.
        self._wanted: Wanted = {}
        self._waiters: set[asyncio.Task[None]] = set()
        self._exchanges: set[asyncio.Task[list[Any]]] = set()
        self._others: asyncio.Semaphore | None = None
        self._is_closed = False

    @classmethod
    def from_url(cls, url: str, *, prefix: str = PREFIX, **settings: Any) -> Self:
        """As `Florence.from_url`, with the settings of `redis.asyncio.Redis.from_url`."""
        settings.setdefault("retry", redis.asyncio.Redis().get_retry())
        florence = cls(redis.asyncio.Redis.from_url(url, **settings), prefix=prefix)
        florence._owns = True
        return florence

    async def aclose(self) -> None:
        """Ends what it does, and closes the connections, if they are its own."""
        self._is_closed = True
        for task in (*self._waiters, *self._exchanges):
            task.cancel()
        await asyncio.gather(*self._waiters, *self._exchanges, return_exceptions=True)
        self._tell_closed()
        if self._owns:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def ask(
        self,
        image: Image,
        question: Question[T],
        *,
        key: str | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> T:
        job = await self.wait(await self.submit(image, question, key=key, **options), timeout)
        return job.answer

    async def submit(
        self,
        image: Image,
        question: Question[T],
        *,
        key: str | None = None,
        **options: Unpack[Options],
    ) -> JobKey[T]:
        return await self._do(jobs.submit(self._key(image, key), image, question, options))

    async def get(self, key: JobKey[T]) -> Job[T] | None:
        return await self._do(jobs.get(key))

    async def wait(self, key: JobKey[T], timeout: float | None = None) -> Job[T]:
        told = await self._told_at_once([key], timeout)
        ended = self._ended(key, told)
        try:
            # Not wait_for, which before Python 3.12 may lose a cancellation.
            await asyncio.wait([ended], timeout=timeout)
            if ended.done():
                return ended.result()
        finally:
            ended.cancel()
        raise jobs.waited_too_long([key])

    async def wait_many(
        self, keys: Iterable[JobKey[T]], timeout: float | None = None
    ) -> list[Job[T]]:
        keys = list(keys)
        ended: dict[str, Job[T]] = {job.key: job async for job in self.as_completed(keys, timeout)}
        return [ended[key] for key in keys]

    async def as_completed(
        self, keys: Iterable[JobKey[T]], timeout: float | None = None
    ) -> AsyncIterator[Job[T]]:
        keys = list(dict.fromkeys(keys))
        told_at_once = await self._told_at_once(keys, timeout)
        # None says that the time is over.
        ended: asyncio.Queue[asyncio.Future[Job[T]] | None] = asyncio.Queue()
        pending, problem = {self._ended(key, told_at_once): key for key in keys}, None
        for future in pending:
            if future.done():
                ended.put_nowait(future)
            else:
                future.add_done_callback(ended.put_nowait)
        timer = timeout is not None and asyncio.get_running_loop().call_later(
            timeout, ended.put_nowait, None
        )
        try:
            while pending:
                told = await ended.get()
                if told is None:
                    raise jobs.waited_too_long(list(pending.values()))
                del pending[told]
                if told.exception() is None:
                    yield told.result()
                else:
                    problem = problem or told.exception()
        finally:
            if timer:
                timer.cancel()
            for future in pending:
                future.cancel()
        if problem:
            raise problem

    async def pieces(self, key: JobKey[Any], timeout: float | None = None) -> AsyncIterator[Piece]:
        until = None if timeout is None else time.monotonic() + timeout
        told = jobs.Told(key)
        while True:
            pieces = await self._do(told.look())
            for piece in pieces:
                yield piece
            if told.has_ended:
                return
            if until is not None and time.monotonic() >= until:
                raise jobs.waited_too_long([key])
            if not pieces:
                await asyncio.sleep(told.PAUSE)

    async def cancel(self, *keys: str) -> int:
        return await self._do(jobs.change("FLORENCE.CANCEL", keys, self._is_cluster))

    async def retry(self, *keys: str) -> int:
        return await self._do(jobs.change("FLORENCE.RETRY", keys, self._is_cluster))

    async def thumbnail(self, key: str) -> bytes | None:
        return await self._do(jobs.thumbnail(key))

    async def jobs(
        self, state: JobState | Literal["ended"] | None = None, count: int | None = None
    ) -> list[Listed]:
        return await self._do(jobs.listed(state, count))

    async def stats(self) -> list[dict[str, Any]]:
        return await self._do(jobs.stats())

    async def latencies(self) -> list[list[dict[str, Any]]]:
        return await self._do(jobs.tables("LATENCY"))

    async def ends(self) -> list[list[dict[str, Any]]]:
        return await self._do(jobs.tables("JOBS"))

    async def model(self) -> list[dict[str, Any]]:
        return await self._do(jobs.model())

    async def _told_at_once(
        self, keys: Sequence[JobKey[T]], timeout: float | None
    ) -> Mapping[str, End]:
        """Ends that are known before the wait, where that may be too short for a reply."""
        if timeout is None or timeout >= self._SHORT or not keys or self._is_closed:
            return {}
        return await self._do(jobs.look(keys, self._is_cluster, 0))

    def _ended(self, key: JobKey[T], told: Mapping[str, End]) -> asyncio.Future[Job[T]]:
        """The job's end. Whoever gets a connection waits for all jobs that have none."""
        future: asyncio.Future[Job[T]] = asyncio.get_running_loop().create_future()
        if key in told:
            _tell([future], told[key])
            return future
        self._wanted.setdefault(key, []).append(future)
        if self._is_closed:
            self._tell_closed()
        elif len(self._waiters) < self._WAITING:
            self._waiters.add(asyncio.create_task(self._wait()))
        return future

    async def _wait(self) -> None:
        waited: Wanted = {}
        try:
            while self._wanted and not self._is_closed:
                waited, self._wanted = self._wanted, {}
                keys = [
                    key for key, futures in waited.items() if not all(f.done() for f in futures)
                ]
                ends = await self._look(keys) if keys else {}
                for key, end in ends.items():
                    _tell(waited[key], end)
                self._want(waited)
                waited = {}
        finally:
            self._want(waited)
            self._waiters.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _want(self, waited: Wanted) -> None:
        """Leaves to whoever is next the tasks that were not told."""
        for key, futures in waited.items():
            if left := [future for future in futures if not future.done()]:
                self._wanted.setdefault(key, []).extend(left)

    async def _look(self, keys: list[str]) -> Mapping[str, End]:
        # Of different length, lest all are begun together and none ends soon for who comes then.
        seconds = self._slice * random.uniform(0.3, 1)
        try:
            return await self._run(jobs.look(keys, self._is_cluster, seconds))
        except Exception as error:
            return dict.fromkeys(keys, error)

    def _tell_closed(self) -> None:
        for waiting in self._wanted.values():
            _tell(waiting, redis.ConnectionError("the client was closed"))
        self._wanted = {}

    async def _do(self, call: Call[T]) -> T:
        if self._others is None:
            # Not before: it belongs to the loop that runs when it is made.
            self._others = asyncio.Semaphore(self._OTHERS)
        async with self._others:
            return await self._run(call)

    async def _run(self, call: Call[T]) -> T:
        replies: Any = None
        while True:
            try:
                commands = call.send(replies)
            except StopIteration as end:
                return cast(T, end.value)
            replies = await self._send(commands)

    async def _send(self, commands: Commands) -> list[Any]:
        # In a task of its own, which is not cancelled with the caller's: redis-py would give the
        # connection up, and before Python 3.12 may not even hear of it.
        exchange = asyncio.create_task(self._exchange(commands))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._forget)
        return await asyncio.shield(exchange)

    def _forget(self, exchange: asyncio.Task[list[Any]]) -> None:
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            # Looked at, lest it is reported as missed by a caller who has left.
            exchange.exception()

    async def _exchange(self, commands: Commands) -> list[Any]:
        client = self._client
        if self._is_cluster:
            # redis-py's own first commands would not know of the slots yet: each may go to a wrong
            # node, and the redirection closes the connections of all the others.
            await client.initialize()
        if commands.everywhere and self._is_cluster:
            (command,), nodes = commands.all, client.get_primaries()
            return [[await client.execute_command(*command, target_nodes=node) for node in nodes]]
        if len(commands.all) > 1:
            pipeline = client.pipeline() if self._is_cluster else client.pipeline(False)
            async with pipeline:
                for command in commands.all:
                    pipeline.execute_command(*command)
                return cast("list[Any]", await pipeline.execute(raise_on_error=False))
        try:
            reply = await client.execute_command(*commands.all[0], **_options(commands))
        except ResponseError as error:
            reply = error
        return [[reply] if commands.everywhere else reply]
