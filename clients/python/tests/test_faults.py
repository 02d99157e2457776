"""Connections that break, servers that stand still or start again, and who leaves early."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import SIGN, Connect, Server, eventually

import florence_redis as f
from florence_redis import AsyncFlorence, Florence, tasks


@pytest.mark.parametrize("socket_timeout", [0.4, None])
def test_wait_may_take_longer_than_the_sockets_time_out(
    connect: Connect, server: Server, socket_timeout: float | None
) -> None:
    # Without retries a single reply that is late would be an exception.
    florence = connect(server.url, socket_timeout=socket_timeout, retry=None)
    assert florence.ocr(SIGN, delay=2.2) == "EXIT"


def test_a_server_that_stands_still_during_a_submission_makes_one_job(own_server: Server) -> None:
    """With redis-py's own settings, a time-out of 5 s and retries.

    A key that the server is asked for is what this client avoids: the same way it makes two jobs.
    """
    plain = redis.Redis(port=own_server.port, protocol=3, socket_timeout=5)
    blocking = Florence.from_url(own_server.url, prefix="blocking:", socket_timeout=5)

    async def awaits() -> str:
        url = own_server.url
        async with AsyncFlorence.from_url(url, prefix="asyncio:", socket_timeout=5) as florence:
            await florence.model()
            has_connected.set()
            await asyncio.to_thread(stands_still.wait)
            return await florence.ask(SIGN, tasks.ocr)

    def blocks() -> str:
        stands_still.wait()
        return blocking.ocr(SIGN)

    def lets_the_server_choose() -> Any:
        stands_still.wait()
        return plain.execute_command("FLORENCE.SUBMIT", "*", "DATA", SIGN.read_bytes(), "<OCR>")

    has_connected, stands_still = threading.Event(), threading.Event()
    plain.ping()
    blocking.model()
    with ThreadPoolExecutor() as threads, blocking:
        calls = [threads.submit(asyncio.run, awaits()), threads.submit(blocks)]
        threads.submit(lets_the_server_choose)
        has_connected.wait()
        threading.Timer(0.2, stands_still.set).start()
        own_server.stop_for(6)
        assert [call.result() for call in calls] == ["EXIT", "EXIT"]
    names = sorted(key.partition(":")[0] for key in own_server.admin.scan_iter("*"))
    assert names == ["asyncio", "blocking", "florence", "florence"]
    plain.close()


def test_waiting_goes_on_when_the_server_starts_again(connect: Connect, own_server: Server) -> None:
    florence = connect(own_server.url)
    key = florence.submit(SIGN, tasks.ocr, delay=1.5)

    def restart() -> None:
        own_server.kill()
        own_server.start()

    timer = threading.Timer(0.5, restart)
    timer.start()
    assert florence.wait(key, timeout=30).answer == "EXIT"
    timer.join()
    assert florence.ocr(SIGN) == "EXIT"


def test_a_server_that_is_gone_is_an_error_of_redis_py(
    connect: Connect, own_server: Server
) -> None:
    florence = connect(own_server.url, retry=None)
    key = florence.submit(SIGN, tasks.ocr, delay=60)
    threading.Timer(0.3, own_server.kill).start()
    with pytest.raises(redis.ConnectionError):
        florence.wait(key)


def test_one_connection_that_is_shared_is_not_held_by_wait(server: Server) -> None:
    client = redis.Redis(port=server.port, single_connection_client=True)
    florence = Florence(client)
    key = florence.submit(SIGN, tasks.ocr, delay=1.5)
    waiting = threading.Thread(target=florence.wait, args=[key])
    waiting.start()
    eventually("it waits", lambda: any(c["cmd"] == "florence.wait" for c in server.clients()))
    start = time.monotonic()
    client.ping()
    assert time.monotonic() - start < 0.4
    waiting.join()
    client.close()


def test_connections_are_given_back_and_closed(connect: Connect, server: Server) -> None:
    before = len(server.clients())
    florence = connect(server.url)
    for _ in range(5):
        florence.ocr(SIGN)
        florence.wait_many([florence.submit(SIGN, tasks.ocr) for _ in range(20)])
        with pytest.raises(f.WaitTimeoutError):
            florence.ocr(SIGN, delay=60, timeout=0.05)
        next(florence.as_completed([florence.submit(SIGN, tasks.ocr) for _ in range(5)]))
    assert len(server.clients()) <= before + 12
    florence.close()
    eventually("all are closed", lambda: len(server.clients()) <= before)


def test_a_client_that_is_given_stays_open(server: Server) -> None:
    client = redis.Redis(port=server.port)
    with Florence(client) as florence:
        florence.ocr(SIGN)
    assert client.ping()
    client.close()


def test_threads_share_a_client(server: Server) -> None:
    with Florence.from_url(server.url) as florence, ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: florence.ocr(SIGN), range(100)))
    assert answers == ["EXIT"] * 100


def run(server: Server, body: Any, **settings: Any) -> None:
    async def main() -> None:
        async with AsyncFlorence.from_url(server.url, **settings) as florence:
            await asyncio.wait_for(body(florence), 60)

    asyncio.run(main())


def test_a_hundred_tasks_at_once_take_few_connections(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        most, done = 0, asyncio.Event()

        async def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, len(await asyncio.to_thread(server.clients)))
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch())
        delays = [0.05 * (i % 10) for i in range(100)]
        asks = (florence.ocr(SIGN, delay=delay) for delay in delays)
        assert await asyncio.gather(*asks) == ["EXIT"] * 100
        done.set()
        await watching
        assert 1 < most <= 8 + 32 + 1

    # As many as redis-py gives by default are not needed.
    run(server, body, max_connections=40)
    eventually("all are closed", lambda: not server.clients())


def test_a_quick_job_does_not_wait_for_slow_ones(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        slow = [asyncio.create_task(florence.ocr(SIGN, delay=60)) for _ in range(100)]
        await asyncio.sleep(1.5)
        start = time.monotonic()
        for _ in range(5):
            assert await florence.ocr(SIGN) == "EXIT"
        assert (time.monotonic() - start) / 5 < 0.4
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)

    run(server, body)


def test_a_task_that_is_cancelled_leaves_nothing_behind(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        for i in range(60):
            asking = asyncio.create_task(florence.ocr(SIGN, delay=60))
            await asyncio.sleep(0.0003 * i)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        # Nobody gets another's reply.
        answers = await asyncio.gather(*(florence.ocr(SIGN) for _ in range(20)))
        assert answers == ["EXIT"] * 20
        assert (await florence.model())[0]["name"] == "tiny"

    run(server, body)
    eventually("all are closed", lambda: not server.clients())


def test_two_tasks_wait_for_one_job(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        key = await florence.submit(SIGN, tasks.ocr, delay=0.5)
        first, second = await asyncio.gather(florence.wait(key), florence.wait(key))
        assert first == second and first.answer == "EXIT"

    run(server, body)


def test_who_waits_is_told_that_the_client_was_closed(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        waiting = asyncio.create_task(florence.ocr(SIGN, delay=60))
        await asyncio.sleep(0.3)
        await florence.aclose()
        with pytest.raises(redis.ConnectionError, match="closed"):
            await waiting
        with pytest.raises(redis.ConnectionError, match="closed"):
            await florence.wait(f.JobKey("job"))

    run(server, body)


def test_closing_does_not_wait_for_a_server_that_is_away(own_server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        key = await florence.submit(SIGN, tasks.ocr, delay=60)
        own_server.kill()
        waiting = asyncio.create_task(florence.wait(key))
        await asyncio.sleep(0.2)
        start = time.monotonic()
        await florence.aclose()
        with pytest.raises(redis.ConnectionError, match="closed"):
            await waiting
        assert time.monotonic() - start < 1

    run(own_server, body)


def test_one_job_that_cannot_be_told_of_does_not_disturb_others(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        server.admin.hset("hash", "x", "y")
        keys = [f.JobKey[str]("hash"), f.JobKey[str]("missing")]
        keys += [await florence.submit(SIGN, tasks.ocr, delay=0.4) for _ in range(3)]
        ends = await asyncio.gather(*map(florence.wait, keys), return_exceptions=True)
        assert [type(end) for end in ends[:2]] == [f.NotAJobError, f.NoJobError]
        assert [end.answer for end in ends[2:] if isinstance(end, f.Job)] == ["EXIT"] * 3

    run(server, body)


def test_a_task_that_waits_with_one_for_a_broken_job_is_told_of_its_own(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        broken = await florence.submit(SIGN, tasks.ocr)
        await florence.wait(broken)
        server.admin.hset(broken, "result", "{")
        late = await florence.submit(SIGN, tasks.ocr, delay=0.4)
        ends = await asyncio.gather(
            florence.wait(late), florence.wait(broken), return_exceptions=True
        )
        assert isinstance(ends[0], f.Job) and ends[0].answer == "EXIT"
        assert isinstance(ends[1], f.InvalidJobError)

    run(server, body)


def test_a_wait_that_is_over_leaves_no_timer_behind(server: Server) -> None:
    async def body(florence: AsyncFlorence) -> None:
        key = await florence.submit(SIGN, tasks.ocr)
        for _ in range(5):
            assert len(await florence.wait_many([key], timeout=3600)) == 1
        loop: Any = asyncio.get_running_loop()
        late = loop.time() + 600
        timers = [timer for timer in loop._scheduled if timer.when() > late]
        assert all(timer.cancelled() for timer in timers)

    run(server, body)


@pytest.mark.parametrize("socket_timeout", [0.0009, 0.4])
def test_a_wait_of_a_slice_is_never_one_for_ever(socket_timeout: float) -> None:
    seconds = f.jobs.slice_below(socket_timeout) * 0.3
    commands = next(f.jobs.look(["job"], False, seconds))
    assert float(commands.all[0][-1]) > 0
