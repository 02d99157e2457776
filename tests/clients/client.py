"""redis-py, both protocols, blocking and asyncio."""

import asyncio
import json
import sys

import redis
import redis.asyncio

port, picture = int(sys.argv[1]), open(sys.argv[2], "rb").read()


def as_map(reply):
    """RESP3 gives a map, RESP2 a flat list."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2]))


for protocol in (2, 3):
    client = redis.Redis(port=port, protocol=protocol, decode_responses=True)
    key = client.execute_command("FLORENCE.SUBMIT", "*", "DATA", picture, "<OD>")
    job = as_map(client.execute_command("FLORENCE.WAIT", key, 30))
    assert job["state"] == "done", job
    assert len(json.loads(job["result"])["<OD>"]["labels"]) > 0, job
    try:
        client.execute_command("FLORENCE.SUBMIT", "*", "DATA", picture, "nonsense")
        raise SystemExit("nonsense was accepted")
    except redis.ResponseError as error:
        assert str(error).startswith("BADPROMPT"), error
    assert client.execute_command("FLORENCE.GET", "missing") is None


async def many():
    client = redis.asyncio.Redis(port=port, decode_responses=True)

    async def one(i):
        key = await client.execute_command("FLORENCE.SUBMIT", f"job:{i}", "DATA", picture, "<CAPTION>")
        return as_map(await client.execute_command("FLORENCE.WAIT", key, 60))

    jobs = await asyncio.gather(*(one(i) for i in range(20)))
    assert all(job["state"] == "done" for job in jobs)
    await client.aclose()


asyncio.run(many())
print("all right")
