#!/usr/bin/env python3
"""Shows what the build for CUDA does on this machine's GPU. Needs no network, no Rust and no other
Python package; where PyTorch and transformers are installed, it compares with them too.

    python3 proof.py [--out DIR] [--minutes 7] [--libraries DIR:DIR] [--emulate] [--only PART ...]

It runs beside payload.tar.xz, which `make gpu-proof` packs with it. Every result is written at once, a
JSON object a line, to results.jsonl in --out; what programs said is in log.txt. Without a GPU every
part says so; `--emulate` runs those that can do without, with the kernels emulated on the host.
"""

import argparse
import datetime
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = ["libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"]
TOKENS = 32


class Proof:
    def __init__(self, args):
        self.args = args
        self.deadline = time.monotonic() + 60 * args.minutes
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = (self.out / "results.jsonl").open("w")
        self.log = (self.out / "log.txt").open("w")
        self.work = Path(tempfile.mkdtemp(prefix="florence-proof-"))
        self.environment = dict(os.environ)
        self.has_gpu = False

    def note(self, part, outcome, **more):
        """Outcomes: ok, failed, no device, not run."""
        line = json.dumps({"part": part, "outcome": outcome, **more})
        print(line if len(line) < 600 else line[:600] + " ...", flush=True)
        self.results.write(line + "\n")
        self.results.flush()
        os.fsync(self.results.fileno())

    def left(self):
        return self.deadline - time.monotonic()

    def run(self, command, seconds, **environment):
        """Runs a program for so long at most: its status, None if it was cut off, and what it said."""
        command = [str(word) for word in command]
        seconds = max(1, min(seconds, self.left()))
        self.log.write(f"\n$ {' '.join(command)}\n")
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds,
                                  env=self.environment | environment)
            status, said, told = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            decode = lambda text: text.decode(errors="replace") if isinstance(text, bytes) else text or ""
            status, said, told = None, decode(error.stdout), decode(error.stderr)
        except OSError as error:
            status, said, told = 127, "", str(error)
        self.log.write(f"{said}{told}\n[{'cut off' if status is None else status}]\n")
        self.log.flush()
        return status, said, told

    def florence(self, part, seconds, *arguments, judge=None, **more):
        """Runs the command line on the device and notes the JSON object that it prints, and what is
        wrong with it: `judge` says."""
        start = time.monotonic()
        status, said, told = self.run([self.work / "florence", *arguments, *self.where()], seconds)
        took = round(time.monotonic() - start, 1)
        lines = said.strip().splitlines()
        if status == 0 and lines:
            found = json.loads(lines[-1])
            wrong = judge(found) if judge else None
            verdict = {"error": wrong} if wrong else {}
            self.note(part, "failed" if wrong else "ok", seconds=took, **more, **verdict, found=found)
            return found
        self.note(part, "failed", seconds=took, **more, status=status, error=(told or said)[-400:])
        return None

    def where(self):
        return ["--kernels", "emulated"] if self.args.emulate else ["--device", "cuda:0"]

    def can_compute(self, part):
        """Whether there is anything to compute on; notes it if not."""
        if self.left() < 5:
            self.note(part, "not run", why="no time is left")
            return False
        if not (self.has_gpu or self.args.emulate):
            self.note(part, "no device")
            return False
        return True


def libraries(proof):
    """Where this machine has CUDA's libraries: LD_LIBRARY_PATH for all that is run."""
    given = [folder for folder in (proof.args.libraries or "").split(":") if folder]
    patterns = ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/local/cuda*/lib64",
                "/usr/local/cuda*/targets/x86_64-linux/lib"]
    packages = ["/usr/lib/python3*/*-packages", "/usr/local/lib/python3*/*-packages",
                "/opt/*/lib/python3*/site-packages", "/opt/*/.venv/lib/python3*/site-packages"]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        packages.insert(0, str(Path(spec.origin).parent.parent))
    patterns += [f"{package}/nvidia/*/lib" for package in packages]
    folders = given + [folder for pattern in patterns for folder in sorted(glob.glob(pattern))]
    found = {name: next((f"{folder}/{name}" for folder in folders if Path(folder, name).exists()), None)
             for name in NEEDED}
    cache = proof.run(["ldconfig", "-p"], 20)[1]
    for name, path in found.items():
        if path is None:
            lines = [line for line in cache.splitlines() if line.strip().startswith(name)]
            found[name] = lines[0].split("=>")[-1].strip() if lines else None
    # A folder of links keeps other libraries of those folders out.
    links = proof.work / "cuda"
    links.mkdir()
    for name, path in found.items():
        if path:
            (links / name).symlink_to(Path(path).resolve())
    before = proof.environment.get("LD_LIBRARY_PATH")
    proof.environment["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(links), str(proof.work / "lib"), before]))
    missing = [name for name, path in found.items() if path is None]
    proof.note("libraries", "failed" if missing else "ok", found=found, missing=missing)


def device(proof):
    query = "name,memory.total,driver_version,compute_cap"
    status, said, _ = proof.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 60)
    gpus = [line.strip() for line in said.splitlines() if line.strip()] if status == 0 else []
    status, doctor, told = proof.run([proof.work / "florence", "doctor"], 60)
    proof.has_gpu = any(line.startswith("cuda:0") for line in doctor.splitlines())
    versions = {}
    for name in ["torch", "transformers"]:
        try:
            versions[name] = importlib.metadata.version(name)
        except Exception:
            versions[name] = None
    outcome = "failed" if status != 0 else "ok" if proof.has_gpu else "no device"
    proof.note("device", outcome, date=datetime.date.today().isoformat(), gpus=gpus, versions=versions,
               doctor=doctor.splitlines(), error=told[-400:], cores=os.cpu_count(), kernel=platform.release(),
               host=platform.processor() or platform.machine())


def kernels(proof):
    """The kernels against formulas in float64: every test of engine/cuda, on the device."""
    for name in ["rows", "products", "vision", "language"]:
        if not proof.can_compute(f"kernels {name}"):
            continue
        where = {} if proof.args.emulate else {"FLORENCE_CUDA_TESTS": "device"}
        start = time.monotonic()
        status, said, told = proof.run([proof.work / f"kernels-{name}"], 120, **where)
        tests = [line.removeprefix("test ").rsplit(" ... ", 1) for line in said.splitlines() if line.startswith("test ")]
        tests = {test[0]: test[1] for test in tests if len(test) == 2}
        failed = [test for test, result in tests.items() if result != "ok"]
        proof.note(f"kernels {name}", "ok" if status == 0 else "failed", seconds=round(time.monotonic() - start, 1),
                   where=where or "emulated", tests=len(tests), failed=failed, status=status,
                   error="" if status == 0 else (said + told)[-1500:])
    part = "compute-sanitizer"
    status, _, _ = proof.run(["compute-sanitizer", "--version"], 20)
    if status != 0 or not proof.has_gpu:
        proof.note(part, "not run", why="there is none here" if status != 0 else "no device")
        return
    for tool, test in [("memcheck", "rows"), ("memcheck", "vision"), ("racecheck", "language")]:
        status, said, told = proof.run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", proof.work / f"kernels-{test}",
             "--skip", "slots_beyond", "--skip", "published_length"], 40, FLORENCE_CUDA_TESTS="device")
        summary = [line for line in (said + told).splitlines() if "SUMMARY" in line]
        outcome = "ok" if status == 0 else "not run" if status is None else "failed"
        proof.note(part, outcome, tool=tool, tests=test, summary=summary[-3:], status=status)


def wrong_answers(found):
    """In float32 every answer has the reference's ids and JSON; in bfloat16 most tokens are the same:
    locations move by a few thousandths."""
    for model in found["models"]:
        cases, name = model["cases"], model["model"]
        if found["arithmetic"].startswith("f32"):
            if not cases == model["equal_ids"] == model["equal_json"] == model["same_in_batches"]:
                return f"{name}: answers differ"
        elif model["equal_tokens"] < 0.8 * model["tokens"] and name == "tiny":
            return f"{name}: {model['equal_tokens']} of {model['tokens']} tokens are the same"
    return None


def wrong_stages(found):
    exact = found["arithmetic"].startswith("f32")
    for stage in found["stages"]:
        if stage["cosine"] is None or not stage["cosine"] > (0.99999 if exact else 0.99):
            return f"{stage['stage']}: cosine {stage['cosine']}"
        if exact and not stage["largest"] < 1e-2:
            return f"{stage['stage']}: {stage['largest']} deviations away"
    return None


def answers(proof):
    """Ids and JSON of models/tiny and of random checkpoints, against the reference's."""
    step = ["--step", "40"] if proof.args.emulate else []
    for precision in ["f32", "bf16"]:
        part = f"answers {precision}"
        if proof.can_compute(part):
            proof.florence(part, 590 if proof.args.emulate else 90, "prove", "answers", "--goldens",
                           proof.work / "goldens", "--precision", precision, *step, precision=precision,
                           judge=wrong_answers)


def stages(proof):
    """Base and large shape with made-up weights, beside this machine's processor in float32."""
    if proof.args.emulate:
        proof.note("stages", "not run", why="emulated, it takes hours")
        return
    for shape, precision in [("base", "f32"), ("base", "bf16"), ("large", "f32"), ("large", "bf16")]:
        part = f"stages {shape} {precision}"
        if proof.can_compute(part):
            proof.florence(part, 60, "prove", "stages", "--synthetic", shape, "--precision", precision,
                           judge=wrong_stages)


def transformers_here():
    return all(importlib.util.find_spec(name) for name in ["torch", "transformers", "tokenizers", "safetensors", "PIL"])


def fidelity(proof):
    """A random checkpoint of base shape through transformers in float32, and through ours on the device."""
    part = "fidelity base"
    if not proof.can_compute(part):
        return
    if proof.args.emulate or not transformers_here():
        why = "emulated, it takes hours" if proof.args.emulate else "PyTorch or transformers is missing here"
        proof.note(part, "not run", why=why)
        return
    status, said, told = proof.run(
        [sys.executable, proof.work / "tools/fidelity.py", "base", "--florence", proof.work / "florence", "--work",
         proof.work / "fidelity", "--tokenizer", proof.work / "tiny", "--device", "cuda:0", "--prompts", "1", "--picture",
         proof.work / "samples/shapes.png"], 100)
    lines = [line for line in said.splitlines() if line.startswith(("equal", "DIFFERENT"))]
    proof.note(part, "ok" if status == 0 else "failed", lines=lines, status=status, error=told[-400:])


class Transformers:
    """transformers on the same GPU, in a process of its own that answers one line for each."""

    def __init__(self, proof):
        self.process = subprocess.Popen([sys.executable, __file__, "--serve-transformers", proof.work / "tools"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=proof.log, text=True)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else {"error": "it ended"}

    def end(self):
        self.process.kill()


def serve_transformers(tools):
    """Times whole answers of a random checkpoint of base shape; the other end of Transformers."""
    sys.path.insert(0, tools)
    import fidelity as shapes
    import torch
    from transformers import Florence2ForConditionalGeneration, GenerationConfig

    models = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            kind, batch, beams = question["precision"], question["batch"], question["beams"]
            if kind not in models:
                models.clear()
                torch.cuda.empty_cache()
                model = Florence2ForConditionalGeneration(shapes.config("base"))
                models[kind] = model.to("cuda", {"f32": torch.float32, "bf16": torch.bfloat16}[kind]).eval()
            model = models[kind]
            ids = torch.tensor([[model.config.image_token_id] * 577 + [0, 574, 22486, 5, 8720, 2]] * batch, device="cuda")
            pixels = torch.randn(batch, 3, 768, 768, device="cuda").to(model.dtype)
            settings = GenerationConfig(num_beams=beams, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                                        decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, bos_token_id=0)
            times = []
            with torch.no_grad():
                for _ in range(3):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                                   generation_config=settings)
                    torch.cuda.synchronize()
                    times.append(1e3 * (time.perf_counter() - start))
            answer = {"total_ms": min(times[1:]), "all_ms": times}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(answer), flush=True)


def speed(proof):
    """Stages of whole answers of fixed length, beside transformers where it is there, in turns."""
    other = None
    if proof.has_gpu and not proof.args.emulate:
        if transformers_here():
            other = Transformers(proof)
        else:
            proof.note("speed transformers", "not run", why="PyTorch or transformers is missing here")
    shapes = [(1, 1), (1, 3), (16, 1), (16, 3), (64, 1)] if not proof.args.emulate else [(1, 1)]
    for precision in ["bf16", "f32"]:
        for batch, beams in shapes:
            part = f"speed {precision}, batch {batch}, {beams} beams"
            if not proof.can_compute(part):
                continue
            model = [] if proof.args.emulate else ["--synthetic", "base"]
            rounds = "1" if proof.args.emulate else "3"
            proof.florence(part, 400 if proof.args.emulate else 40, "bench", *model, "--precision", precision, "--beams",
                           beams, "--batch", batch, "--tokens", 2 if proof.args.emulate else TOKENS, "--rounds", rounds,
                           "--json", precision=precision, batch=batch, beams=beams)
            if other and proof.left() > 30:
                answer = other.ask(precision=precision, batch=batch, beams=beams)
                outcome = "failed" if "error" in answer else "ok"
                proof.note(part + ", transformers", outcome, precision=precision, batch=batch, beams=beams, found=answer)
    if other:
        other.end()


def throughput(proof):
    """Pictures a second, from the bytes of a JPEG file to the answer."""
    decoders = max(2, (os.cpu_count() or 2) - 2)
    model = [] if proof.args.emulate else ["--synthetic", "base"]
    for precision, batch in [("bf16", 16), ("bf16", 64), ("f32", 16)][: 1 if proof.args.emulate else 3]:
        part = f"throughput {precision}, batch {batch}"
        if proof.can_compute(part):
            proof.florence(part, 400 if proof.args.emulate else 45, "prove", "throughput", *model, "--precision", precision,
                           "--seconds", 2 if proof.args.emulate else 8, "--tokens", 2 if proof.args.emulate else TOKENS,
                           "--decoders", decoders, "--batch", batch, "--picture", proof.work / "samples/poster.jpg")


class Redis:
    """As much of the protocol as this needs."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.file = self.socket.makefile("rb")

    def send(self, *words):
        words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        parts = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self.socket.sendall(b"*%d\r\n%s" % (len(words), parts))

    def receive(self):
        line = self.file.readline().rstrip(b"\r\n")
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            return RuntimeError(rest.decode(errors="replace"))
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if int(rest) < 0 else self.file.read(int(rest) + 2)[:-2].decode(errors="replace")
        if kind == b"*":
            return None if int(rest) < 0 else [self.receive() for _ in range(int(rest))]
        raise ConnectionError(f"unexpected reply {line!r}")

    def call(self, *words):
        self.send(*words)
        return self.receive()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(proof, folder, *settings):
    folder.mkdir()
    port = free_port()
    command = [proof.work / "redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", "",
               "--logfile", folder / "log", "--loadmodule", proof.work / "libflorence.so", *settings]
    process = subprocess.Popen([str(word) for word in command], env=proof.environment, stdout=proof.log, stderr=proof.log)
    for _ in range(100):
        try:
            return process, Redis(port), port
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.kill()
    log = folder / "log"
    raise RuntimeError(f"redis-server does not start: {log.read_text()[-600:] if log.exists() else ''}")


def model_state(redis, seconds):
    """FLORENCE.MODEL once loading has ended."""
    until = time.monotonic() + seconds
    while True:
        reply = redis.call("FLORENCE.MODEL")
        model = dict(zip(reply[::2], reply[1::2]))
        if model["state"] != "loading" or time.monotonic() > until:
            return model
        time.sleep(0.1)


def module(proof):
    """1,000 jobs through redis-server, with saves to disk while they run."""
    part = "module"
    if proof.left() < 10:
        proof.note(part, "not run", why="no time is left")
        return
    device = [] if proof.args.emulate else ["device", "cuda"]
    process, redis, port = start_server(proof, proof.work / "server", *device, "precision", "auto", "result-cache-bytes", "0",
                                        "feature-cache-bytes", "0")
    try:
        model = model_state(redis, 60)
        if model["state"] != "ready":
            # Without a device the error has to be told, to SUBMIT too, and the server goes on.
            refused = redis.call("FLORENCE.SUBMIT", "*", "DATA", b"x", "<OD>")
            alive = redis.call("PING")
            told = isinstance(refused, RuntimeError) and str(refused).startswith("NOMODEL")
            fine = told and alive == "PONG" and not proof.has_gpu
            proof.note(part, "no device" if fine else "failed", model=model, submit=str(refused), ping=str(alive))
            return
        cases = json.loads((proof.work / "goldens/tiny.json").read_text())["cases"]
        jobs = 60 if proof.args.emulate else 1000
        pings, over = [], threading.Event()

        def ping():
            connection = Redis(port)
            while not over.is_set():
                start = time.perf_counter()
                connection.call("PING")
                pings.append(1e3 * (time.perf_counter() - start))
                time.sleep(0.005)

        thread = threading.Thread(target=ping)
        thread.start()
        start, saves, refused = time.monotonic(), [], 0
        for i in range(jobs):
            case = cases[i % len(cases)]
            picture = (proof.work / "goldens/pictures" / case["picture"]).read_bytes()
            reply = redis.call("FLORENCE.SUBMIT", f"job:{i}", "DATA", picture, case["prompt"], "BEAMS", case["beams"] or 3)
            refused += isinstance(reply, RuntimeError)
            if i % max(1, jobs // 4) == 0:
                saves.append(str(redis.call("BGSAVE")))
        states, different, tokens = {}, 0, 0
        for i in range(jobs):
            while True:
                done = redis.call("FLORENCE.WAIT", f"job:{i}", 5)
                if done is not None or time.monotonic() - start > min(90, proof.left()):
                    break
                if i % 50 == 0:
                    saves.append(str(redis.call("BGSAVE")))
            if not isinstance(done, list):
                states[str(done)] = states.get(str(done), 0) + 1
                continue
            job = dict(zip(done[::2], done[1::2]))
            states[job["state"]] = states.get(job["state"], 0) + 1
            case = cases[i % len(cases)]
            different += case["no_repeat_ngram"] is None and job["text"] != case["text"]
            if i % 200 == 0:
                saves.append(str(redis.call("BGSAVE")))
        seconds = time.monotonic() - start
        over.set()
        thread.join()
        pings.sort()
        info = redis.call("INFO", "florence")
        persistence = redis.call("INFO", "persistence")
        shown = [line for line in info.splitlines() if line.startswith(("florence_engine_", "florence_panics", "florence_threads"))]
        saved = [line for line in persistence.splitlines() if line.startswith("rdb_last_bgsave_status")]
        fine = states == {"done": jobs} and saved == ["rdb_last_bgsave_status:ok"]
        proof.note(part, "ok" if fine else "failed", model=model, jobs=jobs, seconds=round(seconds, 2), refused=refused,
                   jobs_a_second=round(jobs / seconds, 1), states=states, texts_that_differ=different, saves=saves[:12],
                   saved=saved, engines=shown, pings=len(pings), ping_p50_ms=round(statistics.median(pings), 3),
                   ping_p99_ms=round(pings[int(len(pings) * 0.99)], 3))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        log = proof.work / "server/log"
        said = log.read_text() if log.exists() else ""
        proof.log.write(said[-4000:])
        crashed = "CRASHED" in said or "REDIS BUG REPORT" in said
        proof.note("module, its end", "failed" if process.returncode or crashed else "ok", status=process.returncode)


def fallback(proof):
    """`auto` runs where there is no device too, and says so."""
    process, redis, _ = start_server(proof, proof.work / "fallback", "device", "auto")
    try:
        model = model_state(redis, 60)
        log = (proof.work / "fallback/log").read_text()
        told = [line.split(" * ")[-1] for line in log.splitlines() if "runs on the CPU" in line]
        expected = "cuda" if proof.has_gpu else "cpu"
        fine = model["state"] == "ready" and model["device"].startswith(expected) and bool(told) != proof.has_gpu
        proof.note("auto", "ok" if fine else "failed", model=model, log=told)
    finally:
        process.kill()
        process.wait()


PARTS = [kernels, answers, module, stages, speed, throughput, fidelity, fallback]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--out", default=os.environ.get("OUT") or "proof-out")
    args.add_argument("--minutes", type=float, default=7)
    args.add_argument("--libraries", help="folders where CUDA's libraries are looked for first")
    args.add_argument("--emulate", action="store_true")
    args.add_argument("--only", nargs="*", choices=[part.__name__ for part in PARTS])
    args.add_argument("--serve-transformers", help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.serve_transformers:
        serve_transformers(args.serve_transformers)
        return
    proof = Proof(args)
    with tarfile.open(HERE / "payload.tar.xz") as payload:
        payload.extractall(proof.work)
    for part in [libraries, device, *PARTS]:
        if part in PARTS and args.only and part.__name__ not in args.only:
            continue
        start = time.monotonic()
        try:
            part(proof)
        except Exception as error:
            proof.note(part.__name__, "failed", error=f"{type(error).__name__}: {error}"[:600])
        proof.log.write(f"\n{part.__name__}: {time.monotonic() - start:.1f} s\n")
    proof.note("end", "ok", minutes_left=round(proof.left() / 60, 1))


if __name__ == "__main__":
    main()
