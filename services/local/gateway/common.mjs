// What both threads share.

import fs from 'node:fs';

/** Numbers in the memory that both threads see, by their place in an Int32Array. */
export const SHARED = {
  REQUESTS: 0, // sent to the backend's thread, counted
  UNSENT_BYTES: 1, // of answers, not yet sent to clients
  INTERRUPTED: 2, // pid of the connection whose statement is to end
};

/** At once, whatever the threads do. @param {string} line */
export const log = (line) => fs.writeSync(2, `${new Date().toISOString()} ${line}\n`);
