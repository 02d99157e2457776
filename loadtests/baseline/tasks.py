"""The system that is compared with: Florence-2 in PyTorch behind Celery, as tutorials build it.

    celery -A tasks worker --pool=solo

The model is loaded once a worker, and every task downloads its picture and generates with three
beams in float32. Environment: FLORENCE_CHECKPOINT (a directory), REDIS_URL, and, to compare like
with like, FLORENCE_THREADS, FLORENCE_MAX_TOKENS and FLORENCE_NO_MODEL=1, which leaves download and
inference out and so measures what the system itself takes.
"""

import io
import os
import sys
from pathlib import Path

import requests
from celery import Celery
from celery.signals import worker_init
from PIL import Image

url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
app = Celery("tasks", broker=url, backend=url)
app.conf.update(result_expires=1200, task_track_started=True, broker_connection_retry_on_startup=True)

MAX_TOKENS = int(os.environ.get("FLORENCE_MAX_TOKENS", "1024"))
NO_MODEL = os.environ.get("FLORENCE_NO_MODEL") == "1"
model = None


@worker_init.connect
def load(**_):
    global model
    if NO_MODEL:
        return
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
    from reference import Reference

    torch.set_num_threads(int(os.environ.get("FLORENCE_THREADS", str(os.cpu_count()))))
    model = Reference(os.environ["FLORENCE_CHECKPOINT"], attention="sdpa")


def picture(place):
    if place.startswith(("http://", "https://")):
        answer = requests.get(place, timeout=30)
        answer.raise_for_status()
        place = io.BytesIO(answer.content)
    try:
        return Image.open(place).convert("RGB")
    except OSError as error:
        raise ValueError("not a picture") from error


@app.task(bind=True, max_retries=3, default_retry_delay=1)
def inference_task(self, url, task_prompt):
    """The parsed answer of a picture and a prompt."""
    if NO_MODEL and url != "/":
        return {task_prompt: ""}
    try:
        image = picture(url)
    except requests.ConnectionError as error:
        raise self.retry(exc=error)
    _ids, _text, answer = model.answer(image, task_prompt, beams=3, max_new_tokens=MAX_TOKENS)
    return answer
