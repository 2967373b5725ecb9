// Answers for the files of this folder, and for nothing else: from its store where it can, so that the page works without
// a network, and with the headers that a static host leaves out.

importScripts("./files.js"); // sets VERSION and FILES

const SCOPE = new URL("./", self.location.href);
const PREFIX = `gdino ${SCOPE.pathname} `;
const STORE = PREFIX + VERSION;
const KNOWN = new Set(FILES.map((path) => new URL(path, SCOPE).href));
const PAGE = new URL("index.html", SCOPE).href;

// What makes a page cross-origin isolated, which browsers ask for before they share memory between threads.
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};
// Workers that are loaded from a file do not inherit the page's policy. They get everything as messages.
const WORKER_POLICY = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:";

// A later version of this worker waits until no page of the earlier one is open, so a page never gets files of both.
self.addEventListener("activate", (event) => event.waitUntil(activate()));

async function activate() {
  const names = await caches.keys();
  await Promise.all(names.filter((name) => name.startsWith(PREFIX) && name !== STORE).map((name) => caches.delete(name)));
  await self.clients.claim();
}

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  url.search = "";
  url.hash = "";
  const address = url.href === SCOPE.href ? PAGE : url.href;
  const known = event.request.method === "GET" && KNOWN.has(address);
  event.respondWith(known ? answer(address, event) : Response.error());
});

async function answer(address, event) {
  const store = await caches.open(STORE);
  let response = await store.match(address);
  if (response === undefined) {
    // Without the browser's own cache, which may hold files of an earlier export.
    response = await fetch(address, { cache: "no-cache" });
    if (response.ok) event.waitUntil(store.put(address, response.clone()).catch(() => {})); // a full disk only costs the store
  }
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  if (["worker", "sharedworker"].includes(event.request.destination)) headers.set("Content-Security-Policy", WORKER_POLICY);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
