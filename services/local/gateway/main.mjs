// A PostgreSQL server of one process: the embedded TimescaleDB in this thread, its clients in another.
//
//     clients == TCP ==> frontend.mjs (worker thread) -- messages --> this thread: sessions.mjs, engine.mjs
//
// The backend blocks its thread while a statement runs. The worker goes on reading sockets meanwhile, so that
// new clients are greeted, waiting statements can be cancelled, and so can the running one: the worker reaches
// into this thread through Node's inspector, which V8 lets in at the loops and calls of WebAssembly.
//
// Usage: node main.mjs --port=N --data=DIRECTORY --template=DIRECTORY --user=ROLE --database=NAME, with
// GATEWAY_PASSWORD in the environment; with --certificate, --key and --authority (PEM files) it speaks TLS only.
// Ends gracefully on SIGTERM, or at the end of its standard input when that is a pipe.
//
// What is unlike a real server: one statement at a time, so a connection in a transaction makes the others
// wait until it ends. An advisory lock that another connection holds cannot be waited for: pg_advisory_lock
// fails with 55P03 at once, and lock_timeout and idle_in_transaction_session_timeout do nothing.
// statement_timeout counts from the moment a statement gets the backend. One database. No background
// workers, no replication; pg_stat_activity is empty. WITH HOLD cursors share their names. A statement whose
// recursion exhausts V8's stack ends the server, as a crash of PostgreSQL would. The statement of a client
// that goes away is cancelled.
// A role that is no superuser could become one with RESET SESSION AUTHORIZATION inside a transaction: roles
// here show what a program may do by mistake, they do not keep out an attacker.

import fs from 'node:fs';
import { parseArgs } from 'node:util';
import { MessageChannel, Worker, receiveMessageOnPort } from 'node:worker_threads';
import { Engine } from './engine.mjs';
import { matches, verifier } from './scram.mjs';
import { REPORTED, Sessions } from './sessions.mjs';

const MOST_WAL_BYTES = 256 * 1024 * 1024;
const MOST_IDLE_WAL_BYTES = 16 * 1024 * 1024;
const IDLE_MS = 250;
const FLUSH_BYTES = 64 * 1024;
const MOST_UNSENT_BYTES = 32 * 1024 * 1024;

const log = (line) => fs.writeSync(2, `${new Date().toISOString()} ${line}\n`);
const die = (what) => (error) => {
  const stack = String(error?.stack ?? error).split('\n').filter((line) => !line.includes('wasm://'));
  log(`${what}: ${stack.slice(0, 5).join('\n')}`);
  process.exit(70);
};
process.on('uncaughtException', die('the database failed and the server ends'));

const option = { type: 'string' };
const { values: options } = parseArgs({
  options: {
    port: option, data: option, template: option, user: option, database: option,
    certificate: option, key: option, authority: option,
  },
});
const password = process.env.GATEWAY_PASSWORD ?? '';
delete process.env.GATEWAY_PASSWORD;

// -- the database

const engine = await Engine.open(options.data, options.database, options.template);
const sessions = new Sessions(engine);
prepareDatabase();

function prepareDatabase() {
  const name = `"${options.user.replaceAll('"', '""')}"`;
  // Without LOAD, a reopened database refuses the community features.
  engine.query("CREATE EXTENSION IF NOT EXISTS timescaledb; LOAD 'timescaledb'");
  const role = readRoles()[options.user];
  if (!role) engine.query(`CREATE ROLE ${name} SUPERUSER LOGIN`);
  if (!matches(role?.secret, password)) {
    engine.query(`ALTER ROLE ${name} SUPERUSER LOGIN PASSWORD '${verifier(password)}'`);
  }
}

function tlsFiles() {
  const [cert, key, ca] = [options.certificate, options.key, options.authority].map((path) => fs.readFileSync(path));
  return { cert, key, ca };
}

function readRoles(query = (sql) => engine.query(sql)) {
  const [[json]] = query(
    `SELECT json_object_agg(rolname, json_build_object(
              'secret', rolpassword, 'superuser', rolsuper, 'login', rolcanlogin,
              'settings', (SELECT setconfig FROM pg_catalog.pg_db_role_setting
                            WHERE setrole = role.oid AND setdatabase = 0)))
       FROM pg_catalog.pg_authid AS role`,
  );
  return JSON.parse(json);
}

// -- the other thread

/** [0] messages sent to this thread, [1] bytes of answers not yet sent to clients, [2] connection to interrupt. */
const shared = new Int32Array(new SharedArrayBuffer(12));
const { port1: port, port2: frontendPort } = new MessageChannel();
let running = false;

engine.replace({
  ...sessions.advisoryLocks(),
  pg_backend_pid: () => sessions.current ?? process.pid,
  pg_cancel_backend: (call) => ask('cancel', call.int32(0)),
  pg_terminate_backend: (call) => ask('terminate', call.int32(0)),
  pg_sleep: (call) => sleep(call.float64(0)),
});

function ask(type, pid) {
  if (!sessions.has(pid)) {
    engine.warn('01000', 'no connection has that PID');
    return 0;
  }
  port.postMessage({ type, pid });
  return 1;
}

/** The embedded pg_sleep keeps the processor busy and cannot be interrupted. */
function sleep(seconds) {
  const end = performance.now() + seconds * 1000;
  for (let left = end - performance.now(); left > 0; left = end - performance.now()) {
    Atomics.wait(shared, 2, 0, left);
    if (Atomics.load(shared, 2) === sessions.current) engine.interrupt();
    engine.checkInterrupts();
  }
  return 0;
}

/** Called by the worker through the inspector, in the middle of a statement. */
globalThis.gatewayInterrupt = (pid) => {
  if (running && sessions.current === pid) engine.interrupt();
};

let pieces = [];
let piecesBytes = 0;

function emit(piece) {
  pieces.push(piece);
  piecesBytes += piece.length;
  if (piecesBytes >= FLUSH_BYTES) send({ type: 'answer' });
}

/** Send what was emitted along with `reply`; waits while the client reads too slowly. */
function send(reply) {
  const bytes = new Uint8Array(piecesBytes);
  let at = 0;
  for (const piece of pieces) {
    bytes.set(piece, at);
    at += piece.length;
  }
  pieces = [];
  piecesBytes = 0;
  Atomics.add(shared, 1, bytes.length);
  port.postMessage({ ...reply, pid: sessions.current, bytes }, [bytes.buffer]);
  for (let unsent; (unsent = Atomics.load(shared, 1)) > MOST_UNSENT_BYTES; ) Atomics.wait(shared, 1, unsent);
}

/** The next bytes of COPY data: the backend waits for them as it would at a socket. */
function pull() {
  for (;;) {
    const seen = Atomics.load(shared, 0);
    const received = receiveMessageOnPort(port)?.message;
    if (received?.type === 'more') {
      taken += 1;
      moreBytes += received.bytes.length;
      port.postMessage({ type: 'taken', pid: sessions.current, length: received.bytes.length });
      return received.bytes;
    }
    if (received) perform(received);
    else {
      if (piecesBytes) send({ type: 'answer' });
      Atomics.wait(shared, 0, seen);
    }
  }
}

// -- what the worker asks for; everything that `perform` does is done before the next is looked at

let taken = 0;
let moreBytes = 0;

function unit({ pid, bytes, marks, usesUnnamed, parsesUnnamed }) {
  taken += 1;
  try {
    sessions.activate(pid);
  } catch (error) {
    if (error.code === undefined) throw error;
    return port.postMessage({ type: 'refused', pid, taken, code: error.code, reason: error.message });
  }
  if (usesUnnamed) sessions.restoreUnnamed(pid);
  if (marks) sessions.mark(pid, marks);
  running = true;
  if (Atomics.load(shared, 2) === pid) engine.interrupt(); // cancelled before it has begun
  engine.run(bytes, pull, emit);
  running = false;
  if (parsesUnnamed) sessions.parsedUnnamed(pid, parsesUnnamed);
  // The answer goes out before anything else may fail, and it ends with ReadyForQuery, which the worker holds
  // back until `done` tells it what has changed.
  const roles = sessions.marks(pid)?.roles && engine.ready && engine.status === 'I';
  const parameters = sessions.settle(pid);
  send({ type: 'done', taken, parameters, roles: roles && readRoles((sql) => sessions.asSuperuser(sql)) });
  checkpointInTime(bytes.length + moreBytes);
  moreBytes = 0;
}

// -- checkpoints: there is no checkpointer, and after a crash all since the last one is done again

let unitsUntilLook = 0;
const idle = setTimeout(() => checkpoint(MOST_IDLE_WAL_BYTES), IDLE_MS);

function checkpointInTime(length) {
  idle.refresh();
  unitsUntilLook -= 1 + length / 4096;
  if (unitsUntilLook > 0) return;
  unitsUntilLook = 1000;
  checkpoint(MOST_WAL_BYTES);
}

function checkpoint(mostBytes) {
  if (!engine.ready || engine.status !== 'I') return;
  const [[written]] = sessions.asSuperuser(
    `SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), redo_lsn)
       FROM pg_catalog.pg_control_checkpoint()`,
  );
  if (Number(written) > mostBytes) sessions.asSuperuser('CHECKPOINT');
}

function perform(received) {
  switch (received.type) {
    case 'unit':
      return unit(received);
    case 'more': // COPY data that came too late: the COPY has failed
      taken += 1;
      port.postMessage({ type: 'taken', pid: received.pid, length: received.bytes.length });
      return port.postMessage({ type: 'done', pid: received.pid, taken, bytes: new Uint8Array(0) });
    case 'open':
      return sessions.open(received.session);
    case 'close':
      sessions.close(received.pid);
      return port.postMessage({ type: 'closed', pid: received.pid });
    case 'stop':
      return void stop();
  }
}

async function stop() {
  await engine.close();
  log('stopped');
  process.exit(0);
}

const base = Object.fromEntries(REPORTED.map((name) => [name, engine.query(`SHOW ${name}`)[0][0]]));
const worker = new Worker(new URL('./frontend.mjs', import.meta.url), {
  workerData: {
    port: Number(options.port), database: options.database, backend: frontendPort, shared, base,
    roles: readRoles(), tls: options.certificate && tlsFiles(),
  },
  transferList: [frontendPort],
});
worker.on('error', die('the server ends'));
worker.on('exit', (code) => die('the server ends')(`its network thread ended with code ${code}`));
port.on('message', perform);
process.on('SIGTERM', () => worker.postMessage('stop'));
process.on('SIGINT', () => worker.postMessage('stop'));
