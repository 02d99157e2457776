"""A user's program, for mypy: what the types say of each answer, and which mistakes they find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from typing_extensions import assert_type

from florence_redis import (
    AsyncFlorence,
    Boxes,
    BoxesAndPolygons,
    Florence,
    Job,
    JobKey,
    Listed,
    Piece,
    Polygons,
    Quads,
    Region,
    Step,
    chain,
    crop,
    each,
    prompt,
    several,
    tasks,
)

PICTURE = Path("picture.png")
REGION = Region(0, 0, 500, 500)


def blocking(client: redis.Redis) -> None:
    florence = Florence(client, prefix="shop:")
    assert_type(florence.caption(PICTURE), str)
    assert_type(florence.detect(PICTURE, priority=3, timeout=5), Boxes)
    assert_type(florence.ocr_with_region(b"...", key="job:1"), Quads)
    assert_type(florence.phrase_grounding(PICTURE, "a car"), Boxes)
    assert_type(florence.open_vocabulary_detection(PICTURE, "a car"), BoxesAndPolygons)
    assert_type(florence.region_to_segmentation(PICTURE, REGION), Polygons)
    assert_type(florence.region_to_ocr(PICTURE, REGION), str)

    key = florence.submit(PICTURE, tasks.detect, delay=0.5)
    assert_type(key, JobKey[Boxes])
    assert_type(florence.wait(key).answer, Boxes)
    assert_type(florence.get(key), "Job[Boxes] | None")
    for job in florence.as_completed([key]):
        assert_type(job, Job[Boxes])
    question = several(tasks.ocr, tasks.region_to_segmentation(REGION))
    assert_type(florence.ask(PICTURE, question), "tuple[str, Polygons]")
    assert_type(florence.ask(PICTURE, prompt("<GENERATE_TAGS>"), exif=True), str)
    assert_type(florence.wait(JobKey[Any]("job:1")).answer, Any)
    elsewhere = JobKey[str]("job:1")
    assert_type(florence.wait(elsewhere).answer, str)
    following = chain(tasks.detect, each(tasks.region_to_ocr), crop(tasks.ocr))
    assert_type(florence.ask(PICTURE, following, margin=5), "tuple[Step, ...]")
    assert_type(florence.jobs("ended"), list[Listed])
    assert_type(florence.thumbnail(key), "bytes | None")
    for piece in florence.pieces(florence.submit(PICTURE, tasks.caption, tokens="words")):
        assert_type(piece, Piece)

    florence.caption(3)  # type: ignore[arg-type]
    florence.caption(PICTURE, speed=3)  # type: ignore[call-arg]
    florence.caption(PICTURE, priority="high")  # type: ignore[arg-type]
    florence.region_to_ocr(PICTURE, "left")  # type: ignore[arg-type]
    florence.submit(PICTURE, "<OD>")  # type: ignore[arg-type]
    florence.jobs("lost")  # type: ignore[arg-type]


async def awaiting(client: redis.asyncio.RedisCluster) -> None:
    florence = AsyncFlorence(client)
    assert_type(await florence.detect(PICTURE), Boxes)
    assert_type(await florence.region_to_category(PICTURE, REGION), str)
    key = await florence.submit(PICTURE, tasks.caption)
    assert_type((await florence.wait(key, timeout=3)).answer, str)
    assert_type(await florence.wait_many([key]), list[Job[str]])
    async for job in florence.as_completed([key]):
        assert_type(job.answer, str)
    async for piece in florence.pieces(key):
        assert_type(piece.text, str)
    florence.detect(PICTURE).labels  # type: ignore[attr-defined]
