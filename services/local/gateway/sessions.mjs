// One backend, many connections: what belongs to a connection is put back before its statement runs.
//
// Settings, user and role are kept here for each connection and exchanged when another one gets the backend.
// Nothing is exchanged inside a transaction: it holds the backend until it ends.

import { identifier, SUPERUSER } from './engine.mjs';
import { query, SYNC } from './wire.mjs';
import { deallocateAll, statementPrefix } from './workarounds.mjs';

/**
 * @typedef {{ user: string, role: string, settings: Map<string, string> }} State what the backend is made to be
 */

/** Settings that the server reports to its clients when they change (GUC_REPORT). */
export const REPORTED = [
  'application_name',
  'client_encoding',
  'DateStyle',
  'default_transaction_read_only',
  'in_hot_standby',
  'integer_datetimes',
  'IntervalStyle',
  'is_superuser',
  'scram_iterations',
  'server_encoding',
  'server_version',
  'standard_conforming_strings',
  'TimeZone',
];

/** @param {string} string */
const literal = (string) => `'${string.replaceAll("'", "''")}'`;
/** @type {(name: string, value: string) => string} */
const setConfig = (name, value) => `pg_catalog.set_config(${literal(name)}, ${value}, false)`;

/** SQL that frees the shared advisory locks whose second key is `pid`, each taken once or more. @param {number} pid */
const unlockAll = (pid) =>
  `DO $$ DECLARE key int; BEGIN LOOP
     SELECT classid::int INTO key FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND objid = ${pid} LIMIT 1;
     EXIT WHEN NOT FOUND;
     PERFORM pg_catalog.pg_advisory_unlock_shared(key, ${pid});
   END LOOP; END $$`;

/** A connection, whether it has the backend or not. @param {Start} start */
const newSession = ({ pid, user, settings, reported }) => {
  const defaults = new Map(settings.map(([name, value]) => [name.toLowerCase(), value])); // what RESET goes back to
  return {
    pid,
    defaults,
    reported,
    /** @type {State} */
    state: { user, role: 'none', settings: defaults },
    /** @type {Set<string>} */
    marks: new Set(), // of its statements since they were last followed up
  };
};

export class Sessions {
  #engine;
  /** @type {Map<number, ReturnType<typeof newSession>>} */
  #sessions = new Map();
  /** @type {ReturnType<typeof newSession> | undefined} */
  #current;
  /** What the backend is now. @type {State} */
  #applied = { user: SUPERUSER, role: 'none', settings: new Map() };

  /** @param {Engine} engine */
  constructor(engine) {
    this.#engine = engine;
  }

  /** The connection that has the backend. */
  get current() {
    return this.#current?.pid;
  }

  /** @param {Start} start */
  open(start) {
    this.#sessions.set(start.pid, newSession(start));
  }

  /**
   * Give the backend to `pid`, whose next statements have these marks. Throws PostgresError when a setting from the
   * connection's start is wrong.
   * @type {(pid: number, marks: string[]) => void}
   */
  activate(pid, marks) {
    const session = this.#sessions.get(pid);
    if (!session) throw new Error(`there is no connection ${pid}`);
    this.#current = session;
    for (const mark of marks) session.marks.add(mark);
    this.#apply(session.state);
  }

  /** @param {State} state */
  #apply(state) {
    const { user, role, settings } = state;
    const now = this.#applied;
    const removed = [...now.settings.keys()].filter((name) => !settings.has(name));
    const changed = [...settings].filter(([name, value]) => now.settings.get(name) !== value);
    const calls = [
      ...removed.map((name) => setConfig(name, 'NULL')),
      ...changed.map(([name, value]) => setConfig(name, literal(value))),
    ];
    if (!calls.length && now.user === user && now.role === role) return;
    const sql = [`SET SESSION AUTHORIZATION ${SUPERUSER}`]; // RESET does nothing in a standalone backend
    if (calls.length) sql.push(`SELECT ${calls.join(', ')}`);
    if (user !== SUPERUSER) sql.push(`SET SESSION AUTHORIZATION ${identifier(user)}`);
    if (role !== 'none') sql.push(`SET ROLE ${identifier(role)}`);
    this.#engine.query(sql.join('; '));
    this.#applied = state;
  }

  /** Run a query of the gateway's own between transactions, whoever has the backend. @param {string} sql */
  asSuperuser(sql) {
    this.#apply({ ...this.#applied, user: SUPERUSER, role: 'none' });
    return this.#engine.query(sql);
  }

  /**
   * Follow up what the current connection's statements may have changed. Returns the reported settings with a new
   * value, and whether roles may have changed.
   */
  settle() {
    const session = this.#current;
    const { status, ready } = this.#engine;
    if (!session || !ready) return { parameters: {}, rolesChanged: false };
    const isOver = status === 'I';
    const rolesChanged = isOver && session.marks.has('roles');
    if (isOver && session.marks.has('settings')) this.#capture(session);
    if (isOver) session.marks.clear();
    const values = REPORTED.map((name) => [name, this.#engine.setting(name)]);
    const parameters = Object.fromEntries(values.filter(([name, value]) => session.reported[name] !== value));
    Object.assign(session.reported, parameters);
    return { parameters, rolesChanged };
  }

  /** Read back what the session's statements have set. @param {ReturnType<typeof newSession>} session */
  #capture(session) {
    const rows = this.#engine.query(
      `SELECT name, setting FROM pg_catalog.pg_settings
        WHERE source = 'session' AND name NOT LIKE 'transaction\\_%'`,
    );
    const settings = new Map(rows.map(([name, value]) => [name?.toLowerCase() ?? '', value ?? '']));
    // Both are empty before the first SET in a backend, and after some procedures that commit.
    const user = this.#engine.setting('session_authorization') || SUPERUSER;
    const role = this.#engine.setting('role') || 'none';
    this.#applied = { user, role, settings };
    session.state = { user: session.state.user, role, settings: new Map([...session.defaults, ...settings]) };
    this.#apply(session.state); // what RESET has brought to another value, or SET SESSION AUTHORIZATION
  }

  /** End the transaction, if there is one. */
  rollback() {
    if (this.#engine.status === 'I' && this.#engine.ready) return;
    // After an error in a unit whose Sync has not come, the first is not even looked at.
    this.#engine.exchange(Buffer.concat([query('ROLLBACK'), SYNC, query('ROLLBACK')]));
  }

  /** The connection is gone: nothing of it stays. @param {number} pid */
  close(pid) {
    this.rollback();
    this.asSuperuser(`${deallocateAll(statementPrefix(pid))}; ${unlockAll(pid)}`);
    this.#sessions.delete(pid);
    if (this.current === pid) this.#current = undefined;
  }
}
