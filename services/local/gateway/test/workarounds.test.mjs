import assert from 'node:assert/strict';
import { test } from 'node:test';
import { errorOf, errorResponse, message, messages, PostgresError, readyForQuery, text } from '../wire.mjs';
import { Memory, marksOf, rewrite, withoutWarning, withReason } from '../workarounds.mjs';

/** @param {string} sql */
const sent = (sql) => rewrite(sql, 'c7_');

test('most statements stay as they are', () => {
  for (const sql of [
    'SELECT 1',
    "SELECT 'listen to me'",
    'COPY t FROM STDIN',
    'CREATE TABLE prepare (discard int)',
    "INSERT INTO t VALUES ('EXECUTE x')",
  ]) {
    assert.equal(sent(sql), sql);
  }
});

test('names of prepared statements get the prefix of their connection', () => {
  assert.equal(sent('PREPARE One AS SELECT 1'), 'PREPARE c7_One AS SELECT 1');
  assert.equal(sent('execute "a""B" (1);'), 'execute "c7_a""B" (1);');
  assert.equal(sent(' DEALLOCATE PREPARE x'), ' DEALLOCATE PREPARE c7_x');
});

test('DEALLOCATE ALL is for one connection', () => {
  for (const sql of ['DEALLOCATE ALL', 'deallocate prepare all;']) {
    assert.match(sent(sql), /^DO .*starts_with\(name, 'c7_'\)/s);
  }
});

test('what would reach other connections is refused', () => {
  for (const sql of ['LISTEN x', 'unlisten *;', ' DISCARD ALL', 'discard temporary']) {
    assert.match(sent(sql), /RAISE feature_not_supported/, sql);
  }
});

test('statements that may change settings or roles are known', () => {
  const settings = ['settings'];
  const cases = /** @type {[string, unknown][]} */ ([
    ['SELECT 1', []],
    ['UPDATE t\nSET a = 1', []],
    ['SET TRANSACTION ISOLATION LEVEL SERIALIZABLE', []],
    ['SET LOCAL ROLE x', []],
    ['SET work_mem = 1', settings],
    ['BEGIN; set role x', settings],
    ['DO $$ BEGIN\nSET a = 1; END $$', settings],
    ['/* first */ RESET ALL', settings],
    ['-- first\nRESET ALL', settings],
    ["SELECT set_config('a', 'b', false)", settings],
    ['SET LOCAL a = 1; SET b = 1', settings],
    ["CREATE ROLE x LOGIN PASSWORD 'y'", ['roles']],
    ["SET a = 1; ALTER USER x PASSWORD 'y'", ['settings', 'roles']],
  ]);
  for (const [sql, marks] of cases) assert.deepEqual(marksOf(sql), marks, sql);
});

test('a canceled statement says why, and a rollback is not worth a warning', () => {
  const row = message('D', Buffer.alloc(9));
  const canceled = Buffer.concat([row, errorResponse('ERROR', '57014', 'canceling'), readyForQuery('I')]);
  const [first, error, last] = messages(withReason(canceled, 'too slow'));
  assert.deepEqual([first, errorOf(error).message, last], [row, 'too slow', readyForQuery('I')]);
  const begun = errorResponse('ERROR', '57014', 'a long reason, of which the end is in the next part').subarray(0, -20);
  assert.deepEqual(withReason(begun, 'too slow'), begun);
  const warning = message('N', text('SWARNING', 'VWARNING', 'C01000', 'M# 1743: aborting transaction 739', ''));
  const own = message('N', text('SWARNING', 'VWARNING', 'C01000', 'Mmind the gap', ''));
  assert.deepEqual(withoutWarning(Buffer.concat([row, warning, own])), Buffer.concat([row, own]));
});

test('another build of the engine is noticed', () => {
  const HEAPU32 = new Uint32Array(1 << 20);
  const module = { HEAPU32, HEAP32: new Int32Array(HEAPU32.buffer), _InterruptPending: 0 };
  const memory = new Memory(module);
  assert.throws(() => memory.check(() => {}), /does not fit this build of PGlite: QueryCancelPending/);
  const interrupted = () => {
    const pending = module.HEAP32[1];
    module.HEAP32[1] = 0;
    if (pending) throw new PostgresError('57014', 'canceling statement');
  };
  assert.throws(() => memory.check(interrupted), /does not fit this build of PGlite: stack_base_ptr/);
  HEAPU32.fill(1);
  assert.throws(() => memory.moveStack(), /does not fit this build of PGlite: stack_base_ptr/);
});
