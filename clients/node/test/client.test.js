/** What the client does on one server. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { createClient } from "redis";

import * as f from "../index.js";
import { OPTIONS, optionArguments } from "../wire.js";
import { ROOT, SHAPES, SIGN, SIZE, Server, eventually, sleep } from "./harness.js";

const { Florence, tasks } = f;
const SQUARE = [100, 100, 340, 410];

let server, client, florence;
before(async () => (server = await Server.start()));
after(() => server.close());
beforeEach(async () => {
  await server.call("FLUSHALL");
  client = await createClient({ url: server.url })
    .on("error", () => {})
    .connect();
  florence = new Florence(client);
});
afterEach(async () => {
  await florence.close();
  client.destroy();
});

const near = (box, ...expected) =>
  box.forEach((found, i) => assert(Math.abs(found - expected[i]) < 5, `${box} ${expected}`));

for (const RESP of [2, 3]) {
  test(`fifteen tasks have typed answers, RESP${RESP}`, async () => {
    const client = await createClient({ url: server.url, RESP }).connect();
    const florence = new Florence(client);
    assert.equal(
      await florence.caption(SHAPES),
      "a blue circle, a red square and a black triangle",
    );
    assert.match(await florence.detailedCaption(SIGN), /^The image shows a medium red square/);
    assert.match(await florence.moreDetailedCaption(SIGN), /one shape and one word/);
    assert.equal(await florence.ocr(SIGN), "EXIT");

    const found = await florence.detect(SHAPES);
    assert.deepEqual(found.labels, ["circle", "square", "triangle"]);
    near(found.bboxes[1], 36, 28, 121, 113);
    assert.equal((await florence.denseRegionCaption(SHAPES)).labels[2], "large black triangle");
    assert.equal((await florence.regionProposal(SHAPES)).bboxes.length, 3);
    const phrase = "a black triangle";
    assert.deepEqual((await florence.phraseGrounding(SHAPES, phrase)).labels, [phrase]);

    const words = await florence.ocrWithRegion(SIGN);
    assert.deepEqual(words.labels, ["EXIT"]);
    assert.equal(words.quadBoxes[0].length, 4);
    near(words.quadBoxes[0][0], 72, 225);

    const triangle = await florence.openVocabularyDetection(SHAPES, "black triangle");
    assert.deepEqual([triangle.bboxesLabels, triangle.polygons], [["black triangle"], []]);
    const shape = await florence.referringExpressionSegmentation(SHAPES, phrase);
    assert.deepEqual(
      shape.polygons[0].map((part) => part.length),
      [3],
    );
    assert.equal((await florence.regionToSegmentation(SHAPES, SQUARE)).polygons.length, 1);

    assert.equal(await florence.regionToCategory(SHAPES, SQUARE), "square");
    assert.equal(await florence.regionToDescription(SHAPES, SQUARE), "a medium red square");
    const word = f.regionOf((await florence.detect(SIGN)).bboxes[1], SIZE);
    assert.equal(await florence.regionToOcr(SIGN, word), "EXIT");
    await florence.close();
    client.destroy();
  });
}

test("several questions about one picture have a list of answers", async () => {
  const questions = f.several(tasks.ocr, tasks.detect, tasks.phraseGrounding("a red square"));
  const [text, found, grounded] = await florence.ask(SIGN, questions);
  assert.equal(text, "EXIT");
  assert.deepEqual(found.labels, ["square", "word"]);
  assert.deepEqual(grounded.labels, ["a red square"]);
});

test("a job tells what became of it", async () => {
  const key = await florence.submit(SIGN, tasks.ocr, { key: "job:1", priority: 9, noCache: true });
  const job = await florence.wait(key);
  assert.deepEqual([job.key, job.state, job.image, job.attempts], ["job:1", "done", "DATA", 1]);
  assert.deepEqual([job.prompts, job.answer, job.texts], [["<OCR>"], "EXIT", ["</s><s>EXIT</s>"]]);
  assert(job.submittedAt <= job.startedAt && job.startedAt <= job.finishedAt && job.hasEnded);
  assert.deepEqual([job.result, job.model], [{ "<OCR>": "EXIT" }, "tiny"]);
  assert.deepEqual([job.width, job.height, job.cache, job.dueAt], [...SIZE, "miss", undefined]);
  assert(job.scores[0][0] > 0.5 && job.scores[0][0] <= 1);
  assert.deepEqual(await florence.get(key), job);
});

test("scores are of each label of each prompt", async () => {
  const questions = f.several(tasks.ocr, tasks.detect);
  const scores = async (question) =>
    (await florence.wait(await florence.submit(SIGN, question))).scores.map(({ length }) => length);
  assert.deepEqual(await scores(questions), [1, 2]);
  assert.deepEqual(await scores(tasks.detect), [2]);
});

test("a chain asks about what was found", async () => {
  const { chain, crop, each, then } = f;
  const question = chain(
    tasks.detect,
    each(tasks.regionToDescription),
    then(tasks.phraseGrounding("{}")),
  );
  const job = await florence.wait(await florence.submit(SHAPES, question));
  const [found, told, grounded] = job.answer;
  assert.deepEqual(found.answer.labels, ["circle", "square", "triangle"]);
  const parts = told.parts.map(({ label, answer, region, scores }) => [
    label,
    answer,
    region.length,
    scores.length,
  ]);
  assert.deepEqual(parts[1], ["square", "a medium red square", 4, 1]);
  assert.equal(told.leftOut, 0);
  assert.match(grounded.asked, /a medium blue circle, a medium red square/);
  assert(grounded.answer.bboxes.length > 0 && grounded.text.includes("<loc_"));
  assert.deepEqual(
    job.steps.map(([word]) => word),
    ["each", "then"],
  );
  assert.deepEqual([job.texts, job.scores], [[], []]);

  const words = chain(tasks.ocrWithRegion, crop(tasks.ocr));
  const [, cropped] = await florence.ask(SIGN, words, { margin: 5 });
  assert.equal(cropped.parts[0].label, "EXIT");
  assert.match(cropped.parts[0].answer, /EXIT/);
  assert.throws(() => f.several(tasks.ocr, words), /a chain is asked alone/);
  const nothing = chain(tasks.openVocabularyDetection("a black triangle"), crop(tasks.caption));
  const [, none] = await florence.ask(SIGN, nothing);
  assert.deepEqual(none.parts, []);
});

test("a waiting job tells when it is due", async () => {
  const key = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
  const { dueAt, submittedAt } = await florence.get(key);
  assert(Math.abs(dueAt - submittedAt - 60_000) < 1000);
  assert.deepEqual(await florence.jobs(), [{ key, state: "queued", dueAt }]);
});

test("the best beams are told with their scores", async () => {
  const questions = f.several(tasks.caption, tasks.detect);
  const job = await florence.wait(await florence.submit(SHAPES, questions, { nbest: 2 }));
  const [captions, boxes] = job.nbest;
  assert.deepEqual([captions.length, boxes.length], [2, 2]);
  assert.deepEqual([captions[0].answer, boxes[0].answer], job.answer);
  assert.deepEqual([captions[0].text, boxes[0].text], job.texts);
  assert(captions[0].score < 0 && captions[0].score >= captions[1].score);
  const without = await florence.wait(await florence.submit(SHAPES, questions));
  assert.deepEqual(without.nbest, []);
  const refused = florence.submit(SHAPES, tasks.caption, { nbest: 2, beams: 1 });
  await assert.rejects(refused, /NBEST 2 is more than there are BEAMS, 1/);
});

test("the text of an answer is told piece by piece", async () => {
  // What is drawn so has no end before there is no more room.
  const options = { tokens: "words", temperature: 100, topK: 0, seed: 7 };
  const key = await florence.submit(SHAPES, tasks.caption, options);
  const pieces = [];
  for await (const piece of florence.pieces(key)) pieces.push(piece);
  const job = await florence.wait(key);
  assert.equal(pieces.map(({ text }) => text).join(""), job.texts[0]);
  assert(pieces.length > 3 && pieces.every((piece) => piece.attempt === 1 && piece.step === 0));
  assert.equal(job.stream, "words");

  const steps = f.chain(tasks.detect, f.each(tasks.regionToCategory));
  const chain = await florence.submit(SHAPES, steps, { tokens: "words" });
  const texts = new Map();
  for await (const { step, index, text } of florence.pieces(chain)) {
    texts.set(`${step} ${index}`, (texts.get(`${step} ${index}`) ?? "") + text);
  }
  const [found, each] = (await florence.wait(chain)).answer;
  assert.equal(texts.get("0 0"), found.text);
  each.parts.forEach((part, i) => assert.equal(texts.get(`1 ${i}`), part.text));
});

test("pieces end with the job", async () => {
  const read = async (key, waiting) => {
    for await (const piece of florence.pieces(key, waiting)) assert.fail(piece.text);
  };
  const key = await florence.submit(SIGN, tasks.ocr, { tokens: "words", delayMs: 60_000 });
  assert.equal((await florence.jobs())[0].stream, "words");
  await assert.rejects(read(key, { timeoutMs: 200 }), f.WaitTimeoutError);
  await florence.cancel(key);
  await read(key);
  await read(key, { timeoutMs: 0 });
  await server.call("DEL", key);
  await assert.rejects(read(key), f.NoJobError);
  await assert.rejects(read(await florence.submit(SIGN, tasks.ocr)), /has no stream/);
});

test("a thumbnail is a small JPEG", async () => {
  const key = await florence.submit(SIGN, tasks.ocr, { thumbnail: 64 });
  assert.equal((await florence.wait(key)).state, "done");
  assert.equal((await florence.thumbnail(key)).subarray(0, 3).toString("hex"), "ffd8ff");
  assert.equal(await florence.thumbnail("missing"), undefined);
});

const answerOf = async (question, options) =>
  florence.wait(await florence.submit(SIGN, question, options));

const withAnyPrompts = async (body) => {
  await server.call("CONFIG", "SET", "florence.prompts", "any");
  try {
    await body();
  } finally {
    await server.call("CONFIG", "SET", "florence.prompts", "tasks");
  }
};

test("other prompts than the tasks are refused unless the server takes them", async () => {
  const questions = f.several(f.prompt("<DocVQA> What is it?"), tasks.ocr);
  await assert.rejects(florence.ask(SIGN, questions), f.BadPromptError);
});

test("other prompts than the tasks have a text as their answer", () =>
  withAnyPrompts(async () => {
    const prompts = ["<DocVQA> What is it?", " <DocVQA> What", "What is 3 > 2?", "[INST] what"];
    prompts.push("[1, 2]", "[", "{}");
    for (const text of prompts) {
      const job = await answerOf(f.prompt(text));
      assert.deepEqual([job.prompts, typeof job.answer, job.texts.length], [[text], "string", 1]);
    }
    const answers = await florence.ask(SIGN, f.several(...prompts.map(f.prompt), tasks.ocr));
    assert.deepEqual(new Set(answers.map((answer) => typeof answer)), new Set(["string"]));
    assert.deepEqual([answers.length, answers.at(-1)], [prompts.length + 1, "EXIT"]);
  }));

test("a step with another prompt than a task has its answer", () =>
  withAnyPrompts(async () => {
    const { chain, each, prompt, then } = f;
    const question = chain(tasks.ocr, then(prompt("x {} y")), then(prompt(" [{}] ")));
    const [read, once, again] = await florence.ask(SIGN, question);
    assert.deepEqual([read.answer, once.asked], ["EXIT", "x EXIT y"]);
    assert.deepEqual([typeof once.answer, typeof again.answer], ["string", "string"]);
    const [, { parts }] = await florence.ask(SIGN, chain(tasks.detect, each(prompt("a {}"))));
    assert.deepEqual([parts[0].label, typeof parts[0].answer], ["square", "string"]);
  }));

test("blanks around a prompt change nothing about the answer", async () => {
  const found = await florence.detect(SIGN);
  const blank = f.prompt(" <OD> \n");
  const job = await answerOf(blank, { nbest: 2 });
  assert.deepEqual([job.prompts, job.answer], [[" <OD> \n"], found]);
  assert.deepEqual(job.nbest[0][0].answer, found);
  assert.deepEqual(await florence.ask(SIGN, f.several(blank, tasks.ocr)), [found, "EXIT"]);
  const category = f.each(f.prompt(" <REGION_TO_CATEGORY> "));
  const [first, { parts }] = await florence.ask(SIGN, f.chain(blank, category));
  assert.deepEqual(first.answer, found);
  assert.deepEqual(
    parts.map(({ answer }) => answer),
    ["square", "word"],
  );
});

for (const [field, value] of [
  ["prompt", "[x"],
  ["result", "{"],
  ["result", "[]"],
  ["scores", "x"],
  ["steps", "[1]"],
]) {
  test(`a job that somebody else has written does not disturb others: ${field} ${value}`, async () => {
    const written = (await answerOf(tasks.ocr)).key;
    await server.call("HSET", written, field, value);
    const good = await florence.submit(SIGN, tasks.ocr, { delayMs: 300 });
    const unless = (error) => assert(error instanceof f.InvalidJobError, String(error));
    await florence.get(written).then(({ answer }) => answer, unless).catch(unless);
    const ended = [];
    try {
      for await (const { key } of florence.asCompleted([written, good], { timeoutMs: 10_000 }))
        ended.push(key);
    } catch (error) {
      unless(error);
    }
    assert(ended.includes(good));
    const both = await Promise.allSettled([
      florence.wait(await florence.submit(SIGN, tasks.ocr, { delayMs: 300 })),
      florence.wait(written),
    ]);
    assert.equal(both[0].value?.answer, "EXIT", String(both[0].reason));
  });
}

test("pictures are bytes, keys and addresses", async () => {
  const pictures = createServer((_, reply) => reply.end(SIGN));
  await new Promise((resolve) => pictures.listen(0, "127.0.0.1", resolve));
  await server.call("SET", "page", SIGN);
  const url = new URL(`http://127.0.0.1:${pictures.address().port}/sign.png`);
  const longer = new Uint8Array(SIGN.length + 3);
  longer.set(SIGN, 3);
  try {
    const buffer = longer.buffer.slice(3);
    const views = [SIGN, longer.subarray(3), new DataView(longer.buffer, 3), buffer];
    for (const image of [...views, new Blob([SIGN]), { key: "page" }, url, url.href]) {
      assert.equal(await florence.ocr(image), "EXIT");
    }
    for (const image of [3, null, undefined, {}, [1, 2]]) {
      await assert.rejects(florence.ocr(image), /a picture is/);
    }
  } finally {
    pictures.closeAllConnections();
    pictures.close();
  }
});

test("options name their units", async () => {
  const key = await florence.submit(SIGN, tasks.ocr, {
    priority: 3,
    delayMs: 60_000,
    expiresMs: 90_500,
    model: "tiny",
    attemptTimeoutMs: 250,
    retries: 2,
    ttlSeconds: 7,
    beams: 1,
    maxTokens: 12,
    exif: true,
    noCache: true,
    thumbnail: 64,
  });
  const names =
    "priority delay expires wants timeout retries ttl beams maxtokens exif nocache thumbnail_px";
  const expected = ["3", "60000", "90500", "tiny", "250", "2", "7", "1", "12", "1", "1", "64"];
  assert.deepEqual(await server.call("HMGET", key, ...names.split(" ")), expected);
  const asStored = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000, exif: false });
  assert.equal(await server.call("HGET", asStored, "exif"), "0");
  await assert.rejects(florence.submit(SIGN, tasks.ocr, { speed: 1 }), /no option speed/);
});

test("an option that is null or undefined is not said", async () => {
  const plain = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
  for (const nothing of [null, undefined]) {
    const names = [...Object.keys(OPTIONS), "exif", "noCache", "key"];
    const options = Object.fromEntries(names.map((name) => [name, nothing]));
    const key = await florence.submit(SIGN, tasks.ocr, { ...options, delayMs: 60_000 });
    assert.match(key, /^florence:/);
    assert.deepEqual(await server.call("HKEYS", key), await server.call("HKEYS", plain));
  }
  const waiting = { timeoutMs: null, signal: null };
  assert.equal(await florence.ocr(SIGN, waiting), "EXIT");
});

test("a part of a whole number is not dropped", async () => {
  for (const options of [{ ttlSeconds: 0.5 }, { beams: 1.9 }, { seed: NaN }]) {
    await assert.rejects(florence.submit(SIGN, tasks.ocr, options), /not an integer/);
  }
});

test("questions that would be asked in part are refused", () => {
  const both = f.several(tasks.ocr, tasks.caption);
  const steps = f.chain(tasks.ocr, f.then(tasks.detect));
  for (const question of [both, steps]) {
    for (const step of [f.then, f.each, f.crop]) {
      assert.throws(() => step(question), /a step asks one question/);
    }
    assert.throws(() => f.chain(question, f.then(tasks.ocr)), /a chain begins with one question/);
  }
  assert.throws(() => f.chain(tasks.ocr), /a chain has a step/);
  for (const questions of [[], [tasks.ocr]]) {
    assert.throws(() => f.several(...questions), /two questions at least/);
  }
});

const refuses = async (Kind, promise) => {
  const error = await promise.then(assert.fail, (error) => error);
  assert.equal(error.constructor, Kind, String(error));
  assert.equal(error.job, undefined);
  return error;
};

test("commands that are refused reject by code", async () => {
  await refuses(f.BadPromptError, florence.ask(SIGN, { prompts: ["nonsense"] }));
  await refuses(f.DeniedError, florence.ocr("/etc/hostname"));
  await refuses(f.NoModelError, florence.ocr(SIGN, { model: "large" }));
  await florence.submit(SIGN, tasks.ocr, { key: "job:1" });
  await refuses(f.JobExistsError, florence.submit(SIGN, tasks.detect, { key: "job:1" }));
  await server.call("SET", "text", "x");
  await server.call("HSET", "hash", "x", "y");
  await refuses(f.WrongTypeError, florence.get("text"));
  await refuses(f.NotAJobError, florence.get("hash"));
  await refuses(f.NotAJobError, florence.wait("hash"));
  assert.match((await refuses(f.NoJobError, florence.wait("missing"))).message, /missing/);
  assert.equal(await florence.get("missing"), undefined);
  await server.call("CONFIG", "SET", "florence.max-delayed", 1);
  try {
    await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
    const busy = await refuses(f.BusyError, florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 }));
    assert.deepEqual([busy.retryable, busy.retryAfterMs], [true, 1000]);
  } finally {
    await server.call("CONFIG", "SET", "florence.max-delayed", 100_000);
  }
});

test("errors of the server itself stay those of node-redis", async () => {
  const error = await florence.ocr(SIGN, { priority: 10 }).then(assert.fail, (error) => error);
  assert.match(error.message, /PRIORITY is not an integer/);
  assert(!(error instanceof f.FlorenceError));
});

const ends = async (Kind, key) => {
  const job = await florence.wait(key);
  assert.throws(
    () => job.answer,
    (error) => error.constructor === Kind && error.job === job,
  );
  return job;
};

test("jobs without an answer throw by code", async () => {
  const url = "http://127.0.0.1:9/";
  const fetch = await ends(f.FetchError, await florence.submit(url, tasks.ocr, { retries: 0 }));
  assert.equal(fetch.error.retryable, true);
  await ends(f.ImageError, await florence.submit(Buffer.from("no picture"), tasks.ocr));
  const late = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
  const job = await florence.get(late);
  assert.throws(() => job.answer, f.NotEndedError);
  assert.equal(await florence.cancel(late, "missing"), 1);
  await ends(f.JobCancelledError, late);
  const expires = { delayMs: 200, expiresMs: 100 };
  await ends(f.JobExpiredError, await florence.submit(SIGN, tasks.ocr, expires));
  await server.call("FLORENCE.SUBMIT", "forged", "DATA", "no picture", "<OCR>");
  await eventually("it has failed", () => server.call("HGET", "forged", "error_code"));
  await server.call("HSET", "forged", "error_code", "TIMEOUT");
  await ends(f.AttemptTimeoutError, "forged");
});

test("the errors of earlier attempts are told", async () => {
  await server.call("CONFIG", "SET", "florence.retry-delay-ms", 10);
  const key = await florence.submit("http://127.0.0.1:9/", tasks.ocr, { retries: 2 });
  const job = await florence.wait(key);
  await server.call("CONFIG", "SET", "florence.retry-delay-ms", 1000);
  const told = job.errors.map(({ attempt, code }) => [attempt, code]);
  assert.deepEqual(told, [
    [1, "FETCH"],
    [2, "FETCH"],
  ]);
  assert(job.submittedAt <= job.errors[0].at && job.errors[1].at <= job.finishedAt);
});

test("every field of the documentation is one of a job", async () => {
  const text = readFileSync(join(ROOT, "docs/COMMANDS.md"), "utf8");
  const [documented] = text.split("flat array (RESP2): `")[1].split("`");
  const names = { id: "key", prompt: "prompts", text: "texts" };
  const camel = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());
  const job = await florence.wait(await florence.submit(SIGN, tasks.ocr));
  const expected = documented.split(" ").map((name) => names[name] ?? camel(name));
  assert.deepEqual(new Set(Object.keys(job)), new Set(expected));
});

test("every option of the documentation is taken", async () => {
  const text = readFileSync(join(ROOT, "docs/COMMANDS.md"), "utf8");
  const [table] = text.split("| option | range | default | meaning |")[1].split("\n\n");
  const rows = table.split("\n").slice(2);
  const words = rows.flatMap((row) => row.split(" | ")[0].match(/[A-Z]+/g));
  const steps = ["THEN", "EACH", "CROP"];
  const names = Object.keys(OPTIONS);
  const args = optionArguments(Object.fromEntries(names.map((name) => [name, 1])));
  const taken = args.filter((_, i) => i % 2 === 0);
  assert.deepEqual(new Set(words), new Set([...taken, ...steps, "EXIF", "NOEXIF", "NOCACHE"]));
  const drawn = { temperature: 0.5, topK: 5, topP: 0.9, seed: 7, ngram: 2, noCache: true };
  const key = await florence.submit(SIGN, tasks.ocr, { ...drawn, delayMs: 60_000 });
  const fields = ["temperature", "top_k", "top_p", "seed", "ngram"];
  assert.deepEqual(await server.call("HMGET", key, ...fields), ["0.5", "5", "0.9", "7", "2"]);
  const answers = [await florence.ocr(SIGN, drawn), await florence.ocr(SIGN, drawn)];
  assert.equal(answers[0], answers[1]);
  assert.equal(await florence.ocr(SIGN, { beams: 2, lengthPenalty: 0.5 }), "EXIT");
});

test("every code of the documentation has a class", () => {
  const text = readFileSync(join(ROOT, "docs/COMMANDS.md"), "utf8");
  const [table] = text.split("| code | meaning | retried |")[1].split("\n\n");
  const [line] = text.split("Errors, with nothing stored: ")[1].split("\n");
  const codes = [...table.matchAll(/^\| `(\w+)`/gm), ...line.matchAll(/`(\w+)`/g)].map(
    ([, code]) => code,
  );
  assert(codes.length > 12);
  for (const code of codes) assert(code === "ERR" || code === "NOPERM" || f.ERRORS.has(code), code);
});

test("a wait ends when its time is over, and the job goes on", async () => {
  const key = await florence.submit(SIGN, tasks.ocr, { delayMs: 1000 });
  const start = Date.now();
  const error = await florence.wait(key, { timeoutMs: 300 }).then(assert.fail, (error) => error);
  assert(error instanceof f.WaitTimeoutError);
  assert.deepEqual(error.keys, [key]);
  assert(Date.now() - start < 900);
  assert.equal((await florence.wait(key, { timeoutMs: 10_000 })).answer, "EXIT");
});

for (const timeoutMs of [0.4, 1e-6, 0, -1]) {
  test(`a wait may be as short as one likes: ${timeoutMs} ms`, async () => {
    const late = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
    const start = Date.now();
    await assert.rejects(florence.wait(late, { timeoutMs }), f.WaitTimeoutError);
    assert(Date.now() - start < 1000);
    // What has ended is told all the same, from however far.
    const send = client.sendCommand.bind(client);
    client.sendCommand = (...args) => sleep(20).then(() => send(...args));
    const keys = [(await answerOf(tasks.ocr)).key, (await answerOf(tasks.caption)).key];
    assert.equal((await florence.wait(keys[0], { timeoutMs })).answer, "EXIT");
    assert.equal((await florence.waitMany(keys, { timeoutMs })).length, 2);
    const ended = [];
    await assert.rejects(
      async () => {
        for await (const { key } of florence.asCompleted([late, ...keys], { timeoutMs }))
          ended.push(key);
      },
      (error) => error instanceof f.WaitTimeoutError && error.keys.join() === late,
    );
    assert.deepEqual(new Set(ended), new Set(keys));
    await assert.rejects(florence.wait("missing", { timeoutMs }), f.NoJobError);
  });
}

test("a wait may be as long as one likes", async () => {
  const warnings = [];
  const warned = (warning) => warnings.push(warning.name);
  process.on("warning", warned);
  for (const timeoutMs of [3e9, 1e15, Infinity, null, undefined]) {
    const options = { delayMs: 100, tokens: "words" };
    const key = await florence.submit(SIGN, tasks.ocr, options);
    assert.equal((await florence.wait(key, { timeoutMs })).answer, "EXIT");
    const told = await florence.submit(SIGN, tasks.ocr, options);
    let text = "";
    for await (const piece of florence.pieces(told, { timeoutMs })) text += piece.text;
    assert.match(text, /EXIT/);
  }
  await sleep(20);
  process.off("warning", warned);
  assert.deepEqual(warnings, []);
});

test("a wait ends when its signal says so", async () => {
  const controller = new AbortController();
  const asking = florence.ocr(SIGN, { delayMs: 60_000, signal: controller.signal });
  setTimeout(() => controller.abort(new Error("enough")), 100);
  await assert.rejects(asking, /enough/);
  await assert.rejects(florence.ocr(SIGN, { signal: controller.signal }), /enough/);
  assert.equal(await florence.ocr(SIGN, { signal: new AbortController().signal }), "EXIT");
});

test("waitMany keeps the order, and asCompleted that of the ends", async () => {
  const delays = [900, 100, 500, 300, 700];
  const submit = (delayMs) => florence.submit(SIGN, tasks.ocr, { delayMs });
  const keys = await Promise.all(delays.map(submit));
  const ended = [];
  for await (const job of florence.asCompleted(keys, { timeoutMs: 10_000 })) ended.push(job.key);
  assert.deepEqual(
    ended,
    [1, 3, 2, 4, 0].map((i) => keys[i]),
  );
  const jobs = await florence.waitMany([...keys, keys[0]]);
  assert.deepEqual(
    jobs.map(({ key }) => key),
    [...keys, keys[0]],
  );
  assert.deepEqual(await florence.waitMany([]), []);
});

test("asCompleted gives what ended in time", async () => {
  const submit = (delayMs) => florence.submit(SIGN, tasks.ocr, { delayMs });
  const keys = await Promise.all([100, 60_000].map(submit));
  const ended = [];
  await assert.rejects(async () => {
    for await (const job of florence.asCompleted(keys, { timeoutMs: 800 })) ended.push(job.key);
  }, f.WaitTimeoutError);
  assert.deepEqual(ended, keys.slice(0, 1));
});

test("more keys than a command takes are waited for and cancelled", async () => {
  const names = Array.from({ length: 1003 }, (_, i) => `job:${i}`);
  const submit = (key) => florence.submit(Buffer.from("no picture"), tasks.ocr, { key });
  const keys = await Promise.all(names.map(submit));
  assert.equal((await florence.waitMany(keys, { timeoutMs: 60_000 })).length, 1003);
  assert.equal(await florence.cancel(...keys), 0);
  assert.equal(await florence.cancel(), 0);
});

test("a job that is deleted meanwhile is told of last", async () => {
  const submit = (delayMs) => florence.submit(SIGN, tasks.ocr, { delayMs });
  const keys = await Promise.all([60_000, 200, 600].map(submit));
  const jobs = florence.asCompleted(keys, { timeoutMs: 10_000 });
  assert.equal((await jobs.next()).value.key, keys[1]);
  await server.call("DEL", keys[0]);
  assert.equal((await jobs.next()).value.key, keys[2]);
  await assert.rejects(jobs.next(), f.NoJobError);
});

test("a job is cancelled and queued again, and who waits is woken", async () => {
  const key = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
  const queued = await florence.jobs({ state: "queued", count: 10 });
  assert.deepEqual(
    queued.map((job) => job.key),
    [key],
  );
  const waiting = florence.wait(key);
  await sleep(100);
  assert.equal(await florence.cancel(key), 1);
  assert.equal((await waiting).state, "cancelled");
  assert.deepEqual(await florence.jobs(), []);
  assert.equal(await florence.retry(key), 1);
  assert.equal((await florence.wait(key, { timeoutMs: 10_000 })).answer, "EXIT");
});

test("jobs that have ended are listed by state, and the newest first", async () => {
  const pictures = [SIGN, Buffer.from("no picture")];
  const keys = await Promise.all(pictures.map((picture) => florence.submit(picture, tasks.ocr)));
  await florence.waitMany(keys);
  const late = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
  await florence.cancel(late);
  const [failed] = await florence.jobs({ state: "failed" });
  assert.deepEqual([failed.key, failed.state, failed.code], [keys[1], "failed", "IMAGE"]);
  assert.deepEqual(Object.keys((await florence.jobs({ state: "done" }))[0]), [
    "key",
    "state",
    "finishedAt",
  ]);
  const ended = await florence.jobs({ state: "ended" });
  assert.deepEqual([ended.length, ended[0].key], [3, late]);
  assert.deepEqual(await florence.jobs({ state: "ended", count: 1 }), ended.slice(0, 1));
});

for (const RESP of [2, 3]) {
  test(`what the server tells is maps all through, RESP${RESP}`, async () => {
    const client = await createClient({ url: server.url, RESP }).connect();
    const florence = new Florence(client);
    const [model] = await florence.model();
    assert.deepEqual(
      model.models.map(({ name, state }) => [name, state]),
      [["tiny", "ready"]],
    );
    client.destroy();
  });
}

test("a list of no jobs is refused", async () => {
  for (const wrong of [{ count: 0 }, { state: "" }, "failed"]) await assert.rejects(florence.jobs(wrong));
});

test("latencies and ends are told by task", async () => {
  await florence.ocr(SIGN, { noCache: true });
  const [latencies] = await florence.latencies();
  const [ends] = await florence.ends();
  const isOurs = ({ task, count }) => task === "<OCR>" && count > 0;
  assert(latencies.some((row) => isOurs(row) && row.phase === "total" && row.buckets.length > 0));
  assert(ends.some((row) => isOurs(row) && row.state === "done"));
});

test("the same request under the same key is one job", async () => {
  const [before] = await florence.stats();
  const submit = () => florence.submit(SIGN, tasks.ocr, { key: "invoice:7" });
  assert.deepEqual(await Promise.all([submit(), submit()]), ["invoice:7", "invoice:7"]);
  const [after] = await florence.stats();
  assert.equal(after.jobs_submitted, before.jobs_submitted + 1);
  assert.deepEqual([(await florence.model())[0].name, after.panics], ["tiny", 0]);
});

test("made up keys can be told apart by a prefix", async () => {
  const key = await new Florence(client, { prefix: "shop:" }).submit(SIGN, tasks.ocr);
  assert.match(key, /^shop:[0-9A-Z]{26}$/);
});
