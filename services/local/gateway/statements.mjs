// What the messages of one client become before they reach the backend, which all clients share: prepared
// statements get names of their own, and it is noted which statements may change settings or roles.

import { CLIENT, message, typeAt } from './wire.mjs';
import { marksOf, rewrite } from './workarounds.mjs';

const PASSED = new Set([CLIENT.EXECUTE, CLIENT.SYNC, CLIENT.FLUSH]);

export class Statements {
  #prefix;
  /** @type {Map<string, string[]>} */
  #prepared = new Map(); // marks by the statement's name; '' is the unnamed one

  /** @param {string} prefix of the names of this client's statements in the backend */
  constructor(prefix) {
    this.#prefix = prefix;
  }

  /**
   * The message as the backend gets it, with its statement's marks; null if clients do not send such a message.
   * @type {(type: string, whole: Buffer) => { bytes: Buffer, marks: string[] } | null}
   */
  rewrite(type, whole) {
    const afterFirst = whole.indexOf(0, 5) + 1;
    switch (type) {
      case CLIENT.QUERY: {
        const sql = stringAt(whole, 5);
        return { bytes: message(CLIENT.QUERY, latin1(rewrite(sql, this.#prefix))), marks: marksOf(sql) };
      }
      case CLIENT.PARSE:
        return { bytes: this.#parse(whole, afterFirst), marks: [] };
      case CLIENT.BIND: // the portal's name, then the statement's
        return { bytes: this.#named(whole, afterFirst), marks: this.#prepared.get(stringAt(whole, afterFirst)) ?? [] };
      case CLIENT.DESCRIBE:
      case CLIENT.CLOSE:
        return { bytes: typeAt(whole, 5) === 'S' ? this.#named(whole, 6) : whole, marks: [] }; // else a portal's
      default:
        return PASSED.has(type) ? { bytes: whole, marks: [] } : null;
    }
  }

  /** The statement's name, its SQL, types. @type {(whole: Buffer, sqlAt: number) => Buffer} */
  #parse(whole, sqlAt) {
    const [name, sql] = [stringAt(whole, 5), stringAt(whole, sqlAt)];
    this.#prepared.set(name, marksOf(sql));
    const types = whole.subarray(sqlAt + sql.length + 1);
    return message(CLIENT.PARSE, latin1(name && this.#prefix + name), latin1(rewrite(sql, this.#prefix)), types);
  }

  /** The message with the prefix before the name at `at`. @type {(whole: Buffer, at: number) => Buffer} */
  #named(whole, at) {
    if (whole[at] === 0) return whole; // the unnamed statement
    return message(typeAt(whole), whole.subarray(5, at), Buffer.from(this.#prefix), whole.subarray(at));
  }
}

// Bytes of SQL stay as they are, whatever the client's encoding.
/** @type {(whole: Buffer, at: number) => string} */
const stringAt = (whole, at) => whole.toString('latin1', at, whole.indexOf(0, at));
/** @param {string} string */
const latin1 = (string) => Buffer.from(`${string}\0`, 'latin1');
