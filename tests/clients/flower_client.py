"""Flower beside the module: the worker is online, its tasks and their states are shown.

    flower_client.py REDIS_URL PICTURES_URL
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

url, pictures = sys.argv[1:]
os.environ["CELERY_BROKER_URL"] = url

from celery_app import inference_task

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]


def ask(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.read().decode()


def eventually(what, condition):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            value = condition()
        except (OSError, KeyError):
            value = None
        if value:
            return value
        time.sleep(0.2)
    raise SystemExit(f"timed out: {what}")


flower = subprocess.Popen(
    [sys.executable, "-m", "celery", "-b", url, "flower", "--address=127.0.0.1", f"--port={port}"],
    env=os.environ | {"FLOWER_UNAUTHENTICATED_API": "true"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    def online():
        states = json.loads(ask("/api/workers?status=true"))
        return [name for name, is_online in states.items() if is_online and name.startswith("florence@")]

    [worker] = eventually("the worker is online", online)
    good = inference_task.delay(pictures + "shapes.png", "<CAPTION>")
    bad = inference_task.delay(pictures + "status/404", "<OD>")
    late = inference_task.apply_async((pictures + "shapes.png", "<OD>"), countdown=60)
    answer = good.get(timeout=60)
    late.revoke()

    def states():
        tasks = json.loads(ask("/api/tasks"))
        found = {name: tasks[task.id]["state"] for name, task in (("good", good), ("bad", bad), ("late", late))}
        return tasks if found == {"good": "SUCCESS", "bad": "FAILURE", "late": "REVOKED"} else None

    tasks = eventually("the tasks have ended", states)
    assert tasks[good.id]["name"] == "tasks.inference_task" and tasks[good.id]["worker"] == worker, tasks
    assert json.loads(tasks[good.id]["result"]) == answer and tasks[good.id]["runtime"] >= 0, tasks
    assert "404" in tasks[bad.id]["exception"], tasks

    def refreshed():
        # Flower asks for each part on its own, and shows what came within a second.
        seen = json.loads(ask("/api/workers?refresh=true"))[worker]
        is_whole = seen["registered"] and seen["active_queues"]
        return seen if is_whole and seen["stats"]["total"]["tasks.inference_task"] >= 3 else None

    seen = eventually("the worker has told of itself", refreshed)
    assert seen["registered"] == ["tasks.inference_task"] and seen["active_queues"][0]["name"] == "celery", seen
    assert seen["stats"]["total"] == {"tasks.inference_task": 3}, seen
    eventually("the worker has a page", lambda: worker in ask(f"/worker/{worker}"))
    eventually("the worker is in the metrics",
               lambda: f'flower_worker_online{{worker="{worker}"}} 1.0' in ask("/metrics"))
finally:
    # It has been seen to live on after SIGTERM.
    flower.kill()
    flower.wait()
print("all right")
