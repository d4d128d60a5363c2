import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AnswerFrames, ClientFrames, ProtocolError } from '../frames.mjs';
import { CLIENT, copyFail, errorResponse, int32, message, query, readyForQuery, SERVER, SYNC } from '../wire.mjs';

/**
 * What comes out when `bytes` arrive in chunks of this size; runs of the same type are joined.
 * @param {ClientFrames | AnswerFrames} frames
 * @param {Buffer} bytes
 * @param {number} size
 * @param {number} run the type of runs
 */
function cut(frames, bytes, size, run) {
  /** @type {{ type: number, bytes: Buffer }[]} */
  const found = [];
  for (let at = 0; at < bytes.length; at += size) {
    for (const frame of frames.cut(bytes.subarray(at, at + size))) {
      const last = found.at(-1);
      if (frame.type === run && last?.type === run) last.bytes = Buffer.concat([last.bytes, frame.bytes]);
      else found.push({ type: frame.type, bytes: Buffer.from(frame.bytes) });
    }
  }
  return found;
}

const copyData = message('d', Buffer.from('1\tx\n'));
const copied = Buffer.concat([copyData, message('d'), copyData]);
const row = message('D', Buffer.alloc(100));

test('messages of a client are found wherever the network cuts', () => {
  const sent = Buffer.concat([query('COPY t FROM STDIN'), copied, copyFail('no'), SYNC]);
  const wanted = [
    { type: CLIENT.QUERY, bytes: query('COPY t FROM STDIN') },
    { type: CLIENT.COPY_DATA, bytes: copied },
    { type: CLIENT.COPY_FAIL, bytes: copyFail('no') },
    { type: CLIENT.SYNC, bytes: SYNC },
  ];
  for (let size = 1; size <= sent.length; size++) {
    assert.deepEqual(cut(new ClientFrames(), sent, size, CLIENT.COPY_DATA), wanted, `in chunks of ${size}`);
  }
});

test('COPY data is handed on before its message is complete, and what is missing is known', () => {
  const frames = new ClientFrames();
  const [first] = [...frames.cut(copyData.subarray(0, 7))];
  assert.deepEqual(first, { type: CLIENT.COPY_DATA, bytes: copyData.subarray(0, 7) });
  assert.equal(frames.copyRest, copyData.length - 7);
  const [second] = [...frames.cut(copyData.subarray(7))];
  assert.deepEqual(second.bytes, copyData.subarray(7));
  assert.equal(frames.copyRest, 0);
});

test('impossible lengths are refused', () => {
  for (const [type, length] of /** @type {[string, number][]} */ ([
    ['Q', 3],
    ['d', 3],
    ['Q', 300 << 20],
  ])) {
    const bytes = Buffer.concat([Buffer.from(type), int32(length)]);
    assert.throws(() => [...new ClientFrames().cut(bytes)], ProtocolError, `${type} ${length}`);
  }
});

test('of an answer, only the messages that matter are taken out of the stream', () => {
  const error = errorResponse('ERROR', '22012', 'division by zero');
  const answer = Buffer.concat([row, row, error, row, readyForQuery('E')]);
  const wanted = [
    { type: 0, bytes: Buffer.concat([row, row]) },
    { type: SERVER.ERROR, bytes: error },
    { type: 0, bytes: row },
    { type: SERVER.READY, bytes: readyForQuery('E') },
  ];
  for (let size = 1; size <= answer.length; size++) {
    assert.deepEqual(cut(new AnswerFrames(), answer, size, 0), wanted, `in chunks of ${size}`);
  }
});
