import assert from 'node:assert/strict';
import { test } from 'node:test';
import { errorOf, errorResponse, int32, lengthAt, message, messages, query, row, SYNC, text } from '../wire.mjs';

test('a message is its type, its length and its body', () => {
  assert.deepEqual([...message('Q', text('é'))], [0x51, 0, 0, 0, 7, 0xc3, 0xa9, 0]);
  assert.deepEqual([...SYNC], [0x53, 0, 0, 0, 4]);
});

test('messages are found one by one, and an incomplete head is none', () => {
  const both = Buffer.concat([query('SELECT 1'), SYNC]);
  assert.deepEqual([...messages(both)], [query('SELECT 1'), SYNC]);
  assert.equal(lengthAt(both, both.length - 5), 5);
  assert.equal(lengthAt(both, both.length - 4), 0);
});

test('an error response says its severity, its state and its reason', () => {
  const found = errorOf(errorResponse('FATAL', '57P01', 'the reason'));
  assert.deepEqual([found.sqlstate, found.message], ['57P01', 'the reason']);
});

test('a row has strings, empty strings and nulls', () => {
  const columns = [int32(2), Buffer.from('ab'), int32(0), int32(-1)];
  const count = Buffer.from([0, 3]);
  assert.deepEqual(row(message('D', count, ...columns)), ['ab', '', null]);
});
