// From a picture file to the model's input: decoding, Pillow's resize, and normalization.

const PRECISION = 22; // bits after the binary point of Pillow's fixed-point weights
const STRIP_PIXELS = 4_000_000; // pixels of the picture that are copied out of the bitmap at a time

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Pillow's filters by their number: how far each reaches, and its weight at a distance.
const FILTERS = {
  1: { reach: 3, weight: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) }, // Lanczos
  2: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) }, // bilinear
  3: { reach: 2, weight: cubic },
  4: { reach: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) }, // box
  5: { reach: 1, weight: (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0) }, // Hamming
};

function cubic(x) {
  const a = -0.5;
  const d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
}

/**
 * Decode a picture. It is turned as its EXIF orientation says, and its colours are read as they are stored, as Pillow
 * does.
 *
 * @param {Blob} file
 * @param {number} mostPixels Largest number of pixels that a picture may have.
 * @returns {Promise<ImageBitmap>}
 */
export async function decode(file, mostPixels) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {
      imageOrientation: "from-image",
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Error(`${file.name ?? "The file"} is not a picture this browser can read; give a JPEG, PNG or WebP file.`);
  }
  const { width, height } = bitmap;
  if (width * height > mostPixels) {
    bitmap.close();
    throw new Error(
      `The picture has ${Math.round((width * height) / 1e6)} million pixels and ${Math.round(mostPixels / 1e6)} ` +
        "million are allowed; make it smaller.",
    );
  }
  return bitmap;
}

/**
 * Return the (height, width) that a picture has after resizing.
 *
 * @param {number} height
 * @param {number} width
 * @param {Object | null} size The image processor's `size`, with one of its pairs of edges; null keeps the size.
 */
export function targetSize(height, width, size) {
  if (size === null) return [height, width];
  if ("height" in size) return [size.height, size.width];
  if ("max_height" in size) {
    const scale = Math.min(size.max_height / height, size.max_width / width);
    return [Math.max(1, Math.trunc(height * scale)), Math.max(1, Math.trunc(width * scale))];
  }
  const [short, long] = height < width ? [height, width] : [width, height];
  if (!("shortest_edge" in size)) {
    const scale = size.longest_edge / long;
    return [Math.max(1, roundHalfEven(height * scale)), Math.max(1, roundHalfEven(width * scale))];
  }
  let edge = size.shortest_edge;
  const longest = size.longest_edge ?? Infinity;
  let exact = null;
  if ((long / short) * edge > longest) {
    exact = (longest * short) / long;
    if (exact < 0.5) return height > width ? [longest, 1] : [1, longest];
    edge = roundHalfEven(exact);
  }
  if (edge === short) return [height, width];
  const other = Math.max(1, Math.trunc(((exact ?? edge) * long) / short));
  return height < width ? [Math.max(1, edge), other] : [other, Math.max(1, edge)];
}

// As Python's round: a half goes to the even neighbour.
function roundHalfEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

/**
 * Return for each position of the output where its weights begin in the input, and the weights as whole numbers.
 *
 * A filter that shrinks reaches over all the pixels that become one, so that fine patterns are averaged.
 *
 * @param {number} from Number of pixels of the input.
 * @param {number} to Number of pixels of the output.
 * @param {number} resample Number of Pillow's filter.
 * @returns {{starts: Int32Array, counts: Int32Array, weights: Int32Array, stride: number}}
 */
export function resizeWeights(from, to, resample) {
  if (resample === 0) return nearestWeights(from, to);
  const { reach, weight } = FILTERS[resample];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = reach * stretch;
  const stride = Math.ceil(support) * 2 + 1;
  const starts = new Int32Array(to);
  const counts = new Int32Array(to);
  const weights = new Int32Array(to * stride);
  const row = new Float64Array(stride);
  for (let place = 0; place < to; place += 1) {
    const center = (place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - support + 0.5));
    const count = Math.min(from, Math.trunc(center + support + 0.5)) - start;
    let total = 0;
    for (let i = 0; i < count; i += 1) {
      row[i] = weight((i + start - center + 0.5) * (1 / stretch));
      total += row[i];
    }
    for (let i = 0; i < count; i += 1) {
      const share = (total === 0 ? row[i] : row[i] / total) * 2 ** PRECISION;
      weights[place * stride + i] = Math.trunc(share + (share < 0 ? -0.5 : 0.5));
    }
    starts[place] = start;
    counts[place] = count;
  }
  return { starts, counts, weights, stride };
}

function nearestWeights(from, to) {
  const starts = Int32Array.from({ length: to }, (_, place) => Math.min(from - 1, Math.floor((place + 0.5) * (from / to))));
  return { starts, counts: new Int32Array(to).fill(1), weights: new Int32Array(to).fill(2 ** PRECISION), stride: 1 };
}

const HALF = 2 ** (PRECISION - 1);

// The sums stay below 2^31: weights add up to 2^22, and the lobes of Lanczos add a fifth at most.
const toByte = (sum) => {
  const value = sum >> PRECISION;
  return value < 0 ? 0 : value > 255 ? 255 : value;
};

// RGBA rows of a picture to rows of another width; the result has three channels.
function resizeRows(source, rows, width, across, target, firstRow) {
  const to = across.starts.length;
  for (let y = 0; y < rows; y += 1) {
    for (let x = 0; x < to; x += 1) {
      const count = across.counts[x];
      const base = x * across.stride;
      let at = (y * width + across.starts[x]) * 4;
      let red = HALF;
      let green = HALF;
      let blue = HALF;
      for (let i = 0; i < count; i += 1, at += 4) {
        const weight = across.weights[base + i];
        red += source[at] * weight;
        green += source[at + 1] * weight;
        blue += source[at + 2] * weight;
      }
      const out = ((firstRow + y) * to + x) * 3;
      target[out] = toByte(red);
      target[out + 1] = toByte(green);
      target[out + 2] = toByte(blue);
    }
  }
}

// Three-channel pixels to another height; the values of one row stand beside each other, so the loop goes along rows.
function resizeColumns(source, width, down) {
  const row = width * 3;
  const target = new Uint8Array(down.starts.length * row);
  const sums = new Int32Array(row);
  for (let y = 0; y < down.starts.length; y += 1) {
    sums.fill(HALF);
    for (let i = 0; i < down.counts[y]; i += 1) {
      const weight = down.weights[y * down.stride + i];
      const at = (down.starts[y] + i) * row;
      for (let x = 0; x < row; x += 1) sums[x] += source[at + x] * weight;
    }
    for (let x = 0; x < row; x += 1) target[y * row + x] = toByte(sums[x]);
  }
  return target;
}

/**
 * Resize a picture as Pillow does: first along rows, rounding to bytes, then along columns.
 *
 * @param {ImageBitmap} bitmap
 * @param {[number, number]} size Height and width of the result.
 * @param {number} resample Number of Pillow's filter.
 * @returns {Uint8Array} (height, width, 3) red, green and blue.
 */
export function resize(bitmap, [height, width], resample) {
  const across = resizeWeights(bitmap.width, width, resample);
  const down = resizeWeights(bitmap.height, height, resample);
  const narrow = new Uint8Array(bitmap.height * width * 3);
  const strip = Math.max(1, Math.min(bitmap.height, Math.floor(STRIP_PIXELS / bitmap.width)));
  const canvas = new OffscreenCanvas(bitmap.width, strip);
  const context = canvas.getContext("2d", { willReadFrequently: true, alpha: true });
  for (let top = 0; top < bitmap.height; top += strip) {
    const rows = Math.min(strip, bitmap.height - top);
    context.clearRect(0, 0, bitmap.width, strip);
    context.drawImage(bitmap, 0, -top);
    const { data } = context.getImageData(0, 0, bitmap.width, rows);
    resizeRows(data, rows, bitmap.width, across, narrow, top);
  }
  return resizeColumns(narrow, width, down);
}

/**
 * Return the model's input for the bytes of a picture.
 *
 * @param {Uint8Array} pixels (height, width, 3) bytes.
 * @param {Object} image Options of the image processor.
 * @returns {Float32Array} (3, height, width)
 */
export function normalize(pixels, image) {
  const area = pixels.length / 3;
  const values = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel += 1) {
    const table = Float32Array.from({ length: 256 }, (_, level) => {
      const scaled = Math.fround(level * Math.fround(image.rescale_factor));
      return Math.fround(scaled - Math.fround(image.mean[channel])) / Math.fround(image.std[channel]);
    });
    for (let i = 0; i < area; i += 1) values[channel * area + i] = table[pixels[i * 3 + channel]];
  }
  return values;
}
