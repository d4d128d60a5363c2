// The clients' side, in a worker thread: sockets, logins, whose turn it is, cancelling.

import fs from 'node:fs';
import inspector from 'node:inspector/promises';
import net from 'node:net';
import tls from 'node:tls';
import { parentPort, workerData } from 'node:worker_threads';
import { Client } from './client.mjs';
import { log, SHARED } from './common.mjs';
import { Login } from './login.mjs';

const HOST = '127.0.0.1';
const MAX_CONNECTIONS = 300; // more are closed at once
const FIRST_PID = 1000; // small enough for names, and unlike the pids of single-user mode
const STOPPED = ['57P01', 'terminating connection due to administrator command'];

/**
 * @typedef {import('./types.d.ts').Reply} Reply
 * @typedef {import('./types.d.ts').Request} Request
 */
/** @typedef {import('node:net').Socket} Socket */

/** What all clients share: the backend, who has it, who waits for it. */
export class Hub {
  roles;
  database;
  #backend;
  #shared;
  #parameters; // what the server reports of settings that nobody has changed
  /** @type {tls.Server | null} */
  #tls = null; // it never listens: it is given sockets whose clients asked for TLS
  /** @type {Map<number, Client>} */
  #clients = new Map();
  /** @type {Client | null} */
  #holder = null;
  /** @type {Client[]} */
  #waiting = [];
  #posted = 0;
  #lastPid = FIRST_PID;
  /** @type {(() => void) | null} */
  #closing = null;

  /** @param {import('./types.d.ts').FrontendData} data */
  constructor(data) {
    this.roles = data.roles;
    this.database = data.database;
    this.#backend = data.backend;
    this.#shared = data.shared;
    this.#parameters = data.parameters;
    this.#backend.on('message', (reply) => this.#receive(reply));
    if (!data.tls) return;
    const [cert, key, ca] = [data.tls.cert, data.tls.key, data.tls.ca].map((bytes) => Buffer.from(bytes));
    // A certificate may be shown; Login looks at it.
    const options = { cert, key, ca, requestCert: true, rejectUnauthorized: false };
    this.#tls = tls.createServer(options, (socket) => new Login(this, socket));
  }

  // -- logins

  get encrypts() {
    return this.#tls !== null;
  }

  /**
   * Speak TLS on the socket from here on; then another Login begins on it.
   * @param {Socket} socket
   */
  encrypt(socket) {
    this.#tls?.emit('connection', socket);
  }

  /**
   * Begin a connection whose login is done; `rest` is what it has sent already.
   * @param {Socket} socket
   * @param {string} user
   * @param {import('./types.d.ts').Role} role
   * @param {[string, string][]} given
   * @param {Buffer} rest
   */
  admit(socket, user, role, given, rest) {
    const pid = ++this.#lastPid;
    const defaults = (role.settings ?? []).map((setting) => setting.split(/=(.*)/s, 2));
    const settings = new Map(/** @type {[string, string][]} */ ([...defaults, ...given]));
    this.post({ type: 'open', start: { pid, user, settings: [...settings] } });
    // The settings are put into force, and checked, with the first statement.
    const named = new Map([...settings].map(([name, value]) => [name.toLowerCase(), value]));
    named.set('is_superuser', role.superuser ? 'on' : 'off').set('session_authorization', user);
    const names = Object.keys(this.#parameters);
    const parameters = names.map((name) => [name, named.get(name.toLowerCase()) ?? this.#parameters[name]]);
    const client = new Client(this, socket, pid, Object.fromEntries(parameters), named.get('statement_timeout'));
    this.#clients.set(pid, client);
    if (rest.length) client.feed(rest);
  }

  // -- whose turn it is

  /** @param {Client} client */
  holds(client) {
    return this.#holder === client;
  }

  /** @param {Client} client */
  isWaiting(client) {
    return this.#waiting.includes(client);
  }

  get contended() {
    return this.#waiting.length > 0;
  }

  /**
   * Give the client the backend as soon as it is free; its `proceed` is called then.
   * @param {Client} client
   */
  acquire(client) {
    if (!this.isWaiting(client)) this.#waiting.push(client);
    this.#next();
  }

  /** @param {Client} client */
  leave(client) {
    this.#waiting = this.#waiting.filter((other) => other !== client);
  }

  /** @param {Client} client */
  release(client) {
    if (this.#holder !== client) return;
    this.#holder = null;
    this.#next();
  }

  #next() {
    if (this.#holder || !this.#waiting.length) return;
    this.#holder = this.#waiting.shift() ?? null;
    this.#holder?.proceed();
  }

  // -- the backend

  /**
   * @param {Request} request
   * @param {ArrayBuffer[]} transferred
   */
  post(request, transferred = []) {
    this.#backend.postMessage(request, transferred);
    Atomics.add(this.#shared, SHARED.REQUESTS, 1);
    Atomics.notify(this.#shared, SHARED.REQUESTS);
  }

  /** @param {import('./types.d.ts').Unit | import('./types.d.ts').CopyData} request */
  postBytes(request) {
    this.#posted += 1;
    this.post(request, [request.bytes.buffer]);
  }

  /** @param {Reply} reply */
  #receive(reply) {
    const client = this.#clients.get(reply.pid);
    if (!client) return;
    switch (reply.type) {
      case 'answer':
        return client.answer(asBuffer(reply.bytes), null);
      case 'taken':
        return client.taken(reply.length);
      case 'done':
        if (reply.roles) this.roles = reply.roles;
        client.answer(asBuffer(reply.bytes), reply);
        return this.#done(client, reply.taken);
      case 'refused':
        client.fail(reply.state, reply.reason);
        return this.#done(client, reply.taken);
      case 'closed':
        this.#clients.delete(reply.pid);
        this.release(client);
        if (!this.#clients.size) this.#closing?.();
    }
  }

  /**
   * What was sent after that is still to be taken: the client is not done.
   * @param {Client} client
   * @param {number} taken
   */
  #done(client, taken) {
    if (taken === this.#posted) client.done();
  }

  /**
   * Bytes of an answer have left for the client, or never will.
   * @param {number} length
   */
  sent(length) {
    Atomics.sub(this.#shared, SHARED.UNSENT_BYTES, length);
    Atomics.notify(this.#shared, SHARED.UNSENT_BYTES);
  }

  // -- interrupts

  /**
   * A request of libpq to cancel what a connection is running.
   * @param {number} pid
   * @param {number} key
   */
  cancel(pid, key) {
    const client = this.#clients.get(pid);
    if (client?.key === key) client.cancel();
  }

  /** Forget an interrupt that came too late for the statement before. */
  calm() {
    Atomics.store(this.#shared, SHARED.INTERRUPTED, 0);
  }

  /**
   * Interrupt the running statement of `pid`: the inspector's evaluation happens in the statement's middle.
   * @param {number} pid
   */
  async interrupt(pid) {
    Atomics.store(this.#shared, SHARED.INTERRUPTED, pid);
    Atomics.notify(this.#shared, SHARED.INTERRUPTED);
    const session = new inspector.Session();
    session.connectToMainThread();
    await session.post('Runtime.evaluate', { expression: `gatewayInterrupt(${pid})` });
    session.disconnect();
  }

  /** Hang up on everybody, then let the backend stop. */
  async stop() {
    await new Promise((resolve) => {
      this.#closing = () => resolve(null);
      for (const client of this.#clients.values()) client.fail(STOPPED[0], STOPPED[1]);
      if (!this.#clients.size) resolve(null);
    });
    this.post({ type: 'stop' });
  }
}

/** @param {Uint8Array} bytes */
const asBuffer = (bytes) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/**
 * The other thread may be waiting for this one, so it cannot end the process.
 * @param {string} reason
 */
function die(reason) {
  log(reason);
  process.kill(process.pid, 'SIGKILL');
}

/** @param {import('./types.d.ts').FrontendData} data */
function serve(data) {
  process.on('uncaughtException', (error) => die(`the server ends: ${error.stack}`));
  const hub = new Hub(data);
  const server = net.createServer({ noDelay: true }, (socket) => new Login(hub, socket));
  server.maxConnections = MAX_CONNECTIONS;
  server.on('error', (error) => die(`cannot listen on port ${data.port}: ${error.message}`));
  server.listen(data.port, HOST, () => log(`ready on ${HOST}:${data.port}`));
  let stopping = false;
  const stop = () => {
    if (!stopping) hub.stop();
    stopping = true;
    server.close();
  };
  parentPort?.on('message', stop);
  if (!fs.fstatSync(0).isFIFO()) return;
  // The supervisor's end of the pipe closes when it wants a stop, or is gone.
  new net.Socket({ fd: 0 }).on('close', stop).on('error', stop).resume();
}

if (workerData) serve(workerData);
