"""How long a cascade takes as one job, as single jobs, and through transformers, in turns.

    python tools/cascade_speed.py models/tiny|DIRECTORY --module target/release/libflorence.so

One picture at a time. As one job the picture is fetched, decoded and encoded once, and the questions
about its regions are answered together. Single jobs are sent as soon as what they ask about is known,
all at once, with the picture by its bytes; the server keeps encoded pictures for them. transformers
answers the first question, then all that follow as one batch. Answers are not cached, and no two
rounds have the same bytes. Made-up weights find nothing that more could be asked about, so the model
must be a real one. Prints a table for docs/SPEED.md.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import redis
import torch
from PIL import Image

import reference
import scenes

FIRST_SEED = 930_000
PORT = 6398
CASCADES = {
    "`<OD>` EACH `<REGION_TO_CATEGORY>`": ("<OD>", "EACH", "<REGION_TO_CATEGORY>"),
    "`<DETAILED_CAPTION>` THEN `<CAPTION_TO_PHRASE_GROUNDING> {}`":
        ("<DETAILED_CAPTION>", "THEN", "<CAPTION_TO_PHRASE_GROUNDING> {}"),
}


@contextlib.contextmanager
def server(module, checkpoint, threads, *settings):
    """A connection to a server whose model is loaded."""
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            ["redis-server", "--port", str(PORT), "--save", "", "--dir", directory, "--loadmodule", str(module),
             "model", str(checkpoint), "threads", str(threads), "keep-packed", "no", "result-cache-bytes", "0",
             *settings],
            stdout=subprocess.DEVNULL)
        try:
            connection = redis.Redis(port=PORT, decode_responses=True, protocol=3)
            while True:
                with contextlib.suppress(redis.RedisError):
                    if connection.execute_command("FLORENCE.MODEL")["state"] == "ready":
                        break
                time.sleep(0.1)
            yield connection
        finally:
            process.terminate()
            process.wait()


def follows(first, words, size):
    """The prompts that follow from a first answer."""
    prompt, word, then = words
    if word == "THEN":
        return [then.replace("{}", first[prompt])]
    bins = [[min(999, int(value * 1000 / size[i % 2])) for i, value in enumerate(box)]
            for box in first[prompt]["bboxes"]]
    return [then + "".join(f"<loc_{value}>" for value in box) for box in bins]


class Ways:
    """The three ways, each of which answers about one picture."""

    def __init__(self, connection, model, args):
        self.connection, self.model, self.args, self.jobs = connection, model, args, 0

    def submit(self, picture, *words):
        self.jobs += 1
        key = f"job:{self.jobs}"
        options = ("BEAMS", self.args.beams, "MAXTOKENS", self.args.tokens)
        self.connection.execute_command("FLORENCE.SUBMIT", key, "DATA", picture, *words, *options)
        return key

    def result(self, key):
        self.connection.execute_command("FLORENCE.WAIT", key, 600)
        return json.loads(self.connection.execute_command("FLORENCE.GET", key, "RESULT"))

    def one_job(self, picture, words):
        self.result(self.submit(picture, *words))

    def single_jobs(self, picture, words):
        first = self.result(self.submit(picture, words[0]))
        with Image.open(io.BytesIO(picture)) as image:
            keys = [self.submit(picture, prompt) for prompt in follows(first, words, image.size)]
        for key in keys:
            self.result(key)

    def transformers(self, picture, words):
        image = Image.open(io.BytesIO(picture))
        config = self.model.config(self.args.beams, self.args.tokens)
        first = self.generate([self.model.inputs(image, words[0])], config)
        _, answer = self.model.parsed(first[0].tolist(), words[0], image.size)
        prompts = follows(answer, words, image.size)
        inputs = [self.model.inputs(image, prompt) for prompt in prompts]
        for length in {it["input_ids"].shape[1] for it in inputs}:
            self.generate([it for it in inputs if it["input_ids"].shape[1] == length], config)

    @torch.no_grad()
    def generate(self, inputs, config):
        together = {name: torch.cat([it[name] for it in inputs]) for name in inputs[0]}
        return self.model.model.generate(**together, generation_config=config)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint", type=Path)
    args.add_argument("--module", type=Path, required=True)
    args.add_argument("--pictures", type=int, default=20)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--beams", type=int, default=3)
    args.add_argument("--tokens", type=int, default=32)
    args.add_argument("--rounds", type=int, default=2)
    args = args.parse_args()
    checkpoint = args.checkpoint.resolve()
    torch.set_num_threads(args.threads)
    model = reference.Reference(checkpoint, attention="sdpa")
    pictures = []
    for i in range(args.pictures):
        file = io.BytesIO()
        scenes.draw(scenes.make_scene(FIRST_SEED + i)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    print(f"{args.checkpoint}, milliseconds a picture, medians of {args.pictures} pictures in {args.rounds} rounds, "
          f"{args.threads} threads, {args.beams} beams, {args.tokens} tokens\n\n"
          "| cascade | one job | single jobs | transformers |\n|---|---|---|---|")
    with server(args.module.resolve(), checkpoint, args.threads) as connection:
        ways = Ways(connection, model, args)
        for name, words in CASCADES.items():
            times = {}
            for i in range(args.rounds):
                for picture in pictures:
                    for j, way in enumerate((ways.one_job, ways.single_jobs, ways.transformers)):
                        # PyTorch's threads turn on for a while when they have done.
                        time.sleep(0.3)
                        # What follows the end of a JPEG is not read, but makes it another file.
                        start = time.perf_counter()
                        way(picture + bytes([i, j]), words)
                        times.setdefault(way.__name__, []).append(1000 * (time.perf_counter() - start))
            print(f"| {name} | {' | '.join(f'{statistics.median(each):.0f}' for each in times.values())} |", flush=True)


if __name__ == "__main__":
    main()
