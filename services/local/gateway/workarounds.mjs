// What no ordinary program does, all in one place: rewriting SQL and answers, and changing the engine's memory.
//
// Each part says why it is needed and when it can go.

import { errorResponse, lengthAt, PostgresError } from './wire.mjs';

// == Statements
//
// Why: all connections share one backend, and some statements mean "of this connection": names of prepared
// statements, settings, LISTEN, DISCARD. The gateway has to know of the first two and refuses the others.
// Goes: with an engine that has a backend for each connection.
//
// Text is searched, not parsed. A mark too many costs a query of some milliseconds at the end of the transaction.

const LEAD = String.raw`(?:^|;|\bbegin\b)(?:\s|--[^\n]*\n|/\*[\s\S]*?\*/)*`;
const SET = String.raw`(?:set(?!\s+(?:local|transaction|constraints)\b)|reset)\b`;
/** @type {Record<string, RegExp>} */
const MARKS = {
  settings: new RegExp(String.raw`${LEAD}${SET}|\bset_config\b`, 'i'),
  roles: /\b(?:create|alter|drop)\s+(?:role|user|group)\b/i,
};
const REFUSED = /^\s*(listen|unlisten|discard)\b/i;
const DEALLOCATE_ALL = /^\s*deallocate\s+(?:prepare\s+)?all\b/i;
const BEFORE_NAME = /^\s*(?:prepare|execute|deallocate(?:\s+prepare)?)\s+"?(?=\w)/i;

/** What the names of a connection's prepared statements begin with. @param {number} pid */
export const statementPrefix = (pid) => `c${pid}_`;

/** SQL that forgets the prepared statements of one connection. @param {string} prefix */
export const deallocateAll = (prefix) =>
  `DO $$ DECLARE statement text; BEGIN
     FOR statement IN SELECT name FROM pg_catalog.pg_prepared_statements
                       WHERE pg_catalog.starts_with(name, '${prefix}') LOOP
       EXECUTE pg_catalog.format('DEALLOCATE %I', statement);
     END LOOP; END $$`;

/** SQL as the backend gets it. @type {(sql: string, prefix: string) => string} */
export function rewrite(sql, prefix) {
  const [, refused] = REFUSED.exec(sql) ?? [];
  if (refused) {
    const reason = `${refused.toUpperCase()} is not supported by the gateway`;
    return `DO $$ BEGIN RAISE feature_not_supported USING MESSAGE = '${reason}'; END $$`;
  }
  return DEALLOCATE_ALL.test(sql) ? deallocateAll(prefix) : sql.replace(BEFORE_NAME, `$&${prefix}`);
}

/** What a statement may change for longer than its transaction. @param {string} sql */
export const marksOf = (sql) => Object.keys(MARKS).filter((mark) => MARKS[mark].test(sql));

// == Answers
//
// Why: the build warns of each transaction that is rolled back, for debugging; and as there are no timers in it, a
// statement that the gateway ends for its statement_timeout says that its user has cancelled it.
// Each is flushed at its end, so one part of the answer has the whole of it, unless it is long.
// Goes: with a build without the warning; with timers.

const ABORT_WARNING = 'SWARNING\0VWARNING\0C01000\0M# ';
const CANCELED = 'SERROR\0VERROR\0C57014\0';

/** A part of an answer, without that warning. @param {Buffer} answer */
export const withoutWarning = (answer) => replaceMessage(answer, ABORT_WARNING, Buffer.alloc(0));

/** A part of an answer, with this reason for the cancellation. @type {(answer: Buffer, reason: string) => Buffer} */
export const withReason = (answer, reason) => replaceMessage(answer, CANCELED, errorResponse('ERROR', '57014', reason));

/** @type {(answer: Buffer, start: string, replacement: Buffer) => Buffer} `start` is how the message's body begins */
function replaceMessage(answer, start, replacement) {
  const at = answer.indexOf(start) - 5;
  const end = at + lengthAt(answer, Math.max(at, 0));
  if (at < 0 || end > answer.length) return answer;
  return Buffer.concat([answer.subarray(0, at), replacement, answer.subarray(end)]);
}

// == The engine's memory

/** The package is not the build for which this file was written. The message says it all. */
export class WrongBuild extends Error {
  /** @param {string} what */
  constructor(what) {
    super(`workarounds.mjs does not fit this build of PGlite: ${what}`);
    this.stack = this.message;
  }
}

const STACK_BYTES = 8 * 1024 * 1024;
const STACK_BASE_PTR = 2540524 >> 2; // as an index of 32-bit words
const ERROR = 21;

export class Memory {
  #module;
  /** @type {Map<string, number>} */
  #strings = new Map();

  /** @param {any} module Emscripten's; the package declares next to nothing of what is used here */
  constructor(module) {
    this.#module = module;
  }

  /** The address of a C string that stays: there are few, and always the same. @param {string} string */
  cString(string) {
    const address = this.#strings.get(string) ?? this.#module.stringToNewUTF8(string);
    this.#strings.set(string, address);
    return address;
  }

  // -- The stack
  //
  // Why: the build has a C stack of 64 kB, never checks its depth, and has its variables below: a deep expression
  // would overwrite them. So the stack is moved to where there is room, and PostgreSQL is told where it begins.
  // The variable for that, stack_base_ptr of tcop/postgres.c, is static: STACK_BASE_PTR is its address in this build.
  // Goes: with a build that has a larger stack and calls set_stack_base().

  moveStack() {
    if (this.#module.HEAPU32[STACK_BASE_PTR] !== 0) throw new WrongBuild('stack_base_ptr is not where it was');
    const top = (this.#module._malloc(STACK_BYTES) + STACK_BYTES - 16) & ~15;
    this.#module.___stack_pointer.value = top;
    this.#module.HEAPU32[STACK_BASE_PTR] = top;
  }

  // -- Interrupts
  //
  // Why: nothing in the build cancels a statement. PostgreSQL's signal handler would set these two flags of
  // globals.c; QueryCancelPending is the one after InterruptPending, which the build exports.
  // Goes: with a build that exports a function for it.

  /** Make the running statement end with SQLSTATE 57014 at its next check, or no longer. @param {boolean} pending */
  setInterrupt(pending) {
    const at = this.#module._InterruptPending >> 2;
    this.#module.HEAP32[at] = this.#module.HEAP32[at + 1] = Number(pending);
  }

  /** What CHECK_FOR_INTERRUPTS() does; throws through the calling function. */
  checkInterrupts() {
    if (this.#module.HEAP32[this.#module._InterruptPending >> 2]) this.#module._ProcessInterrupts();
  }

  /** Throw WrongBuild unless both changes make a simple statement fail as they should. @param {() => void} run */
  check(run) {
    this.setInterrupt(true);
    if (sqlstateOf(run) !== '57014') throw new WrongBuild('QueryCancelPending is not where it was');
    const top = this.#module.HEAPU32[STACK_BASE_PTR];
    this.#module.HEAPU32[STACK_BASE_PTR] = top + STACK_BYTES; // so far away that every statement is too deep
    const sqlstate = sqlstateOf(run);
    this.#module.HEAPU32[STACK_BASE_PTR] = top;
    if (sqlstate !== '54001') throw new WrongBuild('stack_base_ptr is not where it was');
  }

  // -- Builtin functions
  //
  // Why: some answers depend on the connection, of which the backend knows nothing (pg_backend_pid), and one
  // function blocks the server (pg_sleep). SQL functions of the same name would be other objects, with other
  // privileges. So others are put into the table through which C calls them. Emscripten's addFunction fills the
  // entry that removeFunction has freed last.
  // Goes: with an engine that has a backend for each connection.

  /** `own` gets the address of FunctionCallInfo. @type {(oid: number, own: (call: number) => number) => void} */
  replaceBuiltin(oid, own) {
    const info = this.#module._malloc(64); // FmgrInfo, which begins with the function's index in the table
    this.#module._fmgr_info(oid, info);
    const index = this.#module.HEAPU32[info >> 2];
    this.#module._free(info);
    this.#module.removeFunction(index);
    const once = own.bind(null); // addFunction does not add the same function again
    if (this.#module.addFunction(once, 'ii') !== index) throw new WrongBuild(`function ${oid} cannot be replaced`);
  }

  /** The first argument of a call, a float8: its address is at byte 20. @param {number} call */
  float8Argument(call) {
    return new DataView(this.#module.HEAPU8.buffer).getFloat64(this.#module.HEAPU32[(call + 20) >> 2], true);
  }

  /** ereport(ERROR): ends the running statement, does not return. @type {(sqlstate: string, reason: string) => void} */
  raise(sqlstate, reason) {
    const file = this.cString('gateway');
    this.#module._errstart(ERROR, 0);
    this.#module._errcode([...sqlstate].reduce((all, digit, at) => all + ((digit.charCodeAt(0) - 48) << (6 * at)), 0));
    this.#module._errmsg(this.cString(reason.replaceAll('%', '%%')), 0);
    this.#module._errfinish(file, 0, file);
  }
}

/** @param {() => void} run */
function sqlstateOf(run) {
  try {
    run();
    return null;
  } catch (error) {
    return error instanceof PostgresError && error.sqlstate;
  }
}
