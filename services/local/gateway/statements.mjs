// What one client's messages become before they reach the backend that all share: names of prepared statements
// get the connection's prefix, and what a statement may change is noted.

import { CLIENT, message } from './wire.mjs';
import { marksOf, rewrite } from './workarounds.mjs';

/**
 * @typedef {import('./types.d.ts').Marks} Marks
 * @typedef {{ bytes: Buffer, marks: Marks | null }} Rewritten
 */

const PASSED = new Set([CLIENT.EXECUTE, CLIENT.SYNC, CLIENT.FLUSH]);
const latin1 = (/** @type {string} */ string) => Buffer.from(string, 'latin1');

export class Statements {
  #prefix;
  /** @type {Map<string, Marks>} */
  #prepared = new Map(); // marks by the statement's name; '' is the unnamed one

  /** @param {string} prefix */
  constructor(prefix) {
    this.#prefix = prefix;
  }

  /**
   * The message as the backend gets it; null if clients do not send such a message.
   * @param {number} type
   * @param {Buffer} whole
   * @returns {Rewritten | null}
   */
  rewrite(type, whole) {
    switch (type) {
      case CLIENT.QUERY:
        return this.#query(whole);
      case CLIENT.PARSE:
        return this.#parse(whole);
      case CLIENT.BIND:
        return this.#bind(whole);
      case CLIENT.DESCRIBE:
      case CLIENT.CLOSE:
        return this.#target(whole);
      default:
        return PASSED.has(type) ? { bytes: whole, marks: null } : null;
    }
  }

  /** @type {(whole: Buffer) => Rewritten} */
  #query(whole) {
    const sql = whole.toString('latin1', 5, whole.length - 1);
    const rewritten = rewrite(sql, this.#prefix);
    return { bytes: rewritten === sql ? whole : message('Q', latin1(`${rewritten}\0`)), marks: marksOf(sql) };
  }

  /** @type {(whole: Buffer) => Rewritten} */
  #parse(whole) {
    const nameEnd = whole.indexOf(0, 5);
    const sqlEnd = whole.indexOf(0, nameEnd + 1);
    const name = whole.toString('latin1', 5, nameEnd);
    const sql = whole.toString('latin1', nameEnd + 1, sqlEnd);
    const marks = marksOf(sql);
    if (marks) this.#prepared.set(name, marks);
    else this.#prepared.delete(name);
    const rewritten = rewrite(sql, this.#prefix);
    if (!name && rewritten === sql) return { bytes: whole, marks: null };
    const head = latin1(`${this.#named(name)}\0${rewritten}\0`);
    return { bytes: message('P', head, whole.subarray(sqlEnd + 1)), marks: null };
  }

  /** @type {(whole: Buffer) => Rewritten} */
  #bind(whole) {
    const portalEnd = whole.indexOf(0, 5);
    const nameEnd = whole.indexOf(0, portalEnd + 1);
    const name = whole.toString('latin1', portalEnd + 1, nameEnd);
    const marks = this.#prepared.get(name) ?? null;
    if (!name) return { bytes: whole, marks };
    const portal = whole.subarray(5, portalEnd + 1);
    return { bytes: message('B', portal, latin1(this.#named(name)), whole.subarray(nameEnd)), marks };
  }

  /**
   * Describe or Close: of a statement ('S') or of a portal.
   * @type {(whole: Buffer) => Rewritten}
   */
  #target(whole) {
    const name = whole.toString('latin1', 6, whole.length - 1);
    if (whole[5] !== 'S'.charCodeAt(0) || !name) return { bytes: whole, marks: null };
    return { bytes: message(String.fromCharCode(whole[0]), latin1(`S${this.#named(name)}\0`)), marks: null };
  }

  /** @param {string} name */
  #named(name) {
    return name && this.#prefix + name;
  }
}
