// A PostgreSQL server of one process: the embedded TimescaleDB in this thread, its clients in another.
//
//     clients == TCP ==> frontend.mjs (worker thread) -- messages --> this thread: backend.mjs, engine.mjs
//
// Usage: node main.mjs --port=N --data=DIRECTORY --template=DIRECTORY --user=ROLE --database=NAME, with
// GATEWAY_PASSWORD in the environment; with --certificate, --key and --authority (PEM files) it speaks TLS only.
// Ends gracefully at the end of its standard input if that is a pipe, or on SIGTERM once no statement is running.
// README.md says how it differs from a real server.

import fs from 'node:fs';
import { parseArgs } from 'node:util';
import { MessageChannel, Worker } from 'node:worker_threads';
import { Backend } from './backend.mjs';
import { log, SHARED } from './common.mjs';
import { Engine, identifier } from './engine.mjs';
import { verifier } from './scram.mjs';
import { REPORTED, Sessions } from './sessions.mjs';

const USAGE = 64; // as in sysexits.h
const FAILED = 70;

/** @type {(what: string) => (error: unknown) => never} */
const die = (what) => (error) => {
  const stack = String(error instanceof Error ? error.stack : error).split('\n');
  const ours = stack.filter((line) => !line.includes('wasm://')).slice(0, 5);
  log(`${what}: ${ours.join('\n')}`);
  process.exit(FAILED);
};

const names = ['port', 'data', 'template', 'user', 'database', 'certificate', 'key', 'authority'];
const { values } = parseArgs({ options: Object.fromEntries(names.map((name) => [name, { type: 'string' }])) });
const { port, data, template, user, database, certificate, key, authority } =
  /** @type {Record<string, string | undefined>} */ (values);
if (!port || !data || !template || !user || !database) {
  log('--port, --data, --template, --user and --database are needed');
  process.exit(USAGE);
}
const password = process.env.GATEWAY_PASSWORD ?? '';
delete process.env.GATEWAY_PASSWORD;

process.on('uncaughtException', die('the database failed and the server ends'));
const engine = await Engine.open(data, database, template);
// Without LOAD, a reopened database refuses the community features.
engine.query("CREATE EXTENSION IF NOT EXISTS timescaledb; LOAD 'timescaledb'");
const shared = new Int32Array(new SharedArrayBuffer(4 * Object.keys(SHARED).length));
const { port1, port2 } = new MessageChannel();
const backend = new Backend(engine, new Sessions(engine), port1, shared);
globalThis.gatewayInterrupt = (pid) => backend.interrupt(pid); // called by the worker through the inspector
if (!backend.readRoles()[user]) engine.query(`CREATE ROLE ${identifier(user)}`);
engine.query(`ALTER ROLE ${identifier(user)} SUPERUSER LOGIN PASSWORD '${verifier(password)}'`);

/** @type {FrontendData} */
const workerData = {
  port: Number(port),
  database,
  backend: port2,
  shared,
  reported: Object.fromEntries(REPORTED.map((name) => [name, engine.setting(name)])),
  roles: backend.readRoles(),
  tls: readTls(),
};
const worker = new Worker(new URL('./frontend.mjs', import.meta.url), { workerData, transferList: [port2] });
worker.on('error', die('the server ends'));
worker.on('exit', (code) => die('the server ends')(`its network thread ended with code ${code}`));
process.on('SIGTERM', () => worker.postMessage('stop'));
process.on('SIGINT', () => worker.postMessage('stop'));

function readTls() {
  if (!certificate || !key || !authority) return null;
  return { cert: fs.readFileSync(certificate), key: fs.readFileSync(key), ca: fs.readFileSync(authority) };
}
