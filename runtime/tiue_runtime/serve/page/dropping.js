/** Files that are dragged over the page. */

/**
 * Show an overlay while a file is dragged, and pass on what is dropped.
 *
 * @param {HTMLElement} overlay
 * @param {(file: File) => void} use
 */
export function onDrop(overlay, use) {
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    overlay.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) overlay.hidden = true;
  });
  addEventListener("drop", (event) => {
    overlay.hidden = true;
    if (!hasFile(event)) return;
    event.preventDefault();
    use(event.dataTransfer.files[0]);
  });
}
