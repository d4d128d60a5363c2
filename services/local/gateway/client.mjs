// One connection after its login: its statements wait for the backend, and its answers come back to it.

import { randomInt } from 'node:crypto';
import { Frames } from './frames.mjs';
import { Statements } from './statements.mjs';
import {
  authentication,
  CLIENT,
  copyFail,
  errorResponse,
  int32,
  message,
  PostgresError,
  parameterStatus,
  readyForQuery,
  SERVER,
} from './wire.mjs';
import { statementPrefix, withoutWarning, withReason } from './workarounds.mjs';

const MAX_UNREAD_BYTES = 4 * 1024 * 1024; // COPY data or statements before the backend; then the socket is paused
const MAX_UNIT_BYTES = 1024 * 1024; // a unit this large is handed over before its Sync has come
const CANCELED = 'canceling statement due to user request';
const TIMED_OUT = 'canceling statement due to statement timeout';
const ENDS_UNIT = new Set([CLIENT.QUERY, CLIENT.SYNC, CLIENT.FLUSH]);

/** Messages up to and including the one that asks for an answer. */
class Unit {
  /** @type {Buffer[]} */
  parts = [];
  length = 0;
  /** @type {string[]} */
  marks = [];
  last = ''; // type of the last message
}

export class Client {
  key = randomInt(1, 2 ** 31);
  #hub;
  #socket;
  #frames = new Frames();
  #statements;
  #unit = new Unit(); // of which more is to come
  /** @type {Unit[]} */
  #outbox = [];
  #running = false;
  #skipping = false; // until Sync
  #unreadBytes = 0; // COPY data that the backend has not taken yet
  #timedOut = false;
  /** @type {NodeJS.Timeout | undefined} */
  #timer;
  #closed = false;

  /** @param {Hub} hub @param {Socket} socket @param {number} pid @param {Record<string, string>} reported */
  constructor(hub, socket, pid, reported) {
    this.#hub = hub;
    this.#socket = socket;
    this.pid = pid;
    this.#statements = new Statements(statementPrefix(pid));
    const statuses = Object.entries(reported).map(([name, value]) => parameterStatus(name, value));
    const key = message(SERVER.KEY, int32(pid), int32(this.key));
    socket.write(Buffer.concat([authentication(0), ...statuses, key, readyForQuery('I')]));
    socket.on('close', () => this.#close()).on('data', (chunk) => this.#feed(chunk));
    socket.resume(); // the login has read in paused mode
  }

  // -- what the client sends

  /** @param {Buffer} chunk */
  #feed(chunk) {
    try {
      for (const { type, bytes } of this.#frames.cut(chunk)) {
        if (this.#closed) return;
        this.#take(type, bytes);
      }
    } catch (error) {
      if (!(error instanceof PostgresError)) throw error;
      this.fail(error.sqlstate, error.message);
    }
  }

  /** @type {(type: string, bytes: Buffer) => void} */
  #take(type, bytes) {
    switch (type) {
      case CLIENT.TERMINATE:
        this.#socket.end();
        return this.#close();
      case CLIENT.COPY_DATA:
      case CLIENT.COPY_DONE:
      case CLIENT.COPY_FAIL:
        return this.#copy(bytes);
      default:
        if (!this.#skipping) return this.#collect(type, bytes);
        this.#skipping = type !== CLIENT.SYNC;
        if (!this.#skipping) this.#socket.write(readyForQuery('I'));
    }
  }

  /** For the running COPY; what comes after it has failed is for nobody. @param {Buffer} bytes */
  #copy(bytes) {
    if (!this.#running) return;
    this.#unreadBytes += bytes.length;
    if (this.#unreadBytes > MAX_UNREAD_BYTES) this.#socket.pause();
    this.#hub.post({ type: 'copy', pid: this.pid, bytes: new Uint8Array(bytes) });
  }

  /** The backend has taken COPY data. @param {number} length */
  copied(length) {
    this.#unreadBytes -= length;
    if (this.#unreadBytes < MAX_UNREAD_BYTES / 2) this.#socket.resume();
  }

  /** @type {(type: string, bytes: Buffer) => void} */
  #collect(type, bytes) {
    const rewritten = this.#statements.rewrite(type, bytes);
    if (!rewritten) throw new PostgresError('08P01', `invalid frontend message type ${type.charCodeAt(0)}`);
    const unit = this.#unit;
    unit.parts.push(rewritten.bytes);
    unit.length += rewritten.bytes.length;
    unit.marks.push(...rewritten.marks);
    unit.last = type;
    if (!ENDS_UNIT.has(type) && unit.length < MAX_UNIT_BYTES) return;
    this.#unit = new Unit();
    this.#outbox.push(unit);
    this.#hub.acquire(this);
    if (this.#outbox.reduce((sum, { length }) => sum + length, 0) > MAX_UNREAD_BYTES) this.#socket.pause();
  }

  // -- taking turns

  /** The backend is this connection's: give it the next unit. */
  proceed() {
    if (this.#closed) return this.#hub.post({ type: 'close', pid: this.pid });
    if (this.#running) return;
    const unit = this.#outbox.shift();
    if (!unit) return;
    this.#running = true;
    this.#timedOut = false;
    this.#hub.calm();
    const bytes = new Uint8Array(Buffer.concat(unit.parts));
    this.#hub.post({ type: 'unit', pid: this.pid, bytes, marks: unit.marks });
    if (this.#unreadBytes < MAX_UNREAD_BYTES) this.#socket.resume();
  }

  /** The backend has begun, with a time limit. @param {number} ms */
  limit(ms) {
    this.#timer = setTimeout(() => {
      this.#timedOut = true;
      this.#interrupt();
    }, ms);
  }

  /** The unit is done; `free` is whether somebody else may have the backend. @param {boolean} free */
  done(free) {
    clearTimeout(this.#timer);
    this.#running = false;
    if (this.#closed || !free) return this.proceed();
    this.#hub.leave(this); // whoever waits comes first
    if (this.#outbox.length) this.#hub.acquire(this);
  }

  cancel() {
    if (this.#hub.isWaiting(this)) this.#cancelWaiting();
    else if (this.#running) this.#interrupt();
  }

  /** What waits is answered with an error, and never runs. */
  #cancelWaiting() {
    const ready = this.#outbox.filter(({ last }) => last === CLIENT.QUERY || last === CLIENT.SYNC);
    this.#hub.leave(this);
    this.#skipping = this.#unit.length > 0 || this.#outbox.at(-1) !== ready.at(-1);
    this.#unit = new Unit();
    this.#outbox = [];
    this.#socket.write(
      Buffer.concat([errorResponse('ERROR', '57014', CANCELED), ...ready.map(() => readyForQuery('I'))]),
    );
  }

  /** A backend that waits for COPY data is not reached by an interrupt, and for any other CopyFail comes too late. */
  #interrupt() {
    this.#hub.interrupt(this.pid);
    this.#copy(copyFail(this.#timedOut ? TIMED_OUT : CANCELED));
  }

  // -- what the backend answers

  /** Pass a part of an answer on. @param {Buffer} bytes */
  answer(bytes) {
    if (this.#closed) return this.#hub.sent(bytes.length);
    const shown = this.#timedOut ? withReason(bytes, TIMED_OUT) : bytes;
    this.#socket.write(withoutWarning(shown), () => this.#hub.sent(bytes.length));
  }

  // -- the end

  /** Tell the client and hang up. @type {(sqlstate: string, reason: string) => void} */
  fail(sqlstate, reason) {
    if (this.#closed) return;
    this.#socket.end(errorResponse('FATAL', sqlstate, reason));
    this.#socket.destroySoon();
    this.#close();
  }

  #close() {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#outbox = [];
    if (this.#running)
      this.#interrupt(); // nobody waits for the statement any more
    else this.#hub.acquire(this); // to roll back, and be forgotten
  }
}
