/** A user's program, for tsc: what the types say of each answer, and which mistakes they find. */

import { createClient, createCluster } from "redis";
import {
  Florence,
  chain,
  crop,
  each,
  prompt,
  regionOf,
  several,
  tasks,
  type Boxes,
  type BoxesAndPolygons,
  type Job,
  type JobKey,
  type Listed,
  type Piece,
  type Polygons,
  type Quads,
  type Step,
} from "florence-redis";

/** Passes where both types are the same. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? A : never;
declare function is<T>(): <A>(value: A & Same<A, T>) => void;

const picture = new Uint8Array();
const florence = new Florence(createClient({ RESP: 3 }), { prefix: "shop:" });
new Florence(createClient());
new Florence(createCluster({ rootNodes: [] }), { connections: 2 });

is<string>()(await florence.caption(picture));
is<Boxes>()(await florence.detect(picture, { priority: 3, timeoutMs: 5000 }));
is<Quads>()(await florence.ocrWithRegion(new URL("https://example.com/a.png")));
is<string>()(await florence.ocr(await (await fetch("https://example.com/a.png")).arrayBuffer()));
is<string>()(await florence.ocr(new Blob([picture])));
is<Boxes>()(await florence.phraseGrounding({ key: "page" }, "a car"));
is<BoxesAndPolygons>()(await florence.openVocabularyDetection(picture, "a car"));
is<Polygons>()(await florence.regionToSegmentation(picture, [0, 0, 500, 500]));
is<string>()(await florence.regionToOcr(picture, regionOf([1, 2, 3, 4], [640, 480])));

const key = await florence.submit(picture, tasks.detect, { delayMs: 500 });
is<JobKey<Boxes>>()(key);
is<Boxes>()((await florence.wait(key)).answer);
is<Job<Boxes> | undefined>()(await florence.get(key));
for await (const job of florence.asCompleted([key])) is<Job<Boxes>>()(job);
const caption = await florence.submit(picture, tasks.caption);
for (const job of await florence.waitMany([key])) is<Job<Boxes>>()(job);
for (const job of await florence.waitMany([key, caption])) is<Boxes | string>()(job.answer);
for await (const job of florence.asCompleted(new Set([key, caption]))) {
  is<Boxes | string>()(job.answer);
}
for (const either of [key, caption]) {
  is<Boxes | string>()((await florence.wait(either)).answer);
  is<Boxes | string | undefined>()((await florence.get(either))?.answer);
}
is<string>()((await florence.wait("job:1" as JobKey<string>)).answer);
is<unknown>()((await florence.wait("job:1")).answer);
for (const { key } of await florence.jobs()) await florence.wait(key);
const [text, polygons] = await florence.ask(
  picture,
  several(tasks.ocr, tasks.regionToSegmentation([0, 0, 9, 9])),
);
is<string>()(text);
is<Polygons>()(polygons);
await florence.wait("job:1", { signal: AbortSignal.timeout(100) });

is<string>()(await florence.ask(picture, prompt("<GENERATE_TAGS>"), { exif: true }));
is<readonly Step[]>()(
  await florence.ask(picture, chain(tasks.detect, each(tasks.regionToOcr), crop(tasks.ocr))),
);
is<Listed[]>()(await florence.jobs({ state: "ended" }));
for await (const piece of florence.pieces(key)) is<Piece>()(piece);
is<Buffer | undefined>()(await florence.thumbnail(key));

// @ts-expect-error a number is no picture
await florence.caption(3);
// @ts-expect-error no such option
await florence.caption(picture, { speed: 3 });
// @ts-expect-error not a number
await florence.caption(picture, { priority: "high" });
// @ts-expect-error a region is four numbers
await florence.regionToOcr(picture, "left");
// @ts-expect-error no such state
await florence.jobs({ state: "lost" });
// @ts-expect-error a prompt is no question
await florence.submit(picture, "<OD>");
// @ts-expect-error a number is no key
await florence.waitMany([key, 3]);
// @ts-expect-error not every answer has labels
(await florence.waitMany([key, caption])).map(({ answer }) => answer.labels);
// @ts-expect-error a text has no labels
(await florence.caption(picture)).labels;
