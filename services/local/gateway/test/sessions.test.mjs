// On the real engine: whether PostgreSQL does what the gateway makes of it cannot be told without it.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, beforeEach, test } from 'node:test';
import { Engine } from '../engine.mjs';
import { Sessions } from '../sessions.mjs';
import { PostgresError } from '../wire.mjs';
import { marksOf } from '../workarounds.mjs';

const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'gateway-'));
/** @type {Engine} */
let engine;
/** @type {Sessions} */
let sessions;
let pid = 1000;

before(async () => {
  engine = await Engine.open(directory, 'sensors', path.join(directory, 'template'));
  engine.query('CREATE ROLE keeper SUPERUSER LOGIN; CREATE ROLE reader LOGIN');
  sessions = new Sessions(engine);
});

after(async () => {
  await engine.close();
  fs.rmSync(directory, { recursive: true });
});

beforeEach(() => {
  if (sessions.current) sessions.close(sessions.current);
});

/** @type {(user?: string, ...settings: [string, string][]) => number} */
function open(user = 'keeper', ...settings) {
  pid += 1;
  sessions.open({ pid, user, settings, reported: {} });
  return pid;
}

/**
 * Run statements as a connection; returns the first column of the first row.
 * @param {number} session
 * @param {string} sql
 */
function run(session, sql) {
  sessions.activate(session, marksOf(sql));
  const rows = engine.query(sql);
  sessions.settle();
  return rows[0]?.[0];
}

test('settings are those of the connection', () => {
  const [one, two] = [open('keeper', ['TimeZone', 'Asia/Tokyo']), open()];
  run(one, "SET work_mem = '8MB'");
  assert.equal(run(two, 'SHOW work_mem'), '4MB');
  assert.equal(run(two, 'SHOW timezone'), 'UTC');
  assert.equal(run(one, 'SHOW work_mem'), '8MB');
  run(one, 'RESET ALL');
  assert.equal(run(one, 'SHOW timezone'), 'Asia/Tokyo');
  assert.equal(run(one, 'SHOW work_mem'), '4MB');
  sessions.close(one);
  sessions.close(two);
});

test('a setting that a transaction took back is not kept', () => {
  const one = open();
  run(one, 'BEGIN');
  run(one, "SET work_mem = '8MB'");
  run(one, 'ROLLBACK');
  sessions.activate(open(), []);
  assert.equal(run(one, 'SHOW work_mem'), '4MB');
});

test('a role ends with the transaction, or when it is reset, and never changes the user', () => {
  const one = open('reader');
  assert.equal(run(one, 'SELECT session_user'), 'reader');
  assert.throws(() => run(one, 'CREATE ROLE other'), PostgresError);
  run(one, 'RESET SESSION AUTHORIZATION');
  assert.equal(run(one, 'SELECT session_user'), 'reader');
  const two = open();
  run(two, 'SET ROLE reader');
  assert.equal(run(one, 'SELECT current_user'), 'reader');
  assert.equal(run(two, "SELECT current_user || ' ' || session_user"), 'reader keeper');
  run(two, 'RESET ROLE');
  assert.equal(run(two, 'SELECT current_user'), 'keeper');
});

test('another user lasts no longer than the transaction', () => {
  const one = open();
  run(one, 'BEGIN');
  run(one, 'SET SESSION AUTHORIZATION reader');
  assert.equal(run(one, 'SELECT session_user'), 'reader');
  run(one, 'COMMIT');
  assert.equal(run(one, 'SELECT session_user'), 'keeper');
});

test("what the gateway does as superuser is not done by the connection's statements", () => {
  const one = open('reader');
  run(one, 'SELECT 1');
  assert.deepEqual(sessions.asSuperuser('SELECT session_user'), [['postgres']]);
  assert.equal(run(one, 'SELECT session_user'), 'reader');
});

test('a setting that is wrong from the start is refused with the first statement', () => {
  const one = open('keeper', ['nonsense', '1']);
  assert.throws(() => sessions.activate(one, []), { sqlstate: '42704' });
  assert.equal(run(open(), 'SELECT 1'), '1');
});

test('settings are reported when they have changed, and only then', () => {
  const one = open();
  run(one, 'SELECT 1');
  sessions.activate(one, []);
  assert.deepEqual(sessions.settle().parameters, {});
  const change = "SELECT pg_catalog.set_config('timezone', 'asia/tokyo', false)";
  sessions.activate(one, marksOf(change));
  engine.query(change);
  assert.deepEqual(sessions.settle().parameters, { TimeZone: 'Asia/Tokyo' });
});

test('a connection that goes leaves no transaction, no prepared statement and no lock', () => {
  const [one, two] = [open(), open()];
  run(two, `PREPARE c${two}_mine AS SELECT 1`);
  run(one, `PREPARE c${one}_mine AS SELECT 1`);
  for (const pid of [one, one, two]) run(pid, `SELECT pg_try_advisory_lock_shared(7, ${pid})`);
  run(one, 'BEGIN');
  run(one, 'CREATE TABLE unfinished (a int)');
  sessions.close(one);
  assert.equal(engine.status, 'I');
  assert.equal(run(two, "SELECT to_regclass('unfinished')"), null);
  assert.deepEqual(engine.query('SELECT name FROM pg_prepared_statements'), [[`c${two}_mine`]]);
  const held = "SELECT objid FROM pg_locks WHERE locktype = 'advisory'";
  assert.deepEqual(engine.query(held), [[`${two}`]]);
  sessions.close(two);
});
