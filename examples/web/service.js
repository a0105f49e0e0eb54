// Installs the service worker, which keeps the page for use without a network and isolates it, for threads.
const TRIED = "reloaded for the service worker";

/** Return whether the page may go on. Otherwise it reloads, once, before anything large is fetched. */
export async function underServiceWorker() {
  if (!("serviceWorker" in navigator)) return true;
  try {
    await navigator.serviceWorker.register("offline.js");
    await navigator.serviceWorker.ready;
  } catch (error) {
    console.warn(`The page will need the network: ${error.message}`);
    return true;
  }
  if (navigator.serviceWorker.controller && crossOriginIsolated) return true;
  if (sessionStorage.getItem(TRIED)) return true; // This browser does not isolate pages: it draws with one thread.
  sessionStorage.setItem(TRIED, "yes");
  location.reload();
  return false;
}
