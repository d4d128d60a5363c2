import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Frames } from '../frames.mjs';
import { CLIENT, copyFail, int32, message, PostgresError, query, SYNC } from '../wire.mjs';

/**
 * What comes out when `bytes` arrive in chunks of this size; COPY data is joined.
 * @param {Buffer} bytes
 * @param {number} size
 */
function cut(bytes, size) {
  const frames = new Frames();
  /** @type {{ type: string, bytes: Buffer }[]} */
  const found = [];
  for (let at = 0; at < bytes.length; at += size) {
    for (const { type, bytes: whole } of frames.cut(bytes.subarray(at, at + size))) {
      const last = found.at(-1);
      if (type === CLIENT.COPY_DATA && last?.type === type) last.bytes = Buffer.concat([last.bytes, whole]);
      else found.push({ type, bytes: Buffer.from(whole) });
    }
  }
  return found;
}

const copyData = message('d', Buffer.from('1\tx\n'));
const copied = Buffer.concat([copyData, message('d'), copyData]);

test('messages of a client are found wherever the network cuts', () => {
  const sent = Buffer.concat([query('COPY t FROM STDIN'), copied, copyFail('no'), SYNC]);
  const wanted = [
    { type: CLIENT.QUERY, bytes: query('COPY t FROM STDIN') },
    { type: CLIENT.COPY_DATA, bytes: copied },
    { type: CLIENT.COPY_FAIL, bytes: copyFail('no') },
    { type: CLIENT.SYNC, bytes: SYNC },
  ];
  for (let size = 1; size <= sent.length; size++) {
    assert.deepEqual(cut(sent, size), wanted, `in chunks of ${size}`);
  }
});

test('CopyData messages that arrive together stay together', () => {
  assert.deepEqual([...new Frames().cut(copied)], [{ type: CLIENT.COPY_DATA, bytes: copied }]);
});

test('impossible lengths are refused', () => {
  for (const [type, length] of /** @type {[string, number][]} */ ([
    ['Q', 3],
    ['d', 3],
    ['Q', 300 << 20],
  ])) {
    const bytes = Buffer.concat([Buffer.from(type), int32(length)]);
    assert.throws(() => [...new Frames().cut(bytes)], PostgresError, `${type} ${length}`);
  }
});
