// The thread of the database: runs what the network thread sends, one unit of messages at a time.
//
// The backend blocks this thread while a statement runs. It takes COPY data out of the message port itself, and
// is interrupted through Node's inspector, which V8 lets in at the loops and calls of WebAssembly.

import { receiveMessageOnPort } from 'node:worker_threads';
import { log, SHARED } from './common.mjs';
import { QueryError } from './engine.mjs';
import { checkInterrupts, raise, replaceBuiltins, setInterrupt } from './workarounds.mjs';

const FLUSH_BYTES = 64 * 1024;
const MAX_UNSENT_BYTES = 32 * 1024 * 1024;
const MAX_WAL_BYTES = 256 * 1024 * 1024;
const MAX_IDLE_WAL_BYTES = 16 * 1024 * 1024;
const IDLE_MS = 250;
const UNITS_UNTIL_POLL = 1000;

/**
 * @typedef {import('./types.d.ts').Request} Request
 * @typedef {import('./types.d.ts').Roles} Roles
 */

export class Backend {
  #engine;
  #sessions;
  #port;
  #shared;
  #running = false;
  /** @type {Buffer[]} */
  #pieces = []; // of the answer, not sent yet
  #piecesBytes = 0;
  #taken = 0; // units and COPY data since the start
  #unitsUntilLook = 0;
  #idle = setTimeout(() => this.#checkpoint(MAX_IDLE_WAL_BYTES), IDLE_MS);

  /**
   * @param {import('./engine.mjs').Engine} engine
   * @param {import('./sessions.mjs').Sessions} sessions
   * @param {import('node:worker_threads').MessagePort} port
   * @param {Int32Array} shared
   */
  constructor(engine, sessions, port, shared) {
    this.#engine = engine;
    this.#sessions = sessions;
    this.#port = port;
    this.#shared = shared;
    this.#replaceBuiltins();
    port.on('message', (request) => this.#perform(request));
  }

  /**
   * The network thread calls it, in the middle of a statement.
   * @param {number} pid
   */
  interrupt(pid) {
    if (this.#running && this.#sessions.current === pid) setInterrupt(this.#engine.module, true);
  }

  // -- requests; each is done before the next is looked at

  /** @param {Request} request */
  #perform(request) {
    switch (request.type) {
      case 'unit':
        return this.#unit(request);
      case 'more': // COPY data that came too late: the COPY has failed
        this.#take(request);
        return this.#reply({ type: 'done', pid: request.pid, taken: this.#taken, bytes: new Uint8Array(0) });
      case 'open':
        return this.#sessions.open(request.start);
      case 'close':
        this.#sessions.close(request.pid);
        return this.#reply({ type: 'closed', pid: request.pid });
      case 'stop':
        return void this.#stop();
    }
  }

  /** @param {import('./types.d.ts').Unit} unit */
  #unit({ pid, bytes, marks }) {
    this.#taken += 1;
    try {
      this.#sessions.activate(pid, marks);
    } catch (error) {
      if (!(error instanceof QueryError)) throw error;
      return this.#reply({ type: 'refused', pid, taken: this.#taken, state: error.state, reason: error.message });
    }
    this.#running = true;
    if (Atomics.load(this.#shared, SHARED.INTERRUPTED) === pid) setInterrupt(this.#engine.module, true); // before it has begun
    this.#engine.run(
      bytes,
      () => this.#pull(),
      (piece) => this.#emit(piece),
    );
    this.#running = false;
    // The answer's end, ReadyForQuery, is not sent before it is known what has changed.
    const { parameters, roles } = this.#sessions.settle();
    const answer = this.#flushed();
    this.#send({
      type: 'done',
      pid,
      taken: this.#taken,
      bytes: answer,
      parameters,
      roles: roles ? this.readRoles() : null,
    });
    this.#checkpointInTime(bytes.length);
  }

  async #stop() {
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

  /** @param {Buffer} piece */
  #emit(piece) {
    this.#pieces.push(piece);
    this.#piecesBytes += piece.length;
    if (this.#piecesBytes >= FLUSH_BYTES) this.#sendAnswer();
  }

  #flushed() {
    const bytes = new Uint8Array(Buffer.concat(this.#pieces));
    this.#pieces = [];
    this.#piecesBytes = 0;
    return bytes;
  }

  #sendAnswer() {
    this.#send({ type: 'answer', pid: this.#sessions.current ?? 0, bytes: this.#flushed() });
  }

  /**
   * Waits while the client reads too slowly.
   * @param {import('./types.d.ts').Answer | import('./types.d.ts').Done} reply
   */
  #send(reply) {
    Atomics.add(this.#shared, SHARED.UNSENT_BYTES, reply.bytes.length);
    this.#port.postMessage(reply, [reply.bytes.buffer]);
    let unsent = Atomics.load(this.#shared, SHARED.UNSENT_BYTES);
    while (unsent > MAX_UNSENT_BYTES) {
      Atomics.wait(this.#shared, SHARED.UNSENT_BYTES, unsent);
      unsent = Atomics.load(this.#shared, SHARED.UNSENT_BYTES);
    }
  }

  /** @param {import('./types.d.ts').Reply} reply */
  #reply(reply) {
    this.#port.postMessage(reply);
  }

  // -- COPY FROM STDIN

  /** The next bytes of COPY data: the backend waits for them as it would at a socket. */
  #pull() {
    for (;;) {
      const seen = Atomics.load(this.#shared, SHARED.REQUESTS);
      /** @type {Request | undefined} */
      const request = receiveMessageOnPort(this.#port)?.message;
      if (request?.type === 'more') return this.#take(request);
      if (request) this.#perform(request);
      else {
        if (this.#piecesBytes) this.#sendAnswer();
        Atomics.wait(this.#shared, SHARED.REQUESTS, seen);
      }
    }
  }

  /** @param {import('./types.d.ts').CopyData} request */
  #take({ pid, bytes }) {
    this.#taken += 1;
    this.#unitsUntilLook -= bytes.length / 4096;
    this.#reply({ type: 'taken', pid, length: bytes.length });
    return bytes;
  }

  // -- checkpoints: there is no checkpointer, and after a crash all since the last one is done again

  /** @param {number} bytes */
  #checkpointInTime(bytes) {
    this.#idle.refresh();
    this.#unitsUntilLook -= 1 + bytes / 4096;
    if (this.#unitsUntilLook > 0) return;
    this.#unitsUntilLook = UNITS_UNTIL_POLL;
    this.#checkpoint(MAX_WAL_BYTES);
  }

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
    const own = {
      pg_backend_pid: () => this.#sessions.current ?? process.pid,
      pg_sleep: (/** @type {{ float64: (index: number) => number }} */ call) => this.#sleep(call.float64(0)),
      /** @type {import('./workarounds.mjs').Replacement} */
      pg_try_advisory_lock_shared_int4: (call, original) => {
        this.#sessions.locked(call.int32(0), call.int32(1));
        return original();
      },
    };
    // One backend would grant the same lock to every connection, and free the locks of all at once.
    const refuse = () => {
      raise(
        this.#engine.module,
        '0A000',
        'the gateway has no advisory locks but pg_try_advisory_lock_shared(int, int)',
      );
      return 0;
    };
    replaceBuiltins(this.#engine.module, this.#engine.functions, own, (name) =>
      /advisory_unlock_shared_int4$/.test(name) ? null : refuse,
    );
  }

  /**
   * The embedded pg_sleep keeps the processor busy and cannot be interrupted.
   * @param {number} seconds
   */
  #sleep(seconds) {
    const end = performance.now() + seconds * 1000;
    for (let left = end - performance.now(); left > 0; left = end - performance.now()) {
      Atomics.wait(this.#shared, SHARED.INTERRUPTED, 0, left);
      if (Atomics.load(this.#shared, SHARED.INTERRUPTED) === this.#sessions.current)
        setInterrupt(this.#engine.module, true);
      checkInterrupts(this.#engine.module);
    }
    return 0;
  }
}
