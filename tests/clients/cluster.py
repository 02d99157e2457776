"""A cluster client (of redis-py or valkey-py), which must find each job's node by itself."""

import importlib
import json
import sys

library, port, picture = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "rb").read()
cluster = importlib.import_module(f"{library}.cluster")
client = getattr(cluster, f"{library.capitalize()}Cluster")(
    host="127.0.0.1", port=port, decode_responses=True
)


def as_map(reply):
    """RESP3 gives a map, RESP2 a flat list."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2]))


keys = [f"{library}:{i}" for i in range(12)]
for key in [*keys, "*"]:
    name = client.execute_command("FLORENCE.SUBMIT", key, "DATA", picture, "<OD>")
    job = as_map(client.execute_command("FLORENCE.WAIT", name, 30))
    assert job["state"] == "done", job
    assert json.loads(client.execute_command("FLORENCE.GET", name, "RESULT"))["<OD>"]["labels"]
assert client.execute_command("FLORENCE.CANCEL", keys[0]) == 0
assert client.execute_command("FLORENCE.GET", "missing") is None
print("all right")
