import assert from 'node:assert/strict';
import { createHash, createHmac, pbkdf2Sync } from 'node:crypto';
import { test } from 'node:test';
import { Exchange, matches, verifier } from '../scram.mjs';

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
  const exchange = new Exchange(secret);
  const serverFirst = exchange.first('n,,n=,r=abc') ?? '';
  assert.match(serverFirst, /^r=abc.{24},s=/);
  const { final, expected } = answer(password, 'n=,r=abc', serverFirst);
  return { found: exchange.final(final), expected };
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
  const [one, two] = [new Exchange(secret), new Exchange(secret)];
  const { final } = answer('correct horse', 'n=,r=abc', one.first('n,,n=,r=abc') ?? '');
  two.first('n,,n=,r=abc');
  assert.equal(two.final(final), null);
});

test('a proof for another nonce than the one that was given is refused', () => {
  const exchange = new Exchange(verifier('correct horse'));
  const { final } = answer('correct horse', 'n=,r=abc', exchange.first('n,,n=,r=abc') ?? '', 'abcmine');
  assert.equal(exchange.final(final), null);
});

test('channel binding and malformed messages are refused', () => {
  assert.equal(new Exchange(null).first('p=tls-server-end-point,,n=,r=abc'), null);
  assert.equal(new Exchange(null).first('n,,n='), null);
  assert.equal(new Exchange(null).final('c=biws'), null);
});

test('a verifier matches its password only', () => {
  assert.ok(matches(verifier('x'), 'x'));
  assert.ok(!matches(verifier('x'), 'y'));
  assert.ok(!matches(null, ''));
  assert.ok(!matches('md5abc', 'abc'));
});
