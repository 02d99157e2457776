"""Celery's client against the module, as its users write it; a Python worker runs what follows.

    celery_client.py REDIS_URL PICTURES_URL GOLDENS PICTURES_DIRECTORY
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
import uuid
from datetime import datetime, timedelta
from pathlib import Path

url, pictures, goldens, directory = sys.argv[1:]
os.environ["CELERY_BROKER_URL"] = url

import celery
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult
from celery_app import app, ask, count, echo, inference_task, labels, note

picture = pictures + "shapes.png"
redis = app.backend.client


def too_late(*_):
    raise SystemExit("not done within five minutes:\n" + "".join(traceback.format_stack()))


# A client that waits for ever is a failure with a place, not a run that hangs.
signal.signal(signal.SIGALRM, too_late)
signal.alarm(300)


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
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


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
    fails(app.send_task("tasks.inference_task"), "TypeError", "2 required positional arguments: 'url' and 'task_prompt'")
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


def signatures():
    """A task of another signature, as `celery-arguments` tells of it."""
    for asked in (ask.delay("<OCR>", picture), ask.delay(image_url=picture, question="<OCR>"),
                  ask.delay("<OCR>", picture, user=7), ask.delay("<OCR>", picture, [7])):
        assert asked.get(timeout=60) == {"<OCR>": ""}
    fails(app.send_task("tasks.ask", ("<OCR>",)), "TypeError", "ask() missing 1 required positional argument: 'image_url'")
    fails(app.send_task("tasks.ask", ("<OCR>", picture, 1, 2)), "TypeError",
          "ask() takes from 2 to 3 positional arguments but 4 were given")


def names_that_are_no_text():
    """Names of files by `os.fsdecode` hold halves of surrogate pairs."""
    with tempfile.TemporaryDirectory() as directory:
        redis.config_set("florence.file-roots", directory)
        path = os.fsencode(directory) + b"/no text \x80\xff \xc3\xa9.png"
        with urllib.request.urlopen(picture) as response:
            Path(os.fsdecode(path)).write_bytes(response.read())
        assert inference_task.delay(os.fsdecode(path), "<OCR>").get(timeout=60) == {"<OCR>": ""}
        assert inference_task.delay("file://" + os.fsdecode(path), "<OCR>").get(timeout=60) == {"<OCR>": ""}
        fails(inference_task.delay(os.fsdecode(path), "<OCR>\udc80"), "ValueError", "task_prompt is no valid text")
        fails(inference_task.delay(picture + "?\udc80", "<OCR>"), "ValueError", "url is no valid text")
        fails(inference_task.delay(directory + "/\ud800.png", "<OCR>"), "ValueError", "url is no valid text")
        redis.config_set("florence.file-roots", "")


def remote_control():
    [name] = eventually("the worker is there", lambda: [
        name for name in app.control.inspect().ping() or {} if name.startswith("florence@")])
    assert told("ping", name) == {"ok": "pong"}
    assert told("registered", name) == ["tasks.ask", "tasks.inference_task"]
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
        odd = [echo.s(float("inf")).set(**there), inference_task.s(picture, "<OCR>"), echo.s("\udc80").set(**there)]
        assert chord(odd)(echo.s().set(**there)).get(timeout=60) == [float("inf"), {"<OCR>": ""}, "\udc80"]
        broken = chord([inference_task.s(picture, "<OCR>"), inference_task.s(picture, "<NOPE>")])(
            count.s().set(**there))
        fails(AsyncResult(broken.id, app=app), "ChordError", "BADPROMPT")
        fails(broken, "ValueError", "BADPROMPT")  # that of the part that failed
        broken = chord([chain(inference_task.s(picture, "<NOPE>"), echo.s().set(**there)), echo.s(1).set(**there)])(
            count.s().set(**there))
        fails(AsyncResult(broken.id, app=app), "ChordError", "BADPROMPT")
        fails(inference_task.apply_async((picture, "<OCR>"), link=group(echo.s(), echo.s())),
              "NotImplementedError", "plain")
        fails(inference_task.starmap([(picture, "<OCR>")]).apply_async(), "NotImplementedError", "send a group")
        assert echo.map([1, 2]).apply_async(**there).get(timeout=60) == [1, 2]


def shape(children):
    """Children as they are stored, without their ids."""
    return [["task" if members is None else shape(members), parent] for (_, parent), members in children]


def children():
    """A result lists what followed its task as that of a Python worker does."""
    there = {"queue": "python"}
    known = lambda result: json.loads(redis.get(f"celery-task-meta-{result.id}"))["children"]
    with worker("python"):
        def sent(head):
            one, two = head(), head()
            one.link(echo.s().set(**there))
            two.link(echo.s().set(**there))
            two.link(echo.si("\udc80").set(**there))
            three = chain(head(), echo.s().set(**there), echo.s().set(**there))
            four = head()
            four.link(echo.s().set(**there))
            four = chain(four, echo.s().set(**there))
            return [one.apply_async(), two.apply_async(), three.apply_async().parent.parent,
                    four.apply_async().parent, head().apply_async()]

        ours = sent(lambda: inference_task.s(picture, "<OCR>"))
        theirs = sent(lambda: echo.s({"<OCR>": ""}).set(**there))
        for result in ours + theirs:
            assert result.get(timeout=60) == {"<OCR>": ""}
        assert [shape(known(result)) for result in ours] == [shape(known(result)) for result in theirs]

        def collected(result):
            """All results of what followed, once they are there."""
            result = AsyncResult(result.id, app=app)
            try:
                # Celery 5.0 can miss a result that is stored while it subscribes, and whoever asks for the same
                # one later waits in vain. So it is asked for those only that are known to be there.
                list(result.iterdeps())
            except celery.exceptions.IncompleteStream:
                return None
            return [value for _, value in result.collect(timeout=60)]

        answer = {"<OCR>": ""}
        expected = [[answer, answer], [answer, [answer, "\udc80"], answer, "\udc80"], [answer] * 3, [answer] * 3, [answer]]
        for results in (ours, theirs):
            assert [eventually("all is there", lambda: collected(result)) for result in results] == expected
            graphs = [AsyncResult(result.id, app=app).graph for result in results]
            assert [len(list(graph)) for graph in graphs] == [2, 4, 3, 3, 1], graphs
        assert ours[0].children[0].parent is None and ours[4].children == []
        failed = inference_task.apply_async((picture, "<NOPE>"), link=echo.s().set(**there))
        fails(failed, "ValueError", "BADPROMPT")
        assert failed.children == []


def times_without_a_zone():
    """They are in UTC, whatever the project's zone is, here as in a worker."""
    there = {"queue": "python"}
    with worker("python"):
        for task, args, options in ((inference_task, (picture, "<OCR>"), {}), (echo, (1,), there)):
            start = datetime.utcnow()
            in_time = task.apply_async(args, eta=start + timedelta(seconds=2), expires=start + timedelta(minutes=30), **options)
            passed = task.apply_async(args, expires=start - timedelta(minutes=30), **options)
            fails(passed, "TaskRevokedError", "expired")
            in_time.get(timeout=60)
            took = in_time.date_done.timestamp() - (start - datetime(1970, 1, 1)).total_seconds()
            assert 1.9 < took < 30, took


def forms():
    """Messages in other forms than clients write them, to the module and to a Python worker."""
    def message(task, args):
        task.apply_async(args, queue="held")
        return json.loads(redis.rpop("held"))

    def header(**fields):
        return lambda message: message["headers"].update(fields)

    def no_embed(message):
        message["body"] = base64.b64encode(json.dumps(
            [*json.loads(base64.b64decode(message["body"]))[:2], None]).encode()).decode()

    changes = {
        "as it is": header(), "retries": header(retries=0.0), "no retries": header(retries=None),
        "limits": header(timelimit=None), "no limits": header(timelimit=[]), "a limit": header(timelimit=[60.5, None]),
        "shadow": header(shadow="\udc80"), "repr": header(argsrepr="('/a\udc80',)"),
        "root": header(root_id=None), "parent": header(parent_id=5), "group": header(group_index=1.0),
        "result": header(ignore_result=0), "more": header(more=float("nan")), "embed": no_embed,
        "priority": lambda message: message["properties"].update(priority=0.0),
    }
    sent = []
    with worker("python"):
        for task, args, queue in ((inference_task, (picture, "<OCR>"), "celery"), (echo, (1,), "python")):
            for name, change in changes.items():
                raw = message(task, args)
                change(raw)
                redis.lpush(queue, json.dumps(raw))
                sent.append((queue, name, raw["headers"]["id"]))
            raw = message(task, args)
            raw["headers"]["id"] = queue[0] * 300
            redis.lpush(queue, json.dumps(raw))
            sent.append((queue, "a long id", raw["headers"]["id"]))
            raw = message(task, args)
            redis.lpush(queue, json.dumps(raw).replace("{", '{"x": "\xff", ', 1).encode("latin-1"))
            sent.append((queue, "no UTF-8", raw["headers"]["id"]))
        for queue, name, id in sent:
            eventually(f"{name} from {queue}", lambda: AsyncResult(id, app=app).state == "SUCCESS")


def ids_of_other_kinds():
    """Current clients take a UUID for an id."""
    if celery.VERSION >= (5, 7):
        result = inference_task.apply_async((picture, "<OCR>"), task_id=uuid.uuid4())
        assert result.get(timeout=60) == {"<OCR>": ""}
        waiting = inference_task.apply_async((picture, "<OCR>"), task_id=uuid.uuid4(), countdown=60)
        eventually("the task is scheduled", lambda: shows("scheduled", str(waiting.id)))
        waiting.revoke()
        fails(waiting, "TaskRevokedError", "revoked")


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
signatures()
names_that_are_no_text()
times_without_a_zone()
forms()
ids_of_other_kinds()
remote_control()
what_follows()
children()
tasks_of_others()
print("all right, celery", celery.__version__)
