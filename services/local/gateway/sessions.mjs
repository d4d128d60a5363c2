// One backend, many connections: what belongs to a connection is put back before its statement runs.
//
// Settings and role are kept here for each connection and exchanged when another one gets the backend. Nothing
// is exchanged inside a transaction: it holds the backend until it ends.

import { identifier, SUPERUSER } from './engine.mjs';
import { query, SYNC } from './wire.mjs';
import { deallocateAll } from './workarounds.mjs';

/**
 * @typedef {import('./types.d.ts').Marks} Marks
 * @typedef {Map<string, string>} Settings
 */

/** @param {string} string */
const literal = (string) => `'${string.replaceAll("'", "''")}'`;

/** Settings that the server reports to its clients (GUC_REPORT). */
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
  'session_authorization',
  'standard_conforming_strings',
  'TimeZone',
];
const WATCHED = [...REPORTED, 'statement_timeout'];

/** What a connection is, or what the backend is at the moment. */
class Session {
  role = 'none';
  stale = true; // the backend is not, or no longer, as this connection wants it
  /** @type {Marks | null} */
  marks = null; // of its statements since the last time that they were followed up
  /** @type {[number, number][]} */
  locks = []; // advisory, shared

  /** @param {import('./types.d.ts').Start} start */
  constructor({ pid, user, settings }) {
    this.pid = pid;
    this.user = user;
    /** @type {Settings} */
    this.defaults = new Map(settings.map(([name, value]) => [name.toLowerCase(), value]));
    this.settings = this.defaults;
  }
}

export class Sessions {
  #engine;
  /** @type {Map<number, Session>} */
  #sessions = new Map();
  /** @type {Session | null} */
  #current = null;
  /** What the backend is now. */
  #applied = { settings: /** @type {Settings} */ (new Map()), user: SUPERUSER, role: 'none' };

  /** @param {import('./engine.mjs').Engine} engine */
  constructor(engine) {
    this.#engine = engine;
  }

  /** The connection that the backend is. */
  get current() {
    return this.#current?.pid;
  }

  /** @param {import('./types.d.ts').Start} start */
  open(start) {
    this.#sessions.set(start.pid, new Session(start));
  }

  /** @param {number} pid */
  #find(pid) {
    const session = this.#sessions.get(pid);
    if (!session) throw new Error(`there is no connection ${pid}`);
    return session;
  }

  // -- before a statement

  /**
   * Make the backend be the one of `pid`, whose next statements have these marks. Throws QueryError when a
   * setting from the connection's start is wrong.
   * @param {number} pid
   * @param {Marks | null} marks
   */
  activate(pid, marks) {
    const session = this.#find(pid);
    if (marks) session.marks = { ...session.marks, ...marks };
    if (this.#current !== session || session.stale) this.#apply(session);
    this.#current = session;
  }

  /** @param {Session} session */
  #apply(session) {
    const { settings, user, role } = session;
    const now = this.#applied;
    const removed = [...now.settings.keys()].filter((name) => !settings.has(name));
    const changed = [...settings].filter(([name, value]) => now.settings.get(name) !== value);
    const calls = [
      ...removed.map((name) => `pg_catalog.set_config(${literal(name)}, NULL, false)`),
      ...changed.map(([name, value]) => `pg_catalog.set_config(${literal(name)}, ${literal(value)}, false)`),
    ];
    if (calls.length || now.user !== user || now.role !== role) {
      const sql = [`SET SESSION AUTHORIZATION ${SUPERUSER}`]; // RESET does nothing in a standalone backend
      if (calls.length) sql.push(`SELECT ${calls.join(', ')}`);
      if (user !== SUPERUSER) sql.push(`SET SESSION AUTHORIZATION ${identifier(user)}`);
      if (role !== 'none') sql.push(`SET ROLE ${identifier(role)}`);
      this.#engine.query(sql.join('; '));
      this.#applied = { settings, user, role };
    }
    session.stale = false;
  }

  /**
   * Run a query of the gateway's own as superuser, whoever the current connection is.
   * @param {string} sql
   */
  asSuperuser(sql) {
    if (this.#applied.user !== SUPERUSER || this.#applied.role !== 'none') {
      this.#engine.query(`SET SESSION AUTHORIZATION ${SUPERUSER}`);
      this.#applied = { ...this.#applied, user: SUPERUSER, role: 'none' };
      if (this.#current) this.#current.stale = true;
    }
    return this.#engine.query(sql);
  }

  /**
   * Note a shared advisory lock of the current connection, which ends with it.
   * @param {number} key1
   * @param {number} key2
   */
  locked(key1, key2) {
    this.#current?.locks.push([key1, key2]);
  }

  // -- after a statement

  /**
   * Follow up what the current connection's statements may have changed, as far as the transaction status
   * allows. Returns the values of the watched settings, and whether roles were changed; null where not.
   */
  settle() {
    const session = this.#current;
    const { status, ready } = this.#engine;
    const marks = session?.marks;
    if (!session || !marks || !ready || status === 'E') return { parameters: null, roles: false };
    const watches = marks.settings || marks.local;
    if (status === 'I') {
      session.marks = null;
      if (marks.settings) this.#capture(session);
      if (session.stale) this.#apply(session);
    }
    return { parameters: watches ? this.#show() : null, roles: status === 'I' && !!marks.roles };
  }

  /** SHOW takes no snapshot, so that SET TRANSACTION ISOLATION LEVEL may still follow. */
  #show() {
    const values = this.#engine.query(WATCHED.map((name) => `SHOW ${name}`).join('; '));
    return Object.fromEntries(WATCHED.map((name, at) => [name, values[at][0] ?? '']));
  }

  /**
   * Read back what the session's statements have set.
   * @param {Session} session
   */
  #capture(session) {
    const rows = this.#engine.query(
      `SELECT name, setting FROM pg_catalog.pg_settings
        WHERE source = 'session' AND name NOT LIKE 'transaction\\_%'
       UNION ALL
       SELECT name, pg_catalog.current_setting(name)
         FROM pg_catalog.unnest(ARRAY['session_authorization', 'role']) AS name`,
    );
    /** @type {Settings} */
    const actual = new Map(rows.map(([name, value]) => [name?.toLowerCase() ?? '', value ?? '']));
    // Both read as empty before the first SET in a backend, and after some procedures that commit.
    const user = actual.get('session_authorization') || SUPERUSER;
    const role = actual.get('role') || 'none';
    actual.delete('session_authorization');
    actual.delete('role');
    this.#applied = { settings: actual, user, role };
    // RESET goes back to what the connection was started with, which the backend does not know.
    session.settings = new Map([...session.defaults, ...actual]);
    session.role = role;
    session.stale = session.settings.size !== actual.size || user !== session.user;
  }

  /**
   * The connection is gone: nothing of it stays.
   * @param {number} pid
   */
  close(pid) {
    const session = this.#find(pid);
    if (this.#engine.status !== 'I' || !this.#engine.ready) {
      // After an error in a unit whose Sync has not come, the first is not even looked at.
      this.#engine.exchange(Buffer.concat([query('ROLLBACK'), SYNC, query('ROLLBACK')]));
    }
    const unlocks = session.locks.map(([key1, key2]) => `SELECT pg_advisory_unlock_shared(${key1}, ${key2})`);
    this.asSuperuser([...unlocks, deallocateAll(`${pid}:`)].join('; '));
    this.#sessions.delete(pid);
    if (this.#current === session) this.#current = null;
  }
}
