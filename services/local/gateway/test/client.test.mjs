// Clients and the hub between them; the test is at the other end of the sockets, and in the database's place.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import net from 'node:net';
import { afterEach, beforeEach, test } from 'node:test';
import { MessageChannel } from 'node:worker_threads';
import { Hub } from '../frontend.mjs';
import { copyFail, errorOf, errorResponse, message, messages, query, readyForQuery, SYNC } from '../wire.mjs';

const role = { secret: null, login: true, superuser: false, settings: null };

/** @type {Hub} */
let hub;
/** @type {net.Server} */
let server;
/** @type {import('node:worker_threads').MessagePort} */
let port;
/** @type {any[]} */
let requests;
/** @type {net.Socket[]} */
let sockets;
/** @type {number[]} */
let interrupted;

beforeEach(async () => {
  const channel = new MessageChannel();
  port = channel.port2;
  requests = [];
  sockets = [];
  port.on('message', (request) => request.type !== 'open' && requests.push(request));
  hub = new Hub({
    port: 0,
    database: 'sensors',
    backend: channel.port1,
    shared: new Int32Array(new SharedArrayBuffer(12)),
    reported: { TimeZone: 'UTC' },
    roles: {},
    tls: null,
  });
  /** @type {number[]} */
  const mine = [];
  interrupted = mine;
  hub.interrupt = async (pid) => void mine.push(pid); // it would need a worker thread
  const admit = (/** @type {net.Socket} */ socket) => {
    socket.on('error', () => {});
    hub.admit(socket, 'keeper', role, []);
  };
  server = net.createServer(admit).listen(0, '127.0.0.1');
  await once(server, 'listening');
});

afterEach(() => {
  for (const socket of sockets) socket.destroy();
  server.close();
  port.close();
});

/** A client that is let in; `received` collects what it gets from then on. */
async function connect() {
  const { port: number } = /** @type {net.AddressInfo} */ (server.address());
  const socket = net.connect(number, '127.0.0.1');
  sockets.push(socket);
  const [greeting] = await once(socket, 'data');
  const key = [...messages(greeting)].find((whole) => whole[0] === 'K'.charCodeAt(0));
  const client = { socket, pid: key?.readInt32BE(5) ?? 0, key: key?.readInt32BE(9) ?? 0, received: Buffer.alloc(0) };
  socket.on('data', (chunk) => {
    client.received = Buffer.concat([client.received, chunk]);
  });
  return client;
}

/** @param {() => unknown} condition */
async function until(condition) {
  for (const end = performance.now() + 5000; !condition(); await new Promise(setImmediate)) {
    assert.ok(performance.now() < end, `${condition} has not come true`);
  }
}

/** The next request to the database. */
async function next() {
  await until(() => requests.length);
  const request = requests.shift();
  return { ...request, sql: request.bytes && Buffer.from(request.bytes).toString('latin1') };
}

/**
 * Answer a request; the unit is done.
 * @param {{ pid: number }} request
 * @param {...Buffer} answer
 */
function answer({ pid }, ...answer) {
  const bytes = new Uint8Array(Buffer.concat(answer));
  port.postMessage({ type: 'done', pid, bytes, free: answer.at(-1)?.equals(readyForQuery('I')) });
}

test('a transaction keeps the backend until it ends', async () => {
  const [one, two] = [await connect(), await connect()];
  one.socket.write(query('BEGIN'));
  const begin = await next();
  answer(begin, readyForQuery('T'));
  await until(() => one.received.length);
  two.socket.write(query('SELECT 2'));
  one.socket.write(query('COMMIT'));
  const commit = await next();
  assert.deepEqual([commit.pid, commit.sql], [one.pid, query('COMMIT').toString('latin1')]);
  assert.deepEqual(requests, []);
  answer(commit, readyForQuery('I'));
  assert.equal((await next()).pid, two.pid);
});

test('messages wait for their Sync, and go to the backend together', async () => {
  const one = await connect();
  const parse = message('P', Buffer.from('\0SELECT 1\0'), Buffer.from([0, 0]));
  one.socket.write(parse.subarray(0, 8));
  one.socket.write(parse.subarray(8));
  one.socket.write(SYNC);
  assert.equal((await next()).sql, Buffer.concat([parse, SYNC]).toString('latin1'));
});

test('a waiting statement that is cancelled is answered and never runs', async () => {
  const [one, two] = [await connect(), await connect()];
  one.socket.write(query('SELECT 1'));
  const running = await next();
  two.socket.write(query('SELECT 2'));
  await until(() => {
    hub.cancel(two.pid, two.key); // until it has arrived, there is nothing to cancel
    return two.received.subarray(-6).equals(readyForQuery('I'));
  });
  const [error, ready] = messages(two.received);
  assert.equal(errorOf(error).sqlstate, '57014');
  assert.deepEqual(ready, readyForQuery('I'));
  answer(running, readyForQuery('I'));
  await until(() => one.received.length);
  assert.deepEqual(requests, []);
});

test('a running statement is interrupted when it is cancelled, and when nobody waits for it', async () => {
  const one = await connect();
  one.socket.write(query('SELECT 1'));
  await next();
  hub.cancel(one.pid, one.key + 1);
  assert.deepEqual(interrupted, []);
  hub.cancel(one.pid, one.key);
  assert.deepEqual(interrupted, [one.pid]);
  one.socket.destroy();
  await until(() => interrupted.length === 2);
});

test('a statement that takes longer than its statement_timeout is interrupted, and says why', async () => {
  const one = await connect();
  one.socket.write(query('SELECT 1'));
  const running = await next();
  port.postMessage({ type: 'limited', pid: running.pid, ms: 1 });
  await until(() => interrupted.length);
  answer(running, errorResponse('ERROR', '57014', 'canceling statement'), readyForQuery('I'));
  await until(() => one.received.length);
  const [error] = messages(one.received);
  assert.equal(errorOf(error).message, 'canceling statement due to statement timeout');
});

test('a COPY that is cancelled gets CopyFail, and its remaining data is for nobody', async () => {
  const one = await connect();
  one.socket.write(query('COPY t FROM STDIN'));
  const copy = await next();
  const data = message('d', Buffer.from('12345\n'));
  one.socket.write(data);
  assert.equal((await next()).sql, data.toString('latin1'));
  hub.cancel(one.pid, one.key);
  assert.equal((await next()).sql, copyFail('canceling statement due to user request').toString('latin1'));
  answer(copy, errorResponse('ERROR', '57014', 'canceling statement'), readyForQuery('I'));
  await until(() => one.received.length);
  one.socket.write(Buffer.concat([data, query('SELECT 1')]));
  assert.equal((await next()).sql, query('SELECT 1').toString('latin1'));
});

test('a client that goes away in a transaction is closed, and the next one gets the backend', async () => {
  const [one, two] = [await connect(), await connect()];
  one.socket.write(query('BEGIN'));
  answer(await next(), readyForQuery('T'));
  await until(() => one.received.length);
  two.socket.write(query('SELECT 2'));
  one.socket.destroy();
  assert.deepEqual(await next(), { type: 'close', pid: one.pid, sql: undefined });
  port.postMessage({ type: 'closed', pid: one.pid });
  assert.equal((await next()).pid, two.pid);
});

test('a message that no client sends ends the connection', async () => {
  const one = await connect();
  one.socket.write(message('F'));
  await once(one.socket, 'end');
  assert.deepEqual(one.received, errorResponse('FATAL', '08P01', 'invalid frontend message type 70'));
});
