"""Measures what the module costs the other users of the same Redis.

    python tools/neighbour.py [SECTION ...] [--server PATH] [--module PATH] [--rounds N] [--json FILE]

Sections: idle, load, stall, growth, speed, tenants, backlog; all of them, if none is named.
Every figure stands beside one of a server without the module, measured in the same run, in turns;
figures are medians of the rounds. Prints Markdown tables. A section that cannot run says NOT RUN,
and the exit status is 1; a goal that is missed changes no status.
"""

import argparse
import asyncio
import base64
import contextlib
import csv
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import redis

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "models/tiny/samples/shapes.png"
SLOW_PICTURE = ROOT / "models/tiny/samples/poster.jpg"
HOUR = "3600000"
MIB = 1 << 20
SECTION_SECONDS = 1800
FORK = multiprocessing.get_context("fork")
Cell = str | int | float | None


@dataclass
class Table:
    """One table of the report; a number is printed with three digits that mean something."""
    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns)] + [[show(cell) for cell in row] for row in self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def plain(self) -> dict[str, object]:
        """For JSON, which has no infinity."""
        def finite(cell: Cell) -> Cell:
            return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell
        return {"title": self.title, "columns": self.columns, "rows": [list(map(finite, row)) for row in self.rows]}


def show(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"
    return "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


def kept(is_kept: bool) -> str:
    return "kept" if is_kept else "MISSED"


def spread(values: list[float]) -> str:
    return f"{show(min(values))} to {show(max(values))}"


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


# Servers and clients.


class Server:
    """A server on a free port, with a directory of its own; `with` ends it."""

    def __init__(
            self, program: str, module: str | None, files: Path | None = None, options: tuple[str, ...] = ()) -> None:
        self.port, self.directory = free_port(), tempfile.mkdtemp(prefix="neighbour-")
        if files:
            shutil.copytree(files, self.directory, dirs_exist_ok=True)
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.directory, "--save", ""]
        command += options
        if module:
            command += ["--loadmodule", module, "allow-networks", "127.0.0.0/8"]
        environment = dict(os.environ)
        if Path(program).name == "redis-7.4":
            environment["LD_LIBRARY_PATH"] = str(Path(program).parent / "libs")
        self.log = Path(self.directory) / "log"
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.redis = redis.Redis(port=self.port, socket_timeout=120)

    def __enter__(self) -> "Server":
        try:
            self.until_ready()
            for name in ("florence.max-queue", "florence.max-delayed"):
                if self.redis.config_get(name):
                    self.redis.config_set(name, 10_000_000)
            return self
        except BaseException:
            self.end()
            raise

    def __exit__(self, *_failure: object) -> None:
        self.end()

    def until_ready(self) -> None:
        """Waits until the data set is loaded, and the model if there is one."""
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(redis.ConnectionError):
                if self.redis.ping() and self.redis.info("florence").get("florence_model", "ready") != "loading":
                    return
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not get ready")
            if self.process.poll() is not None:
                raise RuntimeError("the server does not start: " + self.log.read_text(errors="replace")[-600:])
            time.sleep(0.02)

    def end(self) -> None:
        self.redis.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """What all threads of the server have had of the processors."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass
class Lab:
    """What is measured, and a URL of a host that accepts connections and never says a word."""
    server: str
    module: str
    rounds: int | None
    url: str

    def plain(self, **how: object) -> Server:
        return Server(self.server, None, **how)

    def ours(self, **how: object) -> Server:
        return Server(self.server, self.module, **how)


def resp(*words: str | bytes | int) -> bytes:
    """A command as it goes over the wire."""
    texts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%s\r\n" % (len(text), text) for text in texts)


class Wire:
    """A connection that times whole replies without parsing them: an ECHO behind them marks their end."""
    END = b"$15\r\nneighbour's end\r\n"

    def __init__(self, port: int, timeout: float = 60) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> tuple[float, bytes]:
        """Seconds to the end of the reply, and the reply."""
        request += resp("ECHO", "neighbour's end")
        reply, start = bytearray(), time.monotonic()
        self.socket.sendall(request)
        while not reply.endswith(self.END):
            chunk = self.socket.recv(MIB)
            if not chunk:
                raise ConnectionError("the server has closed the connection")
            reply += chunk
        return time.monotonic() - start, bytes(reply[:-len(self.END)])


def answer(reply: bytes) -> str:
    """The code of a refusal, which is an answer like others."""
    return reply[1:60].split()[0].decode() if reply[:1] == b"-" else "ok"


class Ping(NamedTuple):
    sent: float
    seconds: float
    is_pong: bool


class Prober:
    """A process that sends a PING every millisecond while the `with` block runs."""

    def __init__(self, port: int) -> None:
        self.connected, self.stop, (self.pipe, child) = FORK.Event(), FORK.Event(), FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self.probe, args=(port, child), daemon=True)
        self.pings: list[Ping] = []

    def __enter__(self) -> "Prober":
        self.process.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        self.stop.set()
        if self.pipe.poll(10):
            self.pings = [Ping(*ping) for ping in self.pipe.recv()]
        self.process.kill()
        self.process.join()

    def probe(self, port: int, pipe: "multiprocessing.connection.Connection") -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)  # it is the server that is measured, not this process
        pings, start, line = [], time.monotonic(), b""
        with contextlib.suppress(OSError):
            connection = self.connect(port)
            self.connected.set()
            while not self.stop.is_set():
                start = time.monotonic()
                connection.sendall(b"PING\r\n")
                line = connection.recv(1000)
                pings.append((start, time.monotonic() - start, line[:1] == b"+"))
                time.sleep(max(0.0, start + 0.001 - time.monotonic()))
                start = time.monotonic()
        pings.append((start, time.monotonic() - start, False))  # the one that got no reply
        pipe.send(pings)

    def connect(self, port: int) -> socket.socket:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", port), 120)
            time.sleep(0.001)

    def milliseconds(self, first: float = 0.0, last: float = float("inf")) -> list[float]:
        """Latencies; a late reply counts also for the PINGs that were due while it was awaited."""
        waits = []
        for ping in self.pings:
            if first <= ping.sent <= last:
                waits += [1e3 * ping.seconds - late for late in range(max(1, int(1e3 * ping.seconds)))]
        return waits or [float("nan")]


# Jobs by the thousand.


def job_template(fields: dict[bytes, bytes], expires_at: int | None = None) -> bytes:
    """The HSET of a job like this one, where `%` stands for its number and the time of its submission."""
    quoted = {name: value.replace(b"%", b"%%") for name, value in fields.items()} | {b"submitted_at": b"%(at)013d"}
    commands = [[b"HSET", b"job:%(n)012d", *(word for pair in quoted.items() for word in pair)]]
    if expires_at:
        commands.append([b"PEXPIREAT", b"job:%(n)012d", b"%d" % expires_at])
    lines = []
    for words in commands:
        lines.append(b"*%d\r\n" % len(words))
        lines += [b"$%d\r\n%s\r\n" % (len(word % {b"n": 0, b"at": 0}), word) for word in words]
    return b"".join(lines)


def jobs(template: bytes, count: int) -> Iterator[bytes]:
    """The commands that write so many jobs, a thousand at a time; the first was submitted first."""
    start = int(1e3 * time.time()) - count
    for first in range(0, count, 1000):
        last = min(first + 1000, count)
        yield b"".join(template % {b"n": n, b"at": start + n} for n in range(first, last))


def fill(server: Server, template: bytes, count: int, db: int = 0) -> None:
    """Writes jobs as a client, from a process that lets others go first."""
    def run() -> None:
        os.nice(10)
        wire = Wire(server.port)
        wire.ask(resp("SELECT", db))
        for commands in jobs(template, count):
            _seconds, reply = wire.ask(commands)
            if b"-" in reply:
                raise RuntimeError(f"a job is refused: {reply[:200]!r}")
    process = FORK.Process(target=run, daemon=True)
    process.start()
    process.join(600)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError("jobs cannot be written")


def templates(lab: Lab) -> dict[str, bytes]:
    """A waiting job and an ended one, as the module itself writes them."""
    with lab.ours() as ours:
        ours.redis.execute_command("FLORENCE.SUBMIT", "waits", lab.url, "<CAPTION>", "DELAY", HOUR)
        ours.redis.execute_command("FLORENCE.SUBMIT", "ends", "DATA", PICTURE.read_bytes(), "<CAPTION>")
        ours.redis.execute_command("FLORENCE.WAIT", "ends", 30)
        ended = ours.redis.hgetall("ends")
        if ended.get(b"state") != b"done":
            raise RuntimeError(f"the sample job is not done: {ended}")
        return {"waiting": job_template(ours.redis.hgetall("waits")),
                "ended": job_template(ended, int(1e3 * (time.time() + 86400)))}


# Sections.


def benchmark(server: Server, count: int, *what: str, keys: int = 100_000) -> tuple[float, float]:
    """Requests a second, pipelined, and the microseconds of processor that the server spent on each."""
    before = server.cpu_seconds()
    command = ["redis-benchmark", "-p", str(server.port), "-P", "32", "-r", str(keys), "-n", str(count), "-q", "--csv"]
    done = subprocess.run([*command, *what], capture_output=True, text=True, timeout=300)
    rows = list(csv.reader(done.stdout.splitlines()))
    if done.returncode or len(rows) < 2:
        raise RuntimeError(f"redis-benchmark {' '.join(what)}: {done.stderr.strip()[:300]}")
    return float(rows[-1][1]), 1e6 * (server.cpu_seconds() - before) / count


def idle(lab: Lab) -> list[Table]:
    """Others' pipelined writes beside the module: without jobs, and while 1000 wait."""
    template = templates(lab)["waiting"]
    tests = {name: ("-t", name.lower()) for name in ("SET", "INCR", "HSET", "LPUSH")}
    tests["HSET, many keys"] = ("HSET", "key:__rand_int__", "f", "v")
    counts: dict[str, int] = {}
    rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(lab.rounds or 7):
        with lab.plain() as plain, lab.ours() as ours, lab.ours() as queued:
            fill(queued, template, 1000, db=9)
            servers = {"plain": plain, "idle": ours, "1000 jobs": queued}
            for test, what in tests.items():
                counts[test] = counts.get(test) or int(benchmark(plain, 100_000, *what)[0])
                for name in sorted(servers, reverse=number % 2 == 1):
                    servers[name].redis.flushdb()
                    rates.setdefault((test, name), []).append(benchmark(servers[name], counts[test], *what))
                    servers[name].redis.flushdb()
    table = Table("Others' pipelined writes, beside a server without the module (goal: 0.97 or more)",
                  ["writes", "module", "without, /s", "with, /s", "ratio", "ratios of the rounds", "ratio by CPU time",
                   "goal"])
    for (test, name), values in rates.items():
        base = rates[test, "plain"]
        if name != "plain":
            without, rate = (median(rate for rate, _ in of) for of in (base, values))
            cpu = [median(cpu for _, cpu in of) for of in (base, values)]
            ratios = [mine[0] / other[0] for mine, other in zip(values, base)]
            table.rows.append([test, name, without, rate, rate / without, spread(ratios), cpu[0] / cpu[1],
                               kept(rate / without >= 0.97)])
    return [table]


def data_files(lab: Lab, template: bytes, directory: Path, count: int) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """The same jobs as AOF and as RDB, each with the options of a server that loads it."""
    aof, rdb = directory / "aof", directory / "rdb"
    (aof / "appendonlydir").mkdir(parents=True)
    rdb.mkdir()
    name = "appendonly.aof.1.incr.aof"
    (aof / "appendonlydir/appendonly.aof.manifest").write_text(f"file {name} seq 1 type i\n")
    with (aof / "appendonlydir" / name).open("wb") as file:
        file.writelines([resp("SELECT", 0)])
        file.writelines(jobs(template, count))
    options = ("--appendonly", "yes", "--auto-aof-rewrite-percentage", "0")
    with lab.plain(files=aof, options=options) as plain:
        plain.redis.execute_command("SAVE")
        shutil.move(Path(plain.directory) / "dump.rdb", rdb / "dump.rdb")
    return {"RDB": (rdb, ()), "AOF": (aof, options)}


def start_on(server: Server) -> dict[str, float]:
    """Seconds from the start to the first PONG, and PING meanwhile and for three seconds after."""
    cpu_seconds = float("inf")
    try:
        with Prober(server.port) as prober:
            try:
                server.until_ready()
                cpu_seconds = server.cpu_seconds()
                time.sleep(3)
            except (TimeoutError, redis.TimeoutError):
                server.process.kill()
    finally:
        server.end()
    ready = next((ping.sent + ping.seconds for ping in prober.pings if ping.is_pong), float("inf"))
    loading, after = prober.milliseconds(last=ready), prober.milliseconds(first=ready)
    return {"seconds": ready - server.started, "cpu": cpu_seconds,
            "loading p99": p99(loading), "loading max": max(loading), "after p99": p99(after), "after max": max(after)}


def load(lab: Lab, count: int = 1_000_000) -> list[Table]:
    """Starts on a million jobs, and PING meanwhile."""
    names = ["loading p99", "loading max", "after p99", "after max"]
    table = Table(f"Start on {count:,} jobs (goal: at most 1.3 times); PING in ms, without and with the module",
                  ["file", "without, s", "with, s", "times", "of the rounds", "by CPU time", *names, "goal"])
    for kind, template in templates(lab).items():
        with tempfile.TemporaryDirectory(prefix="neighbour-") as directory:
            for name, (files, options) in data_files(lab, template, Path(directory), count).items():
                starts: list[list[dict[str, float]]] = [[], []]
                for number in range(lab.rounds or 3):
                    for side in (0, 1) if number % 2 == 0 else (1, 0):
                        starts[side].append(start_on((lab.plain, lab.ours)[side](files=files, options=options)))
                both = {key: [median(start[key] for start in side) for side in starts] for key in starts[0][0]}
                times = [mine["seconds"] / other["seconds"] for other, mine in zip(*starts)]
                (without, ours), cpu = both["seconds"], both["cpu"]
                table.rows.append([f"{name}, {kind}", without, ours, ours / without, spread(times), cpu[1] / cpu[0],
                                   *(" / ".join(map(show, both[key])) for key in names), kept(ours / without <= 1.3)])
    return [table]


def padded_png(size: int) -> bytes:
    """The sample picture, made so large by an ancillary chunk before its last one."""
    picture, body = PICTURE.read_bytes(), b"paDd" + bytes(size - PICTURE.stat().st_size - 12)
    return picture[:-12] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + picture[-12:]


def data_url(size: int) -> bytes:
    head = b"data:image/png;base64,"
    return head + base64.b64encode(padded_png((size - len(head)) // 4 * 3))


@dataclass
class Big:
    """A command with big inputs, and what it needs to find."""
    name: str
    request: Callable[[], bytes]
    prepare: Callable[[Server], object] = lambda server: None
    size: int | None = None  # of the SET beside it; else that of the request


def big_commands(lab: Lab, template: bytes) -> list[Big]:
    """Every command of ours that takes big inputs, and one of the server's own."""
    keys = [b"job:%012d" % n for n in range(100_000)]

    def submit(*what: str | bytes | int, key: str = "big") -> bytes:
        return resp("FLORENCE.SUBMIT", key, *what, "DELAY", HOUR)

    def prompt(size: int) -> bytes:
        return (b"<CAPTION_TO_PHRASE_GROUNDING>" + b"a red circle and " * (size // 17 + 1))[:size]

    def cancelled(server: Server) -> None:
        fill(server, template, len(keys))
        for first in range(0, len(keys), 1000):
            server.redis.execute_command("FLORENCE.CANCEL", *keys[first:first + 1000])

    def picture_key(server: Server) -> None:
        server.redis.set("picture", padded_png(32 * MIB))

    def filled(server: Server) -> None:
        fill(server, template, len(keys))

    return [
        Big("SUBMIT, prompt of 10 MB", lambda: submit(lab.url, prompt(10_000_000))),
        Big("SUBMIT, prompt of 64 MB", lambda: submit(lab.url, prompt(64_000_000))),
        Big("SUBMIT, PROMPTS of 16 of 4 MB", lambda: submit(
            lab.url, "PROMPTS", 16, *(prompt(4_000_000) + b"%d" % n for n in range(16)))),
        Big("SUBMIT, data: URL of 40 MB", lambda: submit(data_url(40_000_000), "<CAPTION>")),
        Big("SUBMIT, data: URL of 200 MB", lambda: submit(data_url(200_000_000), "<CAPTION>")),
        Big("SUBMIT, DATA of 32 MiB", lambda: submit("DATA", padded_png(32 * MIB), "<CAPTION>")),
        Big("the same without DELAY, to its answer", lambda: resp(
            "FLORENCE.SUBMIT", "run", "DATA", padded_png(32 * MIB), "<CAPTION>") + resp("FLORENCE.WAIT", "run", 20)),
        Big("SUBMIT, KEY of 32 MiB", lambda: submit("KEY", "picture", "<CAPTION>"), picture_key, 32 * MIB),
        Big("SUBMIT, URL of 1 MB", lambda: submit(lab.url + "/" + "a" * 1_000_000, "<CAPTION>")),
        Big("SUBMIT, MODEL of 10 MB", lambda: submit(lab.url, "<CAPTION>", "MODEL", b"m" * 10_000_000)),
        Big("WAIT, 100,000 keys", lambda: resp("FLORENCE.WAIT", *keys, 0.3), filled),
        Big("CANCEL, 100,000 keys", lambda: resp("FLORENCE.CANCEL", *keys), filled),
        Big("RETRY, 100,000 keys", lambda: resp("FLORENCE.RETRY", *keys), cancelled),
        Big("(the server's own EXISTS, 100,000 keys)", lambda: resp("EXISTS", *keys), filled),
    ]


class Stalled(NamedTuple):
    """Milliseconds of PING, and when the command was answered and how."""
    longest: float
    p99: float
    seconds: float
    answer: str


def stalled(server: Server, request: bytes) -> Stalled:
    """PING beside a command; a server that does not answer in time is ended."""
    wire = Wire(server.port)
    with Prober(server.port) as prober:
        prober.connected.wait(10)
        time.sleep(0.02)
        start = time.monotonic()
        try:
            seconds, reply = wire.ask(request)
            time.sleep(0.05)
        except OSError as failure:
            server.process.kill()
            seconds, reply = time.monotonic() - start, b"-" + type(failure).__name__.encode()
    waits = prober.milliseconds(first=start)
    return Stalled(max(waits), p99(waits), seconds, answer(reply))


def stall(lab: Lab) -> list[Table]:
    """The longest PING beside one command of ours, less that beside a SET of as many bytes."""
    table = Table("PING beside one command with big inputs, ms, less that beside a SET of the same bytes (goal: 20)",
                  ["command", "bytes", "SET p99", "p99", "SET longest", "longest", "difference",
                   "differences of the rounds", "answered after, s", "answer", "goal"])
    for big in big_commands(lab, templates(lab)["waiting"]):
        request, sides = big.request(), ([], [])
        size = big.size or len(request)
        value = resp("SET", "value", bytes(size))
        for _ in range(lab.rounds or 3):
            with lab.plain() as plain, lab.ours() as ours:
                big.prepare(ours)
                sides[0].append(stalled(plain, value))
                sides[1].append(stalled(ours, request))
            if sides[1][-1].seconds > 5:
                break
        figures = [[median(getattr(run, name) for run in side) for side in sides] for name in ("p99", "longest")]
        differences = [mine.longest - other.longest for other, mine in zip(*sides)]
        difference = median(differences)
        table.rows.append([big.name, size, *figures[0], *figures[1], difference, spread(differences),
                           median(run.seconds for run in sides[1]), sides[1][-1].answer, kept(difference <= 20)])
    return [table]


def usec(server: Server, command: str) -> int:
    """The time that the server has spent in a command since its start."""
    return server.redis.info("commandstats").get(f"cmdstat_{command.lower()}", {}).get("usec", 0)


def growing_commands(lab: Lab, count: int, number: int) -> dict[str, bytes]:
    """Every command, with keys that no other round uses; in an order in which each finds what it needs."""
    middle = count // 2
    many = [f"job:{n:012d}" for n in range(1000)]
    one = f"job:{max(middle, count - 1 - number):012d}"
    return {
        "SUBMIT": resp("FLORENCE.SUBMIT", f"new:{number}", lab.url, "<CAPTION>", "DELAY", HOUR),
        "GET": resp("FLORENCE.GET", f"job:{middle:012d}"),
        "GET RESULT": resp("FLORENCE.GET", f"job:{middle:012d}", "RESULT"),
        "JOBS": resp("FLORENCE.JOBS"),
        "JOBS COUNT 1000": resp("FLORENCE.JOBS", "COUNT", 1000),
        "JOBS STATE retrying": resp("FLORENCE.JOBS", "STATE", "retrying"),
        "JOBS, another database": resp("FLORENCE.JOBS"),
        "WAIT, 1000 keys, 10 ms": resp("FLORENCE.WAIT", *many, 0.01),
        "STATS": resp("FLORENCE.STATS"),
        "INFO florence": resp("INFO", "florence"),
        "HOSTS": resp("FLORENCE.HOSTS"),
        "CANCEL, 1 key": resp("FLORENCE.CANCEL", one),
        "RETRY, 1 key": resp("FLORENCE.RETRY", one),
        "CANCEL, 1000 keys": resp("FLORENCE.CANCEL", *many),
        "RETRY, 1000 keys": resp("FLORENCE.RETRY", *many),
        "SWAPDB": resp("SWAPDB", 0, 1),
        "SWAPDB, back": resp("SWAPDB", 0, 1),
    }


@dataclass
class Timed:
    """Milliseconds of a command: of its client, less PING's; in the server, by INFO commandstats; of PINGs after it."""
    client: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    answer: str = "ok"


def timed(server: Server, wires: tuple[Wire, Wire], commands: dict[str, bytes], into: dict[str, Timed]) -> None:
    """Sends every command once; the second connection is that of the other database."""
    for name, request in commands.items():
        wire, figure = wires["another" in name], into.setdefault(name, Timed())
        ping = median(wire.ask(resp("PING"))[0] for _ in range(20))
        command = request.split(b"\r\n", 3)[2].decode()
        before, start = usec(server, command), time.monotonic()
        try:
            _seconds, reply = wire.ask(request)
        except TimeoutError:
            figure.answer = "none in 60 s"
            raise
        finally:
            figure.client.append(1e3 * (time.monotonic() - start - ping))
        figure.after.append(1e3 * max(wire.ask(resp("PING"))[0] for _ in range(50)))
        figure.server.append((usec(server, command) - before) / 1e3)
        figure.answer = answer(reply)


def grown(lab: Lab, template: bytes, count: int) -> dict[str, Timed]:
    """The times of all commands while so many jobs wait; without those after one that has no answer."""
    figures: dict[str, Timed] = {}
    with lab.plain() as plain, lab.ours() as ours, contextlib.suppress(TimeoutError):
        for server in (plain, ours):
            fill(server, template, count)
        wires, other = (Wire(ours.port), Wire(ours.port)), (Wire(plain.port), Wire(plain.port))
        wires[1].ask(resp("SELECT", 1))
        end = time.monotonic() + 60
        for number in range(lab.rounds or 5):
            if number and time.monotonic() > end:
                break
            commands = growing_commands(lab, count, number)
            timed(ours, wires, commands, figures)
            without = {f"({name}, without the module)": commands[name] for name in ("SWAPDB", "SWAPDB, back")}
            timed(plain, other, without, figures)
        flush = resp("FLUSHALL", "ASYNC")
        timed(ours, wires, {"FLUSHALL ASYNC, once": flush}, figures)
        timed(plain, other, {"(FLUSHALL ASYNC, once, without the module)": flush}, figures)
    return figures


def growth(lab: Lab, counts: tuple[int, ...] = (1000, 100_000, 1_000_000)) -> list[Table]:
    """Every command at a thousand, a hundred thousand and a million waiting jobs."""
    template = templates(lab)["waiting"]
    figures = [grown(lab, template, count) for count in counts]
    table = Table("Commands while so many jobs wait, ms less PING, medians; at the most jobs also the worst, and in "
                  "the server (goal: 5 there, by the client; WAIT by the server)",
                  ["command", *(f"{count:,}" for count in counts),
                   "growth", "worst", "server", "server, worst", "PING after, worst", "answer", "goal"])
    for name in figures[0]:
        medians = [median(figure[name].client) if name in figure else None for figure in figures]
        most = figures[-1].get(name, Timed([float("inf")], answer="not reached"))
        server, after = most.server or [float("inf")], most.after or [float("inf")]
        judged = median(server if name.startswith("WAIT") else most.client)
        growth = max(medians[-1], 0.01) / max(medians[0], 0.01) if medians[-1] else None
        goal = "" if name.startswith("(") else kept(judged <= 5)
        table.rows.append([name, *medians, growth, max(most.client), median(server), max(server), max(after),
                           most.answer, goal])
    return [table]


def round_trips(port: int, pairs: Iterator[tuple[bytes, bytes]]) -> list[float]:
    """Milliseconds of pairs of commands, the second sent when the first is answered."""
    wire, times = Wire(port), []
    for first, second in pairs:
        start = time.monotonic()
        wire.socket.sendall(first)
        wire.socket.recv(MIB)
        wire.socket.sendall(second)
        wire.socket.recv(MIB)
        times.append(1e3 * (time.monotonic() - start))
        wire.ask(b"")  # what may have come in a second piece
    return times


def cached_pairs(picture: bytes, count: int) -> Iterator[tuple[bytes, bytes]]:
    for n in range(count):
        key = f"cached:{n}"
        yield resp("FLORENCE.SUBMIT", key, "DATA", picture, "<CAPTION>"), resp("FLORENCE.WAIT", key, 20)


def speed(lab: Lab) -> list[Table]:
    """Pipelined SUBMIT and GET beside SET, and how soon a cached answer is there."""
    template, rates, trips = templates(lab), {}, {}
    picture = PICTURE.read_bytes()
    submit = ("FLORENCE.SUBMIT", "job:__rand_int__", lab.url, "<CAPTION>", "DELAY", HOUR)
    get = ("FLORENCE.GET", "job:__rand_int__")
    for _ in range(lab.rounds or 5):
        with lab.plain() as plain, lab.ours() as ours:
            def rate(name: str, *how: object, **keys: int) -> None:
                rates.setdefault(name, []).append(benchmark(*how, **keys)[0])

            rate("SET", plain, 500_000, "-t", "set")
            rate("SUBMIT", ours, 100_000, *submit, keys=10**9)
            for state in ("waiting", "ended"):
                ours.redis.flushall()
                fill(ours, template[state], 100_000)
                rate(f"GET, {state} job", ours, 100_000, *get)
            ours.redis.flushall()
            round_trips(ours.port, cached_pairs(picture, 1))
            sets = ((resp("SET", f"set:{n}", picture), resp("GET", f"set:{n}")) for n in range(5000))
            for name, server, pairs in (("SET, then GET, without the module", plain, sets),
                                        ("SUBMIT, then WAIT, cached", ours, cached_pairs(picture, 5000))):
                trips.setdefault(name, []).append(round_trips(server.port, pairs))
    base = median(rates["SET"])
    first = Table("Pipelined rates beside SET's on a server without the module (goal: 0.10 or more)",
                  ["command", "/s", "beside SET", "of the rounds", "goal"])
    for name, values in rates.items():
        ratio = median(values) / base
        ratios = spread([value / other for value, other in zip(values, rates["SET"])])
        first.rows.append([name, median(values), ratio, ratios, "" if name == "SET" else kept(ratio >= 0.1)])
    limit = 0.7 * 1e6 / base
    second = Table(f"5000 round trips, ms (goal: p99 of 0.7 where SET gives 1,000,000/s, so {limit:.2f} here)",
                   ["one after the other", "p50", "p99", "p99 of the rounds", "most", "goal"])
    for name, runs in trips.items():
        tails = [p99(run) for run in runs]
        goal = kept(median(tails) <= limit) if "WAIT" in name else ""
        second.rows.append([name, median(map(median, runs)), median(tails), spread(tails), max(map(max, runs)), goal])
    return [first, second]


@contextlib.contextmanager
def slow_host() -> Iterator[int]:
    """A process that serves a picture at 1.1 KB/s to everybody who asks; its port."""
    picture, port = SLOW_PICTURE.read_bytes(), free_port()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n" % len(picture))
            for first in range(0, len(picture), 110):
                writer.write(picture[first:first + 110])
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.close()

    async def run() -> None:
        await (await asyncio.start_server(serve, "127.0.0.1", port, backlog=1000)).serve_forever()

    process = FORK.Process(target=lambda: asyncio.run(run()), daemon=True)
    process.start()
    try:
        yield port
    finally:
        process.kill()
        process.join()


def local_jobs(server: Server, count: int = 20, patience: float = 60) -> list[float]:
    """Milliseconds of jobs that bring their picture, one by one; one not answered in time counts as that long."""
    picture, deadline, times = PICTURE.read_bytes(), time.monotonic() + patience, []
    for n in range(count):
        start = time.monotonic()
        left = deadline - start
        if left > 0:
            server.redis.execute_command("FLORENCE.SUBMIT", f"local:{n}", "DATA", picture, "<CAPTION>", "NOCACHE")
            server.redis.execute_command("FLORENCE.WAIT", f"local:{n}", f"{left:.3f}")
        is_done = left > 0 and server.redis.hget(f"local:{n}", "state") == b"done"
        times.append(1e3 * (time.monotonic() - start if is_done else patience))
    return times


def tenants(lab: Lab) -> list[Table]:
    """Jobs with local bytes while others' pictures come from a slow host."""
    counts, runs = (0, 8, 100), {}
    with slow_host() as port:
        for _ in range(lab.rounds or 3):
            for slow in counts:
                with lab.ours() as ours:
                    for n in range(slow):
                        url = f"http://127.0.0.1:{port}/{n}"
                        ours.redis.execute_command("FLORENCE.SUBMIT", f"slow:{n}", url, "<CAPTION>")
                    time.sleep(0.5)
                    runs.setdefault(slow, []).append(local_jobs(ours))
    table = Table("20 jobs with local bytes beside slow downloads, ms (goal: within twice those without, and 50)",
                  ["slow URLs before them", "p50", "p50 of the rounds", "most", "answered within 60 s", "goal"])
    figures = {slow: (median(map(median, of)), median(map(max, of))) for slow, of in runs.items()}
    for slow, of in runs.items():
        is_kept = all(mine <= 2 * base + 50 for mine, base in zip(figures[slow], figures[0]))
        answered = sum(ms < 60_000 for run in of for ms in run)
        table.rows.append([slow, figures[slow][0], spread([median(run) for run in of]), figures[slow][1],
                           f"{answered} of {sum(map(len, of))}", kept(is_kept) if slow else ""])
    return [table]


def celery_message(name: str, task: str) -> bytes:
    """A message as a client of Celery sends it, for a picture that is no longer there."""
    body = base64.b64encode(json.dumps([["data:,", "<CAPTION>"], {}, {}]).encode()).decode()
    return json.dumps({
        "body": body, "content-encoding": "utf-8", "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": name, "root_id": name, "retries": 0},
        "properties": {"correlation_id": name, "delivery_mode": 2, "delivery_tag": name, "priority": 0,
                       "body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "celery"}},
    }).encode()


def until_left(server: Server, count: int) -> None:
    """Waits until so many messages have been looked at and left."""
    deadline = time.monotonic() + 300
    while server.redis.info("florence")["florence_celery_left"] < count:
        if time.monotonic() > deadline:
            raise TimeoutError("the messages are not looked at")
        time.sleep(0.05)


def backlog(lab: Lab, counts: tuple[int, ...] = (50_000, 200_000), ours: int = 50) -> list[Table]:
    """PING beside a list of Celery in which another task's messages wait, and ours behind them."""
    runs: dict[tuple[int, str], list[tuple[float, list[float]]]] = {}
    options = ("--florence.celery-queues", "celery:tasks.ours")

    def timed_part(server: Server, name: tuple[int, str], part: Callable[[], None]) -> None:
        with Prober(server.port) as prober:
            prober.connected.wait(10)
            start = time.monotonic()
            part()
            seconds = time.monotonic() - start
        runs.setdefault(name, []).append((seconds, prober.milliseconds()))

    def push(server: Server, name: str, task: str, count: int) -> None:
        for first in range(0, count, 1000):
            last = min(first + 1000, count)
            server.redis.lpush("celery", *[celery_message(f"{name}-{n}", task) for n in range(first, last)])

    def answered(server: Server, name: str) -> None:
        push(server, name, "tasks.ours", ours)
        while not server.redis.exists(f"celery-task-meta-{name}-{ours - 1}"):
            time.sleep(0.02)

    def theirs(server: Server, count: int) -> None:
        push(server, "first", "tasks.theirs", count)
        until_left(server, count)

    for _ in range(lab.rounds or 1):
        for count in counts:
            with lab.plain() as server:
                come = (count, "theirs come to a server without the module")
                timed_part(server, come, lambda: push(server, "first", "tasks.theirs", count))
            with lab.ours(options=options) as server:
                timed_part(server, (count, "theirs come and are looked at"), lambda: theirs(server, count))
                timed_part(server, (count, f"{ours} of ours behind them"), lambda: answered(server, "behind"))
    table = Table("A list of Celery with messages of another task: seconds of each part, and PING meanwhile, ms",
                  ["theirs", "part", "s", "PING p50", "p99", "most"])
    for (count, name), of in runs.items():
        seconds, pings = median(run[0] for run in of), [ms for run in of for ms in run[1]]
        table.rows.append([f"{count:,}", name, seconds, median(pings), p99(pings), max(pings)])
    return [table]


SECTIONS: dict[str, Callable[[Lab], list[Table]]] = {
    "idle": idle, "load": load, "stall": stall, "growth": growth, "speed": speed, "tenants": tenants,
    "backlog": backlog}


def interrupt(number: int, _frame: object) -> None:
    """A section that takes too long fails; the script ends in order when it is told to."""
    if number == signal.SIGALRM:
        raise RuntimeError(f"not over after {SECTION_SECONDS} s")
    sys.exit(1)


def run_section(name: str, lab: Lab, report: dict[str, object]) -> bool:
    """Prints a section's tables, or why there are none."""
    signal.alarm(SECTION_SECONDS)
    start = time.monotonic()
    print(f"## {name}\n", flush=True)
    try:
        tables = SECTIONS[name](lab)
    except Exception as failure:
        report[name] = {"not_run": f"{type(failure).__name__}: {failure}"}
        print(f"NOT RUN: {report[name]['not_run']}\n", flush=True)
        return False
    finally:
        signal.alarm(0)
    report[name] = [table.plain() for table in tables]
    print("\n".join(table.markdown() for table in tables))
    seconds, load_average = time.monotonic() - start, os.getloadavg()[0]
    print(f"{seconds:.0f} s, load average {load_average:.1f} on {os.cpu_count()} processors\n", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--server", default="redis-server")
    parser.add_argument("--module", default=str(ROOT / "target/release/libflorence.so"))
    parser.add_argument("--rounds", type=int, help="instead of each section's own number")
    parser.add_argument("--json", type=Path, help="also writes the report there")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, interrupt)
    report: dict[str, object] = {}
    with socket.create_server(("127.0.0.1", free_port()), backlog=1000) as silent:
        lab = Lab(args.server, args.module, args.rounds, f"http://127.0.0.1:{silent.getsockname()[1]}/picture.png")
        version = subprocess.run([args.server, "--version"], capture_output=True, text=True).stdout.strip()
        print(f"# The module beside others\n\n{version}; {args.module}\n", flush=True)
        is_complete = all([run_section(name, lab, report) for name in args.sections or SECTIONS])
    if args.json:
        whole = {"server": version, "module": args.module, "sections": report}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
