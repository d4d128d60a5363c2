// The clients' side, in a worker thread: sockets, logins, whose turn it is, cancelling.

import fs from 'node:fs';
import inspector from 'node:inspector/promises';
import net from 'node:net';
import tls from 'node:tls';
import { parentPort, workerData } from 'node:worker_threads';
import { Client } from './client.mjs';

const { backend, shared } = workerData;
const MOST_CONNECTIONS = 200; // more are closed at once
const FIRST_PID = 1000; // small enough for names, and unlike the pids of single-user mode

/** What all clients share: the backend, who has it, who waits for it. */
class Hub {
  clients = new Map();
  base = workerData.base;
  database = workerData.database;
  roles = workerData.roles;
  #tls = null; // it never listens: it is given sockets whose clients asked for TLS
  #holder = null;
  #waiting = [];
  #posted = 0;
  #nextPid = FIRST_PID;
  #closing = null;

  constructor() {
    if (!workerData.tls) return;
    const [cert, key, ca] = ['cert', 'key', 'ca'].map((name) => Buffer.from(workerData.tls[name]));
    // A certificate may be shown; the client looks at it.
    const options = { cert, key, ca, requestCert: true, rejectUnauthorized: false };
    this.#tls = tls.createServer(options, (socket) => new Client(this, socket));
  }

  get encrypts() {
    return this.#tls !== null;
  }

  /** Speak TLS on the socket from here on; then another Client begins on it. */
  encrypt(socket) {
    this.#tls.emit('connection', socket);
  }

  nextPid() {
    return (this.#nextPid += 1);
  }

  post(received, transfer) {
    backend.postMessage(received, transfer);
    Atomics.add(shared, 0, 1);
    Atomics.notify(shared, 0);
  }

  postBytes(received) {
    this.#posted += 1;
    this.post(received, [received.bytes.buffer]);
  }

  holds(client) {
    return this.#holder === client;
  }

  isWaiting(client) {
    return this.#waiting.includes(client);
  }

  get contended() {
    return this.#waiting.length > 0;
  }

  /** Give the client the backend as soon as it is free; its `proceed` is called then. */
  acquire(client) {
    if (!this.isWaiting(client)) this.#waiting.push(client);
    this.#next();
  }

  leave(client) {
    this.#waiting = this.#waiting.filter((other) => other !== client);
  }

  release(client) {
    if (this.#holder !== client) return;
    this.#holder = null;
    this.#next();
  }

  #next() {
    if (this.#holder || !this.#waiting.length) return;
    this.#holder = this.#waiting.shift();
    this.#holder.proceed();
  }

  receive(received) {
    const client = this.clients.get(received.pid);
    switch (received.type) {
      case 'answer':
        return client.answer(Buffer.from(received.bytes.buffer), null);
      case 'taken':
        return client?.taken(received.length);
      case 'done':
        if (received.roles) this.roles = received.roles;
        client?.answer(Buffer.from(received.bytes.buffer), received);
        if (received.taken === this.#posted) client?.done();
        return;
      case 'refused':
        client.fail('FATAL', received.code, received.reason);
        if (received.taken === this.#posted) client.done();
        return;
      case 'closed':
        this.clients.delete(received.pid);
        this.release(client);
        if (this.#closing && !this.clients.size) this.#closing();
        return;
      case 'cancel':
        return client?.cancel();
      case 'terminate':
        return client?.fail('FATAL', '57P01', 'terminating connection due to administrator command');
    }
  }

  /** Bytes of an answer have left for the client, or will never. */
  sent(length) {
    Atomics.sub(shared, 1, length);
    Atomics.notify(shared, 1);
  }

  notify(channel, whole, sender) {
    for (const client of this.clients.values()) client.notify(channel, whole, sender);
  }

  cancel(pid, key) {
    const client = this.clients.get(pid);
    if (client?.key === key) client.cancel();
  }

  /** Forget an interrupt that came too late for the statement before. */
  calm() {
    Atomics.store(shared, 2, 0);
  }

  /** Interrupt the running statement of `pid`: the inspector's evaluation happens in the statement's middle. */
  async interrupt(pid) {
    Atomics.store(shared, 2, pid);
    Atomics.notify(shared, 2);
    const session = new inspector.Session();
    session.connectToMainThread();
    await session.post('Runtime.evaluate', { expression: `gatewayInterrupt(${pid})` });
    session.disconnect();
  }

  async stop() {
    server.close();
    await new Promise((resolve) => {
      this.#closing = resolve;
      for (const client of this.clients.values()) {
        client.fail('FATAL', '57P01', 'terminating connection due to administrator command');
      }
      if (!this.clients.size) resolve();
    });
    this.post({ type: 'stop' });
  }
}

process.on('uncaughtException', (error) => {
  // The other thread may be waiting for this one, so it cannot end the process.
  fs.writeSync(2, `${new Date().toISOString()} the server ends: ${error.stack}\n`);
  process.kill(process.pid, 'SIGKILL');
});

const hub = new Hub();
backend.on('message', (received) => hub.receive(received));

const server = net.createServer({ noDelay: true }, (socket) => new Client(hub, socket));
server.maxConnections = MOST_CONNECTIONS;
server.on('error', (error) => {
  fs.writeSync(2, `cannot listen on port ${workerData.port}: ${error.message}\n`);
  process.kill(process.pid, 'SIGKILL');
});
server.listen(workerData.port, '127.0.0.1', () => {
  fs.writeSync(2, `${new Date().toISOString()} ready on 127.0.0.1:${workerData.port}\n`);
});

let stopping = false;
const stop = () => {
  if (!stopping) hub.stop();
  stopping = true;
};
parentPort.on('message', stop);
if (fs.fstatSync(0).isFIFO()) {
  // The supervisor's end of the pipe closes when it wants a stop, or is gone.
  new net.Socket({ fd: 0 }).on('close', stop).on('error', stop).resume();
}
