"""What can be asked about a picture, and what the answers are."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    NamedTuple,
    Protocol,
    TypedDict,
    TypeVar,
    Union,
    overload,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import AsyncFlorence, Florence

__all__ = [
    "Box",
    "Boxes",
    "BoxesAndPolygons",
    "Image",
    "ImageKey",
    "Options",
    "Part",
    "Point",
    "Polygon",
    "Polygons",
    "Quads",
    "Question",
    "Region",
    "Step",
    "chain",
    "crop",
    "each",
    "prompt",
    "several",
    "tasks",
    "then",
]

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
X_contra = TypeVar("X_contra", contravariant=True)


@dataclass(frozen=True)
class ImageKey:
    """A string key of the server that holds a picture's bytes."""

    name: str


#: Text is an address that the server reads: a URL, or a path below one of its ``file-roots``.
#: Bytes are sent, and a :class:`pathlib.Path` is read here and sent.
Image = Union[str, bytes, bytearray, memoryview, Path, ImageKey]


def image_arguments(image: Image) -> list[Any]:
    if isinstance(image, str):
        return [image]
    if isinstance(image, ImageKey):
        return ["KEY", image.name]
    if isinstance(image, Path):
        return ["DATA", image.read_bytes()]
    if not isinstance(image, (bytes, bytearray, memoryview)):
        # bytes() would make some of a number, or of a list.
        kind = type(image).__name__
        raise TypeError(f"a picture is a Path, bytes, an address or an ImageKey, and no {kind}")
    return ["DATA", bytes(image)]


class Region(NamedTuple):
    """A part of a picture, in thousandths of its width and height, 0 to 999."""

    x1: int
    y1: int
    x2: int
    y2: int

    def __str__(self) -> str:
        return "".join(f"<loc_{place}>" for place in self)


class Box(NamedTuple):
    """A rectangle, in pixels of the picture."""

    x1: float
    y1: float
    x2: float
    y2: float

    def region(self, size: tuple[int, int]) -> Region:
        """The same as a region of a picture of this width and height."""
        width, height = size

        def place(pixels: float, whole: int) -> int:
            return min(999, max(0, int(pixels * 1000 / whole)))

        return Region(
            place(self.x1, width),
            place(self.y1, height),
            place(self.x2, width),
            place(self.y2, height),
        )


class Point(NamedTuple):
    """A place in the picture, in pixels."""

    x: float
    y: float


#: The corners of a shape.
Polygon = tuple[Point, ...]


def _points(flat: Sequence[float]) -> Polygon:
    return tuple(Point(x, y) for x, y in zip(flat[::2], flat[1::2]))


def _shapes(found: Iterable[Iterable[Sequence[float]]]) -> tuple[tuple[Polygon, ...], ...]:
    return tuple(tuple(_points(part) for part in shape) for shape in found)


@dataclass(frozen=True)
class Boxes:
    """Rectangles and what each is."""

    bboxes: tuple[Box, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Quads:
    """Words and the four corners of each."""

    quad_boxes: tuple[Polygon, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Polygons:
    """Shapes, each of one or more polygons, and what each is."""

    polygons: tuple[tuple[Polygon, ...], ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class BoxesAndPolygons:
    """What was found as rectangles, and what was found as shapes."""

    bboxes: tuple[Box, ...]
    bboxes_labels: tuple[str, ...]
    polygons: tuple[tuple[Polygon, ...], ...]
    polygons_labels: tuple[str, ...]


def _boxes(answer: Mapping[str, Any]) -> Boxes:
    return Boxes(tuple(Box(*box) for box in answer["bboxes"]), tuple(answer["labels"]))


def _quads(answer: Mapping[str, Any]) -> Quads:
    return Quads(tuple(_points(quad) for quad in answer["quad_boxes"]), tuple(answer["labels"]))


def _polygons(answer: Mapping[str, Any]) -> Polygons:
    return Polygons(_shapes(answer["polygons"]), tuple(answer["labels"]))


def _boxes_and_polygons(answer: Mapping[str, Any]) -> BoxesAndPolygons:
    return BoxesAndPolygons(
        tuple(Box(*box) for box in answer["bboxes"]),
        tuple(answer["bboxes_labels"]),
        _shapes(answer["polygons"]),
        tuple(answer["polygons_labels"]),
    )


@dataclass(frozen=True)
class Question(Generic[T_co]):
    """A prompt, or several, or a chain; its type says what the answer is."""

    prompts: tuple[str, ...]
    #: What a chain asks after it: word and prompt.
    steps: tuple[tuple[str, str], ...] = ()


@overload
def several(a: Question[A], b: Question[B], /) -> Question[tuple[A, B]]: ...
@overload
def several(a: Question[A], b: Question[B], c: Question[C], /) -> Question[tuple[A, B, C]]: ...
@overload
def several(*questions: Question[Any]) -> Question[tuple[Any, ...]]: ...
def several(*questions: Question[Any]) -> Question[Any]:
    """Two to 16 different questions about one picture, as one: a tuple of answers."""
    if len(questions) < 2:
        # The server knows a single one only as itself: its answer would be no tuple.
        raise ValueError("several takes two questions at least; a single one is asked as it is")
    if any(question.steps for question in questions):
        raise ValueError("a chain is asked alone")
    return Question(tuple(prompt for question in questions for prompt in question.prompts))


def prompt(text: str) -> Question[str]:
    """A text that is none of the fifteen tasks, for checkpoints that were tuned to others.

    The server takes it with ``florence.prompts any`` only.
    """
    return Question((text,))


@dataclass(frozen=True)
class Part:
    """What was answered about a region."""

    region: Box
    label: str
    answer: Any
    text: str | None = field(default=None, repr=False)
    scores: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Step:
    """A step of a chain: an answer, or one about each region of the answer before."""

    prompt: str
    #: None where nothing was found to ask about.
    answer: Any = None
    parts: tuple[Part, ...] = ()
    #: Regions that were not asked about.
    left_out: int = 0
    #: The prompt with what was found before in it.
    asked: str | None = None
    text: str | None = field(default=None, repr=False)
    scores: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Next:
    """What a chain asks next."""

    word: str
    prompt: str


def then(question: Question[Any]) -> Next:
    """Asks about the picture again; ``{}`` in a text is what was answered before."""
    return Next("THEN", _only_prompt(question, "a step asks"))


def each(question: Question[Any] | TaskWith[Region, Any]) -> Next:
    """Asks about each region that was found; a task of regions is given without one."""
    if isinstance(question, TaskWith):
        return Next("EACH", question.token)
    return Next("EACH", _only_prompt(question, "a step asks"))


def crop(question: Question[Any]) -> Next:
    """Asks about each region as a picture of its own, with ``margin`` around it."""
    return Next("CROP", _only_prompt(question, "a step asks"))


def chain(question: Question[Any], *following: Next) -> Question[tuple[Step, ...]]:
    """A question, and one to three more about what was found, as one job."""
    if not following:
        raise ValueError("a chain has a step at least; a question without one is asked as it is")
    first = _only_prompt(question, "a chain begins with")
    return Question((first,), tuple((step.word, step.prompt) for step in following))


def _only_prompt(question: Question[Any], place: str) -> str:
    if len(question.prompts) != 1 or question.steps:
        raise ValueError(f"{place} one question, neither several nor a chain")
    return question.prompts[0]


class _Method(Protocol[T_co]):
    def __call__(self, image: Image, **options: Unpack[AskOptions]) -> T_co: ...


class _MethodWith(Protocol[X_contra, T_co]):
    def __call__(
        self, image: Image, subject: X_contra, /, **options: Unpack[AskOptions]
    ) -> T_co: ...


class Task(Question[T]):
    """A task that takes nothing besides the picture.

    As an attribute of a client it is a method, which asks and waits for the answer; as one of
    ``tasks`` it is the question.
    """

    def __init__(self, token: str) -> None:
        super().__init__((token,))

    @overload
    def __get__(self, client: None, owner: type[Any]) -> Task[T]: ...
    @overload
    def __get__(self, client: Florence, owner: type[Any]) -> _Method[T]: ...
    @overload
    def __get__(
        self, client: AsyncFlorence, owner: type[Any]
    ) -> _Method[Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type[Any]) -> Any:
        if client is None:
            return self

        def method(image: Image, **options: Unpack[AskOptions]) -> Any:
            return client.ask(image, self, **options)

        return method


class TaskWith(Generic[X_contra, T]):
    """A task that takes a text or a region too: called with it, it gives the question."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, subject: X_contra) -> Question[T]:
        return Question((f"{self.token}{subject}",))

    @overload
    def __get__(self, client: None, owner: type[Any]) -> TaskWith[X_contra, T]: ...
    @overload
    def __get__(self, client: Florence, owner: type[Any]) -> _MethodWith[X_contra, T]: ...
    @overload
    def __get__(
        self, client: AsyncFlorence, owner: type[Any]
    ) -> _MethodWith[X_contra, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type[Any]) -> Any:
        if client is None:
            return self

        def method(image: Image, subject: X_contra, /, **options: Unpack[AskOptions]) -> Any:
            return client.ask(image, self(subject), **options)

        return method


class Tasks:
    """The fifteen tasks: methods of both clients, and questions."""

    caption = Task[str]("<CAPTION>")
    detailed_caption = Task[str]("<DETAILED_CAPTION>")
    more_detailed_caption = Task[str]("<MORE_DETAILED_CAPTION>")
    detect = Task[Boxes]("<OD>")
    dense_region_caption = Task[Boxes]("<DENSE_REGION_CAPTION>")
    region_proposal = Task[Boxes]("<REGION_PROPOSAL>")
    ocr = Task[str]("<OCR>")
    ocr_with_region = Task[Quads]("<OCR_WITH_REGION>")
    phrase_grounding = TaskWith[str, Boxes]("<CAPTION_TO_PHRASE_GROUNDING>")
    open_vocabulary_detection = TaskWith[str, BoxesAndPolygons]("<OPEN_VOCABULARY_DETECTION>")
    referring_expression_segmentation = TaskWith[str, Polygons](
        "<REFERRING_EXPRESSION_SEGMENTATION>"
    )
    region_to_segmentation = TaskWith[Region, Polygons]("<REGION_TO_SEGMENTATION>")
    region_to_category = TaskWith[Region, str]("<REGION_TO_CATEGORY>")
    region_to_description = TaskWith[Region, str]("<REGION_TO_DESCRIPTION>")
    region_to_ocr = TaskWith[Region, str]("<REGION_TO_OCR>")


tasks = Tasks


#: How answers are read that are not plain text, by the names of what they have.
_READERS: dict[frozenset[str], Callable[[Any], Any]] = {
    frozenset(["bboxes", "labels"]): _boxes,
    frozenset(["quad_boxes", "labels"]): _quads,
    frozenset(["polygons", "labels"]): _polygons,
    frozenset(["bboxes", "bboxes_labels", "polygons", "polygons_labels"]): _boxes_and_polygons,
}


def read_answer(result: Mapping[str, Any], prompt: str | None = None) -> Any:
    """The answer to one of several prompts, or to the only one, from the JSON of all.

    An answer says by itself what it is, and the only one is not looked for by its prompt: it is
    under a token, or under what a text with ``{}`` has become.
    """
    if prompt is None:
        (answer,) = result.values()
    else:
        answer = result[prompt]
    return _READERS[frozenset(answer)](answer) if isinstance(answer, dict) else str(answer)


def read_step(step: Mapping[str, Any], text: Any, scores: Any) -> Step:
    """A step, from the JSON of a chain's answers."""

    def read(answer: Mapping[str, Any] | None) -> Any:
        return None if answer is None else read_answer(answer)

    parts = step.get("each", step.get("crop"))
    if parts is None:
        answer = read(step["answer"])
        return Step(step["prompt"], answer, (), 0, step.get("asked"), text, tuple(scores or ()))
    told = tuple(
        Part(Box(*part["region"]), part["label"], read(part["answer"]), text, tuple(scores))
        for part, text, scores in zip(parts, text, scores)
    )
    return Step(step["prompt"], None, told, step["left_out"])


class Options(TypedDict, total=False):
    """How a job is to be run; times are in seconds."""

    #: 0 to 9, higher first.
    priority: int
    #: Not started before.
    delay: float
    #: Not started by then: the job ends as expired.
    expires: float
    #: The model that answers, by its name; else the server's default one.
    model: str
    #: Of one attempt, download and computation together.
    attempt_timeout: float
    #: Further attempts after a failure that may pass.
    retries: int
    #: How long the ended job is kept, in whole seconds; 0 for ever.
    ttl: int
    #: 1 is greedy search.
    beams: int
    #: How many of the best beams are told, in the job's ``nbest``.
    nbest: int
    #: Of the answer.
    max_tokens: int
    #: No sequence of so many tokens occurs twice; 0 allows all.
    ngram: int
    #: Exponent of the length that a beam's score is divided by.
    length_penalty: float
    #: Draws tokens by chance, likely ones more often the lower it is; so do the next three.
    temperature: float
    #: Of so many of the likeliest tokens; 0 for all.
    top_k: int
    #: Of these, the likeliest that have this probability together.
    top_p: float
    #: The same seed draws the same tokens.
    seed: int
    #: How much more than a region ``crop`` cuts out, in hundredths of its width and height.
    margin: int
    #: Turns the picture as its EXIF tag says, or leaves it as it is stored; else as the server
    #: is set.
    exif: bool
    #: Computes the answer even if it is known.
    no_cache: bool
    #: Longer side in pixels of a small copy of the picture, which ``thumbnail`` gives; 0 for none.
    thumbnail: int
    #: Key of a stream that the text goes to while it is generated: see ``pieces``.
    tokens: str


class AskOptions(Options, total=False):
    """The same for a call that also waits."""

    #: The job's key; one is made up if there is none.
    key: str
    #: How long to wait; without it, for as long as the job takes.
    timeout: float | None


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds > 0 else round(seconds * 1000)


def _whole(value: Any) -> int:
    whole = int(value)
    if not isinstance(value, str) and whole != value:
        raise ValueError
    return whole


#: The word of each option, and what becomes of its value.
_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "priority": ("PRIORITY", _whole),
    "delay": ("DELAY", _milliseconds),
    "expires": ("EXPIRES", _milliseconds),
    "model": ("MODEL", str),
    "attempt_timeout": ("TIMEOUT", _milliseconds),
    "retries": ("RETRIES", _whole),
    "ttl": ("TTL", _whole),
    "beams": ("BEAMS", _whole),
    "nbest": ("NBEST", _whole),
    "max_tokens": ("MAXTOKENS", _whole),
    "ngram": ("NGRAM", _whole),
    "length_penalty": ("LENGTHPENALTY", float),
    "temperature": ("TEMPERATURE", float),
    "top_k": ("TOPK", _whole),
    "top_p": ("TOPP", float),
    "seed": ("SEED", _whole),
    "margin": ("MARGIN", _whole),
    "thumbnail": ("THUMBNAIL", _whole),
    "tokens": ("TOKENS", str),
}


def option_arguments(options: Mapping[str, Any]) -> list[Any]:
    arguments: list[Any] = []
    for name, value in options.items():
        if value is None:
            continue
        if name == "no_cache":
            arguments += ["NOCACHE"] if value else []
        elif name == "exif":
            arguments += ["EXIF" if value else "NOEXIF"]
        elif name in _OPTIONS:
            word, convert = _OPTIONS[name]
            try:
                arguments += [word, convert(value)]
            except (ValueError, OverflowError):
                kind = "whole number" if convert is _whole else "number"
                raise ValueError(f"{name} is {value}, and no {kind}") from None
        else:
            raise TypeError(f"there is no option {name}")
    return arguments
