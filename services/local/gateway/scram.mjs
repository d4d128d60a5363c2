// SCRAM-SHA-256, the server's side (RFC 5802, RFC 7677), on verifiers in PostgreSQL's own format, so that
// roles created with SQL log in here with the password that was given there.

import { createHash, createHmac, pbkdf2Sync, randomBytes, timingSafeEqual } from 'node:crypto';

const sha256 = (data) => createHash('sha256').update(data).digest();
const hmac = (key, data) => createHmac('sha256', key).update(data).digest();
const prepared = (password) => password.normalize('NFKC');

/** The verifier that PostgreSQL keeps in pg_authid.rolpassword. */
export function verifier(password, salt = randomBytes(16), iterations = 4096) {
  const salted = pbkdf2Sync(prepared(password), salt, iterations, 32, 'sha256');
  const stored = sha256(hmac(salted, 'Client Key')).toString('base64');
  const server = hmac(salted, 'Server Key').toString('base64');
  return `SCRAM-SHA-256$${iterations}:${salt.toString('base64')}$${stored}:${server}`;
}

/** Whether `secret` is the verifier of `password`. */
export function matches(secret, password) {
  const [, iterations, salt] = /^SCRAM-SHA-256\$(\d+):([^$]+)\$/.exec(secret ?? '') ?? [];
  return salt !== undefined && verifier(password, Buffer.from(salt, 'base64'), Number(iterations)) === secret;
}

// A role that does not exist is asked for its password all the same: the answer must not tell.
const NOBODY = verifier(randomBytes(16).toString('hex'));

/** One authentication exchange; `secret` is the role's verifier, or null when it has none. */
export class Exchange {
  #known;
  #salt;
  #iterations;
  #storedKey;
  #serverKey;
  #clientFirst;
  #serverFirst;
  #nonce;

  constructor(secret) {
    const pattern = /^SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):(.+)$/;
    const parsed = pattern.exec(secret ?? '');
    this.#known = parsed !== null;
    const [, iterations, salt, stored, server] = parsed ?? pattern.exec(NOBODY);
    this.#salt = salt;
    this.#iterations = iterations;
    this.#storedKey = Buffer.from(stored, 'base64');
    this.#serverKey = Buffer.from(server, 'base64');
  }

  /** client-first-message -> server-first-message; null when it is malformed or wants channel binding. */
  first(clientFirst) {
    const parsed = /^([ny],[^,]*,)(.*?r=([^,]+).*)$/.exec(clientFirst);
    if (!parsed) return null;
    this.#clientFirst = { header: parsed[1], bare: parsed[2] };
    this.#nonce = parsed[3] + randomBytes(18).toString('base64');
    this.#serverFirst = `r=${this.#nonce},s=${this.#salt},i=${this.#iterations}`;
    return this.#serverFirst;
  }

  /** client-final-message -> server-final-message; null when the password is wrong. */
  final(clientFinal) {
    const parsed = /^(c=([^,]+),r=([^,]+).*),p=([^,]+)$/.exec(clientFinal);
    if (!parsed) return null;
    const [, withoutProof, binding, nonce, proof64] = parsed;
    const header = Buffer.from(binding, 'base64').toString('latin1');
    const authMessage = `${this.#clientFirst.bare},${this.#serverFirst},${withoutProof}`;
    const signature = hmac(this.#storedKey, authMessage);
    const proof = Buffer.from(proof64, 'base64');
    if (proof.length !== signature.length) return null;
    const clientKey = Buffer.from(proof.map((byte, index) => byte ^ signature[index]));
    const proven = timingSafeEqual(sha256(clientKey), this.#storedKey);
    if (!this.#known || !proven || nonce !== this.#nonce || header !== this.#clientFirst.header) return null;
    return `v=${hmac(this.#serverKey, authMessage).toString('base64')}`;
  }
}
