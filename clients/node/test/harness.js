/**
 * Real servers for the tests: redis-server with the module, each with a port and a directory of its
 * own.
 *
 * FLORENCE_SERVER names the binary (default: redis-server), FLORENCE_SERVER_LIBS a library path for
 * it, FLORENCE_MODULE the module (default: what `make build` makes).
 */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { createClient, createCluster } from "redis";

export const PACKAGE = fileURLToPath(new URL("..", import.meta.url));
export const ROOT = resolve(PACKAGE, "../..");
export const SAMPLES = join(ROOT, "models/tiny/samples");
export const SHAPES = readFileSync(join(SAMPLES, "shapes.png"));
export const SIGN = readFileSync(join(SAMPLES, "sign.png"));
/** Of these two pictures. */
export const SIZE = [360, 280];

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Polls until the condition gives something; fails after a minute. */
export const eventually = async (what, condition) => {
  for (const end = Date.now() + 60_000; Date.now() < end; await sleep(10)) {
    const value = await condition();
    if (value) return value;
  }
  assert.fail(`timed out: ${what}`);
};

const listen = (where) =>
  new Promise((resolve) => {
    const server = createServer();
    server.once("error", () => resolve(undefined));
    server.listen(where, () => resolve(server));
  });

/** A port below those that the system gives to outgoing connections, for as long as we live. */
const freePort = async () => {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 20_000);
    // The system gives a socket's name to one process at a time.
    const claim = await listen(`\0florence-tests-${port}`);
    const probe = claim && (await listen({ port, host: "127.0.0.1" }));
    if (probe) {
      claim.unref();
      await new Promise((resolve) => probe.close(resolve));
      return port;
    }
    claim?.close();
  }
};

export class Server {
  /** A server that is ready; `settings` are lines of its configuration. */
  static async start(...settings) {
    const server = new Server();
    server.port = await freePort();
    server.directory = mkdtempSync(join(tmpdir(), "florence-"));
    const module = process.env.FLORENCE_MODULE ?? join(ROOT, "target/release/libflorence.so");
    const lines = [
      `port ${server.port}`,
      "bind 127.0.0.1",
      `dir ${server.directory}`,
      'save ""',
      `loadmodule ${resolve(module)}`,
      "florence.allow-networks 127.0.0.0/8",
      ...settings,
    ];
    writeFileSync(join(server.directory, "redis.conf"), lines.join("\n"));
    await server.spawn();
    return server;
  }

  get url() {
    return `redis://127.0.0.1:${this.port}`;
  }

  async spawn() {
    const { FLORENCE_SERVER = "redis-server", FLORENCE_SERVER_LIBS } = process.env;
    const log = openSync(join(this.directory, "log"), "a");
    this.process = spawn(FLORENCE_SERVER, [join(this.directory, "redis.conf")], {
      env: FLORENCE_SERVER_LIBS
        ? { ...process.env, LD_LIBRARY_PATH: FLORENCE_SERVER_LIBS }
        : process.env,
      stdio: ["ignore", log, log],
    });
    this.ended = new Promise((resolve) => this.process.once("exit", resolve));
    const failed = this.ended.then(() => {
      throw new Error(readFileSync(join(this.directory, "log"), "utf8"));
    });
    await Promise.race([failed, this.#isReady()]);
    failed.catch(() => {});
  }

  async #isReady() {
    if (!this.admin) {
      const socket = { reconnectStrategy: 20 };
      this.admin = createClient({ url: this.url, socket, RESP: 2 }).on("error", () => {});
      await this.admin.connect();
    }
    await eventually("the model is ready", async () => {
      const model = await this.call("FLORENCE.MODEL").catch(() => []);
      return model.includes("ready");
    });
  }

  call(...args) {
    return this.admin.sendCommand(args.map((arg) => (Buffer.isBuffer(arg) ? arg : String(arg))));
  }

  async kill() {
    this.process.kill("SIGKILL");
    await this.ended;
  }

  /** The process stands still, as one that is swapped out or being debugged. */
  async stopFor(ms) {
    this.process.kill("SIGSTOP");
    await sleep(ms);
    this.process.kill("SIGCONT");
  }

  /** The connections of others. */
  async clients() {
    const list = (await this.call("CLIENT", "LIST")).trim().split("\n");
    const mine = await this.call("CLIENT", "ID");
    return list.filter((line) => !line.startsWith(`id=${mine} `));
  }

  async close() {
    this.admin.destroy();
    await this.kill();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

export class Cluster {
  /** Three masters. */
  static async start() {
    const cluster = new Cluster();
    cluster.nodes = await Promise.all(
      [0, 1, 2].map(async () => {
        const bus = await freePort();
        const settings = ["cluster-enabled yes", "cluster-node-timeout 5000"];
        const node = await Server.start(...settings, `cluster-port ${bus}`);
        return Object.assign(node, { bus });
      }),
    );
    const [first] = cluster.nodes;
    for (const [i, node] of cluster.nodes.entries()) {
      const [from, to] = [i, i + 1].map((part) => Math.floor((16384 * part) / 3));
      await node.call("CLUSTER", "SET-CONFIG-EPOCH", i + 1);
      await node.call("CLUSTER", "ADDSLOTSRANGE", from, to - 1);
      if (i > 0) await node.call("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus);
    }
    for (const node of cluster.nodes) {
      await eventually("the cluster is whole", async () => {
        const info = await node.call("CLUSTER", "INFO");
        return info.includes("cluster_state:ok") && info.includes("cluster_known_nodes:3");
      });
    }
    return cluster;
  }

  async connect(options = {}) {
    const rootNodes = this.nodes.map(({ url }) => ({ url }));
    const client = createCluster({ rootNodes, ...options }).on("error", () => {});
    await client.connect();
    return client;
  }

  async close() {
    for (const node of this.nodes) await node.close();
  }
}
