// One backend, many connections: what belongs to a connection is put back before its statement runs.
//
// Settings, role, temporary tables, the unnamed prepared statement and advisory locks are kept here for each
// connection and exchanged when another one gets the backend. Nothing is exchanged inside a transaction: it
// holds the backend until it ends.

import { SYNC, message, query, text } from './wire.mjs';
import { SUPERUSER } from './engine.mjs';
import { merge } from './statements.mjs';

const literal = (string) => `'${string.replaceAll("'", "''")}'`;
const identifier = (string) => `"${string.replaceAll('"', '""')}"`;
const strings = (list) => `ARRAY[${list.map(literal).join(', ')}]::text[]`;

/** Settings that the server tells its clients (GUC_REPORT), and the one that the gateway acts upon. */
export const REPORTED = [
  'application_name', 'client_encoding', 'DateStyle', 'default_transaction_read_only', 'in_hot_standby',
  'integer_datetimes', 'IntervalStyle', 'is_superuser', 'scram_iterations', 'server_encoding',
  'server_version', 'session_authorization', 'standard_conforming_strings', 'TimeZone',
];
const WATCHED = [...REPORTED, 'statement_timeout'];

export class Sessions {
  #engine;
  #sessions = new Map();
  #advisory = new Map();
  #current = null;
  #applied = { settings: new Map(), authorization: SUPERUSER, role: 'none' };
  #unnamedOwner = null;

  constructor(engine) {
    this.#engine = engine;
  }

  get current() {
    return this.#current;
  }

  has(pid) {
    return this.#sessions.has(pid);
  }

  open({ pid, user, superuser, settings: given }) {
    const settings = given.map(([name, value]) => [name.toLowerCase(), value]);
    this.#sessions.set(pid, {
      pid, user, superuser,
      authorization: user, role: 'none',
      settings: new Map(settings), defaults: new Map(settings),
      unnamed: null, temporary: false, parked: [], custom: new Set(), marks: null, stale: true,
    });
  }

  // -- before a statement

  /** Make the backend be the one of `pid`. Throws QueryError when a setting from its start is wrong. */
  activate(pid) {
    const next = this.#sessions.get(pid);
    if (this.#current === pid && !next.stale) return;
    const previous = this.#sessions.get(this.#current);
    if (previous && previous !== next && previous.temporary) this.#park(previous);
    if (next.parked.length) this.#unpark(next);
    this.#apply(next);
    this.#current = pid;
    next.stale = false;
  }

  #apply({ settings, authorization, role }) {
    const applied = this.#applied;
    const calls = [];
    for (const name of applied.settings.keys()) {
      if (!settings.has(name)) calls.push(`pg_catalog.set_config(${literal(name)}, NULL, false)`);
    }
    for (const [name, value] of settings) {
      if (applied.settings.get(name) === value) continue;
      calls.push(`pg_catalog.set_config(${literal(name)}, ${literal(value)}, false)`);
    }
    const same = applied.authorization === authorization && applied.role === role;
    if (same && !calls.length) return;
    const sql = [`SET SESSION AUTHORIZATION ${identifier(SUPERUSER)}`]; // RESET does nothing in a standalone backend
    if (calls.length) sql.push(`SELECT ${calls.join(', ')}`);
    if (authorization !== SUPERUSER) sql.push(`SET SESSION AUTHORIZATION ${identifier(authorization)}`);
    if (role !== 'none') sql.push(`SET ROLE ${identifier(role)}`);
    this.#query(sql.join('; '));
    this.#applied = { settings: new Map(settings), authorization, role };
  }

  /** Statements and bytes that have to come before a unit which uses an unnamed statement of an earlier one. */
  restoreUnnamed(pid) {
    const session = this.#sessions.get(pid);
    if (this.#unnamedOwner === pid || !session.unnamed) return;
    this.#engine.exchange(Buffer.concat([session.unnamed, SYNC]));
    this.#unnamedOwner = pid;
  }

  parsedUnnamed(pid, parse) {
    this.#sessions.get(pid).unnamed = parse;
    this.#unnamedOwner = pid;
  }

  /** A query of the gateway's own; like any simple query it ends the unnamed prepared statement. */
  #query(sql) {
    this.#unnamedOwner = null;
    return this.#engine.query(sql);
  }

  /** Run a query of the gateway's own as superuser, whoever the current connection is. */
  asSuperuser(sql) {
    if (this.#applied.authorization !== SUPERUSER || this.#applied.role !== 'none') {
      this.#query(`SET SESSION AUTHORIZATION ${identifier(SUPERUSER)}`);
      this.#applied = { ...this.#applied, authorization: SUPERUSER, role: 'none' };
      const session = this.#sessions.get(this.#current);
      if (session) session.stale = true;
    }
    return this.#query(sql);
  }

  // -- after a statement

  /**
   * Do what the marks of `pid`'s statements ask for, as far as the transaction status allows.
   * Returns the values of the watched settings when they may have changed, else null.
   */
  settle(pid) {
    const session = this.#sessions.get(pid);
    const { marks } = session;
    const { status } = this.#engine;
    if (!marks || status === 'E' || !this.#engine.ready) return null;
    if (marks.temporary) session.temporary = true;
    const watches = marks.settings || marks.local || marks.discard;
    if (status === 'T') return watches ? this.#show() : null;
    session.marks = null;
    if (marks.discard === 'all') this.#reset(session);
    else if (marks.discard === 'temp') this.#dropTemporary(session);
    if (marks.keep !== undefined) this.#deallocate(`${pid}.`, marks.keep);
    if (!watches) return null;
    for (const name of marks.custom ?? []) session.custom.add(name.toLowerCase());
    if (marks.settings) this.#capture(session);
    if (session.stale) this.activate(pid);
    return this.#show();
  }

  mark(pid, marks) {
    const session = this.#sessions.get(pid);
    session.marks = merge(session.marks, marks);
  }

  marks(pid) {
    return this.#sessions.get(pid).marks;
  }

  /** SHOW takes no snapshot, so that SET TRANSACTION ISOLATION LEVEL may still follow. */
  #show() {
    const values = this.#query(WATCHED.map((name) => `SHOW ${name}`).join('; '));
    return Object.fromEntries(WATCHED.map((name, at) => [name, values[at][0]]));
  }

  /** Read back what the session's statements have set. */
  #capture(session) {
    const rows = this.#query(
      `SELECT name, setting FROM pg_catalog.pg_settings
        WHERE source = 'session' AND name NOT LIKE 'transaction\\_%'
       UNION ALL
       SELECT name, pg_catalog.current_setting(name, true)
         FROM pg_catalog.unnest(${strings([...session.custom])}) AS name
        WHERE name NOT IN (SELECT name FROM pg_catalog.pg_settings)
       UNION ALL
       SELECT name, pg_catalog.current_setting(name)
         FROM pg_catalog.unnest(ARRAY['session_authorization', 'role']) AS name`,
    );
    const set = rows.filter(([, value]) => value !== null);
    const actual = new Map(set.map(([name, value]) => [name.toLowerCase(), value]));
    // Both read as empty before the first SET in a backend, and after some procedures that commit.
    const authorization = actual.get('session_authorization') || SUPERUSER;
    const role = actual.get('role') || 'none';
    actual.delete('session_authorization');
    actual.delete('role');
    this.#applied = { settings: actual, authorization, role };
    // RESET goes back to what the connection was started with, which the backend does not know.
    session.settings = new Map([...session.defaults, ...actual]);
    const reset = authorization === SUPERUSER || !session.superuser;
    session.authorization = reset ? session.user : authorization;
    session.role = role;
    session.stale = session.settings.size !== actual.size || session.authorization !== authorization;
  }

  /** DISCARD ALL, for one connection only. */
  #reset(session) {
    this.unlockAll(session.pid);
    this.#dropTemporary(session);
    session.settings = new Map(session.defaults);
    session.authorization = session.user;
    session.role = 'none';
    session.stale = true;
    this.activate(session.pid);
  }

  #deallocate(prefix, keep) {
    const names = this.#query('SELECT name FROM pg_catalog.pg_prepared_statements')
      .map(([name]) => name)
      .filter((name) => name.startsWith(prefix) && !(keep && name.startsWith(keep)));
    if (!names.length) return;
    this.#engine.exchange(Buffer.concat([...names.map((name) => message('C', text(`S${name}`))), SYNC]));
  }

  /** The connection is gone: nothing of it stays. */
  close(pid) {
    const session = this.#sessions.get(pid);
    if (!session) return;
    if (this.#engine.status !== 'I' || !this.#engine.ready) {
      // After an error in a unit whose Sync has not come, the first is not even looked at.
      this.#engine.exchange(Buffer.concat([query('ROLLBACK'), SYNC, query('ROLLBACK')]));
      this.#unnamedOwner = null;
    }
    this.unlockAll(pid);
    this.#dropTemporary(session);
    this.#deallocate(`${pid}.`);
    this.#sessions.delete(pid);
    if (this.#current === pid) this.#current = null;
  }

  // -- temporary tables: one schema for all, so those of the others are renamed

  #temporaries() {
    return this.asSuperuser(
      `SELECT oid, relname, relkind FROM pg_catalog.pg_class
        WHERE relnamespace = pg_catalog.pg_my_temp_schema() AND relkind IN ('r', 'p', 'v', 'S', 'i', 'I', 'f')`,
    ).filter(([, name]) => !name.startsWith('parked '));
  }

  #park(session) {
    session.parked = this.#temporaries();
    this.#rename(session.parked.map(([oid, name]) => [name, `parked ${oid}`]));
  }

  #unpark(session) {
    const { parked } = session;
    session.parked = [];
    this.#rename(parked.map(([oid, name]) => [`parked ${oid}`, name]));
  }

  #rename(pairs) {
    const rename = ([from, to]) => `ALTER TABLE pg_temp.${identifier(from)} RENAME TO ${identifier(to)}`;
    if (pairs.length) this.asSuperuser(pairs.map(rename).join('; '));
  }

  #dropTemporary(session) {
    if (!session.temporary) return;
    const parked = session.parked.map(([oid, , kind]) => [oid, `parked ${oid}`, kind]);
    session.parked = [];
    const kinds = { r: 'TABLE', p: 'TABLE', f: 'FOREIGN TABLE', v: 'VIEW', S: 'SEQUENCE' };
    const drops = [...parked, ...(this.#current === session.pid ? this.#temporaries() : [])]
      .filter(([, , kind]) => kind in kinds)
      .map(([, name, kind]) => `DROP ${kinds[kind]} IF EXISTS pg_temp.${identifier(name)} CASCADE`);
    if (drops.length) this.asSuperuser(`SET LOCAL client_min_messages TO error; ${drops.join('; ')}`);
  }

  // -- advisory locks: one backend would grant the same lock to every connection

  /** Replacements for the builtins; `pid` of the caller is the current connection. */
  advisoryLocks() {
    const replacements = {};
    for (const [suffix, keyOf] of [
      ['int8', (call) => `1:${call.int64(0)}`],
      ['int4', (call) => `2:${call.int32(0)}:${call.int32(1)}`],
    ]) {
      for (const shared of [false, true]) {
        const mode = shared ? '_shared' : '';
        for (const [verb, wait, keep] of [
          ['lock', true, true], ['xact_lock', true, false],
          ['try_lock', false, true], ['try_xact_lock', false, false],
        ]) {
          const name = verb.startsWith('try_')
            ? `pg_try_advisory_${verb.slice(4)}${mode}_${suffix}`
            : `pg_advisory_${verb}${mode}_${suffix}`;
          replacements[name] = (call, original) => this.#lock(keyOf(call), shared, wait, keep, call, original);
        }
        replacements[`pg_advisory_unlock${mode}_${suffix}`] = (call, original) =>
          this.#unlock(keyOf(call), shared, call, original);
      }
    }
    replacements.pg_advisory_unlock_all = (call) => {
      for (const { name, numbers } of this.#forget(this.#current)) {
        this.#engine.invoke(`pg_advisory_unlock${name}`, call, numbers);
      }
      return 0;
    };
    return replacements;
  }

  /** Strike out a connection's locks; yields the unlock function and key of each, as often as it was taken. */
  *#forget(pid) {
    for (const [key, holders] of this.#advisory) {
      const held = holders.get(pid);
      holders.delete(pid);
      if (!holders.size) this.#advisory.delete(key);
      const [kind, ...numbers] = key.split(':');
      const suffix = kind === '1' ? '_int8' : '_int4';
      for (let n = held?.exclusive ?? 0; n > 0; n--) yield { name: suffix, numbers };
      for (let n = held?.shared ?? 0; n > 0; n--) yield { name: `_shared${suffix}`, numbers };
    }
  }

  #lock(key, shared, wait, keep, call, original) {
    const holders = this.#advisory.get(key) ?? new Map();
    for (const [pid, held] of holders) {
      if (pid === this.#current || (shared && !held.exclusive)) continue;
      if (!wait) return 0;
      this.#engine.raise('55P03', 'could not obtain the advisory lock: another connection holds it');
    }
    const granted = original(call.address);
    if (keep) {
      const held = holders.get(this.#current) ?? { exclusive: 0, shared: 0 };
      held[shared ? 'shared' : 'exclusive'] += 1;
      this.#advisory.set(key, holders.set(this.#current, held));
    }
    return granted;
  }

  #unlock(key, shared, call, original) {
    const held = this.#advisory.get(key)?.get(this.#current);
    const mode = shared ? 'shared' : 'exclusive';
    if (!held?.[mode]) {
      this.#engine.warn('01000', `you don't own a lock of type ${shared ? 'Share' : 'Exclusive'}Lock`);
      return 0;
    }
    held[mode] -= 1;
    if (!held.exclusive && !held.shared) this.#advisory.get(key).delete(this.#current);
    return original(call.address);
  }

  /** Release every advisory lock of a connection, in the backend's own table too. */
  unlockAll(pid) {
    if (![...this.#advisory.values()].some((holders) => holders.has(pid))) return;
    const before = this.#current;
    this.#current = pid; // the replaced functions look at it
    this.#query('SELECT pg_catalog.pg_advisory_unlock_all()');
    this.#current = before;
  }
}
