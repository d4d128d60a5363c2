// What the two threads tell each other, and what is known of roles and connections. Types only: nothing runs.

/** What a statement may have changed. */
export interface Marks {
  /** settings of the session, role included */
  settings?: boolean;
  /** settings, until the transaction ends */
  local?: boolean;
  /** roles of the cluster */
  roles?: boolean;
}

export interface Role {
  secret: string | null;
  login: boolean;
  superuser: boolean;
  settings: string[] | null;
}
export type Roles = Record<string, Role>;

/** A connection, as it begins. */
export interface Start {
  pid: number;
  user: string;
  settings: [string, string][];
}

/** Messages that the backend runs before any other connection gets a turn. */
export interface Unit {
  type: 'unit';
  pid: number;
  bytes: Uint8Array<ArrayBuffer>;
  marks: Marks | null;
}

/** COPY data for the running unit. */
export interface CopyData {
  type: 'more';
  pid: number;
  bytes: Uint8Array<ArrayBuffer>;
}

/** From the network thread. */
export type Request =
  | { type: 'open'; start: Start }
  | Unit
  | CopyData
  | { type: 'close'; pid: number }
  | { type: 'stop' };

/** To the network thread. `taken` counts what has been received of units and COPY data since the start. */
export type Reply =
  | Answer
  | { type: 'taken'; pid: number; length: number }
  | Done
  | { type: 'refused'; pid: number; taken: number; state: string; reason: string }
  | { type: 'closed'; pid: number };

/** A part of an answer; more follows. */
export interface Answer {
  type: 'answer';
  pid: number;
  bytes: Uint8Array<ArrayBuffer>;
}

/** The rest of an answer. */
export interface Done {
  type: 'done';
  pid: number;
  taken: number;
  bytes: Uint8Array<ArrayBuffer>;
  parameters?: Record<string, string> | null;
  roles?: Roles | null;
}

export interface Tls {
  cert: Uint8Array;
  key: Uint8Array;
  ca: Uint8Array;
}

/** What the network thread starts with. */
export interface FrontendData {
  port: number;
  database: string;
  backend: import('node:worker_threads').MessagePort;
  shared: Int32Array;
  parameters: Record<string, string>;
  roles: Roles;
  tls: Tls | null;
}

declare global {
  /** The network thread calls it through the inspector, in the middle of a statement. */
  var gatewayInterrupt: (pid: number) => void;
}
