// The service worker. It keeps the files of the page, and adds the headers that shared memory needs, so that any static
// server will do. The package keeps the model itself.
const FILES = ["./"]; // build.mjs puts the page's files here,
const VERSION = "development"; // and a hash of them here.
const OWN = `painter ${self.registration.scope} `; // Pages in other folders of this host have caches of their own.
const CACHE = `${OWN}${VERSION}`;
const ISOLATION = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

const keep = async () => {
  const cache = await caches.open(CACHE);
  await cache.addAll(FILES.map((file) => new Request(file, { cache: "no-cache" })));
};
const dropOlder = async () => {
  const names = (await caches.keys()).filter((name) => name.startsWith(OWN) && name !== CACHE);
  await Promise.all(names.map((name) => caches.delete(name)));
  await clients.claim();
};

self.addEventListener("install", (event) => event.waitUntil(keep().then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(dropOlder()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  const ours = url.origin === location.origin && url.href.startsWith(self.registration.scope);
  const model = url.href.startsWith(`${self.registration.scope}model/`);
  if (request.method === "GET" && ours && !model) event.respondWith(answer(request));
});

/** Answer from the cache, or from the network. What a page needs later, such as ONNX Runtime, is then kept as well. */
async function answer(request) {
  const cache = await caches.open(CACHE);
  let response = await cache.match(request, { ignoreSearch: true });
  if (!response) {
    response = await fetch(request);
    // A full storage keeps nothing more, and the page goes on.
    if (response.ok && !response.redirected) await cache.put(request, response.clone()).catch(console.warn);
  }
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
