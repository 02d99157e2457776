"""Both clients on a cluster of three masters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import SIGN, Blocking, Cluster

import florence_redis as f
from florence_redis import AsyncFlorence, Florence, tasks


@pytest.fixture(params=["blocking", "asyncio"])
def florence(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Any]:
    for node in cluster.nodes:
        node.admin.flushall()
    port = cluster.nodes[0].port
    if request.param == "blocking":
        client = redis.RedisCluster(host="127.0.0.1", port=port)
        yield Florence(client)
        client.close()
        return
    loop = asyncio.new_event_loop()

    async def connect() -> redis.asyncio.RedisCluster:
        return redis.asyncio.RedisCluster(host="127.0.0.1", port=port)

    others = loop.run_until_complete(connect())
    yield Blocking(AsyncFlorence(others), loop)
    loop.run_until_complete(others.aclose())
    loop.close()


def test_jobs_are_spread_over_all_nodes(florence: Any, cluster: Cluster) -> None:
    keys = [florence.submit(SIGN, tasks.ocr) for _ in range(60)]
    assert [job.answer for job in florence.wait_many(keys, timeout=30)] == ["EXIT"] * 60
    shares = [node.admin.dbsize() for node in cluster.nodes]
    assert sum(shares) == 60 and min(shares) >= 6


def test_the_first_to_end_comes_first_on_any_node(florence: Any) -> None:
    # So far apart that a busy machine keeps them in order.
    delays = [3.1, 0.1, 2.1, 1.1]
    keys = [florence.submit(SIGN, tasks.ocr, delay=delay) for delay in delays]
    ended = [job.key for job in florence.as_completed(keys, timeout=30)]
    assert ended == [key for _, key in sorted(zip(delays, keys))]


def test_jobs_of_many_nodes_are_cancelled_and_queued_again(florence: Any) -> None:
    keys = [florence.submit(SIGN, tasks.ocr, delay=60) for _ in range(12)]
    assert {job.key for job in florence.jobs()} == set(keys)
    assert florence.cancel(*keys) == 12
    assert florence.jobs() == []
    ends = [job.finished_at for job in florence.jobs("cancelled")]
    assert len(ends) == 12 and ends == sorted(ends, reverse=True)
    assert florence.retry(*keys) == 12
    assert {job.answer for job in florence.as_completed(keys, timeout=20)} == {"EXIT"}


def test_a_job_goes_to_the_node_of_its_picture(florence: Any, cluster: Cluster) -> None:
    client = redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port)
    for name in ("page", "{scans}:1", "{open"):
        client.set(name, SIGN.read_bytes())
        assert florence.ocr(f.ImageKey(name)) == "EXIT"
    client.close()


def test_errors_come_from_any_node(florence: Any, cluster: Cluster) -> None:
    missing = f.JobKey[str]("missing")
    with pytest.raises(f.NoJobError):
        florence.wait(missing)
    keys = [florence.submit(SIGN, tasks.ocr) for _ in range(6)]
    jobs = florence.as_completed([missing, *keys], timeout=10)
    assert {next(jobs).key for _ in keys} == set(keys)
    with pytest.raises(f.NoJobError, match="missing"):
        next(jobs)


def test_every_node_tells_of_its_model_and_its_counters(florence: Any) -> None:
    assert [model["name"] for model in florence.model()] == ["tiny"] * 3
    assert [stats["panics"] for stats in florence.stats()] == [0] * 3
    assert len(florence.latencies()) == len(florence.ends()) == 3


def test_a_thumbnail_comes_from_the_node_of_its_job(florence: Any) -> None:
    keys = [florence.submit(SIGN, tasks.ocr, thumbnail=64) for _ in range(6)]
    florence.wait_many(keys)
    assert all(florence.thumbnail(key).startswith(b"\xff\xd8\xff") for key in keys)


def test_a_burst_may_be_the_first_that_a_client_sends(cluster: Cluster) -> None:
    async def burst() -> list[Any]:
        client = redis.asyncio.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port)
        async with AsyncFlorence(client) as florence:
            asks = (florence.ocr(SIGN) for _ in range(60))
            answers = await asyncio.gather(*asks, return_exceptions=True)
        await client.aclose()
        return answers

    for _ in range(3):
        assert asyncio.run(burst()) == ["EXIT"] * 60
