import assert from 'node:assert/strict';
import { createHash, createHmac, pbkdf2Sync } from 'node:crypto';
import { test } from 'node:test';
import { exchange, verifier } from '../scram.mjs';

/** @type {(key: Buffer, data: string) => Buffer} */
const hmac = (key, data) => createHmac('sha256', key).update(data).digest();

/**
 * The client's side: its last message, and the answer that it expects.
 * @param {string} password
 * @param {string} bare
 * @param {string} serverFirst
 */
function answer(password, bare, serverFirst, ownNonce = '') {
  const [, given, salt, iterations] = /^r=(.+),s=(.+),i=(\d+)$/.exec(serverFirst) ?? [];
  const nonce = ownNonce || given;
  const salted = pbkdf2Sync(password, Buffer.from(salt, 'base64'), Number(iterations), 32, 'sha256');
  const clientKey = hmac(salted, 'Client Key');
  const withoutProof = `c=biws,r=${nonce}`;
  const signed = `${bare},${serverFirst},${withoutProof}`;
  const signature = hmac(createHash('sha256').update(clientKey).digest(), signed);
  const proof = Buffer.from(clientKey.map((byte, index) => byte ^ signature[index])).toString('base64');
  const expected = `v=${hmac(hmac(salted, 'Server Key'), signed).toString('base64')}`;
  return { final: `${withoutProof},p=${proof}`, expected };
}

/**
 * @param {string | null} secret
 * @param {string} password
 */
function login(secret, password) {
  const begun = exchange(secret, 'n,,n=,r=abc');
  assert.match(begun?.challenge ?? '', /^r=abc.{24},s=/);
  const { final, expected } = answer(password, 'n=,r=abc', begun?.challenge ?? '');
  return { found: begun?.prove(final), expected };
}

test('the verifier is that of RFC 7677 for its user and password', () => {
  const secret = verifier('pencil', Buffer.from('W22ZaJ0SNY7soEsUEjb6gQ==', 'base64'));
  const serverKey = Buffer.from(secret.split(':').at(-1) ?? '', 'base64');
  const nonce = 'rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0';
  const messages = `n=user,r=rOprNGfwEbeRWgbNEkqO,r=${nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r=${nonce}`;
  assert.equal(hmac(serverKey, messages).toString('base64'), '6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=');
});

test('the right password gets the signature that proves the server too', () => {
  const { found, expected } = login(verifier('correct horse'), 'correct horse');
  assert.equal(found, expected);
});

test('a wrong password and a role that does not exist get the same answer', () => {
  assert.equal(login(verifier('correct horse'), 'battery').found, null);
  assert.equal(login(null, 'battery').found, null);
});

test('an answer to another exchange proves nothing', () => {
  const secret = verifier('correct horse');
  const [one, two] = [exchange(secret, 'n,,n=,r=abc'), exchange(secret, 'n,,n=,r=abc')];
  const { final } = answer('correct horse', 'n=,r=abc', one?.challenge ?? '');
  assert.equal(two?.prove(final), null);
});

test('a proof for another nonce than the one that was given is refused', () => {
  const begun = exchange(verifier('correct horse'), 'n,,n=,r=abc');
  const { final } = answer('correct horse', 'n=,r=abc', begun?.challenge ?? '', 'abcmine');
  assert.equal(begun?.prove(final), null);
});

test('channel binding and malformed messages are refused', () => {
  assert.equal(exchange(null, 'p=tls-server-end-point,,n=,r=abc'), null);
  assert.equal(exchange(null, 'n,,n='), null);
  const begun = exchange(verifier('correct horse'), 'n,,n=,r=abc');
  assert.equal(begun?.prove('c=biws'), null);
  const { final } = answer('correct horse', 'n=,r=abc', begun?.challenge ?? '');
  assert.equal(begun?.prove(final.replace(/p=.*/, 'p=AAAA')), null);
});
