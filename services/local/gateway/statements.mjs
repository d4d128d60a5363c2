// What the gateway must know about a statement before one backend, shared by all connections, runs it.
//
// Text is looked at, not parsed, and its bytes are left alone (latin1), whatever the client's encoding. A mark
// set too often costs a query at the end of the statement, and the few statements that reach across
// connections (DEALLOCATE, DISCARD, UNLISTEN) are rewritten only in the plain form that clients send.

const LEAD = String.raw`(?:\s|--[^\n]*\n|/\*[\s\S]*?\*/)*`;
const NAME = String.raw`"(?:[^"]|"")+"|[A-Za-z_\x80-\xff][\w$\x80-\xff]*`;
const BEGINS = String.raw`(?:^|;|\*/|\n)\s*`;

const SETTINGS = new RegExp(
  `${BEGINS}(?:set(?!\\s+(?:transaction|constraints)\\b)|reset|discard)\\b|\\bset_config\\b`,
  'i',
);
const LOCAL = new RegExp(`^${LEAD}set\\s+local\\b[^;]*;?\\s*$`, 'i');
const CUSTOM = /\b[a-z_][\w$]*\.[a-z_][\w$]*\b/gi;
const TEMPORARY =
  /\b(?:create|into)\s+(?:or\s+replace\s+)?(?:local\s+|global\s+)?temp(?:orary)?\b|\bpg_temp\./i;
const ROLES = /\b(?:create|alter|drop)\s+(?:role|user|group)\b/i;
const LISTEN = new RegExp(`^${LEAD}(un)?listen\\s+(\\*|${NAME})\\s*;?\\s*$`, 'i');
const PREPARED = new RegExp(
  `^(${LEAD}(?:explain\\b[^;]*?\\s)?)(prepare|execute|deallocate(?:\\s+prepare)?)\\s+(${NAME})`,
  'i',
);
const DISCARD = new RegExp(`^${LEAD}discard\\s+(all|temp(?:orary)?)\\s*;?\\s*$`, 'i');

const lower = (name) => name.replace(/[A-Z]/g, (letter) => letter.toLowerCase());
const folded = (name) => (name[0] === '"' ? name.slice(1, -1).replaceAll('""', '"') : lower(name));
const quoted = (name) => `"${name.replaceAll('"', '""')}"`;

/**
 * The statement as it is sent to the backend, and its marks (null when there are none):
 * settings (session settings may change), local (only until the transaction ends), custom (names with a dot
 * that may be settings), temporary, roles, discard ('all' or 'temp'), deallocateAll, listen, unlisten.
 */
export function inspect(sql, prefix) {
  const marks = {};
  if (SETTINGS.test(sql)) {
    marks[LOCAL.test(sql) ? 'local' : 'settings'] = true;
    marks.custom = sql.match(CUSTOM) ?? [];
  }
  if (TEMPORARY.test(sql)) marks.temporary = true;
  if (ROLES.test(sql)) marks.roles = true;
  const rewritten = rewrite(sql, prefix, marks);
  return { sql: rewritten, marks: Object.keys(marks).length ? marks : null };
}

function rewrite(sql, prefix, marks) {
  const discard = DISCARD.exec(sql);
  if (discard) {
    marks.discard = discard[1].toLowerCase() === 'all' ? 'all' : 'temp';
    marks.deallocateAll = marks.discard === 'all';
    return 'DISCARD PLANS'; // harmless, and an error in a failed transaction as it should be
  }
  const listen = LISTEN.exec(sql);
  if (listen) {
    if (!listen[1]) marks.listen = folded(listen[2]);
    else marks.unlisten = listen[2] === '*' ? '*' : folded(listen[2]);
    return listen[1] ? 'UNLISTEN gateway_nobody' : sql; // others may be listening to the same channel
  }
  const prepared = PREPARED.exec(sql);
  if (!prepared) return sql;
  const [head, before, verb, name] = prepared;
  if (/^prepare$/i.test(verb) && /^transaction$/i.test(name)) return sql;
  if (/^deallocate/i.test(verb) && /^all$/i.test(name)) {
    marks.deallocateAll = true;
    return 'DISCARD SEQUENCES';
  }
  return `${before}${verb} ${quoted(prefix + folded(name))}${sql.slice(head.length)}`;
}

/** Both statements' marks in one. */
export function merge(one, other) {
  if (!one || !other) return one ?? other;
  return { ...one, ...other, custom: [...(one.custom ?? []), ...(other.custom ?? [])] };
}
