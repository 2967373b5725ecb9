// Boxes over the picture, the table of labels, and the files to save.

/**
 * Show boxes as elements in per cent of the picture, so that they fit at any width.
 *
 * Large boxes come first, so that the pointer reaches a small one inside them.
 *
 * @param {HTMLElement} place
 * @param {{label: number, score: number, box: number[]}[]} found
 * @param {{labels: string[], colors: Object[], width: number, height: number}} result
 */
export function showBoxes(place, found, { labels, colors, width, height }) {
  const size = ({ box: [left, top, right, bottom] }) => (right - left) * (bottom - top);
  const elements = [...found].sort((a, b) => size(b) - size(a)).map(({ label, score, box }) => {
    const [left, top, right, bottom] = inside(box, width, height);
    const name = `${labels[label]} ${score.toFixed(2)}`;
    const element = document.createElement("div");
    element.className = "gd-box";
    element.classList.toggle("gd-inside", top / height < 0.06); // there is no room above it
    element.classList.toggle("gd-right", left / width > 0.7);
    element.tabIndex = 0;
    element.role = "img";
    element.ariaLabel = name;
    element.title = name;
    element.dataset.box = JSON.stringify(box);
    element.dataset.score = score;
    element.dataset.label = labels[label];
    const share = (value, whole) => `${(100 * value) / whole}%`;
    element.style.left = share(left, width);
    element.style.top = share(top, height);
    element.style.width = share(right - left, width);
    element.style.height = share(bottom - top, height);
    paint(element, colors[label]);
    const text = document.createElement("span");
    text.textContent = name;
    element.append(text);
    return element;
  });
  place.replaceChildren(...elements);
}

function paint(element, color) {
  element.style.setProperty("--box", color.box);
  element.style.setProperty("--on-box", color.ink);
}

function inside([left, top, right, bottom], width, height) {
  const within = (value, most) => Math.min(Math.max(value, 0), most);
  return [within(left, width), within(top, height), within(right, width), within(bottom, height)];
}

/**
 * Show the highest score of every label that was asked for, found or not.
 *
 * @param {HTMLTableElement} table
 * @param {{label: number}[]} found
 * @param {Float32Array} best Highest score of each label.
 * @param {number} threshold
 * @param {{labels: string[], colors: Object[]}} result
 */
export function showPresence(table, found, best, threshold, { labels, colors }) {
  const rows = labels.map((label, index) => {
    const count = found.filter((each) => each.label === index).length;
    const missing = best[index] > threshold ? "another label fits better" : "not found";
    const row = document.createElement("tr");
    row.className = count ? "" : "gd-missing";
    const cells = [label, best[index].toFixed(2), count ? `${count} ${count === 1 ? "box" : "boxes"}` : missing];
    for (const text of cells) row.insertCell().textContent = text;
    const dot = document.createElement("span");
    dot.className = "gd-dot";
    paint(dot, colors[index]);
    row.cells[0].prepend(dot);
    return row;
  });
  table.tBodies[0].replaceChildren(...rows);
  table.hidden = false;
}

/**
 * Draw boxes into a picture of its full size.
 *
 * @param {Blob} file
 * @param {{label: number, score: number, box: number[]}[]} found Best first.
 * @param {{labels: string[], colors: Object[], width: number, height: number}} result
 * @returns {Promise<OffscreenCanvas>}
 */
export async function drawBoxes(file, found, { labels, colors, width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(await createImageBitmap(file), 0, 0);
  const line = Math.max(2, Math.round(Math.max(width, height) / 400));
  const size = line * 6;
  context.lineWidth = line;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  // The best box is drawn last, on top.
  for (const { label, score, box } of [...found].reverse()) {
    const [left, top, right, bottom] = inside(box, width, height);
    context.strokeStyle = colors[label].box;
    context.strokeRect(left, top, right - left, bottom - top);
    const text = `${labels[label]} ${score.toFixed(2)}`;
    const across = context.measureText(text).width + size;
    const at = Math.max(0, Math.min(left, width - across));
    const above = Math.max(0, top - size * 1.5);
    context.fillStyle = colors[label].box;
    context.fillRect(at, above, across, size * 1.5);
    context.fillStyle = colors[label].ink;
    context.fillText(text, at + size / 2, above + size * 0.75);
  }
  return canvas;
}

/** Return the name of a file about a picture: "cat.jpg" becomes "cat-boxes.json". */
export function pictureFile(name, ending) {
  return `${name.replace(/\.[^.]*$/u, "")}-boxes.${ending}`;
}

/** Let the browser save a file. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
