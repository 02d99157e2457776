/** README.md says what is true, the types say it too, and the package has all that it needs. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { PACKAGE, SAMPLES, Server } from "./harness.js";

const run = (file, args, cwd) =>
  execFileSync(file, args, { cwd, encoding: "utf8", timeout: 60_000 });
const tsc = (args, cwd) =>
  run(process.execPath, [join(PACKAGE, "node_modules/typescript/bin/tsc"), ...args], cwd);

/** A project that has the package as it is published, and what it needs. */
let project;
before(() => {
  project = mkdtempSync(join(tmpdir(), "florence-"));
  const made = join(PACKAGE, "dist");
  rmSync(made, { recursive: true, force: true });
  mkdirSync(made);
  const name = run("npm", ["pack", "--silent", "--pack-destination", made], PACKAGE).trim();
  run("tar", ["xzf", join(made, name)], project);
  const modules = join(project, "node_modules");
  cpSync(join(project, "package"), join(modules, "florence-redis"), { recursive: true });
  for (const name of ["redis", "@redis", "@types", "undici-types"]) {
    symlinkSync(join(PACKAGE, "node_modules", name), join(modules, name));
  }
  writeFileSync(join(project, "package.json"), '{ "type": "module" }');
});
after(() => rmSync(project, { recursive: true }));

const text = readFileSync(join(PACKAGE, "README.md"), "utf8");
/** Of the readme: each example's code, and what it prints. */
const blocks = [...text.matchAll(/^```js\n(.*?)^```\n\n```\n(.*?)^```\n/gms)];

test("every example prints what the readme says", async () => {
  assert.equal(blocks.length, text.split("```js").length - 1);
  const server = await Server.start();
  const mark = "-- next --\n";
  const code = blocks
    .map(([, code]) => code)
    .join(`console.log(${JSON.stringify(mark.trim())});\n`);
  const example = code
    .replace("redis://localhost:6379", server.url)
    .replace("readFileSync(name)", `readFileSync(${JSON.stringify(`${SAMPLES}/`)} + name)`);
  writeFileSync(join(project, "example.mjs"), example);
  const printed = run(process.execPath, ["example.mjs"], project).split(mark);
  assert.deepEqual(
    printed,
    blocks.map(([, , expected]) => expected),
  );
  await server.close();
});

test("the sources, a program of a user and the readme's examples pass tsc", () => {
  tsc(["-p", "."], PACKAGE);
  cpSync(join(PACKAGE, "test/sample.ts"), join(project, "sample.ts"));
  const options = ["--strict", "--noEmit", "--module", "nodenext", "--target", "es2022"];
  writeFileSync(join(project, "readme.ts"), blocks.map(([, code]) => code).join(""));
  tsc([...options, "--types", "node", "--skipLibCheck", "sample.ts", "readme.ts"], project);
});
