// SCRAM-SHA-256, the server's side (RFC 5802, RFC 7677), with verifiers in PostgreSQL's own format: roles that
// were created with SQL log in here with their passwords.

import { createHash, createHmac, pbkdf2Sync, randomBytes, timingSafeEqual } from 'node:crypto';

const ITERATIONS = 4096;
const VERIFIER = /^SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):(.+)$/;

/** @param {Buffer} data */
const sha256 = (data) => createHash('sha256').update(data).digest();
/** @type {(key: Buffer, data: string) => Buffer} */
const hmac = (key, data) => createHmac('sha256', key).update(data).digest();
/** @param {string} encoded */
const base64 = (encoded) => Buffer.from(encoded, 'base64');

/** The verifier that PostgreSQL keeps in pg_authid.rolpassword. @param {string} password */
export function verifier(password, salt = randomBytes(16)) {
  const salted = pbkdf2Sync(password.normalize('NFKC'), salt, ITERATIONS, 32, 'sha256');
  const stored = sha256(hmac(salted, 'Client Key')).toString('base64');
  const server = hmac(salted, 'Server Key').toString('base64');
  return `SCRAM-SHA-256$${ITERATIONS}:${salt.toString('base64')}$${stored}:${server}`;
}

// A role that does not exist, or has no password, is asked for one all the same: the challenge must not tell.
const NOBODY = verifier(randomBytes(16).toString('hex'));

/** @typedef {{ challenge: string, prove: (clientFinal: string) => string | null }} Exchange */

/**
 * Answer a client-first-message, for the role with the verifier `secret`.
 *
 * Gives the challenge (server-first-message), and a function from the client-final-message to the
 * server-final-message, or to null if the password is wrong. null if the message is malformed or asks for channel
 * binding.
 * @type {(secret: string | null, clientFirst: string) => Exchange | null}
 */
export function exchange(secret, clientFirst) {
  const [, header, bare, clientNonce] = /^([ny],[^,]*,)(.*?r=([^,]+).*)$/.exec(clientFirst) ?? [];
  if (!clientNonce) return null;
  const known = VERIFIER.exec(secret ?? '');
  const [, iterations, salt, stored, server] = known ?? VERIFIER.exec(NOBODY) ?? [];
  const nonce = clientNonce + randomBytes(18).toString('base64');
  const challenge = `r=${nonce},s=${salt},i=${iterations}`;

  const prove = (/** @type {string} */ final) => {
    const [, signed, binding, finalNonce, proof] = /^(c=([^,]+),r=([^,]+).*),p=([^,]+)$/.exec(final) ?? [];
    if (!known || finalNonce !== nonce || base64(binding).toString('latin1') !== header) return null;
    const authMessage = `${bare},${challenge},${signed}`;
    const signature = hmac(base64(stored), authMessage);
    const clientKey = Buffer.from(base64(proof).map((byte, index) => byte ^ signature[index]));
    if (!timingSafeEqual(sha256(clientKey), base64(stored))) return null;
    return `v=${hmac(base64(server), authMessage).toString('base64')}`;
  };
  return { challenge, prove };
}
