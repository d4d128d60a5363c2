// The clients' side, in a worker thread: sockets, logins, whose turn it is, canceling.

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

/** What all clients share: the backend, who has it, who waits for it. */
export class Hub {
  roles;
  database;
  #backend;
  #shared;
  #reported; // settings that nobody has changed
  /** @type {tls.Server | null} */
  #tls = null; // it never listens: it is given sockets whose clients asked for TLS
  /** @type {Map<number, Client>} */
  #clients = new Map();
  /** @type {Client[]} */
  #queue = [];
  #lastPid = FIRST_PID;

  /** @param {FrontendData} data */
  constructor(data) {
    this.roles = data.roles;
    this.database = data.database;
    this.#backend = data.backend;
    this.#shared = data.shared;
    this.#reported = data.reported;
    this.#backend.on('message', (reply) => this.#receive(reply));
    if (!data.tls) return;
    const [cert, key, ca] = [data.tls.cert, data.tls.key, data.tls.ca].map((bytes) => Buffer.from(bytes));
    // A certificate may be shown; the login looks at it.
    const options = { cert, key, ca, requestCert: true, rejectUnauthorized: false };
    this.#tls = tls.createServer(options, (socket) => new Login(this, socket).run());
  }

  // -- logins

  get encrypts() {
    return this.#tls !== null;
  }

  /** Speak TLS on the socket from here on; then another login begins on it. @param {Socket} socket */
  encrypt(socket) {
    this.#tls?.emit('connection', socket);
  }

  /**
   * Begin a connection whose login is done, with the settings that it was given.
   * @type {(socket: Socket, user: string, role: Role, given: [string, string][]) => void}
   */
  admit(socket, user, role, given) {
    const pid = ++this.#lastPid;
    const defaults = (role.settings ?? []).map((setting) => setting.split(/=(.*)/s, 2));
    const settings = /** @type {[string, string][]} */ ([...defaults, ...given]);
    // The backend puts them into force, and checks them, with the first statement.
    const named = new Map(settings.map(([name, value]) => [name.toLowerCase(), value]));
    const known = Object.entries(this.#reported).map(([name, value]) => [name, named.get(name.toLowerCase()) ?? value]);
    const reported = { ...Object.fromEntries(known), is_superuser: role.superuser ? 'on' : 'off' };
    this.post({ type: 'open', start: { pid, user, settings, reported } });
    this.#clients.set(pid, new Client(this, socket, pid, { ...reported, session_authorization: user }));
  }

  // -- whose turn it is: the first in the queue has the backend

  /** @param {Client} client */
  isWaiting(client) {
    return this.#queue.indexOf(client) > 0;
  }

  /** Let the client proceed, now if it has the backend, else when its turn comes. @param {Client} client */
  acquire(client) {
    if (!this.#queue.includes(client)) this.#queue.push(client);
    if (this.#queue[0] === client) client.proceed();
  }

  /** @param {Client} client */
  leave(client) {
    const [holder] = this.#queue;
    this.#queue = this.#queue.filter((other) => other !== client);
    if (holder === client) this.#queue[0]?.proceed();
  }

  // -- the backend

  /** @param {BackendRequest} request */
  post(request) {
    this.#backend.postMessage(request, 'bytes' in request ? [request.bytes.buffer] : []);
    Atomics.add(this.#shared, SHARED.REQUESTS, 1);
    Atomics.notify(this.#shared, SHARED.REQUESTS);
  }

  /** @param {BackendReply} reply */
  #receive(reply) {
    const client = this.#clients.get(reply.pid);
    if (!client) return;
    switch (reply.type) {
      case 'limited':
        return client.limit(reply.ms);
      case 'copied':
        return client.copied(reply.length);
      case 'answer':
        return client.answer(asBuffer(reply.bytes));
      case 'done':
        this.roles = reply.roles ?? this.roles;
        client.answer(asBuffer(reply.bytes));
        return client.done(reply.free);
      case 'refused':
        client.fail(reply.sqlstate, reply.reason);
        return client.done(true);
      case 'closed':
        this.#clients.delete(reply.pid);
        this.leave(client);
    }
  }

  /** Bytes of an answer have left for the client, or never will. @param {number} length */
  sent(length) {
    Atomics.sub(this.#shared, SHARED.UNSENT_BYTES, length);
    Atomics.notify(this.#shared, SHARED.UNSENT_BYTES);
  }

  // -- interrupts

  /** A request of libpq to cancel what a connection is running. @type {(pid: number, key: number) => void} */
  cancel(pid, key) {
    const client = this.#clients.get(pid);
    if (client?.key === key) client.cancel();
  }

  /** Forget an interrupt that came too late for the statement before. */
  calm() {
    Atomics.store(this.#shared, SHARED.INTERRUPTED, 0);
  }

  /** Interrupt the running statement of `pid`: the inspector evaluates in the middle of it. @param {number} pid */
  async interrupt(pid) {
    Atomics.store(this.#shared, SHARED.INTERRUPTED, pid);
    Atomics.notify(this.#shared, SHARED.INTERRUPTED);
    const session = new inspector.Session();
    session.connectToMainThread();
    await session.post('Runtime.evaluate', { expression: `gatewayInterrupt(${pid})` });
    session.disconnect();
  }

  /** Hang up on everybody; the backend stops when the running statement has ended. */
  stop() {
    for (const client of this.#clients.values()) {
      client.fail('57P01', 'terminating connection due to administrator command');
    }
    this.post({ type: 'stop' });
  }
}

/** @param {Uint8Array} bytes */
const asBuffer = (bytes) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** The other thread may be waiting for this one, so it cannot end the process. @param {string} reason */
function die(reason) {
  log(reason);
  process.kill(process.pid, 'SIGKILL');
}

/** @param {FrontendData} data */
function serve(data) {
  process.on('uncaughtException', (error) => die(`the server ends: ${error.stack}`));
  const hub = new Hub(data);
  const server = net.createServer({ noDelay: true }, (socket) => new Login(hub, socket).run());
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
