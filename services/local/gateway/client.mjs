// One connection after its login: its statements wait for the backend, and its answers come back to it.

import { randomInt } from 'node:crypto';
import { AnswerFrames, ClientFrames, ProtocolError } from './frames.mjs';
import { Statements } from './statements.mjs';
import {
  CLIENT,
  copyFail,
  errorResponse,
  fields,
  int32,
  message,
  parameterStatus,
  readyForQuery,
  SERVER,
  SYNC,
} from './wire.mjs';

const MAX_UNREAD_BYTES = 4 * 1024 * 1024; // of COPY data or statements not yet with the backend; then the socket is paused
const MAX_UNIT_BYTES = 1024 * 1024; // a unit this large is handed over before its Sync has come
const CANCELLED = 'canceling statement due to user request';
const TIMED_OUT = 'canceling statement due to statement timeout';
const ENDS_UNIT = new Set([CLIENT.QUERY, CLIENT.SYNC, CLIENT.FLUSH]);

/**
 * @typedef {import('./types.d.ts').Marks} Marks
 * @typedef {import('./types.d.ts').Done} Done
 */

/** Messages up to and including the one that asks for an answer. */
const newUnit = () => ({
  /** @type {Buffer[]} */
  parts: [],
  length: 0,
  /** @type {Marks | null} */
  marks: null,
  ready: false, // its answer ends with ReadyForQuery
});

export class Client {
  key = randomInt(1, 2 ** 31);
  #hub;
  #socket;
  #frames = new ClientFrames();
  #answers = new AnswerFrames();
  #statements;
  #closed = false;
  /** @type {Record<string, string>} */
  #parameters; // as the client knows them

  // towards the backend
  #unit = newUnit();
  /** @type {ReturnType<typeof newUnit>[]} */
  #outbox = [];
  #running = false;
  #skipping = false; // until Sync
  #unreadBytes = 0; // COPY data that the backend has not taken yet

  // what the running statement has come to
  #status = 'I';
  #isReady = true; // the last message of the answer was ReadyForQuery
  #copiesIn = false;
  /** @type {string | null} */
  #cancelReason = null;
  #timeoutMs;
  /** @type {NodeJS.Timeout | undefined} */
  #timer;

  /**
   * @param {import('./frontend.mjs').Hub} hub
   * @param {import('node:net').Socket} socket
   * @param {number} pid
   * @param {Record<string, string>} parameters
   * @param {string} statementTimeout
   */
  constructor(hub, socket, pid, parameters, statementTimeout = '0') {
    this.#hub = hub;
    this.#socket = socket;
    this.pid = pid;
    this.#parameters = parameters;
    this.#timeoutMs = milliseconds(statementTimeout);
    this.#statements = new Statements(`${pid}:`);
    socket.on('data', (chunk) => this.feed(chunk)).on('close', () => this.#close());
    const statuses = Object.entries(parameters).map(([name, value]) => parameterStatus(name, value));
    const key = message('K', int32(pid), int32(this.key));
    socket.write(Buffer.concat([message('R', int32(0)), ...statuses, key, readyForQuery('I')]));
  }

  // -- what the client sends

  /** @param {Buffer} chunk */
  feed(chunk) {
    try {
      for (const { type, bytes } of this.#frames.cut(chunk)) {
        if (this.#closed) return;
        this.#take(type, bytes);
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      this.fail('08P01', error.message);
    }
  }

  /** @type {(type: number, bytes: Buffer) => void} */
  #take(type, bytes) {
    switch (type) {
      case CLIENT.TERMINATE:
        this.#socket.end();
        return this.#close();
      case CLIENT.COPY_DATA:
        return this.#copy(bytes);
      case CLIENT.COPY_DONE:
      case CLIENT.COPY_FAIL:
        this.#copy(bytes);
        this.#copiesIn = false;
        return;
      default:
        return this.#skipping ? this.#skip(type) : this.#collect(type, bytes);
    }
  }

  /**
   * For the running COPY; what comes after it has failed is for nobody.
   * @param {Buffer} bytes
   */
  #copy(bytes) {
    if (!this.#running) return;
    this.#unreadBytes += bytes.length;
    if (this.#unreadBytes > MAX_UNREAD_BYTES) this.#socket.pause();
    this.#hub.postBytes({ type: 'more', pid: this.pid, bytes: new Uint8Array(bytes) });
  }

  /**
   * The backend has taken COPY data.
   * @param {number} length
   */
  taken(length) {
    this.#unreadBytes -= length;
    if (this.#unreadBytes < MAX_UNREAD_BYTES / 2) this.#socket.resume();
  }

  /** @param {number} type */
  #skip(type) {
    if (type !== CLIENT.SYNC) return;
    this.#skipping = false;
    this.#socket.write(readyForQuery('I'));
  }

  /** @type {(type: number, bytes: Buffer) => void} */
  #collect(type, bytes) {
    const rewritten = this.#statements.rewrite(type, bytes);
    if (!rewritten) return this.fail('08P01', `invalid frontend message type ${type}`);
    const unit = this.#unit;
    unit.parts.push(rewritten.bytes);
    unit.length += rewritten.bytes.length;
    if (rewritten.marks) unit.marks = { ...unit.marks, ...rewritten.marks };
    if (!ENDS_UNIT.has(type) && unit.length < MAX_UNIT_BYTES) return;
    unit.ready = type === CLIENT.QUERY || type === CLIENT.SYNC;
    this.#unit = newUnit();
    this.#outbox.push(unit);
    if (this.#hub.holds(this)) this.proceed();
    else this.#hub.acquire(this);
    if (this.#waitingBytes() > MAX_UNREAD_BYTES) this.#socket.pause();
  }

  #waitingBytes() {
    return this.#outbox.reduce((sum, unit) => sum + unit.length, 0);
  }

  // -- taking turns

  /** The backend is this connection's: give it the next unit. */
  proceed() {
    if (this.#closed) return this.#hub.post({ type: 'close', pid: this.pid });
    if (this.#running) return;
    const unit = this.#outbox.shift();
    if (!unit) return;
    this.#running = true;
    this.#isReady = false; // without Sync it keeps the backend
    this.#cancelReason = null;
    if (this.#timeoutMs > 0) this.#timer = setTimeout(() => this.cancel(TIMED_OUT), this.#timeoutMs);
    this.#hub.calm();
    const bytes = new Uint8Array(Buffer.concat(unit.parts));
    this.#hub.postBytes({ type: 'unit', pid: this.pid, bytes, marks: unit.marks });
    if (this.#unreadBytes < MAX_UNREAD_BYTES) this.#socket.resume();
  }

  /** The backend has taken and answered everything that it was sent. */
  done() {
    clearTimeout(this.#timer);
    this.#running = false;
    if (this.#closed) return this.proceed();
    const free = this.#status === 'I' && this.#isReady;
    if (!free || (this.#outbox.length && !this.#hub.contended)) return this.proceed();
    if (this.#outbox.length) this.#hub.acquire(this);
    this.#hub.release(this);
  }

  cancel(reason = CANCELLED) {
    if (this.#closed) return;
    if (this.#hub.isWaiting(this)) return this.#cancelWaiting(reason);
    if (this.#running) this.#interrupt(reason);
  }

  /** @param {string} reason */
  #cancelWaiting(reason) {
    const ready = this.#outbox.filter((unit) => unit.ready).length;
    this.#hub.leave(this);
    this.#skipping = this.#unit.length > 0 || !this.#outbox.at(-1)?.ready;
    this.#unit = newUnit();
    this.#outbox = [];
    this.#socket.write(errorResponse('ERROR', '57014', reason));
    for (let count = ready; count > 0; count--) this.#socket.write(readyForQuery('I'));
  }

  /**
   * A backend that waits for COPY data is not reached by an interrupt.
   * @param {string} reason
   */
  #interrupt(reason) {
    this.#cancelReason = reason;
    if (!this.#copiesIn) return void this.#hub.interrupt(this.pid);
    // The rest of a message that was cut short comes first, or CopyFail would be taken for that rest.
    this.#copy(Buffer.concat([Buffer.alloc(this.#frames.copyRest), copyFail(reason)]));
  }

  // -- what the backend answers

  /**
   * Pass an answer on; `done` is null while there is more to come.
   * @param {Buffer} bytes
   * @param {Done | null} done
   */
  answer(bytes, done) {
    if (this.#closed) return this.#hub.sent(bytes.length);
    const pieces = [];
    for (const frame of this.#answers.cut(bytes)) {
      this.#isReady = frame.type === SERVER.READY;
      const piece = this.#look(frame.type, frame.bytes);
      if (piece) pieces.push(piece);
    }
    // Changed parameters go before ReadyForQuery, as a server reports them.
    if (done?.parameters) pieces.splice(this.#isReady ? -1 : pieces.length, 0, ...this.#changed(done.parameters));
    this.#socket.cork();
    for (const piece of pieces) this.#socket.write(piece);
    this.#socket.write('', () => this.#hub.sent(bytes.length));
    this.#socket.uncork();
  }

  /**
   * Note what a message says; returns what the client gets for it.
   * @type {(type: number, bytes: Buffer) => Buffer | null}
   */
  #look(type, bytes) {
    switch (type) {
      case SERVER.COPY_IN:
        this.#copiesIn = true;
        return bytes;
      case SERVER.READY:
        this.#copiesIn = false;
        this.#status = String.fromCharCode(bytes[5]);
        return bytes;
      case SERVER.ERROR:
        this.#copiesIn = false;
        return this.#explain(bytes);
      case SERVER.NOTICE: // one of them is debugging output of the embedded build
        return fields(bytes).R === 'RecordTransactionAbort' ? null : bytes;
      default:
        return bytes;
    }
  }

  /**
   * A cancelled statement says why, as a server would.
   * @param {Buffer} bytes
   */
  #explain(bytes) {
    if (!this.#cancelReason || fields(bytes).C !== '57014') return bytes;
    return errorResponse('ERROR', '57014', this.#cancelReason);
  }

  /** @param {Record<string, string>} parameters */
  #changed(parameters) {
    this.#timeoutMs = milliseconds(parameters.statement_timeout);
    const changed = Object.keys(this.#parameters).filter((name) => parameters[name] !== this.#parameters[name]);
    for (const name of changed) this.#parameters[name] = parameters[name];
    return changed.map((name) => parameterStatus(name, parameters[name]));
  }

  // -- the end

  /**
   * Tell the client and hang up.
   * @param {string} state SQLSTATE
   * @param {string} reason
   */
  fail(state, reason) {
    if (this.#closed) return;
    this.#socket.end(errorResponse('FATAL', state, reason));
    this.#socket.destroySoon();
    this.#close();
  }

  #close() {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#outbox = [];
    this.#hub.leave(this);
    if (!this.#hub.holds(this)) return this.#hub.acquire(this);
    if (!this.#running) return this.proceed();
    // Nobody waits for the statement any more, and everybody else waits for the backend.
    const copied = this.#copiesIn;
    this.#interrupt('connection lost');
    if (copied) this.#copy(SYNC);
  }
}

/**
 * A value of statement_timeout: 0, 250ms, 2s, 5min, 1h.
 * @param {string} shown
 */
export function milliseconds(shown) {
  const [, number, unit = 'ms'] = /^(\d+)\s*(ms|s|min|h|d)?$/.exec(shown) ?? [];
  return Number(number ?? 0) * ({ ms: 1, s: 1e3, min: 6e4, h: 36e5, d: 864e5 }[unit] ?? 1);
}
