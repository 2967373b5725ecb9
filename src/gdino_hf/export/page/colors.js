// The colour of a label: the same in every picture, and the same as in gdino_hf.visualize.

/**
 * Return the colour of a label and that of text on it.
 *
 * @param {string} label Compared without case.
 * @returns {Promise<{box: string, ink: string}>} CSS colours.
 */
export async function labelColor(label) {
  const code = await hash(label.trim().toLowerCase());
  const [red, green, blue] = fromHls((code % 360) / 360, [0.47, 0.55, 0.63][Math.floor(code / 360) % 3], 0.9);
  const linear = [red, green, blue].map((c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  const ink = (luminance + 0.05) ** 2 > 1.05 * 0.05 ? "black" : "white";
  return { box: `rgb(${red}, ${green}, ${blue})`, ink };
}

async function hash(text) {
  const bytes = new TextEncoder().encode(text);
  // Pages without https have no SHA-256; their colours differ from those of gdino_hf.
  if (!self.crypto?.subtle) return bytes.reduce((sum, byte) => (Math.imul(sum, 31) + byte) >>> 0, 7);
  return new DataView(await crypto.subtle.digest("SHA-256", bytes)).getUint32(0);
}

function fromHls(hue, lightness, saturation) {
  const high = lightness <= 0.5 ? lightness * (1 + saturation) : lightness + saturation - lightness * saturation;
  const low = 2 * lightness - high;
  return [hue + 1 / 3, hue, hue - 1 / 3].map((turned) => {
    const at = ((turned % 1) + 1) % 1;
    const rise = (share) => low + (high - low) * share;
    const value = at < 1 / 6 ? rise(at * 6) : at < 1 / 2 ? high : at < 2 / 3 ? rise((2 / 3 - at) * 6) : low;
    return Math.round(value * 255);
  });
}
