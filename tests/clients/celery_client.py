"""Celery's client against the module, as its users write it; a Python worker runs what follows.

    celery_client.py REDIS_URL PICTURES_URL GOLDENS PICTURES_DIRECTORY
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

url, pictures, goldens, directory = sys.argv[1:]
os.environ["CELERY_BROKER_URL"] = url

import celery
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult
from celery_app import app, count, echo, inference_task, labels, note

picture = pictures + "shapes.png"
redis = app.backend.client


def eventually(what, condition):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise SystemExit(f"timed out: {what}")


def told(method, name):
    """What the worker of that name says; a busy one may miss the second that a caller waits."""
    def ask():
        answers = getattr(app.control.inspect(), method)() or {}
        return [answers[name]] if name in answers else None

    return eventually(f"{name} answers {method}", ask)[0]


def shows(method, id):
    """Whether a task is among those that the workers list."""
    listed = (getattr(app.control.inspect(), method)() or {}).values()
    return any(id == task or isinstance(task, dict) and id in (task.get("id"), task.get("request", {}).get("id"))
               for tasks in listed for task in tasks)


def fails(result, kind, text):
    try:
        value = result.get(timeout=60)
    except Exception as error:
        assert type(error).__name__ == kind and text in str(error), (type(error), error)
        assert result.failed() or result.state == "REVOKED", result.state
    else:
        raise SystemExit(f"{kind} was expected, not {value}")


@contextlib.contextmanager
def worker(*queues):
    """A worker of this project, as `--pool=solo` runs it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "--pool=solo", "-Q", ",".join(queues),
         "-n", "python@%h"], cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually("the worker is there", lambda: any(
            name.startswith("python@") for name in app.control.inspect(timeout=1).ping() or {}))
        yield
    finally:
        process.terminate()
        process.wait()


def results():
    result = inference_task.delay(picture, "<CAPTION>")
    assert result.get(timeout=120) == {"<CAPTION>": "a blue circle, a red square and a black triangle"}
    assert (result.state, result.ready(), result.successful()) == ("SUCCESS", True, True)
    assert abs(result.date_done.timestamp() - time.time()) < 60, result.date_done
    assert 86_000 < redis.ttl(f"celery-task-meta-{result.id}") <= 86_400
    assert AsyncResult(result.id, app=app).get(timeout=1) == result.get()

    urgent = inference_task.apply_async(kwargs={"url": picture, "task_prompt": "<OD>"}, priority=6)
    assert urgent.get(timeout=60)["<OD>"]["labels"] == ["circle", "square", "triangle"]
    named = app.send_task("tasks.inference_task", (picture,), {"task_prompt": "<OCR>"})
    assert named.get(timeout=60) == {"<OCR>": ""}

    asked = group(inference_task.s(picture, prompt) for prompt in ("<OD>", "<OCR>", "<CAPTION>")).apply_async()
    assert [list(answer)[0] for answer in asked.get(timeout=60)] == ["<OD>", "<OCR>", "<CAPTION>"]
    assert asked.ready() and asked.successful()

    silent = inference_task.apply_async((picture, "<OCR>"), ignore_result=True)
    later = inference_task.delay(picture, "<OCR>")
    later.get(timeout=60)
    assert redis.get(f"celery-task-meta-{silent.id}") is None or celery.VERSION < (5, 1)


def answers_of_the_reference():
    """Pictures come inside their URLs here; the answers are those of transformers, to the letter."""
    cases = [case for case in json.loads(Path(goldens).read_text())["cases"]
             if case["beams"] == 3 and case["no_repeat_ngram"] is None]
    asked = []
    for case in cases:
        image = base64.b64encode((Path(directory) / case["picture"]).read_bytes()).decode()
        asked.append(inference_task.delay(f"data:image/png;base64,{image}", case["prompt"]))
    assert len(cases) > 20
    for case, result in zip(cases, asked):
        assert json.dumps(result.get(timeout=120)) == json.dumps(case["answer"]), case["picture"]


def errors():
    fails(inference_task.delay(pictures + "status/404", "<OD>"), "ConnectionError", "404")
    fails(inference_task.delay(pictures + "text", "<OD>"), "ValueError", "IMAGE")
    fails(inference_task.delay("/etc/passwd", "<OD>"), "PermissionError", "DENIED")
    fails(inference_task.delay(picture, "<NOPE>"), "ValueError", "BADPROMPT")
    fails(app.send_task("tasks.inference_task", (picture,)), "TypeError", "task_prompt")
    fails(app.send_task("tasks.inference_task", (picture, "<OD>", 3)), "TypeError", "2 positional")
    fails(inference_task.apply_async((picture, "<OD>"), serializer="pickle"), "ContentDisallowed", "python-serialize")
    fails(inference_task.apply_async((pictures + "slow/20000/shapes.png", "<OD>"), time_limit=1, retry=False),
          "TimeLimitExceeded", "TIMEOUT")


def courses():
    """STARTED, RETRY, eta, expiry and revocation."""
    running = inference_task.delay(pictures + "held/running/shapes.png", "<OCR>")
    eventually("the task is started", lambda: running.state == "STARTED")
    assert running.info["hostname"].startswith("florence@"), running.info
    eventually("the task is active", lambda: shows("active", running.id))
    urllib.request.urlopen(pictures + "release/running").close()
    running.get(timeout=60)

    flaky = inference_task.delay(pictures + "status/503", "<OCR>")
    eventually("the task is tried again", lambda: flaky.state == "RETRY")
    assert isinstance(flaky.result, ConnectionError), flaky.result
    app.control.revoke(flaky.id)
    eventually("the task is revoked", lambda: flaky.state == "REVOKED")

    start = time.time()
    later = inference_task.apply_async((picture, "<OCR>"), countdown=2)
    later.get(timeout=60)
    assert 1.9 < later.date_done.timestamp() - start < 10, later.date_done

    late = inference_task.apply_async((picture, "<OCR>"), countdown=30, expires=0.5)
    fails(late, "TaskRevokedError", "expired")
    waiting = inference_task.apply_async((picture, "<OCR>"), countdown=60)
    eventually("the task is scheduled", lambda: shows("scheduled", waiting.id))
    waiting.revoke()
    fails(waiting, "TaskRevokedError", "revoked")
    stuck = inference_task.delay(pictures + "held/stuck/shapes.png", "<OD>")
    eventually("the task is started", lambda: stuck.state == "STARTED")
    stuck.revoke()
    eventually("the revocation is known", lambda: shows("revoked", stuck.id))
    assert stuck.state == "STARTED"
    stuck.revoke(terminate=True)
    fails(stuck, "TaskRevokedError", "revoked")


def remote_control():
    [name] = eventually("the worker is there", lambda: [
        name for name in app.control.inspect().ping() or {} if name.startswith("florence@")])
    assert told("ping", name) == {"ok": "pong"}
    assert told("registered", name) == ["tasks.inference_task"]
    assert told("stats", name)["total"]["tasks.inference_task"] > 30
    assert [queue["name"] for queue in told("active_queues", name)] == ["celery"]
    assert told("reserved", name) == [] and isinstance(told("revoked", name), list)
    # These return with the answer.
    only = app.control.inspect(destination=[name], timeout=60)
    assert list(only.ping()) == [name]
    assert not app.control.inspect(destination=["nobody@nowhere"], timeout=0.5).ping()
    assert "error" in app.control.broadcast("pool_grow", reply=True, destination=[name], timeout=60)[0][name]
    for command in ("ping", "active", "registered", "stats"):
        def shown():
            ran = subprocess.run([sys.executable, "-m", "celery", "-b", url, "inspect", command],
                                 capture_output=True, text=True)
            return ran.returncode == 0 and name in ran.stdout

        eventually(f"celery inspect {command} shows the worker", shown)


def what_follows():
    """Callbacks, chains and chords, whose other tasks a Python worker runs."""
    there = {"queue": "python"}
    with worker("python"):
        found = chain(inference_task.s(picture, "<OD>"), labels.s().set(**there)).apply_async()
        assert found.get(timeout=60) == ["circle", "square", "triangle"]
        assert found.parent.get(timeout=1)["<OD>"]["labels"] == found.get()

        broken = chain(inference_task.s(picture, "<NOPE>"), labels.s().set(**there)).apply_async()
        fails(broken, "ValueError", "BADPROMPT")

        inference_task.apply_async((picture, "<OCR>"), link=note.s("linked").set(**there))
        assert eventually("the callback ran", lambda: redis.get("note-linked")) == b"{'<OCR>': ''}"
        failed = inference_task.apply_async((picture, "<NOPE>"), link_error=note.s("failed").set(**there))
        noted = eventually("the errback ran", lambda: redis.get("note-failed"))
        assert noted == repr(failed.id).encode(), noted

        asked = [inference_task.s(picture, prompt) for prompt in ("<OD>", "<OCR>", "<CAPTION>")]
        assert chord(asked)(count.s().set(**there)).get(timeout=60) == 3
        mixed = [echo.s("first").set(**there), inference_task.s(picture, "<OCR>"), echo.s("last").set(**there)]
        assert chord(mixed)(echo.s().set(**there)).get(timeout=60) == ["first", {"<OCR>": ""}, "last"]
        broken = chord([inference_task.s(picture, "<OCR>"), inference_task.s(picture, "<NOPE>")])(
            count.s().set(**there))
        fails(AsyncResult(broken.id, app=app), "ChordError", "BADPROMPT")
        fails(broken, "ValueError", "BADPROMPT")  # that of the part that failed
        broken = chord([chain(inference_task.s(picture, "<NOPE>"), echo.s().set(**there)), echo.s(1).set(**there)])(
            count.s().set(**there))
        fails(AsyncResult(broken.id, app=app), "ChordError", "BADPROMPT")
        fails(inference_task.apply_async((picture, "<OCR>"), link=group(echo.s(), echo.s())),
              "NotImplementedError", "plain")


def tasks_of_others():
    """They stay in the list that we share with a Python worker."""
    foreign = [echo.delay(i) for i in range(40)]
    inference_task.delay(picture, "<OCR>").get(timeout=60)
    assert redis.llen("celery") == 40
    redis.rpop("celery")
    more = [echo.delay(i) for i in range(40, 50)]
    inference_task.delay(picture, "<OCR>").get(timeout=60)
    assert redis.llen("celery") == 49
    with worker("celery"):
        assert [result.get(timeout=60) for result in foreign[1:] + more] == list(range(1, 50))


results()
answers_of_the_reference()
errors()
courses()
remote_control()
what_follows()
tasks_of_others()
print("all right, celery", celery.__version__)
