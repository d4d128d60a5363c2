// The PostgreSQL wire protocol, version 3: messages and how they are built.
// https://www.postgresql.org/docs/17/protocol-message-formats.html

export const SSL_REQUEST = 80877103;
export const GSS_REQUEST = 80877104;
export const CANCEL_REQUEST = 80877102;

/** One message: type byte, length, body. */
export function message(type, body = Buffer.alloc(0)) {
  const bytes = Buffer.allocUnsafeSlow(5 + body.length);
  bytes.write(type, 0, 'latin1');
  bytes.writeInt32BE(body.length + 4, 1);
  body.copy(bytes, 5);
  return bytes;
}

export const text = (...strings) => Buffer.from(strings.map((string) => `${string}\0`).join(''), 'utf8');
export const query = (sql) => message('Q', text(sql));
export const SYNC = message('S');
export const copyFail = (reason) => message('f', text(reason));
export const parameterStatus = (name, value) => message('S', text(name, value));
export const readyForQuery = (status) => message('Z', Buffer.from(status));
export const int32 = (number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeInt32BE(number);
  return bytes;
};

/** ErrorResponse; severity FATAL means that the connection is closed after it. */
export function errorResponse(severity, code, reason) {
  return message('E', text(`S${severity}`, `V${severity}`, `C${code}`, `M${reason}`, ''));
}

/** The fields of an ErrorResponse or NoticeResponse by their one-letter name. */
export function fields(whole) {
  const parts = whole.toString('utf8', 5).split('\0').filter(Boolean);
  return Object.fromEntries(parts.map((part) => [part[0], part.slice(1)]));
}

/** Every complete message in `bytes`. */
export function* messages(bytes) {
  for (let at = 0; at + 5 <= bytes.length; ) {
    const end = at + 1 + bytes.readInt32BE(at + 1);
    yield bytes.subarray(at, end);
    at = end;
  }
}

/** The columns of a DataRow as strings (null for NULL). */
export function row(whole) {
  const values = [];
  for (let count = whole.readInt16BE(5), at = 7; count > 0; count--) {
    const length = whole.readInt32BE(at);
    values.push(length < 0 ? null : whole.toString('utf8', at + 4, at + 4 + length));
    at += 4 + Math.max(length, 0);
  }
  return values;
}
