// The PostgreSQL wire protocol, version 3: its messages, and how they are built and read.
// https://www.postgresql.org/docs/17/protocol-message-formats.html

export const PROTOCOL = 3 << 16;
export const SSL_REQUEST = 80877103;
export const GSS_REQUEST = 80877104;
export const CANCEL_REQUEST = 80877102;

/** Types of the messages that clients send. */
export const CLIENT = {
  QUERY: 'Q',
  PARSE: 'P',
  BIND: 'B',
  DESCRIBE: 'D',
  EXECUTE: 'E',
  CLOSE: 'C',
  SYNC: 'S',
  FLUSH: 'H',
  TERMINATE: 'X',
  COPY_DATA: 'd',
  COPY_DONE: 'c',
  COPY_FAIL: 'f',
  PASSWORD: 'p',
};

/** Types of the messages that the server sends, as far as the gateway knows them. */
export const SERVER = {
  AUTHENTICATION: 'R',
  KEY: 'K',
  PARAMETER: 'S',
  READY: 'Z',
  ERROR: 'E',
  DATA_ROW: 'D',
};

/** What a server reports as an error. */
export class PostgresError extends Error {
  /** @param {string} sqlstate @param {string} reason */
  constructor(sqlstate, reason) {
    super(reason);
    this.sqlstate = sqlstate;
  }
}

/** @param {number} number */
export function int32(number) {
  const bytes = Buffer.alloc(4);
  bytes.writeInt32BE(number);
  return bytes;
}

/** Strings as the protocol has them, each with a zero byte at its end. @param {...string} strings */
export const text = (...strings) => Buffer.from(strings.map((string) => `${string}\0`).join(''));

/** One message: type byte, length, body. @type {(type: string, ...body: Buffer[]) => Buffer} */
export function message(type, ...body) {
  const length = body.reduce((sum, part) => sum + part.length, 4);
  return Buffer.concat([Buffer.from(type), int32(length), ...body]);
}

export const SYNC = message(CLIENT.SYNC);
export const TERMINATE = message(CLIENT.TERMINATE);
/** @param {string} sql */
export const query = (sql) => message(CLIENT.QUERY, text(sql));
/** @param {string} reason */
export const copyFail = (reason) => message(CLIENT.COPY_FAIL, text(reason));
/** @type {(step: number, ...data: Buffer[]) => Buffer} */
export const authentication = (step, ...data) => message(SERVER.AUTHENTICATION, int32(step), ...data);
/** @type {(name: string, value: string) => Buffer} */
export const parameterStatus = (name, value) => message(SERVER.PARAMETER, text(name, value));
/** @param {'I' | 'T' | 'E'} status of the transaction: none, open, failed */
export const readyForQuery = (status) => message(SERVER.READY, Buffer.from(status));

/** FATAL comes before the connection's end. @type {(severity: string, sqlstate: string, reason: string) => Buffer} */
export const errorResponse = (severity, sqlstate, reason) =>
  message(SERVER.ERROR, text(`S${severity}`, `V${severity}`, `C${sqlstate}`, `M${reason}`, ''));

/** @param {Buffer} bytes */
export const typeAt = (bytes, at = 0) => String.fromCharCode(bytes[at]);

/** Length of the message at `at`, with its type byte; 0 if its head is not complete. @param {Buffer} bytes */
export const lengthAt = (bytes, at = 0) => (bytes.length - at < 5 ? 0 : 1 + bytes.readInt32BE(at + 1));

/** The messages in `bytes`. @param {Buffer} bytes */
export function* messages(bytes) {
  for (let at = 0; at < bytes.length; at += lengthAt(bytes, at)) yield bytes.subarray(at, at + lengthAt(bytes, at));
}

/** What an ErrorResponse says. @param {Buffer} whole */
export function errorOf(whole) {
  const fields = whole.toString('utf8', 5).split('\0');
  const [sqlstate, reason] = ['C', 'M'].map((letter) => fields.find((field) => field[0] === letter)?.slice(1) ?? '');
  return new PostgresError(sqlstate, reason);
}

/** The columns of a DataRow as strings; null for NULL. @param {Buffer} whole */
export function row(whole) {
  const values = [];
  for (let count = whole.readInt16BE(5), at = 7; count > 0; count--) {
    const length = whole.readInt32BE(at);
    values.push(length < 0 ? null : whole.toString('utf8', at + 4, at + 4 + length));
    at += 4 + Math.max(length, 0);
  }
  return values;
}
