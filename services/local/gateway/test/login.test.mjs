import assert from 'node:assert/strict';
import { once } from 'node:events';
import net from 'node:net';
import { afterEach, beforeEach, test } from 'node:test';
import { Login, optionSettings } from '../login.mjs';
import { verifier } from '../scram.mjs';
import { CANCEL_REQUEST, errorOf, GSS_REQUEST, int32, message, PROTOCOL, SSL_REQUEST, text } from '../wire.mjs';

/** @type {net.Server} */
let server;
/** @type {net.Socket} */
let client;
/** @type {unknown[]} */
let cancelled;

beforeEach(async () => {
  cancelled = [];
  const roles = { keeper: { secret: verifier('correct horse'), login: true, superuser: true, settings: null } };
  const hub = {
    encrypts: false,
    roles,
    database: 'sensors',
    cancel: (/** @type {number[]} */ ...given) => cancelled.push(given),
  };
  server = net.createServer((socket) => new Login(/** @type {any} */ (hub), socket).run()).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = /** @type {net.AddressInfo} */ (server.address());
  client = net.connect(port, '127.0.0.1');
  await once(client, 'connect');
});

afterEach(() => {
  client.destroy();
  server.close();
});

/** @param {...Buffer} body */
const greeting = (...body) => Buffer.concat([int32(4 + Buffer.concat(body).length), ...body]);
const startup = greeting(int32(PROTOCOL), text('user', 'keeper', 'database', 'sensors', ''));

/**
 * @param {Buffer} bytes
 * @returns {Promise<Buffer>}
 */
async function ask(bytes) {
  client.write(bytes);
  const [answer] = await once(client, 'data');
  return answer;
}

test('requests for encryption that is not offered are denied, and the login goes on', async () => {
  assert.equal(String(await ask(greeting(int32(GSS_REQUEST)))), 'N');
  assert.equal(String(await ask(greeting(int32(SSL_REQUEST)))), 'N');
  assert.deepEqual(await ask(startup), message('R', int32(10), text('SCRAM-SHA-256', '')));
});

test('a greeting may arrive byte by byte', async () => {
  client.setNoDelay();
  for (const byte of startup.subarray(0, -1)) client.write(Buffer.from([byte]));
  assert.equal((await ask(startup.subarray(-1)))[0], 'R'.charCodeAt(0));
});

test('a request to cancel names its connection, and is over', async () => {
  client.write(greeting(int32(CANCEL_REQUEST), int32(1001), int32(42)));
  client.resume();
  await once(client, 'end');
  assert.deepEqual(cancelled, [[1001, 42]]);
});

test('a wrong proof is a wrong password', async () => {
  await ask(startup);
  const first = Buffer.from('n,,n=,r=abc');
  const challenge = await ask(message('p', text('SCRAM-SHA-256'), int32(first.length), first));
  const nonce = /r=([^,]+)/.exec(challenge.toString('utf8', 9))?.[1];
  const proof = Buffer.alloc(32).toString('base64');
  const refused = errorOf(await ask(message('p', Buffer.from(`c=biws,r=${nonce},p=${proof}`))));
  assert.deepEqual([refused.sqlstate, refused.message], ['28P01', 'password authentication failed for user "keeper"']);
});

test('what is not a greeting is hung up on', async () => {
  for (const sent of [
    greeting(int32(2 << 16)),
    greeting(int32(CANCEL_REQUEST)),
    Buffer.from('GET / HTTP/1.1\r\n\r\n'),
  ]) {
    const other = net.connect(/** @type {net.AddressInfo} */ (server.address()).port, '127.0.0.1');
    other.write(sent);
    other.resume();
    await once(other, 'close');
  }
});

test('another version of the protocol is refused', async () => {
  const refused = errorOf(await ask(greeting(int32(PROTOCOL + 2), text('user', 'keeper', ''))));
  assert.deepEqual([refused.sqlstate, refused.message], ['0A000', 'unsupported frontend protocol 3.2']);
});

test('options of the startup message are settings', () => {
  const options = '-c timezone=Asia/Tokyo -cDateStyle=ISO,\\ MDY -c search_path=a=b';
  assert.deepEqual(
    [...optionSettings(options)],
    [
      ['timezone', 'Asia/Tokyo'],
      ['DateStyle', 'ISO, MDY'],
      ['search_path', 'a=b'],
    ],
  );
});
