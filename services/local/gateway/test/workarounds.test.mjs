import assert from 'node:assert/strict';
import { test } from 'node:test';
import { marksOf, rewrite } from '../workarounds.mjs';

/** @param {string} sql */
const sent = (sql) => rewrite(sql, '7:');

test('most statements stay as they are', () => {
  for (const sql of [
    'SELECT 1',
    "SELECT 'listen to me'",
    'PREPARE TRANSACTION x',
    'DISCARD PLANS',
    'COPY t FROM STDIN',
    'CREATE TABLE prepare (discard int)',
    "INSERT INTO t VALUES ('EXECUTE x')",
  ]) {
    assert.equal(sent(sql), sql);
  }
});

test('names of prepared statements get the prefix of their connection', () => {
  assert.equal(sent('PREPARE One AS SELECT 1'), 'PREPARE "7:one" AS SELECT 1');
  assert.equal(sent('execute "a""B" (1);'), 'execute "7:a""B" (1);');
  assert.equal(sent(' -- why\n DEALLOCATE PREPARE x'), ' -- why\n DEALLOCATE PREPARE "7:x"');
  assert.equal(sent('EXPLAIN ANALYZE EXECUTE x'), 'EXPLAIN ANALYZE EXECUTE "7:x"');
});

test('DEALLOCATE ALL is for one connection', () => {
  for (const sql of ['DEALLOCATE ALL', '/* * */ deallocate prepare all;']) {
    assert.match(sent(sql), /^DO .*starts_with\(name, '7:'\)/s);
  }
});

test('what would reach other connections is refused', () => {
  for (const sql of ['LISTEN x', 'unlisten *;', ' DISCARD ALL', '/* */ DISCARD TEMP', 'discard temporary']) {
    assert.match(sent(sql), /RAISE feature_not_supported/, sql);
  }
});

test('statements that may change settings or roles are known', () => {
  const settings = { settings: true };
  const cases = /** @type {[string, unknown][]} */ ([
    ['SELECT 1', null],
    ['UPDATE t SET a = 1', null],
    ['SET TRANSACTION ISOLATION LEVEL SERIALIZABLE', null],
    ['SET work_mem = 1', settings],
    ['BEGIN; set role x', settings],
    ['/* first */ RESET ALL', settings],
    ["SELECT set_config('a', 'b', false)", settings],
    ['SET LOCAL ROLE x', { local: true }],
    ['SET LOCAL a = 1; SET b = 1', settings],
    ["CREATE ROLE x LOGIN PASSWORD 'y'", { roles: true }],
    ["SET a = 1; ALTER USER x PASSWORD 'y'", { settings: true, roles: true }],
  ]);
  for (const [sql, marks] of cases) assert.deepEqual(marksOf(sql), marks, sql);
});
