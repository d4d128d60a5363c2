// The thread of the database: runs what the network thread sends, one unit of messages at a time.
//
// The backend blocks this thread while a statement runs. It takes COPY data out of the message port itself, and
// is interrupted through Node's inspector, which V8 lets in at the loops and calls of WebAssembly.

import { receiveMessageOnPort } from 'node:worker_threads';
import { log, SHARED } from './common.mjs';
import { READY_BYTES } from './engine.mjs';
import { PostgresError, parameterStatus } from './wire.mjs';

const MAX_UNSENT_BYTES = 32 * 1024 * 1024;
const MAX_WAL_BYTES = 256 * 1024 * 1024;
const MAX_IDLE_WAL_BYTES = 16 * 1024 * 1024;
const IDLE_MS = 250;
const INPUT_UNTIL_POLL_BYTES = 4 * 1024 * 1024;
const UNIT_BYTES = 4096; // what a unit counts for, however short

/** @typedef {import('node:worker_threads').MessagePort} MessagePort */

export class Backend {
  #engine;
  #sessions;
  #port;
  #shared;
  #running = false;
  #end = Buffer.alloc(0); // of the answer, with ReadyForQuery
  #inputBytes = 0; // since the size of the WAL was polled
  #idle = setTimeout(() => this.#checkpoint(MAX_IDLE_WAL_BYTES), IDLE_MS);

  /** @param {Engine} engine @param {Sessions} sessions @param {MessagePort} port @param {Int32Array} shared */
  constructor(engine, sessions, port, shared) {
    this.#engine = engine;
    this.#sessions = sessions;
    this.#port = port;
    this.#shared = shared;
    this.#replaceBuiltins();
    port.on('message', (request) => this.#perform(request));
  }

  /** The network thread calls it, in the middle of a statement. @param {number} pid */
  interrupt(pid) {
    if (this.#running && this.#sessions.current === pid) this.#engine.memory.setInterrupt(true);
  }

  // -- requests; each is done before the next is looked at

  /** @param {BackendRequest} request */
  #perform(request) {
    switch (request.type) {
      case 'unit':
        return this.#run(request.pid, request.bytes, request.marks);
      case 'copy': // too late: the COPY has failed
        return void this.#take(request.pid, request.bytes);
      case 'open':
        return this.#sessions.open(request.start);
      case 'close':
        this.#sessions.close(request.pid);
        return this.#reply({ type: 'closed', pid: request.pid });
      case 'stop':
        return void this.#stop();
    }
  }

  /** @type {(pid: number, bytes: Uint8Array, marks: string[]) => void} */
  #run(pid, bytes, marks) {
    try {
      this.#sessions.activate(pid, marks);
    } catch (error) {
      if (!(error instanceof PostgresError)) throw error;
      return this.#reply({ type: 'refused', pid, sqlstate: error.sqlstate, reason: error.message });
    }
    this.#running = true;
    const { statementTimeoutMs } = this.#engine;
    if (statementTimeoutMs) this.#reply({ type: 'limited', pid, ms: statementTimeoutMs });
    if (this.#isInterrupted()) this.interrupt(pid); // before it has begun
    this.#engine.run(
      bytes,
      () => this.#pull(),
      (piece) => this.#emit(piece),
    );
    this.#running = false;
    this.#finish(pid);
    this.#idle.refresh();
    this.#inputBytes += bytes.length + UNIT_BYTES;
    if (this.#inputBytes < INPUT_UNTIL_POLL_BYTES) return;
    this.#inputBytes = 0;
    this.#checkpoint(MAX_WAL_BYTES);
  }

  /** The end of the answer is sent when it is known what has changed. @param {number} pid */
  #finish(pid) {
    const { status, ready } = this.#engine;
    const { parameters, rolesChanged } = this.#sessions.settle();
    const statuses = Object.entries(parameters).map(([name, value]) => parameterStatus(name, value));
    const [rest, readyForQuery] = [this.#end.subarray(0, -READY_BYTES), this.#end.subarray(-READY_BYTES)];
    this.#end = Buffer.alloc(0);
    this.#send({
      type: 'done',
      pid,
      bytes: new Uint8Array(Buffer.concat([rest, ...statuses, readyForQuery])),
      free: ready && status === 'I',
      ...(rolesChanged && { roles: this.readRoles() }),
    });
  }

  async #stop() {
    this.#sessions.rollback();
    await this.#engine.close();
    log('stopped');
    process.exit(0);
  }

  /** @returns {Roles} */
  readRoles() {
    const [[json]] = this.#sessions.asSuperuser(
      `SELECT json_object_agg(rolname, json_build_object(
                'secret', rolpassword, 'superuser', rolsuper, 'login', rolcanlogin,
                'settings', (SELECT setconfig FROM pg_catalog.pg_db_role_setting
                              WHERE setrole = role.oid AND setdatabase = 0)))
         FROM pg_catalog.pg_authid AS role`,
    );
    return JSON.parse(json ?? '{}');
  }

  // -- answers

  /** @param {Buffer<ArrayBuffer>} piece */
  #emit(piece) {
    if (this.#engine.ready) this.#end = piece;
    else this.#send({ type: 'answer', pid: this.#sessions.current ?? 0, bytes: piece });
  }

  /** Waits while the client reads too slowly. @param {Extract<BackendReply, { type: 'answer' | 'done' }>} reply */
  #send(reply) {
    Atomics.add(this.#shared, SHARED.UNSENT_BYTES, reply.bytes.length);
    this.#port.postMessage(reply, [reply.bytes.buffer]);
    let unsent = Atomics.load(this.#shared, SHARED.UNSENT_BYTES);
    while (unsent > MAX_UNSENT_BYTES) {
      Atomics.wait(this.#shared, SHARED.UNSENT_BYTES, unsent);
      unsent = Atomics.load(this.#shared, SHARED.UNSENT_BYTES);
    }
  }

  /** @param {BackendReply} reply */
  #reply(reply) {
    this.#port.postMessage(reply);
  }

  // -- COPY FROM STDIN

  /** The next COPY data of the running statement, which waits for it as it would at a socket. */
  #pull() {
    for (;;) {
      const seen = Atomics.load(this.#shared, SHARED.REQUESTS);
      /** @type {BackendRequest | undefined} */
      const request = receiveMessageOnPort(this.#port)?.message;
      if (request?.type === 'copy') return this.#take(request.pid, request.bytes);
      if (request) this.#perform(request);
      else Atomics.wait(this.#shared, SHARED.REQUESTS, seen);
    }
  }

  /** @type {(pid: number, bytes: Uint8Array) => Uint8Array} */
  #take(pid, bytes) {
    this.#inputBytes += bytes.length;
    this.#reply({ type: 'copied', pid, length: bytes.length });
    return bytes;
  }

  // -- checkpoints: there is no checkpointer, and after a crash all since the last one is done again

  /** @param {number} maxBytes */
  #checkpoint(maxBytes) {
    if (!this.#engine.ready || this.#engine.status !== 'I') return;
    const [[written]] = this.#sessions.asSuperuser(
      `SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), redo_lsn)
         FROM pg_catalog.pg_control_checkpoint()`,
    );
    if (Number(written) > maxBytes) this.#sessions.asSuperuser('CHECKPOINT');
  }

  // -- builtin functions whose answer depends on the connection

  #replaceBuiltins() {
    // One backend would grant the same lock to every connection, and free the locks of all at once.
    const refuse = () => {
      const reason = 'the gateway has no advisory locks but pg_try_advisory_lock_shared(int, pg_backend_pid())';
      this.#engine.memory.raise('0A000', reason);
      return 0;
    };
    /** @type {Record<string, (call: number) => number>} */
    const replacements = {
      pg_backend_pid: () => this.#sessions.current ?? process.pid,
      pg_sleep: (call) => this.#sleep(this.#engine.memory.float8Argument(call)),
    };
    const functions = this.#engine.query(
      `SELECT oid, prosrc FROM pg_catalog.pg_proc
        WHERE prosrc ~ '^pg_(sleep|backend_pid|(try_)?advisory_.*)$'
          AND prosrc NOT IN ('pg_try_advisory_lock_shared_int4', 'pg_advisory_unlock_shared_int4')`,
    );
    for (const [oid, name] of functions) {
      this.#engine.memory.replaceBuiltin(Number(oid), replacements[name ?? ''] ?? refuse);
    }
  }

  /** The embedded pg_sleep keeps the processor busy and cannot be interrupted. @param {number} seconds */
  #sleep(seconds) {
    const end = performance.now() + seconds * 1000;
    for (let left = end - performance.now(); left > 0; left = end - performance.now()) {
      Atomics.wait(this.#shared, SHARED.INTERRUPTED, 0, left);
      if (this.#isInterrupted()) this.#engine.memory.setInterrupt(true);
      this.#engine.memory.checkInterrupts();
    }
    return 0;
  }

  #isInterrupted() {
    return Atomics.load(this.#shared, SHARED.INTERRUPTED) === this.#sessions.current;
  }
}
