"""A project that uses Celery: its inference task runs in Redis, the others in Python workers."""

import os

from celery import Celery

broker = os.environ["CELERY_BROKER_URL"]
app = Celery("project", broker=broker, backend=broker)
app.conf.broker_connection_retry_on_startup = True
# Far enough from UTC to be noticed where a time names no zone.
app.conf.timezone = "Europe/Berlin"


@app.task(name="tasks.inference_task")
def inference_task(url, task_prompt):
    raise RuntimeError("this task is not meant to run in Python")


@app.task(name="tasks.ask")
def ask(question, image_url, user=None):
    raise RuntimeError("this task is not meant to run in Python")


@app.task
def labels(answer):
    return answer["<OD>"]["labels"]


@app.task
def count(answers):
    return len(answers)


@app.task
def note(value, name):
    app.backend.set(f"note-{name}", repr(value))


@app.task
def echo(value):
    return value
