// What no ordinary program does, all in one place: SQL is rewritten, and the engine's memory is read and written.
//
// Each part says why it is needed and when it can go.

// == Statements
//
// Why: all connections share one backend, and some statements mean "of this connection": names of prepared
// statements, settings, LISTEN, DISCARD. The gateway has to know of the first two and refuses the others.
// Goes: with an engine that has a backend for each connection.
//
// Text is searched, not parsed, and its bytes are left alone (latin1), whatever the client's encoding. A mark
// that is set too often costs a query at the end of the statement.

const LEAD = String.raw`(?:\s|--[^\n]*\n|/\*[\s\S]*?\*/)*`;
const NAME = String.raw`"(?:[^"]|"")+"|[A-Za-z_\x80-\xff][\w$\x80-\xff]*`;
const BEGINS = String.raw`(?:^|;|\*/|\n)\s*`;

const SETTINGS = new RegExp(`${BEGINS}(?:set(?!\\s+(?:transaction|constraints)\\b)|reset)\\b|\\bset_config\\b`, 'i');
const LOCAL = new RegExp(`^${LEAD}set\\s+local\\b[^;]*;?\\s*$`, 'i');
const ROLES = /\b(?:create|alter|drop)\s+(?:role|user|group)\b/i;
const REFUSED = new RegExp(`^${LEAD}(listen|unlisten|discard(?!\\s+(?:plans|sequences)\\b))\\b`, 'i');
const DEALLOCATE_ALL = new RegExp(`^${LEAD}deallocate\\s+(?:prepare\\s+)?all\\b`, 'i');
const PREPARED = new RegExp(
  `^(${LEAD}(?:explain\\b[^;]*?\\s)?(?:prepare(?!\\s+transaction\\b)|execute|deallocate(?:\\s+prepare)?)\\s+)(${NAME})`,
  'i',
);

/** @param {string} name */
const lower = (name) => name.replace(/[A-Z]/g, (letter) => letter.toLowerCase());
/** @param {string} name */
const folded = (name) => (name[0] === '"' ? name.slice(1, -1).replaceAll('""', '"') : lower(name));

/** @param {string} what */
const refusal = (what) =>
  `DO $$ BEGIN RAISE feature_not_supported USING MESSAGE = '${what} is not supported by the gateway'; END $$`;

/**
 * SQL that forgets every prepared statement whose name begins with `prefix`.
 * @param {string} prefix
 */
export const deallocateAll = (prefix) =>
  `DO $$ DECLARE statement text; BEGIN
     FOR statement IN SELECT name FROM pg_catalog.pg_prepared_statements
                       WHERE pg_catalog.starts_with(name, '${prefix}') LOOP
       EXECUTE pg_catalog.format('DEALLOCATE %I', statement);
     END LOOP; END $$`;

/**
 * The statement as the backend gets it.
 * @param {string} sql
 * @param {string} prefix of the names of this connection's prepared statements
 */
export function rewrite(sql, prefix) {
  const refused = REFUSED.exec(sql);
  if (refused) return refusal(refused[1].toUpperCase());
  if (DEALLOCATE_ALL.test(sql)) return deallocateAll(prefix);
  return sql.replace(PREPARED, (_, before, name) => `${before}"${(prefix + folded(name)).replaceAll('"', '""')}"`);
}

/**
 * What a statement may change that the gateway has to know; null if nothing.
 * @param {string} sql
 * @returns {import('./types.d.ts').Marks | null}
 */
export function marksOf(sql) {
  const roles = ROLES.test(sql);
  if (!SETTINGS.test(sql)) return roles ? { roles } : null;
  return { [LOCAL.test(sql) ? 'local' : 'settings']: true, ...(roles && { roles }) };
}

// == The stack
//
// Why: the build has a C stack of 64 kB, never checks its depth, and has its variables below: a deep expression
// would overwrite them. So the stack is moved to where there is room, and PostgreSQL is told where it begins.
// The variable for that, stack_base_ptr of tcop/postgres.c, is static: this is its address in this build of the
// package. It is 0 before, so that another build is noticed.
// Goes: with a build that has a larger stack and calls set_stack_base().

const STACK_BYTES = 8 * 1024 * 1024;
const STACK_BASE_PTR = 2540524;

/** @param {Module} module */
export function moveStack(module) {
  if (module.HEAPU32[STACK_BASE_PTR >> 2] !== 0) throw new Error('stack_base_ptr is not where it was');
  const top = (module._malloc(STACK_BYTES) + STACK_BYTES - 16) & ~15;
  module.___stack_pointer.value = top;
  module.HEAPU32[STACK_BASE_PTR >> 2] = top;
}

// == Interrupts
//
// Why: nothing in the build cancels a statement. PostgreSQL's signal handler would set these two flags of
// globals.c; QueryCancelPending is the one after InterruptPending, which the build exports.
// Goes: with a build that exports a function for it.

/**
 * Make the running statement end with SQLSTATE 57014 at its next check, or no longer.
 * @param {Module} module
 * @param {boolean} pending
 */
export function setInterrupt(module, pending) {
  const at = module._InterruptPending >> 2;
  module.HEAP32[at] = module.HEAP32[at + 1] = Number(pending);
}

/**
 * What CHECK_FOR_INTERRUPTS() does; throws through the calling function.
 * @param {Module} module
 */
export function checkInterrupts(module) {
  if (module.HEAP32[module._InterruptPending >> 2]) module._ProcessInterrupts();
}

// == Builtin functions
//
// Why: some answers depend on the connection, of which the backend knows nothing (pg_backend_pid), and one
// function blocks the server (pg_sleep). SQL functions of the same name would be other objects, in a schema of
// their own, with other privileges. So the pointers in PostgreSQL's table of builtins, fmgr_builtins, are
// changed. The table is not exported: it is found by the form of its rows,
// {Oid, short nargs + 2 bools, char *name, function}. Nor is the table of functions that such pointers lead into:
// it is captured as the module is made, by something that looks like an extension.
// Goes: with an engine that has a backend for each connection.

const REPLACEABLE = /^pg_(?:\w*advisory\w*|sleep|backend_pid)$/;

/** An extension for PGlite that loads nothing, and the functions once PGlite is open. */
export function captureFunctions() {
  /** @type {WebAssembly.Table | undefined} */
  let table;
  const setup = async (/** @type {unknown} */ _, /** @type {any} */ options) => ({
    emscriptenOpts: {
      ...options,
      instantiateWasm: (/** @type {any} */ imports, /** @type {unknown} */ done) => {
        table = imports.env.__indirect_function_table;
        return options.instantiateWasm(imports, done);
      },
    },
  });
  const functions = () => {
    if (!table) throw new Error('PGlite did not make its module as expected');
    return table;
  };
  return { extension: { name: 'capture', setup }, functions };
}

/**
 * Replace builtin functions by their C names. Throws when one is not found, which is how another build of the
 * package would show. For any other that could be replaced, `otherwise` gives the replacement, or null.
 * @param {Module} module
 * @param {WebAssembly.Table} functions
 * @param {Record<string, Replacement>} replacements
 * @param {(name: string) => Replacement | null} otherwise
 */
export function replaceBuiltins(module, functions, replacements, otherwise) {
  const found = findBuiltins(module);
  const missing = Object.keys(replacements).filter((name) => !found.has(name));
  if (missing.length) throw new Error(`the embedded PostgreSQL has no builtin ${missing}`);
  for (const [name, pointer] of found) {
    const replacement = replacements[name] ?? otherwise(name);
    if (!replacement) continue;
    const original = functions.get(module.HEAPU32[pointer]);
    /** @param {number} address */
    const wrapped = (address) => replacement(new Call(module, address), () => original(address));
    module.HEAPU32[pointer] = module.addFunction(wrapped, 'ii');
  }
}

/**
 * Index (in 32-bit words) of the pointer to each builtin that may be replaced.
 * @param {Module} module
 * @returns {Map<string, number>}
 */
function findBuiltins(module) {
  const words = module.HEAPU32;
  const found = new Map();
  for (let at = 0; at + 4 < words.length; at++) {
    const plausible = words[at] > 0 && words[at] < 10_000 && (words[at + 1] & 0xfefe00f0) === 0;
    if (!plausible || words[at + 2] < 1024 || words[at + 2] >= words.length * 4) continue;
    const name = nameAt(module.HEAPU8, words[at + 2]);
    if (name && REPLACEABLE.test(name)) found.set(name, at + 3);
  }
  return found;
}

/** @type {(bytes: Uint8Array, from: number) => string | null} */
function nameAt(bytes, from) {
  if (bytes[from] !== 0x70 || bytes[from + 1] !== 0x67 || bytes[from + 2] !== 0x5f) return null; // pg_
  return Buffer.from(bytes.buffer, from, 64).toString('latin1').split('\0', 1)[0];
}

/** The arguments of a call: FunctionCallInfo, from byte 20 on, 8 bytes each. */
class Call {
  #module;
  #address;

  /**
   * @param {Module} module
   * @param {number} address
   */
  constructor(module, address) {
    this.#module = module;
    this.#address = address;
  }

  #view() {
    return new DataView(this.#module.HEAPU8.buffer);
  }

  /** @param {number} index */
  int32(index) {
    return this.#view().getInt32(this.#address + 20 + 8 * index, true);
  }

  /** @param {number} index */
  float64(index) {
    return this.#view().getFloat64(this.int32(index), true);
  }
}

const ERROR = 21;

/**
 * ereport(ERROR): ends the running statement, does not return.
 * @param {Module} module
 * @param {string} state SQLSTATE
 * @param {string} reason
 */
export function raise(module, state, reason) {
  const place = cString(module, 'gateway');
  module._errstart(ERROR, 0);
  module._errcode([...state].reduce((all, digit, at) => all + ((digit.charCodeAt(0) - 48) << (6 * at)), 0));
  module._errmsg(cString(module, reason.replaceAll('%', '%%')), 0);
  module._errfinish(place, 0, place);
}

/** @type {Map<string, number>} */
const strings = new Map();

/**
 * The address of a C string that stays: there are few, and always the same.
 * @param {Module} module
 * @param {string} string
 */
export function cString(module, string) {
  const known = strings.get(string);
  if (known !== undefined) return known;
  const bytes = Buffer.from(`${string}\0`);
  const at = module._malloc(bytes.length);
  module.HEAPU8.set(bytes, at);
  strings.set(string, at);
  return at;
}

/**
 * @typedef {any} Module Emscripten's module; the package declares next to nothing of what is used here.
 * @typedef {(call: Call, original: () => number) => number} Replacement
 */
