// Types that all files know: what the two threads tell each other.

interface Role {
  secret: string | null; // the password's verifier
  login: boolean;
  superuser: boolean;
  settings: string[] | null;
}
type Roles = Record<string, Role>;

/** A connection, as it begins. */
interface Start {
  pid: number;
  user: string;
  settings: [string, string][];
  reported: Record<string, string>; // settings, as they were reported to the client
}

type Bytes = Uint8Array<ArrayBuffer>;

/** From the network thread. */
type BackendRequest =
  | { type: 'open'; start: Start }
  | { type: 'unit'; pid: number; bytes: Bytes; marks: string[] } // to run before others get a turn
  | { type: 'copy'; pid: number; bytes: Bytes } // COPY data for the running unit
  | { type: 'close'; pid: number }
  | { type: 'stop' };

/** To the network thread. */
type BackendReply =
  | { type: 'limited'; pid: number; ms: number } // the unit has begun, with a statement_timeout
  | { type: 'answer'; pid: number; bytes: Bytes } // a part; more follows
  | { type: 'done'; pid: number; bytes: Bytes; free: boolean; roles?: Roles } // the rest; free: others may have a turn
  | { type: 'refused'; pid: number; sqlstate: string; reason: string }
  | { type: 'copied'; pid: number; length: number } // so much COPY data has been taken
  | { type: 'closed'; pid: number };

/** What the network thread starts with. */
interface FrontendData {
  port: number;
  database: string;
  backend: import('node:worker_threads').MessagePort;
  shared: Int32Array;
  reported: Record<string, string>;
  roles: Roles;
  tls: { cert: Uint8Array; key: Uint8Array; ca: Uint8Array } | null;
}

/** The network thread calls it through the inspector, in the middle of a statement. */
declare var gatewayInterrupt: (pid: number) => void;

type Socket = import('node:net').Socket | import('node:tls').TLSSocket;
type Hub = import('./frontend.mjs').Hub;
type Engine = import('./engine.mjs').Engine;
type Sessions = import('./sessions.mjs').Sessions;
