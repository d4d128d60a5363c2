// Where one message ends and the next begins, in bytes that arrive in pieces of any size.
//
// Most bytes are bulk data (COPY, rows of an answer), so both directions hand on runs of bytes that nobody has
// to look at, and whole messages only where somebody does.

import { CLIENT, lengthAt, SERVER } from './wire.mjs';

const MAX_MESSAGE_BYTES = 256 * 1024 * 1024; // of anything but COPY data
const INSPECTED = new Set([SERVER.READY, SERVER.ERROR, SERVER.NOTICE, SERVER.COPY_IN]);

/** The client does not follow the protocol; its connection cannot be used any further. */
export class ProtocolError extends Error {}

/** What a client sends. */
export class ClientFrames {
  /** @type {Buffer[]} */
  #parts = []; // the beginning of a message
  #partsBytes = 0;
  #wantedBytes = 0;

  /** Bytes of a CopyData message still to come. */
  copyRest = 0;

  /**
   * Whole messages; COPY data as runs of bytes of type COPY_DATA, whatever the size of its messages.
   * @param {Buffer} chunk
   * @returns {Generator<{ type: number, bytes: Buffer }>}
   */
  *cut(chunk) {
    this.#parts.push(chunk);
    this.#partsBytes += chunk.length;
    if (this.#partsBytes < this.#wantedBytes) return;
    const bytes = this.#parts.length > 1 ? Buffer.concat(this.#parts) : chunk;
    this.#parts = [];
    let at = 0;
    for (;;) {
      const copied = this.#endOfCopy(bytes, at);
      if (copied > at) yield { type: CLIENT.COPY_DATA, bytes: bytes.subarray(at, copied) };
      const length = checked(lengthAt(bytes, copied));
      if (!length || bytes.length - copied < length) return this.#keep(bytes.subarray(copied), length || 5);
      at = copied + length;
      yield { type: bytes[copied], bytes: bytes.subarray(copied, at) };
    }
  }

  /**
   * @param {Buffer} bytes
   * @param {number} at
   */
  #endOfCopy(bytes, at) {
    for (;;) {
      const length = Math.min(this.copyRest, bytes.length - at);
      this.copyRest -= length;
      at += length;
      if (bytes[at] !== CLIENT.COPY_DATA) return at;
      this.copyRest = lengthAt(bytes, at);
      if (this.copyRest === 0) return at;
      if (this.copyRest < 5) throw new ProtocolError('invalid message length');
    }
  }

  /**
   * @param {Buffer} rest
   * @param {number} wantedBytes
   */
  #keep(rest, wantedBytes) {
    if (rest.length) this.#parts = [rest];
    this.#partsBytes = rest.length;
    this.#wantedBytes = rest.length ? wantedBytes : 0;
  }
}

/** @param {number} length */
function checked(length) {
  if (length > 0 && length < 5) throw new ProtocolError('invalid message length');
  if (length > MAX_MESSAGE_BYTES) throw new ProtocolError('message too long');
  return length;
}

/** What the backend answers. */
export class AnswerFrames {
  /** @type {Buffer | null} */
  #begun = null; // a message to be looked at of which not all is here
  #rest = 0; // bytes of a message not looked at still to come

  /**
   * Whole messages that somebody looks at, by their type; runs of everything else, of type 0.
   * @param {Buffer} answer
   * @returns {Generator<{ type: number, bytes: Buffer }>}
   */
  *cut(answer) {
    const bytes = this.#begun ? Buffer.concat([this.#begun, answer]) : answer;
    this.#begun = null;
    for (let at = 0; at < bytes.length; ) {
      const end = this.#endOfRun(bytes, at);
      if (end > at) yield { type: 0, bytes: bytes.subarray(at, end) };
      const length = lengthAt(bytes, end);
      if (!length || bytes.length - end < length) {
        if (end < bytes.length) this.#begun = bytes.subarray(end);
        return;
      }
      at = end + length;
      yield { type: bytes[end], bytes: bytes.subarray(end, at) };
    }
  }

  /**
   * @param {Buffer} bytes
   * @param {number} at
   */
  #endOfRun(bytes, at) {
    for (;;) {
      const length = Math.min(this.#rest, bytes.length - at);
      this.#rest -= length;
      at += length;
      if (at === bytes.length || INSPECTED.has(bytes[at])) return at;
      this.#rest = lengthAt(bytes, at);
      if (this.#rest === 0) return at;
    }
  }
}
