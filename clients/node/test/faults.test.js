/** Connections that break, servers that stand still or start again, and who leaves early. */

import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { createClient } from "redis";

import * as f from "../index.js";
import { SIGN, Server, eventually, sleep } from "./harness.js";

const { Florence, tasks } = f;

let server;
before(async () => (server = await Server.start("appendonly yes", "appendfsync always")));
after(() => server.close());
beforeEach(() => server.call("FLUSHALL"));

let opened = [];
const connect = async (options = {}) => {
  const client = await createClient({ url: server.url, ...options })
    .on("error", () => {})
    .connect();
  const florence = new Florence(client);
  opened.push(florence, client);
  return { client, florence };
};
afterEach(async () => {
  for (const one of opened)
    await (one instanceof Florence ? one.close() : one.isOpen && one.destroy());
  opened = [];
  await eventually("all are closed", async () => (await server.clients()).length === 0);
});

test("a wait is never one for ever, however short a socket's time-out is", async () => {
  const sent = [];
  const connection = {
    isOpen: true,
    on: () => {},
    connect: async () => connection,
    destroy: () => {},
    sendCommand: (args) => {
      sent.push(args.at(-1));
      return sleep(10).then(() => null);
    },
  };
  const waiting = { state: "queued", prompt: "<OCR>", result: null, steps: null, text: null };
  const job = { id: "job", scores: null, error: null, errors: null, ...waiting };
  const client = {
    options: { socket: { socketTimeout: 1 } },
    duplicate: () => connection,
    sendCommand: async () => job,
  };
  const florence = new Florence(client);
  await assert.rejects(florence.wait("job", { timeoutMs: 200 }), f.WaitTimeoutError);
  await florence.close();
  assert(sent.length > 0 && sent.every((seconds) => Number(seconds) > 0), sent.join(" "));
});

for (const socketTimeout of [400, undefined]) {
  test(`waiting may take longer than a socket's time-out of ${socketTimeout} ms`, async () => {
    const { florence } = await connect({ socket: { socketTimeout }, pingInterval: 100 });
    const begun = await server.call("INFO", "stats");
    assert.equal(await florence.ocr(SIGN, { delayMs: 2200 }), "EXIT");
    const ended = await server.call("INFO", "stats");
    const connections = (info) => Number(/total_connections_received:(\d+)/.exec(info)[1]);
    // One that waits; none was given up.
    assert.equal(connections(ended) - connections(begun), 1);
  });
}

test("waiting does not hold up the client's own commands", async () => {
  const { client, florence } = await connect();
  const asking = florence.ocr(SIGN, { delayMs: 1000 });
  await eventually("it waits", async () =>
    (await server.clients()).some((line) => line.includes("cmd=florence.wait")),
  );
  const start = Date.now();
  await client.ping();
  assert(Date.now() - start < 300);
  await asking;
});

test("a server that stands still during a submission makes one job", async () => {
  // Of its own accord node-redis does not connect again after a time-out.
  const socket = { socketTimeout: 5000, reconnectStrategy: 100 };
  const { florence } = await connect({ socket });
  await florence.ocr(SIGN);
  await server.call("FLUSHALL");
  const stopped = server.stopFor(6000);
  assert.equal(await florence.ocr(SIGN), "EXIT");
  await stopped;
  assert.equal(await server.call("DBSIZE"), 1);
  assert.match(await server.call("INFO", "commandstats"), /florence.SUBMIT:calls=[3-9]/i);
});

test("waiting goes on when the server starts again", async () => {
  const { florence } = await connect();
  const key = await florence.submit(SIGN, tasks.ocr, { delayMs: 1500 });
  const waiting = florence.wait(key, { timeoutMs: 30_000 });
  await sleep(500);
  await server.kill();
  await server.spawn();
  assert.equal((await waiting).answer, "EXIT");
  assert.equal(await florence.ocr(SIGN), "EXIT");
});

test("a hundred at once take few connections, and a quick one does not wait for slow ones", async () => {
  const { florence } = await connect();
  const delays = Array.from({ length: 100 }, (_, i) => 50 * (i % 10));
  const asks = delays.map((delayMs) => florence.ocr(SIGN, { delayMs }));
  assert.deepEqual(new Set(await Promise.all(asks)), new Set(["EXIT"]));
  assert((await server.clients()).length <= 1 + 4);

  const controller = new AbortController();
  const warnings = [];
  const warned = (warning) => warnings.push(warning.name);
  process.on("warning", warned);
  const options = { delayMs: 60_000, signal: controller.signal };
  const slow = Array.from({ length: 100 }, () => florence.ocr(SIGN, options).catch(() => "left"));
  await sleep(1500);
  const start = Date.now();
  for (let i = 0; i < 5; i += 1) assert.equal(await florence.ocr(SIGN), "EXIT");
  assert((Date.now() - start) / 5 < 500, `${Date.now() - start} ms`);
  controller.abort();
  assert.deepEqual(new Set(await Promise.all(slow)), new Set(["left"]));
  process.off("warning", warned);
  assert.deepEqual(warnings, []);
  // Nobody gets another's reply.
  assert.equal(await florence.ocr(SIGN), "EXIT");
});

test("who leaves asCompleted early leaves nothing behind", async () => {
  const { florence } = await connect();
  for (let i = 0; i < 10; i += 1) {
    const keys = [
      await florence.submit(SIGN, tasks.ocr),
      await florence.submit(SIGN, tasks.caption),
    ];
    for await (const job of florence.asCompleted(keys)) {
      assert(job.hasEnded);
      break;
    }
  }
  assert((await server.clients()).length <= 1 + 4);
});

test("who waits is told that the client was closed", async () => {
  const { florence } = await connect();
  const waiting = assert.rejects(florence.ocr(SIGN, { delayMs: 60_000 }), /closed/);
  await sleep(300);
  await florence.close();
  await waiting;
  await assert.rejects(florence.wait("job"), /closed/);
});

test("closing does not wait for a server that is away", async () => {
  const { client, florence } = await connect();
  const key = await florence.submit(SIGN, tasks.ocr, { delayMs: 60_000 });
  await server.kill();
  const waiting = florence.wait(key).then(assert.fail, (error) => error.message);
  await sleep(200);
  await florence.close();
  assert.match((await Promise.race([waiting, sleep(1000)])) ?? "nothing", /closed/);
  client.destroy();
  await server.spawn();
});

test("one job that cannot be told of does not disturb others", async () => {
  const { florence } = await connect();
  await server.call("HSET", "hash", "x", "y");
  const submit = () => florence.submit(SIGN, tasks.ocr, { delayMs: 400 });
  const keys = ["hash", "missing", await submit(), await submit()];
  const ends = await Promise.allSettled(keys.map((key) => florence.wait(key)));
  assert.deepEqual(
    ends.slice(0, 2).map(({ reason }) => reason.constructor),
    [f.NotAJobError, f.NoJobError],
  );
  assert.deepEqual(
    ends.slice(2).map(({ value }) => value.answer),
    ["EXIT", "EXIT"],
  );
});
