/** What this browser keeps: pictures in IndexedDB, and notes. */

/**
 * @typedef {object} Picture
 * @property {number} id given by the store; larger is newer
 * @property {Blob} blob the file
 * @property {string} prompt
 * @property {string} seed digits
 * @property {string} size for example 64x64
 * @property {?number} steps null: the model's default
 * @property {string} model
 * @property {number} made milliseconds since 1970
 */

const NAME = "tiue";
const STORE = "pictures";

const notes = {};  // for a browser whose storage is closed to this page

let opened = null;

/** Return a note from "localStorage" or, until the tab is closed, from "sessionStorage"; or null. */
export function readNote(area, key) {
  try {
    return globalThis[area].getItem(key);
  } catch {
    return notes[key] ?? null;
  }
}

/** Keep a note. Without storage, it lasts as long as the page. */
export function writeNote(area, key, text) {
  notes[key] = text;
  try {
    globalThis[area].setItem(key, text);
  } catch {
    return;  // The page goes on without storage.
  }
}

/** Keep a picture. Returns its id. */
export async function keep(picture) {
  return committed((await store("readwrite")).add(picture));
}

/** Forget a picture, or all of them. */
export async function forget(id) {
  const pictures = await store("readwrite");
  await committed(id === undefined ? pictures.clear() : pictures.delete(id));
}

/** Return the number of pictures. */
export async function countKept() {
  return finished((await store("readonly")).count());
}

/** Return pictures that are older than an id, the newest first. */
export async function listKept(most, before = Infinity) {
  const request = (await store("readonly")).openCursor(IDBKeyRange.upperBound(before, true), "prev");
  const found = [];
  return new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor || found.length === most) return resolve(found);
      found.push(cursor.value);
      cursor.continue();
    };
  });
}

async function store(mode) {
  opened ??= open().catch((error) => {
    opened = null;  // The next call tries again.
    throw error;
  });
  const database = await opened;
  return database.transaction(STORE, mode).objectStore(STORE);
}

async function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
  const database = await finished(request);
  database.onclose = () => { opened = null; };  // The browser has deleted its files.
  return database;
}

/** Return a request's result when its transaction has ended well: a storage may be full only then. */
function committed(request) {
  const { transaction } = request;
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error ?? new Error("its storage gave up"));
  });
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
