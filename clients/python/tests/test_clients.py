"""What both clients do on one server."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import redis
from conftest import ROOT, SHAPES, SIGN, SIZE, Connect, Server, eventually

import florence_redis as f
from florence_redis import tasks

SQUARE = f.Region(100, 100, 340, 410)


def near(box: f.Box, *expected: float) -> bool:
    return all(abs(found - wanted) < 5 for found, wanted in zip(box, expected))


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode_responses", [False, True])
def test_fifteen_tasks_have_typed_answers(
    connect: Connect, server: Server, protocol: int, decode_responses: bool
) -> None:
    florence = connect(server.url, protocol=protocol, decode_responses=decode_responses)
    assert florence.caption(SHAPES) == "a blue circle, a red square and a black triangle"
    assert florence.detailed_caption(SIGN).startswith("The image shows a medium red square")
    assert "two" not in florence.more_detailed_caption(SIGN)
    assert florence.ocr(SIGN) == "EXIT"

    found = florence.detect(SHAPES)
    assert found.labels == ("circle", "square", "triangle")
    assert near(found.bboxes[1], 36, 28, 121, 113) and isinstance(found.bboxes[1], f.Box)
    assert florence.dense_region_caption(SHAPES).labels[2] == "large black triangle"
    assert len(florence.region_proposal(SHAPES).bboxes) == 3
    assert florence.phrase_grounding(SHAPES, "a black triangle").labels == ("a black triangle",)

    words = florence.ocr_with_region(SIGN)
    assert words.labels == ("EXIT",)
    assert len(words.quad_boxes[0]) == 4 and near(
        f.Box(*words.quad_boxes[0][0], 0, 0), 72, 225, 0, 0
    )

    triangle = florence.open_vocabulary_detection(SHAPES, "black triangle")
    assert triangle.bboxes_labels == ("black triangle",) and triangle.polygons == ()
    shape = florence.referring_expression_segmentation(SHAPES, "a black triangle")
    assert [len(part) for part in shape.polygons[0]] == [3]
    assert shape.polygons[0][0][0].y < shape.polygons[0][0][1].y
    assert len(florence.region_to_segmentation(SHAPES, SQUARE).polygons) == 1

    assert florence.region_to_category(SHAPES, SQUARE) == "square"
    assert florence.region_to_description(SHAPES, SQUARE) == "a medium red square"
    word = florence.detect(SIGN).bboxes[1].region(SIZE)
    assert florence.region_to_ocr(SIGN, word) == "EXIT"


def test_several_questions_about_one_picture_have_a_tuple_of_answers(florence: Any) -> None:
    questions = f.several(tasks.ocr, tasks.detect, tasks.phrase_grounding("a red square"))
    text, found, grounded = florence.ask(SIGN, questions)
    assert text == "EXIT"
    assert found.labels == ("square", "word")
    assert grounded.labels == ("a red square",)


def test_a_job_tells_what_became_of_it(florence: Any) -> None:
    job = florence.wait(florence.submit(SIGN, tasks.ocr, key="job:1", priority=9, no_cache=True))
    assert (job.key, job.state, job.image, job.attempts) == ("job:1", "done", "DATA", 1)
    assert (job.prompts, job.answer, job.texts) == (("<OCR>",), "EXIT", ("</s><s>EXIT</s>",))
    assert job.submitted_at <= job.started_at <= job.finished_at
    assert job.result == {"<OCR>": "EXIT"} and job.model == "tiny" and job.has_ended
    assert (job.width, job.height) == SIZE and job.cache == "miss" and job.due_at is None
    assert len(job.scores) == 1 and len(job.scores[0]) == 1 and 0.5 < job.scores[0][0] <= 1
    assert florence.get(job.key) == job


def test_scores_are_of_each_label_of_each_prompt(florence: Any) -> None:
    job = florence.wait(florence.submit(SIGN, f.several(tasks.ocr, tasks.detect)))
    assert [len(scores) for scores in job.scores] == [1, 2]
    job = florence.wait(florence.submit(SIGN, tasks.detect))
    assert [len(scores) for scores in job.scores] == [2]
    assert florence.wait(florence.submit(b"no picture", tasks.ocr)).scores == ()


def test_a_chain_asks_about_what_was_found(florence: Any) -> None:
    question = f.chain(
        tasks.detect, f.each(tasks.region_to_description), f.then(tasks.phrase_grounding("{}"))
    )
    job = florence.wait(florence.submit(SHAPES, question))
    found, told, grounded = job.answer
    assert found.answer.labels == ("circle", "square", "triangle") and found.parts == ()
    part = told.parts[1]
    assert (part.label, part.answer) == ("square", "a medium red square")
    assert part.region == found.answer.bboxes[1] and len(part.scores) == 1
    assert part.text == "</s><s>a medium red square</s>" and told.left_out == 0
    assert "a medium blue circle, a medium red square" in grounded.asked
    assert grounded.answer.bboxes and len(grounded.scores) == len(grounded.answer.bboxes)
    assert [word for word, _ in job.steps] == ["each", "then"]
    assert job.texts == job.scores == () and florence.get(job.key) == job

    words = f.chain(tasks.ocr_with_region, f.crop(tasks.ocr))
    (cropped,) = florence.ask(SIGN, words, margin=5)[1].parts
    assert cropped.label == "EXIT" and "EXIT" in cropped.answer
    with pytest.raises(ValueError, match="a chain is asked alone"):
        f.several(tasks.ocr, words)
    nothing = f.chain(tasks.open_vocabulary_detection("a black triangle"), f.crop(tasks.caption))
    assert florence.ask(SIGN, nothing)[1].parts == ()


def test_a_waiting_job_tells_when_it_is_due(florence: Any) -> None:
    key = florence.submit(SIGN, tasks.ocr, delay=60)
    job = florence.get(key)
    assert 59 < (job.due_at - job.submitted_at).total_seconds() < 61
    (listed,) = florence.jobs()
    assert (listed.key, listed.state, listed.due_at) == (key, "queued", job.due_at)


def test_a_thumbnail_is_a_small_jpeg(connect: Connect, server: Server) -> None:
    for decode_responses in (False, True):
        florence = connect(server.url, decode_responses=decode_responses)
        key = florence.submit(SIGN, tasks.ocr, thumbnail=64)
        assert florence.wait(key).state == "done"
        assert florence.thumbnail(key).startswith(b"\xff\xd8\xff")
        assert florence.thumbnail("missing") is None


def test_the_best_beams_are_told_with_their_scores(florence: Any) -> None:
    questions = f.several(tasks.caption, tasks.detect)
    job = florence.wait(florence.submit(SHAPES, questions, nbest=2))
    captions, boxes = job.nbest
    assert (len(captions), len(boxes)) == (2, 2)
    assert (captions[0].answer, boxes[0].answer) == job.answer
    assert (captions[0].text, boxes[0].text) == job.texts
    assert 0 > captions[0].score >= captions[1].score and captions[0].text != captions[1].text
    assert florence.wait(florence.submit(SHAPES, questions)).nbest == ()
    with pytest.raises(redis.ResponseError, match="NBEST 2 is more than there are BEAMS, 1"):
        florence.submit(SHAPES, tasks.caption, nbest=2, beams=1)


def test_the_text_of_an_answer_is_told_piece_by_piece(connect: Connect, server: Server) -> None:
    for settings in ({}, {"decode_responses": True, "protocol": 3}):
        florence = connect(server.url, **settings)
        # What is drawn so has no end before there is no more room.
        drawn = {"temperature": 100, "top_k": 0, "seed": 7, "no_cache": True}
        key = florence.submit(SHAPES, tasks.caption, tokens="words", **drawn)
        pieces = list(florence.pieces(key, timeout=60))
        job = florence.wait(key)
        assert "".join(piece.text for piece in pieces) == job.texts[0] and len(pieces) > 3
        assert {(piece.attempt, piece.step, piece.index) for piece in pieces} == {(1, 0, 0)}
        assert job.stream == "words"
        # Who comes later is told the same.
        assert list(florence.pieces(key)) == pieces

    steps = f.chain(tasks.detect, f.each(tasks.region_to_category))
    key = florence.submit(SHAPES, steps, tokens="words")
    texts: dict[tuple[int, int], str] = {}
    for piece in florence.pieces(key):
        texts[piece.step, piece.index] = texts.get((piece.step, piece.index), "") + piece.text
    found, each = florence.wait(key).answer
    assert texts[0, 0] == found.text
    assert [texts[1, i] for i in range(3)] == [part.text for part in each.parts]


def test_pieces_end_with_the_job(florence: Any, server: Server) -> None:
    waiting = florence.submit(SIGN, tasks.ocr, tokens="words", delay=60)
    (listed,) = florence.jobs()
    assert listed.stream == "words"
    with pytest.raises(f.WaitTimeoutError):
        list(florence.pieces(waiting, timeout=0.2))
    florence.cancel(waiting)
    assert list(florence.pieces(waiting)) == list(florence.pieces(waiting, timeout=0)) == []
    server.admin.delete(waiting)
    with pytest.raises(f.NoJobError):
        list(florence.pieces(waiting))
    with pytest.raises(ValueError, match="has no stream"):
        list(florence.pieces(florence.submit(SIGN, tasks.ocr)))


@pytest.fixture
def any_prompts(server: Server) -> Iterator[None]:
    """The server takes other prompts than the tasks."""
    server.admin.config_set("florence.prompts", "any")
    yield
    server.admin.config_set("florence.prompts", "tasks")


def test_other_prompts_than_the_tasks_are_refused_unless_the_server_takes_them(
    florence: Any,
) -> None:
    with pytest.raises(f.BadPromptError):
        florence.ask(SIGN, f.several(f.prompt("<DocVQA> What is it?"), tasks.ocr))


@pytest.mark.usefixtures("any_prompts")
def test_other_prompts_than_the_tasks_have_a_text_as_their_answer(florence: Any) -> None:
    prompts = ["<DocVQA> What is it?", " <DocVQA> What", "What is 3 > 2?", "[INST] what", "[1, 2]"]
    prompts += ["[", "{}"]
    for text in prompts:
        job = florence.wait(florence.submit(SIGN, f.prompt(text)))
        assert job.prompts == (text,) and isinstance(job.answer, str)
        assert len(job.texts) == 1 and florence.get(job.key) == job
    answers = florence.ask(SIGN, f.several(*map(f.prompt, prompts), tasks.ocr))
    assert [type(answer) for answer in answers] == [str] * (len(prompts) + 1)
    assert answers[-1] == "EXIT"


@pytest.mark.usefixtures("any_prompts")
def test_a_step_with_another_prompt_than_a_task_has_its_answer(florence: Any) -> None:
    question = f.chain(tasks.ocr, f.then(f.prompt("x {} y")), f.then(f.prompt(" [{}] ")))
    read, once, again = florence.ask(SIGN, question)
    assert read.answer == "EXIT"
    assert once.asked == "x EXIT y" and isinstance(once.answer, str)
    assert isinstance(again.answer, str)
    (part, _) = florence.ask(SIGN, f.chain(tasks.detect, f.each(f.prompt("a {}"))))[1].parts
    assert part.label == "square" and isinstance(part.answer, str)


def test_blanks_around_a_prompt_change_nothing_about_the_answer(florence: Any) -> None:
    found = florence.detect(SIGN)
    assert isinstance(found, f.Boxes)
    blank = f.prompt(" <OD> \n")
    job = florence.wait(florence.submit(SIGN, blank, nbest=2))
    assert job.prompts == (" <OD> \n",) and job.answer == job.nbest[0][0].answer == found
    assert florence.ask(SIGN, f.several(blank, tasks.ocr)) == (found, "EXIT")
    steps = florence.ask(SIGN, f.chain(blank, f.each(f.prompt(" <REGION_TO_CATEGORY> "))))
    assert steps[0].answer == found
    assert [part.answer for part in steps[1].parts] == ["square", "word"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", "[x"), ("result", "{"), ("result", "[]"), ("scores", "x"), ("steps", "[1]")],
)
def test_a_job_that_somebody_else_has_written_does_not_disturb_others(
    florence: Any, server: Server, field: str, value: str
) -> None:
    written = florence.submit(SIGN, tasks.ocr)
    assert florence.wait(written).answer == "EXIT"
    server.admin.hset(written, field, value)
    good = florence.submit(SIGN, tasks.ocr, delay=0.3)
    with contextlib.suppress(f.InvalidJobError):
        florence.get(written).answer  # noqa: B018
    ended = []
    with contextlib.suppress(f.InvalidJobError):
        for job in florence.as_completed([written, good], timeout=10):
            ended.append(job.key)
    assert good in ended


def test_pictures_are_bytes_files_keys_and_addresses(florence: Any, server: Server) -> None:
    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SIGN.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    data = SIGN.read_bytes()
    server.admin.set("page", data)
    with HTTPServer(("127.0.0.1", 0), Pictures) as pictures:
        thread = threading.Thread(target=pictures.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{pictures.server_port}/sign.png"
        images = [SIGN, data, bytearray(data), memoryview(data), f.ImageKey("page"), url]
        assert [florence.ocr(image) for image in images] == ["EXIT"] * 6
        pictures.shutdown()
        thread.join()


def test_options_are_in_seconds(florence: Any, server: Server) -> None:
    options = {
        "priority": 3,
        "delay": 60,
        "expires": 90.5,
        "model": "tiny",
        "attempt_timeout": 0.25,
        "retries": 2,
        "ttl": 7,
        "beams": 1,
        "max_tokens": 12,
        "exif": True,
        "no_cache": True,
        "thumbnail": 64,
    }
    key = florence.submit(SIGN, tasks.ocr, **options)
    names = "priority delay expires wants timeout retries ttl beams maxtokens exif nocache".split()
    expected = ["3", "60000", "90500", "tiny", "250", "2", "7", "1", "12", "1", "1"]
    assert server.admin.hmget(key, names) == expected
    assert server.admin.hget(key, "thumbnail_px") == "64"
    key = florence.submit(SIGN, tasks.ocr, delay=60, exif=False)
    assert server.admin.hget(key, "exif") == "0"
    with pytest.raises(TypeError, match="no option speed"):
        florence.submit(SIGN, tasks.ocr, speed=1)


def test_an_option_that_is_none_is_not_said(florence: Any, server: Server) -> None:
    nothing = dict.fromkeys([*f.questions._OPTIONS, "exif", "no_cache"])
    plain, key = florence.submit(SIGN, tasks.ocr, delay=60), "job:1"
    florence.submit(SIGN, tasks.ocr, key=key, **{**nothing, "delay": 60})
    assert server.admin.hkeys(key) == server.admin.hkeys(plain)
    assert florence.submit(SIGN, tasks.ocr, key=None).startswith("florence:")


def test_a_part_of_a_whole_number_is_not_dropped(florence: Any) -> None:
    for name, value in (("ttl", 0.5), ("beams", 1.9), ("seed", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} is {value}, and no whole number"):
            florence.submit(SIGN, tasks.ocr, **{name: value})
    assert florence.ocr(SIGN, ttl=60.0, beams=1.0) == "EXIT"


def test_what_is_no_picture_is_not_sent(florence: Any) -> None:
    for image in (3, None, [1, 2]):
        with pytest.raises(TypeError, match="a picture is"):
            florence.ocr(image)


def test_questions_that_would_be_asked_in_part_are_refused(florence: Any) -> None:
    both, steps = f.several(tasks.ocr, tasks.caption), f.chain(tasks.ocr, f.then(tasks.detect))
    for question in (both, steps):
        for step in (f.then, f.each, f.crop):
            with pytest.raises(ValueError, match="a step asks one question"):
                step(question)
        with pytest.raises(ValueError, match="a chain begins with one question"):
            f.chain(question, f.then(tasks.ocr))
    with pytest.raises(ValueError, match="a chain has a step"):
        f.chain(tasks.ocr)
    for questions in ([], [tasks.ocr]):
        with pytest.raises(ValueError, match="two questions at least"):
            f.several(*questions)


def test_commands_that_are_refused_raise_by_code(florence: Any, server: Server) -> None:
    def refuses(error: type[f.FlorenceError], call: Any) -> f.FlorenceError:
        with pytest.raises(error) as raised:
            call()
        assert type(raised.value) is error and raised.value.job is None
        return raised.value

    refuses(f.BadPromptError, lambda: florence.ask(SIGN, f.Question[str](("nonsense",))))
    refuses(f.DeniedError, lambda: florence.ocr("/etc/hostname"))
    refuses(f.NoModelError, lambda: florence.ocr(SIGN, model="large"))
    florence.submit(SIGN, tasks.ocr, key="job:1")
    refuses(f.JobExistsError, lambda: florence.submit(SIGN, tasks.detect, key="job:1"))
    server.admin.set("text", "x")
    server.admin.hset("hash", "x", "y")
    refuses(f.WrongTypeError, lambda: florence.get(f.JobKey("text")))
    refuses(f.NotAJobError, lambda: florence.get(f.JobKey("hash")))
    refuses(f.NotAJobError, lambda: florence.wait(f.JobKey("hash")))
    assert "missing" in refuses(f.NoJobError, lambda: florence.wait(f.JobKey("missing"))).message
    assert florence.get(f.JobKey("missing")) is None
    server.admin.config_set("florence.max-queue", 1)
    try:
        florence.submit(SIGN, tasks.ocr, key="late", delay=60)
        server.admin.config_set("florence.max-delayed", 1)
        busy = refuses(f.BusyError, lambda: florence.submit(SIGN, tasks.ocr, delay=60))
        assert busy.retryable and busy.retry_after == 1.0
    finally:
        server.admin.config_set("florence.max-queue", 100_000)
        server.admin.config_set("florence.max-delayed", 100_000)


def test_errors_of_the_server_itself_stay_those_of_redis_py(florence: Any) -> None:
    with pytest.raises(redis.ResponseError, match="PRIORITY is not an integer") as raised:
        florence.ocr(SIGN, priority=10)
    assert not isinstance(raised.value, f.FlorenceError)


def test_jobs_without_an_answer_raise_by_code(florence: Any, server: Server) -> None:
    def ends(error: type[f.FlorenceError], key: f.JobKey[Any]) -> f.FlorenceError:
        job = florence.wait(key)
        with pytest.raises(error) as raised:
            job.answer  # noqa: B018
        assert type(raised.value) is error and raised.value.job == job
        return raised.value

    fetch = ends(f.FetchError, florence.submit("http://127.0.0.1:9/", tasks.ocr, retries=0))
    assert fetch.retryable
    assert not ends(f.ImageError, florence.submit(b"no picture", tasks.ocr)).retryable
    late = florence.submit(SIGN, tasks.ocr, delay=60)
    with pytest.raises(f.NotEndedError):
        florence.get(late).answer
    assert florence.cancel(late, "missing") == 1
    ends(f.JobCancelledError, late)
    ends(f.JobExpiredError, florence.submit(SIGN, tasks.ocr, delay=0.2, expires=0.1))
    ends(f.AttemptTimeoutError, forged(server, code="TIMEOUT"))


def test_the_errors_of_earlier_attempts_are_told(florence: Any, server: Server) -> None:
    server.admin.config_set("florence.retry-delay-ms", 10)
    try:
        job = florence.wait(florence.submit("http://127.0.0.1:9/", tasks.ocr, retries=2))
    finally:
        server.admin.config_set("florence.retry-delay-ms", 1000)
    assert [(error.attempt, error.code) for error in job.errors] == [(1, "FETCH"), (2, "FETCH")]
    assert job.submitted_at <= job.errors[0].at <= job.errors[1].at <= job.finished_at


def test_every_field_of_the_documentation_is_one_of_a_job() -> None:
    text = (ROOT / "docs/COMMANDS.md").read_text().split("flat array (RESP2): `")[1].split("`")[0]
    names = {"id": "key", "prompt": "prompts", "text": "texts"}
    documented = {names.get(name, name) for name in text.split()}
    known = {field.name for field in dataclasses.fields(f.Job)}
    assert documented == {name for name in known if not name.startswith("_")}


def test_every_option_of_the_documentation_is_taken(florence: Any, server: Server) -> None:
    text = (ROOT / "docs/COMMANDS.md").read_text()
    table = text.split("| option | range | default | meaning |")[1].split("\n\n")[0]
    words = {
        name for row in table.splitlines()[2:] for name in row.split(" | ")[0].split("`")[1::2]
    }
    taken = {word for word, _ in f.questions._OPTIONS.values()}
    assert words == taken | {"THEN", "EACH", "CROP", "EXIF", "NOEXIF", "NOCACHE"}
    drawn = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 7, "ngram": 2}
    key = florence.submit(SIGN, tasks.ocr, delay=60, **drawn)
    names = "temperature top_k top_p seed ngram".split()
    assert server.admin.hmget(key, names) == ["0.5", "5", "0.9", "7", "2"]
    answers = {florence.ocr(SIGN, no_cache=True, **drawn) for _ in range(2)}
    assert len(answers) == 1
    assert florence.ocr(SIGN, beams=2, length_penalty=0.5) == "EXIT"


def forged(server: Server, code: str) -> f.JobKey[str]:
    """A failed job with another code, as a dump of another server would bring it."""
    name = f"forged:{code}"
    server.admin.execute_command("FLORENCE.SUBMIT", name, "DATA", b"no picture", "<OCR>")
    eventually("it has failed", lambda: server.admin.hget(name, "error_code"))
    server.admin.hset(name, "error_code", code)
    return f.JobKey(name)


def test_every_code_of_the_documentation_has_a_class() -> None:
    text = (ROOT / "docs/COMMANDS.md").read_text()
    table = text.split("| code | meaning | retried |")[1].split("\n\n")[0]
    codes = [line.split("`")[1] for line in table.splitlines() if "`" in line]
    errors = text.split("Errors, with nothing stored: ")[1].split("\n")[0]
    codes += [part for part in errors.split("`")[1::2] if part not in ("ERR", "NOPERM")]
    assert len(codes) > 12 and set(codes) <= set(f.ERRORS)


def test_errors_can_be_sent_to_another_process(florence: Any) -> None:
    key = florence.submit(b"no picture", tasks.ocr)
    with pytest.raises(f.ImageError) as raised:
        florence.wait(key).answer  # noqa: B018
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (type(copy), str(copy), copy.job) == (f.ImageError, str(raised.value), raised.value.job)
    error = f.WaitTimeoutError("late", ["a"])
    assert pickle.loads(pickle.dumps(error)).keys == ("a",)


def test_wait_ends_when_its_time_is_over_and_the_job_goes_on(florence: Any) -> None:
    key = florence.submit(SIGN, tasks.ocr, delay=1)
    start = time.monotonic()
    with pytest.raises(TimeoutError) as raised:
        florence.wait(key, timeout=0.3)
    assert 0.25 < time.monotonic() - start < 0.9
    assert raised.value.keys == (key,)
    with pytest.raises(f.WaitTimeoutError):
        florence.ocr(SIGN, delay=60, timeout=0.1)
    assert florence.wait(key, timeout=10).answer == "EXIT"


@pytest.mark.parametrize("timeout", [0.0005, 0.0004, 1e-9, 0, -1])
def test_a_wait_may_be_as_short_as_one_likes(florence: Any, timeout: float) -> None:
    late = florence.submit(SIGN, tasks.ocr, delay=60)
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(f.WaitTimeoutError):
            florence.wait(late, timeout)
    assert time.monotonic() - start < 2
    # What has ended is told all the same.
    keys = [florence.submit(SIGN, tasks.ocr) for _ in range(3)]
    florence.wait_many(keys)
    assert florence.wait(keys[0], timeout).answer == "EXIT"
    assert [job.answer for job in florence.wait_many(keys, timeout)] == ["EXIT"] * 3
    ended = []
    with pytest.raises(f.WaitTimeoutError) as raised:
        for job in florence.as_completed([late, *keys], timeout):
            ended.append(job.key)
    assert sorted(ended) == sorted(keys) and raised.value.keys == (late,)
    with pytest.raises(f.NoJobError):
        florence.wait(f.JobKey("missing"), timeout)


def test_a_wait_may_be_as_long_as_one_likes(florence: Any) -> None:
    for timeout in (3e6, 1e12, float("inf"), None):
        key = florence.submit(SIGN, tasks.ocr, delay=0.1)
        assert florence.wait(key, timeout).answer == "EXIT"
        assert [job.answer for job in florence.as_completed([key], timeout)] == ["EXIT"]
        told = florence.submit(SIGN, tasks.ocr, delay=0.1, tokens="words")
        assert len(list(florence.pieces(told, timeout))) > 0


def test_wait_many_keeps_the_order_and_as_completed_that_of_the_ends(florence: Any) -> None:
    delays = [0.9, 0.1, 0.5, 0.3, 0.7]
    keys = [florence.submit(SIGN, tasks.ocr, delay=delay) for delay in delays]
    ended = [job.key for job in florence.as_completed(keys, timeout=10)]
    assert ended == [key for _, key in sorted(zip(delays, keys))]
    assert [job.key for job in florence.wait_many(keys)] == keys
    assert [job.key for job in florence.wait_many([*keys, keys[0]])] == [*keys, keys[0]]
    assert florence.wait_many([]) == []


def test_as_completed_gives_what_ended_in_time(florence: Any) -> None:
    keys = [florence.submit(SIGN, tasks.ocr, delay=delay) for delay in (0.1, 60)]
    ended = []
    with pytest.raises(f.WaitTimeoutError) as raised:
        for job in florence.as_completed(keys, timeout=0.8):
            ended.append(job.key)
    assert ended == keys[:1] and raised.value.keys == (keys[1],)


def test_more_keys_than_a_command_takes_are_waited_for_and_cancelled(florence: Any) -> None:
    keys = [florence.submit(b"no picture", tasks.ocr, key=f"job:{i}") for i in range(1003)]
    assert {job.key for job in florence.as_completed(keys, timeout=60)} == set(keys)
    assert florence.cancel(*keys) == 0
    assert florence.cancel() == 0


def test_a_job_that_is_deleted_meanwhile_is_told_of_last(florence: Any, server: Server) -> None:
    keys = [florence.submit(SIGN, tasks.ocr, delay=delay) for delay in (60, 0.2, 0.6)]
    jobs = florence.as_completed(keys, timeout=10)
    assert next(jobs).key == keys[1]
    server.admin.delete(keys[0])
    assert next(jobs).key == keys[2]
    with pytest.raises(f.NoJobError, match=keys[0]):
        next(jobs)


def test_a_job_is_cancelled_and_queued_again(florence: Any) -> None:
    key = florence.submit(SIGN, tasks.ocr, delay=60)
    assert [job.key for job in florence.jobs(state="queued", count=10)] == [key]
    assert florence.cancel(key) == 1 and florence.cancel(key) == 0
    assert florence.wait(key).state == "cancelled"
    assert florence.jobs() == []
    assert florence.retry(key) == 1
    assert florence.wait(key, timeout=10).answer == "EXIT"


def test_a_cancelled_job_wakes_who_waits(connect: Connect, florence: Any, server: Server) -> None:
    key = florence.submit(SIGN, tasks.ocr, delay=60)
    timer = threading.Timer(0.3, server.admin.execute_command, ["FLORENCE.CANCEL", key])
    timer.start()
    start = time.monotonic()
    assert florence.wait(key).state == "cancelled"
    assert time.monotonic() - start < 0.9
    timer.join()


def test_the_same_request_under_the_same_key_is_one_job(florence: Any, server: Server) -> None:
    before = florence.stats()[0]["jobs_submitted"]
    keys = {florence.submit(SIGN, tasks.ocr, key="invoice:7") for _ in range(3)}
    assert keys == {"invoice:7"}
    assert florence.stats()[0]["jobs_submitted"] == before + 1


def test_model_and_stats_are_of_every_master(florence: Any) -> None:
    (model,), (stats,) = florence.model(), florence.stats()
    assert (model["name"], model["state"]) == ("tiny", "ready")
    assert stats["panics"] == 0


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode_responses", [False, True])
def test_what_the_server_tells_is_text_and_maps_all_through(
    connect: Connect, server: Server, protocol: int, decode_responses: bool
) -> None:
    florence = connect(server.url, protocol=protocol, decode_responses=decode_responses)
    florence.ocr(SIGN)
    (model,) = florence.model()
    (one,) = model["models"]
    assert (one["name"], one["state"]) == ("tiny", "ready")
    told = [model, florence.stats(), florence.latencies(), florence.ends()]
    assert "b'" not in repr(told)
    row = florence.latencies()[0][0]
    assert all(len(bucket) == 2 for bucket in row["buckets"])


def test_jobs_that_have_ended_are_listed_by_state_and_the_newest_first(florence: Any) -> None:
    keys = [florence.submit(picture, tasks.ocr) for picture in (SIGN, b"no picture")]
    florence.wait_many(keys)
    late = florence.submit(SIGN, tasks.ocr, delay=60)
    florence.cancel(late)
    (failed,) = florence.jobs("failed")
    assert (failed.key, failed.state, failed.code) == (keys[1], "failed", "IMAGE")
    (done,) = florence.jobs("done")
    assert (done.key, done.code) == (keys[0], None) and done.finished_at is not None
    ended = florence.jobs("ended")
    assert len(ended) == 3 and ended[0].key == late
    assert florence.jobs("ended", count=1) == ended[:1]
    for wrong in ({"count": 0}, {"state": ""}):
        with pytest.raises(redis.ResponseError):
            florence.jobs(**wrong)


def test_latencies_and_ends_are_told_by_task(florence: Any) -> None:
    florence.ocr(SIGN, no_cache=True)
    (latencies,), (ends,) = florence.latencies(), florence.ends()
    assert any(
        row["task"] == "<OCR>" and row["phase"] == "total" and row["count"] > 0 and row["buckets"]
        for row in latencies
    ), latencies
    assert any(
        row["state"] == "done" and row["task"] == "<OCR>" and row["count"] > 0 for row in ends
    )


def test_made_up_keys_can_be_told_apart_by_a_prefix(connect: Connect, server: Server) -> None:
    key = connect(server.url, prefix="shop:").submit(SIGN, tasks.ocr)
    assert key.startswith("shop:") and len(key) == 5 + 26


def test_rights_to_the_own_prefix_and_the_commands_are_enough(
    connect: Connect, server: Server
) -> None:
    commands = ["submit", "get", "wait", "cancel", "retry"]
    rights = [f"+florence.{command}" for command in commands]
    server.admin.execute_command(
        "ACL", "SETUSER", "shop", "on", ">secret", "~florence:*", "&florence:*", *rights
    )
    florence = connect(f"redis://shop:secret@127.0.0.1:{server.port}")
    assert florence.ocr(SIGN) == "EXIT"
    assert [job.answer for job in florence.as_completed([florence.submit(SIGN, tasks.ocr)])]
    with pytest.raises(redis.exceptions.NoPermissionError):
        florence.submit(SIGN, tasks.ocr, key="other")


def test_answers_go_to_supervision(florence: Any) -> None:
    supervision = importlib.import_module("supervision")

    def detections(picture: Any, question: Any) -> Any:
        job = florence.wait(florence.submit(picture, question))
        found = f.detections(job)
        scores = list(job.scores[0]) if len(found) else []
        assert found.confidence.tolist() == pytest.approx(scores)
        return found

    found = detections(SHAPES, tasks.detect)
    assert isinstance(found, supervision.Detections)
    assert list(found.data["class_name"]) == ["circle", "square", "triangle"]
    assert near(f.Box(*found.xyxy[1]), 36, 28, 121, 113)
    assert len(detections(SIGN, tasks.ocr_with_region)) == 1
    shape = detections(SHAPES, tasks.referring_expression_segmentation("a black triangle"))
    assert shape.mask.shape == (1, 280, 360) and shape.mask.any()
    nothing = tasks.open_vocabulary_detection("black triangle")
    assert len(detections(SIGN, nothing)) == 0
    assert len(detections(SHAPES, tasks.ocr_with_region)) == 0
    with pytest.raises(ValueError, match="not supported"):
        detections(SHAPES, tasks.caption)
    with pytest.raises(f.ImageError):
        detections(b"no picture", tasks.detect)
