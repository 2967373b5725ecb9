// What the page needs of the place it lies at: a service worker for threads and for work without a network.

const RELOADED = "gdino-reloaded";
const PATIENCE = 5_000; // milliseconds that a service worker has for its start

/**
 * Register the service worker, which keeps the files for offline use and adds the headers that threads need.
 *
 * A static host rarely sends those headers, so a page that came without them loads once more, through the worker.
 *
 * @returns {Promise<string>} Why there is no service worker, in a sentence; empty if there is one.
 */
export async function prepareHost() {
  if (!navigator.serviceWorker) {
    return "Without https the browser allows neither threads nor offline use, so this is slower.";
  }
  try {
    await navigator.serviceWorker.register("./service-worker.js");
    await Promise.race([navigator.serviceWorker.ready, new Promise((_, fail) => setTimeout(fail, PATIENCE))]);
  } catch {
    return "The service worker did not start, so there are no threads and no offline use.";
  }
  if (!self.crossOriginIsolated && sessionStorage.getItem(RELOADED) === null) {
    sessionStorage.setItem(RELOADED, "once");
    location.reload();
    await new Promise(() => {}); // the page ends here
  }
  sessionStorage.removeItem(RELOADED);
  return self.crossOriginIsolated ? "" : "The host's headers forbid threads, so this is slower.";
}

/**
 * Forbid this page and every worker that it starts from now on all connections, until the page is loaded again.
 *
 * Policies only add up: nothing that runs in the page can take this one back.
 */
export function closeConnections() {
  const policy = document.createElement("meta");
  policy.httpEquiv = "Content-Security-Policy";
  policy.content = "connect-src 'none'";
  document.head.append(policy);
}
