"""Asks the workers of tasks.py about a picture, as a web page would: `client.py URL PROMPT`."""

import sys

from tasks import inference_task

print(inference_task.delay(*sys.argv[1:]).get(timeout=120))
