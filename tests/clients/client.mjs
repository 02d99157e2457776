// node-redis, both protocols.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createClient } from "redis";

const [port, file] = [process.argv[2], process.argv[3]];
const picture = readFileSync(file);

const asMap = (reply) =>
  Array.isArray(reply)
    ? Object.fromEntries(reply.flatMap((v, i) => (i % 2 ? [] : [[v, reply[i + 1]]])))
    : { ...reply };

for (const RESP of [2, 3]) {
  const client = createClient({ url: `redis://127.0.0.1:${port}`, RESP });
  await client.connect();
  const key = await client.sendCommand(["FLORENCE.SUBMIT", "*", "DATA", picture, "<OD>"]);
  const job = asMap(await client.sendCommand(["FLORENCE.WAIT", key, "30"]));
  assert.equal(job.state, "done");
  assert.ok(JSON.parse(job.result)["<OD>"].labels.length > 0);
  await assert.rejects(client.sendCommand(["FLORENCE.SUBMIT", "*", "DATA", picture, "x"]), /BADPROMPT/);
  client.destroy ? client.destroy() : await client.disconnect();
}
console.log("all right");
