// SCRAM-SHA-256, the server's side (RFC 5802, RFC 7677), on verifiers in PostgreSQL's own format, so that
// roles created with SQL log in here with the password that was given there.

import { createHash, createHmac, pbkdf2Sync, randomBytes, timingSafeEqual } from 'node:crypto';

const VERIFIER = /^SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):(.+)$/;

/** @param {Buffer} data */
const sha256 = (data) => createHash('sha256').update(data).digest();
/** @type {(key: Buffer, data: string) => Buffer} */
const hmac = (key, data) => createHmac('sha256', key).update(data).digest();

/**
 * The verifier that PostgreSQL keeps in pg_authid.rolpassword.
 * @param {string} password
 */
export function verifier(password, salt = randomBytes(16), iterations = 4096) {
  const salted = pbkdf2Sync(password.normalize('NFKC'), salt, iterations, 32, 'sha256');
  const stored = sha256(hmac(salted, 'Client Key')).toString('base64');
  const server = hmac(salted, 'Server Key').toString('base64');
  return `SCRAM-SHA-256$${iterations}:${salt.toString('base64')}$${stored}:${server}`;
}

/**
 * Whether `secret` is the verifier of `password`.
 * @param {string | null | undefined} secret
 * @param {string} password
 */
export function matches(secret, password) {
  const [, iterations, salt] = VERIFIER.exec(secret ?? '') ?? [];
  return salt !== undefined && verifier(password, Buffer.from(salt, 'base64'), Number(iterations)) === secret;
}

// A role that does not exist is asked for its password all the same: the answer must not tell.
const NOBODY = verifier(randomBytes(16).toString('hex'));

/** One authentication exchange; `secret` is the role's verifier, or null if it has none. */
export class Exchange {
  #known;
  #salt;
  #iterations;
  #storedKey;
  #serverKey;
  #header = '';
  #nonce = '';
  #firstMessages = '';

  /** @param {string | null} secret */
  constructor(secret) {
    this.#known = VERIFIER.test(secret ?? '');
    const [, iterations, salt, stored, server] = VERIFIER.exec(this.#known && secret ? secret : NOBODY) ?? [];
    this.#salt = salt;
    this.#iterations = iterations;
    this.#storedKey = Buffer.from(stored, 'base64');
    this.#serverKey = Buffer.from(server, 'base64');
  }

  /**
   * client-first-message -> server-first-message; null if it is malformed or asks for channel binding.
   * @param {string} clientFirst
   */
  first(clientFirst) {
    const parsed = /^([ny],[^,]*,)(.*?r=([^,]+).*)$/.exec(clientFirst);
    if (!parsed) return null;
    const [, header, bare, nonce] = parsed;
    this.#header = header;
    this.#nonce = nonce + randomBytes(18).toString('base64');
    const serverFirst = `r=${this.#nonce},s=${this.#salt},i=${this.#iterations}`;
    this.#firstMessages = `${bare},${serverFirst}`;
    return serverFirst;
  }

  /**
   * client-final-message -> server-final-message; null if the password is wrong.
   * @param {string} clientFinal
   */
  final(clientFinal) {
    const parsed = /^(c=([^,]+),r=([^,]+).*),p=([^,]+)$/.exec(clientFinal);
    if (!parsed) return null;
    const [, withoutProof, binding, nonce, proof64] = parsed;
    const header = Buffer.from(binding, 'base64').toString('latin1');
    const authMessage = `${this.#firstMessages},${withoutProof}`;
    const signature = hmac(this.#storedKey, authMessage);
    const proof = Buffer.from(proof64, 'base64');
    if (proof.length !== signature.length) return null;
    const clientKey = Buffer.from(proof.map((byte, index) => byte ^ signature[index]));
    const proven = timingSafeEqual(sha256(clientKey), this.#storedKey);
    if (!this.#known || !proven || nonce !== this.#nonce || header !== this.#header) return null;
    return `v=${hmac(this.#serverKey, authMessage).toString('base64')}`;
  }
}
