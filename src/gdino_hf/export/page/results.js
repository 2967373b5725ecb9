// From the model's outputs to boxes with labels, by the rules of gdino_hf.model.grounded_results.

const sigmoid = (x) => Math.fround(1 / (1 + Math.exp(-x)));

/**
 * Return the score of each label for each query: that of the label's best token.
 *
 * @param {Float32Array} logits (queries, columns) of one prompt.
 * @param {number} columns
 * @param {{labels: number[], spans: [number, number][]}} prompt
 * @returns {Float32Array[]} One array of scores in 0..1 for each query.
 */
export function labelScores(logits, columns, prompt) {
  const queries = logits.length / columns;
  return Array.from({ length: queries }, (_, query) =>
    Float32Array.from(prompt.spans, ([start, end]) => {
      let best = -Infinity;
      for (let token = start; token < end; token += 1) best = Math.max(best, logits[query * columns + token]);
      return sigmoid(best);
    }),
  );
}

/**
 * Return the boxes that pass a threshold, best first. A query gets its best label.
 *
 * @param {{scores: Float32Array[], boxes: Float32Array, labels: number[]}[]} outputs Scores (queries, labels), boxes
 *   (queries, 4) as centre and size in 0..1, and label indices, of each prompt.
 * @param {{threshold: number, overlap: number | null, width: number, height: number}} options `overlap` is the
 *   intersection over union above which the lower-scoring of two boxes of one label is dropped; null keeps both.
 * @returns {{label: number, score: number, box: [number, number, number, number]}[]} Boxes as left, top, right and
 *   bottom in pixels.
 */
export function selectBoxes(outputs, { threshold, overlap, width, height }) {
  const found = [];
  for (const { scores, boxes, labels } of outputs) {
    scores.forEach((row, query) => {
      let winner = 0;
      row.forEach((score, place) => {
        if (score > row[winner]) winner = place;
      });
      if (!(row[winner] > Math.fround(threshold))) return;
      const [x, y, w, h] = boxes.subarray(query * 4, query * 4 + 4);
      const box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height];
      found.push({ label: labels[winner], score: row[winner], box });
    });
  }
  found.sort((a, b) => b.score - a.score);
  if (overlap === null) return found;
  const kept = [];
  for (const each of found) {
    if (!kept.some((other) => other.label === each.label && intersectionOverUnion(other.box, each.box) > overlap)) {
      kept.push(each);
    }
  }
  return kept;
}

/**
 * Return the highest score of each label over all queries, found or not.
 *
 * @param {{scores: Float32Array[], labels: number[]}[]} outputs
 * @param {number} count Number of labels.
 */
export function presence(outputs, count) {
  const best = new Float32Array(count);
  for (const { scores, labels } of outputs) {
    for (const row of scores) row.forEach((score, place) => (best[labels[place]] = Math.max(best[labels[place]], score)));
  }
  return best;
}

const area = ([left, top, right, bottom]) => Math.max(0, right - left) * Math.max(0, bottom - top);

function intersectionOverUnion(a, b) {
  const shared = area([Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])]);
  const union = area(a) + area(b) - shared;
  return union > 0 ? shared / union : 0;
}
