// The beginning of a connection: encryption, cancel requests, who it is and whether it may connect.

import { exchange } from './scram.mjs';
import {
  authentication,
  CANCEL_REQUEST,
  CLIENT,
  errorResponse,
  GSS_REQUEST,
  PostgresError,
  PROTOCOL,
  SSL_REQUEST,
  text,
} from './wire.mjs';

const MAX_MESSAGE_BYTES = 10_000;
const [SASL, SASL_CONTINUE, SASL_FINAL] = [10, 11, 12];

/** Something that is not a PostgreSQL client, or one that hung up. */
class NoClient extends Error {}

/** One connection until it is known whose it is; then the hub admits it. */
export class Login {
  #hub;
  #socket;
  #wake = () => {};

  /** @param {Hub} hub @param {Socket} socket */
  constructor(hub, socket) {
    this.#hub = hub;
    this.#socket = socket;
    socket.on('error', () => {}); // 'close' follows
    socket.on('readable', () => this.#wake());
  }

  async run() {
    try {
      const startup = await this.#greet();
      if (startup) await this.#authenticate(startup);
    } catch (error) {
      if (error instanceof NoClient) return void this.#socket.destroy();
      if (!(error instanceof PostgresError)) throw error;
      this.#socket.write(errorResponse('FATAL', error.sqlstate, error.message));
      this.#socket.destroySoon();
    }
  }

  // -- the first message

  /** Parameters of the startup message; null if the connection wanted something else. */
  async #greet() {
    for (;;) {
      const body = await this.#readBody();
      const request = body.readInt32BE();
      if (request === PROTOCOL) return pairs(body.toString('utf8', 4));
      if (request === CANCEL_REQUEST) return this.#cancel(body);
      if (request === SSL_REQUEST && this.#encrypt()) return null;
      if (![SSL_REQUEST, GSS_REQUEST].includes(request)) {
        throw new PostgresError('0A000', `unsupported frontend protocol ${request >> 16}.${request & 0xffff}`);
      }
      this.#socket.write('N');
    }
  }

  /** @param {Buffer} body */
  #cancel(body) {
    if (body.length !== 12) throw new NoClient();
    this.#hub.cancel(body.readInt32BE(4), body.readInt32BE(8));
    this.#socket.destroySoon();
    return null;
  }

  /** Begin TLS, and another login on it; false if there is none, or it has begun. */
  #encrypt() {
    if (!this.#hub.encrypts || 'encrypted' in this.#socket) return false;
    if (this.#socket.readableLength) throw new NoClient(); // sent before our answer, so not by this client
    this.#socket.write('S');
    this.#socket.removeAllListeners('readable');
    this.#hub.encrypt(this.#socket);
    return true;
  }

  // -- who it is

  /** @param {Map<string, string>} startup */
  async #authenticate(startup) {
    const user = startup.get('user') ?? '';
    const database = startup.get('database') || user;
    if (this.#hub.encrypts) this.#checkEncryption(user, database);

    this.#socket.write(authentication(SASL, text('SCRAM-SHA-256', '')));
    const initial = await this.#readPassword(); // the mechanism, a length, the first message of the exchange
    const clientFirst = initial.toString('utf8', initial.indexOf(0) + 5);
    const scram = exchange(this.#hub.roles[user]?.secret ?? null, clientFirst);
    if (!scram) throw new PostgresError('08P01', 'malformed SCRAM message');
    this.#socket.write(authentication(SASL_CONTINUE, Buffer.from(scram.challenge)));
    const proof = scram.prove(String(await this.#readPassword()));
    if (!proof) throw new PostgresError('28P01', `password authentication failed for user "${user}"`);

    const role = this.#hub.roles[user];
    if (!role.login) throw new PostgresError('28000', `role "${user}" is not permitted to log in`);
    if (database !== this.#hub.database) throw new PostgresError('3D000', `database "${database}" does not exist`);
    this.#socket.write(authentication(SASL_FINAL, Buffer.from(proof)));
    this.#socket.removeAllListeners('readable');
    const options = optionSettings(startup.get('options') ?? '');
    for (const name of ['user', 'database', 'options']) startup.delete(name);
    this.#hub.admit(this.#socket, user, role, [...options, ...startup]);
  }

  /** If the client shows a certificate, it must be the user's. @type {(user: string, database: string) => void} */
  #checkEncryption(user, database) {
    if (!('encrypted' in this.#socket)) {
      const who = `host "127.0.0.1", user "${user}", database "${database}"`;
      throw new PostgresError('28000', `no pg_hba.conf entry for ${who}, no encryption`);
    }
    const name = this.#socket.getPeerCertificate().subject?.CN;
    if (name === undefined) return;
    if (!this.#socket.authorized) throw new PostgresError('28000', 'connection requires a valid client certificate');
    if (name !== user) throw new PostgresError('28000', `certificate authentication failed for user "${user}"`);
  }

  // -- reading; what the client has sent beyond its login stays in the socket

  async #readPassword() {
    if (String(await this.#read(1)) !== CLIENT.PASSWORD) throw new NoClient();
    return this.#readBody();
  }

  /** What follows the length of a message. */
  async #readBody() {
    const length = (await this.#read(4)).readInt32BE() - 4;
    if (length < 4 || length > MAX_MESSAGE_BYTES) throw new NoClient();
    return this.#read(length);
  }

  /** @type {(length: number) => Promise<Buffer>} */
  async #read(length) {
    for (;;) {
      const bytes = this.#socket.read(length);
      if (bytes?.length === length) return bytes;
      if (bytes) throw new NoClient(); // all that there was before it hung up
      await new Promise((resolve) => {
        this.#wake = () => resolve(null);
      });
    }
  }
}

/** Names and values up to the first empty name, each with a zero byte at its end. @param {string} body */
function pairs(body) {
  const words = body.split('\0');
  /** @type {Map<string, string>} */
  const found = new Map();
  for (let at = 0; words[at] && at + 1 < words.length; at += 2) found.set(words[at], words[at + 1]);
  return found;
}

/**
 * `options` of the startup message: -c name=value, with blanks escaped by a backslash.
 * @type {(options: string) => Generator<[string, string]>}
 */
export function* optionSettings(options) {
  for (const [, assignment] of options.matchAll(/-c\s*((?:\\.|[^\s\\])+)/g)) {
    const [name, value] = assignment.replace(/\\(.)/g, '$1').split(/=(.*)/s, 2);
    if (value !== undefined) yield [name, value];
  }
}
