// The beginning of a connection: encryption, cancel requests, who it is and whether it may.

import { Exchange } from './scram.mjs';
import {
  authentication,
  CANCEL_REQUEST,
  CLIENT,
  errorResponse,
  GSS_REQUEST,
  int32,
  message,
  PROTOCOL,
  SSL_REQUEST,
  text,
} from './wire.mjs';

const MAX_MESSAGE_BYTES = 10_000;
const [SASL, SASL_CONTINUE, SASL_FINAL] = [10, 11, 12];

/**
 * @typedef {import('./frontend.mjs').Hub} Hub
 * @typedef {import('node:net').Socket | import('node:tls').TLSSocket} Socket
 */

/** One connection until it is known whose it is; then the hub admits it. */
export class Login {
  #hub;
  #socket;
  #bytes = Buffer.alloc(0);
  /** @type {((body: Buffer) => void) | null} */
  #step = (body) => this.#greet(body);
  #headBytes = 0; // before a message's length: its type, but for the first messages
  #receive = (/** @type {Buffer} */ chunk) => this.#read(chunk);
  #user = '';
  #database = '';
  /** @type {[string, string][]} */
  #settings = [];
  #exchange = new Exchange(null);

  /**
   * @param {Hub} hub
   * @param {Socket} socket
   */
  constructor(hub, socket) {
    this.#hub = hub;
    this.#socket = socket;
    socket.on('data', this.#receive).on('error', () => {});
  }

  /** @param {Buffer} chunk */
  #read(chunk) {
    this.#bytes = Buffer.concat([this.#bytes, chunk]);
    while (this.#step && this.#bytes.length >= this.#headBytes + 4) {
      const length = this.#headBytes + this.#bytes.readInt32BE(this.#headBytes);
      const minimum = this.#headBytes ? 5 : 8;
      const malformed = this.#headBytes && this.#bytes[0] !== CLIENT.PASSWORD;
      if (malformed || length < minimum || length > MAX_MESSAGE_BYTES) return void this.#socket.destroy();
      if (this.#bytes.length < length) return;
      const body = this.#bytes.subarray(this.#headBytes + 4, length);
      this.#bytes = this.#bytes.subarray(length);
      this.#step(body);
    }
  }

  /** @param {Buffer} body */
  #greet(body) {
    const version = body.readInt32BE(0);
    if (version === SSL_REQUEST && this.#hub.encrypts && !isEncrypted(this.#socket)) return this.#encrypt();
    if (version === SSL_REQUEST || version === GSS_REQUEST) return void this.#socket.write('N');
    if (version !== CANCEL_REQUEST) return this.#start(version, body.toString('utf8', 4).split('\0'));
    if (body.length >= 12) this.#hub.cancel(body.readInt32BE(4), body.readInt32BE(8));
    this.#over();
    this.#socket.end();
  }

  /** The same socket begins again, as a TLS socket with a login of its own. */
  #encrypt() {
    this.#over();
    if (this.#bytes.length) return void this.#socket.destroy(); // sent before our answer: not by this client
    this.#socket.write('S');
    this.#hub.encrypt(this.#socket);
  }

  #over() {
    this.#step = null;
    this.#socket.removeListener('data', this.#receive);
  }

  /**
   * @param {number} version
   * @param {string[]} words
   */
  #start(version, words) {
    if (version >> 16 !== 3) return this.#fail('0A000', `unsupported protocol ${version >> 16}`);
    const given = pairs(words);
    const unknown = [...given.keys()].filter((name) => name.startsWith('_pq_.'));
    if (version !== PROTOCOL || unknown.length) {
      this.#socket.write(message('v', int32(PROTOCOL), int32(unknown.length), text(...unknown)));
    }
    this.#user = given.get('user') ?? '';
    this.#database = given.get('database') || this.#user;
    this.#settings = [...optionSettings(given.get('options') ?? '')];
    for (const name of ['user', 'database', 'options', 'replication', ...unknown]) given.delete(name);
    this.#settings.push(...given);
    const refusal = this.#refusal();
    if (refusal) return this.#fail('28000', refusal);
    this.#exchange = new Exchange(this.#hub.roles[this.#user]?.secret ?? null);
    this.#headBytes = 1;
    this.#step = (body) => this.#begin(body);
    this.#socket.write(authentication(SASL, text('SCRAM-SHA-256', '')));
  }

  /** Why the connection itself is refused, whatever its password; null if it is not. */
  #refusal() {
    if (!this.#hub.encrypts) return null;
    if (!isEncrypted(this.#socket)) {
      const who = `host "127.0.0.1", user "${this.#user}", database "${this.#database}"`;
      return `no pg_hba.conf entry for ${who}, no encryption`;
    }
    const name = this.#socket.getPeerCertificate().subject?.CN;
    if (name === undefined) return null;
    if (!this.#socket.authorized) return 'connection requires a valid client certificate';
    return name === this.#user ? null : `certificate authentication failed for user "${this.#user}"`;
  }

  /**
   * SASLInitialResponse: the mechanism's name, a length, the first message.
   * @param {Buffer} body
   */
  #begin(body) {
    const nameEnd = body.indexOf(0);
    const known = body.toString('latin1', 0, nameEnd) === 'SCRAM-SHA-256';
    const first = known ? this.#exchange.first(body.toString('utf8', nameEnd + 5)) : null;
    if (!first) return this.#fail('08P01', 'malformed SCRAM message');
    this.#step = (answer) => this.#prove(answer);
    this.#socket.write(authentication(SASL_CONTINUE, Buffer.from(first)));
  }

  /** @param {Buffer} body */
  #prove(body) {
    const final = this.#exchange.final(body.toString('utf8'));
    if (!final) return this.#fail('28P01', `password authentication failed for user "${this.#user}"`);
    const role = this.#hub.roles[this.#user];
    if (!role.login) return this.#fail('28000', `role "${this.#user}" is not permitted to log in`);
    if (this.#database !== this.#hub.database) {
      return this.#fail('3D000', `database "${this.#database}" does not exist`);
    }
    this.#over();
    this.#socket.write(authentication(SASL_FINAL, Buffer.from(final)));
    this.#hub.admit(this.#socket, this.#user, role, this.#settings, this.#bytes);
  }

  /**
   * @param {string} state
   * @param {string} reason
   */
  #fail(state, reason) {
    this.#over();
    this.#socket.end(errorResponse('FATAL', state, reason));
    this.#socket.destroySoon();
  }
}

/**
 * @param {Socket} socket
 * @returns {socket is import('node:tls').TLSSocket}
 */
const isEncrypted = (socket) => 'encrypted' in socket;

/**
 * Names and values up to the first empty name.
 * @param {string[]} words
 */
function pairs(words) {
  const found = new Map();
  for (let at = 0; words[at] && at + 1 < words.length; at += 2) found.set(words[at], words[at + 1]);
  return found;
}

/**
 * `options` of the startup message: -c name=value, blanks escaped by a backslash.
 * @param {string} options
 * @returns {Generator<[string, string]>}
 */
export function* optionSettings(options) {
  for (const [, assignment] of options.matchAll(/-c\s*((?:\\.|[^\s\\])+)/g)) {
    const [name, value] = assignment.replace(/\\(.)/g, '$1').split(/=(.*)/s, 2);
    if (value !== undefined) yield [name, value];
  }
}
