// Where one message of a client ends and the next begins, in bytes that arrive in pieces of any size.

import { CLIENT, lengthAt, PostgresError, typeAt } from './wire.mjs';

const MAX_MESSAGE_BYTES = 256 * 1024 * 1024;

export class Frames {
  /** @type {Buffer[]} */
  #parts = []; // the beginning of a message
  #partsBytes = 0;
  #wantedBytes = 0; // before it is worth looking again

  /**
   * The messages that are complete with `chunk`. Neighbouring CopyData messages come as one: each row can be one.
   * @type {(chunk: Buffer) => Generator<{ type: string, bytes: Buffer }>}
   */
  *cut(chunk) {
    this.#parts.push(chunk);
    this.#partsBytes += chunk.length;
    if (this.#partsBytes < this.#wantedBytes) return;
    const bytes = this.#parts.length > 1 ? Buffer.concat(this.#parts) : chunk;
    let at = 0;
    for (let end = endOfMessage(bytes, 0); end; end = endOfMessage(bytes, at)) {
      const type = typeAt(bytes, at);
      const more = () => (type === CLIENT.COPY_DATA && typeAt(bytes, end) === type ? endOfMessage(bytes, end) : 0);
      for (let next = more(); next; next = more()) end = next;
      yield { type, bytes: bytes.subarray(at, end) };
      at = end;
    }
    this.#parts = [bytes.subarray(at)];
    this.#partsBytes = bytes.length - at;
    this.#wantedBytes = lengthAt(bytes, at);
  }
}

/** 0 if it is not there yet. @type {(bytes: Buffer, at: number) => number} */
function endOfMessage(bytes, at) {
  const length = lengthAt(bytes, at);
  if (length && length < 5) throw new PostgresError('08P01', 'invalid message length');
  if (length > MAX_MESSAGE_BYTES) throw new PostgresError('08P01', 'message too long');
  return at + length <= bytes.length && length ? at + length : 0;
}
