// The PostgreSQL wire protocol, version 3: messages and how they are built.
// https://www.postgresql.org/docs/17/protocol-message-formats.html

export const PROTOCOL = 3 << 16;
export const SSL_REQUEST = 80877103;
export const GSS_REQUEST = 80877104;
export const CANCEL_REQUEST = 80877102;

/** @param {string} letter */
const code = (letter) => letter.charCodeAt(0);

/** Types of messages that clients send. */
export const CLIENT = {
  QUERY: code('Q'),
  PARSE: code('P'),
  BIND: code('B'),
  DESCRIBE: code('D'),
  EXECUTE: code('E'),
  CLOSE: code('C'),
  SYNC: code('S'),
  FLUSH: code('H'),
  TERMINATE: code('X'),
  COPY_DATA: code('d'),
  COPY_DONE: code('c'),
  COPY_FAIL: code('f'),
  PASSWORD: code('p'),
};

/** Types of messages that the server sends, as far as the gateway looks at them. */
export const SERVER = {
  READY: code('Z'),
  ERROR: code('E'),
  NOTICE: code('N'),
  COPY_IN: code('G'),
  DATA_ROW: code('D'),
};

/** @param {number} number */
export function int32(number) {
  const bytes = Buffer.alloc(4);
  bytes.writeInt32BE(number);
  return bytes;
}

/**
 * One message: type byte, length, body.
 * @param {string} type
 * @param {...Buffer} body
 */
export function message(type, ...body) {
  const length = body.reduce((sum, part) => sum + part.length, 4);
  return Buffer.concat([Buffer.from(type, 'latin1'), int32(length), ...body]);
}

/** @param {...string} strings */
export const text = (...strings) => Buffer.from(strings.map((string) => `${string}\0`).join(''));

/** @param {string} sql */
export const query = (sql) => message('Q', text(sql));
export const SYNC = message('S');
export const TERMINATE = message('X');
/** @param {string} reason */
export const copyFail = (reason) => message('f', text(reason));

/** @type {(step: number, ...data: Buffer[]) => Buffer} */
export const authentication = (step, ...data) => message('R', int32(step), ...data);
/** @type {(name: string, value: string) => Buffer} */
export const parameterStatus = (name, value) => message('S', text(name, value));
/** @param {string} status */
export const readyForQuery = (status) => message('Z', Buffer.from(status));

/**
 * ErrorResponse; severity FATAL means that the connection is closed after it.
 * @param {'ERROR' | 'FATAL'} severity
 * @param {string} state SQLSTATE
 * @param {string} reason
 */
export function errorResponse(severity, state, reason) {
  return message('E', text(`S${severity}`, `V${severity}`, `C${state}`, `M${reason}`, ''));
}

/**
 * The length of the message that begins at `at`, type byte included; 0 if that much of it is not there yet.
 * @param {Buffer} bytes
 * @param {number} at
 */
export const lengthAt = (bytes, at) => (bytes.length - at < 5 ? 0 : 1 + bytes.readInt32BE(at + 1));

/**
 * The fields of an ErrorResponse or NoticeResponse by their one-letter name.
 * @param {Buffer} whole
 * @returns {Record<string, string>}
 */
export function fields(whole) {
  const parts = whole.toString('utf8', 5).split('\0').filter(Boolean);
  return Object.fromEntries(parts.map((part) => [part[0], part.slice(1)]));
}

/**
 * Every complete message in `bytes`.
 * @param {Buffer} bytes
 */
export function* messages(bytes) {
  for (let at = 0, length = lengthAt(bytes, at); length; length = lengthAt(bytes, at)) {
    yield bytes.subarray(at, at + length);
    at += length;
  }
}

/**
 * The columns of a DataRow as strings (null for NULL).
 * @param {Buffer} whole
 */
export function row(whole) {
  const values = [];
  for (let count = whole.readInt16BE(5), at = 7; count > 0; count--) {
    const length = whole.readInt32BE(at);
    values.push(length < 0 ? null : whole.toString('utf8', at + 4, at + 4 + length));
    at += 4 + Math.max(length, 0);
  }
  return values;
}
