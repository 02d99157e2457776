/** The client on a cluster of three masters. */

import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, test } from "node:test";

import * as f from "../index.js";
import { Cluster, SIGN } from "./harness.js";

const { Florence, tasks } = f;

let cluster, client, florence;
before(async () => (cluster = await Cluster.start()));
after(() => cluster.close());
beforeEach(async () => {
  for (const node of cluster.nodes) await node.call("FLUSHALL");
  client = await cluster.connect();
  florence = new Florence(client);
});
afterEach(async () => {
  await florence.close();
  client.destroy();
});

const submit = (delayMs) => florence.submit(SIGN, tasks.ocr, { delayMs });

test("jobs are spread over all nodes", async () => {
  const keys = await Promise.all(Array.from({ length: 60 }, () => submit()));
  const jobs = await florence.waitMany(keys, { timeoutMs: 30_000 });
  assert.deepEqual(new Set(jobs.map(({ answer }) => answer)), new Set(["EXIT"]));
  const shares = await Promise.all(cluster.nodes.map((node) => node.call("DBSIZE")));
  assert(
    shares.every((share) => share >= 6),
    String(shares),
  );
});

test("the first to end comes first, on any node", async () => {
  // So far apart that a busy machine keeps them in order.
  const keys = await Promise.all([3100, 100, 2100, 1100].map(submit));
  const ended = [];
  for await (const job of florence.asCompleted(keys, { timeoutMs: 30_000 })) ended.push(job.key);
  assert.deepEqual(
    ended,
    [1, 3, 2, 0].map((i) => keys[i]),
  );
});

test("jobs of many nodes are cancelled and queued again", async () => {
  const keys = await Promise.all(Array.from({ length: 12 }, () => submit(60_000)));
  assert.deepEqual(new Set((await florence.jobs()).map(({ key }) => key)), new Set(keys));
  assert.equal(await florence.cancel(...keys), 12);
  assert.deepEqual(await florence.jobs(), []);
  const ends = (await florence.jobs({ state: "cancelled" })).map(({ finishedAt }) => +finishedAt);
  assert.deepEqual([ends.length, ends], [12, [...ends].sort((one, other) => other - one)]);
  assert.equal(await florence.retry(...keys), 12);
  const jobs = await florence.waitMany(keys, { timeoutMs: 20_000 });
  assert(jobs.every(({ answer }) => answer === "EXIT"));
});

test("a job goes to the node of its picture", async () => {
  for (const name of ["page", "{scans}:1", "{open"]) {
    await client.sendCommand(name, false, ["SET", name, SIGN]);
    assert.equal(await florence.ocr({ key: name }), "EXIT");
  }
});

test("errors come from any node", async () => {
  await assert.rejects(florence.wait("missing"), f.NoJobError);
  const keys = await Promise.all([submit(), submit(), submit()]);
  const jobs = florence.asCompleted(["missing", ...keys], { timeoutMs: 10_000 });
  for (const _ of keys) assert(keys.includes((await jobs.next()).value.key));
  await assert.rejects(jobs.next(), f.NoJobError);
});

test("every node tells of its model and its counters", async () => {
  assert.deepEqual(
    (await florence.model()).map(({ name }) => name),
    ["tiny", "tiny", "tiny"],
  );
  assert.deepEqual(
    (await florence.stats()).map(({ panics }) => panics),
    [0, 0, 0],
  );
  assert.deepEqual([(await florence.latencies()).length, (await florence.ends()).length], [3, 3]);
});

test("a thumbnail comes from the node of its job", async () => {
  const options = { thumbnail: 64 };
  const submits = Array.from({ length: 6 }, () => florence.submit(SIGN, tasks.ocr, options));
  const keys = await Promise.all(submits);
  await florence.waitMany(keys);
  for (const key of keys) assert((await florence.thumbnail(key)).length > 100);
});
