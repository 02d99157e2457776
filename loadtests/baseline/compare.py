"""Celery with PyTorch workers beside Redis with the module: one checkpoint, one machine, in turns.

    compare.py CHECKPOINT|base|large [--tokens N] [--seconds S] [--rounds R] [--work DIR]

Prints a Markdown table for docs/SPEED.md. Both systems are driven by `florence-load` or by a Python
client library, get the same pictures from the same loopback server, and use as many threads. The
module's caches are off except where the row says so.
"""

import argparse
import atexit
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis
from celery import Celery

BASELINE = Path(__file__).resolve().parent
ROOT = BASELINE.parents[1]
RELEASE = ROOT / "target/release"
SAMPLES = ROOT / "models/tiny/samples"
THREADS = 2


class System:
    """One of the systems: its processes, and how jobs are given to it."""

    def __init__(self, name, checkpoint, tokens, workers=(), precision=None, settings=()):
        self.name, self.checkpoint, self.tokens = name, checkpoint, tokens
        self.workers, self.precision, self.settings = workers, precision, settings
        self.processes = []

    @property
    def is_florence(self):
        return self.precision is not None

    def start(self, *redis_settings, **environment):
        """Starts everything on an empty directory and waits for an answer; the seconds that took."""
        self.directory = tempfile.mkdtemp()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        start = time.monotonic()
        self.start_server(*redis_settings)
        self.environment = {
            "REDIS_URL": f"redis://127.0.0.1:{self.port}/9", "FLORENCE_CHECKPOINT": str(self.checkpoint),
            "FLORENCE_MAX_TOKENS": str(self.tokens), **environment}
        for threads in self.workers:
            self.start_worker(threads)
        self.load("first", "about = 'one'\nload.burst = { jobs = 1 }")
        return time.monotonic() - start

    def start_server(self, *redis_settings):
        command = ["redis-server", "--port", str(self.port), "--dir", self.directory, *(redis_settings or ("--save", ""))]
        if self.is_florence:
            command += ["--loadmodule", RELEASE / "libflorence.so", "model", self.checkpoint, "precision", self.precision,
                        "threads", str(THREADS), "allow-networks", "127.0.0.0/8", *self.settings]
        self.run(command)
        self.redis = redis.Redis(port=self.port, db=9, decode_responses=True)
        while True:
            try:
                self.redis.ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError):
                time.sleep(0.02)

    def start_worker(self, threads):
        name = f"{len(self.processes)}@%h"
        self.run([Path(sys.executable).parent / "celery", "-A", "tasks", "worker", "--pool=solo", "-n", name],
                 FLORENCE_THREADS=str(threads), **self.environment)

    def run(self, command, **environment):
        log = open(Path(self.directory) / "log", "a")
        process = subprocess.Popen(command, cwd=BASELINE, env=os.environ | environment, stdout=log, stderr=log)
        atexit.register(process.kill)
        self.processes.append(process)

    def stop(self):
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        self.processes.clear()
        shutil.rmtree(self.directory)

    def load(self, name, scenario):
        """The figures of `florence-load` for a scenario."""
        if self.is_florence:
            scenario = f"max_tokens = {self.tokens}\n{scenario}"
        file, report = (Path(self.directory) / f"{name}.{end}" for end in ("toml", "json"))
        file.write_text(scenario)
        wire = [] if self.is_florence else ["--celery", "celery:tasks.inference_task"]
        done = subprocess.run(
            [RELEASE / "florence-load", "--flush", "--url", f"redis://127.0.0.1:{self.port}/9", *wire, "scenario",
             "--json", report, file], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{self.name}: {done.stderr}{(Path(self.directory) / 'log').read_text()}")
        return json.loads(report.read_text())[0]

    def memory(self):
        """The most that all processes had in memory, in MiB."""
        def most(process):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return sum(most(process) for process in self.processes) / 1024

    def submit(self, count, place, prompt):
        """Submits by the Python client of the system; a function that gives the answer of a job, or None."""
        if self.is_florence:
            for i in range(count):
                self.redis.execute_command(
                    "FLORENCE.SUBMIT", f"j{i}", place, prompt, "MAXTOKENS", self.tokens, "NOCACHE")

            def answer(i):
                found = self.redis.execute_command("FLORENCE.GET", f"j{i}", "RESULT")
                return found and json.loads(found)
            return answer
        address = self.environment["REDIS_URL"]
        app = Celery("client", broker=address, backend=address)
        results = [app.send_task("tasks.inference_task", (place, prompt)) for _ in range(count)]

        def answer(i):
            meta = self.redis.get(f"celery-task-meta-{results[i].id}")
            meta = json.loads(meta) if meta else {}
            return meta.get("result") if meta.get("status") == "SUCCESS" else None
        return answer


def closed(clients, seconds):
    return f"about = 'closed'\nload.closed = {{ clients = {clients}, seconds = {seconds} }}\npatience_seconds = 300"


def speeds(systems, args):
    """Start-up, throughput, latency and memory, in turns."""
    rows = {system.name: [] for system in systems}
    for _ in range(args.rounds):
        for system in systems:
            start = system.start()
            load = system.load("closed", closed(4, args.seconds))
            alone = system.load("alone", closed(1, args.seconds / 2))
            rows[system.name].append({
                "start to first answer, s": start, "pictures/s": load["answers_per_second"],
                "answer p50, ms": load["latency_ms"]["p50"], "answer p99, ms": load["latency_ms"]["p99"],
                "answer p50, one at a time, ms": alone["latency_ms"]["p50"],
                "PING p99, ms": load["ping_ms"]["p99"], "peak memory, MiB": system.memory()})
            system.stop()
            print(f"{system.name}: {rows[system.name][-1]}", file=sys.stderr, flush=True)
    return {name: {row: statistics.median(one[row] for one in rounds) for row in rounds[0]}
            for name, rounds in rows.items()}


def submit_rate(system, count=2000):
    """Submissions a second by the Python client, nothing pipelined, into a queue."""
    system.start(FLORENCE_NO_MODEL="1")
    start = time.monotonic()
    answer = system.submit(count, str(SAMPLES / "shapes.png"), "<CAPTION>")
    rate = count / (time.monotonic() - start)
    del answer  # Celery's results tell the server that they go
    system.stop()
    return rate


def overhead(system):
    """Milliseconds from submission to answer when the answer costs nothing: cached, or without a model."""
    system.start(FLORENCE_NO_MODEL="1")
    scenario = closed(1, 5) + "\npictures = ['shapes.png']\ncache = true"
    figures = [system.load("overhead", scenario)["latency_ms"]["p50"] for _ in range(3)]
    system.stop()
    return statistics.median(figures)


def overload(system):
    system.start()
    figures = system.load("overload", "about = 'overload'\nload.open = { rate = 400, seconds = 10 }\npatience_seconds = 20")
    system.stop()
    return figures


def killed(system, count=40):
    """Jobs that stay without an answer after a kill -9 of what computes, in the middle of them."""
    system.start("--appendonly", "yes", "--appendfsync", "always")
    answer = system.submit(count, str(SAMPLES / "shapes.png"), "<CAPTION>")
    while sum(answer(i) is not None for i in range(count)) < count // 4:
        time.sleep(0.005)
    victim = system.processes.pop()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    if system.is_florence:
        system.start_server("--appendonly", "yes", "--appendfsync", "always")
    else:
        system.start_worker(system.workers[-1])
    lost, until = count, time.monotonic() + 60
    while lost and time.monotonic() < until:
        time.sleep(0.1)
        left = sum(answer(i) is None for i in range(count))
        if left < lost:
            lost, until = left, time.monotonic() + 60
    del answer
    system.stop()
    return f"{lost} of {count}"


def same_answers(ours, theirs):
    """How many answers to all samples and some prompts are the same JSON."""
    answers = []
    for system in (ours, theirs):
        system.start()
        found = []
        for place in sorted(SAMPLES.iterdir()):
            for prompt in ("<CAPTION>", "<DETAILED_CAPTION>", "<OD>", "<OCR>", "<OCR_WITH_REGION>", "<REGION_PROPOSAL>"):
                answer = system.submit(1, str(place), prompt)
                while answer(0) is None:
                    time.sleep(0.005)
                found.append(json.dumps(answer(0)))
                del answer
                system.redis.flushdb()
        system.stop()
        answers.append(found)
    return f"{sum(a == b for a, b in zip(*answers))} of {len(answers[0])}"


def installed(*places):
    """MiB on disk."""
    lines = subprocess.run(["du", "-smc", *places], check=True, capture_output=True, text=True).stdout
    return int(lines.splitlines()[-1].split()[0])


def main():
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint")
    args.add_argument("--tokens", type=int, default=1024)
    args.add_argument("--seconds", type=float, default=20)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--work", type=Path, default=Path("/tmp/florence-work"))
    args = args.parse_args()
    # So that what was started ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    checkpoint = Path(args.checkpoint)
    if args.checkpoint in ("base", "large"):
        sys.path.append(str(ROOT / "tools"))
        import fidelity

        checkpoint = fidelity.speed_checkpoint(args.work, args.checkpoint, ROOT / "models/tiny")
    checkpoint = checkpoint.resolve()
    uncached = ("result-cache-bytes", "0", "feature-cache-bytes", "0", "coordinates", "int", "file-roots", str(SAMPLES))

    def florence(precision, settings=uncached):
        return System(f"Florence, {precision}", checkpoint, args.tokens, precision=precision, settings=settings)

    two, one = (System(name, checkpoint, args.tokens, workers=workers) for name, workers in (
        ("Celery, 2 workers of 1 thread", (1, 1)), ("Celery, 1 worker of 2 threads", (2,))))
    f32, auto, cached = florence("f32"), florence("auto"), florence("f32", settings=("file-roots", str(SAMPLES)))

    rows = speeds([two, one, f32, auto], args)
    names = list(rows)
    print(f"\n{args.checkpoint}, at most {args.tokens} tokens, 3 beams, {THREADS} threads, medians of {args.rounds} "
          f"rounds of {args.seconds:.0f} s with 4 clients\n")
    print("| | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for row in rows[names[0]]:
        cells = [rows[name][row] for name in names]
        print(f"| {row} | " + " | ".join(f"{cell:.{2 if cell < 1 else 1 if cell < 100 else 0}f}" for cell in cells) + " |")

    print("\n| | Celery | Florence |\n|---|---|---|")
    venv = Path(sys.executable).parents[1]
    cuda = [place for place in (venv / "lib").glob("python3*/site-packages/*") if place.name in ("nvidia", "triton")]
    print(f"| installed besides redis-server, MiB | {installed(venv)} (of which CUDA {installed(*cuda)}) | "
          f"{installed(RELEASE / 'libflorence.so')} |")
    print(f"| submissions/s of a Python client | {submit_rate(one):.0f} | {submit_rate(f32):.0f} |")
    print(f"| submission to answer without inference, p50, ms | {overhead(one):.2f} | {overhead(cached):.2f} |", flush=True)
    flood = [overload(system) for system in (two, f32)]
    for row, of in (
            ("400 jobs/s for 10 s: answered within 20 s after", lambda figures: figures["ends"].get("done", 0)),
            ("their latency, p50, ms", lambda figures: f"{figures['latency_ms']['p50']:.0f}"),
            ("PING p99 meanwhile, ms", lambda figures: f"{figures['ping_ms']['p99']:.2f}")):
        print(f"| {row} | " + " | ".join(str(of(figures)) for figures in flood) + " |")
    print(f"| lost by a kill -9 (of a worker; of the server): no answer, a minute after the last one | {killed(two)} | {killed(f32)} |", flush=True)
    print(f"| the same JSON in float32 | {same_answers(f32, one)} | |")


if __name__ == "__main__":
    main()
