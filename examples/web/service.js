// Installs the service worker, which keeps the page for use without a network and isolates it, for threads.
const TRIED = "reloaded for the service worker";

/** Wait until a service worker is there. Throws if it cannot keep its files, for example in a full storage. */
function installed(worker) {
  return new Promise((resolve, reject) => {
    const look = () => {
      if (worker.state === "activated") resolve();
      if (worker.state === "redundant") reject(new Error("its files cannot be kept"));
    };
    worker.addEventListener("statechange", look);
    look();
  });
}

/** Return whether the page may go on. Otherwise it reloads, once, before anything large is fetched. */
export async function underServiceWorker() {
  if (!("serviceWorker" in navigator)) return true;
  try {
    const { installing, active } = await navigator.serviceWorker.register("offline.js");
    if (installing && !active) await installed(installing);
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
