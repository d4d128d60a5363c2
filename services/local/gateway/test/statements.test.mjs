import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Statements } from '../statements.mjs';
import { CLIENT, int32, message, query, SYNC, text, typeAt } from '../wire.mjs';

const none = Buffer.from([0, 0]);
/** @type {(name: string, sql: string) => Buffer} */
const parse = (name, sql) => message('P', text(name, sql), none);
/** @type {(portal: string, name: string) => Buffer} */
const bind = (portal, name) => message('B', text(portal, name), none, none, none);
/** @type {(type: 'C' | 'D', target: 'S' | 'P', name: string) => Buffer} */
const about = (type, target, name) => message(type, Buffer.from(target), text(name));

/** @param {...Buffer} sent */
function rewritten(...sent) {
  const statements = new Statements('c7_');
  return sent.map((whole) => statements.rewrite(typeAt(whole), whole));
}

/** @param {...Buffer} sent */
const bytes = (...sent) => rewritten(...sent).map((each) => each?.bytes);
/** @param {...Buffer} sent */
const marks = (...sent) => rewritten(...sent).map((each) => each?.marks);

test('unnamed statements and portals keep their messages', () => {
  const sent = [
    parse('', 'SELECT 1'),
    bind('', ''),
    about('D', 'S', ''),
    about('C', 'P', 'cursor'),
    message('E', text(''), int32(0)),
    SYNC,
  ];
  assert.deepEqual(bytes(...sent), sent);
});

test('named statements get the prefix in each message that names them', () => {
  assert.deepEqual(bytes(parse('s', 'SELECT 1'), bind('p', 's'), about('D', 'S', 's'), about('C', 'S', 's')), [
    parse('c7_s', 'SELECT 1'),
    bind('p', 'c7_s'),
    about('D', 'S', 'c7_s'),
    about('C', 'S', 'c7_s'),
  ]);
});

test('text is rewritten whatever the encoding of its bytes', () => {
  const latin = Buffer.from("EXECUTE s ('\xe9')", 'latin1');
  const [found] = bytes(message('Q', latin, Buffer.from([0])));
  assert.equal(found?.toString('latin1', 5), "EXECUTE c7_s ('\xe9')\0");
  assert.deepEqual(bytes(parse('', 'EXECUTE s')), [parse('', 'EXECUTE c7_s')]);
});

test('a prepared statement has its marks each time it is bound', () => {
  const found = marks(parse('s', 'SET a = 1'), bind('', 's'), bind('', 's'), parse('s', 'SELECT 1'), bind('', 's'));
  assert.deepEqual(found, [[], ['settings'], ['settings'], [], []]);
  assert.deepEqual(marks(query('SET a = 1')), [['settings']]);
});

test('messages that clients do not send are refused', () => {
  assert.deepEqual(rewritten(message('F'), message('z')), [null, null]);
  assert.deepEqual(new Statements('c7_').rewrite(CLIENT.PASSWORD, message('p')), null);
});
