// One connection: login, framing of what it sends, framing of what it is answered.

import { randomInt } from 'node:crypto';
import { Exchange } from './scram.mjs';
import { inspect, merge } from './statements.mjs';
import {
  CANCEL_REQUEST, GSS_REQUEST, SSL_REQUEST, copyFail, errorResponse, fields, int32, message,
  parameterStatus, readyForQuery, text,
} from './wire.mjs';

const MOST_UNREAD_BYTES = 4 * 1024 * 1024; // COPY data on its way to the backend; then the socket is paused
const MOST_MESSAGE_BYTES = 256 * 1024 * 1024; // of anything but COPY data, which is passed on as it comes
const UNIT_BYTES = 1024 * 1024; // a unit this large is handed over before its Sync has come
const CANCELLED = 'canceling statement due to user request';
const TIMED_OUT = 'canceling statement due to statement timeout';

const code = (letter) => letter.charCodeAt(0);
const [QUERY, PARSE, BIND, DESCRIBE, EXECUTE, CLOSE, SYNC, FLUSH, CALL] = [...'QPBDECSHF'].map(code);
const [TERMINATE, COPY_DATA, COPY_DONE, COPY_FAIL] = [...'Xdcf'].map(code);
const [READY, ERROR, NOTICE, NOTIFICATION, COPY_IN, COMPLETE] = [...'ZENAGC'].map(code);
const LOOKED_AT = new Set([READY, ERROR, NOTICE, NOTIFICATION, COPY_IN, COMPLETE]);
const ENDS_UNIT = new Set([QUERY, SYNC, CALL, FLUSH]);

const newUnit = () => ({ parts: [], length: 0, marks: null, usesUnnamed: false, parsesUnnamed: null, ready: 0 });

export class Client {
  pid = null;
  key = null;
  #hub;
  #socket;
  #receive = (chunk) => this.#greet(chunk);
  #carry = Buffer.alloc(0); // until the login is done
  #carryParts = []; // the beginning of a message
  #carryLength = 0;
  #carryWanted = 0;
  #closed = false;

  // login
  #user = null;
  #settings = new Map();
  #database = null;
  #exchange = null;
  #told = {}; // the parameters as the client knows them

  // statements
  #generation = 0;
  #statementMarks = new Map();
  #unit = newUnit();
  #outbox = [];
  #running = false;
  #passing = 0; // bytes of a CopyData message still to come
  #dropping = false;
  #skipping = false; // until Sync
  #unread = 0;
  #listening = new Set();
  #cancelReason = null;
  #timer = null;
  #timeoutMs = 0;

  // answers
  #partial = null;
  #through = 0; // bytes of an answer message still to come
  #status = 'I';
  #readyLast = true;
  #copyIn = false;

  constructor(hub, socket) {
    this.#hub = hub;
    this.#socket = socket;
    socket.on('data', (chunk) => this.#receive(chunk));
    socket.on('error', () => {});
    socket.on('close', () => this.#close());
  }

  get #prefix() {
    return `${this.pid}.${this.#generation}:`;
  }

  // -- login

  #greet(chunk) {
    this.#carry = Buffer.concat([this.#carry, chunk]);
    if (this.#carry.length < 8) return;
    const length = this.#carry.readInt32BE(0);
    if (length < 8 || length > 10_000) return this.#socket.destroy();
    if (this.#carry.length < length) return;
    const body = this.#carry.subarray(4, length);
    this.#carry = this.#carry.subarray(length);
    const version = body.readInt32BE(0);
    if (version === SSL_REQUEST && this.#hub.encrypts && !this.#socket.encrypted) return this.#encrypt();
    if (version === SSL_REQUEST || version === GSS_REQUEST) {
      this.#socket.write('N');
      return this.#carry.length ? this.#greet(Buffer.alloc(0)) : undefined;
    }
    if (version === CANCEL_REQUEST) {
      this.#hub.cancel(body.readInt32BE(4), body.readInt32BE(8));
      return this.#socket.end();
    }
    this.#start(version, body.toString('utf8', 4).split('\0'));
  }

  #encrypt() {
    if (this.#carry.length) return this.#socket.destroy(); // sent before our answer: not by this client
    this.#socket.removeAllListeners('data').removeAllListeners('close');
    this.#socket.write('S');
    this.#hub.encrypt(this.#socket);
  }

  /** Why the connection itself is refused, whatever its password; null if it is not. */
  #refusal() {
    if (!this.#hub.encrypts) return null;
    if (!this.#socket.encrypted) {
      return `no pg_hba.conf entry for host "127.0.0.1", user "${this.#user}", database "${this.#database}", no encryption`;
    }
    const name = this.#socket.getPeerCertificate().subject?.CN;
    if (name === undefined) return null;
    if (!this.#socket.authorized) return 'connection requires a valid client certificate';
    return name === this.#user ? null : `certificate authentication failed for user "${this.#user}"`;
  }

  #start(version, words) {
    const end = words.indexOf('');
    const given = new Map();
    for (let at = 0; at + 1 < (end < 0 ? words.length : end); at += 2) given.set(words[at], words[at + 1]);
    if (version >> 16 !== 3) return this.fail('FATAL', '0A000', `unsupported protocol ${version >> 16}`);
    const unknown = [...given.keys()].filter((name) => name.startsWith('_pq_.'));
    if (version !== 196608 || unknown.length) {
      this.#socket.write(message('v', Buffer.concat([int32(196608), int32(unknown.length), text(...unknown)])));
    }
    this.#user = given.get('user') ?? '';
    this.#database = given.get('database') || this.#user;
    const refusal = this.#refusal();
    if (refusal) return this.fail('FATAL', '28000', refusal);
    for (const [name, value] of optionSettings(given.get('options') ?? '')) this.#settings.set(name, value);
    for (const name of ['user', 'database', 'options', 'replication', ...unknown]) given.delete(name);
    for (const [name, value] of given) this.#settings.set(name, value);
    this.#exchange = new Exchange(this.#hub.roles[this.#user]?.secret ?? null);
    this.#receive = (chunk) => this.#authenticate(chunk);
    this.#socket.write(message('R', Buffer.concat([int32(10), text('SCRAM-SHA-256', '')])));
    if (this.#carry.length) this.#receive(Buffer.alloc(0));
  }

  #authenticate(chunk) {
    this.#carry = Buffer.concat([this.#carry, chunk]);
    if (this.#carry.length < 5) return;
    const length = 1 + this.#carry.readInt32BE(1);
    if (this.#carry[0] !== code('p') || length > 10_000) return this.#socket.destroy();
    if (this.#carry.length < length) return;
    const body = this.#carry.subarray(5, length);
    this.#carry = this.#carry.subarray(length);
    const nameEnd = body.indexOf(0);
    if (body.toString('latin1', 0, nameEnd) === 'SCRAM-SHA-256') {
      const first = this.#exchange.first(body.toString('utf8', nameEnd + 5));
      if (!first) return this.fail('FATAL', '08P01', 'malformed SCRAM message');
      this.#socket.write(message('R', Buffer.concat([int32(11), Buffer.from(first)])));
      return;
    }
    const final = this.#exchange.final(body.toString('utf8'));
    if (!final) return this.fail('FATAL', '28P01', `password authentication failed for user "${this.#user}"`);
    this.#socket.write(message('R', Buffer.concat([int32(12), Buffer.from(final)])));
    this.#enter();
  }

  #enter() {
    const role = this.#hub.roles[this.#user];
    if (!role.login) return this.fail('FATAL', '28000', `role "${this.#user}" is not permitted to log in`);
    if (this.#database !== this.#hub.database) {
      return this.fail('FATAL', '3D000', `database "${this.#database}" does not exist`);
    }
    this.pid = this.#hub.nextPid();
    this.key = randomInt(1, 2 ** 31);
    const settings = new Map((role.settings ?? []).map((setting) => setting.split(/=(.*)/s, 2)));
    for (const [name, value] of this.#settings) settings.set(name, value);
    this.#timeoutMs = 0;
    this.#hub.clients.set(this.pid, this);
    const session = { pid: this.pid, user: this.#user, superuser: role.superuser, settings: [...settings] };
    this.#hub.post({ type: 'open', session });
    this.#socket.write(
      Buffer.concat([
        message('R', int32(0)),
        ...this.#parameters(settings, role),
        message('K', Buffer.concat([int32(this.pid), int32(this.key)])),
        readyForQuery('I'),
      ]),
    );
    this.#receive = (chunk) => this.#feed(chunk);
    if (this.#carry.length) this.#feed(this.#carry);
  }

  /** What the settings will be; they are put into force, and checked, with the first statement. */
  #parameters(settings, role) {
    const named = new Map([...settings].map(([name, value]) => [name.toLowerCase(), value]));
    named.set('is_superuser', role.superuser ? 'on' : 'off').set('session_authorization', this.#user);
    this.#told = Object.fromEntries(
      Object.entries(this.#hub.base).map(([name, value]) => [name, named.get(name.toLowerCase()) ?? value]),
    );
    return Object.entries(this.#told).map(([name, value]) => parameterStatus(name, value));
  }

  // -- what the client sends

  /** Cut into messages. CopyData is passed on as it comes, whatever the size of its messages. */
  #feed(chunk) {
    if (this.#carryParts.length) {
      this.#carryParts.push(chunk);
      this.#carryLength += chunk.length;
      if (this.#carryLength < this.#carryWanted) return;
      chunk = Buffer.concat(this.#carryParts);
      this.#carryParts = [];
    }
    let start = 0; // of the CopyData bytes not yet passed on
    let at = 0;
    while (at < chunk.length) {
      if (this.#passing) {
        const length = Math.min(this.#passing, chunk.length - at);
        this.#passing -= length;
        at += length;
        continue;
      }
      this.#carryWanted = 5;
      if (chunk.length - at < 5) break;
      const length = 1 + chunk.readInt32BE(at + 1);
      if (length < 5) return this.fail('FATAL', '08P01', 'invalid message length');
      if (chunk[at] === COPY_DATA) {
        this.#passing = length;
        continue;
      }
      if (length > MOST_MESSAGE_BYTES) return this.fail('FATAL', '08P01', 'message too long');
      this.#pass(chunk.subarray(start, at));
      start = at;
      this.#carryWanted = length;
      if (chunk.length - at < length) break;
      this.#take(chunk.subarray(at, at + length));
      at += length;
      start = at;
      if (this.#closed) return;
    }
    this.#pass(chunk.subarray(start, at));
    if (at < chunk.length) this.#carryParts = [Buffer.from(chunk.subarray(at))];
    this.#carryLength = chunk.length - at;
  }

  /** COPY data, whole messages or not: to the running COPY, or to the statement that waits, or nowhere. */
  #pass(bytes) {
    if (!bytes.length) return;
    if (this.#running) this.#postMore(bytes);
    else if (this.#unit.length) this.#append(bytes);
    else if (this.#outbox.length) {
      const last = this.#outbox.at(-1);
      last.parts.push(Buffer.from(bytes));
      last.length += bytes.length;
    }
  }

  #postMore(bytes) {
    const own = new Uint8Array(bytes);
    this.#unread += own.length;
    if (this.#unread > MOST_UNREAD_BYTES) this.#socket.pause();
    this.#hub.postBytes({ type: 'more', pid: this.pid, bytes: own });
  }

  taken(length) {
    this.#unread -= length;
    if (this.#unread < MOST_UNREAD_BYTES / 2) this.#socket.resume();
  }

  #append(bytes) {
    this.#unit.parts.push(bytes);
    this.#unit.length += bytes.length;
  }

  #take(whole) {
    const type = whole[0];
    if (type === TERMINATE) {
      this.#socket.end();
      return this.#close();
    }
    if (type === COPY_DONE || type === COPY_FAIL) return this.#pass(whole);
    if (this.#skipping) {
      if (type === SYNC) {
        this.#skipping = false;
        this.#socket.write(readyForQuery('I'));
      }
      return;
    }
    const rewritten = this.#rewrite(type, whole);
    if (rewritten === null) return this.fail('FATAL', '08P01', `invalid frontend message type ${type}`);
    this.#append(rewritten);
    if (!ENDS_UNIT.has(type) && this.#unit.length < UNIT_BYTES) return;
    if (type !== FLUSH) this.#unit.ready += 1;
    this.#submit();
  }

  #rewrite(type, whole) {
    switch (type) {
      case QUERY: {
        const sql = whole.toString('latin1', 5, whole.length - 1);
        const inspected = this.#inspect(sql);
        return inspected === sql ? whole : message('Q', Buffer.from(`${inspected}\0`, 'latin1'));
      }
      case PARSE:
        return this.#rewriteParse(whole);
      case BIND:
        return this.#rewriteBind(whole);
      case DESCRIBE:
      case CLOSE:
        return this.#rewriteTarget(type, whole);
      case EXECUTE:
      case SYNC:
      case FLUSH:
      case CALL:
        return whole;
      default:
        return null;
    }
  }

  /** Note the statement's marks and return it as it goes to the backend. */
  #inspect(sql) {
    const { sql: rewritten, marks } = inspect(sql, this.#prefix);
    this.#mark(marks);
    return rewritten;
  }

  #mark(marks) {
    if (!marks) return;
    if (marks.listen !== undefined) this.#listening.add(marks.listen);
    if (marks.unlisten === '*' || marks.discard === 'all') this.#listening.clear();
    else if (marks.unlisten !== undefined) this.#listening.delete(marks.unlisten);
    if (marks.deallocateAll) {
      // The old names die at once: new ones get a new prefix, and the old statements are collected later.
      this.#generation += 1;
      this.#statementMarks.clear();
      marks = { ...marks, keep: this.#prefix };
    }
    this.#unit.marks = merge(this.#unit.marks, marks);
  }

  #rewriteParse(whole) {
    const nameEnd = whole.indexOf(0, 5);
    const sqlEnd = whole.indexOf(0, nameEnd + 1);
    const name = whole.toString('latin1', 5, nameEnd);
    const sql = whole.toString('latin1', nameEnd + 1, sqlEnd);
    const { sql: rewritten, marks } = inspect(sql, this.#prefix);
    if (marks) this.#statementMarks.set(name, marks);
    else this.#statementMarks.delete(name);
    if (!name && rewritten === sql) {
      this.#unit.parsesUnnamed = Buffer.from(whole);
      return whole;
    }
    const head = Buffer.from(`${name && this.#prefix + name}\0${rewritten}\0`, 'latin1');
    const parse = message('P', Buffer.concat([head, whole.subarray(sqlEnd + 1)]));
    if (!name) this.#unit.parsesUnnamed = parse;
    return parse;
  }

  #rewriteBind(whole) {
    const portalEnd = whole.indexOf(0, 5);
    const nameEnd = whole.indexOf(0, portalEnd + 1);
    const name = whole.toString('latin1', portalEnd + 1, nameEnd);
    const marks = this.#statementMarks.get(name);
    if (!name) {
      this.#useUnnamed();
      this.#mark(marks);
      return whole;
    }
    const renamed = Buffer.from(this.#prefix, 'latin1');
    this.#mark(marks);
    const [before, after] = [whole.subarray(5, portalEnd + 1), whole.subarray(portalEnd + 1)];
    return message('B', Buffer.concat([before, renamed, after]));
  }

  #rewriteTarget(type, whole) {
    if (whole[5] !== code('S')) return whole;
    const name = whole.toString('latin1', 6, whole.length - 1);
    if (!name) {
      if (type === DESCRIBE) this.#useUnnamed();
      return whole;
    }
    if (type === CLOSE) this.#statementMarks.delete(name);
    return message(String.fromCharCode(type), Buffer.from(`S${this.#prefix}${name}\0`, 'latin1'));
  }

  #useUnnamed() {
    if (!this.#unit.parsesUnnamed) this.#unit.usesUnnamed = true;
  }

  // -- taking turns

  #submit() {
    const unit = this.#unit;
    // Kept beyond this turn of the event loop, so no longer a view of the socket's buffer.
    this.#outbox.push(unit);
    this.#unit = newUnit();
    if (this.#hub.holds(this)) this.#continue();
    else this.#hub.acquire(this);
    if (this.#outbox.length && this.#buffered() > MOST_UNREAD_BYTES) this.#socket.pause();
  }

  #buffered() {
    return this.#outbox.reduce((sum, unit) => sum + unit.length, 0);
  }

  /** The backend is this connection's now. */
  proceed() {
    if (this.#closed) this.#hub.post({ type: 'close', pid: this.pid });
    else this.#continue();
  }

  #continue() {
    if (this.#running || !this.#outbox.length) return;
    const { parts, marks, usesUnnamed, parsesUnnamed } = this.#outbox.shift();
    const bytes = new Uint8Array(Buffer.concat(parts));
    this.#running = true;
    this.#readyLast = false; // a unit without Sync keeps the backend
    this.#cancelReason = null;
    if (this.#timeoutMs > 0) this.#timer = setTimeout(() => this.cancel(TIMED_OUT), this.#timeoutMs);
    this.#hub.calm();
    this.#hub.postBytes({ type: 'unit', pid: this.pid, bytes, marks, usesUnnamed, parsesUnnamed });
    if (this.#unread < MOST_UNREAD_BYTES) this.#socket.resume();
  }

  /** The backend has taken and answered everything that it was sent. */
  done() {
    clearTimeout(this.#timer);
    this.#running = false;
    if (this.#closed) return this.#hub.post({ type: 'close', pid: this.pid });
    const free = this.#status === 'I' && this.#readyLast;
    if (!free || (this.#outbox.length && !this.#hub.contended)) return this.#continue();
    if (this.#outbox.length) this.#hub.acquire(this);
    this.#hub.release(this);
  }

  cancel(reason = CANCELLED) {
    if (this.#hub.isWaiting(this) && !this.#closed) {
      const whole = Buffer.concat(this.#outbox.map((unit) => Buffer.concat(unit.parts)));
      const ready = this.#outbox.reduce((sum, unit) => sum + unit.ready, 0);
      this.#hub.leave(this);
      this.#outbox = [];
      this.#skipping = whole.length > 0 && ready === 0;
      this.#socket.write(errorResponse('ERROR', '57014', reason));
      for (let count = ready; count > 0; count--) this.#socket.write(readyForQuery('I'));
    } else if (this.#running) {
      this.#cancelReason = reason;
      if (this.#copyIn) this.#postMore(copyFail(reason));
      else this.#hub.interrupt(this.pid);
    }
  }

  // -- what the backend answers

  /** Pass an answer on; `done` is null while there is more to come. */
  answer(bytes, done) {
    if (this.#closed) return this.#hub.sent(bytes.length);
    const length = bytes.length;
    const pieces = this.#cut(bytes);
    if (done?.parameters) this.#tell(done.parameters, pieces);
    this.#socket.cork();
    for (const piece of pieces) this.#socket.write(piece);
    this.#socket.write('', () => this.#hub.sent(length));
    this.#socket.uncork();
  }

  /** Changed parameters go before ReadyForQuery, as a server reports them. */
  #tell(parameters, pieces) {
    this.#timeoutMs = milliseconds(parameters.statement_timeout);
    const changed = Object.keys(this.#told).filter((name) => parameters[name] !== this.#told[name]);
    this.#told = Object.fromEntries(Object.keys(this.#told).map((name) => [name, parameters[name]]));
    const statuses = changed.map((name) => parameterStatus(name, parameters[name]));
    pieces.splice(this.#readyLast ? pieces.length - 1 : pieces.length, 0, ...statuses);
  }

  /** Look at the heads of the messages; most pass as they are, in as few pieces as possible. */
  #cut(bytes) {
    if (this.#partial) bytes = Buffer.concat([this.#partial, bytes]);
    this.#partial = null;
    const pieces = [];
    let start = 0;
    let at = 0;
    const keep = (end) => end > start && pieces.push(bytes.subarray(start, end));
    while (at < bytes.length) {
      if (this.#through) {
        const length = Math.min(this.#through, bytes.length - at);
        this.#through -= length;
        at += length;
        continue;
      }
      const known = bytes.length - at >= 5;
      const length = known ? 1 + bytes.readInt32BE(at + 1) : 0;
      const looked = known && LOOKED_AT.has(bytes[at]);
      if (!known || (looked && bytes.length - at < length)) {
        this.#partial = Buffer.from(bytes.subarray(at));
        break;
      }
      this.#readyLast = bytes[at] === READY;
      if (!looked) {
        this.#through = length;
        continue;
      }
      const whole = bytes.subarray(at, at + length);
      const replacement = this.#look(whole);
      if (replacement !== whole) {
        keep(at);
        if (replacement) pieces.push(replacement);
        start = at + length;
      } else if (whole[0] === READY) {
        keep(at);
        start = at;
      }
      at += length;
    }
    keep(at);
    return pieces;
  }

  /** Note what a message says; returns it, or what to send instead, or null. */
  #look(whole) {
    switch (whole[0]) {
      case READY:
        this.#status = String.fromCharCode(whole[5]);
        this.#copyIn = false;
        return whole;
      case COPY_IN:
        this.#copyIn = true;
        return whole;
      case COMPLETE:
        this.#copyIn = false;
        return whole;
      case ERROR:
        this.#copyIn = false;
        return this.#explain(whole);
      case NOTICE: // debugging output of the embedded build
        return fields(whole).R === 'RecordTransactionAbort' ? null : whole;
      default:
        return this.#route(whole);
    }
  }

  /** A cancelled statement says why, as a server would. */
  #explain(whole) {
    const { C: state } = this.#cancelReason ? fields(whole) : {};
    return state === '57014' ? errorResponse('ERROR', state, this.#cancelReason) : whole;
  }

  /** NotificationResponse: int32 pid, channel, payload. The backend listens for all; it names itself as sender. */
  #route(whole) {
    const channel = whole.toString('latin1', 9, whole.indexOf(0, 9));
    const named = Buffer.from(whole);
    named.writeInt32BE(this.pid, 5);
    this.#hub.notify(channel, named, this);
    return this.#listening.has(channel) ? named : null;
  }

  notify(channel, whole, sender) {
    if (sender !== this && this.#listening.has(channel) && !this.#closed) this.#socket.write(whole);
  }

  // -- the end

  /** Tell the client and hang up. */
  fail(severity, state, reason) {
    if (this.#closed) return;
    this.#socket.end(errorResponse(severity, state, reason));
    this.#socket.destroySoon();
    this.#close();
  }

  #close() {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#timer);
    if (this.pid === null) return;
    this.#outbox = [];
    this.#hub.leave(this);
    if (!this.#hub.holds(this)) return this.#hub.acquire(this);
    if (!this.#running) return this.#hub.post({ type: 'close', pid: this.pid });
    // Nobody waits for the statement any more, and everybody else waits for the backend.
    // The rest of a message that was cut short comes first, or the end would be taken for that rest.
    const end = [Buffer.alloc(this.#passing), copyFail('connection lost'), message('S')];
    if (this.#copyIn) this.#postMore(Buffer.concat(end));
    else this.#hub.interrupt(this.pid);
  }
}

/** `options` of the startup message: -c name=value and --name=value, blanks escaped by a backslash. */
function* optionSettings(options) {
  const words = options.match(/(?:\\.|[^\s\\])+/g)?.map((word) => word.replace(/\\(.)/g, '$1')) ?? [];
  for (let at = 0; at < words.length; at++) {
    const word = words[at] === '-c' ? words[++at] ?? '' : words[at].replace(/^-c|^--/, '');
    const [name, value] = word.split(/=(.*)/s, 2);
    if (value !== undefined) yield [name.replaceAll('-', '_'), value];
  }
}

/** SHOW statement_timeout prints a unit: 0, 250ms, 2s, 5min, 1h. */
function milliseconds(shown) {
  const [, number, unit] = /^(\d+)(ms|s|min|h|d)?$/.exec(shown ?? '') ?? [];
  return Number(number ?? 0) * ({ s: 1e3, min: 6e4, h: 36e5, d: 864e5 }[unit] ?? 1);
}
