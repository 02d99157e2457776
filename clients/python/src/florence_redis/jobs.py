"""Jobs and errors, and the commands of every call, which both clients share.

Nothing in here reads or writes. A call is a generator that yields commands, is sent their replies
and returns what the caller gets, so the two clients differ only in how they carry commands.
Replies may be bytes or text, flat lists (RESP2) or maps (RESP3).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Generic, Literal, Union, cast

from redis.exceptions import ResponseError

from .questions import (
    Image,
    ImageKey,
    Question,
    Step,
    T,
    T_co,
    image_arguments,
    option_arguments,
    read_answer,
    read_step,
)

if TYPE_CHECKING:
    import supervision

__all__ = [
    "ERRORS",
    "AttemptTimeoutError",
    "BadPromptError",
    "BusyError",
    "CrashError",
    "DeniedError",
    "FailedAttempt",
    "Failure",
    "FetchError",
    "FlorenceError",
    "ImageError",
    "InternalError",
    "InvalidJobError",
    "Job",
    "JobCancelledError",
    "JobExistsError",
    "JobExpiredError",
    "JobKey",
    "JobState",
    "Listed",
    "NoJobError",
    "NoModelError",
    "NotAJobError",
    "NotEndedError",
    "Piece",
    "PromptError",
    "Ranked",
    "WaitTimeoutError",
    "WrongTypeError",
    "detections",
]


class FlorenceError(Exception):
    """What the module says no with, and jobs that ended without an answer.

    ``code`` is the error's first word. Errors of the connection, and of the server itself, are
    redis-py's own, and so is ``ERR``, which is everybody's: nothing tells the module's from others.
    """

    code = ""

    def __init__(self, message: str, job: Job[Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        #: The job that ended so; none where a command was refused.
        self.job = job

    @property
    def retryable(self) -> bool:
        """Whether the same may succeed later."""
        return bool(self.job and self.job.error and self.job.error.retryable)


class BadPromptError(FlorenceError):
    """No task of Florence-2, or a text where none is taken."""

    code = "BADPROMPT"


class DeniedError(FlorenceError):
    """A source or an address that is not permitted."""

    code = "DENIED"


class JobExistsError(FlorenceError):
    """Another request lives under this key."""

    code = "JOBEXISTS"


class WrongTypeError(FlorenceError):
    """The key holds something else than a job."""

    code = "WRONGTYPE"


class NotAJobError(FlorenceError):
    """The key is a hash, but no job."""

    code = "NOTAJOB"


class NoJobError(FlorenceError):
    """There is no such job, or no longer: it was deleted, or its time is over."""

    code = "NOJOB"


class BusyError(FlorenceError):
    """The queue is full; nothing was stored."""

    code = "BUSY"
    #: Seconds after which to try again.
    retry_after = 1.0

    @property
    def retryable(self) -> bool:
        return True


class NoModelError(FlorenceError):
    """The model is not the one that was asked for, or cannot be loaded."""

    code = "NOMODEL"


class FetchError(FlorenceError):
    """The picture could not be downloaded or read."""

    code = "FETCH"


class ImageError(FlorenceError):
    """Format, size or damage of the picture."""

    code = "IMAGE"


class PromptError(FlorenceError):
    """Refused by the model's tokenizer."""

    code = "PROMPT"


class AttemptTimeoutError(FlorenceError):
    """The attempt took longer than the job's ``attempt_timeout``."""

    code = "TIMEOUT"


class CrashError(FlorenceError):
    """The server died twice while working on the job."""

    code = "CRASH"


class InvalidJobError(FlorenceError):
    """The job's hash holds what the module does not write: somebody else has written it."""

    code = "INVALID"


class InternalError(FlorenceError):
    """A fault of the module."""

    code = "INTERNAL"


class JobCancelledError(FlorenceError):
    """The job was cancelled."""

    code = "CANCELLED"


class JobExpiredError(FlorenceError):
    """The job was not started in time."""

    code = "EXPIRED"


class NotEndedError(FlorenceError):
    """The answer was asked for before the job ended."""

    code = "NOTENDED"


class WaitTimeoutError(FlorenceError, TimeoutError):
    """The time to wait has passed; the jobs go on. ``keys`` are those that have not ended."""

    code = "WAITTIMEOUT"

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


def _family(error: type[FlorenceError]) -> list[type[FlorenceError]]:
    return [error, *(below for child in error.__subclasses__() for below in _family(child))]


#: Error classes by code.
ERRORS = {error.code: error for error in _family(FlorenceError) if error.code}


def _refusal(error: Exception) -> Exception:
    """A command's error as one of ours; errors of others stay what they are."""
    code, _, message = str(error).partition(" ")
    if not isinstance(error, ResponseError) or code not in ERRORS:
        return error
    return ERRORS[code](message)


def waited_too_long(keys: Sequence[str]) -> WaitTimeoutError:
    """What a caller gets whose time to wait is over."""
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return WaitTimeoutError(f"not ended in time: {shown}", keys)


class JobKey(str, Generic[T_co]):
    """The key of a job: a string, whose type says what the answer is."""

    __slots__ = ()


JobState = Literal[
    "queued", "fetching", "running", "retrying", "done", "failed", "cancelled", "expired"
]


@dataclass(frozen=True)
class Failure:
    """Why a job gave no answer."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt that was followed by another."""

    attempt: int
    at: datetime
    code: str
    message: str


@dataclass(frozen=True)
class Ranked:
    """One of the best beams."""

    #: By which they are ranked: a logarithm, at most 0.
    score: float
    #: What the model has written.
    text: str
    #: As the job's answer to the question.
    answer: Any


@dataclass(frozen=True)
class Job(Generic[T_co]):
    """A job as it was when the server told of it."""

    key: JobKey[T_co]
    state: JobState
    prompts: tuple[str, ...]
    #: Where the picture comes from, without what gives access to it.
    image: str
    attempts: int
    submitted_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    #: When a job is started that waits for a moment: for its delay to pass, or its next attempt.
    due_at: datetime | None = None
    retry_at: datetime | None = None
    #: The answer's JSON, as the module gives it.
    result: dict[str, Any] | None = field(default=None, repr=False)
    #: What a chain asked after the prompt: word and prompt.
    steps: tuple[tuple[str, str], ...] = ()
    #: What the model has written, for each prompt; of a chain its steps have that, and the scores.
    texts: tuple[str, ...] = field(default=(), repr=False)
    #: How sure the model was, 0 to 1, for each prompt: of each label, or of the whole text.
    scores: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    #: The best beams for each prompt, the answer first, where ``nbest`` asked for them.
    nbest: tuple[tuple[Ranked, ...], ...] = field(default=(), repr=False)
    #: Of the picture, as the answer's coordinates mean it.
    width: int | None = None
    height: int | None = None
    error: Failure | None = None
    #: Of earlier attempts, the newest ten.
    errors: tuple[FailedAttempt, ...] = field(default=(), repr=False)
    model: str | None = None
    #: result, features or miss: what the answer was spared.
    cache: str | None = None
    phase: str | None = None
    position: int | None = None
    tokens: int | None = None
    #: Key of the stream that the text goes to while it is generated.
    stream: str | None = None
    eta_ms: int | None = None
    queue_ms: int | None = None
    fetch_ms: int | None = None
    infer_ms: int | None = None
    _chain: tuple[Step, ...] = field(default=(), repr=False)

    @property
    def has_ended(self) -> bool:
        """Whether the job will not change any more, unless it is queued again."""
        return self.state in ("done", "failed", "cancelled", "expired")

    @property
    def answer(self) -> T_co:
        """The answer, or as an exception why there is none.

        Of ``several`` a tuple of answers, of a ``chain`` its steps.
        """
        if self.result is None:
            raise self.why_not()
        if self._chain:
            return cast(T_co, self._chain)
        with _reading(self.key, self):
            answers = _answers(self.prompts, self.result)
        return cast(T_co, answers[0] if len(answers) == 1 else answers)

    def why_not(self) -> FlorenceError:
        if self.error:
            known = ERRORS.get(self.error.code, FlorenceError)
            return known(f"{self.key}: {self.error.message}", self)
        ends = {"cancelled": JobCancelledError, "expired": JobExpiredError}
        known = ends.get(self.state, NotEndedError)
        return known(f"{self.key} is {self.state}", self)


@dataclass(frozen=True)
class Listed:
    """A job in a list of many."""

    key: JobKey[Any]
    state: JobState
    #: When it is started, if it waits for a moment.
    due_at: datetime | None = None
    finished_at: datetime | None = None
    #: Why it failed: the code of the error.
    code: str | None = None
    #: Key of the stream that the text goes to while it is generated.
    stream: str | None = None


@dataclass(frozen=True)
class Piece:
    """What follows in the text of an answer: all pieces together are the text.

    Another attempt begins all texts anew.
    """

    attempt: int
    #: Of a chain, counted from 0.
    step: int
    #: Which question of the step.
    index: int
    text: str


def detections(job: Job[Any]) -> supervision.Detections:
    """The answer for supervision, which must be installed (``pip install "supervision>=0.26"``).

    Only what has boxes or polygons can be taken, and one prompt; the scores are the confidence.
    """
    import numpy
    import supervision

    if job.result is None or job.width is None or job.height is None:
        raise job.why_not()
    if not any(answer for columns in job.result.values() for answer in _columns(columns)):
        # Nothing was found; supervision takes no empty lists.
        return supervision.Detections.empty()
    found = supervision.Detections.from_vlm(
        supervision.VLM.FLORENCE_2, result=job.result, resolution_wh=(job.width, job.height)
    )
    found.confidence = numpy.array(job.scores[0], dtype=numpy.float32)
    return found


def _columns(answer: Any) -> Iterable[Any]:
    return answer.values() if isinstance(answer, dict) else [answer]


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _texts(value: Any) -> Any:
    """The same in lists and maps, and in those that they hold."""
    if isinstance(value, list):
        return [_texts(one) for one in value]
    if isinstance(value, dict):
        return {_text(name): _texts(one) for name, one in value.items()}
    return _text(value)


def _mapping(reply: Any) -> dict[str, Any]:
    """RESP3 gives a map, RESP2 a flat list."""
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2])
    return {_text(name): _texts(value) for name, value in pairs}


def _time(milliseconds: int | None) -> datetime | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)


@contextmanager
def _reading(key: str, job: Job[Any] | None = None) -> Iterator[None]:
    """Whatever may be wrong with a job that somebody else has written is an error of that job."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise InvalidJobError(f"{key}: what is stored cannot be read ({error!r})", job) from error


def _prompts(text: str) -> tuple[str, ...]:
    """One, or a JSON list of them. With ``florence.prompts any`` one may begin with a bracket."""
    try:
        prompts = json.loads(text)
    except ValueError:
        return (text,)
    if isinstance(prompts, list) and prompts and all(isinstance(one, str) for one in prompts):
        return tuple(prompts)
    return (text,)


def _answers(prompts: Sequence[str], result: Mapping[str, Any]) -> tuple[Any, ...]:
    if len(prompts) == 1:
        return (read_answer(result),)
    return tuple(read_answer(result, prompt) for prompt in prompts)


def _job(reply: Any) -> Job[Any] | None:
    if reply is None:
        return None
    got = _mapping(reply)
    with _reading(got["id"]):
        return _read_job(got)


def _read_job(got: dict[str, Any]) -> Job[Any]:
    got.setdefault("stream", None)
    prompts, text = _prompts(got["prompt"]), got["text"]
    steps = json.loads(got["steps"]) if got["steps"] else []
    got["steps"] = tuple(pair for step in steps for pair in step.items())
    got["key"], got["prompts"] = JobKey[Any](got["id"]), prompts
    for name in ("error", "errors", "result", "scores"):
        got[name] = json.loads(got[name]) if got[name] else None
    got["nbest"] = tuple(
        tuple(Ranked(one["score"], one["text"], read_answer(one["result"])) for one in best)
        for best in json.loads(got.get("nbest") or "[]")
    )
    got["errors"] = tuple(
        FailedAttempt(**{**error, "at": _time(error["at"])}) for error in got["errors"] or []
    )
    got["error"] = Failure(**got["error"]) if got["error"] else None
    scores, got["_chain"], got["texts"] = got["scores"] or [], (), ()
    if steps:
        if got["result"]:
            rows = zip(got["result"]["steps"], json.loads(text), scores)
            got["_chain"] = tuple(read_step(*row) for row in rows)
        scores = []
    elif text is not None:
        got["texts"] = tuple(json.loads(text)) if len(prompts) > 1 else (text,)
    got["scores"] = tuple(map(tuple, scores if len(prompts) > 1 else [scores] if scores else []))
    for name in ("submitted_at", "started_at", "finished_at", "due_at", "retry_at"):
        got[name] = _time(got[name])
    return Job(**{known.name: got[known.name] for known in fields(Job)})


def new_key(prefix: str, image: Image) -> str:
    """A key that nobody else has: in a cluster, of a node by chance, or of the image key's."""
    number = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    name = "".join(
        "0123456789ABCDEFGHJKMNPQRSTVWXYZ"[number >> 5 * i & 31] for i in range(25, -1, -1)
    )
    return (
        f"{prefix}{{{_tag(image.name)}}}:{name}" if isinstance(image, ImageKey) else prefix + name
    )


def _tag(key: str) -> str:
    """What a cluster puts keys into slots by: what is in the first braces, if anything is."""
    _, brace, rest = key.partition("{")
    tag, end, _ = rest.partition("}")
    return tag if brace and end and tag else key


#: As many keys as WAIT, CANCEL and RETRY take.
_MOST_KEYS = 1000


def _groups(keys: Sequence[str], cluster: bool) -> list[Sequence[str]]:
    """Keys that one command can take: in a cluster those of one slot."""
    by_tag: dict[str, list[str]] = {}
    for key in keys:
        by_tag.setdefault(_tag(key) if cluster else "", []).append(key)
    return [
        group[start : start + _MOST_KEYS]
        for group in by_tag.values()
        for start in range(0, len(group), _MOST_KEYS)
    ]


@dataclass(frozen=True)
class Commands:
    """Commands that can be sent together."""

    all: Sequence[Sequence[Any]]
    #: A single one, to every master of a cluster: the reply is then a list, of one from each.
    everywhere: bool = False
    #: A single one, whose reply is bytes, also where the client decodes text.
    binary: bool = False


#: Replies come in the order of the commands; one that was refused is an exception in its place.
Call = Generator[Commands, "list[Any]", T]


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise _refusal(reply)
    return reply


def submit(
    key: str,
    image: Image,
    question: Question[T],
    options: Mapping[str, Any],
) -> Call[JobKey[T]]:
    """FLORENCE.SUBMIT. Sent again with the same key, after a lost reply, it changes nothing."""
    prompts: list[Any] = list(question.prompts)
    if len(prompts) != 1:
        prompts = ["PROMPTS", len(prompts), *prompts]
    steps = [part for step in question.steps for part in step]
    arguments = [*image_arguments(image), *prompts, *steps, *option_arguments(options)]
    (reply,) = yield Commands([["FLORENCE.SUBMIT", key, *arguments]])
    return JobKey(_text(_checked(reply)))


def get(key: JobKey[T]) -> Call[Job[T] | None]:
    """FLORENCE.GET."""
    (reply,) = yield Commands([["FLORENCE.GET", key]])
    return _job(_checked(reply))


def change(command: str, keys: Sequence[str], cluster: bool) -> Call[int]:
    """FLORENCE.CANCEL or RETRY: how many jobs it changed."""
    groups = _groups(keys, cluster)
    if not groups:
        return 0
    replies = yield Commands([[command, *group] for group in groups])
    return sum(_checked(reply) for reply in replies)


def listed(state: str | None, count: int | None) -> Call[list[Listed]]:
    """FLORENCE.JOBS of every node; jobs that have ended are in the order of their ends."""
    arguments: list[Any] = [] if state is None else ["STATE", state]
    arguments += [] if count is None else ["COUNT", count]
    (replies,) = yield Commands([["FLORENCE.JOBS", *arguments]], everywhere=True)
    found = [
        Listed(
            JobKey(job["id"]),
            job["state"],
            _time(job.get("due_at")),
            _time(job.get("finished_at")),
            job.get("code"),
            job.get("stream"),
        )
        for reply in replies
        for job in map(_mapping, _checked(reply))
    ]
    return sorted(found, key=lambda job: -job.finished_at.timestamp() if job.finished_at else 0)


def stats() -> Call[list[dict[str, Any]]]:
    """FLORENCE.STATS: a map of each node."""
    (replies,) = yield Commands([["FLORENCE.STATS"]], everywhere=True)
    return [_mapping(_checked(reply)) for reply in replies]


def model() -> Call[list[dict[str, Any]]]:
    """FLORENCE.MODEL: a map of each node, with one of each of its models."""
    (replies,) = yield Commands([["FLORENCE.MODEL"]], everywhere=True)
    nodes = [_mapping(_checked(reply)) for reply in replies]
    return [{**node, "models": list(map(_mapping, node["models"]))} for node in nodes]


def tables(what: str) -> Call[list[list[dict[str, Any]]]]:
    """FLORENCE.STATS LATENCY or JOBS: the rows of each node."""
    (replies,) = yield Commands([["FLORENCE.STATS", what]], everywhere=True)
    return [[_mapping(row) for row in _checked(reply)] for reply in replies]


def thumbnail(key: str) -> Call[bytes | None]:
    """The job's small picture, which is a field of its hash."""
    (reply,) = yield Commands([["HGET", key, "thumbnail"]], binary=True)
    return cast("bytes | None", _checked(reply))


class Told:
    """How far the pieces of a job have been read."""

    #: Seconds between two looks.
    PAUSE = 0.05
    _COUNT = 1000

    def __init__(self, key: str) -> None:
        self.key = key
        self.has_ended = False
        self._stream: str | None = None
        self._last = "-"

    def look(self) -> Call[list[Piece]]:
        """What is new. The job is looked at first: its end comes into the stream with it."""
        if self._stream is None:
            job = yield from get(JobKey[Any](self.key))
            if job is None:
                raise NoJobError(f"no such job: {self.key}")
            if job.stream is None:
                raise ValueError(f"{self.key} has no stream: submit it with tokens=")
            self._stream = job.stream
        entries = ["XRANGE", self._stream, self._last, "+", "COUNT", self._COUNT]
        replies = yield Commands([["FLORENCE.GET", self.key], entries])
        job, found = _job(_checked(replies[0])), _checked(replies[1])
        # It may have ended, and be gone by now: what it left is read all the same.
        self.has_ended = (job is None or job.has_ended) and len(found) < self._COUNT
        if found:
            self._last = "(" + _text(found[-1][0])
        told = [_mapping(fields) for _, fields in found]
        return [
            Piece(int(one["attempt"]), int(one["step"]), int(one["index"]), one["text"])
            for one in told
            if one.get("job") == self.key and "text" in one
        ]


#: A job that has ended, or why there will be none.
End = Union[Job[Any], Exception]


def look(keys: Sequence[str], cluster: bool, seconds: float) -> Call[dict[str, End]]:
    """Waits a moment for some of the jobs, or not at all, and tells their ends, the first first.

    FLORENCE.WAIT tells of the first of its keys at once, but of missing keys nothing while it has
    others, and it takes keys of one slot only; so where it has no news, FLORENCE.GET asks for all.
    """
    groups = _groups(keys, cluster)
    if len(groups) > 1:
        # All keys are asked for each time: about a thousand times a second at most.
        seconds = min(seconds, 0.1 + len(keys) / 1000)
    if seconds > 0:
        # Of nothing but zeros the server would make a wait for ever.
        seconds = max(seconds, 0.001)
        (reply,) = yield Commands([["FLORENCE.WAIT", *groups[0], f"{seconds:.3f}"]])
        if isinstance(reply, Exception) and not isinstance(_refusal(reply), FlorenceError):
            raise reply
        if reply is not None and not isinstance(reply, Exception) and len(groups) == 1:
            key = _mapping(reply)["id"]
            end = _end(key, reply)
            return {key: end} if end else {}
    replies = yield Commands([["FLORENCE.GET", key] for key in keys])
    ends = [(key, _end(key, reply)) for key, reply in zip(keys, replies)]
    return dict(sorted(((key, end) for key, end in ends if end), key=_finish))


def _end(key: str, reply: Any) -> End | None:
    if isinstance(reply, Exception):
        return _refusal(reply)
    try:
        job = _job(reply)
    except InvalidJobError as error:
        return error
    if job is None:
        return NoJobError(f"no such job: {key}")
    return job if job.has_ended else None


def _finish(entry: tuple[str, End]) -> float:
    _, end = entry
    if isinstance(end, Job) and end.finished_at:
        return end.finished_at.timestamp()
    return 0.0


def slice_below(socket_timeout: float | None) -> float:
    """How long one WAIT may take: the reply must be there well before the socket's time-out."""
    return min(1.0, socket_timeout / 2) if socket_timeout else 1.0
