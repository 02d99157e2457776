"""Runs the blocks of README.md and docs/CLIENTS.md as a reader would, and compares what they print.

Every block with a language is copied into a fresh shell, Python, Node or redis-cli, in the project's
directory, on a server that `make run` starts as README.md says. A block without a language below it
is what it prints on a terminal; `...` stands for anything. Blocks that are not run are listed here,
with the reason, and told of. Needs what `tools/setup.sh tests` installs.
"""

import filecmp
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-clients/bin/python"
NODE_PACKAGES = {"redis": "clients/node/node_modules/redis", "florence-redis": "clients/node"}
DOCUMENTS = ["README.md", "docs/CLIENTS.md"]
# Seconds that a block may take.
LONGEST = 900

# By the block's first line.
NOT_RUN = {
    "make test": "it is what runs this",
    "pip install": "the environment of the tests has these packages",
    "npm install": "the environment of the tests has these packages",
    "docker build": "there may be no Docker; tests/suite/packaging.rs tries its entry point",
    "sudo make install": "tests/suite/packaging.rs installs into a directory of its own",
    "florence pull": "half a gigabyte; cli/tests/pull.rs tries it on a hub of its own",
    "target/release/florence-load": "it empties a database; `make load` is the same on its own server",
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.M | re.S)


def on_port(language, code, port):
    """The block for a server that has not the port of the text, and keeps nothing."""
    code = code.replace("6379", str(port))
    if language == "sh":
        nothing = '--appendonly no --save "" --dbfilename none.rdb'
        code = code.replace("make run", f"make run ARGS='--port {port} {nothing}'")
        code = code.replace("make demo", "DEMO_ONCE=1 make demo")
        code = f'redis-cli() {{ command redis-cli -p {port} "$@"; }}\n' + code
    return code


def command(language, code, port, directory):
    """What runs a block: the arguments, and what it is to read."""
    if language == "sh":
        return ["bash", "-e", "-c", code], ""
    if language == "redis":
        return ["redis-cli", "--no-raw", "-p", str(port)], code
    if language == "python":
        (directory / "program.py").write_text(code)
        return [PYTHON, directory / "program.py"], ""
    if language == "js":
        for name, package in NODE_PACKAGES.items():
            link = directory / "node_modules" / name
            link.parent.mkdir(exist_ok=True)
            link.exists() or link.symlink_to(ROOT / package)
        (directory / "program.mjs").write_text(code)
        return ["node", directory / "program.mjs"], ""
    raise SystemExit(f"no way to run a block of {language}")


def run(language, code, port, directory):
    """The exit status, and what a terminal shows."""
    arguments, standard_input = command(language, code, port, directory)
    ours, theirs = pty.openpty()
    with tempfile.TemporaryFile() as file:
        file.write(standard_input.encode())
        file.seek(0)
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdin=file, stdout=theirs, stderr=theirs
        )
    os.close(theirs)
    limit = threading.Timer(LONGEST, process.kill)
    limit.start()
    printed = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # nobody has the terminal any more
            break
        if not chunk:
            break
        printed += chunk
    os.close(ours)
    limit.cancel()
    return process.wait(), printed.decode().replace("\r\n", "\n")


def is_as_said(printed, expected):
    pattern = ".*".join(map(re.escape, expected.split("...")))
    return re.fullmatch(pattern, printed, re.S) is not None


class Server:
    """What `make run` starts, on a port and with a directory of its own."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._directory = tempfile.TemporaryDirectory()
        self.directory = Path(self._directory.name)
        self._log = (self.directory / "log").open("w+")
        code = on_port("sh", "make run", self.port)
        self._process = subprocess.Popen(
            ["bash", "-c", code],
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        while not self._is_ready():
            if self._process.poll() is not None:
                raise SystemExit((self.directory / "log").read_text())
            time.sleep(0.1)

    def _is_ready(self):
        ask = ["redis-cli", "-p", str(self.port), "FLORENCE.MODEL"]
        return "ready" in subprocess.run(ask, capture_output=True, text=True).stdout

    def close(self):
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()
        self._log.close()
        self._directory.cleanup()


def check(document, used, server):
    """The faults of one document."""
    text, faults = (ROOT / document).read_text(), []
    for language, code, expected in (match.groups() for match in BLOCK.finditer(text)):
        first = code.splitlines()[0]
        name = f"{document}: {language}: {first}"
        reason = next(
            (reason for start, reason in NOT_RUN.items() if first.startswith(start)), None
        )
        if reason:
            used.update(start for start in NOT_RUN if first.startswith(start))
            print(f"NOT RUN: {name} ({reason})")
            continue
        if first == "make run":
            print(f"ran: {name} (in the background)")
            continue
        code = on_port(language, code, server.port)
        status, printed = run(language, code, server.port, server.directory)
        expected = expected and expected.replace("6379", str(server.port))
        if status != 0 or (expected is not None and not is_as_said(printed, expected)):
            faults.append(
                f"{name}\n  exit status {status}\n  said:\n{expected}\n  printed:\n{printed}"
            )
        else:
            print(f"ran: {name}")
    for name in re.findall(r"\(docs/(\w+\.png)\)", text):
        if f"target/{name}" in text and not filecmp.cmp(
            ROOT / "docs" / name, ROOT / "target" / name, shallow=False
        ):
            faults.append(f"{document} shows docs/{name}, its block draws target/{name}")
    return faults


def main():
    used = set()
    faults = []
    for document in DOCUMENTS:
        server = Server()
        try:
            faults += check(document, used, server)
        finally:
            server.close()
    faults += [f"NOT_RUN names no block: {start}" for start in NOT_RUN.keys() - used]
    print("\n".join(f"FAULT: {fault}" for fault in faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
